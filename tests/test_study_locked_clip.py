"""A small CLIP on features of photographs learns, and resumes bit for bit."""

import dataclasses
from pathlib import Path

import pytest
import torch
from test_study_photos import WORDS, corpus  # noqa: F401

from shared import checkpoints, zeroshot
from shared.study import locked_clip, photos


@pytest.fixture
def cfg(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> locked_clip.Config:  # noqa: F811
    def pixels(batches):
        small = [torch.nn.functional.interpolate(batch.float(), (24, 20)).mean(1).flatten(1) for batch in batches]
        return torch.nn.functional.pad(torch.cat(small) / 128 - 1, (0, 800))

    monkeypatch.setattr(photos, "cached_lite0_features", pixels)
    monkeypatch.chdir(corpus)
    return locked_clip.Config(
        out="run", data="train", total=60, epochs=20, batch_size=12, lr=3e-3, warmup=5, device="cpu", precision="fp32"
    )


def test_it_learns_what_captions_say(cfg: locked_clip.Config):
    features, captions, _ = photos.test_set("retrieval")
    image, text = locked_clip.encode(locked_clip.train(cfg), features, [f"a {word} ." for word in WORDS])
    hits = (image @ torch.nn.functional.normalize(text, dim=-1).T).argmax(1) == torch.arange(12) % 6
    assert zeroshot.percent(hits) > 60 and len(captions) == 12


def test_a_stopped_run_goes_on(cfg: locked_clip.Config, monkeypatch: pytest.MonkeyPatch):
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


def test_few_rows_come_more_often(cfg: locked_clip.Config, monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        locked_clip.np, "resize", lambda rows, total: seen.append(sorted(rows)) or locked_clip.np.tile(rows, 10)[:total]
    )
    locked_clip.train(dataclasses.replace(cfg, epochs=1), [3, 4, 5, 6, 7, 8])
    assert seen == [[3, 4, 5, 6, 7, 8]]
