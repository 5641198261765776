"""The language model reads the study's captions once, on all cores: `python -m studies.lexvla_states`. Training and
evaluation would do the same, one run at a time."""

import dataclasses
from pathlib import Path

import torch
import tyro

from lexvla.config import EMOJI
from lexvla.patchdis import classnames
from lexvla.text import Prompts, States, load_lm
from shared import cli, data
from shared.evalsets import EvalSet


@dataclasses.dataclass
class Config:
    """Add the captions of pairs and evaluation sets to a file of --states."""

    data: str
    """Shards."""
    sets: tuple[str, ...]
    """Retrieval sets and PatchDis folders."""
    states: str = EMOJI.states
    """The file."""


def texts_of(cfg: Config) -> list[str]:
    """The distinct captions and class names."""
    pairs = data.open_pairs(cfg.data)
    texts = [pairs.caption(row) for row in range(len(pairs))]
    for folder in cfg.sets:
        if (Path(folder) / "masks").is_dir():
            texts += classnames(folder)
        else:
            texts += [text for _, _, captions in EvalSet(folder, lambda image: torch.zeros(1)) for text in captions]
    return list(dict.fromkeys(filter(None, texts)))


def main(cfg: Config) -> None:
    lm, tokenizer = load_lm(EMOJI.lm)
    States(cfg.states, EMOJI.lm, lm.eval(), Prompts(tokenizer, EMOJI.max_length)).add(texts_of(cfg))


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
