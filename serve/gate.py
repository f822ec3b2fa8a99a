"""Gate: checks API key, content type and size of every request, before a byte of it is parsed."""

import base64
import binascii
import hashlib
import hmac
import json
import os
import uuid

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from seap_ray.config import LOOPBACK
from serve.errors import ApiError, to_api_error
from serve.keys import KEYS_VARIABLE, ApiKeys, KeyRing

PROXY_VARIABLE = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Ray Serve's variable with the middleware of its proxies, which read it when they start."""
MAX_HEAD_BYTES = 1 << 16
"""Bytes of a request's path and headers; browsers and clients send some thousand at most."""
OPEN_PATHS = ("/healthz", "/readyz")
"""Paths that are answered without a key."""
FORWARDED_HEADERS = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
"""Headers of a proxy, which may pass requests on from other machines."""
UNROUTED = b"Ping http://.../-/routes for available routes."
"""Text in the 404 of Serve's own proxy."""


def prepare_environment() -> None:
    """Prepare the environment of a cluster that starts here.

    Its proxies get ``ProxyGate`` and a minute to start, and none of its processes inherits the API keys.
    """
    os.environ.setdefault(PROXY_VARIABLE, "serve.gate:proxy_middleware")
    # Serve ends a proxy that is not up in five seconds, in which a busy machine has not even imported it.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "60")
    os.environ.pop(KEYS_VARIABLE, None)


class Gate:
    """Outermost ASGI middleware: nothing behind it sees a request without a valid key."""

    def __init__(self, app: ASGIApp, *, keys: ApiKeys | None, operators: ApiKeys | None = None, max_body_bytes: int):
        self.app = app
        self.key_ring = KeyRing(keys) if keys else None
        self.operator_ring = KeyRing(operators) if operators else None
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on if it may be answered, and answer every error before the response has begun."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":  # nothing here speaks over web sockets; 1008 is "policy violation"
            return await send({"type": "websocket.close", "code": 1008})

        # The id under which the log has an unexpected error, which the client reads in the answer.
        request_id = Headers(scope=scope).get("x-request-id") or uuid.uuid4().hex
        has_started = False

        async def send_and_note(message: Message) -> None:
            """Send a message, and note when it begins the response."""
            nonlocal has_started
            has_started = has_started or message["type"] == "http.response.start"
            await send(message)

        try:
            self._admit(scope)
            body = await self._body(scope, receive)
            if body is None:  # nobody is there to read an answer
                return

            _check_text(body)
            await self.app(scope, _replay(body, receive), send_and_note)
        except Exception as error:
            if has_started:  # the client has a status already, so all that is left is to close the connection
                raise

            # Only completions have bodies that vLLM's own classes parse; the ingress notes when that is over.
            is_parsed = scope.get("state", {}).get("is_parsed", not _path(scope).endswith("completions"))
            refusal = to_api_error(error, request_id, is_parsed=is_parsed)
            await refusal.response(scope, receive, send_and_note)

    def _admit(self, scope: Scope) -> None:
        """Raise ApiError 401, 403, 415 or 431 for a request that may not pass, from its headers alone.

        The request's state has whether it may change how experts stand: see ``check_operator``.
        """
        _check_size_of_head(scope)
        if _path(scope) in OPEN_PATHS and scope["method"] in ("GET", "HEAD"):
            return

        headers = Headers(scope=scope)
        authorization = headers.get("authorization", "")
        is_operator = self.operator_ring is None or _has_key(self.operator_ring, authorization)
        scope.setdefault("state", {})["is_operator"] = is_operator
        if self.key_ring is None:
            _admit_local(scope, headers)
        # An operator's key is an API key, too.
        elif not _has_key(self.key_ring, authorization) and not (self.operator_ring and is_operator):
            message = "a valid API key is needed: Authorization: Bearer KEY"
            # A browser that opens the playground asks for a password (the key), and then sends it by itself.
            basic = 'Basic realm="seap_ray: the API key is the password", charset="UTF-8"'
            challenge = {"www-authenticate": basic if _path(scope) == "/" else "Bearer"}
            raise ApiError(401, message, code="invalid_api_key", headers=challenge)

        # A page of another site can send a browser's POST only as text or a form, unless this server agrees.
        if scope["method"] == "POST" and not _is_json(headers.get("content-type", "")):
            raise ApiError(415, "the request body should be JSON, and say so: Content-Type: application/json")

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """Return the whole body; None when the client left before its end. Raises ApiError 413 when it is too large."""
        too_large = ApiError(413, f"the request body is larger than {self.max_body_bytes:,} bytes")
        # The declared length refuses early; since it may be missing or wrong, the bytes are counted as well.
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_body_bytes:
            raise too_large

        chunks: list[bytes] = []
        size = 0
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


def _check_size_of_head(scope: Scope) -> None:
    """Raise ApiError 431 for a path and headers that are too large; not every server in front has a limit."""
    n_bytes = len(scope["path"]) + len(scope.get("query_string", b""))
    n_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
    if n_bytes > MAX_HEAD_BYTES:
        raise ApiError(431, f"path and headers are larger than {MAX_HEAD_BYTES:,} bytes")


def check_operator(request: Request) -> None:
    """Raise ApiError 403 for a request whose key is not an operator's, where there are such keys."""
    if not request.state.is_operator:
        raise ApiError(403, "this needs the key of an operator (serve.guard.operator_keys_file)")


def _path(scope: Scope) -> str:
    """Return the path of a request without the prefix that the application is served under."""
    path, prefix = scope["path"], scope.get("root_path", "").rstrip("/")
    return path[len(prefix) :] or "/" if path == prefix or path.startswith(f"{prefix}/") else path


def _has_key(key_ring: KeyRing, authorization: str) -> bool:
    """Return whether a header holds a valid key, as a bearer token or as a basic password."""
    scheme, _, credentials = authorization.partition(" ")
    # Browsers know the basic scheme alone; of user:password the password is the key.
    if scheme.lower() == "basic":
        try:
            key = base64.b64decode(credentials, validate=True).partition(b":")[2]
        except (binascii.Error, ValueError):
            return False
    else:
        key = credentials.strip().encode("latin-1", "replace") if scheme.lower() == "bearer" else b""

    # All are compared, each in constant time, so that the time taken says nothing about any key.
    offered = hashlib.sha256(key).digest()
    n_equal = sum(hmac.compare_digest(offered, key_hash) for key_hash in key_ring.hashes())
    return n_equal > 0


def _admit_local(scope: Scope, headers: Headers) -> None:
    """Raise ApiError 403 for a request that does not come from this machine.

    The host is checked as well: a page of another site may have a name that resolves to this machine.
    """
    client = (scope.get("client") or ("",))[0]
    # Without the port, and without the brackets of an IPv6 address.
    host = headers.get("host", "").rsplit(":", 1)[0].strip("[]")
    if client not in LOOPBACK or host not in LOOPBACK or any(map(headers.get, FORWARDED_HEADERS)):
        raise ApiError(403, "without API keys (serve.auth=none) only clients on the same machine are answered")


def _is_json(content_type: str) -> bool:
    """Return whether a content type is JSON or a format on top of it."""
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))


def _check_text(body: bytes) -> None:
    """Raise ApiError 400 for a body that is not UTF-8, or whose JSON escapes a lone surrogate.

    JSON can spell half of a surrogate pair, which UTF-8 cannot hold. Each layer behind would fail on it in its own
    way. A body that is no JSON is left to the parser.
    """
    if not _is_utf8(body):
        raise ApiError(400, "the request body should be JSON in UTF-8")
    # Parsing twice costs time, and only an escape in the surrogates' range, \uD800 to \uDFFF, can be at fault.
    if b"\\ud" not in body.lower():
        return

    # A pair is decoded to one character, which encodes; half of one does not.
    try:
        json.dumps(json.loads(body), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ApiError(400, "the request's text holds a lone surrogate, which is no character") from None
    except (ValueError, RecursionError):
        return


def _is_utf8(body: bytes) -> bool:
    """Return whether a body is UTF-8. Python's JSON parser would also accept UTF-16, UTF-32 and surrogates."""
    if not json.detect_encoding(body).startswith("utf-8"):
        return False

    try:
        body.decode()
    except UnicodeDecodeError:
        return False

    return True


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a channel that delivers the whole body at once, then what comes after it (a client that leaves)."""
    is_delivered = False

    async def replay() -> Message:
        """Receive the next message."""
        nonlocal is_delivered
        if is_delivered:
            return await receive()
        is_delivered = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


class ProxyGate:
    """Middleware of Serve's own proxy.

    The proxy's ``/-/routes`` would list what is served to anybody, and its 404 would tell clients to give up on a
    service that is being started or taken down.
    """

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hide the proxy's own routes, and answer 503 in place of its 404 for a missing application."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        if scope["path"].startswith("/-/") and scope["path"] != "/-/healthz":
            return await ApiError(404, "Not Found").response(scope, receive, send)

        held_start: Message | None = None

        async def send_or_replace(message: Message) -> None:
            """Hold the start of a 404 back until its body says whether it is the proxy's or the application's."""
            nonlocal held_start
            if message["type"] == "http.response.start" and message["status"] == 404:
                held_start = message
                return

            start = held_start
            held_start = None
            if start and UNROUTED in message.get("body", b""):
                return await _service_down().response(scope, receive, send)

            if start:
                await send(start)

            await send(message)

        await self.app(scope, receive, send_or_replace)


def _service_down() -> ApiError:
    """Return the answer while the application is being started or taken down."""
    return ApiError(503, "the service is being started or taken down", code="service_down", retry_after=10)


def proxy_middleware() -> list[Middleware]:
    """Return the middleware of Serve's proxies; ``PROXY_VARIABLE`` names this function."""
    return [Middleware(ProxyGate)]
