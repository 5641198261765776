"""The study's corpus: training words and new words, exact masks, finished folders."""

import json
from pathlib import Path

import numpy as np
import pytest
from scene_corpora import SIZES, bank, corpus, small_corpus, small_scenes  # noqa: F401

from lexvla import patchdis
from lexvla.towers import normalize
from shared import data
from shared.evalsets import EvalSet
from studies import lexvla_scenes as scenes
from studies.corpora.emoji_sources import Emoji

SCRIPT = "lexvla.train"

CAT = Emoji(
    "1F408", "cat", ("cat", "pet", "feline", "big cat", "kitty", "9 lives", "animal"), "animals-nature", "mammal"
)


def test_words_of_an_emoji_are_halved():
    known, new = scenes.words_of(CAT)
    assert known[0] == "cat" and len(known) == 3 and len(new) == 2
    assert {*known[1:], *new} == {"pet", "feline", "kitty", "animal"}  # none with the name's word, or a number


def test_sentences_have_training_words_or_new_words(small_corpus: Path, corpus: Path):
    pairs = data.open_pairs(str(small_corpus / "train"))
    assert len(pairs) == 30
    texts = {way: [t for _, _, of in EvalSet(small_corpus / f"eval/retrieval_{way}", np.asarray) for t in of]
             for way in scenes.WAYS}  # fmt: skip
    words = {one.name: scenes.words_of(one) for one in scenes.load_sprites(corpus).emoji}
    names = (small_corpus / "eval/patchdis/classnames.txt").read_text().splitlines()
    masks = patchdis.labelled_images(str(small_corpus / "eval/patchdis"), 64, normalize(""))
    for i, (_, mask, ignore) in enumerate(masks):
        shown = [words[names[c]] for c in mask.unique().tolist() if c != ignore]
        said = {way: texts[way][i] for way in scenes.WAYS}
        assert all(any(f" {word}" in f" {said['known']}" for word in known) for known, _ in shown), said
        assert all(any(f" {word}" in f" {said['new']}" for word in new) for _, new in shown), said
        assert sum(any(f" {word}" in f" {said['mixed']}" for word in new) for _, new in shown) >= 1, said
    assert len(set(texts["known"])) > 10 and all(len(of) == 16 for of in texts.values())


def test_scenes_have_exact_masks(small_scenes: Path):
    names, found = (small_scenes / "classnames.txt").read_text().splitlines(), set()
    for pixels, mask, ignore in patchdis.labelled_images(str(small_scenes), 64, normalize("")):
        labels = set(mask.unique().tolist()) - {ignore}
        assert 2 <= len(labels) <= 3 and pixels.shape == (1, 3, 64, 64) and mask.shape == (1, 64, 64)
        found |= labels
    assert len(names) == 6 and found == set(range(6))


def test_finished_scenes_of_other_settings_are_refused(small_corpus: Path, corpus: Path, capsys):
    again = scenes.Config(small_corpus, corpus, **SIZES)
    scenes.main(again)
    assert "is complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"concepts \(was 6, now 5\)"):
        scenes.main(scenes.Config(small_corpus, corpus, **(SIZES | {"concepts": 5})))
    counts = json.loads((small_corpus / "manifest.json").read_text())["counts"]
    assert counts["train"] == 30 and counts["patchdis_train"] == counts["retrieval_new"] == 16
    with pytest.raises(ValueError, match="--samples must be at least 1"):
        scenes.main(scenes.Config(small_corpus, corpus, **(SIZES | {"samples": 0})))
