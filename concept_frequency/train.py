"""Our experiment with assigned frequencies: train a small CLIP on a corpus with chosen concept frequencies.

    python -m concept_frequency.train PRESET [--overrides]

The authors train nothing: the paper (arXiv 2404.04125) correlates accuracies of published models with counts in their
corpora (count.py, evaluate.py, curve.py). Here frequency is the treatment:
  1. assign frequencies to concepts at random                            `zipf_counts`, `log_uniform_counts`
  2. draw pairs with these frequencies                                   `sample_pairs`
  3. train a CLIP on them                                                `train_step`
  4. measure accuracy on images that no arm has seen                     `zero_shot`
The arms differ only in `law`, `exponent` and `assignment`. 1, 2 and 4 are in assigned.py, settings in config.py. The
loss is `shared.loss.clip_loss`; `shared.corpus.Corpus` shuffles the pairs of an epoch and skips those before a resume.
"""

import math
from pathlib import Path

import open_clip
import torch
from torch import Tensor, nn

from concept_frequency.assigned import STATISTICS, frequency_row, open_arm, read_test_set, zero_shot
from concept_frequency.config import PRESETS, Config
from shared import checkpoints, cli, clip, run
from shared.corpus import Corpus
from shared.loss import clip_loss
from shared.views import SmallView

# ------------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    cfg: Config,
) -> dict[str, Tensor]:
    """One step on this rank's views (B, 3, S, S) and tokens (B, L); returns values to log."""
    with run.autocast(cfg.precision, images.device):
        image_features, text_features, scale, *_ = model(images, tokens)
    loss = clip_loss(image_features, text_features, scale)

    optimizer.zero_grad()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradient_norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    clamp_logit_scale(run.bare(model))
    return {"loss": loss, "logit_scale": scale, "gradient_norm": gradient_norm}


@torch.no_grad()
def clamp_logit_scale(model: nn.Module) -> None:
    """Keep the scale of the logits between 1 and 100."""
    model.logit_scale.clamp_(0, math.log(100))


# ------------------------------------------------------------------------------ learning rates and parameter groups


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then a half-cosine decay to 0."""
    total = cfg.epochs * cfg.steps_per_epoch
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(total - cfg.warmup, 1)))


def set_learning_rate(optimizer: torch.optim.Optimizer, cfg: Config, step: int) -> float:
    """Set the learning rate of all `parameter_groups`; returns it, to log."""
    rate = learning_rate(cfg, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: gains, biases and the temperature without weight decay, matrices with it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if (p.ndim >= 2) == decay], "weight_decay": weight_decay * decay}
        for decay in (False, True)
    ]


# ----------------------------------------------------------------------------------------------------------- the model


def create_model(name: str, image_size: int | None = None) -> nn.Module:
    """A randomly initialised open_clip model whose text tower accepts captions without padding."""
    clip.open_clip_config(name)
    override = {} if image_size is None else {"force_image_size": image_size}
    with clip.quiet_open_clip():
        model = clip.without_padding(open_clip.create_model(name, load_weights=False, **override))
    clip.average_at_start(model)
    return model


def load_run(folder: str | Path, device: torch.device | str) -> tuple[Config, nn.Module]:
    """(settings, model in eval mode) of a run folder. UserError if another script wrote it."""
    state = checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt")
    cfg = checkpoints.config_in(state, Config, folder)
    model = create_model(cfg.model, cfg.image_size).to(device)
    model.load_state_dict(state["state_dict"])
    return cfg, model.eval()


# ---------------------------------------------------------------------------------------------------------- the script


def main(cfg: Config) -> Path | None:
    """Train an arm, resuming from the last checkpoint in its run folder. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)
    per_epoch, total = cfg.steps_per_epoch, cfg.steps_per_epoch * cfg.epochs

    # Model and optimizer, with the state of the last checkpoint if there is one
    model = create_model(cfg.model, cfg.image_size)
    if cfg.dry_run:
        inputs, rows = clip.blank_inputs(model), [frequency_row(cfg), cli.first_loss_row(cfg.batch_size)]
        return cli.show_run(cfg, process, model, inputs, total, lambda step: {"lr": learning_rate(cfg, step)}, rows)
    clip.set_grad_checkpointing(model.to(process.device), cfg.grad_checkpointing)
    groups = parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = run.grad_scaler(cfg, process)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]

    # The pairs of the arm, and its test set
    arm = open_arm(cfg)
    tokenizer = clip.RememberingTokenizer(open_clip.get_tokenizer(cfg.model, context_length=model.context_length))
    corpus = Corpus(cfg, process, lambda pair: tokenizer(pair.caption)[0], arm, cut_padding=clip.cuts(model))
    view = SmallView(clip.image_side(model), *STATISTICS)
    test = read_test_set(cfg.eval_set, arm.names)
    folder.start(per_epoch * first + start, total, len(corpus), data=corpus.fingerprint)
    if process.main:
        arm.write(folder.path)

    network = run.distributed(model, process, cfg.accumulate)
    network.train()
    for epoch in range(first, cfg.epochs):
        for i, (_, images, tokens) in enumerate(corpus.epoch(epoch, view, start), start):
            step = per_epoch * epoch + i
            run.seed_step(cfg, step, process)
            rate = set_learning_rate(optimizer, cfg, step)
            values = train_step(network, images, tokens, optimizer, scaler, cfg)
            if step == 0 or (step + 1) % cfg.log_every == 0:
                folder.log(step + 1, epoch=epoch, lr=rate, **run.over_ranks(values))
            if folder.due(step + 1) and i + 1 < per_epoch:
                folder.save(step + 1, epoch=epoch, batch=i + 1)

        done = per_epoch * (epoch + 1)
        if folder.evaluates(epoch + 1, cfg.epochs):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch):
                accuracy = zero_shot(model, tokenizer, test, arm.names, 1, process.device, cfg.precision)
            folder.log(done, epoch=epoch, zero_shot_top1=overall(accuracy, test.labels))
        run.wait()
        corpus.report_broken(f"epoch {epoch + 1}")
        if folder.due(done) or epoch + 1 == cfg.epochs:
            folder.save(done, epoch=epoch + 1, batch=0)
        start = 0
    folder.close("")
    return folder.path


def overall(accuracy: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of all images, from the accuracy (K,) of each concept (NaN without images) and the labels (N,)."""
    return (accuracy.nan_to_num() * labels.bincount(minlength=len(accuracy))).sum().item() / len(labels)


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
