"""The training stages of TL;DR, end to end on emoji shards, each in its own process.

Captioner, fine-tuning, pre-training and fine-tuning for retrieval; schedules. Scripts start in
forks of a server that has imported torch and other packages.
"""

import dataclasses
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scripts import SHARDS, ended, finished, in_turn, kill_at, metrics, refused, same, trained
from tldr_reduction_runs import REDUCE, chain, command, folder, tiny, tiny_blip  # noqa: F401

from shared import checkpoints
from shared import cli as command_line
from tldr_reduction import config, train
from tldr_reduction.checkpoints import load_run, start_weights
from tldr_reduction.datasets import TextOf, open_pairs, pixel_hash
from tldr_reduction.tokenizer import PROMPT, WordPiece
from tldr_reduction.train import alpha_ramp, learning_rate

SCRIPT = "tldr_reduction.train"
STEPS, PER_EPOCH = 12, 4


def test_every_stage_trains(chain):
    for stage, parts in (
        ("captioner", {"loss_lm", "loss_emb"}),
        ("finetune", {"loss_lm", "loss_emb"}),
        ("scorer", {"loss_ita", "loss_itm", "loss_lm"}),
        ("retrieval", {"loss_ita", "loss_itm"}),
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


def test_a_killed_retrieval_resumes(chain, start, folder, tiny):
    out = folder / "killed"
    words = [*command("retrieval", tiny, "--init", chain["scorer"]), "--save-every", "3", "--out", out]
    for line in (random.randint(2, 5), random.randint(7, 11)):
        kill_at(start(*words), out, line, timeout=120)
    finished(ended(start(*words)))
    assert metrics(out) == metrics(chain["retrieval"]) and same(trained(out), trained(chain["retrieval"]))


def test_a_failed_evaluation_costs_no_epoch(folder, tiny, monkeypatch):
    """The resumed run repeats the evaluation alone, also where --steps ends a run within an epoch."""
    monkeypatch.setattr(train, "quick_top1", in_turn(1.0, ValueError("broken set"), 2.0))
    flags = [
        *command("clip", tiny),
        "--eval-every",
        "1",
        "--eval-set",
        str(SHARDS.parent / "eval/names_ood"),
        "--epochs",
        "2",
        "--steps",
        str(PER_EPOCH + 1),
    ]
    monkeypatch.setattr(sys, "argv", [SCRIPT, *map(str, flags), "--out", str(folder / "failed")])
    cfg = command_line.preset_cli(train.PRESETS)
    with pytest.raises(ValueError, match="broken set"):
        train.main(cfg)
    state = checkpoints.load_checkpoint(folder / "failed/checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (1, PER_EPOCH)
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was repeated"))
    train.main(cfg)
    top1 = {line["step"]: line["zero_shot_top1"] for line in metrics(folder / "failed") if "zero_shot_top1" in line}
    assert top1 == {PER_EPOCH: 1.0, PER_EPOCH + 1: 2.0}


def test_a_stream_trains(cli, folder, tiny):
    finished(cli(*command("scorer", tiny), "--stream", "--epochs", "1", "--out", folder / "stream"))
    assert [line["step"] for line in metrics(folder / "stream")] == list(range(1, PER_EPOCH + 1))


def test_a_run_needs_its_vocabulary(chain, in_process, tiny, tmp_path):
    """One with as many other pieces would give other numbers without an error."""
    vocab = tmp_path / "vocab.txt"
    state = checkpoints.load_checkpoint(chain["finetune"] / "checkpoint.pt")
    pieces = Path(state["config"]["vocab"]).read_text().splitlines()
    vocab.write_text("\n".join([*pieces[:-2], pieces[-1], pieces[-2]]))
    state["config"] |= {"vocab": str(vocab), "epochs": 4}
    (tmp_path / "run").mkdir()
    checkpoints.save_checkpoint(tmp_path / "run/checkpoint.pt", state)
    with pytest.raises(ValueError, match=f"another vocabulary than {vocab}"):
        load_run(tmp_path / "run")
    flags = ["--vocab", vocab, "--epochs", "4", "--init", state["config"]["init"], "--out", tmp_path / "run"]
    result = in_process(*command("finetune", tiny, *flags), module=SCRIPT)
    refused(result, "another vocabulary")


@pytest.mark.parametrize(
    ("stage", "flags", "words"),
    [
        ("finetune", [], "--init is missing"),
        ("finetune", ["--init", "gone"], "gone does not exist"),
        ("retrieval", [], "--init is missing"),
        ("retrieval", ["--queue-size", "8"], "smaller than"),
    ],
)
def test_what_a_stage_needs(in_process, tiny, stage, flags, words):
    refused(in_process(*command(stage, tiny), *flags, module=SCRIPT), words)


def test_each_stage_has_its_schedule():
    captioner = dataclasses.replace(config.CAPTIONER, warmup=10)
    assert learning_rate(captioner, 0, 0) == 1e-6
    assert learning_rate(captioner, 0, 10) == captioner.lr
    assert learning_rate(captioner, 2, 5) == pytest.approx(captioner.lr * 0.81)
    for cfg in (config.FINETUNE, config.RETRIEVAL):
        rates = [learning_rate(cfg, epoch, 3) for epoch in range(cfg.epochs)]
        assert rates[0] == cfg.lr and rates == sorted(rates, reverse=True)
    assert [alpha_ramp(e, 0, 4, 0.4, epochs=1) for e in range(3)] == [0, 0.4, 0.4]
    assert [alpha_ramp(e, 2, 4, 0.4) for e in range(3)] == pytest.approx([0.1, 0.3, 0.4])


def test_a_blip_starts_with_equal_momentum_encoders(tmp_path, capsys):
    source, model = tiny_blip(), tiny_blip()
    state = {name: value for name, value in source.state_dict().items() if "text_decoder" not in name}
    torch.save({"model": {name: value + 1.0 for name, value in state.items()}}, tmp_path / "blip.pth")
    start_weights(model, config.Config(init=str(tmp_path / "blip.pth")))
    assert "start at random" in capsys.readouterr().out
    for online, slow in zip(model.visual_encoder.parameters(), model.visual_encoder_m.parameters(), strict=True):
        assert torch.equal(online, slow)


def test_texts_of_the_stages(folder):
    """The prompt is put before clean captions; in retrieval, images are known by their pixels."""
    pairs, words = open_pairs(str(folder / "pool")), WordPiece(folder / "vocab.txt")
    plain, clean, numbered = (TextOf(words, cfg) for cfg in (config.CAPTIONER, config.FINETUNE, config.RETRIEVAL))
    pair = pairs.read(0)
    prompt = words.prompt_ids(PROMPT)[:-1].tolist()
    assert len(plain(pair)) == 30 and len(clean(pair)) == 40 and clean(pair)[: len(prompt)].tolist() == prompt
    numbers = [int(numbered(pairs.read(i))[1]) for i in (0, 1, 0)]
    assert numbers[0] == numbers[2] != numbers[1] and all(0 <= number < 2**63 for number in numbers)
    assert pixel_hash(Image.new("RGB", (4, 2))) != pixel_hash(Image.new("RGB", (2, 4)))


def test_a_retrieval_run_is_loaded_and_scores(chain, cli, folder):
    model, settings, _ = load_run(chain["retrieval"])
    assert settings.stage == "retrieval" and (model.idx_queue >= 0).any()
    out = folder / "by-retrieval"
    words = [folder / "pool", "--select", "itm", "--keep", "0.5", "--scorer", chain["retrieval"], "--out", out]
    assert cli(*words, module=REDUCE).code == 0
