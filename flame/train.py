"""Train FLAME, or a CLIP on the same captions: `python -m flame.train PRESET [--overrides]`.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. In each step:
  1. load images and draw K of the 11 facets of each from the bank    `training_view`, `Facets`
  2. embed the images with the tower and the MLP                      model.py `FLAME`
  3. compare every image with every text of the batch                 `batch_loss`
  4. one step of AdamW; clamp the scale of the logits                 `train_step`
The texts were embedded by embed.py; no language model is loaded. The CLIP baseline has tokens of a caption in 1, and a
text tower in 2. Losses are in model.py, settings in config.py, evaluation during training in zeroshot.py.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from open_clip.transform import image_transform
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms import Compose

from flame.bank import Bank
from flame.captions import Captions
from flame.config import PRESETS, Config
from flame.model import FLAME, Output, TrainedText, create_model, mp_nce_loss, mp_sigmoid_loss
from flame.zeroshot import tokenizer_of, top1_during_training
from shared import cli, clip, data, run
from shared.corpus import open_corpus
from shared.errors import UserError
from shared.views import SmallView

# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    cfg: Config,
) -> dict[str, Tensor]:
    """One step of this rank's images (B, 3, H, H) and texts, facets (B, K, D) or CLIP's tokens (B, L).

    Returns loss, scale and bias. U:training/train.py:90-207.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    images, texts = batch
    with run.autocast(cfg.precision, images.device):
        output = model(images) if cfg.method == "flame" else model(images, texts)
    loss = batch_loss(output, texts, cfg)
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    run.bare(model).clamp_logit_scale()
    bias = {} if output.logit_bias is None else {"logit_bias": output.logit_bias.detach()}
    return {"loss": loss.detach(), "logit_scale": output.logit_scale.detach(), **bias}


def batch_loss(output: Output, texts: Tensor, cfg: Config) -> Tensor:
    """The loss of the model's output and the texts of a batch."""
    image, scale = output.image_features, output.logit_scale
    if cfg.method == "clip":
        return mp_nce_loss(image, output.text_features, scale)  # one text per image: CLIP's loss
    facets = texts.flatten(0, 1)
    if cfg.loss == "mp-nce":
        return mp_nce_loss(image, facets, scale)
    return mp_sigmoid_loss(image, facets, scale, output.logit_bias)


# --------------------------------------------------------------------------------------------------- images and texts


def training_view(size: int, augmentation: str) -> Callable[[Image.Image], Tensor]:
    """PIL RGB -> (3, S, S): RandomResizedCrop (bicubic, no flip), with OpenAI's statistics."""
    if augmentation == "small":
        return SmallView(size, *clip.STATISTICS)
    *steps, _, _ = image_transform(size, True, aug_cfg={"scale": (0.9, 1.0)}).transforms
    return Compose([*steps, data.ToNormalizedTensor(*clip.STATISTICS)])


def sample_facets(facets: Tensor, num: int = 6) -> Tensor:
    """(T, D) facets of an image -> (num, D), drawn without replacement, in random order. U:training/data.py:409-411."""
    return facets[torch.randperm(len(facets))[:num]]


class Facets:
    """The texts of a sample: (K, D) facets of the bank, drawn anew each time the sample is loaded."""

    def __init__(self, cfg: Config):
        self.bank, self.ids, self.num = Bank(cfg.bank), list(cfg.facet_ids), cfg.facets
        if max(self.ids, default=0) >= self.bank.facets or self.num > self.bank.facets:
            raise UserError(f"{cfg.bank} has {self.bank.facets} facets an image, too few for --facet-ids and --facets")

    def __call__(self, pair: Any) -> Tensor:
        facets = self.bank[pair.key]
        return sample_facets(facets[self.ids] if self.ids else facets, self.num)


class Tokens:
    """The text of a sample in the baseline: CLIP's tokens (L,) of one of its captions, drawn anew each time."""

    def __init__(self, cfg: Config, model: TrainedText):
        self.captions = [Captions(path) for path in cfg.captions]
        self.tokenizer = clip.RememberingTokenizer(tokenizer_of(model))

    def __call__(self, pair: Any) -> Tensor:
        caption = pair.caption
        if self.captions:
            caption = self.captions[int(torch.randint(len(self.captions), (1,)))][pair.key]
        return self.tokenizer([caption])[0]


# -------------------------------------------------------------------------------- learning rate and parameter groups


def learning_rate(cfg: Config, step: int, total: int) -> float:
    """Linear to --lr at step warmup - 1, then half a cosine to 0 at `total`. U:training/scheduler.py:43."""
    warmup = min(cfg.warmup, total)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * cfg.lr


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters without decay (vectors, scalars, names with bn, ln, bias or logit_scale) and with it.

    U:training/main.py:315. Position embeddings, the patch convolution and the unused `visual.proj` decay.
    """

    def spared(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if spared(n, p)], "weight_decay": 0.0},
        {"params": [p for n, p in named if not spared(n, p)], "weight_decay": weight_decay},
    ]


# -------------------------------------------------------------------------------------------------------- the script


def plan(cfg: Config, process: run.Process) -> None:
    """Print the plan of a run, for the widths of Mistral-Nemo or SmolLM2-135M."""
    text_dim = 5120 if cfg.model.startswith("ViT-") else 576
    model = create_model(cfg, text_dim)
    total = data.planned_size(cfg) // cfg.batch_size * cfg.epochs
    inputs, rows = blank_inputs(model), []
    if cfg.method == "clip" or cfg.loss == "mp-nce":
        rows.append(cli.first_loss_row(cfg.batch_size))
    if cfg.method == "flame":
        facets = len(cfg.facet_ids) or 11
        rows += [("texts", f"{cfg.facets} of {facets} facets an image, each of {text_dim} numbers")]
        if cfg.dataset_size:
            size = cfg.dataset_size * 11 * text_dim * 2 / 1e9
            rows.append(("bank", f"{size:,.1f} GB if every image has captions of its own"))
    cli.show_run(cfg, process, model, inputs, total, lambda step: {"lr": learning_rate(cfg, step, total)}, rows)


def blank_inputs(model: FLAME) -> tuple[Tensor, ...]:
    """Two blank images, and of the baseline two captions of full length."""
    side = model.visual.image_size[0]
    images = torch.zeros(2, *getattr(model.visual, "input_shape", (3, side, side)))
    return (images, torch.ones(2, model.text.context_length, dtype=torch.long)) if hasattr(model, "text") else (images,)


def main(cfg: Config, pairs: Any = None) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder.

    `pairs`: pairs to train on instead of those of --data (see shared/corpus.py).
    """
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)
    if cfg.dry_run:
        return plan(cfg, process)

    # Texts, model and optimizer, with the state of the last checkpoint if there is one
    facets = Facets(cfg) if cfg.method == "flame" else None
    model = create_model(cfg, facets and facets.bank.dim).to(process.device)
    text_dim = model.mm[3].normalized_shape[0]
    clip.set_grad_checkpointing(model, cfg.grad_checkpointing)
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=cfg.lr, **cfg.adamw, fused=True)
    scaler = run.grad_scaler(cfg, process)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]

    # Data
    texts, side = facets or Tokens(cfg, model), model.visual.image_size[0]
    corpus = open_corpus(cfg, process, texts, pairs=pairs, cut_padding=facets is None, side=2 * side)
    if not cfg.stream:  # whose keys are known only when they are read
        for check in [facets.bank] if facets else texts.captions:
            check.check(corpus.pairs.keys, cfg.data)
    view, per_epoch = training_view(side, cfg.augmentation), corpus.steps
    total = per_epoch * cfg.epochs
    top1 = top1_during_training(model, cfg, process) if folder.evaluates(cfg.epochs, cfg.epochs) else None
    made_with = {"data": corpus.fingerprint, "bank": facets and facets.bank.digest}
    folder.start(per_epoch * first + start, total, len(corpus), text_dim=text_dim, **made_with)

    network = run.distributed(model, process, cfg.accumulate, static_graph=True)
    for epoch in range(first, cfg.epochs):
        model.train()
        for i, (_, *batch) in enumerate(corpus.epoch(epoch, view, start), start):
            step = per_epoch * epoch + i
            run.seed_step(cfg, step + 1, process)
            lr = learning_rate(cfg, step, total)
            losses = train_step(network, batch, optimizer, scaler, lr, cfg)
            if i == 0 or (step + 1) % cfg.log_every == 0:
                folder.log(step + 1, epoch=epoch, lr=lr, **run.over_ranks(losses))
            if folder.due(step + 1) and i + 1 < per_epoch:
                folder.save(step + 1, epoch=epoch, batch=i + 1)

        done, last = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs
        if folder.evaluates(epoch + 1, cfg.epochs):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch):
                accuracy = top1()
            folder.log(done, epoch=epoch, zero_shot_top1=accuracy)
        corpus.report_broken(f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0)
        start = 0
    folder.close()
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
