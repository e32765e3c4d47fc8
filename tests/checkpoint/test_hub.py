"""Finding models and a decoder's prior; saved pipelines are unchanged when loaded."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from kandinsky_jax import (
    CheckpointError,
    KandinskyV22CombinedPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from kandinsky_jax.checkpoint import WeightSelection, flat_params, hub
from kandinsky_jax.pipelines.modes import repository_of
from tests.conftest import SHAPES_MODEL, quick_and_slow

FAMILY = [hub.PRIOR, hub.DECODER, hub.INPAINT, hub.CONTROLNET]


def cached(cache: Path, repository: str, source: Path, revision: str = "main") -> Path:
    """Put a repository into a Hub cache, as huggingface_hub would; returns its snapshot."""
    commit = hashlib.sha1(repository.encode()).hexdigest()
    base = cache / f"models--{repository.replace('/', '--')}"
    (base / "refs" / revision).parent.mkdir(parents=True)
    (base / "refs" / revision).write_text(commit)
    return Path(shutil.copytree(source, base / "snapshots" / commit))


def assert_same_pipeline(one, other) -> None:
    """Every component: the same numbers, or the same settings."""
    assert one.components.keys() == other.components.keys()
    for name, part in one.components.items():
        twin = other.components[name]
        assert type(part) is type(twin)
        if isinstance(part, nnx.Module):
            assert part.config == twin.config
            params, expected = flat_params(part), flat_params(twin)
            assert params.keys() == expected.keys()
            for key in params:
                assert params[key].dtype == expected[key].dtype
                assert np.array_equal(np.asarray(params[key]), np.asarray(expected[key])), f"{name} {key}"
        elif name.endswith("tokenizer"):
            prompt = "a Red circle, on a blue background"
            assert part(prompt, padding="max_length").input_ids == twin(prompt, padding="max_length").input_ids
            assert part.model_max_length == twin.model_max_length == 77
        elif name.endswith("scheduler"):
            assert part.config == twin.config
        else:
            assert part == twin


# resolve -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("member", FAMILY)
def test_embedded_model(member: str, monkeypatch, tmp_path):
    embedded = hub.EMBEDDED["tiny"] / member
    for name in ("tiny", f"tiny/{member}"):
        assert hub.resolve(name, member) == embedded
    assert repository_of(hub.pipeline_class(embedded)) == member
    assert all(hub.component_folder(embedded, part).is_dir() for part in hub.components(embedded))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()  # a folder of one's own goes before the embedded model
    with pytest.raises(CheckpointError, match="tiny has no model_index"):
        hub.resolve("tiny", member)


def test_folders(tmp_path):
    for member in FAMILY:
        assert hub.resolve(SHAPES_MODEL, member) == SHAPES_MODEL / member  # of a family
        assert hub.resolve(str(SHAPES_MODEL / member), hub.DECODER) == SHAPES_MODEL / member  # of a model
    with pytest.raises(CheckpointError, match=r"no subfolder kandinsky-2-2-decoder with one"):
        hub.resolve(tmp_path, hub.DECODER)


@pytest.mark.parametrize("member", [hub.INPAINT, hub.CONTROLNET])
def test_a_movq_that_a_family_shares(member: str, tmp_path):
    parts = ("unet", "scheduler", "movq")
    family = Path(shutil.copytree(SHAPES_MODEL, tmp_path / "family"))
    folder, shared = family / member, family / hub.DECODER / "movq"
    assert [hub.component_folder(folder, part) for part in parts] == [folder / "unet", folder / "scheduler", shared]
    shutil.copytree(shared, folder / "movq")  # its own goes first
    assert hub.component_folder(folder, "movq") == folder / "movq"
    shutil.rmtree(folder / "movq")
    with pytest.raises(CheckpointError, match="has no folder image_encoder"):
        hub.component_folder(folder, "image_encoder")  # nothing else is shared
    shutil.rmtree(folder / "unet")
    with pytest.raises(CheckpointError, match="has no folder unet"):
        hub.component_folder(folder, "unet")
    shutil.rmtree(shared)
    for lacking in (folder, family / hub.DECODER):
        with pytest.raises(CheckpointError, match="has no folder movq, which its model_index"):
            hub.component_folder(lacking, "movq")


@pytest.mark.parametrize("repository", [hub.DECODER, "decoder"])
def test_a_decoder_loads_with_the_shared_movq(repository: str, shapes_pipe, tmp_path):
    """Only where the folder beside it is named as the official repository."""
    shutil.copytree(SHAPES_MODEL / hub.INPAINT, tmp_path / hub.INPAINT)
    shutil.copytree(SHAPES_MODEL / hub.DECODER, tmp_path / repository)
    load = {"dtype": "float32"}
    if repository == hub.DECODER:
        pipe = KandinskyV22InpaintPipeline.from_pretrained(tmp_path, **load)
        params, expected = flat_params(pipe.movq), flat_params(shapes_pipe.movq)
        assert all(np.array_equal(params[name], expected[name]) for name in expected)
    else:
        with pytest.raises(CheckpointError, match="has no folder movq"):
            KandinskyV22InpaintPipeline.from_pretrained(tmp_path, **load)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("tiny/other", "tiny has kandinsky-2-2-prior, kandinsky-2-2-decoder"),
        ("./nothing", "./nothing is not a folder here, no embedded model (tiny) and no Hub repository"),
        ("../nothing", "../nothing is not a folder here, no embedded model (tiny) and no Hub repository"),
        ("/nothing/at/all", "is not a folder here, no embedded model (tiny) and no Hub repository"),
        ("nothing", "is not a folder here, no embedded model (tiny) and no Hub repository"),
        ("no-owner/no-repository", "no-owner/no-repository is not in the Hub's cache, and only the cache"),
        ("a--b/c", "a--b/c could not be fetched from the Hub: Cannot have -- or .."),
    ],
)
def test_names_of_nothing(name: str, message: str, tmp_path):
    with pytest.raises(CheckpointError) as raised:
        hub.resolve(name, hub.DECODER, cache_dir=tmp_path)
    assert message in str(raised.value)
    assert len(str(raised.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("repository", "stored", "asked"),
    [
        ("owner/model", "main", None),
        ("owner/model", "v1", "v1"),
        ("owner/model", "refs/pr/7", "refs/pr/7"),
        ("kandinsky-community/kandinsky-2-2-controlnet-depth", "refs/pr/5", None),  # where its safetensors are
        ("kandinsky-community/kandinsky-2-2-controlnet-depth", "main", "main"),
    ],
)
def test_repository_in_the_cache(repository: str, stored: str, asked: str | None, tmp_path):
    snapshot = cached(tmp_path, repository, SHAPES_MODEL / hub.DECODER, stored)
    assert hub.resolve(repository, hub.DECODER, revision=asked, cache_dir=tmp_path) == snapshot
    with pytest.raises(CheckpointError, match="with the revision 'another' is not in the Hub's cache"):
        hub.resolve(repository, hub.DECODER, revision="another", cache_dir=tmp_path)


def test_repository_of_pickles(shapes_pipe, tmp_path):
    snapshot = cached(tmp_path, "owner/pickles", SHAPES_MODEL / hub.DECODER)
    for path in list(snapshot.rglob("*.safetensors")):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    pipe = KandinskyV22Pipeline.from_pretrained("owner/pickles", dtype="float32", cache_dir=tmp_path)
    assert_same_pipeline(pipe, shapes_pipe.decoder_pipe)


STORED = [
    "diffusion_pytorch_model.safetensors",
    "model.safetensors",
    "diffusion_pytorch_model-00001-of-00002.safetensors",
    "diffusion_pytorch_model.fp16.safetensors",
    "model.fp16-00001-of-00002.safetensors",
    "diffusion_pytorch_model.bin",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.fp16.bin",
]


@pytest.mark.parametrize(
    ("selection", "stages"),
    [
        (WeightSelection(), [STORED[:3], STORED[5:7]]),
        (WeightSelection(use_safetensors=True), [STORED[:3]]),
        (WeightSelection(use_safetensors=False), [STORED[5:7]]),
        (WeightSelection("fp16"), [STORED[3:5], STORED[7:], STORED[:3], STORED[5:7]]),
    ],
    ids=str,
)
def test_files_of_tensors_are_fetched_in_the_order_of_preference(selection, stages):
    others = ["model.onnx", "custom.py", "optimizer.bin", "config.json", "diffusion_flax_model.msgpack"]
    kinds = hub._weight_kinds(selection)
    assert [variant for variant, _ in kinds[len(stages) :]] == ["*"] * (len(kinds) - len(stages))
    for (variant, form), expected in zip(kinds, stages, strict=False):
        patterns = hub._weight_patterns(variant, form)
        assert list(filter_repo_objects(STORED + others, allow_patterns=patterns)) == expected


def test_small_files_of_a_component_are_fetched():
    wanted = ["config.json", "merges.txt", "model.safetensors.index.fp16.json", "params/_METADATA", "params/d/0123"]
    assert list(filter_repo_objects([*wanted, *STORED, "x.py"], allow_patterns=list(hub._SMALL_FILES))) == wanted


def test_bad_index_in_the_cache(tmp_path):
    snapshot = cached(tmp_path, "owner/bad", SHAPES_MODEL / hub.DECODER)
    (snapshot / "model_index.json").write_text(json.dumps({"../../x": ["diffusers", "VQModel"]}))
    with pytest.raises(CheckpointError, match="is not a name of a component"):
        hub.resolve("owner/bad", hub.DECODER, cache_dir=tmp_path)


# The prior ---------------------------------------------------------------------------------------------------------

README = {
    "string": "---\nlicense: apache-2.0\nprior: owner/prior\n---\n# Decoder\n",
    "list": "---\nprior:\n- owner/prior\ntags:\n- text-to-image\n---\n# Decoder\n",
}


@pytest.fixture(scope="module")
def lone_decoder(tmp_path_factory) -> Path:
    """A decoder with no prior beside it."""
    return Path(shutil.copytree(SHAPES_MODEL / hub.DECODER, tmp_path_factory.mktemp("lone") / "decoder"))


def test_prior_next_to_the_decoder():
    assert hub.find_prior(SHAPES_MODEL / hub.DECODER) == SHAPES_MODEL / hub.PRIOR


def test_prior_that_was_given_goes_first(tmp_path):
    snapshot = cached(tmp_path, "owner/prior", SHAPES_MODEL / hub.PRIOR, "v2")
    named = hub.find_prior(SHAPES_MODEL / hub.DECODER, "owner/prior", revision="v2", cache_dir=tmp_path)
    assert named == snapshot
    assert hub.find_prior(SHAPES_MODEL / hub.DECODER, snapshot) == snapshot
    assert hub.find_prior(tmp_path, SHAPES_MODEL) == SHAPES_MODEL / hub.PRIOR
    with pytest.raises(CheckpointError, match="owner/prior is not in the Hub's cache"):
        hub.find_prior(SHAPES_MODEL / hub.DECODER, "owner/prior", cache_dir=tmp_path)


@pytest.mark.parametrize("form", README)
def test_prior_that_the_readme_names(form: str, tmp_path):
    (tmp_path / "decoder").mkdir()
    (tmp_path / "decoder/README.md").write_text(README[form])
    snapshot = cached(tmp_path, "owner/prior", SHAPES_MODEL / hub.PRIOR)
    assert hub.find_prior(tmp_path / "decoder", cache_dir=tmp_path) == snapshot


@pytest.mark.parametrize(
    "readme",
    [None, "", "# prior: owner/prior", "---\nlicense: mit\n---\n", "---\nprior: 3\n---\n", "---\nprior: []\n---\n"],
)
def test_no_prior_says_what_to_pass(readme: str | None, tmp_path):
    (tmp_path / "decoder").mkdir()
    if readme is not None:
        (tmp_path / "decoder/README.md").write_text(readme)
    with pytest.raises(CheckpointError, match=r"Name one: from_pretrained\(..., prior=FOLDER_OR_REPOSITORY\)"):
        hub.find_prior(tmp_path / "decoder", cache_dir=tmp_path)


def test_combined_pipeline_without_a_prior(lone_decoder):
    with pytest.raises(CheckpointError, match="does not say which prior belongs to it"):
        KandinskyV22CombinedPipeline.from_pretrained(lone_decoder)


# Loading and saving ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["family", "folder and prior", "repository"])
def pipe(request, lone_decoder, tmp_path) -> KandinskyV22CombinedPipeline:
    """The small model, by each of the ways to name it."""
    if request.param == "family":
        name, prior = SHAPES_MODEL, None
    elif request.param == "folder and prior":
        name, prior = lone_decoder, SHAPES_MODEL / hub.PRIOR
    else:
        snapshot = cached(tmp_path, "owner/decoder", lone_decoder)
        (snapshot / "README.md").write_text(README["list"])
        cached(tmp_path, "owner/prior", SHAPES_MODEL / hub.PRIOR)
        name, prior = "owner/decoder", None
    return KandinskyV22CombinedPipeline.from_pretrained(name, prior=prior, dtype="float32", cache_dir=tmp_path)


def test_combined_pipeline_from_everywhere(pipe, shapes_pipe):
    assert_same_pipeline(pipe, shapes_pipe)


@pytest.fixture(scope="module")
def saved(shapes_pipe, tmp_path_factory) -> dict[str, Path]:
    """The small model, saved in both layouts."""
    root = tmp_path_factory.mktemp("saved")
    for layout in ("diffusers", "orbax"):
        shapes_pipe.save_pretrained(root / layout, layout=layout)
    return {layout: root / layout for layout in ("diffusers", "orbax")}


@pytest.mark.parametrize("layout", quick_and_slow(("diffusers", "orbax"), "orbax"))
def test_saved_pipeline_is_the_same(layout: str, saved, shapes_pipe):
    assert len(list(saved[layout].rglob("params"))) == (5 if layout == "orbax" else 0)
    assert_same_pipeline(KandinskyV22CombinedPipeline.from_pretrained(saved[layout], dtype="float32"), shapes_pipe)
    with pytest.raises(FileExistsError, match="exists already"):
        shapes_pipe.save_pretrained(saved[layout], overwrite=False)


def test_saved_decoder_is_the_same(shapes_pipe, tmp_path):
    shapes_pipe.decoder_pipe.save_pretrained(tmp_path / "decoder", layout="orbax")
    shapes_pipe.decoder_pipe.save_pretrained(tmp_path / "decoder", layout="diffusers", overwrite=True)
    assert not list((tmp_path / "decoder").rglob("params"))
    pipe = KandinskyV22Pipeline.from_pretrained(tmp_path / "decoder", dtype="float32")
    assert_same_pipeline(pipe, shapes_pipe.decoder_pipe)


def test_reference_reads_a_saved_pipeline(saved, reference):
    theirs = diffusers.KandinskyV22CombinedPipeline.from_pretrained(saved["diffusers"], dtype=torch.float32)
    prior, decoder = reference
    expected = {f"prior_{name}": part for name, part in prior.components.items()} | decoder.components
    assert theirs.components.keys() == expected.keys()
    for name, part in theirs.components.items():
        assert type(part).__name__ == type(expected[name]).__name__
        if isinstance(part, torch.nn.Module):
            state, twin = part.state_dict(), expected[name].state_dict()
            assert state.keys() == twin.keys()
            assert all(torch.equal(state[key], twin[key]) for key in twin), name
        elif name.endswith("scheduler"):
            settings, twin = ({k: v for k, v in s.config.items() if k[0] != "_"} for s in (part, expected[name]))
            assert settings == twin
        elif name.endswith("tokenizer"):
            assert part("a Red circle", padding="max_length") == expected[name]("a Red circle", padding="max_length")
        else:
            picture = torch.arange(3 * 80 * 100, dtype=torch.uint8).reshape(3, 80, 100)
            assert torch.equal(
                *(processor(picture, return_tensors="pt").pixel_values for processor in (part, expected[name]))
            )
