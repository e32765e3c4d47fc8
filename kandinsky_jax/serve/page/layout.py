"""The page's components and where they lie."""

from __future__ import annotations

import html
from typing import Any

import gradio as gr

from kandinsky_jax.serve.page import views
from kandinsky_jax.serve.page.actions import Actions
from kandinsky_jax.serve.page.context import PageContext
from kandinsky_jax.serve.page.grids import build_axes
from kandinsky_jax.serve.page.settings_panel import SettingsPanel
from kandinsky_jax.serve.page.tabs import PageTab, tabs_of
from kandinsky_jax.serve.page.widgets import SCRIPT, html_output, restore_input

TITLE = "kandinsky-jax"
_HEADER = """<header class="kj-header"><h1>{title}</h1><span class="kj-model">{model}</span>
<button type="button" class="kj-theme">Dark</button></header>"""
STATES = 64  # of Gradio's own memory of sessions


UNNAMED = "notebook"  # what `launch` calls a model that has no name


def build_page(context: PageContext) -> gr.Blocks:
    """Build the page.

    Args:
        context: what it needs of the server.
    """
    tabs = tabs_of(context)
    panel = SettingsPanel(context, tabs[0].mode)
    name = context.model.name
    with gr.Blocks(title=TITLE, analytics_enabled=False, fill_width=True, delete_cache=(600, 600)) as page:
        gr.HTML(
            html_template=_HEADER.format(title=TITLE, model="" if name == UNNAMED else html.escape(name)),
            js_on_load="kandinskyPage.header(element);",
            head=SCRIPT,
            apply_default_css=False,
            padding=False,
        )
        parts: dict[str, Any] = {"tab": gr.State(tabs[0].name), "key": gr.Textbox(visible=False)}
        with gr.Row(elem_classes="kj-columns"):
            with gr.Column(elem_id="kj-inputs"):
                parts["message"] = html_output("message")
                panel.build_prompt()
                with gr.Tabs(selected=tabs[0].name, overflow_behavior="wrap", elem_id="kj-tabs") as container:
                    built = [_build_tab(tab) for tab in tabs]
            with gr.Column(elem_id="kj-outputs"):
                _build_outputs(parts)
            with gr.Column(elem_id="kj-settings"):
                panel.build()
                with gr.Accordion("X/Y grid", open=False):
                    axes = build_axes()
                parts["restore"] = restore_input(context.settings.max_body // 2)
        actions = Actions(context, panel, tabs, parts, axes, page)
        for tab, (item, generate, grid) in zip(tabs, built, strict=True):
            actions.connect_tab(tab, item, generate, grid)
        actions.connect(container)
    page.state_session_capacity = STATES
    page.queue(api_open=False, max_size=8 * context.settings.max_queue, default_concurrency_limit=None)
    return page


def _build_tab(tab: PageTab) -> tuple[gr.Tab, gr.Button, gr.Button]:
    with gr.Tab(tab.title, id=tab.name, elem_id=f"kj-tab-{tab.name}") as item:
        tab.build()
        with gr.Row():
            generate = gr.Button("Generate", variant="primary", elem_classes="kj-generate", scale=3, min_width=120)
            grid = gr.Button("Grid", elem_classes="kj-grid-button", scale=1, min_width=80)
    return item, generate, grid


def _build_outputs(parts: dict[str, Any]) -> None:
    parts["result"] = html_output("result", value=views.empty())
    parts["cancel"] = gr.Button("Cancel", variant="stop", elem_id="kj-cancel")
    gr.HTML("<h2 class='kj-title'>Gallery</h2>", js_on_load=None, apply_default_css=False, padding=False)
    parts["gallery"] = html_output(
        "gallery", "kandinskyPage.gallery(element, trigger); // triggers 'select'", views.NO_PICTURES
    )
    with gr.Row(elem_classes="kj-row"):
        parts["use"] = gr.Button("Use as source", size="sm", min_width=120, elem_id="kj-use")
        parts["repaint"] = gr.Button("Repaint this", size="sm", min_width=120, elem_id="kj-repaint")
        parts["settings"] = gr.Button("Use its settings", size="sm", min_width=120, elem_id="kj-reuse")
    parts["selected"] = html_output("selected")
