"""A small CLIP on photographs, for papers about data: a locked EfficientNet-Lite0, whose features are computed once, a
projection, and a text tower. `python -m studies.harness.locked_clip RUN --export DIR` exports a run for open_clip.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from shared import checkpoints, cli, data, export, run
from shared.clip import quiet_open_clip, trimmed, without_padding
from shared.errors import UserError
from shared.pretrained import LITE0_MEAN, LITE0_STD, efficientnet_lite0
from shared.run import stable_hash
from shared.settings import Count, check_limits
from studies.harness import photos


@dataclasses.dataclass
class Settings:
    """Settings of a CLIP trained on human-written captions, with any towers."""

    out: str = "runs/photos/locked"
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt."""
    data: str = photos.SINGLE
    """Shards of photographs, with one sample per caption."""
    total: Count = 30_000
    """Captions per epoch; if the data have fewer, they are repeated."""
    epochs: Count = 4
    """Passes over `total` captions."""
    batch_size: Count = 256
    """Captions per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    warmup: int = 50
    """Steps of linear warm-up, before half a cosine to 0."""
    weight_decay: float = 3.0
    """AdamW's decay of matrices. The defaults of epochs, batch, rate and decay were chosen by recall of Flickr8k's
    development photographs, on another seed."""
    seed: int = 0
    """Seed of initial weights and order."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """auto: bf16 if the hardware supports it."""
    save_every: int = 1000
    """Fewest steps between checkpoints, which are written when an epoch ends; there is one at the end, too."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""


class Towers(NamedTuple):
    """Functions of a run's settings, the fields of its config."""

    create: Callable[[dict], nn.Module]  # a model of features (B, 1280) and of inputs of its text tower
    texts: Callable[[dict], Callable[[list[str]], Tensor]]  # the function from captions to these inputs


def create_model(settings: dict) -> nn.Module:
    """A randomly initialised open_clip model that takes EfficientNet-Lite0's features (B, 1280) as images.

    The settings are `model`, the name of its open_clip config, and `max_length`, the most tokens of a caption.
    """
    length = settings["max_length"]
    with quiet_open_clip():
        model = open_clip.create_model(settings["model"], load_weights=False, force_context_length=length)
    model.visual.trunk = nn.Identity()
    return without_padding(model)


def tokenizer(settings: dict) -> Callable[[list[str]], Tensor]:
    return open_clip.get_tokenizer(settings["model"], context_length=settings["max_length"])


OPEN_CLIP = Towers(create_model, tokenizer)


def learning_rate(step: int, cfg: Settings) -> float:
    total = cfg.epochs * (cfg.total // cfg.batch_size)
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(total - cfg.warmup, 1)))


def train(cfg: Settings, rows: Sequence[int] | None = None, towers: Towers = OPEN_CLIP) -> Path:
    """Train on all or some rows of the data, from the last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    check_limits(cfg)
    if cfg.total < cfg.batch_size:
        raise UserError(f"--total {cfg.total} is less than one batch of {cfg.batch_size}")
    precision, steps = run.resolve_precision(cfg.precision, process.device), cfg.total // cfg.batch_size
    settings = dataclasses.asdict(cfg)
    model = towers.create(settings).to(process.device)
    matrices, others = ([p for p in model.parameters() if (p.ndim >= 2) == wide] for wide in (True, False))
    groups = [{"params": matrices, "weight_decay": cfg.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    folder = run.RunFolder(cfg, process, epoch=0)
    folder.restore(state_dict=model, optimizer=optimizer)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first = folder.state["epoch"]

    pairs = data.open_pairs(cfg.data)
    folder.check_same("data", pairs.fingerprint, f"on other data than {cfg.data} holds now")
    rows = np.arange(len(pairs)) if rows is None else np.asarray(rows)
    features, captions = photos.features_of(list(map(Path, pairs.paths))), [pairs.caption(i) for i in range(len(pairs))]
    texts = towers.texts(settings)(captions)
    loss_of = open_clip.ClipLoss()
    folder.start(first * steps, cfg.epochs * steps, len(rows), data=pairs.fingerprint)
    for epoch in range(first, cfg.epochs):
        order = np.resize(np.random.default_rng((cfg.seed, epoch)).permutation(rows), cfg.total)
        for step, chosen in enumerate(order[: steps * cfg.batch_size].reshape(steps, -1), epoch * steps):
            torch.manual_seed(stable_hash(cfg.seed, step))  # for dropout, so that resuming is exact
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            model.train()
            with run.autocast(precision, process.device):
                inputs = features[chosen].to(process.device), trimmed(texts[chosen], model, process.device)
                image, text, scale = model(*inputs)[:3]
            loss = loss_of(image.float(), text.float(), scale.float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            if (step + 1) % cfg.log_every == 0 or step + 1 == cfg.epochs * steps:
                folder.log(step + 1, epoch=epoch, loss=loss.detach(), logit_scale=scale.detach())
        if folder.due((epoch + 1) * steps) or epoch + 1 == cfg.epochs:
            folder.save((epoch + 1) * steps, epoch=epoch + 1)
    folder.close(then="")
    return folder.path


def load(folder: str | Path, towers: Towers = OPEN_CLIP) -> tuple[nn.Module, Callable[[list[str]], Tensor]]:
    """A run's model in eval mode, and the function from captions to inputs of its text tower."""
    state = checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt")
    model = towers.create(state["config"])
    try:
        model.load_state_dict(state["state_dict"])
    except RuntimeError as error:
        raise UserError(f"{folder} holds other towers than those of this study") from error
    return model.eval(), towers.texts(state["config"])


def export_run(folder: str | Path, out: str | Path) -> dict[str, float]:
    """Write a run of `create_model`, with its locked trunk, as a folder that open_clip loads (see shared/export.py).

    Returns the largest differences between the run's model and the export.
    """
    settings = checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt").get("config", {})
    if not {"model", "max_length"} <= settings.keys():
        raise UserError(f"{folder} cannot be exported: it is no run of this study with open_clip's text tower")
    model, _ = load(folder)
    model.visual.trunk = efficientnet_lite0()
    config = export.named_config(settings["model"], photos.SIDE)
    config["text_cfg"]["context_length"] = settings["max_length"]

    def transform(image: Image.Image) -> Tensor:
        return photos.view(image).float().sub_(127).div_(128)

    statistics = {"mean": LITE0_MEAN, "std": LITE0_STD}
    return export.write(out, model, config, model.state_dict(), transform, **statistics)


@torch.no_grad()
def encode(
    folder: str | Path, features: Tensor, captions: Sequence[str], towers: Towers = OPEN_CLIP
) -> tuple[Tensor, Tensor]:
    """A run's embeddings (N, E) of images, from EfficientNet-Lite0's features (N, 1280), and (M, E) of captions."""
    model, texts = load(folder, towers)
    inputs = texts(list(captions)).split(256)
    return model.encode_image(features), torch.cat([model.encode_text(batch) for batch in inputs])


def main(run_folder: tyro.conf.Positional[str], export: str) -> None:
    """Export a run, with its locked trunk, as a folder that open_clip loads as `local-dir:DIR`.

    Args:
        run_folder: Run folder of concept frequency's study on photographs.
        export: Folder to write.
    """
    export_run(run_folder, export)


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main))
