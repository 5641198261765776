"""Command lines: choose a preset, print a dry run, report errors in one sentence with exit code 2."""

import contextlib
import errno
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch
import tyro
from torch import nn

from shared.clip import set_grad_checkpointing
from shared.errors import FULL, UserError
from shared.run import QUIET, Process, finish, long_warmup, paper_of

REFUSED = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.EEXIST,
    errno.ENOTDIR,
    errno.EISDIR,
)  # a path that a user chose
PAIR_BYTES = 25_000  # of an image of 256 pixels and its caption: LAION-400M has 10 TB, as its authors report

# ---------------------------------------------------------------------------------------------------------- dry runs


def show_plan(rows: Iterable[tuple[str, str]]) -> None:
    """Print the plan of a run, one line for each (label, text)."""
    for label, text in rows:
        print(f"{label:<19}{text}")


def show_run(
    cfg: Any,
    process: Process,
    model: nn.Module,
    inputs: Sequence[torch.Tensor],
    total: int,
    rates: Callable[[int], dict[str, float]],
    rows: Iterable[tuple[str, str]] = (),
    warmup: int | None = None,
) -> None:
    """Print the plan of a run: parameters, disk, batch, steps, learning rates, memory. Rank 0 only.

    `inputs`: two blank samples for the model. `rates(step)` has the learning rates by name. `rows` come before the
    memory estimate. `warmup` steps are cfg.warmup if they are None.
    """
    if not process.main:
        return
    each = f"{cfg.dataset_size:,}" if cfg.dataset_size else "all of --data"
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    warmup = cfg.warmup if warmup is None else warmup

    def describe(step: int) -> str:
        return ", ".join(f"{name} {rate:.3e}".strip() for name, rate in rates(step).items())

    show_plan(
        [
            ("parameters", f"{trained:,} trained" + (f", {frozen:,} frozen" if frozen else "")),
            ("samples", f"{total * cfg.batch_size:,} seen, of {each}" if total else "all of --data"),
            disk_row(cfg.dataset_size, trained, frozen),
            batch_row(cfg, process.world_size),
            ("steps", f"{total:,}" if total else "depend on the size of --data"),
            *rate_rows(describe, warmup, total),
            *rows,
            *memory_rows(
                lambda: model(*inputs),
                cfg.batch_size / process.world_size / cfg.accumulate,
                trained,
                4 * frozen,
                checkpointed=model if cfg.grad_checkpointing else None,
            ),
        ]
    )


def batch_row(config: Any, world_size: int) -> tuple[str, str]:
    """Row with the global batch size, each process's share and its micro-batches."""
    size, micro_batches = config.batch_size, getattr(config, "accumulate", 1)
    how = f", in {micro_batches} micro-batches" if micro_batches > 1 else ""
    return "batch", f"{size} ({size // world_size} in each of {world_size} processes{how})"


def first_loss_row(batch_size: int) -> tuple[str, str]:
    """Row with InfoNCE at the first step: ln B if images and captions are unrelated, more if features scatter."""
    return "first loss", f"contrastive: {math.log(batch_size):.2f} (ln of the batch), or somewhat more"


def step_row(total: int, each: int, passes: str = "epoch") -> tuple[str, str]:
    """Row with the number of steps of a run, and of one epoch (or another unit, `passes`)."""
    return "steps", f"{total:,} ({each:,} an {passes})"


def rate_rows(describe: Callable[[int], str], warmup: int, total: int) -> list[tuple[str, str]]:
    """Rows with the learning rate, `describe(step)`, at the first step, the end of warm-up, the middle and the end;
    and a note if the warm-up takes most of the run.
    """
    steps = sorted({0, min(warmup, total - 1), total // 2, total - 1}) if total else []
    rows = [("learning rate", f"{describe(step)} at step {step:,}") for step in steps]
    return rows + [("note", note) for note in [long_warmup(warmup, total)] if note]


def memory_rows(
    forward: Callable[[], Any],
    samples: float,
    trained: int,
    other_bytes: float = 0,
    included: str = "gradients, AdamW",
    checkpointed: nn.Module | None = None,
) -> list[tuple[str, str]]:
    """Rows with the memory of a training step of one process, in fp32, in GiB.

    `forward` runs the model on two samples; their activations are measured and scaled to `samples`. A trained
    parameter takes 16 bytes with its gradient and AdamW's two moments; `other_bytes` are added. `included` names what
    is counted with the weights. `checkpointed`: see `activation_bytes`.
    """
    activations = activation_bytes(forward, checkpointed) / 2 * samples / 2**30
    weights = (16 * trained + other_bytes) / 2**30
    return [
        (
            "memory estimate",
            f"{weights + activations:.1f} GiB a process in fp32 (autocast: up to half the activations):",
        ),
        ("", f"{weights:.1f} weights, {included}; {activations:.1f} activations"),
    ]


def disk_row(samples: int | None, trained: int, frozen: int = 0, each: int = PAIR_BYTES) -> tuple[str, str]:
    """Row with the disk space of `samples` pairs of `each` bytes, and of a checkpoint in fp32.

    A checkpoint holds all weights, and AdamW's two moments of the `trained` ones.
    """
    data = f"{samples * each / 2**30:,.1f} GiB of data" if samples else "data"
    size = f"{data}, at {each / 1000:.0f} kB a sample; {(12 * trained + 4 * frozen) / 2**30:.1f} GiB a checkpoint"
    return "disk estimate", size


def activation_bytes(forward: Callable[[], Any], checkpointed: nn.Module | None = None) -> float:
    """Bytes that autograd keeps for the backward pass of `forward()`, without parameters.

    With `checkpointed`, a model, activation checkpointing is turned on in it. The result is then the inputs of all
    blocks plus the activations of one block, estimated as all others divided by the number of blocks.
    """
    kept = kept_bytes(forward)
    if checkpointed is None:
        return kept
    set_grad_checkpointing(checkpointed)
    chains = [module for module in checkpointed.modules() if isinstance(module, (nn.ModuleList, nn.Sequential))]
    read = kept_bytes(forward)
    return read + (kept - read) / max(map(len, chains), default=1)


def kept_bytes(forward: Callable[[], Any]) -> int:
    """`activation_bytes` without changing the model; each tensor is counted once."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # returning the tensor itself would make a reference cycle with the graph

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = forward()  # kept alive, so that no address is reused
    total = sum(seen.values())
    del result
    return total


# ------------------------------------------------------------------------------------------------------------ errors


def fail(sentence: str) -> None:
    """Print one sentence to stderr and exit with code 2."""
    print(f"error: {' '.join(sentence.split())}", file=sys.stderr)
    sys.exit(2)


def preset_cli(presets: dict[str, tuple[str, Any]]) -> Any:
    """The configuration of the command line `PRESET [--overrides]`; UserError if it does not begin with a preset."""
    words, known = sys.argv[1:], {name.replace("_", "-") for name in presets}
    if not {"-h", "--help"} & set(words) and (not words or words[0].replace("_", "-") not in known):
        found = f"{words[0]!r} is no preset" if words and not words[0].startswith("-") else "a preset must come first"
        raise UserError(f"{found}; presets are {', '.join(presets)}")
    if {"-h", "--help"} & set(words):
        paper_first(type(next(iter(presets.values()))[1]))
    cfg = tyro.extras.overridable_config_cli(presets)
    if not getattr(cfg, "out", "-"):
        cfg.out = f"runs/{paper_of(cfg)}/{words[0]}"
    return cfg


def paper_first(config: type) -> None:
    """Let --help list the settings of the class itself before those of its base class."""
    every = config.__dataclass_fields__
    own = {name: every[name] for name in config.__annotations__}
    config.__dataclass_fields__ = own | {name: field for name, field in every.items() if name not in own}


def explained(error: Exception) -> str | None:
    """What a user can do about an error; None for a bug, which keeps its traceback."""
    text = str(error)
    if isinstance(error, UserError):  # from a loader worker, the message contains its traceback
        return text.rstrip().splitlines()[-1].partition(": ")[2] if text.startswith("Caught ") else text
    if isinstance(error, OSError) and error.errno in FULL:
        return f"{error.filename or 'a file'} could not be written ({error.strerror})"
    if isinstance(error, OSError) and error.errno in REFUSED:
        return f"{error.filename or 'a file'} could not be read or written ({error.strerror})"
    if isinstance(error, BrokenProcessPool) or (isinstance(error, RuntimeError) and "DataLoader worker" in text):
        return "a worker process was killed, perhaps for lack of memory: lower --workers, and run the command again"
    if isinstance(error, EOFError):
        return f"a file ends too early ({error}): it is damaged, or was not written to its end"
    if isinstance(error, RuntimeError) and "loading state_dict" in text:
        return f"the checkpoint holds weights of another model: {text[:300]}"
    if isinstance(error, TypeError) and "MPS" in text:
        return f"--device mps: Apple's GPUs do not support an operation of this script ({error}); use --device cpu"
    if isinstance(error, MemoryError):
        return "not enough memory for this data and these settings"
    return None


def command_line(main: Callable[[], Any]) -> None:
    """Run a script's `main`. Errors that the user can fix become one sentence on stderr and exit code 2.

    Also handles --quiet, which every script takes.
    """
    script = sys.modules["__main__"]
    if script.__spec__ and sys.argv[0] == script.__file__:  # the name that usage lines have
        sys.argv[0] = f"python -m {script.__spec__.name.removesuffix('.__main__')}"
    loud, words = os.environ.get(QUIET), [word for word in sys.argv if word != "--quiet"]
    if len(words) < len(sys.argv):
        sys.argv[:], os.environ[QUIET] = words, "1"
    try:
        try:
            main()
        except SystemExit as stop:
            if stop.code == 0 and {"--help", "-h"} & set(sys.argv):
                print("Every script also takes --quiet, which leaves out the lines about progress.")
            raise
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        try:
            print(flush=True)  # what was printed before may be lost, so that a flush alone does not fail
        except BrokenPipeError:  # its reader has ended, as in `--help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still buffered
            sys.exit(1)
        raise  # another pipe
    except Exception as error:
        if os.environ.get("PAPER_CLIPS_TRACEBACK") or (text := explained(error)) is None:
            raise
        fail(text)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        os.environ.pop(QUIET, None)
        if loud is not None:
            os.environ[QUIET] = loud
        with contextlib.suppress(Exception):
            finish()
