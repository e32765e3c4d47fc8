"""Scales of a LoRA file's changes agree with peft and diffusers, for all files that they write."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import diffusers
import numpy as np
import peft
import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from kandinsky_jax.checkpoint import CheckpointError, flat_params, hub, lora_files
from kandinsky_jax.lora import FILE
from kandinsky_jax.models import PriorTransformer, UNet2DConditionModel
from kandinsky_jax.models.layers import abstract
from tests.conftest import SHAPES_MODEL, note

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_shortcut", "conv_in", "conv_out"]  # 3x3 and 1x1
REST = ["time_emb_proj", "linear_1", "linear_2", "image_embeds", "image_proj"]
PRIOR = ["to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "proj_in", "embedding_proj", "proj_to_clip_embeddings"]
BLOCK = "down_blocks.0.attentions.0"
SMALL = {  # the kinds of layers that the official UNet has, each a few times
    "down_block_types": ["SimpleCrossAttnDownBlock2D"],
    "up_block_types": ["SimpleCrossAttnUpBlock2D"],
    "block_out_channels": [32],
}

CONFIGS = {
    "plain": {"r": 4, "lora_alpha": 4},
    "alpha": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 4, "use_rslora": True},
    "rank pattern": {"r": 8, "lora_alpha": 8, "rank_pattern": {"to_q": 2, "mid_block.attentions.0.to_k": 3}},
    "alpha pattern": {"r": 4, "lora_alpha": 4, "alpha_pattern": {f"^{BLOCK}.to_v": 1, r"to_out\.\d": 16, "to_k": 0.5}},
    "all of them": {
        "r": 4,
        "lora_alpha": 3,
        "use_rslora": True,
        "rank_pattern": {r"(down|up)_blocks\.\d\..*\.to_[qk]": 6, "to_q": 5, "to_k": 2},
        "alpha_pattern": {r"attentions\.[01]\.to_q": 7, ".*add_._proj": 2},
    },
    "negative": {"r": 4, "lora_alpha": -4},
    "gaussian": {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian", "lora_dropout": 0.1, "fan_in_fan_out": True},
    "convolutions": {"r": 3, "lora_alpha": 6, "target_modules": CONVOLUTIONS, "rank_pattern": {"conv_in": 2}},
    "rslora of convolutions": {"r": 4, "lora_alpha": 2, "target_modules": CONVOLUTIONS, "use_rslora": True},
    "every layer": {"r": 2, "lora_alpha": 3, "target_modules": ATTENTION + CONVOLUTIONS + REST},
}


QUICK = ("plain", "rank pattern", "all of them", "convolutions")  # as safetensors; the others as .bin


def config_of(name: str, **changed) -> peft.LoraConfig:
    return peft.LoraConfig(**{"target_modules": ATTENTION} | copy.deepcopy(CONFIGS[name]) | changed)


def randomize(network: torch.nn.Module, seed: int = 1) -> None:
    """Changes that do not vanish."""
    torch.manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn_like(parameter)


# peft says that it turns `fan_in_fan_out` off for linear layers, and that it takes the layers of the tensors.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:peft")


@pytest.fixture(scope="module")
def configs() -> dict[str, dict]:
    unet = json.loads((SHAPES_MODEL / hub.DECODER / "unet" / "config.json").read_text())
    prior = json.loads((SHAPES_MODEL / hub.PRIOR / "prior" / "config.json").read_text())
    return {"unet": unet | SMALL, "prior": prior | {"num_layers": 2}}


@pytest.fixture(scope="module")
def unet(configs):
    return diffusers.UNet2DConditionModel.from_config(configs["unet"])


@pytest.fixture(scope="module")
def prior(configs):
    return diffusers.PriorTransformer.from_config(configs["prior"])


@pytest.fixture
def twin(unet):
    """The reference's UNet, to be changed."""
    return copy.deepcopy(unet)


@pytest.fixture(scope="module")
def networks(configs) -> dict:
    """The layers of our networks."""
    kinds = {"unet": UNet2DConditionModel, "prior": PriorTransformer}
    own = {name: abstract(cls, cls.CONFIG.from_dict(configs[name])) for name, cls in kinds.items()}
    return {name: lora_files.layers_of(flat_params(part)) for name, part in own.items()}


def their_deltas(network: torch.nn.Module) -> dict[str, np.ndarray]:
    """What peft adds to each layer's weight, in our order of axes."""
    found = {}
    for name, module in network.named_modules():
        if isinstance(module, BaseTunerLayer):
            [adapter] = module.active_adapters
            delta = module.get_delta_weight(adapter).detach().numpy()
            found[name.removeprefix("base_model.model.")] = delta.transpose(2, 3, 1, 0) if delta.ndim == 4 else delta
    return found


def same(path: Path, networks: dict, theirs: dict[str, np.ndarray], component: str = "unet") -> None:
    """Our change of every layer is theirs."""
    found, left_out = lora_files.read(lora_files.open_file(lora_files.find(path)), networks)
    assert not left_out
    ours = {name: change.delta() for name, change in found[component].items()}
    assert found.keys() == {component}
    assert ours.keys() == theirs.keys()
    assert theirs
    for name, delta in theirs.items():
        assert ours[name].shape == delta.shape
        ratio = float((ours[name].astype(np.float64) * delta).sum() / (delta.astype(np.float64) ** 2).sum())
        assert abs(note(ratio, "our change / peft's") - 1) < 1e-5
        assert np.abs(ours[name] - delta).max() <= 1e-5 * np.abs(delta).max()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_diffusers(unet, twin, networks, tmp_path, name):
    twin.add_adapter(config_of(name))
    randomize(twin)
    twin.save_lora_adapter(tmp_path)
    fresh = copy.deepcopy(unet)
    fresh.load_lora_adapter(tmp_path, prefix=None, weight_name=FILE)
    same(tmp_path, networks, their_deltas(fresh))


@pytest.mark.parametrize("name", ["all of them", "every layer"])
def test_a_pickle_of_diffusers(unet, twin, networks, tmp_path, name):
    """This format has no configuration: every change has the scale 1, as in diffusers."""
    twin.add_adapter(config_of(name))
    randomize(twin)
    twin.save_lora_adapter(tmp_path, safe_serialization=False)
    assert [path.name for path in tmp_path.iterdir()] == ["pytorch_lora_weights.bin"]
    fresh = copy.deepcopy(unet)
    fresh.load_lora_adapter(torch.load(tmp_path / "pytorch_lora_weights.bin"), prefix=None)
    same(tmp_path, networks, their_deltas(fresh))


@pytest.mark.parametrize(
    ("name", "safe"),
    [
        pytest.param(name, safe, marks=() if (name in QUICK) == safe or name == "every layer" else pytest.mark.slow)
        for name in CONFIGS
        for safe in (True, False)
    ],
)
def test_a_folder_of_peft(unet, twin, networks, tmp_path, name, safe):
    model = peft.get_peft_model(twin, config_of(name))
    randomize(model)
    model.save_pretrained(tmp_path, safe_serialization=safe)
    assert (tmp_path / f"adapter_model.{'safetensors' if safe else 'bin'}").is_file()
    same(tmp_path, networks, their_deltas(peft.PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path)))


def test_a_folder_of_peft_for_the_prior(prior, networks, tmp_path):
    patterns = {"rank_pattern": {"net.2": 2}, "alpha_pattern": {r"transformer_blocks\.[01]\.attn1\.to_q": 1}}
    model = peft.get_peft_model(copy.deepcopy(prior), config_of("rslora", target_modules=PRIOR, **patterns))
    randomize(model)
    model.save_pretrained(tmp_path)
    theirs = their_deltas(peft.PeftModel.from_pretrained(copy.deepcopy(prior), tmp_path))
    same(tmp_path, networks, theirs, "prior")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_files_in_other_dtypes(twin, networks, tmp_path, dtype, safe):
    twin.add_adapter(config_of("plain"))
    randomize(twin)
    for name, parameter in twin.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    twin.save_lora_adapter(tmp_path, safe_serialization=safe)
    for module in twin.modules():
        if isinstance(module, BaseTunerLayer):
            module.lora_A.to(torch.float32)
            module.lora_B.to(torch.float32)
    same(tmp_path, networks, their_deltas(twin))


def test_what_we_write_means_the_same_to_diffusers(unet, prior, networks, tmp_path):
    """Other ranks and strengths in every layer, of both networks in one file."""
    rng = np.random.default_rng(0)
    written: dict = {"unet": {}, "prior": {}}
    for component, layers in networks.items():
        for i, (name, shape) in enumerate(sorted(layers.items())):
            rank = 1 + i % 3
            down = rng.standard_normal((rank, *shape[1:])).astype(np.float32)
            up = rng.standard_normal((shape[0], rank)).astype(np.float32)
            written[component][name] = lora_files.LayerChange(down, up, (1 + i % 4) / 3)
    lora_files.write(tmp_path, written)
    for component, module in (("unet", unet), ("prior", prior)):
        network = copy.deepcopy(module)
        network.load_lora_adapter(tmp_path, prefix=component, weight_name=FILE)
        theirs = their_deltas(network)
        assert theirs.keys() == written[component].keys()
        for name, delta in theirs.items():
            assert np.abs(written[component][name].delta() - delta).max() <= 1e-5 * np.abs(delta).max()
    found, _ = lora_files.read(lora_files.open_file(lora_files.find(tmp_path)), networks)
    assert all(found[c][n].scale == pytest.approx(written[c][n].scale, rel=1e-12) for c in found for n in found[c])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"use_dora": True}, "use_dora = True"),
        ({"lora_bias": True}, "lora_bias = True"),
        ({"bias": "all"}, "bias = all"),
        ({"modules_to_save": ["conv_out"]}, "modules_to_save"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = pissa.*changes the network's own weights"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"kasa_config": {"x": 1}}, "kasa_config"),
        ({"a_field_of_the_future": 3}, "a_field_of_the_future = 3"),
        ({"peft_type": "LOHA"}, "type LOHA, only LORA"),
        ({"r": 0}, "r = 0, needed is a positive integer"),
        ({"r": 5}, "rank 4 at .*, its configuration says 5"),
        ({"r": None}, "r = None"),
        ({"rank_pattern": {"to_q": 3}}, "rank 4 at .*to_q, its configuration says 3"),
        ({"rank_pattern": [1]}, "rank_pattern = .*needed is an object"),
        ({"rank_pattern": {"to_q": "4"}}, "rank_pattern to_q = 4"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern, no regular expression"),
        ({"alpha_pattern": {"(x{9999999}){9999999}": 1}}, "alpha_pattern, which is not supported"),
        ({"alpha_pattern": {"(?:.*a|b|ab)*c" * 20: 1}}, None),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan, needed is a finite number"),
        ({"lora_alpha": 10**400}, "lora_alpha = .*needed is a finite number"),
        ({"lora_alpha": "8"}, "lora_alpha = 8, needed is a finite number"),
        ({"lora_alpha": [8]}, "lora_alpha"),
        ({"lora_alpha": True}, "lora_alpha"),
        ({"use_rslora": "yes"}, "use_rslora = yes"),
        (None, "has rank 4 at .*, its configuration says 8"),  # peft's default
    ],
)
def test_fields_that_would_change_the_result_are_refused(networks, changed, says):
    layer = f"{BLOCK}.to_q"
    arrays = {f"{layer}.lora_A.weight": np.ones((4, 32)), f"{layer}.lora_B.weight": np.ones((32, 4))}
    fields = {} if changed is None else {"r": 4, "lora_alpha": 4} | changed
    opened = lora_files.from_dict(arrays, fields)
    if says is None:  # slow to match for some engines; here it ends
        lora_files.read(opened, networks)
        return
    with pytest.raises(CheckpointError, match=says) as caught:
        lora_files.read(opened, networks)
    assert len(str(caught.value)) < 500


def test_the_first_pattern_that_matches_counts():
    """peft's rule: the end of a name from a dot on, and the first in the file's order."""
    from peft.utils.other import get_pattern_key

    from kandinsky_jax.checkpoint.lora_scaling import Scaling

    patterns = ["q", "to_q", "0.to_k", "^mid_block.*to_v", r"up_blocks\.[01]\..*", "attentions.0.to_v", ".*", "to_q"]
    layers = [
        f"{block}.attentions.{i}.{kind}"
        for block in ("mid_block", "up_blocks.0", "down_blocks.2")
        for i in (0, 1)
        for kind in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    for start in range(len(patterns)):
        alphas = {key: i + 2 for i, key in enumerate(patterns[start:])}
        scaling = Scaling({"r": 1, "lora_alpha": 1, "alpha_pattern": alphas})
        for layer in layers:
            assert scaling.of(layer, 1) == alphas.get(get_pattern_key(alphas.keys(), layer), 1)
