"""Captioned pictures: a folder, WebDataset tars or Parquet -> batches of arrays, in an order that can be resumed."""

from kandinsky_jax.training.data.items import Captioned, DataError, Listing, Skipped, fingerprint
from kandinsky_jax.training.data.listing import listing
from kandinsky_jax.training.data.reader import FEWEST_TOKENS, TEXT_ROWS, Batches, Reader, without_padding

__all__ = [
    "FEWEST_TOKENS",
    "TEXT_ROWS",
    "Batches",
    "Captioned",
    "DataError",
    "Listing",
    "Reader",
    "Skipped",
    "fingerprint",
    "listing",
    "without_padding",
]
