"""Presets, dry runs and settings that are refused before a run starts."""

import copy
import functools
import re
import shutil

import pytest
from nmtune_runs import corpus, in_process, one_sentence  # noqa: F401
from scripts import SHARDS

from nmtune import config, encoders

FOLDER = "data/emoji/eval/groups_id"
GROUPS = f"{FOLDER}:test"
ON_GROUPS = ["--encoder", "timm:resnet_emoji", "--data", GROUPS]
PAIRS = ["small-clip", "--data", str(SHARDS)]
ERRORS = {
    "no data": ("train", ["nmtune"], "one source"),
    "paper preset without data": ("train", ["swin-l-nmtune"], "one source"),
    "two sources": ("train", ["--features", "x.npz", "--data", "y"], "--features and --data"),
    "missing features": ("train", ["--features", "no.npz"], "no.npz does not exist"),
    "no encoder": ("train", ["--data", GROUPS], "--encoder is missing"),
    "missing data": ("train", ["--encoder", "timm:resnet_emoji", "--data", "/nowhere"], "/nowhere does not exist"),
    "unknown model": ("train", ["--encoder", "timm:resnet51", "--data", GROUPS], "timm has no model"),
    "unknown source": ("train", ["--encoder", "clip:RN50", "--data", GROUPS], "is neither timm:NAME"),
    "no such run": ("train", ["--encoder", "runs/none", "--data", GROUPS, "--dry-run"], "is neither timm:NAME"),
    "wrong split": ("train", [*ON_GROUPS[:-1], f"{FOLDER}:val"], "holds no .tar file"),
    "a test without name": ("train", ["lp", *ON_GROUPS, "--tests", "x"], "--tests takes NAME=PATH"),
    "a test twice": ("train", ["lp", *ON_GROUPS, "--tests", "id=a", "id=b"], "--tests names id twice"),
    "a test called features": ("train", ["lp", *ON_GROUPS, "--tests", "features=a"], "features has a meaning"),
    "one view in a bank": ("train", ["mlp", *ON_GROUPS, "--bank", "1"], "--bank 1 must be 0"),
    "a choice without memory": ("train", ["--encoder", "timm:resnet_emoji", "--data", "x", "--select"], "--select"),
    "heads without memory": ("train", ["--encoder", "timm:resnet_emoji", "--data", "x", "--heads", "2"], "--heads"),
    "zero-shot MLP": ("train", ["mlp", *ON_GROUPS, "--zero-shot"], "--zero-shot needs"),
    "asymmetric captions": ("pretrain", [*PAIRS, "--asymmetric"], "--asymmetric applies to labels"),
    "a stream of noise": ("pretrain", [*PAIRS, "--no-keep-in-memory", "--stream", "--dataset-size", "9"], "--stream"),
    "a share of nothing": ("train", ["mlp", *ON_GROUPS, "--train-fraction", "0"], "--train-fraction must be above 0"),
    "unknown benchmark": ("train", ["in1k-rn50-lp", "--benchmark", "mnist"], "--benchmark is one of cifar10"),
    "unknown CLIP": ("pretrain", [*PAIRS, "--model", "RN51"], "open_clip has no model 'RN51'"),
    "fine-tuning without encoder": ("finetune", ["full"], "--encoder is missing"),
    "LoRA without blocks": ("finetune", ["lora", *ON_GROUPS], "MLP blocks"),
    "nothing to evaluate": ("eval", [], "name at least one run folder"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path, case):
    script, arguments, message = ERRORS[case]
    out = ["--out", tmp_path / "run"] if script != "eval" else []
    code, _, err = in_process(f"nmtune.{script}", *arguments, *out)
    assert code == 2 and message in err and one_sentence(err), err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("no_initial_values")
@pytest.mark.parametrize("script, presets", [("train", config.PRESETS), ("finetune", config.FINETUNE_PRESETS)])
def test_dry_runs(in_process, script, presets, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    made = functools.lru_cache(1)(encoders.load_encoder)  # presets that follow each other plan with the same one
    copied = lambda *name: copy.deepcopy(made(*name))  # noqa: E731
    monkeypatch.setattr(encoders, "load_encoder", made if script == "train" else copied)
    for preset in presets:
        if (
            script == "train"
            and preset.partition("-")[0] in ("convnext", "efficientnet", "bit", "vit")
            or preset.startswith("swin-l-m")
        ):
            continue  # their heads are those of swin-l
        code, out, err = in_process(f"nmtune.{script}", preset, "--dry-run")
        assert code == 0 and err == "" and not list(tmp_path.iterdir())
        assert re.search(r"^steps +[\d,]+ ", out, re.MULTILINE) and re.search(r"^samples +[\d,]+ an epoch", out, re.M)
        assert re.search(r"^parameters +[\d,]+ tuned", out, re.M) and re.search(r"memory estimate +\d.*GiB", out)
        assert len(re.findall("learning rate", out)) == 3


@pytest.mark.usefixtures("no_initial_values")
@pytest.mark.parametrize("preset", ["in1k-rn50-20", "yfcc15m-rn50-10"])
def test_dry_runs_of_pretraining(in_process, preset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = in_process("nmtune.pretrain", preset, "--dry-run")
    assert code == 0 and not list(tmp_path.iterdir())
    assert all(word in out for word in ("parameters", "learning rate", "memory estimate", "noise"))
    if preset == "yfcc15m-rn50-10":
        assert re.search(r"steps +120,224$", out, re.MULTILINE)


def test_a_dry_run_counts_your_own_captions(in_process, tmp_path):
    shutil.copy(SHARDS / "00000.tar", tmp_path / "mine.tar")
    code, out, err = in_process("nmtune.pretrain", "small-clip", "--data", tmp_path / "mine.tar", "--dry-run")
    assert code == 0 and re.search(r"^steps +98$", out, re.M), (out, err)  # 7 of 128 in each of 14 epochs
