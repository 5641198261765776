"""python -m protoclip.train and .teacher, end to end on real emoji shards, in processes of their own.

Every arm, torchrun, windows of shards. What all scripts do is in test_faults.py and test_scale.py.
Scripts start in forks of a server that has imported torch and the rest already, which saves 4 seconds each.
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from protoclip_runs import TINY, corpus, tiny_model  # noqa: F401
from scripts import ENVIRONMENT, ROOT, SHARDS, finished, in_turn, kill_at, metrics, same
from short_runs import small_set

from protoclip import config, train
from protoclip.config import Config
from protoclip.train import (
    parameter_groups,
    train_step,
)
from shared import checkpoints

SCRIPT = "protoclip.train"

STEPS, PER_EPISODE = 15, 5


# ------------------------------------------------------------------------------------------------------- end to end

ARMS = {
    "clip": ["emoji-clip"],
    "no-pbt": ["emoji", "--w-external", "0", "--no-back-translate"],
    "pbt": ["emoji", "--w-external", "0"],
    "external": ["emoji"],
}


@pytest.fixture(scope="module")
def arms(cli, folder: Path) -> dict[str, Path]:
    def train_arm(arm: str) -> Path:
        finished(cli(*ARMS[arm], *TINY, "--out", folder / arm))
        return folder / arm

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARMS, pool.map(train_arm, ARMS), strict=True))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arms: dict[str, Path], arm: str):
    out = arms[arm]
    assert json.loads((out / "config.json").read_text())["back_translate"] == (arm != "no-pbt")
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["episode"] for line in lines] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(np.isfinite(value) for line in lines for value in line.values())
    for line in lines:  # warm-up, then the arm's own losses
        assert (line["proto"] != 0) == (arm != "clip" and line["episode"] > 0)
        assert (line["external"] != 0) == (arm == "external" and line["episode"] > 0)
        assert np.isclose(line["loss"], line["clip"] + line["proto"] + line["external"], rtol=1e-5)
        assert 1 <= line["logit_scale"] <= 100 and ("logit_scale_proto" in line) == (arm != "clip")
        assert 0 <= line["modality_gap"] <= 2 and line["image_feature_std"] > 0 < line["text_feature_std"]
        first = line["step"] % PER_EPISODE == 1 and line["episode"] > 0  # after the clustering of an episode
        assert ("kmeans_error_image" in line and line["kmeans_error_text"] >= 0) == (arm != "clip" and first)
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    assert (state["episode"], state["batch"], state["prototypes"]) == (3, 0, None)
    assert ("logit_scale_proto" in state["state_dict"]) == (arm != "clip")


def test_arms_start_from_the_same_weights_and_samples(arms: dict[str, Path]):
    """Some processors round the last bit of a loss in another way where another loss is added to it."""
    first = {arm: [line["clip"] for line in metrics(out)[:PER_EPISODE]] for arm, out in arms.items()}
    assert all(losses == pytest.approx(first["clip"], rel=1e-5) for losses in first.values())


def test_evaluation_during_training(cli, folder: Path):
    ood = small_set("groups_ood", folder / "sets", every=40)
    options = [*TINY, "--episodes", "2", "--eval-every", "2", "--eval-set", ood, "--episode-size", "32"]
    finished(cli("emoji-clip", *options, "--out", folder / "evaluated"))
    last = metrics(folder / "evaluated")[-1]
    assert last["step"] == 2 and 0 <= last["zero_shot_top1"] <= 100


def test_a_failed_evaluation_costs_no_episode(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """The resumed run repeats the evaluation, neither training nor clustering."""
    calls, extract = [], train.extract_features
    monkeypatch.setattr(train, "extract_features", lambda *args: calls.append(args[2]) or extract(*args))
    monkeypatch.setattr(train.zeroshot, "quick_top1", in_turn(ValueError("broken set"), 1.0, 2.0))
    cfg = dataclasses.replace(
        config.EMOJI, model="ResNet-test", data=f"{SHARDS}/00000.tar", out=str(folder / "failed"), w_external=0.0, k=4,
        precision="fp32", image_size=16, episodes=2, episode_size=32, batch_size=16, infonce_warmup=0, eval_every=1,
        eval_set=str(ROOT / "data/emoji/eval/groups_ood"), warmup=1, log_every=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="broken set"):
        train.main(cfg)
    state = checkpoints.load_checkpoint(folder / "failed/checkpoint.pt")
    assert (state["episode"], state["batch"]) == (0, 2) and state["prototypes"] is not None
    train.main(cfg)
    lines = metrics(folder / "failed")
    assert calls == [32, 32] and [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4]
    assert [line["zero_shot_top1"] for line in lines if "zero_shot_top1" in line] == [1.0, 2.0]


def test_warm_up_and_lit_episodes_are_not_extracted(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls, extract = [], train.extract_features
    monkeypatch.setattr(train, "extract_features", lambda *args: calls.append(args[2]) or extract(*args))
    cfg = dataclasses.replace(
        config.EMOJI, model="ResNet-test",
        data=f"{SHARDS}/00000.tar", out=str(folder / "lit"), w_external=0.0, k=4, precision="fp32",
        image_size=16, episodes=4, episode_size=32, batch_size=16, infonce_warmup=1, lit_start=3, eval_every=0,
        warmup=1, log_every=1,
    )  # fmt: skip
    train.main(cfg)
    assert calls == [32]  # episode 1 of 0..3
    assert [line["proto"] != 0 for line in metrics(folder / "lit")] == [False, False, True, True] + [False] * 4
    assert [line["lr_visual"] > 0 for line in metrics(folder / "lit")] == [True] * 4 + [False] * 4


# ------------------------------------------------------------------------------------------------------ two processes


def assert_equal_runs(one: Path, two: Path) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        local = {"modality_gap", "image_feature_std", "text_feature_std"}  # of the local batch, as upstream's
        for name in a.keys() - local:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} in step {a['step']}")
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        pair = a[name], b[name]
        if name.endswith("in_proj_bias"):  # without keys' biases, whose gradients vanish: Adam makes steps of rounding
            query, _, value = (torch.arange(len(a[name])).chunk(3)[i] for i in range(3))
            pair = tuple(x[torch.cat([query, value])] for x in pair)
        torch.testing.assert_close(
            pair[1], pair[0], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_two_processes_of_torchrun_equal_one(arms: dict[str, Path], folder: Path):
    """The CLIP arm on a ViT: heads have batch norms, which normalise each process's batch on its own."""
    out = folder / "torchrun"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "small_models", SCRIPT, "emoji-clip", *TINY, "--out", out]
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    assert_equal_runs(arms["clip"], out)


# --------------------------------------------------------------------------------------------------- windows of shards


@pytest.fixture(scope="module")
def small_shards(folder: Path) -> list[Path]:
    """Four shards of 64 real pairs."""
    (folder / "shards").mkdir()
    paths = [folder / "shards" / f"{i}.tar" for i in range(4)]
    with tarfile.open(SHARDS / "00001.tar") as source:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)
        for i, path in enumerate(paths):
            with tarfile.open(path, "w") as target:
                for member in members[128 * i : 128 * (i + 1)]:
                    target.addfile(member, source.extractfile(member))
    return paths


def test_episodes_of_few_shards_train_and_resume(cli, start, folder: Path, small_shards: list[Path]):
    """Each episode reads another shard, which is copied to the cache once."""
    shards, cache = str(small_shards[0].parent / "{0..3}.tar"), folder / "cache"
    window = ["--data", f"pipe:cat {shards}", "--episode-shards", "1", "--cache", cache]
    outs = [folder / f"window-{i}" for i in range(2)]
    command = ["emoji", *TINY, *window, "--episodes", "3", "--episode-size", "64", "--save-every", "3", "--out"]
    finished(cli(*command, outs[0]))
    assert len(list(cache.glob("*.tar"))) == 3
    kill_at(start(*command, outs[1]), outs[1], 5)
    finished(cli(*command, outs[1]))
    assert metrics(outs[0]) == metrics(outs[1]) and len(metrics(outs[0])) == 6
    states = [checkpoints.load_checkpoint(out / "checkpoint.pt")["state_dict"] for out in outs]
    assert same(*states)


# ------------------------------------------------------------------------------------------------------- single steps


def one_step(model, cfg: Config, optimizer: torch.optim.Optimizer) -> None:
    batch = torch.arange(2), torch.randn(2, 3, 16, 16), torch.randint(0, 20, (2, 6))
    train_step(model, batch, None, (0.0, 0.0), optimizer, torch.amp.GradScaler("cpu", enabled=False), cfg)


def test_scales_are_clamped_after_each_step():
    model = tiny_model()
    model.logit_scale.data.fill_(9.0)
    one_step(model, Config(precision="fp32"), torch.optim.AdamW(parameter_groups(model, 0.5), lr=1e-3))
    assert 4.6 < model.logit_scale <= math.log(100) + 1e-6


@pytest.mark.parametrize("with_grad", [True, False])
def test_gather_with_grad_decides_which_gradient_features_pass_on(monkeypatch: pytest.MonkeyPatch, with_grad: bool):
    """In one process of three: the temperature's gradient is the same, the image tower's a third."""
    cfg = Config(precision="fp32", gather_with_grad=with_grad)
    torch.manual_seed(0)
    model, gradients = tiny_model(), []
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay))
    monkeypatch.setattr(train.nn.utils, "clip_grad_norm_", lambda *_: torch.zeros(()))
    monkeypatch.setattr(optimizer, "step", lambda *_: None)
    for world_size in (1, 3):
        monkeypatch.setattr(train.run, "world_size", lambda of=world_size: of)
        torch.manual_seed(1)
        one_step(model, cfg, optimizer)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    alone, of_three = gradients
    torch.testing.assert_close(of_three["logit_scale"], alone["logit_scale"])
    for name in ("visual.proj", "visual.conv1.weight"):
        torch.testing.assert_close(of_three[name], alone[name] * (1 if with_grad else 1 / 3))
