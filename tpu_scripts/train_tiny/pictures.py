"""Noto emoji as captioned pictures: what the embedded model is trained on.

    npm pack emoji-datasource-google@16.0.0
    python tpu_scripts/train_tiny/pictures.py emoji-datasource-google-16.0.0.tgz build/emoji/data

writes three sets of WebDataset tars: `pictures` (each emoji once, captioned by its name), `captions` (each emoji once
for each of its captions) and `views` (each emoji eight times, in half of them smaller, turned and moved, with a depth
map of its outline). Emoji with skin tones are left out. The artwork is Google's Noto Emoji, under the Apache License
2.0.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter

SIDE = 64
VIEWS = 8
PAPER = (255, 255, 255)
TEMPLATES = ("{}", "{} emoji", "an emoji of {}")


class Emoji(NamedTuple):
    """One emoji: its code points, its names, the first one Unicode's, and its picture with transparency."""

    code: str
    names: list[str]
    picture: Image.Image


def emoji(package: Path) -> list[Emoji]:
    """All of the npm package emoji-datasource-google (a .tgz), in its order."""
    found = []
    with tarfile.open(package) as tar:
        files = {member.name: member for member in tar if member.isfile()}

        def read(name: str) -> bytes:
            file = tar.extractfile(files[f"package/{name}"])
            assert file is not None
            return file.read()

        for about in json.loads(read("emoji.json")):
            if about["has_img_google"] and about["category"] != "Component":
                picture = Image.open(io.BytesIO(read(f"img/google/{SIDE}/{about['image']}"))).convert("RGBA")
                found.append(Emoji(about["unified"], names(about), picture))
    return found


def names(about: dict[str, Any]) -> list[str]:
    """What an emoji may be called: Unicode's name, then the package's short names."""
    short = [name.replace("_", " ").replace("-", " ") for name in about["short_names"]]
    if about["subcategory"] == "country-flag":
        short = []  # country codes say little
    return list(dict.fromkeys(name.lower().strip() for name in [about["name"], *short]))


def on_paper(picture: Image.Image) -> Image.Image:
    """On white."""
    paper = Image.new("RGBA", picture.size, (*PAPER, 255))
    return Image.alpha_composite(paper, picture).convert("RGB")


def depth(picture: Image.Image) -> Image.Image:
    """A depth map from the outline alone: near and bulging where the emoji is, far where there is paper."""
    outline = picture.getchannel("A")
    inside = np.asarray(outline, np.float32) / 255
    bulge = np.asarray(outline.filter(ImageFilter.GaussianBlur(SIDE / 12)), np.float32) / 255
    return Image.fromarray(np.uint8(255 * (0.1 + inside * (0.35 + 0.5 * bulge))))


def view(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Smaller, turned a little, and somewhere on the paper."""
    turned = picture.rotate(rng.uniform(-12, 12), Image.Resampling.BICUBIC)
    side = int(rng.uniform(0.45, 1.0) * SIDE)
    small = turned.resize((side, side), Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (SIDE, SIDE), (*PAPER, 0))
    canvas.paste(small, tuple(int(x) for x in rng.integers(0, SIDE - side + 1, 2)))
    return canvas


def rows(found: list[Emoji], kind: str) -> Iterator[tuple[str, str, dict[str, Image.Image]]]:
    """Key, caption and pictures of one set."""
    rng = np.random.default_rng(0)
    for one in found:
        key = one.code.lower()
        if kind == "pictures":
            yield key, one.names[0], {"png": on_paper(one.picture)}
        elif kind == "captions":
            for i, name in enumerate(one.names):
                for j, template in enumerate(TEMPLATES):
                    yield f"{key}-{i}{j}", template.format(name), {"png": on_paper(one.picture)}
        else:
            for i in range(VIEWS):
                seen = view(one.picture, rng) if i % 2 else one.picture
                text = str(rng.choice(TEMPLATES)).format(rng.choice(one.names))
                yield f"{key}-{i}", text, {"png": on_paper(seen), "hint.png": depth(seen)}


def write(found: list[Emoji], kind: str, target: Path) -> int:
    """Write one set; how many pictures it has."""
    count = 0
    with tarfile.open(target, "w") as tar:
        for key, text, pictures in rows(found, kind):
            files = {"txt": text.encode()}
            for ending, picture in pictures.items():
                data = io.BytesIO()
                picture.save(data, "PNG")
                files[ending] = data.getvalue()
            for ending, content in files.items():
                member = tarfile.TarInfo(f"{key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            count += 1
    return count


def main() -> None:
    """Write all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path, help="the .tgz of emoji-datasource-google")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    found = emoji(arguments.package)
    for kind in ("pictures", "captions", "views"):
        print(f"{kind}: {write(found, kind, arguments.output / f'{kind}.tar')} of {len(found)} emoji")


if __name__ == "__main__":
    main()
