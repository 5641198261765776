"""FLAME's training against the authors': `pytest tests/parity/test_flame.py --upstream PATH`, a clone of
MIV-XJTU/FLAME@4d2b9a9. Its parts are in tests/adapters/flame.py.
"""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from flame import config, llm, train
from tests.adapters.flame import Words, authors, flags, like, their_steps, tiny

from . import Table, clone_of, printed, seeded, trajectory  # noqa: F401  (seeded: autouse)


@pytest.fixture(scope="module")
def up(request):
    with authors(clone_of(request, "MIV-XJTU/FLAME", "4d2b9a9")) as modules:
        yield modules


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "FLAME, MIV-XJTU/FLAME@4d2b9a9:src/")


def test_trajectory(up, table):
    """Their train_one_epoch, with optimizer, schedule and loss as their main() makes them, against our training step.

    Four epochs; texts are facets of the shard's captions, embedded by a random language model and drawn for each batch.
    Replaced: their model has no language model, since training does not use it; their loader `training.data`, which
    needs pandas and wids, is a list of batches.
    """
    epochs, batch_size = 4, 32
    per_epoch = trajectory.STEPS // epochs
    pairs, pixels, captions = trajectory.shard(24)
    sizes = dict(hidden_size=20, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    lm = LlamaModel(LlamaConfig(vocab_size=3000, **sizes, initializer_range=0.3)).eval()
    prompts = llm.read_prompts(up.root / "training/embed_cc3m_mask.py")
    bank = llm.embed_captions(llm.FrozenLLM(lm, Words()), captions, captions, captions, prompts, batch_size=64)
    rows = trajectory.orders(len(pairs), batch_size, epochs * per_epoch)
    facets = [torch.stack([train.sample_facets(bank[row]) for row in batch]) for batch in rows]
    start = tiny()
    cfg = config.Config(warmup=20, epochs=epochs, batch_size=batch_size, lr=1e-3, precision="fp32")
    args = flags(warmup=cfg.warmup, epochs=epochs, batch_size=batch_size, lr=cfg.lr)

    def batches(dtype):
        return ((pixels[batch].to(dtype), texts.to(dtype)) for batch, texts in zip(rows, facets, strict=True))

    def theirs(dtype):
        their_steps(up, like(up, start).to(dtype), trajectory.Epochs(batches(dtype), per_epoch, batch_size), args)

    def ours(dtype):
        network = copy.deepcopy(start).to(dtype)
        groups = train.parameter_groups(network, cfg.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw, fused=True)
        scaler = torch.amp.GradScaler(enabled=False)
        for step, batch in enumerate(batches(dtype)):
            lr = train.learning_rate(cfg, step, epochs * per_epoch)
            yield train.train_step(network, batch, adamw, scaler, lr, cfg)["loss"]

    where = f"{table.where(up.train.train_one_epoch)}, training/main.py:308"
    trajectory.compare(table, "flame", where, "train.train_step", trajectory.run(theirs, ours))
