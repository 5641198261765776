"""Tune the encoder itself: `python -m nmtune.finetune PRESET [--overrides]`. Journal version, arXiv 2403.06869.

Authors' code: Hhhhhhao/Noisy-Model-Learning@f249dce, `U:src/models/nml_finetune.py`. The journal's contribution: the
two spectral regularisers act on the encoder's own features of one view, without MLP and L_MSE (`finetune_loss`).
Tunes all weights, or the classifier and rank-8 adapters of the blocks' MLPs (LoRA, by peft).
"""

import math
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from nmtune.config import FINETUNE_PRESETS, FinetuneConfig, check_finetune, check_numbers
from nmtune.datasets import open_labelled, open_test
from nmtune.encoders import load_encoder
from nmtune.eval import test_metrics
from nmtune.features import Views, data_sets, encode_set, load, split_encoder, training_order
from nmtune.model import finetune_loss, make_classifier
from nmtune.train import learning_rate, make_optimizer, plan_rows, planned_encoder, planned_samples
from shared import cli, data, run
from shared.clip import set_grad_checkpointing
from shared.errors import UserError

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
        raise UserError("LoRA needs peft; in the project's folder: pip install '.[nmtune]'") from error
    config = peft.LoraConfig(r=8, target_modules=LORA_TARGETS[source], modules_to_save=["classification_head"])
    try:
        return peft.get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"this {source} encoder has no MLP blocks for LoRA ({str(error)[:80]} ...)") from error


def create_model(cfg: FinetuneConfig, source: str, encoder: nn.Module, dim: int, num_classes: int) -> nn.Module:
    """Encoder and classifier; all weights are trainable, or with `cfg.lora` only adapters and the classifier."""
    model = ImageClassifier(encoder.requires_grad_(True), dim, num_classes)
    return add_lora(model, source) if cfg.lora else model


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def train_step(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    lr: float,
    cfg: FinetuneConfig,
) -> dict[str, Tensor]:
    """One optimizer step on images (B, 3, S, S) and labels (B,) -> {"loss", "ce", "cov", "svd"}."""
    optimizer.param_groups[0]["lr"] = lr
    with run.autocast(cfg.precision, images.device):
        feats, logits = model(images)
    loss, terms = finetune_loss(logits, labels, feats, (cfg.w_cov, cfg.w_svd), cfg.svd_k)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    return {"loss": loss} | terms


# ---------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: FinetuneConfig) -> None:
    """Print the plan of a run: parameters, steps, learning rates, memory of the step."""
    check_numbers(cfg, 1)
    source, name = planned_encoder(cfg, ("open_clip", "ViT-B-16") if cfg.lora else ("timm", "resnet50"))
    encoder, dim, _, view = load_encoder(source, name)
    samples, classes, remark = planned_samples(cfg)
    model = create_model(cfg, source, encoder, dim, classes)
    tuned, whole = sum(p.numel() for p in trained_parameters(model)), sum(p.numel() for p in model.parameters())
    images = view(Image.new("RGB", (64, 64)))[None].repeat(2, 1, 1, 1)
    checkpointed = model if cfg.grad_checkpointing else None
    activations = cli.activation_bytes(lambda: model(images), checkpointed) / 2 * cfg.batch_size
    cli.show_plan(
        [
            ("tuned", f"{'LoRA, rank 8' if cfg.lora else 'all weights'}; cov {cfg.w_cov:g}, svd {cfg.w_svd:g}"),
            ("parameters", f"{tuned:,} tuned of {whole:,} of {source}:{name}, D = {dim:,}"),
            *plan_rows(cfg, samples, classes, remark, 1),
            ("memory estimate", f"{(4 * whole + 12 * tuned + activations) / 2**30:.1f} GiB in fp32"),
        ]
    )


def main(cfg: FinetuneConfig) -> Path | None:
    """Tune to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg)
    check_finetune(cfg, process.world_size)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    training, tests = data_sets(cfg)
    images = open_labelled(training)
    images.strict = cfg.strict
    for test in tests.values():  # errors in test sets are reported before training
        open_test(test, images.classnames)
    folder.check_same("data", images.fingerprint, "on other data than there are now")

    # Model and optimizer; from the checkpoint if there is one
    source, name, checkpoint = split_encoder(cfg.encoder, cfg.checkpoint)
    encoder, dim, train_view, eval_view = load_encoder(source, name, checkpoint)
    torch.manual_seed(cfg.seed)
    channels_last = {"memory_format": torch.channels_last}
    model = create_model(cfg, source, encoder, dim, images.num_classes).to(process.device, **channels_last)
    set_grad_checkpointing(model, cfg.grad_checkpointing)
    tuned, of_all = (sum(p.numel() for p in each) for each in (trained_parameters(model), model.parameters()))
    print(f"{tuned:,} of {of_all:,} parameters are tuned")
    optimizer = make_optimizer(trained_parameters(model), cfg.lr, cfg.weight_decay)
    scaler = run.grad_scaler(cfg, process)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)

    steps, epochs = math.ceil(len(images) / cfg.batch_size), range(folder.state["epoch"], cfg.epochs)
    total, start = steps * cfg.epochs, steps * folder.state["epoch"] + folder.state["batch"]
    folder.start(start, total, len(images), data=images.fingerprint, classnames=images.classnames)
    pixels, normalise = data.split_normalisation(train_view)
    order, broken = training_order(len(images), cfg, process, epochs, folder.state["batch"]), []
    loader = load(Views(images, pixels, cfg.seed), order, cfg.workers, process)
    batches = run.progress(loader, total - start, folder.path.name, cfg.batch_size, process)
    model.train()
    for step, (views, labels, skipped) in enumerate(batches, start):
        broken += skipped
        lr, done = learning_rate(cfg, total, step), step + 1
        torch.manual_seed(run.stable_hash(cfg.seed, step))  # so that dropout is the same after a resume
        x = normalise(views[0].to(process.device, non_blocking=True, **channels_last))
        found = train_step(model, x, labels.to(process.device, non_blocking=True), optimizer, scaler, lr, cfg)
        if done % cfg.log_every == 0 or done == total:
            folder.log(done, epoch=step // steps, lr=lr, **found)
        if folder.due(done) and done < total:
            folder.save(done, epoch=done // steps, batch=done % steps)
        if done % steps == 0:
            data.report_broken(broken, process, f"epoch {done // steps}")
    folder.save(total, epoch=cfg.epochs - 1, batch=steps)  # a resumed run then only tests
    model.eval()

    def test_set(name: str) -> tuple:
        test, groups = open_test(tests[name], images.classnames)
        options = {"process": process, "precision": cfg.precision, "workers": cfg.workers, "label": name}
        logits, labels = encode_set(lambda x: model(x)[1], test, eval_view, **options)
        return logits[0], labels, groups

    results = test_metrics(tests, test_set)
    folder.log(total, epoch=cfg.epochs - 1, **results)
    folder.save(total, epoch=cfg.epochs, batch=0)
    folder.close(then="")
    shown = [f"{name} {value:.2f} %" for name, value in results.items() if name.endswith("top1")]
    print(f"{folder.path}: {', '.join(shown) or 'no test set was named'}")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(FINETUNE_PRESETS)))
