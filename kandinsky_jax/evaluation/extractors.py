"""What turns pictures into features: CLIP's towers, the Inception network, or a function of one's own."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from kandinsky_jax.checkpoint import LazyNetwork, hub
from kandinsky_jax.checkpoint.fingerprint import weights_fingerprint
from kandinsky_jax.checkpoint.tokenizer import FILES as TOKENIZER_FILES
from kandinsky_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, tokenize
from kandinsky_jax.diffusion import Network
from kandinsky_jax.diffusion.calls import call
from kandinsky_jax.evaluation.inception import (
    InceptionV3,
    check_inception,
    inception_fingerprint,
    load_inception,
    resize_like_tensorflow,
)
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import CLIPTextModelWithProjection, CLIPVisionModelWithProjection
from kandinsky_jax.parallel.mesh import Mesh, default_mesh

FEATURES_VERSION = 1  # of what the extractors here compute
CLIP_IMAGE, CLIP_TEXT, INCEPTION = "clip-image", "clip-text", "inception"


class Picture(NamedTuple):
    """A picture to be evaluated."""

    name: str
    prompt: str  # "" where there is none
    image: Image.Image  # RGB
    about: Mapping[str, Any]  # settings of a generated picture (see `batch.rows.ROW_COLUMNS`), else empty


class Extractor(Protocol):
    """What computes features of pictures, which are kept in files.

    `prepare` is called in threads, picture by picture, and may raise ValueError for one that has no features; `encode`
    is called with batches of always the same size.
    """

    @property
    def name(self) -> str:
        """For files, reports and references; letters, digits and hyphens."""

    @property
    def needs_prompt(self) -> bool:
        """Whether a picture without a prompt has no features."""

    @property
    def devices(self) -> int:
        """Over how many devices a batch is sharded."""

    def fingerprint(self) -> str:
        """Return text that is another one whenever the features would be: weights, settings, code."""

    def prepare(self, picture: Picture) -> np.ndarray:
        """Return an array, of the same shape for every picture."""

    def encode(self, batch: np.ndarray) -> jax.Array | np.ndarray:
        """Compute features `[B, D]` of prepared pictures `[B, ...]`."""


# CLIP -------------------------------------------------------------------------------------------------------------


class CLIPTowers:
    """CLIP's two towers with what prepares their inputs, as a prior has them; networks are read on first use.

    Args:
        folder: of a prior, or of a model with its parts.
        dtype: of the networks. Scores of bfloat16 differ in the third digit, so float32 is the default on every device.
        mesh: of devices over which batches are sharded; None is all of this process.
    Raises:
        CheckpointError, ConfigError: where they are missing or damaged, except for values that are not finite.
    """

    def __init__(self, folder: Path, dtype: str = "float32", mesh: Mesh | None = None):
        prefix = "prior_" if "prior_image_encoder" in hub.components(folder) else ""
        parts = {
            name: hub.component_folder(folder, prefix + name)
            for name in ("image_encoder", "text_encoder", "tokenizer", "image_processor")
        }
        mesh = mesh or default_mesh()
        self.folder, self.dtype = folder, dtype
        self.devices = 1 if mesh is None else mesh.shape["data"]
        self.image_encoder = LazyNetwork(CLIPVisionModelWithProjection, parts["image_encoder"], dtype, mesh)
        self.text_encoder = LazyNetwork(CLIPTextModelWithProjection, parts["text_encoder"], dtype, mesh)
        self.image_processor = CLIPImageProcessor.from_pretrained(parts["image_processor"])
        self.tokenizer = load_tokenizer(parts["tokenizer"])
        self.tokenizer_folder = parts["tokenizer"]
        self._values: dict[Path, str] = {}  # fingerprints of towers, which are expensive
        check_tokenizer(self.tokenizer, self.text_encoder.config)

    @classmethod
    def from_pretrained(
        cls,
        model: str | os.PathLike[str] | None = None,
        prior: str | os.PathLike[str] | None = None,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> CLIPTowers:
        """Find the towers of a model's prior.

        Args:
            model: "tiny", a folder of a prior, a decoder or a family, or a Hub repository; None is the official prior.
            prior: of a decoder that does not say which.
            dtype, mesh: see the class.
        """
        folder = hub.resolve(prior or model or f"{hub.OFFICIAL}/{hub.PRIOR}", hub.PRIOR)
        if not hub.components(folder).keys() & {"image_encoder", "prior_image_encoder"}:
            folder = hub.find_prior(folder)
        return cls(folder, dtype, mesh)

    @property
    def images(self) -> CLIPImages:
        """The extractor of pictures' embeddings."""
        return CLIPImages(self)

    @property
    def texts(self) -> CLIPTexts:
        """The extractor of prompts' embeddings."""
        return CLIPTexts(self)

    def fingerprint_of(self, network: LazyNetwork, *further: object) -> str:
        """Return a digest of a tower's values and configuration, and of what prepares its inputs."""
        if network.folder not in self._values:
            found = weights_fingerprint(network.cls, network.config, network.folder, network.selection)
            self._values[network.folder] = found
        parts = (
            FEATURES_VERSION,
            self.dtype,
            self._values[network.folder],
            sorted(network.config.to_dict().items()),
            further,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class CLIPImages:
    """Projected embeddings of pictures, not normalised, float32 `[B, D]`."""

    towers: CLIPTowers
    name: str = CLIP_IMAGE
    needs_prompt: bool = False

    @property
    def devices(self) -> int:
        return self.towers.devices

    def fingerprint(self) -> str:
        return self.towers.fingerprint_of(self.towers.image_encoder, self.towers.image_processor)

    def prepare(self, picture: Picture) -> np.ndarray:
        return self.towers.image_processor(picture.image)[0]

    def encode(self, batch: np.ndarray) -> jax.Array:
        embeds: jax.Array = call(*Network.split(self.towers.image_encoder.load()), jnp.asarray(batch))
        return embeds


_TOKENIZING = threading.Lock()  # a fast tokenizer has the padding of its last call as its state


@dataclasses.dataclass(frozen=True)
class CLIPTexts:
    """Projected embeddings of prompts, not normalised, float32 `[B, D]`; what is too long is cut."""

    towers: CLIPTowers
    name: str = CLIP_TEXT
    needs_prompt: bool = True

    @property
    def devices(self) -> int:
        return self.towers.devices

    def fingerprint(self) -> str:
        files = (self.towers.tokenizer_folder / name for name in TOKENIZER_FILES)
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files if path.is_file()]
        return self.towers.fingerprint_of(self.towers.text_encoder, digests)

    def prepare(self, picture: Picture) -> np.ndarray:
        with _TOKENIZING:
            ids, _ = tokenize(
                self.towers.tokenizer, [picture.prompt], self.towers.text_encoder.config.max_position_embeddings
            )
        return ids[0]

    def encode(self, batch: np.ndarray) -> jax.Array:
        embeds: jax.Array = call(*Network.split(self.towers.text_encoder.load()), jnp.asarray(batch)).text_embeds
        return embeds

    def embed(self, texts: Iterable[str], batch: int = 32) -> np.ndarray:
        """Embed texts, float32 `[N, D]`, at least one."""
        blank = Image.new("RGB", (1, 1))
        ids = np.stack([self.prepare(Picture("", text, blank, {})) for text in texts])
        short = -len(ids) % batch
        padded = np.concatenate([ids, np.repeat(ids[-1:], short, 0)])
        found = [np.asarray(self.encode(padded[i : i + batch]), np.float32) for i in range(0, len(padded), batch)]
        return np.concatenate(found)[: len(ids)]


# Inception --------------------------------------------------------------------------------------------------------


class InceptionFeatures:
    """The 2,048 features of FID and KID, float32; the network is read on first use.

    Args:
        path: of the file of weights, see `evaluation.inception`.
        mesh: of devices over which batches are sharded; None is all of this process.
    Raises:
        CheckpointError: where the file is not there or has other tensors.
    """

    name, needs_prompt = INCEPTION, False

    def __init__(self, path: str | os.PathLike[str], mesh: Mesh | None = None):
        check_inception(path)
        self._path, self._mesh = Path(path), mesh or default_mesh()
        self._network: InceptionV3 | None = None
        self._fingerprint: str | None = None

    @property
    def devices(self) -> int:
        return 1 if self._mesh is None else self._mesh.shape["data"]

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            self._fingerprint = f"{FEATURES_VERSION} {inception_fingerprint(self._path)}"
        return self._fingerprint

    def prepare(self, picture: Picture) -> np.ndarray:
        return resize_like_tensorflow(np.asarray(picture.image))

    def encode(self, batch: np.ndarray) -> jax.Array:
        if self._network is None:
            self._network = load_inception(self._path, self._mesh)
        features: jax.Array = call(*Network.split(self._network), jnp.asarray(batch))
        return features


# Functions of one's own -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class FunctionFeatures:
    """Numbers that a function computes of each picture.

    Args:
        name: of the extractor.
        function: takes a `Picture` and returns a number or some, always as many; ValueError stands for a picture that
            has none.
        version: to be changed with the function, whose code is not compared; otherwise kept results are used.
        needs_prompt: whether a picture without a prompt has none.
    """

    name: str
    function: Callable[[Picture], Any]
    version: str = "1"
    needs_prompt: bool = False
    devices: int = 1

    def fingerprint(self) -> str:
        return f"{self.name} {self.version}"

    def prepare(self, picture: Picture) -> np.ndarray:
        return np.asarray(self.function(picture), np.float32).reshape(-1)

    def encode(self, batch: np.ndarray) -> np.ndarray:
        return batch
