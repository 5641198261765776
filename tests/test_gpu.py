"""`pytest -m gpu`: every training script on a GPU beside the CPU; skipped where torch sees no CUDA.

PAPER_CLIPS_GPU names another device (`cpu` tries these tests out where there is no GPU).
"""

import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from scripts import ROOT, Lazily, ended, finished, kill_at, metrics, start_two
from test_accumulate import PLAIN
from tiny import SCRIPTS, SHARDS, commands, small_corpus  # noqa: F401

DEVICE = os.environ.get("PAPER_CLIPS_GPU", "cuda")
SCRIPT, SECONDS = "protoclip.train", 300
# Of the first loss, relative: sums in another order and TF32's 11 bits of mantissa; 8 and 11 bits in the towers'
# products. And of the second, after a step of AdamW, which makes much of small gradients.
TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
AFTER_A_STEP = 3 * max(TOLERANCE.values())
# Towers of the papers' size in place of the small ones, for what memory is about; LexVLA's need weights from elsewhere.
LARGE = {
    "attentive_mask_clip": "--model vit_b16 --image-size 224",
    "concept_frequency": "--model ViT-B-32 --image-size 224",
    "flame": "--model ViT-B-16 --image-size 224 --hidden-dim 4096 --text-width 512 --text-layers 12 --embed-dim 512",
    "nmtune": "--model RN50",
    "protoclip": "--model RN50 --image-size 224 --hidden-dim 2048 --projection-dim 128",
    "tinyclip": "--model ViT-B-32 --image-size 224",
    "tldr_reduction": """--image-size 224 --patch-size 16 --width 768 --layers 12 --heads 12 --text-width 768
        --text-layers 12 --text-heads 12 --code-dim 768 --num-codes 64""",
    "tldr_reduction-clip": "--clip-model ViT-B-16 --image-size 224",
}
LENGTH = {"protoclip": "--episodes 1", "tinyclip": "--steps {steps}"}  # others have --epochs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"),
]
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing of the kind")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: 'make data' builds it", pytrace=False)
    path = tmp_path_factory.mktemp("gpu")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def given(folder: Path) -> dict[str, list[str]]:
    (folder / "parts").mkdir()
    return commands(small_corpus(folder / "corpus"), folder / "parts")


@pytest.fixture(scope="module")
def runs(start, given: dict[str, list[str]], folder: Path) -> dict[tuple[str, str, str, int], list[dict]]:
    """(script, device, precision, number of processes) -> metrics of its run, made at the first access."""

    def made(key: tuple[str, str, str, int]) -> list[dict]:
        name, device, precision, count = key
        out = folder / "runs" / "-".join(map(str, key))
        command = [*given[name], "--device", device, "--precision", precision, "--out", out]
        if count == 1:
            finished(ended(start(*command, module=SCRIPTS[name])))
        else:
            crowd = start_two(start, *command, count=count, module=SCRIPTS[name], LOCAL_WORLD_SIZE=str(count))
            for process in crowd:
                finished(ended(process))
        return metrics(out)

    return Lazily(made)


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", [*TOLERANCE])
@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_are_those_of_the_cpu(runs, name: str, precision: str):
    """The losses of the first and second step equal the CPU's; all losses are finite."""
    if DEVICE == "cpu" and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    ours, theirs = losses(runs[name, DEVICE, precision, 1]), losses(runs[name, "cpu", "fp32", 1])
    assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE[precision])
    assert ours[1] == pytest.approx(theirs[1], rel=AFTER_A_STEP)


@pytest.mark.parametrize("name", SCRIPTS)
def test_two_processes_on_one_gpu(runs, name: str):
    """Two processes with gloo have the losses of two processes on the CPU."""
    ours, theirs = (losses(runs[name, device, "fp32", 2]) for device in (DEVICE, "cpu"))
    assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE["fp32"])
    assert ours[1] == pytest.approx(theirs[1], rel=AFTER_A_STEP)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_goes_on(start, given, runs, folder: Path, name: str):
    """A killed run ends like an uninterrupted one: on a CPU bit for bit, on a GPU up to the order of sums in
    kernels."""
    out = folder / "killed" / name
    command = [*given[name], "--device", DEVICE, "--precision", "fp32", "--out", out]
    kill_at(start(*command, module=SCRIPTS[name]), out, 4, timeout=SECONDS)
    finished(ended(start(*command, module=SCRIPTS[name])))
    ours, whole = metrics(out), runs[name, DEVICE, "fp32", 1]
    assert [line["step"] for line in ours] == [line["step"] for line in whole]
    if DEVICE == "cpu":
        assert ours == whole
    assert losses(ours) == pytest.approx(losses(whole), rel=AFTER_A_STEP)


def planned(text: str) -> float:
    """GiB per process according to the dry run."""
    return float(re.search(r"^memory estimate\s+([\d.]+) GiB", text, re.MULTILINE)[1])


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_what_the_dry_run_says(start, given, folder: Path, name: str):
    """In fp32 with towers of the papers' size, memory is at most slightly above the estimate and at least half of
    it."""
    command = [*given[name], *LARGE[name].split()]
    said = planned(finished(ended(start(*command, "--dry-run", module=SCRIPTS[name]))).out)
    assert said > 1
    if not torch.cuda.is_available():
        pytest.skip(f"{name}: {said} GiB by the dry run; what a step takes is measured on a GPU")
    out = folder / "large" / name
    done = finished(ended(start(SCRIPTS[name], *command, "--device", DEVICE, "--out", out, module="watched")))
    shutil.rmtree(out)  # gigabytes
    peak = float(re.search(r"^peak ([\d.]+) GiB", done.out, re.MULTILINE)[1])
    print(f"{name}: {said:.1f} GiB by the dry run, {peak:.1f} on the GPU")
    assert 0.5 * said < peak < 1.25 * said + 0.5


@cuda_only
@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_do_not_wait_for_the_gpu(start, given, folder: Path, name: str):
    """Ten steps wait as often as five: only the start, the end and lines of metrics wait."""
    waits = {}
    for steps in (5, 10):
        length = LENGTH.get(name, "--epochs 1").format(steps=steps)
        rare = f"--batch-size {160 // steps} --log-every 1000 --save-every 1000 {length}"
        command = [*given[name], *rare.split(), "--device", DEVICE, "--out", folder / f"waits/{name}{steps}"]
        done = finished(ended(start(SCRIPTS[name], *command, module="watched")))
        waits[steps] = int(re.search(r"waited (\d+) times", done.out)[1])
        print(f"{name}, {steps} steps: {done.out.splitlines()[-1]}")
    assert waits[10] - waits[5] < 5


def test_throughput_is_printed():
    """The table of `make bench-gpu` with few steps; with small towers on a CPU."""
    small = "--models ViT-emoji ResNet-emoji --batch 16 --steps 1" if DEVICE == "cpu" else "--steps 5"
    command = [sys.executable, "-m", "tests.bench.gpu", "--repetitions", "2", *small.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[4:]]
    assert len(rows) == 2 * (3 if DEVICE.startswith("cuda") else 2)
    assert all(float(row[3].replace(",", "")) > 0 < float(row[4].replace(",", "")) for row in rows)


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "protoclip"])  # whose small towers have batch norms
def test_micro_batches_have_the_loss_of_one_batch(start, given, runs, folder: Path, name: str):
    out = folder / "accumulated" / name
    command = [*given[name], "--device", DEVICE, "--precision", "fp32", "--accumulate", "4", "--out", out]
    finished(ended(start(*command, module=SCRIPTS[name])))
    ours, theirs = losses(metrics(out)), losses(runs[name, "cpu", "fp32", 1])
    assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE["fp32"])
