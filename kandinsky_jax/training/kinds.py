"""Kinds of training."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The trained network: the prior or the decoder's UNet, fully or with LoRA; MoVQ, or both towers of CLIP."""

    PRIOR = "prior"
    DECODER = "decoder"
    LORA_PRIOR = "lora-prior"
    LORA_DECODER = "lora-decoder"
    MOVQ = "movq"
    CLIP = "clip"
