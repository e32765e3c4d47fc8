"""The comparison of few evaluations with the usual call: its arithmetic and its files; times are not tested."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kandinsky_jax.checkpoint import flat_params, hub
from tpu_scripts.bench import few_steps, random_models

SCRIPT = Path(__file__).parents[2] / "tpu_scripts" / "bench" / "few_steps.py"
SECONDS = {few_steps.USUAL: [10.0, 12.0, 9.0], few_steps.FEW: [1.0, 2.0, 0.5]}


def test_ratios_are_of_pairs():
    found = few_steps.summary(SECONDS)
    assert (found["usual_s"], found["few_s"], found["pairs"]) == (10, 1, 3)
    assert (found["smallest"], found["times_faster"], found["largest"]) == (6, 10, 18)


def test_rows_replace_only_those_of_the_same_measurement(tmp_path):
    target = tmp_path / "found" / "few-steps.json"
    row = {
        "model": "tiny",
        "size": 64,
        "batch": 1,
        "dtype": "float32",
        "by_stage_s": {few_steps.FEW: dict.fromkeys(("prior", "decoder", "movq"), 0.25)},
    }
    row |= few_steps.summary(SECONDS)
    few_steps.add(target, {"date": "today"}, row)
    few_steps.add(target, {"date": "today"}, row | {"batch": 8})
    rows = few_steps.add(target, {"date": "today"}, row | {"few_s": 3.0})
    assert [(one["batch"], one["few_s"]) for one in rows] == [(8, 1.0), (1, 3.0)]
    assert json.loads(target.read_text()) == {"date": "today", "rows": rows}
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert "| tiny | 64 | 8 | float32 | 10.000 | 1.000 | 0.250 + 0.250 + 0.250 | 10.0 | 6.0 to 18.0 | 3 |" in (
        few_steps.table(rows)
    )


def test_a_call_has_the_steps_and_guidance_of_its_kind():
    asked = []

    class Pipe:
        scheduler = few_steps.KandinskyV22CombinedPipeline.from_pretrained("tiny").scheduler

        def __call__(self, prompts, **options):
            asked.append((type(self.scheduler).__name__, len(prompts), options))

    calls = few_steps.Calls(Pipe(), 64, 2)
    calls(few_steps.FEW)
    calls(few_steps.USUAL)
    assert [one[:2] for one in asked] == [("LCMScheduler", 2), ("DDPMScheduler", 2)]
    names = ("prior_num_inference_steps", "num_inference_steps", "prior_guidance_scale", "guidance_scale")
    assert [[one[2][name] for name in names] for one in asked] == [[4, 4, 1, 1], [25, 50, 4, 4]]


def test_defaults_depend_on_the_model(capsys):
    assert few_steps.parse(["--model", "official"]).size == 512
    assert few_steps.parse([]).batch == [1, 8]
    with pytest.raises(SystemExit):
        few_steps.parse(["--size", "100"])
    assert "--size must be a multiple of 64, got 100" in capsys.readouterr().err


def test_random_network_in_memory():
    """In the official shapes, with the spread of the written files: the kernel's 27 inputs are no first axis here."""
    network = random_models.network(hub.DECODER, "movq", "bfloat16")
    params = flat_params(network)
    assert {str(value.dtype) for value in params.values()} == {"bfloat16"}
    kernel = np.asarray(params["encoder.conv_in.kernel"], np.float32)
    assert kernel.shape == (3, 3, 3, 128)
    assert kernel.std() == pytest.approx(2.4 / (12 * 27) ** 0.5, rel=0.05)


def test_help_has_an_example():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=False)
    assert "python tpu_scripts/bench/few_steps.py --model tiny" in done.stdout
