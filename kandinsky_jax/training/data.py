"""Captioned pictures: a folder, WebDataset tars or Parquet -> batches of arrays, in an order that can be resumed.

What is found is listed once; a picture is read when its turn comes. The order is grain's: a shuffle by a seed and an
epoch, so that a position in it, an integer, is all there is to remember.
"""

from __future__ import annotations

import functools
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.images import CLIPImageProcessor

METADATA = "metadata.jsonl"
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
TEXT_ROWS = ("input_ids", "text_mask", "text_encoder_hidden_states")  # [B, tokens, ...]
FEWEST_TOKENS = 16


class DataError(ValueError):
    """What is wrong with training data, by file name, one fault a line."""

    def __init__(self, where: str, faults: Sequence[str]):
        self.faults = list(faults)
        shown = [*self.faults[:20], f"and {len(self.faults) - 20} more"] if len(self.faults) > 20 else self.faults
        super().__init__(f"{where} cannot be trained on:\n  " + "\n  ".join(shown))


class Captioned(NamedTuple):
    """A picture that has not been read yet; `hint` is its depth map, where it has one."""

    name: str
    text: str
    read: Callable[[], bytes]
    hint: Callable[[], bytes] | None = None


class Tokenizer(Protocol):
    """What is needed of CLIP's."""

    def __call__(self, text: str, **options: Any) -> Any: ...


def listing(path: str | Path) -> list[Captioned]:
    """The captioned pictures of a folder with metadata.jsonl (`file_name`, `text`), of tars, or of Parquet files.

    A depth map is `hint_file_name` in metadata.jsonl, `KEY.hint.png` in a tar, and `hint` in Parquet.

    Args:
        path: the folder, or a single .tar or .parquet file. In a folder with neither metadata.jsonl nor such files, a
            picture's caption is the .txt file of its name.
    Raises:
        DataError: naming every picture without a caption, every caption without a picture, and an empty folder.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(str(path), ["it does not exist"])
    files = [path] if path.is_file() else sorted(path.iterdir())
    faults: list[str] = []
    found: list[Captioned] = []
    if path.is_dir() and (path / METADATA).is_file():
        found = list(_of_metadata(path, faults))
    elif tars := [file for file in files if file.suffix == ".tar"]:
        for tar in tars:
            found += _of_tar(tar, faults)
    elif tables := [file for file in files if file.suffix == ".parquet"]:
        for table in tables:
            found += _of_parquet(table, faults)
    else:
        for file in files:
            if file.suffix.lower() in PICTURES:
                text = file.with_suffix(".txt")
                if text.is_file():
                    found.append(Captioned(file.name, text.read_text(encoding="utf-8").strip(), file.read_bytes))
                else:
                    faults.append(f"{file.name}: there is no caption; needed is {METADATA} or {text.name}")
    faults += [f"{item.name}: its caption is empty" for item in found if not item.text.strip()]
    if not found and not faults:
        faults.append(
            f"there is no picture in it; looked for {METADATA}, .tar, .parquet, and pictures with a .txt each"
        )
    if faults:
        raise DataError(str(path), faults)
    return found


def _of_metadata(folder: Path, faults: list[str]) -> Iterator[Captioned]:
    for number, line in enumerate((folder / METADATA).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            faults.append(f"{METADATA}, line {number}: needed are file_name and text ({type(error).__name__}: {error})")
            continue
        names = [str(name)] + ([str(row["hint_file_name"])] if row.get("hint_file_name") is not None else [])
        files = []
        for given in names:
            file = (folder / given).resolve()
            if not file.is_relative_to(folder.resolve()):
                faults.append(f"{METADATA}, line {number}: {given!r} leads out of the folder")
            elif not file.is_file():
                faults.append(f"{given}: there is no such file")
            else:
                files.append(file.read_bytes)
        if not isinstance(text, str):
            faults.append(f"{name}: its caption is no text")
        elif len(files) == len(names):
            yield Captioned(str(name), text, *files)


def _of_tar(path: Path, faults: list[str]) -> Iterator[Captioned]:
    """WebDataset: neighbours with one key; the caption is a .txt, or `text`, `caption` or `prompt` of a .json."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile():
                folder, _, base = member.name.rpartition("/")
                key, _, ending = base.partition(".")
                samples.setdefault(f"{folder}/{key}", {})[f".{ending.lower()}"] = member

    def reader(member: tarfile.TarInfo) -> Callable[[], bytes]:
        def read() -> bytes:
            with path.open("rb") as file:
                file.seek(member.offset_data)
                return file.read(member.size)

        return read

    for sample in samples.values():
        picture = next((member for ending, member in sample.items() if ending in PICTURES), None)
        if picture is None:
            continue
        name, text = f"{path.name}/{picture.name}", None
        if ".txt" in sample:
            text = reader(sample[".txt"])().decode("utf-8", "replace").strip()
        elif ".json" in sample:
            about = json.loads(reader(sample[".json"])())
            text = next((about[key] for key in ("text", "caption", "prompt") if isinstance(about.get(key), str)), None)
        if text is None:
            faults.append(f"{name}: there is no caption beside it")
        else:
            hint = sample.get(".hint.png")
            yield Captioned(name, text, reader(picture), None if hint is None else reader(hint))


def _of_parquet(path: Path, faults: list[str]) -> Iterator[Captioned]:
    """As `datasets` writes it: `image` (and `hint`, if any) is bytes, or has them; `text` is the caption."""
    import pyarrow.parquet

    table = pyarrow.parquet.read_table(path)
    if missing := {"image", "text"} - set(table.column_names):
        faults.append(f"{path.name}: there is no column {' and '.join(sorted(missing))}")
        return
    for number in range(table.num_rows):
        row = {name: table[name][number].as_py() for name in ("image", "text", "hint") if name in table.column_names}
        data, hint = (x.get("bytes") if isinstance(x, dict) else x for x in (row["image"], row.get("hint")))
        name = f"{path.name}, row {number}"
        if not isinstance(data, bytes) or not isinstance(row["text"], str) or not isinstance(hint, bytes | None):
            faults.append(f"{name}: needed are a picture's bytes and a text")
        else:
            read = [functools.partial(bytes, x) for x in (data, hint) if x is not None]
            yield Captioned(name, row["text"], *read)


# Arrays -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Makes arrays of a captioned picture.

    Args:
        resolution: of the square that is cut out of the middle (or, with `random_crop`, out of anywhere).
        processor: for CLIP's vision tower; None where it is not needed.
        tokenizer, length: for the text tower; None where it is not needed.
        hints: whether depth maps are wanted.
        random_flip: left and right, for half of the pictures.
    """

    resolution: int
    processor: CLIPImageProcessor | None = None
    tokenizer: Tokenizer | None = None
    length: int = 77
    hints: bool = False
    random_flip: bool = False
    random_crop: bool = False
    unreadable: list[str] = field(default_factory=list)  # names of pictures that could not be read

    def __call__(self, item: Captioned, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """pixels uint8 `[R, R, 3]`, clip_pixels float32 `[S, S, 3]`, input_ids int32 `[77]`, text_mask bool `[77]`,
        hint float32 `[R, R, 3]` in 0..1.

        None for a picture that cannot be read, whose name is then in `unreadable`.
        """
        try:
            arrays = self._pictures(item, rng)
        except (ValueError, OSError) as error:
            self.unreadable.append(str(error))
            return None
        if self.tokenizer is not None:
            options = {"padding": "max_length", "max_length": self.length, "truncation": True, "verbose": False}
            tokens = self.tokenizer(item.text, return_tensors="np", **options)
            arrays["input_ids"] = tokens.input_ids[0].astype(np.int32)
            arrays["text_mask"] = tokens.attention_mask[0].astype(bool)
        return arrays

    def _pictures(self, item: Captioned, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays that come from files; ValueError or OSError for files that cannot be read."""
        picture = images.rgb(images.read(io.BytesIO(item.read()), item.name))
        hint = None
        if self.hints and item.hint is not None:
            hint = images.read(io.BytesIO(item.hint()), f"the hint of {item.name}").resize(
                picture.size, Image.Resampling.BILINEAR
            )
        if self.random_flip and rng.random() < 0.5:
            flip = Image.Transpose.FLIP_LEFT_RIGHT
            picture, hint = picture.transpose(flip), None if hint is None else hint.transpose(flip)
        box, size = self._box(picture, rng), (self.resolution, self.resolution)
        # As the reference: the largest square, resized (bicubic).
        square = picture.crop(box).resize(size, Image.Resampling.BICUBIC, reducing_gap=1)
        arrays = {"pixels": np.asarray(square)}
        if hint is not None:
            arrays["hint"] = images.hints(hint.crop(box), f"the hint of {item.name}", *size)[0]
        if self.processor is not None:
            arrays["clip_pixels"] = self.processor(picture)[0]
        return arrays

    def _box(self, picture: Image.Image, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """The square that is cut out."""
        side = min(picture.size)
        spare = picture.width - side, picture.height - side
        left, top = (int(rng.integers(0, x + 1) if self.random_crop else x / 2) for x in spare)
        return left, top, left + side, top + side


def without_padding(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch without the rows of text that are padding in all of its captions, which no other row looks at.

    Captions are short, and the towers and the prior do half of their work, or more, for rows of padding. What is left
    is a power of two or all of it, so that four programs do.
    """
    if "text_mask" not in batch:
        return batch
    longest = int(batch["text_mask"].sum(axis=1).max())
    rows = max(FEWEST_TOKENS, 1 << (longest - 1).bit_length())
    return batch | {name: batch[name][:, :rows] for name in TEXT_ROWS if name in batch}


class Batches:
    """Batches for ever, epoch after epoch; iterating goes on from where `state` says. `index` is of `items`.

    Text is as long as the longest caption of a batch needs it (`without_padding`).

    Args:
        items: what `listing` has found.
        reader: makes arrays of one.
        batch: how many at once; a picture that cannot be read is replaced by the one before it in the order.
        seed: of the order, and of flips and crops.
    """

    def __init__(self, items: Sequence[Captioned], reader: Reader, batch: int, seed: int):
        import grain

        if len(items) < 1:
            raise ValueError("there is nothing to train on")

        def arrays(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            for step in range(len(items)):
                which = (index - step) % len(items)
                if (found := reader(items[which], rng)) is not None:
                    return found | {"index": np.asarray(which, np.int32)}
            raise DataError("the data", reader.unreadable)

        order = grain.MapDataset.source(range(len(items))).seed(seed).shuffle().repeat()
        self._iterator = iter(order.random_map(arrays).batch(batch).to_iter_dataset())

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return without_padding(next(self._iterator))

    @property
    def state(self) -> dict[str, Any]:
        """Where the next batch comes from; JSON."""
        return self._iterator.get_state()

    @state.setter
    def state(self, state: dict[str, Any]) -> None:
        self._iterator.set_state(state)
