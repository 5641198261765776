"""What the end-to-end tests share: starts scripts in new processes, waits for them, kills them, compares their output.

A test module may name the script that it tests:

    SCRIPT = "protoclip.train"              # what `start`, `cli` and `in_process` run without `module`
    SECONDS = 300                           # how long `ended` waits; by default 120

Scripts are forks of a server that has imported preload.py, so that they start at once.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing

from shared import checkpoints, export, run

ROOT = Path(__file__).parent.parent
SHARDS = ROOT / "data/emoji/train"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}  # also for processes that are no forks
multiprocessing.set_forkserver_preload(["tests.preload"])
os.environ["PYTHONPATH"] = ENVIRONMENT["PYTHONPATH"]  # so that a server started in another folder finds it, too


class Ended(NamedTuple):
    code: int
    out: str
    err: str


def script(module: str, arguments: list[str], log: str, environment: dict[str, str]) -> None:
    """Run `python -m module arguments` in this process, a fork, which prints to LOG.out and LOG.err."""
    for stream, ending in enumerate(("out", "err"), start=1):
        with open(f"{log}.{ending}", "wb") as file:
            os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # loader workers start as they do elsewhere
    sys.path.insert(0, os.getcwd())
    try:
        run_module(module, arguments)
    except KeyboardInterrupt:  # while the module is imported
        sys.exit(130)


def run_module(module: str, arguments: list[str]) -> None:
    """Run a module as `__main__` with these arguments, even if it was imported before."""
    sys.argv[:] = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def embedded_corpus() -> None:
    """Fail if the embedded corpus is not built."""
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make data` makes it", pytrace=False)


@pytest.fixture(scope="module")
def folder(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """For the logs and run folders of a test module; deleted at its end."""
    path = tmp_path_factory.mktemp("runs")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def start(request: pytest.FixtureRequest, folder: Path):
    """start(*arguments, module=..., **environment) starts a script; `ended` waits for it."""
    tests = request.module
    context, count = multiprocessing.get_context("forkserver"), iter(range(10**6))
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)

        def start(*arguments, module: str = getattr(tests, "SCRIPT", ""), **environment: str):
            log = str(folder / f"log{next(count)}")
            process = context.Process(target=script, args=(module, [str(a) for a in arguments], log, environment))
            process.log, process.seconds = log, getattr(tests, "SECONDS", 120)
            process.start()
            return process

        yield start


def in_ranks(function: Callable, world_size: int, folder: Path, *arguments) -> list:
    """Results of `function(rank, *arguments)` in several gloo processes."""
    given = function, world_size, folder, arguments
    torch.multiprocessing.start_processes(one_rank, given, nprocs=world_size, start_method="forkserver")
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def one_rank(rank: int, function: Callable, world_size: int, folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=world_size)
    torch.save(function(rank, *arguments), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def cli(start):
    return lambda *arguments, **options: ended(start(*arguments, **options))


@pytest.fixture
def forked_exports(start, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports that a script needs are written by forks of the server; test_export.py uses real processes."""

    def fork(command: list[str], **_) -> types.SimpleNamespace:
        module, *arguments = command[2:]  # behind `python -m`
        result = ended(start(*arguments, module=module))
        return types.SimpleNamespace(returncode=result.code, stdout=result.out, stderr=result.err)

    monkeypatch.setattr(export, "subprocess", types.SimpleNamespace(run=fork))


@pytest.fixture
def in_process(request: pytest.FixtureRequest, capsys, monkeypatch: pytest.MonkeyPatch):
    """Run the script's command line in this process, which is faster for scripts that end before training."""

    def call(*arguments, module: str | None = None) -> Ended:
        module = module or request.module.SCRIPT
        monkeypatch.setattr(sys, "argv", [module, *map(str, arguments)])
        monkeypatch.delitem(sys.modules, module, raising=False)
        plain = [finder for finder in sys.meta_path if type(finder).__name__ != "AssertionRewritingHook"]
        monkeypatch.setattr(sys, "meta_path", plain)  # pytest's loader, which runpy cannot use
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as stop:
            code = stop.code
        return Ended(code, *capsys.readouterr())

    return call


@pytest.fixture
def no_initial_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are 0, since a dry run counts them alone: drawing them takes most of its time."""
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda self, *_, **__: self.zero_())


class Lazily(dict):
    """A mapping that computes `make(key)` at the first access, so that only arms that a test file uses are trained."""

    def __init__(self, make: Callable):
        super().__init__()
        self.make = make

    def __missing__(self, key):
        self[key] = self.make(key)
        return self[key]


def ended(process) -> Ended:
    process.join(process.seconds)
    if process.is_alive():
        process.kill()
        pytest.fail(f"still running after {process.seconds} s")
    return Ended(process.exitcode, Path(process.log + ".out").read_text(), Path(process.log + ".err").read_text())


def finished(result: Ended) -> Ended:
    assert result.code == 0, result.err
    return result


def one_sentence(err: str) -> bool:
    return err.startswith("error: ") and err.count("\n") == 1 and "Traceback" not in err


def refused(result: Ended, *patterns: str) -> None:
    """Assert exit code 2 and one sentence that matches one of these regular expressions, or holds it as it is."""
    said = any(pattern in result.err or re.search(pattern, result.err) for pattern in patterns)
    assert result.code == 2 and one_sentence(result.err) and said, result


def kill_when(process, ready: Callable[[], bool], timeout: float = 60, how: int = signal.SIGKILL) -> None:
    """Send the signal `how` as soon as `ready()` is true."""
    deadline = time.monotonic() + timeout
    while process.is_alive() and not ready():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, how)
    process.join()
    assert process.exitcode == -how, ended(process)


def kill_at(process, out: Path, line: int, timeout: float = 60, how: int = signal.SIGKILL) -> None:
    """Send the signal `how` as soon as metrics.jsonl has this number of lines."""
    log = out / "metrics.jsonl"
    kill_when(process, lambda: log.exists() and log.read_bytes().count(b"\n") >= line, timeout, how)


@contextlib.contextmanager
def held(folder: Path):
    """Context in which another process holds the folder's lock (`shared.run.lock`)."""
    folder.mkdir(parents=True, exist_ok=True)
    code = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with subprocess.Popen([sys.executable, "-c", code, str(folder / ".lock")], **pipes) as other:
        other.stdout.readline()
        yield
        other.kill()


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def start_two(start, *arguments, count: int = 2, **options) -> list:
    """Start the script in `count` processes with the environment variables of torchrun."""
    peers = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [start(*arguments, RANK=str(rank), LOCAL_RANK=str(rank), **peers, **options) for rank in range(count)]


def in_turn(*answers) -> Callable:
    """A function that returns the next answer at each call, or raises it if it is an exception."""
    left = iter(answers)

    def answer(*_, **__):
        if isinstance(value := next(left), Exception):
            raise value
        return value

    return answer


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl without values that may differ from run to run."""
    return [{name: value for name, value in line.items() if name != "seconds"} for line in run.read_metrics(out)]


def same(a, b) -> bool:
    """Whether nested containers are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def trained(out: Path) -> dict:
    """The checkpoint of a run without values that may differ from run to run."""
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    return {key: value for key, value in state.items() if key not in ("seconds", "config", "name", "commit")}


@contextlib.contextmanager
def room(size: int):
    """No file can grow beyond this number of bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
