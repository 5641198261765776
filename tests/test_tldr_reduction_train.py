"""python -m tldr_reduction.{corpus,train,reduce,eval}, end to end on real emoji shards, in processes of their own.

The whole chain, kill -9 and resume of training and of a reduction, two processes against one, broken shards,
command-line errors, dry runs. Scripts start in forks of a server that has imported torch and the rest already.
"""

import csv
import dataclasses
import io
import itertools
import json
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import tyro
from PIL import Image
from scripts import ROOT, Ended, ended, finished, free_port, held, kill_at, kill_when, metrics, same, start_two

from shared import checkpoints, data, run
from shared.study.runner import Stage
from tldr_reduction import config, corpus, train
from tldr_reduction.datasets import open_pairs
from tldr_reduction.eval import plain
from tldr_reduction.inference import cached_rows, gathered_codes, read_rows
from tldr_reduction.model import build
from tldr_reduction.reduce import write_shards
from tldr_reduction.study import EVALUATED, STUDY
from tldr_reduction.tokenizer import build_vocab

SHARDS = ROOT / "data/emoji/train"
SCRIPT, REDUCE, SECONDS = "tldr_reduction.train", "tldr_reduction.reduce", 120
PRELOAD = ["tldr_reduction.train", "tldr_reduction.inference", "shared.zeroshot", "torch.utils.tensorboard"]
SIZES = """--image-size 16 --patch-size 8 --width 32 --layers 2 --heads 2 --text-width 32 --text-layers 1 --text-heads 2
    --code-dim 16 --num-codes 32 --embed-dim 16 --queue-size 64""".split()
STEPS, PER_EPOCH = 12, 4
COMMON = """--epochs 3 --batch-size 32 --lr 1e-3 --lr-decay-rate 0.85 --warmup 4 --precision fp32 --workers 0
    --eval-every 0 --log-every 1 --dataset-size 128""".split()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    """Shards and a vocabulary of 160 pairs in the layout of `corpus`, and room for runs; emptied at the end."""
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.corpora.emoji'", pytrace=False)
    path = tmp_path_factory.mktemp("tldr")
    entries, captions = [], []
    for key, image, description in corpus.samples(SHARDS.parent):
        entries.append((key, image, description["name"], description | {"noise": "name"}))
        captions.append(description["name"])
        if len(entries) == 160:
            break
    corpus.write(path / "pool", entries, size=64)
    (path / "vocab.txt").write_text("\n".join(build_vocab(captions)) + "\n")
    yield path
    shutil.rmtree(path)


# ----------------------------------------------------------------------------------------------------------- scripts


def refused(result: Ended, words: str) -> None:
    """Exit code 2 and one sentence with these words."""
    assert result.code == 2, result.err
    lines = result.err.strip().splitlines()
    assert words in result.err and "Traceback" not in result.err, result.err
    assert len([line for line in lines if line.startswith("error:")]) == 1 and len(lines) == 1, result.err


# --------------------------------------------------------------------------------------------------------- the chain


@pytest.fixture(scope="module")
def tiny(folder: Path) -> list[str]:
    return [*SIZES, *COMMON, "--data", str(folder / "pool"), "--vocab", str(folder / "vocab.txt")]


@pytest.fixture(scope="module")
def chain(folder: Path, cli, tiny) -> dict[str, Path]:
    """Every stage once; -> its folder."""
    out = {name: folder / name for name in ("captioner", "finetune", "scorer", "reduced", "clip", "blip")}
    finished(cli("emoji-captioner", *tiny, "--out", out["captioner"]))
    finished(cli("emoji-finetune", *tiny, "--init", out["captioner"], "--out", out["finetune"]))
    finished(cli("emoji-scorer", *tiny, "--out", out["scorer"]))
    out["models"] = ["--captioner", out["captioner"], "--caption-model", out["finetune"], "--scorer", out["scorer"]]
    reduce = [folder / "pool", "--keep", "0.5", "--clusters", "4", "--chunk", "48", "--max-length", "10"]
    out["command"] = [*reduce, *out["models"]]
    out["printed"] = finished(cli(*out["command"], "--out", out["reduced"], module=REDUCE)).out
    reduced = [*tiny, "--data", out["reduced"] / "shards", "--epochs", "2", "--dataset-size", "64"]
    finished(cli("emoji-clip", *reduced, "--out", out["clip"]))
    finished(cli("emoji-blip", *reduced, "--out", out["blip"]))
    return out


def test_every_stage_trains(chain):
    for stage, parts in (
        ("captioner", {"loss_lm", "loss_emb"}),
        ("finetune", {"loss_lm", "loss_emb"}),
        ("scorer", {"loss_ita", "loss_itm", "loss_lm"}),
    ):
        lines = [line for line in metrics(chain[stage]) if "loss" in line]
        assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
        for line in lines:
            assert np.isclose(line["loss"], sum(line[part] for part in parts), rtol=1e-5)
            assert (line["loss_emb"] == 0) == (stage == "finetune") if "loss_emb" in parts else True
    lines = metrics(chain["captioner"])
    assert all(1 <= line["perplexity"] <= line["codes_used"] + 1e-3 for line in lines if "perplexity" in line)
    assert sum("codes_restarted" in line for line in lines) == 2
    lrs = [line["lr"] for line in lines if "lr" in line]
    assert lrs[0] == pytest.approx(1e-6) and lrs[4] == pytest.approx(1e-3 * 0.85)
    assert not checkpoints.load_checkpoint(chain["finetune"] / "checkpoint.pt")["state_dict"].keys() & {
        "quantize.embedding.weight"
    }


def test_reduction_keeps_a_share_of_each_cluster(chain, folder):
    out = chain["reduced"]
    report = json.loads((out / "report.json").read_text())
    with open(out / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    pairs = open_pairs(str(folder / "pool"))
    assert [line["key"] for line in lines] == pairs.keys.tolist() and report["samples"] == 160
    for cluster in {line["cluster"] for line in lines}:
        members = [line for line in lines if line["cluster"] == cluster]
        assert [line["kept"] for line in members] == ["1" if i % 2 == 0 else "0" for i in range(len(members))]
        assert [int(line["position"]) for line in members] == list(range(len(members)))
    kept = [line for line in lines if line["kept"] == "1"]
    assert report["kept"] == len(kept) == len(json.loads((out / "annotation.json").read_text()))
    reduced = open_pairs(str(out / "shards"))
    assert reduced.keys.tolist() == [line["key"] for line in kept]
    before = {str(key): row for row, key in enumerate(pairs.keys)}
    for row, line in enumerate(kept):
        assert reduced.caption(row) == line["caption"]
        original = pairs.caption(before[line["key"]])
        assert line["caption"] == (f"{original}; {line['generated']}" if line["generated"] else original)
        assert reduced.read(row).image.tobytes() == pairs.read(before[line["key"]]).image.tobytes()
    assert set(report["itm"]) == {"before", "after"} and np.isclose(np.mean(report["itm"]["after"]["histogram"]), 1)
    for words in ("kept", "duplicates", "codebook", "clusters", "ITM score", "seconds"):
        assert words in chain["printed"]
    assert json.loads((out / "annotation.json").read_text())[0].keys() == {"image", "caption"}
    with tarfile.open(out / "shards/00000.tar") as tar:  # the other files of a sample come along
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png", "txt", "json"}


def test_a_finished_reduction_is_not_run_twice(chain, cli):
    out = chain["reduced"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = finished(cli(*chain["command"], "--out", out, module=REDUCE))
    assert "is finished; nothing to do" in result.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    refused(cli(*chain["command"], "--keep", "0.3", "--out", out, module=REDUCE), "another --keep")


def test_a_reduction_is_of_its_data_and_has_one_writer(folder, in_process, tmp_path):
    shutil.copytree(folder / "pool", tmp_path / "pool")
    out = tmp_path / "out"
    command = [tmp_path / "pool", "--keep", "0.5", "--clusters", "2", "--select", "random", "--out", out]
    with held(out):
        refused(in_process(*command, module=REDUCE), "belongs to a run that is still going")
    assert in_process(*command, module=REDUCE).code == 0
    settings = json.loads((out / "config.json").read_text())
    (tmp_path / "pool/00001.tar").unlink()
    refused(in_process(*command, module=REDUCE), "reduces other data than")
    settings.pop("fingerprint")  # an older folder, which does not say
    (out / "config.json").write_text(json.dumps(settings))
    assert "is finished; nothing to do" in in_process(*command, module=REDUCE).out


def test_a_reduction_is_of_the_weights_that_began_it(chain, in_process, tmp_path):
    scorer = tmp_path / "scorer"
    shutil.copytree(chain["scorer"], scorer)
    command = [*chain["command"][:1], "--select", "itm", "--keep", "0.5", "--captions", "original"]
    command += ["--scorer", scorer, "--out", tmp_path / "out"]
    assert in_process(*command, module=REDUCE).code == 0
    assert "is finished; nothing to do" in in_process(*command, module=REDUCE).out
    state = checkpoints.load_checkpoint(scorer / "checkpoint.pt")
    next(iter(state["state_dict"].values())).add_(1)
    checkpoints.save_checkpoint(scorer / "checkpoint.pt", state)
    refused(in_process(*command, module=REDUCE), f"was made by other weights than {scorer} holds")


ARMS = {
    "random": ["--select", "random", "--captions", "original"],
    "first": ["--select", "first"],
    "itm": ["--select", "itm"],
    "all": ["--select", "all"],
    "farthest": ["--select", "farthest"],
    "image": ["--features", "image"],
    "blip": ["--features", "blip"],
    "text": ["--features", "text"],
    "generated": ["--captions", "generated"],
    "cls": ["--select", "all", "--cls-scores"],
    "release": ["--recipe", "release_comment", "--clusters", "4"],
}


def test_every_way_to_reduce(chain, cli, folder):
    """They share codes, scores and captions with the first reduction."""
    work = ["--work", chain["reduced"] / "work"]
    full = json.loads((chain["reduced"] / "report.json").read_text())["kept"]
    kept = {}
    for name, flags in ARMS.items():
        match = ["--match", chain["reduced"]] if name in ("random", "first", "itm") else []
        out = folder / f"reduced-{name}"
        finished(cli(*chain["command"], *work, *flags, *match, "--out", out, module=REDUCE))
        with open(out / "report.csv", newline="") as file:
            kept[name] = [line for line in csv.DictReader(file) if line["kept"] == "1"]
        if match:
            assert len(kept[name]) == full
    assert len(kept["all"]) == 160 and [int(line["key"]) for line in kept["first"]] == list(range(full))
    assert all(line["caption"] == line["generated"] for line in kept["generated"] if line["generated"])
    assert [line["key"] for line in kept["random"]] != [line["key"] for line in kept["first"]]
    scores = sorted((float(line["itm"]) for line in kept["all"]), reverse=True)
    assert min(float(line["itm"]) for line in kept["itm"]) >= scores[full - 1] - 1e-4
    assert 0 < len(kept["release"]) < 80
    assert [line["itm"] for line in kept["cls"]] != [line["itm"] for line in kept["all"]]  # not the scores in work/
    assert all(float(line["itm"]) >= scores[79] - 1e-4 for line in kept["release"])


def test_annotation_json_in_and_out(chain, cli, folder, tiny):
    """The authors' form of a data set: reduce reads it, and train.py reads unchanged what reduce wrote."""
    pairs, entries = open_pairs(str(folder / "pool")), []
    (folder / "images").mkdir()
    for row in range(96):
        pair = pairs.read(row)
        pair.image.save(folder / "images" / f"{pair.key}.png")
        entries.append({"image": f"images/{pair.key}.png", "caption": pair.caption})
    (folder / "all.json").write_text(json.dumps(entries))
    out = folder / "from-json"
    options = ["--keep", "0.5", "--clusters", "3", "--captioner", chain["captioner"], "--image-root", folder]
    finished(cli(folder / "all.json", *options, "--out", out, module=REDUCE))
    written = json.loads((out / "annotation.json").read_text())
    assert 48 <= len(written) <= 51 and all(entry in entries for entry in written) and not (out / "shards").exists()
    data_flags = ["--data", out / "annotation.json", "--image-root", folder, "--dataset-size", "32"]
    finished(cli("emoji-clip", *tiny, *data_flags, "--out", folder / "json-clip"))


def test_the_tool_alone_trains_its_captioner(cli, folder):
    out = folder / "alone"
    command = [folder / "pool", "--keep", "0.25", "--out", out, "--captioner-epochs", "1"]
    assert "kept" in finished(cli(*command, module=REDUCE)).out
    assert (out / "captioner/checkpoint.pt").exists() and (out / "shards/00000.tar").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["clusters"] == 5 and 40 <= report["kept"] <= 45 and "itm" not in report


def test_evaluation(chain, cli, folder):
    sets = ["--sets", str(ROOT / "data/emoji/eval/groups_ood"), "--rerank", str(ROOT / "data/emoji/eval/retrieval_ood")]
    for arm, run_folder in (("tldr", chain["clip"]), ("blip-tldr", chain["blip"])):
        shutil.copytree(run_folder, folder / f"{arm}-seed0")
    runs = [folder / "tldr-seed0", folder / "blip-tldr-seed0"]
    result = finished(
        cli(*runs, *sets, "--k-test", "2", "--report", folder / "report/results.json", module="tldr_reduction.eval")
    )
    assert "not testable here" in result.out
    clip, blip = (json.loads((path / "results.json").read_text())["metrics"] for path in runs)
    assert 0 <= clip["groups_ood/top1"] <= 100 and clip["data/pairs"] >= clip["data/emoji"] > 0 and clip["data/nmi"] > 0
    assert clip["steps"] == 2 * (clip["data/pairs"] // 32) and 0 <= clip["data/generated_right"] <= 100
    assert plain("Piñata: T-shirt") == plain("pinata t - shirt") and "itm/auc" not in clip  # all captions here are true
    assert "rerank/retrieval_ood/txt_r1" in blip and 0 <= blip["itm/after_below_half"] <= 100
    for plot in ("itm", "clusters", "fractions"):
        assert (folder / f"report/tldr_reduction_{plot}.png").stat().st_size > 5000
    refused(cli(chain["captioner"], *sets, module="tldr_reduction.eval"), "stage captioner")


# --------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("stage", ["captioner", "scorer"])
def test_kill_and_resume_equals_uninterrupted(chain, start, folder, tiny, stage):
    out = folder / f"killed-{stage}"
    command = [f"emoji-{stage}", *tiny, "--save-every", "3", "--out", out]
    for line in (random.randint(2, 5), random.randint(7, 11)):
        kill_at(start(*command), out, line, timeout=120)
    finished(ended(start(*command)))
    assert metrics(out) == metrics(chain[stage])
    state, expected = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (out, chain[stage]))
    for part in ("state_dict", "optimizer", "used", "epoch", "batch"):
        assert same(state[part], expected[part]), part


def test_a_killed_reduction_goes_on(chain, start, cli, folder):
    out = folder / "killed-reduction"
    command = [*chain["command"], "--out", out]
    kill_when(start(*command, module=REDUCE), lambda: len(list(out.glob("work/codes-*/0*.npz"))) >= 2, timeout=120)
    before = {path: path.stat().st_mtime_ns for path in out.glob("work/codes-*/0*.npz")}
    finished(cli(*command, module=REDUCE))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    for name in ("report.csv", "annotation.json", "shards/00000.tar", "shards/00001.tar"):
        assert (out / name).read_bytes() == (chain["reduced"] / name).read_bytes(), name


# ------------------------------------------------------------------------------------------------------ two processes


def two(start, *arguments, **options) -> list[Ended]:
    return [finished(ended(process)) for process in start_two(start, *arguments, **options)]


@pytest.mark.parametrize("stage", ["captioner", "clip"])
def test_two_processes_equal_one(start, cli, folder, tiny, stage):
    flags = [f"emoji-{stage}", *tiny, "--dropout", "0", "--eps", "1e-4"]
    one, both = folder / f"{stage}-1", folder / f"{stage}-2"
    finished(cli(*flags, "--out", one))
    two(start, *flags, "--out", both)
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (one, both))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_two_processes_reduce_as_one(chain, start, folder):
    out = folder / "reduced-by-two"
    two(start, *chain["command"], "--out", out, module=REDUCE)
    for name in ("report.csv", "annotation.json", "shards/00000.tar", "shards/00001.tar", "shards/00002.tar"):
        assert (out / name).read_bytes() == (chain["reduced"] / name).read_bytes(), name


def blip_rank(rank: int, world: int, port: str, path: str) -> None:
    """Losses and averaged gradients of a tiny BLIP on this rank's part of eight pairs, with given negatives."""
    from test_tldr_reduction import tiny_blip

    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    model = tiny_blip(queue_size=16)
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(8, 3, 16, 16, generator=generator)
    ids = torch.randint(4, 28, (8, 9), generator=generator)
    lengths = torch.tensor([9, 4, 6, 9, 5, 3, 5, 4])  # of the second half none is as wide as the batch
    mask = (torch.arange(9) < lengths[:, None]).long()
    ids = ids * mask
    negatives = torch.tensor([3, 2, 7, 0, 1, 4, 5, 6]), torch.tensor([5, 6, 1, 2, 0, 7, 3, 4])
    part = slice(rank * 8 // world, (rank + 1) * 8 // world)
    width = int(lengths[part].max())
    inputs = image[part], ids[part, :width], mask[part, :width]
    losses = model(*inputs, 0.3, tuple(n[part] for n in negatives))
    sum(losses).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    values = torch.stack(losses).detach()
    if world > 1:
        for tensor in (values, *gradients.values()):
            dist.all_reduce(tensor)
            tensor /= world
        dist.destroy_process_group()
    if rank == 0:
        torch.save({"losses": values, "queue": model.image_queue, **gradients}, path)


def test_two_processes_give_one_blips_gradients(tmp_path):
    blip_rank(0, 1, "", str(tmp_path / "one.pt"))
    mp.spawn(blip_rank, (2, free_port(), str(tmp_path / "two.pt")), nprocs=2)
    one, both = (torch.load(tmp_path / name) for name in ("one.pt", "two.pt"))
    for name, expected in one.items():
        torch.testing.assert_close(both[name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# ---------------------------------------------------------------------------------------------------- broken samples


@pytest.fixture(scope="module")
def broken(folder: Path) -> str:
    """A shard cut in an image, and one with an unreadable image, an empty caption and a missing one."""
    cut, mixed = folder / "cut.tar", folder / "mixed.tar"
    cut.write_bytes((folder / "pool/00000.tar").read_bytes()[:90_000])
    shutil.copy(folder / "pool/00001.tar", mixed)
    files = (("bad.png", b"?"), ("bad.txt", b"bad"), ("mute.png", b"?"), ("mute.txt", b""), ("x.png", b"?"))
    with tarfile.open(mixed, "a") as tar:
        for name, content in files:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"{cut}::{mixed}"


def test_broken_samples_are_counted(cli, folder, tiny, chain, broken):
    flags = ["emoji-captioner", *tiny, "--data", broken, "--dataset-size", "64", "--batch-size", "16"]
    result = finished(cli(*flags, "--out", folder / "broken"))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert len(reports) == 3 and all("truncated or damaged tar" in line for line in reports)
    options = ["--clusters", "3", "--captioner", chain["captioner"]]
    result = finished(cli(broken, *options, "--out", folder / "broken-reduction", module=REDUCE))
    assert "broken samples, left out" in result.out and "unreadable image" in result.out
    with open(folder / "broken-reduction/report.csv", newline="") as file:
        lines = {line["key"]: line for line in csv.DictReader(file)}
    assert lines["bad"]["reason"].startswith("broken: unreadable") and lines["bad"]["kept"] == "0"
    assert lines["mute"]["reason"] == "broken: empty caption"
    options = ["--select", "random", "--keep", "1", "--out", folder / "broken-random"]  # no captioner looks at these
    result = finished(cli(broken, *options, module=REDUCE))
    assert "broken samples, left out" in result.out and "identical images that occurred before" in result.out
    with open(folder / "broken-random/report.csv", newline="") as file:
        assert {line["key"] for line in csv.DictReader(file) if line["kept"] == "0"} == {"bad", "mute"}
    refused(cli(*flags, "--strict", "--out", folder / "strict"), "--strict")
    flags = [broken, *options, "--strict", "--out", folder / "strict-reduction"]
    refused(cli(*flags, module=REDUCE), "--strict")


# --------------------------------------------------------------------------------------------------- command lines

WRONG = {
    "no data": (["blip-cc3m"], "--data is missing"),
    "missing shard": (
        ["emoji-clip", "--data", "nowhere/{000..002}.tar", "--eval-every", "0"],
        "nowhere/000.tar does not",
    ),
    "no init": (["emoji-finetune", "--data", "x.tar"], "--init is missing"),
    "patch": (["emoji-captioner", "--data", "x.tar", "--image-size", "60"], "no multiple of --patch-size 16"),
    "codes": (["emoji-captioner", "--data", "x.tar", "--code-dim", "48"], "cannot be cut into codes of --code-dim 48"),
    "queue": (["emoji-blip", "--data", "x.tar", "--queue-size", "8", "--eval-every", "0"], "--queue-size 8 is smaller"),
    "tokens": (["emoji-clip", "--data", "x.tar", "--max-length", "99"], "--max-length 99 is not in 2..40"),
    "batch": (["emoji-clip", "--data", "x.tar", "--batch-size", "0"], "--batch-size must be at least 1"),
    "device": (["emoji-clip", "--device", "cuda"], "--device cpu"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_training_flags(cli, case):
    if case == "device" and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    arguments, words = WRONG[case]
    refused(cli(*arguments), words)


def test_wrong_reduction_flags(cli, folder, chain):
    pool, out = folder / "pool", ["--out", folder / "wrong"]
    (folder / "words.json").write_text('[{"image": "a.png", "caption": ["a", "b"]}]')
    (folder / "gone.json").write_text('[{"image": "a.png", "caption": "a"}]')
    for arguments, words in (
        (["nowhere.tar"], "nowhere.tar does not exist"),
        (["x.tsv"], "reduce takes .tar files"),
        ([pool, "--keep", "1.5"], "--keep 1.5 is not in (0, 1]"),
        ([pool, "--max-length", "3"], "--max-length 3 must exceed the prompt's 4 tokens"),
        ([pool, "--clusters", "161"], "--clusters 161 is not in 1..160"),
        ([pool, "--recipe", "cc4m"], "--recipe cc4m is none of paper"),
        ([pool, "--captions", "refined"], "needs --caption-model"),
        ([pool, "--select", "itm"], "need --scorer"),
        ([pool, "--captioner", folder], "is no run folder"),
        ([pool, "--captioner", chain["scorer"], "--clusters", "3"], "run of stage blip, where one of stage captioner"),
        ([pool, "--match", folder], "holds no report.json"),
        ([pool, "--match", chain["reduced"]], "--match goes with --select random, first or itm, not stride"),
        ([chain["reduced"] / "shards", "--match", chain["reduced"], "--select", "all"], "not all"),
        ([folder / "words.json"], "the caption of a.png is no text (entry 0)"),
        ([folder / "gone.json", "--select", "random"], "none of the 1 images"),
        ([pool, "--precision", "fp16"], "fp16 needs a GPU"),
        ([pool, "--caption-model", chain["captioner"]], "where one of stage finetune"),
    ):
        refused(cli(*arguments, *out, module=REDUCE), words)
        shutil.rmtree(folder / "wrong", ignore_errors=True)
    refused(cli(pool, "--out", pool / "00000.tar", module=REDUCE), "is a file")
    own = chain["reduced"].parent / "own"  # shards as input, which the output would be mixed with
    shutil.copytree(chain["reduced"] / "shards", own / "shards")
    refused(cli(own / "shards", "--out", own, module=REDUCE), "choose another --out")
    refused(cli("--source", folder, module="tldr_reduction.corpus"), "is not the embedded corpus")


def test_a_run_never_goes_on_as_another(chain, cli, tiny, folder):
    refused(cli("emoji-captioner", *tiny, "--lr", "2e-3", "--out", chain["captioner"]), "another configuration: lr")


@pytest.mark.parametrize("preset", config.PRESETS)
def test_dry_runs_need_no_data(preset, capsys):
    cfg = config.PRESETS[preset][1]
    small = dict(width=64, layers=1, heads=2, text_width=64, text_layers=1, text_heads=2, code_dim=64, queue_size=1260)
    cfg = dataclasses.replace(
        cfg, **small, dataset_size=100_000, clip_model="ViT-emoji", data=""
    )  # for the time it takes
    train.dry_run(dataclasses.replace(cfg, image_size=32))
    printed = capsys.readouterr().out
    for word in ("parameters", "samples", "batch", "steps", "learning rate", "memory estimate"):
        assert word in printed


def test_dry_run_of_a_reduction(cli, folder):
    """Sizes of what is there, or of the recipe's data set; nothing is written."""
    out = folder / "dry"
    printed = finished(cli(folder / "pool", "--keep", "0.5", "--dry-run", "--out", out, module=REDUCE)).out
    assert "160 (" in printed and "80, and up to one more in each of 5 clusters" in printed
    printed = finished(cli("gone/{0..9}.tar", "--recipe", "yfcc15m", "--dry-run", "--out", out, module=REDUCE)).out
    assert "14,900,000 (yfcc15m" in printed and "2,488,300" in printed and not out.exists()


def test_keyword_start(folder, monkeypatch, tiny):
    """The paper's codebook: keywords by a text encoder, onto the tokens' mean and spread; same on every call."""

    def embed(texts: list[str]) -> torch.Tensor:  # a vector of its own for every text
        seeds = [torch.Generator().manual_seed(data.stable_hash(text)) for text in texts]
        return torch.stack([torch.randn(16, generator=seed) for seed in seeds])

    monkeypatch.setattr(train, "text_embedder", lambda name, dim: embed)
    cfg = dataclasses.replace(
        config.EMOJI, data=str(folder / "pool"), vocab=str(folder / "vocab.txt"), image_size=16, patch_size=8, width=32,
        layers=1, heads=2, text_width=32, text_layers=1, text_heads=2, code_dim=16, num_codes=24,
        codebook_init="keywords",
    )  # fmt: skip
    pairs, weights = open_pairs(cfg.data), []
    for _ in range(2):
        torch.manual_seed(0)
        model = build(cfg, 300)
        train.start_codebook(model, cfg, pairs, run.Process(0, 1, torch.device("cpu")))
        weights.append(model.quantize.embedding.weight.detach().clone())
    assert torch.equal(*weights)
    assert 0.3 < weights[0].std() < 3
    (folder / "tags.txt").write_text("".join(f"tag {i}\n" for i in range(24)))
    for other in (dict(keywords=str(folder / "tags.txt")), dict(codebook_init="xavier")):
        train.start_codebook(model, dataclasses.replace(cfg, **other), pairs, run.Process(0, 1, torch.device("cpu")))
        assert not torch.equal(model.quantize.embedding.weight, weights[0])
    assert model.quantize.embedding.weight.abs().max() <= (6 / (24 + 16)) ** 0.5
    short = dataclasses.replace(cfg, keywords=str(folder / "tags.txt"), num_codes=25)
    with pytest.raises(ValueError, match="holds 24 keywords, fewer than --num-codes 25"):
        config.check(short, 1)


# ------------------------------------------------------------------------------------------------------------ study


def test_reductions_of_a_seed_take_turns():
    """They write into one work folder; and an arm makes no reduction that comes after its own."""

    def reductions(arms: str) -> list[Stage]:
        return [job for job in STUDY.jobs(STUDY.chosen(arms)) if job.name.startswith("reduced/")]

    everything = reductions("all")
    assert len(everything) == len({job.name for job in everything}) == 21
    for before, job in itertools.pairwise(everything):
        assert before.name in job.needs
    assert [job.name for job in reductions("core")] == [f"reduced/{n}" for n in ("tldr", "random", "random-refined")]
    assert not reductions("full")


def test_arms_are_trained_on_the_reduction_they_are_named_after():
    runs = "runs/tldr_reduction"
    for arm in STUDY.arms:
        (words,) = STUDY.words(arm, 7)
        reduction = arm.name.removeprefix("blip-").removesuffix("-steps")
        expected = None if reduction == "full" else f"{runs}/reduced/{reduction}-seed7/shards"
        assert (words[words.index("--data") + 1] if "--data" in words else None) == expected
        assert words[-4:] == ["--seed", "7", "--out", f"{runs}/{arm.name}-seed7"]
        assert ("--epochs" in words) == arm.name.endswith("-steps")
        parsed = tyro.extras.overridable_config_cli(config.PRESETS, args=words[3:])
        assert (parsed.stage, parsed.data) == ("blip" if "blip" in arm.name else "clip", expected or config.POOL)
        assert (parsed.eval_every > 0) == (arm.name in EVALUATED)
    for stage in STUDY.stages:
        (words,) = STUDY.words(stage, 7)
        if stage.name.startswith("reduced/"):
            parsed = tyro.cli(config.ReduceConfig, args=words[3:])
            assert parsed.out == f"{runs}/{stage.name}-seed7" and parsed.work == f"{runs}/work-seed7"
            assert parsed.match in (None, f"{runs}/reduced/tldr-seed7") and parsed.seed == 7
            assert parsed.captioner == f"{runs}/captioner-seed7" and parsed.caption_model == f"{runs}/finetune-seed7"


def test_corpus_is_declared(tmp_path):
    """Noise by key, in the declared shares; the clean style is not in the pool."""
    names = ["a", "b", "c"]
    kinds = []
    for key in range(2000):
        caption, kind = corpus.noisy_caption(str(key), {"name": "a", "tags": ["t"]}, names)
        assert (caption == "a") == (kind == "name") and (caption == "t") == (kind == "keyword")
        kinds.append(kind)
    for kind, share in corpus.SHARES.items():
        assert abs(kinds.count(kind) / 2000 - share) < 0.04
    assert corpus.noisy_caption("7", {"name": "a", "tags": ["t"]}, names) == corpus.noisy_caption(
        "7", {"name": "a", "tags": ["t"]}, names
    )


def test_a_corpus_of_another_version_leaves_nothing_behind(tmp_path):
    """Neither shards beyond the new ones, nor a word that all is up to date before it is."""
    about = [{"name": f"n{i}", "tags": ["t"], "style": "noto" if i % 2 else "twemoji"} for i in range(6)]
    source, out = tmp_path / "emoji", tmp_path / "tldr"
    corpus.write(source / "train", [(str(i), b"png", "", each) for i, each in enumerate(about)])
    (source / "manifest.json").write_text('{"version": "new"}')
    corpus.write(out / "pool", [(str(i), b"png", "", {}) for i in range(4)], size=1)
    (out / "noise.json").write_text(json.dumps({"version": "old", "seed": corpus.SEED, "shares": corpus.SHARES}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "build_vocab", lambda captions: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            corpus.main(corpus.Config(str(source), str(out)))
    assert [path.name for path in sorted((out / "pool").iterdir())] == ["00000.tar"]
    assert not (out / "noise.json").exists()
    corpus.main(corpus.Config(str(source), str(out)))
    assert json.loads((out / "noise.json").read_text())["version"] == "new"


def test_merged_codes_are_memory_mapped(chain):
    codes_folder = next(path for path in (chain["reduced"] / "work").glob("codes-*"))
    merged = gathered_codes(codes_folder, np.arange(160), 48)
    assert isinstance(merged, np.memmap) and merged.shape == (160, 5 * 2) and merged.dtype == np.uint16


def test_rows_are_kept_and_mended(tmp_path):
    """Only what is missing is worked out; a file that is no longer whole is made again."""
    rows, asked = np.array([0, 1, 5, 9, 10, 11]), []

    def compute(missing: np.ndarray) -> dict:
        asked.append(missing.tolist())
        return {"squares": missing**2}

    def squares(wanted: np.ndarray) -> list[int]:
        cached_rows(tmp_path, wanted, 5, run.Process(0, 1, torch.device("cpu")), "", compute)
        return read_rows(tmp_path, wanted, 5, "squares").tolist()

    assert squares(rows[1::2]) == [1, 81, 121] and asked == [[1], [9], [11]]
    assert squares(rows) == [0, 1, 25, 81, 100, 121] and asked[3:] == [[0], [5], [10]]
    path = tmp_path / "000001.npz"
    for whole in (path.read_bytes()[:100], b""):
        path.write_bytes(whole)
        assert squares(rows) == [0, 1, 25, 81, 100, 121] and asked[-1] == [5, 9]


def test_only_the_caption_file_is_rewritten(tmp_path):
    """Other texts of a sample stay as they are."""
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in (("a.png", png.getvalue()), ("a.txt", b"old"), ("a.alt.txt", b"other")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = open_pairs(str(tmp_path / "in.tar"))
    write_shards(pairs, {0: "new"}, tmp_path / "out", run.Process(0, 1, torch.device("cpu")))
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert [tar.extractfile(name).read() for name in ("a.txt", "a.alt.txt")] == [b"new", b"other"]


def test_rows_of_shards(folder):
    pairs = data.open_pairs(str(folder / "pool"))
    assert [pairs.rows_of(number) for number in range(3)] == [range(0, 64), range(64, 128), range(128, 160)]
