"""Settings that are refused, and errors that end in one sentence."""

import contextlib
import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
import types
from concurrent.futures import ProcessPoolExecutor
from importlib.machinery import ModuleSpec

import pytest
import torch
import tyro
from scripts import ROOT, one_sentence
from torch import nn
from torch.utils.checkpoint import checkpoint

from shared import cli, run
from shared.errors import UserError
from shared.loss import clip_loss


def test_activation_bytes():
    x = torch.zeros(4, 30)
    assert cli.activation_bytes(lambda: nn.Linear(30, 50)(x)) == 4 * 4 * 30  # the input, not the weights
    net = nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 7))
    assert cli.activation_bytes(lambda: net(x)) == 4 * 4 * (30 + 50)  # the ReLU's output is kept once
    with torch.no_grad():
        assert cli.activation_bytes(lambda: net(x)) == 0


class Chain(nn.Module):
    """Four blocks that can be recomputed."""

    def __init__(self):
        super().__init__()
        blocks = (nn.Sequential(nn.Linear(30, 50), nn.ReLU(), nn.Linear(50, 30)) for _ in range(4))
        self.blocks, self.grad_checkpointing = nn.ModuleList(blocks), False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.grad_checkpointing else block(x)
        return x


def test_activation_bytes_of_blocks_that_are_computed_again():
    x, chain = torch.zeros(4, 30), Chain()
    assert cli.activation_bytes(lambda: chain(x)) == 4 * 4 * 4 * (30 + 50)
    assert cli.activation_bytes(lambda: chain(x), chain) == 4 * 4 * (4 * 30 + 50)  # what all read, what one keeps
    assert chain.grad_checkpointing


def test_what_the_user_can_mend_is_one_sentence(capsys, monkeypatch: pytest.MonkeyPatch):
    def main():
        raise UserError("a\n  b")

    with pytest.raises(SystemExit) as stop:
        cli.command_line(main)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and err == "error: a b\n"
    monkeypatch.setenv("PAPER_CLIPS_TRACEBACK", "1")
    with pytest.raises(UserError):
        cli.command_line(main)


@pytest.mark.parametrize("error", [ValueError("a bug"), FileNotFoundError(2, "a bug"), RuntimeError("a bug")])
def test_other_errors_keep_their_traceback(error: Exception):
    def main():
        raise error

    with pytest.raises(type(error)):
        cli.command_line(main)


def test_a_full_disk_is_one_sentence(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    with pytest.raises(SystemExit):
        cli.command_line(main)
    said = capsys.readouterr().err
    assert one_sentence(said) and "runs/x" in said and "No space left" in said


def test_quiet_is_an_option_of_every_script(capsys, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("sys.argv", ["script", "--quiet", "emoji"])
    cli.command_line(lambda: (seen.append(list(sys.argv)), run.say("hidden")))
    cli.command_line(lambda: run.say("shown"))
    assert seen == [["script", "emoji"]] and capsys.readouterr().out == "shown\n" and not run.quiet()
    monkeypatch.setattr("sys.argv", ["script", "--help"])
    with pytest.raises(SystemExit) as stop:
        cli.command_line(lambda: sys.exit(0))
    assert stop.value.code == 0 and "--quiet" in capsys.readouterr().out


def one_number(number: int = 1) -> None:
    """A script."""


@pytest.mark.parametrize("name", ["protoclip.eval", "studies.harness.__main__"])
def test_usage_names_the_module(capsys, monkeypatch: pytest.MonkeyPatch, name: str):
    script = types.ModuleType("__main__")
    script.__file__, script.__spec__ = "/project/script.py", ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, "__main__", script)
    monkeypatch.setattr("sys.argv", ["/project/script.py", "--help"])
    with pytest.raises(SystemExit):
        cli.command_line(lambda: tyro.cli(one_number))
    assert f"python -m {name.removesuffix('.__main__')} " in capsys.readouterr().out


def test_what_a_mac_lacks_is_one_sentence(capsys):
    def main():
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64.")

    with pytest.raises(SystemExit):
        cli.command_line(main)
    assert "--device mps" in capsys.readouterr().err


class Unreadable(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row: int):
        raise UserError(f"sample {row} is broken")


def test_an_error_of_a_loader_worker_is_one_sentence_too(capsys):
    with pytest.raises(SystemExit):
        cli.command_line(lambda: list(torch.utils.data.DataLoader(Unreadable(), num_workers=1)))
    assert capsys.readouterr().err == "error: sample 0 is broken\n"


class Killed(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, row: int):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_loader_worker_is_one_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.command_line(lambda: list(torch.utils.data.DataLoader(Killed(), num_workers=1)))
    assert stop.value.code == 2 and "a worker process was killed" in capsys.readouterr().err


def killed(_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence(capsys):
    def main():
        with ProcessPoolExecutor(1) as pool:
            list(pool.map(killed, range(2)))

    with pytest.raises(SystemExit) as stop:
        cli.command_line(main)
    assert stop.value.code == 2 and "a worker process was killed" in capsys.readouterr().err


def test_ctrl_c_is_130():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stop:
        cli.command_line(interrupted)
    assert stop.value.code == 130
    cli.command_line(lambda: None)


def test_a_preset_comes_first(monkeypatch: pytest.MonkeyPatch):
    @dataclasses.dataclass
    class Settings:
        lr: float = 0.1

    presets = {"small": ("ours", Settings()), "paper": ("theirs", Settings(1.0))}
    for words, message in (
        (["--lr", "2"], "small, paper"),
        ([], "small, paper"),
        (["large", "--lr", "2"], "'large'"),
        (["paper", "--lr", "2"], None),
    ):
        monkeypatch.setattr(sys, "argv", ["train.py", *words])
        with contextlib.nullcontext() if message is None else pytest.raises(ValueError, match=re.escape(message)):
            assert cli.preset_cli(presets) == Settings(2.0)


def test_numbers_of_a_plan(capsys):
    cfg = types.SimpleNamespace(batch_size=64)
    layer = nn.Linear(256, 256, bias=False)
    cli.show_plan(
        [
            cli.disk_row(2_500_000, 2**28, 2**28),
            cli.disk_row(None, 2**30, each=110_000),
            cli.batch_row(cfg, 2),
            cli.batch_row(types.SimpleNamespace(batch_size=64, accumulate=4), 2),
            cli.step_row(1200, 400),
            *cli.rate_rows(lambda step: f"{step / 1000:.1e}", warmup=5000, total=1200),
            *cli.memory_rows(lambda: layer(torch.zeros(2, 256)), 2**20, 2**26, included="AdamW"),
        ]
    )
    numbers = [
        re.findall(r"(?<!\w)\d[\d.,]*(?:e[+-]\d+)?(?= |\)|$)", line) for line in capsys.readouterr().out.splitlines()
    ]
    assert numbers == [
        ["58.2", "25", "4.0"], ["110", "12.0"], ["64", "32", "2"], ["64", "32", "2", "4"], ["1,200", "400"],
        ["0.0e+00", "0"], ["6.0e-01", "600"], ["1.2e+00", "1,199"], ["5,000", "1,200"], ["2.0"], ["1.0", "1.0"],
    ]  # fmt: skip
    assert cli.rate_rows(str, 1, 0) == []


@pytest.mark.parametrize("folder", ["flame", "tldr_reduction"])
def test_a_missing_package_is_one_sentence_with_the_line_that_installs_it(folder: str):
    code = f"import {folder}, nothing_of_this_name.part"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    install = f"pip install '.[{folder.replace('_', '-')}]'"
    assert result.returncode == 2 and one_sentence(result.stderr), result.stderr
    assert "nothing_of_this_name" in result.stderr and install in result.stderr
    result = subprocess.run(
        [sys.executable, "-c", f"import {folder}.nothing"], capture_output=True, text=True, cwd=ROOT
    )
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_a_reader_that_ends_early_is_no_error(monkeypatch: pytest.MonkeyPatch):
    """As in `--help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        with pytest.raises(SystemExit) as stopped:
            cli.command_line(lambda: print("help"))
    assert stopped.value.code == 1


def test_another_broken_pipe_keeps_its_traceback():
    def worker() -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        cli.command_line(worker)


def test_a_warm_up_of_most_of_the_run_is_noted():
    assert "80 of 90" in run.long_warmup(80, 90)
    assert run.long_warmup(80, 160) is None and run.long_warmup(80, 0) is None and run.long_warmup(0, 90) is None


def test_the_first_loss_is_that_of_unrelated_features():
    torch.manual_seed(0)
    image, text = torch.nn.functional.normalize(torch.randn(2, 512, 512), dim=2)
    loss = clip_loss(image, text, torch.tensor(1 / 0.07)).item()
    expected = float(re.search(r"\d+\.\d+", cli.first_loss_row(512)[1])[0])
    assert expected < loss < expected + 0.3
