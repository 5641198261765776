"""Towers by name: frozen backbone and adapter, language model with LoRA, and the transforms of their images."""

import contextlib
import functools
from collections.abc import Sequence

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import lexvla.lite0  # noqa: F401  (registers its model with timm)
from lexvla.config import Config
from lexvla.model import (
    BagOfWords,
    ImageEncoder,
    LastMLPTextEncoder,
    LexVLA,
    TextEncoder,
    VisualAdapter,
    add_lora,
)
from lexvla.text import Bags, Prompts, States
from shared import data
from shared.errors import UserError

CROP = (0.9, 1.0)  # smallest and largest share of the image's area in a training crop; not stated in the paper


def create_backbone(name: str, image_size: int, pretrained: bool = True) -> tuple[nn.Module, int]:
    """(network with [CLS] and patches as tokens, its width D).

    name: a folder or hub name of transformers (with a /), or a model of timm. UserError if it cannot be loaded or has
    other tokens before its patches than [CLS].
    """
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
            f"pass a folder or {lexvla.lite0.NAME}"
        ) from error
    if vit.num_prefix_tokens != 1:
        raise UserError(f"--backbone {name} has {vit.num_prefix_tokens} tokens before its patches; [CLS] alone is read")
    return vit, vit.num_features


def patch_side(backbone: nn.Module) -> int:
    """Pixels of a patch's side, of timm's ViTs and transformers'."""
    return backbone.patch_embed.patch_size[0] if hasattr(backbone, "patch_embed") else backbone.config.patch_size


def create_image_encoder(
    cfg: Config, codebook: Tensor, bias: float, pretrained: bool = True, kind: type[ImageEncoder] = ImageEncoder
) -> ImageEncoder:
    """Backbone and adapter of the configuration; the codebook (V, d) is copied. UserError if an image has no patch."""
    backbone, dim = create_backbone(cfg.backbone, cfg.image_size, pretrained)
    if cfg.image_size < (side := patch_side(backbone)):
        raise UserError(f"--image-size {cfg.image_size} is below the {side} pixels of a patch of {cfg.backbone}")
    width = cfg.adapter_width or dim
    adapter = VisualAdapter(width, max(width // 64, 1), cfg.adapter_hidden, codebook.shape[1], dim)
    return kind(backbone, adapter, codebook, bias=bias)


def with_lora(lm: nn.Module, cfg: Config) -> nn.Module:
    """Add LoRA to all of the LM's linear layers; with cached states, to those of the last MLP alone."""
    if cfg.grad_checkpointing:  # transformers renamed the method
        enable = getattr(lm, "activation_checkpointing_enable", None) or lm.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if cfg.lora_rank:
        add_lora(lm.model.layers[-1].mlp if cfg.states else lm, cfg.lora_rank, cfg.lora_alpha)
    return lm


def text_encoder(cfg: Config) -> type[TextEncoder]:
    """The class of the LM's text tower."""
    return LastMLPTextEncoder if cfg.states else TextEncoder


def create_model(cfg: Config, lm: nn.Module, vocab_ids: Tensor, bias: float = 0.0, pretrained: bool = True) -> LexVLA:
    """Build the model of a configuration over a vocabulary, with a bias; adds LoRA to `lm` in place.

    With the same seed, image towers have the same initial weights, whatever the text side is.
    """
    with torch.random.fork_rng(devices=[]):
        text = text_encoder(cfg)(lm if cfg.text == "bow" else with_lora(lm, cfg), vocab_ids, bias)
    image = create_image_encoder(cfg, text.codebook, bias, pretrained)
    return LexVLA(image, BagOfWords(vocab_ids) if cfg.text == "bow" else text)


def lm_input(cfg: Config, lm: nn.Module, tokenizer) -> Prompts | States:
    """The function that turns captions into the input of the LM's text tower."""
    prompts = Prompts(tokenizer, cfg.max_length)
    return States(cfg.states, cfg.lm, lm, prompts) if cfg.states else prompts


def text_input(cfg: Config, lm: nn.Module, tokenizer, vocab_ids: Tensor) -> Prompts | States | Bags:
    """The function that turns captions into the text tower's input."""
    return Bags(tokenizer, vocab_ids) if cfg.text == "bow" else lm_input(cfg, lm, tokenizer)


# -------------------------------------------------------------------------------------------------------------- images


def statistics(backbone: str) -> tuple[Sequence[float], Sequence[float]]:
    """(mean, standard deviation) of a backbone's images, by its own configuration.

    If a transformers folder has no preprocessor_config.json: CLIP's if its name contains "clip", else ImageNet's.
    """
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
def train_transform(backbone: str, size: int) -> transforms.Compose:
    """A crop of at least 90 % of the area, resized bicubically. Augmentation is not stated in the paper."""
    crop = transforms.RandomResizedCrop(size, CROP, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, normalize(backbone)])


@functools.cache
def eval_transform(backbone: str, size: int) -> transforms.Compose:
    """Shorter side to `size`, centre crop."""
    resize = transforms.Resize(size, interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(size), normalize(backbone)])
