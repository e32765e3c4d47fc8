"""CLIP's tokenizer, loaded from any of its file formats."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import CheckpointError, quote, shorten, summarize

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

    from kandinsky_jax.models.clip import CLIPTextConfig

MIN_KNOWN = 0.9  # of a text tower's embeddings, whose number may be padded
LEGACY_END = 2  # eos_token_id in configurations of old releases, whatever the token is

FILES = (
    *("tokenizer.json", "vocab.json", "merges.txt"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)

_IN_USE = threading.Lock()  # transformers sets padding and truncation on the tokenizer, where other threads find them


def load_tokenizer(folder: Path) -> CLIPTokenizer:
    """Load the tokenizer in a folder, and check that it encodes a short text.

    It is read from `tokenizer.json`, or else from `vocab.json` and `merges.txt`; if there are both, they must agree.

    Raises:
        CheckpointError: where its files are missing or damaged.
    """
    present = {name for name in FILES[:3] if (folder / name).is_file()}
    if not {"tokenizer.json"} <= present and not {"vocab.json", "merges.txt"} <= present:
        raise CheckpointError(  # of which transformers makes a tokenizer of two words
            reading.of_file(
                folder,
                "does not hold a tokenizer that can be used: needed is tokenizer.json, or vocab.json and merges.txt; "
                f"there is {', '.join(sorted(present)) or 'none of them'}",
            )
        )
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
        _check_length(tokenizer)
        tokenizer.decode(whole_text(tokenizer, "a b " * 8))
        ids, mask = tokenize(tokenizer, ["a", "a b"], 8)
        if not ids.shape == mask.shape == (2, 8):
            raise ValueError(f"it encodes two texts as {ids.shape} with a mask {mask.shape}, not (2, 8)")
    except CheckpointError as error:
        raise CheckpointError(reading.of_file(folder / "tokenizer_config.json", error)) from None
    except BaseException as error:  # of any kind; a panic of the tokenizers library is no Exception
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        reason = f"{type(error).__name__}: {shorten(error)}"
        raise CheckpointError(
            reading.of_file(folder, f"does not hold a tokenizer that can be used: {reason}")
        ) from None
    if present == set(FILES[:3]):
        _check_agreement(folder, tokenizer)
    return tokenizer


def tokenize(tokenizer: CLIPTokenizer, texts: list[str], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids, int32 `[B, length]`, and a mask, bool `[B, length]`, false for padding; long texts are cut.

    Any number of threads may tokenize at once.
    """
    with _IN_USE:
        tokens = tokenizer(
            texts,
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="np",
            return_attention_mask=True,  # which a tokenizer_config.json can switch off (model_input_names)
            verbose=False,
        )
    return tokens.input_ids.astype(np.int32), tokens.attention_mask.astype(bool)


def whole_text(tokenizer: CLIPTokenizer, text: str) -> list[int]:
    """Return the token ids of a text of any length, with the start and the end token; from any thread."""
    with _IN_USE:
        return tokenizer(text, verbose=False).input_ids


def check_tokenizer(tokenizer: CLIPTokenizer, tower: CLIPTextConfig) -> None:
    """Raise where a tokenizer evidently is not the one that a text tower was trained with.

    Of the ids of special tokens, only that of the end token matters, where the tower's output is read; many
    configurations have the others wrong. An eos_token_id of 2 stands for the greatest id of a text.

    Raises:
        CheckpointError: for another vocabulary size, another end token, or a shorter maximum length.
    """
    _check_length(tokenizer)
    vocab, size = tokenizer.get_vocab(), tower.vocab_size
    basic = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token, tokenizer.pad_token}
    added = tokenizer.get_added_vocab().keys() - basic
    last = max(vocab.values(), default=-1)
    if last >= size > max((number for token, number in vocab.items() if token not in added), default=-1):
        unknown = sorted((token for token in added if vocab[token] >= size), key=vocab.__getitem__)
        names = summarize([quote(token, 40) for token in unknown], 120, ", ")
        raise CheckpointError(
            f"the text tower has no embeddings for the tokenizer's added tokens {names}: it has {size:,}; use the text "
            "tower that was saved with them (textual inversion), or remove them from the tokenizer"
        )
    if last >= size or last < MIN_KNOWN * size - 1:
        raise CheckpointError(
            f"the tokenizer numbers its tokens up to {last:,}, and the text tower has embeddings for {size:,}: they do "
            "not belong together"
        )
    if tower.eos_token_id == LEGACY_END and tokenizer.eos_token_id != last:
        raise CheckpointError(
            f"the tokenizer ends a text with token {tokenizer.eos_token_id}, and the text tower (eos_token_id=2) is "
            f"read at the greatest one, which is {last}: they do not belong together"
        )
    if tower.eos_token_id not in (LEGACY_END, tokenizer.eos_token_id):
        raise CheckpointError(
            f"the tokenizer ends a text with token {tokenizer.eos_token_id}, and the text tower is read at token "
            f"{tower.eos_token_id}: they do not belong together"
        )
    if tokenizer.model_max_length < tower.max_position_embeddings:
        raise CheckpointError(
            f"the tokenizer is for texts of {tokenizer.model_max_length} tokens (model_max_length), and the text tower "
            f"takes {tower.max_position_embeddings}: they do not belong together"
        )


def _check_length(tokenizer: CLIPTokenizer) -> None:
    length: object = tokenizer.model_max_length
    if isinstance(length, bool) or not isinstance(length, int | float) or not length >= 1:
        raise CheckpointError(f"model_max_length must be a number of tokens, got {quote(length)}")


def _check_agreement(folder: Path, tokenizer: CLIPTokenizer) -> None:
    """Raise where vocab.json and merges.txt differ from tokenizer.json, which is the one that is used."""
    known, listed = tokenizer.get_vocab(), reading.read_json_object(folder / "vocab.json")
    model = reading.read_json_object(folder / "tokenizer.json").get("model")
    stored = model.get("merges") if isinstance(model, dict) else None
    merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in stored or ()]
    lines = reading.read_text(folder / "merges.txt").split("\n")
    plain = [tuple(line.split()) for line in lines if line.strip() and not line.startswith("#version")]
    for name, agrees in {
        "vocab.json": all(known.get(token) == number for token, number in listed.items()),
        "merges.txt": plain[: len(merges)] == merges,
    }.items():
        if not agrees:
            raise CheckpointError(
                reading.of_file(folder, f"has tokenizer.json and another {name}: remove what is out of date")
            )


def _check(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise reading.ReadError("is a link to nothing")
    if path.suffix == ".json":
        reading.read_json_object(path)
    else:
        reading.read_text(path)
