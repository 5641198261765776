"""Train FLAME, or a CLIP on the same captions: `python -m flame.train PRESET [--overrides]`.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. The paper's
contribution in this file: the texts of an image are K facets, drawn from the bank (bank.py) each time the image is
loaded (`sample_facets`, `FacetDataset`), and the loss has K positives per image (`batch_loss`). The LLM is never
loaded. Image tower and losses are in model.py, settings in config.py, evaluation during training in zeroshot.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import open_clip
import torch
from open_clip.transform import image_transform
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision.transforms import Compose

from flame.bank import AuthorsBank, Bank, centred, open_bank
from flame.config import PRESETS, SIZES, Config, check, check_inputs
from flame.embed import embed_captions  # noqa: F401  (offered here, too)
from flame.inmemory import InMemory
from flame.model import create_model, mp_nce_loss, mp_sigmoid_loss
from flame.recaption import read_captions
from flame.zeroshot import Curve
from shared import accumulate, cli, data, memory, run, windows
from shared.clip import cut_padding
from shared.errors import UserError
from shared.index import Strings
from shared.pretrained import efficientnet_lite0

# -------------------------------------------------------------------------------------------- schedules and optimizer


def cosine_lr(step: int, base_lr: float, warmup: int, total: int) -> float:
    """Linear to base_lr at step warmup - 1, then half a cosine to 0 at `total`. U:training/scheduler.py:43."""
    if step < warmup:
        return base_lr * (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) * base_lr


def const_lr(step: int, base_lr: float, warmup: int) -> float:
    """Linear to base_lr, then constant. U:training/scheduler.py:13."""
    return base_lr * (step + 1) / warmup if step < warmup else base_lr


def const_cooldown_lr(
    step: int, base_lr: float, warmup: int, total: int, cooldown: int, power: float = 1.0, end: float = 0.0
) -> float:
    """`const_lr`, then a polynomial decay to `end` over the last `cooldown` steps. U:training/scheduler.py:24."""
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
            spared = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
            (plain if spared else decayed).append(parameter)
    return [{"params": plain, "weight_decay": 0.0}, {"params": decayed, "weight_decay": weight_decay}]


# --------------------------------------------------------------------------------------------------------------- data


def view(size: int, train: bool, crop_scale: float = 0.9, statistics=memory.CLIP_STATISTICS):
    """RandomResizedCrop (bicubic, no flip) or resize of the short side and centre crop; mean and standard deviation are
    OpenAI's unless `statistics` gives others."""
    crop = {"scale": (crop_scale, 1.0)} if train else None
    *steps, _, _ = image_transform(size, train, aug_cfg=crop).transforms
    return Compose([*steps, data.ToNormalizedTensor(*statistics)])


def sample_facets(bank: Tensor, num: int = 6, generator: torch.Generator | None = None) -> Tensor:
    """(T, D) facets of an image -> (num, D), drawn without replacement, in random order. U:training/data.py:409-411."""
    if not 1 <= num <= len(bank):
        raise UserError(f"{num} of {len(bank)} facets cannot be drawn")
    return bank[torch.randperm(len(bank), generator=generator)[:num]]


class FacetDataset(Dataset):
    """Item i of a run: uint8 image (3, H, H), its texts, and the broken samples skipped; `normalise` is for batches.

    Texts are K facets (K, D) of the bank, or the CLIP tokens (L,) of one caption. U:training/data.py:393-435. An item
    depends only on seed, epoch and sample.
    """

    def __init__(
        self,
        pairs: data.Shards | data.TSV | windows.Windowed,
        cfg: Config,
        size: int,
        seed: int,
        bank: Bank | AuthorsBank | None = None,
        captions: Sequence[dict[str, str]] = (),
        tokenizer: Callable | None = None,
        statistics=memory.CLIP_STATISTICS,
    ):
        self.pairs, self.cfg, self.seed, self.bank = pairs, cfg, seed, bank
        self.captions, self.tokenizer = captions, tokenizer
        self.view, self.normalise = data.split_normalisation(view(size, True, cfg.crop_scale, statistics))
        self.centres = bank.centres[: bank.facets] if cfg.centre and bank is not None else None

    def __len__(self) -> int:
        return len(self.pairs)

    def facets(self, key: str) -> Tensor:
        """(K, D), drawn from `cfg.facet_ids`."""
        embeddings = self.bank[key] if self.centres is None else centred(self.bank[key], self.centres)
        ids = list(self.cfg.facet_ids)
        return sample_facets(embeddings[ids] if ids else embeddings, self.cfg.facets)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, list[data.Broken]]:
        pair, broken = data.read_item(self.pairs, i, self.seed)
        image = self.view(pair.image)
        if self.bank is not None:
            return image, self.facets(pair.key), broken
        caption = pair.caption
        if self.captions:
            choice = int(torch.randint(len(self.captions), (1,)))
            caption = self.captions[choice].get(pair.key)
            if caption is None:
                raise UserError(f"{self.cfg.captions[choice]} has no caption of sample {pair.key}")
        return image, self.tokenizer([caption])[0], broken


def collate(items: list) -> tuple[Tensor, Tensor, list[data.Broken]]:
    images, texts, broken = zip(*items, strict=True)
    return torch.stack(images), torch.stack(texts), [b for each in broken for b in each]


def on_device(images: Tensor, texts: Tensor, cfg: Config, device: torch.device) -> tuple[Tensor, Tensor]:
    """Move the images and texts of `collate` to the device, and cut padding from tokens."""
    images = images.to(device, non_blocking=True)
    return images, cut_padding(texts, device) if cfg.method == "clip" else texts.to(device, non_blocking=True)


# ------------------------------------------------------------------------------------------------------ model and step


def model_inputs(images: Tensor, texts: Tensor, cfg: Config) -> tuple[Tensor, ...]:
    """The model's inputs: images for FLAME, images and tokens for CLIP."""
    return (images,) if cfg.method == "flame" else (images, texts)


def batch_loss(outputs: tuple[Tensor, ...], texts: Tensor, cfg: Config) -> Tensor:
    """Loss of the model's outputs for a batch; texts are facets (B, K, D) of the bank, or the tokens of CLIP."""
    if cfg.method == "clip":
        return mp_nce_loss(*outputs)  # one text per image: CLIP's loss
    image, scale, *bias = outputs
    loss = mp_sigmoid_loss if cfg.loss == "mp-sigmoid" else mp_nce_loss
    return loss(image, texts.flatten(0, 1), scale, *bias)


def train_step(
    model: nn.Module,
    batch: tuple[Tensor, Tensor],
    optimizer: torch.optim.Optimizer,
    lr: float,
    cfg: Config,
    precision: str = "fp32",
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Learning rate, forward, backward, AdamW, clamp, in upstream's order; -> loss. U:training/train.py:90-207."""
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    images, texts = batch
    outputs, backward = accumulate.forward(model, model_inputs(images, texts, cfg), cfg, precision)
    loss = batch_loss(outputs, texts, cfg)
    backward(scaler.scale(loss))
    scaler.step(optimizer)
    scaler.update()
    (model.module if isinstance(model, DistributedDataParallel) else model).clamp_logit_scale()
    return loss.detach()


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print the plan of a run: parameters, steps, learning rates, samples, memory of the training step."""
    text_dim = 5120 if cfg.model.startswith("ViT-") else 576  # Mistral-Nemo, SmolLM2-135M
    model = create_model(cfg, text_dim)
    parameters = sum(p.numel() for p in model.parameters())
    mlp = sum(p.numel() for p in model.mm.parameters())
    try:
        samples = data.planned_size(cfg)
    except UserError:
        samples = SIZES.get(cfg.data, 0)
    per_epoch = samples // cfg.batch_size
    total = per_epoch * cfg.epochs
    if samples and not total:
        raise UserError(f"{samples:,} samples are less than one batch of {cfg.batch_size}")
    side = model.visual.image_size[0]
    images, texts, about_texts = torch.zeros(2, 3, side, side), torch.ones(2, cfg.max_length, dtype=torch.long), []
    if cfg.method == "flame":
        texts = torch.zeros(2, cfg.facets, text_dim)
        gigabytes = samples * 11 * text_dim * 2 / 1e9
        about_texts = [
            ("texts", f"{cfg.facets} of {len(cfg.facet_ids) or 11} facets an image, each of {text_dim} numbers"),
            *([("bank", f"{gigabytes:,.1f} GB if every image has captions of its own")] if samples else []),
        ]
    inputs, checkpointed = model_inputs(images, texts, cfg), model.visual if cfg.grad_checkpointing else None
    activations = cli.activation_bytes(lambda: batch_loss(model(*inputs), texts, cfg), checkpointed) / 2 / 2**30
    activations *= cfg.batch_size / world_size / cfg.accumulate
    weights = 16 * parameters / 2**30
    cli.show_plan(
        [
            ("parameters", f"{parameters:,} (MLP {mlp:,}); no language model"),
            ("samples", f"{samples:,} an epoch, {total * cfg.batch_size:,} in all" if samples else "all of --data"),
            cli.disk_row(samples, parameters),
            cli.batch_row(cfg, world_size),
            *about_texts,
            *([cli.step_row(total, per_epoch)] if samples else []),
            *cli.rate_rows(lambda step: f"{schedule(cfg, step, total):.3e}", cfg.warmup, total),
            ("memory estimate", f"{weights + activations:.1f} GiB a process in fp32 (autocast: half the activations):"),
            ("", f"{weights:.1f} weights, gradients, AdamW; {activations:.1f} activations"),
        ]
    )


def training_batches(
    cfg: Config, pairs, sources: tuple, tower: nn.Module, process: run.Process, epochs: range, start: int
) -> tuple[Iterable, Callable]:
    """(batches of these epochs, from batch `start` of the first; function that normalises their images on the
    device). `sources`: the texts' bank, or captions and tokenizer, as `open_texts` returns them."""
    if cfg.keep_in_memory:
        dataset = InMemory(pairs, cfg, tower, process, *sources)
        return dataset.batches(epochs, start), dataset.normalise
    statistics = getattr(tower, "statistics", memory.CLIP_STATISTICS)
    dataset = FacetDataset(pairs, cfg, tower.image_size[0], cfg.seed, *sources, statistics)
    return windows.training_batches(dataset, collate, cfg, process, epochs, start), dataset.normalise


def open_texts(
    cfg: Config, pairs: data.Shards | data.TSV | windows.Windowed, main: bool = True
) -> tuple[Bank | AuthorsBank | None, list[dict[str, str]], Callable | None]:
    """(bank, [], None), or for the clip method (None, captions by sample key, tokenizer).

    UserError if a sample has no text, the bank lacks the facets to draw from, or, in the main process only, a caption
    file has changed since the bank was made. With windows, a missing text is found only when its sample is read.
    """
    keys = Strings.of([]) if isinstance(pairs, windows.Windowed) else pairs.keys
    if cfg.method == "clip":
        captions = [read_captions(path) for path in cfg.captions]
        for path, found in zip(cfg.captions, captions, strict=True):
            missing = next((key for key in keys if key not in found), None)
            if missing is not None:
                raise UserError(f"{path} has no caption of sample {missing}, which is in {cfg.data}")
        return None, captions, data.RememberingTokenizer(open_clip.SimpleTokenizer(context_length=cfg.max_length))
    bank = open_bank(cfg.bank)
    bank.check(keys)  # also sorts its keys, once before the loader processes fork and share them
    if main and isinstance(bank, Bank):
        bank.check_captions()
    if max(cfg.facet_ids, default=0) >= bank.facets or cfg.facets > bank.facets:
        raise UserError(f"{cfg.bank} has {bank.facets} facets an image, too few for --facet-ids and --facets")
    if (cfg.centre or cfg.keep_in_memory) and not isinstance(bank, Bank):
        raise UserError("--centre and --keep-in-memory need a bank made by 'python -m flame.embed'")
    return bank, [], None


def open_model(cfg: Config, text_dim: int) -> nn.Module:
    """The model of a configuration; a locked trunk gets its pretrained weights."""
    model = create_model(cfg, text_dim)
    if cfg.lock_image:
        model.visual.trunk.load_state_dict(efficientnet_lite0().state_dict())
        model.visual.lock()
    model.visual.set_grad_checkpointing(cfg.grad_checkpointing)
    return model


def distributed(model: nn.Module, cfg: Config) -> DistributedDataParallel:
    """Wrap the model so that gradients are averaged over processes; `ln_post` and `proj` of the ViT get none, as
    upstream.

    A static graph allows such unused parameters, but averages gradients in the first backward pass of a step; with
    micro-batches, later passes follow.
    """
    return DistributedDataParallel(model, static_graph=cfg.accumulate == 1, find_unused_parameters=cfg.accumulate > 1)


def main(cfg: Config) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    check(cfg, process.world_size)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check_inputs(cfg)
    precision = run.resolve_precision(cfg.precision, process.device)

    # Images, texts, model, optimizer; from the checkpoint if there is one
    pairs = windows.open_pairs(cfg, process)
    per_epoch = len(pairs) // cfg.batch_size
    total = per_epoch * cfg.epochs
    bank, *_ = sources = open_texts(cfg, pairs, process.main)
    text_dim = cfg.embed_dim if bank is None else bank.dim
    model = open_model(cfg, text_dim).to(process.device)
    optimizer = torch.optim.AdamW(param_groups(model, cfg.weight_decay), lr=cfg.lr, **cfg.adamw(), fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    data.check_pairs(pairs, cfg, folder.state, process)
    if cfg.cooldown > total:
        raise UserError(f"--cooldown {cfg.cooldown} is longer than the {total} steps of the run")
    curve = Curve(model, cfg, process.device, run.DTYPES[precision]) if cfg.eval_every and process.main else None
    first, start = folder.state["epoch"], folder.state["batch"]
    folder.check_same("bank", digest := getattr(bank, "digest", None), f"with another bank than {cfg.bank} is")
    folder.start(per_epoch * first + start, total, len(pairs), text_dim=text_dim, data=pairs.fingerprint, bank=digest)
    ddp = distributed(model, cfg) if process.world_size > 1 else model
    epochs = range(first, cfg.epochs)
    loader, normalise = training_batches(cfg, pairs, sources, model.visual, process, epochs, start)

    for epoch in epochs:
        model.train()
        broken = list(pairs.broken)
        label = f"{folder.path.name} epoch {epoch + 1}/{cfg.epochs}"
        batches = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for batch, (images, texts, _) in enumerate(data.collect_broken(batches, broken), start + 1):
            step = per_epoch * epoch + batch  # from 1
            lr = schedule(cfg, step - 1, total)
            images, texts = on_device(images, texts, cfg, process.device)
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # for dropout: a resumed run is equal
            loss = train_step(ddp, (normalise(images), texts), optimizer, lr, cfg, precision, scaler)
            if step % cfg.log_every == 0 or batch == 1:
                bias = {} if model.logit_bias is None else {"logit_bias": model.logit_bias}
                folder.log(step, epoch=epoch, lr=lr, loss=loss, logit_scale=model.logit_scale.exp(), **bias)
            if folder.due(step) and batch < per_epoch:
                folder.save(step, epoch=epoch, batch=batch)

        done, last, start = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs, 0
        if curve is not None and ((epoch + 1) % cfg.eval_every == 0 or last):
            with folder.evaluation(done, epoch=epoch, batch=per_epoch):
                top1 = curve.top1()
            folder.log(done, epoch=epoch, zero_shot_top1=top1)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0)
    folder.close("--sets FOLDER")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
