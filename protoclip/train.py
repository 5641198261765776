"""Train ProtoCLIP, or its CLIP baseline: `python -m protoclip.train PRESET [--overrides]`.

ProtoCLIP (arXiv 2206.10996); authors' code, called upstream: megvii-research/protoclip@fde1933, `U:` is its `src/`.
Training goes by episodes. In each of them:
  1. draw N samples with replacement                                              `sample_episode`
  2. cache the projected features h_I, h_T of all samples, in eval mode           `extract_features`
  3. cluster them, and translate the prototypes back                              `cluster_episode`
  4. train one pass over the same samples, in a new order and with new views      `train_step`
The CLIP baseline has only 1 and 4. Heads, prototypes and losses are in model.py, views in views.py, settings in
config.py, the external teacher in teacher.py, its file in teacher_file.py.
"""

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from protoclip.config import PRESETS, Config
from protoclip.model import (
    ProtoCLIPOutput,
    Prototypes,
    build_prototypes,
    create_model,
    divide_gradient,
    kmeans_error,
    protoclip_loss,
)
from protoclip.teacher_file import open_teacher
from protoclip.views import ascii_caption, episode_pairs, training_view, whole_image
from shared import cli, clip, run, zeroshot
from shared.corpus import Corpus

# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor],
    prototypes: Prototypes | None,
    weights: tuple[float, float],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    cfg: Config,
) -> dict[str, Tensor]:
    """One step on this rank's batch: rows (B,) int64, images (B, 3, S, S), texts (B, L) int64. U:training/train.py:107.

    Rows are positions in the episode, which select pseudo-labels. `weights` are w_proto and w_external. Returns the
    losses and other scalars to log.
    """
    rows, images, texts = batch
    with run.autocast(cfg.precision, images.device):
        output = model(images, texts)
    features = output if cfg.gather_with_grad else divide_gradient(output, run.world_size())
    losses = protoclip_loss(features, rows, prototypes, weights, cfg.target_temperature, run.gather)

    optimizer.zero_grad()
    scaler.scale(losses["loss"]).backward()
    scaler.unscale_(optimizer)
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    run.bare(model).clamp_logit_scale()
    return losses | {"gradient_norm": gradient_norm} | batch_statistics(output)


@torch.no_grad()
def batch_statistics(output: ProtoCLIPOutput) -> dict[str, Tensor]:
    """Logit scales; spread and modality gap of the local batch's features. U:training/train.py:234-256."""
    image, text = output.image_features, output.text_features
    found = {
        "logit_scale": output.logit_scale,
        "image_feature_std": image.std(0).mean(),
        "text_feature_std": text.std(0).mean(),
        "modality_gap": (image.mean(0) - text.mean(0)).norm(),
    }
    return found | ({} if output.logit_scale_proto is None else {"logit_scale_proto": output.logit_scale_proto})


# ------------------------------------------------------------------------------------------------------- one episode


def sample_episode(dataset_size: int, episode_size: int, rng: np.random.RandomState) -> np.ndarray:
    """(N,) int64 indices of an episode's samples in the data, drawn with replacement. U:training/main.py:357.

    Successive calls with one `np.random.RandomState(seed)` give upstream's episodes.
    """
    return rng.choice(dataset_size, episode_size, replace=True)


@torch.no_grad()
def extract_features(model: nn.Module, batches: Iterable, episode_size: int, cfg: Config) -> tuple[Tensor, Tensor]:
    """h_I, h_T (N, P) fp32 on the CPU, where row i is sample i of the episode. U:training/train.py:288.

    Eval mode, no gradient. `batches` are this rank's; every rank returns the features of all ranks.
    """
    run.share_buffers(model)
    model.eval()
    device = next(model.parameters()).device
    h_image, h_text = (torch.zeros(episode_size, cfg.projection_dim, device=device) for _ in range(2))
    for rows, images, texts in batches:
        with run.autocast(cfg.precision, device):
            output = model(images, texts)
        h_image[rows], h_text[rows] = output.image_projected, output.text_projected
    model.train()
    return run.sum_over_ranks(h_image).cpu(), run.sum_over_ranks(h_text).cpu()


def cluster_episode(
    h_image: Tensor, h_text: Tensor, external: Tensor | None, cfg: Config
) -> tuple[Prototypes, dict[str, float]]:
    """The episode's prototypes, and the error of K-means in each modality, to log. U:training/main.py:371-431."""
    found = build_prototypes(h_image, h_text, cfg.k, external, cfg.back_translate, cfg.niter, cfg.nredo)
    return found, {
        "kmeans_error_image": kmeans_error(h_image, found.image_labels, found.image),
        "kmeans_error_text": kmeans_error(h_text, found.text_labels, found.text),
    }


def loss_weights(cfg: Config, episode: int) -> tuple[float, float]:
    """(w_proto, w_external) in an episode; both are 0 in InfoNCE warm-up and in LiT. U:training/train.py:67-85."""
    lit = cfg.lit_start is not None and episode >= cfg.lit_start - 1
    return (0.0, 0.0) if episode < cfg.infonce_warmup or lit else (cfg.w_proto, cfg.w_external)


# ------------------------------------------------------------------------------ learning rates and parameter groups


def learning_rates(cfg: Config, step: int) -> dict[str, float]:
    """Learning rates at a global step, of the image tower and of the rest. U:training/scheduler.py:35, main.py:285-299.

    Linear warm-up, then half a cosine to 0 at the end of training; with LiT, at its start for the image tower. The
    README's eta_0 is cfg.lr, t_w cfg.warmup, t_end `total`, t_LiT `visual`.
    """
    total = cfg.steps_per_episode * cfg.episodes
    visual = total if cfg.lit_start is None else cfg.steps_per_episode * (cfg.lit_start - 1)

    def cosine(horizon: int) -> float:
        if step < cfg.warmup:
            return cfg.lr * (step + 1) / cfg.warmup
        if step > horizon:
            return 0.0
        return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(horizon - cfg.warmup, 1)))

    return {"lr_visual": cosine(visual), "lr_rest": cosine(total)}


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's four groups, image tower and rest, each without and with decay. U:training/main.py:188-225.

    The image tower is all names with `visual`. Both projection heads are in the rest, without decay.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not any(
            word in name for word in ("bn", "ln", "bias", "logit_scale", "projection_head")
        )

    named = list(model.named_parameters())
    return [
        {
            "params": [p for n, p in named if ("visual" in n) == visual and decays(n, p) == decay],
            "weight_decay": weight_decay * decay,
        }
        for visual in (True, False)
        for decay in (False, True)
    ]


def set_learning_rates(optimizer: torch.optim.Optimizer, cfg: Config, step: int) -> dict[str, float]:
    """Set the learning rates of the four `parameter_groups`; returns them, to log."""
    rates = learning_rates(cfg, step)
    names = ("lr_visual", "lr_visual", "lr_rest", "lr_rest")
    for group, name in zip(optimizer.param_groups, names, strict=True):
        group["lr"] = rates[name]
    return rates


# -------------------------------------------------------------------------------------------------------- the script


def main(cfg: Config) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)
    per_episode, total = cfg.steps_per_episode, cfg.steps_per_episode * cfg.episodes

    # Model and optimizer, with the state of the last checkpoint if there is one
    model = create_model(cfg.model, cfg.heads, cfg.hidden_dim, cfg.projection_dim, image_size=cfg.image_size)
    nn.init.constant_(model.logit_scale, math.log(1 / cfg.temperature))
    if cfg.dry_run:
        left = cfg.episode_size % cfg.batch_size
        episodes = f"{cfg.episodes} of {per_episode} batches"
        episodes += f"; {left} samples of each are left out" if left else ""
        rows = [("episodes", episodes), cli.first_loss_row(cfg.batch_size)]
        inputs = clip.blank_inputs(model)
        return cli.show_run(cfg, process, model, inputs, total, lambda at: learning_rates(cfg, at), rows)
    clip.set_grad_checkpointing(model.to(process.device), cfg.grad_checkpointing)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=cfg.lr, **cfg.adamw, fused=True)
    scaler = run.grad_scaler(cfg, process)
    folder = run.RunFolder(cfg, process, episode=0, batch=0, prototypes=None)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(episode=cfg.episodes):
        return folder.path
    first, start, prototypes = (folder.state[name] for name in ("episode", "batch", "prototypes"))
    if prototypes is not None:
        prototypes = Prototypes(**prototypes).to(process.device)

    # Data
    tokenizer = clip.RememberingTokenizer(open_clip.get_tokenizer(cfg.model, context_length=model.context_length))
    view, whole = training_view(cfg, model), whole_image(model)

    def open_corpus(episode: int) -> Corpus:
        pairs = episode_pairs(cfg, episode) if cfg.episode_shards else None
        text = lambda pair: tokenizer([ascii_caption(pair.caption)])[0]  # noqa: E731
        return Corpus(cfg, process, text, pairs, cut_padding=True, side=2 * clip.image_side(model))

    corpus = open_corpus(first)
    teacher = open_teacher(cfg.external_teacher, corpus.pairs, process) if cfg.w_external else None
    made_with = {"data": None if cfg.episode_shards else corpus.fingerprint, "teacher": teacher and teacher.digest()}
    folder.start(per_episode * first + start, total, len(corpus), **made_with)

    network = run.distributed(model, process, cfg.accumulate)
    rng = np.random.RandomState(cfg.seed)
    for episode in range(cfg.episodes):
        if cfg.episode_shards:
            rng = np.random.RandomState([cfg.seed, episode])
            corpus = open_corpus(episode) if episode > first else corpus
        samples = sample_episode(len(corpus), cfg.episode_size, rng)
        if episode < first:
            continue  # a resumed run repeats only the draws of earlier episodes
        name = f"episode {episode + 1} of {cfg.episodes}"
        weights = loss_weights(cfg, episode)  # w_proto, w_external
        errors: dict[str, float] = {}

        if prototypes is None and any(weights):
            batches = corpus.batches(samples, view, (cfg.seed, episode, 0), label=f"features of {name}")
            h_image, h_text = extract_features(model, batches, len(samples), cfg)
            if process.main:
                external = teacher.features_of(corpus.pairs, samples) if weights[1] else None
                prototypes, errors = cluster_episode(h_image, h_text, external, cfg)
            prototypes = run.broadcast(prototypes, process).to(process.device)

        model.train()
        batches = corpus.batches(samples, view, (cfg.seed, episode, 1), start=start, drop_last=True, label=name)
        for i, batch in enumerate(batches, start):
            step = per_episode * episode + i
            run.seed_step(cfg, step, process)
            rates = set_learning_rates(optimizer, cfg, step)
            losses = train_step(network, batch, prototypes, weights, optimizer, scaler, cfg)
            if i == 0 or (step + 1) % cfg.log_every == 0:
                folder.log(step + 1, episode=episode, **rates, **run.over_ranks(losses), **errors)
                errors = {}
            if folder.due(step + 1) and i + 1 < per_episode:
                folder.save(step + 1, episode=episode, batch=i + 1, prototypes=prototypes)

        done, last = per_episode * (episode + 1), episode + 1 == cfg.episodes
        if folder.evaluates(episode + 1, cfg.episodes):
            with folder.evaluation(done, episode=episode, batch=per_episode, prototypes=prototypes):
                top1 = zeroshot.quick_top1(model, tokenizer, whole, cfg.eval_set, process.device, cfg.precision)
            folder.log(done, episode=episode, zero_shot_top1=top1)
        corpus.report_broken(f"episode {episode + 1}")
        if folder.due(done) or last:
            folder.save(done, episode=episode + 1, batch=0, prototypes=None)
        start, prototypes = 0, None
    folder.close()
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
