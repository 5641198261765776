"""Train LexVLA, or an ablation of it: `python -m lexvla.train PRESET [--overrides]`.

LexVLA (arXiv 2407.17827); no code of the authors is public. Before training,
  1. the vocabulary is taken from the captions, and with it both codebooks       `vocabulary`
Then, for each batch,
  2. both lexical representations, the summed InfoNCE and the penalties over all
     processes' pairs (eq. 8), a step of Adam, and the cap of the temperature    `train_step`
  3. the weights of the penalties rise, the learning rate falls                  `quadratic_warmup`, `learning_rate`
Towers and losses are in model.py, captions in text.py, towers by name in towers.py, settings in config.py; the order of
samples, also after resuming, is in shared/corpus.py (`Corpus.order`), with --stream in shared/streams.py.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lexvla import plan
from lexvla.checkpoints import Trained, backbone_fingerprint, check_lm
from lexvla.config import PRESETS, Config
from lexvla.model import LexVLA, total_loss
from lexvla.text import caption_vocabulary, lm_dtype, lm_sample, load_lm, piece_counts
from lexvla.tokens import Precomputed, frozen_tokens
from lexvla.towers import create_backbone, create_model, lm_input, text_encoder, text_input, train_transform
from shared import cli, data, run
from shared.corpus import open_corpus

BETAS = 0.9, 0.98  # of Adam; not stated in the paper

# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, tuple[Tensor, ...]],
    lambdas: tuple[float, float],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    cfg: Config,
) -> dict[str, Tensor]:
    """One step on this rank's (images, text input), with these weights of the penalties; returns the losses."""
    images, text = batch
    with run.autocast(cfg.precision, images.device):
        output = model(images, *text)
    losses = total_loss(*output, *lambdas, cfg.penalty)

    optimizer.zero_grad()
    scaler.scale(losses["loss"]).backward()
    scaler.step(optimizer)
    scaler.update()
    run.bare(model).clamp_logit_scale()
    return losses


# ----------------------------------------------------------------------------------------------------------- schedules


def quadratic_warmup(step: int, value: float, steps: int) -> float:
    """A penalty's weight lambda(t) = lambda min(1, t / steps)^2; t is 1 in the first step.

    Section 4; S:splade/losses/regularization.py:27.
    """
    return value * min(1.0, step / steps if steps else 1.0) ** 2


def learning_rate(step: int, base: float, total: int, warmup: int = 0) -> float:
    """Learning rate of a step from 0 on: linear to `base` over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def rates(cfg: Config, step: int, total: int) -> dict[str, float]:
    """Learning rate and weights of the penalties at a step, from 0 on."""
    image, text = (quadratic_warmup(step + 1, x, cfg.penalty_warmup) for x in (cfg.lambda_image, cfg.lambda_text))
    return {"lr": learning_rate(step, cfg.lr, total, cfg.warmup), "lambda_image": image, "lambda_text": text}


# ---------------------------------------------------------------------------------------------------------- vocabulary


def all_captions(cfg: Config, pairs: Any, process: run.Process) -> Iterator[str]:
    """This process's share of all captions. A stream is read once for them, images and all."""
    if pairs is not None:
        yield from filter(None, map(pairs.caption, range(process.rank, len(pairs), process.world_size)))
        return
    stream = open_corpus(cfg, process, lambda pair: pair.caption)
    for _, _, captions in stream.epoch(0, lambda image: torch.zeros(1)):
        yield from captions


def vocabulary(cfg: Config, pairs: Any, lm: nn.Module, tokenizer: Any, process: run.Process) -> dict[str, Any]:
    """Vocabulary ids (V,) from all captions, each process counting a share, and the bias of the logits.

    The bias is the configuration's, or minus two standard deviations of the LM's logits of the first captions, so that
    few words are above 0 (ours).
    """
    captions = all_captions(cfg, pairs, process)
    counts = piece_counts(tokenizer, map(str.lower, captions) if cfg.lowercase else captions)
    counts = sum(run.gather_lists([counts], process))
    vocab_ids = caption_vocabulary(tokenizer, counts, cfg.min_count, cfg.max_vocabulary, cfg.pattern)
    bias = cfg.bias
    if bias is None and process.main:
        text, tower = lm_input(cfg, lm, tokenizer)(first_captions(pairs)), text_encoder(cfg)(lm, vocab_ids)
        with torch.no_grad():
            z = tower.hidden(*(x.to(tower.codebook.device) for x in text))
            bias = -2 * (z @ tower.codebook.T).std().item()
    return {"vocab_ids": vocab_ids, "bias": run.broadcast(bias, process)}


def first_captions(pairs: Any) -> list[str]:
    """The captions of the first 256 samples."""
    return list(filter(None, map(pairs.caption, range(min(len(pairs), 256)))))


# -------------------------------------------------------------------------------------------------------- the script


def main(cfg: Config, create: Callable[..., LexVLA] = create_model, start: Callable | None = None) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder.

    create, start: make another model, and begin with it, for baselines with the same data and loop.
    """
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)
    if cfg.dry_run:
        return plan.show(cfg, process, rates)
    folder, device = run.RunFolder(cfg, process, epoch=0, batch=0), process.device
    if folder.finished(epoch=cfg.epochs):
        return folder.path

    # Language model and vocabulary
    lm, tokenizer = load_lm(cfg.lm, lm_dtype(run.resolve_precision(cfg.precision, device), device))
    lm.to(device if cfg.text == "lm" else "cpu")  # bags of words need only its head
    pairs = None if cfg.stream else data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    if cfg.states and cfg.text == "lm":
        create_backbone(cfg.backbone, cfg.image_size)  # ends here if there is none, not after minutes of captions
        lm_input(cfg, lm, tokenizer).add(filter(None, map(pairs.caption, range(len(pairs)))))
    if folder.resumed:
        check_lm(lm, folder.state, folder.path)
        found = {name: folder.state[name] for name in ("vocab_ids", "bias")}
    else:
        found = vocabulary(cfg, pairs, lm, tokenizer, process)
    read = text_input(cfg, lm, tokenizer, found["vocab_ids"])

    # Model and optimizer, with the state of the last checkpoint if there is one
    torch.manual_seed(cfg.seed)
    model = create(cfg, lm, *found.values()).to(device)
    if start and not folder.resumed:
        start(model, read, pairs)
    optimizer = torch.optim.Adam(
        [p for p in model.parameters() if p.requires_grad], lr=cfg.lr, betas=BETAS, eps=cfg.eps, fused=True
    )
    scaler = run.grad_scaler(cfg, process)
    folder.restore(weights=Trained(model), optimizer=optimizer, scaler=scaler)
    backbone = backbone_fingerprint(model.image)

    # Data: images, or tokens of the frozen backbone
    view = train_transform(cfg.backbone, cfg.image_size)
    if cfg.encode_once:
        pairs = frozen_tokens(cfg, pairs, model.image, process)
        model.image.backbone = Precomputed()
    corpus = open_corpus(cfg, process, lambda pair: [x[0] for x in read([pair.caption])], pairs)
    first, begin = folder.state["epoch"], folder.state["batch"]
    total = corpus.steps * cfg.epochs
    folder.start(corpus.steps * first + begin, total, len(corpus), data=corpus.fingerprint, backbone=backbone)
    kept = found | {"lm": lm_sample(lm)}
    # Buffers are the frozen codebook and those of frozen models: equal in all processes.
    network = run.distributed(model, process, cfg.accumulate, broadcast_buffers=False)

    for epoch in range(first, cfg.epochs):
        model.train()
        for batch, (_, images, text) in enumerate(corpus.epoch(epoch, view, begin), begin):
            step = corpus.steps * epoch + batch
            run.seed_step(cfg, step + 1, process)
            now = rates(cfg, step, total)
            for group in optimizer.param_groups:
                group["lr"] = now["lr"]
            lambdas = now["lambda_image"], now["lambda_text"]
            losses = train_step(network, (images, text), lambdas, optimizer, scaler, cfg)
            if batch == 0 or (step + 1) % cfg.log_every == 0:
                scale = model.logit_scale.exp()
                folder.log(step + 1, epoch=epoch, lr=now["lr"], logit_scale=scale, **run.over_ranks(losses))
            if folder.due(step + 1) and batch + 1 < corpus.steps:
                folder.save(step + 1, epoch=epoch, batch=batch + 1, **kept)

        done, last, begin = corpus.steps * (epoch + 1), epoch + 1 == cfg.epochs, 0
        corpus.report_broken(f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0, **kept)
    folder.close()
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
