"""Pictures <-> arrays, on the host. The one place that reads and makes pictures."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

OutputType = Literal["pil", "np", "pt", "latent"]


def from_network(pixels: np.ndarray) -> np.ndarray:
    """What MoVQ decodes, `[B, H, W, 3]` about -1..1 -> float32 `[B, H, W, 3]` in 0..1."""
    return np.clip(np.asarray(pixels, np.float32) * 0.5 + 0.5, 0, 1)


def to_output(pixels: np.ndarray, output_type: OutputType) -> Any:
    """Pictures `[B, H, W, 3]` in 0..1 as a pipeline returns them.

    Returns:
        "pil": a list of RGB pictures, levels round(255 x); "np": the array itself; "pt": PyTorch's order of axes,
        `[B, 3, H, W]`, also in 0..1 (the reference returns -1..1 in some pipelines and 0..1 in others).
    """
    if output_type == "np":
        return pixels
    if output_type == "pt":
        return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    levels = (pixels * 255).round().astype(np.uint8)
    return [Image.fromarray(picture) for picture in levels]


WRITABLE = (".png", ".jpg", ".jpeg", ".webp")


def check_writable(path: Path) -> None:
    """Raise where a picture could not be written to `path`, before the work for it is done."""
    if path.suffix.lower() not in WRITABLE:
        raise ValueError(f"{path} should end in one of {', '.join(WRITABLE)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder {path.absolute().parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"the folder {path.absolute().parent} is not writable")


def write(path: Path, picture: Image.Image, about: dict[str, Any] | None = None) -> None:
    """Write a picture, complete or not at all; a PNG also carries `about`, what it takes to draw it again."""
    info = PngInfo()
    if about is not None:
        info.add_itxt("kandinsky_jax", json.dumps(about, ensure_ascii=False))
    scratch = path.with_name(f".{path.name}.partial{path.suffix}")
    try:
        options: dict[str, Any] = {"pnginfo": info} if path.suffix.lower() == ".png" else {"quality": 95}
        picture.save(scratch, **options)
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


@dataclass(frozen=True)
class CLIPImageProcessor:
    """A picture as CLIP's vision tower takes it: shorter edge resized (bicubic), centre cropped, normalised.

    Reads and writes transformers' `preprocessor_config.json`. It is not transformers' own class because importing that
    takes seconds and pulls in torch where torch is installed.
    """

    size: int = 224
    crop: int = 224
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    FILE = "preprocessor_config.json"

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CLIPImageProcessor:
        path = Path(folder) / cls.FILE
        try:
            return cls._from_dict(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} cannot be used: {error}") from None

    @classmethod
    def _from_dict(cls, raw: dict[str, Any]) -> CLIPImageProcessor:
        size, crop = raw.get("size", 224), raw.get("crop_size", 224)
        side = size["shortest_edge"] if isinstance(size, dict) else size
        cropped = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
        needed = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "do_rescale": True, "resample": 3}
        faults = [f"{k}={raw[k]!r}" for k, v in needed.items() if raw.get(k, v) != v]
        if cropped[0] != cropped[1]:
            faults.append(f"crop_size={crop!r}")
        if faults:
            raise ValueError(f"not supported here: {', '.join(faults)}")
        return cls(side, cropped[0], tuple(raw["image_mean"]), tuple(raw["image_std"]))

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        fields = asdict(self)
        side, crop = fields.pop("size"), fields.pop("crop")
        config = {
            "image_processor_type": "CLIPImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "size": {"shortest_edge": side},
            "resample": 3,
            "do_center_crop": True,
            "crop_size": {"height": crop, "width": crop},
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            **{name: list(value) for name, value in fields.items()},
        }
        (Path(folder) / self.FILE).write_text(json.dumps(config, indent=2) + "\n")

    def __call__(self, image: Image.Image) -> np.ndarray:
        """A picture of any size -> float32 `[1, crop, crop, 3]`."""
        image = image.convert("RGB")
        scale = self.size / min(image.size)
        width, height = (self.size if side == min(image.size) else int(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.asarray(image, np.float32) / 255
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        return ((pixels - mean) / std)[None]
