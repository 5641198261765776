"""Process plumbing of every train.py and eval.py: start-up, precision, checkpoints, logs, progress, error messages.

Thin on purpose: torch, open_clip_train, tensorboard and tqdm do the work; nothing here knows of any paper.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, BinaryIO, NamedTuple

import matplotlib
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import torch.distributed.nn
from open_clip_train.distributed import init_distributed_device_so
from tqdm import tqdm

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
    """Seed every generator and join the process group if torchrun (or SLURM) started us.

    `device` is auto (CUDA if there is one), cpu, cuda or cuda:N. On a CPU the flash kernel of scaled dot product
    attention is switched off: its backward pass is several times slower than the plain one at a few dozen tokens.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(f"there is no device {device!r}: --device is auto, cpu, cuda or cuda:N")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {device!r} was asked for, but torch sees no CUDA device; use --device cpu")
    info = init_distributed_device_so(device)
    if info["distributed"]:  # for ranks that wait, for hours if need be, while others work something out
        global _patient
        _patient = dist.new_group(backend="gloo", timeout=timedelta(hours=12))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cuda.enable_flash_sdp(not info["device"].startswith("cpu"))
    return Process(info["global_rank"], info["world_size"], torch.device(info["device"]))


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
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    native = [getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile")]
    return "bf16" if any(native) else "fp32"


def autocast(precision: str | torch.dtype, device: torch.device) -> torch.autocast:
    """Autocast region for a forward pass; `precision` is bf16, fp16 or fp32 (then it does nothing), or such a dtype."""
    dtype = DTYPES.get(precision, precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32)


# ------------------------------------------------------------------------------------------------------ checkpoints


def save_checkpoint(path: Path, state: dict) -> None:
    """Write `state` so that `path` always holds a whole file.

    ValueError if a tensor is not finite, OSError if `state` cannot be written: what `path` held before is then kept.
    """
    for name, tensor in tensors(state):
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} is no longer finite, and {path} is left as it was: lower --lr, or use --precision fp32"
            )
    with replaced(path) as file:
        torch.save(state, file)


@contextlib.contextmanager
def replaced(path: Path, ending: str = ".tmp") -> Iterator[BinaryIO]:
    """A file to write that takes `path`'s place when it is whole: temporary file, fsync, atomic replace.

    OSError if it cannot be written, which names `path`: what that held before is then kept.
    """
    temporary = path.with_name(path.name + ending)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        temporary.unlink(missing_ok=True)
        why = error if isinstance(error, OSError) else error.__context__  # torch makes a RuntimeError of a failed write
        if not isinstance(why, OSError):
            raise
        raise OSError(f"{path} could not be written and is left as it was ({why.strerror or why})") from error


def tensors(value: Any, name: str = "state") -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) of all tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, (dict, list, tuple)):
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from tensors(part, str(key))


# What authors' training scripts keep beside plain values: their command line, and learning rates that are NumPy numbers
# (which live under one of two names, as files of NumPy 1 and 2 say). Harmless; for `torch.serialization.safe_globals`.
_scalar = np.float64(0).__reduce__()[0]
AUTHORS_GLOBALS = [
    argparse.Namespace,
    np.dtype,
    np.dtypes.Float64DType,
    (_scalar, "numpy.core.multiarray.scalar"),
    (_scalar, "numpy._core.multiarray.scalar"),
]


def load_checkpoint(path: str | Path, map_location: str | torch.device = "cpu") -> dict:
    """Load a checkpoint without running code from it (`weights_only=True`). ValueError if it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{path} is not a checkpoint that loads with weights_only=True ({type(error).__name__})"
        ) from error


def config_in(state: Any, config: type, path: str | Path) -> Any:
    """The `config`, a dataclass, in a checkpoint that was read from `path`. ValueError if that is another script's."""
    values = state.get("config") if isinstance(state, dict) else None
    if not isinstance(values, dict) or values.keys() - {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"{path} is no run of {config.__module__.partition('.')[0]}'s that can be used here")
    return config(**values)


class State(dict):
    """What a run's checkpoint holds; ValueError for what it lacks."""

    def __missing__(self, key: str):
        raise ValueError(f"the checkpoint holds no {key!r}: it is of another script; choose another --out")


def changes(then: dict, now: dict) -> str:
    """ "lr (was 0.1, now 0.2) and 3 more": the settings of `now` that differ in `then`; "" if none does."""
    changed = [name for name in now if now[name] != then.get(name)]
    what = ", ".join(f"{name} (was {then.get(name)!r}, now {now[name]!r})" for name in changed[:5])
    return what + (f" and {len(changed) - 5} more" if len(changed) > 5 else "")


def resume(folder: Path, config: Any) -> dict | None:
    """The state in `folder`/checkpoint.pt, or None if the run is new.

    ValueError if the checkpoint was written with another configuration: a run never goes on as something else. Fields
    that do not change the result may differ.
    """
    path = folder / "checkpoint.pt"
    if not path.exists():
        return None
    state = load_checkpoint(path)
    if not isinstance(state, dict) or not isinstance(state.get("config"), dict):
        raise ValueError(f"{path} is no checkpoint of this script: choose another --out, or remove the folder")
    free = {
        "out",
        "device",
        "workers",
        "save_every",
        "log_every",
        "eval_every",
        "eval_set",
        "cache",
        "strict",
        "dry_run",
    }
    now = {name: value for name, value in dataclasses.asdict(config).items() if name not in free}
    if what := changes(state["config"], now):
        raise ValueError(
            f"{folder} holds a run with another configuration: {what}; choose another --out, or remove the folder"
        )
    return State(state)


# ------------------------------------------------------------------------------------------------------------- logs


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
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise ValueError(f"{folder} belongs to a run that is still going: wait, or choose another --out") from error
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


def read_json(path: Path) -> dict:
    """A JSON object; ValueError names a file that holds none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object: remove it, or name another folder")
    return value


def write_json(path: Path, value: Any) -> None:
    """Indented JSON, replaced atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replaced(path) as file:
        file.write(text.encode())


def activation_bytes(forward: Callable[[], Any]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward()`, each tensor once; parameters not counted."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would be kept by the graph that it keeps, for good

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # kept alive, so that no address is used twice
    total = sum(seen.values())
    del result
    return total


def progress(items: Iterable, total: int, label: str, images: int, process: Process | None = None) -> tqdm:
    """tqdm over batches of `images` samples, counting images/s; nothing is shown when stderr is not a terminal."""
    hidden = not sys.stderr.isatty() or (process is not None and not process.main)
    bar = tqdm(
        items, total=total, desc=label, disable=hidden, leave=False, unit="img", unit_scale=images, dynamic_ncols=True
    )
    return bar


# ---------------------------------------------------------------------------------------------- what runs are refused


def check_data(config: Any, example: str) -> None:
    """ValueError if no data are named, the embedded corpus is not built, or the evaluation set is not there."""
    if not config.data:
        raise ValueError(
            f"--data is missing: it takes image-text shards in img2dataset layout, e.g. --data '{example}'"
        )
    if config.data.startswith("data/emoji") and not Path(config.data).exists():
        raise ValueError(f"{config.data} does not exist: 'make data' builds the embedded corpus")
    if config.eval_every and not Path(config.eval_set).is_dir():
        raise ValueError(f"--eval-set {config.eval_set} does not exist: name a folder, or pass --eval-every 0")


def check_counts(config: Any, *names: str, least: int = 1) -> None:
    """ValueError if a field of these is less than `least`; None, where a field may be that, is none."""
    for name in names:
        if (value := getattr(config, name)) is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")


def check_batch(config: Any, world_size: int) -> None:
    """ValueError if processes cannot have equal shares of a batch."""
    if config.batch_size % world_size:
        raise ValueError(f"--batch-size {config.batch_size} cannot be shared out evenly over {world_size} processes")


# ---------------------------------------------------------------------------------------------------- command lines


def fail(sentence: str) -> None:
    """Exit code 2 and one sentence on stderr."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


def command_line(main: Callable[[], Any]) -> None:
    """Run a script's `main`; what the user can mend ends in one sentence on stderr and exit code 2."""
    try:
        main()
    except (ValueError, OSError) as error:
        if os.environ.get("PAPER_CLIPS_TRACEBACK"):
            raise
        text = str(error)
        if text.startswith("Caught "):  # a loader worker's, whose traceback came along
            text = text.rstrip().splitlines()[-1].partition(": ")[2]
        fail(text)
    except RuntimeError as error:
        if "loading state_dict" not in str(error) or os.environ.get("PAPER_CLIPS_TRACEBACK"):
            raise
        fail(f"the checkpoint holds weights of another model: {str(error)[:300]}")
    except MemoryError:
        if os.environ.get("PAPER_CLIPS_TRACEBACK"):
            raise
        fail("not enough memory for this data and these settings")
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        with contextlib.suppress(Exception):
            finish()


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
