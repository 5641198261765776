"""python -m protoclip.train and .teacher, end to end on real emoji shards, in processes of their own.

Every arm, kill -9 and resume, two processes against one, broken shards, windows of shards, command-line errors.
Scripts start in forks of a server that has imported torch and the rest already, which saves 4 seconds each.
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
from scripts import ENVIRONMENT, ROOT, ended, finished, kill_at, metrics, one_sentence, same, start_two

from protoclip import config, train
from protoclip.teacher import Teacher
from shared import checkpoints, data

SHARDS = ROOT / "data/emoji/train"
TEACHER = ROOT / "data/emoji/teacher.npz"
SCRIPT, SECONDS = "protoclip.train", 60
PRELOAD = ["protoclip.episodes", "protoclip.model", "protoclip.teacher", "shared.zeroshot", "torch.utils.tensorboard"]

STEPS, PER_EPISODE = 15, 5
TINY = f"""--data {SHARDS}/00000.tar --external-teacher {TEACHER} --image-size 16 --episodes 3 --episode-size 160
    --batch-size 32 --k 8 --niter 5 --nredo 1 --hidden-dim 32 --projection-dim 16 --eval-every 0 --warmup 2
    --lr 1e-3 --eps 1e-4 --precision fp32 --log-every 1""".split()


@pytest.fixture(scope="module", autouse=True)
def corpus():
    for path, command in {SHARDS / "00000.tar": "shared.corpora.emoji", TEACHER: "protoclip.teacher minilm"}.items():
        if not path.is_file():
            pytest.fail(f"{path} is missing: `make test` makes it with 'python -m {command}'", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """For run folders; emptied at the end, since a checkpoint has 90 MB."""
    path = tmp_path_factory.mktemp("protoclip")
    yield path
    shutil.rmtree(path)


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
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt"}
    assert json.loads((out / "config.json").read_text())["back_translate"] == (arm != "no-pbt")
    assert list((out / "tensorboard").iterdir())
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line["episode"] for line in lines] == [0] * 5 + [1] * 5 + [2] * 5
    assert all(np.isfinite(value) for line in lines for value in line.values())
    for line in lines:  # warm-up, then the arm's own losses
        assert (line["proto"] != 0) == (arm != "clip" and line["episode"] > 0)
        assert (line["external"] != 0) == (arm == "external" and line["episode"] > 0)
        assert np.isclose(line["loss"], line["clip"] + line["proto"] + line["external"], rtol=1e-5)
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    assert (state["episode"], state["batch"], state["prototypes"]) == (3, 0, None)
    assert ("logit_scale_proto" in state["state_dict"]) == (arm != "clip")


def test_arms_start_from_the_same_weights_and_samples(arms: dict[str, Path]):
    first = {arm: metrics(out)[:PER_EPISODE] for arm, out in arms.items()}
    assert all([line["clip"] for line in lines] == [line["clip"] for line in first["clip"]] for lines in first.values())


def test_a_finished_run_is_not_run_twice(arms: dict[str, Path], cli):
    out = arms["external"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    began = time.monotonic()
    result = finished(cli(*ARMS["external"], *TINY, "--out", out))
    assert "is finished (3 episodes); nothing to do" in result.out and time.monotonic() - began < 5
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


def test_evaluation_during_training(cli, folder: Path):
    ood = ROOT / "data/emoji/eval/groups_ood"
    options = [*TINY, "--episodes", "2", "--eval-every", "2", "--eval-set", ood, "--episode-size", "32"]
    finished(cli("emoji-clip", *options, "--out", folder / "evaluated"))
    last = metrics(folder / "evaluated")[-1]
    assert last["step"] == 2 and 0 <= last["zero_shot_top1"] <= 100


def test_warm_up_and_lit_episodes_are_not_extracted(folder: Path, monkeypatch: pytest.MonkeyPatch):
    calls, extract = [], train.extract_features
    monkeypatch.setattr(train, "extract_features", lambda *args: calls.append(args[2]) or extract(*args))
    cfg = dataclasses.replace(
        config.EMOJI, data=f"{SHARDS}/00000.tar", out=str(folder / "lit"), w_external=0.0, k=4, precision="fp32",
        image_size=16, episodes=4, episode_size=32, batch_size=16, infonce_warmup=1, lit_start=3, eval_every=0,
        warmup=1, log_every=1,
    )  # fmt: skip
    train.main(cfg)
    assert calls == [32]  # episode 1 of 0..3
    assert [line["proto"] != 0 for line in metrics(folder / "lit")] == [False, False, True, True] + [False] * 4
    assert [line["lr_visual"] > 0 for line in metrics(folder / "lit")] == [True] * 4 + [False] * 4


# -------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("workers", [0, 2])
def test_kill_and_resume_equals_uninterrupted(arms: dict[str, Path], start, folder: Path, workers: int):
    out = folder / f"killed-{workers}"
    command = [*ARMS["external"], *TINY, "--save-every", "2", "--workers", workers, "--out", out]
    kills = [random.randint(2, 5), random.randint(6, 9), random.randint(11, 14)]  # each of the three episodes
    for line in kills:
        kill_at(start(*command), out, line)
        if (out / "checkpoint.pt").exists():
            state = checkpoints.load_checkpoint(out / "checkpoint.pt")
            assert (state["prototypes"] is not None) == (state["episode"] > 0 and state["batch"] > 0), kills
    finished(ended(start(*command)))
    assert metrics(out) == metrics(arms["external"]), kills
    state, expected = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (out, arms["external"]))
    for part in ("state_dict", "optimizer", "episode", "batch"):
        assert same(state[part], expected[part]), (part, kills)


# ------------------------------------------------------------------------------------------------------ two processes

LINEAR = ["--num-layers", "0"]  # heads without BatchNorm, which normalises each process's batch on its own


def assert_equal_runs(one: Path, two: Path) -> None:
    for a, b in zip(metrics(one), metrics(two), strict=True):
        for name in a.keys() - {"modality_gap"}:  # of the local batch, as upstream's
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} in step {a['step']}")
    # TINY has the golden episodes' large Adam eps: else the rounding of a vanishing gradient becomes a visible step
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_of_torchrun_equal_one(cli, folder: Path):
    one, two = folder / "protoclip-1", folder / "protoclip-2"
    finished(cli("emoji", *TINY, *LINEAR, "--out", one))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "protoclip.train", "emoji", *TINY, *LINEAR, "--out", two]
    result = subprocess.run(
        list(map(str, command)), cwd=ROOT, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=90
    )
    assert result.returncode == 0, result.stderr
    assert_equal_runs(one, two)


def test_two_processes_equal_one_clip(arms: dict[str, Path], start, folder: Path):
    """The processes get what torchrun would tell them. They are killed on the way, and a single one takes over."""
    out = folder / "clip-2"
    command = ["emoji-clip", *TINY, "--save-every", "3", "--out", out]
    first, second = start_two(start, *command)
    kill_at(first, out, 7)
    second.kill()
    second.join()
    finished(ended(start(*command)))
    assert_equal_runs(arms["clip"], out)


# ----------------------------------------------------------------------------------------- broken shards and windows


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


@pytest.fixture(scope="module")
def broken_shards(small_shards: list[Path], folder: Path) -> str:
    """One shard cut in the middle of an image, one with two broken samples and one without caption."""
    cut, mixed = folder / "cut.tar", folder / "mixed.tar"
    cut.write_bytes(small_shards[0].read_bytes()[:40_000])
    shutil.copy(small_shards[1], mixed)
    with tarfile.open(mixed, "a") as tar:
        for name, content in [
            ("bad.png", b"?"),
            ("bad.txt", b"bad"),
            ("mute.png", b"?"),
            ("mute.txt", b""),
            ("x.png", b"?"),
        ]:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"{cut}::{mixed}"


def test_broken_shards_are_reported_and_the_run_finishes(cli, start, folder: Path, broken_shards: str):
    command = ["emoji-clip", *TINY, "--data", broken_shards, "--out"]
    result = finished(cli(*command, folder / "broken"))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert len(reports) == 3 and reports[0].startswith("episode 1: ")
    assert all("1 missing caption" in line and "truncated or damaged tar" in line for line in reports)
    assert any("unreadable image" in line for line in reports)

    both = start_two(start, *command, folder / "broken-2")  # the report counts the samples of both
    results = [finished(ended(process)) for process in both]
    assert [line for line in results[0].out.splitlines() if "broken samples" in line] == reports
    assert "broken samples" not in results[1].out


def test_strict_names_the_sample(cli, folder: Path, broken_shards: str):
    cut, mixed = broken_shards.split("::")
    for shards, reason in ((cut, "truncated or damaged tar"), (mixed, "sample x: missing caption")):
        result = cli("emoji-clip", *TINY, "--data", shards, "--strict", "--out", folder / "strict")
        assert result.code == 2 and reason in result.err and one_sentence(result.err)


@pytest.mark.parametrize("remote", [False, True])
def test_windows_of_shards_train_and_resume(cli, start, folder: Path, small_shards: list[Path], remote: bool):
    shards = str(small_shards[0].parent / "{0..3}.tar")
    cache = folder / f"cache-{remote}"
    cache.mkdir()
    (cache / "precious.tar").write_bytes(b"someone else's")
    window = ["--data", f"pipe:cat {shards}" if remote else shards, "--episode-shards", "1", "--cache", cache]
    outs = [folder / f"window-{remote}-{i}" for i in range(2)]
    command = ["emoji", *TINY, *window, "--episodes", "4", "--episode-size", "64", "--save-every", "3", "--out"]
    finished(cli(*command, outs[0]))
    kill_at(start(*command, outs[1]), outs[1], 5)
    finished(cli(*command, outs[1]))
    assert metrics(outs[0]) == metrics(outs[1]) and len(metrics(outs[0])) == 8
    states = [checkpoints.load_checkpoint(out / "checkpoint.pt")["state_dict"] for out in outs]
    assert same(*states)
    copies = [path for path in cache.iterdir() if path.name != "precious.tar"]
    assert len(copies) == (2 if remote else 0) and (cache / "precious.tar").exists()  # this window and the last
    assert all(path.exists() for path in small_shards)


# ----------------------------------------------------------------------------------------------------------- teacher


def test_teacher_script(cli, folder: Path):
    out = folder / "made.npz"
    command = ["minilm", "--data", SHARDS / "00000.tar", "--dataset-size", "200", "--dim", "8", "--out", out]
    assert "200 captions, 384 -> 8 dimensions" in finished(cli(*command, module="protoclip.teacher")).out
    before = out.stat().st_mtime_ns
    assert "nothing to do" in finished(cli(*command, module="protoclip.teacher")).out
    assert out.stat().st_mtime_ns == before
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), 200)
    rows = Teacher(str(out)).rows(pairs, np.array([3, 3, 199]))
    assert rows.shape == (3, 8) and torch.equal(rows[0], rows[1])
    grown = cli(*command[:3], "--dataset-size", "201", "--out", out, module="protoclip.teacher")
    assert grown.code == 2 and "has no row for sample" in grown.err and one_sentence(grown.err)


def test_row_aligned_teacher(cli, folder: Path):
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), 300)
    features = Teacher(str(TEACHER)).rows(pairs, np.arange(300)).numpy()
    np.save(folder / "upstream.npy", features)
    np.savez(folder / "by_key.npz", keys=pairs.keys[::-1], features=features[::-1])
    options = [*TINY, "--episodes", "2", "--dataset-size", "300", "--episode-size", "64"]
    for name in ("upstream.npy", "by_key.npz"):
        out = folder / name.replace(".", "-")
        finished(cli("emoji", *options, "--external-teacher", folder / name, "--out", out))
    assert metrics(folder / "upstream-npy") == metrics(folder / "by_key-npz")
    result = cli("emoji", *TINY, "--external-teacher", folder / "upstream.npy", "--out", folder / "wrong")
    assert result.code == 2 and "has 300 rows, the data" in result.err and one_sentence(result.err)


def test_teacher_rows_of_repeated_keys(tmp_path: Path):
    class Pairs:
        keys = np.array(["a", "b", "a"])

        def __len__(self):
            return 3

    np.savez(tmp_path / "t.npz", keys=Pairs.keys, features=np.arange(3.0)[:, None])
    teacher = Teacher(str(tmp_path / "t.npz"))
    assert teacher.rows(Pairs(), np.array([2, 0, 1])).flatten().tolist() == [2, 0, 1]  # same rows, same order
    other = Pairs()
    other.keys = np.array(["b", "a", "a"])
    with pytest.raises(ValueError, match="two rows for sample a"):
        teacher.rows(other, np.array([0]))


# ---------------------------------------------------------------------------------------------------- command lines


ERRORS = {
    "paper preset without data": (["cc3m-rn50"], "--data is missing: it takes image-text shards"),
    "paper preset without teacher": (["cc3m-rn50", "--data", f"{SHARDS}/00000.tar"], "--external-teacher is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "empty folder": (["emoji", "--data", str(ROOT / "shared")], "holds no .tar shard"),
    "missing teacher file": (["emoji", "--external-teacher", "no.npz"], "teacher file no.npz does not exist"),
    "teacher that is none": (["emoji", "--external-teacher", f"{SHARDS}/00000.tar"], "is no teacher file"),
    "teacher without PBT": (["emoji", "--no-back-translate"], "needs back translation"),
    "unknown model": (["emoji", "--model", "RN51"], "model 'RN51' is no open_clip config"),
    "model without a plain text tower": (["emoji", "--model", "ViT-B-16-SigLIP"], "custom text tower"),
    "more prototypes than samples": (["emoji", "--k", "161"], "--k 161 prototypes"),
    "less than a batch": (["emoji", "--episode-size", "31"], "--episode-size 31 is less than one batch of 32"),
    "LiT too late": (["emoji", "--lit-start", "4"], "--lit-start 4 is not in 2..3"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no evaluation set": (
        ["emoji", "--eval-every", "1", "--eval-set", "/nowhere"],
        "--eval-set /nowhere does not exist",
    ),
    "too large a window": (["emoji", "--episode-shards", "2"], "--episode-shards 2 of 1 shards"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = TINY if preset == "emoji" else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_teacher_that_does_not_cover_the_data(in_process, tmp_path: Path):
    pairs = data.open_pairs(f"{SHARDS}/00000.tar")
    np.savez(tmp_path / "t.npz", keys=pairs.keys[:-1], features=np.zeros((len(pairs) - 1, 4), np.float32))
    result = in_process("emoji", *TINY, "--external-teacher", tmp_path / "t.npz", "--out", tmp_path / "run")
    assert result.code == 2 and f"has no row for sample {pairs.keys[-1]}" in result.err and one_sentence(result.err)
    assert not (tmp_path / "run").exists()  # before the first episode, not after it


@pytest.mark.parametrize("arguments", [["emoji", "--lerning-rate", "1"], ["emoji", "--lr", "fast"], ["imagenet"], []])
def test_wrong_flags(in_process, arguments: list[str]):
    result = in_process(*arguments)
    assert result.code == 2 and "Traceback" not in result.err
    assert all(word in result.err for word in arguments[1:2])


def test_teacher_command_line_errors(in_process, tmp_path: Path):
    cases = {
        "--data is missing": ["roberta-large"],
        "should end in .npz": ["minilm", "--data", f"{SHARDS}/00000.tar", "--out", tmp_path / "t.npy"],
        "does not exist": ["minilm", "--data", "/nowhere/0.tar", "--out", tmp_path / "t.npz"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, module="protoclip.teacher")
        assert result.code == 2 and message in result.err and one_sentence(result.err)


def test_run_folders_of_other_runs_are_refused(in_process, arms: dict[str, Path], tmp_path: Path):
    result = in_process(*ARMS["pbt"], *TINY, "--lr", "1e-4", "--out", arms["pbt"])
    assert result.code == 2 and "lr (was 0.001, now 0.0001)" in result.err and one_sentence(result.err)
    (tmp_path / "checkpoint.pt").write_bytes((arms["pbt"] / "checkpoint.pt").read_bytes()[:1_000_000])
    result = in_process(*ARMS["pbt"], *TINY, "--out", tmp_path)
    assert result.code == 2 and "checkpoint.pt is not a checkpoint" in result.err and one_sentence(result.err)


def test_a_run_does_not_go_on_with_other_data(in_process, tmp_path: Path):
    shard, out = tmp_path / "shard.tar", tmp_path / "run"
    shutil.copy(SHARDS / "00000.tar", shard)
    arguments = ["emoji-clip", *TINY, "--data", shard, "--out", out]
    assert in_process(*arguments).code == 0
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    torch.save(state | {"episode": 1}, out / "checkpoint.pt")  # as if it had stopped early
    shutil.copy(SHARDS / "00001.tar", shard)
    result = in_process(*arguments)
    assert result.code == 2 and "was trained on other data" in result.err and one_sentence(result.err)


# ----------------------------------------------------------------------------------------------------------- dry run

DRY_RUNS = {  # parameters, projection heads, steps
    "emoji": (None, None, None),  # no published numbers
    "emoji-clip": (None, 0, None),
    "cc3m-rn50": ("106.7", 4.73, 156_400),
    "cc3m-rn50-clip": ("102.0", 0, 156_256),
    "cc3m-rn50-clip-light": ("102.0", 0, 156_256),
    "cc3m-rn50-1gpu": ("106.7", 4.73, 312_500),
    "cc3m-rn50-1gpu-clip": ("102.0", 0, 312_504),
}


@pytest.mark.parametrize("preset", train.PRESETS)
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    parameters, heads, steps = DRY_RUNS[preset]
    cfg = config.PRESETS[preset][1]
    steps = steps or cfg.episodes * cfg.steps_per_episode()
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir())
    total, projection = (
        int(n.replace(",", "")) for n in re.search(r"parameters +([\d,]+) .*heads ([\d,]+)", result.out).groups()
    )
    assert parameters is None or f"{total / 1e6:.1f}" == parameters
    assert heads is None or round(projection / 1e6, 2) == heads
    assert re.search(rf"^steps +{steps:,} ", result.out, re.MULTILINE)
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert all(word in result.out for word in ("learning rate", "samples", "batch", "loss weights"))


def test_dry_run_of_the_published_eight_processes(capsys):
    cfg = dataclasses.replace(config.PRESETS["cc3m-rn50"][1], model="ViT-emoji", image_size=16)
    train.dry_run(cfg, world_size=8)
    out = capsys.readouterr().out
    assert re.search(r"steps +156,400 \(391 an episode\)", out) and re.search(
        r"batch +512 \(64 in each of 8 processes\)", out
    )
    assert "at step 15,625" in out and "5.000e-04 image tower" in out
