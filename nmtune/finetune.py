"""Tune the encoder itself: `python -m nmtune.finetune PRESET [--overrides]`. Journal version, arXiv 2403.06869.

Authors' code: Hhhhhhao/Noisy-Model-Learning@f249dce, `U:src/models/nml_finetune.py`. Its contribution here: the two
spectral regularisers act on the encoder's own features, of one view, without MLP and without L_MSE (`finetune_loss`).
All weights are tuned, or rank-8 adapters of the blocks' MLPs (LoRA, by peft) and the classifier.
"""

import dataclasses
import math
from pathlib import Path

import torch
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from nmtune.analysis import accuracy, balanced_accuracy, project_logits
from nmtune.config import FINETUNE_PRESETS, FinetuneConfig, check_finetune
from nmtune.datasets import open_labelled, open_test
from nmtune.features import Views, collate, encode_set
from nmtune.model import finetune_loss, load_encoder, make_classifier
from nmtune.train import cosine_lr, data_sets, make_optimizer, plan, planned_encoder, planned_samples, split_encoder
from shared import checkpoints, cli, data, run

LORA_TARGETS = {"timm": r".*\.mlp\.fc\d", "open_clip": r".*\.mlp\.(c_fc|c_proj)"}  # U:src/models/nml_finetune.py:68-81


class ImageClassifier(nn.Module):
    """Encoder and linear classifier: images (B, 3, H, W) -> (features (B, D), logits (B, C)), both fp32."""

    def __init__(self, image_encoder: nn.Module, dim: int, num_classes: int):
        super().__init__()
        self.image_encoder = image_encoder
        self.classification_head = make_classifier(dim, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.image_encoder(images).float()
        with torch.autocast(images.device.type, enabled=False):
            return features, self.classification_head(features)


def add_lora(model: ImageClassifier, source: str) -> nn.Module:
    """Freeze all but rank-8 adapters of the blocks' MLPs and the classifier."""
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs peft: pip install 'paper-clips[nmtune]'") from error
    config = peft.LoraConfig(r=8, target_modules=LORA_TARGETS[source], modules_to_save=["classification_head"])
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise ValueError(f"this {source} encoder has no MLP blocks for LoRA ({str(error)[:80]} ...)") from error


@torch.no_grad()
def test_metrics(
    model: nn.Module, tests: dict[str, str], classnames: list[str], view, process, cfg
) -> dict[str, float]:
    """{"NAME/top1", "NAME/balanced"} of every test set, in per cent."""
    model.eval()
    results = {}
    for name, path in tests.items():
        images, groups = open_test(path, classnames)
        logits, labels = encode_set(
            lambda x: model(x)[1], images, view, process, precision=cfg.precision, workers=cfg.workers, label=name
        )
        logits = logits[0] if groups is None else project_logits(logits[0], groups)
        results[f"{name}/top1"] = 100 * accuracy(logits, labels)
        results[f"{name}/balanced"] = 100 * balanced_accuracy(logits, labels)
    return results


def dry_run(cfg: FinetuneConfig) -> None:
    """Print what a run would be: parameters, steps, learning rates, memory of the step."""
    source, name = planned_encoder(cfg, ("open_clip", "ViT-B-16") if cfg.lora else ("timm", "resnet50"))
    encoder, dim, _, view = load_encoder(source, name)
    samples, classes, remark = planned_samples(cfg)
    model = ImageClassifier(encoder.requires_grad_(True), dim, classes)
    model = add_lora(model, source) if cfg.lora else model
    tuned, whole = (sum(p.numel() for p in model.parameters() if p.requires_grad or all_) for all_ in (False, True))
    print(f"tuned              {'LoRA, rank 8' if cfg.lora else 'all weights'}; cov {cfg.w_cov:g}, svd {cfg.w_svd:g}")
    print(f"parameters         {tuned:,} tuned of {whole:,} of {source}:{name}, D = {dim:,}")
    plan(cfg, samples, classes, remark, cfg.batch_size)
    images = view(Image.new("RGB", (64, 64)))[None].repeat(2, 1, 1, 1)
    activations = cli.activation_bytes(lambda: model(images)) / 2 * cfg.batch_size
    print(f"memory estimate    {(4 * whole + 12 * tuned + activations) / 2**30:.1f} GiB in fp32")


def main(cfg: FinetuneConfig) -> Path | None:
    """Tune to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg)
    check_finetune(cfg, process.world_size)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)
    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if state["epoch"] >= cfg.epochs:
        print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder

    source, name, checkpoint = split_encoder(cfg.encoder, cfg.checkpoint)
    training, tests = data_sets(cfg)
    images = open_labelled(training)
    images.strict = cfg.strict
    for test in tests.values():
        open_test(test, images.classnames)
    if state.get("data", images.fingerprint) != images.fingerprint:
        raise ValueError(f"{folder} was trained on other data than there is now: choose another --out")
    encoder, dim, train_view, eval_view = load_encoder(source, name, checkpoint)
    torch.manual_seed(cfg.seed)
    model = ImageClassifier(encoder.requires_grad_(True), dim, images.num_classes)
    model = (add_lora(model, source) if cfg.lora else model).to(process.device, memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    print(f"{sum(p.numel() for p in trained):,} of {sum(p.numel() for p in model.parameters()):,} parameters are tuned")
    optimizer = make_optimizer(trained, cfg.lr, cfg.weight_decay)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])

    steps = math.ceil(len(images) / cfg.batch_size)
    total, saved = steps * cfg.epochs, steps * state["epoch"] + state["batch"]
    log = run.RunLog(folder, cfg, process, step=saved)
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(epoch: int, batch: int) -> None:
        parts = {"state_dict": model, "optimizer": optimizer, "scaler": scaler}
        values = {"epoch": epoch, "batch": batch, "seconds": clock.read(), "commit": commit}
        about = {"data": images.fingerprint, "classnames": images.classnames, "config": dataclasses.asdict(cfg)}
        states = {name: part.state_dict() for name, part in parts.items()}
        checkpoints.save_checkpoint(folder / "checkpoint.pt", states | values | about)

    for epoch in range(state["epoch"], cfg.epochs):
        start = state["batch"] if epoch == state["epoch"] else 0
        broken: list[data.Broken] = []
        order = data.batches(len(images), cfg.batch_size, (cfg.seed, epoch), start=start)
        views = Views(images, train_view, cfg.seed, epoch)
        loader = DataLoader(views, batch_sampler=order, num_workers=cfg.workers, collate_fn=collate)
        bar = run.progress(loader, len(order), f"{folder.name} {epoch + 1}/{cfg.epochs}", cfg.batch_size, process)
        model.train()
        for i, (batch, labels, _) in enumerate(data.watch(bar, broken), start):
            step = steps * epoch + i
            lr = optimizer.param_groups[0]["lr"] = cosine_lr(cfg.lr, cfg.warmup, total, step)
            torch.manual_seed(data.stable_hash(cfg.seed, step))  # for dropout: a resumed run agrees
            with run.autocast(precision, process.device):
                feats, logits = model(batch[0].to(process.device, memory_format=torch.channels_last))
            loss, parts = finetune_loss(logits, labels.to(process.device), feats, (cfg.w_cov, cfg.w_svd), cfg.svd_k)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if (step + 1) % cfg.log_every == 0 or step + 1 == total:
                log.write(step + 1, epoch=epoch, seconds=clock.read(), lr=lr, loss=loss, **parts)
                run.check_loss(loss, step)
            if step + 1 - saved >= cfg.save_every and step + 1 < total:
                save(epoch + (i + 1) // steps, (i + 1) % steps)
                saved = step + 1
        data.report_broken(broken, process, f"epoch {epoch + 1}")
    results = test_metrics(model, tests, images.classnames, eval_view, process, cfg)
    log.write(total, epoch=cfg.epochs - 1, seconds=clock.read(), **results)
    save(cfg.epochs, 0)
    log.close()
    shown = ", ".join(f"{name} {value:.2f} %" for name, value in results.items() if name.endswith("top1"))
    print(f"{folder}: {shown or 'no test set was named'}")
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(FINETUNE_PRESETS)))
