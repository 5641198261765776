"""Settings that are refused before a run starts: exit code 2, one sentence with the flag or the word that helps.

What all scripts check (shared/settings.py) is in test_settings.py; here, each script is asked once whether it does, and
each number of its settings whether it has limits. Then come what papers check of their own.
"""

import dataclasses
import importlib
import math
import typing
from pathlib import Path
from typing import Any

import pytest
from scripts import SHARDS, refused
from short_runs import FOLDERS, SCRIPTS, commands, further, offered, small_corpus

from lexvla import lite0
from shared.errors import UserError
from shared.settings import check_limits, limits_of
from tldr_reduction.config import ReduceConfig

EVAL = SHARDS.parent / "eval"

# ---------------------------------------------------------------------------------------------------- limits of numbers

PRESETS = [cfg for folder in FOLDERS for cfg in offered(folder).values() if dataclasses.is_dataclass(cfg)]
SETTINGS = {f"{type(cfg).__module__}.{type(cfg).__name__}": cfg for cfg in (*PRESETS, ReduceConfig("", ""))}
SIGNED = {"logit_bias", "bias", "scale_init", "target_temperature", "lambda_lr"}
SHARES = set(  # above 1 they mean nothing
    """alpha beta1 beta2 crop_scale dropout ema_momentum itm_keep keep keep_ratio label_noise misaligned noise
    ssl_crop_scale start_sparsity target_sparsity threshold train_fraction""".split()
)


def numbers(cfg: Any) -> dict[str, Any]:
    """{field: type} of a configuration's numbers."""

    def parts(hint: Any) -> set:
        return {hint}.union(*(parts(part) for part in typing.get_args(hint) if part is not hint))

    hints = typing.get_type_hints(type(cfg), include_extras=True)
    return {
        name: hint for name, hint in hints.items() if parts(hint) & {int, float} and name != "bank"
    }  # its own check


@pytest.mark.parametrize("name", SETTINGS)
def test_numbers_have_limits(name: str):
    cfg = SETTINGS[name]
    check_limits(cfg)
    for field, hint in numbers(cfg).items():
        assert limits_of(hint), field
        wrong = [math.nan] + [-1] * (field not in SIGNED) + [1.5] * (field in SHARES)
        for number in wrong:
            value = (number,) if isinstance(getattr(cfg, field), tuple) else number
            with pytest.raises(ValueError, match=f"--{field.replace('_', '-')} must be"):
                check_limits(dataclasses.replace(cfg, **{field: value}))


# ---------------------------------------------------------------------------------------------------------- all scripts


@pytest.fixture(scope="module")
def given(folder: Path) -> dict[str, list[str]]:
    (folder / "parts").mkdir()
    data = small_corpus(folder / "corpus")
    return commands(data, folder / "parts") | further(data, folder / "parts")


CHECKED = {  # by shared/settings.py, shared/data.py and shared/run.py
    "--data=": "--data is missing",
    "--data /nowhere/{0..3}.tar": "/nowhere/0.tar",
    "--batch-size 0": "--batch-size",
    "--batch-size 32 --accumulate 3": "3 micro-batches",
    "--stream --keep-in-memory": "--stream",
    "--precision fp16 --device cpu": "fp16",
    "--eval-every 1 --eval-set /nowhere": "--eval-set",
}
NEVER = {  # what a script lacks
    "concept_frequency": ("--stream --keep-in-memory", "--eval-every 1 --eval-set /nowhere"),
    **dict.fromkeys(("lexvla", "nmtune", "tldr_reduction"), ("--eval-every 1 --eval-set /nowhere",)),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_script_checks_what_all_check(name: str, given, in_process, tmp_path: Path):
    for words, said in CHECKED.items():
        if words not in NEVER.get(name, ()):
            refused(in_process(*given[name], *words.split(), "--out", tmp_path / "run", module=SCRIPTS[name]), said)
            assert not (tmp_path / "run/metrics.jsonl").exists()


# -------------------------------------------------------------------------------------------------------- a paper's own

OWN = {  # run of short_runs.py: {further words: what the error says}
    "attentive_mask_clip": {
        "--model vit_b32": "--model",
        "--image-size 22": "patches of 5",
        "--image-size 25": "blocks of 2x2",
        "--ema-image-size 11": "--ema-image-size 11",
        "--keep-ratio 0": "--keep-ratio",
        "--ssl-crop-scale 0": "--ssl-crop-scale",
        "--warmup-epochs 4": "--warmup-epochs 4",
        "--dataset-size 31": "batch of 32",
        "--batch-size 1": "BatchNorm",
        "--keep-best": "--eval-every",
    },
    "flame": {"--captions no.json": "no.json"},
    "flame-bank": {
        "--bank=": "--bank is missing",
        "--bank /nowhere": "flame.embed",
        "--model RN-1": "RN-1",
        f"--data {SHARDS}/00001.tar": "no embeddings of sample",
        "--image-size 41": "patches of 8",
        "--facet-ids 0 1 --facets 3": "--facets 3",
        "--facet-ids 11 --facets 1": "11 facets",
        "--facet-ids 1 1 --facets 1": "--facet-ids",
        "--batch-size 161": "batch of 161",
        "--lr 0": "--lr",
        "--logit-scale 1000": "--logit-scale",
        f"--eval-every 1 --eval-set {EVAL}/subgroups_ood": "embedded",
    },
    "lexvla": {
        "--states= --encode-once --stream --dataset-size 9": "--encode-once",
        "--encode-once --keep-in-memory": "--encode-once",
        "--lm /nowhere": "--lm /nowhere",
        "--backbone vit_nothing": "--backbone vit_nothing",
        "--image-size 4": "--image-size 4",
        f"--encode-once --backbone {lite0.NAME} --image-size 20": "multiples of 32",
        "--batch-size 161": "batch of 161",
        "--max-vocabulary 1": "--max-vocabulary",
        "--min-count 9999": "0 pieces",
        "--pattern [": "regular expression",
    },
    "protoclip-teacher": {
        "--external-teacher None": "--external-teacher is missing",
        "--external-teacher no.npz": "no.npz",
        f"--external-teacher {SHARDS}/00000.tar": "teacher file",
        "--no-back-translate": "back translation",
        "--model RN51": "RN51",
        "--model ViT-B-16-SigLIP": "text tower",
        "--k 161": "--k 161",
        "--episode-size 31": "--episode-size 31",
        "--lit-start 4": "--lit-start",
    },
    "tinyclip": {
        "--init /nowhere": "--init /nowhere",
        "--model RN51": "--model 'RN51'",
        "--model RN50": "--image-size 16",
        "--image-size 20": "patch_size 8",
        "--batch-size 161": "160 pairs",
        "--inherit-only image": "--inherit-only",
        "--inherit random": "--init",
    },
    "tinyclip-masks": {
        "--teacher None": "--teacher",
        "--teacher /nowhere": "--teacher /nowhere",
        "--teacher .": "without weights",
        f"--teacher {SHARDS}/00000.tar": "checkpoint",
        "--teacher ViT-L-14@nothing": "ViT-L-14@nothing",
        "--prune-step 10": "--prune-step 10",
        "--start-sparsity 0.9": "--start-sparsity 0.9",
        "--model RN50 --image-size 32": "ResNet",
        "--inherit-only text": "--masks",
        "--lambda-lr 0.2": "--lambda-lr",
    },
}


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, of in OWN.items() for words in of])
def test_what_a_paper_refuses(name: str, words: str, given, in_process, tmp_path: Path):
    module = f"{name.partition('-')[0]}.train"
    refused(in_process(*given[name], *words.split(), "--out", tmp_path / "run", module=module), OWN[name][words])
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.parametrize("words", ["--mask low", "--views 3"])
def test_unknown_choices_are_refused(words: str, in_process):
    result = in_process("emoji", *words.split(), module="attentive_mask_clip.train")
    assert result.code == 2 and words.split()[0] in result.err and "Traceback" not in result.err


@pytest.mark.parametrize("script", [f"{folder}.eval" for folder in FOLDERS] + ["concept_frequency.evaluate"])
def test_evaluations_refuse_batches_of_no_samples(script: str):
    module = importlib.import_module(script)
    fields = {field.name for field in dataclasses.fields(module.Config)}
    cfg = module.Config(runs=("nowhere",)) if "runs" in fields else module.Config(model="nowhere")
    with pytest.raises(UserError, match="--batch-size"):
        module.main(dataclasses.replace(cfg, batch_size=0))
