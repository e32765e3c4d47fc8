"""Captioned pictures -> batches of arrays, in a resumable order.

The order is that of grain: a shuffle by seed and epoch, so that its state is a single integer.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.checkpoint.tokenizer import tokenize
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.training.data.items import Captioned, DataError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_ARRAYS = ("input_ids", "text_mask", "text_encoder_hidden_states")  # [B, tokens, ...]
FEWEST_TOKENS = 16
MAX_CHARACTERS = 100_000  # of a caption; far more than any text tower reads
PREFETCHED = 16  # batches that are read ahead
MAX_ITEMS = 2**48  # of all epochs; keeps the lengths that grain computes exact, and within an index


@dataclass(frozen=True)
class Reader:
    """Reads a captioned picture as arrays.

    Args:
        resolution: of the square crop, from the centre or, with `random_crop`, from a random position.
        processor: for CLIP's vision tower; None if that is not needed.
        tokenizer, length: for the text tower; None if that is not needed.
        hints: whether to read depth maps.
        pairs: whether to read the pictures to which others are preferred.
        random_flip: mirror half of the pictures.
    """

    resolution: int
    processor: CLIPImageProcessor | None = None
    tokenizer: CLIPTokenizer | None = None
    length: int = 77
    hints: bool = False
    pairs: bool = False
    random_flip: bool = False
    random_crop: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)  # reasons by picture name

    def __call__(self, item: Captioned, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """Read an item: pixels uint8 `[R, R, 3]`, clip_pixels float32 `[S, S, 3]`, input_ids int32 `[77]`, text_mask
        bool `[77]`, hint float32 `[R, R, 3]` in 0..1; rejected_pixels and rejected_clip_pixels of the other picture of
        a pair, which is flipped as the first one is.

        Returns None for an unreadable picture, whose name is added to `unreadable`.
        """
        try:
            return self._pictures(item, rng) | self._caption(item)
        except Exception as error:  # decoders raise many kinds for damaged files; one picture must not end a run
            reason = str(error) or type(error).__name__
            self.unreadable[item.name] = shorten(reason if item.name in reason else f"{item.name}: {reason}", 300)
            return None

    def _caption(self, item: Captioned) -> dict[str, np.ndarray]:
        """Return the arrays of the caption."""
        if self.tokenizer is None:
            return {}
        [ids], [mask] = tokenize(self.tokenizer, [item.text[:MAX_CHARACTERS]], self.length)
        return {"input_ids": ids, "text_mask": mask}

    def _pictures(self, item: Captioned, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """Return the arrays of the picture, of its depth map, and of the other picture of a pair."""
        picture = images.rgb(images.read(io.BytesIO(item.read()), item.name), item.name)
        hint = rejected = None
        if self.hints and item.hint is not None:
            hint = images.read(io.BytesIO(item.hint()), f"the hint of {item.name}").resize(
                picture.size, Image.Resampling.BILINEAR
            )
        if self.pairs and item.rejected is not None:
            name = f"the rejected picture of {item.name}"
            rejected = images.rgb(images.read(io.BytesIO(item.rejected()), name), name)
        if self.random_flip and rng.random() < 0.5:
            flip = Image.Transpose.FLIP_LEFT_RIGHT
            picture = picture.transpose(flip)
            hint, rejected = (None if x is None else x.transpose(flip) for x in (hint, rejected))
        box = self._box(picture, rng)
        arrays = self._arrays(picture, box)
        if hint is not None:
            size = (self.resolution, self.resolution)
            arrays["hint"] = images.hints(hint.crop(box), f"the hint of {item.name}", *size)[0]
        if rejected is not None:
            others = self._arrays(rejected, self._box(rejected, rng))
            arrays |= {f"rejected_{name}": array for name, array in others.items()}
        return arrays

    def _arrays(self, picture: Image.Image, box: tuple[int, int, int, int]) -> dict[str, np.ndarray]:
        """Return pixels and clip_pixels of one picture."""
        # As the reference: the largest square, resized (bicubic).
        size = (self.resolution, self.resolution)
        square = picture.crop(box).resize(size, Image.Resampling.BICUBIC, reducing_gap=1)
        arrays = {"pixels": np.asarray(square)}
        if self.processor is not None:
            arrays["clip_pixels"] = self.processor(picture)[0]
        return arrays

    def _box(self, picture: Image.Image, rng: np.random.Generator) -> tuple[int, int, int, int]:
        """Choose the square crop."""
        side = min(picture.size)
        spare = picture.width - side, picture.height - side
        left, top = (int(rng.integers(0, x + 1) if self.random_crop else x / 2) for x in spare)
        return left, top, left + side, top + side


def tokens_needed(batch: Mapping[str, np.ndarray]) -> int:
    """Return the tokens of the longest caption of a batch, rounded up to a power of two; 0 for a batch without text.

    Rounded, so that four programs are enough.
    """
    if "text_mask" not in batch:
        return 0
    longest = int(batch["text_mask"].sum(axis=1).max())
    return max(FEWEST_TOKENS, 1 << (longest - 1).bit_length())


def without_padding(batch: dict[str, np.ndarray], tokens: int | None = None) -> dict[str, np.ndarray]:
    """Drop text positions that are padding in all captions of a batch, to which no other position attends.

    Captions are short, and the towers and the prior would spend half of their work or more on padding.

    Args:
        tokens: length to keep, of all processes' parts of a batch; None is that of `tokens_needed`.
    """
    length = tokens_needed(batch) if tokens is None else tokens
    return batch | {name: batch[name][:, :length] for name in TEXT_ARRAYS if name in batch}


class Batches:
    """Infinite iterator over batches, epoch after epoch, resumable by `state`; `index` refers to `items`.

    The order depends on the seed alone: several processes take their examples of each batch from the same order.

    Args:
        items: from `listing`.
        reader: reads an item as arrays.
        batch: batch size; an unreadable picture is replaced by the previous one in the order.
        seed: of the order, and of flips and crops.
        where: path of the data, for errors.
        examples: which examples of each batch this process reads, ascending; None is all of them.
    Raises:
        DataError: from `next`, if no picture can be read.
    """

    def __init__(
        self,
        items: Sequence[Captioned],
        reader: Reader,
        batch: int,
        seed: int,
        where: str = "the data",
        examples: np.ndarray | None = None,
    ):
        import grain

        if len(items) < 1:
            raise ValueError("there is nothing to train on")

        def arrays(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            for step in range(len(items)):
                which = (index - step) % len(items)
                if (found := reader(items[which], rng)) is not None:
                    return found | {"index": np.asarray(which, np.int32)}
            raise DataError(where, list(reader.unreadable.values()))

        # Not an infinite `repeat()`: its length, sys.maxsize, overflows for a batch size of one.
        order = grain.MapDataset.source(range(len(items))).seed(seed).shuffle().repeat(MAX_ITEMS // len(items))
        read = order.random_map(arrays)
        size = batch
        if examples is not None and len(examples) < batch:
            size = len(examples)
            mine = [int(example) for example in examples]
            positions = grain.MapDataset.range(len(order) // batch * size)
            whole = read  # read at positions in the order of all processes
            read = positions.map(lambda position: whole[position // size * batch + mine[position % size]])
        options = grain.ReadOptions(num_threads=PREFETCHED, prefetch_buffer_size=PREFETCHED)
        self._iterator = iter(read.batch(size).to_iter_dataset(options))

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        return next(self._iterator)

    @property
    def state(self) -> dict[str, object]:
        """Position of the next batch, as JSON values."""
        return self._iterator.get_state()

    @state.setter
    def state(self, state: dict[str, object]) -> None:
        self._iterator.set_state(state)
