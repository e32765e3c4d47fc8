"""Models of the official sizes with random weights, in diffusers' layout, for benchmarks without the Hub.

`python tpu_scripts/bench/random_models.py FOLDER` writes the prior (10.6 GB) and the decoder (5.3 GB) into FOLDER.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import re
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx

from kandinsky_jax.checkpoint import flat_params, hub, set_params, tensor_files, tensor_names
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.models.layers import abstract

OFFICIAL = Path(__file__).parents[2] / "tests" / "official"  # the official repositories' configurations
# component -> its class, and the dtype that the official files have
PARTS = {
    hub.PRIOR: {
        "prior": ("PriorTransformer", "float32"),
        "text_encoder": ("CLIPTextModelWithProjection", "float32"),
        "image_encoder": ("CLIPVisionModelWithProjection", "float16"),
    },
    hub.DECODER: {"unet": ("UNet2DConditionModel", "float32"), "movq": ("VQModel", "float32")},
}


def write(folder: Path, repository: str, prompts: Sequence[str] = ()) -> int:
    """Write one repository into `folder`; the bytes of its largest part.

    Args:
        prompts: that will be measured; the tokenizer knows their words.
    """
    embedded = hub.EMBEDDED["tiny"] / repository
    sizes = []
    for part in hub.components(embedded):
        target = folder / part
        target.mkdir(parents=True)
        if part in PARTS[repository]:
            sizes.append(_write_network(target, *PARTS[repository][part], OFFICIAL / repository / part / "config.json"))
        elif part == "tokenizer":
            shutil.copytree(embedded / part, target, dirs_exist_ok=True)
            _enlarge_vocabulary(
                target / "tokenizer.json", OFFICIAL / repository / "text_encoder" / "config.json", prompts
            )
        else:
            shutil.copytree(OFFICIAL / repository / part, target, dirs_exist_ok=True)
    shutil.copy(embedded / "model_index.json", folder / "model_index.json")
    return max(sizes)


def _write_network(target: Path, name: str, dtype: str, config: Path) -> int:
    rng = np.random.default_rng(0)
    shapes = {n: tensor_names.torch_shape(n, leaf.shape) for n, leaf in flat_params(_shapes_of(name, config)).items()}
    tensors = {
        tensor_names.torch_name(n): tensor_files.Tensor(
            s, partial(_draw, rng, tensor_names.torch_name(n), s, math.prod(s[1:]), dtype), np.dtype(dtype)
        )
        for n, s in shapes.items()
    }
    shutil.copy(config, target / "config.json")
    stem = "model" if name.startswith("CLIP") else "diffusion_pytorch_model"
    tensor_files.write(target / f"{stem}.safetensors", tensors)
    return np.dtype(dtype).itemsize * sum(math.prod(shape) for shape in shapes.values())


def _enlarge_vocabulary(path: Path, tower: Path, prompts: Sequence[str]) -> None:
    """Give a small tokenizer as many tokens as a text tower has, the start's and the end's the last two.

    Each word of the prompts becomes one token, as common words are in the official vocabulary: how long a prompt is
    matters for how long it takes. The other new tokens are in no text.
    """
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    given, size = json.loads(path.read_text()), json.loads(tower.read_text())["vocab_size"]
    vocab, merges, moved = given["model"]["vocab"], given["model"]["merges"], {}
    for token in reversed(given["added_tokens"]):
        moved[token["id"]] = token["id"] = vocab[token["content"]] = size - 1 - len(moved)
    number = len(vocab) - len(moved)
    for word in dict.fromkeys(re.findall("[a-z]+", " ".join(prompts).lower())):
        for start, piece in itertools.pairwise(itertools.accumulate(tokenizer.encode(word).tokens[1:-1])):
            if piece not in vocab:
                vocab[piece], number = number, number + 1
            merges.append([start, piece[len(start) :]])
    vocab |= {f"unused {each}": each for each in range(number, size - len(moved))}
    given["padding"] = given["truncation"] = None  # the pipelines say how long a text is
    for end in (given["post_processor"]["cls"], given["post_processor"]["sep"]):
        end[1] = moved[end[1]]
    path.write_text(json.dumps(given))


def network(repository: str, part: str, dtype: str, **changes: Any) -> nnx.Module:
    """One network in memory.

    Args:
        changes: of its configuration.
    """
    name, rng = PARTS[repository][part][0], np.random.default_rng(0)
    module, params = _shapes_of(name, OFFICIAL / repository / part / "config.json", **changes), {}
    for n, leaf in flat_params(module).items():
        fan_in = math.prod(tensor_names.torch_shape(n, leaf.shape)[1:])
        values = _draw(rng, tensor_names.torch_name(n), leaf.shape, fan_in, "float32")
        params[n] = jnp.asarray(values, dtype)
    return set_params(module, params)


def _shapes_of(name: str, config: Path, **changes: Any) -> nnx.Module:
    cls = NETWORKS[name]
    return abstract(cls, cls.CONFIG.from_dict(json.loads(config.read_text()) | changes, str(config)))


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...], fan_in: int, dtype: str) -> np.ndarray:
    """Matrices that keep the variance of what they multiply, nearly; norms about 1, biases about 0."""
    values = rng.random(shape, np.float32)
    values -= 0.5
    if len(shape) > 1:
        values *= 2.4 * fan_in**-0.5
    else:
        values *= 0.1
        values += name.endswith(".weight")
    return values.astype(dtype)


def main() -> None:
    """Write both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Any = parser.parse_args().folder
    for repository in PARTS:
        write(folder / repository, repository)
        print(folder / repository)


if __name__ == "__main__":
    main()
