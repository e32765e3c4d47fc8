"""The benchmark runs, keeps what it has measured whatever fails, and says what it could not measure."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tpu_scripts" / "bench" / "benchmark.py"
sys.path.insert(0, str(SCRIPT.parent))

import benchmark  # noqa: E402
import benchmark_table  # noqa: E402
import kernel_times  # noqa: E402
import random_models  # noqa: E402
from benchmark_worker import OPENVINO, OURS, PROMPTS, THEIRS, Job  # noqa: E402
from worker_process import WorkerFailed, WorkerProcess, WorkerTimeout  # noqa: E402

from kandinsky_jax.checkpoint import hub  # noqa: E402
from kandinsky_jax.checkpoint.tokenizer import check_tokenizer, load_tokenizer, tokenize  # noqa: E402
from kandinsky_jax.models.clip import CLIPTextConfig  # noqa: E402

JOB = Job(
    side=OURS,
    stage="unet",
    models="tiny",
    batch=2,
    size=512,
    steps=50,
    repeats=1,
    dtype="bfloat16",
    device="cuda",
    prior_steps=25,
    each_step=False,
    resident=True,
)


def process(seconds: list[float], peak: float | None) -> dict:
    """What a worker answers, on a GPU."""
    calls = [{"seconds": s, "steps": [], "prior_steps": []} for s in seconds]
    return {"load_s": 1.0, "warm_up_s": 2.0, "calls": calls, "peak_gb": peak, "matmul_tflops": 700.0}


@pytest.mark.slow
def test_it_runs_on_the_small_model(tmp_path):
    small = "--models tiny --size 64 --steps 2 --prior-steps 2 --stages text2img profile --repeats 1 --rounds 1".split()
    command = [sys.executable, str(SCRIPT), *small, "--output", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["missed"]
    sides = {(row["what"], row["side"]) for row in found["rows"]}
    assert {what for what, side in sides if side == "ours"} == {what for what, side in sides if side == "diffusers"}
    assert all(row["seconds"] > 0 and row["peak_gb"] > 0 for row in found["rows"])
    [profile] = found["kernels"]
    assert sum(kernel["share"] for kernel in profile["kernels"]) == pytest.approx(1, abs=0.05)
    assert (tmp_path / "found.png").stat().st_size > 1000
    text = (tmp_path / "found.md").read_text()
    assert "text2img, 25 + 50 steps" in text
    assert f"| {profile['kernels'][0]['kernel'][:80]} |" in text


@pytest.mark.campaign
def test_the_side_of_openvino_makes_the_same_picture(tmp_path):
    """Each side in a process of its own, as in the benchmark: OpenVINO's forks, and JAX warns of that."""
    job = JOB._replace(
        stage="parity",
        size=64,
        steps=4,
        prior_steps=4,
        dtype="float32",
        device="cpu",
        folder=str(tmp_path),
    )
    arrays = []
    for side in (OPENVINO, THEIRS):
        worker = WorkerProcess(side, benchmark.WORKER, {"OPENVINO_PROGRAMS": str(tmp_path / "programs")})
        arrays.append(Path(worker.ask(job._replace(side=side)._asdict(), 300)["arrays"]))
        worker.close()
    differences = benchmark_table.differences(*arrays)
    assert max(differences.values()) < 0.05, differences  # of the spread, and of 255
    kept = [path.name.partition("-")[0] for path in (tmp_path / "programs").glob("*.xml")]
    assert sorted(kept) == ["image_encoder", "movq", "prior", "text_encoder", "unet"]  # one program of each


def test_the_tokenizer_of_random_models_fits_the_official_text_tower(tmp_path):
    shutil.copytree(hub.EMBEDDED["tiny"] / hub.PRIOR / "tokenizer", tmp_path, dirs_exist_ok=True)
    tower = random_models.OFFICIAL / hub.PRIOR / "text_encoder" / "config.json"
    random_models._enlarge_vocabulary(tmp_path / "tokenizer.json", tower, PROMPTS)
    tokenizer = load_tokenizer(tmp_path)
    check_tokenizer(tokenizer, CLIPTextConfig.from_dict(json.loads(tower.read_text()), str(tower)))
    ids, mask = tokenize(tokenizer, list(PROMPTS), 77)
    assert mask.sum(axis=1).tolist() == [8, 19, 14, 21]  # by the official vocabulary 8, 19, 14, 22
    assert (ids[:, 0] == 49406).all()
    assert (ids[~mask] == 49407).all()


@pytest.mark.slow
def test_help_has_an_example():
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, check=True)
    assert "python tpu_scripts/bench/benchmark.py --models tiny" in done.stdout


def test_what_is_given_counts_more_than_the_run():
    arguments = benchmark.parse(["--run", "2", "--batch", "4"])
    assert arguments.sides == benchmark.RUNS[2]["sides"]
    assert arguments.batch == [4]


def test_ours_stands_beside_each_other_side():
    """Every side of a run is measured against ours, sizes and batches rising."""
    options = ["--run", "2", "--batch", "16", "1", "--size", "768", "512"]
    planned = benchmark.plan(benchmark.parse(options), JOB)
    pairs = [[tuple(job.side for job in turn) for turn in turns] for turns in planned]
    assert pairs == [[(OURS, side)] * 12 for side in benchmark.COMPILED]
    unet = [(turn[0].size, turn[0].batch) for turns in planned for turn in turns if turn[0].stage == "unet"]
    assert unet == [(512, 1), (512, 16), (768, 1), (768, 16)] * len(pairs)


# Answers at once, and the reference's side fails, but not before our row is on disk.
WORKER = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    if job["side"] == "ours":
        print(json.dumps(json.loads({answer!r})), flush=True)
    else:
        kept = json.load(open({found!r}))["rows"][0]["seconds"]
        print(json.dumps({{"error": f"Traceback\\nOutOfMemoryError, with {{kept}} s kept"}}), flush=True)
"""


def test_a_row_is_on_disk_when_it_is_measured_and_failures_are_named(tmp_path):
    worker = tmp_path / "worker.py"
    answer, found = json.dumps(process([5.0], 8.0)), str(tmp_path / "found.json")
    worker.write_text(WORKER.format(answer=answer, found=found))
    limits = {"minutes": 5, "job_minutes": 5}
    bench = benchmark.Bench(tmp_path / "found", {}, tmp_path, resident=True, worker=worker, **limits)
    bench.steady([JOB, JOB._replace(side=THEIRS)], 2, benchmark.tqdm(disable=True))
    bench.close()
    text = benchmark_table.report(bench.found)
    assert "| UNet, 50 steps | 2 | 512 | 5 (5 to 5, 2 samples) | 8.0 |" in text
    assert "Not measured: diffusers, unet, bfloat16, batch 2, 512: OutOfMemoryError, with 5.0 s kept" in text


def test_no_time_left_is_said_and_starts_nothing(tmp_path):
    bench = benchmark.Bench(tmp_path / "found", {}, tmp_path, resident=True, minutes=0, job_minutes=1)
    assert bench.ask(JOB) is None
    assert bench.found["missed"][0]["why"] == "no time was left"
    assert not (tmp_path / "found.log").exists()


def test_a_job_that_fails_leaves_the_process_to_the_next(tmp_path):
    """A real worker, asked for a model that does not exist, twice."""
    bench = benchmark.Bench(tmp_path / "found", {}, tmp_path, resident=True, minutes=5, job_minutes=5)
    job = JOB._replace(models=str(tmp_path / "nothing"), device="cpu", dtype="float32")
    for _ in range(2):
        assert bench.ask(job) is None
        assert set(bench._workers) == {OURS}
    bench.close()
    [missed] = bench.found["missed"]
    assert "nothing" in missed["why"]


@pytest.mark.slow
def test_a_process_that_does_not_answer_or_dies(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        "import sys, time\nif 'wait' in input():\n    time.sleep(60)\nsys.exit('worker: out of memory')\n"
    )
    for question, error, message in (("wait", WorkerTimeout, "no answer in"), ("die", WorkerFailed, "out of memory")):
        worker = WorkerProcess("one", script)
        with pytest.raises(error, match=message):
            worker.ask({"question": question}, timeout=1 if question == "wait" else 60)
        worker.close()


def test_samples_of_all_turns_make_one_row():
    rows = benchmark_table.rows(JOB, [process([5.0, 7.0], 8.0), process([6.0], None)])
    assert [(row.what, row.seconds, row.spread, row.samples, row.peak_gb) for row in rows] == [
        ("UNet, 50 steps", 6.0, (5.0, 7.0), 3, 8.0)
    ]


def test_the_share_of_a_matrix_product():
    """Batch 2, guided: four rows of 0.856 TFLOP a step, in 0.1 s, beside 700 TFLOP/s."""
    share = benchmark_table.share_of_peak(JOB._replace(models="official"), [process([5.0], 8.0)])
    assert share == pytest.approx(4 * 0.856 / 0.1 / 700)


def test_differences_are_of_the_spread_and_of_255(tmp_path):
    reference = {"embedding": np.array([0.0, 2.0]), "latents": np.array([0.0, 4.0]), "picture": np.zeros((2, 2))}
    ours = {**reference, "latents": np.array([0.0, 4.1]), "picture": np.array([[0, 0], [0, 4 / 255]])}
    for name, arrays in (("a", ours), ("b", reference)):
        np.savez(tmp_path / f"{name}.npz", **arrays)
    found = benchmark_table.differences(tmp_path / "a.npz", tmp_path / "b.npz")
    assert found["embedding: max difference / std"] == 0
    assert found["latents: max difference / std"] == pytest.approx(0.05)
    assert found["picture: mean, of 255"] == pytest.approx(1)
    assert found["picture: max, of 255"] == pytest.approx(4)


def test_a_folder_without_a_trace_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"jax\.profiler\.trace"):
        kernel_times.kernel_times(tmp_path)
