"""TL;DR's small models and runs, for its tests."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from scripts import SHARDS, Ended, Lazily, ended, finished, start_two
from tldr_reduction_ports import build_vocab, emoji_pairs

from shared import tars
from tldr_reduction.blip import BLIP, TextTransformer, VisionTransformer
from tldr_reduction.model import CodebookCaptioner, VectorQuantizer


def tiny_blip(queue_size=12, vocab=30) -> BLIP:
    torch.manual_seed(0)
    texts = [TextTransformer(vocab, 16, 2, 4, 24, 16, dropout=0.0) for _ in range(2)]
    return BLIP(VisionTransformer(16, 8, 16, 2, 4), *texts, 8, queue_size)


def tiny_captioner(vocab=30, num_codes=20, code_dim=8, quantize=True) -> CodebookCaptioner:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes, code_dim) if quantize else None
    text = TextTransformer(vocab, 16, 2, 4, 24, 16, dropout=0.0)
    return CodebookCaptioner(VisionTransformer(16, 8, 16, 2, 4), text, quantizer, sep_token_id=3)


REDUCE = "tldr_reduction.reduce"
STAGES = {  # name: preset
    "captioner": "small-captioner",
    "finetune": "small-finetune",
    "retrieval": "retrieval-coco",
    "scorer": "small-scorer",
    "clip": "small-clip",
    "blip": "small-blip",
}
SIZES = """--image-size 16 --patch-size 8 --width 32 --layers 2 --heads 2 --text-width 32 --text-layers 1
    --text-heads 2""".split()
COMMON = (
    """--epochs 3 --batch-size 32 --lr 1e-3 --precision fp32 --workers 0 --log-every 1 --dataset-size 128""".split()
)
CODES = ["--code-dim", "16", "--num-codes", "32"]
WARM = ["--lr-decay-rate", "0.85", "--warmup", "4"]
QUEUE = ["--embed-dim", "16", "--queue-size", "64"]
OWN = {  # flags of a stage besides SIZES and COMMON
    "captioner": [*CODES, *WARM],
    "finetune": [],
    "retrieval": [*QUEUE, "--max-positions", "40", "--no-augment", "--no-flip"],
    **dict.fromkeys(("scorer", "clip", "blip"), [*QUEUE, *WARM]),
}


@pytest.fixture(scope="module")
def folder(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory):
    """Folder with shards and a vocabulary of 160 pairs, and for runs; deleted at the end."""
    path = tmp_path_factory.mktemp("tldr")
    entries = emoji_pairs(SHARDS.parent, 160)
    for number in range(0, 160, 64):
        tars.write_tar(path / f"pool/{number // 64:05}.tar", entries[number : number + 64])
    (path / "vocab.txt").write_text("\n".join(build_vocab(entry["txt"] for entry in entries)) + "\n")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tiny(folder: Path) -> list[str]:
    return [*SIZES, *COMMON, "--data", str(folder / "pool"), "--vocab", str(folder / "vocab.txt")]


def command(stage: str, tiny: list[str], *more) -> list:
    """Arguments of a stage, after the module."""
    return [STAGES[stage], *tiny, *OWN[stage], *more]


@pytest.fixture(scope="module")
def chain(folder: Path, cli, tiny) -> Lazily:
    """Folder of each stage, which runs when it is first needed; `command` and `printed` are arguments and output of
    the reduction."""
    shorter = ["--epochs", "2", "--dataset-size", "64"]

    def make(name: str):
        if name == "command":
            reduce = [folder / "pool", "--keep", "0.5", "--clusters", "4", "--batch-size", "48"]
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
        if name == "retrieval":
            options = ["--init", chain["scorer"]]
        finished(cli(*command(name, tiny, *options), "--out", folder / name))
        return folder / name

    chain = Lazily(make)
    return chain


@pytest.fixture(scope="module")
def broken(folder: Path) -> str:
    """A shard that ends within an image, and one with an unreadable image, an empty caption and a missing caption."""
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


def two(start, *arguments, **options) -> list[Ended]:
    return [finished(ended(process)) for process in start_two(start, *arguments, **options)]
