"""Pictures <-> arrays, on the host. The one place that reads and makes pictures.

A picture that a user gives is a PIL picture of any mode (turned upright by its EXIF), the path of a file, or an array:
`[H, W]`, `[H, W, C]` or `[C, H, W]`, uint8 in 0..255 or float in 0..1, NumPy or JAX. Several come as a list, or stacked
along a first axis. PIL pictures and files are resized to what is drawn; arrays have to fit.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from kandinsky_jax.errors import quote, shorten, summarize
from kandinsky_jax.fields import Bounds, field_faults
from kandinsky_jax.reading import of_file, read_json_object
from kandinsky_jax.tensors.files import CheckpointError

MAX_EDGE = 4096  # of what a vision tower takes: the official one takes 224 pixels
OutputType = Literal["pil", "np", "pt", "latent"]

# What is opened: no format whose reader starts another program, as PostScript's does.
READABLE = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# Pictures in ------------------------------------------------------------------------------------------------------


def read(value: Image.Image | str | os.PathLike[str] | BinaryIO, name: str = "image") -> Image.Image:
    """A picture, or the one in a file (or open file), decoded and upright.

    Raises:
        ValueError: where it cannot be read, or has more pixels than Pillow holds to be safe.
    """
    given = isinstance(value, str | os.PathLike)
    what = os.fspath(value) if given else value if isinstance(value, Image.Image) else "the file"  # type: ignore[arg-type]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(value, Image.Image):
                value.load()
                return ImageOps.exif_transpose(value)
            Image.init()
            with Image.open(value, formats=[name for name in READABLE if name in Image.OPEN]) as image:
                image.load()
                return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"{name}: {what} is too large to be opened safely: {error}") from None
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no file {what}") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ValueError(f"{name}: {what} cannot be read as a picture: {error}") from None


def rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB; transparency is dropped, as `convert` does."""
    if image.mode == "I" or image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        image = Image.fromarray((_unit(np.asarray(image), "image") * 255).round().astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about a transparent palette
    return image.convert("RGB")


def pictures(value: Any, name: str, height: int, width: int) -> np.ndarray:
    """Pictures as MoVQ encodes them, float32 `[N, height, width, 3]` in -1..1.

    PIL pictures and files are resized (bicubic), arrays have to fit.
    """
    found = []
    for which, item in _items(value, name, (3, 4, 1)):
        if isinstance(item, Image.Image):
            resized = rgb(item).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
            pixels = np.asarray(resized, np.float32) / 127.5 - 1
        else:
            pixels = _unit(_fitting(item, which, height, width), which) * 2 - 1
        found.append(np.broadcast_to(pixels[..., :3], (height, width, 3)))
    return np.stack(found).astype(np.float32)


def masks(value: Any, name: str, height: int, width: int) -> np.ndarray:
    """Masks, bool `[N, height, width]`, true where the picture is to be repainted: where it is white, 1 or true.

    PIL masks and files are resized (Lanczos), arrays have to fit; from the middle of the range on it is white.
    """
    found = []
    for which, item in _items(value, name, (1,)):
        if isinstance(item, Image.Image):
            mask = item if item.mode in ("1", "L", "RGB") else rgb(item)
            mask = mask.resize((width, height), Image.Resampling.LANCZOS).convert("L")
            found.append(np.asarray(mask) >= 128)
        else:
            plane = _fitting(item, which, height, width)[..., 0]
            # Whole numbers may be levels, or 0 and 1.
            binary = plane.dtype.kind in "iu" and 0 <= plane.min() <= plane.max() <= 1
            found.append(_unit(plane.astype(bool) if binary else plane, which) >= 0.5)
    return np.stack(found)


def hints(value: Any, name: str, height: int, width: int) -> np.ndarray:
    """Depth hints, float32 `[N, height, width, 3]` in 0..1, near bright.

    Ready ones are RGB pictures and arrays of three channels, which are taken as they are. A depth map is a picture of
    one channel or an array `[H, W]`, of any size: 8-bit ones are levels of 0..255, as depth estimators make them;
    16-bit and float ones, which have no range of their own, are stretched from their least to their largest value.
    """
    found = []
    for which, item in _items(value, name, (3, 1)):
        if isinstance(item, Image.Image) and item.mode in ("1", "L", "LA", "I", "F", "I;16", "I;16L", "I;16B", "I;16N"):
            plane = np.asarray(item.convert("L") if item.mode in ("1", "LA") else item)
        elif isinstance(item, Image.Image):
            resized = rgb(item).resize((width, height), Image.Resampling.BILINEAR)
            found.append(np.asarray(resized, np.float32) / 255)
            continue
        elif item.shape[-1] == 1:
            plane = item[..., 0]
        else:
            found.append(_unit(_fitting(item, which, height, width), which))
            continue
        depth = Image.fromarray(_depth(plane, which)).resize((width, height), Image.Resampling.BILINEAR)
        found.append(np.repeat(np.asarray(depth)[..., None], 3, axis=-1))
    return np.stack(found).clip(0, 1)


def _freeze(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _depth(plane: np.ndarray, name: str) -> np.ndarray:
    """A depth map `[H, W]` as float32 in 0..1."""
    if plane.dtype == np.uint8:
        return plane.astype(np.float32) / 255
    plane = plane.astype(np.float32)
    if not np.isfinite(plane).all():
        raise ValueError(f"{name} has numbers that are not finite; fill the holes of a depth map first")
    low, high = plane.min(), plane.max()
    return (plane - low) / (high - low if high > low else 1)


def _items(value: Any, name: str, channels: tuple[int, ...]) -> Iterator[tuple[str, Any]]:
    """The pictures that a user gave, one by one, each with its name: PIL pictures, or arrays `[H, W, channels]`."""
    if isinstance(value, Image.Image | str | os.PathLike):
        yield name, read(value, name)
    elif isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} is an empty list; give one picture or more")
        for i, item in enumerate(value):
            yield from _items(item, f"{name}[{i}]", channels)
    elif hasattr(value, "__array__"):
        array = _nhwc(np.asarray(value), name, channels)
        yield from ((name if len(array) == 1 else f"{name}[{i}]", item) for i, item in enumerate(array))
    else:
        raise TypeError(
            f"{name} must be a PIL picture, the path of a file, an array or a list of such, got {type(value).__name__}"
        )


def _nhwc(array: np.ndarray, name: str, channels: tuple[int, ...]) -> np.ndarray:
    """An array of one or more pictures in any order of axes as `[N, H, W, C]`."""
    shape = array.shape
    if array.dtype.kind not in "biufV" or array.dtype.fields is not None:  # V: bfloat16 and its kin
        raise TypeError(f"{name} must be an array of numbers, has dtype {array.dtype}")
    if array.ndim in (3, 4) and shape[-1] not in channels and shape[-3] in channels:
        array = np.moveaxis(array, -3, -1)  # [C, H, W] or [N, C, H, W]
    elif array.ndim == 2 or (array.ndim == 3 and shape[-1] not in channels and 4 not in channels):
        array = array[..., None]  # [H, W], or [N, H, W] of masks and depth maps
    array = array[None] if array.ndim == 3 else array
    if array.ndim != 4 or array.shape[-1] not in channels or array.size == 0:
        wanted = " or ".join(map(str, sorted(channels)))
        raise ValueError(f"{name} has shape {shape}, needed is [H, W, C] or a stack of such, with {wanted} channels")
    return array


def _fitting(array: np.ndarray, name: str, height: int, width: int) -> np.ndarray:
    """The array `[H, W, C]` itself, if it has the size that is drawn."""
    if array.shape[:2] != (height, width):
        raise ValueError(
            f"{name} has {array.shape[0]}x{array.shape[1]} pixels (height x width), needed is {height}x{width}, the "
            "size that is drawn; resize the array, or give a PIL picture, which is resized for you"
        )
    return array


def _unit(array: np.ndarray, name: str) -> np.ndarray:
    """An array of levels 0..255 (whole numbers) or of 0..1 (floats, booleans) as float32 in 0..1."""
    whole = array.dtype.kind in "iu"
    array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise ValueError(f"{name} has numbers that are not finite")
    top = 255 if whole else 1
    if array.min() < 0 or array.max() > top:
        raise ValueError(
            f"{name} has values from {array.min():g} to {array.max():g}, needed are "
            + ("whole numbers of 0 to 255" if whole else "floats of 0 to 1 (x / 2 + 0.5 for -1 to 1)")
        )
    return array / np.float32(top)


def fitting_size(image: Image.Image, native: int) -> tuple[int, int]:
    """(height, width) for drawing after a picture: its proportions, about native x native pixels, multiples of 64."""
    scale = native / math.sqrt(image.width * image.height)
    height, width = (max(64, round(side * scale / 64) * 64) for side in (image.height, image.width))
    return height, width


# Pictures out -----------------------------------------------------------------------------------------------------


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


# By the ending: Pillow's name, and how they are written.
ENCODINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95}),
    "jpeg": ("JPEG", {"quality": 95}),
    "webp": ("WEBP", {"quality": 95}),
}
WRITABLE = tuple(f".{ending}" for ending in ENCODINGS)


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
        kind, options = ENCODINGS[path.suffix.lower().removeprefix(".")]
        picture.save(scratch, kind, **options, **({"pnginfo": info} if kind == "PNG" else {}))
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)


def encode(picture: Image.Image, ending: str) -> bytes:
    """A picture as the bytes of a file.

    Args:
        ending: one of `ENCODINGS`.
    """
    kind, options = ENCODINGS[ending]
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return data.getvalue()


# CLIP's own way in ------------------------------------------------------------------------------------------------


def embeddable(value: Any, name: str) -> list[Image.Image]:
    """Pictures for `CLIPImageProcessor`, which resizes and crops by itself."""
    found = []
    for which, item in _items(value, name, (3, 4, 1)):
        if isinstance(item, Image.Image):
            found.append(item)
        else:
            levels = (_unit(item, which) * 255).round().astype(np.uint8)
            found.append(Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels))
    return found


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

    FILE: ClassVar[str] = "preprocessor_config.json"
    BOUNDS: ClassVar[Bounds] = {"size": (1, MAX_EDGE), "crop": (1, MAX_EDGE), "image_std": (1e-6, 1e6)}

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CLIPImageProcessor:
        """Read a configuration; CheckpointError where it is missing, damaged or of another kind of processor."""
        path = Path(folder) / cls.FILE
        try:
            return cls._from_dict(read_json_object(path))
        except FileNotFoundError:
            raise CheckpointError(of_file(path, "is missing")) from None
        except ValueError as error:  # ReadError among them
            raise CheckpointError(of_file(path, f"cannot be used: {shorten(error, 240)}")) from None

    @classmethod
    def _from_dict(cls, raw: dict[str, Any]) -> CLIPImageProcessor:
        size, crop = raw.get("size", cls.size), raw.get("crop_size", cls.crop)
        side: Any = size.get("shortest_edge") if isinstance(size, dict) else size
        cropped: tuple[Any, Any] = (crop.get("height"), crop.get("width")) if isinstance(crop, dict) else (crop, crop)
        needed = {"do_resize": True, "do_center_crop": True, "do_normalize": True, "do_rescale": True, "resample": 3}
        faults = [f"{k}={quote(raw[k], 40)}" for k, v in needed.items() if raw.get(k, v) != v]
        if cropped[0] != cropped[1]:
            faults.append(f"crop_size={quote(crop, 40)}")
        if faults:
            raise ValueError(f"not supported here: {summarize(faults, 200, ', ')}")
        colours: list[Any] = [_freeze(raw.get(name)) for name in ("image_mean", "image_std")]
        processor = cls(side, cropped[0], *colours)
        faults = field_faults(processor, cls.BOUNDS)
        if not faults and not (len(processor.image_mean) == len(processor.image_std) == 3):
            faults = ["image_mean and image_std must have three numbers each"]
        if faults:
            raise ValueError(summarize(faults, 200))
        return processor

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
        """A picture of any size and mode -> float32 `[1, crop, crop, 3]`."""
        image = rgb(read(image))
        scale = self.size / min(image.size)
        width, height = (self.size if side == min(image.size) else int(side * scale) for side in image.size)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        image = image.crop((left, top, left + self.crop, top + self.crop))
        pixels = np.asarray(image, np.float32) / 255
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        return ((pixels - mean) / std)[None]
