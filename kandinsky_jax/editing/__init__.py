"""Inversion and editing of pictures, by pure functions of arrays; see docs/editing.md.

A picture becomes noise by `ddim_inversion`, or the noises of a stochastic sampler by `edit_friendly_inversion`;
`kandinsky_jax.diffusion.sample` makes the edited picture of them, with another condition.
"""

from kandinsky_jax.editing.edit_friendly import EditFriendlyInversion, edit_friendly_inversion
from kandinsky_jax.editing.embeds import embeds_by_step, rotate_embeds, shift_embeds
from kandinsky_jax.editing.inversion import ddim_inversion
from kandinsky_jax.editing.masks import KeepOutside, difference_mask
from kandinsky_jax.editing.null_embeds import NullEmbeds, optimize_null_embeds

__all__ = [
    "EditFriendlyInversion",
    "KeepOutside",
    "NullEmbeds",
    "ddim_inversion",
    "difference_mask",
    "edit_friendly_inversion",
    "embeds_by_step",
    "optimize_null_embeds",
    "rotate_embeds",
    "shift_embeds",
]
