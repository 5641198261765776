"""Training of every arm, end to end on real emoji shards, with a tiny random language model.

Every arm. Kills and several processes: test_faults.py, test_scale.py. Scripts start in
forks of a server that has already imported torch and the rest, which saves time.
"""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lexvla_runs import ARMS, arms, backbone, lm, module, states, tiny  # noqa: F401
from scripts import finished, metrics, same
from short_runs import small_corpus
from transformers import AutoTokenizer

from lexvla import config, train
from lexvla import text as texts
from lexvla.towers import create_model
from shared import checkpoints, run
from studies import lexvla_dense

SCRIPT = "lexvla.train"
STEPS, PER_EPOCH = 15, 5


# --------------------------------------------------------------------------------------------------------- end to end


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arms: dict[str, Path], arm: str):
    out = arms[arm]
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for line in lines for value in line.values())
    penalty = {"flops": "flops", "overuse": "overuse", "whole-models": "overuse", "bow": "overuse"}.get(arm)
    for line in lines:
        parts = line["i2t"] + line["t2i"]
        if penalty:
            weight = (1 if arm == "flops" else 0.1) * min(1, line["step"] / 4) ** 2
            parts += weight * (line[f"{penalty}_image"] + line[f"{penalty}_text"])
        assert np.isclose(line["loss"], parts, rtol=1e-5)
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    weights = state["weights"]
    assert {name.split(".")[0] for name in weights} == {"adapter", "image", "logit_scale"} | (
        set() if arm == "bow" else {"lora"} | ({"text"} if arm == "dense" else set())
    )
    lora = {name for name in weights if name.startswith("lora.")}
    assert len(lora) == {"bow": 0, "whole-models": 28}.get(arm, 6)
    assert not any("lm_head" in name for name in weights)
    assert state["vocab_ids"].diff().min() > 0 and (state["bias"] < 0) == (arm != "dense")


def test_image_towers_of_a_seed_start_alike(arms: dict[str, Path], lm: Path):
    starts = []
    for out in (arms["none"], arms["dense"]):
        state = checkpoints.load_checkpoint(out / "checkpoint.pt")
        torch.manual_seed(0)
        dense = "dense_dim" in state["config"]
        kind, create = (lexvla_dense.Config, lexvla_dense.create_model) if dense else (config.Config, create_model)
        model = create(kind(**state["config"]), texts.load_lm(str(lm))[0], state["vocab_ids"])
        starts.append(model.image)
    for part in ("adapter", "backbone"):
        assert same(*(dict(getattr(image, part).state_dict()) for image in starts))


def test_a_stream_has_the_vocabulary_of_its_captions(cli, arms: dict[str, Path], folder: Path, tiny: list[str]):
    """The same as by row, if the stream's epoch holds each sample once."""
    whole = ["--dataset-size", "None", "--max-vocabulary", "60", "--bias", "-1", "--states", "", "--no-encode-once"]
    shards, found = small_corpus(folder / "streamed", 160, 2), []
    for name, how in (("by-row", ["--dataset-size", "160"]), ("stream", ["--stream", "--dataset-size", "160"])):
        options = [*whole, "--data", shards, "--epochs", "1", *how]
        finished(cli("emoji-bow", *tiny, *options, "--workers", "1", "--out", folder / name))
        assert len(metrics(folder / name)) == PER_EPOCH
        found.append(checkpoints.load_checkpoint(folder / name / "checkpoint.pt")["vocab_ids"])
    assert torch.equal(*found)


# ----------------------------------------------------------------------------------------------------------- evaluation


class Captions(list):
    caption = list.__getitem__


def test_the_bias_is_minus_two_standard_deviations_of_the_logits(monkeypatch: pytest.MonkeyPatch):
    """Logits 1, 3, 2 and 4 deviate from their mean by 1.5, 0.5, 0.5 and 1.5: a variance of 5 / 3."""
    tower = SimpleNamespace(hidden=lambda text: text, codebook=torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    monkeypatch.setattr(train, "piece_counts", lambda tokenizer, captions: len([*captions]))
    monkeypatch.setattr(train, "caption_vocabulary", lambda tokenizer, counts, *_: [counts])
    monkeypatch.setattr(train, "lm_input", lambda *_: lambda captions: [torch.eye(2)])
    monkeypatch.setattr(train, "text_encoder", lambda cfg: lambda lm, vocab_ids: tower)
    process, captions = run.Process(0, 1, torch.device("cpu")), Captions(["dog", "", "cat"])
    found = train.vocabulary(config.Config(bias=None), captions, None, None, process)
    assert found == {"vocab_ids": [2], "bias": pytest.approx(-2 * (5 / 3) ** 0.5)}


def test_the_vocabulary_of_small_has_the_words_of_captions_in_capitals(lm: Path):
    """The same as of captions in lower case; the paper's presets keep case."""
    tokenizer, process = AutoTokenizer.from_pretrained(lm), run.Process(0, 1, torch.device("cpu"))
    found = {}
    for name in ("small", "cc12m"):
        cfg = replace(config.PRESETS[name][1], bias=0.0, min_count=1)
        for captions in (["Red Cat Face", "BLUE CAT FACE"], ["red cat face", "blue cat face"]):
            vocabulary = train.vocabulary(cfg, Captions(captions), None, tokenizer, process)["vocab_ids"]
            found[name, captions[0]] = texts.pieces(tokenizer, vocabulary.tolist())
    assert found["small", "Red Cat Face"] == found["small", "red cat face"] and " cat" in found["small", "Red Cat Face"]
    assert found["cc12m", "Red Cat Face"] != found["cc12m", "red cat face"]
