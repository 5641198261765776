"""Fine-tune the captioner on clean captions: `python -m tldr_reduction.finetune PRESET --init RUN [--overrides]`.

TL;DR (arXiv 2305.20087), section 3.2; authors' code showlab/datacentric.vlp@a488102:vq_compress_model/train_caption.py,
which is BLIP's. reduce.py generates captions with the fine-tuned captioner.
"""

from pathlib import Path

from shared import cli, data, run
from tldr_reduction import training
from tldr_reduction.config import FINETUNES, FinetuneConfig
from tldr_reduction.model import build, build_for
from tldr_reduction.tokenizer import PROMPT, WordPiece


def dry_run(cfg: FinetuneConfig, world_size: int = 1) -> None:
    """Print the plan of a run: sizes, steps, learning rates, memory."""
    model, batch = build(cfg, training.vocab_size(cfg)), training.two_samples(cfg.image_size, cfg.max_length)
    training.show_plan(cfg, world_size, model, lambda: model.train()(*batch))


def train(cfg: FinetuneConfig, process: run.Process) -> Path:
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
    prompt_length = len(tokenizer.prompt_ids(PROMPT)) - 1
    model = build_for(cfg, tokenizer).to(process.device)
    optimizer, scaler = training.optimizer_of(model, cfg, precision, process)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if not folder.resumed:
        training.start_from_elsewhere(model, cfg)
    fixed = dict(data=pairs.fingerprint, vocab=training.vocab_of(tokenizer, cfg, folder))
    folder.start(per_epoch * first + start, per_epoch * cfg.epochs, len(pairs), **fixed)
    ddp = training.parallel(model, process)
    dataset, loader = training.training_batches(pairs, tokenizer, model, first, start, cfg, process, PROMPT)

    for epoch in range(first, cfg.epochs):
        model.train()
        batches, broken = training.of_epoch(loader, pairs, epoch, start, cfg, process)
        for batch, (_, *inputs, _) in enumerate(batches, start):
            step, lr = per_epoch * epoch + batch + 1, training.learning_rate(cfg, epoch, batch)
            training.begin_step(optimizer, lr, step, cfg, process)
            images, ids, mask, places = training.on_device(inputs, dataset, process.device, prompt_length)
            with run.autocast(precision, process.device):
                loss_lm, loss_emb = ddp(images, ids, mask, prompt_length, places=places)
            loss = loss_lm + loss_emb
            training.update(loss, optimizer, scaler)
            if step % cfg.log_every == 0 or batch == 0:
                losses = run.over_ranks({"loss": loss, "loss_lm": loss_lm, "loss_emb": loss_emb})
                folder.log(step, epoch=epoch, lr=lr, **losses)
            if folder.due(step) and batch + 1 < per_epoch:
                folder.save(step, epoch=epoch, batch=batch + 1)

        done, last, start = per_epoch * (epoch + 1), epoch + 1 == cfg.epochs, 0
        data.report_broken(broken, process, f"epoch {epoch + 1}")
        if folder.due(done) or last:
            folder.save(done, epoch=epoch + 1, batch=0)
    folder.close(then=f"python -m tldr_reduction.reduce FOLDER --caption-model {cfg.out} --out FOLDER")
    return folder.path


def main(cfg: FinetuneConfig) -> Path | None:
    """`train`, or --dry-run."""
    return training.main(cfg, train, dry_run)


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(FINETUNES)))
