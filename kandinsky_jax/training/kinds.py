"""Kinds of training."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kandinsky_jax.training.config import Config


class Kind(StrEnum):
    """The trained network, and how.

    The prior or the decoder's UNet, fully, with LoRA, distilled, or by preferred pictures; MoVQ, or CLIP's towers.
    """

    PRIOR = "prior"
    DECODER = "decoder"
    LORA_PRIOR = "lora-prior"
    LORA_DECODER = "lora-decoder"
    DISTILL_PRIOR = "distill-prior"
    DISTILL_DECODER = "distill-decoder"
    DPO_PRIOR = "dpo-prior"
    DPO_DECODER = "dpo-decoder"
    MOVQ = "movq"
    CLIP = "clip"


DISTILLATION = (Kind.DISTILL_PRIOR, Kind.DISTILL_DECODER)
DPO = (Kind.DPO_PRIOR, Kind.DPO_DECODER)
LORA = (Kind.LORA_PRIOR, Kind.LORA_DECODER)


def trains_lora(kind: Kind, config: Config) -> bool:
    """Whether a kind of training ends with a LoRA file."""
    if kind in DPO:
        return config.dpo.lora
    return config.distillation.lora if kind in DISTILLATION else kind in LORA
