"""`kandinsky-jax verify` finds flipped bits, truncated, missing and foreign files, by a manifest or the Hub's cache."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kandinsky_jax.checkpoint import hub
from kandinsky_jax.checkpoint.conversion import convert
from kandinsky_jax.checkpoint.manifest import MANIFEST, verify, write_manifest
from kandinsky_jax.cli import app
from kandinsky_jax.common.errors import CheckpointError
from tests.conftest import SHAPES_MODEL

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A model with a manifest."""
    copy = Path(shutil.copytree(SHAPES_MODEL / hub.DECODER, tmp_path / "model"))
    write_manifest(copy)
    return copy


@pytest.fixture
def cached(tmp_path) -> Path:
    """A snapshot in a Hub's cache as huggingface_hub lays it out: links to files that are named by their checksums."""
    base = tmp_path / "cache/models--owner--model"
    snapshot = base / "snapshots" / ("0" * 40)
    (base / "blobs").mkdir(parents=True)
    for path in (SHAPES_MODEL / hub.DECODER).rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            large = path.suffix == ".safetensors"
            git = hashlib.sha1(f"blob {len(data)}\0".encode() + data)
            name = hashlib.sha256(data).hexdigest() if large else git.hexdigest()
            (base / "blobs" / name).write_bytes(data)
            link = snapshot / path.relative_to(SHAPES_MODEL / hub.DECODER)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(base / "blobs" / name, link.parent))
    return snapshot


def run(*arguments: object):
    return CliRunner().invoke(app, ["verify", *map(str, arguments)])


def flip(path: Path, at: float = 0.7) -> None:
    """Flip the lowest bit of a byte, which leaves a finite number of the same size."""
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(data)


def statuses(folder: Path) -> dict[str, str]:
    return {report.path: report.status for report in verify(folder)}


def test_an_intact_folder(folder):
    assert set(statuses(folder).values()) == {"ok"}
    assert len(statuses(folder)) == 6
    done = run(folder)
    assert done.exit_code == 0
    assert f"  ok          {UNET}" in done.output
    assert "6 ok" in done.output


def test_each_kind_of_fault_is_named(folder):
    flip(folder / UNET)
    os.truncate(folder / "movq/diffusion_pytorch_model.safetensors", 1000)
    (folder / "unet/config.json").unlink()
    (folder / "notes.txt").write_text("mine")
    done = run(folder, "--quiet")
    assert done.exit_code == 1
    assert f"damaged     {UNET}: other content than in the manifest" in done.output
    assert "damaged     movq/diffusion_pytorch_model.safetensors: 1,000 bytes, " in done.output
    assert "missing     unet/config.json" in done.output
    assert "notes.txt" not in done.output  # no fault
    assert statuses(folder)["notes.txt"] == "extra"


@pytest.mark.parametrize(
    "name",
    [
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.safetensors.index.json",
        "unet/diffusion_pytorch_model-00001-of-00002.safetensors",
        "movq/diffusion_pytorch_model.bin",
        "unet/params/manifest.ocdbt",
        "unet/params/d/0123",
        "unet/scheduler_config.json",
        "scheduler/config.json",
        "tokenizer/added_tokens.json",
    ],
)
def test_a_file_that_loading_would_read_is_a_fault(folder, name):
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"tokenizer": ["transformers", "CLIPTokenizer"]}))
    (folder / "tokenizer").mkdir()
    for path in (SHAPES_MODEL / hub.PRIOR / "tokenizer").iterdir():
        shutil.copy(path, folder / "tokenizer")
    write_manifest(folder)
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("{}")
    done = run(folder, "--quiet")
    assert done.exit_code == 1
    assert f"unexpected  {name}: not in the manifest, but loading reads it" in done.output
    assert run(folder, "--update").exit_code == run(folder).exit_code == 0


@pytest.mark.parametrize(
    "name", ["README.md", "unet/notes.md", "old/model.safetensors", "pytorch_lora_weights.safetensors", "unet/mine.txt"]
)
def test_a_file_that_loading_does_not_read_is_none(folder, name):
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("mine")
    assert statuses(folder)[name] == "extra"
    assert run(folder).exit_code == 0


def test_a_component_is_compared_with_the_models_manifest(folder):
    done = run(folder / "unet")
    assert done.exit_code == 0
    assert "2 ok" in done.output
    with contextlib.chdir(folder / "unet"):
        assert set(statuses(Path()).values()) == {"ok"}
    write_manifest(folder / "unet")
    flip(folder / UNET)
    write_manifest(folder / "unet")  # of the part, which does not count before that of the whole
    assert statuses(folder / "unet")[Path(UNET).name] == statuses(folder)[UNET] == "damaged"
    (folder / "unet/model.safetensors").write_text("")
    assert statuses(folder / "unet")["model.safetensors"] == statuses(folder)["unet/model.safetensors"] == "unexpected"
    assert "give that" in str(run(folder / "unet", "--update").exception)


def test_json_output(folder):
    flip(folder / UNET)
    done = run(folder, "--json")
    assert done.exit_code == 1
    printed = json.loads(done.stdout)
    assert printed["ok"] is False
    assert printed["counts"] == {"ok": 5, "damaged": 1}
    [entry] = [entry for entry in printed["files"] if entry["status"] == "damaged"]
    assert (entry["folder"], entry["path"]) == (str(folder), UNET)


def test_a_configuration_that_was_edited(folder):
    path = folder / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("}", ', "steps_offset": 1}'))
    done = run(folder)
    assert done.exit_code == 1
    assert "damaged     scheduler/scheduler_config.json" in done.output
    assert "if you edited it: --update" in done.output
    assert run(folder, "--update").exit_code == 0
    assert run(folder).exit_code == 0


@pytest.mark.parametrize(
    ("name", "says"),
    [("/nothing/here", r"model \(tiny\) and no Hub repository \(owner/name\)$"), ("owner/absent", "has files$")],
)
def test_names_of_nothing(tmp_path, name, says):
    with pytest.raises(CheckpointError, match=says):
        hub.stored_folders(name, tmp_path)


def test_a_folder_without_checksums(tmp_path):
    folder = shutil.copytree(SHAPES_MODEL / hub.DECODER, tmp_path / "model")
    assert set(statuses(folder).values()) == {"not covered"}
    done = run(folder)
    assert done.exit_code == 2
    assert "nothing could be compared; --update writes" in done.output
    assert json.loads(run(folder, "--json").stdout)["ok"] is False
    shutil.rmtree(tmp_path / "model/unet")
    assert statuses(folder)["unet"] == "missing"
    assert run(folder).exit_code == 1


def test_a_family_whose_members_have_manifests(folder):
    root = folder.parent / "family"
    root.mkdir()
    shutil.move(folder, root / "decoder")
    assert set(statuses(root).values()) == {"ok"}
    flip(root / "decoder" / UNET)
    (root / "model_index.json").write_text("{}")
    (root / "decoder/unet/model.bin").write_text("")
    (root / "README.md").write_text("mine")
    found = statuses(root)
    assert found[f"decoder/{UNET}"] == "damaged"
    assert found["model_index.json"] == found["decoder/unet/model.bin"] == "unexpected"
    assert found["README.md"] == "not covered"


def test_the_hubs_cache(cached, tmp_path):
    intact = run("owner/model", "--cache-dir", tmp_path / "cache")
    assert intact.exit_code == 0
    assert "6 ok" in intact.output
    (cached / "unet/diffusion_pytorch_model.safetensors.index.json").write_text("{}")
    assert statuses(cached)["unet/diffusion_pytorch_model.safetensors.index.json"] == "unexpected"
    (cached / "unet/diffusion_pytorch_model.safetensors.index.json").unlink()
    for name in (UNET, "unet/config.json"):
        flip((cached / name).resolve())
    (cached / "movq/diffusion_pytorch_model.safetensors").resolve().unlink()
    found = statuses(cached)
    assert {name for name, status in found.items() if status == "damaged"} == {UNET, "unet/config.json"}
    assert found["movq/diffusion_pytorch_model.safetensors"] == "missing"
    done = run("owner/model", "--cache-dir", tmp_path / "cache")
    assert done.exit_code == 1
    assert "force_download=True" in done.output
    refused = run("owner/model", "--cache-dir", tmp_path / "cache", "--update")
    assert isinstance(refused.exception, ValueError)


def test_what_a_download_into_a_folder_has_noted(tmp_path):
    folder = Path(shutil.copytree(SHAPES_MODEL / hub.DECODER, tmp_path / "model"))
    note = folder / ".cache/huggingface/download" / f"{UNET}.metadata"
    note.parent.mkdir(parents=True)
    note.write_text(f"{'0' * 40}\n{hashlib.sha256((folder / UNET).read_bytes()).hexdigest()}\n1700000000.0\n")
    assert statuses(folder)[UNET] == "ok"
    flip(folder / UNET)
    assert statuses(folder)[UNET] == "damaged"


def test_a_converted_model_has_a_manifest_of_its_own(folder, tmp_path):
    flip(folder / "model_index.json", 0)  # no matter: what was written is listed
    shutil.copy(SHAPES_MODEL / hub.DECODER / "model_index.json", folder / "model_index.json")
    target = convert(folder, tmp_path / "orbax", progress=False)
    assert set(statuses(target).values()) == {"ok"}
    [data] = sorted((target / "unet/params").rglob("d/*"), key=lambda path: path.stat().st_size)[-1:]
    flip(data)
    assert statuses(target)[data.relative_to(target).as_posix()] == "damaged"


def entry(size: str, name: str = "a.json", sha: str = "0" * 64) -> str:
    """A manifest of one file."""
    return f'{{"format_version": 1, "files": {{"{name}": {{"bytes": {size}, "sha256": "{sha}"}}}}}}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ('{"format_version": 2}', "has the format version 2"),
        ('{"format_version": true}', "has the format version True"),
        ('{"format_version": 1.0}', "has the format version 1.0"),
        ('{"format_version": 1}', "not a manifest"),
        ('{"format_version": 1, "files": []}', "not a manifest"),
        (entry("Infinity"), "'a.json' has the size inf"),
        (entry("-3"), "'a.json' has the size -3"),
        (entry("2.5"), "'a.json' has the size 2.5"),
        (entry("true"), "'a.json' has the size True"),
        (entry('"3"'), "has the size"),
        (entry("1" * 5000), "json"),
        (entry("3", sha="0"), "has no SHA-256"),
        (entry("3", sha=""), "has no SHA-256"),
        (entry("3", name="../a.json"), "is not a path within the folder"),
        (entry("3", name="/a.json"), "is not a path within the folder"),
    ],
)
def test_a_manifest_that_cannot_be_read(content, says, folder):
    (folder / MANIFEST).write_text(content)
    done = run(folder)
    assert says in str(done.exception)
    assert str(folder / MANIFEST) in str(done.exception)


def test_names_of_nothing_and_help():
    done = run("no-owner/no-model")
    assert done.exit_code == 2
    assert "no Hub repository" in done.output
    done = run("--help")
    assert done.exit_code == 0
    assert "kandinsky-jax verify kandinsky-community/kandinsky-2-2-decoder" in done.output


def test_components_that_are_links_to_folders(folder, tmp_path):
    """Readers follow such links, so checksums do too; a link to a folder above ends nowhere."""
    (folder / "unet").rename(tmp_path / "elsewhere")
    (folder / "unet").symlink_to(tmp_path / "elsewhere")
    (folder / "movq/above").symlink_to(folder)
    assert run(folder, "--update").exit_code == 0
    assert set(statuses(folder).values()) == {"ok"}
    flip(tmp_path / "elsewhere" / Path(UNET).name)
    assert {path for path, status in statuses(folder).items() if status != "ok"} == {UNET}


def test_a_model_without_files_is_an_error(tmp_path):
    for model in (tmp_path, "tiny/kandinsky-2-2-decodr", "owner/" + "x" * 5000):
        done = run(model)
        assert done.exit_code == 2
        assert done.output.startswith("error: ")
        assert len(done.output) < 500


@pytest.mark.parametrize("name", ["tiny", *(f"tiny/{member}" for member in (hub.PRIOR, hub.DECODER, hub.INPAINT))])
def test_the_embedded_model_is_as_it_was_shipped(name):
    done = CliRunner().invoke(app, ["verify", name])
    assert done.exit_code == 0, done.output
    assert done.output.strip().splitlines()[-1].endswith(" ok")


def test_what_is_saved_into_a_part_of_a_model_is_noted(tmp_path, ours):
    """In the manifests of the whole: of the family, and of the model; the rest of them stays as it was."""
    family = Path(shutil.copytree(hub.EMBEDDED["tiny"], tmp_path / "family"))
    pipe, damaged = ours["KandinskyV22Pipeline"], family / hub.PRIOR / "prior/config.json"
    damaged.write_text(damaged.read_text() + " ")
    pipe.save_pretrained(family / hub.DECODER)
    pipe.unet.save_pretrained(family / hub.INPAINT / "unet", layout="orbax")
    pipe.movq.save_config(family / hub.DECODER / "movq")
    pipe.scheduler.save_pretrained(family / hub.INPAINT / "scheduler")
    for folder in (family, family / hub.DECODER, family / hub.INPAINT / "unet"):
        faults = [report.path for report in verify(folder) if report.status not in ("ok", "extra")]
        assert faults == ([f"{hub.PRIOR}/prior/config.json"] if folder == family else [])
    alone = tmp_path / "alone"
    pipe.save_pretrained(alone)
    pipe.unet.save_pretrained(alone / "unet", max_shard_size="100KB")
    assert {report.status for report in verify(alone)} == {"ok"}
    (alone / "dot").symlink_to(".")
    assert {report.status for report in verify(alone)} == {"ok"}
