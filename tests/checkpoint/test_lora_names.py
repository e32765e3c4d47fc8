"""Naming conventions and folders of LoRA files; unsupported ones give one short message."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from kandinsky_jax.checkpoint import CheckpointError, lora_files
from kandinsky_jax.lora import FILE, LayerChange

UNET = {
    "conv_in": (32, 4, 3, 3),
    "down_blocks.0.resnets.0.conv1": (32, 32, 3, 3),
    "down_blocks.0.resnets.0.conv_shortcut": (32, 16, 1, 1),
    "down_blocks.0.attentions.0.to_q": (32, 32),
    "down_blocks.0.attentions.0.to_out.0": (32, 32),
    "down_blocks.0.attentions.0.add_k_proj": (32, 8),
    "time_embedding.linear_1": (64, 32),
}
PRIOR = {
    "transformer_blocks.0.attn1.to_q": (24, 24),
    "transformer_blocks.0.ff.net.0.proj": (48, 24),
    "time_embedding.linear_1": (24, 24),
}
NETWORKS = {"unet": UNET, "prior": PRIOR}
ATTENTION = [name for name in UNET if "attentions" in name]
LINEAR = [name for name, shape in UNET.items() if len(shape) == 2]


def arrays(layers: dict, names=None, rank: int = 2) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Down and up of layers, as PyTorch has them."""
    rng = np.random.default_rng(0)
    found = {}
    for name in names or layers:
        out, of, *kernel = layers[name]
        down = rng.standard_normal((rank, of, *kernel)).astype(np.float32)
        found[name] = down, rng.standard_normal((out, rank, *[1] * len(kernel))).astype(np.float32)
    return found


def spelled(pattern: str, pairs: dict, down: str, up: str) -> dict[str, np.ndarray]:
    return {
        pattern.format(name=name, flat=name.replace(".", "_"), part=part): array
        for name, pair in pairs.items()
        for part, array in zip((down, up), pair, strict=True)
    }


def old_processors(pairs: dict) -> dict[str, np.ndarray]:
    """As the reference's LoRA scripts for Kandinsky wrote them."""
    found = {}
    for name, pair in pairs.items():
        stem, layer = name.removesuffix(".0").rsplit(".", 1)
        for part, array in zip(("down", "up"), pair, strict=True):
            found[f"{stem}.processor.{layer}_lora.{part}.weight"] = array
    return found


def read(tensors: dict, networks: dict | None = None, config: dict | None = None):
    return lora_files.read(lora_files.from_dict(tensors, config), NETWORKS if networks is None else networks)


def same(found: dict, pairs: dict, scale: float = 1.0) -> None:
    assert found.keys() == pairs.keys()
    for name, (down, up) in pairs.items():
        kernel = down.reshape(down.shape[0], -1)
        delta = scale * (up.reshape(up.shape[0], -1) @ kernel).reshape(up.shape[0], *down.shape[1:])
        if delta.ndim == 4:
            delta = delta.transpose(2, 3, 1, 0)
        np.testing.assert_allclose(found[name].delta(), delta, rtol=1e-5, atol=1e-5)


SPELLINGS = {
    "peft": lambda p: spelled("{name}.{part}.weight", p, "lora_A", "lora_B"),
    "PeftModel": lambda p: spelled("base_model.model.{name}.{part}.weight", p, "lora_A", "lora_B"),
    "PeftModel's state": lambda p: spelled("base_model.model.{name}.{part}.default.weight", p, "lora_A", "lora_B"),
    "diffusers": lambda p: spelled("unet.{name}.{part}.weight", p, "lora_A", "lora_B"),
    "wrapped": lambda p: spelled("unet.base_model.model.{name}.{part}.weight", p, "lora_A", "lora_B"),
    "compiled": lambda p: spelled("_orig_mod.module.{name}.{part}.weight", p, "lora_A", "lora_B"),
    "transformer": lambda p: spelled("transformer.{name}.{part}.weight", p, "lora_A", "lora_B"),
    "down and up": lambda p: spelled("unet.{name}.lora.{part}.weight", p, "down", "up"),
    "linear layer": lambda p: spelled("{name}.lora_linear_layer.{part}.weight", p, "down", "up"),
    "dotted kohya": lambda p: spelled("unet.{name}.{part}.weight", p, "lora_down", "lora_up"),
    "kohya": lambda p: spelled("lora_unet_{flat}.{part}.weight", p, "lora_down", "lora_up"),
    "LyCORIS": lambda p: spelled("lycoris_{flat}.{part}.weight", p, "lora_down", "lora_up"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings(spelling):
    """Linear layers and convolutions, whatever their tensors are called."""
    pairs = arrays(UNET)
    found, left_out = read(SPELLINGS[spelling](pairs))
    assert found.keys() == {"unet"}
    assert not left_out
    same(found["unet"], pairs)


@pytest.mark.parametrize("prefix", ["", "unet."])
def test_attention_processors_of_old_diffusers(prefix):
    pairs = arrays(UNET, ATTENTION)
    tensors = {prefix + name: array for name, array in old_processors(pairs).items()}
    same(read(tensors)[0]["unet"], pairs)


@pytest.mark.parametrize(
    ("spelling", "alpha"),
    [
        ("kohya", "lora_unet_{flat}.alpha"),
        ("dotted kohya", "unet.{name}.alpha"),
        ("down and up", "unet.{name}.alpha"),
        ("down and up", "unet.{name}.lora.alpha"),
        ("peft", "{name}.alpha"),
    ],
)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64])
def test_alpha_tensors(spelling, alpha, dtype):
    """kohya's scripts write integers where the alpha is one."""
    pairs = arrays(UNET)
    named = {alpha.format(name=name, flat=name.replace(".", "_")): np.array(6, dtype) for name in UNET}
    same(read(SPELLINGS[spelling](pairs) | named)[0]["unet"], pairs, scale=3.0)


def test_alpha_of_old_processors_and_of_some_layers_only():
    pairs = arrays(UNET, ATTENTION)
    stem = "down_blocks.0.attentions.0"
    alphas = {f"{stem}.processor.{name}_lora.alpha": np.float32(1) for name in ("to_q", "to_out", "add_k_proj")}
    same(read(old_processors(pairs) | alphas)[0]["unet"], pairs, scale=0.5)
    found, _ = read(SPELLINGS["kohya"](pairs) | {"lora_unet_down_blocks_0_attentions_0_to_q.alpha": np.float32(1)})
    assert [found["unet"][name].scale for name in ATTENTION] == [0.5, 1.0, 1.0]


def test_the_three_tensors_of_a_lycoris_convolution():
    rng = np.random.default_rng(0)
    down, mid, up = (rng.standard_normal(s).astype(np.float32) for s in ((2, 32, 1, 1), (2, 2, 3, 3), (32, 2, 1, 1)))
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = {f"{name}.lora_{part}.weight": a for part, a in (("down", down), ("mid", mid), ("up", up))}
    [change] = read(tensors | {f"{name}.alpha": np.float32(4)})[0]["unet"].values()
    # LyCORIS' rebuild_tucker: 'n m k l, i n, m j -> i j k l'
    expected = 2 * torch.einsum("nmkl,in,mj->ijkl", *map(torch.from_numpy, (mid, up[..., 0, 0], down[..., 0, 0])))
    np.testing.assert_allclose(change.delta(), expected.numpy().transpose(2, 3, 1, 0), rtol=1e-4, atol=1e-5)


def test_one_file_for_both_networks():
    pairs, others = arrays(UNET), arrays(PRIOR)
    tensors = SPELLINGS["diffusers"](pairs) | spelled("prior.{name}.{part}.weight", others, "lora_A", "lora_B")
    config = {"unet.r": 2, "unet.lora_alpha": 4, "prior.r": 2, "prior.lora_alpha": 1, "prior.use_rslora": True}
    found, left_out = read(tensors, config=config)
    same(found["unet"], pairs, scale=2.0)
    same(found["prior"], others, scale=1 / np.sqrt(2))
    assert not left_out
    found, left_out = read(tensors, {"prior": PRIOR}, config)
    same(found["prior"], others, scale=1 / np.sqrt(2))
    assert left_out == {"unet": len(UNET)}
    with pytest.raises(CheckpointError, match="is for a unet, and this pipeline has none"):
        read(SPELLINGS["diffusers"](pairs), {"prior": PRIOR})


def test_the_network_of_names_without_a_prefix():
    """Names tell; where both networks have them, shapes do."""
    same(read(SPELLINGS["peft"](arrays(PRIOR)))[0]["prior"], arrays(PRIOR))
    shared = ["time_embedding.linear_1"]
    assert read(SPELLINGS["peft"](arrays(UNET, shared)))[0].keys() == {"unet"}
    assert read(SPELLINGS["peft"](arrays(PRIOR, shared)))[0].keys() == {"prior"}
    with pytest.raises(CheckpointError, match=r"fits unet and prior alike; give its tensors names that begin with"):
        read(SPELLINGS["peft"](arrays(UNET, shared)), {"unet": UNET, "prior": UNET})


def test_names_with_underscores_that_fit_two_layers():
    layers = {"a.b_c": (4, 4), "a_b.c": (4, 4), "a.d": (4, 4)}
    with pytest.raises(CheckpointError, match="fit two layers of the unet each: a_b_c"):
        read(SPELLINGS["kohya"](arrays(layers, ["a.b_c"])), {"unet": layers})
    same(read(SPELLINGS["kohya"](arrays(layers, ["a.d"])), {"unet": layers})[0]["unet"], arrays(layers, ["a.d"]))


GOOD = SPELLINGS["peft"](arrays(UNET, LINEAR))
FIRST = "down_blocks.0.attentions.0.to_q"
A, B = f"{FIRST}.lora_A.weight", f"{FIRST}.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({f"{FIRST}.lora_magnitude_vector": np.ones(32)}, "uses DoRA, which is not supported, in 1 of its 9 tensors"),
        ({"lora_unet_conv_in.dora_scale": np.ones(32)}, "uses DoRA"),
        ({f"lora_unet_x.hada_w{i}_{ab}": np.ones((2, 2)) for i in (1, 2) for ab in "ab"}, "uses LoHa.* 4 of its 12"),
        ({"base_model.model.conv_in.hada_w1_a": np.ones((2, 2))}, "uses LoHa"),
        ({"x.lokr_w1": np.ones((2, 2)), "x.lokr_w2": np.ones((2, 2))}, "uses LoKr"),
        ({f"{FIRST}.oft_R.weight": np.ones((2, 2))}, "uses OFT"),
        ({"lora_unet_x.oft_blocks": np.ones((2, 2))}, "uses OFT"),
        ({f"base_model.model.{FIRST}.ia3_l": np.ones(32)}, "uses IA3"),
        ({f"{FIRST}.lora_E": np.ones(2)}, "uses AdaLoRA"),
        ({f"{FIRST}.lora_B.bias": np.ones(32)}, "uses LoRA with a bias"),
        ({"x.lora_embedding_A": np.ones((2, 2))}, "uses LoRA of an embedding"),
        ({"lora_unet_conv_in.diff": np.ones((2, 2))}, "uses a change of full rank"),
        ({"text_encoder.text_model.x.lora_A.weight": np.ones((2, 2))}, "changes a text encoder, which is not supp"),
        ({"lora_te_text_model_x.lora_down.weight": np.ones((2, 2))}, "changes a text encoder"),
        ({"lora_te1_x.alpha": np.ones(())}, "changes a text encoder"),
        ({f"{FIRST}.base_layer.weight": np.ones((32, 32))}, "holds 1 tensors of 9 that are not LoRA tensors"),
        ({B: None}, "lacks the up tensor of down_blocks.0.attentions.0.to_q"),
        ({A: None, f"{FIRST}.alpha": np.ones(())}, "lacks the down tensor"),
        ({A: np.ones((2, 31))}, r"does not fit .*to_q, whose weight is \[32, 32\]: its down is \[2, 31\]"),
        ({A: np.ones((3, 32))}, "does not fit"),
        ({A: np.ones((0, 32)), B: np.ones((32, 0))}, "does not fit"),
        ({A: np.ones(())}, "does not fit"),
        ({A: np.ones((2, 32, 1, 1))}, "does not fit"),
        ({A: np.full((2, 32), np.nan)}, "is not finite in down_blocks.0.attentions.0.to_q.lora_A.weight"),
        ({A: np.full((2, 32), 1e300)}, "is not finite"),
        ({A: np.ones((2, 32), np.int32)}, "in int32, needed is a floating-point dtype"),
        ({A: np.ones((2, 32), bool)}, "in bool, needed"),
        ({A: np.ones((2, 32), np.complex64)}, "in complex64, needed"),
        ({f"{FIRST}.alpha": np.float32("nan")}, "alpha at .*to_q = nan, needed is a finite number"),
        ({f"{FIRST}.alpha": np.ones(3)}, r"an alpha of shape \[3\]"),
        ({f"{FIRST}.alpha": np.ones((), np.complex64)}, "alpha that cannot be read|needed is a finite number"),
        (
            {"nowhere.lora_A.weight": np.ones((2, 2)), "nowhere.lora_B.weight": np.ones((2, 2))},
            "unet does not have: nowhere",
        ),
        ({f"module.{A}": np.ones((2, 32))}, "two tensors for one thing"),
        ({f"{FIRST}.lora_A.one.weight": GOOD[A], A: None}, "holds 2 adapters, needed is one"),
        ({f"unet.{A}": GOOD[A], f"unet.{B}": GOOD[B]}, "holds 1 layers twice"),
        (dict.fromkeys(GOOD), "holds no tensors"),
    ],
)
def test_one_short_sentence(tmp_path, tensors, says):
    path = tmp_path / FILE
    save_file({name: np.asarray(a) for name, a in (GOOD | tensors).items() if a is not None}, path)
    with pytest.raises(CheckpointError, match=says) as caught:
        lora_files.read(lora_files.open_file(path), NETWORKS)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500


def test_files_for_other_models_are_named_shortly():
    """Of Stable Diffusion, say: hundreds of names are not listed."""
    names = [f"lora_unet_input_blocks_{i}_{j}_transformer_blocks_0_attn1_to_q" for i in range(9) for j in range(40)]
    tensors = {f"{n}.lora_{part}.weight": np.ones((2, 2)) for n in names for part in ("down", "up")}
    with pytest.raises(CheckpointError, match=r"has 360 of 360 layers that the unet does not have") as caught:
        read(tensors)
    assert len(str(caught.value)) < 400
    other = {name.replace("lora_unet", "lycoris"): array for name, array in tensors.items()}
    with pytest.raises(CheckpointError, match=r"for another network: none of its 360 layers") as caught:
        read(other)
    assert len(str(caught.value)) < 400


def test_strength_given_twice():
    alphas = {f"{name}.alpha": np.float32(1) for name in LINEAR}
    with pytest.raises(CheckpointError, match="says twice how strong it is"):
        read(GOOD | alphas, config={"r": 2, "lora_alpha": 2})


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", "[" * 9999, '{"r": ' + "9" * 5000 + "}", '{"r": 2, "lora_alpha": NaN}', '{"r": 2.5}']
)
def test_damaged_configurations_in_the_header(tmp_path, text):
    path = tmp_path / FILE
    save_file(GOOD, path, {lora_files.METADATA: text})
    with pytest.raises(CheckpointError) as caught:
        lora_files.read(lora_files.open_file(path), NETWORKS)
    assert str(caught.value).startswith(str(path))
    assert len(str(caught.value)) < 500


# Folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ([FILE], FILE),
        (["pytorch_lora_weights.bin"], "pytorch_lora_weights.bin"),
        (["pytorch_lora_weights.bin", FILE, "optimizer.bin", "scheduler.bin", "random_states_0.pkl"], FILE),
        (["adapter_config.json", "adapter_model.safetensors", "README.md"], "adapter_model.safetensors"),
        (["adapter_config.json", "adapter_model.bin"], "adapter_model.bin"),
        (["model.safetensors", "optimizer.bin", "scheduler.bin", "scaler.pt"], "model.safetensors"),
        (["pytorch_model.bin", "optimizer.bin"], "pytorch_model.bin"),
        (["my-style.safetensors", "preview.png"], "my-style.safetensors"),
        ([f"checkpoint-500/{FILE}", FILE], FILE),
        ([f"model/{FILE}", "metrics.jsonl", "checkpoints/6/_METADATA"], f"model/{FILE}"),
    ],
)
def test_which_file_of_a_folder_is_read(tmp_path, held, expected):
    for name in held:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert lora_files.find(tmp_path) == tmp_path / expected


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ([], "holds no LoRA file: looked for pytorch_lora_weights.safetensors"),
        (["optimizer.bin", "scheduler.bin"], "holds no LoRA file"),
        (["a.safetensors", "b.safetensors", "c.bin"], "2 files that could be meant.*a.safetensors.*give weight_name="),
        ([f"checkpoint-{i}/{FILE}" for i in (500, 1000, 90)], "give one of them, such as checkpoint-1000"),
    ],
)
def test_folders_that_are_not_clear(tmp_path, held, says):
    for name in held:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=says) as caught:
        lora_files.find(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))


def test_a_file_by_its_name(tmp_path):
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert lora_files.find(tmp_path, "b.safetensors") == tmp_path / "b.safetensors"
    for path, name in ((tmp_path, "c.safetensors"), (tmp_path / "d", None), (tmp_path / "x\0y", None)):
        with pytest.raises(CheckpointError, match=r"not there|cannot be read"):
            lora_files.find(path, name)


def test_only_the_configuration_of_peft_files_counts(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 6, "peft_type": "LORA"}))
    for name, scale in (("adapter_model.safetensors", 3.0), (FILE, 1.0)):
        save_file(GOOD, tmp_path / name)
        found, _ = lora_files.read(lora_files.open_file(tmp_path / name), NETWORKS)
        assert {change.scale for change in found["unet"].values()} == {scale}
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is not JSON"):
        lora_files.open_file(tmp_path / "adapter_model.safetensors")


def test_pickles_that_hold_more_than_tensors_are_refused(tmp_path):
    path = tmp_path / "pytorch_lora_weights.bin"
    torch.save({"a": print}, path)
    with pytest.raises(CheckpointError, match="more than tensors"):
        lora_files.open_file(path)
    torch.save({name: torch.from_numpy(array) for name, array in GOOD.items()}, path)
    same(lora_files.read(lora_files.open_file(path), NETWORKS)[0]["unet"], arrays(UNET, LINEAR))


def test_a_written_file_has_the_same_bytes_in_every_process(tmp_path):
    """The safetensors library orders the header's metadata by a hash that differs from process to process."""
    change = LayerChange(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), scale=0.5)
    path = lora_files.write(tmp_path, {"unet": {"mid_block.attentions.0.to_q": change}})
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")], object_pairs_hook=list)
    assert [name for name, _ in dict(header)["__metadata__"]] == ["format", lora_files.METADATA]
