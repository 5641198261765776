"""Train TL;DR's models: `python -m tldr_reduction.train PRESET [--overrides]`.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, `V:` for its `vq_compress_model/`. The paper's
contribution in this file is stage `captioner`: loss = loss_lm + loss_emb of a captioner that reads the image through a
codebook. The other stages are stock:
  captioner   on the noisy data; reduce.py codes and clusters the images with it
  finetune    the captioner on clean captions; reduce.py writes the refined captions with it
  blip, clip  vision-language pre-training on the full or the reduced data; a blip also scores image-text matching
Models are in model.py and blip.py, settings in config.py, pairs and their views in datasets.py.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared import accumulate, cli, data, pretrained, run, windows
from shared.clip import set_grad_checkpointing, trimmed
from shared.zeroshot import quick_top1
from tldr_reduction.blip import target_places
from tldr_reduction.checkpoints import init_text, init_vision, load_blip
from tldr_reduction.config import PRESETS, Config, check
from tldr_reduction.datasets import Collate, PairDataset, eval_transform, open_pairs, train_transform
from tldr_reduction.model import (
    CodebookCaptioner,
    build,
    build_for,
    codebook_perplexity,
    image_side,
    keyword_codebook,
    rescaled,
    restart_unused,
    sampled_codebook,
)
from tldr_reduction.tokenizer import PROMPT, WordPiece, eval_tokenizer, tokenizer_of

# --------------------------------------------------------------------------------------------------------- schedules


def warmup_step_lr(
    epoch: int, step: int, init_lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, decay_rate: float
) -> float:
    """Epoch 0: linear from warmup_lr to init_lr over warmup_steps; then init_lr * decay^epoch, at least min_lr.

    V:utils.py:8-17 as V:pretrain_vq_compress.py:41,127 call them. An epoch 0 shorter than the warm-up leaves it
    unfinished, and epoch 1 jumps.
    """
    if epoch == 0:
        return min(init_lr, warmup_lr + (init_lr - warmup_lr) * step / max(warmup_steps, 1))
    return max(min_lr, init_lr * decay_rate**epoch)


def cosine_lr(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """Half a cosine from init_lr to min_lr, constant within an epoch. V:utils.py:2."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def alpha_ramp(epoch: int, step: int, steps_per_epoch: int, alpha: float) -> float:
    """Weight of the momentum targets: linear from 0 to alpha over two epochs. V:pretrain_vq_compress.py:51."""
    return alpha * min(1.0, (epoch * steps_per_epoch + step) / (2 * steps_per_epoch))


def learning_rate(cfg: Config, epoch: int, step: int) -> float:
    """The stage's learning rate at a step of an epoch, both from 0."""
    if cfg.stage == "finetune":
        return cosine_lr(epoch, cfg.epochs, cfg.lr, cfg.min_lr)
    return warmup_step_lr(epoch, step, cfg.lr, cfg.min_lr, cfg.warmup_lr, cfg.warmup, cfg.lr_decay_rate)


# ------------------------------------------------------------------------------------------------------ initial weights


def initialise(model: nn.Module, cfg: Config, pairs, process: run.Process) -> None:
    """Weights that do not start at random: those from elsewhere that the settings name, and the codebook."""
    if cfg.vision_init:
        init_vision(model.visual_encoder, cfg.vision_init)
    if cfg.text_init:
        init_text(model, cfg.text_init)
    if cfg.init:
        path = Path(cfg.init)
        missing = load_blip(model, path / "checkpoint.pt" if path.is_dir() else path)
        lost = [name for name in missing if "_m." not in name and "queue" not in name]
        if lost:
            print(
                f"--init {cfg.init} lacks {len(lost)} of the parameters, which start at random: {', '.join(lost[:3])}"
            )
    if cfg.stage == "blip":  # momentum encoders start equal
        model.momentum, kept = 0.0, model.momentum
        model.update_momentum()
        model.momentum = kept
    if cfg.stage == "captioner" and cfg.codebook_init != "uniform":
        start_codebook(model, cfg, pairs, process)


@torch.no_grad()
def start_codebook(captioner: CodebookCaptioner, cfg: Config, pairs, process: run.Process) -> None:
    """Xavier's codebook, or tokens of the data, or keywords moved and scaled onto those; a function of the seed."""
    generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, "codebook"))
    weight = captioner.quantize.embedding.weight
    if cfg.codebook_init == "xavier":
        weight.copy_(nn.init.xavier_uniform_(torch.empty(weight.shape), generator=generator))
        return
    codes_per_image = captioner.visual_encoder.pos_embed.shape[1] * cfg.width // cfg.code_dim
    wanted = -(-4 * cfg.num_codes // codes_per_image)
    if isinstance(pairs, windows.Windowed):  # of the first process' share, whose first window is in random order
        own = (i for i in range(len(pairs)) if i // pairs.batch_size % process.world_size == 0)
        items = list(itertools.islice(own, wanted))
    else:
        items = torch.randperm(len(pairs), generator=generator)[:wanted].tolist()
    dataset = PairDataset(pairs, eval_transform(cfg.image_size), cfg.seed, cfg.max_words)
    images = dataset.normalise(torch.stack([dataset[i][1] for i in items]).to(process.device))
    tokens = torch.cat([captioner.visual_encoder(part).float() for part in images.split(64)]).reshape(-1, cfg.code_dim)
    if cfg.codebook_init == "data":
        weight.copy_(sampled_codebook(tokens, cfg.num_codes, generator))
    else:
        embed = text_embedder(cfg.keyword_model, cfg.code_dim)
        if cfg.keywords is not None:
            codebook = embed(Path(cfg.keywords).read_text(encoding="utf-8").splitlines()[: cfg.num_codes]).float()
        else:  # the first process goes through all captions, its peers wait
            found = keyword_codebook(windows.captions(pairs), cfg.num_codes, embed) if process.main else None
            codebook = run.broadcast(found, process)
        weight.copy_(rescaled(codebook.to(process.device), tokens))


def text_embedder(name: str, dim: int):
    """texts -> (n, dim): mean last hidden state of a text encoder; a seeded random rotation where its width differs."""
    from transformers import AutoModel, AutoTokenizer

    name = str(pretrained.minilm()) if name == "minilm" else name
    tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()

    def embed(texts: list[str]) -> Tensor:
        parts = []
        for first in range(0, len(texts), 256):
            batch = tokenizer(texts[first : first + 256], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            parts.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        embedded = torch.cat(parts).detach()
        if embedded.shape[1] != dim:
            random = torch.randn(max(embedded.shape[1], dim), dim, generator=torch.Generator().manual_seed(0))
            embedded = embedded @ torch.linalg.qr(random).Q[: embedded.shape[1]]
        return embedded

    return embed


# --------------------------------------------------------------------------------------------------------------- losses


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of this rank's unit rows (B, D) among those of all ranks, in fp32."""
    image, text, scale = image_features.float(), text_features.float(), logit_scale.float()
    labels = run.own_columns(image)
    to_text, to_image = scale * image @ run.gather(text).T, scale * text @ run.gather(image).T
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2


def losses_of(
    model: nn.Module,
    batch: Sequence[Tensor],
    cfg: Config,
    alpha: float = 0.0,
    prompt_length: int = 0,
    precision: str = "fp32",
) -> tuple[dict[str, Tensor], Tensor | None, Callable]:
    """The stage's losses of images, ids, mask, and `target_places` if they are known: {"loss": their sum, each by
    name}; the codes of stage captioner; the backward pass of a loss."""
    images, ids, mask, places = (*batch, None)[:4]
    if cfg.stage == "clip":
        features, backward = accumulate.forward(model, (images, ids), cfg, precision)
        loss = clip_loss(*features)
        return {"loss": loss, "loss_ita": loss}, None, backward
    with run.autocast(precision, images.device):
        if cfg.stage == "blip":
            found = model(images, ids, mask, alpha, places=places)
            losses = dict(zip(("loss_ita", "loss_itm", "loss_lm"), found, strict=True))
        else:
            loss_lm, loss_emb, codes = model(images, ids, mask, prompt_length, return_codes=True, places=places)
            return {"loss": loss_lm + loss_emb, "loss_lm": loss_lm, "loss_emb": loss_emb}, codes, Tensor.backward
    return {"loss": sum(losses.values()), **losses}, None, Tensor.backward


# ----------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, samples, steps, learning rates, memory of the training step."""
    model = build(cfg, len(WordPiece(cfg.vocab)) if Path(cfg.vocab).is_file() else 30524)  # else BERT's
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    n = cfg.dataset_size or cfg.expected or 0
    if cfg.data and Path(cfg.data).exists() and not cfg.window_shards:
        n = len(open_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.strict, cfg.cache))
    per_epoch = n // cfg.batch_size
    rows = [("parameters", f"{trained:,} trained, {frozen:,} momentum copies")]
    if cfg.stage == "captioner":
        codes = (1 + (cfg.image_size // cfg.patch_size) ** 2) * cfg.width // cfg.code_dim
        rows += [("codes", f"{codes} an image, of {cfg.num_codes} with {cfg.code_dim} dimensions")]
    size = f"{n:,} an epoch, {n * cfg.epochs:,} in {cfg.epochs} epochs"
    rows += [("samples", size if n else "unknown: pass --data or --dataset-size"), cli.batch_row(cfg, world_size)]
    rows += [cli.disk_row(n, trained, frozen)]
    if per_epoch:
        rows += [cli.step_row(per_epoch * cfg.epochs, per_epoch)]
    for epoch, step in ((0, 0), (0, cfg.warmup), (1, 0), (cfg.epochs // 2, 0), (cfg.epochs - 1, 0)):
        if not per_epoch or step <= per_epoch:
            rate = learning_rate(cfg, epoch, step)
            rows += [("learning rate", f"{rate:.3e} in epoch {epoch} at its step {step:,}")]
    side, length = image_side(model, cfg), model.context_length if cfg.stage == "clip" else cfg.max_length
    batch = torch.zeros(2, 3, side, side), torch.ones(2, length, dtype=torch.long), torch.ones(2, length)
    if cfg.stage == "blip":
        model.queue_ptr.zero_()

    def forward() -> tuple:
        return losses_of(model.train(), batch, dataclasses.replace(cfg, accumulate=1), 0.4)

    samples, kept = cfg.batch_size / world_size / cfg.accumulate, "gradients, AdamW, momentum"
    checkpointed = model if cfg.grad_checkpointing else None
    cli.show_plan([*rows, *cli.memory_rows(forward, samples, trained, 4 * frozen, kept, checkpointed)])


def pairs_of(cfg: Config, process: run.Process):
    """What is trained on: by window, or by row."""
    if cfg.window_shards:
        return windows.open_pairs(cfg, process)
    return open_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.strict, cfg.cache)


def training_batches(
    pairs, tokenizer, model: nn.Module, first: int, start: int, cfg: Config, process: run.Process
) -> tuple[PairDataset, Iterator[tuple]]:
    """The stage's views, and batches of all epochs from batch `start` of epoch `first` on, as `Collate` makes them."""
    view = train_transform(image_side(model, cfg), cfg.crop_scale, cfg.flip, cfg.augment)
    dataset = PairDataset(pairs, view, cfg.seed, cfg.max_words)
    collate = Collate(tokenizer, cfg.max_length, PROMPT if cfg.stage == "finetune" else "")
    epochs = range(first, cfg.epochs)
    return dataset, windows.training_batches(dataset, collate, cfg, process, epochs, start)


def of_epoch(
    loader: Iterator[tuple], pairs, epoch: int, start: int, cfg: Config, process: run.Process
) -> tuple[Iterable, list[data.Broken]]:
    """The batches of an epoch from batch `start` on, which come next, and the list that broken samples go to."""
    broken, left = list(pairs.broken), len(pairs) // cfg.batch_size - start
    label = f"{Path(cfg.out).name} epoch {epoch + 1}/{cfg.epochs}"
    bar = run.progress(loader, left, label, cfg.batch_size, process)
    return data.watch(bar, broken), broken


def on_device(
    inputs: list[Tensor],
    dataset: PairDataset,
    model: nn.Module,
    cfg: Config,
    device: torch.device,
    prompt_length: int = 0,
) -> list[Tensor]:
    """Images, ids, mask of a batch of the dataset, and what a decoder has to predict: `target_places`."""
    images, ids, mask = inputs
    images, mask = dataset.normalise(images.to(device, non_blocking=True)), mask.to(device, non_blocking=True)
    if cfg.stage == "clip":
        return [images, trimmed(ids, model, device), mask]
    places = run.pinned(target_places(ids, prompt_length), device)
    return [images, ids.to(device, non_blocking=True), mask, places.to(device, non_blocking=True)]


def train_step(
    model: nn.Module, inputs: list[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, cfg, **how
) -> tuple[dict[str, Tensor], Tensor | None]:
    """One step on images, ids, mask -> losses and codes; `how` are the other arguments of `losses_of`."""
    losses, codes, backward = losses_of(model, inputs, cfg, **how)
    optimizer.zero_grad()
    backward(scaler.scale(losses["loss"]))
    scaler.step(optimizer)
    scaler.update()
    return losses, codes


def step_metrics(model: nn.Module, losses: dict, codes: Tensor | None, used: Tensor, cfg: Config) -> dict[str, Tensor]:
    """What is logged of a step: losses of the global batch, use of the codebook, temperature."""
    logged = run.over_ranks(losses)
    if codes is not None:
        logged["codes_used"] = (used > 0).sum()
        logged["perplexity"] = codebook_perplexity(run.gather(codes), cfg.num_codes)
    if cfg.stage == "clip":
        logged["logit_scale"] = model.logit_scale.exp()
    elif cfg.stage == "blip":
        logged["logit_scale"] = 1 / model.temp
    return logged


@torch.no_grad()
def restart_codes(captioner: CodebookCaptioner, used: Tensor, images: Tensor, epoch: int, cfg: Config) -> int:
    """Move codes that nothing chose in the epoch onto tokens of its last batch; returns how many."""
    tokens = run.gather(captioner.visual_encoder(images).float()).reshape(-1, cfg.code_dim)
    generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, epoch, "restart"))
    return restart_unused(captioner.quantize, used, tokens, generator)


def evaluates(cfg: Config, epoch: int) -> bool:
    """Whether the stage has a zero-shot evaluation after that epoch, from 0."""
    due = cfg.eval_every > 0 and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs)
    return due and cfg.stage in ("blip", "clip")


def zero_shot(model: nn.Module, tokenizer, cfg: Config, device: torch.device, precision: str) -> float:
    """Top-1 in percent on `eval_set`."""
    view = eval_transform(image_side(model, cfg))
    return quick_top1(model, eval_tokenizer(tokenizer, cfg), view, cfg.eval_set, device, run.DTYPES[precision])


def count_codes(used: Tensor, codes: Tensor | None) -> None:
    """Add the codes (B, ...) of all ranks, if there are any, to how often each was used, (K,) int64."""
    if codes is not None:
        chosen = run.gather(codes).flatten()
        used.scatter_add_(0, chosen, torch.ones_like(chosen))  # `bincount` would wait for a GPU


def train(cfg: Config, process: run.Process) -> Path:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]
    pairs = pairs_of(cfg, process)
    data.check_pairs(pairs, cfg, folder.state, process)
    per_epoch = len(pairs) // cfg.batch_size

    # Tokenizer, model, optimizer
    precision, tokenizer = run.resolve_precision(cfg.precision, process.device), tokenizer_of(cfg)
    prompt_length = len(tokenizer.prompt_ids(PROMPT)) - 1 if cfg.stage == "finetune" else 0
    model = build_for(cfg, tokenizer).to(process.device)
    set_grad_checkpointing(model, cfg.grad_checkpointing)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]  # weight decay is on all
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, eps=cfg.eps, weight_decay=cfg.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if not folder.resumed:
        initialise(model, cfg, pairs, process)
    used = folder.state.get("used", torch.zeros(cfg.num_codes, dtype=torch.long)).to(process.device)
    folder.start(per_epoch * first + start, per_epoch * cfg.epochs, len(pairs), data=pairs.fingerprint)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    dataset, loader = training_batches(pairs, tokenizer, model, first, start, cfg, process)

    for epoch in range(first, cfg.epochs):
        model.train()
        batches, broken = of_epoch(loader, pairs, epoch, start, cfg, process)
        for batch, (_, *inputs, _) in enumerate(batches, start):
            step, lr = per_epoch * epoch + batch + 1, learning_rate(cfg, epoch, batch)
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # dropout, negatives: resume agrees
            for group in optimizer.param_groups:
                group["lr"] = lr
            inputs = on_device(inputs, dataset, model, cfg, process.device, prompt_length)
            alpha = alpha_ramp(epoch, batch, per_epoch, cfg.alpha)
            how = {"alpha": alpha, "prompt_length": prompt_length, "precision": precision}
            losses, codes = train_step(ddp, inputs, optimizer, scaler, cfg, **how)
            if cfg.stage == "clip":
                model.logit_scale.data.clamp_(0, math.log(100))
            count_codes(used, codes)
            if step % cfg.log_every == 0 or batch == 0:
                folder.log(step, epoch=epoch, lr=lr, **step_metrics(model, losses, codes, used, cfg))
            if folder.due(step) and batch + 1 < per_epoch:
                folder.save(step, epoch=epoch, batch=batch + 1, used=used.cpu())

        done, last, start = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs, 0
        if cfg.stage == "captioner":
            if cfg.restart_codes and not last:
                folder.log(done, epoch=epoch, codes_restarted=restart_codes(model, used, inputs[0], epoch, cfg))
            used.zero_()
        if process.main and evaluates(cfg, epoch):
            with folder.clock.paused():
                top1 = zero_shot(model, tokenizer, cfg, process.device, precision)
            folder.log(done, epoch=epoch, zero_shot_top1=top1)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0, used=used.cpu())
    folder.close("--sets FOLDER --rerank", next_command(cfg))
    return folder.path


def next_command(cfg: Config) -> str | None:
    """What a captioner is for; None where a run is evaluated."""
    flag = {"captioner": "--captioner", "finetune": "--caption-model"}.get(cfg.stage)
    return flag and f"python -m tldr_reduction.reduce {cfg.data} {flag} {cfg.out} --out FOLDER"


def main(cfg: Config) -> Path | None:
    """`train`, or --dry-run."""
    process = run.setup(cfg.seed, cfg.device)
    check(cfg, process.world_size)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    return train(cfg, process)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
