"""Faults during the scripts of every folder: they continue as if nothing had happened, or end with exit code 2 and one
sentence, and no earlier file is lost. The times of faults are random; PAPER_CLIPS_FAULT_SEED repeats a run."""

import io
import json
import os
import pickle
import random
import re
import shutil
import signal
import struct
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ended, finished, kill_at, metrics, refused, room, same, trained
from short_runs import FOLDERS, FURTHER, SCRIPTS, add_sample, commands, further, small_corpus, small_set, stages

from shared import checkpoints
from shared.run import read_metrics

SCRIPT = "faulty"
SEED = os.environ.get("PAPER_CLIPS_FAULT_SEED") or str(random.SystemRandom().randrange(10**6))

RUNS = SCRIPTS | FURTHER
STAGES = (  # under the faults at the end of this file; SCRIPTS are under those before
    "attentive_mask_clip.pack_yfcc", "concept_frequency.count", "flame.embed", "studies.flame_recaption",
    "nmtune.finetune", "nmtune.train", "protoclip.teacher", "tldr_reduction.reduce",
)  # fmt: skip


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    print(f"PAPER_CLIPS_FAULT_SEED={SEED}")  # is shown with a failure
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def given(folder: Path) -> dict[str, list[str]]:
    """The command line of each script without --out."""
    data, parts = small_corpus(folder / "corpus"), folder / "parts"
    parts.mkdir()
    return commands(data, parts) | further(data, parts) | stages(data, parts)


@pytest.fixture(scope="module")
def whole(cli, given, folder: Path):
    """whole(name) -> an undisturbed run, made without a network."""

    def make(name: str) -> Path:
        out = folder / name / "whole"
        if not out.exists():
            finished(cli("no_network", RUNS[name], *given[name], "--out", out))
        return out

    return make


# -------------------------------------------------------------------------------------------------- what a run leaves

TRAINING_STAGES = ("nmtune.train", "nmtune.finetune")


@pytest.mark.parametrize("name", (*SCRIPTS, *TRAINING_STAGES))
def test_run_folders_have_the_same_files_keys_and_log_names(name: str, given, whole, cli, folder: Path):
    out = whole(name) if name in SCRIPTS else folder / name / "keys"
    if name not in SCRIPTS:
        finished(cli("no_network", name, *given[name], "--out", out))
    assert {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt"} <= set(os.listdir(out))
    assert os.listdir(out / "tensorboard") and not list(out.glob("*.tmp"))
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    assert {"seconds", "commit", "config"} <= state.keys() and state.keys() & {"optimizer", "optimizers"}, state.keys()
    kept = json.loads(json.dumps(state["config"]))  # tuples become lists
    assert kept == checkpoints.read_json(out / "config.json") and ("data" in state or name == "nmtune.train")
    for line in read_metrics(out):
        assert "seconds" in line and len(line.keys() & {"epoch", "episode"}) == 1, line
    first = read_metrics(out)[0]
    assert "loss" in first and first.keys() & {"lr", "lr_visual"}
    assert "logit_scale" in first or name in ("tldr_reduction", *TRAINING_STAGES), first.keys()


# ------------------------------------------------------------------------------- a run that has ended, or another run


def contents(out: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_finished_run_is_not_run_twice_nor_with_other_settings(name: str, given, whole, in_process):
    out, module = whole(name), SCRIPTS[name]
    before = contents(out)
    assert "nothing to do" in finished(in_process(*given[name], "--out", out, module=module)).out
    refused(in_process(*given[name], "--lr", "1e-9", "--out", out, module=module), r"\blr\b.* 1e-09")
    assert contents(out) == before


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "concept_frequency"])  # chooses pairs by name
def test_a_run_does_not_go_on_with_other_data(name: str, given, whole, in_process, folder: Path, tmp_path: Path):
    """The checkpoint is put back, as if the run had stopped early; the shards change places."""
    data, state = tmp_path / "corpus", checkpoints.load_checkpoint(whole(name) / "checkpoint.pt")
    shutil.copytree(folder / "corpus", data)
    for i in range(2):
        shutil.copy(folder / f"corpus/{i:05}.tar", data / f"{1 - i:05}.tar")
    state["config"] |= {"data": str(data), "out": str(tmp_path / "run")}
    state |= {key: 0 for key in ("epoch", "episode", "step", "batch") if key in state}
    (tmp_path / "run").mkdir()
    torch.save(state, tmp_path / "run/checkpoint.pt")
    command = [*given[name], "--data", data, "--out", tmp_path / "run"]
    refused(in_process(*command, module=SCRIPTS[name]), "other data")


# --------------------------------------------------------------------------------------------- while a run is going on


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_at_random_it_ends_as_if_it_had_not_been(name: str, given, whole, start, folder: Path, rng):
    """SIGTERM, SIGKILL, a full disk and a shard that vanishes, all in one run."""
    out, module = folder / name / "run", RUNS[name]
    command, expected = [*given[name], "--out", out], whole(name)
    kill_at(start(*command, module=module), out, rng.randint(1, 3), how=signal.SIGTERM)
    kill_at(start(*command, module=module), out, rng.randint(4, 6))
    before = (out / "checkpoint.pt").read_bytes()
    refused(ended(start("full_disk", module, *command)), "File too large")
    assert (out / "checkpoint.pt").read_bytes() == before and not list(out.glob("*.tmp"))

    shard = folder / "corpus/00001.tar"
    content = shard.read_bytes()
    # what goes wrong in a worker is one sentence, too, and workers change no sample
    workers = ["--workers", "1"] if name in ("flame", "nmtune", "tinyclip") else []
    result = ended(start(f"vanish,1,{shard}", module, *command, *workers))
    gone = not shard.exists()
    shard.write_bytes(content)
    assert gone or name.startswith("lexvla-")  # which reads tokens that it has kept
    if result.code != 0:  # what is read but once can go
        refused(result, "00001.tar")
        finished(ended(start(*command, module=module)))
    assert metrics(out) == metrics(expected)
    assert same(trained(out), trained(expected))


# --eval-every, so that the end is evaluated alone
EVALUATED = dict.fromkeys(("attentive_mask_clip", "flame", "protoclip", "tldr_reduction-clip"), 2) | {"tinyclip": 10}


@pytest.mark.parametrize("name", EVALUATED)
def test_a_failed_evaluation_costs_no_step(name: str, given, whole, cli, folder: Path):
    """All steps are saved when the set is gone at the end; the next run ends like one without evaluations."""
    out, evaluated = folder / name / "evaluated", Path(small_set("names_ood", folder / "sets" / name, every=80))
    command = [*given[name], "--eval-every", EVALUATED[name], "--eval-set", evaluated, "--out", out]
    shard = evaluated / "test/0.tar"
    content = shard.read_bytes()
    assert cli(f"vanish,6,{shard}", SCRIPTS[name], *command).code != 0
    assert same(trained(out)["state_dict"], trained(whole(name))["state_dict"])
    shard.write_bytes(content)
    finished(cli(*command, module=SCRIPTS[name]))
    lines = metrics(out)
    assert [line["step"] for line in lines if "zero_shot_top1" in line] == [10]
    assert [line for line in lines if "zero_shot_top1" not in line] == metrics(whole(name))
    assert same(trained(out), trained(whole(name)))


def test_killed_between_writing_a_checkpoint_and_putting_it_in_place(given, whole, start, folder: Path, rng):
    name, count = rng.choice(FOLDERS), rng.randint(1, 4)
    out, command = folder / name / "saving", [*given[name], "--out", folder / name / "saving"]
    result = ended(start(f"die_saving,{count}", SCRIPTS[name], *command))
    assert result.code == -signal.SIGKILL and (out / "checkpoint.pt.tmp").exists(), (name, count, result)
    assert (out / "checkpoint.pt").exists() == (count > 1)
    finished(ended(start(*command, module=SCRIPTS[name])))
    assert metrics(out) == metrics(whole(name)) and same(trained(out), trained(whole(name))), (name, count)
    assert not (out / "checkpoint.pt.tmp").exists()


def test_no_room_for_the_log_or_the_configuration(given, whole, start, folder: Path, rng):
    name, line = rng.choice(FOLDERS), rng.randint(4, 6)
    out, command = folder / name / "log", [*given[name], "--out", folder / name / "log"]
    kill_at(start(*command, module=SCRIPTS[name]), out, line)
    left = set(out.glob("*.tmp"))
    assert left <= {out / "checkpoint.pt.tmp"}  # it may have been half written when the run was killed
    files = [path for path in out.iterdir() if path.is_file() and path.name != "metrics.jsonl"]
    faults = {f"no_space,metrics.jsonl,{rng.randint(0, 1)}": "metrics.jsonl", "full_disk,300": "(config|pairs)"}
    for fault, file in faults.items():
        before = [path.read_bytes() for path in files]
        refused(ended(start(fault, SCRIPTS[name], *command)), f"{out}/{file}.* could not be written")
        assert [path.read_bytes() for path in files] == before and set(out.glob("*.tmp")) == left, (name, line, fault)
    finished(ended(start(*command, module=SCRIPTS[name])))
    assert metrics(out) == metrics(whole(name)) and same(trained(out), trained(whole(name))), (name, line)
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("name", FOLDERS)
def test_a_nan_never_gets_into_a_checkpoint(name: str, given, cli, folder: Path):
    """NaN is noticed although no one reads the losses. TinyCLIP skips such a step, like its authors, and continues."""
    out, seen = folder / name / "nan", folder / f"{name} saw it"
    batch = 7
    every = "1" if name == "tinyclip" else "1000"
    result = cli(f"nan,{batch},{seen}", SCRIPTS[name], *given[name], "--log-every", every, "--out", out)
    assert seen.exists()
    if name == "tinyclip":
        finished(result)
        assert [line["step"] for line in metrics(out) if line["skipped"]] == [batch]
    else:
        refused(result, "no longer finite", "the loss is nan")
    assert (out / "checkpoint.pt").exists()
    assert all(tensor.isfinite().all() for _, tensor in checkpoints.tensors(trained(out)))


# ------------------------------------------------------------------------------------------------------- hostile data


def png(width: int, height: int) -> bytes:
    """A white image of any size in a few kilobytes."""
    rows = zlib.compressobj(9)
    line = b"\0" + b"\xff" * (-(-width // 8))
    data = b"".join(rows.compress(line) for _ in range(height)) + rows.flush()
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)), (b"IDAT", data), (b"IEND", b""))
    parts = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c)) for kind, c in chunks)
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.fixture(scope="module")
def hostile(folder: Path) -> Path:
    """Images of 1x1, 9,000x9,000 and 20,000x20,000; captions of 100,000 characters, undecodable, or missing; tar
    members with paths outside; shards truncated within an image, with a damaged header, and not a tar."""
    out = small_corpus(folder / "hostile", shards=3)
    first, cut, damaged = (out / f"{i:05}.tar" for i in range(3))
    rng = random.Random(0)
    endless = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(100_000)).encode()
    large, bomb = png(9_000, 9_000), png(20_000, 20_000)
    for i in range(4):  # several, so that what draws rows at random draws some
        add_sample(first, f"dot{i}", png(1, 1), b"a dot")
        add_sample(first, f"huge{i}", bomb, b"a wall")
        add_sample(first, f"large{i}", large, b"a wall")
        add_sample(first, f"words{i}", png(40, 40), b"cat " * 25_000)
        add_sample(first, f"bytes{i}", png(40, 40), b"\xff\xfe caf\xe9")
    add_sample(first, "letters", png(40, 40), endless)
    add_sample(first, "../../evil", png(40, 40), b"up")
    add_sample(first, f"{folder}/evil", png(40, 40), b"absolute")
    with tarfile.open(first, "a") as tar:
        for name, kind in (("link.png", tarfile.SYMTYPE), ("hard.png", tarfile.LNKTYPE), ("folder", tarfile.DIRTYPE)):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        for name, content in (("link.txt", b"link"), ("mute.png", png(40, 40))):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with tarfile.open(cut) as tar:
        image = next(member for member in tar.getmembers()[90:] if member.name.endswith(".png"))
    cut.write_bytes(cut.read_bytes()[: image.offset_data + image.size // 2])
    content = bytearray(damaged.read_bytes())
    with tarfile.open(damaged) as tar:
        middle = tar.getmembers()[75].offset
    content[middle : middle + 64] = b"?" * 64
    damaged.write_bytes(content)
    (out / "00003.tar").write_bytes(b"no tar at all" * 100)
    return out


BOMB, PIXELS = "unreadable image: DecompressionBombError", "9000x9000 pixels are more than the 67108864 allowed"
ENCODING = "caption is not UTF-8"
SEEN_IN_HEADERS = {
    "truncated or damaged tar": 4,
    "missing image": 1,
    "missing caption": 1,
}  # of three shards, one image


def reported(text: str) -> dict[str, int]:
    """{reason: largest number of samples} in the reports of a script."""
    found: dict[str, int] = {}
    for total, parts in re.findall(r"(\d+) broken samples, [^:]+: (.+) \(", text):
        counts = {reason: int(count) for count, reason in re.findall(r"(\d+) (.+?)(?=, \d|$)", parts)}
        assert sum(counts.values()) == int(total)
        found = {reason: max(counts.get(reason, 0), found.get(reason, 0)) for reason in counts | found}
    return found


@pytest.mark.parametrize("name", FOLDERS)
def test_hostile_data_are_counted_and_trained_around(name: str, given, hostile: Path, cli, folder: Path):
    out, workers = folder / name / "hostile", ["--workers", "1"] if name == "flame" else []
    began = time.monotonic()
    result = finished(cli("no_network", SCRIPTS[name], *given[name], *workers, "--data", hostile, "--out", out))
    found = reported(result.out)
    if name == "concept_frequency":  # reads names, in the .json, and few images
        assert found == {"truncated or damaged tar": 3, "no image, or no .json with a name": 2}, result.out
    else:
        assert SEEN_IN_HEADERS.items() <= found.items(), result.out
        read = {reason: count for reason, count in found.items() if reason not in SEEN_IN_HEADERS}
        assert read.keys() == {BOMB, PIXELS, ENCODING}, result.out
        assert all(1 <= count <= 4 for count in read.values()), result.out  # batches are whole: some may be in none
    assert all(np.isfinite(value) for line in metrics(out) for value in line.values())
    assert time.monotonic() - began < 60
    strict = cli("no_network", SCRIPTS[name], *given[name], "--data", hostile, "--strict", "--out", f"{out} strict")
    refused(strict, "--strict")
    assert not [path for path in (folder, folder.parent) if list(path.glob("evil*"))]


# -------------------------------------------------------------------------------------------------- hostile run folders


class Malicious:
    def __init__(self, victim: Path):
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoints_that_are_not_its_own_are_refused(name: str, given, whole, in_process, tmp_path: Path):
    other = whole(FOLDERS[FOLDERS.index(name) - 1]) / "checkpoint.pt"
    victim, path = tmp_path / "victim", tmp_path / "run/checkpoint.pt"
    path.parent.mkdir()
    for content, words in (
        (other.read_bytes(), "another configuration"),
        (pickle.dumps({"state_dict": Malicious(victim)}, 2), "is not a checkpoint"),
        (other.read_bytes()[:5000], "is not a checkpoint"),
        (b"", "is not a checkpoint"),
    ):
        path.write_bytes(content)
        refused(in_process(*given[name], "--out", path.parent, module=SCRIPTS[name]), words)
        assert path.read_bytes() == content and not victim.exists()
    mine = checkpoints.load_checkpoint(whole(name) / "checkpoint.pt")
    mine |= {key: 0 for key in ("epoch", "episode", "step", "batch") if key in mine}
    foreign = {"weights" if "weights" in mine else "state_dict": {"foreign": torch.zeros(1)}}
    for content, words in (
        ([1, 2], "is not a checkpoint of this script"),
        ({"config": [1]}, "is not a checkpoint of this script"),
        ({"config": mine["config"]}, "the checkpoint has no '"),
        (mine | foreign, "weights of (another|the) model"),
    ):
        torch.save(content, path)
        refused(in_process(*given[name], "--out", path.parent, module=SCRIPTS[name]), words)
    torch.save({"config": Malicious(victim)}, path)
    refused(in_process(*given[name], "--out", path.parent, module=SCRIPTS[name]), "is not a checkpoint")
    assert not victim.exists() and set(os.listdir(path.parent)) == {".lock", "checkpoint.pt"}


@pytest.mark.parametrize("name", FOLDERS)
def test_two_runs_in_one_folder(name: str, given, whole, start, cli, folder: Path):
    """The second run is refused, and the first one continues undisturbed."""
    out, here = folder / name / "two", folder / name / "paused"
    first = start(f"pause,3,{here}", SCRIPTS[name], *given[name], "--out", out)
    while first.is_alive() and not here.exists():
        time.sleep(0.01)
    try:
        refused(cli(*given[name], "--out", out, module=SCRIPTS[name]), "still going")
    finally:
        here.unlink()
    finished(ended(first))
    assert metrics(out) == metrics(whole(name)) and same(trained(out), trained(whole(name)))


@pytest.mark.parametrize("name", FOLDERS)
def test_folders_that_cannot_be_written(name: str, given, cli, in_process, folder: Path, tmp_path: Path):
    out = folder / name / "sealed"
    refused(cli(f"read_only,{out}", SCRIPTS[name], *given[name], "--out", out), "Read-only file system")
    assert not out.exists()
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file/run"):
        refused(in_process(*given[name], "--out", path, module=SCRIPTS[name]), str(path))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", FOLDERS)
def test_remote_shards_without_a_network(name: str, given, in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("http_proxy", "")
    monkeypatch.setattr("shared.fetch.PAUSE", 0)
    url = "http://127.0.0.1:9/{00000..00001}.tar"
    result = in_process(*given[name], "--data", url, "--out", tmp_path / "run", module=SCRIPTS[name])
    refused(result, "shard http://127.0.0.1:9/00000.tar")
    assert {path.name for path in tmp_path.glob("run/*")} <= {".lock"}


# ------------------------------------------------------------------------- stages before and after, in one process


def target(module: str, folder: Path) -> Path:
    """The path that --out names."""
    return folder / {"protoclip.teacher": "teacher.npz"}.get(module, "run")


def made(folder: Path) -> dict:
    """Contents of a script's output folder without values that may differ from run to run."""
    read = {
        ".pt": lambda path: trained(path.parent) if path.name == "checkpoint.pt" else checkpoints.load_checkpoint(path)
    }
    read |= {".jsonl": lambda path: metrics(path.parent)}
    files = [path for path in folder.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    free = ("config.json", "report.json")
    return {
        str(path.relative_to(folder)): read.get(path.suffix, Path.read_bytes)(path)
        for path in files if path.name not in free
    }  # fmt: skip


@pytest.fixture
def stage(in_process, given):
    """stage(module, folder, *arguments) -> the result of the script."""

    def call(module: str, folder: Path, *arguments, data: Path | None = None):
        """Run the script with `data`, if given, instead of the data of its command line."""
        usual = [str(data) if data and a.endswith("/corpus") else a for a in given[module]]
        return in_process(*usual, *arguments, "--out", target(module, folder), module=module)

    return call


@pytest.mark.parametrize("module", STAGES)
def test_a_stage_on_a_full_disk(module: str, stage, tmp_path: Path, rng):
    """The disk is full at some write; the next run resumes and does not take a partial file for a complete one."""
    finished(stage(module, tmp_path / "whole"))
    expected = made(tmp_path / "whole")
    largest = max(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
    for size in sorted(rng.sample(range(largest), 2)):
        with room(size):
            refused(stage(module, tmp_path / "full"), "could not be written")
        left = made(tmp_path / "full")
        assert left.keys() <= expected.keys(), (size, left.keys() - expected.keys())
    finished(stage(module, tmp_path / "full"))
    result = made(tmp_path / "full")
    assert same(result, expected), [name for name in expected if not same(result.get(name), expected[name])]


@pytest.mark.parametrize("module", STAGES)
def test_a_stage_that_cannot_write_where_it_should(module: str, stage, tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    refused(stage(module, tmp_path / "file"), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


HOSTILE = {  # what a stage reports of hostile data beside what the headers show; None: it wants its data whole
    "concept_frequency.count": {ENCODING: 4},
    "flame.embed": {},
    "studies.flame_recaption": None,
    "protoclip.teacher": {},
    "tldr_reduction.reduce": {BOMB: 4, PIXELS: 4, ENCODING: 4},
}


@pytest.mark.parametrize("module", HOSTILE)
def test_a_stage_on_hostile_data(module: str, stage, hostile: Path, tmp_path: Path):
    result = stage(module, tmp_path / "out", data=hostile)
    if HOSTILE[module] is None:
        refused(result, "00001.tar: truncated or damaged tar", "00000.tar is damaged")
    else:
        assert reported(finished(result).out) == SEEN_IN_HEADERS | HOSTILE[module], result.out


GOES_ON_FROM = {
    "attentive_mask_clip.pack_yfcc": "run/config.json", "flame.embed": "run/index.json",
    "nmtune.finetune": "run/checkpoint.pt", "nmtune.train": "run/checkpoint.pt", "protoclip.teacher": "teacher.npz",
    "tldr_reduction.reduce": "run/config.json",
}  # fmt: skip


@pytest.mark.parametrize("module", GOES_ON_FROM)
def test_a_stage_over_files_of_something_else(module: str, stage, tmp_path: Path):
    """Foreign files are refused and left unchanged."""
    path = tmp_path / GOES_ON_FROM[module]
    path.parent.mkdir(exist_ok=True)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    torch.save({"config": {"a": 1}}, tmp_path / "other.pt")
    npz, pt = ((tmp_path / f"other.{kind}").read_bytes() for kind in ("npz", "pt"))
    for content in (b"", b"[1]", b'{"a": 1}', npz, npz[:50], pt):
        path.write_bytes(content)
        refused(stage(module, tmp_path), str(path.parent))
        assert path.read_bytes() == content


@pytest.mark.parametrize("name", FOLDERS)
@pytest.mark.usefixtures("forked_exports")
def test_runs_of_other_scripts_are_named_where_one_of_ones_own_is_wanted(name: str, given, whole, in_process, tmp_path):
    for other in {"lexvla", "tldr_reduction"} - {name}:
        commands = [[f"{name}.eval", whole(other)]]
        if name == "nmtune":
            commands += [["nmtune.finetune", *given["nmtune.finetune"], "--encoder", whole(other)]]
        for module, *arguments in commands:
            out = ["--out", tmp_path / "run"] * (not module.endswith("eval"))
            refused(in_process(*arguments, *out, module=module), str(whole(other)))
    if name == "tldr_reduction":
        reduce = given["tldr_reduction.reduce"]
        for flag in ("--captioner", "--scorer", "--caption-model"):
            command = [*reduce, flag, whole("lexvla"), "--out", tmp_path / "run"]
            refused(in_process(*command, module="tldr_reduction.reduce"), str(whole("lexvla")))
