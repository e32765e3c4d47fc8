"""Restoring the settings of a picture into the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component

from kandinsky_jax.pipelines.modes import MODES
from kandinsky_jax.serve.page.settings_panel import SettingsPanel
from kandinsky_jax.serve.page.tabs import PageTab
from kandinsky_jax.serve.page.widgets import decode_bytes
from kandinsky_jax.serve.records import SettingsError, read_settings
from kandinsky_jax.serve.requests import RequestError


def read_record(text: str) -> dict[str, Any]:
    """Return the settings in a file that the restore area has sent.

    Raises:
        RequestError: where it is no picture, or has no settings.
    """
    try:
        record = read_settings(decode_bytes(text, "the picture"))
    except SettingsError as error:
        raise RequestError(str(error)) from None
    if not record:
        raise RequestError("this picture has no settings: it has neither this server's record nor a parameters text")
    return record


def tab_of(record: Mapping[str, Any], tabs: Sequence[PageTab]) -> PageTab | None:
    """Return the tab that a picture was made in, None where it is not shown."""
    mode = record.get("mode", "generate")
    return next((tab for tab in tabs if mode in tab.modes), None)


def restored_updates(
    record: Mapping[str, Any], tabs: Sequence[PageTab], panel: SettingsPanel, container: gr.Tabs
) -> tuple[dict[Component | gr.Tabs, Any], PageTab, str]:
    """Return the updates of the page's components, the tab, and what to tell the user.

    Raises:
        RequestError: where there is no tab for it.
    """
    tab = tab_of(record, tabs)
    if tab is None:
        raise RequestError(f"this picture is of the mode {record.get('mode')}, which this server does not have")
    shared, missing = panel.restored(record, tab.mode)
    updates: dict[Component | gr.Tabs, Any] = {
        component: gr.update(value=shared[name]) for name, component in panel.inputs.items() if name in shared
    }
    for component, update in panel.show_recommended(tab.mode, bool(shared["fast"])).items():
        updates[component] = gr.update(**{**_given(updates.get(component)), **_given(update)})
    for name, value in tab.restored(record).items():
        updates[tab.inputs[name]] = gr.update(value=value)
    updates[container] = gr.Tabs(selected=tab.name)
    message = f"Settings restored into {tab.title}."
    if pictures := needed_pictures(record):
        message += f" Choose the {' and the '.join(pictures)} again: a picture's settings do not hold others."
    if missing:
        message += f" Not restored, as this server does not have it: {', '.join(missing)}."
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
