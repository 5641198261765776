"""Drawings with transparency, cached beside the corpus."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scene_corpora import NPM, bank, corpus  # noqa: F401

from studies.corpora import emoji, sprites


def test_sprites_are_kept_and_made_again(corpus: Path, bank: sprites.Sprites, tmp_path: Path, monkeypatch) -> None:
    read = sprites.load_sprites(corpus)
    assert read == bank
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji/manifest.json").write_bytes((corpus / "manifest.json").read_bytes())
    (tmp_path / ".npm").symlink_to(NPM.resolve())
    (tmp_path / "emoji/sprites.npz").write_bytes(b"no file of arrays")
    with pytest.raises(ValueError, match="cannot be read .*: remove it"):
        sprites.load_sprites(tmp_path / "emoji")
    sprites.write_sprites(tmp_path / "emoji/sprites.npz", "other versions", bank)
    few = list(dict.fromkeys(bank.emoji))[:2]
    monkeypatch.setattr(sprites.emoji_sources, "read_emoji", lambda *_: few)
    monkeypatch.setattr(sprites, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    monkeypatch.setattr(emoji, "read_emoji", lambda *_: few)
    made = sprites.load_sprites(tmp_path / "emoji")
    assert set(made.emoji) == set(few)
    wanted = {(one, style): png for one, style, png in zip(*bank, strict=True)}
    assert all(wanted[one, style] == png for one, style, png in zip(*made, strict=True))
