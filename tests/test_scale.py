"""Training scripts on large data and several processes: by stream, killed on the way; three
processes against one."""

import dataclasses
import random
from pathlib import Path

import pytest
from scripts import Lazily, ended, finished, kill_at, metrics, start_two, trained
from server import serving
from short_runs import FURTHER, PLAIN, SCRIPTS, commands, config, further, image_folder, small_corpus, small_set

from shared import checkpoints

SCRIPT = "protoclip.train"


@pytest.fixture(scope="module")
def given(folder: Path) -> dict[str, list[str]]:
    (folder / "parts").mkdir()
    data = small_corpus(folder / "corpus", shards=4)
    return commands(data, folder / "parts") | further(data, folder / "parts")


RUNS = SCRIPTS | FURTHER


def has(name: str, field: str) -> bool:
    return field in {each.name for each in dataclasses.fields(config(*RUNS[name].split(".")))}


# ----------------------------------------------------------------------------------------------------------- by stream

ROWS = ("protoclip", "nmtune", "concept_frequency")  # choose samples by row
BY_ROW = {
    "lexvla": ["--bias", "-6.3"],
    "tldr_reduction": ["--codebook-init", "uniform"],
}  # in place of what reads by row
STREAMED = [name for name in SCRIPTS if has(name, "stream") and name not in ROWS]


@pytest.mark.parametrize("name", STREAMED)
def test_streams_are_gone_through_and_a_killed_run_goes_on(name: str, given, start, folder: Path):
    """As many steps as without the kill, which a run does not repeat bit for bit."""
    urls = "::".join(f"pipe:cat {folder}/corpus/{i:05}.tar" for i in range(4))
    cache, (whole, out) = folder / "cache" / name, (folder / "streams" / name / each for each in ("whole", "killed"))
    command = [*given[name], "--no-keep-in-memory", "--no-distinct-captions", "--data", urls, "--stream"]
    command += ["--dataset-size", "160", "--cache", cache, *BY_ROW.get(name, ())]
    finished(ended(start(*command, "--out", whole, module=SCRIPTS[name])))
    print("killed at line", line := random.randint(1, 7))
    kill_at(start(*command, "--out", out, module=SCRIPTS[name]), out, line)
    finished(ended(start(*command, "--workers", "1", "--out", out, module=SCRIPTS[name])))
    steps = [[line["step"] for line in metrics(each) if "loss" in line] for each in (out, whole)]
    assert steps[0] == steps[1] and len(steps[0]) == 10
    assert not list(cache.rglob("*.tar"))


@pytest.mark.parametrize("name", [name for name in STREAMED if name == "attentive_mask_clip"])
def test_two_processes_stream_from_a_faulty_server(name: str, given, start, folder: Path):
    """The first download of each shard is cut off. Each process reads shards of its own, all of them once."""
    with serving(folder / "corpus") as server:
        data = ["--data", f"{server.url}/{{00000..00003}}.tar", "--stream", "--dataset-size", "160"]
        command = [*given[name], "--no-keep-in-memory", *data, "--cache", folder / "cache of two"]
        out = folder / "stream of two"
        for process in start_two(start, *command, "--epochs", "1", "--out", out, module=SCRIPTS[name]):
            finished(ended(process))
    assert len([line for line in metrics(out) if "loss" in line]) == 5 and set(server.asked.values()) == {2}


@pytest.mark.parametrize("name", [*SCRIPTS, "tinyclip in epochs"])
def test_a_dry_run_fetches_nothing(name: str, given, in_process, folder: Path):
    command = given.get(name, ["small-teacher", "--image-size", "16", "--epochs", "2"])
    remote = ["--data", f"pipe:touch {folder}/fetched-{{0..1}}", "--dry-run"]
    told = finished(in_process(*command, *remote, module=SCRIPTS.get(name, "tinyclip.train"))).out
    assert len(told.splitlines()) > 3 and not list(folder.glob("fetched-*"))


# --------------------------------------------------------------------------------------------------- several processes

EQUAL = PLAIN | {"attentive_mask_clip": ["--views", "1", "--no-ssl"]}  # without BatchNorm
OF_FURTHER = ("flame-bank", "lexvla-lm", "lexvla-dense", "tinyclip-masks")  # those without BatchNorm and queue
EVALUATED = ("attentive_mask_clip", "flame", "protoclip", "tinyclip", "tldr_reduction-clip")  # by the first process
SUPERVISED = """small-sup --noise 0.3 --model test_convnext --precision fp32 --epochs 1 --warmup 2 --log-every 1
    --workers 0""".split()


@pytest.fixture(scope="module")
def short(given, folder: Path) -> dict[str, list[str]]:
    """Each script on 64 pairs in batches of 24; the last 16 are left out. Evaluated if possible."""
    once = {"protoclip": "--episodes 1 --episode-size 64", "tinyclip": "--steps 4"}
    once["tinyclip-masks"] = "--steps 4 --prune-step 2 --sparsity-warmup 1"
    shown = ["--eval-set", small_set("names_ood", folder / "sets", every=80), "--eval-every", "1"]
    found = {}
    for name, command in given.items():
        size = ["--dataset-size", "64"] if has(name, "dataset_size") else []
        passes = once.get(name, "").split() + (["--epochs", "1"] if has(name, "epochs") else [])
        evaluated = shown if name in EVALUATED else []
        found[name] = [*command, "--batch-size", "24", *size, *passes, *EQUAL.get(name, ()), *evaluated]
    images = image_folder(folder / "images", folder / "corpus")
    return found | {"nmtune-supervised": [*SUPERVISED, "--data", images, "--batch-size", "9"]}


@pytest.fixture(scope="module")
def alone(cli, short, folder: Path) -> Lazily:
    """Run folders of runs with one process."""

    def make(name: str) -> Path:
        out = folder / "ranks" / name / "1"
        finished(cli(*short[name], "--out", out, module=RUNS.get(name, "nmtune.pretrain")))
        return out

    return Lazily(make)


@pytest.mark.parametrize("name", [*SCRIPTS, "nmtune-supervised", *OF_FURTHER])
def test_three_processes_equal_one(name: str, short, alone, start, folder: Path):
    """With two micro-batches in each of the three, where there is --accumulate."""
    out, parts = folder / "ranks" / name / "3", ["--accumulate", "2"] * (name in {*PLAIN, *OF_FURTHER})
    module = RUNS.get(name, "nmtune.pretrain")
    for process in start_two(start, *short[name], *parts, "--out", out, count=3, module=module):
        finished(ended(process))
    ours, theirs = metrics(out), metrics(alone[name])
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    losses = [[line["loss"] for line in lines if "loss" in line] for lines in (ours, theirs)]
    assert len(losses[0]) >= 2 and losses[0] == pytest.approx(losses[1], rel=1e-2)
    apart, total = 0, 0
    for (_, x), (_, y) in zip(*(checkpoints.tensors(trained(each)) for each in (out, alone[name])), strict=True):
        apart += int(((x.double() - y.double()).abs() > 1e-3 * (1 + y.double().abs())).sum())
        total += x.numel()
    assert apart <= 1e-3 * total  # where a gradient is 0, AdamW makes steps from rounding
    tops = [[line["zero_shot_top1"] for line in lines if "zero_shot_top1" in line] for lines in (ours, theirs)]
    assert len(tops[0]) == len(tops[1]) and bool(tops[0]) == (name in EVALUATED)
