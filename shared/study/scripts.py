"""Run scripts as forks of a server process that has imported torch and the other libraries, which saves each script the
seconds of importing them."""

import multiprocessing
import os
import runpy
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing import connection, forkserver
from unittest import mock

CONTEXT = multiprocessing.get_context("forkserver")
LOCK = threading.Lock()  # a thread that starts or joins a process also asks the others' whether they have ended


def run_script(module: str, arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `python -m module arguments` in a process of its own and return its exit code; it prints where we do.

    The first call starts the server with `environment`. Threads may call this at the same time.
    """
    # by asking NVML for GPUs the server does not initialise CUDA, which no fork could use then
    environment = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"} | dict(environment)
    output = [connection.Connection(os.dup(stream), readable=False) for stream in (1, 2)]  # can be sent to a process
    process = CONTEXT.Process(target=script, args=(module, list(arguments), environment, output))
    study = sys.modules["__main__"].__spec__  # None if we were not started by `python -m`
    with LOCK, mock.patch.dict(os.environ, environment):
        CONTEXT.set_forkserver_preload(["shared.study.runner", *([study.name] if study else [])])
        forkserver.ensure_running()
        process.start()
    connection.wait([process.sentinel])
    with LOCK:
        process.join()
    return process.exitcode


def script(
    module: str, arguments: list[str], environment: dict[str, str], output: Sequence[connection.Connection]
) -> None:
    """Run `python -m module arguments` in this process, which prints to `output`: stdout and stderr."""
    for stream, file in enumerate(output, start=1):
        os.dup2(file.fileno(), stream)
    os.environ.update(environment)
    multiprocessing.set_start_method(None, force=True)  # loader workers start as they do elsewhere
    sys.argv[:] = [module, *arguments]
    sys.path.insert(0, os.getcwd())
    sys.modules.pop(module, None)  # imported with the study, but a script starts without
    runpy.run_module(module, run_name="__main__", alter_sys=True)
