"""`kandinsky-jax serve`: what it refuses, and how it ends."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from typer.testing import CliRunner

from kandinsky_jax.cli.main import app
from kandinsky_jax.cli.serve import EXAMPLE, KEY, _key
from tests.serve.servers import environment_with_temporary_folder

COMMAND = [
    sys.executable,
    "-m",
    "kandinsky_jax.cli",
    "serve",
    "--model",
    "tiny",
    "--port",
    "0",
    "--no-page",
    "--batch-size",
    "1",
]


def test_help_has_an_example_and_the_keys_variable():
    shown = " ".join(CliRunner().invoke(app, ["serve", "--help"]).output.split())
    assert EXAMPLE in shown
    assert KEY in shown


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--host", "0.0.0.0"], "is reached from other machines"),
        (["--api-key", " "], "the API key is empty"),
        (["--api-key", "a key of 15 ch."], "the API key has 15 characters; needed are 16 or more"),
        (["--api-key", "a k\u00e9y of 16 chars."], "the API key has a character that no client can send"),
        (["--size", "64"], "needed is WIDTHxHEIGHT"),
        (["--size", "65x64"], "needed are multiples of 64"),
        (["--host", "203.0.113.1"], "is reached from other machines"),
        (["--host", "203.0.113.1", "--without-key"], "is no address of this machine"),
        (["--allow-origin", "example.org"], "is no origin"),
        (["--mesh", "1"], "three whole numbers"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_a_model_is_loaded(arguments, says):
    done = CliRunner().invoke(app, ["serve", "--model", "/nowhere", "--no-page", "--port", "0", *arguments])
    assert done.exit_code == 1
    assert says in str(done.exception)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xd8 a key of the tests", "is no text in UTF-8"),
        ("a key of the tests".encode("utf-16"), "is no text in UTF-8"),
        ("a k\u00e9y of the tests".encode(), "no client can send in a header"),
        (b"a key of\nthe tests", "printable ASCII characters in one line"),
        (b"\0" * 20, "no client can send in a header"),
        (b"\r\n", "the API key is empty"),
        (b"a key of the tests\r\n", None),
        (b"\xef\xbb\xbfa key of the tests\n", None),
        (b"a key of the tests", None),
    ],
    ids=str,
)
def test_key_files(tmp_path, content, says):
    file = tmp_path / "key"
    file.write_bytes(content)
    if says is None:
        assert _key(None, file) == "a key of the tests"
        return
    line = ["serve", "--model", "/nowhere", "--no-page", "--port", "0", "--api-key-file", str(file)]
    done = CliRunner().invoke(app, line)
    assert done.exit_code == 1
    assert says in str(done.exception)


@pytest.mark.slow
def test_sigterm_finishes_what_runs(tmp_path):
    key = tmp_path / "key"
    key.write_text("a key from a file\n")
    with subprocess.Popen([*COMMAND, "--api-key-file", str(key)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert address is not None
            client = httpx.Client(
                base_url=address[0], headers={"authorization": "Bearer a key from a file"}, timeout=120
            )
            assert any(line.startswith("ready: ") for line in process.stdout)  # before it, what is compiled
            assert client.get("/health").json()["status"] == "ready"
            assert httpx.get(f"{address[0]}/v1/models").status_code == 401
            with ThreadPoolExecutor(1) as pool:
                body = {"prompt": "x", "steps": 200, "n": 4}
                running = pool.submit(client.post, "/v1/images/generations", json=body)
                while client.get("/health").json()["running"] == 0:
                    assert not running.done()
                process.send_signal(signal.SIGTERM)
                while client.get("/health").json()["status"] != "stopping":
                    assert not running.done()
                refused = client.post("/v1/images/generations", json={"prompt": "y"})
                assert refused.status_code == 503
                assert refused.json()["error"]["code"] == "server_stopping"
                assert len(running.result().json()["data"]) == 4
            assert process.wait(60) == 0
            assert process.stdout.read() == "stopped\n"
        finally:
            process.kill()
            client.close()


@pytest.mark.slow
def test_stopping_ends_the_streams_of_open_pages_in_silence(tmp_path):
    command = [part for part in COMMAND if part != "--no-page"]
    environment = environment_with_temporary_folder(tmp_path)
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        ) as process,
        contextlib.ExitStack() as connections,
    ):
        assert process.stdout is not None
        try:
            address = re.search(r"http://127\.0\.0\.1:(\d+)", process.stdout.readline())
            assert address is not None
            assert any(line.startswith("ready: ") for line in process.stdout)  # before it, what is compiled
            assert list(tmp_path.glob("kandinsky-jax-*"))
            for i in range(3):
                connection = connections.enter_context(socket.create_connection(("127.0.0.1", int(address[1])), 30))
                path = f"/ui/gradio_api/heartbeat/tab{i}"
                connection.sendall(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            said, faults = process.communicate(timeout=30)
            assert time.monotonic() - began < 3
            assert process.returncode == 0
            assert said == "stopped\n"
            assert "Traceback" not in faults
            assert "Error" not in faults
            assert "graceful" not in faults
            assert not list(tmp_path.glob("kandinsky-jax-*"))  # what the page gives Gradio
        finally:
            process.kill()


@pytest.mark.slow
def test_what_runs_for_page_and_api_is_cancelled_after_the_grace():
    command = [part for part in COMMAND if part != "--no-page"] + ["--grace", "3", "--max-steps", "1000"]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process,
        ThreadPoolExecutor(3) as pool,
    ):
        assert process.stdout is not None
        try:
            address = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
            assert address is not None
            assert any(line.startswith("ready: ") for line in process.stdout)  # before it, what is compiled
            with httpx.Client(base_url=address[0], timeout=60) as client:
                stream = f"{address[0]}/ui/gradio_api/queue/data?session_hash="
                event = page_event(client, "on_cancel", "idle")
                assert client.post("/ui/gradio_api/queue/join", json=event).status_code == 200
                assert "close_stream" in last_line("GET", f"{stream}idle")
                idle = pool.submit(last_line, "GET", f"{stream}idle")  # has nothing to say any more
                event = page_event(client, "on_generate", "tab", Prompt="x", Steps="900", Pictures=10)
                assert client.post("/ui/gradio_api/queue/join", json=event).status_code == 200
                page = pool.submit(last_line, "GET", f"{stream}tab")
                while client.get("/health").json()["running"] == 0:
                    assert not page.done()
                body = {"prompt": "x", "steps": 900, "n": 10, "stream": True}
                api = pool.submit(last_line, "POST", f"{address[0]}/v1/images/generations", json=body)
                while client.get("/health").json()["waiting"] == 0:
                    assert not api.done()
            process.send_signal(signal.SIGTERM)
            began = time.monotonic()
            said, faults = process.communicate(timeout=30)
            assert time.monotonic() - began < 3 + 4
            assert process.returncode == 0
            assert said == "stopped\n"
            assert "Traceback" not in faults
            assert re.search(r" page/generation (499|503) ", faults)
            assert "cancelled" in api.result(10)
            for one in (idle, page):
                with contextlib.suppress(httpx.RemoteProtocolError):  # the page's streams have no end of their own
                    one.result(10)
        finally:
            process.kill()


def page_event(client: httpx.Client, name: str, tab: str, **values: object) -> dict[str, object]:
    """An event of the page, by its function's name, with values by the labels of its inputs."""
    config = client.get("/ui/config").json()
    [function] = [one for one in config["dependencies"] if one["api_name"] == name]
    inputs = [one["props"] for number in function["inputs"] for one in config["components"] if one["id"] == number]
    data = [values.get(one.get("label"), one.get("value")) for one in inputs]
    return {"data": data, "fn_index": function["id"], "session_hash": tab}


def last_line(method: str, url: str, **given: object) -> str:
    """The last line of a stream."""
    with httpx.stream(method, url, timeout=60, **given) as answer:
        return [line for line in answer.iter_lines() if line][-1]
