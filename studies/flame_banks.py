"""Banks of the study: `python -m studies.flame_banks --bank BANK [--encoder minilm]` writes BANK-centred.

Small language models embed all captions close to one direction. A centred bank holds each facet less its mean over the
bank, normalised again (not in the paper). centres.npy (T + L, D) has these means and then, for k = 1 .. L, that of the
embedding by the first k of the long caption's L facets; studies/flame_measure.py subtracts them from the texts of an
evaluation. With --encoder minilm, BANK itself is written first: captions of the embedded corpus, embedded without
prompts by a small sentence encoder, one facet each.
"""

import dataclasses
import functools
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn

from flame.bank import Bank
from flame.config import EMBED_PRESETS
from flame.embed import embed_bank
from flame.llm import SLOT, Prompt
from shared import checkpoints, cli, pretrained, run
from shared.index import file_fingerprint

MINILM = "minilm"
PLAIN = Prompt(SLOT, ("",), False)  # only the caption


@dataclasses.dataclass
class Config:
    bank: str
    """Bank to centre; the centred one is BANK-centred."""
    data: str = "data/flame/known/train"
    """Shards of the samples of a bank that is made here."""
    encoder: Literal["llm", "minilm"] = "llm"
    """llm: BANK was made by flame.embed. minilm: BANK is made here."""


class SentenceEncoder(nn.Module):
    """A small frozen sentence encoder in the language model's place: the mean of a caption's last hidden states."""

    def __init__(self, encoder: nn.Module, tokenizer: Any, max_caption: int = 256):
        super().__init__()
        self.encoder, self.tokenizer, self.max_caption = encoder.eval().requires_grad_(False), tokenizer, max_caption

    @property
    def dim(self) -> int:
        return self.encoder.config.hidden_size

    @torch.no_grad()
    def forward(self, captions: list[str], prompt: Prompt = PLAIN) -> Tensor:
        """Captions -> (B, 1, D) float32, not normalised; a caption's embedding does not depend on the batch."""
        texts = [prompt.head.replace(SLOT, caption) for caption in captions]
        options = dict(padding=True, truncation=True, max_length=self.max_caption, return_tensors="pt")
        inputs = self.tokenizer(texts, **options).to(self.encoder.device)
        hidden = self.encoder(**inputs).last_hidden_state.float()
        real = inputs["attention_mask"][..., None]
        return ((hidden * real).sum(1) / real.sum(1))[:, None]


@functools.cache
def load_minilm() -> SentenceEncoder:
    import transformers

    folder = pretrained.minilm()
    dtype = run.DTYPES[run.resolve_precision("auto", torch.device("cpu"))]
    encoder = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
    return SentenceEncoder(encoder, transformers.AutoTokenizer.from_pretrained(folder))


def centred_path(bank: str | Path) -> Path:
    return Path(f"{bank}-centred")


def centred(embeddings: Tensor, centre: Tensor) -> Tensor:
    """Unit embeddings (..., D) less their centre (..., D), normalised again."""
    return F.normalize(embeddings - centre, dim=-1)


def centres_of(embeddings: np.ndarray, long: int) -> Tensor:
    """(U, T, D) embeddings -> (T + long, D): the mean of each facet; and for k = 1 .. `long`, that of the normalised
    means of the first k of the last `long` facets. Images with equal captions count once."""
    of_long = embeddings[:, -long:].astype(np.float32).cumsum(1)
    of_long /= np.linalg.norm(of_long, axis=-1, keepdims=True)
    means = np.concatenate([each.mean(0, dtype=np.float64) for each in (embeddings, of_long)])
    return torch.from_numpy(means.astype(np.float32))


def centre(bank: str | Path) -> None:
    """Write the centred bank. Its embeddings are float32, so that it differs from its source by the centres alone."""
    source, out = Bank(bank), centred_path(bank)
    long = len(source.index["prompts"][2][1])
    index = source.index | {"centred": source.facets + long}
    if (out / "index.json").is_file() and checkpoints.read_json(out / "index.json") == index:
        return print(f"{out} holds {len(source.keys):,} samples already; nothing to do")
    centres = centres_of(source.embeddings, long)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in ("keys", "ends", "rows", "done"):
        shutil.copy(source.root / f"{name}.npy", out)
    embeddings = torch.from_numpy(source.embeddings.astype(np.float32))
    checkpoints.save_array(out / "embeddings.npy", centred(embeddings, centres[: source.facets]).numpy())
    checkpoints.save_array(out / "centres.npy", centres.numpy())
    checkpoints.write_json(out / "index.json", index)  # last
    print(f"{out}: {len(source.keys):,} samples")


def main(cfg: Config) -> None:
    if cfg.encoder == MINILM:
        settings = dataclasses.replace(EMBED_PRESETS["emoji"][1], llm=MINILM, data=cfg.data, out=cfg.bank)
        digest = file_fingerprint(pretrained.minilm() / "model.safetensors")
        embed_bank(settings, (PLAIN, PLAIN, PLAIN), digest, load_minilm, run.setup(0, "cpu"))
    centre(cfg.bank)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config, description=__doc__)))
