"""The controlled experiment: train a small CLIP on a corpus with chosen concept frequencies.

    python -m concept_frequency.train PRESET [--overrides]

The paper (arXiv 2404.04125; authors' code bethgelab/frequency_determines_performance@11ef009) correlates accuracies of
published models with counts in their corpora. Here frequency is the treatment:
  1. assign frequencies to concepts at random                            `zipf_counts`, `log_uniform_counts`
  2. draw pairs with these frequencies                                   `sample_pairs`
  3. train a CLIP on them                                                `train_step`
  4. measure accuracy on a drawing style that no arm has seen            `zero_shot`
The arms differ only in `law`, `exponent` and `assignment`. The experiment is ours; counts and curves are the paper's.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from concept_frequency.assigned import (
    NOISE,
    TestSet,
    frequencies,
    make_pairs,
    read_corpus,
    read_test_set,
    views,
    write_pairs,
)
from concept_frequency.config import PRESETS, Config, check, check_sizes
from shared import accumulate, checkpoints, cli, data, export, run
from shared.clip import image_side, quiet_open_clip, trimmed, without_padding
from shared.evalsets import EvalSet
from shared.zeroshot import build_classifier, label_ranks, per_class_accuracy

# ---------------------------------------------------------------------------------------------------------------- model


def create_model(name: str, image_size: int | None = None) -> nn.Module:
    """A randomly initialised open_clip model whose text tower accepts captions without padding."""
    export.open_clip_config(name)
    override = {} if image_size is None else {"force_image_size": image_size}
    with quiet_open_clip():
        return without_padding(open_clip.create_model(name, load_weights=False, **override))


def load_run(folder: str | Path, device: torch.device | str) -> tuple[Config, nn.Module]:
    """(settings, model in eval mode) of a run folder. UserError if another script wrote it."""
    state = checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt")
    cfg = checkpoints.config_in(state, Config, folder)
    model = create_model(cfg.model, cfg.image_size).to(device)
    model.load_state_dict(state["state_dict"])
    return cfg, model.eval()


# ------------------------------------------------------------------------------------------------------------- accuracy


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    tokenizer,
    test: TestSet,
    names: Sequence[str],
    num_views: int,
    device: torch.device,
    precision: str,
    batch_size: int = 256,
) -> Tensor:
    """Accuracy (K,) in percent of each concept among all K, prompt `{c}`, over `num_views` fixed views per image."""
    was_training = model.training
    model.eval()
    dtype = run.DTYPES[precision]
    classifier = build_classifier(model.encode_text, tokenizer, list(names), ["{c}"], batch_size, device, dtype)
    noise = torch.rand(num_views, NOISE, generator=torch.Generator().manual_seed(0))
    noise[0] = 0.5
    hits = []
    for view in noise:
        for rows in torch.arange(len(test.labels)).split(batch_size):
            x = views(test.images[rows].to(device), view.expand(len(rows), NOISE).to(device), image_side(model))
            with run.autocast(precision, device):
                features = F.normalize(model.encode_image(x).float(), dim=-1).cpu()
            hits.append(label_ranks(features, test.labels[rows], classifier) < 1)
    model.train(was_training)
    return per_class_accuracy(torch.cat(hits), test.labels.repeat(num_views), len(names))


# ------------------------------------------------------------------------------------------------------------- one step


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of this rank's unit features (B, D) against those of all ranks, in fp32."""
    image, text, scale = image_features.float(), text_features.float(), logit_scale.float()
    labels = run.own_columns(image)
    to_text, to_image = scale * image @ run.gather(text).T, scale * text @ run.gather(image).T
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then a half-cosine decay to 0."""
    total = cfg.epochs * cfg.steps_per_epoch()
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(total - cfg.warmup, 1)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's parameter groups: gains, biases and the temperature without weight decay, matrices with it."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if (p.ndim >= 2) == decay], "weight_decay": weight_decay * decay}
        for decay in (False, True)
    ]


def train_step(
    model: nn.Module,
    images: Tensor,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    step: int,
    cfg: Config,
    process: run.Process,
    precision: str,
) -> dict[str, Tensor]:
    """One step on this process's share of a batch: views (B, 3, S, S), tokens (B, L) on the CPU -> values to log."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, cfg)
    torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # dropout, if any, repeats after a resume
    inputs = images, trimmed(tokens, model, process.device)
    (image_features, text_features, scale, *_), backward = accumulate.forward(model, inputs, cfg, precision)
    loss = clip_loss(image_features, text_features, scale)
    optimizer.zero_grad()
    backward(scaler.scale(loss))
    scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
    scaler.step(optimizer)
    scaler.update()
    with torch.no_grad():
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        bare.logit_scale.clamp_(0, math.log(100))
    return {"loss": loss, "logit_scale": scale, "gradient_norm": norm}


# ----------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int) -> None:
    """Print the plan of a run: parameters, steps, learning rates, frequencies, memory of the training step."""
    model = create_model(cfg.model, cfg.image_size)
    parameters, size = sum(p.numel() for p in model.parameters()), image_side(model)
    per_epoch = cfg.steps_per_epoch()
    total = per_epoch * cfg.epochs
    concepts = cfg.num_concepts or 400
    if not cfg.num_concepts and cfg.eval_set and Path(cfg.eval_set).is_dir():
        concepts = len(EvalSet(cfg.eval_set, None).classnames)
    counts = np.sort(frequencies(cfg, concepts, None))[::-1]
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, model.context_length, dtype=torch.long)
    activations = cli.activation_bytes(lambda: model(images, tokens)) / 2 / 2**30
    activations *= cfg.batch_size / world_size / cfg.accumulate
    weights = 16 * parameters / 2**30
    cli.show_plan(
        [
            ("parameters", f"{parameters:,}"),
            ("samples", f"{cfg.total:,} pairs of {concepts:,} concepts, {cfg.epochs} times"),
            cli.disk_row(cfg.total, parameters),
            ("frequencies", f"{counts[0]:,} (most), {counts[len(counts) // 2]:,} (median), {counts[-1]:,} (least)"),
            cli.batch_row(cfg, world_size),
            cli.step_row(total, per_epoch),
            *cli.rate_rows(lambda step: f"{learning_rate(step, cfg):.3e}", cfg.warmup, total),
            (
                "memory estimate",
                f"{weights + activations:.1f} GiB a process in fp32: {weights:.1f} weights and AdamW;",
            ),
            ("", f"{activations:.1f} activations"),
        ]
    )


class ArmData:
    """The data of an arm, in memory: its pairs, their images and tokens, and its test set."""

    def __init__(self, cfg: Config, process: run.Process, tokenizer: Callable, size: int):
        self.cfg, self.process, self.size = cfg, process, size
        offered = EvalSet(cfg.eval_set, None).classnames
        self.corpus = read_corpus(cfg.data, offered, cfg.groups, cfg.num_concepts, cfg.strict)
        self.names = [concept.name for concept in self.corpus.concepts]
        self.counts, self.pairs = make_pairs(cfg, self.corpus)
        captions = "\n".join(self.pairs.caption).encode()
        self.fingerprint = data.fingerprint(self.corpus.images.numpy().tobytes(), captions)
        self.tokens, self.test = tokenizer(self.pairs.caption), read_test_set(cfg.eval_set, self.names)

    def write(self, folder: Path) -> None:
        """Report broken samples; write pairs.parquet (the input of the count) and frequencies.json."""
        if line := data.broken_report(self.corpus.broken, "left out"):
            print(line)
        folder.mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "pairs.parquet", self.corpus, self.pairs)
        frequencies = dict(zip(self.names, self.counts.tolist(), strict=True))
        checkpoints.write_json(folder / "frequencies.json", frequencies)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(views, tokens) of this process's share of each batch of an epoch, from batch `start` on."""
        cfg, (rank, world_size, device) = self.cfg, self.process
        local, steps = cfg.batch_size // world_size, cfg.steps_per_epoch()
        rows = data.batches(cfg.total, local, (cfg.seed, epoch), rank, world_size, start)[: steps - start]
        label = f"{Path(cfg.out).name} {epoch + 1}/{cfg.epochs}"
        bar = run.progress(rows, steps - start, label, cfg.batch_size, self.process)
        for step, batch in enumerate(bar, epoch * steps + start):
            # each rank draws the noise of the whole batch, so views do not depend on the number of processes
            generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, step))
            noise = torch.rand(cfg.batch_size, NOISE, generator=generator)[rank * local : (rank + 1) * local]
            chosen = self.corpus.images[self.pairs.image[batch]], noise
            images, noise = (run.pinned(x, device).to(device, non_blocking=True) for x in chosen)
            yield views(images, noise, self.size), run.pinned(self.tokens[batch], device)


def train(cfg: Config) -> Path | None:
    """Train an arm, resuming from the last checkpoint in its run folder. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        check_sizes(cfg, process.world_size)
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    precision, steps = run.resolve_precision(cfg.precision, process.device), cfg.steps_per_epoch()

    # Model, tokenizer, optimizer; restored from the checkpoint if there is one
    model = create_model(cfg.model, cfg.image_size).to(process.device)
    tokenizer = open_clip.get_tokenizer(cfg.model, context_length=model.context_length)
    groups = parameter_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    folder = run.RunFolder(cfg, process, step=0, epoch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first = folder.state["step"]

    # Data of the arm
    arm = ArmData(cfg, process, tokenizer, image_side(model))
    folder.check_same("data", arm.fingerprint, f"on other data than {cfg.data} holds")
    if process.main:
        arm.write(folder.path)
    folder.start(first, cfg.epochs * steps, cfg.total, data=arm.fingerprint)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    ddp.train()

    for epoch in range(folder.state["epoch"], cfg.epochs):
        start = max(first, epoch * steps)
        for step, (images, tokens) in enumerate(arm.batches(epoch, start - epoch * steps), start):
            values = train_step(ddp, images, tokens, optimizer, scaler, step, cfg, process, precision)
            if (step + 1) % cfg.log_every == 0 or step == 0:
                folder.log(step + 1, epoch=epoch, lr=learning_rate(step, cfg), **run.over_ranks(values))
            if folder.due(step + 1) and (step + 1) % steps:
                folder.save(step + 1, epoch=epoch, step=step + 1)

        done, last = (epoch + 1) * steps, epoch + 1 == cfg.epochs
        if last or (cfg.eval_every and (epoch + 1) % cfg.eval_every == 0):
            if process.main:
                with folder.evaluation(done, epoch=epoch, step=done):
                    accuracy = zero_shot(model, tokenizer, arm.test, arm.names, 1, process.device, precision)
                folder.log(done, epoch=epoch, zero_shot_top1=accuracy.nanmean().item())
            run.wait()
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, step=done)
    folder.close(f"--eval-set {cfg.eval_set}")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: train(cli.preset_cli(PRESETS)))
