"""Sets of pictures to evaluate: the shards of a batch job, or a folder of captioned pictures; here or at a URL.

A set has parts, whose features are computed and kept one by one: a shard of the job, or some of the folder's pictures.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Protocol

from kandinsky_jax.batch.failures import read_failures
from kandinsky_jax.batch.shards import Output
from kandinsky_jax.batch.status import open_job_folder
from kandinsky_jax.batch.stored_pictures import stored_pictures
from kandinsky_jax.common.errors import counted, shorten
from kandinsky_jax.common.files import FileInfo, open_files
from kandinsky_jax.common.reading import ReadError, of_file
from kandinsky_jax.training.data import data_fingerprint, listing

PART_PICTURES = 256  # of a folder
MAX_SKIPPED = 1000  # files that cannot be used and are named


class StoredImage(NamedTuple):
    """A picture of a set that has been read but not decoded."""

    name: str
    prompt: str  # "" where there is none
    data: bytes | str  # the encoded picture, or the reason why it cannot be read
    about: Mapping[str, Any]  # settings of a generated picture, else empty
    retry: bool = False  # whether it may be readable later


class Part(NamedTuple):
    """A part of a set.

    Attributes:
        name: for files of its features.
        digest: changes where its content does.
        expected: about how many pictures it has.
    """

    name: str
    digest: str
    expected: int


class PictureSource(Protocol):
    """A set of pictures in parts."""

    @property
    def parts(self) -> list[Part]:
        """The parts, in order."""

    @property
    def about(self) -> dict[str, object]:
        """What the set is, for a report; values of JSON."""

    @property
    def skipped(self) -> list[str]:
        """Reasons why files cannot be used, found without reading pictures."""

    def read(self, part: Part) -> Iterator[StoredImage]:
        """Yield the pictures of a part, one at a time.

        Raises:
            ValueError: where the rest of it is damaged.
            OSError: where it cannot be read now.
        """


def open_source(url: str | os.PathLike[str], *, needs_prompts: bool, incomplete: bool = False) -> PictureSource:
    """Open a batch job's folder, or a folder or file of pictures.

    Args:
        url: a path or URL; a folder with a job.json is a batch job's.
        needs_prompts: leave out pictures of a folder that have no caption.
        incomplete: whether shards of a job may be missing.
    Raises:
        ValueError: where there are no pictures, or shards are missing.
        OSError: where it cannot be read.
    """
    url = os.fspath(url)
    try:
        is_job = open_files(url).size("job.json") is not None
    except NotADirectoryError:
        is_job = False
    except ReadError as error:
        raise ValueError(of_file(url, error)) from None
    return JobSource(url, incomplete) if is_job else FolderSource(url, needs_prompts)


class JobSource:
    """The complete shards of a batch job.

    Args:
        url: of its folder.
        incomplete: whether shards may be missing.
    """

    def __init__(self, url: str, incomplete: bool = False):
        self._files, self._job = open_job_folder(url)
        self._output = Output(url, self._job.form, self._job.encoding)
        found = self._output.find(self._job.shards).complete
        missing = self._job.shards - len(found)
        if missing and not incomplete:
            raise ValueError(
                f"{shorten(url, 240)} is not complete: {missing:,} of {counted(self._job.shards, 'shard')} are not "
                "there; start the batch job again to finish it, or give --incomplete to evaluate what there is"
            )
        if not found:
            raise ValueError(f"{shorten(url, 240)} has no complete shard yet")
        self._numbers = {f"{number:06d}": number for number in found}
        self.parts = [self._part(number, info) for number, info in found.items()]
        self.skipped: list[str] = []
        failed = read_failures(self._files, found).rows
        self.about: dict[str, object] = {
            "kind": "batch job",
            "path": shorten(url, 2000),
            "shards": len(found),
            "shards_missing": missing,
            "rows_failed": failed,
        }

    def _part(self, number: int, info: FileInfo) -> Part:
        name = self._output.file_name(number)
        parts: list[object] = [name, info.size, info.modified]
        if info.modified is None:  # the file system does not say when it was written
            parts.append(hashlib.sha256(self._files.read(name)).hexdigest())
        if self._job.form == "folder":
            pictures = self._files.details(f"images/{number:06d}")
            parts.append(sorted((key, found.size, str(found.modified)) for key, found in pictures.items()))
        expected = self._job.rows_of(number) * self._job.images_per_row
        return Part(f"{number:06d}", hashlib.sha256(repr(parts).encode()).hexdigest(), expected)

    def read(self, part: Part) -> Iterator[StoredImage]:
        for picture in stored_pictures(self._files, self._job, self._output, self._numbers[part.name]):
            yield StoredImage(picture.id, picture.prompt, picture.data, picture.about)


class FolderSource:
    """Captioned pictures of a folder or file, as for training: see `kandinsky_jax.training.data.listing`.

    Args:
        url: of the folder, or of a .tar or .parquet file.
        needs_prompts: leave out pictures without a caption.
    """

    def __init__(self, url: str, needs_prompts: bool):
        found = listing(url, needs_captions=needs_prompts)
        self.skipped = [] if not needs_prompts else found.skipped.faults[:MAX_SKIPPED]
        self._items = {}
        self.parts = []
        for start in range(0, len(found), PART_PICTURES):
            items = found[start : start + PART_PICTURES]
            part = Part(f"{start // PART_PICTURES:06d}", data_fingerprint(items, modified=True), len(items))
            self._items[part.name] = items
            self.parts.append(part)
        self.about: dict[str, object] = {
            "kind": "pictures",
            "path": shorten(url, 2000),
            "skipped": found.skipped.count,
        }

    def read(self, part: Part) -> Iterator[StoredImage]:
        for item in self._items[part.name]:
            try:
                yield StoredImage(item.name, item.text, item.read(), {})
            except OSError as error:
                yield StoredImage(item.name, item.text, str(error.strerror or error), {}, retry=True)
            except ValueError as error:
                yield StoredImage(item.name, item.text, shorten(error, 200), {})
