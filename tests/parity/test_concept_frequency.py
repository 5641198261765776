"""Concept frequency against the authors' published files and, in training, against open_clip's trainer: `pytest
tests/parity/test_concept_frequency.py --upstream PATH`, a clone of bethgelab/frequency_determines_performance@11ef009.
Its parts are in tests/adapters/concept_frequency.py.
"""

import copy
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch

from concept_frequency import statistics, train
from concept_frequency.config import Config
from concept_frequency.published.files import BINS, Results
from shared import clip
from shared.clip import without_padding
from tests.adapters.concept_frequency import function_of, module

from . import Table, clone_of, import_beside, printed, race, run_block, trajectory


@pytest.fixture(scope="module")
def table(request):
    root = clone_of(request, "bethgelab/frequency_determines_performance", "11ef009")
    yield from printed(request, Table(root), "Concept frequency, bethgelab/frequency_determines_performance@11ef009")


@pytest.mark.parametrize(("task", "prompts"), [("classification", "class"), ("retrieval", "t2i_k=10")])
def test_curves(table, task, prompts):
    notebook = {
        "classification": "zero_shot_integrated_search_results",
        "retrieval": "retrieval_integrated_search_results",
    }[task]
    place = {"classification": "zero_shot_evaluations", "retrieval": "retrieval_evaluations"}[task]
    kept, quiet = {}, SimpleNamespace(path=os.path, makedirs=lambda *a, **k: None)
    function = function_of(
        table.root / f"notebooks/{notebook}.ipynb", "save_plotting_info", os=quiet, json=json, np=np,
        pickle=SimpleNamespace(dump=lambda value, file: kept.update(value)), results_dir=str(table.root / place),
        search_counts_dir=str(table.root / "search_counts"), open=lambda p, m="r": None if "w" in m else open(p),
    )  # fmt: skip
    published = Results(table.root)
    for name in ("RN50|cc3m", "ViT-B-16|yfcc15m", "ViT-B-32|laion400m"):
        backbone, _, pretraining = name.partition("|")

        def ours(name=name):
            counts, scores, _ = Results(table.root).pairs(task, "integrated", name, prompts)
            return statistics.log_linear_curve(counts, scores, BINS[task])

        (_, curve), seconds = race(lambda b=backbone, p=pretraining: function(b, p, prompts), ours, 2)
        theirs = [kept[key] for key in ("exp_bins", "cum_means", "cum_stds")]
        mine, title = [curve.position, curve.mean, curve.std], f"curve, {task}, {name.replace('|', ' ')}"
        names = f"notebooks/{notebook}.ipynb", "statistics.log_linear_curve"
        table.compare(title, *names, theirs, mine, rtol=1e-9, atol=1e-9, seconds=seconds)
        assert len(published.pairs(task, "integrated", name, prompts)[0]) == curve.size.sum()


def test_trajectory(table):
    """Four epochs of open_clip_train's train_one_epoch, with optimizer, schedule and loss of its main(), against ours.

    The authors have no training code, since they measure models trained by others. open_clip's trainer, which is
    installed with open_clip, takes its place. Replaced: its `data`, which needs pandas, by a list of batches.
    """
    without_loader = {"open_clip_train.data": module("open_clip_train.data", get_data=None)}
    names = ["open_clip_train.main", "open_clip_train.train"]
    main, loop = import_beside(Path(open_clip.__file__).parents[1], names, without_loader).values()
    epochs, batch_size, side = 4, 32, 16
    _, pixels, captions = trajectory.shard(side)
    torch.manual_seed(0)
    vision = dict(image_size=side, layers=2, width=32, head_width=16, patch_size=8)
    text = dict(context_length=24, vocab_size=49408, width=32, heads=2, layers=2)
    start = open_clip.CLIP(24, vision, text, output_dict=True)
    tokens = open_clip.SimpleTokenizer(context_length=24)(captions)
    size = trajectory.STEPS // epochs * batch_size
    cfg = Config(epochs=epochs, batch_size=batch_size, dataset_size=size, warmup=20, precision="fp32")
    per_epoch = cfg.steps_per_epoch
    rows = trajectory.orders(len(captions), batch_size, epochs * per_epoch)
    args = SimpleNamespace(
        model="CLIP", train_data="shards", opt="adamw", trace=False, precision="fp32", device="cpu", rank=0,
        local_rank=0, world_size=1, horovod=False, wd=cfg.weight_decay, lr=cfg.lr, beta1=0.9, beta2=0.999, eps=1e-8,
        warmup=cfg.warmup, epochs=epochs, lr_scheduler="cosine", skip_scheduler=False, accum_freq=1, distill=False,
        siglip=False, local_loss=False, gather_with_grad=False, grad_clip_norm=cfg.max_grad_norm,
        log_every_n_steps=100, batch_size=batch_size, wandb=False,
    )  # fmt: skip

    def batches(dtype):
        return ((pixels[batch].to(dtype), tokens[batch]) for batch in rows)

    def theirs(dtype):
        network, loader = copy.deepcopy(start).to(dtype), trajectory.Epochs(batches(dtype), per_epoch, batch_size)
        loaders = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}
        made = run_block(main, "args.train_data or args.dataset_type == 'synthetic'", args=args, model=network)
        made |= run_block(main, "'train' in data and optimizer is not None", **made | {"data": loaders})
        for epoch in range(epochs):
            loss, optimizer, scheduler = open_clip.create_loss(args), made["optimizer"], made["scheduler"]
            loop.train_one_epoch(network, loaders, loss, epoch, optimizer, None, scheduler, None, args)

    def ours(dtype):
        network = copy.deepcopy(start).to(dtype)
        network.output_dict = False
        network = without_padding(network)
        groups = train.parameter_groups(network, cfg.weight_decay)
        adamw = torch.optim.AdamW(groups, lr=cfg.lr, fused=True)
        scaler = torch.amp.GradScaler(enabled=False)
        for step, (images, texts) in enumerate(batches(dtype)):
            train.set_learning_rate(adamw, cfg, step)
            yield train.train_step(network, images, clip.cut_padding(texts, images.device), adamw, scaler, cfg)

    where = f"open_clip_train/train.py:{loop.train_one_epoch.__code__.co_firstlineno}"
    curves, against = trajectory.run(theirs, ours), "open_clip's trainer"
    trajectory.compare(table, "concept_frequency", where, "train.train_step", curves, against=against)
