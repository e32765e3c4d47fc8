"""Names of tensors in LoRA files: the layer that each belongs to, and its part in the change.

Five conventions are in use, each with or without the network's name as a prefix:

    down_blocks.1.attentions.0.to_q.lora_A.weight                       peft, and diffusers today
    base_model.model.down_blocks.1.attentions.0.to_q.lora_A.default.weight   a `PeftModel`'s own
    down_blocks.1.attentions.0.to_q.lora.down.weight                    diffusers of 2023
    down_blocks.1.attentions.0.processor.to_q_lora.down.weight          diffusers before, and its Kandinsky scripts
    lora_unet_down_blocks_1_attentions_0_to_q.lora_down.weight          kohya's scripts
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

Part = Literal["down", "up", "mid", "alpha"]


class TensorName(NamedTuple):
    """A parsed name of a tensor.

    Attributes:
        component: the network that the name begins with, such as "unet"; None where it begins with none.
        layer: the layer's name; dotted, or with underscores only (`underscored`).
        part: "down" is peft's A, "up" its B; "mid" stands between them for convolutions of LyCORIS.
        underscored: the layer's name has underscores in place of dots, as kohya's scripts write it.
        adapter: the adapter's name in the tensor's name, "" where it has none.
    """

    component: str | None
    layer: str
    part: Part
    underscored: bool = False
    adapter: str = ""


# Prefixes of wrappers around a network.
_WRAPPERS = ("base_model.model.", "module.", "_orig_mod.")
_COMPONENTS = ("unet", "prior", "transformer")
_TEXT = re.compile(r"^(text_encoder(_\d)?\.|text_model\.|lora_te\d?_|image_encoder\.|vision_model\.)")
_UNDERSCORED = re.compile(r"^(?:lora_(unet|prior|transformer)|lycoris)_([A-Za-z0-9_]+)$")

_PEFT = re.compile(r"^(.+)\.lora_([AB])(?:\.([^.]+))?\.weight$")
_DOWN_UP = re.compile(r"^(.+)\.lora(?:_linear_layer)?\.(down|up)\.weight$")
_PROCESSOR = re.compile(r"^(.+\.[a-z_]+)_lora\.(?:(down|up)\.weight|alpha)$")
_KOHYA = re.compile(r"^(.+)\.lora_(down|up|mid)\.weight$")
_ALPHA = re.compile(r"^(.+?)(?:\.lora)?\.alpha$")

# Methods other than LoRA, by what their tensors are called; of peft, LyCORIS and kohya.
_METHODS = (
    ("DoRA", re.compile(r"\.(lora_magnitude_vector|dora_scale)\b")),
    ("LoHa", re.compile(r"\.hada_[wt]\d")),
    ("LoKr", re.compile(r"\.lokr_[wt]\d")),
    ("BOFT", re.compile(r"\.boft_")),
    ("OFT", re.compile(r"\.(oft_|oft_blocks$|oft_diag$)")),
    ("IA3", re.compile(r"\.(ia3_l|on_input$)")),
    ("VeRA", re.compile(r"\.vera_lambda|\bvera_[AB]\b")),
    ("LoRA with a bias", re.compile(r"\.lora_(B|up)(\.[^.]+)?\.bias$")),
    ("AdaLoRA", re.compile(r"\.(lora_E\b|ranknum\b)|\.lora_[AB](\.[^.]+)?$")),
    ("KaSA", re.compile(r"\.lora_diag\b")),
    ("LoRA of an embedding", re.compile(r"\.lora_embedding_[AB]\b")),
    ("GLoRA", re.compile(r"\.[ab][12]\.weight$")),
    ("a change of full rank", re.compile(r"\.diff(_b)?$")),
)


def parse(name: str) -> TensorName | None:
    """Parse a tensor's name; None where it is not a LoRA tensor of a UNet or prior."""
    if _TEXT.match(name):
        return None
    component, bare = _component(name)
    if _TEXT.match(bare):
        return None
    found = _layer(bare.replace(".processor.", "."))
    if found is None:
        return None
    layer, part, adapter = found
    if "." not in layer and (flat := _UNDERSCORED.match(layer)):
        return TensorName(component or flat[1], flat[2], part, underscored=True)
    return TensorName(component, layer, part, adapter=adapter)


def method(name: str) -> str:
    """Return what a tensor that `parse` rejects belongs to, for a message: "DoRA", "a text encoder" and so on."""
    if _TEXT.match(name) or _TEXT.match(_component(name)[1]):
        return "a text encoder"
    return next((called for called, pattern in _METHODS if pattern.search(name)), "")


def underscored(layers: Mapping[str, object]) -> dict[str, str | None]:
    """Map names with underscores instead of dots to a network's layers; None where two have the same."""
    found: dict[str, str | None] = {}
    for layer in layers:
        name = layer.replace(".", "_")
        found[name] = None if name in found else layer
    return found


def _component(name: str) -> tuple[str | None, str]:
    """Return the network that a name begins with, and the rest, both without wrappers."""
    component = None
    while True:
        head, _, rest = name.partition(".")
        if wrapper := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), None):
            name = name.removeprefix(wrapper)
        elif head in _COMPONENTS and component is None and rest:
            component, name = head, rest
        else:
            return component, name


def _layer(name: str) -> tuple[str, Part, str] | None:
    """Return the layer, the part, and the adapter's name."""
    if found := _PEFT.match(name):
        return found[1], "down" if found[2] == "A" else "up", found[3] or ""
    if found := _DOWN_UP.match(name) or _KOHYA.match(name):
        part: Part = "down" if found[2] == "down" else "up" if found[2] == "up" else "mid"
        return found[1], part, ""
    if found := _PROCESSOR.match(name):
        layer = f"{found[1]}.0" if found[1].endswith(".to_out") else found[1]
        return layer, "alpha" if found[2] is None else "down" if found[2] == "down" else "up", ""
    if found := _ALPHA.match(name):
        return found[1], "alpha", ""
    return None
