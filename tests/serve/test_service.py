"""What a service makes of its settings, of programs that cannot be compiled, and of the end of the process."""

from __future__ import annotations

import gc
import subprocess
import sys
import time
import warnings
import weakref

import pytest
from PIL import Image

from kandinsky_jax.serve.batching import warmup
from kandinsky_jax.serve.batching.plan import RequestPlan
from kandinsky_jax.serve.requests import ImageRequest
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service
from kandinsky_jax.serve.tickets import Failed, ImageDone
from tests.serve.servers import environment_with_temporary_folder, tiny

TOO_MANY = 2**32  # images at once, for any memory


def test_networks_are_served_once_at_a_time():
    model = ServedModel.load("tiny", modes=["generate"])
    twin = ServedModel([type(pipe).from_pipe(pipe) for pipe in model.by_repository.values()], "twin")
    first, second = (Service(one, ServerSettings(batch_sizes=(1,))) for one in (model, twin))
    first.start()
    try:
        assert first.shares_networks(second)
        assert not first.shares_networks(Service(tiny(), ServerSettings()))
        with pytest.raises(ValueError, match=r"served already.*stop that one first"):
            second.start()
    finally:
        first.stop()
    second.start()
    second.stop()


def test_announced_sizes_are_within_the_limit_of_pixels():
    with pytest.raises(
        ValueError, match=r"2048x1024 have 2,097,152 pixels, and max_pixels is 2,000,000; .*--max-pixels"
    ):
        Service(tiny(), ServerSettings(sizes=((64, 64), (1024, 2048)), max_pixels=2_000_000))
    with pytest.raises(ValueError, match="64x64 have 4,096 pixels"):  # the model's own
        Service(tiny(), ServerSettings(max_pixels=4_000))


def _wait_until_ready(service: Service) -> None:
    service.start()
    while not service.state.ready:
        time.sleep(0.05)


@pytest.mark.slow
def test_what_cannot_be_compiled_is_named_and_the_rest_is_served():
    model = ServedModel.load("tiny", modes=["generate"])
    service = Service(model, ServerSettings(batch_sizes=(1, TOO_MANY), prior_batch_sizes=(1,)))
    with pytest.warns(UserWarning, match=f"64x64 with.* guidance, {TOO_MANY} at once, cannot be compiled: "):
        _wait_until_ready(service)
    try:
        state = service.state
        assert len(state.failures) == 2
        assert state.compiled == state.programs - 2
        assert all(f"{TOO_MANY} at once: " in failure for failure in state.failures)
        assert service.submit(ImageRequest(prompt="purple heart", num_images=3)).result(60)
    finally:
        service.stop()


def test_compiling_leaves_the_filters_of_warnings_to_other_threads():
    """A thread that changes them for a while, as tests and notebooks do, gets its own back."""
    service = Service(ServedModel.load("tiny", modes=["generate"]), ServerSettings(batch_sizes=(1,)))
    filters, changed = list(warnings.filters), 0
    service.start()
    try:
        while not service.state.ready:
            changed += warnings.filters != filters
            time.sleep(0.0005)
    finally:
        service.stop()
    assert not changed
    assert not service.state.failures  # where warnings are errors: the rehearsals warn of nothing


def plan_of(side: int) -> RequestPlan:
    request = ImageRequest(prompt="a", height=side, width=64, num_inference_steps=2)
    return RequestPlan(tiny(), tiny().complete(request, ServerSettings(any_size=True)))


def test_what_is_waited_for_is_compiled_first_and_in_its_order(monkeypatch):
    settings = ServerSettings(batch_sizes=(1, 8), any_size=True)
    service = Service(tiny(), settings)
    one, sizes = service.warmup, service._engine.sizes
    sides = (128, 192, 256)
    for side in sides:
        assert not one.is_compiled(plan_of(side), "decoder", 1)
    for _ in sides:
        assert not one.is_compiled(plan_of(128), "prior", 4)
    for side in sides:
        kind = one._next()
        assert (kind.size, kind.batch_size, kind.prior_batch_size) == ((side, 64), 1, 1)
        one._ready |= kind.programs()
    kind = one._next()
    assert (kind.size, kind.batch_size, kind.prior_batch_size) == ((128, 64), sizes.decoder[0], 4)
    one._ready |= kind.programs()
    assert not one.is_compiled(plan_of(320), "decoder", 1)
    monkeypatch.setattr(warmup, "ASKED_SECONDS", 0.0)  # the clients of 320 have left
    assert one._next() == one.kinds[0]
    assert not one._asked


def test_an_ended_request_frees_its_memory_without_the_cyclic_collector():
    service = Service(ServedModel.load("tiny", modes=["img2img"]), ServerSettings(batch_sizes=(1,)))
    service.start()
    picture = Image.new("RGB", (64, 64))
    gc.collect()
    gc.disable()
    try:
        ticket = service.submit(ImageRequest(mode="img2img", prompt="purple heart", image=picture, num_images=2))
        held = weakref.ref(ticket)
        assert len([event for event in ticket.events() if isinstance(event, ImageDone)]) == 2
        cancelled = service.submit(ImageRequest(mode="img2img", prompt="purple heart", image=picture))
        also_held = weakref.ref(cancelled)
        cancelled.cancel()
        assert any(isinstance(event, Failed) for event in cancelled.events())
        service.stop()
        del ticket, cancelled
        assert (held(), also_held()) == (None, None)
    finally:
        gc.enable()


@pytest.mark.slow
@pytest.mark.parametrize("end", ["", "page.close()"], ids=["as it is", "after close"])
def test_a_program_may_end_while_its_server_compiles(tmp_path, end):
    program = f"""
import kandinsky_jax as kj
from kandinsky_jax.serve import launch
page = launch(kj.KandinskyV22CombinedPipeline.from_pretrained("tiny"))
{end}
"""
    line = [sys.executable, "-c", program]
    environment = environment_with_temporary_folder(tmp_path)
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not list(tmp_path.glob("kandinsky-jax-*"))  # what the page gives Gradio
