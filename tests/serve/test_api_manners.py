"""What the server refuses, and how: keys, other sites, limits, slow clients. Nothing is generated here."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import socket
import time

import httpx
import openai
import pytest
from PIL import Image

from kandinsky_jax.serve.api import bind
from kandinsky_jax.serve.api import server as server_module
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.api.fields import GenerationFields, from_json_body
from kandinsky_jax.serve.server_settings import ServerSettings
from tests.serve.servers import encoded, server

GENERATE = "/v1/images/generations"
KEY = "a key of the tests"


@pytest.fixture(scope="module")
def plain():
    with server(generates=False, max_body=200_000, body_time=1.0, time_limit=5.0) as running:
        yield running


@pytest.fixture(scope="module")
def locked():
    with server(
        generates=False, api_key=KEY, origins=("https://friend.example",), hosts=("pictures.example",)
    ) as running:
        yield running


def error_of(response):
    assert set(response.json()) == {"error"}
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    return response.json()["error"]


# The key -----------------------------------------------------------------------------------------------------------


def test_without_the_key_only_health_answers(locked):
    assert locked.send("GET", "/health").json()["status"] == "starting"
    for path in ("/v1/models", "/metrics", "/docs", "/openapi.json", "/", "/nowhere"):
        response = locked.send("GET", path)
        assert response.status_code == 401
        assert error_of(response)["code"] == "invalid_api_key"
    with pytest.raises(openai.AuthenticationError, match="is not this server's"):
        locked.client(api_key="another").models.list()
    assert locked.client(api_key=KEY).models.list().data[0].id == "tiny"


def test_a_browser_logs_in_with_the_key(locked):
    asked = locked.send("GET", "/", headers={"sec-fetch-mode": "navigate"})
    assert (asked.status_code, asked.headers["location"]) == (303, "/login")
    assert "<form" in locked.send("GET", "/login").text
    wrong = locked.send("POST", "/login", data={"key": "another"})
    assert wrong.status_code == 401
    assert "set-cookie" not in wrong.headers
    given = locked.send("POST", "/login", data={"key": KEY})
    cookie = given.headers["set-cookie"]
    assert given.status_code == 303
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert KEY not in cookie
    assert locked.send("GET", "/docs", headers={"cookie": cookie.partition(";")[0]}).status_code == 200
    assert locked.send("GET", "/docs", headers={"cookie": cookie.partition(";")[0][:-1] + "0"}).status_code == 401


# Other sites -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:1"}, 200),
        ({"host": "[::1]:80"}, 200),
        ({"host": "192.168.7.7"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": ""}, 403),
        ({"host": "localhost/../x"}, 403),
        ({"host": "localhost@evil.example"}, 403),
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "null"}, 403),
        ({"sec-fetch-site": "cross-site"}, 403),
        ({"sec-fetch-site": "same-site", "sec-fetch-mode": "no-cors"}, 403),
        ({"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}, 200),
        ({"sec-fetch-site": "same-origin"}, 200),
    ],
)
def test_pages_of_other_sites_are_refused(plain, headers, status):
    response = plain.send("GET", "/v1/models", headers=headers)
    assert response.status_code == status
    assert "access-control-allow-origin" not in response.headers


def test_a_page_of_another_site_cannot_post(plain):
    for headers in ({"origin": "http://localhost:1"}, {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate"}):
        assert plain.send("POST", GENERATE, headers=headers, json={"prompt": "x"}).status_code == 403


def test_own_pages_and_admitted_ones_may(plain, locked):
    own = plain.send("POST", GENERATE, headers={"origin": plain.url}, json={"prompt": ""})
    assert own.status_code == 400
    headers = {"authorization": f"Bearer {KEY}", "origin": "https://friend.example"}
    response = locked.send("GET", "/v1/models", headers=headers | {"host": "pictures.example"})
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://friend.example"
    assert (
        "access-control-allow-origin"
        not in locked.send("GET", "/health", headers={"origin": "https://e.example"}).headers
    )


def test_security_headers(plain):
    headers = plain.send("GET", "/docs").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "frame-ancestors 'self'" in headers["content-security-policy"]
    assert headers["x-request-id"].startswith("req_")


# Limits ------------------------------------------------------------------------------------------------------------


def test_large_bodies_are_refused(plain):
    large = json.dumps({"prompt": "x" * 300_000})
    response = plain.send("POST", GENERATE, content=large, headers={"content-type": "application/json"})
    assert response.status_code == 413
    assert error_of(response)["code"] == "body_too_large"

    def chunks():
        yield from (large[i : i + 10_000].encode() for i in range(0, len(large), 10_000))

    response = plain.send("POST", GENERATE, content=chunks(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    response = plain.send("POST", "/v1/images/edits", files={"image": large.encode()}, data={"prompt": "x"})
    assert response.status_code == 413


@pytest.mark.parametrize("body", [b'{"items":[' + b"[]," * 2**21 + b"1]}", b'{"' + b'":1,"' * 2**20 + b'":1}'])
def test_json_of_many_values_is_refused_at_once(body):
    began = time.monotonic()
    with pytest.raises(ApiError, match="more than 200,000 values"):
        from_json_body(GenerationFields, body)
    assert time.monotonic() - began < 0.5


def test_slow_bodies_are_refused(plain):
    with plain.connect() as connection:
        head = f"POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        connection.sendall(f"{head}content-length: 100\r\n\r\n{{".encode())
        answer = b""
        while part := connection.recv(4096):  # until it is closed
            answer += part
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"slow_body" in answer


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\n"])
def test_slow_headers_end_the_connection(plain, monkeypatch, sent):
    monkeypatch.setattr(server_module, "HEADER_SECONDS", 0.3)
    with plain.connect() as connection:
        began = time.monotonic()
        connection.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""
        assert time.monotonic() - began < 5


def test_other_content_types_are_refused(plain):
    response = plain.send("POST", GENERATE, content="prompt=x", headers={"content-type": "text/plain"})
    assert response.status_code == 415
    assert plain.send("POST", "/v1/images/edits", json={"prompt": "x"}).status_code == 415


def test_too_many_parts_are_refused(plain):
    fields = {f"user[{i}]": "x" for i in range(200)}
    response = plain.send("POST", "/v1/images/edits", data=fields, files={"image": b"x"})
    assert response.status_code == 400
    assert "Too many fields" in error_of(response)["message"]


def test_a_picture_is_measured_before_it_is_decoded(plain):
    bomb = encoded(Image.new("1", (8000, 8000)))
    assert len(bomb) < 20_000
    with pytest.raises(openai.BadRequestError, match="8000 x 8000 pixels") as caught:
        plain.client().images.edit(image=bomb, prompt="x")
    assert caught.value.param == "image"


@pytest.mark.parametrize("path", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "../../x.png"])
def test_nothing_is_opened_as_a_path_or_url(plain, path):
    for body in ({"hint": path}, {"items": [{"image": path}]}):
        response = plain.send("POST", GENERATE, json={"prompt": "x"} | body if "hint" in body else body)
        assert response.status_code == 400
        assert "base64" in error_of(response)["message"]
    response = plain.send("POST", "/v1/images/edits", data={"image": path, "prompt": "x"}, files={"hint": b"x"})
    assert response.status_code == 400
    assert "file part" in error_of(response)["message"]


def test_a_data_url_is_decoded(plain):
    url = "data:image/png;base64," + base64.b64encode(encoded(Image.new("RGB", (64, 64)))).decode()
    response = plain.send("POST", GENERATE, json={"items": [{"image": url}], "weights": [1, 2]})
    assert error_of(response)["param"] == "weights"  # so the picture was read


def test_a_full_queue_says_when_to_come_again():
    with server(generates=False, max_queue=1, time_limit=1.0) as running:
        with running.connect() as connection:
            body = json.dumps({"prompt": "x"})
            head = f"POST {GENERATE} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
            connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
            wait_until(lambda: running.service.state.waiting == 1)
            with pytest.raises(openai.RateLimitError) as caught:
                running.client().images.generate(prompt="y")
            assert int(caught.value.response.headers["retry-after"]) >= 1
            answer = connection.recv(4096)
        assert answer.startswith(b"HTTP/1.1 504")  # the first one, after its time
        assert b"x-should-retry: false" in answer


def wait_until(condition, seconds: float = 20.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


# Operation ---------------------------------------------------------------------------------------------------------


def test_errors_of_routes(plain):
    assert error_of(plain.send("GET", "/nowhere"))["message"].startswith("there is no /nowhere")
    refused = plain.send("GET", GENERATE)
    assert refused.status_code == 405
    assert error_of(refused)["code"] == "method_not_allowed"
    for path, status in (("/", 307), ("/health", 503), ("/docs", 200), ("/manifest.json", 200), ("/nowhere", 404)):
        head = plain.send("HEAD", path)
        assert (head.status_code, head.content) == (status, b"")
    with pytest.raises(openai.NotFoundError):
        plain.client().models.retrieve("another/model")
    assert plain.client().models.retrieve("tiny").id == "tiny"


def test_metrics_and_pages_are_whole(plain):
    plain.send("GET", "/nowhere")
    text = plain.send("GET", "/metrics").text
    assert 'kandinsky_jax_requests_total{method="GET",route="unknown",status="404"}' in text
    assert "kandinsky_jax_requests_waiting 0.0" in text
    page = plain.send("GET", "/docs").text
    assert "negative_prompt" in page
    assert "<script" not in page
    assert "://" not in page
    schema = plain.send("GET", "/openapi.json").json()
    assert set(schema["paths"]) >= {GENERATE, "/v1/images/edits", "/v1/images/variations", "/health", "/v1/models"}
    assert plain.send("GET", "/").headers["location"] == "/docs"


def test_one_log_line_without_the_prompt(plain, caplog):
    with caplog.at_level(logging.INFO, "kandinsky_jax.serve"):
        plain.send("POST", GENERATE, json={"prompt": "a secret", "steps": -1})
        wait_until(lambda: caplog.records)
    [record] = caplog.records
    assert record.getMessage().startswith(f"POST {GENERATE} 400 ")
    assert "secret" not in caplog.text


def test_log_lines_of_other_paths(plain, locked, caplog):
    with caplog.at_level(logging.INFO, "kandinsky_jax.serve"):
        plain.send("GET", "/nowhere%0aGET%20/x" + "y" * 200)
        locked.send("POST", "/login", data={"key": KEY})
        wait_until(lambda: len(caplog.records) == 2)
    unknown, login = (record.getMessage() for record in caplog.records)
    assert unknown.startswith("GET '/nowhere\\nGET /x")
    assert "\n" not in unknown
    assert len(unknown) < 200
    assert login.startswith("POST /login 303 ")


def test_a_port_in_use_is_one_sentence():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of 127.0.0.1 is in use"):
            bind(ServerSettings(port=port))
    with bind(ServerSettings(port=0)) as first, pytest.raises(ValueError, match="is in use"):
        bind(ServerSettings(port=first.getsockname()[1]))  # while the first one loads its model
    with pytest.raises(ValueError, match="is no address of this machine"):
        bind(ServerSettings(host="203.0.113.1", port=0))


def test_a_stopped_server_listens_no_more():
    with server(generates=False) as running:
        assert running.client().models.list()
    with pytest.raises(httpx.ConnectError):
        running.send("GET", "/health")
