"""Pictures drawn by a seed, where a network has to be seen at work and there is no data: colours, gradients, shapes."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

CELLS = ((2, 4), (8, 16, 32))  # of the grids that a field of colours is made of: a smooth one, a texture
MAX_SHAPES = 8
NOISY = 0.25  # share of the pictures with noise on them


def drawn_pictures(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Return pictures, float32 `[count, side, side, 3]` in -1..1: half of shapes on one colour, the others fields."""
    rng = np.random.default_rng(seed)
    return np.stack([_picture(rng, side) for _ in range(count)])


def _picture(rng: np.random.Generator, side: int) -> np.ndarray:
    kind = rng.choice(("field", "gradient", "shapes", "shapes"))
    if kind == "field":
        pixels = _field(rng, side)
    elif kind == "gradient":
        pixels = _gradient(rng, side)
    else:
        pixels = _shapes(rng, side)
    if rng.random() < NOISY:
        pixels = pixels + rng.normal(0, rng.uniform(0.02, 0.3), pixels.shape)
    return pixels.clip(-1, 1).astype(np.float32)


def _colour(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, 3)


def _field(rng: np.random.Generator, side: int) -> np.ndarray:
    """Add up coarse grids of random colours, resized."""
    cells = CELLS[rng.integers(len(CELLS))]
    found = np.zeros((side, side, 3))
    for number in cells:
        grid = rng.uniform(-1, 1, (3, number, number)).astype(np.float32)
        planes = [Image.fromarray(plane).resize((side, side), Image.Resampling.BICUBIC) for plane in grid]
        found += np.stack([np.asarray(plane) for plane in planes], axis=-1) / len(cells) ** 0.5
    return found


def _gradient(rng: np.random.Generator, side: int) -> np.ndarray:
    """Pass from a colour to another along a line, softly or at an edge."""
    angle, steepness = rng.uniform(0, 2 * np.pi), rng.uniform(0.8, 8)
    y, x = np.mgrid[:side, :side] / side - 0.5
    share = np.clip((np.cos(angle) * x + np.sin(angle) * y) * steepness + 0.5, 0, 1)[..., None]
    return _colour(rng) * (1 - share) + _colour(rng) * share


def _shapes(rng: np.random.Generator, side: int) -> np.ndarray:
    """Draw shapes on one colour, often on black or white."""
    ground = _colour(rng) if rng.random() < 0.7 else np.full(3, rng.choice((-1.0, 1.0)))
    image = Image.new("RGB", (side, side), _levels(ground))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(1, MAX_SHAPES + 1)):
        fill, (x, y) = _levels(_colour(rng)), rng.uniform(-0.2, 1, 2) * side
        width, height = rng.uniform(0.05, 0.7, 2) * side
        points = [(float(a), float(b)) for a, b in rng.uniform(-0.1, 1.1, (3, 2)) * side]
        kind = rng.choice(("ellipse", "rectangle", "triangle", "line"))
        if kind == "ellipse":
            draw.ellipse((x, y, x + width, y + height), fill=fill)
        elif kind == "rectangle":
            draw.rectangle((x, y, x + width, y + height), fill=fill)
        elif kind == "triangle":
            draw.polygon(points, fill=fill)
        else:
            draw.line(points[:2], fill=fill, width=int(rng.integers(1, max(2, side // 10))))
    return np.asarray(image, np.float32) / 127.5 - 1


def _levels(colour: np.ndarray) -> tuple[int, int, int]:
    red, green, blue = ((colour + 1) * 127.5).astype(int).tolist()
    return red, green, blue
