"""`kandinsky_jax.serve.launch`."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from kandinsky_jax import KandinskyV22CombinedPipeline, serve
from kandinsky_jax.serve import notebook
from kandinsky_jax.serve.notebook import _name_of
from kandinsky_jax.serve.requests import ImageRequest
from tests.serve.servers import tiny


def test_settings_that_launch_refuses():
    with pytest.raises(ValueError, match="share"):
        serve.launch(share=True)
    with pytest.raises(ValueError, match="no setting colour"):
        serve.launch(tiny().pipe("generate"), colour="red")
    with pytest.raises(ValueError, match="no pipeline"):
        serve.launch()


def test_launch_serves_the_page_in_a_frame_until_it_is_closed():
    with serve.launch([tiny().pipe("generate"), tiny().pipe("inpaint")], batch_sizes=(1,), grace=1.0) as page:
        assert page.service.model.name == Path(tiny().pipe("generate")._name_or_path).name
        assert "inpaint" in page.service.model.modes
        assert f'src="{page.url}/ui/"' in page._repr_html_()
        answer = httpx.get(f"{page.url}/ui/")
        assert answer.status_code == 200
        assert "http://localhost:*" in answer.headers["content-security-policy"]
    page.close()
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{page.url}/ui/")


@pytest.mark.slow
def test_a_cell_may_be_run_again():
    pipe = tiny().pipe("generate")
    first = serve.launch(pipe, batch_sizes=(1,), grace=1.0)
    with serve.launch(KandinskyV22CombinedPipeline.from_pipe(pipe), batch_sizes=(1,), grace=1.0) as second:
        assert "closed" in repr(first)
        assert second.service.submit(ImageRequest(prompt="purple heart")).result(60)
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            with pytest.raises(ValueError, match="in use"):
                serve.launch(pipe, port=other.getsockname()[1])
        assert "closed" not in repr(second), "what cannot be opened closes nothing"
        with serve.launch(pipe, port=int(second.url.rpartition(":")[2]), batch_sizes=(1,), grace=1.0) as third:
            assert (third.url, "closed" in repr(second)) == (second.url, True)
    assert not notebook._open


def test_a_program_waits_until_its_page_is_closed():
    page = serve.launch(tiny().pipe("generate"), batch_sizes=(1,), grace=1.0)
    waiting = threading.Thread(target=page.wait)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    page.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_closing_ends_the_streams_of_open_pages_in_silence(caplog):
    page = serve.launch(tiny().pipe("generate"), batch_sizes=(1,), grace=1.0)
    while not page.service.state.ready:  # a program that is being compiled is waited for
        time.sleep(0.05)
    with httpx.stream("GET", f"{page.url}/ui/gradio_api/heartbeat/tab") as stream:
        assert stream.status_code == 200
        began = time.monotonic()
        page.close()
        assert time.monotonic() - began < 3
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize(
    ("loaded_from", "name"),
    [
        ("/home/me/hearts", "hearts"),
        ("/cache/models--owner--hearts-2/snapshots/0a1b2c", "hearts-2"),
        (None, "notebook"),
    ],
)
def test_the_model_is_named_by_what_it_was_loaded_from(loaded_from, name):
    pipe = KandinskyV22CombinedPipeline.from_pipe(tiny().pipe("generate"))
    pipe._name_or_path = loaded_from
    assert _name_of([pipe]) == name


def test_importing_serve_imports_no_server():
    program = "import sys, kandinsky_jax.serve; assert not {'gradio', 'fastapi', 'uvicorn'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)
