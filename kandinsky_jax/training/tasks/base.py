"""What every training task does, and helpers that they share."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from PIL import Image

from kandinsky_jax import lora
from kandinsky_jax.checkpoint import flat_params, set_params
from kandinsky_jax.common.types import PyTree
from kandinsky_jax.diffusion import Params
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.pipelines import Pipeline
from kandinsky_jax.training.config import Config
from kandinsky_jax.training.data import Captioned, Reader, Skipped
from kandinsky_jax.training.kinds import Kind

# (trained parameters, batch with what is drawn for it) -> loss, a float32 scalar. Where there are `frozen` arrays, they
# are its third argument; where it `uses_average`, the last one is the average of the trained parameters.
Loss: TypeAlias = Callable[..., jax.Array]
# (encoded batch, key) -> batch with what is drawn for it; the key determines all randomness.
Draw: TypeAlias = Callable[[Mapping[str, jax.Array], jax.Array], dict[str, jax.Array]]


@dataclass(frozen=True)
class TrainingTask(ABC):
    """One kind of training on one model.

    Args:
        pipe: the model, float32.
        config: settings of the run.
    """

    kind: ClassVar[Kind]

    pipe: Any  # a pipeline, whose components differ with the kind
    config: Config

    @classmethod
    @abstractmethod
    def load(cls, config: Config) -> Pipeline:
        """Load the pipeline to train, float32."""

    @property
    @abstractmethod
    def modules(self) -> dict[str, nnx.Module]:
        """The trained networks, by component name."""

    @abstractmethod
    def initial(self, key: jax.Array) -> PyTree:
        """Return the initial values of the trained parameters."""

    @abstractmethod
    def weights(self, trained: PyTree) -> dict[str, Params]:
        """Return the parameters of `modules` for trained values."""

    def frozen(self) -> PyTree:
        """Return frozen arrays that the loss also needs; None if there are none."""
        return None

    @property
    def uses_average(self) -> bool:
        """Whether the loss takes the average of the trained parameters."""
        return False

    @property
    def further_settings(self) -> dict[str, object]:
        """What determines the result besides the configuration, data and weights, for the run's record."""
        return {}

    @abstractmethod
    def reader(self) -> Reader:
        """Return the reader of the arrays that `encode` takes."""

    @abstractmethod
    def encode(self, batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Encode a batch of the reader with the frozen networks; returns the batch of the loss."""

    def draw(self) -> Draw:
        """Return what adds random numbers of each example to an encoded batch, such as noise."""
        return lambda batch, key: dict(batch)

    @abstractmethod
    def loss(self) -> Loss:
        """Return the loss of a batch from `draw`, see `Loss`."""

    @abstractmethod
    def sample(self, items: Sequence[Captioned]) -> Image.Image | None:
        """Generate a contact sheet of sample pictures with the weights in the pipeline."""

    @abstractmethod
    def export(self, target: Path, trained: PyTree, items: Sequence[Captioned]) -> None:
        """Write the result atomically; the weights are in the pipeline."""

    @contextmanager
    def installed(self, trained: PyTree) -> Iterator[None]:
        """Put trained values into the pipeline's networks while the block runs."""
        modules = self.modules
        before = {name: flat_params(module) for name, module in modules.items()}
        for name, params in self.weights(trained).items():
            set_params(modules[name], lora.flat(params))
        try:
            yield
        finally:
            for name, module in modules.items():
                set_params(module, before[name])

    def offload(self, networks: Mapping[str, nnx.Module]) -> None:
        """Move parameters of networks from their devices to the host; a call of such a network copies them back."""
        for module in networks.values():
            set_params(module, {name: np.array(value) for name, value in flat_params(module).items()})

    @property
    def networks(self) -> dict[str, nnx.Module]:
        """All networks that affect the result."""
        return self.modules

    def usable(self, items: Sequence[Captioned], skipped: Skipped) -> list[Captioned]:
        """Return the pictures that this kind of training can use; `skipped` collects the others."""
        return list(items)


def to_movq_pixels(pixels: np.ndarray) -> jax.Array:
    """Convert the reader's pixels to MoVQ's range, float32 in -1..1."""
    return jnp.asarray(pixels, jnp.float32) / 127.5 - 1


def reader_of(config: Config, processor: CLIPImageProcessor | None = None, **options: Any) -> Reader:
    """Make a reader with the configuration's resolution, flips and crops."""
    options |= {"random_flip": config.random_flip, "random_crop": config.random_crop}
    return Reader(config.resolution, processor, **options)


def contact_sheet(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Arrange rows of pictures of one size in one picture."""
    width, height = rows[0][0].size
    whole = Image.new("RGB", (width * max(map(len, rows)), height * len(rows)))
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            whole.paste(picture, (x * width, y * height))
    return whole


def first_readable(reader: Reader, items: Sequence[Captioned], count: int) -> list[dict[str, np.ndarray]]:
    """Read the first readable pictures, at most `count`."""
    rng = np.random.default_rng(0)
    return list(itertools.islice((row for item in items if (row := reader(item, rng)) is not None), count))
