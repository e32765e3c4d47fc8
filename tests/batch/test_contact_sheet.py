"""Contact sheets: each thumbnail is the shard's own picture, and nothing of a shard is trusted."""

from __future__ import annotations

import io
import os
import tarfile

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from kandinsky_jax import images
from kandinsky_jax.batch import contact_sheet as sheets
from kandinsky_jax.batch.contact_sheet import GAP, LINE, SIDE, cell, contact_sheet, wrap
from kandinsky_jax.batch.shards import GeneratedImage, Output
from kandinsky_jax.batch.status import status
from tests.batch.store import object_store
from tests.batch.test_jobs import contents, job_of, members, run_job
from tests.batch.test_status import identity

RNG = np.random.default_rng(0)


def picture(height: int = 64, width: int = 64) -> Image.Image:
    small = RNG.integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def job_with(url: str, shard: dict[str, Image.Image | bytes], form: str = "webdataset", ending: str = "png") -> Output:
    """A job's folder whose first shard has these pictures."""
    output = Output(url, form, ending)
    output.begin(identity(500, 250, form, pictures=ending))
    made = [
        GeneratedImage(key, each if isinstance(each, bytes) else images.encode(each, ending), {"prompt": f"of {key}"})
        for key, each in shard.items()
    ]
    output.write(0, made, [])
    return output


def thumbnails(sheet: Image.Image, count: int) -> list[np.ndarray]:
    """The squares of the first thumbnails, each SIDE x SIDE pixels."""
    columns = (sheet.width - GAP) // (SIDE + GAP)
    edges = [cell(position, columns) for position in range(count)]
    return [np.asarray(sheet.crop((left, top, left + SIDE, top + SIDE))) for left, top in edges]


def expected(image: Image.Image) -> np.ndarray:
    """A picture as it should be on the sheet: reduced, in the middle of the lower edge of a white square."""
    square = np.full((SIDE, SIDE, 3), 255, np.uint8)
    factor = min(1.0, SIDE / max(image.size))
    width, height = (round(side * factor) for side in image.size)
    small = image if factor == 1 else image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=2.0)
    left = (SIDE - width) // 2
    square[SIDE - height :, left : left + width] = np.asarray(small)
    return square


def assert_shows(sheet: Image.Image, pictures: list[Image.Image]) -> None:
    for found, wanted in zip(thumbnails(sheet, len(pictures)), pictures, strict=True):
        assert np.array_equal(found, expected(wanted))


def test_it_shows_a_jobs_pictures_in_their_order(whole):
    found = members(whole)
    for shard, keys in enumerate((["000000000", "three+0", "three+1", "three+2", "000000002"], None, None)):
        with tarfile.open(whole / f"{shard:06d}.tar") as tar:
            names = [name.removesuffix(".png") for name in tar.getnames() if name.endswith(".png")]
        assert keys in (None, names)
        sheet = contact_sheet(str(whole), shard)
        assert (sheet.shard, sheet.pictures, sheet.more) == (shard, len(names), False)
        assert_shows(sheet.image, [Image.open(io.BytesIO(found[f"{name}.png"])) for name in names])


def test_it_is_the_same_for_every_form_and_place(rows, whole, shapes_pipe, tmp_path):
    """Tar files and folders of pictures, on a disk and in an object store."""
    sheet = contact_sheet(str(whole), 0).image
    run_job(job_of(tmp_path, rows[:3], "folder", form="folder"), shapes_pipe)
    assert contact_sheet(str(tmp_path / "folder"), 0).image == sheet
    with object_store("bucket") as store:
        fs = fsspec.filesystem("gs")
        for name, folder in (("tar", whole), ("folder", tmp_path / "folder")):
            for path, data in contents(folder).items():
                fs.pipe_file(f"bucket/{name}/{path}", data)
        store.random_faults(1, 0.2)
        assert contact_sheet("gs://bucket/tar", 0).image == sheet
        assert contact_sheet("gs://bucket/folder", 0).image == sheet
        assert sum(store.faults.values()) > 0


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_large_pictures_are_reduced_in_their_proportions(tmp_path, form, ending):
    made = {"tall": picture(640, 320), "wide": picture(200, 1000), "small": picture(64, 128), "even": picture(160, 160)}
    job_with(str(tmp_path), made, form, ending)
    stored = [Image.open(io.BytesIO(images.encode(each, ending))) for each in made.values()]
    assert_shows(contact_sheet(str(tmp_path), 0).image, stored)


def test_identifiers_and_prompts_are_below_the_thumbnails(tmp_path):
    """Two sheets differ only where their words differ."""
    image = picture()
    job_with(str(tmp_path / "a"), {"aaa": image, "bbb": image})
    job_with(str(tmp_path / "b"), {"aaa": image, "ccc": image})
    a, b = (np.asarray(contact_sheet(str(tmp_path / name), 0).image, int) for name in "ab")
    changed = np.argwhere((a != b).any(-1))
    left, top = cell(1, 2)
    assert changed.min(0)[0] > top + SIDE
    assert changed.min(0)[1] >= left
    assert {int(line - top - SIDE - 2) // LINE for line, _ in changed} == {0, 1}  # the identifier, and the prompt
    assert (a[top + SIDE + 3 + 2 * LINE :, left:] == 255).all()


def test_captions_fit_below_their_thumbnail():
    from PIL import ImageFont

    font = ImageFont.load_default(11)
    for text in ("", "x", "word " * 100, "w" * 500, "\n\t\0", "Привет мир " * 9, "\udcff", "a " + "b" * 60 + " c" * 90):
        found = wrap(text, font, SIDE, 2)
        assert len(found) <= 2
        assert all(font.getlength(line) <= SIDE for line in found)
    assert wrap("a red circle", font, SIDE, 2) == ["a red circle"]
    first, second = wrap("a red circle on a blue background with many small stars and a moon", font, SIDE, 2)
    assert not first.endswith(" ")
    assert "a red circle on a blue background with many small stars and a moon".startswith(f"{first} {second[:-3]}")
    assert second.endswith("...")


# Which shard ------------------------------------------------------------------------------------------------------


def test_the_last_shard_is_that_which_was_completed_last(tmp_path):
    output = Output(str(tmp_path), "webdataset", "png")
    output.begin(identity(9, 3))
    for shard in range(3):
        output.write(shard, [GeneratedImage(f"p{shard}", images.encode(picture(), "png"), {})], [])
        time = 1_750_000_000 + (10 if shard == 1 else shard)
        os.utime(tmp_path / f"{shard:06d}.tar", (time, time))
    assert contact_sheet(str(tmp_path)).shard == 1


def test_a_shard_that_cannot_be_shown_is_one_sentence(tmp_path):
    output = Output(str(tmp_path), "webdataset", "png")
    output.begin(identity(9, 3))
    with pytest.raises(ValueError, match=r"no shard of .* is complete yet"):
        contact_sheet(str(tmp_path))
    output.write(0, [], [{"row": i, "id": None, "error": "x"} for i in range(3)])
    (tmp_path / "000001.tar").write_bytes(b"cut")
    for shard, says in (
        (0, r"shard 0 has no pictures, all of its 3 rows failed; .*/errors/000000\.jsonl says why"),
        (1, r"shard 1 is not complete: .*/000001\.tar is damaged or not there yet"),
        (2, r"shard 2 is not complete: .*/000002\.tar is damaged or not there yet"),
        (3, r"there is no shard 3 in .*: the job has 0 to 2"),
        (-1, r"there is no shard -1"),
    ):
        with pytest.raises(ValueError, match=says) as caught:
            contact_sheet(str(tmp_path), shard)
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 500


def test_a_sheet_has_a_bounded_number_of_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(sheets, "MOST", 5)
    made = {f"p{i}": picture() for i in range(7)}
    job_with(str(tmp_path), made)
    sheet = contact_sheet(str(tmp_path), 0)
    assert (sheet.pictures, sheet.more) == (5, True)
    assert_shows(sheet.image, list(made.values())[:5])


# Damaged and foreign content --------------------------------------------------------------------------------------


def is_placeholder(square: np.ndarray) -> bool:
    return bool((square[0] == 225).all() and (square[-1] == 225).all() and (square < 225).any())


@pytest.mark.parametrize("form", ["webdataset", "folder"])
def test_a_picture_that_cannot_be_read_hides_no_other(tmp_path, form):
    good = picture()
    cut = images.encode(picture(100, 100), "png")[:300]
    script = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"  # a format whose reader would start a program
    job_with(str(tmp_path), {"a": good, "cut": cut, "empty": b"", "script": script, "b": good}, form)
    squares = thumbnails(contact_sheet(str(tmp_path), 0).image, 5)
    assert [is_placeholder(square) for square in squares] == [False, True, True, True, False]
    assert np.array_equal(squares[4], expected(good))


def test_a_picture_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)
    job_with(str(tmp_path), {"large": picture(301, 100), "good": picture(300, 100)})
    squares = thumbnails(contact_sheet(str(tmp_path), 0).image, 2)
    assert [is_placeholder(square) for square in squares] == [True, False]


def test_names_in_a_tar_file_lead_nowhere(tmp_path):
    """Links, folders and names above the folder: nothing is written, and no other file is read."""
    job_with(str(tmp_path / "job"), {"x": picture()})
    secret, good = tmp_path / "secret.png", picture()
    picture().save(secret)
    with tarfile.open(tmp_path / "job" / "000000.tar", "w") as tar:

        def add(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = "") -> None:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(data), kind, link
            tar.addfile(member, io.BytesIO(data))

        add("../../up.png", images.encode(good, "png"))
        add("../../up.json", b"{damaged")
        add("link.png", kind=tarfile.SYMTYPE, link=str(secret))
        add("hard.png", kind=tarfile.LNKTYPE, link=str(secret))
        add("folder.png", kind=tarfile.DIRTYPE)
        add("lone.json", b'{"prompt": "of no picture"}')
        add("other.txt", b"text")
        add("last.png", images.encode(good, "png"))
    before = sorted(tmp_path.rglob("*"))
    sheet = contact_sheet(str(tmp_path / "job"), 0)
    assert sheet.pictures == 2
    assert_shows(sheet.image, [good, good])
    assert sorted(tmp_path.rglob("*")) == before


def test_names_in_a_manifest_lead_nowhere(tmp_path):
    job_with(str(tmp_path / "job"), {"x": picture()}, "folder")
    picture().save(tmp_path / "secret.png")
    paths = ["images/000000/x.png", "../secret.png", "images/000000/../../../secret.png", str(tmp_path / "secret.png")]
    paths += ["images/000001/x.png", "images/000000/absent.png", None]
    table = pyarrow.table({"file_name": paths, "prompt": ["a", None, "", "x" * 1000, "b", "c", "d"]})
    pyarrow.parquet.write_table(table, tmp_path / "job" / "manifest" / "000000.parquet")
    squares = thumbnails(contact_sheet(str(tmp_path / "job"), 0).image, len(paths))
    assert [is_placeholder(square) for square in squares] == [False] + [True] * 6


def test_a_damaged_shard_ends_in_one_sentence(tmp_path):
    """Its first and last bytes are those of a shard, and between them it is not."""
    job_with(str(tmp_path / "a"), {f"p{i}": picture(100, 100) for i in range(4)})
    path = tmp_path / "a" / "000000.tar"
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        second = tar.getmembers()[2].offset
    data[second : second + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"000000\.tar cannot be read"):
        contact_sheet(str(tmp_path / "a"), 0)
    with pytest.raises(ValueError, match=r"000000\.tar cannot be read"):
        status(str(tmp_path / "a"), count=True)
    job_with(str(tmp_path / "b"), {"p": picture()}, "folder")
    path = tmp_path / "b" / "manifest" / "000000.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"else": [1]}), path)
    with pytest.raises(ValueError, match=r"000000\.parquet cannot be read"):
        contact_sheet(str(tmp_path / "b"), 0)


def test_settings_of_any_kind_are_no_prompt(tmp_path):
    output = Output(str(tmp_path), "webdataset", "png")
    output.begin(identity(9, 9))
    made: list[dict] = [{"prompt": None}, {"prompt": ["a"]}, {}, {"prompt": "x" * 10**6}, {"prompt": "\udcff\0\n"}]
    data = images.encode(picture(), "png")
    output.write(0, [GeneratedImage(f"p{i}", data, about) for i, about in enumerate(made)], [])
    assert contact_sheet(str(tmp_path), 0).pictures == 5
