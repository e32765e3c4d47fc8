"""Inverse problems and composition: posterior sampling, panoramas, interpolation, outpainting.

All of it is built on `kandinsky_jax.diffusion`: a guider, a model around a model, and functions of noises and pictures.
"""

from kandinsky_jax.composition.interpolation import Interpolation, interpolation_grid
from kandinsky_jax.composition.operators import Operator, downsampling, gaussian_blur, masking, of_decoded
from kandinsky_jax.composition.outpainting import OutpaintCanvas, outpaint_canvas, paste_original
from kandinsky_jax.composition.panorama import Panorama, decode_wrapped, stack_conditions, window_starts
from kandinsky_jax.composition.pictures import save_gif, save_grid, to_pictures
from kandinsky_jax.composition.posterior import PosteriorSampling, measurement_distance

__all__ = [
    "Interpolation",
    "Operator",
    "OutpaintCanvas",
    "Panorama",
    "PosteriorSampling",
    "decode_wrapped",
    "downsampling",
    "gaussian_blur",
    "interpolation_grid",
    "masking",
    "measurement_distance",
    "of_decoded",
    "outpaint_canvas",
    "paste_original",
    "save_gif",
    "save_grid",
    "stack_conditions",
    "to_pictures",
    "window_starts",
]
