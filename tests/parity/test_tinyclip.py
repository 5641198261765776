"""TinyCLIP's training against the authors': `pytest tests/parity/test_tinyclip.py --upstream PATH`, a clone of
wkcn/TinyCLIP@ad981bf. Its parts are in tests/adapters/tinyclip.py.
"""

import copy
from argparse import Namespace
from unittest import mock

import open_clip
import pytest
import torch

from tests.adapters.tinyclip import inputs, load, our_stage, process_group, their_args, their_trainer, twins
from tinyclip import geometry, model
from tinyclip.config import Config

from . import Table, clone_of, printed, seeded, trajectory  # noqa: F401  (seeded: autouse)

VISION = {"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3}


@pytest.fixture(scope="module")
def up(request):
    path = clone_of(request, "wkcn/TinyCLIP", "ad981bf")
    with process_group():
        yield load(path)


@pytest.fixture(scope="module")
def table(request, up):
    yield from printed(request, Table(up.root), "TinyCLIP, wkcn/TinyCLIP@ad981bf:src/")


@pytest.mark.parametrize("masks", [False, True], ids=["plain", "masks"])
def test_training(up, table, masks):
    """Four steps of their loop, which logs the first one; with masks, both draw the same random numbers."""
    stage = Config(
        steps=100, lr=1e-3, warmup=3, alpha=0.7, masks=masks, prune_step=4, target_sparsity=0.6, sparsity_warmup=2,
        precision="fp32",
    )  # fmt: skip
    theirs, student = twins(up, VISION, TEXT, 24, masked=masks)
    teacher, own_teacher = twins(up, VISION, TEXT, 40)
    batches = [inputs(6, VISION, TEXT) for _ in range(4)]
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
    loop, step = up.train.train_one_epoch, "train.train_step"
    table.compare(f"{name}: first loss", loop, step, *values, rtol=1e-4, gradient_left=True)
    state = {name.removeprefix("clip."): value for name, value in student.state_dict().items()}
    states = geometry.convert_state_dict(theirs.state_dict()), state
    table.compare(f"{name}: weights after 4 steps", loop, step, *states, atol=1e-4, gradient_left=True)


def test_checkpoint_of_their_trainer(up, table, tmp_path):
    """A file with all entries that their loop saves (training/train.py:673)."""
    theirs = twins(up, VISION, TEXT, 24)[0]
    theirs.ddpify(up.model.FakeDDP)
    args = Namespace(**vars(their_args(Config())), force_quick_gelu=False, pretrained="", name="a", model="ViT-B-32")
    state = {"args": args, "epoch": 0, "iter_in_epoch": 9, "num_batches": 10, "samples_per_epoch": 60, "name": "a"}
    state |= {"state_dict": theirs.state_dict(), "scaler": torch.amp.GradScaler("cpu").state_dict()}
    state["optimizer"] = [each.state_dict() for each in up.optimizer.build_optimizer(args, theirs)]
    torch.save(state, tmp_path / "epoch_0_iter_9.pt")
    loaded, batch = model.load_clip(tmp_path / "epoch_0_iter_9.pt", head_width=16), inputs(4, VISION, TEXT)
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
    starts, teachers = twins(up, VISION, text, 24, masked=True), twins(up, VISION, text, 40)
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
