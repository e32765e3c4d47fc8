"""Data sets of captioned pictures: a folder, WebDataset tars or Parquet -> batches of arrays, resumable."""

from kandinsky_jax.training.data.items import Captioned, DataError, Listing, Skipped, data_fingerprint
from kandinsky_jax.training.data.listing import listing
from kandinsky_jax.training.data.reader import (
    FEWEST_TOKENS,
    TEXT_ARRAYS,
    Batches,
    Reader,
    tokens_needed,
    without_padding,
)

__all__ = [
    "FEWEST_TOKENS",
    "TEXT_ARRAYS",
    "Batches",
    "Captioned",
    "DataError",
    "Listing",
    "Reader",
    "Skipped",
    "data_fingerprint",
    "listing",
    "tokens_needed",
    "without_padding",
]
