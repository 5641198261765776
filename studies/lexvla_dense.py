"""The latent baseline of LexVLA's study: `python -m studies.lexvla_dense PRESET [--overrides]`.

The same towers, samples and training loop, with trained linear maps to `dense_dim` dimensions instead of codebooks, and
no activation, as in CLIP. The paper compares with latent models that others trained; this one is ours.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lexvla import config, train
from lexvla.checkpoints import load_run
from lexvla.eval import Config as Measure
from lexvla.eval import encode_pairs, retrieval
from lexvla.model import ImageEncoder, LastMLPTextEncoder, LexVLA
from lexvla.patchdis import classnames, labelled_images, measure
from lexvla.text import encode_texts, lm_dtype
from lexvla.towers import create_image_encoder, eval_transform, normalize, with_lora
from shared import cli, evaluation, run


@dataclasses.dataclass
class Config(config.Config):
    dense_dim: int = 512
    """Dimensions of the latent baseline."""
    pool_cls: bool = False
    """Read the token in [CLS]'s place, as CLIP does, instead of the mean patch, so that patches are trained, too."""


_EMOJI = {field.name: getattr(config.EMOJI, field.name) for field in dataclasses.fields(config.EMOJI)}
PRESETS = {
    "emoji-dense": (
        "A latent baseline of 512 dimensions on scenes: same towers, samples and steps",
        Config(**_EMOJI | {"penalty": "none", "bias": 0.0}),
    )
}


class DenseImageEncoder(ImageEncoder):
    """A linear map (E, d) of the mean patch or [CLS] instead of the codebook, without activation."""

    pool_cls = False

    def forward(self, pixels: Tensor) -> Tensor:
        tokens = self.tokens(pixels)
        z = tokens[:, 0] if self.pool_cls else tokens[:, 1:].mean(1)
        return F.normalize((z @ self.codebook.T).float(), dim=-1)

    def patches(self, pixels: Tensor) -> Tensor:
        return F.normalize((self.tokens(pixels)[:, 1:] @ self.codebook.T).float(), dim=-1)


class DenseTextEncoder(LastMLPTextEncoder):
    """A trained affine map of z_txt to E dimensions instead of the codebook."""

    def __init__(self, lm: nn.Module, vocab_ids: Tensor, projection: Tensor):
        super().__init__(lm, vocab_ids)
        self.projection = nn.Parameter(projection.clone())  # (E, d)
        self.offset = nn.Parameter(torch.zeros(len(projection)))

    @torch.no_grad()
    def start(self, states: Tensor) -> None:
        """Set the offset so that these captions' mean is 0: prompts have nearly equal states, which hide the
        differences."""
        self.offset.copy_(-(self.hidden(states) @ self.projection.T).mean(0))

    def represent(self, z: Tensor) -> Tensor:
        return F.normalize((z @ self.projection.T + self.offset).float(), dim=-1)


def create_model(cfg: Config, lm: nn.Module, vocab_ids: Tensor, bias: float = 0.0, pretrained: bool = True) -> LexVLA:
    """As `lexvla.towers.create_model`; image towers of a seed start alike in both."""
    with torch.random.fork_rng(devices=[]):
        width = lm.config.hidden_size
        visual, textual = (torch.randn(cfg.dense_dim, width) / width**0.5 for _ in range(2))
        text = DenseTextEncoder(with_lora(lm, cfg), vocab_ids, textual)
    image = create_image_encoder(cfg, visual, bias, pretrained, DenseImageEncoder)
    image.pool_cls = cfg.pool_cls
    return LexVLA(image, text)


def start(model: LexVLA, read: Callable, pairs) -> None:
    """Centre the texts of a new model on the captions of the first samples."""
    states = read(train.first_captions(pairs))
    model.text.start(*(x.to(model.text.projection.device) for x in states))


@torch.no_grad()
def evaluate_run(path: str, cfg: Measure, process: run.Process, load: Callable = load_run) -> dict[str, float]:
    """Retrieval and PatchDis, as `lexvla.eval.evaluate_run`."""
    precision, device = run.resolve_precision(cfg.precision, process.device), process.device
    dtype = run.DTYPES[precision]
    model, train_cfg, _, read = load(path, lm_dtype(precision, device), Config, create_model)
    model.to(device)
    transform = eval_transform(train_cfg.backbone, train_cfg.image_size)
    flat: dict[str, float] = {}
    for eval_set in evaluation.open_sets("sets", cfg.sets, transform, "retrieval"):
        s_img, s_txt, image_of_text, _ = encode_pairs(model, read, eval_set, cfg.batch_size, cfg.workers, device, dtype)
        flat |= {f"{eval_set.name}/{key}": v for key, v in retrieval(s_img, s_txt, image_of_text).items()}
    if cfg.patchdis:
        s_class = encode_texts(model, read, classnames(cfg.patchdis), cfg.batch_size, device, dtype)
        side = cfg.patchdis_side or train_cfg.image_size
        images = labelled_images(cfg.patchdis, side, normalize(train_cfg.backbone))
        found, _ = measure(model.image.patches, s_class, images, device=device)
        flat |= {f"patchdis/{name}": value for name, value in found.items()}
    return flat


if __name__ == "__main__":
    cli.command_line(lambda: train.main(cli.preset_cli(PRESETS), create_model, start))
