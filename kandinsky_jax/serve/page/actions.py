"""What the page's buttons do."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import gradio as gr
from gradio.blocks import Block
from gradio.components import Component

from kandinsky_jax.serve.page import views
from kandinsky_jax.serve.page.context import Job, PageContext
from kandinsky_jax.serve.page.grids import example, plan_grid, shown_grid
from kandinsky_jax.serve.page.restore import read_record, restored_updates
from kandinsky_jax.serve.page.runs import Done, shown
from kandinsky_jax.serve.page.sessions import Session
from kandinsky_jax.serve.page.settings_panel import NEXT, NUMBERS, SettingsPanel
from kandinsky_jax.serve.page.tabs import PageTab
from kandinsky_jax.serve.page.visitors import unread
from kandinsky_jax.serve.page.widgets import check_slider, decode_bytes, encode_value
from kandinsky_jax.serve.requests import RequestError

Updates = dict[Any, Any]  # new values by component
# Of all events: no second public interface, no queue besides the service's, and no checks by Gradio, whose words would
# be beside the page's, and in the log with a traceback.
EVENT: dict[str, Any] = {
    "api_visibility": "private",
    "concurrency_limit": None,
    "show_progress": "hidden",
    "preprocess": False,
}
MAX_UNREAD = 32  # messages of progress for a client that does not fetch them

# `page.js`, which may not be there yet, keeps the key of the session while the page is left and loaded again.
READ_KEY = """() => {
  try {
    return sessionStorage.getItem("kandinsky-session") ?? "";
  } catch {
    return ""; // a frame that may not store anything
  }
}"""


class Actions:
    """Connects the page's components.

    Args:
        context: of the page.
        panel: shared settings.
        tabs: that are shown.
        parts: other components by their names, see `layout.build_page`.
        axes: inputs of a grid.
        page: that they are on.
    """

    def __init__(
        self,
        context: PageContext,
        panel: SettingsPanel,
        tabs: Sequence[PageTab],
        parts: dict[str, Any],
        axes: dict[str, Component],
        page: gr.Blocks,
    ):
        self.context, self.panel, self.tabs, self.parts, self.axes = context, panel, tabs, parts, axes
        self.page = page

    # Generating ---------------------------------------------------------------------------------------------------

    def connect_tab(self, tab: PageTab, item: gr.Tab, generate: gr.Button, grid: gr.Button) -> None:
        """Connect a tab's buttons, and what it shows when it is selected."""
        inputs: set[Block] = {*self.panel.inputs.values(), *tab.inputs.values()}
        outputs = [self.parts[name] for name in ("message", "result", "gallery", "selected")] + [
            self.panel.inputs["seed"]
        ]

        async def on_generate(values: Updates, request: gr.Request) -> AsyncIterator[Updates]:
            session = self.session(request)
            events = shown(lambda: self.job(tab, values), session, self.context)
            async for event in self.fetched(events, request):
                yield self.updates(event, session, values[self.panel.inputs["after"]] == NEXT)

        async def on_grid(values: Updates, request: gr.Request) -> AsyncIterator[Updates]:
            session = self.session(request)
            axes = {name: values[component] for name, component in self.axes.items()}
            events = shown_grid(lambda: plan_grid(self.job(tab, values), axes, self.context), session, self.context)
            async for event in self.fetched(events, request):
                yield self.updates(event, session, False)

        generate.click(on_generate, inputs, outputs, **EVENT)
        grid.click(on_grid, inputs | set(self.axes.values()), outputs, **EVENT)
        self._connect_recommended(tab, item)

    def _connect_recommended(self, tab: PageTab, item: gr.Tab) -> None:
        prompt, fast, opened = self.panel.inputs["prompt"], self.panel.inputs["fast"], self.parts["tab"]

        def on_select(fast: bool) -> Updates:
            return {
                prompt: gr.update(visible=tab.uses_prompt),
                opened: tab.name,
                **self.panel.show_recommended(tab.mode, fast),
            }

        outputs = [prompt, opened, *(self.panel.inputs[name] for name in self.panel.recommended(tab.mode, False))]
        item.select(on_select, [fast], outputs, **EVENT)

    async def fetched(self, events: AsyncIterator[str | Done], request: gr.Request) -> AsyncIterator[str | Done]:
        """Yield events of a run; while the client does not fetch them, only the newest view, with what comes of it."""
        view: str | None = None
        async for event in events:
            if isinstance(event, str) and unread(self.page, request.session_hash) > MAX_UNREAD:
                view = event
                continue
            if view is not None and not isinstance(event, str):
                yield view
            view = None
            yield event
        if view is not None:
            yield view

    def job(self, tab: PageTab, values: Updates) -> Job:
        """Return the job of a tab's inputs.

        Raises:
            RequestError: for a value that is none.
        """
        for component in (*self.panel.inputs.values(), *tab.inputs.values()):
            if isinstance(component, gr.Slider):
                check_slider(component, values[component])
        shared = self.panel.fields({name: values[component] for name, component in self.panel.inputs.items()})
        return tab.job({name: values[component] for name, component in tab.inputs.items()}, shared)

    def updates(self, event: str | Done, session: Session, next_seed: bool) -> Updates:
        """Return what an event of a run changes on the page."""
        if isinstance(event, str):
            return {self.parts["message"]: "", self.parts["result"]: event}
        session.selected = event.kept[-1 if event.kept[-1].record is None else 0].number
        changed = self.gallery(session)
        if next_seed and event.request.seed is not None:
            changed[self.panel.inputs["seed"]] = str(event.request.seed + 1)
        return changed

    def gallery(self, session: Session) -> Updates:
        """Return the gallery and the selected picture."""
        return {self.parts["gallery"]: views.gallery(session), self.parts["selected"]: views.selected(session)}

    def session(self, request: gr.Request) -> Session:
        """Return the session of a tab of a browser."""
        return self.context.sessions.get(request.session_hash)

    # Other buttons ------------------------------------------------------------------------------------------------

    def connect(self, container: gr.Tabs) -> None:
        """Connect what is not a tab's own."""
        self._connect_session()
        self._connect_restore(container)
        self._connect_axes()
        takers = {tab.name: tab for tab in self.tabs if tab.source is not None}
        usual = takers.get("img2img", next(iter(takers.values()), None))
        self._connect_source(self.parts["use"], usual, takers, container)
        self._connect_source(self.parts["repaint"], takers.get("inpaint"), {}, container)
        modes = {tab.name: tab.mode for tab in self.tabs}

        fast, opened = self.panel.inputs["fast"], self.parts["tab"]
        names = [name for name in self.panel.recommended(self.tabs[0].mode, False) if name != "fast"] + ["suffix"]

        def on_fast(fast: bool, opened: str) -> Updates:
            shown = self.panel.recommended(modes[opened], fast)
            # What was set is for the other mode, such as 50 steps.
            empty: dict[str, dict[str, Any]] = {name: {"value": ""} for name in (*NUMBERS, "scheduler", "suffix")}
            return {self.panel.inputs[name]: gr.update(**shown.get(name, {}), **empty.get(name, {})) for name in names}

        assert isinstance(fast, gr.Checkbox)
        fast.input(on_fast, [fast, opened], [self.panel.inputs[name] for name in names], **EVENT)

    def _connect_axes(self) -> None:
        """Have the values of a grid's axis show an example of the setting that is chosen."""

        def on_axis(setting: str | None) -> Updates:
            return gr.update(placeholder=example(setting))

        for axis in ("x", "y"):
            setting = self.axes[f"{axis}_setting"]
            assert isinstance(setting, gr.Dropdown)
            setting.change(on_axis, [setting], [self.axes[f"{axis}_values"]], **EVENT)

    def _connect_session(self) -> None:
        def on_cancel(request: gr.Request) -> None:
            self.session(request).cancel()

        def on_pick(event: gr.EventData, request: gr.Request) -> Updates:
            session, number = self.session(request), None
            if isinstance(event._data, dict):
                number = event._data.get("number")
            if isinstance(number, int) and number in session.pictures:
                session.selected = number
            return self.gallery(session)

        def on_unload(request: gr.Request) -> None:
            self.context.sessions.leave(request.session_hash)

        def on_load(key: str, request: gr.Request) -> Updates:
            key = key if isinstance(key, str) and key.isascii() else ""
            return self.gallery(self.context.sessions.resume(request.session_hash, key))

        outputs = [self.parts["gallery"], self.parts["selected"]]
        loaded = self.page.load(on_load, [self.parts["key"]], outputs, js=READ_KEY, **EVENT)
        loaded.then(None, None, None, js="() => { kandinskyPage.wired(); }", **EVENT)
        self.parts["cancel"].click(on_cancel, None, None, **EVENT)
        self.parts["gallery"].select(on_pick, None, outputs, **EVENT)
        self.page.unload(on_unload)

    def _connect_source(
        self, button: gr.Button, usual: PageTab | None, takers: Mapping[str, PageTab], container: gr.Tabs
    ) -> None:
        """Connect a button that fills the selected picture into the open tab if `takers` has it, else into `usual`."""
        if usual is None:
            button.visible = False
            return
        targets = list({tab.name: tab for tab in (usual, *takers.values())}.values())
        message, opened = self.parts["message"], self.parts["tab"]

        def on_use(opened_name: str, request: gr.Request) -> Updates:
            chosen = self.session(request).selection
            if chosen is None:
                return {message: views.notice("Choose a picture of the gallery.", wrong=True)}
            tab = takers.get(opened_name, usual)
            return {
                message: "",
                tab.inputs[tab.source or ""]: encode_value(chosen.picture()),
                container: gr.Tabs(selected=tab.name),
                opened: tab.name,
                **({} if tab.source_area is None else {tab.source_area: gr.update(open=True)}),
            }

        sources = [tab.inputs[tab.source or ""] for tab in targets]
        areas = [tab.source_area for tab in targets if tab.source_area is not None]
        button.click(on_use, [opened], [message, container, opened, *sources, *areas], **EVENT)

    def _connect_restore(self, container: gr.Tabs) -> None:
        area, message, opened = self.parts["restore"], self.parts["message"], self.parts["tab"]
        result = self.parts["result"]
        inputs = [component for tab in self.tabs for component in tab.inputs.values()]
        outputs = [area, message, result, opened, container, *self.panel.inputs.values(), *inputs]

        def restore(session: Session, read: Callable[[], dict[str, Any]]) -> Updates:
            try:
                updates, tab, text = restored_updates(read(), self.tabs, self.panel, container)
            except RequestError as error:
                return {area: "", message: views.notice(f"Not restored: {error}.", wrong=True)}
            prompt = self.panel.inputs["prompt"]
            updates[prompt] = gr.update(**{**updates[prompt], "visible": tab.uses_prompt})
            if session.failed:  # an error of what the settings were before
                session.failed = False
                updates[result] = views.empty()
            return {area: "", message: views.notice(text), opened: tab.name, **updates}

        def on_drop(text: str | None, request: gr.Request) -> Updates:
            return restore(self.session(request), lambda: read_record(decode_bytes(text or "", "the picture")))

        def on_settings(request: gr.Request) -> Updates:
            session = self.session(request)
            return restore(session, lambda: self.record(session))

        area.upload(on_drop, [area], outputs, **EVENT)
        self.parts["settings"].click(on_settings, None, outputs, **EVENT)

    def record(self, session: Session) -> dict[str, Any]:
        """Return the settings of the selected picture.

        Raises:
            RequestError: where there is none, or it is a grid.
        """
        chosen = session.selection
        if chosen is None or chosen.record is None:
            raise RequestError(
                "choose a picture of the gallery" if chosen is None else "a grid has no settings of its own"
            )
        return read_record(chosen.png)
