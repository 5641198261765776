"""python -m tinyclip.train and .eval, end to end on real emoji shards, in processes of their own.

Every kind of stage, kill -9 and resume, two processes against one, broken shards, command-line errors, open_clip.
Scripts start in forks of a server that has imported torch and the rest already.
"""

import dataclasses
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import tyro
from scripts import ENVIRONMENT, ROOT, ended, finished, kill_at, metrics, one_sentence, same, start_two

from shared import checkpoints
from shared.study import statistics
from shared.study.report import Comparison
from tinyclip import config, study, train
from tinyclip import eval as evaluation
from tinyclip.model import CLIP, CONFIGS, create_model, load_clip
from tinyclip.train import first_weights

SHARDS = ROOT / "data/emoji/train"
SCRIPT, SECONDS = "tinyclip.train", 90
PRELOAD = ["tinyclip.model", "tinyclip.config", "shared.data", "shared.zeroshot", "torch.utils.tensorboard"]

STEPS = 8
TINY = f"""--data {SHARDS}/00000.tar --dataset-size 96 --image-size 16 --steps {STEPS} --batch-size 32 --eval-every 0
    --warmup 2 --precision fp32 --log-every 1""".split()
MASKS = "--prune-step 4 --sparsity-warmup 2 --mask-lr 1.0 --lambda-lr -1.0".split()


@pytest.fixture(scope="module", autouse=True)
def corpus():
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.corpora.emoji'", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """For run folders; emptied at the end, since a checkpoint has 90 MB."""
    path = tmp_path_factory.mktemp("tinyclip")
    yield path
    shutil.rmtree(path)


# ------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def runs(cli, folder: Path) -> dict[str, Path]:
    """A teacher and every kind of stage after it; the second automatic stage starts from the first."""
    teacher = folder / "teacher-seed0"
    given = ["--teacher", teacher, "--init", teacher]
    commands = {
        "teacher": ["emoji-teacher"],
        "random-contrastive": ["emoji-contrastive", "--init", "None"],
        "inherited-affinity": ["emoji", *given],
        "random-channels": ["emoji", *given, "--inherit", "random"],
        "crops": ["emoji", *given, "--augmentation", "crop", "--no-keep-in-memory", "--depth-rule", "uniform"],
        "auto": ["emoji-auto", *given, *MASKS],
        "auto-progressive": [
            *("emoji-auto", *given, *MASKS, "--init", folder / "auto-seed0"),
            *("--start-sparsity", "0.5", "--target-sparsity", "0.75"),
        ],
    }
    for arm, command in commands.items():
        finished(cli(*command, *TINY, "--out", folder / f"{arm}-seed0"))
    return {arm: folder / f"{arm}-seed0" for arm in commands}


def test_every_stage_trains(runs: dict[str, Path]):
    for arm, out in runs.items():
        files = {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt", "model.pt"}
        files |= {"masks.pt"} if "auto" in arm else set()
        assert {path.name for path in out.iterdir()} == files, arm
        lines = [line for line in metrics(out) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        assert all(np.isfinite(value) for line in lines for value in line.values())
        assert [("constraint" in line) for line in lines] == ["auto" in arm] * 4 + [False] * 4
        state = checkpoints.load_checkpoint(out / "checkpoint.pt")
        assert state["step"] == STEPS and state["masks"] is None
        scale = state["state_dict"]["logit_scale"].exp().item()
        assert math.isclose(scale, 50, rel_tol=1e-5) == (arm not in ("teacher", "random-contrastive"))


def test_sizes(runs: dict[str, Path]):
    sizes = {arm: load_clip(out) for arm, out in runs.items()}
    shapes = {arm: {name: value.shape for name, value in model.state_dict().items()} for arm, model in sizes.items()}
    assert shapes["random-channels"] == shapes["inherited-affinity"] == shapes["random-contrastive"]
    pruned, again = (
        sum(p.numel() for p in sizes[arm].transformer.parameters()) for arm in ("auto", "auto-progressive")
    )
    assert again < pruned < sum(p.numel() for p in sizes["teacher"].transformer.parameters())
    for arm in ("auto", "auto-progressive"):
        reached = [line["sparsity_reached"] for line in metrics(runs[arm]) if "sparsity_reached" in line]
        assert len(reached) == 1 and 0 < reached[0] < 1


def test_inherited_weights_start_as_the_teachers(runs: dict[str, Path]):
    cfg = dataclasses.replace(config.EMOJI, init=str(runs["teacher"]), image_size=16)
    (student, _), teacher = first_weights(cfg), load_clip(runs["teacher"])
    assert torch.equal(student.visual.conv1.weight, teacher.visual.conv1.weight[:96])
    assert torch.equal(student.transformer.resblocks[1].ln_1.weight, teacher.transformer.resblocks[2].ln_1.weight)
    assert student.logit_scale.exp().item() == pytest.approx(1 / 0.07)
    auto = dataclasses.replace(config.EMOJI_AUTO, init=str(runs["teacher"]), image_size=16)
    whole, masks = first_weights(auto)
    state = whole.state_dict()
    assert all(torch.equal(state[k], v) for k, v in teacher.state_dict().items() if k != "logit_scale")
    assert all((loga == 10).all() for mask in masks for loga in mask.logas().values())


def test_the_second_stage_starts_where_the_first_ended(runs: dict[str, Path]):
    """All that the first stage has left sits in the front corner of full size, with its gates open."""
    auto = dataclasses.replace(config.EMOJI_AUTO, init=str(runs["auto"]), image_size=16)
    (student, (image_mask, text_mask)), first = first_weights(auto), load_clip(runs["auto"])
    width = first.geometry["text"]["width"]
    assert torch.equal(student.token_embedding.weight[:, :width], first.token_embedding.weight)
    assert not student.token_embedding.weight[:, width:].any()
    assert (text_mask.hidden_loga > 0).sum() == width
    heads = [int((row > 0).sum()) for row in image_mask.heads_loga]
    assert heads == [0 if block.attn is None else block.attn.heads for block in first.visual.transformer.resblocks]


def test_a_finished_run_is_not_run_twice(runs: dict[str, Path], cli):
    out = runs["auto"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    given = ["--teacher", runs["teacher"], "--init", runs["teacher"]]
    result = finished(cli("emoji-auto", *given, *MASKS, *TINY, "--out", out))
    assert f"is finished ({STEPS} steps); nothing to do" in result.out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


def test_evaluation_during_training(runs: dict[str, Path], cli, folder: Path):
    ood = ROOT / "data/emoji/eval/groups_ood"
    options = [*TINY, *MASKS, "--steps", "6", "--eval-every", "3", "--eval-set", ood]
    given = ["--teacher", runs["teacher"], "--init", runs["teacher"]]
    finished(cli("emoji-auto", *given, *options, "--out", folder / "evaluated"))
    points = [
        (line["step"], line["zero_shot_top1"]) for line in metrics(folder / "evaluated") if "zero_shot_top1" in line
    ]
    assert [step for step, _ in points] == [3, 6] and all(0 <= top1 <= 100 for _, top1 in points)


# -------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("arm", ["auto", "crops"])
def test_kill_and_resume_equals_uninterrupted(runs: dict[str, Path], start, folder: Path, arm: str):
    """Once before the masks are cut, once after, and in a run that reads and crops while it trains."""
    out, teacher = folder / f"killed-{arm}", runs["teacher"]
    given = ["--teacher", teacher, "--init", teacher, *TINY, "--save-every", "1", "--out", out]
    crops = ["--augmentation", "crop", "--no-keep-in-memory", "--depth-rule", "uniform", "--workers", "1"]
    command = ["emoji-auto", *MASKS, *given] if arm == "auto" else ["emoji", *crops, *given]
    kills = [random.randint(2, 3), random.randint(6, 7)]
    for line in kills:
        kill_at(start(*command), out, line)
    finished(ended(start(*command)))
    assert metrics(out) == metrics(runs[arm]), kills
    state, expected = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (out, runs[arm]))
    for part in ("state_dict", "optimizers", "geometry", "step"):
        assert same(state[part], expected[part]), (part, kills)


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.parametrize("arm", ["auto", "inherited-affinity"])
def test_two_processes_equal_one(runs: dict[str, Path], start, folder: Path, arm: str):
    """The processes get what torchrun would tell them."""
    out, teacher = folder / f"two-{arm}", runs["teacher"]
    preset = ["emoji-auto", *MASKS] if arm == "auto" else ["emoji"]
    command = [*preset, "--teacher", teacher, "--init", teacher, *TINY, "--out", out]
    for process in start_two(start, *command):
        finished(ended(process))
    one, two = ([line for line in metrics(path) if "loss" in line] for path in (runs[arm], out))
    for a, b in zip(one, two, strict=True):
        for name in ("expected_sparsity", "image_sparsity", "gradient_norm", "text_lambda_1"):
            if name in a:
                np.testing.assert_allclose(b[name], a[name], rtol=2e-3, err_msg=f"{name} in step {a['step']}")
    # `distillation` is each process's own part; Adam turns the rounding of a vanishing gradient into part of a step
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (runs[arm], out))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=5e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_torchrun(cli, folder: Path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = [*TINY, "--steps", "2", "--model", "emoji-25"]
    command = [*torchrun, "-m", "tinyclip.train", "emoji-teacher", *options, "--out", folder / "torchrun"]
    environment = os.environ | ENVIRONMENT
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert checkpoints.load_checkpoint(folder / "torchrun/checkpoint.pt")["step"] == 2


# --------------------------------------------------------------------------------------------------- broken shards


@pytest.fixture(scope="module")
def broken_shards(folder: Path) -> str:
    """One shard cut in the middle of an image, one with two broken samples and one without caption."""
    whole, cut, mixed = folder / "whole.tar", folder / "cut.tar", folder / "mixed.tar"
    with tarfile.open(SHARDS / "00001.tar") as source, tarfile.open(whole, "w") as target:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)
        for member in members[:128]:
            target.addfile(member, source.extractfile(member))
    cut.write_bytes(whole.read_bytes()[:40_000])
    shutil.copy(whole, mixed)
    samples = [("bad.png", b"?"), ("bad.txt", b"bad"), ("mute.png", b"?"), ("mute.txt", b""), ("x.png", b"?")]
    with tarfile.open(mixed, "a") as tar:
        for name, content in samples:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"{cut}::{mixed}"


@pytest.mark.parametrize("preset", ["emoji-teacher", "emoji-contrastive"])  # read in every epoch, and read once
def test_broken_shards_are_reported_and_the_run_finishes(cli, folder: Path, broken_shards: str, preset: str):
    out = folder / f"broken-{preset}"
    options = [*TINY, "--init", "None", "--dataset-size", "None", "--data", broken_shards, "--steps", "4", "--out", out]
    result = finished(cli(preset, *options))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert reports and reports[0].startswith("epoch 1: ")
    assert "1 missing caption" in reports[0] and "truncated or damaged tar" in reports[0]
    assert any("unreadable image" in line for line in reports)


def test_strict_names_the_sample(cli, folder: Path, broken_shards: str):
    options = [*TINY, "--dataset-size", "None", "--data", broken_shards, "--strict", "--out", folder / "strict"]
    result = cli("emoji-teacher", *options)
    assert result.code == 2 and "truncated or damaged tar" in result.err and one_sentence(result.err)


# ---------------------------------------------------------------------------------------------------- command lines


ERRORS = {
    "paper preset without data": (["manual-61M-29M"], "--data is missing: it takes image-text shards"),
    "missing shard": (["emoji-teacher", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing teacher": (["emoji", "--init", "None", "--teacher", "/nowhere"], "--teacher /nowhere does not exist"),
    "missing weights": (["emoji-contrastive", "--init", "/nowhere"], "--init /nowhere does not exist"),
    "a teacher that is none": (["emoji", "--init", "None", "--teacher", f"{SHARDS}/00000.tar"], "is not a checkpoint"),
    "unknown weights": (["emoji", "--init", "None", "--teacher", "ViT-B-32@nothing"], "weights of open_clip that fit"),
    "other weights": (["emoji", "--init", "None", "--teacher", "ViT-L-14@openai"], "weights of open_clip that fit"),
    "affinity without a teacher": (["emoji", "--teacher", "None"], "affinity mimicking needs --teacher"),
    "unknown model": (["emoji-teacher", "--model", "RN51"], "--model 'RN51' is none of"),
    "alpha": (["emoji-teacher", "--alpha", "2"], "--alpha 2.0 is not between 0"),
    "temperature": (["emoji-teacher", "--logit-scale", "0"], "--logit-scale 0.0 must be above 0"),
    "pruning too late": (["emoji-auto", "--prune-step", "8"], "--prune-step 8 is not within the 8 steps"),
    "falling sparsity": (["emoji-auto", *MASKS, "--start-sparsity", "0.9"], "--start-sparsity 0.9"),
    "nothing to mask": (["emoji-auto", *MASKS, "--mask-types", "hidden"], "--mask-types needs both heads"),
    "half of what counts": (["emoji-auto", *MASKS, "--mask-types", "heads"], "--mask-types needs both heads"),
    "masks on a ResNet": (["emoji-auto", *MASKS, "--model", "RN50"], "not on the ResNet of RN50"),
    "too few pairs": (["emoji-teacher", "--batch-size", "97"], "holds 96 pairs, less than one batch"),
    "no steps": (["emoji-teacher", "--steps", "0"], "--steps must be at least 1"),
    "no steps between logs": (["emoji-teacher", "--log-every", "0"], "--log-every must be at least 1"),
    "crops in memory": (["emoji-teacher", "--keep-in-memory"], "it needs --augmentation none"),
    "patches that do not fit": (["emoji-teacher", "--image-size", "20"], "is no multiple of patch_size 8"),
    "fp16 on a CPU": (["emoji-teacher", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no pixels": (["emoji-teacher", "--image-size", "0"], "--image-size must be at least 1 pixel"),
    "evaluation before it starts": (["emoji-teacher", "--eval-every", "-1"], "--eval-every must be at least 0"),
    "no evaluation set": (["emoji-teacher", "--eval-every", "1", "--eval-set", "/nowhere"], "--eval-set /nowhere"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset.startswith("emoji") else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("arguments", [["emoji", "--lerning-rate", "1"], ["emoji", "--lr", "fast"], ["imagenet"], []])
def test_wrong_flags(in_process, arguments: list[str]):
    result = in_process(*arguments)
    assert result.code == 2 and "Traceback" not in result.err
    assert all(word in result.err for word in arguments[1:2])


def test_runs_that_do_not_fit_are_refused(in_process, runs: dict[str, Path], tmp_path: Path):
    given = ["--teacher", runs["teacher"], "--init", runs["teacher"]]
    result = in_process("emoji", *given, *TINY, "--lr", "1e-4", "--out", runs["inherited-affinity"])
    assert result.code == 2 and "lr (was 0.001, now 0.0001)" in result.err and one_sentence(result.err)
    (tmp_path / "unfinished").mkdir()
    result = in_process("emoji-contrastive", *TINY, "--init", tmp_path / "unfinished", "--out", tmp_path / "a")
    assert result.code == 2 and "its run is not finished" in result.err and one_sentence(result.err)
    result = in_process("emoji", *given, *TINY, "--inherit", "random", "--quick-gelu", "--out", tmp_path / "a")
    assert result.code == 2 and "--inherit random cannot cut emoji-50" in result.err and one_sentence(result.err)
    result = in_process("emoji", *given, *TINY, "--image-size", "24", "--out", tmp_path / "a")
    assert result.code == 2 and "the teacher sees 16 pixels" in result.err and one_sentence(result.err)
    result = in_process("emoji", "--teacher", runs["teacher"], *TINY, "--model", "emoji-100", "--init", runs["auto"])
    assert result.code == 2 and "more than" in result.err and one_sentence(result.err)


def test_a_run_does_not_go_on_with_other_data(in_process, tmp_path: Path):
    shard, out = tmp_path / "shard.tar", tmp_path / "run"
    shutil.copy(SHARDS / "00000.tar", shard)
    options = [*TINY, "--data", shard, "--model", "emoji-25", "--steps", "3", "--save-every", "2", "--out", out]
    assert in_process("emoji-teacher", *options).code == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(state | {"step": 2}, out / "checkpoint.pt")  # as if it had stopped early
    shutil.copy(SHARDS / "00001.tar", shard)
    result = in_process("emoji-teacher", *options)
    assert result.code == 2 and "was trained on other data" in result.err and one_sentence(result.err)


@pytest.mark.parametrize("preset", train.PRESETS)
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    cfg = config.PRESETS[preset][1]
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    total = int(re.search(r"parameters +([\d,]+) ", result.out)[1].replace(",", ""))
    with torch.device("meta"):
        assert total == sum(p.numel() for p in create_model(cfg.model).parameters())
    assert re.search(rf"^steps +{cfg.steps:,}$", result.out, re.MULTILINE)
    assert f"{cfg.steps * cfg.batch_size:,}" in result.out and ("masks  " in result.out) == cfg.masks
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0


# ------------------------------------------------------------------------------------------------------- checkpoints


def theirs(model: CLIP, layout: str) -> dict[str, torch.Tensor]:
    """The state dict with the keys that the authors' files have."""
    if layout == "openai":
        return {f"module.{name}": value for name, value in model.state_dict().items()}
    state = {}
    for name, value in model.state_dict().items():
        tower = (
            "logit_scale" if name == "logit_scale" else "image_encoder" if name.startswith("visual") else "text_encoder"
        )
        state[f"_{tower}.{'module.' if layout == 'towers, distributed' else ''}{name}"] = value
        if layout == "auto" and tower != "logit_scale":
            state[f"{tower}_without_ddp.{name}"] = value  # registered twice
    return state


@pytest.mark.parametrize("layout", ["openai", "towers", "towers, distributed", "auto"])
def test_checkpoints_in_the_authors_layouts(runs: dict[str, Path], tmp_path: Path, layout: str):
    model = load_clip(runs["auto" if layout == "auto" else "inherited-affinity"])
    torch.save({"epoch": 6, "name": "x", "state_dict": theirs(model, layout)}, tmp_path / "theirs.pt")
    loaded = load_clip(tmp_path / "theirs.pt", head_width=32)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    images, tokens = torch.rand(2, 3, 16, 16), torch.tensor([[49406, 320, 49407] + [0] * 21] * 2)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(images, tokens), model(images, tokens), strict=True))


def test_released_geometries_load(tmp_path: Path):
    """A file with the keys and shapes of each released model by hand."""
    for name in ("TinyCLIP-ViT-8M-16-Text-3M", "TinyCLIP-ResNet-19M-Text-19M"):
        model = create_model(name)
        torch.save({"state_dict": theirs(model, "openai")}, tmp_path / f"{name}.pt")
        loaded = load_clip(tmp_path / f"{name}.pt")
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
        tower = {key: loaded.geometry["vision"][key] for key in CONFIGS[name]["vision"]}
        assert tower == CONFIGS[name]["vision"]


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": None}, {"state_dict": {1: torch.zeros(1)}}, {"state_dict": {"a": 1}},
     {"positional_embedding": torch.zeros(3)}, {"state_dict": {}, "geometry": {"width": 1}}],
    ids=["list", "nothing", "numbered", "no tensor", "too few axes", "strange geometry"],
)  # fmt: skip
def test_files_that_hold_no_clip(tmp_path: Path, content):
    checkpoints.save_checkpoint(tmp_path / "file.pt", content)
    with pytest.raises(ValueError):
        load_clip(tmp_path / "file.pt")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ValueError, match="ViT-B-32@laion2b_e16: open_clip could not download"):
        load_clip("ViT-B-32@laion2b_e16")


# --------------------------------------------------------------------------------------------------------- evaluation

SETS = tuple(str(ROOT / "data/emoji/eval" / name) for name in ("groups_id", "retrieval_xm_en"))


def test_report(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch):
    arms = ("teacher", "random-contrastive", "inherited-affinity", "auto")
    cfg = evaluation.Config(
        tuple(str(runs[arm]) for arm in arms), sets=SETS, report=str(tmp_path / "results.json"), device="cpu"
    )
    monkeypatch.setattr(evaluation, "throughput", lambda *_, **__: {"pairs_per_second": 10.0})
    claim = statistics.Claim("higher", "+1", "groups_id/top1", arms[2], arms[1])
    metrics = {"groups_id/top1": "groups", "parameters_m": "M", "macs_g": "G"}
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, claims=(claim,), metrics=metrics))
    monkeypatch.setattr(study, "CLAIMS_AT_SIZES", ())  # they read names_ood
    monkeypatch.setattr(
        study, "learning_curve", lambda folder: [(4, 1.0), (8, 3.0 if "affinity" in str(folder) else 2.0)]
    )
    monkeypatch.setattr(evaluation, "METRICS", metrics)
    found = evaluation.main(cfg)
    summary = checkpoints.read_json(tmp_path / "results.json")
    assert list(summary["arms"]) == list(arms) and summary["seeds"] == [0]
    values = {arm: json.loads((runs[arm] / "results.json").read_text())["metrics"] for arm in arms}
    assert found == list(values.values())
    for arm in arms:
        assert summary["arms"][arm]["groups_id/top1"]["values"] == [values[arm]["groups_id/top1"]]
    assert values["auto"]["parameters_m"] < values["teacher"]["parameters_m"]
    assert values["inherited-affinity"]["macs_g"] < values["teacher"]["macs_g"]
    rows = {row["claim"]: row for row in summary["claims"]}
    assert rows["higher"] == statistics.judge(
        claim, [values[arms[2]]["groups_id/top1"]], [values[arms[1]]["groups_id/top1"]]
    )
    assert rows["steps to the score of random weights, contrastive"]["here"] == "1.33x fewer"  # 8 of 6 steps
    assert "asked" in rows["sparsity reached within 5 points, auto"]["here"]
    assert "not testable at this scale" in capsys.readouterr().out
    for name in ("tinyclip_curves.png", "tinyclip_masks.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    evaluation.main(cfg)


def test_curves(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(study, "learning_curve", lambda folder: [(1, 1.0), (2, 2.0)])
    runs = [{"names_ood/top1": x, "parameters_m": x, "pairs_per_second": x} for x in (1.0, 2.0)]
    study.plot(Comparison({"auto": runs}, [0, 1], {"auto": [tmp_path, tmp_path]}, set()), tmp_path)
    assert (tmp_path / "tinyclip_curves.png").stat().st_size > 10_000
    assert not (tmp_path / "tinyclip_masks.png").exists()


def test_steps_to_reach():
    curve = [(10, 1.0), (20, 3.0), (30, 3.0)]
    assert study.steps_to_reach(curve, 2.0) == 15 and study.steps_to_reach(curve, 0.5) == 5
    assert study.steps_to_reach(curve, 4.0) == math.inf


def test_speed_up_says_who_never_gets_there(monkeypatch):
    curves = {
        "a0": [(4, 2.0), (8, 3.0)],
        "b0": [(4, 1.0), (8, 2.0)],
        "a1": [(8, 1.0)],
        "b1": [(8, 2.0)],
        "zero": [(8, 0)],
    }
    monkeypatch.setattr(study, "learning_curve", curves.get)
    row = study.speed_up(["a0", "a1"], ["b0", "b1"])  # twice as fast, and never
    assert row["here"].startswith("1.00 ± ") and row["here"].endswith("x fewer, 1 of 2 never")
    assert row["verdict"] == "not resolved at this scale"
    assert study.speed_up(["a0"], ["zero"])["here"] == "8.00x fewer"  # a baseline that ends at 0


@pytest.mark.parametrize(
    ("gain", "size", "verdict"),
    [
        (1.0, 1.01, "reproduced"),
        (1.0, 0.9, "reproduced"),
        (1.0, 1.1, "not resolved at this scale"),
        (-1.0, 0.9, "not resolved at this scale"),
        (-1.0, 1.1, "not reproduced"),
    ],
)
def test_sizes_may_take_a_verdict(gain: float, size: float, verdict: str):
    claim = statistics.Claim("higher", "claimed", "m", "auto", "manual")
    method, baseline = ([{"m": m, "block_parameters_m": s}] * 2 for m, s in ((10 + gain, size), (10.0, 1.0)))
    row = statistics.judge(claim, [10 + gain] * 2, [10.0] * 2)
    row = study.with_sizes(row, claim, method, baseline)
    assert row["verdict"] == verdict and row["here"].endswith(f"{size:.2f}x the size")


def test_report_refuses(runs: dict[str, Path], tmp_path: Path):
    folders = [str(runs["teacher"]), str(runs["inherited-affinity"])]
    with pytest.raises(ValueError, match="names_ood/top1: give --sets those sets, too"):
        study.STUDY.compare(folders, [{"seconds": 1.0}] * 2, tmp_path / "r.json")
    with pytest.raises(ValueError, match="ARM-seedN"):
        study.STUDY.compare(["runs/other"], [{}], tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


# Presets and overrides that results/tinyclip.json was measured with; TEACHER is the run folder of the same seed
COMMANDS = {
    "teacher": "emoji-teacher",
    "random-contrastive": "emoji-contrastive --init None",
    "random-affinity": "emoji --teacher TEACHER --init None",
    "inherited-contrastive": "emoji-contrastive --init TEACHER",
    "inherited-affinity": "emoji --teacher TEACHER --init TEACHER",
    "random-channels": "emoji --teacher TEACHER --init TEACHER --inherit random",
    "auto": "emoji-auto --teacher TEACHER --init TEACHER",
    "auto-half": """emoji-auto --teacher TEACHER --init TEACHER --steps 200 --prune-step 80 --sparsity-warmup 40
        --mask-lr 0.3 --lambda-lr -0.3 --target-sparsity 0.5""",
    "auto-progressive": """emoji-auto --teacher TEACHER --init runs/tinyclip/auto-half-seed3 --steps 200 --prune-step 80
        --sparsity-warmup 40 --mask-lr 0.3 --lambda-lr -0.3 --start-sparsity 0.5 --target-sparsity 0.75""",
    "auto-oneshot": """emoji-auto --teacher TEACHER --init TEACHER --steps 400 --prune-step 160 --sparsity-warmup 80
        --target-sparsity 0.75""",
}


def test_arms_are_commands_that_their_script_takes():
    """Each arm's command line, what it waits for, and that train.py reads it."""
    known = {arm.name: arm for arm in study.STUDY.chosen("all")}
    assert set(known) == set(COMMANDS)
    for name, arm in known.items():
        expected = COMMANDS[name].replace("TEACHER", "runs/tinyclip/teacher-seed3").split()
        expected += ["--seed", "3", "--out", f"runs/tinyclip/{name}-seed3"]
        ((_, *words),) = study.STUDY.words(arm, 3)
        assert words == ["-m", "tinyclip.train", *expected]
        cfg = tyro.extras.overridable_config_cli(config.PRESETS, args=words[2:])
        config.check_stage(cfg)
        assert arm.needs == {Path(folder).name.removesuffix("-seed3") for folder in (cfg.teacher, cfg.init) if folder}
    core = [arm.name for arm in study.STUDY.chosen("core")]
    assert core == list(COMMANDS)[:5]


@pytest.mark.parametrize("name, macs", [("TinyCLIP-ViT-61M-32-Text-29M", 5.3), ("TinyCLIP-ResNet-19M-Text-19M", 4.4)])
def test_macs_are_those_of_the_model_zoo(name: str, macs: float):
    assert round(evaluation.macs(create_model(name)) / 1e9, 1) == macs


def test_throughput():
    rates = evaluation.throughput(create_model("emoji-25"), batch=2, seconds=0.05)
    pairs = 1 / (1 / rates["images_per_second"] + 1 / rates["captions_per_second"])
    assert rates["pairs_per_second"] == pytest.approx(pairs)


def test_evaluation_errors(in_process, tmp_path: Path, runs: dict[str, Path]):
    for arguments, words in (
        ((tmp_path / "nowhere",), "no checkpoint"),
        ((runs["auto"], "--sets", tmp_path), str(tmp_path)),
        ((), "name at least one run folder"),
        ((f"{SHARDS}/00000.tar",), "is not a checkpoint"),
    ):
        result = in_process(*arguments, module="tinyclip.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err)
