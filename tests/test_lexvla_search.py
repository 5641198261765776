"""Search in an inverted index, and the explanation of a pair."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scripts import one_sentence
from test_lexvla_train import (  # noqa: F401
    ARMS,
    GROUPS,
    SCRIPT,
    SECONDS,
    SHARDS,
    arms,
    backbone,
    folder,
    lm,
    small_set,
    states,
    tiny,
)

from lexvla.search import LexicalIndex
from shared import data


def test_search(arms: dict[str, Path], in_process, small_set: Path):
    result = in_process("search", arms["overuse"], "red fruit", "--images", small_set, module="lexvla.eval")
    assert result.code == 0 and result.out.startswith("query: "), result.err
    lines = result.out.splitlines()[1:]
    scores = [float(line.split()[0]) for line in lines]
    assert 1 <= len(lines) <= 10 and scores == sorted(scores, reverse=True)
    again = in_process("search", arms["overuse"], "red fruit", "--images", small_set, module="lexvla.eval")
    (kept,) = arms["overuse"].glob("index-retrieval_known-*.npz")
    assert again.out == result.out
    kept.write_bytes(b"damaged")
    again = in_process("search", arms["overuse"], "red fruit", "--images", small_set, module="lexvla.eval")
    assert again.out == result.out and len(kept.read_bytes()) > 100
    other = in_process("search", arms["overuse"], "red fruit", "--images", GROUPS, "--k", 3, module="lexvla.eval")
    assert other.code == 0 and len(other.out.splitlines()) <= 4, other.err
    result = in_process("search", arms["dense"], "red fruit", "--images", small_set, module="lexvla.eval")
    assert result.code == 2 and "its dimensions are no words" in result.err and one_sentence(result.err)
    unknown = in_process("search", arms["bow"], "qqqq of the", "--images", small_set, module="lexvla.eval")
    assert unknown.code == 2 and "is in 'qqqq of the'" in unknown.err and one_sentence(unknown.err), unknown.err
    for query in ("", "qqqq zzzz", '"quotes" ' * 200):  # a language model says something of everything
        result = in_process("search", arms["overuse"], query, "--images", small_set, module="lexvla.eval")
        assert result.code == 0 and result.out.startswith("query: "), result.err
    for arguments, words in (
        ((arms["overuse"], "red fruit", "--k", "0"), "--k must be at least 1"),
        ((arms["overuse"], "red fruit", "--images", "/nowhere"), "/nowhere"),
        ((arms["overuse"], "red fruit"), "--images is missing"),
        (("/nowhere", "red fruit"), "/nowhere/checkpoint.pt"),
    ):
        result = in_process("search", *arguments, module="lexvla.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err


@pytest.mark.parametrize("arm", ["overuse", "bow"])
def test_explanation_of_a_pair(arms: dict[str, Path], in_process, tmp_path: Path, arm: str):
    image, picture = tmp_path / "image.png", tmp_path / "explain.png"
    data.open_pairs(f"{SHARDS}/00000.tar", 1).read(0).image.save(image)
    caption = data.open_pairs(f"{SHARDS}/00000.tar", 1).caption(0)
    result = in_process("explain", arms[arm], image, caption, "--out", picture, module="lexvla.eval")
    assert result.code == 0 and picture.stat().st_size > 5_000, result.err
    first, *reasons, _ = result.out.splitlines()
    values = [float(line.split()[0]) for line in reasons]
    assert values == sorted(values, reverse=True) and sum(values) <= float(first.split()[1].rstrip(":")) + 0.01
    nothing = in_process("explain", arms[arm], image, "", "--out", tmp_path / "empty.png", module="lexvla.eval")
    assert nothing.code == 0 and (arm != "bow" or nothing.out.startswith("score 0.000")), nothing.err
    for options in (["--out", tmp_path / "nowhere/x.png"], ["--out", tmp_path / "x.gif"], ["--k", "-1"]):
        result = in_process("explain", arms[arm], image, caption, *options, module="lexvla.eval")
        assert result.code == 2 and options[0] in result.err and one_sentence(result.err), result.err
    (tmp_path / "text.png").write_text("no image")
    for file, words in ((tmp_path / "nothing.png", "does not exist"), (tmp_path / "text.png", "cannot be read")):
        result = in_process("explain", arms[arm], file, "a cat", module="lexvla.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err


def test_index_gives_the_products():
    torch.manual_seed(0)
    s = torch.rand(50, 30) * (torch.rand(50, 30) < 0.2)
    query = torch.rand(30) * (torch.rand(30) < 0.3)
    index = LexicalIndex(s)
    np.testing.assert_allclose(index.scores(query), (s @ query).numpy(), rtol=1e-5, atol=1e-7)
    best = index.search(query, 5)
    assert [i for i, _ in best] == (s @ query).sort(descending=True, stable=True).indices[:5].tolist()
    found = [i for i, _ in best]
    torch.testing.assert_close(index.common(query, found), s[found] * (query > 0))
    assert index.search(torch.zeros(30)) == [] and len(index.search(query, 500)) == int(((s @ query) > 0).sum())
