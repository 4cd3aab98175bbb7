"""Section 4.3 of the field notes, where it concerns the frame: each line a test."""

from __future__ import annotations

import ast
import asyncio
import importlib
import json
import logging
import time
from pathlib import Path

import pytest
from server_fakes import FakeAsyncEngine
from server_frame import ROUTES, RunRequest, read_all, serving

import nanovllm
from nanovllm.errors import ConfigError
from nanovllm.server import admin, page
from nanovllm.server.app import ENDPOINT_MODULES, create_app
from nanovllm.server.auth import Key, Keyring, _digest
from nanovllm.server.body import parse
from nanovllm.server.errors import BadField
from nanovllm.server.options import ServerOptions
from nanovllm.server.protocol import ChatRequest

USER, OTHER, ADMIN = "sk-user-12345", "sk-other-12345", "sk-admin-12345"
PACKAGE = Path(nanovllm.__file__).parent


def make_key(secret: str, name: str, **options) -> Key:
    return Key(name=name, digest=_digest(secret, "test"), **options)


@pytest.fixture(scope="module")
def frame():
    """With keys."""
    keyring = Keyring([make_key(USER, "user"), make_key(OTHER, "other"), make_key(ADMIN, "admin", is_admin=True)])
    with serving(keyring, {"max_body_bytes": 100_000, "max_header_bytes": 4096, "body_timeout_s": 2.0}) as running:
        yield running


@pytest.fixture(scope="module")
def open_frame():
    """Without keys, on loopback."""
    with serving() as running:
        yield running


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1]) if answer else 0


# --- authentication


@pytest.mark.parametrize(
    "path",
    ["/run", "/metrics", "/load", "/version", "/embed", "/admin/inspect", "/admin/inspector", "/nowhere", "/docs", "/inspector/"],
)
def test_every_route_but_the_probes_asks_for_a_key(frame, path):
    for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
        assert frame.request(method, path).status == 401
    assert frame.get(path, authorization="Bearer sk-wrong-123").status == 401


def test_of_all_endpoints_only_the_probes_and_the_files_of_the_pages_are_open(frame):
    """Whatever a module declares: the endpoints are those of a real server, the answers those of the layer before them."""
    routes = [route for name in ENDPOINT_MODULES for route in importlib.import_module(f"nanovllm.server.{name}").routes]
    assert len(routes) > 20
    for route in routes:
        open_methods = {method for method in ("GET", "POST", "DELETE") if frame.request(method, route.path).status != 401}
        is_file = route.path in page.open_paths
        expected = {"GET"} if is_file else {"GET", "POST", "DELETE"} if route.path in ("/health", "/ready") else set()
        assert open_methods == expected, route.path


@pytest.mark.parametrize("path", ["/health", "/ready"])
def test_probes_are_open(frame, path):
    assert frame.get(path).status == 200


def test_both_headers_carry_a_key(frame):
    assert frame.get("/version", authorization=f"Bearer {USER}").status == 200
    assert frame.get("/version", authorization=f"bearer  {USER}").status == 200
    assert frame.get("/version", x_api_key=USER).status == 200
    assert frame.get("/version", authorization=f"Bearer {USER}", x_api_key=USER).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": USER},
        {"Authorization": f"Basic {USER}"},
        {"Authorization": f"Bearer{USER}"},
        {"Authorization": "Bearer"},
        {"Authorization": ""},
        {"Authorization": f"Bearer {USER.upper()}"},
        {"Authorization": f"Bearer {USER}x"},
        {"Authorization": f"Bearer {USER[:-1]}"},
        {"X-Api-Key": f"Bearer {USER}"},
        {"X-Api-Key": ""},
        {"Authorization": f"Bearer {USER}", "X-Api-Key": OTHER},  # who is it?
        {"Authorization": "Bearer wrong-123", "X-Api-Key": USER},
        {"Cookie": f"api_key={USER}"},
    ],
)
def test_what_is_nearly_a_key_is_none(frame, headers):
    reply = frame.request("GET", "/version", headers=headers)
    assert reply.status == 401 and reply.headers["www-authenticate"] == "Bearer"
    assert USER not in reply.body.decode()


def test_a_key_in_the_query_is_none(frame):
    assert frame.get(f"/version?api_key={USER}&key={USER}").status == 401


@pytest.mark.parametrize("secret", [b"\xff\xfe\x00", b"\xc3\xa4" * 50, b"x" * 3000])
def test_strange_bytes_as_a_key_are_refused(frame, secret):
    answer = frame.raw(b"GET /version HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + secret + b"\r\n\r\n")
    assert status_of(answer) in (400, 401)


TRICKS = [
    b"GET http://localhost/health HTTP/1.1",  # absolute form: the path of a route that is open
    b"GET /health/ HTTP/1.1",
    b"GET //health HTTP/1.1",
    b"GET /Health HTTP/1.1",
    b"GET /health%2f..%2frun HTTP/1.1",
    b"GET /health/../version HTTP/1.1",
    b"GET /health/%2e%2e/version HTTP/1.1",
    b"GET /health;/version HTTP/1.1",
    b"GET /%68ealth HTTP/1.1",
    b"GET /health%00 HTTP/1.1",
    b"GET /health%0d%0a HTTP/1.1",
    b"GET //version HTTP/1.1",
    b"GET /version/ HTTP/1.1",
    b"GET /VERSION HTTP/1.1",
    b"GET /%76ersion HTTP/1.1",
    b"GET /./version HTTP/1.1",
    b"GET /version?x=/health HTTP/1.1",
    b"GET /version#/health HTTP/1.1",
    b"GET http://localhost/version HTTP/1.1",
    b"GET http://x@localhost/health/../version HTTP/1.1",
    b"GET \\health HTTP/1.1",
    b"GET * HTTP/1.1",
    b"OPTIONS * HTTP/1.1",
    b"GET /\xc3\xa4 HTTP/1.1",
    b"CONNECT localhost:80 HTTP/1.1",
]


@pytest.mark.parametrize("line", TRICKS, ids=lambda line: line.decode("latin-1"))
def test_no_spelling_of_a_path_gets_around_the_key(frame, line):
    answer = frame.raw(line + b"\r\nHost: localhost\r\nConnection: close\r\n\r\n", wait=5)
    assert status_of(answer) == 200 if b"http://localhost/health " in line else status_of(answer) in (400, 401)


@pytest.mark.parametrize(
    "host", [b"localhost/health?", b"localhost:80/health", b"/health", b"health", b"a\\b", b"x@y", b"[::1]", b""]
)
@pytest.mark.parametrize("name", [b"Host", b"X-Forwarded-Host", b"X-Forwarded-Prefix", b"X-Original-URL", b"X-Rewrite-URL"])
def test_no_header_changes_the_path_that_is_judged(frame, name, host):
    other = b"" if name == b"Host" else b"Host: localhost\r\n"
    answer = frame.raw(b"GET /version HTTP/1.1\r\n" + other + name + b": " + host + b"\r\nConnection: close\r\n\r\n")
    assert status_of(answer) in (400, 401)


@pytest.mark.parametrize("path", [route.path for route in admin.routes])
def test_admin_routes_want_an_admin_key(frame, path):
    for method in ("GET", "POST"):
        assert frame.request(method, path, headers={"X-Api-Key": USER}).status == 403


@pytest.mark.parametrize(
    "path", ["//admin/inspect", "/Admin/inspect", "/admin//inspect", "/admin/inspect/", "/x/../admin/inspect"]
)
def test_no_spelling_of_an_admin_path_takes_a_user_key(frame, path):
    assert frame.request("GET", path, headers={"X-Api-Key": USER}).status in (403, 404)


def test_an_encoded_admin_path_is_an_admin_path(frame):
    assert frame.request("GET", "/%61dmin/inspect", headers={"X-Api-Key": USER}).status == 403
    assert frame.request("GET", "/admin/inspect", headers={"X-Api-Key": ADMIN}).status == 200


def test_without_admin_keys_admin_routes_are_closed_even_on_loopback(open_frame):
    assert open_frame.get("/admin/inspect").status == 401
    assert open_frame.request("POST", "/admin/drain", headers={"X-Api-Key": "anything-123"}).status == 401


def test_websocket_and_unknown_scopes_are_declined_and_lifespan_gives_nothing():
    async def talk(scope):
        sent = []
        messages = iter([{"type": f"{scope['type']}.{name}"} for name in ("startup", "shutdown")])
        if scope["type"] == "websocket":
            messages = iter([{"type": "websocket.connect"}])

        async def receive():
            return next(messages)

        async def send(message):
            sent.append(message)

        app = create_app(FakeAsyncEngine(), ServerOptions(), Keyring([make_key(USER, "user")]), routes=ROUTES)  # type: ignore[arg-type]
        await app(scope, receive, send)
        return sent

    websocket = {"type": "websocket", "path": "/health", "raw_path": b"/health", "headers": []}
    assert [message["type"] for message in asyncio.run(talk(websocket))] == ["websocket.close"]
    assert asyncio.run(talk({"type": "mystery", "path": "/run", "headers": []})) == []
    lifespan = asyncio.run(talk({"type": "lifespan"}))
    assert [message["type"] for message in lifespan] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


def test_a_websocket_handshake_gets_no_further_than_a_request(frame):
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Version: 13\r\n"
    answer = frame.raw(b"GET /version HTTP/1.1\r\nHost: localhost\r\n" + upgrade + b"\r\n", wait=2)
    assert status_of(answer) == 401


def test_keys_are_compared_as_digests_with_compare_digest_and_all_of_them(monkeypatch):
    compared = []

    def compare(own: bytes, given: bytes) -> bool:
        compared.append((own, given))
        return own == given

    monkeypatch.setattr("nanovllm.server.auth.hmac.compare_digest", compare)
    keyring = Keyring([make_key(USER, "user"), make_key(OTHER, "other"), make_key(ADMIN, "admin", is_admin=True)])
    for secret in (USER, ADMIN, "sk-nobody"):
        compared.clear()
        keyring.find(secret.encode())
        assert len(compared) == 3 and all(len(own) == len(given) == 32 for own, given in compared)


# --- where it listens


def test_loopback_is_the_default():
    assert ServerOptions().host == "127.0.0.1" and ServerOptions().is_loopback


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "example.org", "127.0.0.1.nip.io"])
def test_beyond_loopback_it_refuses_to_start_without_keys(host):
    options = ServerOptions(host=host)
    with pytest.raises(ConfigError, match="there are no API keys"):
        Keyring.load(options, {})
    with pytest.raises(ConfigError, match="there are no API keys"):
        Keyring.load(options, {"NANOVLLM_ADMIN_KEYS": ADMIN})
    assert Keyring.load(options, {"NANOVLLM_API_KEYS": USER}).has_user_keys
    assert not Keyring.load(ServerOptions(host=host, insecure=True), {}).keys


def test_a_key_file_without_keys_is_refused(tmp_path):
    path = tmp_path / "keys.json"
    for text in ('{"keys": []}', "[]"):
        path.write_text(text)
        with pytest.raises(ConfigError, match="holds no keys"):
            Keyring.load(ServerOptions(api_key_file=str(path)), {})


def test_the_variable_of_clients_is_not_mistaken_for_that_of_servers(caplog):
    Keyring.load(ServerOptions(), {"NANOVLLM_API_KEY": USER})
    assert "NANOVLLM_API_KEYS" in caplog.text
    caplog.clear()
    Keyring.load(ServerOptions(), {"NANOVLLM_API_KEY": USER, "NANOVLLM_API_KEYS": USER})
    assert not caplog.text


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_on_loopback_no_keys_are_needed(host):
    assert not Keyring.load(ServerOptions(host=host), {}).keys


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "169.254.169.254", "127.0.0.1.nip.io"]
)
def test_without_keys_a_page_that_points_its_name_at_loopback_is_refused(open_frame, host):
    reply = open_frame.request("POST", "/run", {"prompt": "x"}, {"Host": host})
    assert reply.status == 403 and reply.error["code"] == "foreign_host"


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://localhost:1", "http://127.0.0.1"])
def test_without_keys_a_page_of_another_origin_is_refused(open_frame, origin):
    assert open_frame.post("/run", {"prompt": "x"}, origin=origin).status == 403
    assert open_frame.post("/run", {"prompt": "x"}, origin=f"http://127.0.0.1:{open_frame.port}").status == 200


def test_no_cross_origin_header_unless_asked_for(open_frame, frame):
    asked = {"Origin": f"http://127.0.0.1:{open_frame.port}", "Access-Control-Request-Method": "POST"}
    for reply in (open_frame.request("OPTIONS", "/run", headers=asked), open_frame.request("GET", "/version", headers=asked)):
        assert not [name for name in reply.headers if name.startswith("access-control")]


def test_a_named_origin_may_preflight_and_call_and_read_errors_and_another_may_not():
    with serving(options={"cors_origins": "https://chat.example"}) as frame:
        asked = {"Origin": "https://chat.example", "Access-Control-Request-Method": "POST"}
        assert frame.request("OPTIONS", "/run", headers=asked).headers["access-control-allow-origin"] == "https://chat.example"
        for body, status in (({"prompt": "x"}, 200), ({"prompt": 7}, 400)):
            reply = frame.post("/run", body, origin="https://chat.example")
            assert reply.status == status and reply.headers["access-control-allow-origin"] == "https://chat.example"
        other = frame.post("/run", {"prompt": "x"}, origin="https://evil.example")
        assert other.status == 403 and "access-control-allow-origin" not in other.headers


# --- sizes


def run_bytes(frame, body: bytes, headers: bytes = b"", wait: float = 10) -> bytes:
    head = f"POST /run HTTP/1.1\r\nHost: localhost\r\nX-Api-Key: {USER}\r\nConnection: close\r\n".encode()
    return frame.raw(head + headers + b"\r\n" + body, wait)


def test_a_declared_body_that_is_too_long_is_refused_before_it_is_sent(frame):
    answer = run_bytes(frame, b"", b"Content-Length: 100001\r\n")
    assert status_of(answer) == 413 and b"max_body_bytes=100000" in answer


def test_a_body_without_a_declared_length_is_counted_as_it_comes(frame):
    with frame.connect() as connection:
        connection.sendall(f"POST /run HTTP/1.1\r\nHost: x\r\nX-Api-Key: {USER}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        chunk = b"2710\r\n" + b" " * 10000 + b"\r\n"
        try:
            for _ in range(1000):
                connection.sendall(chunk)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it had heard enough
        connection.settimeout(5)
        try:
            answer = connection.recv(65536)
        except ConnectionResetError:
            answer = b""
    assert not answer or status_of(answer) == 413
    frame.assert_nothing_is_held()


def test_a_chunked_body_just_too_long_gets_413_and_one_that_fits_is_answered(frame):
    for size, status in ((100_001, 413), (50, 200)):
        body = b'{"prompt": "hello"}'.ljust(size)
        chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:20], body[20:])) + b"0\r\n\r\n"
        assert status_of(run_bytes(frame, chunks, b"Transfer-Encoding: chunked\r\n")) == status


@pytest.mark.parametrize("length", [b"-1", b"1e3", b"99999999999999999999999", b"0x10", b"5, 6", b"+5", b"\xb2"])
def test_a_length_that_is_no_number_is_refused(frame, length):
    assert status_of(run_bytes(frame, b"{}", b"Content-Length: " + length + b"\r\n", 3)) in (400, 413)


def test_both_kinds_of_length_at_once_are_refused(frame):
    answer = run_bytes(frame, b"0\r\n\r\n", b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n", 3)
    assert status_of(answer) == 400
    answer = run_bytes(frame, b"{}", b"Content-Length: 2\r\nContent-Length: 3\r\n", 3)
    assert status_of(answer) == 400


def test_headers_are_bounded_one_and_all_together(frame):
    for headers in (b"X-Long: " + b"x" * 5000 + b"\r\n", b"".join(b"X-%d: %s\r\n" % (i, b"x" * 100) for i in range(50))):
        answer = run_bytes(frame, b"", headers)
        assert status_of(answer) == 431 and answer.count(b"HTTP/1.1") == 1


@pytest.mark.parametrize("endless", [b"GET /", b"GET / HTTP/1.1\r\nX-Long: ", b"GET / HTTP/1.1\r\n", b"\r\n"])
def test_a_head_that_never_ends_does_not_fill_memory(frame, endless):
    part = b"X-Many: 1\r\n" * 1000 if endless.endswith(b"1.1\r\n") else b"x" * 10_000
    with frame.connect() as connection:
        connection.settimeout(5)
        sent = 0
        try:
            connection.sendall(endless)
            for _ in range(200):
                connection.sendall(part)
                sent += len(part)
                time.sleep(0.001)
        except (BrokenPipeError, ConnectionResetError, TimeoutError):
            pass
        answer = read_all(connection, 1)
    assert sent < 1_000_000 and (not answer or status_of(answer) in (400, 431))


def test_trailers_of_a_chunked_body_are_bounded(frame):
    trailers = b"".join(b"X-%d: %s\r\n" % (i, b"x" * 100) for i in range(500))
    body = b"2\r\n{}\r\n0\r\n" + trailers + b"\r\n"
    assert status_of(run_bytes(frame, body, b"Transfer-Encoding: chunked\r\n")) in (400, 431)
    frame.assert_nothing_is_held()


def test_a_head_or_a_body_that_takes_too_long_ends_the_connection(frame):
    started = time.monotonic()
    late = frame.connect()
    late.sendall(b"GET /health HTTP/1.1\r\nHost: ")
    body = run_bytes(frame, b'{"pro', b"Content-Length: 50\r\n")
    assert status_of(body) == 408 and b"body_timeout_s=2" in body
    assert read_all(late, 5) == b"" and 1.5 < time.monotonic() - started < 5


def test_connections_beyond_the_limit_are_turned_away():
    with serving(options={"max_connections": 5}) as frame:
        connections = [frame.connect() for _ in range(5)]
        for connection in connections:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        assert read_all(frame.connect(), 5).startswith(b"HTTP/1.1 503")
        connections[0].close()
        time.sleep(0.1)
        assert frame.get("/health").status == 200


def test_a_compressed_body_is_refused(frame):
    answer = run_bytes(frame, b"x", b"Content-Length: 1\r\nContent-Encoding: gzip\r\n")
    assert status_of(answer) == 415


# --- values

BAD_BODIES = [
    (b"", "not valid JSON"),
    (b"null", "must be a JSON object"),
    (b"[]", "must be a JSON object"),
    (b'"text"', "must be a JSON object"),
    (b'{"prompt": "x"', "not valid JSON"),
    (b'{"prompt": "x"} x', "not valid JSON"),
    (b'{"prompt": "x",}', "not valid JSON"),
    (b"{'prompt': 'x'}", "not valid JSON"),
    (b'\xef\xbb\xbf{"prompt": "x"}', "not valid JSON"),
    (b'{"prompt": "\xff"}', "not valid JSON"),
    (b'{"prompt": "\xed\xa0\x80"}', "not valid JSON"),
    (b'{"prompt": "\\ud800"}', "not valid JSON"),
    (b'{"prompt": "\\ud800 then text"}', "not valid JSON"),
    (b'{"prompt": "a\x00b"}', "not valid JSON"),
    (b'{"prompt": "x", "extra": NaN}', "not valid JSON"),
    (b'{"prompt": "x", "extra": Infinity}', "not valid JSON"),
    (b'{"prompt": "x", "extra": -Infinity}', "not valid JSON"),
    (b'{"prompt": "x", "extra": 1e999}', "not valid JSON"),
    (b'{"prompt": "x", "extra": [-1e999]}', "not valid JSON"),
    (b'{"prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b'{"prompt": "x", "max_tokens": 36893488147419103232}', "more than 64 bits"),
    (b'{"prompt": "x", "extra": {"deep": [-36893488147419103232]}}', "more than 64 bits"),
    (b'{"prompt": "x", "max_tokens": 9223372036854775808}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": true}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": 1.5}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": "4"}', "max_tokens"),
    (b'{"prompt": "x", "max_tokens": -1}', "max_tokens"),
    (b'{"prompt": "x", "priority": 1001}', "priority"),
    (b'{"prompt": "x", "stream": 1}', "stream"),
    (b'{"prompt": [1, true]}', "prompt"),
    (b'{"prompt": [1, 1000000]}', "token ids"),
    (b'{"prompt": [-1]}', "token ids"),
    (b'{"prompt": ""}', "no tokens"),
    (b'{"prompt": {}}', "prompt"),
    (b'{"max_tokens": 4}', "prompt"),
    (b'{"prompt": "x", "prompt": "y"}', "given twice"),
    (b'{"prompt": "x", "extra": {"a": 1, "a": 2}}', "given twice"),
    (b'{"prompt": "x", "pr\\u006fmpt": "y"}', "given twice"),
    (b'{"prompt": "x", "best_of": 2}', "unknown field 'best_of'"),
    (b'{"prompt": "x", "max_token": 2}', "did you mean 'max_tokens'"),
    (b'{"prompt": "x", "suffix": "y"}', "'suffix' is not supported: the model does not fill gaps"),
    (b'{"prompt": "x", "extra": ' + b"[" * 64 + b"]" * 64 + b"}", "max_json_depth=64"),
    (b'{"prompt": "x", "extra": ' + b'{"a":' * 64 + b"1" + b"}" * 64 + b"}", "max_json_depth=64"),
    (b"[" * 50_000, "max_json_depth=64"),
    (b'{"a":' * 15_000, "max_json_depth=64"),
    (b'{"prompt": "x", "extra": ' + b"[" * 40_000 + b"]" * 40_000 + b"}", "max_json_depth=64"),
]


@pytest.mark.parametrize(("body", "message"), BAD_BODIES, ids=[repr(body[:48]) for body, _ in BAD_BODIES])
def test_a_bad_body_is_a_400_that_says_what_is_wrong(frame, body, message):
    reply = frame.request("POST", "/run", body, {"X-Api-Key": USER})
    assert reply.status == 400 and reply.error["type"] == "invalid_request_error"
    assert message in reply.error["message"] + str(reply.error["param"])
    frame.assert_nothing_is_held()


def test_a_field_that_is_not_supported_may_be_null(frame):
    assert frame.request("POST", "/run", b'{"prompt": "x", "suffix": null}', {"X-Api-Key": USER}).status == 200


def test_errors_name_the_field(frame):
    for fields, param in (
        ({"max_tokens": "4"}, "max_tokens"),
        ({"best": 1}, "best"),
        ({"suffix": "x"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        assert frame.run(key=USER, **fields).error["param"] == param


def test_a_repeated_key_among_very_many_is_found_in_no_time():
    body = b'{"extra": {' + b",".join(b'"%d":1' % i for i in range(25_000)) + b',"24999":1}}'
    started = time.monotonic()
    with pytest.raises(BadField, match="given twice"):
        parse(body, RunRequest, {}, 64)
    assert time.monotonic() - started < 1


def test_a_large_body_is_parsed_in_a_thread_by_the_same_rules():
    with serving(options={"max_body_bytes": 10_000_000}, num_blocks=8192, max_model_len=10_000) as frame:
        padding = b" " * 300_000
        assert frame.request("POST", "/run", b'{"prompt": "x", "prompt": "y"}' + padding).error["code"] == "duplicate_field"
        assert frame.request("POST", "/run", b'{"prompt": "x"}' + padding).status == 200


# --- what errors tell


@pytest.mark.parametrize("path", ["/crash", "/crash_later"])
def test_an_internal_error_tells_nothing_but_the_id_and_the_log_tells_all(frame, path, caplog):
    logging.getLogger("nanovllm").propagate = True
    reply = frame.request("GET", path, headers={"X-Api-Key": USER})
    text = reply.body.decode()
    assert "internal error" in text and reply.headers["x-request-id"] in text
    for secret in ("/secret/path", "Traceback", "OSError", ".py", "site-packages"):
        assert secret not in text
    assert "/secret/path" in caplog.text


def test_no_answer_names_the_software_that_made_it(frame):
    for reply in (frame.get("/health"), frame.get("/nowhere"), frame.request("GET", "/crash", headers={"X-Api-Key": USER})):
        assert "server" not in reply.headers and "x-powered-by" not in reply.headers


def test_what_a_client_sends_is_quoted_in_part_only(frame):
    reply = frame.run(key=USER, **{"x" * 50_000: 1})
    assert reply.status == 400 and len(reply.error["message"]) < 300
    reply = frame.request("GET", "/" + "y" * 3000, headers={"X-Api-Key": USER})
    assert reply.status == 404 and len(reply.body) < 600


def test_control_characters_in_a_path_cannot_forge_log_lines(frame, caplog):
    logging.getLogger("nanovllm").propagate = True
    with caplog.at_level(logging.INFO, "nanovllm.access"):
        caplog.set_level(logging.INFO, "nanovllm")
        frame.request("GET", '/x%0a{"status":200}', headers={"X-Api-Key": USER})
        frame.wait_until(lambda: any("/x" in record.getMessage() for record in caplog.records))
    lines = [record.getMessage() for record in caplog.records if record.name == "nanovllm.access"]
    assert not any("\n" in line for line in lines)
    parsed = [json.loads(line) for line in lines]  # the last line of an earlier test's request may be among them
    assert [line["status"] for line in parsed if not line["path"].startswith("/yyy")] == [404]


# --- keys do not see each other


def test_cached_prefixes_are_not_shared_between_keys(frame):
    def cached(key, **fields):
        return frame.run(prompt=[1, 2, 3, 4] * 5, key=key, **fields).json["cached"]

    assert cached(USER) == 0 and cached(USER) == 16
    assert cached(OTHER) == 0 and cached(OTHER) == 16
    assert cached(USER, cache_salt="own") == 0 and cached(USER, cache_salt="own") == 16
    assert cached(OTHER, cache_salt="own") == 0


def test_a_salt_cannot_be_made_to_look_like_another_keys():
    server = create_app(FakeAsyncEngine(), ServerOptions(), Keyring(), routes=[]).server  # type: ignore[arg-type]
    user, other = make_key(USER, "user"), make_key(OTHER, "other")
    salts = {server.salt(key, salt) for key in (user, other) for salt in (None, "", "x", f"{user.salt}:x", f":{other.salt}")}
    assert len(salts) == 8  # None and "" are one


# --- key files


def test_keys_come_from_files_with_their_classes_and_limits(tmp_path):
    entries = [
        {"name": "a", "key": USER, "priority": -5, "max_concurrent": 3, "tokens_per_minute": 100},
        {"name": "b", "sha256": _digest(OTHER, "").hex()},
        {"name": "c", "key": ADMIN, "admin": True},
    ]
    path = tmp_path / "keys.json"
    path.write_text(json.dumps(entries))
    keyring = Keyring.load(ServerOptions(api_key_file=str(path)), {})
    a, b, c = (keyring.find(secret.encode()) for secret in (USER, OTHER, ADMIN))
    assert (a.name, a.priority, a.max_concurrent, a.tokens_per_minute) == ("a", -5, 3, 100)
    assert b.name == "b" and c.is_admin and keyring.find(b"nobody-123") is None
    assert USER not in repr(keyring.keys)


def test_keys_come_from_toml(tmp_path):
    pytest.importorskip("tomllib")
    path = tmp_path / "keys.toml"
    path.write_text(f'[[keys]]\nname = "a"\nkey = "{USER}"\n')
    assert Keyring.load(ServerOptions(api_key_file=str(path)), {}).find(USER.encode()).name == "a"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read"),
        ("[1]", "list of keys"),
        ('[{"name": "a"}]', "either key or sha256"),
        ('[{"name": "a", "key": "short"}]', "8 to 1024"),
        ('[{"name": "a", "key": "with space 123"}]', "8 to 1024"),
        ('[{"name": "a", "key": "sk-12345678", "sha256": "00"}]', "either key or sha256"),
        ('[{"name": "a", "sha256": "00"}]', "64 hexadecimal"),
        ('[{"name": "a", "key": "sk-12345678", "max_concurent": 1}]', "unknown field 'max_concurent'"),
        ('[{"name": "a", "key": "sk-12345678", "max_concurrent": 0}]', "max_concurrent=0"),
        ('[{"name": "a", "key": "sk-12345678", "priority": true}]', "priority=True"),
        ('[{"name": "a", "key": "sk-12345678", "admin": "no"}]', "true or false"),
        ('[{"name": "a", "key": "sk-12345678"}, {"name": "b", "key": "sk-12345678"}]', "same value|same name"),
    ],
)
def test_a_key_file_with_a_mistake_is_refused(tmp_path, text, message):
    path = tmp_path / "keys.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        Keyring.load(ServerOptions(api_key_file=str(path)), {})


# --- trust


def test_nothing_is_unpickled_or_evaluated_and_the_server_reads_the_environment_for_keys_alone():
    """Looked for in the syntax trees, so that words in messages do not count."""
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        attributes = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        imports |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & {"eval", "exec", "__import__"}, path
        assert not imports & {"pickle", "marshal", "shelve", "cloudpickle", "dill", "joblib"}, path
        assert not attributes & {"torch.load", "torch.hub.load", "numpy.load", "np.load"}, path
        if "server" in path.parts:
            assert not attributes & {"os.environ", "os.getenv"} or path.name == "auth.py", path


@pytest.mark.parametrize(
    ("body", "name", "hint"),
    [
        ({"stream_options": {"includ_usage": True}}, "stream_options.includ_usage", "include_usage"),
        ({"messages": [{"role": "user", "contnt": "x"}]}, "messages[0].contnt", "content"),
        ({"tools": [{"type": "function", "function": {"nme": "f"}}]}, "tools[0].function.nme", "name"),
    ],
)
def test_an_unknown_field_inside_of_another_gets_a_suggestion(body, name, hint):
    body = {"messages": [{"role": "user", "content": "x"}], **body}
    with pytest.raises(BadField, match=f"did you mean '{hint}'") as caught:
        parse(json.dumps(body).encode(), ChatRequest, {}, 64)
    assert caught.value.param == name
