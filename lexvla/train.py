"""Train LexVLA, or an ablation of it: `python -m lexvla.train PRESET [--overrides]`.

LexVLA (arXiv 2407.17827); no code of the authors is public. A step computes both lexical representations, then the
summed InfoNCE and the penalties over all processes' pairs, with this step's penalty weights (eq. 8), takes an Adam step
and caps the temperature. Settings are in config.py, towers by name in towers.py, the processing of captions in text.py.
"""

import itertools
import math
import os
from collections.abc import Callable, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Subset

from lexvla.checkpoints import backbone_fingerprint, check_lm, load_weights, trained_weights
from lexvla.config import PRESETS, Config, check, check_model
from lexvla.model import ImageEncoder, LexVLA, TextEncoder, total_loss
from lexvla.text import Prompts, caption_vocabulary, lm_dtype, lm_sample, load_lm, piece_counts
from lexvla.towers import (
    Precomputed,
    create_model,
    eval_transform,
    lm_input,
    patch_side,
    text_encoder,
    text_input,
    train_transform,
)
from shared import accumulate, checkpoints, cli, data, evaluation, run, windows
from shared.errors import UserError

BETAS = 0.9, 0.98  # of Adam; not stated in the paper

# ----------------------------------------------------------------------------------------------------------- schedules


def quadratic_warmup(step: int, value: float, steps: int) -> float:
    """A penalty's weight lambda(t) = lambda min(1, t / steps)^2; t is 1 in the first step.

    Section 4; S:splade/losses/regularization.py:27.
    """
    return value * min(1.0, step / steps if steps else 1.0) ** 2


def cosine_lr(step: int, base: float, total: int, warmup: int = 0) -> float:
    """Learning rate of a step from 0 on: linear to `base` over `warmup` steps, then half a cosine to 0."""
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))


# ---------------------------------------------------------------------------------------------------------------- data


class PairDataset(Dataset):
    """Item i of a run: (image, caption, broken samples skipped); the crop depends on seed, epoch and sample.

    If `transform` ends in normalising, images are uint8, and `normalise` normalises a batch of them.
    """

    def __init__(self, pairs, transform: Callable, seed: int = 0):
        self.pairs, self.seed = pairs, seed
        self.transform, self.normalise = data.split_normalisation(transform)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, str, list[data.Broken]]:
        pair, broken = data.read_item(self.pairs, i, self.seed)
        return self.transform(pair.image), pair.caption, broken


class TokenDataset(Dataset):
    """Item i: (the frozen backbone's tokens (n, D) of image i by `transform`, caption, broken samples skipped).

    Tokens are read from `file` if it has the right shape and the first image's tokens agree. Otherwise each process
    encodes a share of the images, the shares are gathered, and `file` is written, unless a sample is broken.
    """

    def __init__(
        self, pairs, transform: Callable, image: ImageEncoder, process: run.Process, precision: str, file: Path
    ):
        self.pairs, self.normalise, self.file = pairs, data.identity, file
        views = PairDataset(pairs, transform)
        alone = run.Process(0, 1, process.device)
        [(_, first, *_)] = encoded(Subset(views, range(1)), views.normalise, image, alone, precision)
        kept = self.kept(first)
        if all(run.gather_lists([kept is not None], process)):
            self.tokens, self.broken = kept, [[]] * len(pairs)
            self.captions = [pairs.caption(row) for row in range(len(pairs))]
            return
        batches = run.gather_lists(encoded(views, views.normalise, image, process, precision), process)
        _, tokens, captions, broken = zip(*sorted(batches, key=itemgetter(0)), strict=True)
        self.tokens = np.concatenate(tokens)
        self.captions, self.broken = (list(itertools.chain.from_iterable(each)) for each in (captions, broken))
        if any(self.broken) or not np.isfinite(self.tokens).all():
            return
        if process.main:
            file.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.save_array(file, self.tokens, f".{os.getpid()}.tmp")
        run.wait()
        if (kept := self.kept(first)) is not None:  # processes share its memory
            self.tokens = kept

    def kept(self, first: np.ndarray) -> np.ndarray | None:
        """Tokens of all images, memory-mapped from `file`; None if it is missing or belongs to other images.

        `first`: tokens (1, n, D) of the first image, to compare with.
        """
        try:
            tokens = np.load(self.file, mmap_mode="r")
        except (OSError, ValueError):
            return None
        same = tokens.shape == (len(self.pairs), *first.shape[1:])
        return tokens if same and np.allclose(tokens[:1], first, rtol=0.01, atol=0.01) else None

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, i: int) -> tuple[Tensor, str, list[data.Broken]]:
        i %= len(self)
        return torch.from_numpy(self.tokens[i].astype(np.float32)), self.captions[i], self.broken[i]


def encoded(
    views: Dataset, normalise: Callable, image: ImageEncoder, process: run.Process, precision: str
) -> list[tuple[int, np.ndarray, list[str], list[list[data.Broken]]]]:
    """(number, tokens (B, n, D) in half precision, captions, broken samples) of each of this process' batches.

    Batches have 256 images and are dealt out in turn to the W processes, so they do not depend on W. An image that is
    in a batch several times, with different captions, is encoded once.
    """
    batches = [range(first, min(first + 256, len(views))) for first in range(0, len(views), 256)]
    own = range(process.rank, len(batches), process.world_size)
    items, done = DataLoader(views, batch_sampler=[batches[i] for i in own], collate_fn=lambda items: items), []
    total = sum(len(batches[i]) for i in own)

    def encode(pixels: Tensor) -> np.ndarray:
        with run.autocast(precision, process.device):
            return image.frozen(normalise(pixels.to(process.device))).half().cpu().numpy()

    with run.counting(total, "images through the frozen backbone", process=process) as tick:
        for number, batch in zip(own, items, strict=True):
            pixels, captions, broken = zip(*batch, strict=True)
            tokens = data.encode_distinct(encode, torch.stack(pixels), [each.numpy().tobytes() for each in pixels])
            done.append((number, tokens, list(captions), list(broken)))
            tick(len(batch))
    return done


def training_set(
    cfg: Config, pairs, image: ImageEncoder, process: run.Process, precision: str
) -> PairDataset | TokenDataset:
    """Random crops of the images, or with --encode-once the tokens of their evaluation views."""
    if cfg.encode_once:
        sources = evaluation.images_of(pairs), backbone_fingerprint(image), cfg.backbone, str(cfg.image_size), precision
        file = Path(cfg.cache) / f"tokens-{data.fingerprint(*(source.encode() for source in sources))}.npy"
        return TokenDataset(pairs, eval_transform(cfg.backbone, cfg.image_size), image, process, precision, file)
    return PairDataset(pairs, train_transform(cfg.backbone, cfg.image_size), cfg.seed)


class Collate:
    """Items -> (pixels (B, 3, S, S) or tokens (B, n, D), the text tower's input, broken samples)."""

    def __init__(self, read: Callable[[Sequence[str]], tuple[Tensor, ...]]):
        self.read = read

    def __call__(self, items: list) -> tuple[Tensor, tuple[Tensor, ...], list[data.Broken]]:
        images, captions, broken = zip(*items, strict=True)
        return torch.stack(images), self.read(captions), [b for each in broken for b in each]


@torch.no_grad()
def bias_of_logits(model: TextEncoder, *text: Tensor) -> float:
    """Minus two standard deviations of the logits of a batch's captions, so that few words are above 0 (ours)."""
    return -2 * (model.hidden(*text) @ model.codebook.T).std().item()


def vocabulary_and_bias(cfg: Config, pairs, lm: nn.Module, tokenizer, process: run.Process) -> tuple[Tensor, float]:
    """(vocabulary ids (V,), bias of the logits).

    The vocabulary comes from all captions; each process counts the pieces of its share. The bias is the
    configuration's, or `bias_of_logits` of the LM and the captions of the first 256 samples.
    """
    captions = windows.captions(pairs, process.rank, process.world_size)
    counts = sum(run.gather_lists([piece_counts(tokenizer, captions)], process))
    vocab_ids = caption_vocabulary(tokenizer, counts, cfg.min_count, cfg.max_vocabulary, cfg.pattern)
    bias = cfg.bias
    if bias is None and process.main:
        text = lm_input(cfg, lm, tokenizer)(first_captions(pairs))
        bias = bias_of_logits(text_encoder(cfg)(lm, vocab_ids), *(x.to(process.device) for x in text))
    return vocab_ids, run.broadcast(bias, process)


def first_captions(pairs) -> list[str]:
    """The captions of the first 256 samples."""
    return list(filter(None, itertools.islice(windows.captions(pairs), 256)))


# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, tuple[Tensor, ...]],
    optimizer: torch.optim.Optimizer,
    step: int,
    lr: float,
    cfg: Config,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> dict[str, Tensor]:
    """One optimizer step, `step` from 1, on (pixels, text input); returns this rank's losses."""
    bare = model.module if isinstance(model, DistributedDataParallel) else model
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    pixels, text = batch
    for group in optimizer.param_groups:
        group["lr"] = lr
    (s_img, s_txt, logit_scale), backward = accumulate.forward(model, (pixels, *text), cfg, precision)
    weights = (quadratic_warmup(step, value, cfg.penalty_warmup) for value in (cfg.lambda_image, cfg.lambda_text))
    losses = total_loss(s_img, s_txt, logit_scale, *weights, cfg.penalty)
    optimizer.zero_grad()
    backward(scaler.scale(losses["loss"]))
    scaler.step(optimizer)
    scaler.update()
    bare.clamp_logit_scale()
    return losses


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print the plan of a run: parameters, vocabulary, steps, rates, memory; needs neither data nor weights."""
    check_model(cfg)
    cli.check_batch(cfg, world_size)
    try:
        n = data.planned_size(cfg)
    except UserError:
        n = 0
    V = cfg.max_vocabulary or 2_000
    model, lm_config = model_without_weights(cfg, V)
    sizes = {"adapter": model.image.adapter, "backbone": model.image.backbone, "text tower": model.text}
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in sizes.items()}
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    lora = sum(p.numel() for p in model.text.parameters() if p.requires_grad)
    vocabulary = f"{V:,} at most" if cfg.max_vocabulary else f"about {V:,}, from the captions"
    per_epoch = n // cfg.batch_size
    steps = per_epoch * cfg.epochs
    cli.show_plan(
        [
            ("parameters", f"{trained:,} trained, {frozen:,} frozen"),
            ("", ", ".join(f"{name} {value:,}" for name, value in count.items())),
            ("", f"image codebook {model.image.codebook.numel():,}, trained in the text tower {lora:,}"),
            ("vocabulary", vocabulary),
            ("samples", f"{n:,} an epoch, {n * cfg.epochs:,} in {cfg.epochs} epochs"),
            cli.disk_row(n, trained),
            cli.batch_row(cfg, world_size),
            cli.step_row(steps, per_epoch),
        ]
    )
    for step in sorted({0, cfg.warmup, cfg.penalty_warmup, steps // 2, steps - 1}):
        if 0 <= step < steps:
            lr = cosine_lr(step, cfg.lr, steps, cfg.warmup)
            lambdas = [quadratic_warmup(step + 1, x, cfg.penalty_warmup) for x in (cfg.lambda_image, cfg.lambda_text)]
            rates = f"{lr:.3e}, penalties {lambdas[0]:.1e} and {lambdas[1]:.1e}, at step {step:,}"
            cli.show_plan([("learning rate", rates)])
    mean, longest = prompt_lengths(cfg)
    length = f"{mean:.0f} tokens on average, the longest {longest}" if mean else f"{longest} tokens, by --max-length"
    cli.show_plan([("prompts", length)] if cfg.text == "lm" else [])
    weights, image, text, words = memory(cfg, cfg.batch_size // world_size, model, lm_config, V, longest)
    estimate = f"{weights + image + words + text:.1f} GiB a process: {weights:.1f} weights and Adam; "
    terms = f"{image:.1f} image tokens; {text:.1f} language model; {words:.1f} representations"
    cli.show_plan([("memory estimate", estimate + terms)])


def model_without_weights(cfg: Config, words: int) -> tuple[LexVLA, Any]:
    """(the model on the meta device, the LM's configuration)."""
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    local = Path(cfg.lm).is_dir()
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(cfg.lm) if local else LlamaConfig())
        model = create_model(cfg, lm, torch.arange(words), cfg.bias or 0.0, pretrained=False)
    return model, lm.config


def prompt_lengths(cfg: Config) -> tuple[float | None, int]:
    """(mean, maximum) number of tokens of the prompts in the first shard, for the estimate of memory.

    (None, --max-length) if the data or the LM's tokenizer is not available offline.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(cfg.lm, local_files_only=True)
        first = cfg.data if cfg.data.endswith((".tsv", ".csv")) else data.expand_shards(cfg.data)[0]
        if data.is_remote(first):
            return None, cfg.max_length
        pairs = data.open_pairs(first, cache=Path(cfg.cache))
    except (OSError, ValueError):
        return None, cfg.max_length
    captions = filter(None, map(pairs.caption, range(min(len(pairs), 10_000))))
    lengths = [len(ids) for ids in Prompts(tokenizer, cfg.max_length).ids(list(captions))]
    return sum(lengths) / len(lengths), max(lengths)


def memory(cfg: Config, size: int, model: LexVLA, lm: Any, words: int, length: int | None = None) -> tuple[float, ...]:
    """GiB of (weights with Adam, image tokens, language model, representations) in one process.

    size: pairs per process; lm: the LM's configuration; words: V; length: tokens of a prompt, by default --max-length.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    gib, d, blocks = 2**30, lm.hidden_size, lm.num_hidden_layers
    D, tokens = model.image.adapter.proj.fc1.in_features, (cfg.image_size // patch_side(model.image.backbone)) ** 2 + 1
    weights = (16 * trained + 2 * frozen) / gib
    micro = size / cfg.accumulate
    cached = size if cfg.accumulate > 1 else 0  # pairs whose representations and gradients `accumulate` keeps
    image = micro * tokens * (34 * D + 4 * d) / gib  # 34 D: a block's tokens in bf16
    s = (20 * micro + 16 * cached + 24 * cfg.batch_size) * words / gib
    text = micro * (length or cfg.max_length) * d * (2 * blocks + 34 if cfg.grad_checkpointing else 34 * blocks) / gib
    return weights, image, 0.0 if cfg.states or cfg.text == "bow" else text, s


def prepare(
    cfg: Config, folder: run.RunFolder, pairs, process: run.Process, precision: str, create: Callable, start: Callable
) -> tuple[LexVLA, Callable, nn.Module]:
    """(model, text input, LM).

    On resuming, weights, vocabulary and bias are the checkpoint's; a new run takes the vocabulary from the captions.
    """
    lm, tokenizer = load_lm(cfg.lm, lm_dtype(precision, process.device))
    lm.to(process.device)
    check_lm(lm, folder.state, folder.path) if folder.resumed else None
    if cfg.states and cfg.text == "lm":
        lm_input(cfg, lm, tokenizer).add(filter(None, windows.captions(pairs)))
    if not folder.resumed:
        found = vocabulary_and_bias(cfg, pairs, lm, tokenizer, process)
        folder.state["vocab_ids"], folder.state["bias"] = found
    vocab_ids, bias = folder.state["vocab_ids"], folder.state["bias"]
    read = text_input(cfg, lm, tokenizer, vocab_ids)
    torch.manual_seed(cfg.seed)
    model = create(cfg, lm, vocab_ids, bias).to(process.device)
    if folder.resumed:
        load_weights(model, folder.state, folder.path)
        del folder.state["weights"]
    else:
        start(model, read, pairs)
    return model, read, lm


def main(cfg: Config, create: Callable[..., LexVLA] = create_model, start: Callable = lambda *_: None) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder.

    create: makes the model, for baselines with the same data and loop.
    """
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    device, precision = process.device, run.resolve_precision(cfg.precision, process.device)
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path

    # Data, model, optimizer
    pairs = windows.open_pairs(cfg, process)
    data.check_pairs(pairs, cfg, folder.state, process)
    model, read, lm = prepare(cfg, folder, pairs, process, precision, create, start)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=cfg.lr, betas=BETAS, eps=cfg.eps, fused=True)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    folder.restore(optimizer=optimizer, scaler=scaler)
    per_epoch, first = len(pairs) // cfg.batch_size, folder.state["epoch"]
    kept = {name: folder.state[name] for name in ("vocab_ids", "bias")}
    kept |= {"backbone": backbone_fingerprint(model.image), "lm": lm_sample(lm)}
    done, total = per_epoch * first + folder.state["batch"], per_epoch * cfg.epochs
    folder.start(done, total, len(pairs), data=pairs.fingerprint, **kept)
    # Buffers are the frozen codebook and those of frozen models: equal in all processes.
    ddp = DistributedDataParallel(model, broadcast_buffers=False) if process.world_size > 1 else model
    skipped = folder.state["batch"]
    dataset = training_set(cfg, pairs, model.image, process, precision)
    if cfg.encode_once:
        model.image.backbone = Precomputed()
    loader = windows.training_batches(dataset, Collate(read), cfg, process, range(first, cfg.epochs), skipped)

    for epoch in range(first, cfg.epochs):
        model.train()
        broken = list(pairs.broken)
        label = f"{folder.path.name} epoch {epoch + 1}/{cfg.epochs}"
        batches = run.progress(loader, per_epoch - skipped, label, cfg.batch_size, process)
        for batch, (pixels, text, _) in enumerate(data.collect_broken(batches, broken), skipped + 1):
            step = per_epoch * epoch + batch  # from 1
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # for dropout: a resumed run is equal
            pixels = dataset.normalise(pixels.to(device, non_blocking=True))
            on_device = pixels, tuple(x.to(device, non_blocking=True) for x in text)
            lr = cosine_lr(step - 1, cfg.lr, total, cfg.warmup)
            losses = train_step(ddp, on_device, optimizer, step, lr, cfg, precision, scaler)
            if step % cfg.log_every == 0 or batch == 1:
                folder.log(step, epoch=epoch, lr=lr, logit_scale=model.logit_scale.exp(), **run.over_ranks(losses))
            if folder.due(step) and batch < per_epoch:
                folder.save(step, epoch=epoch, batch=batch, weights=trained_weights(model))

        done, last, skipped = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs, 0
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0, weights=trained_weights(model))
    folder.close("--sets FOLDER")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
