"""Captioned pictures -> batches of arrays, in an order that can be resumed.

The order is grain's: a shuffle by a seed and an epoch, so that a position in it, an integer, is all there is to
remember.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.checkpoint.tokenizer import encode
from kandinsky_jax.errors import shorten
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.training.data.items import Captioned, DataError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

TEXT_ROWS = ("input_ids", "text_mask", "text_encoder_hidden_states")  # [B, tokens, ...]
FEWEST_TOKENS = 16
MAX_CHARACTERS = 100_000  # of a caption; far more than any tower's length has room for
PREFETCHED = 16  # batches that are read ahead
MAX_ITEMS = 2**48  # of all epochs together; the lengths that grain computes stay exact, and fit an index


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
    tokenizer: CLIPTokenizer | None = None
    length: int = 77
    hints: bool = False
    random_flip: bool = False
    random_crop: bool = False
    unreadable: dict[str, str] = field(default_factory=dict)  # why, by the names of pictures

    def __call__(self, item: Captioned, rng: np.random.Generator) -> dict[str, np.ndarray] | None:
        """pixels uint8 `[R, R, 3]`, clip_pixels float32 `[S, S, 3]`, input_ids int32 `[77]`, text_mask bool `[77]`,
        hint float32 `[R, R, 3]` in 0..1.

        None for a picture that cannot be read, whose name is then in `unreadable`.
        """
        try:
            return self._pictures(item, rng) | self._caption(item)
        except Exception as error:  # of a damaged file, decoders raise anything; one picture must not end a run
            reason = str(error) or type(error).__name__
            self.unreadable[item.name] = shorten(reason if item.name in reason else f"{item.name}: {reason}", 300)
            return None

    def _caption(self, item: Captioned) -> dict[str, np.ndarray]:
        """The arrays that come from the caption."""
        if self.tokenizer is None:
            return {}
        [ids], [mask] = encode(self.tokenizer, [item.text[:MAX_CHARACTERS]], self.length)
        return {"input_ids": ids, "text_mask": mask}

    def _pictures(self, item: Captioned, rng: np.random.Generator) -> dict[str, np.ndarray]:
        """The arrays that come from files."""
        picture = images.rgb(images.read(io.BytesIO(item.read()), item.name), item.name)
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
        where: the data's path, for errors.
    Raises:
        DataError: from `next`, where no picture can be read.
    """

    def __init__(self, items: Sequence[Captioned], reader: Reader, batch: int, seed: int, where: str = "the data"):
        import grain

        if len(items) < 1:
            raise ValueError("there is nothing to train on")

        def arrays(index: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
            for step in range(len(items)):
                which = (index - step) % len(items)
                if (found := reader(items[which], rng)) is not None:
                    return found | {"index": np.asarray(which, np.int32)}
            raise DataError(where, list(reader.unreadable.values()))

        # Not `repeat()` for ever: its length is sys.maxsize, which overflows when it is divided by a batch of one.
        order = grain.MapDataset.source(range(len(items))).seed(seed).shuffle().repeat(MAX_ITEMS // len(items))
        options = grain.ReadOptions(num_threads=PREFETCHED, prefetch_buffer_size=PREFETCHED)
        self._iterator = iter(order.random_map(arrays).batch(batch).to_iter_dataset(options))

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
