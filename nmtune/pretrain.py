"""Pre-train an encoder on noisy supervision: `python -m nmtune.pretrain PRESET [--overrides]`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning, `U:` = @f249dce, `U0:` = its first, @e9c5fb1.
The paper's controlled study: the same encoder at five noise ratios gamma,
  - supervised: a share gamma of the labels is flipped      `NoisyLabels`, datasets.py `flip_labels`
  - CLIP: captions are swapped between image-text pairs     `SwappedCaptions`, datasets.py `swap_captions`
The authors trained with stock timm and OpenCLIP 2.16.0. Models are timm's and open_clip's here, too, optimizers timm's;
CLIP's loss is shared/loss.py `clip_loss`.
"""

import random
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from nmtune.config import PRETRAIN_PRESETS, PretrainConfig
from nmtune.datasets import LabelledImages, flip_labels, open_labelled, swap_captions
from nmtune.encoders import create_model
from nmtune.train import cosine_lr
from shared import cli, clip, data, run
from shared.corpus import Corpus
from shared.loss import clip_loss

# ---------------------------------------------------------------------------------------------------------------- data


class NoisySample(NamedTuple):
    """A training sample after its label was flipped, or its caption swapped."""

    key: str
    image: Image.Image
    target: int | str  # label or caption
    noisy: bool  # whether the target is wrong


class NoisyLabels:
    """Labelled images, a share of whose labels is flipped."""

    def __init__(self, cfg: PretrainConfig, images: LabelledImages):
        rng = np.random.RandomState(cfg.seed if cfg.noise_seed is None else cfg.noise_seed)
        labels = flip_labels(images.labels, images.num_classes, cfg.noise, rng, cfg.exclude_true, cfg.asymmetric)
        self.noisy, self.images = labels != images.labels, images.relabelled(labels)
        self.images.border, self.strict, self.broken, self.total = images.border, cfg.strict, [], len(images)
        self.keys, self.fingerprint = self.images.keys, self.images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def read(self, row: int) -> NoisySample:
        image, label = self.images.read(row)
        return NoisySample(self.keys[row], image, label, bool(self.noisy[row]))


class SwappedCaptions:
    """Image-text pairs, some of which have another pair's caption."""

    def __init__(self, cfg: PretrainConfig, pairs: data.Shards | data.TSV):
        n, seed = len(pairs), cfg.seed if cfg.noise_seed is None else cfg.noise_seed
        self.pairs, self.source = pairs, swap_captions(n, int(n * cfg.noise / 2), random.Random(seed))
        self.noisy, self.keys = self.source != np.arange(n), pairs.keys
        self.strict, self.broken, self.total = cfg.strict, pairs.broken, n
        self.fingerprint = data.fingerprint(pairs.fingerprint.encode(), self.source.tobytes())

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, row: int) -> NoisySample:
        pair = self.pairs.read(row)
        caption = self.pairs.caption(int(self.source[row])) if self.noisy[row] else pair.caption
        return NoisySample(pair.key, pair.image, caption, bool(self.noisy[row]))


def open_samples(cfg: PretrainConfig, images: LabelledImages | None) -> NoisyLabels | SwappedCaptions:
    """The training set with its noise; `images` are given if the kind is supervised."""
    if images is not None:
        return NoisyLabels(cfg, images)
    return SwappedCaptions(cfg, data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache)))


# ------------------------------------------------------------------------------------------------------------ one step


def losses(cfg: PretrainConfig, output: dict | Tensor, targets: Tensor, noisy: Tensor) -> dict:
    """{"loss", ...} of a model's output. Supervised: cross-entropy, and training accuracy on wrong and on right labels,
    in per cent, as "accuracy_noisy" and "accuracy_clean". CLIP: the contrastive loss and "logit_scale"."""
    if cfg.kind == "clip":
        loss = clip_loss(output["image_features"], output["text_features"], output["logit_scale"])
        return {"loss": loss, "logit_scale": output["logit_scale"].detach()}
    loss = F.cross_entropy(output.float(), targets)
    found = {"loss": loss}
    with torch.no_grad():  # NaN without a sample of the kind
        hit = output.argmax(dim=1) == targets
        for name, chosen in (("clean", ~noisy), ("noisy", noisy)):
            found[f"accuracy_{name}"] = 100 * (hit & chosen).sum() / chosen.sum()
    return found


def make_optimizer(model: nn.Module, cfg: PretrainConfig) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or AdamW. Biases and gains do not decay. Positional embeddings of a CLIP decay, as in
    open_clip 2.16 (U:open_clip/training/main.py:292-302); timm would exclude them."""
    name = {"sgd": "nesterov"}.get(cfg.optimizer, cfg.optimizer)
    adam = {"betas": (0.9, cfg.beta2), "eps": cfg.eps} if cfg.optimizer == "adamw" else {}
    parameters = model
    if cfg.kind == "clip":
        gains, matrices = ([p for p in model.parameters() if (p.ndim < 2) == spared] for spared in (True, False))
        parameters = [{"params": gains, "weight_decay": 0.0}, {"params": matrices}]
    return create_optimizer_v2(parameters, opt=name, lr=cfg.lr, weight_decay=cfg.weight_decay, **adam)


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    cfg: PretrainConfig,
) -> dict[str, Tensor]:
    """One optimizer step on (images (B, 3, S, S), labels (B,) or tokens (B, L), noisy (B,)) -> `losses`."""
    images, targets, noisy = batch
    for group in optimizer.param_groups:
        group["lr"] = lr
    with run.autocast(cfg.precision, images.device):
        output = model(images, targets) if cfg.kind == "clip" else model(images)
    found = losses(cfg, output, targets, noisy)
    optimizer.zero_grad()
    scaler.scale(found["loss"]).backward()
    scaler.step(optimizer)
    scaler.update()
    if cfg.kind == "clip":
        with torch.no_grad():
            run.bare(model).logit_scale.clamp_(0, np.log(100))
    return found


# ---------------------------------------------------------------------------------------------------------- the script


def planned_samples(cfg: PretrainConfig) -> int:
    """Samples of an epoch for a dry run, which reads neither labelled images nor remote shards: as in the paper if
    --data is not named."""
    if cfg.kind == "supervised":
        return 1_281_167
    cc12m = 12_423_374 if cfg.model == "ViT-B-16" else 0  # of the journal's version
    return data.planned_size(cfg) or 15_388_848 + cc12m


def main(cfg: PretrainConfig) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)

    # Model and optimizer, with the state of the last checkpoint if there is one
    supervised = cfg.kind == "supervised"
    images = open_labelled(cfg.data, Path(cfg.cache)) if supervised and not cfg.dry_run else None
    torch.manual_seed(cfg.seed)
    model, transform, side = create_model(cfg, 0 if images is None else images.num_classes)
    if cfg.dry_run:
        total = planned_samples(cfg) // cfg.batch_size * cfg.epochs
        inputs = [torch.zeros(2, 3, side, side)]
        inputs += [] if supervised else [torch.ones(2, model.context_length, dtype=torch.long)]
        rates = lambda step: {"": cosine_lr(cfg.lr, cfg.warmup, total, step)}  # noqa: E731
        rows = [("noise", f"{cfg.noise:g}")]
        if not supervised:
            rows.append(cli.first_loss_row(cfg.batch_size))
        return cli.show_run(cfg, process, model, inputs, total, rates, rows)
    model = model.to(process.device, memory_format=torch.channels_last)
    clip.set_grad_checkpointing(model, cfg.grad_checkpointing)
    optimizer = make_optimizer(model, cfg)
    scaler = run.grad_scaler(cfg, process)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]

    # Data and its noise
    samples, tokenizer = open_samples(cfg, images), None
    if not supervised:
        tokenizer = clip.RememberingTokenizer(open_clip.get_tokenizer(cfg.model))

    def text(sample: NoisySample) -> tuple[Any, bool]:
        return (sample.target if tokenizer is None else tokenizer([sample.target])[0]), sample.noisy

    corpus = Corpus(cfg, process, text, samples, side=2 * side)
    noise = folder.state["noise"] if folder.resumed else float(samples.noisy.mean())
    if process.main:
        what = "captions displaced" if cfg.kind == "clip" else "labels wrong"
        print(f"noise ratio {cfg.noise:g}: {100 * noise:.2f} % of {len(samples):,} {what}")
    per_epoch, total = corpus.steps, corpus.steps * cfg.epochs
    folder.start(per_epoch * first + start, total, len(samples), data=samples.fingerprint, noise=noise)

    network = run.distributed(model, process, cfg.accumulate)
    network.train()
    for epoch in range(first, cfg.epochs):
        batches = corpus.epoch(epoch, transform, start)
        for step, (_, pixels, (targets, noisy)) in enumerate(batches, per_epoch * epoch + start):
            run.seed_step(cfg, step, process)
            lr, done = cosine_lr(cfg.lr, cfg.warmup, total, step), step + 1
            batch = pixels.to(memory_format=torch.channels_last), targets, noisy
            found = train_step(network, batch, optimizer, scaler, lr, cfg)
            if done % cfg.log_every == 0 or done == total:
                folder.log(done, epoch=epoch, lr=lr, **(found | run.over_ranks({"loss": found["loss"]})))
            if folder.due(done):
                folder.save(done, epoch=epoch, batch=done - per_epoch * epoch)
        corpus.report_broken(f"epoch {epoch + 1}")
        start = 0
    folder.save(total, epoch=cfg.epochs, batch=0)
    folder.close(then=f"python -m nmtune.train nmtune --encoder {cfg.out} --data FOLDER")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRETRAIN_PRESETS)))
