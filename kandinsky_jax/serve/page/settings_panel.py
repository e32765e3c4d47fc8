"""The settings that all tabs share; what is left empty is as the model recommends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import gradio as gr
from gradio.components import Component

from kandinsky_jax.serve.page.context import PageContext
from kandinsky_jax.serve.page.widgets import choices
from kandinsky_jax.serve.requests import RequestError

LORA_ROWS = 3
MAX_SEED = 2**63 - 1
KEEP, NEXT = "keep", "next"
NUMBERS = {  # setting -> label
    "num_inference_steps": "Steps",
    "guidance_scale": "Guidance scale",
    "prior_num_inference_steps": "Prior steps",
    "prior_guidance_scale": "Prior guidance scale",
}


class SettingsPanel:
    """Components of the shared settings.

    Args:
        context: of the page.
        mode: whose recommended values are shown first.
    """

    def __init__(self, context: PageContext, mode: str):
        self.context, self.mode = context, mode
        self.inputs: dict[str, Component] = {}

    def build_prompt(self) -> None:
        """Create the prompt, above the tabs."""
        self.inputs["prompt"] = gr.Textbox(
            label="Prompt",
            lines=2,
            max_lines=6,
            placeholder="What the picture shows",
            elem_id="kj-prompt",
            autofocus=True,
        )

    def build(self) -> None:
        """Create the other settings."""
        shown = self.recommended(self.mode, False)
        with gr.Row():
            self.inputs["num_images"] = gr.Slider(
                1, self.context.settings.max_images, value=1, step=1, label="Pictures", min_width=170
            )
            self.inputs["size"] = gr.Dropdown(
                label="Size, width x height",
                value="",
                allow_custom_value=self.context.settings.any_size,
                info="Or type another, such as 192x128." if self.context.settings.any_size else None,
                min_width=170,
                elem_id="kj-size",
                **shown["size"],
            )
        with gr.Row():
            self.inputs["seed"] = gr.Textbox(
                label="Seed",
                placeholder="new each time",
                max_lines=1,
                min_width=160,
                elem_classes="kj-number",
            )
            self.inputs["after"] = gr.Radio([KEEP, NEXT], value=KEEP, label="Seed after generating", min_width=160)
        self.inputs["fast"] = gr.Checkbox(
            False,
            label="Fast mode",
            info="Few steps, with the model's adapter for them and the settings that go with it.",
            visible=shown["fast"]["visible"],
        )
        with gr.Accordion("More settings", open=False):
            self.inputs["negative_prompt"] = gr.Textbox(
                label="Negative prompt", lines=1, max_lines=4, placeholder="What to avoid"
            )
            for pair in (
                ("num_inference_steps", "guidance_scale"),
                ("prior_num_inference_steps", "prior_guidance_scale"),
            ):
                with gr.Row():
                    for name in pair:
                        self.inputs[name] = gr.Textbox(
                            label=NUMBERS[name], max_lines=1, min_width=140, elem_classes="kj-number", **shown[name]
                        )
            with gr.Row():
                self.inputs["scheduler"] = gr.Dropdown(label="Scheduler", value="", min_width=160, **shown["scheduler"])
                self.inputs["suffix"] = gr.Dropdown(
                    choices(self.context.model.scheduler_suffixes, "none"),
                    label="Its variant",
                    value="",
                    min_width=160,
                )
            self._build_loras()

    def _build_loras(self) -> None:
        names = self.context.model.loras
        for row in range(1, min(LORA_ROWS, len(names)) + 1):
            with gr.Row():
                self.inputs[f"lora_{row}"] = gr.Dropdown(
                    choices(names, "none"), value="", label=f"LoRA {row}", min_width=160
                )
                self.inputs[f"lora_weight_{row}"] = gr.Slider(
                    -2, 2, value=1, step=0.05, label=f"Weight of LoRA {row}", min_width=140
                )

    # What the model recommends ------------------------------------------------------------------------------------

    def recommended(self, mode: str, fast: bool) -> dict[str, dict[str, Any]]:
        """Return what the components show where nothing is set, as their properties by name."""
        model, settings = self.context.model, self.context.settings
        own = model.settings(mode, fast and model.has_fast(mode))
        height, width = model.usual_size(mode, settings)
        sizes = model.sizes(mode, settings) or list(dict.fromkeys([(height, width), *settings.sizes]))
        first = f"recommended ({width} x {height})"
        shown: dict[str, dict[str, Any]] = {
            name: {"placeholder": f"{getattr(own, name):g} (recommended)"} for name in NUMBERS
        }
        shown["size"] = {"choices": [(first, ""), *((f"{w} x {h}", f"{w}x{h}") for h, w in sizes)]}
        scheduler = f"recommended ({own.scheduler})" if own.scheduler else "the model's own"
        shown["scheduler"] = {"choices": choices(model.schedulers, scheduler)}
        shown["fast"] = {"visible": model.has_fast(mode)}
        return shown

    def show_recommended(self, mode: str, fast: bool) -> dict[Component, Any]:
        """Return updates of the components for another mode."""
        return {self.inputs[name]: gr.update(**props) for name, props in self.recommended(mode, fast).items()}

    # To requests and from records ---------------------------------------------------------------------------------

    def fields(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields of the request that the settings give; those left empty are not in it.

        Raises:
            RequestError: for a value that is none.
        """
        found: dict[str, Any] = {"prompt": values["prompt"] or "", "num_images": int(values["num_images"] or 1)}
        found["negative_prompt"] = (values["negative_prompt"] or "").strip() or None
        found["seed"] = read_seed(values["seed"])
        for name in NUMBERS:
            found[name] = read_number(values[name], NUMBERS[name], whole=name.endswith("steps"))
        found |= read_size(values["size"])
        if values["scheduler"]:
            found["scheduler"] = "-".join(filter(None, (values["scheduler"], values["suffix"])))
        elif values["suffix"]:
            raise RequestError("a variant is chosen but no scheduler; choose the scheduler too", "scheduler")
        rows = [row for row in range(1, LORA_ROWS + 1) if values.get(f"lora_{row}")]
        found["loras"] = {values[f"lora_{row}"]: float(values[f"lora_weight_{row}"]) for row in rows}
        if len(found["loras"]) < len(rows):
            raise RequestError("one LoRA is chosen twice; choose each once", "loras")
        found["fast"] = bool(values["fast"])
        return {name: value for name, value in found.items() if value is not None}

    def restored(self, record: Mapping[str, Any], mode: str) -> tuple[dict[str, Any], list[str]]:
        """Return values of the components that a picture's settings give, and what could not be restored."""
        missing: list[str] = []
        names = ("prompt", "negative_prompt", "num_images", *NUMBERS)
        found = {name: record.get(name) for name in names}
        found |= {name: "" if record.get(name) is None else f"{record[name]:g}" for name in NUMBERS}
        found |= {"prompt": found["prompt"] or "", "negative_prompt": found["negative_prompt"] or ""}
        found["num_images"] = min(record.get("num_images", 1), self.context.settings.max_images)
        found["seed"] = str(record.get("seed", ""))
        found["size"] = self._restored_size(record, mode, missing)
        scheduler, suffix = split_scheduler(record.get("scheduler"), self.context.model.scheduler_suffixes)
        if scheduler and scheduler not in self.context.model.schedulers:
            missing.append(f"the scheduler {scheduler}")
            scheduler = suffix = ""
        found |= {"scheduler": scheduler, "suffix": suffix}
        found["fast"] = bool(record.get("fast")) and self.context.model.has_fast(mode)
        missing += ["fast mode"] if record.get("fast") and not found["fast"] else []
        self._restore_loras(record.get("loras", {}), found, missing)
        return found, missing

    def _restored_size(self, record: Mapping[str, Any], mode: str, missing: list[str]) -> str:
        height, width = record.get("height"), record.get("width")
        if not height or not width:
            return ""
        sizes = self.context.model.sizes(mode, self.context.settings)
        if sizes is None or (height, width) in sizes:
            return f"{width}x{height}"
        missing.append(f"the size {width} x {height}")
        return ""

    def _restore_loras(self, loras: Mapping[str, float], found: dict[str, Any], missing: list[str]) -> None:
        rows = [row for row in range(1, LORA_ROWS + 1) if f"lora_{row}" in self.inputs]
        for number in rows:
            found |= {f"lora_{number}": "", f"lora_weight_{number}": 1.0}
        free = iter(rows)
        for name, weight in loras.items():
            row: int | None = next(free, None) if name in self.context.model.loras else None
            if row is None:
                missing.append(f"the LoRA {name}")
            else:
                found |= {f"lora_{row}": name, f"lora_weight_{row}": min(2.0, max(-2.0, weight))}


def read_seed(text: str | None) -> int | None:
    """Return a seed, None for an empty text.

    Raises:
        RequestError: for what is none.
    """
    given = (text or "").strip()
    if not given:
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 20 and int(given) <= MAX_SEED):
        raise RequestError(f"the seed is {given[:40]!r}; needed is a whole number from 0 to {MAX_SEED}", "seed")
    return int(given)


def read_number(text: str | None, label: str, whole: bool) -> float | int | None:
    """Return a number, None for an empty text.

    Raises:
        RequestError: for what is none.
    """
    given = (text or "").strip()
    if not given:
        return None
    try:
        return int(given[:20]) if whole else float(given[:40].replace(",", "."))
    except ValueError:
        raise RequestError(f"{label} is {given[:40]!r}; needed is a {'whole ' if whole else ''}number") from None


def read_size(text: str | None) -> dict[str, int]:
    """Return height and width of "width x height", nothing for an empty text.

    Raises:
        RequestError: for what is none.
    """
    given = (text or "").replace(" ", "").lower()
    if not given:
        return {}
    width, _, height = given.partition("x")
    if not all(side.isascii() and side.isdigit() and len(side) < 6 for side in (width, height)):
        raise RequestError(f"the size is {given[:40]!r}; needed is width x height, such as 768x512", "size")
    return {"height": int(height), "width": int(width)}


def split_scheduler(name: str | None, suffixes: tuple[str, ...]) -> tuple[str, str]:
    """Return a scheduler's short name and its suffix, "" for none."""
    stem, _, last = (name or "").rpartition("-")
    return (stem, last) if stem and last in suffixes else (name or "", "")
