"""Towers by name: frozen backbone and adapter, language model with LoRA, and the transforms of their images."""

import contextlib
import functools
from collections.abc import Sequence

import timm
import torch
import torch.nn.functional as F
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from lexvla.config import LITE0, Config
from lexvla.model import (
    BagOfWords,
    DenseImageEncoder,
    DenseTextEncoder,
    ImageEncoder,
    LexVLA,
    TextEncoder,
    VisualAdapter,
    add_lora,
)
from lexvla.text import Bags, Prompts, States
from shared import data
from shared.errors import UserError
from shared.pretrained import LITE0 as LITE0_OF_TIMM
from shared.pretrained import LITE0_MEAN, LITE0_STD, efficientnet_lite0, fold_batch_norms


class Lite0Maps(nn.Module):
    """EfficientNet-Lite0's feature maps as the tokens of a ViT: the mean patch instead of [CLS], patches of 16 pixels.

    (B, 3, H, W) -> (B, 1 + H W / 256, 432), H and W multiples of 32. A patch concatenates the map of stride 16 (112
    channels) and the last one (320, interpolated from stride 32), each normalised over its channels. Ours, for small
    experiments, instead of DINOv2.
    """

    patch_size, num_features, middle = (16, 16), 432, 4  # middle: the stage whose map has stride 16
    chunk = 16  # images that a CPU sees at a time: it takes twice as long if a layer's map exceeds its cache (32 MB)

    def __init__(self, pretrained: bool = True):
        super().__init__()
        network = efficientnet_lite0() if pretrained else timm.create_model(LITE0_OF_TIMM, num_classes=0)
        network = fold_batch_norms(network)
        self.stem, self.stages = nn.Sequential(network.conv_stem, network.bn1), network.blocks

    def forward_features(self, pixels: Tensor) -> Tensor:
        size = self.chunk if pixels.device.type == "cpu" else len(pixels)
        return torch.cat([self.tokens(some) for some in pixels.split(size)])

    def tokens(self, pixels: Tensor) -> Tensor:
        """Tokens of all these images at once."""
        x = self.stem(pixels)
        for number, stage in enumerate(self.stages):
            x = stage(x)
            if number == self.middle:
                middle = x
        last = F.interpolate(x, scale_factor=2, mode="bilinear")
        maps = [each.flatten(2).transpose(1, 2) for each in (middle, last)]
        patches = torch.cat([F.layer_norm(each, each.shape[-1:]) for each in maps], dim=-1)
        return torch.cat([patches.mean(1, keepdim=True), patches], dim=1)


def create_backbone(name: str, image_size: int, pretrained: bool = True) -> tuple[nn.Module, int]:
    """(network with [CLS] and patches as tokens, its width D).

    name: `LITE0` for EfficientNet-Lite0's maps, a folder or hub name of transformers (with a /), or a model of timm.
    UserError if it cannot be loaded or has other tokens before its patches than [CLS].
    """
    if name == LITE0:
        return Lite0Maps(pretrained), Lite0Maps.num_features
    try:
        if "/" in name:
            from transformers import AutoModel, Dinov2Config, Dinov2Model

            sizes = {"hidden_size": 384, "num_attention_heads": 6} if name.endswith("dinov2-small") else {}
            vit = AutoModel.from_pretrained(name) if pretrained else Dinov2Model(Dinov2Config(patch_size=14, **sizes))
            return vit, vit.config.hidden_size
        vit = timm.create_model(name, pretrained=pretrained, num_classes=0, img_size=image_size, dynamic_img_size=True)
    except (OSError, RuntimeError, TypeError) as error:
        raise UserError(
            f"--backbone {name} could not be loaded from disk, from the Hugging Face hub or as a ViT of timm; offline, "
            f"pass a folder or {LITE0}"
        ) from error
    if vit.num_prefix_tokens != 1:
        raise UserError(f"--backbone {name} has {vit.num_prefix_tokens} tokens before its patches; [CLS] alone is read")
    return vit, vit.num_features


def patch_side(backbone: nn.Module) -> int:
    """Pixels of a patch's side, of transformers' ViTs, timm's and `Lite0Maps`."""
    if isinstance(backbone, Lite0Maps):
        return backbone.patch_size[0]
    return backbone.patch_embed.patch_size[0] if hasattr(backbone, "patch_embed") else backbone.config.patch_size


def side_step(backbone: nn.Module) -> int:
    """Number of pixels that must divide an image's side: a patch's side, or the larger stride of `Lite0Maps`."""
    return 32 if isinstance(backbone, Lite0Maps) else patch_side(backbone)


def create_image_encoder(cfg: Config, codebook: Tensor, bias: float, pretrained: bool = True) -> ImageEncoder:
    """Backbone and adapter of the configuration; the codebook (V, d) is copied. UserError if an image has no patch."""
    backbone, dim = create_backbone(cfg.backbone, cfg.image_size, pretrained)
    if cfg.image_size < (side := patch_side(backbone)):
        raise UserError(f"--image-size {cfg.image_size} is below the {side} pixels of a patch of {cfg.backbone}")
    width = cfg.adapter_width or dim
    adapter = VisualAdapter(width, max(width // 64, 1), cfg.adapter_hidden, codebook.shape[1], dim)
    cls = DenseImageEncoder if cfg.head == "dense" else ImageEncoder
    encoder = cls(backbone, adapter, codebook, cfg.pool_cls, bias)
    encoder.codebook.requires_grad_(cfg.tune_codebook)
    return encoder


def with_lora(lm: nn.Module, cfg: Config) -> nn.Module:
    """Add LoRA to the LM's layers named in `lora_targets`; with cached states, to those of the last MLP alone."""
    if cfg.grad_checkpointing:  # transformers renamed the method
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if cfg.lora_rank:
        linear = {name.rpartition(".")[2] for name, module in lm.named_modules() if isinstance(module, nn.Linear)}
        if unknown := set(cfg.lora_targets) - linear:
            wrong, found = (", ".join(sorted(names)) for names in (unknown, linear - {"lm_head"}))
            raise UserError(f"--lora-targets {wrong}: the LM's layers are {found}")
        add_lora(lm.model.layers[-1].mlp if cfg.states else lm, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets)
    return lm


def create_model(cfg: Config, lm: nn.Module, vocab_ids: Tensor, bias: float = 0.0, pretrained: bool = True) -> LexVLA:
    """Build the model of a configuration over a vocabulary, with a bias; adds LoRA to `lm` in place.

    With the same seed, image towers have the same initial weights, whatever the text side is.
    """
    with torch.random.fork_rng(devices=[]):
        if cfg.head == "dense":
            width = lm.config.hidden_size
            codebook, projection = (torch.randn(cfg.dense_dim, width) / width**0.5 for _ in range(2))
            text: nn.Module = DenseTextEncoder(with_lora(lm, cfg), vocab_ids, projection)
        elif cfg.text == "bow":
            codebook = TextEncoder(lm, vocab_ids, bias, cfg.centre_codebook).codebook
            text = BagOfWords(vocab_ids)
        else:
            text = TextEncoder(with_lora(lm, cfg), vocab_ids, bias, cfg.centre_codebook)
            codebook = text.codebook
    return LexVLA(create_image_encoder(cfg, codebook, bias, pretrained), text)


def text_input(cfg: Config, lm: nn.Module, tokenizer, vocab_ids: Tensor) -> Prompts | Bags | States:
    """The function that turns captions into the text tower's input. UserError if --states are of another LM."""
    if cfg.text == "bow":
        return Bags(tokenizer, vocab_ids)
    if cfg.states:
        states = States(cfg.states, cfg.lm, cfg.max_length, cfg.prompt_end)
        states.check_lm(lm, cfg.lm)
        return states
    return Prompts(tokenizer, cfg.max_length, cfg.prompt_end)


# -------------------------------------------------------------------------------------------------------------- images


def statistics(backbone: str) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, standard deviation) of a backbone's images, by its own configuration.

    If a transformers folder has no preprocessor_config.json: CLIP's if its name contains "clip", else ImageNet's.
    """
    if backbone == LITE0:
        return LITE0_MEAN, LITE0_STD
    if about := timm.models.get_pretrained_cfg(backbone):
        return about.mean, about.std
    from transformers.image_processing_utils import BaseImageProcessor

    with contextlib.suppress(OSError, KeyError):
        about, _ = BaseImageProcessor.get_image_processor_dict(backbone)
        return about["image_mean"], about["image_std"]
    clip = OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
    return clip if "clip" in backbone else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def normalize(backbone: str) -> data.ToNormalizedTensor:
    """Images normalised by the backbone's `statistics`."""
    return data.ToNormalizedTensor(*statistics(backbone))


@functools.cache
def train_transform(backbone: str, size: int, crop_scale: float) -> transforms.Compose:
    """A crop of at least `crop_scale` of the area, resized bicubically. Augmentation is not stated in the paper."""
    crop = transforms.RandomResizedCrop(size, (crop_scale, 1.0), interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, normalize(backbone)])


@functools.cache
def eval_transform(backbone: str, size: int) -> transforms.Compose:
    """Shorter side to `size`, centre crop."""
    resize = transforms.Resize(size, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), normalize(backbone)])
