"""The data of `shapes_model`: captions, true pictures, and a scorer of pictures without a network.

A coloured shape on a plain ground. A fault in a port that keeps the pictures smooth (a swapped guidance, a wrong time
step) may look fine to every check of ranges and shapes, but makes the model generate something else than the caption.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
PALETTE = {
    "red": (220, 40, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (250, 220, 50),
    "purple": (140, 50, 190),
    "orange": (245, 130, 30),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
COLOURS = tuple(name for name in PALETTE if name != "gray")
BACKGROUNDS = ("green", "blue", "yellow", "white", "black", "gray")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
RADII = {"small": (10.0, 12.0), "": (14.5, 18.5), "large": (21.5, 25.5)}
JITTER = 9.0
TEMPLATES = (
    "{an_obj} on {a_bg} background",
    "{obj}, {bg} background",
    "{a_bg} background with {an_obj}",
    "{obj} on {bg}",
)


@dataclass(frozen=True)
class Verdict:
    """What a picture shows, or should show."""

    colour: str
    background: str
    shape: str


@dataclass(frozen=True)
class Caption:
    """A prompt and the shape that it asks for; `size` is "" where the prompt leaves it open."""

    text: str
    truth: Verdict
    size: str


# ---- captions ----


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def caption(truth: Verdict, size: str = "", template: str = TEMPLATES[0]) -> Caption:
    """The caption of one picture."""
    obj = f"{size} {truth.colour} {truth.shape}".strip()
    bg = truth.background
    text = template.format(obj=obj, an_obj=_with_article(obj), bg=bg, a_bg=_with_article(bg))
    return Caption(text, truth, size)


def captions(n: int, seed: int = 0) -> list[Caption]:
    """`n` distinct captions in which every colour, shape, background, size and template comes up equally often."""
    rng = np.random.default_rng(seed)

    def deck(options: Sequence[str]) -> list[str]:
        return [options[i % len(options)] for i in rng.permutation(n)]

    colours, shapes, backgrounds, sizes, templates = map(deck, (COLOURS, SHAPES, BACKGROUNDS, tuple(RADII), TEMPLATES))
    while True:
        rows = zip(colours, backgrounds, shapes, sizes, templates, strict=True)
        found = [caption(Verdict(*row[:3]), *row[3:]) for row in rows]
        texts = [c.text for c in found]
        bad = [i for i, c in enumerate(found) if c.truth.colour == c.truth.background or c.text in texts[:i]]
        if not bad:
            return found
        # A swap keeps the number of each background; a fresh sample would not.
        for i in bad:
            j = int(rng.integers(n))
            backgrounds[i], backgrounds[j] = backgrounds[j], backgrounds[i]


# ---- true pictures ----


def _regular(corners: int, radii: Sequence[float]) -> np.ndarray:
    """Corners on circles of the given radii in turn, the first one straight up."""
    angles = 2 * np.pi * np.arange(corners) / corners
    radius = np.resize(radii, corners)
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], -1)


def _cross(arm: float) -> np.ndarray:
    """A plus sign; `arm` is half the width of an arm."""
    quarter = np.array([(-arm, -1), (arm, -1), (arm, -arm)])
    turn = np.array([(0, 1), (-1, 0)])
    return np.concatenate([quarter @ np.linalg.matrix_power(turn, k) for k in range(4)])


# Of radius 1. The star, the cross and the ring have the proportions that fit the model's large shapes best; the
# verdicts do not hang on them.
OUTLINES = {
    "square": 0.85 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
    "triangle": _regular(3, [1.0]),
    "star": _regular(10, [1.0, 0.41]),
    "cross": _cross(1 / 3),
}
RING_HOLE = 0.52


def coverage(shape: str, centre: tuple[float, float], radius: float, side: int = SIDE, fine: int = 8) -> np.ndarray:
    """The share of each pixel that the shape covers, [side, side] in [0, 1]."""
    canvas = Image.new("L", (side * fine, side * fine))
    draw = ImageDraw.Draw(canvas)
    middle = np.asarray(centre) * fine
    if shape in OUTLINES:
        draw.polygon([tuple(point) for point in middle + OUTLINES[shape] * radius * fine], fill=255)
    else:
        draw.circle(tuple(middle), radius * fine, fill=255)
    if shape == "ring":
        draw.circle(tuple(middle), RING_HOLE * radius * fine, fill=0)
    return np.asarray(canvas.resize((side, side), Image.Resampling.BOX), np.float32) / 255


def draw(asked: Caption, rng: np.random.Generator) -> np.ndarray:
    """Draw the true picture of a caption, [64, 64, 3] in [0, 1], with random position and radius as in training."""
    x, y = SIDE / 2 + rng.uniform(-JITTER, JITTER, 2)
    share = coverage(asked.truth.shape, (x, y), rng.uniform(*RADII[asked.size]))[..., None]
    ink, ground = (np.array(PALETTE[name]) / 255 for name in (asked.truth.colour, asked.truth.background))
    return share * ink + (1 - share) * ground


def depth(shape: str, centre: tuple[float, float], radius: float) -> np.ndarray:
    """A depth hint as in the training data, float32 [64, 64] in [0, 1]: a shape before a ground that rises a little."""
    share = coverage(shape, centre, radius)
    rows, columns = np.mgrid[:SIDE, :SIDE] + 0.5
    far = np.hypot(columns - centre[0], rows - centre[1]) / radius
    ground = np.linspace(0.04, 0.16, SIDE)[:, None]
    return np.float32(share * (0.95 - 0.22 * np.minimum(far, 1.2)) + (1 - share) * ground)


# ---- the scorer ----

_PAD = 96  # the correlation wraps round: this leaves space for the largest template past the border
_NAMES = tuple(PALETTE)
_TABLE = np.array([PALETTE[name] for name in _NAMES], np.float32)


@functools.cache
def _templates() -> tuple[tuple[str, ...], np.ndarray, np.ndarray]:
    """Every shape at every radius: names, conjugate spectra, and the area that lies on the canvas for each place."""
    sizes = [(shape, radius) for shape in SHAPES for radius in np.geomspace(8, 28, 22)]
    middle = (_PAD / 2, _PAD / 2)
    stack = np.stack([coverage(shape, middle, radius, _PAD) > 0.5 for shape, radius in sizes])
    spectra = np.fft.rfft2(stack.astype(np.float32)).conj()
    return tuple(shape for shape, _ in sizes), spectra, _overlap(np.ones((SIDE, SIDE), bool), spectra)


def _overlap(mask: np.ndarray, spectra: np.ndarray) -> np.ndarray:
    """The pixels that a mask shares with each template at each place."""
    padded = np.zeros((_PAD, _PAD), np.float32)
    padded[:SIDE, :SIDE] = mask
    return np.fft.irfft2(np.fft.rfft2(padded) * spectra, s=(_PAD, _PAD))


def _pixels(picture: Any) -> np.ndarray:
    """A PIL picture or an array, bytes or [0, 1], as float32 [height, width, 3] in 0..255."""
    array = np.asarray(picture)
    return array.astype(np.float32) * (1 if array.dtype == np.uint8 else 255)


def _nearest(colour: np.ndarray) -> str:
    return _NAMES[int(np.linalg.norm(_TABLE - colour, axis=-1).argmin())]


def _inks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The colours of the ground, from the border, and of the shape, from the pixels least like the ground."""
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(border, axis=0)
    away = np.linalg.norm(pixels - ground, axis=-1)
    # Half of the largest distance leaves out the pixels that the edge blends.
    ink = np.median(pixels[away >= away.max() / 2], axis=0)
    return ground, ink


def silhouette(picture: Any) -> np.ndarray:
    """Where the shape is: the pixels whose colour is nearer to the shape's than to the ground's."""
    pixels = _pixels(picture)
    ground, ink = _inks(pixels)
    return np.linalg.norm(pixels - ink, axis=-1) < np.linalg.norm(pixels - ground, axis=-1)


def shape_scores(mask: np.ndarray) -> dict[str, float]:
    """For each shape the best intersection over union with a silhouette, over all radii and places."""
    names, spectra, areas = _templates()
    shared = _overlap(mask, spectra)
    union = mask.sum() + areas - shared
    best = (shared / np.maximum(union, 1)).max(axis=(1, 2))  # nothing at all, past the border of a blank picture
    return {shape: float(max(best[i] for i, name in enumerate(names) if name == shape)) for shape in SHAPES}


def classify(picture: Any) -> Verdict:
    """What a 64x64 picture shows; a blank one shows a shape of the ground's colour, which no caption asks for."""
    ground, ink = _inks(_pixels(picture))
    scores = shape_scores(silhouette(picture))
    return Verdict(_nearest(ink), _nearest(ground), max(scores, key=lambda shape: scores[shape]))


def rates(verdicts: Iterable[Verdict], truths: Iterable[Verdict]) -> dict[str, float]:
    """The shares of pictures with the right colour, background, shape, and all three."""
    pairs = list(zip(verdicts, truths, strict=True))
    parts = {part: [getattr(v, part) == getattr(t, part) for v, t in pairs] for part in Verdict.__dataclass_fields__}
    return {part: float(np.mean(right)) for part, right in (parts | {"all": [v == t for v, t in pairs]}).items()}


# ---- for a person to look at ----


def contact_sheet(pictures: Sequence[Any], captions: Sequence[str], columns: int = 8, scale: int = 2) -> Image.Image:
    """The pictures in rows, each with its caption below."""
    width, height = SIDE * scale + 24, SIDE * scale + 34
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), (235, 235, 235))
    pen = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(pictures, captions, strict=True)):
        x, y = i % columns * width + 4, i // columns * height + 4
        tile = Image.fromarray(_pixels(picture).round().clip(0, 255).astype(np.uint8))
        sheet.paste(tile.resize((SIDE * scale, SIDE * scale), Image.Resampling.NEAREST), (x, y))
        middle = text.rfind(" ", 0, 24) if len(text) > 24 else len(text)
        pen.multiline_text((x, y + SIDE * scale + 2), f"{text[:middle]}\n{text[middle:].strip()}", fill=0, font_size=10)
    return sheet
