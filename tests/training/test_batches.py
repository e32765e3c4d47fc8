"""The order of training batches."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kandinsky_jax.training.data import Batches, Captioned, DataError, Reader, listing
from kandinsky_jax.training.latent_cache import LatentCache


@pytest.mark.parametrize(("count", "batch"), [(1, 1), (1, 3), (5, 1), (5, 2), (5, 5), (5, 12)])
def test_batches_of_every_size(monkeypatch, count, batch):
    """Every epoch has every picture once, also where batches are larger than the data."""

    monkeypatch.setattr("kandinsky_jax.training.data.reader.PREFETCHED", 1)  # the order of few pictures is slow

    class Pixels(Reader):
        def __call__(self, item, rng):
            return {"pixels": np.zeros((2, 2, 3), np.uint8)}

    items = [Captioned(f"{i}", "a", bytes) for i in range(count)]
    batches = Batches(items, Pixels(64), batch, seed=0)
    seen = [next(batches) for _ in range(max(4, 10 // batch))]
    assert all(found["pixels"].shape == (batch, 2, 2, 3) for found in seen)
    order = np.concatenate([found["index"] for found in seen])
    for start in range(0, len(order) - count + 1, count):
        assert sorted(order[start : start + count]) == list(range(count))
    again = Batches(items, Pixels(64), batch, seed=0)
    again.state = {"next_index": 3}
    assert np.array_equal(next(again)["index"], seen[3]["index"])


def test_data_without_a_readable_picture_is_an_error_with_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"cannot be used:\n  a\.png: ") as caught:
        next(Batches(listing(tmp_path), Reader(64), 1, seed=0, where=str(tmp_path)))
    assert str(tmp_path) in str(caught.value)


def test_threads_open_encoded_parts_at_once(tmp_path):
    """NumPy parses headers as Python, in which threads disturb each other in CPython 3.11."""
    parts = []
    for i in range(40):
        folder = tmp_path / f"{i:05d}"
        folder.mkdir()
        np.save(folder / "a.npy", np.full(1, i))
        np.save(folder / "b.npy", np.zeros(1))
        parts.append((folder, {"which": [i], "files": ["a", "b"]}))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as threads:
            for _ in range(20):
                cache = LatentCache(parts)
                found = threads.map(lambda item, cache=cache: cache(item, None)["a"], 8 * list(range(40)))
                assert list(found) == 8 * list(range(40))
    finally:
        sys.setswitchinterval(interval)
