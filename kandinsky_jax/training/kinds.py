"""Kinds of training."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The trained network: the prior or the decoder's UNet, fully, with LoRA, or distilled; MoVQ, or CLIP's towers."""

    PRIOR = "prior"
    DECODER = "decoder"
    LORA_PRIOR = "lora-prior"
    LORA_DECODER = "lora-decoder"
    DISTILL_PRIOR = "distill-prior"
    DISTILL_DECODER = "distill-decoder"
    MOVQ = "movq"
    CLIP = "clip"
