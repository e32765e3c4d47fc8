"""Settings restored from pictures: the server's own, the command line's, and those of other tools."""

from __future__ import annotations

import io
import json
import random

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kandinsky_jax import images
from kandinsky_jax.serve.records import SettingsError, encode_image, parameters_text, read_settings
from kandinsky_jax.serve.requests import ImageRequest
from tests.test_picture_records import OTHERS, PICTURE, opened

ENDINGS = ("png", "jpeg", "webp")
ALPHABET = [
    "a",
    "Z",
    "7",
    " ",
    ",",
    ":",
    ";",
    '"',
    "'",
    "\\",
    "\n",
    "é",
    "猫",
    "🙂",
    "{",
    "}",
    "\t",
    "<lora:x:1>",
    "=",
    "%",
]


def texts(seed: int, number: int) -> list[str]:
    """Seeded prompts, empty and one-line ones among them."""
    rng = random.Random(seed)
    made = ["".join(rng.choices(ALPHABET, k=rng.choice((1, 3, 10, 60)))) for _ in range(number)]
    return ["", '"', "Negative prompt: x", "Steps: 1, Seed: 2, Size: 3x4", "a\nNegative prompt: b", *made]


def with_text(key: str, text: str) -> bytes:
    info = PngInfo()
    info.add_text(key, text)
    data = io.BytesIO()
    PICTURE.save(data, "PNG", pnginfo=info)
    return data.getvalue()


def request_of(number: int, prompt: str, negative: str) -> ImageRequest:
    rng = random.Random(number)
    return ImageRequest(
        mode=rng.choice(("generate", "img2img", "inpaint", "controlnet", "controlnet-img2img", "vary")),
        prompt=prompt,
        negative_prompt=rng.choice((None, negative)),
        image=PICTURE,
        strength=rng.choice((None, 0.3, 1.0)),
        height=64 * rng.randint(1, 16),
        width=64 * rng.randint(1, 16),
        num_images=rng.randint(1, 4),
        seed=rng.choice((0, 1, 2**63 - 1)),
        num_inference_steps=rng.randint(1, 100),
        guidance_scale=rng.choice((1.0, 4.0, 0.1 + 0.2)),
        prior_num_inference_steps=rng.randint(1, 100),
        prior_guidance_scale=rng.choice((1.0, 2.5)),
        scheduler=rng.choice((None, "ddim", "dpm++2m-karras", "dpm++2m-trailing", "euler-a")),
        loras=rng.choice(({}, {"a, b: c": 0.5, "d": -1.0})),
        fast=rng.random() < 0.5,
        torch_noise=rng.random() < 0.5,
        paste_back=rng.random() < 0.5,
    )


def told(request: ImageRequest) -> dict[str, object]:
    """The fields of a request that its record has."""
    facts = {name: value for name, value in vars(request).items() if value is not None}
    return {name: value for name, value in facts.items() if value != {} and name not in ("image", "items", "weights")}


@pytest.mark.parametrize("ending", ENDINGS)
def test_settings_of_the_server_are_restored(ending):
    prompts = texts(0, 40)
    for i, prompt in enumerate(prompts):
        request = request_of(i, prompt, prompts[-i])
        data = encode_image(PICTURE, request.record("tiny", 1), ending)
        assert read_settings(data) == told(request)
        assert read_settings(opened(data)) == told(request)
        ImageRequest(**read_settings(data))


def test_settings_are_restored_where_only_the_parameters_are_left():
    """Whatever a line of a prompt is, except that outer spaces are lost, and what looks like a negative prompt is."""
    for i, prompt in enumerate(text for text in texts(1, 60) if "Negative prompt:" not in text):
        request = request_of(i, prompt, "bad, worse")
        found = read_settings(with_text("parameters", parameters_text(request.record("tiny", 0))))
        expected = told(request)
        for name in ("num_images", "loras", "fast", "torch_noise", "paste_back"):
            expected.pop(name, None)
        expected["prompt"] = "\n".join(line.strip() for line in prompt.strip().split("\n")).strip("\n")
        assert found == expected, prompt


def test_a_mix_is_restored_without_its_pictures():
    request = ImageRequest(mode="mix", items=("dog", PICTURE, "a, b"), weights=(0.5, 0.25, 0.25), seed=1)
    found = read_settings(encode_image(PICTURE, request.record("tiny", 0), "png"))
    assert found["items"] == ("dog", None, "a, b")
    assert found["weights"] == (0.5, 0.25, 0.25)
    assert found["mode"] == "mix"
    assert "prompt" not in found


@pytest.mark.parametrize(
    ("record", "mode"),
    [
        ({}, "generate"),
        ({"files": {"image": ["a.png"]}, "strength": 0.5}, "img2img"),
        ({"files": {"image": ["a.png"]}, "strength": 0.5, "prior": {"num_inference_steps": 5}}, "vary"),
        ({"files": {"image": ["a.png"], "mask_image": ["/etc/passwd"]}}, "inpaint"),
        ({"files": {"hint": ["a.png"]}}, "controlnet"),
        ({"files": {"hint": ["a.png"], "image": ["b.png"]}}, "controlnet-img2img"),
    ],
)
def test_settings_of_the_command_line_are_restored(record, mode):
    run = {"prompt": "red", "model": "tiny", "seed": 7, "image": 2, "torch_noise": False, "scheduler": None}
    run |= {"fast": True, "guidance_scale": 4, "guider": None, "guidance_interval": [0.3, 0.7], "cache_interval": 1}
    found = read_settings(encode_image(PICTURE, run | record, "png"))
    expected = {"mode": mode, "prompt": "red", "seed": 7, "num_images": 3, "fast": True, "torch_noise": False}
    expected |= {"guidance_scale": 4.0} | ({"strength": 0.5} if "strength" in record else {})
    assert found == expected | ({"prior_num_inference_steps": 5} if "prior" in record else {})


def test_a_mix_of_the_command_line_is_restored():
    found = read_settings(encode_image(PICTURE, {"items": ["dog", "cat.png"], "weights": [0.6, 0.4]}, "webp"))
    assert found == {"mode": "mix", "items": ("dog", None), "weights": (0.6, 0.4)}


def test_settings_of_other_tools_are_restored():
    assert read_settings(with_text("parameters", OTHERS)) == {
        "prompt": "girl with a hat, desert, ((detailed))\nby the sea",
        "negative_prompt": "ugly, [blurry]\nwatermark",
        "num_inference_steps": 20,
        "scheduler": "euler-a",
        "guidance_scale": 7.5,
        "seed": 965400086,
        "width": 512,
        "height": 768,
        "strength": 0.4,
    }
    # The upscaler's strength is another; a sampler and a seed that are not ours are left out.
    other = "x\nSteps: 20, Sampler: DPM adaptive, Seed: -1, CFG scale: nan, Denoising strength: 0.4, Hires upscale: 2"
    assert read_settings(with_text("parameters", other)) == {"prompt": "x", "num_inference_steps": 20}
    for sampler, ours in (("DPM++ 2M Karras", "dpm++2m-karras"), ("Euler a Karras", "euler-a"), ("Heun", "heun")):
        found = read_settings(with_text("parameters", f"x\nSteps: 1, Sampler: {sampler}, Schedule type: Uniform"))
        assert found["scheduler"] == ours


WRONG = (True, -1, 1.5, 10**30, float("nan"), float("inf"), "x", "4", "\ud800", [], [1], {}, {"a": {}}, None)


def test_values_that_no_request_could_have_are_left_out():
    """Every field with values of every kind: what comes back has the field's type and range."""
    kinds = {"mode": str, "prompt": str, "negative_prompt": str, "scheduler": str}
    kinds |= dict.fromkeys(("height", "width", "num_images", "seed", "num_inference_steps"), int)
    kinds |= dict.fromkeys(("strength", "guidance_scale", "prior_guidance_scale"), float)
    kinds |= dict.fromkeys(("fast", "torch_noise", "paste_back"), bool)
    kinds |= {"prior_num_inference_steps": int, "items": tuple, "weights": tuple, "loras": dict}
    names = [*kinds, "image", "mask_image", "hint", "files", "prior", "model", "other"]
    for name in names:
        for value in WRONG:
            found = read_settings(with_text("kandinsky_jax", json.dumps({name: value})))
            assert found.keys() <= kinds.keys()
            for field, restored in found.items():
                assert type(restored) is kinds[field], (name, value)
                assert restored == restored
                assert not isinstance(restored, int | float) or -1e6 <= restored < 2**63
            ImageRequest(**found)


def test_damaged_records_leave_the_parameters():
    info = PngInfo()
    info.add_itxt("kandinsky_jax", '{"prompt": ')
    info.add_text("parameters", "cat\nSteps: 3, Seed: 4, Size: 64x128")
    data = io.BytesIO()
    PICTURE.save(data, "PNG", pnginfo=info)
    assert read_settings(data.getvalue()) == {
        "prompt": "cat", "num_inference_steps": 3, "seed": 4, "width": 64, "height": 128
    }  # fmt: skip


@pytest.mark.parametrize("text", ["[" * 60_000, '{"a":' * 10_000, "1" * 60_000, "[1]", "null", "", "\0"])
def test_records_that_are_no_records_are_ignored(text):
    assert read_settings(with_text("kandinsky_jax", text)) == {}


@pytest.mark.parametrize("mark", ["a:", 'a: "', 'ab: "\\", ', "ab: 1, ", ",", ":", '"', "\n", "Negative prompt:\n"])
def test_hostile_parameters_are_read_in_little_time(mark):
    text = mark * (60_000 // len(mark))
    assert read_settings(with_text("parameters", text)).keys() <= {"prompt", "negative_prompt"}


def test_what_is_no_picture_is_refused():
    for data in (b"", b"x", b"\x89PNG\r\n\x1a\n", b"/etc/passwd", encode_image(PICTURE, {}, "png")[:40]):
        with pytest.raises(SettingsError, match="cannot be read as a picture of PNG, JPEG or WebP"):
            read_settings(data)
    data = io.BytesIO()
    PICTURE.save(data, "GIF")
    with pytest.raises(SettingsError):
        read_settings(data.getvalue())
    assert read_settings(Image.new("RGB", (8, 8))) == {}


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # of damaged EXIF
@pytest.mark.parametrize("ending", ENDINGS)
def test_damaged_pictures_raise_nothing_else(ending):
    rng = random.Random(5)
    request = request_of(0, "a cat, é", "dog")
    whole = encode_image(PICTURE, request.record("tiny", 0), ending)
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        try:
            found = read_settings(bytes(data))
        except SettingsError:
            continue
        ImageRequest(**found)


def test_formats_and_qualities_are_checked():
    with pytest.raises(ValueError, match="'gif' is no format of pictures; there are png, jpg, jpeg, webp"):
        encode_image(PICTURE, {}, "gif")
    with pytest.raises(ValueError, match="quality is 0, needed are 1 to 100"):
        encode_image(PICTURE, {}, "jpeg", 0)
    noise = Image.effect_noise((64, 64), 90).convert("RGB")
    assert len(encode_image(noise, {}, "jpeg", 20)) < len(encode_image(noise, {}, "jpeg")) / 2
    assert images.read(io.BytesIO(encode_image(noise, {}, "png", 20))).tobytes() == noise.tobytes()
