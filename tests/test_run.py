"""shared/run.py: checkpoints that are whole, harmless and of the same run; logs that resume; errors of one sentence."""

import contextlib
import dataclasses
import json
import os
import pickle
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from scripts import ROOT
from torch import nn

from shared import checkpoints, cli, run

CPU = torch.device("cpu")
ALONE = run.Process(0, 1, CPU)


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    model: str | None = None
    out: str = "here"
    workers: int = 0


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_checkpoint_round_trip(tmp_path: Path):
    state = {"state_dict": nn.Linear(2, 3).state_dict(), "step": 7, "config": {"lr": 0.1}, "nothing": None}
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", state)
    loaded = checkpoints.load_checkpoint(tmp_path / "checkpoint.pt")
    assert torch.equal(loaded["state_dict"]["weight"], state["state_dict"]["weight"])
    assert loaded["step"] == 7 and loaded["nothing"] is None
    assert os.listdir(tmp_path) == ["checkpoint.pt"]


def test_a_crash_while_saving_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"step": 1})
    before = path.read_bytes()

    def half(state, file):
        file.write(before[: len(before) // 2])
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(OSError, match="no space left"):
            checkpoints.save_checkpoint(path, {"step": 2})
    assert path.read_bytes() == before and checkpoints.load_checkpoint(path) == {"step": 1}
    checkpoints.save_checkpoint(path, {"step": 2})  # what the crash left behind is in nobody's way
    assert checkpoints.load_checkpoint(path) == {"step": 2} and os.listdir(tmp_path) == ["checkpoint.pt"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, value: float):
    path = tmp_path / "checkpoint.pt"
    checkpoints.save_checkpoint(path, {"state_dict": {"weight": torch.ones(2)}})
    with pytest.raises(ValueError, match="weight is no longer finite, and .*checkpoint.pt is left as it was"):
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
    with pytest.raises(ValueError, match="checkpoint.pt is not a checkpoint that loads with weights_only=True"):
        checkpoints.load_checkpoint(path)
    assert not victim.exists()


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04 half a zip"])
def test_garbage_is_no_checkpoint(tmp_path: Path, content: bytes):
    (tmp_path / "checkpoint.pt").write_bytes(content)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        checkpoints.resume(tmp_path, Config())
    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
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


# -------------------------------------------------------------------------------------------------------------- logs


def test_log(tmp_path: Path):
    log = run.RunLog(tmp_path / "new" / "folder", Config(), ALONE)
    log.write(1, loss=torch.tensor(0.5), episode=0)
    log.write(2, loss=float("nan"))
    log.close()
    assert json.loads((tmp_path / "new/folder/config.json").read_text()) == dataclasses.asdict(Config())
    first, second = run.read_metrics(tmp_path / "new/folder")
    assert first == {"step": 1, "loss": 0.5, "episode": 0} and second["loss"] != second["loss"]
    assert list((tmp_path / "new/folder/tensorboard").iterdir())


def test_resumed_log_drops_what_came_after_the_checkpoint(tmp_path: Path):
    lines = [json.dumps({"step": step, "loss": step / 10}) for step in (1, 2, 3, 4)]
    for half in (lines[3][:5], lines[3][:-1], ""):
        (tmp_path / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n" + half)
        log = run.RunLog(tmp_path, Config(), ALONE, step=2)
        log.write(3, loss=30)
        log.close()
        assert [(line["step"], line["loss"]) for line in run.read_metrics(tmp_path)] == [(1, 0.1), (2, 0.2), (3, 30)]


def test_new_log_starts_empty(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a run that was killed before its first checkpoint
    run.RunLog(tmp_path, Config(), ALONE).close()
    assert run.read_metrics(tmp_path) == []


def test_a_run_folder_has_one_writer(tmp_path: Path):
    """Another process is refused while it lives, and whatever way it ends, the folder is free."""
    code = """if True:
        import sys, time
        from pathlib import Path
        sys.path.append("tests")
        from test_run import ALONE, Config, run
        log = run.RunLog(Path(sys.argv[1]), Config(), ALONE)
        log.write(1, loss=1.0)
        print("here", flush=True)
        time.sleep(60)"""
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert other.stdout.readline() == "here\n"
    with pytest.raises(ValueError, match="belongs to a run that is still going"):
        run.RunLog(tmp_path, Config(lr=0.2), ALONE)
    assert len(run.read_metrics(tmp_path)) == 1 and json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1
    other.kill()
    other.wait()
    run.RunLog(tmp_path, Config(), ALONE, step=1).close()
    assert len(run.read_metrics(tmp_path)) == 1


def test_other_ranks_write_nothing(tmp_path: Path):
    log = run.RunLog(tmp_path / "run", Config(), run.Process(1, 2, CPU))
    log.write(1, loss=1.0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_write_json_is_atomic(tmp_path: Path):
    path = tmp_path / "x.json"
    checkpoints.write_json(path, {"a": "é"})
    with pytest.raises(TypeError):
        checkpoints.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": "é"} and os.listdir(tmp_path) == ["x.json"]


# --------------------------------------------------------------------------------------------------------- processes


def test_setup_seeds_and_names_a_missing_device():
    assert run.setup(3, "cpu") == ALONE and ALONE.main
    first = torch.rand(2)
    run.setup(3, "cpu")
    assert torch.equal(first, torch.rand(2))
    with pytest.raises(ValueError, match="no device 'tpu': --device is auto, cpu, cuda or cuda:N"):
        run.setup(0, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda:1' was asked for.*--device cpu"):
            run.setup(0, "cuda:1")


def test_precision():
    assert [run.resolve_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert run.resolve_precision("auto", CPU) in ("bf16", "fp32")
    assert run.resolve_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(ValueError, match="one of auto, bf16, fp16, fp32, not 'amp'"):
        run.resolve_precision("amp", CPU)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run.resolve_precision("fp16", CPU)


def test_autocast():
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    for precision, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        with run.autocast(precision, CPU):
            assert layer(x).dtype == dtype


def test_activation_bytes():
    x = torch.zeros(4, 30)
    assert cli.activation_bytes(lambda: nn.Linear(30, 50)(x)) == 4 * 4 * 30  # the input, not the weights
    net = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 7))
    assert cli.activation_bytes(lambda: net(x)) == 4 * 4 * (30 + 50)  # the ReLU's output is kept once
    with torch.no_grad():
        assert cli.activation_bytes(lambda: net(x)) == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_is_quiet_when_not_a_terminal(terminal: bool, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert list(run.progress([1, 2], 2, "reading", 32)) == [1, 2]
    assert list(run.progress([1], 1, "rank 1", 32, run.Process(1, 2, CPU))) == [1]
    shown = capsys.readouterr().err
    assert ("reading" in shown and "64" in shown) == terminal and "rank 1" not in shown


def test_stopwatch(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    watch = run.Stopwatch(5.0)
    now[0] += 2
    with watch.paused():
        now[0] += 50
    now[0] += 1
    assert watch.read() == 8.0


# ------------------------------------------------------------------------------------------------------ command lines


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, IsADirectoryError, PermissionError, OSError])
def test_what_the_user_can_mend_is_one_sentence(error: type, capsys, monkeypatch: pytest.MonkeyPatch):
    def main():
        raise error("a\n  b")

    with pytest.raises(SystemExit) as stop:
        cli.command_line(main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err == "error: a b\n"
    monkeypatch.setenv("PAPER_CLIPS_TRACEBACK", "1")
    with pytest.raises(error):
        cli.command_line(main)


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row: int):
        raise ValueError(f"sample {row} is broken")


def test_an_error_of_a_loader_worker_is_one_sentence_too(capsys):
    with pytest.raises(SystemExit):
        cli.command_line(lambda: list(torch.utils.data.DataLoader(Unreadable(), num_workers=1)))
    assert capsys.readouterr().err == "error: sample 0 is broken\n"


def test_a_bug_keeps_its_traceback_and_ctrl_c_is_130():
    def bug():
        raise RuntimeError("bug")

    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(RuntimeError):
        cli.command_line(bug)
    with pytest.raises(SystemExit) as stop:
        cli.command_line(interrupted)
    assert stop.value.code == 130
    cli.command_line(lambda: None)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"data": ""}, "--data is missing: it takes image-text shards in img2dataset layout, e.g. --data 'x.tar'"),
        ({"data": "data/emoji/nowhere"}, "data/emoji/nowhere does not exist: 'make data' builds the embedded corpus"),
        ({"eval_every": 1}, "--eval-set /nowhere does not exist: name a folder, or pass --eval-every 0"),
        ({"save_every": 0}, "--save-every must be at least 1, not 0"),
        ({"batch_size": 9}, "--batch-size 9 cannot be shared out evenly over 2 processes"),
        ({}, None),
    ],
)
def test_configurations_that_are_refused(changed: dict, message: str | None):
    usual = {"data": "x.tar", "eval_every": 0, "eval_set": "/nowhere", "save_every": 1, "batch_size": 8}
    config = types.SimpleNamespace(**(usual | changed))
    with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=re.escape(message)):
        cli.check_data(config, "x.tar")
        cli.check_counts(config, "save_every", "batch_size")
        cli.check_batch(config, 2)
