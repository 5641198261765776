"""Training steps do not wait for a GPU, tested on a CPU with tensors that claim to be on a GPU and refuse to return
values."""

import importlib
import shutil
from pathlib import Path

import pytest
import tyro
from conftest import Watch
from scripts import metrics
from short_runs import SCRIPTS, commands, small_corpus

# What takes a step in each script; timm's AdamW, which keeps the number of steps on the CPU, is left out.
STEP = {"protoclip": ["protoclip_loss", "batch_statistics", "ProtoCLIP.forward"], "nmtune": ["losses"]}
STEP |= {"tldr_reduction-clip": ["losses_of"]}
NAMES = {"nmtune": "PRETRAIN_PRESETS"}  # of presets


@pytest.fixture(scope="module")
def given(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("waiting")
    (path / "parts").mkdir()
    yield commands(small_corpus(path / "corpus"), path / "parts")
    shutil.rmtree(path)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_step_does_not_wait(given, watch: Watch, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str):
    script = importlib.import_module(SCRIPTS[name])
    for path in STEP.get(name, ["train_step"]):
        place, _, function = f"{script.__name__}.{path}".rpartition(".")
        owner = script if place == script.__name__ else importlib.import_module("protoclip.model").ProtoCLIP
        monkeypatch.setattr(owner, function, watch.within(getattr(owner, function)))
    for function in ("trimmed", "cut_padding"):
        if hasattr(script, function):
            monkeypatch.setattr(script, function, watch.within(getattr(script, function), on=False))
    presets = getattr(script, NAMES.get(name, "PRESETS"))
    words = [*given[name], "--device", "cpu", "--out", str(tmp_path / name)]
    cfg = tyro.extras.overridable_config_cli(presets, args=words)
    script.main(cfg)
    assert len(metrics(tmp_path / name)) >= 10


def test_what_waits_is_noticed(watch: Watch):
    import torch

    x = torch.arange(3)
    for asks in (lambda: x.sum().item(), lambda: bool(x.any()), lambda: x[x > 1], lambda: torch.bincount(x)):
        asks()
        with pytest.raises(AssertionError, match="would wait for a GPU"):
            watch.within(asks)()
    assert watch.within(lambda: x[1:][x[:2]].is_cuda)() and not x.is_cuda
    assert watch.within(watch.within(lambda: x.max().item(), on=False))() == 2
