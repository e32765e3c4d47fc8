"""The API as OpenAI's client calls it: pictures are those of the pipelines, errors are the client's own classes."""

from __future__ import annotations

import base64
import io
import json
import time
import warnings
from pathlib import Path

import numpy as np
import openai
import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.serve.records import read_settings
from tests.conftest import note
from tests.serve.servers import encoded, half_masked, server, tiny

pytestmark = pytest.mark.slow
CLOSE = 0.02  # of 255, mean over a picture: the engine pads batches, the pipelines do not
STEPS = {"num_inference_steps": 3, "prior_num_inference_steps": 2}
GUIDANCE = {"guidance_scale": 2.0, "prior_guidance_scale": 1.0}  # what the model recommends, and the server uses
FEW = {"steps": 3, "prior_steps": 2, "seed": 11}


@pytest.fixture(scope="module")
def running():
    with server() as found:
        yield found


@pytest.fixture(scope="module")
def client(running):
    return running.client()


@pytest.fixture(scope="module")
def picture():
    """A picture with a gradient, so that what is done to it is seen."""
    rows, columns = np.mgrid[0:64, 0:64].astype(np.uint8) * 4
    return Image.fromarray(np.stack([rows, columns, 255 - rows], -1))


def pixels(image) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(image.b64_json))), np.float32)


def check_close(images, expected, what):
    assert len(images) == len(expected)
    for image, other in zip(images, expected, strict=True):
        assert note(np.abs(pixels(image) - np.asarray(other, np.float32)).mean(), what) <= CLOSE


def pipeline(mode, **given):
    own = {"generator": 11, "height": 64, "width": 64, **STEPS, **GUIDANCE}
    return tiny().pipe(mode)("a red heart", **(own | given)).images


# Pictures ----------------------------------------------------------------------------------------------------------


def test_generations_are_the_pipelines(client):
    response = client.images.generate(
        model="tiny", prompt="a red heart", n=2, size="64x64", extra_body=FEW | {"guidance_scale": 3.0}
    )
    assert response.size == "64x64"
    assert response.output_format == "png"
    check_close(response.data, pipeline("generate", guidance_scale=3.0, num_images_per_prompt=2), "generations")
    assert [image.seed for image in response.data] == [11, 11]
    assert [image.settings["image"] for image in response.data] == [0, 1]
    data = base64.b64decode(response.data[1].b64_json)
    assert read_settings(data)["seed"] == 11  # the file has them too


def test_the_scheduler_and_the_fast_adapter_are_used(client):
    given = {"seed": 11, "steps": 3, "scheduler": "ddim"}
    response = client.images.generate(prompt="a red heart", extra_body=given | {"prior_steps": 2})
    assert response.data[0].settings["scheduler"] == "ddim"
    fast = client.images.generate(prompt="a red heart", extra_body={"seed": 11, "fast": True})
    own = tiny().settings("generate", fast=True)
    assert fast.data[0].settings["num_inference_steps"] == own.num_inference_steps
    assert np.abs(pixels(fast.data[0]) - pixels(response.data[0])).mean() > 1


def test_an_edit_is_image_to_image(client, picture):
    response = client.images.edit(image=encoded(picture), prompt="a red heart", extra_body=FEW | {"strength": 0.7})
    assert response.data[0].settings["mode"] == "img2img"
    check_close(response.data, pipeline("img2img", image=picture, strength=0.7), "edits")


def test_an_edit_with_a_mask_repaints_what_is_transparent(client, picture):
    response = client.images.edit(
        image=encoded(picture), mask=half_masked(), prompt="a red heart", extra_body=FEW | {"paste_back": True}
    )
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    check_close(
        response.data, pipeline("inpaint", image=picture, mask_image=mask, paste_back=True), "edits with a mask"
    )
    kept = pixels(response.data[0])[:, :32] - np.asarray(picture, np.float32)[:, :32]
    assert np.abs(kept).max() == 0
    white = client.images.edit(
        image=encoded(picture), mask=encoded(mask), prompt="a red heart", extra_body=FEW | {"paste_back": True}
    )
    assert (pixels(white.data[0]) == pixels(response.data[0])).all()
    holes = picture.copy()
    holes.putalpha(Image.open(io.BytesIO(half_masked())).getchannel("A"))
    own = client.images.edit(image=encoded(holes), prompt="a red heart", extra_body=FEW | {"paste_back": True})
    assert (pixels(own.data[0]) == pixels(response.data[0])).all()


def test_several_images_are_mixed(client, picture):
    others = [encoded(picture), encoded(Image.new("RGB", (64, 64), "blue"), "JPEG")]
    response = client.images.edit(image=others, prompt="a red heart", extra_body=FEW | {"weights": [0.2, 0.3, 0.5]})
    settings = response.data[0].settings
    assert settings["mode"] == "mix"
    assert settings["weights"] == [0.2, 0.3, 0.5]
    texts = [base64.b64encode(data).decode() for data in others]
    items = ["a red heart", *({"image": text} for text in texts)]
    same = client.images.generate(prompt="", extra_body=FEW | {"items": items, "weights": [0.2, 0.3, 0.5]})
    assert (pixels(same.data[0]) == pixels(response.data[0])).all()
    read = [images.read(io.BytesIO(data)) for data in others]
    pipe = tiny().pipe("generate")
    embeds = pipe.prior_pipe.interpolate(
        ["a red heart", *read], [0.2, 0.3, 0.5], num_inference_steps=2, guidance_scale=1.0, generator=11
    )
    expected = pipe.decoder_pipe(**embeds, height=64, width=64, num_inference_steps=3, guidance_scale=2.0, generator=11)
    check_close(response.data, expected.images, "mixes")


def test_hints_and_variations(client, picture):
    hint = base64.b64encode(encoded(picture.convert("L"))).decode()
    response = client.images.generate(prompt="a red heart", extra_body=FEW | {"hint": hint})
    check_close(response.data, pipeline("controlnet", hint=picture.convert("L")), "hints")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # OpenAI's own has no variations any more
        response = client.images.create_variation(
            image=encoded(picture), n=2, response_format="url", extra_body=FEW | {"prompt": "blue", "strength": 0.5}
        )
    assert [image.settings["mode"] for image in response.data] == ["vary", "vary"]
    assert all(image.url.startswith("data:image/png;base64,") for image in response.data)


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_formats(client, kind):
    given = {"prompt": "a red heart", "output_format": kind, "extra_body": FEW}
    small, large = (client.images.generate(output_compression=quality, **given) for quality in (10, 100))
    assert small.output_format == kind
    assert Image.open(io.BytesIO(base64.b64decode(small.data[0].b64_json))).format == kind.upper()
    assert len(small.data[0].b64_json) < len(large.data[0].b64_json)


# Streams -----------------------------------------------------------------------------------------------------------


def test_a_stream_has_partial_images(client, picture):
    slow = FEW | {"steps": 200}
    events = list(client.images.generate(prompt="a red heart", n=2, stream=True, partial_images=2, extra_body=slow))
    kinds = [event.type.partition(".")[2] for event in events]
    assert kinds[-1] == "completed"
    assert kinds.count("completed") == 2
    assert kinds.count("partial_image") >= 2
    for event in events:
        assert pixels(event).shape[-1] == 3
        assert event.size == "64x64"
    partial = [(event.image_index, event.partial_image_index) for event in events if "partial" in event.type]
    assert len(set(partial)) == len(partial)
    assert {index for _, index in partial} <= {0, 1}
    whole = client.images.generate(prompt="a red heart", n=2, extra_body=slow)
    done = {event.image_index: event for event in events if "completed" in event.type}
    assert all(np.abs(pixels(done[i]) - pixels(image)).mean() <= CLOSE for i, image in enumerate(whole.data))
    assert done[0].usage.total_tokens == 0
    [event] = client.images.edit(image=encoded(picture), prompt="x", stream=True, extra_body=FEW | {"strength": 1.0})
    assert event.type == "image_edit.completed"


# Errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"n": 11}, "n"),
        ({"n": 0}, "n"),
        ({"size": "65x"}, "size"),
        ({"size": "128x128"}, "size"),
        ({"background": "transparent"}, "background"),
        ({"prompt": " "}, "prompt"),
        ({"extra_body": {"steps": 100_000}}, "steps"),
        ({"extra_body": {"seed": -1}}, "seed"),
        ({"extra_body": {"seed": 2**63}}, "seed"),
        ({"extra_body": {"scheduler": "fastest"}}, "scheduler"),
        ({"extra_body": {"loras": {"../../x": 1.0}}}, "loras"),
        ({"extra_body": {"guidance_scale": "high"}}, "guidance_scale"),
        ({"extra_body": {"stepz": 3}}, "stepz"),
        ({"partial_images": 1}, "partial_images"),
        ({"output_compression": 50}, "output_compression"),
    ],
    ids=str,
)
def test_bad_requests_name_the_field(client, given, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(**({"prompt": "x"} | given))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize("name", ["steps", "prior_steps"])
def test_counts_say_their_least_value(client, name):
    with pytest.raises(openai.BadRequestError, match=f"{name} is -1: Input should be greater than or equal to 1"):
        client.images.generate(prompt="x", extra_body={name: -1})


def test_a_field_of_another_route_is_named_with_the_route(client):
    with pytest.raises(
        openai.BadRequestError, match="'strength' is no field of /v1/images/generations; its fields are"
    ):
        client.images.generate(prompt="x", extra_body={"strength": 0.5})


def test_errors_of_models_and_masks(client, picture):
    with pytest.raises(openai.NotFoundError) as caught:
        client.images.generate(prompt="x", model="gpt-image-2")
    assert caught.value.code == "model_not_found"
    black = encoded(Image.new("L", (64, 64)))
    for mask, says in ((black, "repaints nothing"), (encoded(Image.new("L", (32, 64), 255)), "the same size")):
        with pytest.raises(openai.BadRequestError, match=says):
            client.images.edit(image=encoded(picture), mask=mask, prompt="x")
    with pytest.raises(openai.BadRequestError, match="strength is not used with a mask"):
        client.images.edit(image=encoded(picture), mask=half_masked(), prompt="x", extra_body={"strength": 0.5})


# A client that leaves, and the log ---------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
def test_a_client_that_leaves_frees_its_place(running, streams):
    body = json.dumps({"prompt": "x", "steps": 200, "n": 10, "stream": streams})
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with running.connect() as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        wait_until(lambda: running.service.state.running == 1)
    began = time.monotonic()
    wait_until(lambda: running.service.state.running == 0)
    assert time.monotonic() - began < 2  # of more than five
    assert running.send("GET", "/metrics").text.count('status="499"') >= 1 or streams


def test_pictures_are_counted_and_logged(running, client, caplog):
    with caplog.at_level("INFO", "kandinsky_jax.serve"):
        client.images.generate(prompt="a secret", extra_body=FEW)
        wait_until(lambda: any("/v1/images" in record.getMessage() for record in caplog.records))
    [line] = [record.getMessage() for record in caplog.records if "/v1/images" in record.getMessage()]
    assert "mode=generate size=64x64 steps=3 n=1 seed=11 queue=" in line
    assert "secret" not in caplog.text
    text = running.send("GET", "/metrics").text
    assert 'kandinsky_jax_images_total{mode="generate"}' in text
    assert "kandinsky_jax_evaluations_total" in text


def wait_until(condition, seconds: float = 60.0):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.005)


def test_the_example_of_the_docs_runs(running, capsys):
    text = (Path(__file__).parents[2] / "docs" / "serve.md").read_text()
    example = text.partition("## The API")[2].partition("```python\n")[2].partition("```")[0]
    own = example.replace("http://127.0.0.1:7860", running.url)
    assert own != example
    names: dict[str, object] = {}
    exec(compile(own, "docs/serve.md", "exec"), names)
    names["client"].close()
    assert len(capsys.readouterr().out.splitlines()) == 2
    assert Image.open(io.BytesIO(names["picture"])).size == (64, 64)
