"""Train FLAME, or a CLIP on the same captions: `python -m flame.train PRESET [--overrides]`.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/.
The paper's: texts are embeddings from the bank (bank.py), of which each visit draws K (`FacetDataset`,
`sample_facets`), and the loss has K positives an image. The LLM is never loaded. Settings are in config.py.
"""

import dataclasses
import math
from pathlib import Path

import open_clip
import torch
import tyro
from open_clip.transform import image_transform
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from flame.bank import AuthorsBank, Bank, centred, open_bank, sample_facets
from flame.config import PRESETS, Config, check, check_inputs
from flame.embed import embed_captions, open_set  # noqa: F401
from flame.eval import classifier_of, text_features, view_of, zero_shot_top1
from flame.model import create_model, mp_nce_loss, mp_sigmoid_loss
from flame.recaption import read_captions
from shared import checkpoints, cli, data, run

# -------------------------------------------------------------------------------------------- schedules and optimizer


def cosine_lr(step: int, base_lr: float, warmup: int, total: int) -> float:
    """Linear to base_lr at step warmup - 1, then half a cosine to 0 at `total`. U:training/scheduler.py:43."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * base_lr


def const_lr(step: int, base_lr: float, warmup: int) -> float:
    """Linear to base_lr, which then stays. U:training/scheduler.py:13."""
    return base_lr * (step + 1) / warmup if step < warmup else base_lr


def const_cooldown_lr(
    step: int, base_lr: float, warmup: int, total: int, cooldown: int, power: float = 1.0, end: float = 0.0
) -> float:
    """`const_lr`, and a polynomial fall to `end` over the last `cooldown` steps. U:training/scheduler.py:24."""
    start = total - cooldown
    if step < max(warmup, start):
        return const_lr(step, base_lr, warmup)
    return (1 - (step - start) / cooldown) ** power * (base_lr - end) + end


def schedule(cfg: Config, step: int, total: int) -> float:
    """The learning rate of a step, counted from 0."""
    warmup = min(cfg.warmup, total)
    if cfg.schedule == "cosine":
        return cosine_lr(step, cfg.lr, warmup, total)
    if cfg.schedule == "const":
        return const_lr(step, cfg.lr, warmup)
    return const_cooldown_lr(step, cfg.lr, warmup, total, cfg.cooldown)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Parameters without decay (vectors, scalars, names with bn, ln, bias or logit_scale) and with it.

    U:training/main.py:315. Position embeddings, the patch convolution and the unused `visual.proj` decay.
    """
    plain, decayed = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            spared = parameter.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            (plain if spared else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


# --------------------------------------------------------------------------------------------------------------- data


def view(size: int, train: bool, crop_scale: float = 0.9):
    """RandomResizedCrop (bicubic, no flip) or resize of the short side and centre crop; OpenAI's mean and deviation."""
    crop = {"scale": (crop_scale, 1.0)} if train else None
    *steps, _, normalize = image_transform(size, train, aug_cfg=crop).transforms
    return Compose([*steps, data.ToNormalizedTensor(normalize.mean, normalize.std)])


class FacetDataset(Dataset):
    """Item i: image (3, H, H), its K texts, broken samples passed over; a function of (seed, i) alone.

    Texts: rows (K, D) of the bank, or the CLIP tokens (77,) of one of the captions. U:training/data.py:393-435.
    """

    def __init__(self, pairs, cfg: Config, size: int, seed: tuple[int, ...], bank=None, captions=(), tokenizer=None):
        self.pairs, self.cfg, self.seed, self.bank = pairs, cfg, seed, bank
        self.captions, self.tokenizer = captions, tokenizer
        self.view = view(size, True, cfg.crop_scale)
        self.centres = bank.centres[: bank.count] if cfg.centre and bank is not None else None

    def __len__(self) -> int:
        return len(self.pairs)

    def facets(self, key: str) -> Tensor:
        rows = self.bank[key] if self.centres is None else centred(self.bank[key], self.centres)
        return sample_facets(rows[list(self.cfg.rows)] if self.cfg.rows else rows, self.cfg.facets)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, list[data.Broken]]:
        broken: list[data.Broken] = []
        pair = data.read_or_next(self.pairs, int(i), broken)
        torch.default_generator.manual_seed(data.stable_hash(*self.seed, int(i)))  # CPU only: cheap
        image = self.view(pair.image)
        if self.bank is not None:
            return image, self.facets(pair.key), broken
        caption = pair.caption
        if self.captions:
            caption = self.captions[int(torch.randint(len(self.captions), (1,)))][pair.key]
        return image, self.tokenizer([caption])[0], broken


def collate(items: list) -> tuple[Tensor, Tensor, list[data.Broken]]:
    images, texts, broken = zip(*items, strict=True)
    return torch.stack(images), torch.stack(texts), [b for each in broken for b in each]


# ------------------------------------------------------------------------------------------------------ model and step


def forward_loss(model: nn.Module, images: Tensor, texts: Tensor, cfg: Config) -> Tensor:
    """Loss of a batch: images (B, 3, H, H); texts are rows (B, K, D) of the bank, or tokens (B, 77)."""
    with run.autocast(run.resolve_precision(cfg.precision, images.device), images.device):
        outputs = model(images) if cfg.method == "flame" else model(images, texts)
    if cfg.method == "clip":
        return mp_nce_loss(*outputs)  # one text an image: CLIP's loss
    image, scale, bias = outputs
    texts = texts.flatten(0, 1)
    if cfg.loss == "mp-sigmoid":
        return mp_sigmoid_loss(image, texts, scale, bias)
    return mp_nce_loss(image, texts, scale) + 0.0 * bias  # DistributedDataParallel wants a gradient, if zero, of all


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    lr: float,
    cfg: Config,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Learning rate, forward, backward, AdamW, clamp, in upstream's order; -> loss. U:training/train.py:90-207."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = forward_loss(model, *batch, cfg)
    if scaler is None:
        loss.backward()
        optimizer.step()
    else:
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    (model.module if isinstance(model, DistributedDataParallel) else model).clamp_logit_scale()
    return loss.detach()


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, steps, learning rates, samples, memory of the training step."""
    text_dim = 576 if cfg.model == "emoji" else 5120  # SmolLM2-135M, Mistral-Nemo
    model = create_model(cfg, text_dim)
    parameters = sum(p.numel() for p in model.parameters())
    mlp = sum(p.numel() for p in model.mm.parameters())
    samples = cfg.dataset_size or 8913
    per_epoch = samples // cfg.batch_size
    total = per_epoch * cfg.epochs
    if not total:
        raise ValueError(f"{samples:,} samples are less than one batch of {cfg.batch_size}")
    print(f"parameters         {parameters:,} (MLP {mlp:,}); no language model")
    print(f"samples            {samples:,} an epoch, {per_epoch * cfg.batch_size * cfg.epochs:,} in all")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    if cfg.method == "flame":
        drawn = len(cfg.rows) or 11
        print(f"texts              {cfg.facets} of {drawn} rows of {text_dim} numbers an image")
        print(
            f"bank               {samples * 11 * text_dim * 2 / 1e9:,.1f} GB where every image has captions of its own"
        )
    print(f"steps              {total:,} ({per_epoch:,} an epoch)")
    for step in sorted({0, min(cfg.warmup, total - 1), total // 2, total - 1}):
        print(f"learning rate      {schedule(cfg, step, total):.3e} at step {step:,}")
    side = model.visual.image_size[0]
    images = torch.zeros(2, 3, side, side)
    texts = torch.zeros(2, cfg.facets, text_dim)
    if cfg.method == "clip":
        texts = torch.ones(2, cfg.max_length, dtype=torch.long)
    fp32 = dataclasses.replace(cfg, precision="fp32")
    gib = 2**30
    activations = cli.activation_bytes(lambda: forward_loss(model, images, texts, fp32)) / 2
    activations *= cfg.batch_size / world_size / gib
    weights = 16 * parameters / gib
    print(
        f"memory estimate    {weights + activations:.1f} GiB a process in fp32 (autocast: up to half the activations;"
        " checkpointing: less)"
    )
    print(f"                   {weights:.1f} weights, gradients, AdamW; {activations:.1f} activations")


def open_texts(cfg: Config, pairs) -> tuple[Bank | AuthorsBank | None, list[dict[str, str]]]:
    """The bank, or the captions of the clip method; ValueError if a sample has none."""
    if cfg.method == "clip":
        captions = [read_captions(path) for path in cfg.captions]
        for path, found in zip(cfg.captions, captions, strict=True):
            missing = next((key for key in pairs.keys.tolist() if key not in found), None)
            if missing is not None:
                raise ValueError(f"{path} has no caption of sample {missing}, which is in {cfg.data}")
        return None, captions
    bank = open_bank(cfg.bank)
    bank.check(pairs.keys)
    if max(cfg.rows, default=0) >= bank.count or cfg.facets > bank.count:
        raise ValueError(f"{cfg.bank} has {bank.count} rows an image, too few for --rows and --facets")
    if cfg.centre and not isinstance(bank, Bank):
        raise ValueError("--centre needs a bank made by 'python -m flame.embed', which knows its centres")
    return bank, []


def main(cfg: Config) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    check(cfg, process.world_size)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check_inputs(cfg)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)

    # Data
    pairs = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    if len(pairs) < cfg.batch_size:
        raise ValueError(f"{cfg.data} holds {len(pairs):,} pairs, less than one batch of {cfg.batch_size}")
    if process.main and len(pairs) < (cfg.dataset_size or 0):
        print(f"{cfg.data} holds {len(pairs):,} pairs, fewer than --dataset-size {cfg.dataset_size:,}")
    bank, captions = open_texts(cfg, pairs)
    text_dim = bank.dim if bank is not None else cfg.embed_dim

    # Model, optimizer
    model = create_model(cfg, text_dim).to(process.device)
    model.visual.set_grad_checkpointing(cfg.grad_checkpointing)
    tokenizer = None
    if cfg.method == "clip":
        tokenizer = data.RememberingTokenizer(open_clip.SimpleTokenizer(context_length=cfg.max_length))
    groups = param_groups(model, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps, fused=True)
    scaler = torch.amp.GradScaler(process.device.type) if precision == "fp16" else None

    # Resume
    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
    if state["epoch"] >= cfg.epochs:
        if process.main:
            print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder
    if state.get("data", pairs.fingerprint) != pairs.fingerprint:
        raise ValueError(f"{folder} was trained on other data than {cfg.data} holds now: choose another --out")
    per_epoch = len(pairs) // cfg.batch_size
    total = per_epoch * cfg.epochs
    if cfg.cooldown > total:
        raise ValueError(f"--cooldown {cfg.cooldown} is longer than the {total} steps of the run")
    texts_of_curve = None
    if cfg.eval_every and process.main:
        texts_of_curve = text_features(model, cfg, process.device, run.DTYPES[precision], load=False)
        eval_set = open_set(cfg.eval_set, view_of(model), "classification")
        if bank is not None:
            classifier_of(texts_of_curve, eval_set)  # fails now if it must

    size = model.visual.image_size[0]
    saved = per_epoch * state["epoch"] + state["batch"]  # step of the last checkpoint
    log = run.RunLog(folder, cfg, process, step=saved)
    ddp = DistributedDataParallel(model, static_graph=True) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(epoch: int, batch: int) -> None:
        if process.main:
            checkpoints.save_checkpoint(
                folder / "checkpoint.pt",
                {
                    "epoch": epoch,
                    "batch": batch,
                    "state_dict": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    **({"scaler": scaler.state_dict()} if scaler is not None else {}),
                    "text_dim": text_dim,
                    "seconds": clock.read(),
                    "commit": commit,
                    "data": pairs.fingerprint,
                    "config": dataclasses.asdict(cfg),
                },
            )

    for epoch in range(state["epoch"], cfg.epochs):
        model.train()
        start = state["batch"] if epoch == state["epoch"] else 0
        broken = list(pairs.broken)
        dataset = FacetDataset(pairs, cfg, size, (cfg.seed, epoch), bank, captions, tokenizer)
        label = f"{folder.name} epoch {epoch + 1}/{cfg.epochs}"
        loader = data.epoch_loader(dataset, collate, cfg, process, dataset.seed, start)
        batches = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for batch, (images, texts, _) in enumerate(data.watch(batches, broken), start + 1):
            step = per_epoch * epoch + batch  # from 1
            images, texts = (x.to(process.device, non_blocking=True) for x in (images, texts))
            lr = schedule(cfg, step - 1, total)
            loss = train_step(ddp, (images, texts), optimizer, lr, cfg, scaler)
            if step % cfg.log_every == 0 or batch == 1:
                log.write(
                    step, epoch=epoch, seconds=clock.read(), lr=lr, loss=loss, logit_scale=model.logit_scale.exp(),
                    **({"logit_bias": model.logit_bias} if cfg.method == "flame" else {}),
                )  # fmt: skip
                run.check_loss(loss, step)
            if step - saved >= cfg.save_every and batch < per_epoch:
                save(epoch, batch)
                saved = step

        if texts_of_curve is not None and ((epoch + 1) % cfg.eval_every == 0 or epoch + 1 == cfg.epochs):
            with clock.paused():
                classifier = classifier_of(texts_of_curve, eval_set)
                top1 = zero_shot_top1(model, classifier, eval_set, process.device, run.DTYPES[precision])
            log.write(per_epoch * (epoch + 1), epoch=epoch, seconds=clock.read(), zero_shot_top1=top1)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if per_epoch * (epoch + 1) - saved >= cfg.save_every or epoch + 1 == cfg.epochs:
            save(epoch + 1, 0)
            saved = per_epoch * (epoch + 1)
    log.close()
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
