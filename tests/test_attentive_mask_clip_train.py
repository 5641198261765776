"""A-CLIP's train.py, timing.py and study.py, end to end on real emoji shards, in processes of their own.

Every arm, kill -9 and resume, two processes against one, broken shards, command-line errors, dry runs, reports. Scripts
start in forks of a server that has imported torch and the rest already, which saves 4 seconds each.
"""

import dataclasses
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import tyro
from scripts import ENVIRONMENT, ROOT, ended, finished, kill_at, metrics, one_sentence, same, start_two

from attentive_mask_clip import config, study, timing, train
from attentive_mask_clip import eval as evaluation
from attentive_mask_clip.model import ACLIP, create_model
from shared import checkpoints, data
from shared.study.report import Comparison

SHARDS = ROOT / "data/emoji/train"
SCRIPT, SECONDS = "attentive_mask_clip.train", 120
PRELOAD = ["attentive_mask_clip.model", "attentive_mask_clip.crops", "shared.zeroshot", "torch.utils.tensorboard"]

STEPS, PER_EPOCH = 9, 3
TINY = f"""--data {SHARDS}/00000.tar --dataset-size 96 --image-size 20 --epochs 3 --batch-size 32 --warmup-epochs 1
    --lr 1e-3 --eps 1e-4 --precision fp32 --workers 0 --eval-every 0 --log-every 1""".split()


@pytest.fixture(scope="module", autouse=True)
def corpus():
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.corpora.emoji'", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """For run folders; emptied at the end, since a checkpoint has 80 MB."""
    path = tmp_path_factory.mktemp("aclip")
    yield path
    shutil.rmtree(path)


# -------------------------------------------------------------------------------------------------------- end to end

MASKED = ["--views", "1", "--no-ssl"]
ARMS = {
    "clip": ["emoji-clip"],
    "slip": ["emoji-slip"],
    "random": ["emoji", "--mask", "random", *MASKED],
    "attentive": ["emoji", *MASKED],
    "high-drop": ["emoji", "--mask", "high", *MASKED],
    "aclip": ["emoji"],
    "aclip-eff": ["emoji", "--ema-image-size", "10"],
    "unmasked": ["emoji", "--mask", "none"],
    "released": ["emoji", "--released-boxes", "--simclr-pair", "same"],
}
SSL = ("aclip", "aclip-eff", "unmasked", "released")


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
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt"}
    assert list((out / "tensorboard").iterdir())
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


def test_methods_start_from_the_same_towers_and_first_crops():
    states, samples = [], []
    pairs = data.open_pairs(f"{SHARDS}/00000.tar", 8)
    for arm in ("emoji", "emoji-clip", "emoji-slip"):
        cfg = dataclasses.replace(config.PRESETS[arm][1])
        torch.manual_seed(cfg.seed)
        states.append(create_model(cfg.method, cfg.model, **cfg.model_settings()).state_dict())
        dataset = train.ViewDataset(pairs, cfg, 20, lambda text: torch.zeros(1, 4, dtype=torch.long), (0, 0), True)
        samples.append([dataset[i][1][0] for i in range(8)])
    for name in states[1]:
        assert torch.equal(states[0][name], states[1][name]) and torch.equal(states[2][name], states[1][name]), name
    assert all(same(boxes, samples[0]) for boxes in samples)


def test_a_finished_run_is_not_run_twice(arms: dict[str, Path], cli):
    out = arms["aclip"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    began = time.monotonic()
    result = finished(cli(*ARMS["aclip"], *TINY, "--out", out))
    assert "is finished (3 epochs); nothing to do" in result.out and time.monotonic() - began < 10
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


def test_evaluation_during_training_changes_nothing(arms: dict[str, Path], cli, folder: Path):
    out, options = folder / "evaluated", ["--eval-every", "2", "--eval-set", ROOT / "data/emoji/eval/groups_ood"]
    finished(cli("emoji-clip", *TINY, *options, "--out", out))
    accuracies = [line for line in metrics(out) if "zero_shot_top1" in line]
    assert [line["step"] for line in accuracies] == [2 * PER_EPOCH, STEPS]  # after two epochs, and at the end
    assert all(0 <= line["zero_shot_top1"] <= 100 for line in accuracies)
    assert [line for line in metrics(out) if "loss" in line] == metrics(arms["clip"])


# -------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("arm, workers", [("aclip", 0), ("random", 2), ("slip", 0)])
def test_kill_and_resume_equals_uninterrupted(arms: dict[str, Path], start, folder: Path, arm: str, workers: int):
    out = folder / f"killed-{arm}"
    command = [*ARMS[arm], *TINY, "--save-every", "2", "--workers", workers, "--out", out]
    kills = [random.randint(2, 4), random.randint(5, 8)]
    for line in kills:
        kill_at(start(*command), out, line, timeout=120)
    finished(ended(start(*command)))
    assert metrics(out) == metrics(arms[arm]), kills
    state, expected = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (out, arms[arm]))
    for part in ("state_dict", "optimizer", "epoch", "batch"):
        assert same(state[part], expected[part]), (part, kills)


# ------------------------------------------------------------------------------------------------------ two processes


def assert_equal_lines(one: Path, two: Path, steps: int | None = None) -> None:
    for a, b in list(zip(metrics(one), metrics(two), strict=True))[:steps]:
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} in step {a['step']}")


def assert_equal_weights(one: Path, two: Path) -> None:
    """TINY has a large Adam eps: else the rounding of a vanishing gradient becomes a visible step."""
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("arm", ["aclip", "slip"])
def test_two_processes_of_torchrun_equal_one(arms: dict[str, Path], folder: Path, arm: str):
    """A-CLIP to the first steps only: of two tokens of nearly equal attention, rounding decides later on."""
    out = folder / f"{arm}-2"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "attentive_mask_clip.train", *ARMS[arm], *TINY, "--out", out]
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert_equal_lines(arms[arm], out, 4 if arm == "aclip" else None)
    if arm == "slip":
        assert_equal_weights(arms[arm], out)


@pytest.mark.parametrize("arm", ["slip", "attentive"])
def test_two_processes_equal_one(arms: dict[str, Path], start, folder: Path, arm: str):
    """The processes get what torchrun would tell them. They are killed on the way, and a single one takes over."""
    out = folder / f"{arm}-2"
    command = [*ARMS[arm], *TINY, "--save-every", "3", "--out", out]
    first, second = start_two(start, *command)
    kill_at(first, out, 5, timeout=120)
    second.kill()
    second.join()
    finished(ended(start(*command)))
    assert_equal_lines(arms[arm], out)
    assert_equal_weights(arms[arm], out)


# ------------------------------------------------------------------------------------------------------ broken shards


@pytest.fixture(scope="module")
def broken_shards(folder: Path) -> str:
    """One shard cut in the middle of an image, one of 64 real pairs with two broken samples and one without caption."""
    cut, mixed = folder / "cut.tar", folder / "mixed.tar"
    with tarfile.open(SHARDS / "00001.tar") as source, tarfile.open(mixed, "w") as target:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)
        for member in members[:128]:
            target.addfile(member, source.extractfile(member))
    cut.write_bytes(mixed.read_bytes()[:40_000])
    with tarfile.open(mixed, "a") as tar:
        contents = {"bad.png": b"?", "bad.txt": b"bad", "mute.png": b"?", "mute.txt": b"", "x.png": b"?"}
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"{cut}::{mixed}"


def counts(report: str) -> list[str]:
    """What was wrong how often, without the names of samples, of which a report has a few."""
    return sorted(re.split(r"[:,] ", report.partition(" (")[0]))


def test_broken_shards_are_reported_and_the_run_finishes(cli, start, folder: Path, broken_shards: str):
    command = [*ARMS["attentive"], *TINY, "--data", broken_shards, "--out"]
    result = finished(cli(*command, folder / "broken"))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert len(reports) == 3 and reports[0].startswith("epoch 1: ")
    assert all("1 missing caption" in line and "truncated or damaged tar" in line for line in reports)
    assert any("unreadable image" in line for line in reports)
    assert "fewer than --dataset-size 96" in result.out

    both = start_two(start, *command, folder / "broken-2")  # the report counts the samples of both
    results = [finished(ended(process)) for process in both]
    again = [line for line in results[0].out.splitlines() if "broken samples" in line]
    assert [counts(line) for line in again] == [counts(line) for line in reports]
    assert "broken samples" not in results[1].out


def test_strict_names_the_sample(in_process, folder: Path, broken_shards: str):
    cut, mixed = broken_shards.split("::")
    for shards, reason in ((cut, "truncated or damaged tar"), (mixed, "sample x: missing caption")):
        result = in_process("emoji-clip", *TINY, "--data", shards, "--strict", "--out", folder / "strict")
        assert result.code == 2 and reason in result.err and one_sentence(result.err)


# ------------------------------------------------------------------------------------------------------ command lines


ERRORS = {
    "paper preset without data": (["yfcc15m-vitb16"], "--data is missing: it takes image-text shards"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "empty folder": (["emoji", "--data", str(ROOT / "shared")], "holds no .tar shard"),
    "unknown model": (["emoji", "--model", "vit_b32"], "--model is one of vit_s16, vit_b16, vit_l16, emoji"),
    "patches that do not tile": (["emoji", "--image-size", "22"], "--image-size 22 cannot be cut into patches of 5"),
    "blocks that do not tile": (["emoji", "--image-size", "25"], "blocks of 2x2 patches do not tile 5 patches a side"),
    "EMA view that does not tile": (["emoji", "--ema-image-size", "11"], "--ema-image-size 11 cannot be cut"),
    "nothing kept": (["emoji", "--keep-ratio", "0"], "--keep-ratio must be above 0 and at most 1, not 0"),
    "too much kept": (["emoji", "--keep-ratio", "1.5"], "--keep-ratio must be above 0 and at most 1"),
    "momentum above 1": (["emoji", "--ema-momentum", "1.1"], "--ema-momentum must be in 0..1"),
    "long warm-up": (["emoji", "--warmup-epochs", "4"], "--warmup-epochs 4.0 must be in 0..3"),
    "less than a batch": (["emoji", "--dataset-size", "31"], "holds 31 pairs, less than one batch of 32"),
    "one pair for BatchNorm": (["emoji", "--batch-size", "1"], "too few for BatchNorm"),
    "uneven micro-batches": (["emoji", "--accumulate", "3"], "--batch-size 32 cannot be shared out evenly"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no evaluation set": (
        ["emoji", "--eval-every", "1", "--eval-set", "/nowhere"],
        "--eval-set /nowhere does not exist",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset == "emoji" else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "arguments", [["emoji", "--lerning-rate", "1"], ["emoji", "--mask", "low"], ["emoji", "--views", "3"], ["yfcc"], []]
)
def test_wrong_flags(in_process, arguments: list[str]):
    result = in_process(*arguments)
    assert result.code == 2 and "Traceback" not in result.err
    assert all(word in result.err for word in arguments[1:2])


def test_run_folders_of_other_runs_are_refused(in_process, arms: dict[str, Path], tmp_path: Path):
    result = in_process(*ARMS["aclip"], *TINY, "--lr", "1e-4", "--out", arms["aclip"])
    assert result.code == 2 and "lr (was 0.001, now 0.0001)" in result.err and one_sentence(result.err)
    (tmp_path / "checkpoint.pt").write_bytes((arms["clip"] / "checkpoint.pt").read_bytes()[:1_000_000])
    result = in_process(*ARMS["clip"], *TINY, "--out", tmp_path)
    assert result.code == 2 and "checkpoint.pt is not a checkpoint" in result.err and one_sentence(result.err)


def test_a_run_does_not_go_on_with_other_data(in_process, arms: dict[str, Path], tmp_path: Path):
    shard, out = tmp_path / "shard.tar", tmp_path / "run"
    shutil.copy(SHARDS / "00001.tar", shard)
    state = checkpoints.load_checkpoint(arms["clip"] / "checkpoint.pt")
    state["config"] |= {"data": str(shard), "out": str(out)}
    out.mkdir()
    torch.save(state | {"epoch": 1}, out / "checkpoint.pt")  # as if it had stopped early
    result = in_process("emoji-clip", *TINY, "--data", shard, "--out", out)
    assert result.code == 2 and "was trained on other data" in result.err and one_sentence(result.err)


# ----------------------------------------------------------------------------------------------------------- dry run

STEPS_AN_EPOCH = 14_689_580 // 4096


def thin_towers(method: str, preset: str, **settings):
    """Of the preset's geometry, but quick."""
    geometry = dict(image_size=40, patch_size=5) if preset == "emoji" else dict(image_size=224, patch_size=16)
    return create_model(method, "emoji", **{**geometry, "vision_layers": 1, "text_layers": 1, **settings})


@pytest.mark.parametrize("preset", config.PRESETS)
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    cfg = config.PRESETS[preset][1]
    if preset not in ("emoji", "yfcc15m-vits16"):
        monkeypatch.setattr("attentive_mask_clip.model.create_model", thin_towers)
    if cfg.data:  # counts the samples of the corpus
        (tmp_path / "data").symlink_to(ROOT / "data")
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and {path.name for path in tmp_path.iterdir()} <= {"data"}
    assert all(word in result.out for word in ("parameters", "learning rate", "samples", "batch", "patches"))
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert ("EMA momentum 0.9" in result.out) == (cfg.method == "aclip")
    if not cfg.data:
        assert re.search(rf"^steps +{STEPS_AN_EPOCH * cfg.epochs:,} ", result.out, re.MULTILINE)
        masked = cfg.method == "aclip"
        kept = {"random": 98, "attentive": 100, "high": 100}[cfg.mask]
        assert (f"patches            196, {kept} kept in each of {cfg.views} views" in result.out) == masked


@pytest.mark.parametrize("preset", config.PRESETS)
def test_sizes_of_presets(preset: str):
    cfg = config.PRESETS[preset][1]
    config.check_model(cfg)
    with torch.device("meta"):
        model = create_model(cfg.method, cfg.model, **cfg.model_settings())
    expected = {"emoji": 0.6, "vit_s16": 21.7, "vit_b16": 85.8, "vit_l16": 303.3}[cfg.model]
    assert round(sum(p.numel() for p in model.visual.parameters()) / 1e6, 1) == expected


def test_parameters_of_the_paper():
    for method, expected in {"clip": 149.6, "slip": 170.6, "aclip": 176.9}.items():
        with torch.device("meta"):
            model = create_model(
                method, "vit_b16", **dataclasses.replace(config.Config(), method=method).model_settings()
            )
        ema = 0 if not isinstance(model, ACLIP) else sum(online.numel() for _, online in model._pairs())
        total = sum(p.numel() for p in model.parameters()) - ema
        assert round(total / 1e6, 1) == expected, (method, total)


# ------------------------------------------------------------------------------------------------------------- timing


def test_timing_script(cli, folder: Path):
    out = folder / "times.json"
    command = ["--arms", "aclip", "aclip-eff", "slip", "--batch-size", "4", "--rounds", "2", "--out", out]
    result = finished(cli(*command, module="attentive_mask_clip.timing"))
    times = json.loads(out.read_text())
    assert list(times) == ["clip", "aclip", "aclip-eff", "slip"] and times["clip"]["ratio"] == 1
    assert all(t["low"] <= t["ratio"] <= t["high"] and t["seconds"] > 0 for t in times.values())
    assert all(ratio in result.out for ratio in timing.PAPER.values())


def test_timing_refuses_unknown_names(in_process):
    for flag, message in {"--arms": "--arms takes clip, random", "--model": "--model is one of vit_s16"}.items():
        result = in_process(flag, "other", module="attentive_mask_clip.timing")
        assert result.code == 2 and message in result.err and one_sentence(result.err)


# -------------------------------------------------------------------------------------------------------------- study


def test_the_report_has_what_the_study_declares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """`eval --report --times` of two arms, as the study runs it, with measurements that are given."""
    report, times = tmp_path / "report/results.json", tmp_path / "times.json"
    step = {"seconds": 2.0, "ratio": 1.5, "low": 1.25, "high": 2.0}
    times.write_text(json.dumps({"clip": step | {"ratio": 1.0}, "aclip": step}))
    runs = [str(tmp_path / f"{arm}-seed0") for arm in ("aclip", "clip")]
    for run in map(Path, runs):
        run.mkdir()
        torch.save({"epoch": 2, "config": {"epochs": 2}, "commit": "abc"}, run / "checkpoint.pt")
        lines = [{"step": n, "seconds": n / 2, "zero_shot_top1": n / 4} for n in (3, 6)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "aclip-seed0/kept.png").write_bytes(b"picture")
    given = dict.fromkeys([*evaluation.METRICS, "kept/untrained_share"], 2.0)
    monkeypatch.setattr(evaluation, "evaluated", lambda path, *_: given | {"names_ood/top1": 2.0 + ("aclip" in path)})
    evaluation.main(evaluation.Config(runs=tuple(runs), times=str(times), report=str(report), device="cpu"))
    found, shown = json.loads(report.read_text()), capsys.readouterr().out
    assert list(found["arms"]) == ["clip", "aclip"] and set(found["arms"]["clip"]) == set(given)
    claims = {row["claim"]: row for row in found["claims"]}
    expected = {claim.claim for claim in study.CLAIMS if {claim.method, claim.baseline} == {"clip", "aclip"}}
    assert expected and expected == set(claims) & {claim.claim for claim in study.CLAIMS}
    assert claims["A-CLIP above CLIP"]["here"] == "+1.00"
    time = claims["step time of A-CLIP / CLIP's"]
    assert (time["paper"], time["here"]) == ("1.16x", "1.50x (1.25-2.00)") and str(report) in shown
    pictures = {"attentive_mask_clip_curves.png", "attentive_mask_clip_kept.png"}
    assert {path.name for path in report.parent.iterdir()} == pictures | {"results.json"}
    assert (report.parent / "attentive_mask_clip_kept.png").read_bytes() == b"picture"


def test_rows_of_an_arm_compare_measurements_of_the_same_run():
    kept = {"kept/attentive_share": 90.0, "kept/random_share": 75.0, "kept/centre_share": 90.0}
    run = kept | {"kept/untrained_share": 92.0, "names_ood/top1": 3.0, "online/names_ood/top1": 2.5}
    rows = {row["claim"]: row for row in study.more_rows(Comparison({"aclip": [run]}, [0], {}, set()))}
    here = {
        claim.removeprefix("aclip: kept patches hold more foreground than "): r["here"] for claim, r in rows.items()
    }
    assert (here["random ones"], here["the centre's"], here["before training"]) == ("+15.00", "+0.00", "-2.00")
    assert here["A-CLIP: EMA towers above online"] == "+0.50"
    assert not any("step time" in claim for claim in rows)  # none were measured


def test_the_arms_of_the_study_are_those_that_are_timed():
    for arm in study.STUDY.chosen("all"):
        words = arm.command.removeprefix("train ").split()
        assert words == (["emoji", "--ema-image-size", "20"] if arm.name == "aclip-eff" else ARMS[arm.name])
        cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words)
        assert all(getattr(cfg, name) == value for name, value in timing.ARMS[arm.name].items()), arm.name
