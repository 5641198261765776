"""Train TL;DR's models: `python -m tldr_reduction.train PRESET [--overrides]`.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, `V:` its `vq_compress_model/`; BLIP's
salesforce/BLIP@056a169, `B:`. One loop trains the five stages, which differ in their losses (`losses_of`):
  captioner    reads the image through a codebook, on the noisy data (sec. 3.1); reduce.py clusters its codes
  finetune     the captioner without its codebook, on clean captions (sec. 3.2); it writes the captions T_g
  blip, clip   pre-training on the full or the reduced data (sec. 4); a blip also scores image-text matching
  retrieval    fine-tuning of a blip for retrieval (sec. 4.2.1)
Models and losses are in model.py and blip.py, the codebook's start in codebook.py, settings in config.py. Batches come
from shared/corpus.py, shuffled by seed and epoch, so that a run resumes with the next batch.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from shared import cli, clip, run
from shared.corpus import Corpus
from shared.loss import clip_loss
from shared.streams import Stream
from shared.zeroshot import quick_top1
from tldr_reduction.blip import PAD
from tldr_reduction.checkpoints import start_weights
from tldr_reduction.codebook import restart_unused, start_codebook
from tldr_reduction.config import PRESETS, Common, Warm, for_steps, total_steps
from tldr_reduction.datasets import TextOf, local_pairs, open_pairs, train_transform, view_of
from tldr_reduction.model import build, build_for, codebook_perplexity, image_side
from tldr_reduction.tokenizer import WordPiece, eval_tokenizer, tokenizer_of

PROMPT_LENGTH = 4  # [DEC] a picture of
BERT_SIZE = 30_524  # of BERT's vocabulary with [DEC] and [ENC], for a dry run, which downloads nothing

# ---------------------------------------------------------------------------------------------------------- one step


def losses_of(model: nn.Module, images: Tensor, texts: Tensor, cfg: Common, alpha: float = 0.0) -> dict[str, Tensor]:
    """Losses of this rank's batch by name, whose sum is minimised, and the captioner's `codes` (B, L').

    images (B, 3, S, S); texts: token ids (B, T), in retrieval with the numbers (B,) of the images. `alpha` weights the
    targets of BLIP's momentum encoders.
    """
    if cfg.stage == "clip":
        with run.autocast(cfg.precision, images.device):
            features = model(images, texts)
        return {"loss_ita": clip_loss(*features)}
    ids, *numbers = texts if cfg.stage == "retrieval" else [texts]
    mask = (ids != PAD).long()
    inputs = {
        "captioner": (),
        "finetune": (PROMPT_LENGTH,),
        "blip": (alpha,),
        "retrieval": (alpha, *numbers),
    }[cfg.stage]
    with run.autocast(cfg.precision, images.device):
        return model(images, ids, mask, *inputs)._asdict()


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    cfg: Common,
    alpha: float = 0.0,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """One step on (images, texts); returns the losses, their sum as `loss`, and the captioner's codes (B, L')."""
    losses = losses_of(model, *batch, cfg, alpha)
    codes = losses.pop("codes", None)
    loss = sum(losses.values())
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"loss": loss, **losses}, codes


def clamp_logit_scale(model: nn.Module) -> None:
    """A clip's logit scale stays in 1..100; a blip clamps its temperature itself."""
    model.logit_scale.data.clamp_(0, math.log(100))


# --------------------------------------------------------------------------------------------------------- schedules


def warmup_step_lr(
    epoch: int, step: int, init_lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, decay_rate: float
) -> float:
    """Epoch 0: linear from warmup_lr to init_lr over warmup_steps; then init_lr * decay^epoch, at least min_lr.

    V:utils.py:8-17, as called in V:pretrain_vq_compress.py:41,127. If epoch 0 is shorter than the warm-up, the warm-up
    ends unfinished, and the learning rate jumps at epoch 1.
    """
    if epoch == 0:
        return min(init_lr, warmup_lr + (init_lr - warmup_lr) * step / max(warmup_steps, 1))
    return max(min_lr, init_lr * decay_rate**epoch)


def cosine_lr(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """Half a cosine from init_lr to min_lr, constant within an epoch. V:utils.py:2."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def learning_rate(cfg: Common, epoch: int, step: int) -> float:
    """The stage's learning rate at a step of an epoch, both from 0: warm-up and decay, or a cosine."""
    if isinstance(cfg, Warm):
        return warmup_step_lr(epoch, step, cfg.lr, cfg.min_lr, 1e-6, cfg.warmup, cfg.lr_decay_rate)
    return cosine_lr(epoch, cfg.epochs, cfg.lr, cfg.min_lr)


def alpha_ramp(epoch: int, step: int, steps_per_epoch: int, alpha: float, epochs: int = 2) -> float:
    """Weight of the momentum targets: linear from 0 to alpha over the first `epochs`. V:pretrain_vq_compress.py:51."""
    return alpha * min(1.0, (epoch * steps_per_epoch + step) / (epochs * steps_per_epoch))


# ---------------------------------------------------------------------------------------------------------- codebook


def count_codes(used: Tensor, codes: Tensor) -> None:
    """Add the codes (B, L') of all ranks to the usage counts (K,) int64."""
    chosen = run.gather(codes).flatten()
    used.scatter_add_(0, chosen, torch.ones_like(chosen))  # `bincount` would wait for a GPU


@torch.no_grad()
def restart_codes(model: nn.Module, used: Tensor, images: Tensor, epoch: int, cfg: Common) -> int:
    """Replace codes not used in the epoch by tokens of its last batch; returns their number."""
    tokens = run.gather(model.visual_encoder(images).float()).reshape(-1, cfg.code_dim)
    generator = torch.Generator().manual_seed(run.stable_hash(cfg.seed, epoch, "restart"))
    return restart_unused(model.quantize, used, tokens, generator)


# -------------------------------------------------------------------------------------------------------- the script


class Learner(NamedTuple):
    """What is trained, and on what."""

    model: nn.Module
    tokenizer: Callable  # WordPiece, or open_clip's
    pairs: Any  # image-text pairs; None with --stream
    view: Callable  # a pair's image -> a random view
    whole: Callable  # PIL RGB -> (3, S, S), for evaluation


def learner_of(cfg: Common, process: run.Process) -> Learner:
    """The model of a stage, and the data of its settings."""
    tokenizer = tokenizer_of(cfg)
    model = build_for(cfg, tokenizer)
    view = train_transform(image_side(model, cfg), cfg.crop_scale, cfg.flip, cfg.augment)
    pairs = None if cfg.stream else open_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.strict, cfg.cache)
    return Learner(model, tokenizer, pairs, view, view_of(model, cfg))


def dry_run(cfg: Common, process: run.Process) -> None:
    """Print the plan of a run: sizes, steps, learning rates, memory. It needs no data."""
    model = build(cfg, len(WordPiece(cfg.vocab)) if Path(cfg.vocab).is_file() else BERT_SIZE)
    pairs = local_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.cache)
    per_epoch = (cfg.dataset_size or 0 if pairs is None else len(pairs)) // cfg.batch_size
    cfg = for_steps(cfg, per_epoch)
    if cfg.stage == "clip":
        inputs = clip.blank_inputs(model)
    else:
        images = torch.zeros(2, 3, cfg.image_size, cfg.image_size)
        ids, mask = torch.ones(2, cfg.max_length, dtype=torch.long), torch.ones(2, cfg.max_length)
        inputs = images, ids, mask, *{"blip": (0.4,), "retrieval": (0.4, torch.arange(2))}.get(cfg.stage, ())

    def rates(step: int) -> dict[str, float]:
        return {"lr": learning_rate(cfg, *divmod(step, max(per_epoch, 1)))}

    warmup = getattr(cfg, "warmup", 0)
    rows = [cli.first_loss_row(cfg.batch_size)] if cfg.stage == "clip" else []
    cli.show_run(cfg, process, model, inputs, total_steps(cfg, per_epoch), rates, rows, warmup)


def train(cfg: Common, process: run.Process, learner: Learner) -> Path:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    model, tokenizer, pairs, view, whole = learner
    text, cut = TextOf(tokenizer, cfg), cfg.stage != "clip" or clip.cuts(model)  # whether the model ignores padding
    if cfg.stream:
        corpus = Stream(cfg, process, text, cut)
    else:
        corpus = Corpus(cfg, process, text, pairs, cut, side=2 * image_side(model, cfg))
    per_epoch = corpus.steps
    cfg = for_steps(cfg, per_epoch)
    total = total_steps(cfg, per_epoch)

    # Model and optimizer, with the state of the last checkpoint if there is one
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]
    model.to(process.device)
    clip.set_grad_checkpointing(model, cfg.grad_checkpointing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=cfg.weight_decay, fused=True)
    scaler = run.grad_scaler(cfg, process)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)

    # Initial weights and codebook
    used = None
    if not folder.resumed:
        start_weights(model, cfg)
    if cfg.stage == "captioner":
        used = folder.state.get("used", torch.zeros(cfg.num_codes, dtype=torch.long)).to(process.device)
        if not folder.resumed:
            start_codebook(model, cfg, pairs, process)
    made_with = {"data": corpus.fingerprint, "vocabulary": getattr(tokenizer, "fingerprint", None)}
    folder.start(min(per_epoch * first + start, total), total, len(corpus), **made_with)

    network = run.distributed(model, process, cfg.accumulate)
    for epoch in range(first, cfg.epochs):
        model.train()
        for batch, (_, images, texts) in enumerate(corpus.epoch(epoch, view, start=start), start):
            step, lr = per_epoch * epoch + batch, learning_rate(cfg, epoch, batch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            run.seed_step(cfg, step + 1, process)
            alpha = alpha_ramp(epoch, batch, per_epoch, 0.4, 1 if cfg.stage == "retrieval" else 2)
            losses, codes = train_step(network, (images, texts), optimizer, scaler, cfg, alpha)
            if cfg.stage == "clip":
                clamp_logit_scale(model)
            if codes is not None and used is not None:
                count_codes(used, codes)
            if batch == 0 or (step + 1) % cfg.log_every == 0:
                folder.log(step + 1, epoch=epoch, lr=lr, **run.over_ranks(losses), **state_of(model, used, codes))
            if step + 1 == total:
                break
            if folder.due(step + 1) and batch + 1 < per_epoch:
                folder.save(step + 1, epoch=epoch, batch=batch + 1, **usage(used))

        done, last, start = min(per_epoch * (epoch + 1), total), epoch + 1 == cfg.epochs, 0
        if used is not None:
            if cfg.restart_codes and not last:
                folder.log(done, epoch=epoch, codes_restarted=restart_codes(model, used, images, epoch, cfg))
            used.zero_()
        if folder.evaluates(epoch + 1, cfg.epochs):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch, **usage(used)):
                tokens = eval_tokenizer(tokenizer, cfg)
                top1 = quick_top1(model, tokens, whole, cfg.eval_set, process.device, cfg.precision)
            folder.log(done, epoch=epoch, zero_shot_top1=top1)
        corpus.report_broken(f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0, **usage(used))
    folder.close(then=NEXT[cfg.stage](cfg) if cfg.stage in NEXT else None)
    return folder.path


NEXT = {  # the command after a stage; after the others, the evaluation
    "captioner": lambda cfg: f"python -m tldr_reduction.reduce {cfg.data} --captioner {cfg.out} --out FOLDER",
    "finetune": lambda cfg: f"python -m tldr_reduction.reduce FOLDER --caption-model {cfg.out} --out FOLDER",
}


def state_of(model: nn.Module, used: Tensor | None, codes: Tensor | None) -> dict[str, Tensor]:
    """Temperature of a clip or blip, usage of a captioner's codebook."""
    if used is not None:
        perplexity = codebook_perplexity(run.gather(codes), len(used))
        return {"codes_used": (used > 0).sum(), "perplexity": perplexity}
    if hasattr(model, "logit_scale"):
        return {"logit_scale": model.logit_scale.exp()}
    return {"logit_scale": 1 / model.temp} if hasattr(model, "temp") else {}


def usage(used: Tensor | None) -> dict[str, Tensor]:
    """The counts of codes, for a checkpoint."""
    return {} if used is None else {"used": used.cpu()}


def main(cfg: Common, learner_of: Callable[[Common, run.Process], Learner] = learner_of) -> Path | None:
    """`train`, or --dry-run. A study may bring its own learners."""
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)
    return dry_run(cfg, process) if cfg.dry_run else train(cfg, process, learner_of(cfg, process))


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
