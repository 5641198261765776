"""The controlled experiment: train a small CLIP on a corpus whose concept frequencies we choose.

    python -m concept_frequency.train PRESET [--overrides]

The paper (arXiv 2404.04125; authors' code bethgelab/frequency_determines_performance@11ef009) correlates accuracies of
published models with counts in their corpora. Here frequency is the treatment: ranks are given to concepts at random,
pairs are drawn (pairs.py), and accuracy is measured on a drawing style that no arm has seen. The arms differ in
`exponent` and `assignment` alone. This file is all ours; counts, curves and tests are the paper's.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from concept_frequency.config import PRESETS, Config, check
from concept_frequency.pairs import SIDE, make_pairs, read_corpus, sample_pairs, write_pairs, zipf_counts  # noqa: F401
from shared import checkpoints, cli, data, export, run
from shared.clip import without_padding
from shared.evalsets import EvalSet
from shared.zeroshot import build_classifier, label_ranks, per_class_accuracy

NOISE = 7  # random numbers of one view

# ------------------------------------------------------------------------------------------------------ views and model


def views(images: Tensor, noise: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) and uniform noise (B, 7) -> float (B, 3, size, size) in -1..1; noise 0.5 is the plain image.

    Zoom of 0.8 to 1.25, shift of up to a tenth, rotation of up to 15 degrees, and a tint; white outside.
    """
    u = 2 * noise - 1  # (B, 7) in -1..1
    zoom, angle = 1.25 ** u[:, 0], u[:, 1] * math.pi / 12
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, 0.2 * u[:, 2]], 1), torch.stack([sin, cos, 0.2 * u[:, 3]], 1)], 1)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    ink = F.grid_sample(1 - images.float() / 255, grid, align_corners=False)  # zeros outside: white
    return (1 - ink * (1 + 0.3 * u[:, 4:7, None, None])).clamp(0, 1) * 2 - 1


def create_model(name: str, image_size: int | None = None) -> nn.Module:
    """A randomly initialised open_clip model, with a plain text tower's context length."""
    export.open_clip_config(name)
    override = {} if image_size is None else {"force_image_size": image_size}
    logging.disable(logging.WARNING)  # of random weights, which are meant
    try:
        return without_padding(open_clip.create_model(name, load_weights=False, **override))
    finally:
        logging.disable(logging.NOTSET)


def image_side(model: nn.Module) -> int:
    size = model.visual.image_size
    return size[0] if isinstance(size, tuple) else size


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit rows (B, D), in fp32."""
    logits = logit_scale.float() * image_features.float() @ text_features.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then half a cosine to 0."""
    total = cfg.epochs * cfg.steps_per_epoch()
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(total - cfg.warmup, 1)))


# ----------------------------------------------------------------------------------------------------------- evaluation


class TestSet(NamedTuple):
    images: Tensor  # (T, 3, SIDE, SIDE) uint8
    labels: Tensor  # (T,) int64 concept


def read_test_set(folder: str, names: Sequence[str], workers: int = 0) -> TestSet:
    """The evaluation set's images of these concepts."""
    place = {name: c for c, name in enumerate(names)}
    evaluation = EvalSet(folder, lambda image: torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1))
    concept = torch.tensor([place.get(name, -1) for name in evaluation.classnames])
    images, labels = map(torch.cat, zip(*evaluation.batches(256, workers), strict=True))
    kept = concept[labels] >= 0
    return TestSet(images[kept], concept[labels[kept]])


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    tokenizer,
    test: TestSet,
    names: Sequence[str],
    num_views: int,
    device: torch.device,
    precision: str,
    batch_size: int = 256,
) -> Tensor:
    """Percent (K,) of each concept among all K, prompt `{c}`, over `num_views` fixed views of each test image."""
    was_training = model.training
    model.eval()
    dtype = run.DTYPES[precision]
    classifier = build_classifier(model.encode_text, tokenizer, list(names), ["{c}"], batch_size, device, dtype)
    noise = torch.rand(num_views, NOISE, generator=torch.Generator().manual_seed(0))
    noise[0] = 0.5
    hits = []
    for view in noise:
        for rows in torch.arange(len(test.labels)).split(batch_size):
            x = views(test.images[rows].to(device), view.expand(len(rows), NOISE).to(device), image_side(model))
            with run.autocast(precision, device):
                features = F.normalize(model.encode_image(x).float(), dim=-1).cpu()
            hits.append(label_ranks(features, test.labels[rows], classifier) < 1)
    model.train(was_training)
    return per_class_accuracy(torch.cat(hits), test.labels.repeat(num_views), len(names))


# ----------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int) -> None:
    """Print what a run would be: parameters, steps, learning rates, frequencies, memory of the training step."""
    model = create_model(cfg.model, cfg.image_size)
    parameters = sum(p.numel() for p in model.parameters())
    per_epoch = cfg.steps_per_epoch()
    total, size = per_epoch * cfg.epochs, image_side(model)
    counts = np.sort(zipf_counts(cfg.num_concepts, cfg.total, cfg.exponent, None))[::-1]
    print(f"parameters         {parameters:,}")
    print(f"samples            {cfg.total:,} pairs of {cfg.num_concepts:,} concepts, {cfg.epochs} times")
    print(f"frequencies        {counts[0]:,} (most), {counts[len(counts) // 2]:,} (median), {counts[-1]:,} (least)")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {total:,} ({per_epoch:,} an epoch)")
    for step in sorted({0, min(cfg.warmup, total - 1), total // 2, total - 1}):
        print(f"learning rate      {learning_rate(step, cfg):.3e} at step {step:,}")
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, model.context_length, dtype=torch.long)
    activations = cli.activation_bytes(lambda: model(images, tokens)) / 2 * cfg.batch_size / world_size / 2**30
    weights = 16 * parameters / 2**30
    print(f"memory estimate    {weights + activations:.1f} GiB a process in fp32: {weights:.1f} weights and AdamW;")
    print(f"                   {activations:.1f} activations")


def train(cfg: Config) -> Path | None:
    """Train an arm to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)
    steps, total_steps = cfg.steps_per_epoch(), cfg.epochs * cfg.steps_per_epoch()

    # Model, tokenizer, optimizer
    model = create_model(cfg.model, cfg.image_size).to(process.device)
    tokenizer = open_clip.get_tokenizer(cfg.model, context_length=model.context_length)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if (p.ndim >= 2) == decay], "weight_decay": cfg.weight_decay * decay}
        for decay in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")

    # Resume
    state = checkpoints.resume(folder, cfg) or {"step": 0, "seconds": 0.0}
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    if state["step"] >= total_steps:
        if process.main:
            print(f"{folder} is finished ({total_steps} steps); nothing to do")
        return folder

    # Data: the arm's corpus, in memory
    evaluation = EvalSet(cfg.eval_set, lambda image: image)
    corpus = read_corpus(cfg.data, evaluation.classnames, cfg.groups, cfg.num_concepts, cfg.strict)
    names = [concept.name for concept in corpus.concepts]
    counts, pairs = make_pairs(cfg, corpus)
    fingerprint = data.fingerprint(corpus.images.numpy().tobytes(), "\n".join(pairs.caption).encode())
    if state.get("data", fingerprint) != fingerprint:
        raise ValueError(f"{folder} was trained on other data than {cfg.data} holds now: choose another --out")
    if process.main:
        if line := data.broken_report(corpus.broken, "left out"):
            print(line)
        folder.mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "pairs.parquet", corpus, pairs)
        checkpoints.write_json(folder / "frequencies.json", dict(zip(names, counts.tolist(), strict=True)))
    tokens = tokenizer(pairs.caption)
    test = read_test_set(cfg.eval_set, names)
    size = image_side(model)

    log = run.RunLog(folder, cfg, process, step=state["step"])
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(step: int) -> None:
        if process.main:
            checkpoints.save_checkpoint(
                folder / "checkpoint.pt",
                {
                    "name": cfg.out,
                    "epoch": step // steps,
                    "step": step,
                    "state_dict": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "seconds": clock.read(),
                    "commit": commit,
                    "data": fingerprint,
                    "config": dataclasses.asdict(cfg),
                },
            )

    ddp.train()
    rank, local = process.rank, cfg.batch_size // process.world_size
    for epoch in range(state["step"] // steps, cfg.epochs):
        start = state["step"] - epoch * steps if epoch == state["step"] // steps else 0
        batches = data.batches(cfg.total, local, (cfg.seed, epoch), rank, process.world_size, start)
        label = f"{folder.name} {epoch + 1}/{cfg.epochs}"
        bar = run.progress(batches[: steps - start], steps - start, label, cfg.batch_size, process)
        for step, rows in enumerate(bar, epoch * steps + start):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            # the views of the whole batch are drawn alike on all ranks, so that processes together see what one would
            generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, step))
            noise = torch.rand(cfg.batch_size, NOISE, generator=generator)[rank * local : (rank + 1) * local]
            x = views(corpus.images[pairs.image[rows]].to(process.device), noise.to(process.device), size)
            torch.manual_seed(data.stable_hash(cfg.seed, step, rank))  # for towers with dropout: resume agrees
            with run.autocast(precision, process.device):
                image_features, text_features, scale, *_ = ddp(x, tokens[rows].to(process.device))
            loss = clip_loss(run.gather(image_features), run.gather(text_features), scale)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            if (step + 1) % cfg.log_every == 0 or step == 0:
                log.write(
                    step + 1, epoch=epoch, seconds=clock.read(), lr=learning_rate(step, cfg), loss=loss,
                    logit_scale=scale, gradient_norm=norm,
                )  # fmt: skip
                run.check_loss(loss, step)
            if (step + 1) % cfg.save_every == 0 and step + 1 < total_steps:
                save(step + 1)
        if process.main and (epoch + 1 == cfg.epochs or (cfg.eval_every and (epoch + 1) % cfg.eval_every == 0)):
            with clock.paused():
                accuracy = zero_shot(model, tokenizer, test, names, 1, process.device, precision).nanmean().item()
            log.write((epoch + 1) * steps, epoch=epoch, seconds=clock.read(), zero_shot_top1=accuracy)
    save(total_steps)
    log.close()
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: train(tyro.extras.overridable_config_cli(PRESETS)))
