"""Train a small ViT that replaces DINOv2: `python -m lexvla.backbone`. Ours; the study does not use it.

Like DINOv2 it is trained on images only, and frozen afterwards. Two images of the same object, such as two drawings of
one emoji, are positives; images of the batch's other objects are negatives (InfoNCE of [CLS], and of the mean patch).

A finished file is not changed; it is an error if its settings or data differ. During training, a folder beside it
(backbone.work) holds the checkpoint of the last epoch, from which an interrupted run resumes.
"""

import dataclasses
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.utils.data import Dataset

from lexvla.towers import small_vit, train_transform
from lexvla.train import cosine_lr, param_groups
from shared import checkpoints, cli, data, run, tars


@dataclasses.dataclass
class Config:
    """Train a small ViT on images alone, and write its weights to a file."""

    data: str = "data/emoji/train"
    """Shards of images; by default the emoji corpus, whose .json names the emoji that is drawn."""
    same: str = "hexcode"
    """Field of .json that is equal for images of the same object. Two crops of an image without this field are
    positives of each other."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    out: str = "data/lexvla/backbone.pt"
    """File to write; a finished one is not changed. With a checkpoint in the folder beside it (.work), the run
    resumes."""
    image_size: int = 40
    """Image side in pixels; a patch has 8."""
    crop_scale: float = 0.5
    """Smallest share of the image's area in a crop."""
    epochs: int = 24
    """Passes over the objects; a pass takes two images of each."""
    batch_size: int = 64
    """Objects per step."""
    temperature: float = 0.1
    """Temperature of the contrastive loss."""
    lr: float = 1e-3
    """Peak learning rate, after 50 steps of linear warm-up; then half a cosine to 0."""
    weight_decay: float = 0.05
    """AdamW's decay of matrices."""
    workers: int = 0
    """Loader processes."""
    seed: int = 0
    """Seed of weights, pairs and crops."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """auto, bf16, fp16 or fp32."""


def drawings(spec: str, keys: list[str], same: str = "hexcode") -> list[list[int]]:
    """Positions in `keys`, grouped by object: samples with equal values of the field `same` in their .json.

    A sample without this field is a group of its own.
    """
    object_of = {key: about.get(same) for key, about in tars.descriptions(data.local_shards(spec))}
    groups: dict[tuple, list[int]] = {}
    for row, key in enumerate(keys):
        name = object_of.get(key)
        groups.setdefault(("one", key) if name is None else ("same", str(name)), []).append(row)
    return list(groups.values())


class Views(Dataset):
    """Item i of a run: (crops (2, 3, S, S) of two images of object i, or of its only one; broken samples skipped).

    groups: `drawings`. Item i depends only on seed, epoch and i. If `transform` ends in normalising, the crops are
    uint8, and `normalise` normalises a batch of them.
    """

    def __init__(self, pairs, groups: list[list[int]], transform, seed: int):
        self.pairs, self.groups, self.seed = pairs, groups, seed
        self.transform, self.normalise = data.in_two(transform)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, i: int) -> tuple[Tensor, list[data.Broken]]:
        broken: list[data.Broken] = []
        data.seed_views(self.seed, i, len(self))
        rows = self.groups[i % len(self)]
        chosen = [rows[j] for j in torch.randperm(len(rows))[:2]]
        images = [data.read_or_next(self.pairs, row, broken).image for row in (chosen * 2)[:2]]
        return torch.stack([self.transform(image) for image in images]), broken


def collate(items: list) -> tuple[Tensor, list[data.Broken]]:
    """Views (B, 2, 3, S, S) and broken samples."""
    views, broken = zip(*items, strict=True)
    return torch.stack(views), [b for each in broken for b in each]


def drawing_loss(tokens: Tensor, temperature: float) -> Tensor:
    """InfoNCE of [CLS], and of the mean patch, between two images of each object; tokens (2, B, n, D)."""
    loss = tokens.new_zeros(())
    for features in (tokens[:, :, 0], tokens[:, :, 1:].mean(2)):
        a, b = F.normalize(features.float(), dim=-1)
        logits = a @ b.T / temperature
        labels = torch.arange(len(logits), device=logits.device)
        loss = loss + (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    return loss


def train(cfg: Config, process: run.Process, pairs: data.Shards, work: Path) -> nn.Module:
    """The trained ViT; `work` holds the checkpoint of the last epoch."""
    state = checkpoints.resume(work, cfg)
    data.check_pairs(pairs, cfg, state or {}, process)
    groups = drawings(cfg.data, list(pairs.keys), cfg.same)
    run.say(f"{cfg.data}: {len(pairs):,} images of {len(groups):,} objects, by their {cfg.same}", process)
    per_epoch = len(groups) // cfg.batch_size
    if not per_epoch:
        raise ValueError(f"{cfg.data} shows {len(groups)} objects, less than one batch of {cfg.batch_size}")
    vit = small_vit(cfg.image_size).to(process.device).train()
    optimizer = torch.optim.AdamW(param_groups(vit, cfg.weight_decay), lr=cfg.lr, fused=True)
    first = 0
    if state is not None:
        vit.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["epoch"]
        run.say(f"going on after epoch {first} of {cfg.epochs}", process)
    transform = train_transform(cfg.out, cfg.image_size, cfg.crop_scale)
    precision = run.resolve_precision(cfg.precision, process.device)
    dataset = Views(pairs, groups, transform, cfg.seed)
    loader = data.training_batches(dataset, collate, cfg, process, range(first, cfg.epochs))
    for epoch in range(first, cfg.epochs):
        losses, broken = [], list(pairs.broken)
        label = f"backbone epoch {epoch + 1}/{cfg.epochs}"
        bar = run.progress(data.watch(loader, broken), per_epoch, label, 2 * cfg.batch_size)
        for step, (views, _) in enumerate(bar, epoch * per_epoch):
            for group in optimizer.param_groups:
                group["lr"] = cosine_lr(step, cfg.lr, per_epoch * cfg.epochs, 50)
            pixels = dataset.normalise(views.to(process.device)).transpose(0, 1)  # (2, B, 3, S, S)
            with run.autocast(precision, process.device):
                tokens = vit.forward_features(pixels.flatten(0, 1)).unflatten(0, (2, -1))
            loss = drawing_loss(tokens, cfg.temperature)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        mean = sum(losses) / per_epoch
        run.check_loss(torch.tensor(mean), (epoch + 1) * per_epoch)
        run.say(f"backbone epoch {epoch + 1} of {cfg.epochs}: loss {mean:.3f}", process)
        data.report_broken(broken, process, f"backbone epoch {epoch + 1}")
        state = {"model": vit.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch + 1}
        state |= {"data": pairs.fingerprint, "config": dataclasses.asdict(cfg)}
        checkpoints.save_checkpoint(work / "checkpoint.pt", state)
    return vit


def check_made(out: Path, cfg: Config) -> None:
    """ValueError if the finished file `out` was made with other settings than `cfg`, or from other data.

    The output path, device and number of workers may differ. An older file has no fingerprint of its data, so its
    --data and --dataset-size have to be the same.
    """
    kept = checkpoints.load_checkpoint(out)
    if not isinstance(kept, dict) or not isinstance(kept.get("config"), dict) or "weights" not in kept:
        raise ValueError(f"{out} is no file of this script: choose another --out")
    free = {"out", "device", "workers"} | ({"data", "dataset_size"} if "data" in kept else set())
    now = {name: value for name, value in dataclasses.asdict(cfg).items() if name not in free}
    then = {field.name: field.default for field in dataclasses.fields(cfg)}  # the file may lack newer fields
    if what := checkpoints.changes(then | kept["config"], now):
        raise ValueError(f"{out} was made with other settings: {what}; choose another --out, or remove it")
    if "data" in kept and kept["data"] != data.open_pairs(cfg.data, cfg.dataset_size).fingerprint:
        raise ValueError(
            f"{out} was made from other data than {cfg.data} holds now: choose another --out, or remove it"
        )


def main(cfg: Config) -> None:
    out = Path(cfg.out)
    if out.suffix != ".pt":
        raise ValueError(f"--out {out} must end in .pt: lexvla.train knows files of this script by this ending")
    if out.exists():
        check_made(out, cfg)
        return print(f"{out} is there already")
    cli.check_counts(cfg, "batch_size", "epochs", "dataset_size", "image_size")
    cli.check_rates(cfg, "lr", "weight_decay", "temperature")
    cli.check_positive(cfg, "temperature")
    if cfg.image_size % 8:
        raise ValueError(f"--image-size {cfg.image_size} cannot be cut into patches of 8 pixels")
    process, work = run.setup(cfg.seed, cfg.device), out.with_suffix(".work")
    if process.world_size > 1:
        raise ValueError("the backbone is trained by one process: start it without torchrun")
    with run.lock(work, process):
        pairs = data.open_pairs(cfg.data, cfg.dataset_size)
        vit = train(cfg, process, pairs, work)
        made = {"config": dataclasses.asdict(cfg), "data": pairs.fingerprint}
        checkpoints.save_checkpoint(out, {"weights": vit.cpu().state_dict()} | made)
        shutil.rmtree(work)
    print(f"{out} written")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
