"""Downloads from the Hub, here a local server whose responses are late, wrong or truncated."""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from pathlib import Path

import pytest
from huggingface_hub import constants

from kandinsky_jax import CheckpointError, DDPMScheduler, KandinskyV22Pipeline, SchedulerError, UNet2DConditionModel
from kandinsky_jax.checkpoint import WeightSelection, hub
from kandinsky_jax.checkpoint.recommended_settings import FILE
from tests.checkpoint.hub_server import COMMIT, serving
from tests.conftest import SHAPES_MODEL

DECODER = SHAPES_MODEL / hub.DECODER
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture
def served(monkeypatch):
    """(fault or None, repositories) -> a server that huggingface_hub talks to."""

    def serve(fault=None, **repositories: Path):
        named = {f"owner/{name}": folder for name, folder in repositories.items()}
        server = stack.enter_context(serving(named or {"owner/m": DECODER}, fault))
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    wait = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: wait(min(seconds, 0.001)))  # ours and huggingface_hub's
    with contextlib.ExitStack() as stack:
        yield serve


def resolve(tmp_path: Path, **options) -> Path:
    return hub.resolve("owner/m", hub.DECODER, cache_dir=tmp_path, **options)


def refused(tmp_path: Path, **options) -> str:
    with pytest.raises(CheckpointError) as raised:
        resolve(tmp_path, **options)
    message = str(raised.value)
    assert message.startswith("owner/m ")
    assert len(message) < 500
    assert len(message.splitlines()) == 1
    return message


def test_a_repository_is_fetched_once(served, tmp_path):
    server = served()
    folder = resolve(tmp_path)
    assert folder.name == COMMIT
    assert (folder / UNET).read_bytes() == (DECODER / UNET).read_bytes()
    fetched = {path for path in server.asked if path.endswith(UNET)}
    before = sum(server.asked[path] for path in fetched)
    resolve(tmp_path)
    assert sum(server.asked[path] for path in fetched) == before
    resolve(tmp_path, force_download=True)
    assert sum(server.asked[path] for path in fetched) > before


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again(status, served, tmp_path):
    server = served(lambda path, times: status if times <= 2 else None)
    assert resolve(tmp_path).name == COMMIT
    assert max(server.asked.values()) > 2


def test_a_server_that_stays_busy_is_given_up(served, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "MOST_WAITS", 2)
    server = served(lambda path, times: 429)
    assert "429" in refused(tmp_path)
    assert 3 <= sum(server.asked.values()) <= 30


def test_a_download_that_is_cut_goes_on_later(served, tmp_path):
    cut = True
    server = served(lambda path, times: "cut" if cut and path.endswith(UNET) else None)
    message = refused(tmp_path)
    assert "could not be fetched from the Hub: peer closed connection" in message
    assert "call it again" in message
    cut = False
    server.asked.clear()
    folder = resolve(tmp_path)
    assert (folder / UNET).read_bytes() == (DECODER / UNET).read_bytes()
    again = {path: times for path, times in server.asked.items() if path.endswith("movq/" + UNET.split("/")[1])}
    assert all(times <= 1 for times in again.values())


@pytest.mark.parametrize(
    ("fault", "options", "says"),
    [
        (lambda path, times: 403, {}, "is gated: accept its conditions"),
        (lambda path, times: 401, {}, "is not on the Hub, or not open to you: `hf auth login`, or give token="),
        (None, {"revision": "v9"}, "has no revision 'v9'"),
        (None, {"local_files_only": True}, "is not in the Hub's cache, and only the cache was used"),
    ],
    ids=["gated", "private", "revision", "local"],
)
def test_what_cannot_be_fetched_is_said(fault, options, says, served, tmp_path):
    served(fault)
    assert says in refused(tmp_path, **options)


def test_server_that_does_not_listen(served, tmp_path):
    server = served()
    server.server_close()
    assert "could not be fetched from the Hub" in refused(tmp_path)


def test_no_network_but_a_cache(served, tmp_path, monkeypatch):
    served()
    folder = resolve(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve(tmp_path) == folder
    assert resolve(tmp_path, local_files_only=True) == folder


def test_only_the_files_that_are_read_are_fetched(served, tmp_path):
    source = tmp_path / "source"
    shutil.copytree(DECODER, source)
    for path in source.rglob("*.safetensors"):
        shutil.copy(path, path.with_suffix(".fp16.safetensors"))
        shutil.copy(path, path.with_suffix(".bin"))
    (source / "unet/code.py").write_text("raise SystemExit")
    served(m=source)
    plain = resolve(tmp_path / "plain")
    assert sorted(path.name for path in plain.rglob("unet/*")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    half = resolve(tmp_path / "half", selection=WeightSelection("fp16"))
    assert sorted(path.name for path in half.rglob("unet/d*")) == ["diffusion_pytorch_model.fp16.safetensors"]
    pickles = resolve(tmp_path / "pickles", selection=WeightSelection(use_safetensors=False))
    assert sorted(path.name for path in pickles.rglob("unet/d*")) == ["diffusion_pytorch_model.bin"]


def test_the_fast_adapter_that_the_settings_name_is_fetched(served, tmp_path):
    source = Path(shutil.copytree(DECODER, tmp_path / "source"))
    for name in ("fast.safetensors", "other.safetensors"):
        (source / name).write_bytes(b"lora")
    (source / FILE).write_text(json.dumps({"format_version": 2, "fast": {"lora": "fast.safetensors"}}))
    served(m=source)
    assert sorted(path.name for path in resolve(tmp_path / "a").glob("*.safetensors")) == ["fast.safetensors"]
    (source / FILE).write_text("{")  # is no reason not to load the model
    assert not list(resolve(tmp_path / "b").glob("*.safetensors"))


def test_a_scheduler_and_configurations_without_tensors(served, tmp_path):
    served()
    scheduler = DDPMScheduler.from_pretrained("owner/m", subfolder="scheduler", cache_dir=tmp_path)
    assert scheduler == DDPMScheduler.from_pretrained(DECODER, subfolder="scheduler")
    config = UNet2DConditionModel.load_config("owner/m", subfolder="unet", cache_dir=tmp_path)
    assert config == json.loads((DECODER / "unet/config.json").read_text())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_in_a_subfolder(served, tmp_path):
    shutil.copytree(DECODER, tmp_path / "source/models/decoder")
    served(m=tmp_path / "source")
    folder = resolve(tmp_path / "cache", subfolder="models/decoder")
    assert (folder / UNET).is_file()
    assert hub.resolve(tmp_path / "source", hub.DECODER, subfolder="models/decoder").name == "decoder"
    with pytest.raises(ValueError, match="subfolder must lie within the model"):
        resolve(tmp_path, subfolder="../x")


@pytest.mark.parametrize("name", ["unet/config.json", "scheduler/scheduler_config.json", "model_index.json"])
def test_a_damaged_file_in_the_cache_says_how_to_fetch_it_again(name, served, tmp_path, shapes_pipe):
    served()
    folder = resolve(tmp_path)
    (folder / name).resolve().write_text('{"_class_name": ')
    with pytest.raises((CheckpointError, SchedulerError)) as raised:
        KandinskyV22Pipeline.from_pretrained("owner/m", cache_dir=tmp_path, movq=shapes_pipe.movq)
    message = str(raised.value)
    assert name in message
    assert len(message) < 500
    assert "`kandinsky-jax verify owner/m` finds damaged files, force_download=True fetches them again" in message
    parts = {"movq": shapes_pipe.movq, "force_download": True, "dtype": "float32"}
    pipe = KandinskyV22Pipeline.from_pretrained("owner/m", cache_dir=tmp_path, **parts)
    assert json.loads((folder / name).read_text())
    assert pipe.unet.config == shapes_pipe.unet.config
