"""Train ProtoCLIP, or its CLIP baseline: `python -m protoclip.train PRESET [--overrides]`.

ProtoCLIP (arXiv 2206.10996); authors' code megvii-research/protoclip@fde1933, cited as `U:` (its `src/`).
The paper's contribution in this file is episodic training. One episode is:
  1. draw N rows with replacement                                       `episodes.sample_episode`
  2. cache h_I, h_T of the whole episode in eval mode                   `extract_features`
  3. cluster, back-translate                                            `model.build_prototypes`
  4. train one pass over the same rows, new shuffle and new views       `train_episode`
Losses, heads and prototypes are in model.py, settings in config.py, sampling and views in episodes.py,
the teacher's features in teacher.py.
"""

import dataclasses
import math
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import faiss
import numpy as np
import open_clip
import torch
import torch.distributed as dist
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoclip.config import PRESETS, Config, check
from protoclip.episodes import (  # noqa: F401
    BatchTransform,
    EpisodeDataset,
    Episodes,
    ascii_caption,
    episode_loader,
    image_transform,
    sample_episode,
)
from protoclip.model import ProtoCLIPOutput, Prototypes, build_prototypes, create_model, image_side, protoclip_loss
from protoclip.teacher import Teacher
from shared import data, memory, run
from shared.run import gather
from shared.zeroshot import quick_top1

# -------------------------------------------------------------------------------------------- schedules and optimizer


def loss_weights(
    episode: int, weights: tuple[float, float, float], infonce_warmup: int, lit_start: int | None
) -> tuple[float, float, float]:
    """(w_clip, w_proto, w_external) in force; (1, 0, 0) in InfoNCE warm-up and LiT. U:training/train.py:67-85."""
    lit = lit_start is not None and lit_start > 0 and episode >= lit_start - 1
    return (1.0, 0.0, 0.0) if episode < infonce_warmup or lit else tuple(weights)


def learning_rates(
    step: int,
    *,
    lr: float,
    lr_text: float,
    warmup: int,
    total_steps: int,
    visual_steps: int,
    text_start: int = 0,
    text_end: int | None = None,
) -> tuple[float, float]:
    """(visual, rest) learning rates at a global step; all horizons in steps. U:training/scheduler.py:35.

    Linear warm-up, then half a cosine to 0 at the group's own horizon: `visual_steps` for the image tower (LiT is
    nothing but an earlier horizon), text_start..text_end for text tower, heads and scales.
    """
    text_end = total_steps if text_end is None else text_end

    def cosine(step: int, base: float, horizon: int) -> float:
        if step < warmup:
            return base * (step + 1) / warmup
        if step > horizon:
            return 0.0
        return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(horizon - warmup, 1)))

    rest = 0.0 if step < text_start else cosine(step - text_start, lr_text, text_end - text_start)
    return cosine(step, lr, visual_steps), rest


def schedule(cfg: Config, step: int) -> tuple[float, float]:
    """`learning_rates` with the horizons of U:training/main.py:285-299."""
    per_episode = cfg.steps_per_episode()
    return learning_rates(
        step,
        lr=cfg.lr,
        lr_text=cfg.lr if cfg.lr_text is None else cfg.lr_text,
        warmup=cfg.warmup,
        total_steps=per_episode * cfg.episodes,
        visual_steps=per_episode * (cfg.episodes if cfg.lit_start is None else cfg.lit_start - 1),
        text_start=per_episode * cfg.text_start,
        text_end=per_episode * (cfg.episodes if cfg.text_end is None else cfg.text_end),
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's four groups, image tower and rest, each without and with decay. U:training/main.py:188-225.

    Only names with `visual` are image tower: both projection heads train with the rest, and without decay.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not any(
            word in name for word in ("bn", "ln", "bias", "logit_scale", "projection_head")
        )

    named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {
            "params": [p for n, p in named if ("visual" in n) == visual and decays(n, p) == decay],
            "weight_decay": weight_decay * decay,
        }
        for visual in (True, False)
        for decay in (False, True)
    ]


# ------------------------------------------------------------------------------------------------ one episode's passes


def gather_output(output: ProtoCLIPOutput) -> ProtoCLIPOutput:
    """The global batch: features of all ranks, the scalars as they are."""
    return ProtoCLIPOutput(*(gather(x) if x is not None and x.ndim == 2 else x for x in output))


@torch.no_grad()
def extract_features(
    model: nn.Module, loader: Iterable, episode_size: int, device: torch.device | str, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """h_I, h_T (N, P) fp32 on the CPU, row i for episodic index i; eval mode, no gradient. U:training/train.py:288.

    `loader` yields (index, images, tokens, ...). Ranks fill in each other's rows.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    device = torch.device(device)
    if dist.is_initialized():
        for buffer in model.buffers():  # each rank's BatchNorm has seen its own last batch
            dist.broadcast(buffer, src=0)
    was_training = model.training
    model.eval()
    h_image = h_text = None
    for index, images, tokens, *_ in loader:
        with run.autocast(precision, device):
            output = model(images.to(device, non_blocking=True), tokens.to(device, non_blocking=True))
        if h_image is None:
            h_image, h_text = (
                torch.zeros(episode_size, output.image_projected.shape[1], device=device) for _ in range(2)
            )
        h_image[index], h_text[index] = output.image_projected, output.text_projected
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(h_image)
        dist.all_reduce(h_text)
    return h_image.cpu(), h_text.cpu()


def train_episode(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    prototypes: Prototypes | None,
    episode: int,
    cfg: Config,
    process: run.Process,
    start: int = 0,
    scaler: torch.amp.GradScaler | None = None,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """One pass over an episode from batch `start` on; yields (global step, losses) per step. U:training/train.py:49."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    weights = loss_weights(episode, (cfg.w_clip, cfg.w_proto, cfg.w_external), cfg.infonce_warmup, cfg.lit_start)
    per_episode = cfg.steps_per_episode()
    precision = run.resolve_precision(cfg.precision, process.device)
    if prototypes is not None:
        prototypes = Prototypes(*(x if x is None else x.to(process.device) for x in prototypes))
    model.train()
    for i, (index, images, tokens, *_) in enumerate(loader, start):
        if i >= cfg.episode_size // cfg.batch_size:
            continue  # the short last batch, on every rank
        step = per_episode * episode + i
        visual, rest = schedule(cfg, step)
        for group, lr in zip(optimizer.param_groups, (visual, visual, rest, rest), strict=True):
            group["lr"] = lr
        torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # for towers with dropout: resume agrees
        with run.autocast(precision, process.device):
            output = model(images.to(process.device, non_blocking=True), tokens.to(process.device, non_blocking=True))
        losses = protoclip_loss(
            gather_output(output), gather(index.to(process.device)), prototypes, weights, cfg.target_temperature
        )
        optimizer.zero_grad()
        if scaler is None:
            losses["loss"].backward()
        else:
            scaler.scale(losses["loss"]).backward()
            scaler.unscale_(optimizer)
        losses["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        bare.clamp_logit_scales()
        with torch.no_grad():  # U:training/evaluations/analyze_features.py:33, on the local batch
            losses["modality_gap"] = (output.image_features.mean(0) - output.text_features.mean(0)).norm()
        yield step, losses


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, steps, learning rates, samples, memory of the training step."""
    model = create_model(cfg.model, cfg.heads, cfg.hidden_dim, cfg.projection_dim, cfg.num_layers, cfg.image_size)
    parameters = sum(p.numel() for p in model.parameters())
    heads = sum(p.numel() for n, p in model.named_parameters() if "projection_head" in n)
    per_episode = cfg.steps_per_episode()
    total, samples = per_episode * cfg.episodes, cfg.episode_size * cfg.episodes
    print(f"parameters         {parameters:,} (projection heads {heads:,})")
    rows = f"{cfg.dataset_size:,}" if cfg.dataset_size else "all"
    print(f"samples            {samples:,} in {cfg.episodes} episodes of {cfg.episode_size:,}, drawn from {rows} rows")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {total:,} ({per_episode:,} an episode)")
    for step in sorted({0, min(cfg.warmup, total - 1), total // 2, total - 1}):
        visual, rest = schedule(cfg, step)
        print(f"learning rate      {visual:.3e} image tower, {rest:.3e} rest, at step {step:,}")
    for episode in sorted({0, min(cfg.infonce_warmup, cfg.episodes - 1), cfg.episodes - 1}):
        clip, proto, external = loss_weights(
            episode, (cfg.w_clip, cfg.w_proto, cfg.w_external), cfg.infonce_warmup, cfg.lit_start
        )
        print(f"loss weights       clip {clip:g}, proto {proto:g}, external {external:g} in episode {episode}")
    size = image_side(model)
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, model.context_length, dtype=torch.long)
    gib = 2**30
    activations = run.activation_bytes(lambda: model(images, tokens)) / 2 * cfg.batch_size / world_size / gib
    weights = (16 * parameters + (24 * cfg.k * cfg.projection_dim if cfg.heads else 0)) / gib
    print(
        f"memory estimate    {weights + activations:.1f} GiB a process in fp32 (autocast: up to half the activations):"
    )
    print(f"                   {weights:.1f} weights, gradients, AdamW, prototypes; {activations:.1f} activations")


def main(cfg: Config) -> Path:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)

    # Model, tokenizer, optimizer
    model = create_model(cfg.model, cfg.heads, cfg.hidden_dim, cfg.projection_dim, cfg.num_layers, cfg.image_size).to(
        process.device
    )
    tokenizer = data.RememberingTokenizer(open_clip.get_tokenizer(cfg.model, context_length=model.context_length))
    groups = parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw(), fused=True)
    scaler = torch.amp.GradScaler(process.device.type) if precision == "fp16" else None

    # Resume
    state = run.resume(folder, cfg) or {"episode": 0, "batch": 0, "seconds": 0.0, "prototypes": None}
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
    if state["episode"] >= cfg.episodes:
        if process.main:
            print(f"{folder} is finished ({cfg.episodes} episodes); nothing to do")
        return folder

    # Data
    episodes = Episodes(cfg)
    fingerprint = None if episodes.pairs is None else episodes.pairs.fingerprint
    if state.get("data", fingerprint) != fingerprint:
        raise ValueError(f"{folder} was trained on other data than {cfg.data} holds now: choose another --out")
    teacher = Teacher(cfg.external_teacher) if cfg.w_external != 0 else None
    if teacher is not None and episodes.pairs is not None:  # else a hole would show after the first episode only
        teacher.find(episodes.pairs, np.arange(len(episodes.pairs)))
    size = image_side(model)
    view_of = BatchTransform if cfg.keep_in_memory else image_transform
    train_view = view_of(size, train=True, light=cfg.augmentation == "light", crop=cfg.crop, ratio=cfg.crop_ratio)
    extraction_view = train_view if cfg.extraction_view == "train" else view_of(size, train=False)
    remembered = None
    if cfg.keep_in_memory:
        tokenize = lambda captions: tokenizer([ascii_caption(caption) for caption in captions])  # noqa: E731
        remembered = memory.read(episodes.pairs, 2 * size, tokenize, process).to(process.device)

    if process.main and episodes.pairs is not None and len(episodes.pairs) < (cfg.dataset_size or 0):
        print(f"{cfg.data} holds {len(episodes.pairs):,} pairs, fewer than --dataset-size {cfg.dataset_size:,}")
    if process.main and process.world_size > 1:
        faiss.omp_set_num_threads(os.cpu_count() or 1)  # torchrun gives each process one thread; K-means runs on rank 0
    per_episode = cfg.steps_per_episode()
    saved = per_episode * state["episode"] + state["batch"]  # step of the last checkpoint
    log = run.RunLog(folder, cfg, process, step=saved)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(episode: int, batch: int, prototypes: Prototypes | None) -> None:
        if process.main:
            parts = prototypes._asdict() if prototypes is not None and batch else None
            run.save_checkpoint(
                folder / "checkpoint.pt",
                {
                    "name": cfg.out,
                    "epoch": episode,
                    "state_dict": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    **({"scaler": scaler.state_dict()} if scaler is not None else {}),
                    "episode": episode,
                    "batch": batch,
                    "prototypes": parts,
                    "seconds": clock.read(),
                    "commit": commit,
                    "data": fingerprint,
                    "config": dataclasses.asdict(cfg),
                },
            )

    def progress(what: str, batches: Iterable, total: int) -> Iterable:
        label = f"{folder.name} {what} {episode + 1}/{cfg.episodes}"
        return run.progress(batches, total, label, cfg.batch_size, process)

    for episode in range(state["episode"], cfg.episodes):
        start = state["batch"] if episode == state["episode"] else 0
        pairs, rows = episodes.episode(episode)
        broken = list(pairs.broken)
        weights = loss_weights(episode, (cfg.w_clip, cfg.w_proto, cfg.w_external), cfg.infonce_warmup, cfg.lit_start)

        # Prototypes of the episode; not where their losses have weight 0
        prototypes = None
        if start and state["prototypes"] is not None:
            prototypes = Prototypes(**state["prototypes"])
        elif weights[1] != 0 or weights[2] != 0:
            dataset = EpisodeDataset(remembered or pairs, rows, extraction_view, tokenizer, (cfg.seed, episode, 0))
            loader = progress("extract", episode_loader(cfg, process, dataset), per_episode)
            h_image, h_text = extract_features(model, loader, len(rows), process.device, precision)
            if process.main:
                external = teacher.rows(pairs, rows) if teacher is not None and weights[2] != 0 else None
                prototypes = build_prototypes(
                    h_image, h_text, cfg.k, external, cfg.back_translate, cfg.niter, cfg.nredo
                )
            prototypes = run.broadcast(prototypes, process)

        # One pass over the same rows: new shuffle, new views
        dataset = EpisodeDataset(remembered or pairs, rows, train_view, tokenizer, (cfg.seed, episode, 1))
        bar = progress("train", episode_loader(cfg, process, dataset, start), per_episode - start)
        seen = data.watch(bar, broken)
        for step, losses in train_episode(ddp, seen, optimizer, prototypes, episode, cfg, process, start, scaler):
            batch = step - per_episode * episode + 1
            if (step + 1) % cfg.log_every == 0 or batch == 1:
                visual, rest = optimizer.param_groups[0]["lr"], optimizer.param_groups[2]["lr"]
                log.write(step + 1, episode=episode, seconds=clock.read(), lr_visual=visual, lr_rest=rest, **losses)
                run.check_loss(losses["loss"], step)
            if step + 1 - saved >= cfg.save_every and batch < per_episode:
                save(episode, batch, prototypes)
                saved = step + 1

        if cfg.eval_every and ((episode + 1) % cfg.eval_every == 0 or episode + 1 == cfg.episodes) and process.main:
            with clock.paused():
                view = image_transform(size, train=False)
                top1 = quick_top1(model, tokenizer, view, cfg.eval_set, process.device, run.DTYPES[precision])
            log.write(per_episode * (episode + 1), episode=episode, seconds=clock.read(), zero_shot_top1=top1)
        data.report_broken(broken, process, f"episode {episode + 1}")
        if per_episode * (episode + 1) - saved >= cfg.save_every or episode + 1 == cfg.episodes:
            save(episode + 1, 0, None)
            saved = per_episode * (episode + 1)
    log.close()
    return folder


if __name__ == "__main__":
    run.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
