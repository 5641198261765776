"""A-CLIP's training, captions and suite against the authors': `pytest tests/parity/test_attentive_mask_clip.py
--upstream PATH`, a clone of microsoft/A-CLIP@0e51942. Its parts are in tests/adapters/attentive_mask_clip.py.
"""

import ast
import contextlib
import copy
import inspect
import json
import re
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import clip_benchmark.datasets
import numpy as np
import open_clip
import pytest
import torch
from torchvision import transforms

from attentive_mask_clip import model, pack_yfcc, suite, train
from tests.adapters.attentive_mask_clip import (
    HIDDEN,
    JOINT,
    OUT,
    TEXT,
    TRAIN,
    VIT,
    load,
    on_cpu,
    our_towers,
    slip_of,
    twins,
)

from . import Table, clone_of, printed, seeded, trajectory  # noqa: F401  (seeded: autouse)

WORDS = {**TEXT, "context_length": 24, "vocab_size": 49408}


@pytest.fixture(scope="module")
def up(request):
    path = clone_of(request, "microsoft/A-CLIP", "0e51942")
    with on_cpu():
        yield load(path)


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "A-CLIP, microsoft/A-CLIP@0e51942")


def test_trajectory(up, table):
    """Two epochs of their train(), with the schedules and the optimizer of their main(), against our training step.

    Inputs: their crops and boxes of a shard's images, tokens of open_clip; no colour jitter, since GaussianBlur and
    Solarize are missing in the release.
    Replaced: `.cuda()` does nothing; the blocks of the installed timm get the attributes and the unfused attention of
    0.5.4; torchvision's functional_tensor is its private successor; the SSL heads are narrower, the grid is theirs. In
    float64, torch's LayerNorm replaces theirs, which computes in float32. In float32 the curves diverge when a rounding
    error makes one side keep another block of patches; with this order of samples, not in the first 10 steps.
    """
    side, batch_size, epochs = 28, 8, 2
    steps = trajectory.STEPS // epochs
    pairs, _, captions = trajectory.shard(side)
    tokens = open_clip.SimpleTokenizer(context_length=24)(captions)
    crop = up.datasets.GetThreeRandomResizedCrop(side, scale=(0.5, 1.0))
    starts, batches = twins(up, text=WORDS, hidden=40, out=16), []
    for rows in trajectory.orders(len(pairs), batch_size, epochs * steps, seed=1):
        crops_, boxes = zip(*(zip(*crop(pairs.read(int(row)).image), strict=True) for row in rows), strict=True)
        views = torch.stack([torch.stack([transforms.functional.to_tensor(x) for x in three]) for three in crops_])
        batches.append((list((2 * views - 1).unbind(1)), torch.tensor(boxes), tokens[rows]))

    def in_precision(dtype):
        return [([view.to(dtype) for view in views], boxes, tokens) for views, boxes, tokens in batches]

    args = SimpleNamespace(**{**TRAIN, "batch_size": batch_size}, lr_end=1e-5, lr_start=1e-6, momentum_ema=0.996)

    def theirs(dtype):
        network, loader = copy.deepcopy(starts[0]).to(dtype), in_precision(dtype)
        optimizer, scaler = up.main.get_optim(args, network), torch.amp.GradScaler("cpu", enabled=False)
        lrs = up.utils.cosine_scheduler(args.lr, args.lr_end, epochs, steps, 1, args.lr_start)
        momenta = up.utils.cosine_scheduler(args.momentum_ema, 1, epochs, steps, 0)
        norm = torch.nn.LayerNorm if dtype == torch.float64 else up.models.LayerNorm
        with contextlib.redirect_stdout(None), mock.patch.object(up.models.LayerNorm, "forward", norm.forward):
            for epoch in range(epochs):
                part, criterion = loader[epoch * steps :][:steps], up.losses.ACLIPLoss()
                up.main.train(part, network, criterion, optimizer, scaler, epoch, lrs, momenta, args)

    def ours(dtype):
        network = copy.deepcopy(starts[1]).to(dtype)
        cfg = train.Config(
            simclr_pair="same", weight_decay=args.wd, lr=args.lr, min_lr=args.lr_end, warmup_lr=args.lr_start,
            epochs=epochs, batch_size=batch_size, ema_momentum=args.momentum_ema, precision="fp32",
        )  # fmt: skip
        groups = train.parameter_groups(network, args.wd)
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, **cfg.adamw, fused=True)
        for batch, lr, momentum in zip(in_precision(dtype), *train.schedules(cfg, steps), strict=True):
            yield train.train_step(network, batch, adamw, torch.amp.GradScaler(enabled=False), lr, momentum, cfg)

    curves = trajectory.run(theirs, ours)
    trajectory.compare(table, "attentive_mask_clip", up.main.train, "train.train_step", curves, late=0.3, double=1e-5)


def test_checkpoint(up, table, tmp_path):
    theirs, _ = twins(up)
    state = {f"module.{name}": value for name, value in theirs.state_dict().items()}
    args = up.main.argparse.Namespace(**TRAIN)
    content = {
        "epoch": 3,
        "state_dict": state,
        "optimizer": {"param_groups": [{"lr": np.float64(1e-5)}]},
        "scaler": {},
        "best_acc": 0.0,
        "args": args,
    }
    up.utils.save_on_master(content, False, str(tmp_path))
    ours = model.ACLIP(ssl_hidden=HIDDEN, ssl_dim=OUT, **our_towers(VIT, TEXT, JOINT))
    model.load_checkpoint(ours, tmp_path / "checkpoint.pt")
    values = theirs.state_dict(), ours.state_dict()
    function = up.utils.save_on_master
    table.compare("a checkpoint of theirs, loaded strictly", function, "model.load_checkpoint", *values, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ captions and suite


def test_cleaning_of_captions(up):
    """Against the two regular expressions in their make_dataset.py, a script that cannot be imported."""
    html, urls = re.findall(r"= re\.compile\('(.+?)'\)\n", (up.root / "make_dataset.py").read_text())
    for text in (
        "Sunset\nTaken in Rome.\n\nWith my brother...", "<b>a</b> <i>b</i> <a href='http://x.y'>c</a> <abbr>d</abbr>",
        "see http://x.y/z?a=1, https://x.y or www.x.y www", "<a\nhref='x'>y</a> <B>z</B> < a > <bold>", "C++ & 50% off",
    ):  # fmt: skip
        assert pack_yfcc.clean(text) == " ".join(re.sub(urls, "", re.sub(html, "", text)).split())


def test_what_the_suite_reports(up):
    source = inspect.getsource(up.eval_zeroshot.main)
    listed = re.search(r"if d in (\[.*?\]):\s+metric = mean_per_class", source)[1]
    for kind, names in {
        "mean_per_class": ast.literal_eval(listed), "top1_top5": ["kinetics700_frames"], "roc_auc": ["hateful_memes"],
    }.items():  # fmt: skip
        assert [name for name in suite.SUITE if suite.reported(name) == kind] == names


def test_suite_of_slip(up):
    """All sets have names and templates, and class names can be put into the order of CLIP-benchmark."""
    slip = slip_of(up)
    files = "dataset_catalog", "labels", "templates"
    catalog, labels, templates = (json.loads((slip.root / f"{name}.json").read_text()) for name in files)
    assert list(catalog) == list(suite.SUITE) and set(suite.SUITE) <= set(labels) & set(templates)
    known = json.loads((Path(clip_benchmark.datasets.__file__).parent / "en_classnames.json").read_text())
    known["caltech101"], checked = known["caltech101_vtab"], []
    for name, benchmark in suite.SUITE.items():
        if ours := known.get((benchmark or "").rpartition("/")[2]):
            entries = [[entry] if isinstance(entry, str) else entry for entry in labels[name]]
            for own, synonyms in zip(ours, suite.in_order_of(ours, entries, name), strict=True):
                assert suite.plain(own) in map(suite.plain, synonyms), name
            checked.append(name)
    assert {"imagenet", "pets", "caltech101", "kitti_distance", "clevr_counts", "fer2013"} <= set(checked)
