"""Gate: what every request passes first, before a byte of it is parsed: API key, content type, size."""

import base64
import binascii
import hashlib
import hmac
import json
import os
import uuid
from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seap_ray.config import LOOPBACK, ServeSection
from seap_ray.errors import ConfigError
from serve.errors import ApiError, known

KEYS_VARIABLE = "SEAP_API_KEYS"
PROXY_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Serve's own: what its proxies put before themselves. They read it as they start."""
SHORTEST = 16
"""Characters of a key; what can be guessed is none."""
OPEN = ("/healthz", "/readyz")
"""Paths that are answered without a key."""
FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers of a proxy, which speaks for clients elsewhere."""
UNROUTED = b"Ping http://.../-/routes for available routes."
"""In Serve's own 404."""


def key_hashes(config: ServeSection) -> tuple[bytes, ...] | None:
    """SHA-256 of the API keys, which travel in the keys' place; None when authentication is off.

    Raises ConfigError when keys are asked for and there are none.
    """
    if config.auth == "none":
        return None
    if config.api_keys_file:
        where = f"serve.api_keys_file: {config.api_keys_file}"
        try:
            text = Path(config.api_keys_file).expanduser().read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{where} cannot be read ({getattr(error, 'strerror', None) or 'no text'})") from None
    else:
        where, text = KEYS_VARIABLE, os.environ.get(KEYS_VARIABLE, "").replace(",", "\n")
    lines = [line.strip() for line in text.splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(
            f"{where} holds no API key; set {KEYS_VARIABLE}, or serve.api_keys_file, or, to answer this machine alone, "
            "serve.auth=none"
        )
    for number, key in enumerate(keys, 1):
        if len(key) < SHORTEST:
            raise ConfigError(
                f"{where}: key {number} has under {SHORTEST} characters; `openssl rand -hex 16` makes a good one"
            )
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def close_environment() -> None:
    """For a cluster that starts here: its proxies get their gate, and none of its processes inherits the keys."""
    os.environ.setdefault(PROXY_VARIABLE, "serve.gate:proxy_middleware")
    os.environ.pop(KEYS_VARIABLE, None)


class Gate:
    """ASGI middleware; the outermost, so that nothing behind it sees a request without a key."""

    def __init__(self, app: ASGIApp, *, key_hashes: Sequence[bytes] | None, max_body_bytes: int):
        self.app, self.key_hashes, self.max_body_bytes = app, key_hashes, max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        started = False

        async def noted(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._admit(scope)
            body = await self._body(scope, receive)
            if body is None:
                return
            _check_text(body)
            await self.app(scope, _replay(body, receive), noted)
        except Exception as error:
            if started:  # the client has a status already; the connection ends
                raise
            is_parsed = scope.get("state", {}).get("is_parsed", not _path(scope).endswith("completions"))
            await known(error, request_id, is_parsed=is_parsed).response(scope, receive, noted)

    def _admit(self, scope: Scope) -> None:
        if _path(scope) in OPEN and scope["method"] in ("GET", "HEAD"):
            return
        headers = Headers(scope=scope)
        if self.key_hashes is None:
            _admit_local(scope, headers)
        elif not self._has_key(headers.get("authorization", "")):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            # A browser that opens the page asks for a password (the key), and then sends it along by itself.
            basic = 'Basic realm="seap_ray: the API key is the password", charset="UTF-8"'
            challenge = {"www-authenticate": basic if _path(scope) == "/" else "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            raise ApiError(415, "the request body should be JSON, and say so: Content-Type: application/json")

    def _has_key(self, authorization: str) -> bool:
        scheme, _, credentials = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(credentials, validate=True).partition(b":")[2]
            except (binascii.Error, ValueError):
                return False
        else:
            key = credentials.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""
        offered = hashlib.sha256(key).digest()
        # All are compared, each in constant time: how long it takes says nothing about any key.
        return sum(hmac.compare_digest(offered, known) for known in self.key_hashes or ()) > 0

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body; None when the client left before its end. Raises ApiError 413."""
        too_large = ApiError(413, f"the request body is larger than {self.max_body_bytes:,} bytes")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise too_large
        chunks, size = [], 0
        while True:
            message = await receive()
            if message["type"] != "http.request":
                return None
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.max_body_bytes:
                raise too_large
            if not message.get("more_body"):
                break
        return b"".join(chunks)


def _path(scope: Scope) -> str:
    """Without the prefix that the application is served under."""
    path, prefix = scope["path"], scope.get("root_path", "").rstrip("/")
    return path[len(prefix) :] or "/" if path == prefix or path.startswith(f"{prefix}/") else path


def _admit_local(scope: Scope, headers: Headers) -> None:
    """Without keys only this machine is answered, and no page that another site's script has loaded under a name."""
    client = (scope.get("client") or ("",))[0]
    host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
    if client not in LOOPBACK or host not in LOOPBACK or any(map(headers.get, FORWARDED)):
        raise ApiError(403, "without API keys (serve.auth=none) only clients on the same machine are answered")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _check_text(body: bytes) -> None:
    """JSON can spell halves of characters that no UTF-8 holds; each layer behind fails on them in its own way.

    Raises ApiError 400. What is no JSON is left to the parser.
    """
    if not _is_utf8(body):
        raise ApiError(400, "the request body should be JSON in UTF-8")
    if b"\\ud" not in body.lower():
        return
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the request's text holds a lone surrogate, which is no character") from None
    except (ValueError, RecursionError):
        return


def _is_utf8(body: bytes) -> bool:
    """The parser would guess at UTF-16 and 32, and let the bytes of halves pass."""
    if not json.detect_encoding(body).startswith("utf-8"):
        return False
    try:
        body.decode()
    except UnicodeDecodeError:
        return False
    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """A channel that gives the whole body at once, then whatever comes after (a client that leaves)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class ProxyGate:
    """Before Serve's own proxy, whose ``/-/routes`` would tell what it serves without a key, and whose 404 would tell
    clients to give up on a service that is being started or taken down."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith("/-/") and scope["path"] != "/-/healthz":
            return await ApiError(404, "Not Found").response(scope, receive, send)
        held: Message | None = None

        async def mended(message: Message) -> None:
            nonlocal held
            if message["type"] == "http.response.start" and message["status"] == 404:
                held = message  # the body will say whose it is
                return
            start, held = held, None
            if start and UNROUTED in message.get("body", b""):
                return await _away().response(scope, receive, send)
            if start:
                await send(start)
            await send(message)

        await self.app(scope, receive, mended)


def _away() -> ApiError:
    return ApiError(503, "the service is being started or taken down", code="service_down", retry_after=10)


def proxy_middleware() -> list[Middleware]:
    """What PROXY_VARIABLE names."""
    return [Middleware(ProxyGate)]
