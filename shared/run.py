"""A process and its run folder: start-up, gathering over processes, precision, signs of life, resume, save, log.

Thin on purpose: torch, open_clip_train, tensorboard and tqdm do the work; nothing here knows of any paper.
"""

import contextlib
import dataclasses
import errno
import fcntl
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
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, NamedTuple

import matplotlib
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.distributed.nn
from open_clip_train.distributed import init_distributed_device_so
from torch.amp import GradScaler
from tqdm import tqdm

from shared.checkpoints import replaced, resume, save_checkpoint, write_json

matplotlib.use("Agg")  # plots go to files
open_clip.add_model_config(Path(__file__).parent / "model_configs")  # the emoji-scale towers, by name like any other


_patient = None  # process group of `broadcast` and `gather_lists`


class Process(NamedTuple):
    """Where this process stands among its peers (one process without torchrun)."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def main(self) -> bool:
        return self.rank == 0


def setup(seed: int, device: str = "auto") -> Process:
    """Seed every generator and join the process group if torchrun (or SLURM's srun) started us.

    `device` is auto (CUDA if there is one), cpu, cuda, cuda:N, or mps on a Mac. Of several processes each takes the GPU
    of its local rank, modulo their number; where torchrun starts more of them than there are GPUs, they talk by gloo,
    since NCCL refuses to share one. On a CPU the flash kernel of scaled dot product attention is switched off: its
    backward pass is several times slower than the plain one at a few dozen tokens.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", device):
        raise ValueError(f"there is no device {device!r}: --device is auto, cpu, cuda, cuda:N or mps")
    if device == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' was asked for, but torch sees no GPU of a Mac; use --device cpu")
    if device == "mps" and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("--device mps is one GPU, which one process uses: start the script without torchrun")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device; use --device cpu")
    if "SLURM_NTASKS" in os.environ and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        os.environ.setdefault("WORLD_SIZE", "1")  # in an allocation, but not by srun: there are no peers to wait for
    crowded = device.startswith("cuda") and int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > torch.cuda.device_count()
    info = init_distributed_device_so(
        "cpu" if device == "mps" else device, "gloo" if crowded else None, no_set_device_rank=True
    )
    place = torch.device(device if device == "mps" else info["device"])
    if place.type == "cuda" and info["distributed"]:  # SLURM may show each process its own GPU alone, as number 0
        place = torch.device("cuda", info["local_rank"] % torch.cuda.device_count())
    if place.index is not None:
        torch.cuda.set_device(place)
    if info["distributed"]:  # for ranks that wait, for hours if need be, while others work something out
        global _patient
        _patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = True  # most steps have the shapes of the step before
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cuda.enable_flash_sdp(place.type != "cpu")
    return Process(info["global_rank"], info["world_size"], place)


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
    """Ranks wait for each other, for hours if need be: for rank 0's evaluation, say, or for data."""
    if dist.is_initialized():
        dist.barrier(group=_patient)


def gather_lists(items: list, process: Process) -> list:
    """The items of all ranks, on every rank; each waits for the slowest, as long as that takes."""
    if process.world_size == 1:
        return items
    boxes: list = [None] * process.world_size
    dist.all_gather_object(boxes, items, group=_patient)
    return [item for box in boxes for item in box]


def over_ranks(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Means over all processes of scalars by name: what is logged of a step is of its global batch."""
    if not dist.is_initialized():
        return values
    means = torch.stack([value.detach().float() for value in values.values()])
    dist.all_reduce(means)
    return dict(zip(values, means / dist.get_world_size(), strict=True))


def gather(features: torch.Tensor, with_grad: bool = True) -> torch.Tensor:
    """Rows of all ranks, in rank order: (B, D) -> (W*B, D).

    `with_grad`: gradients flow to every rank's rows, and W processes equal one with W times the batch after DDP's
    averaging. Without, only the own rows carry gradient, which makes the encoders' W times smaller.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    if with_grad and features.requires_grad:
        return torch.cat(torch.distributed.nn.all_gather(features))
    gathered = [torch.zeros_like(features) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, features.detach().contiguous())
    gathered[dist.get_rank()] = features
    return torch.cat(gathered)


def own_columns(features: torch.Tensor) -> torch.Tensor:
    """Where this rank's rows (B, D) stand among the gathered ones: (B,) int64."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(features), device=features.device) + rank * len(features)


def pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor in page-locked memory, from which copies to a GPU wait for nothing; as it is for another device."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


# -------------------------------------------------------------------------------------------------------- precision

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def resolve_precision(name: str, device: torch.device) -> str:
    """auto -> bf16 where the processor computes in it, else fp32. The others (bf16, fp16, fp32) stand as they are."""
    if name not in ("auto", "bf16", "fp16", "fp32"):
        raise ValueError(f"--precision is one of auto, bf16, fp16, fp32, not {name!r}")
    if name == "fp16" and device.type == "cpu":
        raise ValueError("--precision fp16 needs a GPU; on a CPU use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "mps":  # untried here, and its half precisions differ by version
        return "fp32"
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile")]
    return "bf16" if any(native) else "fp32"


def autocast(precision: str | torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast region for a forward pass; `precision` is bf16, fp16 or fp32 (then it does nothing), or such a dtype."""
    dtype = DTYPES.get(precision, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ---------------------------------------------------------------------------------------------------- signs of life

QUIET = "PAPER_CLIPS_QUIET"  # in the environment: no signs of life
EVERY = 60.0  # seconds: off a terminal, long work says so often how far it is
_last = time.monotonic()  # when a line was said


def quiet() -> bool:
    """Whether --quiet was passed, or the environment says so, as a study does for its runs."""
    return bool(os.environ.get(QUIET))


def say(text: str, process: Process | None = None) -> None:
    """Print a line about what is going on, above a progress bar if there is one; nothing if `quiet`, or on ranks other
    than 0."""
    global _last
    if not quiet() and (process is None or process.main):
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
        _last = time.monotonic()


def silent(seconds: float = EVERY) -> bool:
    """Whether a line is due: nothing was said for so long, no terminal shows a progress bar, and not `quiet`."""
    return time.monotonic() - _last >= seconds and not sys.stderr.isatty() and not quiet()


def duration(seconds: float) -> str:
    """Hours, minutes and seconds, as in 0:01:40."""
    return str(timedelta(seconds=round(seconds)))


@contextlib.contextmanager
def counting(
    total: int | None, label: str | None, unit: str = "image", process: Process | None = None
) -> Iterator[Callable[[int], None]]:
    """Gives `tick(n, note)`, to be called whenever n of `total` things are done: a bar on a terminal, elsewhere a line
    a minute, with things a second and the time left; nothing if `quiet`, or on ranks other than 0."""
    shown = not quiet() and (process is None or process.main)
    how = {"leave": False, "unit": unit, "unit_scale": total is None or total >= 10_000, "dynamic_ncols": True}
    done, start = 0, time.monotonic()
    with tqdm(total=total, desc=label, disable=None if shown else True, **how) as bar:

        def tick(n: int = 1, note: str = "") -> None:
            nonlocal done
            done += n
            bar.set_postfix_str(note, refresh=False)
            bar.update(n)
            passed = time.monotonic() - start
            if shown and passed >= EVERY and silent():
                rate = done / max(passed, 1e-9)
                of, left = (f" of {total:,}", f", {duration((total - done) / rate)} left") if total else ("", "")
                say(f"{label or 'working'}: {done:,}{of} {unit}s, {rate:,.1f} {unit}s/s{left}{note and ', '}{note}")

        yield tick


def progress(
    items: Iterable, total: int | None, label: str | None, images: int = 1, process: Process | None = None,
    unit: str = "image",
) -> Iterator:  # fmt: skip
    """The next `total` items (None: all), batches of `images` things of this unit, which are `counting`."""
    whole = None if total is None else total * images
    with counting(whole, label, unit, process) as tick:
        for item in itertools.islice(items, total):
            yield item
            tick(images)


# ------------------------------------------------------------------------------------------------------ run folders


def lock(folder: Path, process: Process | None = None, name: str = ".lock") -> IO[str] | contextlib.nullcontext:
    """Make a folder this process' own, as long as the file that this returns is open and the process lives.

    ValueError if it is another process' already. Ranks other than 0 get nothing: their rank 0 has it for them.
    """
    if process is not None and not process.main:
        return contextlib.nullcontext()
    folder.mkdir(parents=True, exist_ok=True)
    file = open(folder / name, "a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process alone: no loader worker inherits it
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ValueError(f"{folder} belongs to a run that is still going: wait, or choose another --out") from error
        print(f"{folder} is on a file system without locks ({error.strerror}): give no other run this folder")
    return file


class RunLog:
    """A run folder's config.json, metrics.jsonl and tensorboard/; silent on ranks other than 0.

    On resume at `step`, lines of later steps (written after the last checkpoint) are dropped, so that the file reads
    as if the run had never stopped. The process that writes it has it locked, as long as it lives: ValueError if
    another one does.
    """

    def __init__(self, folder: Path, config: Any, process: Process, step: int = 0):
        self.active = process.main
        if not self.active:
            return
        from torch.utils.tensorboard import SummaryWriter

        self.file = lock(folder, process, "metrics.jsonl")
        write_json(folder / "config.json", dataclasses.asdict(config))
        self.file.seek(0)
        kept = itertools.takewhile(lambda line: line.endswith("}\n") and json.loads(line)["step"] <= step, self.file)
        self.file.truncate(sum(len(line.encode()) for line in kept) if step else 0)
        self.board = SummaryWriter(folder / "tensorboard", purge_step=step + 1 if step else None)

    def write(self, step: int, **values: float) -> None:
        """One line of metrics.jsonl, and the same numbers to TensorBoard."""
        if not self.active:
            return
        values = {name: value.item() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
        try:
            self.file.write(json.dumps({"step": step, **values}) + "\n")
            self.file.flush()
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.close()  # else Python tries again at its end, and complains
            raise OSError(f"{self.file.name} could not be written ({error.strerror})") from error
        for name, value in values.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.board.add_scalar(name, value, step)

    def close(self) -> None:
        if self.active:
            self.file.close()
            self.board.close()


class Stopwatch:
    """Seconds of training proper, evaluation left out; survives a resume through `seconds`."""

    def __init__(self, seconds: float = 0.0):
        self.seconds, self._start = seconds, time.perf_counter()

    def read(self) -> float:
        return self.seconds + time.perf_counter() - self._start

    @contextlib.contextmanager
    def paused(self):
        self.seconds = self.read()
        yield
        self._start = time.perf_counter()


class RunFolder:
    """A run folder: resumes from its checkpoint.pt, logs to metrics.jsonl and TensorBoard, saves.

        folder = RunFolder(cfg, process, epoch=0, batch=0)         # state of a new run, else the checkpoint's
        if folder.finished(epoch=cfg.epochs):
            return folder.path
        folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
        folder.start(step, total, len(pairs), data=pairs.fingerprint)
        ...
            folder.log(step, epoch=epoch, loss=loss)
            if folder.due(step):
                folder.save(step, epoch=epoch, batch=batch)
        folder.close()

    `cfg` is the run's dataclass, with `out` and `save_every`. Ranks other than 0 write nothing.
    """

    def __init__(self, cfg: Any, process: Process, **first: Any):
        self.cfg, self.process, self.path = cfg, process, Path(cfg.out)
        found = resume(self.path, cfg)
        self.resumed, self.state = found is not None, first if found is None else found
        self.parts: dict[str, Any] = {}

    def finished(self, **totals: int) -> bool:
        """Whether the checkpoint has reached this total, given by its name: `epoch=cfg.epochs`. Says so if it has."""
        ((name, total),) = totals.items()
        done = self.state[name] >= total
        if done and self.process.main:
            print(f"{self.path} is finished ({total} {name}s); nothing to do")
        return done

    def restore(self, **parts: Any) -> None:
        """Load what has a state_dict from the checkpoint, by its name there, and save it from now on.

        What is loaded leaves `state`, where it would take its memory once more.
        """
        self.parts = parts
        for name, part in parts.items() if self.resumed else ():
            if not disabled(part):
                part.load_state_dict(self.state[name])
                del self.state[name]

    def start(self, step: int, total: int = 0, samples: int | None = None, **fixed: Any) -> None:
        """Open the log behind `step`, the last one saved, and start the clock. Each checkpoint also holds `fixed`.

        Says what begins: `samples`, `total` steps, device, precision.
        """
        wait()  # a rank may have indexed or copied data for hours; what follows would not wait for it
        self.total, self.latest = total, {}
        self.saved, self.fixed, self.commit = step, fixed, commit()
        self.metrics = RunLog(self.path, self.cfg, self.process, step)
        self.clock = Stopwatch(self.state["seconds"] if self.resumed else 0.0)
        self.mark = step, self.clock.read()
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

    def log(self, step: int, /, **values: Any) -> None:
        """Write a line of metrics with the seconds so far. ValueError if `loss` is among them and not finite."""
        self.write(step, **values)
        if "loss" in values:
            check_loss(values["loss"], step)

    def write(self, step: int, /, **values: Any) -> None:
        """Write a line of metrics with the seconds so far; say those of an evaluation, which come without a loss."""
        self.metrics.write(step, seconds=self.clock.read(), **values)
        if "loss" in values:
            self.latest = {"loss": values["loss"]}
        elif self.total:
            self.say(step, {name: value for name, value in values.items() if name != "epoch"})

    def say(self, step: int, values: dict[str, Any]) -> None:
        """A line of how far the run is, with the last loss and `values`."""
        (before, then), now = self.mark, self.clock.read()
        speed = ""
        if step > before and now > then:
            rate, self.mark = (step - before) / (now - then), (step, now)
            speed = f"; {rate * self.cfg.batch_size:,.1f} images/s, {duration((self.total - step) / rate)} left"
        if self.process.main and not quiet():
            shown = list((self.latest | values).items())[:6]
            numbers = ((name, value.item() if isinstance(value, torch.Tensor) else value) for name, value in shown)
            shown = "".join(f", {name} {number:.4g}" for name, number in numbers)
            say(f"{self.path}: step {step:,} of {self.total:,}{shown}{speed}")

    def due(self, step: int) -> bool:
        """Whether `save_every` steps have gone by since the last checkpoint, or this one stays (`keep_every`).

        It is asked at every step, and off a terminal says every minute how far the run is.
        """
        if self.total and silent(EVERY - 10):  # before a bar of the same loop does
            self.say(step, {})
        return step - self.saved >= self.cfg.save_every or self.stays(step)

    def stays(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept as checkpoint-STEP.pt beside checkpoint.pt."""
        every = getattr(self.cfg, "keep_every", 0)
        return every > 0 and step % every == 0

    def save(self, step: int, /, is_best: bool = False, **values: Any) -> None:
        """Write checkpoint.pt: the restored parts, `values`, what `start` fixed, seconds, commit and settings.

        `is_best`: checkpoint-best.pt, too, and first: a run that is killed between the two goes on from before both.
        """
        self.saved = step
        if self.process.main:
            parts = {name: part.state_dict() for name, part in self.parts.items() if not disabled(part)}
            about = {"seconds": self.clock.read(), "commit": self.commit, "config": dataclasses.asdict(self.cfg)}
            about["paper"] = paper_of(self.cfg)
            for name in ["checkpoint-best.pt"] * is_best + ["checkpoint.pt"]:
                save_checkpoint(self.path / name, parts | values | self.fixed | about)
            if self.stays(step):
                with replaced(self.path / f"checkpoint-{step}.pt") as file:
                    file.write((self.path / "checkpoint.pt").read_bytes())

    def close(self, flags: str = "", then: str | None = None) -> None:
        """Close the log, and say that the run is finished, and the command that comes `then`.

        None is the evaluation, which on other data than the embedded corpus is to have these `flags`.
        """
        self.metrics.close()
        if self.total and self.process.main and not quiet():
            if then is None:
                own = flags if flags and not self.cfg.data.startswith("data/emoji") else ""
                then = f"python -m {paper_of(self.cfg)}.eval {self.path} {own}".rstrip()
            loss = "".join(
                f", {name} {float(torch.as_tensor(value).detach()):.4g}" for name, value in self.latest.items()
            )
            after = f"; next: {then}" if then else ""
            say(f"{self.path}: finished, {self.total:,} steps in {duration(self.clock.read())}{loss}{after}")


def paper_of(cfg: Any) -> str:
    """The folder that a configuration is of."""
    return type(cfg).__module__.partition(".")[0]


def disabled(part: Any) -> bool:
    """Whether `part` is a gradient scaler that does nothing, and so has no state."""
    return isinstance(part, GradScaler) and not part.is_enabled()


def machine() -> str:
    """Processor and cores, as the results were measured on."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name}, {os.cpu_count()} cores{gpu}, torch {torch.__version__}"


def commit() -> str:
    """The repository's commit, with + if its code differs from it; "unknown" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--", "*.py"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def check_loss(loss: torch.Tensor, step: int) -> None:
    """ValueError if the loss of a step, (), is no longer finite."""
    if not math.isfinite(value := loss.item()):
        raise ValueError(f"the loss is {value} at step {step}: lower --lr, or use --precision fp32")


def read_metrics(folder: Path, key: str = "step") -> list[dict]:
    """The lines of a run's metrics.jsonl that have this key."""
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if key in line]
