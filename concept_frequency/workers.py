"""Run a function on many jobs: in this process, on processes of this machine, or on a Ray cluster, with equal results.

Jobs and results are pickled; functions are found by name, so that the project is importable where they run.
"""

import itertools
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

SECONDS = 5.0  # that a Ray head may take to answer a knock
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])  # preface, empty SETTINGS frame


def run_jobs(
    work: Callable, jobs: Sequence, workers: int, address: str, gpu: bool = False
) -> Iterator[tuple[int, Any]]:
    """(number of the job, its result), as they come. `gpu`: a job takes one of the Ray cluster's, if it has any."""
    if address:
        yield from run_on_ray(work, jobs, gpu)
    elif workers == 1 or len(jobs) < 2:
        yield from ((i, work(job)) for i, job in enumerate(jobs))
    else:
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes to come
        with ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn")) as pool:
            futures = {pool.submit(work, job): i for i, job in enumerate(jobs)}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                pool.shutdown(cancel_futures=True)


def run_on_ray(work: Callable, jobs: Sequence, gpu: bool) -> Iterator[tuple[int, Any]]:
    """On the cluster that `connect` has connected to, a few jobs ahead for each of its processors."""
    import ray

    resources = ray.cluster_resources()
    remote = ray.remote(num_gpus=1 if gpu and resources.get("GPU") else 0)(work)
    todo = iter(enumerate(jobs))
    running = {remote.remote(job): i for i, job in itertools.islice(todo, 4 * int(resources.get("CPU", 1)))}
    while running:
        (ready,), _ = ray.wait(list(running), num_returns=1)
        try:
            yield running.pop(ready), ray.get(ready)
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None  # a sentence, not a report of both machines
        running |= {remote.remote(job): i for i, job in itertools.islice(todo, 1)}


def connect(address: str) -> None:
    """Connect to the Ray cluster at HOST:PORT, ray://HOST:PORT or `auto`, or start one here (`local`).

    Its processes import this project, and what lies in the working folder, from where this process does: machines
    share a file system, or have the project installed. ValueError in seconds where nothing answers; Ray would try for
    minutes.
    """
    try:
        import ray
    except ImportError:
        raise ValueError("--address needs Ray: pip install 'ray>=2.9'") from None
    if address not in ("auto", "local"):
        knock(address)
    folders = [str(Path(__file__).resolve().parents[1]), os.getcwd(), os.environ.get("PYTHONPATH", "")]
    environment = {"env_vars": {"PYTHONPATH": os.pathsep.join(filter(None, folders)), "OMP_NUM_THREADS": "1"}}
    try:
        ray.init(
            address=None if address == "local" else address, ignore_reinit_error=True, log_to_driver=False,
            runtime_env=environment,
        )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = str(error).splitlines()[0].partition(". ")[0]
        raise ValueError(f"--address {address}: no Ray cluster to connect to ({why})") from None


def knock(address: str) -> None:
    """ValueError unless what listens at [ray://]HOST:PORT speaks HTTP/2, as gRPC and so Ray's servers do.

    It is answered with a SETTINGS frame: length (3 bytes), type 4, flags, stream.
    """
    where = urlsplit(address if "://" in address else f"ray://{address}")
    try:
        host, port = where.hostname, where.port
    except ValueError:
        host = port = None
    if not host or not port:
        raise ValueError(f"--address is auto, local, HOST:PORT or ray://HOST:PORT, not {address!r}")
    try:
        with socket.create_connection((host, port), timeout=SECONDS) as connection:
            if os.environ.get("RAY_USE_TLS", "0") == "1":
                return
            connection.sendall(HTTP2)
            answer = connection.recv(9)
    except OSError as error:
        raise ValueError(f"--address {address}: nothing answers there ({error}); `ray status` names the head") from None
    if answer[3:4] != b"\x04":
        raise ValueError(f"--address {address}: what answers there is no Ray head; `ray status` names it")
