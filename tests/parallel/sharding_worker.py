"""Pictures generated on eight simulated devices; run by test_sharding.py in a process that writes an .npz file.

python -m tests.parallel.sharding_worker OUT.npz
"""

from __future__ import annotations

import os
import sys
import tempfile

from tests.xla_flags import devices

os.environ["XLA_FLAGS"] = devices(8)

import numpy as np
from jax.sharding import PartitionSpec
from PIL import Image

import kandinsky_jax as kj
from kandinsky_jax.checkpoint import flat_params
from kandinsky_jax.parallel.mesh import make_mesh
from kandinsky_jax.parallel.sharding import rules_by_size
from tests.conftest import SHAPES_MODEL
from tests.pipelines.test_compile import compilations

PROMPTS = [
    "a red circle on a blue background",
    "a green star on a white background",
    "a large yellow ring on a black background",
    "an orange square on a purple background",
    "a blue cross on a yellow background",
    "a white triangle on a red background",
    "a small pink circle on a green background",
    "a purple star on an orange background",
]
SIZE = {"height": 64, "width": 64, "num_inference_steps": 6, "output_type": "np"}
CALL = SIZE | {"prior_num_inference_steps": 4}
PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
MASK = np.zeros((64, 64), bool)
MASK[16:40, 16:40] = True


def pipeline(mesh, name: str = "", **options):
    """A combined pipeline of the small model on a mesh."""
    cls = getattr(kj, f"KandinskyV22{name}CombinedPipeline")
    pipe = cls.from_pretrained(SHAPES_MODEL, dtype="float32", mesh=mesh, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe, count: int = 8, first: int = 0, **extra) -> np.ndarray:
    """Generate pictures of some prompts, each with its own seed."""
    prompts = PROMPTS[first : first + count]
    return pipe(prompts, generator=list(range(first, first + count)), **CALL | extra).images


def over_data(found: dict[str, np.ndarray]) -> None:
    """Shard the batch, as by default."""
    one, default = pipeline(None), pipeline(None)
    one.shard(None)
    assert next(iter(flat_params(default.unet).values())).sharding.mesh.shape == {"data": 8, "guidance": 1, "rows": 1}
    found["alone"] = np.concatenate([generate(one, 1, i) for i in range(8)])
    found["data"] = generate(default)
    with compilations() as events:
        generate(default, num_inference_steps=9, guidance_scale=2.0, prior_guidance_scale=3.0)
    assert not events
    found["uneven"] = generate(default, 3)


def further_over_data(found: dict[str, np.ndarray]) -> None:
    """Other programs, other modes."""
    one, default = pipeline(None), pipeline(None)
    one.shard(None)
    default.warmup(height=64, width=64, batch=8)
    with compilations() as events:
        default(PROMPTS, generator=0, **CALL)
    assert not events
    seen = []

    def callback(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].shape)
        return {"latents": tensors["latents"] * np.float32(1)} if step == 2 else tensors

    found["callback"] = generate(default, 3, callback_on_step_end=callback)
    assert seen == [(3, 4, 8, 8)] * 6
    found["batch"] = generate(one)
    found["unguided"], found["unguided alone"] = (
        generate(p, n, guidance_scale=1.0) for p, n in ((default, 8), (one, 1))
    )
    negative = {"negative_prompt": "a red square"}
    found["negative"], found["negative alone"] = (generate(p, n, **negative) for p, n in ((default, 8), (one, 1)))
    found["torch"] = default(PROMPTS, **CALL, generator=[kj.TorchGenerator(i) for i in range(8)]).images
    found["torch alone"] = one(PROMPTS[0], **CALL, generator=kj.TorchGenerator(0)).images
    modes = {
        "Img2Img": {"image": PICTURE, "strength": 0.7},
        "Inpaint": {"image": PICTURE, "mask_image": MASK},
        "Controlnet": {"hint": MASK * 1.0},
    }
    for name, extra in modes.items():
        pipe = pipeline(None, name)
        found[name] = generate(pipe, 3, **extra)
        pipe.shard(None)
        found[f"{name} alone"] = np.concatenate([generate(pipe, 1, i, **extra) for i in range(3)])


def other_meshes(found: dict[str, np.ndarray]) -> None:
    """Shard guidance, rows of pictures, and parameters."""
    for shape in ((1, 2, 1), (4, 2, 1), (1, 1, 8), (1, 2, 4), (2, 2, 2)):
        found[f"mesh {shape}"] = generate(pipeline(make_mesh(*shape)))
    mesh = make_mesh(1, 1, 8)
    shapes = {name: leaf.shape for name, leaf in flat_params(pipeline(mesh).unet).items()}
    pipe = pipeline(mesh, shard_rules=rules_by_size(mesh, shapes, least=1 << 10))
    leaves = flat_params(pipe.unet).values()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    found["share"] = np.array(held / sum(leaf.nbytes for leaf in leaves))
    found["sharded"] = generate(pipe, 1)


def cached_features(found: dict[str, np.ndarray]) -> None:
    """Keep features of the UNet; each device keeps those of what it evaluates."""
    one = pipeline(None)
    one.shard(None)
    call = {"cache_interval": 3, "guidance_interval": (0.2, 1.0)}
    found["cached alone"] = np.concatenate([generate(one, 1, i, **call) for i in range(2)])
    found["cached batch"] = generate(one, **call)
    found["not cached"] = generate(one, guidance_interval=(0.2, 1.0))
    for shape in ((8, 1, 1), (2, 2, 2)):
        pipe = pipeline(make_mesh(*shape))
        found[f"cached {shape}"] = generate(pipe, **call)
        with compilations() as events:
            generate(pipe, **call | {"cache_interval": 2})
        assert not events
    found["cached uneven"] = generate(pipe, 3, **call)


def guiders(found: dict[str, np.ndarray]) -> None:
    """A guider with a memory, whose evaluations are exchanged, and two that are done whole on every device."""
    one = pipeline(None)
    one.shard(None)
    weak = os.path.join(tempfile.mkdtemp(), "unet")
    noisy = kj.UNet2DConditionModel.from_pretrained(SHAPES_MODEL / "kandinsky-2-2-decoder", subfolder="unet")
    noisy.conv_out.kernel[...] *= 0.8
    noisy.save_pretrained(weak)
    calls = {
        "apg": {"guider": "apg:eta=0.3", "prior_guider": "apg", "cache_interval": 2},
        "pag": {"guider": r"pag:layers=down_blocks\..*,perturbed_scale=2", "prior_guider": "rescaled-cfg"},
        "autoguidance": {"guider": f"autoguidance:model={weak}", "prior_guider": "cfg++:scale=0.4"},
    }
    for name, call in calls.items():
        found[name] = generate(one, **call)
        for shape in ((8, 1, 1), (2, 2, 2)):
            found[f"{name} {shape}"] = generate(pipeline(make_mesh(*shape)), **call)


def quantized(found: dict[str, np.ndarray]) -> None:
    """Calibrate on a mesh, and generate with the same networks on others."""
    pipe = pipeline(None)
    pipe.quantize(prompts=PROMPTS, num_inference_steps=3, prior_num_inference_steps=2)
    layer = pipe.unet.down_blocks[0].resnets[0].conv1
    assert layer.kernel[...].sharding.mesh.shape["data"] == layer.input_scale[...].sharding.mesh.shape["data"] == 8
    found["data"] = generate(pipe)
    pipe.shard(None)
    found["alone"] = np.concatenate([generate(pipe, 1, i) for i in range(3)])
    found["batch"] = generate(pipe)
    pipe.shard(make_mesh(2, 2, 2), [("attentions.*to_q", PartitionSpec("rows"))])
    found["mesh"] = generate(pipe)


def main() -> None:
    """One part of the cases, or several."""
    found: dict[str, np.ndarray] = {}
    for part in sys.argv[2:]:
        globals()[part](found)
    np.savez(sys.argv[1], **found)


if __name__ == "__main__":
    main()
