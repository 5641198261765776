"""The learner of TL;DR's study of scenes: a CLIP whose image tower is a locked EfficientNet-Lite0 with an MLP, and
whose text tower is a bag of words. It is trained by tldr_reduction.train, on features that are computed once.

    python -m studies.tldr_reduction_learner train --data POOL --out RUN
    python -m studies.tldr_reduction_learner reduce POOL --scorer RUN --out DIR      # tldr_reduction.reduce
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import tyro
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

from shared import checkpoints, cli, data, run
from shared.pretrained import efficientnet_lite0
from studies.harness.lite0 import cached_lite0_features
from tldr_reduction import reduce, train
from tldr_reduction.config import Config, ReduceConfig
from tldr_reduction.datasets import eval_transform, of_lite0, open_pairs
from tldr_reduction.encoders import Scorer, cosines
from tldr_reduction.tokenizer import eval_tokenizer, tokenizer_of

SETTINGS = Config(
    stage="clip", clip_model="Lite0-emoji", data="data/tldr/noise-30", epochs=7, batch_size=256, lr=4e-3, min_lr=1e-5,
    weight_decay=3.0, warmup=31, lr_decay_rate=0.65, workers=0, save_every=500, log_every=20,
)  # fmt: skip
VIEW = eval_transform(128, of_lite0)  # one object, since `floors.read` caches by it

# -------------------------------------------------------------------------------------------------------------- model


class LockedTower(TimmModel):
    """open_clip's tower of a timm network, with a frozen trunk. Input: images, or the trunk's features (B, C)."""

    def lock_trunk(self) -> None:
        self.trunk.requires_grad_(False).to(memory_format=torch.channels_last)
        self.train(self.training)

    def train(self, mode: bool = True) -> "LockedTower":
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if x.ndim == 2 else self.trunk(x.contiguous(memory_format=torch.channels_last)))


class BagOfWords(nn.Module):
    """A text tower without word order: token ids (B, T) of open_clip's tokenizer -> features (B, E).

    Averages the tokens' embeddings, without start, end and padding, and adds the outputs of a linear layer and of an
    MLP on this mean. In training, each token is left out with probability `drop`.
    """

    def __init__(self, vocab_size: int, context_length: int, width: int, embed_dim: int, drop: float = 0.3):
        super().__init__()
        self.vocab_size, self.context_length, self.drop = vocab_size, context_length, drop
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.3)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, embed_dim)
        )

    def forward(self, ids: Tensor) -> Tensor:
        words = (ids > 0) & (ids < self.vocab_size - 2)  # the last two ids are start and end
        if self.training:
            words &= torch.rand(ids.shape, device=ids.device) >= self.drop
        words = words[..., None].float()
        mean = (self.token_embedding(ids) * words).sum(1) / words.sum(1).clamp(min=1)
        return self.projection(mean) + self.mlp(mean)


def create_model(cfg: Config) -> nn.Module:
    """The two towers, the trunk with ImageNet's weights."""
    settings = open_clip.get_model_config(cfg.clip_model)
    model = open_clip.CustomTextCLIP(settings["embed_dim"], settings["vision_cfg"], settings["text_cfg"])
    sizes = model.vocab_size, model.context_length, settings["text_cfg"]["width"], settings["embed_dim"]
    model.text = BagOfWords(*sizes)
    model.visual.__class__ = LockedTower
    model.visual.lock_trunk()
    model.visual.trunk.load_state_dict(efficientnet_lite0().state_dict())
    return model


def load_run(path: str | Path) -> tuple[nn.Module, Config, Any]:
    """Model in eval mode, settings and tokenizer of a run folder."""
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    cfg = checkpoints.config_in(state, Config, path)
    model = create_model(cfg)
    model.load_state_dict(state["state_dict"])
    return model.eval(), cfg, tokenizer_of(cfg)


def load_scorer(path: str, device: torch.device) -> Scorer:
    """A run as a scorer of image-text matching."""
    model, cfg, tokenizer = load_run(path)
    return cosines(model, VIEW, eval_tokenizer(tokenizer, cfg), device)


# --------------------------------------------------------------------------------------------------------------- data


class Features:
    """Pairs with features (C,) of the locked trunk in place of images, computed once on whole images.

    A broken sample is replaced by the next one. Features are kept in `cache` for other runs.
    """

    def __init__(self, pairs, cache: str | Path = "data/cache"):
        self.keys, self.strict, self.fingerprint = pairs.keys, pairs.strict, pairs.fingerprint
        self.broken, self.captions = list(pairs.broken), []
        self.features = cached_lite0_features(self.views(pairs), cache)

    def views(self, pairs, size: int = 256) -> Iterator[Tensor]:
        """Yield uint8 batches (B, 3, S, S) of all images, and collect their captions in `captions`."""
        pixels, _ = data.split_normalisation(VIEW)
        for first in range(0, len(pairs), size):
            rows = range(first, min(first + size, len(pairs)))
            found = [data.read_or_next(pairs, row, self.broken) for row in rows]
            self.captions += [pair.caption for pair in found]
            yield torch.stack([pixels(pair.image) for pair in found])

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, row: int) -> data.Pair:
        return data.Pair(self.keys[row], self.features[row], self.captions[row])


def learner_of(cfg: Config, process: run.Process) -> train.Learner:
    model = create_model(cfg)
    pairs = Features(open_pairs(cfg.data, None, cfg.dataset_size, cfg.strict, cfg.cache), cfg.cache)
    return train.Learner(model, tokenizer_of(cfg), pairs, data.identity, VIEW)


def main(cfg: Config) -> Path | None:
    return train.main(cfg, learner_of)


COMMANDS = (
    Annotated[Config, tyro.conf.subcommand("train", default=SETTINGS)]
    | Annotated[ReduceConfig, tyro.conf.subcommand("reduce")]
)


def command() -> None:
    cfg = tyro.cli(COMMANDS)
    if isinstance(cfg, ReduceConfig):
        reduce.main(cfg, load_scorer)
    else:
        main(cfg)


if __name__ == "__main__":
    cli.command_line(command)
