"""Fine-tune a BLIP for retrieval: `python -m tldr_reduction.retrieval PRESET --init RUN [--overrides]`.

The headline numbers of TL;DR (arXiv 2305.20087) come from BLIPs that were pre-trained on the full or the reduced data
and fine-tuned like this on COCO or Flickr30K. The fine-tuning is stock BLIP's (salesforce/BLIP@056a169, `B:`, in
B:train_retrieval.py). All captions of an image count as its matches; samples with equal pixels are the same image, so
the data may have one sample per caption. `python -m tldr_reduction.eval RUN --rerank SET` then measures recall.
"""

from pathlib import Path

import torch
from torch import Tensor

from shared import cli, data, run
from tldr_reduction import training
from tldr_reduction.config import RETRIEVALS, RetrievalConfig
from tldr_reduction.datasets import PairDataset, pixel_hash
from tldr_reduction.model import build, build_for
from tldr_reduction.tokenizer import WordPiece, pre_caption


class ImageDataset(PairDataset):
    """`PairDataset` whose items have image_id as fourth entry, which is equal for all samples with the same pixels."""

    def __getitem__(self, i: int) -> tuple[int, Tensor, str, int, list[data.Broken]]:
        pair, broken = data.read_item(self.pairs, i, self.seed)
        caption, image_id = pre_caption(pair.caption, self.max_words), pixel_hash(pair.image) >> 1  # fits int64
        return int(i), self.transform(pair.image), caption, image_id, broken


def dry_run(cfg: RetrievalConfig, world_size: int = 1) -> None:
    """Print the plan of a run: sizes, steps, learning rates, memory."""
    model, batch = build(cfg, training.vocab_size(cfg)), training.two_samples(cfg.image_size, cfg.max_length)
    training.show_plan(cfg, world_size, model, lambda: model.train()(*batch, 0.4, torch.arange(2)))


def train(cfg: RetrievalConfig, process: run.Process) -> Path:
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
    fixed = dict(data=pairs.fingerprint, vocab=training.vocab_of(tokenizer, cfg, folder))
    folder.start(per_epoch * first + start, per_epoch * cfg.epochs, len(pairs), **fixed)
    ddp = training.parallel(model, process)
    dataset, loader = training.training_batches(
        pairs, tokenizer, model, first, start, cfg, process, dataset_type=ImageDataset
    )

    for epoch in range(first, cfg.epochs):
        model.train()
        batches, broken = training.of_epoch(loader, pairs, epoch, start, cfg, process)
        for batch, (_, *inputs, _) in enumerate(batches, start):
            step, lr = per_epoch * epoch + batch + 1, training.learning_rate(cfg, epoch, batch)
            training.begin_step(optimizer, lr, step, cfg, process)
            images, ids, mask, _, image_ids = training.on_device(inputs, dataset, process.device)
            alpha = training.alpha_ramp(epoch, batch, per_epoch, cfg.alpha, epochs=1)  # B:train_retrieval.py:44-47
            with run.autocast(precision, process.device):
                loss_ita, loss_itm = ddp(images, ids, mask, alpha, image_ids)
            loss = loss_ita + loss_itm
            training.update(loss, optimizer, scaler)
            if step % cfg.log_every == 0 or batch == 0:
                losses = run.over_ranks({"loss": loss, "loss_ita": loss_ita, "loss_itm": loss_itm})
                folder.log(step, epoch=epoch, lr=lr, logit_scale=1 / model.temp, **losses)
            if folder.due(step) and batch + 1 < per_epoch:
                folder.save(step, epoch=epoch, batch=batch + 1)

        done, last, start = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs, 0
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0)
    folder.close("--sets FOLDER --rerank FOLDER")
    return folder.path


def main(cfg: RetrievalConfig) -> Path | None:
    """`train`, or --dry-run."""
    return training.main(cfg, train, dry_run)


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(RETRIEVALS)))
