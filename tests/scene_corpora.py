"""Small corpora of scenes, for the tests of scenes and of what reads them."""

import dataclasses
import json
from pathlib import Path

import pytest

from studies import lexvla_scenes
from studies.corpora import emoji, emoji_sources, scenes, sprites

NPM = Path(__file__).parent.parent / "data/.npm"
SETTING = scenes.Setting(captioned=(2, 3), captioned_size=(0.3, 0.5), clutter=(1, 3), concepts=10)


@pytest.fixture(scope="module")
def bank() -> sprites.Sprites:
    """Drawings of a few emoji, a third of them symbols."""
    modules = emoji_sources.install(NPM)
    known = emoji_sources.read_emoji(modules, None)
    chosen = [one for one in known if one.group == "animals-nature"][::8] + [
        one for one in known if one.group == "symbols"
    ][::24]
    drawings, _ = emoji.collect(modules, chosen)
    pngs = [sprites.render(drawing.svg) for drawing in drawings]
    return sprites.Sprites([drawing.emoji for drawing in drawings], [drawing.style for drawing in drawings], pngs)


@pytest.fixture(scope="module")
def corpus(bank: sprites.Sprites, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of an emoji corpus that scenes need."""
    folder = tmp_path_factory.mktemp("corpus") / "emoji"
    folder.mkdir()
    packages = emoji_sources.packages(emoji_sources.install(NPM))
    (folder / "manifest.json").write_text(json.dumps({"packages": packages}))
    versions = json.dumps([sprites.SPRITE, packages], sort_keys=True)
    sprites.write_sprites(folder / "sprites.npz", versions, bank)
    return folder


@pytest.fixture(scope="module")
def config(corpus: Path) -> scenes.Config:
    setting = {field.name: getattr(SETTING, field.name) for field in dataclasses.fields(SETTING)}
    return scenes.Config(**setting, out=corpus.parent / "scenes", corpus=corpus, samples=12, eval_samples=11)


@pytest.fixture(scope="module")
def built(config: scenes.Config) -> Path:
    scenes.main(config)
    return config.out


SIZES = dict(image_size=64, concepts=6, samples=30, eval_samples=16)


# ----------------------------------------------------------------------------------------- the corpus of LexVLA's study


@pytest.fixture(scope="module")
def small_corpus(corpus: Path, folder: Path) -> Path:
    lexvla_scenes.main(lexvla_scenes.Config(folder / "small-scenes", corpus, **SIZES))
    return folder / "small-scenes"


@pytest.fixture(scope="module")
def small_scenes(small_corpus: Path) -> Path:
    return small_corpus / "eval/patchdis"
