"""Continuous batching: images of any requests share steps, and each has the bits that it has alone."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from PIL import Image

import kandinsky_jax as kj
from kandinsky_jax.diffusion.rng import image_keys
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.schedulers import NAMES, scheduler_named
from kandinsky_jax.serve.batching.image_task import ImageTask
from kandinsky_jax.serve.batching.plan import RequestPlan
from kandinsky_jax.serve.batching.slots import SlotBatch, SlotJob
from kandinsky_jax.serve.requests import MIX, VARY, ImageRequest, RequestError
from kandinsky_jax.serve.served_model import ServedModel
from kandinsky_jax.serve.server_settings import ServerSettings
from kandinsky_jax.serve.service import Service
from kandinsky_jax.serve.tickets import Cancelled, Failed, Progress, QueueFull, Ticket, TimedOut
from tests.conftest import note

TOLERANCE = 0.02  # of 255, beside the pipeline
PROMPTS = ("purple heart", "red apple", "grinning face", "dog face", "cat face", "panda face", "green heart", "a b c")


class Made(NamedTuple):
    """An image as MoVQ decoded it, and the batch sizes that it ran at."""

    pixels: np.ndarray
    sizes: dict[str, int]
    plan: RequestPlan
    index: int


class Recorder:
    """A service whose decoded images are kept."""

    def __init__(self, model: ServedModel, settings: ServerSettings):
        self.made: dict[tuple[Ticket, int], Made] = {}
        self.service = Service(model, settings)
        deliver = self.service._engine.deliver

        def recorded(run: Any, pending: Any) -> None:
            pixels = np.asarray(pending.array)
            self.made[run.work.ticket, run.task.index] = Made(pixels, dict(run.sizes), run.work.plan, run.task.index)
            deliver(run, pending)

        self.service._engine.deliver = recorded
        self.service.start()

    def wait_until_ready(self) -> None:
        while not self.service.state.ready:
            time.sleep(0.05)


@pytest.fixture(scope="module")
def generating() -> Iterator[Recorder]:
    """A service of one mode, whose programs are few."""
    model = ServedModel.load("tiny", modes=["generate"])
    recorder = Recorder(model, ServerSettings(batch_sizes=(2,), max_queue=4))
    recorder.wait_until_ready()
    yield recorder
    recorder.service.stop()


def alone(made: Made) -> np.ndarray:
    """Generate an image by itself, in batches of the same padded sizes."""
    plan, task = made.plan, ImageTask(made.plan, made.index)
    _run_alone(plan.model, plan.pipe.prior_prior, task.start_prior(), made.sizes.get("prior", 1))
    job = task.start_decoder()
    _run_alone(plan.model, plan.decoder.unet, [job], made.sizes["decoder"])
    return np.asarray(task.decode(job).array)


def _run_alone(model: ServedModel, module: Any, jobs: list[SlotJob], size: int) -> None:
    network, params = model.network(module)
    for job in jobs:
        batch = SlotBatch(network, params, size, guided=job.inputs.uncond is not None)
        batch.add(job)
        while batch.jobs:
            batch.advance()


def by_pipeline(made: Made) -> np.ndarray:
    """Generate an image by the pipelines, `[H, W, 3]` in 0..1: several times, to fill batches of the same sizes."""
    request, model = made.plan.request, made.plan.model
    pipe, scheduler = model.pipe(request.mode), model.pipe(request.mode).scheduler
    pipe.set_progress_bar_config(disable=True)
    copies, of_prior = made.sizes["decoder"], 1 if request.mode == MIX else made.sizes.get("prior", 1)
    sources: Any = image_keys([request.seed] * max(copies, of_prior), [made.index] * max(copies, of_prior))
    if request.torch_noise:
        sources = [kj.TorchGenerator(request.seed) for _ in range(max(copies, of_prior))]
    prior: dict[str, Any] = {
        "num_inference_steps": request.prior_num_inference_steps,
        "guidance_scale": request.prior_guidance_scale,
        "generator": sources[:of_prior],
    }
    own: dict[str, Any] = {"height": request.height, "width": request.width, "output_type": "np"}
    own |= {"num_inference_steps": request.num_inference_steps, "guidance_scale": request.guidance_scale}
    if request.scheduler is not None:
        pipe.scheduler = scheduler_named(request.scheduler, scheduler.config)
    try:
        if request.mode == MIX:
            embeds = pipe.prior_pipe.interpolate(
                list(request.items), list(request.weights), negative_prompt=request.negative_prompt or "", **prior
            )
        elif request.mode == VARY:
            model.vary_prior.set_progress_bar_config(disable=True)
            given = request.prompt, request.image, request.strength, request.negative_prompt
            embeds = model.vary_prior(*given, num_images_per_prompt=of_prior, **prior)
        else:
            prompts = request.prompt, request.negative_prompt
            embeds = pipe.prior_pipe(*prompts, num_images_per_prompt=of_prior, **prior)
            own |= {name: getattr(request, name) for name in MODES[request.mode].pictures}
            own |= {"strength": request.strength} if MODES[request.mode].takes_strength else {}
            own |= {"paste_back": request.paste_back} if request.mode == "inpaint" else {}
        each = {name: np.repeat(np.asarray(embed)[:1], copies, axis=0) for name, embed in embeds.items()}
        return pipe.decoder_pipe(**each, generator=sources[:copies], **own).images[0]
    finally:
        pipe.scheduler = scheduler


def pixels_of(made: Made, request: ImageRequest) -> np.ndarray:
    """Return an image as the pipelines return it."""
    pixels = np.clip(made.pixels * 0.5 + 0.5, 0, 1)
    own = made.plan.decoder_request
    if request.paste_back and own.image is not None:
        pixels = np.where(own.repaint_mask[..., None], pixels, np.clip(own.image * 0.5 + 0.5, 0, 1))
    return pixels[0]


def random_request(rng: random.Random, modes: tuple[str, ...], steps: int) -> ImageRequest:
    """Return a request of any mode, solver, steps, guidance, seed and negative prompt."""
    mode, noise = rng.choice(modes), rng.random() < 0.1
    noise_levels = np.random.default_rng(rng.randrange(2**32)).normal(128, 60, (64, 64, 1)).clip(0, 255)
    picture = Image.fromarray(np.repeat(noise_levels.astype(np.uint8), 3, axis=2)).resize(
        (rng.choice((48, 64, 96)), 64)
    )
    mask = Image.new("L", (64, 64))
    mask.paste(255, (rng.randrange(24), rng.randrange(24), 40, 48))
    pictures: dict[str, Any] = {"image": picture, "mask_image": mask, "hint": Image.linear_gradient("L")}
    needed = ("image",) if mode == VARY else MODES[mode].pictures if mode in MODES else ()
    mixed: dict[str, Any] = {"items": (rng.choice(PROMPTS), picture, "heart"), "weights": (0.4, 0.3, 0.3)}
    takes_strength = mode == VARY or (mode in MODES and MODES[mode].takes_strength)
    return ImageRequest(
        mode=mode,
        prompt="" if mode == MIX else rng.choice(PROMPTS),
        negative_prompt=rng.choice((None, None, "circle")),
        strength=rng.choice((0.5, 0.9)) if takes_strength else None,
        num_images=1 if noise else rng.choice((1, 1, 2)),
        seed=rng.randrange(2**40),
        torch_noise=noise,
        num_inference_steps=rng.randrange(8, steps),
        guidance_scale=rng.choice((1.0, 2.0, 3.5)),
        prior_num_inference_steps=rng.randrange(4, 12),
        prior_guidance_scale=rng.choice((1.0, 3.0)),
        scheduler=rng.choice((None, *(name for name in NAMES if name not in ("lcm", "tcd")))),
        paste_back=mode == "inpaint" and rng.random() < 0.5,
        **{name: pictures[name] for name in needed},
        **(mixed if mode == MIX else {}),
    )


def run_at_random_times(service: Service, requests: list[ImageRequest], rng: random.Random) -> list[Ticket]:
    """Submit requests one after the other with pauses, whenever the queue has room, and wait for all."""
    tickets = []
    for request in requests:
        while True:
            try:
                tickets.append(service.submit(request))
                break
            except QueueFull:
                time.sleep(0.02)
        time.sleep(rng.random() * 0.1)
    for ticket in tickets:
        ticket.result(600)
    return tickets


def check_all(recorder: Recorder, tickets: list[Ticket], beside: int) -> None:
    """Compare every image with itself alone, bit for bit, and those of the first tickets with the pipeline's.

    On average over its pixels, each of these is within the tolerance, and at least 95 % are in their worst pixel. LMS,
    PNDM and PLMS with few steps extrapolate far, and make more of the last bits, which two programs round differently.
    """
    worst = []
    for i, ticket in enumerate(tickets):
        request = ticket.request
        for index in range(request.num_images):
            made = recorder.made.pop((ticket, index))
            assert np.array_equal(alone(made), made.pixels), request
            if i < beside:
                error = 255 * np.abs(pixels_of(made, request) - by_pipeline(made))
                assert note(error.mean(), "mean error beside the pipeline, of 255") <= TOLERANCE, request
                worst.append(note(error.max(), "largest error beside the pipeline, of 255"))
                if worst[-1] > TOLERANCE:
                    note(worst[-1], f"largest errors over {TOLERANCE}: {request.scheduler}")
    assert note(np.mean(np.array(worst) > TOLERANCE), "share of images with a larger error") <= 0.05


def test_an_image_has_the_bits_that_it_has_alone(generating):
    rng = random.Random(1)
    requests = [random_request(rng, ("generate",), 12) for _ in range(5)]
    check_all(generating, run_at_random_times(generating.service, requests, rng), beside=3)


@pytest.mark.parametrize(
    ("count", "beside"),
    [
        pytest.param(12, 3, marks=pytest.mark.slow, id="12"),
        pytest.param(500, 501, marks=pytest.mark.campaign, id="500"),
    ],
)
def test_images_of_all_modes_solvers_and_steps_do_not_depend_on_their_neighbours(count, beside):
    recorder = Recorder(ServedModel.load("tiny"), ServerSettings(batch_sizes=(1, 8)))
    compiled: list[str] = []
    try:
        recorder.wait_until_ready()
        jax.monitoring.register_event_duration_secs_listener(
            lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
        )
        rng = random.Random(count)
        requests = [random_request(rng, recorder.service.model.modes, 24) for _ in range(count)]
        began = time.monotonic()
        tickets = run_at_random_times(recorder.service, [ImageRequest(prompt="purple heart", seed=1)], rng)  # alone
        tickets += run_at_random_times(recorder.service, requests, rng)
        seconds = time.monotonic() - began
        assert not compiled, "compiled after the service was ready"
        sizes = {size for made in recorder.made.values() for size in made.sizes.values()}
        assert {1, 8} <= sizes, "images must have run at several sizes"
        check_all(recorder, tickets, beside)
        note(sum(request.num_images for request in requests) / seconds, "images a second")
    finally:
        recorder.service.stop()


def test_previews_and_progress_come_before_the_pictures(generating):
    ticket = generating.service.submit(ImageRequest(prompt="purple heart", seed=3, num_images=2), previews=True)
    events = list(ticket.events())
    progress = [event for event in events if isinstance(event, Progress)]
    assert [event.done for event in progress] == sorted(event.done for event in progress)
    assert all(0 <= event.done <= 1 and event.step <= event.steps for event in progress)
    shown = [preview for event in progress for preview in event.previews if preview is not None]
    assert shown
    assert all(preview.size == (16, 16) and preview.mode == "RGB" for preview in shown)
    final = np.asarray(ticket.result()[0].picture.resize((16, 16), Image.Resampling.BOX), float)
    last = np.asarray(shown[-2], float)  # of the first picture
    assert np.abs(last - final).mean() < 40
    assert np.abs(last - final).mean() < np.abs(last - final[::-1]).mean(), "nearer than the picture upside down"


def test_cancelling_frees_the_place_at_once(generating):
    service = generating.service
    long = [service.submit(ImageRequest(prompt="dog face", num_inference_steps=200)) for _ in range(3)]
    running = next(event for event in long[0].events() if isinstance(event, Progress))
    assert running.done < 0.5
    evaluations = service.state.evaluations
    for ticket in long:
        ticket.cancel()
    for ticket in long:
        with pytest.raises(Cancelled):
            ticket.result(10)
    assert service.state.evaluations - evaluations < 200
    assert service.state.running == service.state.waiting == 0
    assert service.submit(ImageRequest(prompt="dog face", num_inference_steps=2)).result(30)


def test_the_queue_is_bounded_and_says_when_to_come_back(generating):
    tickets = [generating.service.submit(ImageRequest(prompt="dog face", num_inference_steps=150)) for _ in range(4)]
    with pytest.raises(QueueFull, match="4 requests are waiting or running") as raised:
        generating.service.submit(ImageRequest(prompt="dog face"))
    assert raised.value.retry_after >= 1
    for ticket in tickets:
        ticket.cancel()
    for ticket in tickets:
        with pytest.raises(Cancelled):
            ticket.result(10)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"prompt": " "}, "prompt", "prompt is empty"),
        ({"mode": "inpaint"}, "mode", "is not served"),
        ({"mode": "sculpt"}, "mode", "is not served; there are generate"),
        ({"height": 128, "width": 128}, "size", "size 128x128 is not served; there are 64x64"),
        ({"height": 65}, "size", "size 64x65 is not served"),
        ({"height": "64"}, "height", "must be an integer number of pixels"),
        ({"num_images": 11}, "num_images", "at most 10"),
        ({"num_images": 0}, "num_images", "at least 1"),
        ({"seed": -1}, "seed", "from 0 to"),
        ({"seed": True}, "seed", "needed is an integer"),
        ({"num_inference_steps": 201}, "num_inference_steps", "at most 200"),
        ({"num_inference_steps": 0}, "num_inference_steps", "at least 1"),
        ({"prior_num_inference_steps": 1}, "prior_num_inference_steps", "2 to"),
        ({"guidance_scale": float("nan")}, "guidance_scale", "finite"),
        ({"guidance_scale": -5.0}, "guidance_scale", "from 0 to 100"),
        ({"prior_guidance_scale": 101.0}, "prior_guidance_scale", "from 0 to 100"),
        ({"scheduler": "eular"}, "scheduler", "eular"),
        ({"loras": {"../../etc/passwd": 1.0}}, "loras", "there is no LoRA"),
        ({"image": Image.new("RGB", (8, 8))}, "image", "is not used by the mode generate"),
        ({"items": ("a",)}, "items", "not used"),
        ({"prompt": "a" * 10_001}, "prompt", "10001 characters; at most are 10000"),
        ({"prompt": "\ud800"}, "prompt", "half of a surrogate pair"),
        ({"torch_noise": True, "num_images": 2}, "num_images", "one picture at a time"),
    ],
)
def test_a_request_that_cannot_be_served_names_the_field(generating, fields, param, message):
    with pytest.raises(RequestError, match=message) as raised:
        generating.service.submit(ImageRequest(**{"prompt": "heart"} | fields))
    assert raised.value.param == param


@pytest.mark.slow
def test_another_size_is_compiled_when_it_is_asked_for(generating):
    service = Service(ServedModel.load("tiny", modes=["generate"]), ServerSettings(batch_sizes=(2,), any_size=True))
    service.warmup._ready |= generating.service.warmup._ready
    service.start()
    try:
        wide = service.submit(ImageRequest(prompt="dog face", height=64, width=128, num_inference_steps=4, seed=1))
        usual = service.submit(ImageRequest(prompt="dog face", num_inference_steps=4))
        assert usual.result(30), "it does not wait for the other size"
        assert wide.end is None
        assert wide.result(120)[0].picture.size == (128, 64)
    finally:
        service.stop()


def test_a_long_prompt_is_noted_and_its_words_are_not_logged(generating):
    ticket = generating.service.submit(ImageRequest(prompt="secret " * 90, num_inference_steps=2))
    assert ticket.notes == ("prompt has 272 tokens, of which CLIP reads 77: its end is not used",)
    assert ticket.result(30), "a warning would be an error here"
    assert generating.service.submit(ImageRequest(prompt="heart", num_inference_steps=2)).notes == ()


def test_a_request_that_takes_too_long_ends(generating):
    model = generating.service.model
    service = Service(model, ServerSettings(batch_sizes=(2,), time_limit=0.5))
    service.warmup._ready = generating.service.warmup._ready
    service._thread.start()
    try:
        ticket = service.submit(ImageRequest(prompt="dog face", num_inference_steps=200, num_images=8))
        with pytest.raises(TimedOut, match=r"not done after 0.5 seconds"):
            ticket.result(20)
        assert isinstance(ticket.end, Failed)
        assert service.state.running == 0
    finally:
        service.stop()


def test_stopping_finishes_what_runs_and_cancels_what_waits(generating):
    service = Service(generating.service.model, ServerSettings(batch_sizes=(2,)))
    service.warmup._ready = generating.service.warmup._ready
    service._thread.start()
    running = [service.submit(ImageRequest(prompt="dog face", num_inference_steps=40)) for _ in range(2)]
    while service.state.images < 2:
        time.sleep(0.01)
    waiting = [service.submit(ImageRequest(prompt="cat face", num_images=10)) for _ in range(3)]
    stopping = threading.Thread(target=service.stop)
    stopping.start()
    while not service.state.stopping:
        time.sleep(0.01)
    with pytest.raises(QueueFull, match="stopping"):
        service.submit(ImageRequest(prompt="dog face"))
    stopping.join(60)
    assert all(ticket.result(0) for ticket in running)
    assert any(isinstance(ticket.end, Failed) and isinstance(ticket.end.error, Cancelled) for ticket in waiting)
    assert all(ticket.end is not None for ticket in waiting)
