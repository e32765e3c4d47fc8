"""Where a job's pictures go: one file or folder a shard, complete or absent, in a local folder or at any fsspec URL.

    OUT/job.json              what the job is; a run with another job in mind stops here
    OUT/000000.tar            a shard in WebDataset's form: ID.png and ID.json for each picture
    OUT/errors/000000.jsonl   the rows of the shard that could not be drawn, and why; absent where there are none
    OUT/errors.jsonl          all of these, when the last shard is complete

or, as a folder of pictures, OUT/images/000000/ID.png and OUT/manifest/000000.parquet in the place of the tar file. The
tar file or manifest is written last: where it is, the shard is complete. On a local disk a shard is written under
another name and renamed; in an object store, an object is there when all of it is.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import posixpath
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from kandinsky_jax.batch.process import Process
from kandinsky_jax.batch.rows import JobError, parquet

PARTIAL = ".partial"
FORMATS = ("webdataset", "folder")


class Drawn(NamedTuple):
    """A picture of a shard."""

    key: str  # its name without the ending
    data: bytes  # the encoded picture
    about: dict[str, Any]  # what it takes to draw it again


class Output:
    """The folder of a job.

    Args:
        url: a local path or an fsspec URL.
        form: one of `FORMATS`.
        suffix: of the pictures, such as "png".
    """

    def __init__(self, url: str, form: str, suffix: str):
        self.url, self.form, self.suffix = url, form, suffix
        self.fs, self.root = fsspec.core.url_to_fs(url)
        self.local = isinstance(self.fs, LocalFileSystem)
        self._process = Process()

    def begin(self, identity: dict[str, Any], process: Process) -> None:
        """Make the folder the job's, or see that it is.

        Args:
            identity: of the job.
            process: which one this is; others may do the same at this moment.
        Raises:
            JobError: naming what differs where it is another job's, or no job's.
        """
        self._process = process
        path = self._path("job.json")
        if self.fs.exists(path):
            known = json.loads(self.fs.cat_file(path))
            differ = [
                f"{name} was {known.get(name)!r}, now {identity.get(name)!r}"
                for name in sorted(known.keys() | identity.keys())
                if known.get(name) != identity.get(name)
            ]
            if differ:
                raise JobError([f"{self.url} holds another job; finish that one, or take another folder", *differ])
            return
        others = [name for name in self._names("") if not name.startswith(".")]
        if others:
            raise JobError([f"{self.url} is neither empty nor a job's folder; it has {', '.join(sorted(others)[:5])}"])
        self._put("job.json", (json.dumps(identity, indent=2, ensure_ascii=False) + "\n").encode())

    def complete(self) -> set[int]:
        """The shards that are complete."""
        folder, ending = ("", ".tar") if self.form == "webdataset" else ("manifest", ".parquet")
        names = [name.removesuffix(ending) for name in self._names(folder) if name.endswith(ending)]
        return {int(name) for name in names if name.isdecimal()}

    def sweep(self, shards: Sequence[int]) -> None:
        """Remove what an earlier run, killed, has left of shards that are not complete."""
        if not self.local:
            return
        for folder in ("", "errors", "images", "manifest"):
            for name in self._names(folder):
                if not (name.startswith(".") and name.endswith(PARTIAL)):
                    continue
                shard, writer = name.split(".")[1], name.split(".")[-2]
                if shard.isdecimal():  # others may be writing theirs
                    mine = int(shard) in shards
                else:
                    mine = writer.isdecimal() and (
                        int(writer) == self._process.index or int(writer) >= self._process.count
                    )
                if mine:
                    _remove(Path(self._path(folder, name)))

    def write(self, shard: int, pictures: Sequence[Drawn], errors: Sequence[dict[str, Any]]) -> None:
        """Write a shard; when this returns, it is complete."""
        name = f"{shard:06d}"
        if errors:
            self._put(f"errors/{name}.jsonl", b"".join(_line(error) for error in errors))
        if self.form == "webdataset":
            with self._whole(f"{name}.tar") as file:
                _write_tar(file, pictures, self.suffix)
        else:
            self._write_folder(f"images/{name}", pictures)
            with self._whole(f"manifest/{name}.parquet") as file:
                _write_manifest(file, [(f"images/{name}/{p.key}.{self.suffix}", p) for p in pictures])

    def finish(self) -> None:
        """When all shards are complete: the errors of all in one file."""
        parts = [self.fs.cat_file(self._path("errors", name)) for name in sorted(self._names("errors"))]
        if parts:
            self._put("errors.jsonl", b"".join(parts))

    # Files --------------------------------------------------------------------------------------------------------

    def _path(self, *names: str) -> str:
        return posixpath.join(self.root, *filter(None, names))

    def _names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache()
        try:
            found = self.fs.ls(self._path(folder), detail=False)
        except FileNotFoundError:
            return []
        return [posixpath.basename(path.rstrip("/")) for path in found]

    def _put(self, name: str, data: bytes) -> None:
        with self._whole(name) as file:
            file.write(data)

    @contextlib.contextmanager
    def _whole(self, name: str) -> Iterator[BinaryIO]:
        """A file to write that will be there whole, or not at all."""
        path = self._path(name)
        if not self.local:
            file = self.fs.open(path, "wb")
            try:
                yield file
            except BaseException:
                with contextlib.suppress(Exception):
                    file.discard()
                raise
            file.close()
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        # What is no shard's may be written by several processes at once, all with the same bytes.
        writer = "" if target.name.split(".")[0].isdecimal() else f".{self._process.index}"
        scratch = target.with_name(f".{target.name}{writer}{PARTIAL}")
        try:
            with scratch.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(target)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise

    def _write_folder(self, name: str, pictures: Sequence[Drawn]) -> None:
        if not self.local:
            for picture in pictures:
                self.fs.pipe_file(self._path(name, f"{picture.key}.{self.suffix}"), picture.data)
            return
        target = Path(self._path(name))
        scratch = target.with_name(f".{target.name}{PARTIAL}")
        _remove(scratch)
        scratch.mkdir(parents=True)
        try:
            for picture in pictures:
                (scratch / f"{picture.key}.{self.suffix}").write_bytes(picture.data)
            _remove(target)  # of a run that was killed before it wrote the manifest
            scratch.rename(target)
        except BaseException:
            _remove(scratch)
            raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False, default=str) + "\n").encode(errors="backslashreplace")


def _write_tar(file: BinaryIO, pictures: Sequence[Drawn], suffix: str) -> None:
    """WebDataset: the files of one sample share a name, and are neighbours. Nothing in it tells when or where."""
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            for name, data in (
                (f"{picture.key}.{suffix}", picture.data),
                (f"{picture.key}.json", _line(picture.about)),
            ):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


# Of the manifest: the same in every shard, also where a shard has nothing in a column.
COLUMNS = {
    "string": "file_name id prompt negative_prompt mode model prior scheduler dtype image mask hint metadata".split(),
    "int64": "seed image_number height width steps prior_steps batch".split(),
    "float64": "guidance_scale prior_guidance_scale strength".split(),
}


def _write_manifest(file: BinaryIO, pictures: Sequence[tuple[str, Drawn]]) -> None:
    import pyarrow

    schema = pyarrow.schema([(name, kind) for kind, names in COLUMNS.items() for name in names])
    rows = []
    for path, picture in pictures:
        row = {"file_name": path, **picture.about}
        if "metadata" in row:  # of any type
            row["metadata"] = json.dumps(row["metadata"], ensure_ascii=False)
        rows.append({name: row.get(name) for name in schema.names})
    parquet().write_table(pyarrow.Table.from_pylist(rows, schema), file)
