"""The gate, in front of an application that says what reached it."""

import asyncio
import base64
import codecs
import json
import os
from types import SimpleNamespace

import httpx
import pytest
from fastapi import FastAPI, Request
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator
from starlette.responses import PlainTextResponse

from seap_ray.config import ServeSection, load_config
from seap_ray.errors import ConfigError
from serve import gate
from serve.errors import add_handlers
from serve.gate import OPEN_PATHS, Gate, check_operator, prepare_environment, proxy_middleware
from serve.keys import KEYS_VARIABLE, LOOK_EVERY_S, read_keys, read_operator_keys

KEYS = "alpha-key-of-team-a, beta-key-of-team-b"
ONE, TWO = "the-first-key-there-is", "the-second-key-there-is"


class Body(BaseModel):
    text: str
    number: int = 0

    @field_validator("number")
    @classmethod
    def _trips(cls, number):
        return [][number] if number else 0  # as vLLM's validators do at values nobody thought of


def app(keys, max_body_bytes=1000, operators=None):
    made = FastAPI(docs_url=None, redoc_url=None)
    add_handlers(made)
    made.add_middleware(Gate, keys=keys, operators=operators, max_body_bytes=max_body_bytes)
    made.state.reached = []

    @made.get("/{path:path}")
    async def read(path: str):
        made.state.reached.append(path)
        return PlainTextResponse("read")

    @made.post("/guard")
    async def guard(request: Request):
        check_operator(request)
        return PlainTextResponse("done")

    @made.post("/write/completions")
    async def write(body: Body, request: Request):
        request.state.is_parsed = True
        made.state.reached.append("write")
        if body.text == "fail":
            raise ValueError("secret detail")
        return {"length": len(body.text)}

    return made


@pytest.fixture
def keyed(monkeypatch):
    monkeypatch.setenv("SEAP_API_KEYS", KEYS)
    return app(read_keys(ServeSection()))


def call(target, method, path, client=("127.0.0.1", 1), host="127.0.0.1", **kwargs):
    async def one():
        transport = httpx.ASGITransport(target, client=client, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=f"http://{host}") as http:
            return await http.request(method, path, **kwargs)

    return asyncio.run(one())


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def error_of(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in response.text
    return error


# --- keys ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["alpha-key-of-team-a", "beta-key-of-team-b"])
def test_each_key_opens(keyed, key):
    assert call(keyed, "GET", "/x", headers=bearer(key)).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer(""),
        bearer("alpha-key"),
        bearer("alpha-key-of-team-a "[:-2]),
        bearer("alpha-key-of-team-a,beta-key-of-team-b"),
        {"authorization": "alpha-key-of-team-a"},
        {"authorization": "Basic alpha-key-of-team-a"},
        {"authorization": "Basic " + base64.b64encode(b"alpha-key-of-team-a").decode()},
        {"authorization": "Basic " + base64.b64encode(b"alpha-key-of-team-a:").decode()},
        {"x-api-key": "alpha-key-of-team-a"},
        {"authorization": b"Bearer \xff\xfe"},
    ],
)
@pytest.mark.parametrize(
    "path", ["/", "/v1/models", "/metrics", "/openapi.json", "/healthz/", "/healthz/x", "//healthz"]
)
def test_nothing_is_reached_without_a_key(keyed, headers, path):
    response = call(keyed, "GET", path, headers=headers)
    assert (response.status_code, keyed.state.reached) == (401, [])
    assert error_of(response)["code"] == "invalid_api_key"


@given(st.text(st.characters(codec="latin-1", exclude_characters="\r\n\0"), max_size=40))
def test_no_text_but_the_keys_opens(value):
    target = app(keys_of("alpha-key-of-team-a", "beta-key-of-team-b"))
    opened = call(target, "GET", "/x", headers={"authorization": value.encode("latin-1")}).status_code == 200
    assert opened == (
        value.strip().lower().startswith("bearer ")
        and value.strip()[7:].strip() in ("alpha-key-of-team-a", "beta-key-of-team-b")
    )


def keys_of(*keys):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEAP_API_KEYS", ",".join(keys))
        return read_keys(ServeSection())


@pytest.mark.parametrize("path", OPEN_PATHS)
def test_health_is_answered_without_a_key(keyed, path):
    assert call(keyed, "GET", path).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_health_is_read_and_nothing_else(keyed, method):
    assert call(keyed, method, "/healthz").status_code == 401


def test_a_prefix_of_the_service_opens_no_other_path(keyed):
    async def status(path):
        sent = []

        async def send(message):
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"", "more_body": False}

        scope = {"type": "http", "method": "GET", "path": path, "root_path": "/app", "headers": [], "query_string": b""}
        await Gate(keyed, keys=keys_of("alpha-key-of-team-a"), max_body_bytes=10)(scope, receive, send)
        return sent[0]["status"]

    assert asyncio.run(status("/apphealthz")) == asyncio.run(status("/app/x/healthz")) == 401
    assert asyncio.run(status("/app/healthz")) != 401


def test_serves_own_routes_are_not_told():
    [middleware] = proxy_middleware()
    target = middleware.cls(app(None))
    assert [call(target, "GET", path).status_code for path in ("/-/routes", "/-/x")] == [404, 404]
    assert call(target, "GET", "/-/healthz").status_code != 404  # Serve's own answer


def test_a_service_that_starts_or_stops_is_503_and_not_serves_404():
    from ray.serve._private.proxy import HTTPProxy

    async def unrouted(scope, receive, send):
        async for message in HTTPProxy.not_found_response(None, SimpleNamespace(path=scope["path"])):
            if isinstance(message, dict):
                await send(message)

    [middleware] = proxy_middleware()
    response = call(middleware.cls(unrouted), "POST", "/v1/completions")
    assert (response.status_code, error_of(response)["type"]) == (503, "overloaded_error")
    assert int(response.headers["retry-after"]) > 0


def test_what_an_application_does_not_find_stays_404(keyed):
    [middleware] = proxy_middleware()
    response = call(middleware.cls(keyed), "POST", "/v1/nowhere", json={}, headers=bearer("alpha-key-of-team-a"))
    assert response.status_code == 405 and error_of(response)["message"] == "Method Not Allowed"


def test_a_browser_is_asked_for_the_key_and_sends_it_as_a_password(keyed):
    challenge = call(keyed, "GET", "/").headers["www-authenticate"]
    assert challenge.startswith("Basic ")
    assert call(keyed, "GET", "/", auth=("anybody", "beta-key-of-team-b")).status_code == 200
    assert call(keyed, "GET", "/v1/models").headers["www-authenticate"] == "Bearer"


def test_keys_come_from_a_file_one_a_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAP_API_KEYS", "not-this-one-of-all")
    (tmp_path / "keys").write_text(f"# of both teams\n{ONE}\n\n  {TWO}  \n")
    target = app(read_keys(ServeSection(api_keys_file=str(tmp_path / "keys"))))
    found = [
        key
        for key in (ONE, TWO, "# of both teams", "not-this-one-of-all")
        if call(target, "GET", "/x", headers=bearer(key)).is_success
    ]
    assert found == [ONE, TWO]


def test_a_file_that_changes_rotates_the_keys_and_one_that_is_wrong_takes_none_away(tmp_path, monkeypatch, caplog):
    now = [1000.0]
    monkeypatch.setattr("serve.keys.time.monotonic", lambda: now[0])
    file = tmp_path / "keys"
    file.write_text(ONE)
    target = app(read_keys(ServeSection(api_keys_file=str(file))))

    def valid():
        return [key for key in (ONE, TWO) if call(target, "GET", "/x", headers=bearer(key)).is_success]

    assert valid() == [ONE]
    file.write_text(TWO)
    assert valid() == [ONE], "the file is looked at once a second"
    now[0] += LOOK_EVERY_S
    assert valid() == [TWO]

    # Replaced, as editors and Kubernetes do it, with the same length and time.
    about = file.stat()
    (tmp_path / "new").write_text(ONE[: len(TWO)].ljust(len(TWO), "x"))
    os.utime(tmp_path / "new", ns=(about.st_atime_ns, about.st_mtime_ns))
    os.replace(tmp_path / "new", file)
    now[0] += LOOK_EVERY_S
    assert valid() == ([ONE] if len(ONE) == len(TWO) else [])

    file.write_text(f"{ONE}\n{TWO}")
    now[0] += LOOK_EVERY_S
    assert valid() == [ONE, TWO]
    for wrong in ("", "hunter2", "# nothing"):
        file.write_text(wrong)
        now[0] += LOOK_EVERY_S
        assert valid() == [ONE, TWO]
    assert "the keys from before stay valid" in caplog.text and "hunter2" not in caplog.text
    file.unlink()
    now[0] += LOOK_EVERY_S
    assert valid() == [ONE, TWO], "a node may not have the file"


def test_where_there_are_keys_of_operators_no_other_key_may_change_how_experts_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("SEAP_API_KEYS", KEYS)
    (tmp_path / "operators").write_text(ONE)
    config = ServeSection(guard={"operator_keys_file": str(tmp_path / "operators")})
    target = app(read_keys(config), operators=read_operator_keys(config))

    def ask(method, path, key):
        return call(target, method, path, headers={**bearer(key), "content-type": "application/json"})

    refused = ask("POST", "/guard", "alpha-key-of-team-a")
    assert refused.status_code == 403 and error_of(refused)["type"] == "permission_error"
    assert ask("POST", "/guard", ONE).text == "done"
    assert ask("POST", "/guard", TWO).status_code == 401
    assert [ask("GET", "/x", key).status_code for key in ("alpha-key-of-team-a", ONE, TWO)] == [200, 200, 401]


def test_without_keys_of_operators_every_key_is_one(keyed):
    reply = call(keyed, "POST", "/guard", headers={**bearer(KEYS[:19]), "content-type": "application/json"})
    assert reply.text == "done"


def test_keys_of_operators_that_cannot_be_used_are_refused_by_the_name_of_their_key(tmp_path):
    def read(file):
        return read_operator_keys(ServeSection(guard={"operator_keys_file": str(tmp_path / file)}))

    with pytest.raises(ConfigError, match="^serve.guard.operator_keys_file: .*/none cannot be read"):
        read("none")
    (tmp_path / "short").write_text("hunter2")
    with pytest.raises(ConfigError, match="^serve.guard.operator_keys_file: .*/short: key 1 has under 16"):
        read("short")
    with pytest.raises(ConfigError, match="guard.operator_keys_file needs auth=keys"):
        load_config(["config=ray_config.yaml", "serve.auth=none", "serve.guard.operator_keys_file=keys"])


def test_keys_travel_as_hashes_only():
    assert b"alpha-key-of-team-a" not in b"".join(keys_of("alpha-key-of-team-a").hashes)


def test_no_keys_at_all_are_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("SEAP_API_KEYS", raising=False)
    with pytest.raises(ConfigError, match="SEAP_API_KEYS holds no API key; set SEAP_API_KEYS, or"):
        read_keys(ServeSection())
    with pytest.raises(ConfigError, match="serve.api_keys_file: .*/none cannot be read"):
        read_keys(ServeSection(api_keys_file=str(tmp_path / "none")))
    (tmp_path / "empty").write_text("\n")
    with pytest.raises(ConfigError, match="empty holds no API key"):
        read_keys(ServeSection(api_keys_file=str(tmp_path / "empty")))


def test_a_key_that_can_be_guessed_is_refused_and_not_repeated(monkeypatch):
    monkeypatch.setenv("SEAP_API_KEYS", "alpha-key-of-team-a,hunter2")
    with pytest.raises(ConfigError, match="SEAP_API_KEYS: key 2 has under 16 characters") as refused:
        read_keys(ServeSection())
    assert "hunter2" not in str(refused.value)


# --- no keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "host", "status"),
    [
        ("127.0.0.1", "127.0.0.1:8000", 200),
        ("127.0.0.1", "localhost", 200),
        ("::1", "[::1]:8000", 200),
        ("10.0.0.7", "127.0.0.1", 403),
        ("127.0.0.1", "rebound.example", 403),
        ("10.0.0.7", "10.0.0.1", 403),
    ],
)
def test_without_keys_this_machine_alone_is_answered(client, host, status):
    target = app(read_keys(ServeSection(auth="none")))
    assert call(target, "GET", "/x", client=(client, 1), host=host).status_code == status


@pytest.mark.parametrize("header", ["forwarded", "x-forwarded-for", "x-real-ip", "via"])
def test_without_keys_a_proxy_on_this_machine_is_not_this_machine(header):
    target = app(read_keys(ServeSection(auth="none")))
    assert call(target, "GET", "/x", headers={header: "10.0.0.7"}).status_code == 403


def test_without_keys_another_address_is_no_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("serve: {auth: none, host: 0.0.0.0}")
    with pytest.raises(
        ConfigError, match="serve: .*auth=none is for the hosts 127.0.0.1, localhost, ::1 only, not 0.0.0.0"
    ):
        load_config([f"config={tmp_path}/c.yaml"])


# --- bodies ----------------------------------------------------------------------------------------------------------


def post(target, **kwargs):
    headers = {**bearer("alpha-key-of-team-a"), "content-type": "application/json", **kwargs.pop("headers", {})}
    return call(target, "POST", "/write/completions", headers=headers, **kwargs)


def test_a_body_arrives_whole(keyed):
    assert post(keyed, content=json.dumps({"text": "é" * 100})).json() == {"length": 100}


@pytest.mark.parametrize("declared", [True, False])
def test_a_body_beyond_the_limit_is_refused_whether_it_says_so_or_not(keyed, declared):
    async def pieces():
        for _ in range(5):
            yield b"x" * 300

    response = post(keyed, content=b"x" * 1500 if declared else pieces())
    assert (response.status_code, keyed.state.reached) == (413, [])
    assert "larger than 1,000 bytes" in error_of(response)["message"]


@pytest.mark.parametrize("path", ["/x", "/healthz"])
def test_headers_and_paths_beyond_the_limit_are_refused(keyed, monkeypatch, path):
    monkeypatch.setattr(gate, "MAX_HEAD_BYTES", 400)
    key = bearer("alpha-key-of-team-a")
    assert call(keyed, "GET", path, headers=key).status_code == 200
    keyed.state.reached.clear()
    for response in (
        call(keyed, "GET", path, headers={**key, "x-more": "a" * 400}),
        call(keyed, "GET", path, headers={**key, **{f"x-{i}": "a" for i in range(100)}}),
        call(keyed, "GET", path + "?q=" + "a" * 400, headers=key),
    ):
        assert (response.status_code, keyed.state.reached) == (431, [])
        assert "larger than 400 bytes" in error_of(response)["message"]


@pytest.mark.parametrize("body", ["[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000])
@pytest.mark.parametrize("more", ["", ', "b": "\\ud83d\\ude00"'], ids=["plain", "with an escape"])
def test_a_body_that_is_nested_too_deeply_is_400(monkeypatch, body, more):
    target = app(keys_of("alpha-key-of-team-a"), max_body_bytes=1 << 20)
    response = post(target, content=f'{{"text": {body}{more}}}')
    assert (response.status_code, target.state.reached) == (400, [])
    assert error_of(response)["message"] == "the request is nested too deeply"


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonx"])
def test_a_body_that_is_not_said_to_be_json_is_refused(keyed, kind):
    assert post(keyed, content=b"{}", headers={"content-type": kind}).status_code == 415


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "the body is no JSON"),
        (b"", "Field required"),
        (b'{"text": "\xff"}', "should be JSON in UTF-8"),
        (b'{"text": "a\xed\xa0\x80"}', "should be JSON in UTF-8"),
        *(
            ('{"text": "a\\ud800"}'.encode(kind), "should be JSON in UTF-8")
            for kind in ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be")
        ),
        (b"[" * 900, "the body is no JSON"),
        (b'{"text": "a\\ud800"}', "lone surrogate"),
        (b'{"text": "a", "\\uDC00": 1}', "lone surrogate"),
        (b'{"text": "\\ud800', "the body is no JSON"),
        (b'{"text": 5}', "text: Input should be a valid string"),
        (b'{"text": "a", "number": 7}', "vLLM cannot use this request (IndexError)"),
    ],
)
def test_what_cannot_be_read_is_400_and_says_why(keyed, body, message):
    response = post(keyed, content=body)
    assert response.status_code == 400 and message in error_of(response)["message"]


def test_a_byte_order_mark_is_no_text(keyed):
    assert post(keyed, content=codecs.BOM_UTF8 + b'{"text": "a"}').json() == {"length": 1}
    assert post(keyed, content=codecs.BOM_UTF8 + b'{"text": "a\\ud800"}').status_code == 400


def test_a_character_spelt_in_two_halves_arrives_whole(keyed):
    assert post(keyed, content=b'{"text": "\\ud83d\\ude00"}').json() == {"length": 1}


def test_an_error_of_ours_is_500_without_its_words(keyed):
    response = post(keyed, content=b'{"text": "fail"}', headers={"x-request-id": "r-77"})
    assert response.status_code == 500
    assert error_of(response)["message"] == "internal error; the log has it under request r-77"


def test_unknown_paths_and_methods_have_the_same_form(keyed):
    assert (
        error_of(call(keyed, "PUT", "/write/completions", headers=bearer("alpha-key-of-team-a")))["type"]
        == "invalid_request_error"
    )
    assert call(keyed, "PUT", "/write/completions", headers=bearer("alpha-key-of-team-a")).status_code == 405


@given(st.binary(max_size=200), st.sampled_from(["application/json", "application/json; charset=utf-16", "text/json"]))
def test_no_bytes_make_it_fail(body, kind):
    target = app(keys_of("alpha-key-of-team-a"))
    assert post(target, content=body, headers={"content-type": kind}).status_code in (200, 400, 413, 415)


def test_a_cluster_that_starts_has_no_keys_and_gives_proxies_the_time_that_users_say_or_a_minute(monkeypatch):
    variable = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"
    # The middleware's variable is set here as well, and gone again after the test.
    monkeypatch.setenv(gate.PROXY_VARIABLE, "serve.gate:proxy_middleware")
    for given_s, expected_s in (("7", "7"), (None, "60")):
        monkeypatch.setenv(KEYS_VARIABLE, "a-key")
        monkeypatch.setenv(variable, given_s or "")
        if given_s is None:
            monkeypatch.delenv(variable)
        prepare_environment()
        assert os.environ[variable] == expected_s
        assert KEYS_VARIABLE not in os.environ
