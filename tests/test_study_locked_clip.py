"""A small CLIP on features of photographs learns, and resumes bit for bit."""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import clip_benchmark.cli as their_cli
import pytest
import torch
from photographs import WORDS, cfg, corpus, lite0, picture  # noqa: F401

from shared import checkpoints, layout, run, zeroshot
from studies.concept_frequency_nouns import Config
from studies.harness import locked_clip, photos

pytestmark = pytest.mark.slow


def test_it_learns_what_captions_say(cfg: Config):
    features, captions, _ = photos.test_set("retrieval")
    image, text = locked_clip.encode(locked_clip.train(cfg), features, [f"a {word} ." for word in WORDS])
    hits = (image @ torch.nn.functional.normalize(text, dim=-1).T).argmax(1) == torch.arange(12) % 6
    assert zeroshot.percent(hits) > 60 and len(captions) == 12


def test_a_stopped_run_goes_on(cfg: Config, monkeypatch: pytest.MonkeyPatch):
    whole = locked_clip.train(dataclasses.replace(cfg, epochs=3, out="whole"))
    save, stopped = locked_clip.run.RunFolder.save, dataclasses.replace(cfg, epochs=3, out="stopped", save_every=1)

    def once(self, step, **values):
        save(self, step, **values)
        raise KeyboardInterrupt

    monkeypatch.setattr(locked_clip.run.RunFolder, "save", once)
    with pytest.raises(KeyboardInterrupt):
        locked_clip.train(stopped, range(60))
    monkeypatch.setattr(locked_clip.run.RunFolder, "save", save)
    states = [
        checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"]
        for path in (whole, locked_clip.train(stopped))
    ]
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())


def test_what_cannot_be_trained_or_exported(cfg: Config, tmp_path):
    with pytest.raises(ValueError, match="--total 3"):
        locked_clip.train(dataclasses.replace(cfg, total=3))
    folder = locked_clip.train(dataclasses.replace(cfg, epochs=1))
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    torch.save(state | {"epoch": 0, "data": "other pairs"}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="other data"):
        locked_clip.train(dataclasses.replace(cfg, epochs=1))
    torch.save(state | {"config": {"model": "RN50"}}, folder / "checkpoint.pt")
    with pytest.raises(ValueError, match="run cannot be exported"):
        locked_clip.export_run(folder, tmp_path / "exported")


def test_few_rows_come_more_often(cfg: Config):
    """An epoch has as many steps as with all rows, although six rows do not fill a batch."""
    locked_clip.train(dataclasses.replace(cfg, epochs=1, log_every=1), [3, 4, 5, 6, 7, 8])
    assert len(run.read_metrics(Path("run"))) == 60 // 12


@pytest.mark.usefixtures("lite0")
def test_the_command_of_the_readme_gives_the_numbers_of_the_study(
    corpus: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
):
    """clip-benchmark's retrieval of an exported run, which contains the trunk, and ours from the trunk's features."""
    page = (Path(photos.__file__).parents[2] / "docs/corpora.md").read_text().replace("\\\n", " ")
    words = shlex.split(re.search(r"^ +(clip_benchmark eval .* retrieval_en\.json)$", page, re.M)[1])
    monkeypatch.chdir(corpus)
    monkeypatch.setattr(photos, "SIDE", 64)
    texts = [
        (f"a {WORDS[i % 6]} of {i} kinds .", f"the {WORDS[-i % 6]} again, {i} times") for i in range(20)
    ]  # no ties
    pairs = ({"png": picture(i, i % 6), "txt": "\n".join(both)} for i, both in enumerate(texts))
    layout.write_retrieval(corpus / "retrieval_en", pairs)
    cfg = Config(out="run", data="train", total=60, epochs=2, batch_size=12, warmup=5, device="cpu", precision="fp32")
    exported = locked_clip.export_run(locked_clip.train(cfg), "exported")
    assert max(exported.values()) < 1e-5
    features, captions, _ = photos.test_set("retrieval_en")
    both = locked_clip.encode("run", features, [text for each in captions for text in each])
    ours = zeroshot.retrieval_metrics(*both, zeroshot.owners(captions))

    words[words.index("--dataset_root") + 1] = "{dataset}"
    words[words.index("--num_workers") + 1] = "0"
    monkeypatch.setattr(sys, "argv", words)
    their_cli.main()
    theirs = json.loads(Path("retrieval_en.json").read_text())["metrics"]
    for k in (1, 5, 10):
        assert ours[f"text_to_image_R@{k}"] == pytest.approx(100 * theirs[f"image_retrieval_recall@{k}"], abs=1e-3)
        assert ours[f"image_to_text_R@{k}"] == pytest.approx(100 * theirs[f"text_retrieval_recall@{k}"], abs=1e-3)
    assert ours["text_to_image_R@5"] > 0
