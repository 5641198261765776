"""The learner of TL;DR's study of scenes: a CLIP whose image tower is a locked EfficientNet-Lite0 with a linear layer
on its whitened features, and whose text tower is a bag of words. It is trained by tldr_reduction.train, on features of
random views that are computed once.

    python -m studies.tldr_reduction_learner features POOL                           # of all pictures, into data/cache
    python -m studies.tldr_reduction_learner train --data POOL --out RUN
    python -m studies.tldr_reduction_learner reduce POOL --scorer RUN --out DIR      # tldr_reduction.reduce
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import tyro
from open_clip.timm_model import TimmModel
from torch import Tensor, nn
from torchvision.transforms import v2

from shared import checkpoints, cli, data, run
from shared.pretrained import efficientnet_lite0
from studies.harness.lite0 import in_order, keep_features, known_features, lite0_features
from tldr_reduction import reduce, train
from tldr_reduction.config import Config, ReduceConfig
from tldr_reduction.datasets import eval_transform, of_lite0, open_pairs
from tldr_reduction.encoders import Scorer, cosines
from tldr_reduction.tokenizer import eval_tokenizer, tokenizer_of

SETTINGS = Config(
    stage="clip", clip_model="Lite0-emoji", data="data/tldr/noise-30", epochs=7, batch_size=128, lr=2e-3, min_lr=1e-5,
    weight_decay=1.0, warmup=40, lr_decay_rate=0.65, workers=0, save_every=500, log_every=20,
)  # fmt: skip
VIEW = eval_transform(128, of_lite0)  # one object, since `floors.read` caches by it
VIEWS = 3  # random views of a picture, beside the whole one
AUGMENT = v2.Compose([
    v2.RandomResizedCrop(128, scale=(0.5, 1.0), ratio=(0.8, 1.25)), v2.RandomHorizontalFlip(),
    v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2),
])  # fmt: skip
AXES, RIDGE, NOISE = 256, 0.1, 0.3  # of `Whitened`
EMBED_DIM = 128
SCALE = 3.0  # the fixed factor of cosines in the loss: a larger one learns the wrong captions, too

# -------------------------------------------------------------------------------------------------------------- model


class Whitened(nn.Module):
    """Features (B, C) -> their projections (B, AXES) on the first principal axes, each divided by its standard
    deviation; in training with noise. RIDGE times the mean variance is added to each variance."""

    def __init__(self, channels: int, noise: float = NOISE):
        super().__init__()
        self.noise = noise
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("axes", torch.zeros(channels, AXES))

    def fit(self, features: Tensor) -> None:
        """Measure mean and axes of features (N, C)."""
        self.mean.copy_(features.mean(0))
        centred = features - self.mean
        covariance = centred.T @ centred / len(features)
        variances, axes = torch.linalg.eigh(covariance.double())  # ascending
        ridge = RIDGE * covariance.diagonal().mean()
        self.axes.copy_((axes * (variances + ridge).rsqrt()).flip(1)[:, :AXES])

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            x = (x.float() - self.mean) @ self.axes
        return x + self.noise * torch.randn_like(x) if self.training else x


class LockedTower(TimmModel):
    """open_clip's tower of a timm network with a frozen trunk, whose head is linear in whitened features.

    Input: images (B, 3, S, S), the trunk's features (B, C), or those of several views (B, V, C), of which training
    draws one.
    """

    def lock_trunk(self, embed_dim: int) -> None:
        self.trunk.requires_grad_(False).to(memory_format=torch.channels_last)
        self.head = nn.Sequential(Whitened(self.trunk.num_features), nn.Linear(AXES, embed_dim))
        nn.init.normal_(self.head[1].weight, std=1e-3)  # so that axes without a signal have nearly no weight
        nn.init.zeros_(self.head[1].bias)
        self.train(self.training)

    def train(self, mode: bool = True) -> "LockedTower":
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3:
            views = torch.randint(x.shape[1], (len(x),), device=x.device) if self.training else 0
            x = x[torch.arange(len(x), device=x.device), views]
        return self.head(x if x.ndim == 2 else self.trunk(x.contiguous(memory_format=torch.channels_last)))


class BagOfWords(nn.Module):
    """A text tower without word order: token ids (B, T) of open_clip's tokenizer -> features (B, E).

    The mean of the tokens' embeddings, without start, end and padding. In training, each token is left out with
    probability `drop`.
    """

    def __init__(self, vocab_size: int, context_length: int, embed_dim: int, drop: float = 0.4):
        super().__init__()
        self.vocab_size, self.context_length, self.drop = vocab_size, context_length, drop
        self.token_embedding = nn.Embedding(vocab_size, embed_dim)
        nn.init.normal_(self.token_embedding.weight, std=0.03)

    def forward(self, ids: Tensor) -> Tensor:
        words = (ids > 0) & (ids < self.vocab_size - 2)  # the last two ids are start and end
        if self.training:
            words &= torch.rand(ids.shape, device=ids.device) >= self.drop
        words = words[..., None].float()
        return (self.token_embedding(ids) * words).sum(1) / words.sum(1).clamp(min=1)


def create_model(cfg: Config) -> nn.Module:
    """The two towers, the trunk with ImageNet's weights."""
    settings = open_clip.get_model_config(cfg.clip_model)
    model = open_clip.CustomTextCLIP(EMBED_DIM, settings["vision_cfg"], settings["text_cfg"])
    model.text = BagOfWords(model.vocab_size, model.context_length, EMBED_DIM)
    model.visual.__class__ = LockedTower
    model.visual.lock_trunk(EMBED_DIM)
    model.visual.trunk.load_state_dict(efficientnet_lite0().state_dict())
    model.logit_scale.requires_grad_(False).fill_(math.log(SCALE))
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


def cached_views(batches: Iterable[Tensor], cache: str | Path) -> Tensor:
    """Features (N, 1 + VIEWS, C), float16, of pictures and of random views of them, which their pixels determine.

    batches: uint8 pixels (B, 3, S, S). Stored in `cache` by a hash of the pixels, as `cached_lite0_features` does.
    """
    precision = run.resolve_precision("auto", torch.device("cpu"))
    store, order, fresh = Path(cache) / f"lite0-views-{precision}.npz", [], []
    known = known_features(store)

    def unseen() -> Iterator[Tensor]:
        seen = set(known)
        for batch in batches:
            digests = [data.file_hash(image.numpy().tobytes()) for image in batch]
            order.extend(digests)
            for image, digest in zip(batch, digests, strict=True):
                if digest not in seen:
                    seen.add(digest)
                    fresh.append(digest)
                    with torch.random.fork_rng(devices=[]):
                        torch.manual_seed(run.stable_hash(digest.hex()))
                        yield torch.stack([image, *(AUGMENT(image) for _ in range(VIEWS))])

    features = lite0_features(unseen(), precision=precision).half()
    features = features.view(len(fresh), 1 + VIEWS, features.shape[1]).numpy()
    keep_features(store, new := dict(zip(fresh, features, strict=True)))
    return in_order(order, known | new)


class Features:
    """Pairs with features (1 + VIEWS, C) of the locked trunk in place of images: of the whole image, then of views.

    A broken sample is replaced by the next one. Features are kept in `cache` for other runs.
    """

    def __init__(self, pairs, cache: str | Path = "data/cache"):
        self.keys, self.strict, self.fingerprint = pairs.keys, pairs.strict, pairs.fingerprint
        self.broken, self.captions = list(pairs.broken), []
        self.views = cached_views(self.pictures(pairs), cache)

    @property
    def features(self) -> Tensor:
        """Those of the whole images (N, C)."""
        return self.views[:, 0].float()

    def pictures(self, pairs, size: int = 256) -> Iterator[Tensor]:
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
        return data.Pair(self.keys[row], self.views[row], self.captions[row])


def learner_of(cfg: Config, process: run.Process) -> train.Learner:
    model = create_model(cfg)
    pairs = Features(open_pairs(cfg.data, None, cfg.dataset_size, cfg.strict, cfg.cache), cfg.cache)
    model.visual.head[0].fit(pairs.features)
    return train.Learner(model, tokenizer_of(cfg), pairs, data.identity, VIEW)


def main(cfg: Config) -> Path | None:
    return train.main(cfg, learner_of)


@dataclasses.dataclass
class Pool:
    """Compute the features of all pictures of a pool, so that runs in parallel need not."""

    data: tyro.conf.Positional[str]
    """Shards."""


COMMANDS = (
    Annotated[Config, tyro.conf.subcommand("train", default=SETTINGS)]
    | Annotated[ReduceConfig, tyro.conf.subcommand("reduce")]
    | Annotated[Pool, tyro.conf.subcommand("features")]
)


def command() -> None:
    cfg = tyro.cli(COMMANDS)
    if isinstance(cfg, ReduceConfig):
        reduce.main(cfg, load_scorer)
    elif isinstance(cfg, Pool):
        print(f"{cfg.data}: features of {len(Features(open_pairs(cfg.data))):,} pictures are in data/cache")
    else:
        main(cfg)


if __name__ == "__main__":
    cli.command_line(command)
