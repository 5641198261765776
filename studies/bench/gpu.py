"""A CLIP step on a GPU, ours and open_clip's: images/s and memory. `python -m studies.bench.gpu` (`make bench-gpu`)

Our step is that of ProtoCLIP's baseline (`protoclip.train.train_step`), theirs `open_clip_train.train_one_epoch`,
with the same towers, weights and batches; captions have 5 to 24 of 77 tokens. Both read batches from page-locked memory
and take turns. If a batch does not fit, one of half its size is tried. PAPER_CLIPS_GPU names a device other than CUDA.
"""

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr

from protoclip import model, train
from shared import run
from shared.clip import image_side, trimmed
from studies.bench import at_least, race, set_up
from studies.bench.open_clip_loop import AUTOCAST, open_clip_loop

DEVICE = os.environ.get("PAPER_CLIPS_GPU", "cuda")
HEAD = (
    "| model | precision | batch | ours, images/s | open_clip | ours/open_clip | min .. max | ours, GiB | open_clip |"
)


def make_batches(size: int, side: int, context: int, steps: int, device: torch.device) -> list[tuple]:
    """(index, images (B, 3, S, S), tokens (B, L)) on the CPU, like those of a loader."""
    position, found = torch.arange(context), []
    for _ in range(steps):
        lengths = torch.randint(4, 24, (size, 1)).clamp(max=context - 1)
        tokens = torch.randint(1, 49406, (size, context)) * (position < lengths)
        tokens[position == lengths] = 49407
        batch = torch.arange(size), torch.randn(size, 3, side, side), tokens
        found.append(tuple(run.pinned(x, device) for x in batch))
    return found


def both(name: str, size: int, precision: str, steps: int, process: run.Process) -> tuple[Callable, Callable]:
    """Functions that take `steps` steps, ours and open_clip's."""
    device = process.device
    plan = {"model": name, "image_size": None, "batch_size": size, "episode_size": size * steps, "beta2": None}
    plan["precision"] = precision
    cfg = dataclasses.replace(train.PRESETS["cc3m-rn50-clip"][1], **plan)
    ours = model.create_model(name, heads=False).to(device)
    theirs = open_clip.create_model(name, output_dict=True, force_quick_gelu=True, load_weights=False).to(device)
    theirs.load_state_dict(ours.state_dict())
    loader = make_batches(size, image_side(ours), ours.context_length, steps, device)

    optimizer = torch.optim.AdamW(train.parameter_groups(ours, cfg.weight_decay), lr=cfg.lr, **cfg.adamw, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def our_steps() -> None:
        ours.train()
        for step, (rows, images, tokens) in enumerate(loader):
            train.set_learning_rates(optimizer, cfg, step)
            rows, images = (x.to(device, non_blocking=True) for x in (rows, images))
            batch = rows, images, trimmed(tokens, ours, device)
            train.train_step(ours, batch, None, (1.0, 0.0, 0.0), optimizer, scaler, cfg)
        wait(device)

    other = torch.optim.AdamW(train.parameter_groups(theirs, cfg.weight_decay), lr=cfg.lr, **cfg.adamw)
    other_scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    scheduler = cosine_lr(other, cfg.lr, cfg.warmup, 10**6)
    batches, clip = [batch[1:] for batch in loader], cfg.max_grad_norm
    their_loop = open_clip_loop(theirs, batches, other, scheduler, precision, clip, other_scaler, str(device))

    def their_steps() -> None:
        their_loop()
        wait(device)

    return our_steps, their_steps


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(steps: Callable, device: torch.device) -> float:
    """Peak memory of tensors on a GPU in GiB; NaN on other devices."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.reset_peak_memory_stats(device)
    steps()
    return torch.cuda.max_memory_allocated(device) / 2**30


def measured(name: str, size: int, precision: str, options: argparse.Namespace, process: run.Process) -> str:
    """A row of the table."""
    ours, theirs = both(name, size, precision, options.steps, process)
    ours(), theirs()  # the first steps of each shape choose their kernels
    _, seconds = race(f"{name}, {precision}, {size}", ours, theirs, options.repetitions, options.steps)
    mine, other = zip(*seconds, strict=True)
    ratios = [b / a for a, b in seconds]
    rates = [size / statistics.median(values) for values in (mine, other)]
    cells = [name, precision, f"{size}", *(f"{rate:,.0f}" for rate in rates), f"{rates[0] / rates[1]:.2f}"]
    cells += [f"{min(ratios):.2f} .. {max(ratios):.2f}", *(f"{peak(f, process.device):.1f}" for f in (ours, theirs))]
    return "| " + " | ".join(cells) + " |"


def fitting(name: str, precision: str, options: argparse.Namespace, process: run.Process) -> str:
    """`measured` with the largest batch that fits: `--batch`, half of it, a quarter, and so on."""
    size = options.batch
    while True:
        try:
            return measured(name, size, precision, options, process)
        except torch.cuda.OutOfMemoryError:
            if size == 1:
                raise
        size //= 2  # outside of `except`, where the error still holds the tensors that did not fit
        torch.cuda.empty_cache()


def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=["ViT-B-16", "RN50"], help="open_clip's names")
    parser.add_argument("--precisions", nargs="*", choices=list(AUTOCAST), help="by default all of the device")
    parser.add_argument("--batch", type=at_least(1), default=256, help="images of a step, if they fit")
    parser.add_argument("--steps", type=at_least(1), default=20, help="of a repetition")
    parser.add_argument("--repetitions", type=at_least(1), default=5, help="of each side, in turns")
    parser.add_argument("--results", type=Path, help="also write the table into this folder, as CARD.md")
    options = parser.parse_args()
    if DEVICE.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("torch sees no CUDA device; PAPER_CLIPS_GPU=cpu tries this bench out without one")
    set_up()
    process = run.setup(0, DEVICE)
    head = [HEAD, "|" + " --- |" * (HEAD.count("|") - 1)]
    about = f"{run.machine()}, open_clip {version('open_clip_torch')}"
    print("\n".join([about, "", *head]), flush=True)
    rows = []
    for name in options.models:
        for precision in options.precisions or [p for p in AUTOCAST if p != "fp16" or process.device.type == "cuda"]:
            rows.append(fitting(name, precision, options, process))
            print(rows[-1], flush=True)
    if options.results is not None:
        text = f"Measured {date.today()} at commit `{run.commit()}` on {about}; `make bench-gpu`.\n\n"
        options.results.mkdir(parents=True, exist_ok=True)
        name = "".join(c if c.isalnum() else "-" for c in card(process.device))
        (options.results / f"{name}.md").write_text(text + "\n".join([*head, *rows, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
