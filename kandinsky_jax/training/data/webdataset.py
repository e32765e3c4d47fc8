"""WebDataset tars: files whose names are equal up to the first dot are one sample.

A damaged tar is read up to the damage, and from the next intact member on.
"""

from __future__ import annotations

import os
import posixpath
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

from kandinsky_jax.common.errors import shorten
from kandinsky_jax.training.data.captions import caption_from
from kandinsky_jax.training.data.files import DataFile
from kandinsky_jax.training.data.items import (
    MAX_CAPTION_BYTES,
    MAX_PICTURE_BYTES,
    Captioned,
    Skipped,
    picture_suffixes,
    unread_suffixes,
)

TAR_BLOCK = tarfile.BLOCKSIZE
COMPRESSION_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


@dataclass(frozen=True)
class Member:
    """A file in a tar; for a link, its target."""

    name: str
    info: tarfile.TarInfo

    @property
    def suffix(self) -> str:
        """The last suffix, in lower case."""
        return posixpath.splitext(self.name)[1].lower()

    @property
    def stem(self) -> str:
        """The name without the last suffix."""
        return posixpath.splitext(self.name)[0]

    @property
    def ending(self) -> str:
        """The part of the file's name after the first dot, in lower case."""
        return posixpath.basename(self.name).partition(".")[2].lower()

    @property
    def is_hint(self) -> bool:
        """Whether it is a depth map."""
        return self.ending.startswith("hint.") and self.suffix in picture_suffixes()

    @property
    def is_picture(self) -> bool:
        """Whether it is a picture, and not a depth map."""
        return self.suffix in picture_suffixes() and not self.is_hint

    @property
    def is_caption(self) -> bool:
        """Whether it may hold a caption."""
        return self.suffix in (".txt", ".json")

    def read(self, tar: DataFile) -> bytes:
        """Read its bytes; OSError if the tar is truncated."""
        return self._whole(tar.read_range(self.info.offset_data, _stored(self.info)))

    def read_from(self, file: BinaryIO) -> bytes:
        """Read its bytes from the tar's open file."""
        file.seek(self.info.offset_data)
        return self._whole(file.read(_stored(self.info)))

    def _whole(self, data: bytes) -> bytes:
        """Return its bytes from the stored ones; a sparse file's holes are not stored."""
        if len(data) != _stored(self.info):
            raise OSError(f"{self.name} is cut short, {len(data):,} of {self.info.size:,} bytes")
        if not self.info.issparse():
            return data
        whole, position = bytearray(self.info.size), 0
        for offset, length in _pieces(self.info):
            whole[offset : offset + length] = data[position : position + length]
            position += length
        return bytes(whole)


@dataclass
class Sample:
    """The files of one key."""

    members: dict[str, Member] = field(default_factory=dict)  # by their endings


def read_tar(tar: DataFile, skipped: Skipped, needs_captions: bool = True) -> Iterator[Captioned]:
    """Yield the captioned pictures of a tar, in the order of its members.

    A picture's caption is the .txt, or else the .json, of the same name; for the first picture of a sample it may be
    that of the sample. Its depth map is `KEY.hint.png`.

    Args:
        tar: the tar, of which the headers and captions are read in one pass.
        skipped: collects unused data.
        needs_captions: see `listing`.
    """
    name, captions = str(tar.name), Captions()
    try:
        with tar.open() as file:
            found = []
            for info in _members(file, name, skipped):
                found.append(info)
                captions.read(info, file)
            for sample in _samples(list(_regular(found, name, skipped))):
                yield from _of_sample(sample, tar, captions, skipped, needs_captions)
    except OSError as error:
        skipped.add(f"{name}: {error.strerror or error}")


class Captions:
    """Captions of a tar, read when their headers are, so that a remote tar takes one pass."""

    def __init__(self) -> None:
        self._found: dict[int, str | Exception] = {}  # by the position of the member

    def read(self, info: tarfile.TarInfo, file: BinaryIO) -> None:
        """Read a member if it may hold a caption."""
        member = Member(info.name, info)
        if info.isreg() and member.is_caption and info.size <= MAX_CAPTION_BYTES:
            self._found[info.offset] = _caption_in(member, file)

    def of(self, member: Member) -> str:
        """Return the caption in a member; the error of reading it is raised."""
        caption = self._found[member.info.offset]
        if isinstance(caption, Exception):
            raise caption
        return caption


def _caption_in(member: Member, file: BinaryIO) -> str | Exception:
    try:
        return caption_from(member.read_from(file), member.suffix)
    except (ValueError, OSError, tarfile.TarError) as error:
        return error


def _of_sample(
    sample: Sample, archive: DataFile, texts: Captions, skipped: Skipped, needs_captions: bool
) -> Iterator[Captioned]:
    tar, (_, modified) = str(archive.name), archive.stat()
    members = list(sample.members.values())
    pictures = sorted((member for member in members if member.is_picture), key=lambda member: "." in member.ending)
    captions = sorted((member for member in members if member.is_caption), key=lambda member: member.suffix != ".txt")
    hints = [member for member in members if member.is_hint]
    for member in members:
        if member.suffix in unread_suffixes():
            skipped.add(f"{tar}/{member.name}: pictures of this format are not read; convert it to PNG or JPEG")
    if not pictures:
        known = [*captions, *hints]
        if known or not any(member.suffix in unread_suffixes() for member in members):
            fault = "there is no picture for it" if known else "it is neither a picture nor a caption (.txt or .json)"
            skipped.add(f"{tar}/{(known or members)[0].name}: {fault}")
        return
    own = {member.stem: member for member in reversed(captions)}
    if not any(picture.stem in own for picture in pictures) and captions:
        # Of several, the one with the fewest dots.
        own[pictures[0].stem] = min(captions, key=lambda member: (member.suffix != ".txt", member.ending.count(".")))
    for picture in pictures:
        full = f"{tar}/{picture.name}"
        caption = own.get(picture.stem)
        if caption is None and needs_captions:
            skipped.add(f"{full}: there is no caption for it; needed is .txt or .json")
            continue
        try:
            for part, most in ((picture, MAX_PICTURE_BYTES), (caption, MAX_CAPTION_BYTES)):
                if part is not None and part.info.size > most:
                    raise ValueError(f"{part.name} has {part.info.size:,} bytes, at most {most:,} are read")
            text = "" if caption is None else texts.of(caption)
        except (ValueError, OSError, tarfile.TarError) as error:
            about = "" if caption is None or caption.name in str(error) else f"{caption.name}: "
            skipped.add(f"{full}: {about}{error}")
            continue
        size = picture.info.size + sum(member.info.size for member in hints[:1])
        read: list[Callable[[], bytes]] = [partial(member.read, archive) for member in (picture, *hints[:1])]
        yield Captioned(full, text, read[0], read[1] if hints else None, size, modified)


def _samples(members: list[Member]) -> list[Sample]:
    """Group the files of a tar by key; a repeated name begins a new sample."""
    samples: list[Sample] = []
    current: dict[str, Sample] = {}
    for member in members:
        folder, base = posixpath.split(member.name)
        key = f"{folder}/{base.partition('.')[0]}"
        if key not in current or member.ending in current[key].members:
            current[key] = Sample()
            samples.append(current[key])
        current[key].members[member.ending] = member
    return samples


# Members ----------------------------------------------------------------------------------------------------------


def _regular(found: list[tarfile.TarInfo], tar: str, skipped: Skipped) -> Iterator[Member]:
    """Yield the files of a tar that are not hidden, including links."""
    by_name = {posixpath.normpath(info.name): info for info in found if info.isreg()}
    for info in found:
        base = posixpath.basename(info.name)
        if info.isdir() or not base or base.startswith("."):
            continue
        if posixpath.pardir in info.name.split("/"):
            skipped.add(f"{tar}/{info.name}: its name leads out of the tar")
        elif info.isreg():
            yield Member(info.name, info)
        elif not info.islnk() and not info.issym():
            skipped.add(f"{tar}/{info.name}: it is not a file")
        else:
            to = info.linkname if info.islnk() else posixpath.join(posixpath.dirname(info.name), info.linkname)
            if (target := by_name.get(posixpath.normpath(to))) is None:
                skipped.add(f"{tar}/{info.name}: it is a link to {shorten(info.linkname, 80)}, which is not in the tar")
            else:
                yield Member(info.name, target)


def _members(file: BinaryIO, name: str, skipped: Skipped) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of all complete members; damage between them is reported and skipped."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    first = file.read(8)
    for mark, kind in COMPRESSION_MAGIC.items():
        if first.startswith(mark):
            skipped.add(f"{name}: it is compressed with {kind}; decompress it, as members are read one by one")
            return
    start: int | None = 0
    while start is not None and start < size:
        position, reason = start, ""
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for info in tar:
                    if info.size < 0 or info.offset < position:
                        raise tarfile.ReadError("a size below zero")
                    position = info.offset_data + _blocks(_stored(info))
                    if info.offset_data + _stored(info) > size:
                        skipped.add(f"{name}/{info.name}: the tar is cut short within it")
                    else:
                        yield info
        except Exception as error:  # on damaged headers, tarfile also raises ValueError, KeyError, OverflowError, ...
            reason = shorten(str(error), 80)
        start = _next(file, name, position, size, reason, skipped)


def _next(file: BinaryIO, name: str, position: int, size: int, reason: str, skipped: Skipped) -> int | None:
    """Find the next header after the readable members, which end at `position`."""
    if position >= size:
        if position == size:
            skipped.add(f"{name}: it has no end; it may be cut short after {size:,} bytes")
        return None
    file.seek(position)
    if not any(block := file.read(TAR_BLOCK)):
        found = _first_that(lambda chunk: bool(chunk.strip(b"\0")), file, position)  # concatenated tars
        if found is None or _is_header(file, found):
            return found
        position = found
        file.seek(position)
        block = file.read(TAR_BLOCK)
    label = block[:100].split(b"\0")[0].decode("utf-8", "replace")
    what = f" ({shorten(label, 60)!r})" if label.isprintable() and label else ""
    skipped.add(f"{name}: the header at byte {position:,}{what} is damaged{f': {reason}' if reason else ''}")
    following = _first_that(lambda chunk: b"ustar" in chunk, file, position + TAR_BLOCK)
    while following is not None and not _is_header(file, following):
        following = _first_that(lambda chunk: b"ustar" in chunk, file, following + TAR_BLOCK)
    return following


def _first_that(test: Callable[[bytes], bool], file: BinaryIO, position: int) -> int | None:
    """Find the first block from `position` on that passes a test, which is applied to many blocks at once first."""
    file.seek(position)
    while chunk := file.read(2048 * TAR_BLOCK):
        if test(chunk):
            for at in range(0, len(chunk), TAR_BLOCK):
                if test(chunk[at : at + TAR_BLOCK]):
                    return position + at
        position += len(chunk)
    return None


def _is_header(file: BinaryIO, position: int) -> bool:
    file.seek(position)
    try:
        tarfile.TarInfo.frombuf(file.read(TAR_BLOCK), "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _stored(info: tarfile.TarInfo) -> int:
    """Return the bytes that a member occupies in the tar; holes of sparse files take none."""
    if not info.isreg() and info.type in tarfile.SUPPORTED_TYPES:  # unknown types are treated as files, as in tarfile
        return 0
    return sum(length for _, length in _pieces(info)) if info.issparse() else info.size


def _pieces(info: tarfile.TarInfo) -> list[tuple[int, int]]:
    """Return (offset, length) of the data of a sparse member; ValueError for an invalid map."""
    sparse: Any = info.sparse  # typeshed says bytes
    found: list[tuple[int, int]] = list(sparse)
    if any(offset < 0 or length < 0 or offset + length > info.size for offset, length in found):
        raise ValueError("a damaged map of a sparse member")
    return found


def _blocks(size: int) -> int:
    return -(-size // TAR_BLOCK) * TAR_BLOCK
