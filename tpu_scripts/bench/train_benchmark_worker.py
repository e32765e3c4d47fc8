"""One side of `train_benchmark.py` in a process of its own: loads, makes its first step, then steps when it is told to.

Not for use by hand. A line of JSON comes in, a line goes out: first the job, then seconds to train for, as often as the
other side likes; between the lines the process does nothing. Whoever closes the standard input ends it.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from benchmark_worker import OURS, peak_gb

PRIOR, DECODER = "kandinsky-2-2-prior", "kandinsky-2-2-decoder"
BATCHES = 4  # different ones, again and again
CAPTIONS = (  # 3 to 17 tokens of the small model's tokenizer, 3 to 12 of CLIP's
    "a red circle on a white background",
    "an oil painting of a lighthouse in a storm",
    "star",
    "a small town in winter, snow on the roofs",
)
# The layers that the reference's LoRA scripts change.
TARGETS = {
    "decoder": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
    "prior": ["to_q", "to_k", "to_v", "to_out.0"],
}
Arrays = dict[str, np.ndarray]
Step = Callable[[], float]  # trains on the next batch; the loss


class Job(NamedTuple):
    """What to measure; `train_benchmark.py` writes it as JSON."""

    side: str
    kind: str  # prior, decoder, lora-prior, lora-decoder
    encoding: bool  # the frozen networks in front of every step, as the scripts have them
    models: str  # a folder with both repositories
    batch: int
    size: int
    ema: float | None
    snr_gamma: float | None
    rank: int
    padded: bool = False  # ours with all rows of text, as theirs
    device: str = "cpu"  # or cuda
    dtype: str = "float32"  # that the networks compute in; trained weights are float32

    @property
    def network(self) -> str:
        return self.kind.removeprefix("lora-")

    @property
    def lora(self) -> bool:
        return self.kind.startswith("lora-")


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def batches(job: Job, tokenizer: Any, length: int) -> list[Arrays]:
    """What a reader makes of captioned pictures, the same for both sides; pictures are `[B, H, W, C]`."""
    folder = Path(job.models) / PRIOR / "image_encoder" / "config.json"
    side = json.loads(folder.read_text())["image_size"]
    rng, found = np.random.default_rng(0), []
    for i in range(BATCHES):
        texts = [CAPTIONS[(i + j) % len(CAPTIONS)] for j in range(job.batch)]
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="np")
        found.append(
            {
                "pixels": rng.integers(0, 256, (job.batch, job.size, job.size, 3), np.uint8),
                "clip_pixels": rng.standard_normal((job.batch, side, side, 3), np.float32),
                "input_ids": tokens.input_ids.astype(np.int32),
                "text_mask": tokens.attention_mask.astype(bool),
            }
        )
    return found


def our_step(job: Job) -> Step:
    """What the loop does with a batch of its reader."""
    import jax

    from kandinsky_jax import KandinskyV22CombinedPipeline
    from kandinsky_jax.lora import LoraConfig
    from kandinsky_jax.training.config import Config
    from kandinsky_jax.training.data import without_padding
    from kandinsky_jax.training.kinds import Kind
    from kandinsky_jax.training.step import OptimizerConfig, Trainer
    from kandinsky_jax.training.tasks import make_task

    root = Path(job.models)
    pipe = KandinskyV22CombinedPipeline.from_pretrained(root / DECODER, prior=root / PRIOR, dtype="float32")
    optimizer = OptimizerConfig(ema_decay=job.ema, dtype=job.dtype)
    lora = LoraConfig(rank=job.rank)
    config = Config(model="", data="", output="", snr_gamma=job.snr_gamma, lora=lora, optimizer=optimizer)
    task = make_task(Kind(job.kind), config, pipe)
    trainer = Trainer(task.loss(), optimizer, task.frozen(), draw=task.draw())
    key = jax.random.key(0)
    state = trainer.init(task.initial(key))
    length = pipe.prior_text_encoder.config.max_position_embeddings
    data = batches(job, pipe.prior_tokenizer, length)
    if not job.padded:
        data = [without_padding(batch) for batch in data]
    given = itertools.cycle(data if job.encoding else [task.encode(batch) for batch in data])

    def step() -> float:
        nonlocal state
        batch = next(given)
        state, metrics = trainer.step(state, task.encode(batch) if job.encoding else batch, key)
        return {name: float(value) for name, value in metrics.items()}["loss"]

    return step


def their_step(job: Job) -> Step:
    """What the reference's scripts do with a batch of their loader, on one device, without accelerate.

    In bfloat16 as their scripts' mixed precision: frozen networks are cast, and the trained one runs under autocast.
    """
    import diffusers
    import torch
    import transformers
    from diffusers.training_utils import EMAModel, compute_snr

    torch.set_num_threads(cores())
    torch.manual_seed(0)
    root = Path(job.models)
    load = {"torch_dtype": torch.float32}
    of_prior = job.network == "prior"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(root / PRIOR / "tokenizer")
    vision = transformers.CLIPVisionModelWithProjection.from_pretrained(root / PRIOR / "image_encoder", **load)
    frozen: list[Any] = [vision]
    if of_prior:
        text = transformers.CLIPTextModelWithProjection.from_pretrained(root / PRIOR / "text_encoder", **load)
        frozen.append(text)
        length = text.config.max_position_embeddings
        network: Any = diffusers.PriorTransformer.from_pretrained(root / PRIOR / "prior", **load)
        scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    else:
        movq = diffusers.VQModel.from_pretrained(root / DECODER / "movq", **load)
        frozen.append(movq)
        length = 77
        network = diffusers.UNet2DConditionModel.from_pretrained(root / DECODER / "unet", **load)
        scheduler = diffusers.DDPMScheduler.from_pretrained(root / DECODER / "scheduler")
    for part in frozen:
        part.requires_grad_(False).eval().to(job.device, getattr(torch, job.dtype))
    network.to(job.device)
    if job.lora:
        import peft

        network.requires_grad_(False)
        targets = TARGETS[job.network]
        network.add_adapter(
            peft.LoraConfig(r=job.rank, lora_alpha=job.rank, target_modules=targets, init_lora_weights="gaussian")
        )
    network.train()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    average = None if job.ema is None else EMAModel(trained, decay=job.ema)

    def tensors(batch: Arrays) -> dict[str, Any]:
        """As the scripts' loaders hand them over."""
        nchw = lambda array: torch.from_numpy(array.transpose(0, 3, 1, 2)).float().contiguous()  # noqa: E731
        pixels = nchw(batch["pixels"].astype(np.float32) / 127.5 - 1).to(dtype=getattr(torch, job.dtype))
        clip_pixels = nchw(batch["clip_pixels"]).to(dtype=getattr(torch, job.dtype))
        ids, mask = torch.from_numpy(batch["input_ids"]).long(), torch.from_numpy(batch["text_mask"])
        found = {"pixels": pixels, "clip_pixels": clip_pixels, "input_ids": ids, "text_mask": mask}
        return {name: tensor.to(job.device) for name, tensor in found.items()}

    def encode(batch: dict[str, Any]) -> dict[str, Any]:
        with torch.no_grad():
            found = {"image_embeds": vision(batch["clip_pixels"]).image_embeds}
            if not of_prior:
                return found | {"latents": movq.encode(batch["pixels"]).latents}
            output = text(batch["input_ids"])
            told = {"prompt_embeds": output.text_embeds, "hidden_states": output.last_hidden_state}
            return found | told | {"text_mask": batch["text_mask"]}

    def prediction(batch: dict[str, Any]) -> tuple[Any, Any, Any]:
        """Predicted, wanted, timesteps."""
        embeds = batch["image_embeds"]
        timesteps = torch.randint(0, scheduler.config.num_train_timesteps, (len(embeds),), device=job.device)
        if not of_prior:
            noise = torch.randn_like(batch["latents"])
            noisy = scheduler.add_noise(batch["latents"], noise, timesteps)
            output = network(noisy, timesteps, None, added_cond_kwargs={"image_embeds": embeds}).sample
            return output[:, :4], noise, timesteps
        clean = (embeds - network.clip_mean.detach()) / network.clip_std.detach()
        output = network(
            scheduler.add_noise(clean, torch.randn_like(clean), timesteps),
            timestep=timesteps,
            proj_embedding=batch["prompt_embeds"],
            encoder_hidden_states=batch["hidden_states"],
            attention_mask=batch["text_mask"],
        )
        return output.predicted_image_embedding, clean, timesteps

    def loss_of(batch: dict[str, Any]) -> Any:
        predicted, wanted, timesteps = prediction(batch)
        if job.snr_gamma is None:
            return torch.nn.functional.mse_loss(predicted.float(), wanted.float())
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, job.snr_gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        if scheduler.config.prediction_type == "epsilon":
            weights = weights / snr
        error = torch.nn.functional.mse_loss(predicted.float(), wanted.float(), reduction="none")
        return (error.mean(dim=list(range(1, error.ndim))) * weights).mean()

    data = [tensors(batch) for batch in batches(job, tokenizer, length)]
    given = itertools.cycle(data if job.encoding else [encode(batch) for batch in data])

    def step() -> float:
        batch = next(given)
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bfloat16"):
            loss = loss_of(encode(batch) if job.encoding else batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.step(trained)
        return loss.item()

    return step


def timed(step: Step, seconds: float) -> dict[str, Any]:
    """Train for so long, at least for one step."""
    began, count, losses = time.perf_counter(), 0, 0.0
    while (taken := time.perf_counter() - began) < seconds or not count:
        losses, count = losses + step(), count + 1
    return {"steps": count, "seconds": taken, "loss": losses / count}


def main() -> None:
    """Obey the lines of standard input."""
    answers = os.fdopen(os.dup(1), "w")  # for answers alone: what libraries print goes elsewhere
    os.dup2(2, 1)

    def say(answer: dict[str, Any]) -> None:
        print(json.dumps(answer), file=answers, flush=True)

    began = time.perf_counter()
    job = Job(**json.loads(sys.stdin.readline()))
    step = (our_step if job.side == OURS else their_step)(job)
    loaded = time.perf_counter()
    step()
    first = time.perf_counter()
    timed(step, 0.5)  # pools of threads and memory have been made
    say({"load_s": loaded - began, "first_step_s": first - loaded})
    for line in sys.stdin:
        found = timed(step, json.loads(line)["seconds"])
        say(found | {"peak_gb": peak_gb(job.device, ours=job.side == OURS)})


if __name__ == "__main__":
    main()
