"""Train the codebook captioner: `python -m tldr_reduction.captioner PRESET [--overrides]`.

TL;DR (arXiv 2305.20087), section 3.1; authors' code showlab/datacentric.vlp@a488102, `V:` for its `vq_compress_model/`.
The captioner reads the image through a codebook; loss = loss_lm + loss_emb, on the noisy data. reduce.py uses it to
encode and cluster the images; finetune.py starts from it.
"""

import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from shared import cli, data, pretrained, run, windows
from tldr_reduction import training
from tldr_reduction.config import CAPTIONERS, CaptionerConfig, read_lines
from tldr_reduction.datasets import PairDataset, eval_transform
from tldr_reduction.model import (
    CodebookCaptioner,
    build,
    build_for,
    codebook_perplexity,
    keyword_codebook,
    rescaled,
    restart_unused,
    sampled_codebook,
)
from tldr_reduction.tokenizer import WordPiece

# ----------------------------------------------------------------------------------------------------------- codebook


@torch.no_grad()
def start_codebook(captioner: CodebookCaptioner, cfg: CaptionerConfig, pairs, process: run.Process) -> None:
    """Initialise the codebook by `codebook_init`: uniform (as built), xavier, data (image tokens), or keywords (their
    text embeddings, shifted and scaled to image tokens). Random draws depend only on the seed.
    """
    generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, "codebook"))
    weight = captioner.quantize.embedding.weight
    if cfg.codebook_init == "uniform":
        return
    if cfg.codebook_init == "xavier":
        weight.copy_(nn.init.xavier_uniform_(torch.empty(weight.shape), generator=generator))
        return
    codes_per_image = captioner.visual_encoder.pos_embed.shape[1] * cfg.width // cfg.code_dim
    wanted = -(-4 * cfg.num_codes // codes_per_image)
    if isinstance(pairs, windows.Windowed):  # items of the first process; its first window is shuffled
        own = (i for i in range(len(pairs)) if i // pairs.batch_size % process.world_size == 0)
        items = list(itertools.islice(own, wanted))
    else:
        items = torch.randperm(len(pairs), generator=generator)[:wanted].tolist()
    dataset = PairDataset(pairs, eval_transform(cfg.image_size), cfg.seed, cfg.max_words)
    images = dataset.normalise(torch.stack([dataset[i][1] for i in items]).to(process.device))
    tokens = torch.cat([captioner.visual_encoder(few).float() for few in images.split(64)]).reshape(-1, cfg.code_dim)
    if cfg.codebook_init == "data":
        weight.copy_(sampled_codebook(tokens, cfg.num_codes, generator))
    else:
        embed = text_embedder(cfg.keyword_model, cfg.code_dim)
        if cfg.keywords is not None:
            codebook = embed(read_lines(cfg.keywords, "--keywords")[: cfg.num_codes]).float()
        else:  # the first process reads all captions, the others wait
            found = keyword_codebook(windows.captions(pairs), cfg.num_codes, embed) if process.main else None
            codebook = run.broadcast(found, process)
        weight.copy_(rescaled(codebook.to(process.device), tokens))


def text_embedder(name: str, dim: int) -> Callable[[list[str]], Tensor]:
    """Return a function texts -> (n, dim): the mean last hidden state of a text encoder, mapped by a seeded random
    orthogonal matrix if its width is not `dim`."""
    from transformers import AutoModel, AutoTokenizer

    name = str(pretrained.minilm()) if name == "minilm" else name
    tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        means = []
        for first in range(0, len(texts), 256):
            batch = tokenizer(texts[first : first + 256], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            means.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        embedded = torch.cat(means)
        if embedded.shape[1] != dim:
            random = torch.randn(max(embedded.shape[1], dim), dim, generator=torch.Generator().manual_seed(0))
            embedded = embedded @ torch.linalg.qr(random).Q[: embedded.shape[1]]
        return embedded

    return embed


@torch.no_grad()
def restart_codes(captioner: CodebookCaptioner, used: Tensor, images: Tensor, epoch: int, cfg: CaptionerConfig) -> int:
    """Replace codes not used in the epoch by tokens of its last batch; returns their number."""
    tokens = run.gather(captioner.visual_encoder(images).float()).reshape(-1, cfg.code_dim)
    generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, epoch, "restart"))
    return restart_unused(captioner.quantize, used, tokens, generator)


def count_codes(used: Tensor, codes: Tensor) -> None:
    """Add the codes (B, L') of all ranks to the usage counts (K,) int64."""
    chosen = run.gather(codes).flatten()
    used.scatter_add_(0, chosen, torch.ones_like(chosen))  # `bincount` would wait for a GPU


# --------------------------------------------------------------------------------------------------------- the script


def train_step(
    model: nn.Module,
    inputs: list[Tensor],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: str = "fp32",
) -> tuple[dict[str, Tensor], Tensor]:
    """One optimizer step on (images, ids, mask[, `target_places`]); returns losses by name and codes (B, L')."""
    images, ids, mask, places = (*inputs, None)[:4]
    with run.autocast(precision, images.device):
        loss_lm, loss_emb, codes = model(images, ids, mask, return_codes=True, places=places)
    loss = loss_lm + loss_emb
    training.update(loss, optimizer, scaler)
    return {"loss": loss, "loss_lm": loss_lm, "loss_emb": loss_emb}, codes


def dry_run(cfg: CaptionerConfig, world_size: int = 1) -> None:
    """Print the plan of a run: sizes, steps, learning rates, memory."""
    model, batch = build(cfg, training.vocab_size(cfg)), training.two_samples(cfg.image_size, cfg.max_length)
    codes = (1 + (cfg.image_size // cfg.patch_size) ** 2) * cfg.width // cfg.code_dim
    rows = [("codes", f"{codes} an image, of {cfg.num_codes} with {cfg.code_dim} dimensions")]
    training.show_plan(cfg, world_size, model, lambda: model.train()(*batch), rows)


def train(cfg: CaptionerConfig, process: run.Process) -> Path:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    folder = run.RunFolder(cfg, process, epoch=0, batch=0)
    if folder.finished(epoch=cfg.epochs):
        return folder.path
    first, start = folder.state["epoch"], folder.state["batch"]
    pairs = training.pairs_of(cfg, process)
    data.check_pairs(pairs, cfg, folder.state, process)
    per_epoch = len(pairs) // cfg.batch_size

    # Tokenizer, model, optimizer
    precision, tokenizer = run.resolve_precision(cfg.precision, process.device), WordPiece(cfg.vocab)
    model = build_for(cfg, tokenizer).to(process.device)
    optimizer, scaler = training.optimizer_of(model, cfg, precision, process)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if not folder.resumed:
        training.start_from_elsewhere(model, cfg)
        start_codebook(model, cfg, pairs, process)
    used = folder.state.get("used", torch.zeros(cfg.num_codes, dtype=torch.long)).to(process.device)
    fixed = dict(data=pairs.fingerprint, vocab=training.vocab_of(tokenizer, cfg, folder))
    folder.start(per_epoch * first + start, per_epoch * cfg.epochs, len(pairs), **fixed)
    ddp = training.parallel(model, process)
    dataset, loader = training.training_batches(pairs, tokenizer, model, first, start, cfg, process)

    for epoch in range(first, cfg.epochs):
        model.train()
        batches, broken = training.of_epoch(loader, pairs, epoch, start, cfg, process)
        for batch, (_, *inputs, _) in enumerate(batches, start):
            step, lr = per_epoch * epoch + batch + 1, training.learning_rate(cfg, epoch, batch)
            training.begin_step(optimizer, lr, step, cfg, process)
            inputs = training.on_device(inputs, dataset, process.device)
            losses, codes = train_step(ddp, inputs, optimizer, scaler, precision)
            count_codes(used, codes)
            if step % cfg.log_every == 0 or batch == 0:
                usage = {"codes_used": (used > 0).sum()}
                usage["perplexity"] = codebook_perplexity(run.gather(codes), cfg.num_codes)
                folder.log(step, epoch=epoch, lr=lr, **run.over_ranks(losses), **usage)
            if folder.due(step) and batch + 1 < per_epoch:
                folder.save(step, epoch=epoch, batch=batch + 1, used=used.cpu())

        done, last, start = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs, 0
        if cfg.restart_codes and not last:
            folder.log(done, epoch=epoch, codes_restarted=restart_codes(model, used, inputs[0], epoch, cfg))
        used.zero_()
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0, used=used.cpu())
    folder.close(then=f"python -m tldr_reduction.reduce {cfg.data} --captioner {cfg.out} --out FOLDER")
    return folder.path


def main(cfg: CaptionerConfig) -> Path | None:
    """`train`, or --dry-run."""
    return training.main(cfg, train, dry_run)


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(CAPTIONERS)))
