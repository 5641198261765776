"""The noisy pool: noise of its captions, and replacement of a pool of another version."""

import json

import pytest
from test_tldr_reduction_train import refused

from studies import tldr_reduction_corpus as corpus


def test_corpus_is_declared(tmp_path):
    """Kinds of noise have the declared shares and depend only on the key."""
    names = ["a", "b", "c"]
    kinds = []
    for key in range(2000):
        caption, kind = corpus.noisy_caption(str(key), {"name": "a", "tags": ["t"]}, names)
        assert (caption == "a") == (kind == "name") and (caption == "t") == (kind == "keyword")
        kinds.append(kind)
    for kind, share in corpus.SHARES.items():
        assert abs(kinds.count(kind) / 2000 - share) < 0.04
    assert corpus.noisy_caption("7", {"name": "a", "tags": ["t"]}, names) == corpus.noisy_caption(
        "7", {"name": "a", "tags": ["t"]}, names
    )


def test_a_corpus_of_another_version_leaves_nothing_behind(tmp_path):
    """Old shards are deleted, and noise.json is missing until everything is written."""
    about = [{"name": f"n{i}", "tags": ["t"], "style": "noto" if i % 2 else "twemoji"} for i in range(6)]
    source, out = tmp_path / "emoji", tmp_path / "tldr"
    corpus.write(source / "train", [(str(i), b"png", "", each) for i, each in enumerate(about)])
    (source / "manifest.json").write_text('{"version": "new"}')
    corpus.write(out / "pool", [(str(i), b"png", "", {}) for i in range(4)], size=1)
    (out / "noise.json").write_text(json.dumps({"version": "old", "seed": corpus.SEED, "shares": corpus.SHARES}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "build_vocab", lambda captions: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            corpus.main(corpus.Config(str(source), str(out)))
    assert [path.name for path in sorted((out / "pool").iterdir())] == ["00000.tar"]
    assert not (out / "noise.json").exists()
    corpus.main(corpus.Config(str(source), str(out)))
    assert json.loads((out / "noise.json").read_text())["version"] == "new"


def test_a_folder_that_is_no_corpus_is_refused(in_process, tmp_path):
    refused(in_process("--source", tmp_path, module="studies.tldr_reduction_corpus"), "is not the embedded corpus")
