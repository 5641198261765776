"""TinyCLIP against the authors' code: `pytest tests/parity/test_tinyclip.py --upstream PATH`, a clone of
wkcn/TinyCLIP@ad981bf. Both sides get the same seeded inputs on the CPU in fp32; the table is printed at the end.
"""

import contextlib
import copy
import sys
import tempfile
import warnings
from argparse import Namespace
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from shared import zeroshot
from tinyclip import geometry, inheritance, model, train
from tinyclip import masks as own_masks
from tinyclip.config import Config

from . import Table, clone_of, import_beside, printed, race, seeded, trajectory, unit  # noqa: F401  (seeded: autouse)

VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3}
RESNET = {"image_size": 64, "width": 8, "layers": [1, 2, 1, 1], "head_width": 64}
EMBED = 24
WAYS = "image_to_text", "text_to_image"


def load(path: str | Path) -> SimpleNamespace:
    """The authors' modules from a clone."""
    root = Path(path).resolve() / "src"
    names = [f"open_clip.{n}" for n in ("model", "l0module", "weight_inherit", "clip_soft_loss", "loss", "transform")]
    names += [f"training.{name}" for name in ("optimizer", "scheduler", "train", "zero_shot")] + ["open_clip.tokenizer"]
    modules = import_beside(root, names, {})
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)


@contextlib.contextmanager
def on_cpu(up):
    """Stand-ins for the GPU, disk and plotting functions that their training loop calls; hides what it prints."""
    viz = ModuleType("training.viz")
    viz.plot = lambda *_: None
    with (
        mock.patch.dict(sys.modules, {"training": ModuleType("training"), "training.viz": viz}),
        mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (0, 1)),
        mock.patch.object(torch.cuda.amp, "autocast", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(up.train.psutil, "disk_usage", lambda _: SimpleNamespace(free=0)),
        contextlib.redirect_stdout(None),
    ):
        yield


@contextlib.contextmanager
def process_group():
    """A group of one process, which their losses need."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch.distributed.nn
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def up(request):
    path = clone_of(request, "wkcn/TinyCLIP", "ad981bf")
    with process_group():
        yield load(path)


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "TinyCLIP, wkcn/TinyCLIP@ad981bf:src/")


def inputs(n=4, vision=VISION, text=TEXT):
    """Images and tokens; the end token, the largest id, is at a random position in the second half."""
    side, length, last = vision["image_size"], text["context_length"], text["vocab_size"] - 1
    tokens = torch.randint(1, last, (n, length))
    return torch.randn(n, 3, side, side), tokens.scatter(1, torch.randint(length // 2, length, (n, 1)), last)


def twins(up, vision=VISION, text=TEXT, embed=EMBED, masks=False, quick_gelu=False, spread=1.0):
    """Their model and our `Student` with the same weights, none at a special value."""
    cfg = {key: value for key, value in vision.items()} | ({"patch_size": None} if "patch_size" not in vision else {})
    theirs = up.model.CLIP(embed, cfg, dict(text), quick_gelu, mask_image=masks, mask_text=masks)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "loga" in name:
                parameter.normal_(0.5, spread)
            elif parameter.ndim and "lambda" not in name:
                parameter += 0.02 * torch.randn_like(parameter)
    clip = model.CLIP(embed, vision, text, quick_gelu)
    student = model.Student(clip, *[own_masks.L0Mask.of(cfg) for cfg in (vision, text)] if masks else [])
    state = geometry.convert_state_dict(theirs.state_dict())
    student.load_state_dict({name if "mask." in name else f"clip.{name}": value for name, value in state.items()})
    return theirs, student


def student_gradients(student: model.Student) -> dict:
    return {name.removeprefix("clip."): p.grad for name, p in student.named_parameters() if p.grad is not None}


def their_gradients(theirs) -> dict:
    return geometry.convert_state_dict({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


# ----------------------------------------------------------------------------------------------------------- losses


def with_gradients(function, *tensors):
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = function(*tensors)
    return value.detach(), torch.autograd.grad(value, tensors)


def test_losses(up, table):
    features, teacher = (
        (unit(64, 24), unit(64, 24), torch.tensor(50.0)),
        (unit(64, 40), unit(64, 40), torch.tensor(50.0)),
    )
    options = dict(local_loss=True, gather_with_grad=True, cache_labels=True, rank=0, world_size=1)
    soft, hard = up.clip_soft_loss.ClipSoftLoss(**options), up.loss.ClipLoss(**options)
    pairs_of = {
        "affinity mimicking": (
            up.clip_soft_loss.ClipSoftLoss.forward, "model.affinity_mimicking_loss",
            lambda *x: soft(*x, *teacher), lambda *x: sum(model.affinity_mimicking_loss(*x, *teacher)) / 2,
        ),
        "contrastive": (up.loss.ClipLoss.forward, "model.clip_loss", hard, model.clip_loss),
    }  # fmt: skip
    for name, (where, own, theirs, ours) in pairs_of.items():
        results, seconds = race(
            partial(with_gradients, theirs, *features), partial(with_gradients, ours, *features), 20
        )
        values, gradients = zip(*results, strict=True)
        table.compare(name, where, own, *values, gradients=gradients, seconds=seconds)


# ----------------------------------------------------------------------------------------------------------- towers


@pytest.mark.parametrize("kind", ["ViT", "QuickGELU", "ResNet"])
def test_forward(up, table, kind):
    vision = RESNET if kind == "ResNet" else VISION
    theirs, student = twins(up, vision, quick_gelu=kind == "QuickGELU")
    images, tokens = inputs(vision=vision)
    results = []
    for network_ in (theirs.train(), student.train()):
        image, text, scale = network_(images, tokens)
        (image.sum() + (text * text[:, :1].detach()).sum()).backward()
        results.append([image, text, scale])
    gradients = their_gradients(theirs), student_gradients(student)
    keys = gradients[0].keys() & gradients[1].keys()
    gradients = [{key: g[key] for key in keys} for g in gradients]
    name = f"CLIP, {kind}"
    table.compare(name, up.model.CLIPBase.forward, "model.CLIP", *results, gradients=gradients, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("training", [True, False], ids=["sampled", "evaluation"])
def test_masked_forward(up, table, training):
    theirs, student = twins(up, masks=True)
    images, tokens = inputs()

    def forward(network_):
        torch.manual_seed(1)  # the same uniform numbers in the same order
        network_.zero_grad()
        image, text, _ = network_.train(training)(images, tokens)
        (image.sum() + (text * text[:, :1].detach()).sum()).backward()
        return image.detach(), text.detach()

    (a, b), seconds = race(lambda: forward(theirs), lambda: forward(student), 10)
    gradients = their_gradients(theirs), student_gradients(student)
    if not training:  # evaluation masks carry no gradient
        gradients = [{name: g for name, g in each.items() if "mask." not in name} for each in gradients]
    name = f"masked CLIP, {'sampled' if training else 'evaluation'} masks"
    where = "open_clip/model.py:40-315, 443-540, 764-805"
    table.compare(name, where, "model.CLIP", a, b, gradients=gradients, rtol=1e-4, atol=2e-5, seconds=seconds)


# ------------------------------------------------------------------------------------------------------ inheritance


def test_l0_module(up, table):
    types = ["hidden", "heads", "intermediate", "layer"]
    config = SimpleNamespace(hidden_size=48, intermediate_size=192, num_attention_heads=3, num_hidden_layers=3)
    theirs = up.l0module.L0Module(config, 0.1, 0.6, 7, pruning_type=types)
    ours = own_masks.L0Mask(48, 192, 3, 3, own_masks.KINDS)
    for kind in own_masks.KINDS:
        getattr(theirs, f"{kind}_loga").data.normal_(0.3, 2)
        getattr(ours, f"{kind}_loga").data.copy_(getattr(theirs, f"{kind}_loga"))
    penalty = theirs.lagrangian_regularization(3)
    penalty[0].backward()
    loss, expected = own_masks.sparsity_loss([ours], own_masks.target_sparsity(3, 0.1, 0.6, 7))
    loss.backward()
    gradients = [{name: p.grad for name, p in each.named_parameters()} for each in (theirs, ours)]
    function = up.l0module.L0Module.lagrangian_regularization
    values = [penalty[0], penalty[1]], [loss, expected]
    table.compare("sparsity constraint", function, "masks.sparsity_loss", *values, gradients=gradients)
    masks = theirs.eval()(), ours.eval_masks()
    masks = [
        {kind: masks[0][f"{kind}_z"].flatten() for kind in own_masks.KINDS},
        {k: z.flatten() for k, z in masks[1].items()},
    ]
    function = up.l0module.L0Module._deterministic_z
    table.compare("evaluation masks", function, "masks.eval_gate", *masks, rtol=0, atol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 4.0], ids=["narrow", "wide"])
def test_prune_and_expand(up, table, spread):
    theirs, student = twins(up, masks=True, spread=spread)
    images, tokens = inputs()
    full = copy.deepcopy(theirs)
    pruned = up.model.prune_model(theirs.eval())
    ours = student.eval().pruned()
    states = geometry.convert_state_dict(pruned.state_dict()), ours.clip.state_dict()
    table.compare("pruned weights", up.model.prune_model, "masks.prune", *states, rtol=0, atol=0)
    with torch.no_grad():
        values = list(pruned(images, tokens)), list(ours(images, tokens))
    table.compare("pruned network", up.model.prune_model, "masks.prune", *values)
    exact = own_masks.prune(student.clip, *student.eval_masks(), exact=True)
    with torch.no_grad():
        values = list(full.eval()(images, tokens)), list(exact(images, tokens))
    table.compare("exact pruning against their masked network", "open_clip/model.py:1415", "prune(exact=True)", *values)
    up.model.load_pruned_model(full, pruned.state_dict())
    for mask in student.masks:
        for parameter in mask.parameters():
            parameter.data.fill_(10.0)
    for name, parameter in full.named_parameters():  # theirs does not change open gates, which are 10 in a new model
        if "loga" in name:
            parameter.data[parameter.data != -10] = 10.0
    own_masks.expand_pruned(student.clip, *student.masks, pruned.state_dict())
    expanded = {name.removeprefix("clip."): value for name, value in student.state_dict().items()}
    states = geometry.convert_state_dict(full.state_dict()), expanded
    where = "open_clip/model.py:1300"
    table.compare("back to full size", where, "masks.expand_pruned", *states, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["ViT", "ResNet"])
def test_inherit_by_hand(up, table, kind):
    vision = VISION if kind == "ViT" else RESNET
    small = vision | ({"width": 32, "layers": 2} if kind == "ViT" else {"width": 4, "layers": [1, 1, 1, 1]})
    teacher = twins(up, vision, embed=64)[1].clip.state_dict()
    target = model.CLIP(64, small, TEXT | {"layers": 1, "width": 16, "heads": 1}).state_dict()
    ours = inheritance.inherit_weights(target, teacher, 16)
    theirs = {}
    with contextlib.redirect_stdout(None):
        for visual in (True, False):
            part = [
                {k: v for k, v in s.items() if k.startswith("visual") == visual and k != "logit_scale"}
                for s in (target, teacher)
            ]
            theirs |= up.weight_inherit.weight_inherit({k: v.clone() for k, v in part[0].items()}, part[1], 16)
    function = up.weight_inherit.weight_inherit
    table.compare(f"manual inheritance, {kind}", function, "inheritance.inherit_weights", theirs, ours, rtol=0, atol=0)


def test_checkpoint_keys(up, table):
    theirs, student = twins(up)
    plain = {f"module.{name}": value for name, value in student.clip.state_dict().items()}
    converted = geometry.convert_state_dict(
        up.model.convert_to_new_checkpoint({k.removeprefix("module."): v for k, v in plain.items()})
    )
    function = up.model.convert_to_new_checkpoint
    table.compare(
        "checkpoint keys",
        function,
        "geometry.convert_state_dict",
        converted,
        geometry.convert_state_dict(plain),
        rtol=0,
        atol=0,
    )


def test_positional_embedding(up, table):
    state = {"visual.positional_embedding": torch.randn(50, 6)}
    resized = inheritance.resize_positional_embedding(state["visual.positional_embedding"], 9)
    up.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(9, 9))))
    function = up.model.resize_pos_embed
    values = state["visual.positional_embedding"], resized
    table.compare("position table", function, "inheritance.resize_positional_embedding", *values)


# --------------------------------------------------------------------------------------------------------- training


def test_schedules(up, table):
    optimizer = SimpleNamespace(param_groups=[{"lr": 0.0}])
    theirs, after, masks = (
        up.scheduler.cosine_lr(optimizer, 1e-3, 5, 40),
        up.scheduler.cosine_lr_start_nowarmup(optimizer, 1e-3, 40, 5),
        up.scheduler.step_lr(optimizer, 5),
    )
    cfg = Config(lr=1e-3, warmup=5, steps=40)
    masked = replace(cfg, warmup=2, masks=True, prune_step=5)
    rows = [[theirs(s), train.learning_rate(cfg, s)] for s in range(40)]
    rows += [[after(s), train.learning_rate(masked, s)] for s in range(5, 40)]
    assert all(masks(s) is None for s in range(5))  # constant until the masks are cut out
    a, b = zip(*rows, strict=True)
    table.compare(
        "learning rates", up.scheduler.cosine_lr, "train.learning_rate", list(a), list(b), rtol=1e-9, atol=1e-12
    )


class Scaler:
    """A gradient scaler that scales by 1, with the interface that their loop uses."""

    def __init__(self):
        self._per_optimizer_states = {}

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        self._per_optimizer_states[id(optimizer)] = {"found_inf_per_device": {}}

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass

    def state_dict(self):
        return {"scale": 1.0}


class Enough(Exception):
    """Raised to end their epoch before its last batch, after which it would evaluate."""


class Loader:
    """Batches in memory with the interface of their loader."""

    def __init__(self, batches, num_batches=100):
        self.batches, self.num_batches, self.batch_size = batches, num_batches, len(batches[0][0])
        self.num_samples = self.num_batches * self.batch_size

    def __iter__(self):
        yield from self.batches
        yield self.batches[0]  # their loop reads one batch ahead
        raise Enough


def their_args(stage: Config) -> SimpleNamespace:
    return SimpleNamespace(
        device="cpu", precision="fp32", image_precision="fp32", text_precision="fp32", logit_precision="fp32",
        distillation=True, local_loss=True, gather_with_grad=True, rank=0, world_size=1, local_rank=0, horovod=False,
        distributed=False, epochs=1, distillation_alpha=stage.alpha, distillation_weight=stage.weight,
        lock_image=False, lock_text=False, prune_step=stage.prune_step, prune_image=stage.masks, prune_text=stage.masks,
        logit_scale=stage.logit_scale, use_teacher_image=False, use_teacher_text=False, total_loss_flag=True,
        save_logs=False, wandb=False, norm_gradient_clip=stage.max_grad_norm, wd=stage.weight_decay, lr=stage.lr,
        beta1=stage.beta1, beta2=stage.beta2, eps=stage.eps, l0lr=stage.lambda_lr,
    )  # fmt: skip


def their_trainer(up, theirs, teacher, stage: Config, **flags):
    """(function that runs their train_one_epoch over batches, {(name, step): logged value})."""
    if not theirs.used_ddp:
        theirs.ddpify(up.model.FakeDDP)
    theirs.teacher = [teacher.eval().requires_grad_(False)]
    args, logged = SimpleNamespace(**vars(their_args(stage)) | flags), {}
    for tower in (theirs.image_encoder_without_ddp, theirs.text_encoder_without_ddp) if stage.masks else ():
        tower.l0_module.start_sparsity, tower.l0_module.target_sparsity = stage.start_sparsity, stage.target_sparsity
        tower.l0_module.lagrangian_warmup = stage.sparsity_warmup
    optimizer = up.optimizer.build_optimizer(args, theirs)
    scheduler_l0 = up.scheduler.step_lr(optimizer[-1], stage.prune_step) if stage.masks else None
    warmup = stage.prune_step if stage.masks else stage.warmup
    scheduler = up.scheduler.cosine_lr(optimizer[:3], stage.lr, warmup, stage.steps)
    writer = SimpleNamespace(add_scalar=lambda name, value, step: logged.update({(name, step): float(value)}))

    def one_pass(batches, epoch=0):
        loader = Loader(batches, stage.steps)
        data = {"train": SimpleNamespace(dataloader=loader, sampler=None, set_epoch=lambda _: None)}
        with on_cpu(up), contextlib.suppress(Enough):
            up.train.train_one_epoch(theirs, data, epoch, optimizer, Scaler(), scheduler, scheduler_l0, args, writer)

    return one_pass, logged


def our_stage(student, teacher, batches, stage: Config):
    """(student after a stage of our steps, what each step logs)."""
    optimizers, rows = train.make_optimizers(student.train(), stage), []
    scaler, teacher = torch.amp.GradScaler("cpu", enabled=False), teacher.eval().requires_grad_(False)
    for step, batch in enumerate(batches):
        if student.masks and step == stage.prune_step:
            student = student.pruned()
            optimizers = train.make_optimizers(student, stage)
        features = train.teacher_forward(teacher, *batch, stage)
        rows.append(train.train_step(student, features, *batch, step, optimizers, scaler, stage))
    return student, rows


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
def test_training(up, table, masks):
    """Four steps of their loop, which logs the first one; with masks, both draw the same random numbers."""
    stage = Config(
        steps=100, lr=1e-3, warmup=3, alpha=0.7, masks=masks, prune_step=4, target_sparsity=0.6, sparsity_warmup=2,
        precision="fp32",
    )  # fmt: skip
    theirs, student = twins(up, masks=masks)
    teacher, own_teacher = twins(up, embed=40)
    batches = [inputs(6) for _ in range(4)]
    one_pass, logged = their_trainer(up, theirs, teacher, stage)
    torch.manual_seed(3)
    one_pass(batches)
    torch.manual_seed(3)
    student, rows = our_stage(student, own_teacher.clip, batches, stage)
    values = [logged["train/loss", 0]], [rows[0]["loss"]]
    if masks:
        values[0].append(logged["train/all_expected_sparsity", 0])
        values[1].append(rows[0]["expected_sparsity"])
    name = "training, " + ("masks" if masks else "plain")
    table.compare(f"{name}: first loss", up.train.train_one_epoch, "train.train_step", *values, rtol=1e-4)
    state = {name.removeprefix("clip."): value for name, value in student.state_dict().items()}
    states = geometry.convert_state_dict(theirs.state_dict()), state
    table.compare(f"{name}: weights after 4 steps", up.train.train_one_epoch, "train.train_step", *states, atol=1e-4)


def test_checkpoint_of_their_trainer(up, table, tmp_path):
    """A file with all entries that their loop saves (training/train.py:673)."""
    theirs = twins(up)[0]
    theirs.ddpify(up.model.FakeDDP)
    args = Namespace(**vars(their_args(Config())), force_quick_gelu=False, pretrained="", name="a", model="ViT-B-32")
    state = {"args": args, "epoch": 0, "iter_in_epoch": 9, "num_batches": 10, "samples_per_epoch": 60, "name": "a"}
    state |= {"state_dict": theirs.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()}
    state["optimizer"] = [each.state_dict() for each in up.optimizer.build_optimizer(args, theirs)]
    torch.save(state, tmp_path / "epoch_0_iter_9.pt")
    loaded, batch = model.load_clip(tmp_path / "epoch_0_iter_9.pt", head_width=16), inputs()
    with torch.no_grad():
        values = list(theirs.eval()(*batch)), list(loaded(*batch))
    table.compare("checkpoint", up.model.convert_to_new_checkpoint, "model.load_clip", *values, atol=2e-6)


def test_trajectory(up, table):
    """A whole stage with masks in one call of their loop: 100 steps of learning masks, pruning, 100 further steps.

    Replaced: CUDA's autocast and memory query, the query of free space in /dev/shm and the plot of masks do nothing;
    the GradScaler scales by 1; before pruning, they run the masked towers on an image of 224 pixels and a caption of 77
    tokens on a GPU, here with the towers' sizes; the process group has one process; their loader is a list that ends
    the epoch before the evaluation.
    """
    stage = Config(
        steps=trajectory.STEPS, lr=1e-3, alpha=0.7, masks=True, prune_step=trajectory.STEPS // 2, target_sparsity=0.6,
        sparsity_warmup=50, precision="fp32",
    )  # fmt: skip
    side, text = VISION["image_size"], {**TEXT, "vocab_size": 49408, "context_length": 24}
    _, pixels, captions = trajectory.shard(side)
    tokens = open_clip.SimpleTokenizer(context_length=text["context_length"])(captions)
    starts, teachers = twins(up, text=text, masks=True), twins(up, text=text, embed=40)
    rows = trajectory.orders(len(pixels), 32, stage.steps)

    def of(dtype, side):
        """(student, teacher, batches); seeds torch, so that both sides draw the same numbers for masks."""
        batches = [(pixels[batch].to(dtype), tokens[batch]) for batch in rows]
        copies = [copy.deepcopy(pair[side]).to(dtype) for pair in (starts, teachers)]
        torch.manual_seed(3)
        return *copies, batches

    def theirs(dtype):
        student, teacher, batches = of(dtype, 0)
        randn, randint = torch.randn, torch.randint
        probes = dict(
            randn=lambda shape, device: randn(1, 3, side, side, dtype=dtype),
            randint=lambda low, high, shape, device: randint(low, high, (1, text["context_length"])),
        )
        with trajectory.default_dtype(dtype), mock.patch.multiple(torch, **probes):
            their_trainer(up, student, teacher, stage)[0](batches)

    def ours(dtype):
        student, teacher, batches = of(dtype, 1)
        with trajectory.default_dtype(dtype):
            our_stage(student, teacher.clip, batches, stage)

    curves = trajectory.run(theirs, ours)
    trajectory.compare(table, "tinyclip", up.train.train_one_epoch, "train.train_step", curves, early=3e-5)


# ------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation(up, table):
    image, text = unit(50, 16), unit(50, 16)
    theirs = up.train.get_metrics(image, text, torch.tensor(100.0))
    recalls = zeroshot.retrieval_metrics(image, text, torch.arange(len(image)))
    ours = {f"{way}_R@{k}": recalls[f"{way}_R@{k}"] / 100 for way in WAYS for k in (1, 5, 10)}
    theirs = {name: theirs[name] for name in ours}
    table.compare("retrieval", up.train.get_metrics, "zeroshot.retrieval_metrics", theirs, ours)
    logits, target = torch.randn(64, 12), torch.randint(0, 12, (64,))
    with mock.patch.object(up.zero_shot, "float", lambda x: float(np.asarray(x).item()), create=True):
        theirs = [hits / 64 for hits in up.zero_shot.accuracy(logits, target, (1, 5))]
    ranks = zeroshot.label_ranks(logits, target)
    ours = [(ranks < k).double().mean().item() for k in (1, 5)]
    table.compare("accuracy", up.zero_shot.accuracy, "zeroshot.label_ranks", theirs, ours)


def test_transform_and_tokens(up, table):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (40, 60, 3), dtype=np.uint8))
    values = up.transform.image_transform(32, is_train=False)(image), train.image_transform(32)(image)
    table.compare(
        "evaluation transform", up.transform.image_transform, "train.image_transform", *values, rtol=0, atol=0
    )
    texts = ["A Photo of a  cat", "it&amp;s", "caf\u00e9", "word " * 100, ""]
    values = up.tokenizer.tokenize(texts), open_clip.SimpleTokenizer(context_length=77)(texts)
    table.compare("tokens", up.tokenizer.tokenize, "open_clip.SimpleTokenizer", *values, rtol=0, atol=0)
