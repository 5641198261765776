"""The learner of TL;DR's study of scenes: a CLIP with a small convolutional network and a bag of words, both from
random weights, trained by tldr_reduction.train.

    python -m studies.tldr_reduction_learner train --data POOL --out RUN
    python -m studies.tldr_reduction_learner reduce POOL --scorer RUN --out DIR      # tldr_reduction.reduce
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import open_clip
import torch
import tyro
from PIL import Image
from torch import Tensor, nn

from shared import checkpoints, cli, clip, data, run
from shared.views import SmallView, colours, views_at
from tldr_reduction import reduce, train
from tldr_reduction.config import Config, ReduceConfig
from tldr_reduction.datasets import open_pairs, view_of
from tldr_reduction.encoders import Scorer, cosines
from tldr_reduction.tokenizer import eval_tokenizer, tokenizer_of

SETTINGS = Config(  # 20 epochs and the decay of the learning rate are the paper's
    stage="clip", clip_model="ConvNet-emoji", data="data/tldr/noise-30", batch_size=128, lr=2e-2, weight_decay=0.2,
    warmup=40, crop_scale=0.5, workers=0, keep_in_memory=True, save_every=500, log_every=20,
)  # fmt: skip
EMBED_DIM = 128
ANGLE = math.radians(10)  # at most, of a turned view
SCALE = 5.0  # the fixed factor of cosines in the loss: a learned one grows until the wrong captions are learned, too


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
    """The two towers, with random weights."""
    settings = open_clip.get_model_config(cfg.clip_model)
    model = open_clip.CustomTextCLIP(EMBED_DIM, settings["vision_cfg"], settings["text_cfg"])
    model.text = BagOfWords(model.vocab_size, model.context_length, EMBED_DIM)
    model.logit_scale.requires_grad_(False).fill_(math.log(SCALE))
    return model


class View(SmallView):
    """RGB image -> a random view (3, S, S), normalised: a crop of at least `crop_scale` of the area, turned, mirrored
    or not, in other colours. What lies beyond the picture is its mirror image.
    """

    def __init__(self, size: int, crop_scale: float):
        super().__init__(size, *clip.STATISTICS)
        self.crop_scale = crop_scale

    def pixels(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """RGB image -> its pixels (3, H, W) uint8, the view's noise (10,)."""
        return data.to_pixels(image), torch.rand(10)

    def normalise(self, batch: Sequence[Tensor]) -> Tensor:
        """[pixels (B, 3, H, W) uint8, noise (B, 10) in 0..1] -> views (B, 3, S, S)."""
        pixels, noise = batch
        u = 2 * noise - 1
        area, ratio = 1 - (1 - self.crop_scale) * noise[:, 0], (4 / 3) ** u[:, 1]
        width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
        sine, cosine = (u[:, 2] * ANGLE).sin(), (u[:, 2] * ANGLE).cos()
        side, x, y = u[:, 3].sign(), (1 - width) * u[:, 4], (1 - height) * u[:, 5]
        rows = [side * width * cosine, -height * sine, x, side * width * sine, height * cosine, y]
        maps = torch.stack(rows, 1).view(-1, 2, 3)
        return views_at(pixels, maps, colours(u[:, 6:]), self.size, *self.statistics, outside="reflection")


def learner_of(cfg: Config, process: run.Process) -> train.Learner:
    model = create_model(cfg)
    pairs = open_pairs(cfg.data, None, cfg.dataset_size, cfg.strict, cfg.cache)
    view = View(clip.image_side(model), cfg.crop_scale)
    return train.Learner(model, tokenizer_of(cfg), pairs, view, view_of(model, cfg))


def main(cfg: Config) -> Path | None:
    return train.main(cfg, learner_of)


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
    return cosines(model, view_of(model, cfg), eval_tokenizer(tokenizer, cfg), device)


COMMANDS = (
    Annotated[Config, tyro.conf.subcommand("train", default=SETTINGS)]
    | Annotated[ReduceConfig, tyro.conf.subcommand("reduce")]
)


def command() -> None:
    cfg = tyro.cli(COMMANDS)
    reduce.main(cfg, load_scorer) if isinstance(cfg, ReduceConfig) else main(cfg)


if __name__ == "__main__":
    cli.command_line(command)
