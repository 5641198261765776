"""Process start-up, precision, logs that resume, and progress."""

import contextlib
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scripts import ROOT, one_sentence
from torch import nn
from torch.utils.data import DataLoader

from protoclip.config import PRESETS
from shared import checkpoints, run

CPU = torch.device("cpu")
ALONE = run.Process(0, 1, CPU)


@dataclasses.dataclass
class Config:
    lr: float = 0.1
    model: str | None = None
    out: str = "here"
    workers: int = 0


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


def test_half_a_last_line_is_left_out_and_damage_is_named(tmp_path: Path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 2, "lo')
    assert run.read_metrics(tmp_path) == [{"step": 1}]
    file.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        run.read_metrics(tmp_path)


def test_a_damaged_log_is_not_cut(tmp_path: Path):
    """A line in the middle that is no JSON is named when a run resumes; what follows it is not lost."""
    text = '{"step": 1}\n\n{"step": 2}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is damaged"):
        run.RunLog(tmp_path, Config(), ALONE, step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_new_log_starts_empty(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')  # a run that was killed before its first checkpoint
    run.RunLog(tmp_path, Config(), ALONE).close()
    assert run.read_metrics(tmp_path) == []


def write_on(out: str, begun: Any) -> None:
    """Log to a run folder, and hold it."""
    folder = run.RunFolder(Config(out=out), ALONE, epoch=0)
    folder.restore()
    folder.start(0)
    folder.log(1, loss=torch.tensor(1.0))
    begun.set()
    time.sleep(60)


def test_a_run_folder_has_one_writer(tmp_path: Path):
    """Another process is refused while the first one runs; the folder is free again however the first one ends."""
    context = multiprocessing.get_context("forkserver")
    begun = context.Event()
    other = context.Process(target=write_on, args=(str(tmp_path), begun))
    other.start()
    assert begun.wait(60)
    with pytest.raises(ValueError, match="still going"):
        run.RunFolder(Config(out=str(tmp_path), lr=0.2), ALONE, epoch=0)
    assert len(run.read_metrics(tmp_path)) == 1 and json.loads((tmp_path / "config.json").read_text())["lr"] == 0.1
    other.kill()
    other.join()
    run.RunFolder(Config(out=str(tmp_path)), ALONE, epoch=0)
    assert len(run.read_metrics(tmp_path)) == 1


def test_other_ranks_write_nothing(tmp_path: Path):
    log = run.RunLog(tmp_path / "run", Config(), run.Process(1, 2, CPU))
    log.write(1, loss=1.0)
    log.close()
    assert not (tmp_path / "run").exists()


def test_setup_seeds_and_names_a_missing_device():
    assert run.setup(3, "cpu") == ALONE and ALONE.main
    first = torch.rand(2)
    run.setup(3, "cpu")
    assert torch.equal(first, torch.rand(2))
    with pytest.raises(ValueError, match="'tpu'.*cuda:N or mps"):
        run.setup(0, "tpu")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="'cuda:1' was requested.*--device cpu"):
            run.setup(0, "cuda:1")


def test_more_loader_processes_than_cores_are_no_warning(recwarn: pytest.WarningsRecorder):
    run.setup(0, "cpu")
    DataLoader(range(3), num_workers=2 * os.cpu_count() + 1)
    assert not [str(warning.message) for warning in recwarn if "worker" in str(warning.message)]


def test_a_script_in_an_allocation_of_slurm_runs_alone_without_srun(monkeypatch: pytest.MonkeyPatch):
    """salloc and sbatch set the tasks of the allocation, srun those of its step (1 in an interactive step)."""
    monkeypatch.setenv("WORLD_SIZE", "1")  # what is set below goes afterwards
    for name, value in {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}.items():
        monkeypatch.setenv(name, value)
    joined = []

    def join(*given, **more) -> dict:
        joined.append(os.environ.get("WORLD_SIZE"))
        return {"device": "cpu", "distributed": False, "global_rank": 0, "world_size": 1}

    monkeypatch.setattr(run, "init_distributed_device_so", join)
    for tasks in (None, "1", "8"):
        del os.environ["WORLD_SIZE"]
        if tasks:
            monkeypatch.setenv("SLURM_STEP_NUM_TASKS", tasks)
        run.setup(0, "cpu")
        os.environ.setdefault("WORLD_SIZE", "")
    assert joined == ["1", "1", None]


def test_precision():
    assert [run.resolve_precision(name, CPU) for name in ("fp32", "bf16")] == ["fp32", "bf16"]
    assert run.resolve_precision("auto", CPU) in ("bf16", "fp32")
    assert run.resolve_precision("fp16", torch.device("cuda")) == "fp16"
    with pytest.raises(ValueError, match="'amp'"):
        run.resolve_precision("amp", CPU)
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        run.resolve_precision("fp16", CPU)


def test_autocast():
    layer, x = nn.Linear(2, 2), torch.zeros(1, 2)
    for precision, dtype in {"bf16": torch.bfloat16, "fp32": torch.float32}.items():
        with run.autocast(precision, CPU):
            assert layer(x).dtype == dtype


def test_a_gpu_of_a_mac(monkeypatch: pytest.MonkeyPatch):
    """With a simulated GPU: it must be named, computes in fp32, and supports one process."""
    with pytest.raises(ValueError, match="--device cpu"):
        run.setup(0, "mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    process = run.setup(0, "mps")
    assert process.device == torch.device("mps") and run.setup(0, "auto").device.type != "mps"
    assert run.resolve_precision("auto", process.device) == "fp32"
    with run.autocast("fp32", process.device):
        assert nn.Linear(2, 2)(torch.zeros(1, 2)).dtype == torch.float32
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="without torchrun"):
        run.setup(0, "mps")


def test_windows_is_refused_in_one_sentence():
    code = "import sys; sys.platform = 'win32'; import shared"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and one_sentence(result.stderr) and "Windows Subsystem" in result.stderr


def test_progress_is_shown_at_once_on_a_terminal_and_each_minute_in_a_log(capsys, monkeypatch: pytest.MonkeyPatch):
    for terminal, shown in ((True, True), (False, False)):
        monkeypatch.setattr(sys.stderr, "isatty", lambda of=terminal: of, raising=False)
        assert list(run.progress(slowly(), 2, "reading", 32)) == [1, 2]
        assert list(run.progress(slowly(), 1, "rank 1", 32, run.Process(1, 2, CPU))) == [1]
        seen = capsys.readouterr().err
        assert ("reading" in seen) == shown and "rank 1" not in seen
    with run.counting(2, "hidden for 60 s"):
        run.say("a line of the log")
    assert capsys.readouterr() == ("a line of the log\n", "")
    with run.counting(None, "parts", "part") as tick:
        tick(2, "7 captions/s")


def slowly() -> Iterator[int]:
    for i in (1, 2):
        time.sleep(0.11)
        yield i


def test_stopwatch(monkeypatch: pytest.MonkeyPatch):
    now = [100.0]
    monkeypatch.setattr(run.time, "perf_counter", lambda: now[0])
    watch = run.Stopwatch(5.0)
    now[0] += 2
    with watch.paused():
        now[0] += 50
    now[0] += 1
    assert watch.read() == 8.0
    with contextlib.suppress(ValueError), watch.paused():  # an evaluation that fails
        now[0] += 50
        raise ValueError
    assert watch.read() == 8.0


def test_a_warm_up_scaled_to_the_run_is_no_long_one(tmp_path: Path, capsys: pytest.CaptureFixture):
    for warmup, noted in ((None, True), (2, False)):
        folder = run.RunFolder(
            dataclasses.replace(PRESETS["small"][1], out=str(tmp_path / str(warmup)), warmup=90), ALONE, step=0
        )
        folder.start(0, 16, warmup=warmup)
        folder.close()
        assert ("90 of 16" in capsys.readouterr().out) == noted


@dataclasses.dataclass
class Settings(Config):
    save_every: int = 2
    epochs: int = 3


def objects(seed: int) -> dict:
    torch.manual_seed(seed)
    model = nn.Linear(2, 1)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return {"state_dict": model, "optimizer": torch.optim.SGD(model.parameters(), momentum=0.9), "scaler": scaler}


def test_a_failed_evaluation_costs_no_training(tmp_path: Path):
    """The run is saved where it repeats the evaluation; an evaluation that does not fail saves nothing."""
    cfg = Settings(out=str(tmp_path / "run"))
    folder = run.RunFolder(cfg, ALONE, epoch=0, batch=0)
    folder.restore(**objects(0))
    folder.start(0)
    with folder.evaluation(2, epoch=0, batch=2):
        pass
    assert not (tmp_path / "run/checkpoint.pt").exists()
    with pytest.raises(ValueError, match="broken set"), folder.evaluation(2, epoch=0, batch=2):
        raise ValueError("broken set")
    folder.close()
    again = run.RunFolder(cfg, ALONE, epoch=0, batch=0)
    assert (again.state["epoch"], again.state["batch"]) == (0, 2) and not again.finished(epoch=3)


def test_a_run_folder_saves_logs_and_resumes(tmp_path: Path, capsys):
    cfg = Settings(out=str(tmp_path / "run"))
    folder, mine = run.RunFolder(cfg, ALONE, epoch=0, batch=0), objects(0)
    assert folder.state == {"epoch": 0, "batch": 0} and not folder.finished(epoch=3)
    folder.restore(**mine)
    folder.start(0, data="abc")
    for step in range(1, 6):
        folder.log(step, epoch=0, loss=torch.tensor(0.5))
        if folder.due(step):
            folder.save(step, epoch=0, batch=step)
    folder.close()
    state = checkpoints.load_checkpoint(tmp_path / "run/checkpoint.pt")
    about = {"seconds", "commit", "config", "paper"}
    assert set(state) == {"state_dict", "optimizer", "epoch", "batch", "data"} | about
    assert state["batch"] == 4 and state["data"] == "abc" and state["config"] == dataclasses.asdict(cfg)

    again, others = run.RunFolder(cfg, ALONE, epoch=0, batch=0), objects(1)
    assert again.state["batch"] == 4 and not again.finished(epoch=3)
    again.restore(**others)
    assert torch.equal(others["state_dict"].weight, mine["state_dict"].weight)
    again.start(4, data="abc")
    assert again.clock.seconds >= state["seconds"]
    assert [line["step"] for line in run.read_metrics(tmp_path / "run")] == [1, 2, 3, 4]  # the fifth was not saved
    with pytest.raises(ValueError, match="nan at step 5"):
        again.log(5, epoch=0, loss=float("nan") * torch.ones(()))
    again.save(6, epoch=3, batch=0)
    again.close()
    assert run.RunFolder(cfg, ALONE).finished(epoch=3)
    assert "nothing to do" in capsys.readouterr().out


def test_a_checkpoint_without_a_part_is_refused(tmp_path: Path):
    cfg = Settings(out=str(tmp_path))
    checkpoints.save_checkpoint(tmp_path / "checkpoint.pt", {"config": dataclasses.asdict(cfg)})
    with pytest.raises(ValueError, match="state_dict"):
        run.RunFolder(cfg, ALONE).restore(**objects(0))


def test_other_ranks_save_nothing(tmp_path: Path):
    folder = run.RunFolder(Settings(out=str(tmp_path / "run")), run.Process(1, 2, CPU), epoch=0)
    folder.restore(**objects(0))
    folder.start(0)
    folder.log(1, epoch=0)
    folder.save(2, epoch=1)
    assert not folder.due(3) and folder.due(4) and not (tmp_path / "run").exists()


@dataclasses.dataclass
class Kept(Settings):
    save_every: int = 100
    keep_every: int = 3


def test_chosen_checkpoints_stay(tmp_path: Path):
    folder, mine = run.RunFolder(Kept(out=str(tmp_path / "run")), ALONE, epoch=0), objects(0)
    folder.restore(**mine)
    folder.start(0)
    for step in range(1, 8):
        if folder.due(step):
            folder.save(step, epoch=step)
    folder.save(8, epoch=8)
    assert sorted(path.name for path in (tmp_path / "run").glob("*.pt")) == [
        "checkpoint-3.pt",
        "checkpoint-6.pt",
        "checkpoint.pt",
    ]
    kept = [checkpoints.load_checkpoint(tmp_path / f"run/checkpoint{step}.pt")["epoch"] for step in ("-3", "-6", "")]
    assert kept == [3, 6, 8]


def test_the_best_checkpoint_is_written_before_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A new run removes that of an earlier one, whose checkpoint.pt was removed; a resumed run keeps its own."""
    folder, written = run.RunFolder(Settings(out=str(tmp_path / "run")), ALONE, epoch=0), []
    folder.restore(**objects(0))
    best = tmp_path / "run/checkpoint-best.pt"
    best.touch()
    folder.start(0)
    assert not best.exists()
    folder.save(1, True, epoch=1)
    folder.close()
    folder = run.RunFolder(Settings(out=str(tmp_path / "run")), ALONE, epoch=0)
    folder.restore(**objects(0))
    folder.start(1)
    assert best.exists()
    monkeypatch.setattr(run, "save_checkpoint", lambda path, state: written.append((path.name, state["epoch"])))
    folder.save(2, True, epoch=1)
    folder.save(4, epoch=2)
    assert written == [("checkpoint-best.pt", 1), ("checkpoint.pt", 1), ("checkpoint.pt", 2)]
