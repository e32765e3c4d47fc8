"""Reading the pictures of a complete shard, with the settings that they were generated with.

Pictures are read one at a time, from memory; nothing is extracted under a name that a file gives.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from kandinsky_jax.batch.requests import MAX_FILE
from kandinsky_jax.batch.rows import parquet
from kandinsky_jax.batch.shards import Output, tar_members
from kandinsky_jax.batch.status import JobFacts
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.files import Files

MAX_ABOUT = 1 << 20  # bytes of a picture's settings that are read


class StoredPicture(NamedTuple):
    """A picture of a shard, as it is stored."""

    id: str
    data: bytes | str  # the encoded picture, or the reason why it cannot be read
    about: Mapping[str, Any]  # settings that reproduce it; empty where they are damaged

    @property
    def prompt(self) -> str:
        """The prompt; empty where the settings do not say."""
        prompt = self.about.get("prompt")
        return prompt if isinstance(prompt, str) else ""


def stored_pictures(files: Files, job: JobFacts, output: Output, shard: int) -> Iterator[StoredPicture]:
    """Yield the pictures of a complete shard, one at a time.

    Args:
        files, job: from `open_job_folder`.
        output: of the same folder.
    Raises:
        ValueError, OSError: where the shard cannot be read.
    """
    name = output.file_name(shard)
    try:
        yield from _of_manifest(files, name, shard) if job.form == "folder" else _of_tar(files, name, job.encoding)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"{shorten(output.url, 240)}/{name} cannot be read: {shorten(error, 200)}") from None


def _of_tar(files: Files, name: str, encoding: str) -> Iterator[StoredPicture]:
    """Yield the pictures of a WebDataset shard: ID.png, and ID.json right after it."""
    waiting: tuple[str, bytes | str] | None = None
    for tar, member in tar_members(files, name):
        if not member.isfile():
            continue
        key, _, ending = member.name.rpartition(".")
        if waiting is not None:
            settings = _read_member(tar, member, MAX_ABOUT) if (key, ending) == (waiting[0], "json") else None
            yield StoredPicture(*waiting, _about(settings))
            waiting = None
        if ending == encoding:
            waiting = key, _read_member(tar, member, MAX_FILE) or _NOT_THERE
    if waiting is not None:
        yield StoredPicture(*waiting, {})


_NOT_THERE = "is not there, or too large"


def _read_member(tar: tarfile.TarFile, member: tarfile.TarInfo, limit: int) -> bytes | None:
    """Return the bytes of a file in a tar; None if there are more than `limit`."""
    file = tar.extractfile(member) if member.size <= limit else None
    return None if file is None else file.read()


def _about(settings: bytes | None) -> dict[str, Any]:
    """Return a picture's settings; empty where they are damaged."""
    try:
        about = reading.parse_json(settings or b"{}")
    except reading.ReadError:
        return {}
    return about if isinstance(about, dict) else {}


def _of_manifest(files: Files, name: str, shard: int) -> Iterator[StoredPicture]:
    """Yield the pictures that a manifest lists, which lie in the shard's folder."""
    try:
        rows = parquet().read_table(io.BytesIO(files.read(name))).to_pylist()
        paths = [row["file_name"] for row in rows]
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"{name} cannot be read: {shorten(error, 200)}") from None
    pattern = re.compile(rf"images/{shard:06d}/([^/\\\0]+)\.[a-z]+")
    for path, row in zip(paths, rows, strict=True):
        match = pattern.fullmatch(path) if isinstance(path, str) else None
        key = match[1] if match else shorten(str(path), 60)
        data = (_read_picture(files, path) or _NOT_THERE) if match else "is not in the shard's folder"
        yield StoredPicture(key, data, row)


def _read_picture(files: Files, path: str) -> bytes | None:
    size = files.size(path)
    return files.read(path) if size is not None and size <= MAX_FILE else None
