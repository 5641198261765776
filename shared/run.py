"""A process and its run folder: setup, gathering over processes, precision, progress lines, resume, save, log.

A thin layer over torch, open_clip_train, tensorboard and tqdm, independent of the papers.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import inspect
import itertools
import json
import math
import os
import platform
import random
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

import matplotlib
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.nn
from open_clip_train.distributed import init_distributed_device_so
from torch import nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from shared.accumulate import micro_batches
from shared.checkpoints import ROOT, link, resume, save_checkpoint, write_json
from shared.errors import UserError

matplotlib.use("Agg")  # plots go to files


_patient = None  # process group of `broadcast`, `wait` and `gather_lists`


class Process(NamedTuple):
    """Rank, number of processes, and device of this process."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def setup(seed: int, device: str = "auto") -> Process:
    """Seed all generators, and join the process group if torchrun or SLURM's srun started the process.

    `device` is auto (CUDA if available), cpu, cuda, cuda:N, or mps on a Mac. With several processes, each takes the GPU
    of its local rank, modulo the number of GPUs. If torchrun starts more processes than there are GPUs, they use gloo,
    since NCCL cannot share a GPU. On a CPU the flash kernel of scaled dot product attention is turned off: for a few
    dozen tokens its backward pass is several times slower than the plain one.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise UserError(f"there is no device {device!r}: --device is auto, cpu, cuda, cuda:N or mps")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError("device 'mps' was requested, but torch finds no Apple GPU; use --device cpu")
    if device == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError("--device mps supports only one process: start the script without torchrun")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"device {device!r} was requested, but torch finds no CUDA device; use --device cpu")
    if "SLURM_NTASKS" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        os.environ.setdefault("WORLD_SIZE", "1")  # in an allocation, but not by srun: there are no peers to wait for
    crowded = device.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()
    info = init_distributed_device_so(
        "cpu" if device == "mps" else device, "gloo" if crowded else None, no_set_device_rank=True
    )
    place = torch.device(device if device == "mps" else info["device"])
    if place.type == "cuda" and info["distributed"]:  # with SLURM, a process may see only its own GPU, as number 0
        place = torch.device("cuda", info["local_rank"] % torch.cuda.device_count())
    if place.index is not None:
        torch.cuda.set_device(place)
    if info["distributed"]:  # a group with a long timeout, for ranks that wait hours for others
        global _patient
        _patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    warnings.filterwarnings("ignore", "This DataLoader will create")  # --workers on a machine with fewer cores
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True  # shapes rarely change between steps
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(place.type != "cpu")
    return Process(info["global_rank"], info["world_size"], place)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def stable_hash(*parts: int | str) -> int:
    """A 63-bit hash of its arguments, the same in every process and on every machine."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_step(cfg: Any, step: int, process: Process) -> None:
    """Seed the generators for a step, so that a resumed run has the same dropout and masks."""
    torch.manual_seed(stable_hash(cfg.seed, step, process.rank))


def finish() -> None:
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(value: Any, process: Process) -> Any:
    """Rank 0's `value` on every rank; other ranks may pass None."""
    if process.world_size == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_patient)
    return box[0]


def wait() -> None:
    """Barrier with a timeout of hours, for example during rank 0's evaluation."""
    if dist.is_initialized():
        dist.barrier(group=_patient)


def gather_lists(items: list, process: Process) -> list:
    """The items of all ranks, concatenated, on every rank; waits up to hours for the slowest rank."""
    if process.world_size == 1:
        return items
    boxes: list = [None] * process.world_size
    dist.all_gather_object(boxes, items, group=_patient)
    return [item for box in boxes for item in box]


def over_ranks(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means of scalars over all processes, so that logged values are of the global batch."""
    if not dist.is_initialized():
        return values
    means = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(means)
    return dict(zip(values, means / dist.get_world_size(), strict=True))


def distributed(model: nn.Module, process: Process, accumulate: int = 1, **options: Any) -> nn.Module:
    """The model, wrapped in `MicroBatches` if a step has several, and in DistributedDataParallel (with `options`) if
    there are several processes."""
    network = micro_batches(model, accumulate)
    return DistributedDataParallel(network, **options) if process.world_size > 1 else network


def bare(model: nn.Module) -> nn.Module:
    """The model without the wrappers of `distributed` and of micro-batches."""
    while hasattr(model, "module"):
        model = model.module
    return model


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Copy rank 0's buffers to all ranks: statistics of batch norms differ between them."""
    for buffer in model.buffers() if dist.is_initialized() else ():
        dist.broadcast(buffer, src=0)


def sum_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def gather(features: torch.Tensor, with_grad: bool = True) -> torch.Tensor:
    """Features of all ranks, in rank order: (B, D) -> (W*B, D).

    With `with_grad`, gradients flow to the features of every rank; after DDP's averaging, W processes then equal one
    process with W times the batch. Without it, gradients flow only to this rank's features, so that the encoders'
    gradients are W times smaller.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    if with_grad and features.requires_grad:
        return torch.cat(torch.distributed.nn.all_gather(features))
    gathered = [torch.zeros_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, features.detach().contiguous())
    gathered[dist.get_rank()] = features
    return torch.cat(gathered)


def own_columns(features: torch.Tensor, gathered: bool = True) -> torch.Tensor:
    """Columns of this rank's features (B, D) in the logits: (B,) int64, from 0 if features are not `gathered`."""
    rank = dist.get_rank() if gathered and dist.is_initialized() else 0
    return torch.arange(len(features), device=features.device) + rank * len(features)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in pinned memory, for asynchronous copies, if the device is a GPU; else the tensor itself."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


# -------------------------------------------------------------------------------------------------------- precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str, device: torch.device) -> str:
    """Precision for a device: auto -> bf16 if the hardware supports it, else fp16 on a GPU, fp32 on a CPU or Mac.

    UserError for other names, or fp16 on a CPU.
    """
    if name not in ("auto", "bf16", "fp16", "fp32"):
        raise UserError(f"--precision is one of auto, bf16, fp16, fp32, not {name!r}")
    if name == "fp16" and device.type == "cpu":
        raise UserError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "mps":  # untested; its half precisions depend on the version
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile")]
    return "bf16" if any(native) else "fp32"


def autocast(precision: str | torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast context for a forward pass; `precision` is auto, bf16, fp16 or fp32 (no autocast), or a dtype."""
    dtype = precision if isinstance(precision, torch.dtype) else DTYPES[resolve_precision(precision, device)]
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


def grad_scaler(cfg: Any, process: Process) -> GradScaler:
    """The scaler of gradients, which only fp16 needs; otherwise it changes nothing."""
    return GradScaler(process.device.type, enabled=resolve_precision(cfg.precision, process.device) == "fp16")


# --------------------------------------------------------------------------------------------------------- progress

QUIET = "PAPER_CLIPS_QUIET"  # environment variable that turns progress off


def quiet() -> bool:
    """Whether --quiet was passed, or QUIET is set (studies set it for their runs)."""
    return bool(os.environ.get(QUIET))


def say(text: str, process: Process | None = None) -> None:
    """Print a line, above a progress bar if there is one. Prints nothing if `quiet`, or on ranks above 0."""
    if not quiet() and (process is None or process.main):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()


class Bar(tqdm):
    """A progress bar that is hidden for its first `delay` seconds, also from `tqdm.write`, which would show it at once
    and leave it on the screen."""

    def refresh(self, *args: Any, **how: Any) -> None:
        if self._time() >= self.start_t + self.delay:
            super().refresh(*args, **how)
            self.last_print_t = self._time()

    def clear(self, *args: Any, **how: Any) -> None:
        if self.last_print_t > self.start_t:
            super().clear(*args, **how)


@contextlib.contextmanager
def counting(
    total: int | None, label: str | None, unit: str = "image", process: Process | None = None
) -> Iterator[Callable[[int], None]]:
    """Context that yields `tick(n, note)`, to be called when n more of `total` units are done; shows a progress bar, in
    a log once a minute. Nothing if `quiet`, or on ranks above 0."""
    hidden = quiet() or not (process is None or process.main)
    every = 0.1 if sys.stderr.isatty() else 60.0
    how = {"leave": False, "unit": unit, "unit_scale": total is None or total >= 10_000, "dynamic_ncols": True}
    with Bar(total=total, desc=label, disable=hidden, mininterval=every, delay=every, **how) as bar:

        def tick(n: int = 1, note: str = "") -> None:
            bar.set_postfix_str(note, refresh=False)
            bar.update(n)

        yield tick


def progress(
    items: Iterable, total: int | None, label: str | None, images: int = 1, process: Process | None = None,
    unit: str = "image",
) -> Iterator:  # fmt: skip
    """Yield the next `total` items (None: all) and show their progress with `counting`; an item counts as `images`
    units."""
    whole = None if total is None else total * images
    with counting(whole, label, unit, process) as tick:
        for item in itertools.islice(items, total):
            yield item
            tick(images)


# ------------------------------------------------------------------------------------------------------ run folders


def lock(folder: Path, process: Process | None = None, name: str = ".lock") -> IO[str] | contextlib.nullcontext:
    """Lock a folder for this process -> the lock file; the lock lasts until it is closed or the process ends.

    UserError if another process has the lock. Ranks above 0 do nothing: rank 0 locks for them.
    """
    if process is not None and not process.main:
        return contextlib.nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / name, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # loader workers do not inherit this lock
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise UserError(f"{folder} belongs to a run that is still going: wait, or choose another --out") from error
        print(f"{folder} is on a file system without locks ({error.strerror}): do not start another run in it")
    return file


class RunLog:
    """Writes a run folder's config.json, metrics.jsonl and tensorboard/; does nothing on ranks above 0.

    On resume at `step`, lines of later steps (written after the last checkpoint) are removed, so that metrics.jsonl
    becomes that of an uninterrupted run.
    """

    def __init__(self, folder: Path, config: Any, process: Process, step: int = 0):
        self.active = process.main
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "metrics.jsonl", "a+")
        write_json(folder / "config.json", dataclasses.asdict(config))
        self.file.seek(0)
        kept = itertools.takewhile(lambda line: line["step"] <= step, parsed(self.file, folder / "metrics.jsonl"))
        self.file.truncate(sum(line["bytes"] for line in kept) if step else 0)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def write(self, step: int, **values: float) -> None:
        """Write one line of metrics.jsonl, and the same numbers to TensorBoard."""
        if not self.active:
            return
        values = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.close()  # else Python tries to flush again at exit
            raise UserError(f"{self.file.name} could not be written ({error.strerror})") from error
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


class Stopwatch:
    """Seconds of training, without evaluation; `seconds` is the time before a resume."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self._start = seconds, time.perf_counter()

    def read(self) -> float:
        return self.seconds + time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self):
        self.seconds = self.read()
        try:
            yield
        finally:
            self._start = time.perf_counter()


def long_warmup(warmup: int, total: int) -> str | None:
    """A note on a run whose learning rate rises in more than half of its `total` steps; None for others."""
    if 2 * warmup <= total or not total:
        return None
    return f"the learning rate rises in {warmup:,} of {total:,} steps: shorten the warm-up, or train longer"


class RunFolder:
    """A run folder: resumes from its checkpoint.pt, logs to metrics.jsonl and TensorBoard, saves.

        folder = RunFolder(cfg, process, epoch=0, batch=0)         # initial state, if there is no checkpoint
        if folder.finished(epoch=cfg.epochs):
            return folder.path
        folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
        folder.start(step, total, len(pairs), data=pairs.fingerprint)
        ...
            folder.log(step, epoch=epoch, loss=loss)
            if folder.due(step):
                folder.save(step, epoch=epoch, batch=batch)
        folder.close()

    `cfg` is the run's dataclass, with `out` and `save_every`. Ranks above 0 write nothing.
    """

    def __init__(self, cfg: Any, process: Process, **first: Any):
        self.cfg, self.process, self.path = cfg, process, Path(cfg.out)
        self.lock = lock(self.path, process)  # before the checkpoint is read
        found = resume(self.path, cfg)
        self.resumed, self.state = found is not None, first if found is None else found
        self.objects: dict[str, Any] = {}

    def finished(self, **totals: int) -> bool:
        """Whether the checkpoint has reached a total, as in `epoch=cfg.epochs`; if so, prints that it is finished."""
        ((name, total),) = totals.items()
        done = self.state[name] >= total
        if done and self.process.main:
            print(f"{self.path} is finished ({total} {name}s); nothing to do")
        return done

    def restore(self, **objects: Any) -> None:
        """Load objects with a state_dict from the checkpoint, by name, and include them in later checkpoints.

        Loaded values are removed from `state` to free their memory.
        """
        self.objects = objects
        for name, one in objects.items() if self.resumed else ():
            if not disabled(one):
                one.load_state_dict(self.state[name])
                del self.state[name]

    def start(
        self, step: int, total: int = 0, samples: int | None = None, warmup: int | None = None, **fixed: Any
    ) -> None:
        """Open the log after `step`, the last saved one, start the clock, and print the size of the run.

        The printed line has `samples`, `total` steps, device and precision; a note follows if `warmup`, by default the
        settings', is most of the steps. `fixed`: digests of what the run is made with, which every checkpoint holds.
        UserError if the checkpoint was made with something else.
        """
        for name, value in fixed.items():
            what = "on other data than there are" if name == "data" else f"with another {name} than the one given"
            self.check_same(name, value, what)
        wait()  # a rank may index or copy data for hours, longer than the default timeout
        self.total, self.loss = total, None
        self.saved, self.fixed, self.commit = step, fixed, commit()
        self.metrics = RunLog(self.path, self.cfg, self.process, step)
        if self.process.main and not self.resumed:  # it is of an earlier run, whose checkpoint.pt was removed
            (self.path / "checkpoint-best.pt").unlink(missing_ok=True)
        self.clock = Stopwatch(self.state["seconds"] if self.resumed else 0.0)
        if total:
            cfg, (_, processes, device) = self.cfg, self.process
            source = next(filter(None, (getattr(cfg, name, "") for name in ("features", "benchmark", "data"))), "")
            many = f"{processes} processes on " if processes > 1 else ""
            what = "samples" if samples is None else f"{samples:,} samples"
            begun = f", {step:,} of them done" if step else ""
            say(
                f"{self.path}: {what} of {source}, {total:,} steps of {cfg.batch_size:,}{begun}, {many}{device} in "
                f"{resolve_precision(cfg.precision, device)}",
                self.process,
            )
            warmup = getattr(cfg, "warmup", 0) if warmup is None else warmup
            if self.process.main and (note := long_warmup(warmup, total)):
                print(f"note: {note}")

    def check_same(self, name: str, value: str | None, than: str) -> None:
        """UserError if the checkpoint's entry `name` is not `value`; None on either side is unknown, and passes.

        `than` completes the message "PATH was trained ...", as in "on other data than DATA holds now".
        """
        if None not in (before := self.state.get(name), value) and before != value:
            raise UserError(f"{self.path} was trained {than}: choose another --out")

    def log(self, step: int, /, **values: Any) -> None:
        """Like `write`, but UserError if a `loss` among the values is not finite."""
        self.write(step, **values)
        if "loss" in values:
            check_loss(values["loss"], step)

    def write(self, step: int, /, **values: Any) -> None:
        """Write a line of metrics with the seconds so far; print it if it has no loss (an evaluation)."""
        self.metrics.write(step, seconds=self.clock.read(), **values)
        if "loss" in values:
            self.loss = values["loss"]
        elif self.total:
            shown = "".join(
                f", {name} {value:.4g}"
                for name, value in values.items()
                if name not in ("epoch", "episode") and not isinstance(value, str)
            )
            say(f"{self.path}: step {step:,} of {self.total:,}{shown}", self.process)

    def due(self, step: int) -> bool:
        """Whether to save now: `save_every` steps after the last checkpoint, or at a step to keep (`keep_every`)."""
        return step - self.saved >= self.cfg.save_every or self.is_kept(step)

    @contextlib.contextmanager
    def evaluation(self, step: int, /, **values: Any) -> Iterator[None]:
        """Stop the clock during an evaluation. If it fails, `save` with `values`, from which a run repeats it alone."""
        try:
            with self.clock.paused():
                yield
        except Exception:
            self.save(step, **values)
            raise

    def evaluates(self, done: int, total: int) -> bool:
        """Whether this rank evaluates after pass `done` of `total`: rank 0, every `eval_every` passes and at last."""
        every = self.cfg.eval_every
        return self.process.main and every > 0 and (done % every == 0 or done == total)

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of this step is also kept as checkpoint-STEP.pt."""
        every = getattr(self.cfg, "keep_every", 0)
        return every > 0 and step % every == 0

    def save(self, step: int, /, is_best: bool = False, **values: Any) -> None:
        """Write checkpoint.pt: the objects of `restore`, `values`, `fixed` of `start`, seconds, commit and settings.

        `is_best` also writes checkpoint-best.pt, first: a run that is killed in between then repeats both.
        """
        self.saved = step
        if self.process.main:
            states = {name: one.state_dict() for name, one in self.objects.items() if not disabled(one)}
            about = {"seconds": self.clock.read(), "commit": self.commit, "config": dataclasses.asdict(self.cfg)}
            about["paper"] = paper_of(self.cfg)
            values = {name: plain(value) for name, value in values.items()}
            for name in ["checkpoint-best.pt"] * is_best + ["checkpoint.pt"]:
                save_checkpoint(self.path / name, states | values | self.fixed | about)
            if self.is_kept(step):
                kept = self.path / f"checkpoint-{step}.pt"
                kept.unlink(missing_ok=True)
                link(self.path / "checkpoint.pt", kept)

    def close(self, flags: str = "--sets FOLDER", then: str | None = None) -> None:
        """Close the log; print that the run is finished and the next command, `then`.

        then: "" prints no command; None prints the evaluation's, with `flags` if the run has no `own_set`.
        """
        self.metrics.close()
        self.lock.__exit__(None, None, None)
        if self.total and self.process.main and not quiet():
            if then is None:
                flags = "" if own_set(vars(self.cfg)) else flags
                then = f"python -m {paper_of(self.cfg)}.eval {self.path} {flags}".rstrip()
            loss = "" if self.loss is None else f", loss {float(torch.as_tensor(self.loss).detach()):.4g}"
            after = f"; next: {then}" if then else ""
            took = timedelta(seconds=round(self.clock.read()))
            say(f"{self.path}: finished, {self.total:,} steps in {took}{loss}{after}")


def paper_of(cfg: Any) -> str:
    """Folder name of the paper whose file defines the class of `cfg` (its module may be __main__)."""
    return Path(inspect.getfile(type(cfg))).parent.name


def folder_of(data: str) -> Path:
    """The first path of --data; if it has braces, the folder before them."""
    first, brace, _ = data.partition("::")[0].partition("{")
    return Path(first.rpartition("/")[0] if brace else first)


def own_set(settings: dict[str, Any]) -> str | None:
    """The evaluation set of a run with these settings: eval_set, or eval/held_out beside its training data, which
    shared.pack writes; None if there is no such folder here."""
    folders = settings.get("eval_set"), folder_of(str(settings.get("data"))).parent / "eval/held_out"
    return next((str(folder) for folder in folders if folder and Path(folder).is_dir()), None)


def plain(value: Any) -> Any:
    """A named tuple as a dict, which a checkpoint can hold; other values unchanged."""
    return value._asdict() if hasattr(value, "_asdict") else value


def disabled(one: Any) -> bool:
    """Whether this object is a disabled gradient scaler, which has no state."""
    return isinstance(one, GradScaler) and not one.is_enabled()


def machine() -> str:
    """Processor, cores, GPU and torch version of this machine, for results."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def commit() -> str:
    """The repository's commit, with + if .py files have changed since; "unknown" outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def check_loss(loss: torch.Tensor, step: int) -> None:
    """UserError if the loss () of a step is not finite."""
    if not math.isfinite(value := loss.item()):
        raise UserError(f"the loss is {value} at step {step}: lower --lr, or use --precision fp32")


def read_metrics(folder: Path, key: str = "step") -> list[dict]:
    """The lines of a run's metrics.jsonl that contain `key`; a last line that is not complete is left out.

    UserError names a line that is damaged.
    """
    file = Path(folder) / "metrics.jsonl"
    lines = [line for line in parsed(file.read_text().splitlines(keepends=True), file) if key in line]
    for line in lines:
        del line["bytes"]
    return lines


def parsed(lines: Iterable[str], file: Path) -> Iterator[dict]:
    """The lines of a metrics.jsonl as dicts, with their number of bytes as "bytes". A last line that is not complete
    (of a run that still writes, or was killed) is left out; UserError names a damaged one."""
    for number, text in enumerate(lines, 1):
        if not text.endswith("\n"):
            return
        try:
            line = json.loads(text)
            line["step"], line["bytes"] = line["step"], len(text.encode())
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file}, line {number} is damaged: remove this line") from error
        yield line
