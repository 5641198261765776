"""TL;DR's training against the authors': `pytest tests/parity/test_tldr_reduction.py --upstream PATH`, a clone of
showlab/datacentric.vlp@a488102. Its parts are in tests/adapters/tldr_reduction.py.
"""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from tldr_reduction_ports import build_vocab

from tests.adapters import Case
from tests.adapters.tldr_reduction import SEP, authors, our_captioner, settings, their_model, towers
from tldr_reduction import model, train
from tldr_reduction.config import CaptionerConfig
from tldr_reduction.tokenizer import WordPiece, pre_caption

from . import Table, clone_of, printed, run_block, run_line, seeded, trajectory  # noqa: F401  (seeded: autouse)


@pytest.fixture(scope="module")
def up(request):
    with authors(clone_of(request, "showlab/datacentric.vlp", "a488102")) as modules:
        yield modules


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "TL;DR, showlab/datacentric.vlp@a488102")


class Words:
    """Our tokenizer with the interface of transformers', which pads to the full length."""

    def __init__(self, words: WordPiece):
        self.words, self.bos_token_id, self.pad_token_id = words, words.dec, words.pad

    def __call__(self, captions, max_length, **_):
        parts = [F.pad(x, (0, max_length - x.shape[1])) for x in self.words(captions, max_length)]
        return SimpleNamespace(to=lambda _: SimpleNamespace(input_ids=parts[0], attention_mask=parts[1]))


def test_trajectory(up, table, tmp_path):
    """Four epochs of the body of their main()'s loop, which calls their train(), against our training step.

    Replaced: transformers 4.15's base class and outputs, ruamel.yaml, their data package (missing in their clone) and
    the process group's barrier by stand-ins; BERT's tokenizer by ours, with words of the shard, padded as theirs; the
    sizes that their constructor fixes. Towers without influence on the loss are left out.
    """
    epochs, batch_size = 4, 16
    per_epoch = trajectory.STEPS // epochs
    _, pixels, captions = trajectory.shard(32)
    captions = [pre_caption(caption) for caption in captions]
    (tmp_path / "vocab.txt").write_text("\n".join(build_vocab(captions)), encoding="utf-8")
    words = WordPiece(tmp_path / "vocab.txt")
    network = model.CodebookCaptioner(*towers(32, 32, 32, 4, len(words), 30), model.VectorQuantizer(40, 32))
    start = settings(network, 4) | {"bos_token_id": words.dec, "sep_token_id": SEP, "beta": 0.25, "legacy": 1}
    case, kind = Case(tmp_path, start), up.blip_pretrain_vq_compress.BLIP_Pretrain
    starts = their_model(up, kind, case, Words(words)), our_captioner(case)
    rows = trajectory.orders(len(captions), batch_size, epochs * per_epoch)
    cfg = CaptionerConfig(epochs=epochs, batch_size=batch_size, lr=1e-3, warmup=20, lr_decay_rate=0.8, precision="fp32")
    config = dict(
        laion_path="", warmup_steps=cfg.warmup, warmup_lr=1e-6, init_lr=cfg.lr, min_lr=cfg.min_lr, alpha=0.4,
        lr_decay_rate=cfg.lr_decay_rate, weight_decay=cfg.weight_decay, max_epoch=epochs,
    )  # fmt: skip

    def batches(dtype):
        return ((pixels[batch].to(dtype), [captions[row] for row in batch]) for batch in rows)

    def theirs(dtype):
        module, network = up.pretrain_vq_compress, copy.deepcopy(starts[0]).to(dtype)
        loader = trajectory.Epochs(batches(dtype), per_epoch, batch_size)
        loader.sampler = SimpleNamespace(set_epoch=lambda _: None)
        names = dict(config=config, model=network, args=SimpleNamespace(output_dir=str(tmp_path)), device="cpu")
        names |= dict(model_without_ddp=network, data_loader=loader, dist=mock.Mock())
        names["optimizer"] = run_line(module, "optimizer", **names)
        for epoch in range(epochs):
            run_block(module, "range(start_epoch, config['max_epoch'])", epoch=epoch, **names)

    def ours(dtype):
        network, scaler = copy.deepcopy(starts[1]).to(dtype), torch.amp.GradScaler(enabled=False)
        trained, decay = list(network.parameters()), cfg.weight_decay
        optimizer = torch.optim.AdamW(trained, lr=cfg.lr, weight_decay=decay, fused=True)
        for step, (images, texts) in enumerate(batches(dtype)):
            optimizer.param_groups[0]["lr"] = train.learning_rate(cfg, *divmod(step, per_epoch))
            yield train.train_step(network, (images, words(texts)[0]), optimizer, scaler, cfg)

    where = f"{table.where(up.pretrain_vq_compress.train)}, vq_compress_model/pretrain_vq_compress.py:125"
    trajectory.compare(table, "tldr_reduction", where, "train.train_step", trajectory.run(theirs, ours))
