"""A contact sheet of a shard: its pictures as thumbnails, with their identifiers and prompts below them."""

from __future__ import annotations

import bisect
import io
import math
from collections.abc import Iterator
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from kandinsky_jax import images
from kandinsky_jax.batch.shards import FoundShards, Output
from kandinsky_jax.batch.status import JobFacts, open_job_folder
from kandinsky_jax.batch.stored_pictures import stored_pictures
from kandinsky_jax.common.errors import shorten
from kandinsky_jax.common.files import Files

SIDE = 160  # pixels, of a thumbnail's longer side
GAP = 8
LINE = 14  # pixels from line to line of a caption
PROMPT_LINES = 2
MOST = 500  # pictures of a sheet: 23 columns, 53 MB in memory
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_BACKGROUND, _INK, _FAINT, _EMPTY = (255, 255, 255), (20, 20, 20), (110, 110, 110), (225, 225, 225)


class ShardPicture(NamedTuple):
    """A picture of a shard, reduced for a sheet."""

    id: str
    prompt: str
    thumbnail: Image.Image | str  # RGB, its longer side at most `SIDE`; or the reason why it cannot be read


class ContactSheet(NamedTuple):
    """A sheet, and what is on it."""

    image: Image.Image
    shard: int
    pictures: int  # on the sheet
    more: bool  # whether the shard has others


def contact_sheet(output: str, shard: int | None = None) -> ContactSheet:
    """Draw the pictures of a shard as thumbnails.

    Args:
        output: path or URL of a job's folder.
        shard: its number; None is the one that was completed last, or where the files have no times the last one.
    Raises:
        ValueError: where there is no job, no such shard, or no picture in it.
        OSError: where it cannot be read.
    """
    files, job = open_job_folder(output)
    out = Output(output, job.form, job.encoding)
    if shard is None:
        shard = _last_shard(out.find(job.shards), output)
    elif not 0 <= shard < job.shards:
        raise ValueError(f"there is no shard {shard} in {shorten(output, 240)}: the job has 0 to {job.shards - 1}")
    elif not out.is_complete(shard):
        raise ValueError(
            f"shard {shard} is not complete: {shorten(output, 240)}/{out.file_name(shard)} is damaged or not there yet"
        )
    found: list[ShardPicture] = []
    more = False
    for picture in shard_pictures(files, job, out, shard):
        if len(found) == MOST:
            more = True
            break
        found.append(picture)
    if not found:
        raise ValueError(
            f"shard {shard} has no pictures, all of its {job.rows_of(shard)} rows failed; "
            f"{shorten(output, 240)}/errors/{shard:06d}.jsonl says why"
        )
    return ContactSheet(_draw(found), shard, len(found), more)


def _last_shard(found: FoundShards, output: str) -> int:
    if not found.complete:
        raise ValueError(f"no shard of {shorten(output, 240)} is complete yet, so there are no pictures to show")
    times = {shard: info.modified.timestamp() for shard, info in found.complete.items() if info.modified is not None}
    return max(found.complete, key=lambda shard: (times.get(shard, 0.0), shard))


# Reading ----------------------------------------------------------------------------------------------------------


def shard_pictures(files: Files, job: JobFacts, output: Output, shard: int) -> Iterator[ShardPicture]:
    """Yield the pictures of a complete shard, one at a time.

    Raises:
        ValueError, OSError: where the shard cannot be read.
    """
    for stored in stored_pictures(files, job, output, shard):
        yield ShardPicture(stored.id, stored.prompt, _thumbnail(stored.data))


def _thumbnail(data: bytes | str) -> Image.Image | str:
    """Decode a picture and reduce it, or return the reason why it cannot be read."""
    if isinstance(data, str):
        return data
    try:
        picture = images.rgb(images.read(io.BytesIO(data), "picture"), "picture")
    except ValueError as error:
        return str(error).removeprefix("picture: it ")
    picture.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    return picture


# Layout -----------------------------------------------------------------------------------------------------------


def _draw(pictures: list[ShardPicture]) -> Image.Image:
    """Lay the thumbnails out in a square, row by row."""
    columns = math.ceil(math.sqrt(len(pictures)))
    rows = -(-len(pictures) // columns)
    width, height = SIDE + GAP, SIDE + (1 + PROMPT_LINES) * LINE + 2 * GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), _BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(11)
    for position, picture in enumerate(pictures):
        left, top = cell(position, columns)
        if isinstance(picture.thumbnail, str):
            draw.rectangle((left, top, left + SIDE - 1, top + SIDE - 1), fill=_EMPTY)
            for line, text in enumerate(wrap(picture.thumbnail, font, SIDE - 2 * GAP, SIDE // LINE - 2)):
                draw.text((left + GAP, top + GAP + line * LINE), text, fill=_INK, font=font)
        else:
            inside = picture.thumbnail
            sheet.paste(inside, (left + (SIDE - inside.width) // 2, top + SIDE - inside.height))
        [title] = wrap(picture.id, font, SIDE, 1) or [""]
        draw.text((left, top + SIDE + 2), title, fill=_INK, font=font)
        for line, text in enumerate(wrap(picture.prompt, font, SIDE, PROMPT_LINES)):
            draw.text((left, top + SIDE + 2 + (1 + line) * LINE), text, fill=_FAINT, font=font)
    return sheet


def cell(position: int, columns: int) -> tuple[int, int]:
    """Return the left and upper edge of a thumbnail's square."""
    width, height = SIDE + GAP, SIDE + (1 + PROMPT_LINES) * LINE + 2 * GAP
    return GAP + position % columns * width, GAP + position // columns * height


def wrap(text: str, font: Font, width: int, lines: int) -> list[str]:
    """Break a text into at most so many lines of a width in pixels; "..." marks what is left out."""
    rest = shorten(text, 400)
    found: list[str] = []
    while rest and len(found) < lines:
        line = _fitting(rest, font, width)
        if line != rest and len(found) == lines - 1:
            line = _fitting(rest, font, width - font.getlength("...")) + "..."
        elif line != rest and " " in line:
            line = line[: line.rindex(" ")]
        found.append(line)
        rest = rest[len(line) :].lstrip()
    return found


def _fitting(text: str, font: Font, width: float) -> str:
    """Return the beginning of a text that fits into a width, at least one character."""
    length = bisect.bisect_right(range(1, len(text) + 1), width, key=lambda count: font.getlength(text[:count]))
    return text[: max(1, length)]
