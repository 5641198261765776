"""Checkpoints of TinyCLIP: the authors' key layouts, geometries read off tensors, open_clip's weights and configs.

Authors' code: wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

from shared import checkpoints
from tinyclip.network import CLIP, CONFIGS, block_sizes


def convert_state_dict(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keys of the authors' layouts -> OpenAI's; masks become `image_mask.*` and `text_mask.*`.
    U:open_clip/model.py:1115.

    Theirs are OpenAI's with `module.`, or `_image_encoder.visual.X`, `_text_encoder.X`, `_logit_scale.logit_scale`,
    with or without `module.`; automatic checkpoints hold the towers twice, again as `image_encoder_without_ddp.*`.
    """
    converted = {}
    for key, value in sd.items():
        key = re.sub(r"(^|\.)module\.", r"\1", key)
        key = re.sub(r"^_?(image_encoder|text_encoder|logit_scale)(_without_ddp)?\.", r"\1:", key)
        key = re.sub(r"^(image|text)_encoder:l0_module\.", r"\1_mask.", key)
        converted[key.rpartition(":")[2]] = value
    return converted


def geometry(state_dict: Mapping[str, Tensor], head_width: int | tuple[int, int] = 64) -> dict:
    """embed_dim, vision and text of the CLIP that a state dict in OpenAI's layout belongs to, pruned or not.

    Shapes do not tell the width of a head, of both towers or of (image, text): all released models have 64.
    """
    widths = head_width if isinstance(head_width, tuple) else (head_width, head_width)
    if min(widths) < 1:
        raise ValueError(f"a head is at least 1 wide, not {min(widths)}")

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
        raise ValueError(f"these are not the weights of a CLIP: {error.args[0]} is missing") from error
    except IndexError as error:
        raise ValueError("these are not the weights of a CLIP: a table or projection has too few axes") from error


def resize_positional_embedding(table: Tensor, grid: int) -> Tensor:
    """(1 + g*g, H) -> (1 + grid*grid, H), bicubic over the grid with aligned corners. U:open_clip/model.py:1261."""
    side = round((len(table) - 1) ** 0.5)
    patches = table[1:].T.reshape(1, -1, side, side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], patches[0].flatten(1).T])


def load_clip(source: str | Path, head_width: int = 64, quick_gelu: bool = False) -> CLIP:
    """A CLIP in eval mode from a run folder of ours, a checkpoint file in either of the authors' layouts, or
    `MODEL@WEIGHTS` of open_clip (`ViT-B-32@laion2b_e16`), which it downloads.

    `head_width` and `quick_gelu` are for the authors' files, which do not say.
    """
    if "@" in str(source) and not Path(source).exists():
        name, _, tag = str(source).partition("@")
        tags = {known: open_clip.list_pretrained_tags_by_model(known) for known in ("ViT-B-32", "ViT-B-16", "RN50")}
        if tag not in tags.get(name, ()):
            known = "; ".join(f"{model}@ {', '.join(weights)}" for model, weights in tags.items())
            raise ValueError(f"{source} is not among the weights of open_clip that fit here: {known}")
        try:
            state = open_clip.create_model(name, pretrained=tag).state_dict()
        except (RuntimeError, OSError) as error:
            why = str(error).splitlines()[0]
            raise ValueError(f"{source}: open_clip could not download these weights ({why}); name a file") from error
        quick_gelu = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", tag == "openai"))
        shape = CONFIGS[name]
    else:
        path = Path(source)
        file = next((path / n for n in ("model.pt", "checkpoint.pt") if (path / n).exists()), path)
        content = checkpoints.load_checkpoint(file)
        state = content.get("state_dict", content) if isinstance(content, dict) else None
        if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
            raise ValueError(
                f"{source} holds no weights by name: a checkpoint is a dict of tensors, or has one as state_dict"
            )
        state = convert_state_dict(state)
        if "masks" in content and content["masks"] is not None:
            raise ValueError(f"{source} is in the middle of learning its masks; let it run past its --prune-step")
        if "geometry" in content:
            shape = content["geometry"]
        elif any("mask." in key for key in state):
            raise ValueError(f"{source} still has its masks; prune it with the authors' code, or load its last stage")
        else:
            try:
                shape = geometry(state, head_width)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from error
    try:
        model = CLIP(**({"quick_gelu": quick_gelu} | shape))
    except (TypeError, KeyError) as error:
        raise ValueError(f"{source} says a geometry that no CLIP here has: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{source} does not hold a CLIP that this code knows: {str(error).splitlines()[1].strip()}"
        ) from error
    return model.eval()


def open_clip_config(model: CLIP) -> dict | None:
    """The model as a config of open_clip, or None where open_clip has no such shapes (layers of different widths)."""
    towers = {}
    for name in ("vision", "text"):
        tower = model.geometry[name]
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
    quick_gelu = model.geometry["quick_gelu"]
    return {"embed_dim": model.geometry["embed_dim"], "quick_gelu": quick_gelu, **towers}
