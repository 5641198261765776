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
from short_runs import PLAIN, SCRIPTS, commands, dinov2, features, image_folder, language_model, small_corpus

DEVICE = os.environ.get("PAPER_CLIPS_GPU", "cuda")
SCRIPT, SECONDS = "protoclip.train", 300
SCRIPTS = SCRIPTS | {  # and further arms and scripts
    "nmtune-labels": "nmtune.pretrain",
    "nmtune-views": "nmtune.train",
    "nmtune-features": "nmtune.train",
    "nmtune-finetune": "nmtune.finetune",
    "nmtune-lora": "nmtune.finetune",
    "tldr_reduction-blip": "tldr_reduction.train",
    "tldr_reduction-finetune": "tldr_reduction.train",
    "tldr_reduction-retrieval": "tldr_reduction.train",
}
ALONE = ("nmtune-finetune", "nmtune-lora")  # refuse a second process: their regularisers need the whole batch
# Of the first loss, relative: sums in another order and TF32's 11 bits of mantissa; 8 and 11 bits in the towers'
# products. And of the second, after a step of AdamW, which makes much of small gradients.
TOLERANCE = {"fp32": 5e-3, "bf16": 5e-2, "fp16": 1e-2}
AFTER_A_STEP = 3 * max(TOLERANCE.values())
BLIP = """--image-size 224 --patch-size 16 --width 768 --layers 12 --heads 12 --text-width 768 --text-layers 12
    --text-heads 12"""
# Towers of the papers' size in place of the small ones, for what memory is about. Left out are nmtune.train, whose head
# takes less than 1 GiB, LoRA, whose encoder is that of nmtune-finetune, and retrieval, whose model is a BLIP, too.
LARGE = {
    "attentive_mask_clip": "--model vit_b16 --image-size 224",
    "concept_frequency": "--model ViT-B-32 --image-size 224",
    "flame": "--model ViT-B-16 --image-size 224 --hidden-dim 4096",
    "lexvla": """--text lm --lora-rank 8 --image-size 224 --adapter-hidden 2048 --precision bf16
        --lm {parts}/large-lm --backbone {parts}/dinov2-base""",
    "nmtune": "--model RN50",
    "nmtune-labels": "--model resnet50 --batch-size 24",
    "nmtune-finetune": "--encoder timm:resnet50 --batch-size 24",
    "protoclip": "--model RN50 --image-size 224 --hidden-dim 2048 --projection-dim 128",
    "tinyclip": "--model ViT-B-32 --image-size 224",
    "tldr_reduction": f"{BLIP} --code-dim 768 --num-codes 64",
    "tldr_reduction-clip": "--clip-model ViT-B-16 --image-size 224",
    "tldr_reduction-blip": f"{BLIP} --embed-dim 256 --queue-size 57600 --batch-size 16",
    "tldr_reduction-finetune": BLIP,
}
LENGTH = {"protoclip": "--episodes 1", "tinyclip": "--steps {steps}"}  # others have --epochs
# without L_SVD, whose decomposition waits for the GPU
LENGTH |= dict.fromkeys(("nmtune-views", "nmtune-features", *ALONE), "--epochs 1 --w-svd 0")
SAMPLES = dict.fromkeys(("nmtune-labels", "nmtune-views", *ALONE), 24) | {"nmtune-features": 48}  # others have 160

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"),
]
cuda_only = pytest.mark.skipif(not torch.cuda.is_available(), reason="a CPU has nothing of the kind")


@pytest.fixture(scope="module")
def given(start, folder: Path) -> dict[str, list[str]]:
    data, parts = small_corpus(folder / "corpus"), folder / "parts"
    parts.mkdir()
    found = commands(data, parts)
    captioner = [*found["tldr_reduction"], "--device", "cpu", "--out", parts / "captioner"]
    finished(ended(start(*captioner, module=SCRIPTS["tldr_reduction"])))
    images = image_folder(parts / "images", data)
    views = f"--data {images} --tests again={images}"
    blip = f"""--data {data} --vocab {parts}/vocab.txt --image-size 16 --patch-size 8 --width 32 --layers 2 --heads 2
        --text-width 32 --text-layers 1 --text-heads 2 --max-positions 40 --dropout 0 --epochs 2 --batch-size 32"""
    more = {
        "nmtune-labels": f"""small-sup --noise 0.3 --data {images} --no-keep-in-memory --epochs 4 --warmup 2
            --batch-size 8""",
        "nmtune-views": f"nmtune --encoder timm:resnet_emoji {views} --epochs 4 --batch-size 8",
        "nmtune-features": f"nmtune --features {features(parts / 'features.npz')} --epochs 4 --batch-size 12",
        "nmtune-finetune": f"full --encoder timm:resnet_emoji {views} --epochs 4 --batch-size 8",
        "nmtune-lora": f"lora --encoder open_clip:ViT-test {views} --epochs 4 --batch-size 8",
        "tldr_reduction-blip": f"small-blip {blip} --embed-dim 16 --queue-size 64 --warmup 2",
        "tldr_reduction-finetune": f"small-finetune {blip} --init {parts}/captioner",
        "tldr_reduction-retrieval": f"retrieval-coco {blip} --init {parts}/captioner --embed-dim 16 --queue-size 64",
    }
    common = "--precision fp32 --workers 0 --log-every 1 --save-every 2".split()
    return found | {name: [*text.split(), *common] for name, text in more.items()}


def weights_of_lexvla(data: Path, parts: Path) -> None:
    """Write a random LM with 4 blocks and a random DINOv2 base, for the memory of LexVLA's adapter and of LoRA."""
    sizes = dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=16)
    language_model(parts / "large-lm", data, **sizes)
    dinov2(parts / "dinov2-base", patch_size=14)


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


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in ALONE])
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


def test_heads_with_other_seeds(start, given, folder: Path):
    """Further heads are tuned on a GPU, although features in memory are on the CPU."""
    command = [*given["nmtune-features"], "--heads", "2", "--device", DEVICE, "--out", folder / "heads"]
    finished(ended(start(*command, module=SCRIPTS["nmtune-features"])))
    assert "id/top1" in metrics(folder / "heads")[-1]


def planned(text: str) -> float:
    """GiB per process according to the dry run."""
    return float(re.search(r"^memory estimate\s+([\d.]+) GiB", text, re.MULTILINE)[1])


@pytest.mark.parametrize("name", LARGE)
def test_memory_is_what_the_dry_run_says(start, given, folder: Path, name: str):
    """With towers of the papers' size, memory is at most slightly above the estimate and at least half of it; in bf16
    for LexVLA, whose estimate is of bf16, else in fp32."""
    parts = folder / "parts"
    if name == "lexvla":
        weights_of_lexvla(folder / "corpus", parts)
    command = [*given[name], *LARGE[name].format(parts=parts).split()]
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
    """Ten steps wait as often as five (12 as 6 where SAMPLES are few): only the start, the end and lines of metrics
    wait."""
    waits = {}
    for steps in (5, 10):
        length = LENGTH.get(name, "--epochs 1").format(steps=steps)
        rare = f"--batch-size {SAMPLES.get(name, 160) // steps} --log-every 1000 --save-every 1000 {length}"
        command = [*given[name], *rare.split(), "--device", DEVICE, "--out", folder / f"waits/{name}{steps}"]
        done = finished(ended(start(SCRIPTS[name], *command, module="watched")))
        waits[steps] = int(re.search(r"waited (\d+) times", done.out)[1])
        print(f"{name}, {steps} steps: {done.out.splitlines()[-1]}")
    assert waits[10] - waits[5] < 5


def test_throughput_is_printed():
    """The table of `make bench-gpu` with few steps; with small towers on a CPU."""
    small = "--models ViT-emoji ConvNet-emoji --batch 16 --steps 1" if DEVICE == "cpu" else "--steps 5"
    command = [sys.executable, "-m", "studies.bench.gpu", "--repetitions", "2", *small.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    print(done.stdout)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines()[4:]]
    assert len(rows) == 2 * (3 if DEVICE.startswith("cuda") else 2)
    assert all(float(row[3].replace(",", "")) > 0 < float(row[4].replace(",", "")) for row in rows)


# Without ProtoCLIP and nmtune-labels, whose small towers have batch norms; the further scripts have no --accumulate.
@pytest.mark.parametrize("name", [name for name in PLAIN if name != "protoclip"])
def test_micro_batches_have_the_loss_of_one_batch(start, given, runs, folder: Path, name: str):
    out = folder / "accumulated" / name
    command = [*given[name], "--device", DEVICE, "--precision", "fp32", "--accumulate", "4", "--out", out]
    finished(ended(start(*command, module=SCRIPTS[name])))
    ours, theirs = losses(metrics(out)), losses(runs[name, "cpu", "fp32", 1])
    assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE["fp32"])
