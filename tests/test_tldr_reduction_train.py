"""python -m tldr_reduction.train, end to end on real emoji shards, in processes of their own.

Every stage that a reduction needs, kill -9 and resume, two processes against one, broken shards, the start of a
codebook, schedules. Scripts start in forks of a server that has imported torch and the rest already.
"""

import dataclasses
import io
import random
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import ROOT, Ended, Lazily, ended, finished, kill_at, metrics, same, start_two
from test_tldr_reduction_model import exact

from shared import checkpoints, data, run
from tldr_reduction import config, corpus, train
from tldr_reduction.datasets import open_pairs
from tldr_reduction.model import build
from tldr_reduction.tokenizer import build_vocab
from tldr_reduction.train import alpha_ramp, cosine_lr, warmup_step_lr

SHARDS = ROOT / "data/emoji/train"
SCRIPT, REDUCE, SECONDS = "tldr_reduction.train", "tldr_reduction.reduce", 120
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


@pytest.fixture(scope="module")
def tiny(folder: Path) -> list[str]:
    return [*SIZES, *COMMON, "--data", str(folder / "pool"), "--vocab", str(folder / "vocab.txt")]


@pytest.fixture(scope="module")
def chain(folder: Path, cli, tiny) -> Lazily:
    """Folder of each stage, which runs when it is first asked for; `command` and `printed` are the reduction's."""
    shorter = ["--epochs", "2", "--dataset-size", "64"]

    def make(name: str):
        if name == "command":
            reduce = [folder / "pool", "--keep", "0.5", "--clusters", "4", "--chunk", "48", "--max-length", "10"]
            models = {"--captioner": "captioner", "--caption-model": "finetune", "--scorer": "scorer"}
            return [*reduce, *(word for flag, stage in models.items() for word in (flag, chain[stage]))]
        if name == "printed":
            return finished(cli(*chain["command"], "--out", folder / "reduced", module=REDUCE)).out
        if name == "reduced":
            assert chain["printed"]
            return folder / "reduced"
        options = []
        if name == "finetune":
            options = ["--init", chain["captioner"]]
        if name in ("clip", "blip"):
            options = ["--data", chain["reduced"] / "shards", *shorter]
        finished(cli(f"emoji-{name}", *tiny, *options, "--out", folder / name))
        return folder / name

    chain = Lazily(make)
    return chain


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


def refused(result: Ended, words: str) -> None:
    """Exit code 2 and one sentence with these words."""
    assert result.code == 2, result.err
    lines = result.err.strip().splitlines()
    assert words in result.err and "Traceback" not in result.err, result.err
    assert len([line for line in lines if line.startswith("error:")]) == 1 and len(lines) == 1, result.err


def two(start, *arguments, **options) -> list[Ended]:
    return [finished(ended(process)) for process in start_two(start, *arguments, **options)]


@pytest.mark.golden("tldr_reduction", "schedules")
def test_schedules(case):
    rates = [exact(case[name]) for name in ("init_lr", "min_lr", "warmup_lr", "warmup_steps", "lr_decay_rate")]
    epochs, steps = case["pretrain_lr"].shape
    grid = [(epoch, step) for epoch in range(epochs) for step in range(steps)]
    lr = torch.tensor([warmup_step_lr(*at, *rates) for at in grid], dtype=torch.float64)
    case.close("pretrain_lr", lr.view(epochs, steps), rtol=1e-6)
    ramp = [alpha_ramp(*at, case["steps_per_epoch"], exact(case["alpha"])) for at in grid]
    case.close("alpha_ramp", torch.tensor(ramp, dtype=torch.float64).view(epochs, steps), rtol=1e-6)
    last, ends = case["finetune_max_epoch"], [exact(case[f"finetune_{name}"]) for name in ("init_lr", "min_lr")]
    case.close("finetune_lr", torch.tensor([cosine_lr(e, last, *ends) for e in range(last)]).double(), rtol=1e-6)


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


@pytest.mark.parametrize("stage", ["captioner", "clip"])
def test_two_processes_equal_one(start, cli, folder, tiny, stage):
    flags = [f"emoji-{stage}", *tiny, "--dropout", "0", "--eps", "1e-4"]
    one, both = folder / f"{stage}-1", folder / f"{stage}-2"
    finished(cli(*flags, "--out", one))
    two(start, *flags, "--out", both)
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (one, both))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_broken_samples_are_counted(cli, folder, tiny, broken):
    flags = ["emoji-captioner", *tiny, "--data", broken, "--dataset-size", "64", "--batch-size", "16"]
    result = finished(cli(*flags, "--out", folder / "broken"))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert len(reports) == 3 and all("truncated or damaged tar" in line for line in reports)
    refused(cli(*flags, "--strict", "--out", folder / "strict"), "--strict")


def test_a_run_never_goes_on_as_another(chain, cli, tiny, folder):
    refused(cli("emoji-captioner", *tiny, "--lr", "2e-3", "--out", chain["captioner"]), "another configuration: lr")


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
