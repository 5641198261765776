"""FLAME's small language model, bank and training runs, for its tests."""

import re
from pathlib import Path

import pytest
import torch
from scripts import ROOT, SHARDS, Lazily, finished
from short_runs import small_set

from flame.model import FLAME, image_tower
from shared.clip import open_clip_config


def small(text_dim: int, hidden_dim: int | None = None, **options) -> FLAME:
    return FLAME(*image_tower(open_clip_config("FLAME-emoji")), text_dim, hidden_dim, **options)


EVAL = ROOT / "data/emoji/eval"
IMAGES = 160


@pytest.fixture(scope="module")
def tiny_llm(folder: Path) -> Path:
    """A Llama of two layers over bytes, in transformers' format."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out = folder / "llm"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<pad>").save_pretrained(out)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), num_key_value_heads=2, **sizes)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def captions(cli, folder: Path) -> Path:
    out = folder / "captions"
    finished(cli("--data", SHARDS / "00000.tar", "--out", out, module="studies.flame_recaption"))
    return out


@pytest.fixture(scope="module")
def embed_flags(tiny_llm: Path, captions: Path, folder: Path) -> list:
    flags = f"emoji --data {SHARDS}/00000.tar --dataset-size {IMAGES} --precision fp32 --batch-size 16".split()
    for kind in ("raw", "short", "long"):
        flags += [f"--{kind}", captions / f"{kind}.json"]
    long = small_set("retrieval_long_ood", folder / "embedded", every=16)
    return [*flags, "--llm", tiny_llm, "--sets", EVAL / "groups_ood", long]


@pytest.fixture(scope="module")
def bank(cli, embed_flags: list, folder: Path) -> Path:
    result = finished(cli(*embed_flags, "--out", folder / "banks/bank", module="flame.embed"))
    assert re.search(r"captions in \d+ s, [\d.]+ captions/s", result.out)
    return folder / "banks/bank"


@pytest.fixture(scope="module")
def tiny(bank: Path, captions: Path) -> list:
    flags = f"""--data {SHARDS}/00000.tar --dataset-size {IMAGES} --image-size 16 --hidden-dim 32 --epochs 3
        --batch-size 32 --warmup 2 --lr 1e-3 --eps 1e-4 --precision fp32 --workers 0 --eval-every 0 --log-every 1
        --model ViT-test""".split()
    files = [captions / f"{kind}.json" for kind in ("raw", "short", "long")]
    return [*flags, "--bank", bank, "--captions", *files]


ARMS = {
    "clip": ["emoji-clip"],
    "flame": ["emoji"],
    "raw": ["emoji", "--facet-ids", "0", "--facets", "1"],
    "summary": ["emoji", "--facet-ids", "0", "1", "4", "--facets", "3"],
    "nce": ["emoji", "--loss", "mp-nce"],
}


@pytest.fixture(scope="module")
def arms(cli, tiny: list, folder: Path) -> dict[str, Path]:
    def trained(arm: str) -> Path:
        finished(cli(*ARMS[arm], *tiny, "--out", folder / f"{arm}-seed0"))
        return folder / f"{arm}-seed0"

    return Lazily(trained)
