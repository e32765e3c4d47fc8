"""Parts of the page that are HTML with the script of `page.js`: pictures as inputs, the drop area, the gallery."""

from __future__ import annotations

import base64
import binascii
import html
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass

import gradio as gr
from PIL import Image

from kandinsky_jax.common.errors import quote
from kandinsky_jax.serve.api.bodies import Budget
from kandinsky_jax.serve.api.errors import ApiError
from kandinsky_jax.serve.api.pictures import PictureReader
from kandinsky_jax.serve.page.encoding import data_url
from kandinsky_jax.serve.requests import RequestError

SCRIPT = '<script src="own/page.js"></script>'
_ids = itertools.count(1)

_PICTURE = """<fieldset class="kj-picture">
<legend>{label}</legend>
<div class="kj-stage" hidden>
<canvas class="kj-image" role="img" aria-label="{label}"></canvas>
{mask}</div>
<div class="kj-choose">
<input type="file" id="{id}" accept="image/png,image/jpeg,image/webp" aria-label="{label}: choose a file">
<label for="{id}" aria-hidden="true">Choose a picture</label>
<span class="kj-hint">or drop or paste one here</span>
<button type="button" class="kj-remove" hidden>Remove<span class="kj-unseen"> the picture of: {label}</span></button>
</div>
{tools}<p class="kj-note" role="status"></p>
</fieldset>"""
_MASK = """<canvas class="kj-mask" tabindex="0" role="application"
 aria-label="Mask on the picture. Paint with the mouse or a finger; or move with the arrow keys, hold Shift to paint on
 the way, press Space to paint a dot."></canvas>
<div class="kj-ring" aria-hidden="true"></div>
"""
_TOOLS = """<div class="kj-tools" role="group" aria-label="Mask tools">
<label>Brush <input type="range" class="kj-brush" min="2" max="40" value="12" aria-label="Size of the brush"></label>
<button type="button" class="kj-eraser" aria-pressed="false">Eraser</button>
<button type="button" class="kj-undo">Undo</button>
<button type="button" class="kj-wipe">Clear</button>
<button type="button" class="kj-invert">Invert</button>
</div>
"""
_RESTORE = """<fieldset class="kj-picture kj-restore" data-limit="{limit}">
<legend>Restore settings from a picture</legend>
<div class="kj-choose">
<input type="file" id="{id}" accept="image/png,image/jpeg,image/webp" aria-label="Restore settings: choose a picture">
<label for="{id}" aria-hidden="true">Choose a picture</label>
<span class="kj-hint">or drop one anywhere on the page</span>
</div>
<p class="kj-note" role="status"></p>
</fieldset>"""


def picture_input(label: str, name: str, paint: bool = False, side: int = 1536) -> gr.HTML:
    """Return an input for a picture, with `paint` and a mask on it; `decode` reads its value.

    Args:
        label: what it is for.
        name: the element's id, after "kj-".
        paint: whether there is a brush.
        side: pixels of the longer side that the browser scales larger pictures down to.
    """
    template = _PICTURE.format(
        label=html.escape(label),
        id=f"kj-file-{next(_ids)}",
        mask=_MASK if paint else "",
        tools=_TOOLS if paint else "",
    )
    return gr.HTML(
        value="",
        html_template=template,
        js_on_load=f"kandinskyPage.picture(element, props, watch, {json.dumps(paint)}, {side});",
        head=SCRIPT,
        apply_default_css=False,
        elem_id=f"kj-{name}",
    )


def restore_input(limit: int) -> gr.HTML:
    """Return the drop area for a picture whose settings are restored; its value is a data: URL.

    Args:
        limit: bytes of a file.
    """
    return gr.HTML(
        value="",
        html_template=_RESTORE.format(id=f"kj-file-{next(_ids)}", limit=limit),
        js_on_load="kandinskyPage.restore(element, props, trigger); // triggers 'upload'",
        head=SCRIPT,
        apply_default_css=False,
        elem_id="kj-restore",
    )


def html_output(name: str, script: str = "", value: str = "") -> gr.HTML:
    """Return a place for HTML that Python makes.

    Args:
        name: the element's id, after "kj-".
        script: run when it is there.
        value: what is in it first.
    """
    return gr.HTML(
        value=value,
        js_on_load=script or None,
        head=SCRIPT,
        apply_default_css=False,
        elem_id=f"kj-{name}",
        padding=False,
    )


@dataclass(frozen=True)
class ChosenPicture:
    """What a picture input holds.

    Args:
        picture: as chosen.
        mask: white where it was painted; None without a brush.
    """

    picture: Image.Image
    mask: Image.Image | None


def decode(value: object, label: str, most: int) -> ChosenPicture | None:
    """Decode the value of a picture input, None for an empty one.

    Args:
        value: from the client.
        label: of the input, for messages.
        most: pixels.
    Raises:
        RequestError: where it is not a picture.
    """
    if not value:
        return None
    try:
        given = json.loads(value) if isinstance(value, str) else None
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict) or not isinstance(given.get("picture"), str):
        raise RequestError(f"{label} is not a picture that this page has sent", "image")
    mask = given.get("mask")
    return ChosenPicture(
        decode_text(given["picture"], label, most),
        decode_text(mask, f"mask of {label}", most).convert("L") if isinstance(mask, str) and mask else None,
    )


def decode_text(text: str, label: str, most: int) -> Image.Image:
    """Decode a picture in base64, or a data: URL with it.

    Raises:
        RequestError: where it is not a picture.
    """
    reader = PictureReader(most, Budget(most, "the pictures"))
    try:
        return reader.decode_text(text, label)
    except ApiError as error:
        raise RequestError(error.message, error.param) from None


def decode_bytes(text: str, label: str) -> bytes:
    """Return the bytes of a data: URL; what is in them is not looked at.

    Raises:
        RequestError: where it is none.
    """
    try:
        return base64.b64decode(text.partition(";base64,")[2], validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(f"{label} is not a file that this page has sent", "image") from None


def encode_value(picture: Image.Image) -> str:
    """Return the value of a picture input that shows a picture."""
    return json.dumps({"picture": data_url(picture), "mask": ""})


def check_slider(slider: gr.Slider, value: float | None) -> None:
    """Raise RequestError for a number beside a slider that was cleared, or is beyond its ends."""
    if value is None or not slider.minimum <= value <= slider.maximum:
        given = "empty" if value is None else quote(value, 40)
        raise RequestError(
            f"{slider.label} is {given}; needed is a number from {slider.minimum:g} to {slider.maximum:g}"
        )


def choices(names: Sequence[str], first: str) -> list[tuple[str, str]]:
    """Return a dropdown's choices, with an empty one first."""
    return [(first, ""), *((name, name) for name in names)]
