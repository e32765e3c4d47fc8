"""Damaged and invalid configurations of training."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from kandinsky_jax.training.config import TrainingConfigError, load

NEEDED = 'model = "tiny"\ndata = "d"\noutput = "o"\n'


def fault(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    with pytest.raises(TrainingConfigError) as caught:
        load(path)
    message = str(caught.value)
    message.encode()
    assert str(path) in message
    assert len(message) < 500
    return message


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("x = " + "[" * 50_000 + "]" * 50_000, "nested too deeply"),
        (NEEDED + "x" * 300_000 + " = 1", "larger than 262,144 bytes"),
        (NEEDED + f"seed = {'9' * 5000}", "seed|digits"),
        (NEEDED + "".join(f"unknown_{i} = 1\n" for i in range(1000)), "there is no unknown_0; .*and 99"),
        (NEEDED + '"' + "x" * 5000 + '" = 1', "there is no x"),
        (NEEDED.replace("tiny", "x" * 5000) + "seed = 'a'", "seed must be int"),
        (NEEDED.encode("utf-16"), "is not UTF-8 text"),
        (b"\xff" + NEEDED.encode(), "is not UTF-8 text"),
        (b"\0" * 100, "is not a configuration"),
        (NEEDED + "seed = 1\nseed = 2", "is not a configuration"),
    ],
)
def test_damaged_files(tmp_path, content, says):
    assert re.search(says, fault(tmp_path / "c.toml", content), re.DOTALL)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("resolution = 0", "resolution must be at least 1"),
        ("resolution = 6400000", "resolution must be at most"),
        ("train_batch_size = 1000000000000", "train_batch_size must be at most"),
        ("seed = -1", "seed must be from 0 to"),
        ("seed = 1" + "0" * 40, "seed must be from 0 to"),
        ("seed = 2020-01-01", "seed must be int"),
        ("seed = 1.5", "seed must be int"),
        ("snr_gamma = nan", "snr_gamma must be above 0"),
        ("snr_gamma = -1", "snr_gamma must be above 0"),
        ("condition_dropout = nan", "condition_dropout must be from 0"),
        (f"snr_gamma = 1{'0' * 400}", "snr_gamma is too large"),
        ("validation_prompts = [1]", "validation_prompts must be a list of texts"),
        ("validation_prompts = [['a']]", "validation_prompts must be a list of texts"),
        ("checkpointing_steps = 0", "checkpointing_steps must be at least 1"),
        ("optimizer = 3", "optimizer must be a table"),
        ("[optimizer]\nlearning_rate = nan", "optimizer.learning_rate must be a number"),
        ("[optimizer]\nlearning_rate = -1", "optimizer.learning_rate must be a number"),
        ("[optimizer]\nadam_beta1 = 1.0", "optimizer.adam_beta1 must be from 0"),
        ("[optimizer]\nmax_train_steps = 1000000000000", "optimizer.max_train_steps must be"),
        ("[optimizer]\ndtype = 'float8'", "optimizer.dtype='float8' is not supported"),
        ("[optimizer]\nmax_grad_norm = nan", "optimizer.max_grad_norm must be above 0"),
        ("[lora]\nrank = 0", "lora.rank must be from 1"),
        ("[lora]\nalpha = nan", "lora.alpha must be above 0"),
        ("[lora]\npattern = '('", "lora.pattern is not a regular expression"),
        ("[mesh]\nfsdp = 0", "mesh.fsdp must be at least 1"),
    ],
)
def test_values_that_no_run_could_have(tmp_path, line, says):
    assert says in fault(tmp_path / "c.toml", NEEDED + line)


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, says in (
        (tmp_path, "is a folder"),
        (tmp_path / "pipe", "not a regular file"),
        (tmp_path / "x", "no such file"),
    ):
        with pytest.raises(TrainingConfigError, match=says):
            load(path)


def test_a_byte_order_mark_is_no_fault(tmp_path):
    (tmp_path / "c.toml").write_bytes(b"\xef\xbb\xbf" + NEEDED.encode())
    assert load(tmp_path / "c.toml").data == "d"
