"""Winoground and SugarCrepe: match images to captions that differ in one word or in word order.

FLAME evaluates both with the long prompt (Evaluation.md of MIV-XJTU/FLAME@4d2b9a9), through
LAION-AI/CLIP_benchmark@48de38c, cited as `B:` with paths under clip_benchmark/. An instance has I images and C
captions; caption i belongs to image i, and further captions are wrong.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from shared.errors import UserError
from shared.zeroshot import percent

SUGAR_CREPE = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")


class Instance(NamedTuple):
    """Images and captions to be matched."""

    images: tuple[Path, ...]
    captions: tuple[str, ...]


def winoground(root: Path) -> dict[str, list[Instance]]:
    """Read the hub's folder facebook/winoground with data/images.zip unpacked in place: two images, two captions per
    instance.

    B:datasets/winoground.py.
    """
    found = []
    for line in (root / "data/examples.jsonl").read_text(encoding="utf-8").splitlines():
        about = json.loads(line)
        images = tuple(root / "data/images" / f"{about[f'image_{i}']}.png" for i in range(2))
        found.append(Instance(images, (about["caption_0"], about["caption_1"])))
    return {"winoground": found}


def sugar_crepe(root: Path) -> dict[str, list[Instance]]:
    """Read COCO's val2017/ and SugarCrepe's seven files beside it: an image, its caption and a wrong one per instance.

    B:datasets/sugar_crepe.py, B:datasets/builder.py:228-244.
    """
    found = {}
    for kind in SUGAR_CREPE:
        entries = json.loads((root / f"{kind}.json").read_text(encoding="utf-8")).values()
        found[f"sugar_crepe_{kind}"] = [
            Instance((root / "val2017" / one["filename"],), (one["caption"], one["negative_caption"]))
            for one in entries
        ]
    return found


READERS: dict[str, Callable[[Path], dict[str, list[Instance]]]] = {"winoground": winoground, "sugar_crepe": sugar_crepe}


def read_instances(name: str, root: str | Path) -> dict[str, list[Instance]]:
    """Read the instances of `name`, a key of READERS, in the folder `root` -> {set: instances}.

    UserError if the files have another format.
    """
    try:
        found = READERS[name](Path(root))
    except OSError as error:
        raise UserError(f"{error.filename} is missing") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{root} is not {name} in its authors' format ({error!r})") from error
    if empty := [kind for kind, instances in found.items() if not instances]:
        raise UserError(f"{root} holds no instance of {empty[0]}")
    return found


def caption_selection(images: Tensor, captions: Tensor) -> dict[str, float]:
    """Percent of instances whose captions and images are matched correctly, by cosine.

    images (N, I, D), captions (N, C, D), of unit length. text_acc: each of the first min(I, C) images is nearest to its
    own caption; image_acc: each of these captions is nearest to its own image; acc: both.
    B:metrics/image_caption_selection.py. Ties count as wrong.
    """
    scores = images @ captions.transpose(1, 2)  # (N, I, C)
    own = scores.diagonal(dim1=1, dim2=2)  # (N, min(I, C))
    k = own.shape[1]
    others = scores.clone()
    others.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
    text = (others[:, :k].amax(dim=2) < own).all(dim=1)
    image = (others[:, :, :k].amax(dim=1) < own).all(dim=1)
    return {"text_acc": percent(text), "image_acc": percent(image), "acc": percent(text & image)}
