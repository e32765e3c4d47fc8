"""Restoring the settings of a picture into the page."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from PIL import Image

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.picture_records import flat_record, read_texts
from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.serve.page.settings_panel import SettingsPanel
from kandinsky_jax.serve.page.tabs import PageTab
from kandinsky_jax.serve.records import PICTURE_FORMATS, SettingsError, read_settings, unused_parameters
from kandinsky_jax.serve.requests import RequestError

GRID = "kandinsky_jax_grid"  # name of a PNG's text, the labels of a grid


def read_record(data: bytes) -> dict[str, Any]:
    """Return the settings in a file.

    Besides, `index` is which picture of its request it is, where that is known, and `unused` has the names of settings
    of another tool that are not used here.

    Raises:
        RequestError: where it is no picture, or has no settings.
    """
    try:
        with Image.open(io.BytesIO(data), formats=PICTURE_FORMATS) as opened:
            own, parameters = read_texts(opened)
            is_grid = GRID in opened.info
        record = read_settings(data)
    except SettingsError as error:
        raise RequestError(str(error)) from None
    except Exception:  # Pillow's readers raise many kinds for damaged data
        raise RequestError("this file is no picture of PNG, JPEG or WebP that can be read") from None
    if is_grid:
        raise RequestError("a grid has no settings of its own; drop one of its pictures")
    if not record:
        raise RequestError("this picture has no settings: it has neither this server's record nor a parameters text")
    index = flat_record(own or {}).get("image")
    unused = unused_parameters(parameters) if own is None and parameters is not None else []
    return record | ({"index": index} if isinstance(index, int) else {}) | ({"unused": unused} if unused else {})


def tab_of(record: Mapping[str, Any], tabs: Sequence[PageTab]) -> PageTab | None:
    """Return the tab that a picture was made in, None where it is not shown."""
    mode = record.get("mode", "generate")
    return next((tab for tab in tabs if mode in tab.modes), None)


def restored_updates(
    record: Mapping[str, Any], tabs: Sequence[PageTab], panel: SettingsPanel, container: gr.Tabs
) -> tuple[dict[Any, Any], PageTab, str]:
    """Return the updates of the page's components, the tab, and what to tell the user.

    Raises:
        RequestError: where there is no tab for it.
    """
    tab = tab_of(record, tabs)
    if tab is None:
        raise RequestError(f"this picture is of the mode {record.get('mode')}, which this server does not have")
    shared, missing = panel.restored(record, tab.mode)
    updates: dict[Any, Any] = {
        component: gr.update(value=shared[name]) for name, component in panel.inputs.items() if name in shared
    }
    for component, update in panel.show_recommended(tab.mode, bool(shared["fast"])).items():
        updates[component] = gr.update(**{**_given(updates.get(component)), **_given(update)})
    for name, value in tab.restored(record).items():
        updates[tab.inputs[name]] = gr.update(value=value)
    updates[container] = gr.Tabs(selected=tab.name)
    message = f"Settings restored into {tab.title}."
    made, index = record.get("num_images", 1), record.get("index")
    if made > 1 and index is not None and index < made:
        message += f" It is picture {index + 1} of {made}; Generate makes all {made} again."
    if pictures := needed_pictures(record):
        message += f" Choose the {' and the '.join(pictures)} again: a picture's settings do not hold others."
    if missing:
        message += f" Not restored, as this server does not have it: {', '.join(missing)}."
    if unused := record.get("unused"):
        message += f" Not used, of another tool: {shorten(', '.join(unused), 160)}."
    return updates, tab, message


def needed_pictures(record: Mapping[str, Any]) -> list[str]:
    """Return names of the pictures that a record's request had."""
    names = {"image": "source picture", "mask_image": "mask", "hint": "depth map"}
    mode = record.get("mode", "generate")
    found = [names[name] for name in (MODES[mode].pictures if mode in MODES else ())]
    if mode == "vary":
        return ["source picture"]
    return found if None not in record.get("items", ()) else ["pictures of the mix"]


def _given(update: Any) -> dict[str, Any]:
    return {name: value for name, value in (update or {}).items() if name != "__type__"}
