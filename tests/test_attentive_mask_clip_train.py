"""Steps and schedules; python -m attentive_mask_clip.train on real emoji shards.

Every arm. Kills and several processes: test_faults.py, test_scale.py. Scripts start in forks
of a server that has imported torch and the rest already, which saves 4 seconds each.
"""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from attentive_mask_clip_runs import TINY, attention_as_in_training, batch, tiny  # noqa: F401
from scripts import (
    SHARDS,
    Lazily,
    ended,
    finished,
    in_ranks,
    in_turn,
    kill_at,
    metrics,
    same,
)
from short_runs import small_set
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

from attentive_mask_clip import config, train
from attentive_mask_clip import eval as evaluation
from attentive_mask_clip.config import Config
from attentive_mask_clip.crops import Views
from attentive_mask_clip.model import aclip_loss, create_model
from attentive_mask_clip.train import cosine_schedule, parameter_groups, schedules, train_step
from shared import checkpoints, data
from shared import cli as command_line
from shared.clip import set_grad_checkpointing

SCRIPT = "attentive_mask_clip.train"

STEPS, PER_EPOCH = 9, 3


# ------------------------------------------------------------------------------------------------------- steps


def unscaled() -> torch.amp.GradScaler:
    return torch.amp.GradScaler(enabled=False)


def test_the_text_tower_has_a_rate_of_its_own():
    """With --text-lr, only parameters that images never pass have it; decay is split as without it."""
    model = tiny().train()
    cfg = Config(precision="fp32", text_lr=0.1)
    groups, plain = parameter_groups(model, 0.3, cfg.text_lr), parameter_groups(model, 0.3)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert sorted(names[id(p)] for group in groups for p in group["params"]) == sorted(
        name for name, parameter in model.named_parameters() if parameter.requires_grad
    )
    for scale in (1.0, 0.1):
        decays = {group["weight_decay"]: group["params"] for group in groups if group["lr_scale"] == scale}
        assert set(decays) == {0.0, 0.3} and all(decays.values())
        for group in plain:
            assert {id(p) for p in decays[group["weight_decay"]]} <= {id(p) for p in group["params"]}
    slow = {names[id(p)] for group in groups if group["lr_scale"] == 0.1 for p in group["params"]}
    model.encode_text(batch()[2]).sum().backward()
    assert slow == {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    views, ema_view, tokens, boxes = batch()
    train_step(model, ([*views.split(len(tokens)), ema_view], boxes, tokens), optimizer, unscaled(), 0.01, 0.9, cfg)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.01, 0.001, 0.001]


def test_schedule_ends_of_warm_up_are_included():
    values = cosine_schedule(1.0, 0.1, 100, 11, 0.5)
    assert len(values) == 100 and values[0] == 0.5 and values[10] == 1.0 == values[11] and np.isclose(values[5], 0.75)
    assert 0.1 < values[-1] < 0.101 and (np.diff(values[11:]) < 0).all()
    assert len(cosine_schedule(1.0, 0.0, 0)) == 0 and len(cosine_schedule(1.0, 0.0, 5, 5)) == 5


def test_schedules_of_the_paper():
    cfg = Config()
    lrs, momenta = schedules(cfg, per_epoch=3586)
    assert len(lrs) == len(momenta) == 3586 * 25
    assert lrs[0] == 1e-6 and lrs[3585] == lrs[3586] == 5e-4 == lrs.max() and lrs[-1] < 1.001e-5
    assert momenta[0] == 0.996 and (np.diff(momenta) > 0).all() and 0.99999 < momenta[-1] < 1


def step_of(model, inputs, cfg: Config, lr: float = 1e-3, momentum: float = 0.9):
    views, ema_view, tokens, boxes = inputs
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=lr)
    images = [*views.split(len(tokens)), ema_view]
    return train_step(model, (images, boxes, tokens), optimizer, unscaled(), lr, momentum, cfg)


def test_the_ema_of_a_step_has_seen_the_weights_before_it():
    cfg, model = Config(precision="fp32"), tiny()
    with torch.no_grad():
        for _, online in model._pairs():
            online += 0.1 * torch.randn_like(online)
    before = [(ema.clone(), online.clone()) for ema, online in model._pairs()]
    step_of(model.train(), batch(), cfg, momentum=0.75)
    for (ema, online), (old_ema, old_online) in zip(model._pairs(), before, strict=True):
        torch.testing.assert_close(ema, 0.75 * old_ema + 0.25 * old_online)
        assert not online.requires_grad or not torch.equal(online, old_online)


def test_accumulation_averages_micro_batches_and_moves_the_ema_once():
    model, inputs = tiny(ssl=False), batch(4)  # without BatchNorm
    cfg = Config(precision="fp32", ssl=False, accumulate=2)
    views, ema_view, tokens, boxes = inputs
    halves = []
    for half in (slice(0, 2), slice(2, 4)):
        images = torch.cat([view[half] for view in views.split(4)])
        halves.append(aclip_loss(model(images, ema_view[half], tokens[half], boxes[half]))["loss"])
    moved = []
    model.update_ema = lambda momentum: moved.append(momentum)
    losses = step_of(model, inputs, cfg)
    torch.testing.assert_close(losses["loss"], sum(halves).detach() / 2)
    assert moved == [0.9]


def weights_after_accumulation(rank: int) -> dict[str, torch.Tensor]:
    """Weights after a step with two micro-batches; "shared" is the number of all-reduces."""
    model, sent = DistributedDataParallel(tiny(ssl=False)), []
    model.register_comm_hook(sent, lambda sent, bucket: sent.append(1) or default_hooks.allreduce_hook(None, bucket))
    torch.manual_seed(rank)
    step_of(model, batch(4), Config(precision="fp32", ssl=False, accumulate=2))
    return dict(model.module.state_dict()) | {"shared": torch.tensor(len(sent))}


def test_accumulation_synchronises_gradients_once(tmp_path: Path):
    one, two = in_ranks(weights_after_accumulation, 2, tmp_path)
    assert same(one, two) and one["shared"] == 1  # the one bucket of the last backward pass


@pytest.mark.parametrize("method", ["aclip", "slip", "clip"])
def test_checkpointing_changes_no_gradient(method: str):
    views, ema_view, tokens, boxes = batch(4)
    images = {"aclip": [*views.split(4), ema_view], "slip": [*views.split(4), ema_view], "clip": [views[:4]]}[method]
    found = []
    for on in (False, True):
        model = tiny(method, vision_layers=3, text_layers=2).train()
        set_grad_checkpointing(model, on)
        torch.manual_seed(2)
        losses = model.loss(model(*model.inputs(images, boxes, tokens)), Config(method=method))
        losses["loss"].backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None] + [*model.buffers()])
    assert len(found[0]) == len(found[1]) > 20 and all(map(torch.equal, *found))


def test_the_temperature_is_clamped_after_a_step():
    model = tiny()
    model.logit_scale.data.fill_(9.0)
    step_of(model, batch(), Config(precision="fp32"))
    torch.testing.assert_close(model.logit_scale.item(), 4.6052)


# -------------------------------------------------------------------------------------------------------- end to end

MASKED = ["--views", "1", "--no-ssl"]
ARMS = {
    "clip": ["emoji-clip"],
    "slip": ["emoji-slip"],
    "random": ["emoji", "--mask", "random", *MASKED],
    "attentive": ["emoji", *MASKED],
    "high-drop": ["emoji", "--mask", "high", *MASKED],
    "aclip": ["emoji", "--text-lr", "0.5"],
    "aclip-eff": ["emoji", "--ema-image-size", "10"],
    "unmasked": ["emoji", "--mask", "none"],
    "released": ["emoji", "--released-boxes", "--simclr-pair", "same"],
}
SSL = ("aclip", "aclip-eff", "unmasked", "released")


@pytest.fixture(scope="module")
def arms(cli, folder: Path) -> dict[str, Path]:
    def trained(arm: str) -> Path:
        finished(cli(*ARMS[arm], *TINY, "--out", folder / arm))
        return folder / arm

    return Lazily(trained)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arms: dict[str, Path], arm: str):
    out = arms[arm]
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["epoch"] for line in lines] == sorted([0, 1, 2] * PER_EPOCH)
    assert all(np.isfinite(value) for line in lines for value in line.values())
    rates = [line["lr"] for line in lines]
    assert rates[0] == pytest.approx(1e-6) and rates[PER_EPOCH - 1] == rates[PER_EPOCH] == pytest.approx(1e-3)
    for line in lines:  # the arm's own losses
        if arm in ("clip", "slip"):
            parts = line["clip_loss"] + line.get("ssl_loss", 0)
            assert ("ssl_loss" in line) == (arm == "slip")
        else:
            contrastive = [line[name] for name in ("contra_loss_1", "contra_loss_2") if name in line]
            assert len(contrastive) == (2 if arm in SSL else 1)
            assert (line["simclr_loss"] > 0) == (line["im_byol_loss"] > 0) == (arm in SSL)
            parts = np.mean(contrastive) + line["simclr_loss"] + 2 * line["im_byol_loss"]
        assert np.isclose(line["loss"], parts, rtol=1e-5)
    loss = [line["clip_loss"] if "clip_loss" in line else line["contra_loss_1"] for line in lines]
    assert np.mean(loss[-PER_EPOCH:]) < np.mean(loss[:PER_EPOCH])
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (3, 0)
    ema = any(name.startswith("visual_ema.") for name in state["state_dict"])
    heads = any(name.startswith("im_proj_byol_e.") for name in state["state_dict"])
    assert ema == (arm not in ("clip", "slip")) and heads == (arm in SSL)


def test_frozen_patches_and_moving_ema(arms: dict[str, Path]):
    state = checkpoints.load_checkpoint(arms["aclip"] / "checkpoint.pt")
    cfg = config.Config(**state["config"])
    torch.manual_seed(cfg.seed)
    before = create_model(cfg.method, cfg.model, **cfg.model_settings()).state_dict()
    after = state["state_dict"]
    frozen = {name for name in after if "patch_embed.proj" in name}
    assert frozen and all(torch.equal(before[name], after[name]) for name in frozen)
    for name in ("visual.blocks.0.attn.qkv.weight", "text_projection", "im_proj_byol.0.weight"):
        ema = name.replace("visual.", "visual_ema.").replace("projection", "projection_e").replace("byol.", "byol_e.")
        moved, followed = (after[name] - before[name]).norm(), (after[ema] - before[ema]).norm()
        assert 0 < followed < moved
    # The baselines train the patch projection
    clip = checkpoints.load_checkpoint(arms["clip"] / "checkpoint.pt")["state_dict"]
    assert not torch.equal(clip["visual.patch_embed.proj.weight"], before["visual.patch_embed.proj.weight"])


def test_methods_start_from_the_same_towers_and_first_crops(embedded_corpus: None):
    states, samples = [], []
    pairs = data.open_pairs(f"{SHARDS}/00000.tar", 8)
    for arm in ("emoji", "emoji-clip", "emoji-slip"):
        cfg = dataclasses.replace(config.PRESETS[arm][1])
        torch.manual_seed(cfg.seed)
        states.append(create_model(cfg.method, cfg.model, **cfg.model_settings()).state_dict())
        view, boxes = Views(cfg, 20, ema_view=True), []
        for i in range(8):
            torch.manual_seed(i)
            boxes.append(view.pixels(pairs.read(i).image)[1][0])
        samples.append(boxes)
    for name in states[1]:
        assert torch.equal(states[0][name], states[1][name]) and torch.equal(states[2][name], states[1][name]), name
    assert all(same(boxes, samples[0]) for boxes in samples)


@pytest.fixture(scope="module")
def groups(folder: Path) -> str:
    return small_set("groups_ood", folder / "sets", every=40)


def test_the_best_checkpoint_is_kept_through_kills(arms: dict[str, Path], cli, start, folder: Path, groups: str):
    """The best checkpoint is chosen by the online towers; EMA towers are also evaluated.

    Neither changes the training.
    """
    outs = [folder / "best", folder / "best-killed"]
    evaluated = ["--eval-every", "1", "--eval-set", groups]
    command = [*ARMS["aclip"], *TINY, *evaluated, "--keep-best", "--save-every", "2", "--out"]
    finished(cli(*command, outs[0]))
    points = {line["step"]: line for line in metrics(outs[0]) if "zero_shot_top1" in line}
    assert list(points) == [PER_EPOCH, 2 * PER_EPOCH, STEPS]
    assert all(0 <= line[name] <= 100 for line in points.values() for name in ("zero_shot_top1", "zero_shot_top1_ema"))
    assert [line for line in metrics(outs[0]) if "loss" in line] == metrics(arms["aclip"])
    top = max(line["zero_shot_top1"] for line in points.values())
    first = min(step for step, line in points.items() if line["zero_shot_top1"] == top)
    best = checkpoints.load_checkpoint(outs[0] / "checkpoint-best.pt")
    assert best["epoch"] == first // PER_EPOCH and best["best"] == {groups: top}
    assert same(dict(evaluation.load_model(outs[0] / "checkpoint-best.pt").state_dict()), dict(best["state_dict"]))

    for line in (random.randint(2, 5), random.randint(6, 11)):
        kill_at(start(*command, outs[1]), outs[1], line, timeout=120)
    finished(ended(start(*command, outs[1])))
    assert metrics(outs[0]) == metrics(outs[1])
    for name in ("checkpoint.pt", "checkpoint-best.pt"):
        one, two = (checkpoints.load_checkpoint(out / name) for out in outs)
        for part in ("state_dict", "optimizer", "epoch", "batch", "best"):
            assert same(one[part], two[part]), (name, part)


def test_evaluation_during_training_changes_nothing(arms: dict[str, Path], cli, folder: Path, groups: str):
    out, options = folder / "evaluated", ["--eval-every", "2", "--eval-set", groups]
    finished(cli("emoji-clip", *TINY, *options, "--out", out))
    accuracies = [line for line in metrics(out) if "zero_shot_top1" in line]
    assert [line["step"] for line in accuracies] == [2 * PER_EPOCH, STEPS]  # after two epochs, and at the end
    assert all(0 <= line["zero_shot_top1"] <= 100 for line in accuracies)
    assert [line for line in metrics(out) if "loss" in line] == metrics(arms["clip"])


def test_a_failed_evaluation_costs_no_epoch(folder: Path, groups: str, monkeypatch: pytest.MonkeyPatch):
    """The resumed run repeats the evaluation alone, and still knows its best epoch."""
    found = [{"zero_shot_top1": value} for value in (3.0, 2.0)]
    monkeypatch.setattr(train, "zero_shot_top1", in_turn(found[0], ValueError("broken set"), found[1]))
    flags = [*TINY, "--epochs", "2", "--eval-every", "1", "--eval-set", groups, "--keep-best"]
    monkeypatch.setattr(sys, "argv", [SCRIPT, "emoji-clip", *flags, "--out", str(folder / "failed")])
    cfg = command_line.preset_cli(config.PRESETS)
    with pytest.raises(ValueError, match="broken set"):
        train.main(cfg)
    state = checkpoints.load_checkpoint(folder / "failed/checkpoint.pt")
    assert (state["epoch"], state["batch"], state["best"]) == (1, PER_EPOCH, {groups: 3.0})
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was repeated"))
    train.main(cfg)
    points = {line["step"]: line["zero_shot_top1"] for line in metrics(folder / "failed") if "zero_shot_top1" in line}
    assert points == {PER_EPOCH: 3.0, 2 * PER_EPOCH: 2.0}
    assert checkpoints.load_checkpoint(folder / "failed/checkpoint-best.pt")["epoch"] == 1


def test_a_run_of_one_epoch_is_all_warm_up(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setattr(sys, "argv", [SCRIPT, "emoji-clip", *TINY, "--epochs", "1", "--out", str(folder / "one")])
    train.main(command_line.preset_cli(config.PRESETS))
    assert f"note: the learning rate rises in {PER_EPOCH} of {PER_EPOCH} steps" in capsys.readouterr().out
