"""Write shards of a locked tower's features: `python -m studies.harness.features FOLDER... --out DIR [--side 224]`.

Every tar below each FOLDER is copied to DIR/FOLDER's name with EfficientNet-Lite0's features of the uncropped image,
KEY.npy (1280, 1, 1) float32, in the image's place; captions, labels and class names are unchanged. A corpus of features
is trained on like any other, with `--model Lite0-features`, and evaluated on sets of features.
"""

import io
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from shared import cli, layout
from shared.errors import UserError
from shared.tars import IMAGE_EXTENSIONS, Broken, key_of, read_tar, write_tar
from studies.harness.photos import lite0_features_of_files


@dataclass
class Config:
    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of training shards, and evaluation sets."""
    out: Path
    """Folder to write, with a subfolder for each of them."""
    side: int = 128
    """Side of the squares that the network sees, in pixels."""
    strict: bool = True
    """A broken sample is an error."""


def features_file(feature: np.ndarray) -> bytes:
    """Bytes of an .npy file with a feature (1280,) as an image (1280, 1, 1)."""
    file = io.BytesIO()
    np.save(file, feature.reshape(-1, 1, 1))
    return file.getvalue()


def copy_shard(source: Path, target: Path, side: int) -> int:
    """Copy a shard with features in the place of images; returns the number of images."""
    broken: list[Broken] = []
    files = list(read_tar(source, broken))
    if broken:
        raise UserError(f"{source} is damaged ({broken[0].reason}): build it again")
    pictures = [(name, content) for name, content in files if key_of(name)[1] in IMAGE_EXTENSIONS]
    features = lite0_features_of_files([content for _, content in pictures], side).numpy()
    samples: dict[str, dict] = {}
    for name, content in files:
        key, extension = key_of(name)
        if extension not in IMAGE_EXTENSIONS:
            samples.setdefault(key, {"__key__": key})[extension] = content
    for (name, _), feature in zip(pictures, features, strict=True):
        samples.setdefault(key_of(name)[0], {"__key__": key_of(name)[0]})["npy"] = features_file(feature)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_tar(target, list(samples.values()))
    return len(pictures)


def main(cfg: Config) -> None:
    """Write all shards; a complete folder is left as it is."""

    def write(folder: Path) -> dict:
        count = 0
        for source in cfg.folders:
            for path in sorted(source.rglob("*")):
                target = folder / source.name / path.relative_to(source)
                if path.suffix == ".tar":
                    count += copy_shard(path, target, cfg.side)
                elif path.is_file():
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(path, target)
        return {"counts": {"images": count}}

    setting = {"data": "lite0 features", "of": sorted(map(str, cfg.folders)), "side": cfg.side}
    layout.build(cfg.out, setting, write)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config, description=__doc__)))
