"""What pictures carry of their settings, in each format."""

from __future__ import annotations

import io
import struct

import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.picture_records import (
    MAX_TEXT,
    SAMPLERS,
    SCHEDULE_TYPES,
    Parameters,
    SettingsError,
    parameters_text,
    parse_parameters,
    read_texts,
    solver_and_schedule,
)
from kandinsky_jax.schedulers import NAMES
from kandinsky_jax.schedulers.names import SUFFIXES

PICTURE = Image.new("RGB", (16, 8), "red")
ENDINGS = ("png", "jpeg", "jpg", "webp")
# As AUTOMATIC1111's web interface writes it.
OTHERS = """girl with a hat, desert, ((detailed))
by the sea
Negative prompt: ugly, [blurry]
watermark
Steps: 20, Sampler: Euler a, Schedule type: Automatic, CFG scale: 7.5, Seed: 965400086, Size: 512x768, Model hash: \
45dee52b, Model: a-model, Denoising strength: 0.4, Lora hashes: "one: 12ab, two: 34cd", Version: v1.10.1"""


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def piexif_bytes(text: str) -> bytes:
    """EXIF with a UserComment as piexif writes it: big-endian, the comment in the Exif IFD."""
    comment = b"UNICODE\0" + text.encode("utf-16-be")
    first = struct.pack(">HHHLLL", 1, 0x8769, 4, 1, 26, 0)
    second = struct.pack(">HHHLLL", 1, 0x9286, 7, len(comment), 44, 0)
    return b"Exif\0\0MM\0*\0\0\0\x08" + first + second + comment


@pytest.mark.parametrize("ending", ENDINGS)
def test_every_format_carries_the_record_and_the_parameters(ending):
    record = {"prompt": 'a "cat", é猫\nsecond: line', "seed": 3, "guider": None}
    data = images.encode(PICTURE, ending, record)
    assert read_texts(opened(data)) == (record, parameters_text(record))
    assert read_texts(opened(images.encode(PICTURE, ending))) == (None, None)


def test_a_written_file_is_the_encoded_picture(tmp_path):
    images.write(tmp_path / "a.JPG", PICTURE, {"prompt": "red"})
    assert (tmp_path / "a.JPG").read_bytes() == images.encode(PICTURE, "jpg", {"prompt": "red"})


def test_parameters_are_those_of_other_tools():
    record = {
        "prompt": "a cat\nby the sea",
        "negative_prompt": "bad, worse",
        "num_inference_steps": 20,
        "scheduler": "dpm++2m-karras",
        "guidance_scale": 4.0,
        "seed": 1,
        "height": 512,
        "width": 768,
        "model": "models/a, b",
        "strength": 0.25,
        "prior": {"num_inference_steps": 25, "guidance_scale": 1.5},
        "loras": {"ink": 0.5, "oil": 1},
        "mode": "img2img",
    }
    assert parameters_text(record) == (
        "a cat\nby the sea\nNegative prompt: bad, worse\n"
        "Steps: 20, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 4, Seed: 1, Size: 768x512, "
        'Model: "a, b", Denoising strength: 0.25, Prior steps: 25, Prior CFG scale: 1.5, Lora: "ink: 0.5, oil: 1", '
        "Mode: img2img, Version: kandinsky-jax"
    )
    assert parameters_text({"items": ["dog", "(picture)"], "weights": [0.6, 0.4]}).startswith(
        "dog :0.6 AND (picture) :0.4\n"
    )
    assert parameters_text({"prompts": ["a", "b"], "step": 3}) == ""


def test_texts_of_other_tools_are_parsed():
    parsed = parse_parameters(OTHERS)
    assert parsed.prompt == "girl with a hat, desert, ((detailed))\nby the sea"
    assert parsed.negative_prompt == "ugly, [blurry]\nwatermark"
    assert parsed.fields["Sampler"] == "Euler a"
    assert parsed.fields["Lora hashes"] == "one: 12ab, two: 34cd"
    assert list(parsed.fields)[-1] == "Version"
    assert parse_parameters("only, a: prompt") == Parameters("only, a: prompt")
    assert parse_parameters("") == Parameters()


@pytest.mark.parametrize("ending", ["jpeg", "webp"])
@pytest.mark.parametrize("text", [OTHERS, "猫\nSteps: 1, Seed: 2, Size: 8x8"])
def test_user_comments_of_other_tools_are_read(ending, text):
    data = io.BytesIO()
    PICTURE.save(data, ending, exif=piexif_bytes(text))
    assert read_texts(opened(data.getvalue())) == (None, text)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-le")
    data = io.BytesIO()
    PICTURE.save(data, ending, exif=exif)
    assert read_texts(opened(data.getvalue())) == (None, text)


def test_samplers_are_all_schedulers():
    assert SAMPLERS.keys() == NAMES.keys()
    assert SCHEDULE_TYPES.keys() == SUFFIXES.keys()
    for name, label in SAMPLERS.items():
        for suffix, kind in SCHEDULE_TYPES.items():
            assert solver_and_schedule(label, kind) == (name, suffix)
            assert solver_and_schedule(f"{label.upper()} {kind}") == (name, suffix)
    assert solver_and_schedule("DPM fast", "Karras") is None


@pytest.mark.parametrize("length", [2_000, 15_000, 40_000, 70_000])
def test_long_prompts_do_not_exceed_a_jpegs_segment(length):
    record = {"prompt": "x" * length, "seed": 3}
    found, parameters = read_texts(opened(images.encode(PICTURE, "jpeg", record)))
    assert found == (record if length < 65_000 else None)
    assert parameters == (parameters_text(record) if length < 21_000 else None)


@pytest.mark.parametrize("ending", ENDINGS)
def test_half_of_a_surrogate_pair_is_no_fault(ending):
    record = {"prompt": "a\ud800b\0c"}
    found, parameters = read_texts(opened(images.encode(PICTURE, ending, record)))
    assert found == record
    assert parameters.startswith("a?b c\n")


def test_texts_that_are_too_long_are_refused():
    for record in ({"prompt": "é" * MAX_TEXT}, {"other": "x" * MAX_TEXT}):
        with pytest.raises(SettingsError, match=r"the picture's settings are [\d,]+ characters, at most 65,536"):
            read_texts(opened(images.encode(PICTURE, "png", record)))
