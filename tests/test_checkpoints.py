"""Checkpoints are complete, safe to load, and checked against the run's settings; JSON files are replaced
atomically."""

import argparse
import dataclasses
import importlib
import json
import os
import pickle
import sys
from pathlib import Path, PurePath
from typing import get_type_hints

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from shared import checkpoints
from shared.presets import folders


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    model: str | None = None
    out: str = "here"
    workers: int = 0


def test_checkpoint_round_trip(tmp_path: Path):
    state = {"state_dict": nn.Linear(2, 3).state_dict(), "step": 7, "config": {"lr": 0.1}, "nothing": None}
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded["state_dict"]["weight"], state["state_dict"]["weight"])
    assert loaded["step"] == 7 and loaded["nothing"] is None
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_weights_in_a_safetensors_file(tmp_path: Path):
    file, state = tmp_path / "model.safetensors", nn.Linear(2, 3).state_dict()
    save_file(state, file)
    loaded = checkpoints.load_checkpoint(file)
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[name], state[name]) for name in state)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="model.safetensors is not a complete"):
        checkpoints.load_checkpoint(file)
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoints.load_checkpoint(tmp_path / "none.safetensors")


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def half(state, file):
        file.write(before[: len(before) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(ValueError, match="no space left"):
            checkpoints.save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before and checkpoints.load_checkpoint(path) == {"step": 1}
    checkpoints.save_checkpoint(path, {"step": 2})  # what the crash left behind is in nobody's way
    assert checkpoints.load_checkpoint(path) == {"step": 2} and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"state_dict": {"weight": torch.ones(2)}})
    with pytest.raises(ValueError, match="weight is no longer finite"):
        checkpoints.save_checkpoint(path, {"state_dict": {"weight": torch.tensor([1.0, value])}})
    assert checkpoints.load_checkpoint(path)["state_dict"]["weight"].tolist() == [1, 1]


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("save", [torch.save, lambda state, path: path.write_bytes(pickle.dumps(state, 2))])
def test_a_checkpoint_cannot_run_code(tmp_path: Path, save):
    path, victim = tmp_path / "checkpoint.pt", tmp_path / "victim"
    save({"state_dict": {}, "extra": Malicious(victim)}, path)
    with pytest.raises(ValueError, match="checkpoint.pt is not a checkpoint"):
        checkpoints.load_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_garbage_is_no_checkpoint(tmp_path: Path, content: bytes):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoints.resume(tmp_path, Config())
    with pytest.raises(ValueError, match="no checkpoint at"):
        checkpoints.load_checkpoint(tmp_path / "none.pt")


def test_resume_refuses_another_configuration(tmp_path: Path):
    assert checkpoints.resume(tmp_path, Config()) is None
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", {"step": 3, "config": dataclasses.asdict(Config())})
    assert checkpoints.resume(tmp_path, Config())["step"] == 3
    assert checkpoints.resume(tmp_path, Config(out="there", workers=4))["step"] == 3  # these do not change the result
    with pytest.raises(ValueError) as error:
        checkpoints.resume(tmp_path, Config(lr=0.2, model="ViT"))
    message = str(error.value)
    assert str(tmp_path) in message and "choose another --out" in message
    assert "lr (was 0.1, now 0.2), model (was None, now 'ViT')" in message
    older = dataclasses.asdict(Config())
    del older["model"]  # a field that the run is older than: it has had the default
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", {"step": 4, "config": older})
    assert checkpoints.resume(tmp_path, Config())["step"] == 4
    with pytest.raises(ValueError, match=r"model \(was None, now 'ViT'\)"):
        checkpoints.resume(tmp_path, Config(model="ViT"))


def configs() -> list[type]:
    """The settings of all papers' training scripts."""
    modules = [importlib.import_module(f"{folder}.config") for folder in folders()]
    found = {value for module in modules for name, value in vars(module).items() if name.endswith("Config")}
    return sorted((cls for cls in found if hasattr(cls, "out") and "seed" in vars(cls())), key=str)


@pytest.mark.parametrize("cls", configs(), ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_settings_of_another_type_in_a_checkpoint(cls: type):
    """Every preset's settings are read; a text or a list in place of a number ends in a sentence."""
    every = [preset for _, preset in getattr(sys.modules[cls.__module__], "PRESETS", {}).values()]
    for cfg in [cls(), *(preset for preset in every if type(preset) is cls)]:
        assert checkpoints.config_in({"config": dataclasses.asdict(cfg)}, cls, "RUN") == cfg
    kinds = get_type_hints(cls)
    for name in (name for name, kind in kinds.items() if kind in (int, float, bool, int | None)):
        for wrong in ("12", [12]):
            with pytest.raises(ValueError, match=rf"RUN .* {name} is ['\[]"):
                checkpoints.config_in({"config": dataclasses.asdict(cls()) | {name: wrong}}, cls, "RUN")


def test_write_json_is_atomic(tmp_path: Path):
    path = tmp_path / "x.json"
    checkpoints.write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "é"} and os.listdir(tmp_path) == ["x.json"]


def test_what_authors_trainers_keep_beside_weights_is_loaded(tmp_path: Path):
    """A command line with a path, and NumPy learning rates in the optimizer's groups and elsewhere."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=np.float64(1e-3))
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = np.float32(5e-4) * np.float64(0.5)
    state = {"epoch": 3, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    args = argparse.Namespace(lr=np.float64(5e-4), model="RN50", output_dir=tmp_path / "x")
    torch.save(state | {"args": args}, tmp_path / "epoch_3.pt")
    loaded = checkpoints.load_checkpoint(tmp_path / "epoch_3.pt")
    assert torch.equal(loaded["state_dict"]["weight"], model.weight) and loaded["args"].model == "RN50"
    assert loaded["args"].output_dir == PurePath(tmp_path / "x")
    assert loaded["optimizer"]["param_groups"][0]["lr"] == pytest.approx(2.5e-4)
    fresh = torch.optim.AdamW(model.parameters())
    fresh.load_state_dict(loaded["optimizer"])
    assert torch.equal(fresh.state[model.weight]["exp_avg"], optimizer.state[model.weight]["exp_avg"])
