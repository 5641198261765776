"""The lines of docs/export.md that embed a picture and a text, and files in the authors' layouts to run them with."""

import re
import textwrap
from pathlib import Path

import torch
from authors_files import beside_weights
from PIL import Image
from torch import nn

PAGE = Path(__file__).parent.parent / "docs/export.md"


def lines_of(model: str) -> str:
    """The lines that load this file or run."""
    blocks = re.findall(r"^ {4}from PIL import Image\n(?:^ {4}.*\n)+", PAGE.read_text(encoding="utf-8"), re.M)
    (found,) = [textwrap.dedent(block) for block in blocks if f'"{model}"' in block]
    return found


def execute(code: str) -> None:
    """Run the lines beside picture.jpg: image and text are vectors of one length."""
    Image.new("RGB", (60, 40), "red").save("picture.jpg")
    names: dict = {}
    with torch.no_grad():
        exec(code, names)
    image, text = names["image"], names["text"]
    assert image.shape == text.shape == (1, image.shape[1]) and image.isfinite().all() and text.isfinite().all()


def authors_weights(model: nn.Module) -> dict:
    """A file of a trainer with DistributedDataParallel."""
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    return beside_weights(state_dict=weights)
