"""The helpers of `diffusers.utils` for pictures."""

from __future__ import annotations

import diffusers.utils
import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image

from kandinsky_jax import utils
from tests.checkpoint.hub_server import serving


@pytest.fixture
def pictures(tmp_path):
    """A folder of a PNG with transparency, a JPEG that its EXIF turns, and a file that is not a picture."""
    levels = np.random.default_rng(0).integers(0, 256, (24, 40, 4), np.uint8)
    Image.fromarray(levels).save(tmp_path / "cat.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(levels[..., :3]).save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "page.html").write_text("<html>")
    return tmp_path


@pytest.mark.parametrize("name", ["cat.png", "turned.jpg"])
def test_pictures_from_files_and_urls_are_the_references(pictures, name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    expected = diffusers.utils.load_image(str(pictures / name))
    with serving({"owner/m": pictures}) as server:
        url = f"{server.url}/owner/m/resolve/main/{name}"
        given = [str(pictures / name), pictures / name, url, Image.open(pictures / name)]
        for image in map(utils.load_image, given):
            assert image.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(image), np.asarray(expected))
    assert utils.load_image(pictures / name, lambda image: image.convert("L")).mode == "L"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("page.html", "cannot be read as a picture"),
        ("none.png", "cannot be fetched: .*404"),
        ("large.png", "larger than 0 MiB"),
    ],
)
def test_what_is_no_picture_is_named_with_its_url(pictures, name, message, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    if name == "large.png":
        (pictures / name).write_bytes(bytes(1000))
        monkeypatch.setattr(utils, "MAX_DOWNLOAD", 999)
    with serving({"owner/m": pictures}) as server, pytest.raises(ValueError, match=message) as raised:
        utils.load_image(f"{server.url}/owner/m/resolve/main/{name}")
    assert server.url in str(raised.value)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize("image", ["no/such/file.png", "ftp://host/cat.png", b"PNG", None])
def test_what_is_neither_path_nor_url_is_refused(image):
    with pytest.raises(ValueError, match=r"no file|needed is"):
        utils.load_image(image)


@pytest.mark.parametrize("resize", [None, 8])
def test_grids_are_the_references(resize):
    levels = np.random.default_rng(0).integers(0, 256, (6, 10, 12, 3), np.uint8)
    pictures = [Image.fromarray(each) for each in levels]
    pictures[3] = pictures[3].convert("L")
    ours = utils.make_image_grid(pictures, rows=2, cols=3, resize=resize)
    theirs = diffusers.utils.make_image_grid(pictures, rows=2, cols=3, resize=resize)
    np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    with pytest.raises(ValueError, match="2 rows of 2 need 4 pictures, got 6"):
        utils.make_image_grid(pictures, rows=2, cols=2)
