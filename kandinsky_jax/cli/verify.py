"""`kandinsky-jax verify`: compare a model's files with their checksums."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from tqdm.auto import tqdm

from kandinsky_jax.common.errors import shorten

EXAMPLE = "Example: kandinsky-jax verify kandinsky-community/kandinsky-2-2-decoder"


def verify(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A folder, or a Hub repository that was downloaded.")],
    update: Annotated[
        bool, typer.Option("--update", help="Write a folder's manifest anew, after its files were changed on purpose.")
    ] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Cache of Hub files; default: the Hub's own.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object with an entry for each file.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress bar; print faults only.")] = False,
) -> None:
    """Compare a model's files with their checksums.

    Exit codes: 0 if all files with checksums are unchanged, 1 if a file is damaged, missing or unexpected, 2 if no file
    could be compared.

    Checksums come from the Hub's cache, or from the manifest that save_pretrained and convert_weights write. Each file
    is ok, damaged, missing, unexpected (not in the manifest, but read when the model is loaded), extra (not in the
    manifest, and not read) or not covered (no checksum is known).
    """
    from kandinsky_jax.checkpoint import CheckpointError, hub, manifest

    try:
        folders = hub.stored_folders(model, cache_dir)
    except CheckpointError as error:
        _stop_uncompared(str(error))
    if update:
        for folder in folders:
            if hub.is_in_cache(folder):
                raise ValueError(
                    f"{folder} is in the Hub's cache, whose checksums are the Hub's; --update is for folders"
                )
            if (above := manifest.manifest_above(folder)) is not None:
                raise ValueError(
                    f"{folder} is a part of the model in {above.parent}, whose manifest lists it: give that"
                )
            print(f"wrote {manifest.write_manifest(folder)}")
        return
    total = sum(manifest.total_bytes(folder) for folder in folders)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=quiet or total < 1e8) as bar:
        found = {folder: manifest.verify(folder, bar.update) for folder in folders}
    if not any(found.values()):
        _stop_uncompared(f"{shorten(model)} holds no files")
    counts = Counter(report.status for reports in found.values() for report in reports)
    damaged = any(counts[status] for status in manifest.FAULTS)
    compared = damaged or bool(counts["ok"])
    if as_json:
        entries = [
            {"folder": str(folder), **dataclasses.asdict(report)}
            for folder, reports in found.items()
            for report in reports
        ]
        print(
            json.dumps({"model": model, "ok": compared and not damaged, "counts": counts, "files": entries}, indent=1)
        )
    else:
        for folder, reports in found.items():
            print(folder)
            for report in reports:
                if not quiet or report.status in manifest.FAULTS:
                    print(f"  {report.status:12}{report.path}" + (f": {report.detail}" if report.detail else ""))
        print(", ".join(f"{count} {status}" for status, count in counts.items()))
        if not compared:
            print("nothing could be compared; --update writes a folder's manifest, of its files as they are now")
        if damaged and hub.is_in_cache(folders[0]):
            print("fetch it again: from_pretrained(..., force_download=True), or `hf download --force-download ...`")
    sys.exit(1 if damaged else 0 if compared else 2)


def _stop_uncompared(reason: str) -> NoReturn:
    """Exit with the code for nothing compared."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)
