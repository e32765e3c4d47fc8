"""A model is refused unless its tokenizer is complete and the one that the text tower was trained with."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from kandinsky_jax import CheckpointError, KandinskyV22PriorPipeline
from kandinsky_jax.checkpoint import hub
from kandinsky_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, tokenize, whole_text
from kandinsky_jax.models.clip import CLIPTextConfig
from kandinsky_jax.training.data.items import Captioned
from kandinsky_jax.training.data.reader import Reader
from tests.conftest import SHAPES_MODEL

TOKENIZER = SHAPES_MODEL / hub.PRIOR / "tokenizer"
CONFIG = CLIPTextConfig.from_dict(json.loads((TOKENIZER.parent / "text_encoder/config.json").read_text()))
PROMPT = "a Red circle, on a blue background"


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(TOKENIZER, tmp_path / "tokenizer"))


@pytest.mark.parametrize("removed", [[], ["vocab.json", "merges.txt"], ["tokenizer.json"], ["special_tokens_map.json"]])
def test_either_form_or_both(removed, folder):
    for name in removed:
        (folder / name).unlink()
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, CONFIG)
    assert tokenizer(PROMPT).input_ids == load_tokenizer(TOKENIZER)(PROMPT).input_ids


@pytest.mark.parametrize(
    ("removed", "there"),
    [
        (["tokenizer.json", "vocab.json", "merges.txt"], "none of them"),
        (["tokenizer.json", "merges.txt"], "vocab.json"),
        (["tokenizer.json", "vocab.json"], "merges.txt"),
    ],
    ids=str,
)
def test_a_tokenizer_without_its_files_is_refused(removed, there, folder):
    """transformers makes one of two words of such a folder."""
    for name in removed:
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match=rf"^{folder} .*needed is tokenizer.json, .*; there is {there}$"):
        load_tokenizer(folder)


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt"])
def test_two_forms_that_contradict_each_other(name, folder):
    text = (folder / name).read_text()
    changed = text.replace('"rcle</w>"', '"rklo</w>"') if name == "vocab.json" else "\n".join(text.splitlines()[:-3])
    assert changed != text
    (folder / name).write_text(changed)
    with pytest.raises(CheckpointError, match=f"has tokenizer.json and another {name}: remove what is out of date"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"vocab_size": 573}, "up to 573, and the text tower has embeddings for 573"),
        ({"vocab_size": 49408}, "up to 573, and the text tower has embeddings for 49,408"),
        ({"eos_token_id": 572}, "ends a text with token 573, and the text tower is read at token 572"),
        ({"max_position_embeddings": 78}, r"texts of 77 tokens \(model_max_length\), and the text tower takes 78"),
    ],
    ids=str,
)
def test_a_tokenizer_of_another_text_tower(changes, says):
    with pytest.raises(CheckpointError, match=says):
        check_tokenizer(load_tokenizer(TOKENIZER), dataclasses.replace(CONFIG, **changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1},  # as the official configuration has them
        {"vocab_size": 576},  # filled up
        {"max_position_embeddings": 64},  # texts are cut where the tower ends
    ],
    ids=str,
)
def test_configurations_that_fit(changes):
    check_tokenizer(load_tokenizer(TOKENIZER), dataclasses.replace(CONFIG, **changes))


def configure(folder: Path, **settings: object) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


@pytest.mark.parametrize("length", [{}, [], "x", "77", True, 0, -1, float("nan")], ids=str)
def test_the_longest_text_must_be_a_number(length, folder):
    says = rf"^{folder}/tokenizer_config.json.*model_max_length must be a number of tokens, got "
    with pytest.raises(CheckpointError, match=says):
        load_tokenizer(configure(folder, model_max_length=length))
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.model_max_length = length
    with pytest.raises(CheckpointError, match="model_max_length must be a number of tokens"):
        check_tokenizer(tokenizer, CONFIG)


@pytest.mark.parametrize("length", [77, 77.0, 1e30, None], ids=str)
def test_lengths_that_fit(length, folder):
    check_tokenizer(load_tokenizer(configure(folder, model_max_length=length)), CONFIG)


@pytest.mark.parametrize("names", [["input_ids"], [], ["attention_mask"]], ids=str)
def test_a_mask_is_returned_whatever_the_tokenizer_lists(names, folder, shapes_pipe):
    tokenizer = load_tokenizer(configure(folder, model_input_names=names))
    pipe = KandinskyV22PriorPipeline.from_pipe(shapes_pipe, tokenizer=tokenizer)
    own = KandinskyV22PriorPipeline.from_pipe(shapes_pipe)
    for mine, right in zip(pipe._tokenize([PROMPT, ""]), own._tokenize([PROMPT, ""]), strict=True):
        np.testing.assert_array_equal(mine, right)
    reader = Reader(64, tokenizer=tokenizer, length=77)
    assert reader._caption(Captioned("a", PROMPT, lambda: b""))["text_mask"].sum() == own._tokenize([PROMPT])[1].sum()


@pytest.mark.parametrize("number", [1, 3])
def test_added_tokens_that_the_tower_does_not_know(number):
    tokenizer = load_tokenizer(TOKENIZER)
    tokenizer.add_tokens([f"<cat-toy-{i}>" for i in range(number)])
    says = "no embeddings for the tokenizer's added tokens '<cat-toy-0>'.*it has 574; use the text tower that was saved"
    with pytest.raises(CheckpointError, match=says):
        check_tokenizer(tokenizer, CONFIG)
    check_tokenizer(tokenizer, dataclasses.replace(CONFIG, vocab_size=574 + number))


def test_legacy_towers_are_read_at_the_greatest_token(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_token = "<|startoftext|>"
    with pytest.raises(CheckpointError, match=r"eos_token_id=2\) is read at the greatest one, which is 573"):
        check_tokenizer(tokenizer, dataclasses.replace(CONFIG, eos_token_id=2))


def test_a_pipeline_with_a_tokenizer_of_another_model(shapes_pipe, tmp_path):
    other = hub.EMBEDDED["tiny"] / hub.PRIOR / "tokenizer"
    folder = tmp_path / "prior"
    shutil.copytree(SHAPES_MODEL / hub.PRIOR, folder, ignore=shutil.ignore_patterns("tokenizer"))
    shutil.copytree(other, folder / "tokenizer")
    with pytest.raises(CheckpointError, match=rf"^{folder}/tokenizer does not fit the model: .* up to 2,047"):
        KandinskyV22PriorPipeline.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="do not belong together"):
        KandinskyV22PriorPipeline.from_pipe(shapes_pipe, tokenizer=load_tokenizer(other))


def test_threads_do_not_change_each_others_padding_and_truncation():
    tokenizer, long = load_tokenizer(TOKENIZER), "red circle " * 60

    def lengths(i: int) -> tuple[int, int]:
        return len(whole_text(tokenizer, long)), tokenize(tokenizer, [long if i % 2 else PROMPT], 77)[0].shape[1]

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            found = set(pool.map(lengths, range(1000)))
    finally:
        sys.setswitchinterval(interval)
    assert found == {(len(whole_text(tokenizer, long)), 77)}
