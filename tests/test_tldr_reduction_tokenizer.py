"""A WordPiece vocabulary of one's own."""

import dataclasses

import pytest
import tokenizers
import torch
from tldr_reduction_ports import build_vocab
from tldr_reduction_runs import tiny_blip

from tldr_reduction.config import Config
from tldr_reduction.encoders import itm_scores
from tldr_reduction.tokenizer import WordPiece, eval_tokenizer


def test_word_pieces(tmp_path):
    vocab = build_vocab(["a red car", "blue car", "café"])
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(vocab) + "\n")
    tokenizer = WordPiece(path)
    ids, mask = tokenizer(["a picture of red car", "unknownred"], 30)
    assert (tokenizer.dec, tokenizer.enc) == (len(vocab), len(vocab) + 1) and len(tokenizer) == len(vocab) + 2
    assert ids[0, 0] == tokenizer.cls and mask.sum(1).tolist() == [(row != 0).sum() for row in ids]
    assert tokenizer(["red " * 50], 7)[0].shape == (1, 7) and tokenizer(["red " * 50], 7)[0][0, -1] == tokenizer.sep
    prompt = tokenizer.prompt_ids("a red ")
    caption = torch.cat([torch.tensor([[tokenizer.dec]]), tokenizer(["a red blue car"])[0][:, 1:]], 1)
    assert prompt.tolist() == [tokenizer.cls, *caption[0, 1:3].tolist(), tokenizer.sep]
    assert tokenizer.decode(caption, "a red ") == ["blue car"]
    with pytest.raises(ValueError, match="vocabulary"):
        WordPiece(tmp_path / "missing.txt")


def test_a_vocabulary_is_checked(tmp_path):
    path, pieces = tmp_path / "vocab.txt", ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b"]
    path.write_text("\n".join(pieces))
    first = WordPiece(path).fingerprint
    path.write_text("\n".join([*pieces[:-1], "c", ""]))
    assert WordPiece(path).fingerprint != first
    for lines in ([], pieces[1:], pieces[:3], [*pieces, "a"], [*pieces[:5], "", "", "b"]):
        path.write_text("\n".join(lines))
        with pytest.raises(ValueError, match=f"{path} is not BERT's"):
            WordPiece(path)
    path.write_bytes("café".encode("latin-1"))
    with pytest.raises(ValueError, match=f"{path} is not UTF-8"):
        WordPiece(path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        WordPiece(tmp_path)


def test_captions_are_cut_later_in_retrieval_and_matching_than_in_training(tmp_path):
    """At 35 tokens as in BLIP, or where the model has no more positions."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(24))]) + "\n")
    tokenizer, settings = WordPiece(path), Config(vocab=str(path))
    assert tokenizer(["1 " * 50])[0].shape == (1, 30)
    for positions, length in ((512, 35), (32, 32)):
        tokens = eval_tokenizer(tokenizer, dataclasses.replace(settings, max_positions=positions))
        assert tokens(["1-1 " * 30]).shape == (1, length)
    scorer = tiny_blip().eval()
    assert scorer.text_encoder.max_positions == 24
    scores = itm_scores(scorer, tokenizer, torch.rand(2, 3, 16, 16), ["1 " * 50, "2"])
    assert scores.shape == (2,) and scores.isfinite().all()


def test_without_a_network_the_vocabulary_is_named(monkeypatch: pytest.MonkeyPatch):
    def from_pretrained(name: str):
        raise OSError("no network")

    monkeypatch.setattr(tokenizers.Tokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(ValueError, match="bert-base-uncased.*no network.*vocab.txt"):
        WordPiece("bert-base-uncased")
