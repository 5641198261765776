"""NMTune's tuning against the authors': `pytest tests/parity/test_nmtune.py --upstream PATH`, a clone of
Hhhhhhao/Noisy-Model-Learning@f249dce. Its parts are in tests/adapters/nmtune.py.
"""

import copy

import pytest
import torch

from nmtune import config, model, train
from shared import tars
from tests.adapters.nmtune import ARGS, Stacked, Toy, authors, their_run

from . import Table, clone_of, printed, seeded, trajectory  # noqa: F401  (seeded: autouse)


@pytest.fixture(scope="module")
def up(request):
    with authors(clone_of(request, "Hhhhhhao/Noisy-Model-Learning", "f249dce")) as modules:
        yield modules


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "NMTune, Hhhhhhao/Noisy-Model-Learning@f249dce")


def test_trajectory(up, table):
    """Eight epochs of their nml_tune against ours. Features are pixels of a shard, classes are groups of emoji.

    The two views are two crops; both sides also use the short last batch of an epoch.
    Replaced: `.cuda()` does nothing; the encoder is the identity; their package of data sets and their evaluation after
    an epoch are stubs, and so are timm, clip and open_clip, of which their clone has copies.
    """
    epochs, batch_size, side = 8, 41, 8
    pairs, pixels, _ = trajectory.shard(side + 2)
    groups = [about["group"] for _, about in tars.descriptions([str(trajectory.SHARD)])]
    names = sorted(set(groups))
    labels = torch.tensor([names.index(group) for group in groups])
    batches = []
    for batch in (batch for _ in range(epochs) for batch in torch.randperm(len(pairs)).split(batch_size)):
        corners = torch.randint(0, 3, (2, 2)).tolist()
        views = tuple(pixels[batch, :, y : y + side, x : x + side].flatten(1) for y, x in corners)
        batches.append((views, labels[batch]))
    length, dim = len(batches) // epochs, 3 * side**2
    start = model.NMTuneHead(dim, len(names))
    flags = dict(epochs=epochs, batch_size=batch_size, warmup_length=20)

    def loader(dtype):
        return trajectory.Epochs(((tuple(v.to(dtype) for v in vs), y) for vs, y in batches), length, batch_size)

    def theirs(dtype):
        with trajectory.default_dtype(dtype):
            their_run(up, "nml_tune", loader(dtype), start.state_dict(), Toy(dim), len(names), **flags)

    def ours(dtype):
        head = copy.deepcopy(start).to(dtype)
        cfg = config.Config(epochs=epochs, lr=ARGS["lr"], weight_decay=ARGS["wd"], warmup=flags["warmup_length"])
        train.tune(cfg, head, Stacked(loader(dtype)), views=2)

    curves = trajectory.run(theirs, ours)
    trajectory.compare(table, "nmtune", up.nml_tune.nml_tune, "train.tune", curves)
