"""Pre-train an encoder on noisy supervision: `python -m nmtune.pretrain PRESET [--overrides]`.

NMTune (arXiv 2309.17002); authors' code Hhhhhhao/Noisy-Model-Learning, `U:` = @f249dce, `U0:` = its first, @e9c5fb1.
The paper's controlled study: the same encoder at five noise ratios gamma,
  - supervised: a share gamma of the labels is flipped      `NoisyLabels`, datasets.py `flip_labels`
  - CLIP: captions are swapped between image-text pairs     `SwappedCaptions`, datasets.py `swap_captions`
The authors trained with stock timm and OpenCLIP 2.16.0; so do we: timm's and open_clip's models, losses and optimizers.
"""

import copy
import dataclasses
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

from nmtune.config import PRETRAIN_PRESETS, PretrainConfig, check_numbers, check_pretrain
from nmtune.datasets import LabelledImages, flip_labels, open_labelled, swap_captions
from nmtune.model import create_model
from nmtune.train import cosine_lr
from shared import accumulate, cli, data, memory, run, windows
from shared.clip import set_grad_checkpointing, trimmed

IMAGENET_BYTES = 110_000  # mean file size of an image

# ---------------------------------------------------------------------------------------------------------------- data


class NoisyLabels(Dataset):
    """Training views and noisy labels: item i of a run -> uint8 image (3, S, S), label, noisy?, broken samples.

    `normalise` is for batches of images. A view depends on seed, epoch and sample only.
    """

    def __init__(self, cfg: PretrainConfig, transform: Callable, images: LabelledImages):
        self.images = images
        self.images.strict = cfg.strict
        self.seed = cfg.seed
        self.transform, self.normalise = data.split_normalisation(transform)
        rng = np.random.RandomState(cfg.seed if cfg.noise_seed is None else cfg.noise_seed)
        given, classes = self.images.labels, self.images.num_classes
        labels = flip_labels(given, classes, cfg.noise, rng, cfg.exclude_true, cfg.asymmetric)
        self.noisy = labels != given
        self.images.labels = labels
        self.broken: list[data.Broken] = []
        self.fingerprint = self.images.fingerprint

    def __len__(self) -> int:
        return len(self.images)

    def share(self) -> float:
        """Share of the labels that are wrong."""
        return float(self.noisy.mean())

    def __getitem__(self, i: int) -> tuple[Tensor, int, bool, list]:
        (image, label), broken = data.read_item(self.images, i, self.seed)
        return self.transform(image), label, bool(self.noisy[i % len(self)]), broken


class SwappedCaptions(Dataset):
    """Training views and captions after swapping: item i of a run -> uint8 image (3, S, S), tokens (L,), swapped?, and
    broken samples. `normalise` is for batches of images. A view depends on seed, epoch and sample only.
    """

    def __init__(self, cfg: PretrainConfig, transform: Callable, tokenizer: Callable, pairs):
        self.pairs, self.broken, self.tokenizer, self.seed = pairs, pairs.broken, tokenizer, cfg.seed
        self.transform, self.normalise = data.split_normalisation(transform)
        self.noise, self.noise_seed = cfg.noise, cfg.seed if cfg.noise_seed is None else cfg.noise_seed
        self.fingerprint = data.fingerprint(pairs.fingerprint.encode(), self.swap(cfg))

    def swap(self, cfg: PretrainConfig) -> bytes:
        """Swap captions; returns a fingerprint of the swaps."""
        self.rows = np.arange(len(self.pairs))
        if ":pretrain" in cfg.data:  # the emoji of the embedded corpus that are not held out
            known = set(open_labelled(cfg.data).keys.tolist())
            self.rows = np.array([row for row, key in enumerate(self.pairs.keys) if key in known], dtype=np.int64)
        n = len(self.rows)
        self.source = swap_captions(n, int(n * self.noise / 2), random.Random(self.noise_seed))
        return self.source.tobytes()

    def __len__(self) -> int:
        return len(self.rows)

    def share(self) -> float:
        """Share of the pairs that have another pair's caption."""
        return float((self.source != np.arange(len(self))).mean())

    def place(self, i: int) -> tuple[data.Shards | data.TSV, int, int]:
        """Item -> (pairs, index of the image's sample, index of the caption's sample)."""
        i %= len(self)
        return self.pairs, int(self.rows[i]), int(self.rows[self.source[i]])

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, bool, list]:
        pairs, row, source = self.place(int(i))
        data.seed_views(self.seed, i, len(self))
        broken: list[data.Broken] = []
        pair = data.read_or_next(pairs, row, broken)
        caption = pairs.caption(source) if source != row else pair.caption
        return self.transform(pair.image), self.tokenizer([caption])[0], source != row, broken


class SwappedWithinShards(SwappedCaptions):
    """`SwappedCaptions` for windows of shards. Captions are swapped within each shard, since other shards may not be on
    disk; the swaps are the same in every epoch and window.
    """

    def swap(self, cfg: PretrainConfig) -> bytes:
        return repr((self.noise, self.noise_seed)).encode()

    def __len__(self) -> int:
        return len(self.pairs)

    def swaps_of(self, pairs: data.Shards, rows: range) -> np.ndarray:
        """`swap_captions` of the shard with the samples `rows`; depends only on its first key and its size."""
        return shard_swaps(pairs.keys[rows[0]], len(rows), self.noise, self.noise_seed)

    def share(self) -> float:
        """Share of the pairs in the first window that have another pair's caption."""
        pairs, _ = self.pairs.open(0, 0, self.pairs.rank)
        shards = [rows for shard in range(len(pairs.paths)) if (rows := pairs.rows_of(shard))]
        moved = [self.swaps_of(pairs, rows) != np.arange(len(rows)) for rows in shards]
        return float(np.concatenate(moved).mean())

    def place(self, i: int) -> tuple[data.Shards, int, int]:
        pairs, row = self.pairs.place(i)
        rows = pairs.rows_of(pairs.shard_of(row))
        return pairs, row, rows[int(self.swaps_of(pairs, rows)[row - rows[0]])]


@functools.lru_cache(maxsize=1024)  # shards
def shard_swaps(first: str, n: int, noise: float, seed: int) -> np.ndarray:
    """`swap_captions` of a shard of n pairs whose first key is `first`."""
    return swap_captions(n, int(n * noise / 2), random.Random(data.stable_hash(seed, first)))


def open_samples(
    cfg: PretrainConfig, transform: Callable, side: int, process: run.Process, images: LabelledImages | None
) -> NoisyLabels | SwappedCaptions:
    """The training set with its noise; `images` are given if the kind is supervised.

    With `keep_in_memory` it has two more attributes: `decoded`, the tensors that `decoded()` returns, and `side`, the
    side of a view in pixels.
    """
    if cfg.kind == "supervised":
        samples = NoisyLabels(cfg, transform, images)
    else:
        shards = f"{cfg.data.partition(':')[0]}/train" if ":pretrain" in cfg.data else cfg.data
        pairs = windows.open_pairs(dataclasses.replace(cfg, data=shards), process)
        data.say_size(pairs, cfg, process)
        tokenizer = data.RememberingTokenizer(open_clip.get_tokenizer(cfg.model))
        kind = SwappedWithinShards if cfg.window_shards else SwappedCaptions
        samples = kind(cfg, transform, tokenizer, pairs)
    if cfg.keep_in_memory:
        samples.side, samples.decoded = side, decoded(samples, 2 * side, process)
    return samples


def decoded(samples: "NoisyLabels | SwappedCaptions", side: int, process: run.Process) -> tuple[Tensor, Tensor, Tensor]:
    """Decode every sample once: images as centre squares (N, 3, side, side) uint8, labels (N,) or tokens (N, L), and
    whether they are noise (N,). Broken samples are added to `samples.broken`."""
    memory.check_size(len(samples), side, process)
    whole = copy.copy(samples)
    whole.transform = lambda image: memory.square_pixels(image, side)
    rows = run.progress(range(len(samples)), len(samples), "reading", 1, process)
    *batch, broken = collate([whole[row] for row in rows])
    samples.broken = [*samples.broken, *broken]
    return tuple(batch)


def batch_order(
    cfg: PretrainConfig, n: int, epoch: int, process: run.Process, start: int
) -> tuple[list[np.ndarray], list[float]]:
    """(positions of the samples in this rank's batches of an epoch, from batch `start` on; each batch's weight in the
    mean over ranks).

    A short last batch is split evenly; a rank without samples gets the batch's first one with weight 0. For CLIP, a
    short last batch has too few negatives and is dropped, as in open_clip, unless it is the only batch.
    """
    order = data.batches(n, cfg.batch_size, (cfg.seed, epoch), start=start)
    if cfg.kind == "clip" and n % cfg.batch_size and n > cfg.batch_size:
        order = order[:-1]
    if cfg.kind == "clip":  # ranks need equal numbers of samples, since features are gathered
        order = [batch[: len(batch) // process.world_size * process.world_size] for batch in order]
    own = [np.array_split(batch, process.world_size)[process.rank] for batch in order]
    weights = [len(rows) * process.world_size / len(batch) for rows, batch in zip(own, order, strict=True)]
    return [rows if len(rows) else batch[:1] for rows, batch in zip(own, order, strict=True)], weights


def steps_an_epoch(cfg: PretrainConfig, n: int) -> int:
    """Number of batches that `batch_order` makes of n samples."""
    whole, rest = divmod(n, cfg.batch_size)
    return whole if cfg.kind == "clip" and whole else whole + (rest > 0)


def memory_batches(
    samples: NoisyLabels | SwappedCaptions, cfg: PretrainConfig, process: run.Process, epochs: range, start: int
) -> Iterator[tuple]:
    """`training_batches` for samples that are `decoded`: crops (and flips) a whole batch at once."""
    (pixels, targets, noisy), labels = samples.decoded, cfg.kind == "supervised"
    scale = (cfg.crop_scale, 1.0) if labels else (0.9, 1.0)
    for epoch in epochs:
        u = memory.uniforms((cfg.seed, epoch, 1), len(samples), 5)  # (seed, epoch) seeds the shuffle
        own = batch_order(cfg, len(samples), epoch, process, start if epoch == epochs[0] else 0)
        for rows, weight in zip(*own, strict=True):
            rows = torch.from_numpy(rows)
            flip = u[rows, 4] < 0.5 if labels else None
            boxes = memory.random_crops(u[rows], scale)
            images = memory.crop_and_resize(pixels[rows], boxes, samples.side, flip)
            inputs = images, targets[rows]
            yield weight, *(run.pinned(x, process.device) for x in inputs), noisy[rows], []


def training_batches(
    samples: NoisyLabels | SwappedCaptions, cfg: PretrainConfig, process: run.Process, epochs: range, start: int
) -> Iterator[tuple]:
    """(weight, *batch of `collate`) in `batch_order`, or by window, from batch `start` of the first epoch on."""
    if cfg.window_shards:
        for batch in windows.training_batches(samples, collate, cfg, process, epochs, start):
            yield 1.0, *batch
        return
    if cfg.keep_in_memory:
        yield from memory_batches(samples, cfg, process, epochs, start)
        return
    ahead: deque[float] = deque()  # weights of the batches that the loader has been asked for

    def order() -> Iterator[np.ndarray]:
        for epoch in epochs:
            own, weights = batch_order(cfg, len(samples), epoch, process, start if epoch == epochs[0] else 0)
            for rows, weight in zip(own, weights, strict=True):
                ahead.append(weight)
                yield epoch * len(samples) + rows

    for batch in data.loader_of(samples, order(), collate, cfg, process):
        yield ahead.popleft(), *batch


def collate(items: list) -> tuple[Tensor, Tensor, Tensor, list]:
    """-> images (B, 3, S, S), labels (B,) or tokens (B, L), whether they are noise (B,), broken samples."""
    images, targets, noisy, broken = zip(*items, strict=True)
    targets = torch.stack(targets) if torch.is_tensor(targets[0]) else torch.tensor(targets)
    return torch.stack(images), targets, torch.tensor(noisy), [one for each in broken for one in each]


# ------------------------------------------------------------------------------------------------------------ one step


def losses(cfg: PretrainConfig, output: dict | Tensor, targets: Tensor, noisy: Tensor, process: run.Process) -> dict:
    """{"loss", ...} of a model's output. Supervised: cross-entropy, and training accuracy on wrong and on right labels,
    in per cent, as "accuracy_noisy" and "accuracy_clean". CLIP: the contrastive loss and "logit_scale"."""
    if cfg.kind == "clip":
        clip_loss = open_clip.ClipLoss(  # local_loss: a rank's own pairs against all; gather_with_grad
            True, True, rank=process.rank, world_size=process.world_size
        )
        features = output["image_features"].float(), output["text_features"].float()
        return {"loss": clip_loss(*features, output["logit_scale"]), "logit_scale": output["logit_scale"].detach()}
    each = F.cross_entropy(output.float(), targets, label_smoothing=cfg.label_smoothing, reduction="none")
    found = {"loss": each.mean()}
    with torch.no_grad():
        hit = output.argmax(dim=1) == targets
        for name, chosen in (("clean", ~noisy), ("noisy", noisy)):
            if count := int(chosen.sum()):  # counted on the CPU
                chosen = run.pinned(chosen, hit.device).to(hit.device, non_blocking=True)
                found[f"accuracy_{name}"] = 100 * ((hit & chosen).sum() / count)
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
    process: run.Process,
    precision: str,
    weight: float = 1.0,
) -> dict[str, Tensor]:
    """Run one optimizer step on (images, targets, noisy), images on the device -> `losses`.

    weight: the weight of this rank's loss in the mean over ranks.
    """
    images, targets, noisy = batch
    for group in optimizer.param_groups:
        group["lr"] = lr
    if cfg.kind == "clip":
        targets = trimmed(targets, model, process.device)
    else:
        targets = targets.to(process.device, non_blocking=True)
    inputs = (images, targets) if cfg.kind == "clip" else (images,)
    output, backward = accumulate.forward(model, inputs, cfg, precision)
    found = losses(cfg, output, targets, noisy, process)
    optimizer.zero_grad()
    backward(scaler.scale(found["loss"] * weight))
    scaler.step(optimizer)
    scaler.update()
    if cfg.kind == "clip":
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        with torch.no_grad():
            bare.logit_scale.clamp_(0, np.log(100))
    return found


# ---------------------------------------------------------------------------------------------------------- the script


def planned_samples(cfg: PretrainConfig) -> tuple[int, str]:
    """(samples of an epoch, remark) for a dry run, which reads neither labelled images nor remote shards."""
    if ":pretrain" in cfg.data:  # the embedded corpus
        return cfg.dataset_size or 4_494, ""
    if cfg.kind == "supervised":
        return 1_281_167, " (as in ImageNet-1K)"
    if found := data.planned_size(cfg):
        return found, ""
    cc12m = 12_423_374 if cfg.model == "ViT-B-16" else 0  # of the journal's version
    return 15_388_848 + cc12m, " (as in the paper)"


def dry_run(cfg: PretrainConfig, world_size: int) -> None:
    """Print the plan of a run: parameters, steps, learning rates, memory of the training step."""
    model, _, size = create_model(cfg)
    parameters = sum(p.numel() for p in model.parameters())
    samples, remark = planned_samples(cfg)
    per_epoch = steps_an_epoch(cfg, samples)
    total = per_epoch * cfg.epochs
    swaps = f", {int(samples * cfg.noise / 2):,} swaps" if cfg.kind == "clip" else ""
    inputs = [torch.zeros(2, 3, size, size)]
    if cfg.kind == "clip":
        inputs.append(torch.ones(2, model.context_length, dtype=torch.long))
    checkpointed = model if cfg.grad_checkpointing else None
    activations = cli.activation_bytes(lambda: model(*inputs), checkpointed) / 2 / 2**30
    activations *= cfg.batch_size / world_size / cfg.accumulate
    gib = 16 * parameters / 2**30 + activations
    cli.show_plan(
        [
            ("parameters", f"{parameters:,}"),
            ("samples", f"{samples:,} an epoch, {cfg.epochs} epochs{remark}"),
            cli.disk_row(samples, parameters, each=cli.PAIR_BYTES if cfg.kind == "clip" else IMAGENET_BYTES),
            ("noise", f"{cfg.noise:g}{swaps}"),
            cli.batch_row(cfg, world_size),
            cli.step_row(total, per_epoch),
            *cli.rate_rows(lambda step: f"{cosine_lr(cfg.lr, cfg.warmup, total, step):.3e}", cfg.warmup, total),
            ("memory estimate", f"{gib:.1f} GiB a process in fp32 (autocast: up to half the activations)"),
        ]
    )


def main(cfg: PretrainConfig) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        check_numbers(cfg, process.world_size)
        return dry_run(cfg, process.world_size) if process.main else None
    check_pretrain(cfg, process.world_size)
    precision = run.resolve_precision(cfg.precision, process.device)

    # Model and optimizer; from the checkpoint if there is one
    images = open_labelled(cfg.data, Path(cfg.cache)) if cfg.kind == "supervised" else None
    num_classes = 0 if images is None else images.num_classes
    torch.manual_seed(cfg.seed)
    model, transform, side = create_model(cfg, num_classes)
    model = model.to(process.device, memory_format=torch.channels_last)
    set_grad_checkpointing(model, cfg.grad_checkpointing)
    optimizer = make_optimizer(model, cfg)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]

    # Data and its noise
    samples = open_samples(cfg, transform, side, process, images)
    folder.check_same("data", samples.fingerprint, f"on other data than {cfg.data} holds")
    noise = folder.state["noise"] if folder.resumed else samples.share()
    if process.main:
        what = "captions displaced" if cfg.kind == "clip" else "labels wrong"
        print(f"noise ratio {cfg.noise:g}: {100 * noise:.2f} % of {len(samples):,} {what}")

    per_epoch = steps_an_epoch(cfg, len(samples))
    total = per_epoch * cfg.epochs
    folder.start(per_epoch * first + start, total, len(samples), data=samples.fingerprint, noise=noise)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    ddp.train()
    loader = training_batches(samples, cfg, process, range(first, cfg.epochs), start)
    for epoch in range(first, cfg.epochs):
        broken, label = list(samples.broken), f"{folder.path.name} {epoch + 1}/{cfg.epochs}"
        bar = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for step, (weight, *batch, _) in enumerate(data.collect_broken(bar, broken), per_epoch * epoch + start):
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # the same dropout after a resume
            images = batch[0].to(process.device, non_blocking=True, memory_format=torch.channels_last)
            batch[0] = samples.normalise(images)
            lr, done = cosine_lr(cfg.lr, cfg.warmup, total, step), step + 1
            found = train_step(ddp, batch, optimizer, scaler, lr, cfg, process, precision, weight)
            if done % cfg.log_every == 0 or done == total:
                found |= run.over_ranks({"loss": found["loss"] * weight})
                folder.log(done, epoch=epoch, lr=lr, **found)
            if folder.due(done):
                folder.save(done, epoch=epoch, batch=done - per_epoch * epoch)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        start = 0
    folder.save(total, epoch=cfg.epochs, batch=0)
    folder.close(then=f"python -m nmtune.train nmtune --encoder {cfg.out} --data FOLDER")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRETRAIN_PRESETS)))
