"""CLIP's tokenizer from a folder, whatever its files are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from kandinsky_jax import reading
from kandinsky_jax.errors import shorten
from kandinsky_jax.tensors.files import CheckpointError

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer in a folder, after it has encoded a short text.

    Raises:
        CheckpointError: where its files are missing or damaged.
    """
    for path in (folder / name for name in FILES):
        try:
            _check(path)
        except FileNotFoundError:
            continue
        except reading.ReadError as error:
            raise CheckpointError(reading.of_file(path, error)) from None
    from transformers import CLIPTokenizer

    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        encoded = tokenizer(["a", "a b"], padding="max_length", truncation=True, max_length=8, return_tensors="np")
        if encoded.input_ids.shape != (2, 8):
            raise ValueError(f"it encodes two texts as {encoded.input_ids.shape}, not (2, 8)")
    except BaseException as error:  # of any kind; a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise CheckpointError(
            reading.of_file(folder, f"does not hold a tokenizer that can be used: {reason}")
        ) from None
    return tokenizer


def _check(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise reading.ReadError("is a link to nothing")
    if path.suffix == ".json":
        reading.read_json_object(path)
    else:
        reading.read_text(path)
