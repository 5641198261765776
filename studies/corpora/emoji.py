"""Builds the embedded corpus: every emoji, drawn in several art styles, with words in many languages.

    python -m studies.corpora.emoji --out data/emoji

One concept (an emoji) has up to eight drawings, so the corpus has style shift, redundancy, a class hierarchy and a long
tail of words, like web image-text pairs, at a size that trains on a laptop. It stands in for CC3M / YFCC15M.

    train/{00000..}.tar    img2dataset layout: .png (64x64 on white), .txt (caption), .json
    train_names/           the same pictures; every caption is the name alone
    eval/<set>/            CLIP-benchmark webdataset layout, read unchanged by its `wds` loader
    unmatched.json         icons without an emoji and emoji without an icon, per style
    manifest.json          counts, licences, package versions, sha256 of every shard

Held out: 10 % of the (emoji, style) pairs of the training styles (`id`; each such emoji is seen in training in another
style), and the whole style fluent-emoji-flat (`ood`).

Drawings and words come from npm packages that package-lock.json pins by hash; `npm ci` puts them into `.npm` next to
the corpus, once. The same packages give the same bytes on every run. What is read of them is in emoji_sources.py.
"""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import tyro
from tqdm import tqdm

from shared import cli
from shared.errors import UserError
from shared.layout import link, one_process, sha256
from shared.tars import write_split, write_tar
from studies.corpora.emoji_sources import (
    OOD_STYLE,
    SIZE,
    STYLES,
    Emoji,
    Match,
    bare,
    cldr_names,
    icon_svg,
    install,
    match_icons,
    packages,
    read,
    read_emoji,
    read_icons,
    read_names,
    render,
)

SEED = 0
SHARD = 1000  # samples of a training shard
TEMPLATES = ("{c}", "a drawing of {c}", "an emoji of {c}", "{c} emoji", "{c} icon")
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
# Crossmodal-3600's languages
LANGUAGES = (
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
).split()

PHRASES = (
    "a drawing of {name}",
    "an emoji of {name}",
    "{name} emoji",
    "{name} icon",
    "picture of {name}, {subgroup}",
    "{name}, {subgroup} emoji",
    "{subgroup}: {name}",
    "{name} from {group}",
    "{group} icon, {name}",
)
OPENINGS = (
    "This small picture is a drawing of {name}, one of the emoji for {group}.",
    "The picture shows {name}, an emoji that belongs to {group}.",
    "Here we see an emoji of {name}, drawn for the set named {group}.",
)
PLACES = (
    "In the keyboard it stands under {subgroup}, close to {near}.",
    "It is part of the row {subgroup}, where its neighbours are {near}.",
    "Look for it among {subgroup}, not far from {near}.",
)
CLOSINGS = (
    "The drawing is flat and simple, with clear shapes and few colours on a plain white background.",
    "It is small enough to sit inside a line of text, and people send it in messages instead of the word itself.",
    "Nothing else is in the picture: one symbol in the middle, seen from the usual side, without any frame or text.",
    "Other artists have drawn the same thing with other lines and colours, but the meaning stays the same.",
)


@dataclass
class Drawing:
    """One emoji in one style; `split` is train, id or ood."""

    emoji: Emoji
    style: str
    svg: str
    split: str = "train"
    png: bytes = b""


# ---------------------------------------------------------------------------------------------------------- captions


def caption(emoji: Emoji, style: str) -> str:
    """A caption like a web alt text, drawn per (emoji, style): name, name and tags, phrase, or (1 in 6) tags alone."""
    rng = random.Random(f"caption {SEED} {emoji.hexcode} {style}")
    tags = rng.sample(emoji.tags, min(len(emoji.tags), rng.randint(2, 4)))
    form = rng.choices(("name", "name, tags", "tag name tag", "phrase", "tags"), (4, 6, 4, 6, 4))[0]
    if form == "name, tags" and tags:
        return ", ".join([emoji.name, *tags])
    if form == "tag name tag" and tags:
        return " ".join([tags[0], emoji.name, *tags[1:]])
    if form == "tags" and len(tags) >= 2:
        return rng.choice((" ", ", ")).join(tags)
    return emoji.name if form == "name" else rng.choice(PHRASES).format(**emoji.words)


def several_captions(emoji: Emoji) -> str:
    """The captions of a retrieval image, one a line: name, phrases, and tags where there are any."""
    rng = random.Random(f"retrieval {SEED} {emoji.hexcode}")
    tags = rng.sample(emoji.tags, min(len(emoji.tags), 4))
    lines = [emoji.name, f"a drawing of {emoji.name}", rng.choice(PHRASES[1:]).format(**emoji.words)]
    if tags:
        lines.append(", ".join([emoji.name, *tags[:3]]))
    if len(tags) >= 2:
        lines.append(" ".join(tags))
    return "\n".join(dict.fromkeys(lines))


def long_caption(emoji: Emoji, neighbours: list[Emoji]) -> str:
    """Four to seven sentences, 60 to 150 words, from name, tags and place in the hierarchy."""
    rng = random.Random(f"long {SEED} {emoji.hexcode}")
    near = [other.name for other in rng.sample(neighbours, min(3, len(neighbours)))] or ["the rest of its group"]
    sentences = [
        rng.choice(OPENINGS).format(**emoji.words),
        rng.choice(PLACES).format(near=", ".join(near), **emoji.words),
    ]
    if emoji.tags:
        tags = rng.sample(emoji.tags, min(len(emoji.tags), 8))
        sentences.append(f"People who write {', '.join(tags)} often pick it.")
    for closing in rng.sample(CLOSINGS, len(CLOSINGS)):
        if len(" ".join(sentences).split()) < 75:
            sentences.append(closing)
    return " ".join(sentences)


# ------------------------------------------------------------------------------------------------------------ writing


def write_train(folder: Path, drawings: list[Drawing], caption_of: Callable[[Emoji, str], str] = caption) -> None:
    """Training shards in img2dataset layout; the order of `drawings` is the order of the samples.

    caption_of: emoji and style -> caption.
    """
    for shard in range(0, len(drawings), SHARD):
        samples = []
        for index, drawing in enumerate(drawings[shard : shard + SHARD]):
            emoji, key = drawing.emoji, f"{shard // SHARD:05d}{index:04d}"
            text = caption_of(emoji, drawing.style)
            about = {
                "key": key, "caption": text, "name": emoji.name, "tags": emoji.tags, "group": emoji.group,
                "subgroup": emoji.subgroup, "hexcode": emoji.hexcode, "style": drawing.style, "split": drawing.split,
                "width": SIZE, "height": SIZE,
            }  # fmt: skip
            samples.append({"__key__": key, "png": drawing.png, "txt": text, "json": json.dumps(about, sort_keys=True)})
        write_tar(folder / f"{shard // SHARD:05d}.tar", samples)


def write_retrieval(folder: Path, drawings: list[Drawing], captions: list[str]) -> None:
    """A retrieval set: `captions[i]` holds the captions of `drawings[i]`, one a line."""
    samples = zip(drawings, captions, strict=True)
    write_split(folder / "test", ({"png": drawing.png, "txt": text} for drawing, text in samples))
    (folder / "dataset_type.txt").write_text("retrieval\n")


def write_classification(folder: Path, drawings: list[Drawing], attribute: str, classes: list[str]) -> None:
    """Sets `<attribute>s_id` and `_ood`: test images of both splits, training images as `train/` for probes."""
    index = {name: i for i, name in enumerate(classes)}
    first_train = folder / f"{attribute}s_id/train"
    for split in ("id", "ood", "train"):
        chosen = [d for d in drawings if d.split == split and d.emoji.words[attribute] in index]
        target = first_train if split == "train" else folder / f"{attribute}s_{split}/test"
        write_split(target, ({"png": d.png, "cls": str(index[d.emoji.words[attribute]])} for d in chosen))
    shutil.copytree(first_train, folder / f"{attribute}s_ood/train", copy_function=link)
    for split in ("id", "ood"):
        home = folder / f"{attribute}s_{split}"
        (home / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        (home / TEMPLATES_FILE).write_text("".join(f"{line}\n" for line in TEMPLATES))


def write_eval(folder: Path, modules: Path, emoji: list[Emoji], drawings: list[Drawing]) -> dict[str, int]:
    """All evaluation sets; returns the number of classes of each classification task."""
    in_train = {d.emoji for d in drawings if d.split == "train"}
    ood = [d for d in drawings if d.split == "ood"]
    names = [d.emoji.name for d in ood if d.emoji in in_train]
    classes = {
        "name": names,
        "subgroup": list(dict.fromkeys(e.words["subgroup"] for e in emoji if e in in_train)),
        "group": list(dict.fromkeys(e.words["group"] for e in emoji if e in in_train)),
    }
    for attribute, values in classes.items():
        write_classification(folder, drawings, attribute, values)
    for split in ("id", "ood"):  # for models that have read `train_names`
        home = folder / f"bare_names_{split}"
        ignore = shutil.ignore_patterns(TEMPLATES_FILE)
        shutil.copytree(folder / f"names_{split}", home, ignore=ignore, copy_function=link)
        (home / TEMPLATES_FILE).write_text("{c}\n")

    siblings = defaultdict(list)
    for one in emoji:
        siblings[one.subgroup].append(one)
    one_each = list({d.emoji: d for d in drawings if d.split == "id"}.values())  # so that a caption has one image
    for split, images in (("id", one_each), ("ood", ood)):
        write_retrieval(folder / f"retrieval_{split}", images, [several_captions(d.emoji) for d in images])
        texts = [long_caption(d.emoji, [one for one in siblings[d.emoji.subgroup] if one != d.emoji]) for d in images]
        write_retrieval(folder / f"retrieval_long_{split}", images, texts)

    names_in = {language: cldr_names(modules, language) for language in LANGUAGES}
    everywhere = [d for d in ood if all(d.emoji.hexcode in name_of for name_of in names_in.values())]
    for language, name_of in names_in.items():
        write_retrieval(folder / f"retrieval_xm_{language}", everywhere, [name_of[d.emoji.hexcode] for d in everywhere])
    return {attribute: len(values) for attribute, values in classes.items()}


# ----------------------------------------------------------------------------------------------------------- the build


def recipe(limit: int | None) -> str:
    """A hash of all that decides the corpus: its two files, the pinned packages, the renderer and `limit`."""
    files = ("emoji.py", "emoji_sources.py", "package-lock.json")
    parts = [Path(__file__).with_name(name).read_bytes() for name in files]
    parts += [version("resvg_py").encode(), str(limit).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def split_drawings(drawings: list[Drawing]) -> None:
    """Marks all of the OOD style `ood`, and 10 % of the other pairs `id`, leaving each emoji a drawing to train on."""
    for drawing in drawings:
        drawing.split = "ood" if drawing.style == OOD_STYLE else "train"
    pairs = [drawing for drawing in drawings if drawing.split == "train"]
    left, wanted = Counter(drawing.emoji.hexcode for drawing in pairs), round(len(pairs) / 10)
    for drawing in random.Random(SEED).sample(pairs, len(pairs)):
        if wanted and left[drawing.emoji.hexcode] > 1:
            drawing.split = "id"
            left[drawing.emoji.hexcode] -= 1
            wanted -= 1


def collect(modules: Path, emoji: list[Emoji]) -> tuple[list[Drawing], dict[str, Match]]:
    """All drawings of `emoji`, split but not rendered, and how each style's icons were matched."""
    icon_sets = {style: read_icons(modules, style) for style in STYLES}
    names, by_hexcode = read_names(modules, icon_sets), {one.hexcode: one for one in read_emoji(modules, None)}
    data = read(modules, "emojibase-data/en/data.json")
    tones = {bare(skin["hexcode"]) for entry in data for skin in entry.get("skins", [])}
    matches = {style: match_icons(*icon_sets[style], names, set(by_hexcode), tones) for style in STYLES}
    drawings = [
        Drawing(one, style, icon_svg(icon_sets[style][0], matches[style].icon_of[one.hexcode]))
        for one in emoji
        for style in STYLES
        if one.hexcode in matches[style].icon_of
    ]
    split_drawings(drawings)
    return drawings, matches


def build(folder: Path, modules: Path, limit: int | None) -> dict:
    """Writes the whole corpus into the empty `folder` and returns its manifest."""
    emoji = read_emoji(modules, limit)
    drawings, matches = collect(modules, emoji)
    workers = min(os.cpu_count() or 1, 8)
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        pngs = pool.map(render, [drawing.svg for drawing in drawings], chunksize=16)
        for drawing, png in zip(
            drawings, tqdm(pngs, "drawing", len(drawings), unit="image", disable=None), strict=True
        ):
            drawing.png = png

    random.Random(SEED).shuffle(drawings)
    train = [drawing for drawing in drawings if drawing.split == "train"]
    write_train(folder / "train", train)
    write_train(folder / "train_names", train, lambda emoji, style: emoji.name)
    order = {one: i for i, one in enumerate(emoji)}
    tests = sorted((d for d in drawings if d.split != "train"), key=lambda d: order[d.emoji])
    classes = write_eval(folder / "eval", modules, emoji, tests + [d for d in drawings if d.split == "train"])

    all_emoji, report, styles = read_emoji(modules, None), {}, {}
    for style, match in matches.items():
        missing = [f"{one.hexcode} {one.name}" for one in all_emoji if one.hexcode not in match.icon_of]
        report[style] = {"icons_without_emoji": match.unmatched, "emoji_without_icon": missing}
        splits = Counter(drawing.split for drawing in drawings if drawing.style == style)
        styles[style] = {split: splits[split] for split in ("train", "id", "ood")} | {
            "skin_tone_icons": len(match.skin_tones),
            "other_drawings": len(match.other_drawings),
            "icons_without_emoji": len(match.unmatched),
            "emoji_without_icon": len(missing),
        }
    (folder / "unmatched.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

    shards = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*.tar"))}
    manifest = {
        "version": hashlib.sha256("".join(shards.values()).encode()).hexdigest()[:12],  # same version, same bytes
        "recipe": recipe(limit),
        "emoji": len(emoji),
        "samples": {split: sum(counts[split] for counts in styles.values()) for split in ("train", "id", "ood")},
        "classes": classes,
        "languages": LANGUAGES,
        "styles": styles,
        "packages": packages(modules) | {"resvg_py": {"version": version("resvg_py")}},
        "sha256": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return manifest


def summary(manifest: dict) -> Iterator[str]:
    """The lines that the command prints about a corpus."""
    columns = ("train", "id", "ood", "skin_tone_icons", "other_drawings", "icons_without_emoji", "emoji_without_icon")
    heads = ("train", "id test", "ood test", "skin tones", "duplicates", "unmatched", "not drawn")
    yield "style".ljust(18) + "".join(head.rjust(11) for head in heads) + "  licence"
    for style, counts in manifest["styles"].items():
        licence = manifest["packages"][f"@iconify-json/{style}"]["licence"]
        yield style.ljust(18) + "".join(str(counts[column]).rjust(11) for column in columns) + f"  {licence}"
    totals = (sum(counts[column] for counts in manifest["styles"].values()) for column in columns)
    yield "all".ljust(18) + "".join(str(total).rjust(11) for total in totals)
    words = (f"{name} {manifest['packages'][name]['licence']}" for name in ("emojibase-data", "cldr-annotations-full"))
    yield f"words: {', '.join(words)}"
    yield f"{manifest['emoji']} emoji; classes: " + ", ".join(f"{n} {name}s" for name, n in manifest["classes"].items())
    yield f"{len(manifest['languages'])} languages; unmatched icons and emoji are listed in unmatched.json"


def is_complete(out: Path, limit: int | None) -> bool:
    """Whether `out` holds the corpus; prints its version. UserError if it holds something else than an emoji corpus."""
    try:
        built = json.loads((out / "manifest.json").read_text(encoding="utf-8"))
        if done := built["recipe"] == recipe(limit):
            print(f"{out} is complete (version {built['version']})")
        return done
    except (OSError, ValueError, KeyError, TypeError) as error:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            other = f"{out} exists and is not an emoji corpus; move it away or choose another --out."
            raise UserError(other) from error
        return False


def main(out: Path = Path("data/emoji"), limit: int | None = None, npm: Path | None = None) -> None:
    """Builds the embedded emoji corpus; a finished corpus is left as it is.

    Args:
        out: Where the corpus goes. It appears there only when it is complete. If another process is building it, this
            one waits.
        limit: Only this many emoji, spread evenly over all groups, for a quick look.
        npm: Where the npm packages are or will be installed; default: .npm next to the corpus.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}.")
    if is_complete(out, limit):
        return
    with one_process(out):
        if is_complete(out, limit):  # another process has built it in the meantime
            return
        modules = install(npm or out.parent / ".npm")
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            folder = Path(scratch) / "corpus"
            folder.mkdir()
            manifest = build(folder, modules, limit)
            if out.exists():
                out.rename(Path(scratch) / "old")
            folder.rename(out)
    print("\n".join([f"{out} built (version {manifest['version']})", *summary(manifest)]))


if __name__ == "__main__":
    cli.command_line(lambda: tyro.cli(main, description=main.__doc__.splitlines()[0]))
