"""`pytest -m gpu`: every training script on a GPU beside the CPU; skipped where torch sees no CUDA.

PAPER_CLIPS_GPU names another device (`cpu` tries these tests out where there is no GPU).
"""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from scripts import ROOT, ended, finished, kill_at, metrics
from test_accumulate import PLAIN
from tiny import PRELOAD, SCRIPTS, SHARDS, commands, small_corpus  # noqa: F401

DEVICE = os.environ.get("PAPER_CLIPS_GPU", "cuda")
SCRIPT, SECONDS = "protoclip.train", 300
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
# Of the first loss, relative: sums in another order; 8 and 11 bits of mantissa in the towers' products.
TOLERANCE = {"fp32": 2e-3, "bf16": 5e-2, "fp16": 1e-2}

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA"),
]


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
def on_cpu(start, given: dict[str, list[str]], folder: Path) -> dict[str, list[dict]]:
    """Metrics of every script's run on the CPU, in fp32, made when first asked for."""
    made: dict[str, list[dict]] = {}

    def of(name: str) -> list[dict]:
        if name not in made:
            out = folder / "cpu" / name
            finished(ended(start(*given[name], "--device", "cpu", "--out", out, module=SCRIPTS[name])))
            made[name] = metrics(out)
        return made[name]

    return of


def losses(lines: list[dict]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.parametrize("precision", [*TOLERANCE])
@pytest.mark.parametrize("name", SCRIPTS)
def test_steps_are_those_of_the_cpu(start, given, on_cpu, folder: Path, name: str, precision: str):
    """The first loss is the CPU's; all are finite."""
    if DEVICE == "cpu" and precision == "fp16":
        pytest.skip("fp16 needs a GPU")
    out = folder / precision / name
    command = [*given[name], "--device", DEVICE, "--precision", precision, "--out", out]
    finished(ended(start(*command, module=SCRIPTS[name])))
    ours, theirs = losses(metrics(out)), losses(on_cpu(name))
    assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE[precision])


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_killed_run_goes_on(start, given, on_cpu, folder: Path, name: str):
    out = folder / "killed" / name
    command = [*given[name], "--device", DEVICE, "--out", out]
    kill_at(start(*command, module=SCRIPTS[name]), out, 4, timeout=SECONDS)
    finished(ended(start(*command, module=SCRIPTS[name])))
    whole = metrics(out)
    assert [line["step"] for line in whole] == [line["step"] for line in on_cpu(name)]
    assert losses(whole)[0] == pytest.approx(losses(on_cpu(name))[0], rel=TOLERANCE["fp32"])


@pytest.mark.parametrize("name", [name for name in PLAIN if name != "protoclip"])  # whose small towers have batch norms
def test_micro_batches_have_the_loss_of_one_batch(start, given, on_cpu, folder: Path, name: str):
    out = folder / "accumulated" / name
    finished(ended(start(*given[name], "--device", DEVICE, "--accumulate", "4", "--out", out, module=SCRIPTS[name])))
    ours, theirs = losses(metrics(out)), losses(on_cpu(name))
    assert len(ours) == len(theirs) and all(map(math.isfinite, ours))
    assert ours[0] == pytest.approx(theirs[0], rel=TOLERANCE["fp32"])
