"""Train LexVLA, or an ablation of it: `python -m lexvla.train PRESET [--overrides]`.

LexVLA (arXiv 2407.17827); no code of the authors is public. A step: both lexical representations, gathered from all
processes; summed InfoNCE and the penalties with their weights of this step (eq. 8); Adam; the cap on the temperature.
Settings are in config.py, towers by name in build.py, what captions become in text.py.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lexvla.build import (
    create_backbone,
    create_model,
    eval_transform,
    frozen_fingerprint,
    load_weights,
    text_input,
    train_transform,
    trained_weights,
)
from lexvla.config import PRESETS, Config, check, check_model
from lexvla.eval import quick_recall
from lexvla.model import ImageEncoder, LexVLA, TextEncoder, sparsify, total_loss
from lexvla.text import States, caption_vocabulary, lm_dtype, load_lm
from shared import checkpoints, cli, data, run

# ----------------------------------------------------------------------------------------------------------- schedules


def quadratic_warmup(step: int, value: float, steps: int) -> float:
    """A penalty's weight lambda(t) = lambda min(1, t / steps)^2; t is 1 in the first step.

    Section 4; SPLADE:splade/losses/regularization.py:27.
    """
    return value * min(1.0, step / steps if steps else 1.0) ** 2


def cosine_lr(step: int, base: float, total: int, warmup: int = 0) -> float:
    """Learning rate of a step from 0 on: linear to `base` over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices decay (by 0 in the paper's setting), vectors and the temperature do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


# ---------------------------------------------------------------------------------------------------------------- data


class PairDataset(Dataset):
    """Item i: (image, caption, broken samples passed over); the crop is a function of (seed, i) alone."""

    def __init__(self, pairs, transform: Callable, seed: Sequence[int]):
        self.pairs, self.transform, self.seed = pairs, transform, seed

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, str, list[data.Broken]]:
        broken: list[data.Broken] = []
        pair = data.read_or_next(self.pairs, int(i), broken)
        torch.default_generator.manual_seed(data.stable_hash(*self.seed, int(i)))  # CPU only: cheap
        return self.transform(pair.image), pair.caption, broken


class TokenDataset(Dataset):
    """Item i: (the frozen backbone's tokens (n, D) of image i, uncropped, caption, broken samples passed over)."""

    def __init__(self, pairs, transform: Callable, image: ImageEncoder, device: torch.device, precision: str):
        items = DataLoader(PairDataset(pairs, transform, ()), batch_size=256, collate_fn=lambda items: items)
        tokens, self.captions, self.broken = [], [], []
        for batch in tqdm(items, desc="images through the frozen backbone", unit="batch", disable=None):
            pixels = torch.stack([pixels for pixels, _, _ in batch]).to(device)
            with run.autocast(precision, device):
                tokens.append(image.frozen(pixels).half().cpu())
            self.captions += [caption for _, caption, _ in batch]
            self.broken += [broken for _, _, broken in batch]
        self.tokens = torch.cat(tokens)

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> tuple[Tensor, str, list[data.Broken]]:
        return self.tokens[i].float(), self.captions[i], self.broken[i]


class Collate:
    """Items -> (pixels (B, 3, S, S) or tokens (B, n, D), the text tower's input, broken samples)."""

    def __init__(self, read: Callable[[Sequence[str]], tuple[Tensor, ...]]):
        self.read = read

    def __call__(self, items: list) -> tuple[Tensor, tuple[Tensor, ...], list[data.Broken]]:
        images, captions, broken = zip(*items, strict=True)
        return torch.stack(images), self.read(captions), [b for each in broken for b in each]


@torch.no_grad()
def first_bias(model: TextEncoder, texts: tuple[Tensor, ...]) -> float:
    """Minus two standard deviations of a batch's text logits: a word must stand out to pass 0 (ours)."""
    z = model.hidden_of_states(texts[0]) if texts[0].is_floating_point() else model.hidden(*texts)
    return -2 * (z @ model.codebook.T).std().item()


def vocabulary_and_bias(cfg: Config, pairs, lm: nn.Module, tokenizer) -> tuple[Tensor, float]:
    """Vocabulary from all captions, and the bias as given or from the first 256."""
    captions = (pairs.caption(row) for row in range(len(pairs)))
    vocab_ids = caption_vocabulary(tokenizer, captions, cfg.min_count, cfg.max_vocabulary, cfg.pattern)
    if cfg.bias is not None:
        return vocab_ids, cfg.bias
    first = list(filter(None, (pairs.caption(row) for row in range(min(len(pairs), 256)))))
    return vocab_ids, first_bias(
        TextEncoder(lm, vocab_ids, center=cfg.centre_codebook), text_input(cfg, tokenizer, vocab_ids)(first)
    )


# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    step: int,
    lr: float,
    cfg: Config,
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """One optimizer step, `step` from 1, on (pixels, text input); returns the losses of the global batch."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    pixels, text = batch
    for group in optimizer.param_groups:
        group["lr"] = lr
    with run.autocast(run.resolve_precision(cfg.precision, pixels.device), pixels.device):
        s_img, s_txt, logit_scale = model(pixels, *text)
    weights = (quadratic_warmup(step, value, cfg.penalty_warmup) for value in (cfg.lambda_image, cfg.lambda_text))
    options = {"sparse": functools.partial(sparsify, topk=cfg.topk)} if cfg.sparse_training else {}
    rows = run.gather(s_img), run.gather(s_txt)
    losses = total_loss(*rows, logit_scale, *weights, cfg.penalty, cfg.detach_weight, **options)
    optimizer.zero_grad()
    (losses["loss"] if scaler is None else scaler.scale(losses["loss"])).backward()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()
    bare.clamp_logit_scale()
    return losses


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, vocabulary, steps, rates, memory; needs neither data nor weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    check_model(cfg)
    try:
        n = cfg.dataset_size or (len(data.open_pairs(cfg.data, cache=Path(cfg.cache))) if cfg.data else 0)
    except FileNotFoundError:
        n = 0
    V = cfg.max_vocabulary or 2_000
    local = Path(cfg.lm).is_dir()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.lm) if local else LlamaConfig())
        model = create_model(cfg, lm, torch.arange(V), cfg.bias or 0.0, pretrained=False)
        patch = create_backbone(cfg.backbone, cfg.image_size, pretrained=False)[2]
    sizes = {
        "adapter": model.image.adapter,
        "backbone": model.image.backbone,
        "text tower": model.text,
    }
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in sizes.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    lora = sum(p.numel() for p in model.text.parameters() if p.requires_grad)
    words = f"{V:,} at most" if cfg.max_vocabulary else f"about {V:,}, from the captions"
    print(f"parameters         {trained:,} trained, {frozen:,} frozen")
    print(f"                   {', '.join(f'{name} {value:,}' for name, value in count.items())}")
    print(f"                   image codebook {model.image.codebook.numel():,}, trained in the text tower {lora:,}")
    print(f"vocabulary         {words}")
    per_epoch = n // cfg.batch_size
    steps = per_epoch * cfg.epochs
    print(f"samples            {n:,} an epoch, {n * cfg.epochs:,} in {cfg.epochs} epochs")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {steps:,} ({per_epoch:,} an epoch)")
    for step in sorted({0, cfg.warmup, cfg.penalty_warmup, steps // 2, steps - 1}):
        if 0 <= step < steps:
            lr = cosine_lr(step, cfg.lr, steps, cfg.warmup)
            lambdas = [quadratic_warmup(step + 1, x, cfg.penalty_warmup) for x in (cfg.lambda_image, cfg.lambda_text)]
            print(f"learning rate      {lr:.3e}, penalties {lambdas[0]:.1e} and {lambdas[1]:.1e}, at step {step:,}")
    gib, size, d = 2**30, cfg.batch_size // world_size, lm.config.hidden_size
    D = model.image.adapter.proj.fc1.in_features
    tokens = (cfg.image_size // patch) ** 2 + 1
    weights = (16 * trained + 2 * frozen) / gib
    image = size * tokens * (34 * D + 4 * d) / gib  # 34 D: a block's tokens in bf16
    rows = (20 * size + 24 * cfg.batch_size) * V / gib
    blocks = lm.config.num_hidden_layers
    text = size * cfg.max_length * d * (2 * blocks + 34 if cfg.grad_checkpointing else 34 * blocks) / gib
    text = 0.0 if cfg.states or cfg.text == "bow" else text
    print(
        f"memory estimate    {weights + image + rows + text:.1f} GiB a process: {weights:.1f} weights and Adam; "
        f"{image:.1f} image tokens; {text:.1f} language model; {rows:.1f} rows of words"
    )


def main(cfg: Config) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    return train(cfg, process)


def train(cfg: Config, process: run.Process | None = None) -> Path:
    """The training loop; `main` is its command line."""
    process = process or run.setup(cfg.seed, cfg.device)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)

    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if state["epoch"] >= cfg.epochs:
        if process.main:
            print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder

    # Data
    pairs = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    data.check_pairs(pairs, cfg, state, process)
    per_epoch = len(pairs) // cfg.batch_size

    # Model, vocabulary, optimizer
    lm, tokenizer = load_lm(cfg.lm, lm_dtype(precision, process.device))
    if "vocab_ids" not in state:
        found = vocabulary_and_bias(cfg, pairs, lm, tokenizer) if process.main else None
        state["vocab_ids"], state["bias"] = run.broadcast(found, process)
    vocab_ids, bias = state["vocab_ids"], state["bias"]
    read = text_input(cfg, tokenizer, vocab_ids)
    torch.manual_seed(cfg.seed)
    model: LexVLA = create_model(cfg, lm, vocab_ids, bias).to(process.device)
    if "weights" in state:
        load_weights(model, state, folder)
    groups = param_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    scaler = torch.amp.GradScaler(process.device.type) if precision == "fp16" else None
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    steps = per_epoch * cfg.epochs
    saved = per_epoch * state["epoch"] + state["batch"]  # step of the last checkpoint
    log = run.RunLog(folder, cfg, process, step=saved)
    # Buffers are the frozen codebook and what the frozen models keep: the same everywhere.
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()
    backbone = frozen_fingerprint(model)

    def save(epoch: int, batch: int) -> None:
        if process.main:
            checkpoints.save_checkpoint(
                folder / "checkpoint.pt",
                {
                    "epoch": epoch,
                    "batch": batch,
                    "weights": trained_weights(model),
                    "vocab_ids": vocab_ids,
                    "bias": bias,
                    "backbone": backbone,
                    "optimizer": optimizer.state_dict(),
                    **({"scaler": scaler.state_dict()} if scaler is not None else {}),
                    "seconds": clock.read(),
                    "commit": commit,
                    "data": pairs.fingerprint,
                    "config": dataclasses.asdict(cfg),
                },
            )

    encoded = None
    if cfg.encode_once:
        transform = eval_transform(cfg.backbone, cfg.image_size)
        encoded = TokenDataset(pairs, transform, model.image, process.device, precision)

    for epoch in range(state["epoch"], cfg.epochs):
        model.train()
        start = state["batch"] if epoch == state["epoch"] else 0
        broken = list(pairs.broken)
        seed = (cfg.seed, epoch)
        dataset = encoded or PairDataset(pairs, train_transform(cfg.backbone, cfg.image_size, cfg.crop_scale), seed)
        loader = data.epoch_loader(dataset, Collate(read), cfg, process, seed, start)
        label = f"{folder.name} epoch {epoch + 1}/{cfg.epochs}"
        batches = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for batch, (pixels, text, _) in enumerate(data.watch(batches, broken), start + 1):
            step = per_epoch * epoch + batch  # from 1
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # for towers with dropout: resume agrees
            pixels = pixels.to(process.device, non_blocking=True)
            text = tuple(x.to(process.device, non_blocking=True) for x in text)
            lr = cosine_lr(step - 1, cfg.lr, steps, cfg.warmup)
            losses = train_step(ddp, (pixels, text), optimizer, step, lr, cfg, scaler)
            if step % cfg.log_every == 0 or batch == 1:
                scale = model.logit_scale.exp()
                log.write(step, epoch=epoch, seconds=clock.read(), lr=lr, logit_scale=scale, **losses)
                run.check_loss(losses["loss"], step)
            if step - saved >= cfg.save_every and batch < per_epoch:
                save(epoch, batch)
                saved = step

        if cfg.eval_every and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs) and process.main:
            with clock.paused():
                transform = eval_transform(cfg.backbone, cfg.image_size)
                with read.unknown_through(lm, tokenizer) if isinstance(read, States) else contextlib.nullcontext():
                    recall = quick_recall(model, read, transform, cfg.eval_set, process.device, run.DTYPES[precision])
            log.write(per_epoch * (epoch + 1), epoch=epoch, seconds=clock.read(), **recall)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if per_epoch * (epoch + 1) - saved >= cfg.save_every or epoch + 1 == cfg.epochs:
            save(epoch + 1, 0)
            saved = per_epoch * (epoch + 1)
    log.close()
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
