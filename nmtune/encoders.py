"""Encoders: models to pre-train, frozen encoders with their views, and files of weights.

NMTune (arXiv 2309.17002) tunes heads on any frozen encoder; authors' code Hhhhhhao/Noisy-Model-Learning@f249dce, `U:`.
Here an encoder is a model of timm or open_clip, a run of nmtune.pretrain, or EfficientNet-Lite0.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import open_clip
import timm
import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from torch import Tensor, nn
from torchvision import transforms

from nmtune.config import PretrainConfig
from shared import checkpoints, data
from shared.clip import average_at_start, image_side, quiet_open_clip, without_padding
from shared.errors import UserError
from shared.pretrained import LITE0_MEAN, LITE0_STD, efficientnet_lite0, fold_batch_norms
from shared.zeroshot import build_classifier

default_cfgs = generate_default_cfgs(  # timm requires this name
    {
        "resnet_emoji": {
            "input_size": (3, 32, 32), "pool_size": (2, 2), "crop_pct": 1.0, "interpolation": "bicubic",
            "mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5), "first_conv": "stem.conv", "classifier": "head.fc",
        }
    }
)  # fmt: skip


@register_model
def resnet_emoji(pretrained: bool = False, **options) -> ByobNet:
    """The encoder of small studies: a stem of 24 channels, blocks of 48, 96 and 192, each halving the image; 0.7 M
    parameters, D = 192. Importing this file registers it in timm."""
    blocks = tuple(ByoBlockCfg(type="basic", d=1, c=width, s=2, gs=0, br=1.0) for width in (48, 96, 192))
    small = ByoModelCfg(blocks=blocks, stem_chs=24, stem_type="3x3", stem_pool="")
    flat = {"flatten_sequential": True}
    return build_model_with_cfg(ByobNet, "resnet_emoji", pretrained, model_cfg=small, feature_cfg=flat, **options)


def timm_transforms(config: dict, crop_scale: float = 0.8) -> tuple[Callable, Callable]:
    """(training, evaluation) transform of a timm model's config. U:src/models/modeling.py:34-65.

    Training: crop of scale `crop_scale` to 1 and flip; evaluation: resize to ceil(size/crop_pct), centre crop. Images
    must be RGB, as shared.data.decode_image returns them; upstream fails on grey images.
    """
    size = config["input_size"][-1]
    mode = transforms.InterpolationMode(config["interpolation"])
    normalize = data.ToNormalizedTensor(config["mean"], config["std"])
    crop = transforms.RandomResizedCrop(size, scale=(crop_scale, 1.0), interpolation=mode)
    resize = transforms.Resize(math.ceil(size / config["crop_pct"]), interpolation=mode)
    return (
        transforms.Compose([crop, transforms.RandomHorizontalFlip(), normalize]),
        transforms.Compose([resize, transforms.CenterCrop(size), normalize]),
    )


def create_model(cfg: PretrainConfig, num_classes: int = 1000) -> tuple[nn.Module, Callable, int]:
    """(model to pre-train, training transform, image side).

    An open_clip model returns a dict of features and logit scale, a timm model logits (B, num_classes).
    """
    if cfg.kind == "clip":
        if open_clip.get_model_config(cfg.model) is None:
            raise UserError(f"open_clip has no model {cfg.model!r}; open_clip.list_models() lists the names")
        model, transform, _ = create_clip(cfg.model)
        average_at_start(without_padding(model))
        return model, transform, image_side(model)
    if not timm.is_model(cfg.model):
        raise UserError(f"timm has no model {cfg.model!r}; timm.list_models() lists the names")
    model = timm.create_model(cfg.model, num_classes=num_classes)
    return model, timm_transforms(model.pretrained_cfg, cfg.crop_scale)[0], model.pretrained_cfg["input_size"][-1]


def load_encoder(source: str, name: str, checkpoint: str | None = None) -> tuple[nn.Module, int, Callable, Callable]:
    """(module, D, training transform, evaluation transform); the module maps images (B, 3, H, W) to features (B, D).

    timm: pooled features before the classifier (U:src/models/modeling.py:14-65). open_clip: the projected image
    embedding, *not* normalised (U:src/models/modeling.py:78-85). lite0: EfficientNet-Lite0, pretrained on ImageNet-1k,
    for images of NAME pixels (shared.pretrained). The module is frozen: in eval mode and without gradients.
    checkpoint: None for random weights; "pretrained" for timm's own, by name and tag; a tag of open_clip; or a file or
    run folder with `state_dict`, in the layout of timm's `model.pth.tar`, open_clip's `epoch_32.pt` or our checkpoints;
    prefixes `module.` are removed.
    """
    weights = encoder_weights(checkpoint) if checkpoint and Path(checkpoint).exists() else None
    if source == "timm":
        if not timm.is_model(name):
            raise UserError(f"timm has no model {name!r}; timm.list_models() lists the names")
        if checkpoint and weights is None and checkpoint != "pretrained":
            raise UserError(f"encoder checkpoint {checkpoint} does not exist")
        encoder = timm.create_model(name, pretrained=checkpoint == "pretrained", num_classes=0)
        dim, views = encoder.num_features, timm_transforms(encoder.pretrained_cfg)
        dim = getattr(encoder, "head_hidden_size", dim)
    elif source == "open_clip":
        config = open_clip.get_model_config(name)
        if config is None:
            raise UserError(f"open_clip has no model {name!r}; open_clip.list_models() lists the names")
        if checkpoint and weights is None and checkpoint not in open_clip.list_pretrained_tags_by_model(name):
            raise UserError(f"{checkpoint} is neither a file nor a tag of open_clip's {name}")
        tag = checkpoint if weights is None else None
        model, *views = create_clip(name, tag or None)
        encoder, dim = model.visual, config["embed_dim"]
        if weights is not None:
            weights = {key.removeprefix("visual."): w for key, w in weights.items() if key.startswith("visual.")}
    elif source == "lite0":
        if not name.isdecimal() or not int(name) or int(name) % 32:
            raise UserError(f"lite0:{name} should give the image size in pixels, a multiple of 32, such as lite0:128")
        size = {"input_size": (3, int(name), int(name)), "crop_pct": 1.0, "interpolation": "bicubic"}
        encoder, dim = fold_batch_norms(efficientnet_lite0()), 1280
        views = timm_transforms(size | {"mean": LITE0_MEAN, "std": LITE0_STD})
    else:
        raise UserError(f"an encoder comes from timm, open_clip or lite0, not from {source!r}")
    if weights is not None:
        load_weights(encoder, weights, source, name, checkpoint)
    elif source != "lite0" and not checkpoint:
        print(f"encoder {source}:{name} has random weights: --checkpoint names others")
    return encoder.eval().requires_grad_(False), dim, *views


@torch.no_grad()
def zero_shot_weights(name: str, checkpoint: str | None, classnames: Sequence[str]) -> Tensor:
    """Classifier (C, D) of an open_clip model for features of length 1: e^logit_scale times the unit embeddings of
    "a photo of a CLASS.". U:src/models/zeroshot.py:18-60."""
    weights = encoder_weights(checkpoint) if checkpoint and Path(checkpoint).exists() else None
    model, *_ = create_clip(name, None if weights else checkpoint or None)
    if weights:
        model.load_state_dict(weights)
    names = [classname.replace("_", " ") for classname in classnames]
    tokenizer = open_clip.get_tokenizer(name)
    classifier = build_classifier(model.eval().encode_text, tokenizer, names, ["a photo of a {c}."])
    return model.logit_scale.exp() * classifier.T


def load_weights(encoder: nn.Module, weights: dict[str, Tensor], source: str, name: str, checkpoint: str) -> None:
    """Load strictly, except for classifier weights, which the encoder does not have."""
    classifier = getattr(encoder, "pretrained_cfg", {}).get("classifier", ()) if source == "timm" else ()
    prefixes = tuple(f"{layer}." for layer in ([classifier] if isinstance(classifier, str) else classifier))
    try:
        missing, unexpected = encoder.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{checkpoint} does not fit {source} {name}: {str(error).splitlines()[1].strip()}") from error
    unexpected = [key for key in unexpected if not key.startswith(prefixes)] if prefixes else unexpected
    if missing or unexpected:
        key = (missing + unexpected)[0]
        raise UserError(f"{checkpoint} does not fit {source} {name}: {'no' if missing else 'unknown'} weight {key}")


def create_clip(name: str, tag: str | None = None) -> tuple[nn.Module, Callable, Callable]:
    """(open_clip model that returns a dict, training and evaluation transform); weights by tag, or random."""
    with quiet_open_clip():  # about random weights, which are intended or replaced later
        return open_clip.create_model_and_transforms(
            name, pretrained=tag, output_dict=True, force_quick_gelu=tag == "openai"
        )


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Weights by name in a checkpoint file, or in its `state_dict`, without prefixes `module.`. UserError if it has
    none."""
    state = checkpoints.load_checkpoint(path)
    weights = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in weights.items()):
        raise UserError(f"{path} holds no weights: it should be a state dict, or have one under `state_dict`")
    return {key.removeprefix("module."): value for key, value in weights.items()}


def encoder_weights(checkpoint: str) -> dict[str, Tensor]:
    """Weights of a file or run folder with timm's or open_clip's names."""
    path = Path(checkpoint)
    weights = read_weights(path / "checkpoint.pt" if path.is_dir() else path)
    return split_upstream(weights)[1] if any(key.startswith("image_encoder.") for key in weights) else weights


def split_upstream(weights: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """State dict of upstream's tuned `ImageClassifier` -> (head, encoder) weights with our names.

    Upstream's files are pickled modules; `torch.save(module.state_dict(), FILE)` in its environment exports a state
    dict.
    """
    head, encoder = {}, {}
    for key, value in weights.items():
        if key.startswith("image_encoder.model.model."):  # timm's, in a wrapper with an alias of the classifier
            encoder[key.removeprefix("image_encoder.model.model.")] = value
        elif key.startswith("image_encoder.model.visual."):
            encoder[key.removeprefix("image_encoder.model.")] = value
        elif key.startswith(("image_encoder.mlp_after.", "image_encoder.scale_after")):
            head[key.removeprefix("image_encoder.")] = value
        elif key.startswith("classification_head."):
            head[key] = value
    return head, encoder
