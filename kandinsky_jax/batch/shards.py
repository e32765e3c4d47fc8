"""Output of a job: one file or folder per shard, written atomically, in a local folder or at any fsspec URL.

    OUT/job.json              identity of the job; a run of another job is refused
    OUT/000000.tar            a shard in WebDataset format: ID.png and ID.json for each picture
    OUT/errors/000000.jsonl   rows of the shard that could not be generated, with reasons; absent if there are none
    OUT/errors.jsonl          all of these, once the last shard is complete

As a folder of pictures, there are OUT/images/000000/ID.png and OUT/manifest/000000.parquet instead of the tar file. The
tar file or manifest is written last and marks the shard as complete. An empty or truncated file of that name is
replaced; files of other names are ignored. `kandinsky_jax.common.files` describes atomic writes by several processes.
"""

from __future__ import annotations

import errno
import functools
import io
import json
import math
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple

from kandinsky_jax.batch.model_files import changed
from kandinsky_jax.batch.rows import USUAL_DEFAULTS, JobError, parquet
from kandinsky_jax.common import reading
from kandinsky_jax.common.errors import quote, shorten, summarize
from kandinsky_jax.common.files import FileInfo, Files, open_files, read_small

OUTPUT_FORMATS = ("webdataset", "folder")
FORMAT_VERSION = 2  # of job.json and shards; 1 had a single digest of the model, 0 no version; both can be resumed
_BLOCK = tarfile.BLOCKSIZE
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")  # in the repr of an object, different in every run


class GeneratedImage(NamedTuple):
    """A generated and encoded picture of a shard."""

    key: str  # file name without suffix
    data: bytes  # the encoded picture
    about: dict[str, object]  # settings that reproduce it
    fault: str | None = None  # the reason if there is no picture


class Failed(NamedTuple):
    """Rows of a complete job that could not be generated."""

    rows: int
    shards: list[str]  # files of their shards; a shard whose file is removed is made again


class FoundShards(NamedTuple):
    """Files of a job's folder that have the name of a shard."""

    complete: dict[int, FileInfo]  # by number, in their order
    damaged: list[str]  # names of empty or truncated ones, which are made again


class Output:
    """The folder of a job.

    Args:
        url: a local path or an fsspec URL.
        form: one of `OUTPUT_FORMATS`.
        suffix: of the pictures, such as "png".
        further: values that the manifest has columns for, see `Job.extensions`.
    Raises:
        ReadError, OSError: as in `open_files`.
    """

    def __init__(self, url: str, form: str, suffix: str, further: Mapping[str, bool | int | str] | None = None):
        self.url, self.form, self.suffix = url, form, suffix
        self._columns = {kind: [*names] for kind, names in MANIFEST_COLUMNS.items()}
        for name, value in (further or {}).items():
            kind = next(kind for kind, cls in KINDS.items() if isinstance(value, cls))
            self._columns.setdefault(kind, []).append(name)
        self._files = open_files(url)
        self._begun = False
        self._stale: set[str] | None = None  # error files of an earlier run, for shards that are made again

    def begin(self, identity: dict[str, object], older_model: Callable[[], str] | None = None) -> None:
        """Start the job in this folder, or check that it was started here; safe against concurrent processes.

        Args:
            identity: of the job.
            older_model: computes the value of `identity["model"]` in format versions 0 and 1.
        Raises:
            JobError: for the folder of another job, naming the differences, or a folder with other content.
            OSError: for a folder that cannot be read or written.
        """
        text = json.dumps({"format_version": FORMAT_VERSION} | identity, indent=2) + "\n"
        found = self._files.sizes("")
        if "job.json" not in found:
            if others := sorted(name for name in found if not name.startswith(".")):
                shown = shorten(", ".join(others[:5]), 150)
                raise JobError([f"{shorten(self.url, 240)} is neither empty nor a job's folder; it has {shown}"])
            if self._write("job.json", text.encode(), overwrite=False):
                self._begun = True
                return
        try:
            version, known = read_identity(self.url, self._files)
        except (OSError, JobFileError) as error:
            raise JobError([str(error)]) from None
        self._compare(version, known, json.loads(json.dumps(identity)), older_model)
        self._begun = True

    def _compare(
        self,
        version: int,
        known: dict[str, object],
        identity: dict[str, object],
        older_model: Callable[[], str] | None,
    ) -> None:
        """Raise JobError where job.json is that of another job."""
        if version < 2 and older_model is not None:
            identity["model"] = older_model()
        differ = _changes(*(_with_usual_defaults(each) for each in (known, identity)))
        if differ:
            fault = f"{shorten(self.url, 150)} holds another job; finish that one, or use another folder"
            raise JobError([fault, *differ])

    def has_begun(self) -> bool:
        """Return whether a job was started in this folder."""
        return self._files.size("job.json") is not None

    def check_begun(self) -> None:
        """Raise FileNotFoundError where the folder of a job that has begun is gone."""
        if not self.has_begun():
            why = "job.json is gone, so the folder was removed or renamed: start the job again"
            raise FileNotFoundError(errno.ENOENT, why, shorten(self.url, 240))

    # Shards -------------------------------------------------------------------------------------------------------

    def complete(self, count: int) -> set[int]:
        """Return which of a job's shards, numbered from 0 to `count` - 1, are complete.

        Empty or truncated files with a shard's name give a warning.
        """
        found = self.find(count)
        for name in found.damaged:
            warnings.warn(f"{shorten(self.url, 240)}/{name} is not a complete shard and is made again", stacklevel=2)
        return set(found.complete)

    def find(self, count: int) -> FoundShards:
        """Find the files of a job's shards, numbered from 0 to `count` - 1, and check their first and last bytes."""
        folder = "" if self.form == "webdataset" else "manifest"
        listed = self._files.details(folder)
        numbers = sorted(number for name in listed if (number := self._number(name)) is not None and number < count)
        files = {number: listed[self.file_name(number).rpartition("/")[2]] for number in numbers}
        known = {self.file_name(number): info.size for number, info in files.items() if info.size is not None}
        ends = dict(zip(known, self._files.ends(known, _BLOCK, 2 * _BLOCK), strict=True))
        errors = self._files.sizes("errors")
        found = FoundShards({}, [])
        for number, info in files.items():
            name = self.file_name(number)
            if info.size is None:  # a folder or a pipe
                continue
            if self._is_whole(info.size, *ends[name], f"{number:06d}.jsonl" in errors):
                found.complete[number] = info
            else:
                found.damaged.append(name)
        return found

    def _number(self, name: str) -> int | None:
        """Return the number of the shard whose file has this name."""
        match = re.fullmatch(r"([0-9]{6,18})\.(tar|parquet)", name)
        if match is None or self.file_name(int(match[1])).rpartition("/")[2] != name:
            return None
        return int(match[1])

    def is_complete(self, shard: int) -> bool:
        """Return whether a shard is complete, by this process or another."""
        name = self.file_name(shard)
        size = self._files.size(name)
        if size is None:
            return False
        [ends] = self._files.ends({name: size}, _BLOCK, 2 * _BLOCK)
        return self._is_whole(size, *ends, self._files.size(f"errors/{shard:06d}.jsonl") is not None)

    def file_name(self, shard: int) -> str:
        """Return the name of the file that marks a shard as complete."""
        return f"{shard:06d}.tar" if self.form == "webdataset" else f"manifest/{shard:06d}.parquet"

    def _is_whole(self, size: int, head: bytes, tail: bytes, errors: bool) -> bool:
        """Return whether a file of this size, with these first and last bytes, is a complete shard."""
        if self.form == "folder":
            footer = int.from_bytes(tail[-8:-4], "little")
            return size >= 12 and head[:4] == tail[-4:] == b"PAR1" and footer + 12 <= size
        if size < tarfile.RECORDSIZE or size % tarfile.RECORDSIZE or any(tail):
            return False
        return head[257:262] == b"ustar" or (errors and size == tarfile.RECORDSIZE and not any(head))

    def sweep(self) -> None:
        """Remove scratch files of killed runs, once in this process; those of running processes stay."""
        if self._stale is not None:
            return
        pictures = [f"images/{name}" for name, size in self._files.sizes("images").items() if size is None]
        self._files.sweep(("", "errors", "manifest", "images", *pictures))
        self._stale = {name for name in self._files.sizes("errors") if not name.startswith(".")}

    def write(self, shard: int, pictures: Sequence[GeneratedImage], errors: Sequence[Mapping[str, object]]) -> bool:
        """Write a shard, which is complete when this returns.

        Returns:
            whether this call has written it; False if another process has completed it first.
        Raises:
            OSError: if it cannot be written, or the folder has been removed; it stays absent.
        """
        if self._begun:
            self.check_begun()
        number, name = f"{shard:06d}", self.file_name(shard)
        if self.is_complete(shard):
            return False
        if errors:
            self._write(f"errors/{number}.jsonl", b"".join(_error_line(error) for error in errors))
        elif self._stale and f"{number}.jsonl" in self._stale:
            self._files.remove(f"errors/{number}.jsonl")
        if self.form == "webdataset":
            fill = functools.partial(_write_tar, pictures=pictures, suffix=self.suffix)
        else:
            paths = [f"images/{number}/{picture.key}.{self.suffix}" for picture in pictures]
            for path, picture in zip(paths, pictures, strict=True):
                self._write(path, picture.data)
            listed = list(zip(paths, pictures, strict=True))
            fill = functools.partial(_write_manifest, pictures=listed, columns=self._columns)
        if self._files.write(name, fill):
            return True
        if self.is_complete(shard):
            return False
        return self._files.write(name, fill, overwrite=True)  # the existing file is not a shard

    def finish(self, count: int) -> Failed:
        """Collect the errors of all shards in one file, once all are complete."""
        found = self._files.sizes("errors")
        shards = [number for number in range(count) if f"{number:06d}.jsonl" in found]
        if not shards:
            self._files.remove("errors.jsonl")
            return Failed(0, [])
        lines = b"".join(self._files.read(f"errors/{number:06d}.jsonl") for number in shards)
        self._write("errors.jsonl", lines)
        rows = {_row_number(line) for line in lines.splitlines()}
        return Failed(len(rows), [self.file_name(number) for number in shards])

    def _write(self, name: str, data: bytes, *, overwrite: bool = True) -> bool:
        return self._files.write(name, lambda file: file.write(data), overwrite=overwrite)


class JobFileError(ValueError):
    """A job.json that cannot be read, is damaged, or is that of a later release."""


def read_identity(url: str, files: Files) -> tuple[int, dict[str, object]]:
    """Read a folder's job.json.

    Args:
        url: of the folder, for errors.
        files: the folder's.
    Returns:
        its format version, and the identity of the job.
    Raises:
        FileNotFoundError: where there is none.
        JobFileError: where it is not one that this release knows.
    """
    shown = f"{shorten(url, 240)}/job.json"
    try:
        known = reading.parse_json(read_small(files, "job.json"))
        if not isinstance(known, dict):
            raise reading.ReadError(f"holds {type(known).__name__}, needed is an object")
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = shorten(error.strerror or error, 200)
        raise JobFileError(f"{shown} cannot be read: {reason}") from None
    except reading.ReadError as error:
        fault = reading.of_file(shown, error)
        raise JobFileError(f"{fault}; it is damaged: use another folder, or remove this one") from None
    version = known.pop("format_version", 0)
    if version not in range(FORMAT_VERSION + 1) or isinstance(version, bool):
        raise JobFileError(
            f"{shown} has format version {shorten(version, 40)}, this release knows 0 to {FORMAT_VERSION}: "
            "continue with the release that started the job, or use another folder"
        )
    return int(version), known


_PARTS = {"defaults": "{}", "rows": "the {} of rows", "versions": "the version of {}"}


def _with_usual_defaults(identity: dict[str, object]) -> dict[str, object]:
    """Complete an identity of a release that did not record what was not given."""
    defaults = identity.get("defaults")
    return identity | {"defaults": USUAL_DEFAULTS | defaults} if isinstance(defaults, dict) else identity


def _changes(before: dict[str, object], now: dict[str, object]) -> list[str]:
    """List the differences of two identities of a job, by setting."""
    faults = []
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new:
            continue
        if not (isinstance(old, dict) and isinstance(new, dict)):
            faults.append("the model's files changed" if name == "model" else _change(name, old, new))
        elif name == "model":
            faults.append(f"the model's files changed: {summarize(changed(old, new), 150, ', ')}")
        elif name == "rows" and old.get("count") == new.get("count"):
            faults.append("the file of rows changed; the number of rows did not")
        else:
            faults += [
                _change(_PARTS.get(name, f"{shorten(name, 20)}: {{}}").format(part), old.get(part), new.get(part))
                for part in sorted(old.keys() | new.keys())
                if old.get(part) != new.get(part) and (name, part) != ("rows", "sha256")
            ]
    return faults


def _change(name: str, before: object, now: object) -> str:
    """Describe a setting's two values; long ones from where they differ."""
    old, new = ("not given" if value is None else quote(value, 2000) for value in (before, now))
    alike = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
    if alike > 40:
        old, new = f"...{old[alike - 20 :]}", f"...{new[alike - 20 :]}"
    return f"{shorten(name, 40)} was {shorten(old, 60)}, now {shorten(new, 60)}"


# Content ----------------------------------------------------------------------------------------------------------


def json_line(value: object) -> bytes:
    """Encode a value as a line of standard JSON, the same in every run.

    Numbers without a JSON form become text, "Infinity", "-Infinity" and "NaN", as in Protocol Buffers; other values
    become their text, without memory addresses.

    Raises:
        ValueError: for values nested too deeply, or keys that are not text.
    """
    try:
        text = json.dumps(_finite(value), ensure_ascii=False, default=_text, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"cannot be written as JSON: {shorten(str(error), 100)}") from None
    return (text + "\n").encode(errors="backslashreplace")  # unpaired surrogates, escaped as in JSON


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if isinstance(value, dict):
        return {name: _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def _text(value: object) -> str:
    return _ADDRESS.sub("", str(value))


def _error_line(error: Mapping[str, object]) -> bytes:
    """Encode a line of errors.jsonl; the row's identifier may be any value."""
    name = error.get("id")
    short = isinstance(name, str) and len(name) <= 200
    if not (name is None or short or (isinstance(name, int) and abs(name) < 2**63)):
        name = shorten(name, 200)
    return json_line({**error, "id": name, "error": _text(error["error"])})


def _row_number(line: bytes) -> object:
    """Return the row of a line of errors.jsonl; a row of several pictures may have several lines."""
    try:
        return json.loads(line)["row"]
    except (ValueError, TypeError, KeyError, RecursionError):  # damaged
        return line


def _write_tar(file: BinaryIO, pictures: Sequence[GeneratedImage], suffix: str) -> None:
    """Write a WebDataset shard: files of one sample share a name and are adjacent; no times or owners are stored.

    With names of up to 100 characters the bytes are those of the older USTAR format; PAX allows longer ones.
    """
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for picture in pictures:
            for name, data in (
                (f"{picture.key}.{suffix}", picture.data),
                (f"{picture.key}.json", json_line(picture.about)),
            ):
                member = tarfile.TarInfo(name)
                member.size, member.mode = len(data), 0o644
                tar.addfile(member, io.BytesIO(data))


def tar_members(files: Files, name: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Yield the members of a shard's tar file in their order; each can be read until the next one is asked for.

    Raises:
        ValueError: where the tar file is damaged.
        OSError: where it cannot be read.
    """
    size = files.size(name) or 0
    try:
        with files.open(name) as file, tarfile.open(fileobj=file, mode="r|") as tar:
            for member in tar:
                if not 0 <= member.size <= size - member.offset_data:  # tarfile would skip as much
                    raise tarfile.ReadError(f"{shorten(member.name, 60)} has {member.size} bytes, the file {size:,}")
                yield tar, member
            if size - tar.offset > tarfile.RECORDSIZE + _BLOCK:  # at a header in the middle, tarfile ends silently
                raise tarfile.ReadError(f"the header at byte {tar.offset:,} is damaged")
    except (tarfile.TarError, EOFError, RecursionError, ValueError) as error:  # headers of headers, or no numbers
        raise ValueError(f"{name} cannot be read: {shorten(error, 200)}") from None


KINDS = {"bool": bool, "int64": int, "string": str}  # of further columns; a bool is an int, too
# Columns of the manifest, the same in every shard even where one is empty.
MANIFEST_COLUMNS = {
    "string": "file_name id prompt negative_prompt mode model prior scheduler dtype image mask hint metadata".split(),
    "int64": "seed image_number height width steps prior_steps batch".split(),
    "float64": "guidance_scale prior_guidance_scale strength".split(),
}


def _write_manifest(
    file: BinaryIO, pictures: Sequence[tuple[str, GeneratedImage]], columns: Mapping[str, Sequence[str]]
) -> None:
    import pyarrow

    schema = pyarrow.schema([(name, kind) for kind, names in columns.items() for name in names])
    rows = []
    for path, picture in pictures:
        row = {"file_name": path, **picture.about}
        if "metadata" in row:  # of any type
            row["metadata"] = json_line(row["metadata"]).decode().rstrip("\n")
        rows.append({name: _utf8(row.get(name)) for name in schema.names})
    parquet().write_table(pyarrow.Table.from_pylist(rows, schema), file)


def _utf8(value: object) -> object:
    return value.encode(errors="backslashreplace").decode() if isinstance(value, str) else value
