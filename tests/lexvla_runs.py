"""LexVLA's small language model and training runs, for its tests."""

import tarfile
from pathlib import Path

import pytest
import torch
from scripts import ROOT, SHARDS, Lazily, finished
from short_runs import dinov2
from tokenizers import ByteLevelBPETokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lexvla import text as texts
from shared import data


def tiny_lm(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    defaults = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(defaults | sizes), num_key_value_heads=1)).eval()


@pytest.fixture(scope="module")
def lm(folder: Path) -> Path:
    """A random Llama of two small blocks, with a tokenizer trained on a shard's captions."""
    pairs = data.open_pairs(f"{SHARDS}/00000.tar", 400)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [" " + pairs.caption(i) for i in range(400)], vocab_size=700, special_tokens=["<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "lm")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # far from 0, so that logits and LoRA matter
            parameter.mul_(3) if parameter.ndim == 2 else parameter
    model.save_pretrained(folder / "lm")
    return folder / "lm"


@pytest.fixture(scope="module")
def states(folder: Path, lm: Path) -> Path:
    """States of the captions that the runs train on, as the first of them would keep them."""
    model, tokenizer = texts.load_lm(str(lm))
    pairs = data.open_pairs(f"{SHARDS}/00000.tar")
    kept = texts.States(str(folder / "states.pt"), str(lm), model, texts.Prompts(tokenizer))
    kept.add(pairs.caption(row) for row in range(len(pairs)))
    return folder / "states.pt"


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    return dinov2(folder / "dinov2")


@pytest.fixture(scope="module")
def tiny(lm: Path, states: Path, backbone: Path, folder: Path) -> list[str]:
    return f"""--data {SHARDS}/00000.tar --dataset-size 160 --lm {lm} --states {states} --backbone {backbone}
        --cache {folder}/cache --image-size 16 --epochs 3 --adapter-width None --adapter-hidden 32 --batch-size 32
        --lora-rank 2 --min-count 2 --warmup 2 --penalty-warmup 4 --lr 1e-3 --eps 1e-4 --precision fp32
        --log-every 1""".split()


ARMS = {
    "none": ["emoji-none"],
    "flops": ["emoji-flops"],
    "overuse": ["emoji"],
    "bow": ["emoji-bow"],
    "dense": ["emoji-dense"],
    "whole-models": ["emoji", "--states", "", "--no-encode-once"],
}


def module(arm: str) -> str:
    """The script that trains an arm."""
    return "studies.lexvla_dense" if arm == "dense" else "lexvla.train"


@pytest.fixture(scope="module")
def arms(cli, folder: Path, tiny: list[str]) -> dict[str, Path]:
    def trained(arm: str) -> Path:
        preset, *options = ARMS[arm]
        finished(cli(preset, *tiny, *options, "--out", folder / arm, module=module(arm)))
        return folder / arm

    return Lazily(trained)


@pytest.fixture(scope="module")
def small_set(folder: Path) -> Path:
    """The first 40 images of the emoji corpus's OOD retrieval set, under the name of the study's set."""
    source, target = ROOT / "data/emoji/eval/retrieval_ood", folder / "retrieval_known"
    (target / "test").mkdir(parents=True)
    (target / "dataset_type.txt").write_text("retrieval\n")
    (target / "test/nshards.txt").write_text("1\n")
    with tarfile.open(source / "test/0.tar") as tar, tarfile.open(target / "test/0.tar", "w") as small:
        members = sorted(tar.getmembers(), key=lambda m: m.name)[:80]
        for member in members:
            small.addfile(member, tar.extractfile(member))
    return target
