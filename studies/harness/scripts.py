"""Run scripts as forks of a server process that has already imported torch and the other libraries, so that scripts
need not wait seconds for these imports."""

import contextlib
import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from importlib.machinery import ModuleSpec
from multiprocessing import connection
from typing import IO
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
MAIN = sys.modules["__main__"]
STUDY = MAIN.__spec__  # of `python -m studies.PAPER`; None if this process was not started by -m
CONTEXT.set_forkserver_preload(["studies.harness.runner", *([STUDY.name] if STUDY else [])])
LOCK = threading.Lock()  # starting or joining a process also polls the processes that other threads started
RUNNING: set[multiprocessing.process.BaseProcess] = set()
PATIENCE = 3.0  # seconds that interrupted scripts have to end


def run_script(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `python -m module arguments` in a new process with our stdout and stderr, and return its exit code.

    The first call starts the server with `environment`. Threads may call this at the same time.
    """
    # torch then asks NVML for GPUs: forks could not use CUDA if the server had initialised it
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} | dict(environment)
    output = [connection.Connection(os.dup(stream), readable=False) for stream in (1, 2)]  # can be sent to a process
    process = CONTEXT.Process(target=script, args=(module, list(arguments), environment, output))
    no_main = mock.patch.object(MAIN, "__spec__", ModuleSpec("__main__", None))  # forks do not import the study again
    with LOCK, mock.patch.dict(os.environ, environment), no_main:
        process.start()
        RUNNING.add(process)
    connection.wait([process.sentinel])
    with LOCK:
        process.join()
        RUNNING.remove(process)
    return process.exitcode


def interrupt(futures: Collection[Future]) -> None:
    """Send SIGINT to the running scripts until these futures, which wait for them, are done; later SIGTERM, which also
    ends scripts that ignore SIGINT. Scripts that Ctrl+C in a terminal has reached already get PATIENCE seconds first.
    """
    stop, deadline = signal.SIGINT, time.monotonic() + PATIENCE
    while not all(future.done() for future in futures):
        left = list(RUNNING)
        left = [each for each in left if not connection.wait([each.sentinel], max(deadline - time.monotonic(), 0))]
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, stop)
        if left:
            stop, deadline = signal.SIGTERM, time.monotonic() + 2 * PATIENCE
        time.sleep(0.1)


def script(
    module: str, arguments: list[str], environment: dict[str, str], output: Sequence[connection.Connection | IO]
) -> None:
    """Run `python -m module arguments` in this process, a fork; its stdout and stderr go to the two files `output`."""
    for stream, file in enumerate(output, start=1):
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
