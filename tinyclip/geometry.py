"""Sizes of CLIPs, by model name or read from the weights, and the key layouts of checkpoints.

A geometry is a dict of embed_dim, vision and text: the arguments of `model.CLIP`. Authors' code:
wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`.
"""

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from shared.checkpoints import read_json
from shared.clip import STATISTICS
from shared.errors import UserError

# ------------------------------------------------------------------------------------------------- geometries by name


def _config(embed_dim: int, vision: dict, text_width: int, text_heads: int, text_layers: int, **text) -> dict:
    text = {"context_length": 77, "vocab_size": 49408} | text
    text |= {"width": text_width, "heads": text_heads, "layers": text_layers}
    return {"embed_dim": embed_dim, "vision": vision, "text": text}


def _vit(width: int, layers: int, patch: int, image_size: int = 224, head_width: int = 64) -> dict:
    return {
        "image_size": image_size, "patch_size": patch, "width": width, "layers": layers, "head_width": head_width
    }  # fmt: skip


def _resnet(width: int) -> dict:
    return {"image_size": 224, "width": width, "layers": [3, 4, 6, 3], "head_width": 64}


def _convnet(width: float) -> dict:
    return {"image_size": 32, "width": width, "layers": [1, 1, 1, 1], "block": "convolution"}


_EMOJI_TEXT = {"context_length": 24}
CONFIGS: dict[str, dict] = {  # U:open_clip/model_configs/*.json; the emoji-* ones are ours
    "ViT-B-32": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "ViT-B-16": _config(512, _vit(768, 12, 16), 512, 8, 12),
    "RN50": _config(1024, _resnet(64), 512, 8, 12),
    "TinyCLIP-ViT-61M-32-Text-29M": _config(512, _vit(640, 12, 32), 512, 8, 9),
    "TinyCLIP-ViT-40M-32-Text-19M": _config(512, _vit(512, 12, 32), 512, 8, 6),
    "TinyCLIP-ViT-39M-16-Text-19M": _config(512, _vit(512, 12, 16), 512, 8, 6),
    "TinyCLIP-ViT-8M-16-Text-3M": _config(512, _vit(256, 10, 16), 256, 4, 3),
    "TinyCLIP-ResNet-30M-Text-29M": _config(1024, _resnet(56), 512, 8, 9),
    "TinyCLIP-ResNet-19M-Text-19M": _config(1024, _resnet(44), 512, 8, 6),
    # Automatic inheritance starts from ViT-B/32 with masks; the names give the sizes after pruning.
    "TinyCLIP-auto-ViT-63M-32-Text-31M": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "TinyCLIP-auto-ViT-45M-32-Text-18M": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "TinyCLIP-auto-ViT-22M-32-Text-10M": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "emoji-100": _config(128, _vit(96, 4, 8, 40, 24), 96, 4, 2, **_EMOJI_TEXT),
    "emoji-50": _config(128, _vit(72, 4, 8, 40, 24), 96, 4, 1, **_EMOJI_TEXT),
    "emoji-25": _config(128, _vit(48, 4, 8, 40, 24), 72, 3, 1, **_EMOJI_TEXT),
    "emoji-convnet-100": _config(256, _convnet(1.0), 128, 4, 2, **_EMOJI_TEXT),
    "emoji-convnet-50": _config(256, _convnet(0.625), 128, 4, 1, **_EMOJI_TEXT),
    "emoji-convnet-25": _config(256, _convnet(0.375), 96, 3, 1, **_EMOJI_TEXT),
}


def block_sizes(tower: Mapping) -> tuple[int, list[int], list[int | None]]:
    """(d, heads of each layer, neurons of each layer) of a transformer's `vision` or `text` dict.

    `heads` and `mlp_width` may be lists, as in pruned networks. 0 heads: a block without attention. None neurons: a
    block without MLP. 0 neurons: an MLP of which only the bias is left.
    """
    layers, heads = tower["layers"], tower.get("heads")
    head_width = tower.get("head_width") or tower["width"] // heads
    heads = tower["width"] // head_width if heads is None else heads
    neurons = tower.get("mlp_width", 4 * tower["width"])
    heads, neurons = (list(x) if isinstance(x, (list, tuple)) else [x] * layers for x in (heads, neurons))
    return head_width, heads, neurons


def named_towers(shape: Mapping) -> Iterator[tuple[str, str, Mapping]]:
    """Yield (name, prefix of its weights, geometry) of each tower that is a transformer: image, "visual."; text, ""."""
    if isinstance(shape["vision"]["layers"], int):
        yield "image", "visual.", shape["vision"]
    yield "text", "", shape["text"]


def tower_of(name: str) -> str | None:
    """The tower that a weight of a `model.CLIP` belongs to, vision or text; None for the temperature."""
    return None if name == "logit_scale" else "vision" if name.startswith("visual.") else "text"


# ---------------------------------------------------------------------------------------- checkpoints in other layouts


def convert_state_dict(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the authors' layouts, or of transformers, -> OpenAI's; masks become `image_mask.*` and `text_mask.*`.
    U:open_clip/model.py:1115.

    The authors' keys are OpenAI's with `module.`, or `_image_encoder.visual.X`, `_text_encoder.X`,
    `_logit_scale.logit_scale` with or without `module.`. Automatic checkpoints have the towers a second time, as
    `image_encoder_without_ddp.*`.
    """
    if of_transformers(sd):
        return from_transformers(sd)
    converted = {}
    for key, value in sd.items():
        key = re.sub(r"(^|\.)module\.", r"\1", key)
        key = re.sub(r"^_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?\.", r"\1:", key)
        key = re.sub(r"^(image|text)_encoder:l0_module\.", r"\1_mask.", key)
        converted[key.rpartition(":")[2]] = value
    return converted


# Names in transformers' CLIPModel, without the tower's prefix: names in OpenAI's layout. Replaced in this order.
TRANSFORMERS = {
    "embeddings.class_embedding": "class_embedding",
    "embeddings.patch_embedding": "conv1",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding": "token_embedding",
    "pre_layrnorm": "ln_pre",
    "post_layernorm": "ln_post",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "layer_norm": "ln_",
    "self_attn": "attn",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "visual_projection.weight": "visual.proj",
    "text_projection.weight": "text_projection",
}


def of_transformers(sd: Mapping[str, Tensor]) -> bool:
    """Whether these are the weights of a `CLIPModel` of transformers."""
    return any(key.startswith("text_model.") for key in sd)


def from_transformers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a `CLIPModel` -> OpenAI's layout: q, k and v in one matrix, projections transposed."""
    converted, fused = {}, defaultdict(dict)
    for key, value in sd.items():
        name = key.replace("vision_model.", "visual.").removeprefix("text_model.")
        for theirs, ours in TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        if match := re.fullmatch(r"(.+\.attn\.)([qkv])_proj\.(weight|bias)", name):
            fused[f"{match[1]}in_proj_{match[3]}"][match[2]] = value
        elif not name.endswith("position_ids"):  # older files have this constant 0, 1, 2, ...
            converted[name] = value.T if name in ("visual.proj", "text_projection") else value
    return converted | {name: torch.cat([qkv[x] for x in "qkv" if x in qkv]) for name, qkv in fused.items()}


# Weight files of our run folders, and of folders that open_clip and transformers write
WEIGHTS = (
    "model.pt", "checkpoint.pt", "open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors",
    "pytorch_model.bin",
)  # fmt: skip


def weights_file(path: Path) -> Path:
    """The weight file in a folder; `path` itself if it is not such a folder."""
    return next((path / name for name in WEIGHTS if (path / name).exists()), path)


def config_beside(file: Path, transformers: bool) -> dict:
    """Read quick_gelu and head_width (image, text) from the configuration beside a weight file of transformers
    (config.json) or open_clip (open_clip_config.json); {} if there is no configuration. Shapes do not contain them.

    UserError if the configuration is not a CLIP's, or describes a tower that this code does not have.
    """
    path = file.with_name("config.json" if transformers else "open_clip_config.json")
    if not path.is_file():
        return {}
    config = read_json(path)
    try:
        if not transformers:
            vision, text = config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"]
            widths = vision.get("head_width", 64), text.get("width", 512) // text.get("heads", 8)
            return {"quick_gelu": bool(config["model_cfg"].get("quick_gelu", False)), "head_width": widths}
        # The file omits values that equal the defaults of transformers' CLIPVisionConfig and CLIPTextConfig
        common = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
        vision = common | {"hidden_size": 768, "num_attention_heads": 12} | config["vision_config"]
        text = common | {"hidden_size": 512, "num_attention_heads": 8} | config["text_config"]
        activations, eps = ({tower[key] for tower in (vision, text)} for key in ("hidden_act", "layer_norm_eps"))
        if activations not in ({"gelu"}, {"quick_gelu"}) or eps != {1e-5}:
            raise UserError(f"{path}: both towers must use gelu or both quick_gelu, and LayerNorms of eps 1e-5")
        widths = tuple(tower["hidden_size"] // tower["num_attention_heads"] for tower in (vision, text))
        return {"quick_gelu": activations == {"quick_gelu"}, "head_width": widths}
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not the configuration of a CLIP: {error}") from error


def statistics_beside(file: Path) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, std) of a network's images, each of three numbers, from the configuration beside its weight file: of
    open_clip, or of transformers (preprocessor_config.json). CLIP's if there is none. UserError if it is damaged."""
    for name, mean, std in (
        ("open_clip_config.json", "mean", "std"),
        ("preprocessor_config.json", "image_mean", "image_std"),
    ):
        path = file.with_name(name)
        config = read_json(path) if path.is_file() else {}
        config = config.get("preprocess_cfg", config)
        if mean in config and std in config:
            try:
                found = tuple(tuple(float(value) for value in config[key]) for key in (mean, std))
            except (TypeError, ValueError):
                found = ((), ())
            if any(len(values) != 3 for values in found) or min(found[1]) <= 0:
                raise UserError(f"{path} has no three means and three positive standard deviations of images")
            return found
    return STATISTICS


def config_of_trainer(args: object) -> dict:
    """Read quick_gelu from `args`, the command line that the authors' trainer stores in its files; {} if it is None.
    U:training/train.py:674, U:open_clip/factory.py:111, 127."""
    if not hasattr(args, "force_quick_gelu"):
        return {}
    return {"quick_gelu": bool(args.force_quick_gelu or str(getattr(args, "pretrained", "")).lower() == "openai")}


def geometry_of_weights(state_dict: Mapping[str, Tensor], head_width: int | tuple[int, int] = 64) -> dict:
    """State dict of a CLIP in OpenAI's layout, pruned or not -> its geometry: embed_dim, vision and text.

    `head_width`, for both towers or (image, text), cannot be read from shapes; all released models have 64.
    UserError if these are not the weights of a CLIP.
    """
    widths = head_width if isinstance(head_width, tuple) else (head_width, head_width)
    if min(widths) < 1:
        raise UserError(f"a head must be at least 1 wide, not {min(widths)}")

    def depth(pattern: str) -> int:
        return 1 + max((int(m[1]) for key in state_dict if (m := re.match(pattern + r"\.(\d+)\.", key))), default=-1)

    def transformer(prefix: str, head_width: int) -> dict:
        blocks = f"{prefix}transformer.resblocks"
        layers = depth(re.escape(blocks))
        heads, neurons = [], []
        for i in range(layers):
            qkv, c_fc = (state_dict.get(f"{blocks}.{i}.{name}") for name in ("attn.in_proj_bias", "mlp.c_fc.bias"))
            heads.append(0 if qkv is None else len(qkv) // (3 * head_width))
            neurons.append(None if c_fc is None else len(c_fc))
        width = state_dict[prefix + "positional_embedding"].shape[1]
        tower = {"width": width, "layers": layers, "head_width": head_width}
        regular = heads == [width // head_width] * layers and width % head_width == 0
        tower["heads"] = heads[0] if regular else heads
        return tower if neurons == [4 * width] * layers else tower | {"mlp_width": neurons}

    try:
        text = transformer("", widths[1])
        text |= {
            "context_length": len(state_dict["positional_embedding"]),
            "vocab_size": len(state_dict["token_embedding.weight"]),
        }
        if "visual.class_embedding" in state_dict:
            patch = state_dict["visual.conv1.weight"].shape[-1]
            side = round((len(state_dict["visual.positional_embedding"]) - 1) ** 0.5)
            vision = transformer("visual.", widths[0]) | {"patch_size": patch, "image_size": patch * side}
        else:
            side = round((len(state_dict["visual.attnpool.positional_embedding"]) - 1) ** 0.5)
            vision = {
                "image_size": 32 * side,
                "width": len(state_dict["visual.conv3.weight"]),
                "layers": [depth(rf"visual\.layer{i}") for i in (1, 2, 3, 4)],
                "head_width": 64,
            }
        return {"embed_dim": state_dict["text_projection"].shape[1], "vision": vision, "text": text}
    except KeyError as error:
        raise UserError(f"these are not the weights of a CLIP: {error.args[0]} is missing") from error
    except IndexError as error:
        raise UserError("these are not the weights of a CLIP: an embedding or projection has too few axes") from error


def open_clip_config(shape: Mapping) -> dict | None:
    """The geometry as an open_clip config; None if open_clip does not support it: layers of different widths, or a
    `ConvTower`."""
    if "block" in shape["vision"]:
        return None
    towers = {}
    for name in ("vision", "text"):
        tower = shape[name]
        cfg = {key: tower[key] for key in tower.keys() - {"heads", "mlp_width"}}
        if isinstance(tower["layers"], int):
            cfg.pop("head_width", None)
            head_width, heads, neurons = block_sizes(tower)
            width, mlp = tower["width"], neurons[0]
            if set(heads) != {width / head_width} or set(neurons) != {mlp} or mlp is None:
                return None
            cfg |= {"head_width": head_width} if name == "vision" else {"heads": heads[0]}
            cfg["mlp_ratio"] = mlp / width
            if int(width * cfg["mlp_ratio"]) != mlp:
                return None
        towers[f"{name}_cfg"] = cfg
    return {"embed_dim": shape["embed_dim"], "quick_gelu": shape["quick_gelu"], **towers}
