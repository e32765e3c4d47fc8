"""The embedded model before training: configurations, a tokenizer of its captions' words, random weights.

    python tpu_scripts/train_tiny/models.py build/emoji/data build/emoji/first

writes a prior and a decoder in diffusers' layout;

    python tpu_scripts/train_tiny/models.py --widen build/emoji/decoder/model build/emoji/first

writes an inpainting and a depth-hint decoder that begin as that decoder, blind to their further input channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer

from kandinsky_jax import (
    KandinskyV22ControlnetPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
)
from kandinsky_jax.checkpoint import flat_params, hub, set_params
from kandinsky_jax.images import CLIPImageProcessor
from kandinsky_jax.models import NETWORKS
from kandinsky_jax.schedulers import DDPMScheduler, UnCLIPScheduler
from kandinsky_jax.training.data import listing

DIM = 128  # of CLIP's embeddings
WORDS = 2048  # in the vocabulary
END = "</w>"
SPECIAL = ("<|startoftext|>", "<|endoftext|>")
# As CLIP's own (Radford et al. 2021): words, digits and signs, each with what follows an apostrophe cut off.
SPLIT = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

TOWER = {
    "hidden_size": DIM,
    "intermediate_size": 4 * DIM,
    "projection_dim": DIM,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "hidden_act": "gelu",
}
TEXT = TOWER | {
    "vocab_size": WORDS,
    "bos_token_id": WORDS - 2,
    "eos_token_id": WORDS - 1,
    "pad_token_id": WORDS - 1,
}
VISION = TOWER | {"image_size": 64, "patch_size": 8}
PRIOR = {"num_attention_heads": 6, "attention_head_dim": 32, "num_layers": 4, "embedding_dim": DIM}
UNET = {
    "sample_size": 8,
    "block_out_channels": (64, 80, 80),
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D", "SimpleCrossAttnDownBlock2D"),
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "cross_attention_dim": 48,
    "encoder_hid_dim": DIM,
    "attention_head_dim": 16,
}
MOVQ = {
    "block_out_channels": (32, 32, 64, 64),
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "num_vq_embeddings": 512,
    "vq_embed_dim": 4,
    "sample_size": 64,
}
INPAINT = {"in_channels": 9}
DEPTH = {"in_channels": 8, "addition_embed_type": "image_hint"}
CODES = 0.5  # deviation of the codebook's first vectors, about that of MoVQ's first latents


def network(name: str, seed: int, **config: Any) -> Any:
    """A network with random weights."""
    cls = NETWORKS[name]
    return cls(cls.CONFIG(**config), rngs=nnx.Rngs(seed))


def tokenizer(texts: list[str]) -> CLIPTokenizer:
    """CLIP's kind of tokenizer with a vocabulary of these texts' words."""
    model = Tokenizer(BPE(unk_token=SPECIAL[1], end_of_word_suffix=END, continuing_subword_prefix=""))
    model.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    model.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    count = WORDS - 2 * len(alphabet) - len(SPECIAL)
    trainer = BpeTrainer(vocab_size=WORDS, initial_alphabet=alphabet, end_of_word_suffix=END, show_progress=False)
    model.train_from_iterator(texts, trainer)
    merges = [tuple(pair) for pair in json.loads(model.to_str())["model"]["merges"]][:count]
    pieces = [*alphabet, *(letter + END for letter in alphabet), *("".join(pair) for pair in merges)]
    pieces += [f"<|unused{i}|>" for i in range(WORDS - len(SPECIAL) - len(pieces))]
    vocabulary = {piece: i for i, piece in enumerate([*pieces, *SPECIAL])}
    assert len(vocabulary) == WORDS, "a merge came twice"
    options = {"bos_token": SPECIAL[0], "eos_token": SPECIAL[1], "pad_token": SPECIAL[1], "unk_token": SPECIAL[1]}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **options)


def first(data: Path, output: Path) -> None:
    """The prior and the decoder."""
    KandinskyV22PriorPipeline(
        prior=network("PriorTransformer", 1, **PRIOR),
        image_encoder=network("CLIPVisionModelWithProjection", 2, **VISION),
        text_encoder=network("CLIPTextModelWithProjection", 3, **TEXT),
        tokenizer=tokenizer([item.text for item in listing(data / "captions.tar")]),
        scheduler=UnCLIPScheduler(
            variance_type="fixed_small_log", clip_sample=True, clip_sample_range=5.0, prediction_type="sample"
        ),
        image_processor=CLIPImageProcessor(64, 64),
    ).save_pretrained(output / hub.PRIOR)
    movq = network("VQModel", 4, **MOVQ)
    codes = movq.quantize.embedding.embedding
    codes[...] = CODES * jax.random.normal(jax.random.key(0), codes.shape)
    KandinskyV22Pipeline(
        unet=network("UNet2DConditionModel", 5, **UNET),
        scheduler=DDPMScheduler(beta_schedule="linear", beta_start=0.00085, beta_end=0.012, clip_sample=False),
        movq=movq,
    ).save_pretrained(output / hub.DECODER)


def widen(decoder: Path, output: Path) -> None:
    """The inpainting and the depth-hint decoder."""
    pipe = KandinskyV22Pipeline.from_pretrained(decoder, dtype="float32")
    old = flat_params(pipe.unet)
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        hub.INPAINT: (KandinskyV22InpaintPipeline, INPAINT),
        hub.CONTROLNET: (KandinskyV22ControlnetPipeline, DEPTH),
    }
    for name, (pipeline, changes) in kinds.items():
        fields = {field.name: getattr(pipe.unet.config, field.name) for field in dataclasses.fields(pipe.unet.config)}
        unet = network("UNet2DConditionModel", 6, **(fields | changes))
        new = flat_params(unet) | {path: leaf for path, leaf in old.items() if path != "conv_in.kernel"}
        kernel = jnp.zeros_like(new["conv_in.kernel"])
        new["conv_in.kernel"] = kernel.at[:, :, : pipe.unet.config.in_channels].set(old["conv_in.kernel"])
        set_params(unet, new)
        pipeline(unet=unet, scheduler=pipe.scheduler, movq=pipe.movq).save_pretrained(output / name, overwrite=True)


def main() -> None:
    """Write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder of the pictures, or with --widen a trained decoder")
    parser.add_argument("output", type=Path)
    parser.add_argument("--widen", action="store_true")
    arguments = parser.parse_args()
    (widen if arguments.widen else first)(arguments.source, arguments.output)


if __name__ == "__main__":
    main()
