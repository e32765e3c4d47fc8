"""Conversion of pictures and arrays on the host; all reading and writing of pictures is here.

A picture that a user gives is a PIL picture of any mode (turned upright by its EXIF), the path of a file, or an array
of NumPy, JAX or PyTorch: `[H, W]`, `[H, W, C]` or `[C, H, W]`. Several come as a list, or stacked along a first axis.

What its numbers mean is decided by their dtype and range (`unit`): booleans and floats up to 1 are shares of white,
whole numbers up to 255 are levels of 8 bits, larger ones of 16 bits. What could be either is refused.

PIL pictures and files are resized as in diffusers: pictures bicubic, masks by Lanczos. So are arrays: to the nearest
pixel, which is what `torch.nn.functional.interpolate` does by itself.
"""

from __future__ import annotations

import io
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Literal

import numpy as np
from PIL import Image, ImageOps

from kandinsky_jax.common import atomic
from kandinsky_jax.common.arrays import to_numpy
from kandinsky_jax.common.errors import CheckpointError, quote, shorten, summarize
from kandinsky_jax.common.fields import Bounds, field_faults
from kandinsky_jax.common.reading import check_regular, of_file, read_json_object
from kandinsky_jax.picture_records import save_arguments

MAX_EDGE = 4096  # of a vision tower's input; the official one takes 224 pixels
OutputType = Literal["pil", "np", "pt", "latent"]

# Formats that are opened; none whose reader starts another program, as that of PostScript does.
READABLE = (
    *("AVIF", "BMP", "DDS", "DIB", "GIF", "ICNS", "ICO", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "PSD", "QOI"),
    *("SGI", "TGA", "TIFF", "WEBP"),
)
DEEP = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")  # PIL's modes of more than 8 bits
DARKEST = 31  # floats up to 1 are shares of white, and such with one above this are levels; between, they may be either
OVERSHOOT = 1e-3  # of a range: floats beyond it by rounding, as bicubic resizing leaves them
MAX_FITTING = 4096  # pixels along a side
MAX_LIST_NESTING = 4  # of lists
LONGEST = 16  # times its shorter side: a longer picture is not resized whole before its middle is cut out

# Pictures in ------------------------------------------------------------------------------------------------------


def read(value: Image.Image | str | os.PathLike[str] | BinaryIO, name: str = "image") -> Image.Image:
    """Decode a picture, or the one in a file or open file, and turn it upright by its EXIF.

    Raises:
        ValueError: where it cannot be read, or has more pixels than Pillow holds to be safe.
    """
    given = isinstance(value, str | os.PathLike)
    what = shorten(os.fspath(value), 200) if given else "it"  # type: ignore[arg-type]
    try:
        if isinstance(value, Image.Image):
            value.load()
            return _upright(value)
        if given:
            check_regular(value)  # type: ignore[arg-type]
        Image.init()
        with Image.open(value, formats=[name for name in READABLE if name in Image.OPEN]) as image:
            most = Image.MAX_IMAGE_PIXELS
            if most is not None and image.width * image.height > most:
                raise Image.DecompressionBombError(f"{image.width} x {image.height} pixels, at most {most} in all")
            image.load()
            return _upright(image)
    except (Image.DecompressionBombWarning, Image.DecompressionBombError, MemoryError) as error:
        raise ValueError(f"{name}: {what} is too large to be opened safely: {shorten(str(error), 150)}") from None
    except FileNotFoundError:
        raise ValueError(f"{name}: there is no file {what}") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(READABLE)
        raise ValueError(f"{name}: {what} cannot be read as a picture: cannot identify it as any of {known}") from None
    except Exception as error:  # Pillow's readers raise many kinds for damaged data
        fault = shorten(str(error), 150) or type(error).__name__
        raise ValueError(f"{name}: {what} cannot be read as a picture: {fault}") from None


def _upright(image: Image.Image) -> Image.Image:
    if image.mode in ("La", "RGBa"):  # premultiplied alpha, for which Pillow has no other conversion
        image = image.convert(image.mode.upper())
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF is ignored
        return image.copy()


def rgb(image: Image.Image, name: str = "image") -> Image.Image:
    """Convert a picture of any mode to RGB; transparency is dropped, as `convert` does."""
    if image.mode in DEEP:
        image = Image.fromarray((unit(np.asarray(image), name) * 255).round().astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about a transparent palette
    try:
        return image.convert("RGB")
    except ValueError:
        raise ValueError(f"{name} has the mode {image.mode}, which cannot be made RGB; convert it first") from None


def pictures(value: object, name: str, height: int, width: int) -> np.ndarray:
    """Read pictures for MoVQ, float32 `[N, height, width, 3]` in -1..1."""
    found = []
    for which, item in _items(value, name, (3, 4, 1), unit):
        if isinstance(item, Image.Image):
            resized = rgb(item, which).resize((width, height), Image.Resampling.BICUBIC, reducing_gap=1)
            pixels = np.asarray(resized, np.float32) / 127.5 - 1
        else:
            pixels = _nearest(item, height, width) * 2 - 1
        found.append(np.broadcast_to(pixels[..., :3], (height, width, 3)))
    return np.stack(found).astype(np.float32)


def masks(value: object, name: str, height: int, width: int, warn: bool = True) -> np.ndarray:
    """Read masks, bool `[N, height, width]`, true where the picture is repainted: where they are white, 1 or true.

    From the middle of the range on it is white. Whole numbers of which none is above 1 are 0 and 1.

    Args:
        warn: whether to warn of a mask that repaints nothing or everything.
    """
    found = []
    for which, item in _items(value, name, (1,), _mask_unit):
        if isinstance(item, Image.Image):
            grey = _mask_levels(item, which).resize((width, height), Image.Resampling.LANCZOS).convert("L")
            mask, largest = np.asarray(grey) >= 128, f"{np.asarray(grey).max()} of 255"
        else:
            mask = _nearest(item, height, width)[..., 0] >= 0.5
            largest = f"{float(item.max()):.3g} of 1"
        if warn and not mask.any():
            warnings.warn(f"{which} repaints nothing: its largest value is {largest}; white is repainted", stacklevel=2)
        elif warn and mask.all():
            warnings.warn(f"{which} repaints everything: all of it is white; black is kept", stacklevel=2)
        found.append(mask)
    return np.stack(found)


def _mask_levels(image: Image.Image, name: str) -> Image.Image:
    """Convert a mask of any mode to 1, L or RGB, where white is 255."""
    if image.has_transparency_data and image.mode != "1":
        colours = image.convert("RGBA")
        *ranges, alpha = [np.ptp(np.asarray(band)) for band in colours.split()]
        if alpha and not any(ranges):
            raise ValueError(
                f"{name} is of one colour, and its content is in its transparency, which can mean either; needed is "
                "a mask without transparency in which white is repainted"
            )
    if image.mode in DEEP:
        return Image.fromarray((_mask_unit(np.asarray(image), name) * 255).round().astype(np.uint8))
    mask = image if image.mode in ("1", "L", "RGB") else rgb(image, name)
    return mask.point(lambda level: 255 * level) if np.asarray(mask).max() == 1 and mask.mode != "1" else mask


def _mask_unit(array: np.ndarray, name: str) -> np.ndarray:
    """Convert as `unit`, except that integers may be 0 and 1."""
    if array.dtype.kind in "iu" and array.size and 0 <= array.min() <= array.max() <= 1:
        return array.astype(np.float32)
    return unit(array, name)


def hints(value: object, name: str, height: int, width: int) -> np.ndarray:
    """Read depth hints, float32 `[N, height, width, 3]` in 0..1, bright where near.

    Ready ones are RGB pictures and arrays of three channels, which are taken as they are. A depth map is a picture of
    one channel or an array `[H, W]`, of any size: 8-bit ones are levels of 0..255, as depth estimators make them;
    16-bit and float ones, which have no range of their own, are stretched from their least to their largest value.
    """
    found = []
    for which, item in _items(value, name, (3, 1)):
        if isinstance(item, Image.Image) and item.mode in ("1", "L", "LA", *DEEP):
            plane = np.asarray(item.convert("L") if item.mode in ("1", "LA") else item)
        elif isinstance(item, Image.Image):
            resized = rgb(item, which).resize((width, height), Image.Resampling.BILINEAR)
            found.append(np.asarray(resized, np.float32) / 255)
            continue
        elif item.shape[-1] == 1:
            plane = item[..., 0]
        else:
            found.append(unit(_fitting(item, which, height, width), which))
            continue
        depth = Image.fromarray(_depth(plane, which)).resize((width, height), Image.Resampling.BILINEAR)
        found.append(np.repeat(np.asarray(depth)[..., None], 3, axis=-1))
    return np.stack(found).clip(0, 1)


def _freeze(value: object) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _depth(plane: np.ndarray, name: str) -> np.ndarray:
    """Scale a depth map `[H, W]` to float32 in 0..1."""
    if plane.dtype == np.uint8:
        return plane.astype(np.float32) / 255
    plane = plane.astype(np.float32)
    if not np.isfinite(plane).all():
        raise ValueError(f"{name} has numbers that are not finite; fill the holes of a depth map first")
    low, high = plane.min(), plane.max()
    return (plane - low) / (high - low if high > low else 1)


def _items(
    value: object,
    name: str,
    channels: tuple[int, ...],
    convert: Callable[[np.ndarray, str], np.ndarray] | None = None,
    nesting: int = 0,
) -> Iterator[tuple[str, Image.Image | np.ndarray]]:
    """Yield the given pictures with their names: PIL pictures, or arrays `[H, W, channels]`.

    Args:
        convert: applied to each given array, whose pictures share a range.
        nesting: number of enclosing lists.
    """
    if isinstance(value, Image.Image | str | os.PathLike):
        yield name, read(value, name)
    elif isinstance(value, list | tuple):
        if not value:
            raise ValueError(f"{name} is an empty list; give one picture or more")
        if nesting == MAX_LIST_NESTING:
            raise ValueError(f"{name} is a list in {nesting} others; give one list of pictures")
        for i, item in enumerate(value):
            yield from _items(item, f"{name}[{i}]", channels, convert, nesting + 1)
    elif hasattr(value, "__array__"):
        array = _nhwc(to_numpy(value, name), name, channels)
        array = array if convert is None else convert(array, name)
        yield from ((name if len(array) == 1 else f"{name}[{i}]", item) for i, item in enumerate(array))
    else:
        raise TypeError(
            f"{name} must be a PIL picture, the path of a file, an array or a list of such, got {type(value).__name__}"
        )


def _nhwc(array: np.ndarray, name: str, channels: tuple[int, ...]) -> np.ndarray:
    """Convert an array of one or more pictures in any order of axes to `[N, H, W, C]`."""
    shape = array.shape
    if channels == (1,) and array.ndim == 3 and shape[-1] in (2, 3, 4):
        raise ValueError(f"{name} has shape {shape}, which is {shape[-1]} channels; needed is one, [H, W]")
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
    """Return an array `[H, W, C]`; ValueError unless it has the generated size."""
    if array.shape[:2] != (height, width):
        raise ValueError(
            f"{name} has {array.shape[0]}x{array.shape[1]} pixels (height x width), needed is {height}x{width}, the "
            "size of the output; resize the array, or give a PIL picture, which is resized for you"
        )
    return array


def _nearest(array: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize an array `[H, W, C]` to the nearest pixels, as PyTorch's `interpolate` chooses them."""
    if array.shape[:2] == (height, width):
        return array
    rows, columns = (
        np.minimum(np.floor(np.arange(new, dtype=np.float32) * np.float32(old / new)).astype(int), old - 1)
        for old, new in zip(array.shape, (height, width), strict=False)
    )
    return array[rows][:, columns]


def unit(array: np.ndarray, name: str) -> np.ndarray:
    """Convert a picture's values to float32 in 0..1, by their dtype and range.

    - Booleans, and floats up to 1: as they are. Floats from above `DARKEST` to 255: levels of 8 bits.
    - Whole numbers up to 255: levels of 8 bits, also in a wider dtype. From above 4095 to 65535: of 16 bits.
    - Floats that overshoot a range by rounding, by up to `OVERSHOOT` of it, are clipped.

    Raises:
        ValueError: for what is negative, not finite or too large, or could be in two units.
    """
    if array.dtype.kind == "b":
        return array.astype(np.float32)
    whole = array.dtype.kind in "iu"
    if not whole:
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError(f"{name} has numbers that are not finite")
    low, high = array.min(), array.max()
    if whole:
        top = 255 if high <= 255 else 65535 if 4095 < high <= 65535 else 0
        needed = "whole numbers of 0 to 255, or 16-bit levels of which some are above 4095"
    else:
        most = 1 + OVERSHOOT
        top = 1 if high <= most else 255 if DARKEST < high <= 255 * most else 0
        needed = "floats of 0 to 1 (x / 2 + 0.5 for -1 to 1; clip what overshoots), or levels up to 255"
    if low < (0 if whole else -OVERSHOOT * top) or not top:
        low, high = (str(x).removesuffix(".0") for x in (low, high))
        raise ValueError(f"{name} has values from {low} to {high}, needed are {needed}")
    return (array.astype(np.float32) / np.float32(top)).clip(0, 1)


def fitting_size(image: Image.Image, native: int) -> tuple[int, int]:
    """Return (height, width) with a picture's proportions: about native x native pixels, multiples of 64.

    Raises:
        ValueError: where a picture is so long that a side would exceed `MAX_FITTING`.
    """
    scale = native / math.sqrt(image.width * image.height)
    height, width = (max(64, round(side * scale / 64) * 64) for side in (image.height, image.width))
    if max(height, width) > max(MAX_FITTING, native):
        raise ValueError(
            f"image has {image.height} x {image.width} pixels (height x width), which is too long for its proportions "
            f"to be kept: a side would have {max(height, width)} pixels, at most {MAX_FITTING}; give height and width"
        )
    return height, width


# Pictures out -----------------------------------------------------------------------------------------------------


def from_network(pixels: np.ndarray) -> np.ndarray:
    """Convert MoVQ's output, `[B, H, W, 3]` about -1..1, to float32 in 0..1."""
    return np.clip(np.asarray(pixels, np.float32) * 0.5 + 0.5, 0, 1)


def to_output(pixels: np.ndarray, output_type: OutputType) -> Any:
    """Convert pictures `[B, H, W, 3]` in 0..1 to the output type of a pipeline.

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


# By suffix: Pillow's format, and options for writing.
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "png": ("PNG", {}),
    "jpg": ("JPEG", {"quality": 95}),
    "jpeg": ("JPEG", {"quality": 95}),
    "webp": ("WEBP", {"quality": 95}),
}
WRITABLE = tuple(f".{ending}" for ending in ENCODINGS)


def check_writable(path: Path) -> None:
    """Raise ValueError if a picture cannot be written to `path`, before it is generated."""
    if path.suffix.lower() not in WRITABLE:
        raise ValueError(f"{path} should end in one of {', '.join(WRITABLE)}")
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"the folder {path.absolute().parent} does not exist")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"the folder {path.absolute().parent} is not writable")


def write(path: Path, picture: Image.Image, about: Mapping[str, object] | None = None) -> None:
    """Write a picture atomically, with `about`, the settings that reproduce it (see `picture_records`)."""
    atomic.replace_file(path, encode(picture, path.suffix.lower().removeprefix("."), about))


def encode(
    picture: Image.Image, ending: str, about: Mapping[str, object] | None = None, quality: int | None = None
) -> bytes:
    """Encode a picture as the bytes of a file.

    Args:
        ending: one of `ENCODINGS`.
        about: the settings that reproduce it, which the file then carries (see `picture_records`).
        quality: of JPEG and WebP, 1..100; None is 95.
    """
    kind, options = ENCODINGS[ending]
    if quality is not None and "quality" in options:
        options = options | {"quality": quality}
    data = io.BytesIO()
    picture.save(data, kind, **options, **save_arguments(kind, about))
    return data.getvalue()


# CLIP's preprocessing ---------------------------------------------------------------------------------------------


def embeddable(value: object, name: str) -> list[Image.Image]:
    """Read pictures for `CLIPImageProcessor`, which resizes and crops them."""
    found = []
    for _, item in _items(value, name, (3, 4, 1), unit):
        if isinstance(item, Image.Image):
            found.append(item)
        else:
            levels = (item * 255).round().astype(np.uint8)
            found.append(Image.fromarray(levels[..., 0] if levels.shape[-1] == 1 else levels))
    return found


@dataclass(frozen=True)
class CLIPImageProcessor:
    """Preprocessing of CLIP's vision tower: shorter edge resized (bicubic), centre crop, normalisation.

    Reads and writes transformers' `preprocessor_config.json`. It is not transformers' own class because importing that
    takes seconds and pulls in torch where torch is installed.
    """

    size: int = 224
    crop: int = 224
    image_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    rescale_factor: float = 1 / 255  # factor of the pixel values

    FILE: ClassVar[str] = "preprocessor_config.json"
    BOUNDS: ClassVar[Bounds] = {
        "size": (1, MAX_EDGE),
        "crop": (1, MAX_EDGE),
        "image_std": (1e-6, 1e6),
        "rescale_factor": (1e-6, 1e3),
    }

    @classmethod
    def from_pretrained(cls, folder: str | os.PathLike[str]) -> CLIPImageProcessor:
        """Read a configuration; CheckpointError if it is missing, damaged or of another kind of processor."""
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
        faults = [f"{name}={quote(raw[name], 40)}" for name, value in needed.items() if raw.get(name, value) != value]
        faults += [f"{name}={quote(raw[name], 40)}" for name in ("do_pad", "use_square_size") if raw.get(name)]
        if isinstance(size, dict) and size.keys() != {"shortest_edge"}:
            faults.append(f'size={quote(size, 60)} (only {{"shortest_edge": N}})')
        if isinstance(crop, dict) and (crop.keys() != {"height", "width"} or cropped[0] != cropped[1]):
            faults.append(f'crop_size={quote(crop, 60)} (only {{"height": N, "width": N}})')
        if faults:
            raise ValueError(f"not supported here: {summarize(faults, 200, ', ')}")
        mean, std = (_freeze(raw.get(name)) for name in ("image_mean", "image_std"))
        processor = cls(side, cropped[0], mean, std, raw.get("rescale_factor", cls.rescale_factor))
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
            "do_normalize": True,
            **fields,
        }
        atomic.replace_file(Path(folder) / self.FILE, (json.dumps(config, indent=2) + "\n").encode())

    def __call__(self, image: Image.Image) -> np.ndarray:
        """Preprocess a picture of any size and mode to float32 `[1, crop, crop, 3]`."""
        image = rgb(read(image))
        scale = self.size / min(image.size)
        width, height = (self.size if side == min(image.size) else int(side * scale) for side in image.size)
        left, top = (width - self.crop) // 2, (height - self.crop) // 2
        box = (left, top, left + self.crop, top + self.crop)
        if max(width, height) > LONGEST * self.size and min(left, top) >= 0:  # only the part that is kept
            across, down = image.width / width, image.height / height
            part = (box[0] * across, box[1] * down, box[2] * across, box[3] * down)
            image = image.resize((self.crop, self.crop), Image.Resampling.BICUBIC, box=part)
        else:
            image = image.resize((width, height), Image.Resampling.BICUBIC).crop(box)
        pixels = (np.asarray(image, np.float64) * self.rescale_factor).astype(np.float32)
        mean, std = np.asarray(self.image_mean, np.float32), np.asarray(self.image_std, np.float32)
        return ((pixels - mean) / std)[None]
