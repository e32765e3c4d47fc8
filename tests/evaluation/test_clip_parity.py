"""CLIP scores beside transformers', on the same weights, from the files of pictures on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.evaluation import Resampling, evaluate
from tests.conftest import SHAPES_MODEL, note
from tests.evaluation.conftest import drawn, write_folder
from tests.models.test_networks import randomise


@pytest.fixture(scope="module")
def random_prior(tmp_path_factory) -> Path:
    """A prior whose towers are transformers' with random weights, saved by it."""
    source, folder = SHAPES_MODEL / hub.PRIOR, tmp_path_factory.mktemp("random") / "prior"
    folder.mkdir()
    (folder / "model_index.json").write_text((source / "model_index.json").read_text())
    for name in ("tokenizer", "image_processor"):
        (folder / name).symlink_to(source / name)
    sizes = {"hidden_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
    text = json.loads((source / "text_encoder" / "config.json").read_text())
    kept = {name: text[name] for name in ("vocab_size", "max_position_embeddings", "eos_token_id")}
    kept["bos_token_id"] = kept["eos_token_id"] - 1
    side = json.loads((source / "image_encoder" / "config.json").read_text())["image_size"]
    torch.manual_seed(0)
    towers = {
        "text_encoder": transformers.CLIPTextModelWithProjection(
            transformers.CLIPTextConfig(**sizes, **kept, projection_dim=32)
        ),
        "image_encoder": transformers.CLIPVisionModelWithProjection(
            transformers.CLIPVisionConfig(**sizes, image_size=side, patch_size=8, projection_dim=32)
        ),
    }
    for name, tower in towers.items():
        randomise(tower)
        if name == "image_encoder":
            tower.visual_projection.weight.data *= -1  # most scores are above zero then
        tower.save_pretrained(folder / name)
    return folder


def scores_of_transformers(prior: Path, pictures) -> np.ndarray:
    """max(100 cos, 0) of each picture, with transformers' towers, tokenizer and image processor."""
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(prior / "image_encoder").eval().float()
    text = transformers.CLIPTextModelWithProjection.from_pretrained(prior / "text_encoder").eval().float()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(prior / "tokenizer")
    processor = transformers.CLIPImageProcessorPil.from_pretrained(prior / "image_processor")
    length = text.config.max_position_embeddings
    prompts, images = zip(*pictures, strict=True)
    with torch.no_grad():
        tokens = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        said = text(tokens.input_ids).text_embeds
        seen = vision(processor(list(images), return_tensors="pt").pixel_values).image_embeds
        return np.maximum(100 * torch.nn.functional.cosine_similarity(seen, said).numpy(), 0)


@pytest.mark.parametrize("which", ["random", "tiny", "shapes"])
def test_clip_scores_are_transformers(which, random_prior, tmp_path):
    prior = {"random": random_prior, "tiny": hub.EMBEDDED["tiny"] / hub.PRIOR, "shapes": SHAPES_MODEL / hub.PRIOR}[
        which
    ]
    pictures = [(prompt, picture.resize((80, 64 + 8 * i))) for i, (prompt, picture) in enumerate(drawn(12))]
    expected = scores_of_transformers(prior, pictures)
    assert (expected > 0).sum() >= 3
    write_folder(tmp_path / "pictures", pictures)
    found = evaluate(
        tmp_path / "pictures",
        tmp_path / "out",
        clip=str(prior),
        batch=4,
        quiet=True,
        resampling=Resampling(resamples=0),
    )
    of_each = found["clip-score"].values
    assert note(np.abs(of_each - expected).max() / 100, "cosine, max |d|") < 1e-5
    relative = abs(found["clip-score"].value - expected.mean(dtype=np.float64)) / expected.mean()
    assert note(relative, "mean score, relative difference") < 1e-5
