"""The settings that a picture carries: our record, and the `parameters` text that other tools read.

| | the record, as JSON | `parameters` |
|---|---|---|
| PNG | iTXt chunk `kandinsky_jax` | tEXt or iTXt chunk `parameters` |
| JPEG, WebP | EXIF ImageDescription, after `kandinsky_jax:` | EXIF UserComment, Unicode, UTF-16 of big-endian order |

The text is that of AUTOMATIC1111's web interface (its `infotext`): the prompt's lines, those of the negative prompt
after "Negative prompt:", and one line of `name: value` with commas between, whose values are JSON strings where they
have a comma, a colon or a line break. It is for people and other programs; the record is what restores settings.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from kandinsky_jax.common.reading import ReadError, parse_json

RECORD, PARAMETERS = "kandinsky_jax", "parameters"  # names of a PNG's chunks
NEGATIVE = "Negative prompt:"
PROGRAM = "kandinsky-jax"  # the Version in our text
MAX_TEXT = 1 << 16  # characters that are read of each text
MAX_EXIF = 1 << 19  # bytes that are read
MAX_JPEG_EXIF = 65_000  # bytes that are written: a JPEG's segment holds 65,533
LEAST_FIELDS = 3  # of a last line that is settings and no prompt, as in AUTOMATIC1111's reader

# Schedulers' short names, and what the web interfaces call the same solver.
SAMPLERS = {
    "ddpm": "DDPM",
    "ddim": "DDIM",
    "dpm++2m": "DPM++ 2M",
    "dpm++3m": "DPM++ 3M",
    "dpm++2m-sde": "DPM++ 2M SDE",
    "dpm++2s": "DPM++ 2S",
    "dpm++3s": "DPM++ 3S",
    "dpm++sde": "DPM++ SDE",
    "deis": "DEIS",
    "unipc": "UniPC",
    "sa": "SA Solver",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "dpm2": "DPM2",
    "dpm2-a": "DPM2 a",
    "lms": "LMS",
    "pndm": "PNDM",
    "plms": "PLMS",
    "ipndm": "iPNDM",
    "lcm": "LCM",
    "tcd": "TCD",
}
# Suffixes of those names, and the types of schedules.
SCHEDULE_TYPES = {
    "karras": "Karras",
    "exponential": "Exponential",
    "beta": "Beta",
    "lu": "Lu",
    "leading": "Leading",
    "linspace": "Linspace",
    "trailing": "SGM Uniform",
}
_EXIF_IFD, _DESCRIPTION, _COMMENT = 0x8769, 0x010E, 0x9286  # EXIF's tags
_UNICODE, _ASCII = b"UNICODE\0", b"ASCII\0\0\0"  # what a UserComment begins with
_LABEL = re.compile(r"\w[\w \-/]{1,60}")


class SettingsError(ValueError):
    """The settings of a picture cannot be read."""


# Writing ----------------------------------------------------------------------------------------------------------


def save_arguments(kind: str, record: Mapping[str, object] | None) -> dict[str, Any]:
    """Return the arguments of Pillow's `save` by which a picture carries its settings.

    A JPEG has no room for more than `MAX_JPEG_EXIF` bytes: what exceeds them is left out, `parameters` first.

    Args:
        kind: Pillow's name of the format: PNG, JPEG or WEBP.
        record: the settings, None for none.
    Raises:
        TypeError: where JSON cannot hold a value of the record.
    """
    if record is None:
        return {}
    text, parameters = _json(record, ascii_only=kind != "PNG"), parameters_text(record)
    if kind == "PNG":
        info = PngInfo()
        info.add_itxt(RECORD, text)
        if parameters:
            info.add_text(PARAMETERS, parameters)
        return {"pnginfo": info}
    limit = MAX_JPEG_EXIF if kind == "JPEG" else math.inf
    for comment in (parameters, ""):
        data = _exif(f"{RECORD}:{text}", comment)
        if len(data) <= limit:
            return {"exif": data}
    return {}


def _json(record: Mapping[str, object], ascii_only: bool) -> str:
    text = json.dumps(record, ensure_ascii=ascii_only)
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(record)
    return text


def _exif(description: str, comment: str) -> bytes:
    exif = Image.Exif()
    exif[_DESCRIPTION] = description
    if comment:
        exif.get_ifd(_EXIF_IFD)[_COMMENT] = _UNICODE + comment.encode("utf-16-be")
    return exif.tobytes()


def parameters_text(record: Mapping[str, object]) -> str:
    """Return the `parameters` of a record of the server or the command line; "" for one that is of no prompt.

    A mix is written as prompts with weights, "dog face :0.6 AND cat :0.4".
    """
    facts = flat_record(record)
    prompt = facts.get("prompt") or _mix(facts)
    if not isinstance(prompt, str) or (not prompt and "prompt" not in facts):
        return ""
    lines = [prompt]
    if isinstance(negative := facts.get("negative_prompt"), str) and negative:
        lines.append(f"{NEGATIVE} {negative}")
    fields = {name: value for name, value in _fields(facts).items() if value}
    lines.append(", ".join(f"{name}: {_quoted(value)}" for name, value in fields.items()))
    text = "\n".join(lines).replace("\r\n", "\n").replace("\0", " ")
    return text.encode("utf-8", "replace").decode()


def flat_record(record: Mapping[str, object]) -> dict[str, object]:
    """Return a record with the prior's settings beside the others; the command line groups some under "prior"."""
    facts = dict(record)
    if isinstance(prior := facts.pop("prior", None), Mapping):
        facts |= {f"prior_{name}": value for name, value in prior.items()}
    return facts


def _mix(facts: Mapping[str, object]) -> str:
    items, weights = facts.get("items"), facts.get("weights")
    if not isinstance(items, list | tuple) or not isinstance(weights, list | tuple):
        return ""
    return " AND ".join(f"{item} :{_number(weight)}" for item, weight in zip(items, weights, strict=False))


def _fields(facts: Mapping[str, object]) -> dict[str, str]:
    """Return the last line's values; "" for those that a record does not tell."""
    height, width = _number(facts.get("height")), _number(facts.get("width"))
    sampler, schedule = _sampler(facts.get("scheduler"))
    loras = facts.get("loras")
    return {
        "Steps": _number(facts.get("num_inference_steps")),
        "Sampler": sampler,
        "Schedule type": schedule,
        "CFG scale": _number(facts.get("guidance_scale")),
        "Seed": _number(facts.get("seed")),
        "Size": f"{width}x{height}" if height and width else "",
        "Model": _model(facts.get("model")),
        "Denoising strength": _number(facts.get("strength")),
        "Prior steps": _number(facts.get("prior_num_inference_steps")),
        "Prior CFG scale": _number(facts.get("prior_guidance_scale")),
        "Lora": ", ".join(f"{name}: {_number(weight)}" for name, weight in loras.items())
        if isinstance(loras, Mapping)
        else "",
        "Mode": mode if isinstance(mode := facts.get("mode"), str) else "",
        "Version": PROGRAM,
    }


def _number(value: object) -> str:
    """Return a number as text, "" for what is none; the shortest text that reads as the same."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return ""
    return str(int(value)) if math.isfinite(value) and value == int(value) else str(value)


def _model(value: object) -> str:
    """Return the last part of a model's name or folder; None is the official one."""
    return PurePath(value).name if isinstance(value, str) else "kandinsky-2-2"


def _sampler(name: object) -> tuple[str, str]:
    """Return a scheduler's name and type of schedule as other tools call them, our own name where they have none."""
    if not isinstance(name, str):
        return "", ""
    stem, types = name, []
    while stem not in SAMPLERS and "-" in stem and stem.rsplit("-", 1)[1] in SCHEDULE_TYPES:
        stem, suffix = stem.rsplit("-", 1)
        types.append(SCHEDULE_TYPES[suffix])
    if stem not in SAMPLERS or len(types) > 1:
        return name, ""
    return SAMPLERS[stem], "".join(types)


def _quoted(value: str) -> str:
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',:\n"') else value


# Reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """A `parameters` text.

    Args:
        prompt, negative_prompt: lines, stripped.
        fields: values of the last line by their names, both as they stand.
    """

    prompt: str = ""
    negative_prompt: str = ""
    fields: Mapping[str, str] = field(default_factory=dict)


def read_texts(picture: Image.Image) -> tuple[dict[str, object] | None, str | None]:
    """Return the record and the `parameters` that a picture carries; None for what it does not, or is damaged.

    Raises:
        SettingsError: where a text is longer than `MAX_TEXT`.
    """
    record, parameters = picture.info.get(RECORD), picture.info.get(PARAMETERS)
    exif = picture.info.get("exif")
    if record is None and parameters is None and isinstance(exif, bytes) and exif:
        record, parameters = _of_exif(exif)
    for text in (record, parameters):
        if isinstance(text, str) and len(text) > MAX_TEXT:
            raise SettingsError(f"the picture's settings are {len(text):,} characters, at most {MAX_TEXT:,} are read")
    return _object(record), parameters if isinstance(parameters, str) else None


def _object(text: object) -> dict[str, object] | None:
    if not isinstance(text, str):
        return None
    try:
        parsed = parse_json(text)
    except ReadError:
        return None
    return parsed if isinstance(parsed, dict) else None


def _of_exif(data: bytes) -> tuple[str | None, str | None]:
    if len(data) > MAX_EXIF:
        raise SettingsError(f"the picture's EXIF is {len(data):,} bytes, at most {MAX_EXIF:,} are read")
    exif = Image.Exif()
    try:
        exif.load(data)
        description, comment = exif.get(_DESCRIPTION), exif.get_ifd(_EXIF_IFD).get(_COMMENT)
    except Exception:  # Pillow's reader raises many kinds for damaged data
        return None, None
    record = None
    if isinstance(description, str) and description.startswith(f"{RECORD}:"):
        record = description.removeprefix(f"{RECORD}:")
    return record, _comment(comment)


def _comment(comment: object) -> str | None:
    """Decode a UserComment."""
    if isinstance(comment, str):
        return comment
    if not isinstance(comment, bytes):
        return None
    kind, data = comment[:8], comment[8:]
    if kind == _UNICODE:  # EXIF does not say in which order; that of most text is seen by its zeros
        big = data[0::2].count(0) >= data[1::2].count(0)
        return data.decode("utf-16-be" if big else "utf-16-le", "replace").lstrip("\ufeff")
    return (data if kind == _ASCII else comment).decode("utf-8", "replace").rstrip("\0")


def parse_parameters(text: str) -> Parameters:
    """Parse a `parameters` text; anything is one: without settings in its last line all of it is prompts."""
    *lines, last = text.strip().split("\n")
    fields = _parse_fields(last)
    if len(fields) < LEAST_FIELDS:
        lines, fields = [*lines, last], {}
    prompts: tuple[list[str], list[str]] = [], []
    which = 0
    for line in lines:
        line = line.strip()
        if line.startswith(NEGATIVE):
            which, line = 1, line.removeprefix(NEGATIVE).strip()
        prompts[which].append(line)
    prompt, negative = ("\n".join(found).strip("\n") for found in prompts)
    return Parameters(prompt, negative, fields)


def _parse_fields(line: str) -> dict[str, str]:
    """Parse `name: value, name: "a value, quoted"`; what is no such pair is skipped."""
    found: dict[str, str] = {}
    decoder, at = json.JSONDecoder(), 0
    while (colon := line.find(":", at)) >= 0:
        label = line[at:colon].rsplit(",", 1)[-1].strip()
        start = colon + 1
        while start < len(line) and line[start] == " ":
            start += 1
        value = None
        if line[start : start + 1] == '"':
            try:
                value, at = decoder.raw_decode(line, start)
            except ValueError:
                value = None
        if value is None:
            end = line.find(",", start)
            at = len(line) if end < 0 else end
            value = line[start:at].strip()
        if _LABEL.fullmatch(label):
            found.setdefault(label, value)
        at = line.find(",", at) + 1 or len(line)
    return found


def solver_and_schedule(sampler: str, schedule_type: str = "") -> tuple[str, str] | None:
    """Return the short name of a scheduler and its suffix, "" for none; None for a sampler that we do not have.

    Args:
        sampler: "DPM++ 2M", or with its schedule as older versions wrote it, "DPM++ 2M Karras".
        schedule_type: "Karras"; an unknown one is left out.
    """
    names = {label.lower(): name for name, label in SAMPLERS.items()} | {name: name for name in SAMPLERS}
    suffixes = {label.lower(): suffix for suffix, label in SCHEDULE_TYPES.items()}
    given, kind = sampler.strip().lower(), schedule_type.strip().lower()
    for label in suffixes:
        if given not in names and given.endswith(f" {label}"):
            given, kind = given.removesuffix(f" {label}"), label
    return (names[given], suffixes.get(kind, "")) if given in names else None
