"""What there is to train."""

from __future__ import annotations

from enum import StrEnum


class Kind(StrEnum):
    """The prior or the decoder's UNet, whole or by low-rank changes; MoVQ, and both towers of CLIP."""

    PRIOR = "prior"
    DECODER = "decoder"
    LORA_PRIOR = "lora-prior"
    LORA_DECODER = "lora-decoder"
    MOVQ = "movq"
    CLIP = "clip"
