"""TinyCLIP's weight inheritance (arXiv 2309.12314): the student's first weights are a part of the teacher's.

Authors' code: wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`. The paper's contribution
here is inheritance by hand (every k-th layer, the first channels and heads); masks that learn it are in masks.py.
"""

import copy
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from shared.data import stable_hash
from tinyclip.checkpoints import load_clip, resize_positional_embedding
from tinyclip.config import Config
from tinyclip.masks import L0Mask, expand_pruned, prune
from tinyclip.network import CLIP, CONFIGS, block_sizes


def depth_indices(teacher_depth: int, student_depth: int, rule: str = "interval_front") -> list[int]:
    """Which of the teacher's layers the student's start from. U:open_clip/weight_inherit.py:84.

    interval_front: every (teacher_depth // student_depth)-th, so 12 -> 9 takes the first nine; uniform: an even spread.
    """
    if not 0 < student_depth <= teacher_depth:
        raise ValueError(f"{student_depth} layers cannot inherit from {teacher_depth}")
    if rule == "interval_front":
        return [i * (teacher_depth // student_depth) for i in range(student_depth)]
    if rule == "uniform":
        return [i * teacher_depth // student_depth for i in range(student_depth)]
    raise ValueError(f"depth rule {rule!r} is none of interval_front, uniform")


BLOCK = re.compile(r"(.*(?:resblocks|layer\d))\.(\d+)\.(.+)")  # transformer blocks, and blocks of a ResNet's stages


def inherit_weights(
    student_sd: Mapping[str, Tensor],
    teacher_sd: Mapping[str, Tensor],
    head_dim: int = 64,
    depth_rule: str = "interval_front",
) -> dict[str, Tensor]:
    """The student's state dict, cut out of the teacher's; logit_scale is not inherited.
    U:open_clip/weight_inherit.py:71.

    Layers by `depth_indices` in each transformer or ResNet stage, the front slice on every axis, and of the fused
    (3 h d, H) projection the first heads of each of q, k and v. Of `student_sd` only names and shapes are used.
    """

    def depths(state: Mapping[str, Tensor]) -> dict[str, int]:
        counts: dict[str, int] = {}
        for match in filter(None, map(BLOCK.fullmatch, state)):
            counts[match[1]] = max(counts.get(match[1], 0), int(match[2]) + 1)
        return counts

    ours, theirs = depths(student_sd), depths(teacher_sd)
    layers = {stage: depth_indices(theirs.get(stage, 0), depth, depth_rule) for stage, depth in ours.items()}
    inherited = {}
    for name, target in student_sd.items():
        if name == "logit_scale":
            continue
        match = BLOCK.fullmatch(name)
        source = name if match is None else f"{match[1]}.{layers[match[1]][int(match[2])]}.{match[3]}"
        if source not in teacher_sd:
            raise ValueError(f"the student's {name} has nothing to inherit from: the teacher has no {source}")
        value = teacher_sd[source]
        if "visual" in name and name.endswith("positional_embedding") and len(value) != len(target):
            raise ValueError(
                f"{name} has {len(target)} positions and the teacher's {len(value)}: another patch grid, whose front "
                "slice would be meaningless; resize it first (resize_positional_embedding)"
            )
        if ".attn.in_proj_" in name:
            heads = value.unflatten(0, (3, -1, head_dim))
            value = heads[:, : len(target) // (3 * head_dim)].flatten(0, 2)
        if any(have < need for have, need in zip(value.shape, target.shape, strict=True)):
            raise ValueError(
                f"{name} is {tuple(target.shape)} in the student, more than {tuple(value.shape)} of the teacher"
            )
        inherited[name] = value[tuple(slice(0, size) for size in target.shape)].clone()
    return inherited


def random_masks(tower: Mapping, small: Mapping, generator: torch.Generator) -> dict[str, Tensor]:
    """0/1 masks that leave a tower of `tower`'s geometry with `small`'s sizes, at random places: the control for
    inheriting.

    Layers beyond the small tower's depth lose both their blocks.
    """
    _, heads, neurons = block_sizes(tower)
    _, small_heads, small_neurons = block_sizes(small)
    layers = tower["layers"]

    def choose(count: int, total: int) -> Tensor:
        mask = torch.zeros(total)
        mask[torch.randperm(total, generator=generator)[:count]] = 1
        return mask

    depth = choose(small["layers"], layers)
    return {
        "hidden": choose(small["width"], tower["width"]),
        "heads": torch.stack([choose(small_heads[0], heads[0]) for _ in range(layers)]),
        "intermediate": torch.stack([choose(small_neurons[0], neurons[0]) for _ in range(layers)]),
        "mha": depth,
        "ffn": depth,
    }


def without_empty_blocks(clip: CLIP) -> CLIP:
    """The same network without the layers that have neither attention nor MLP left."""
    shape, state = copy.deepcopy(clip.geometry), clip.state_dict()
    for tower, prefix in (("vision", "visual."), ("text", "")):
        sizes, stem = shape[tower], f"{prefix}transformer.resblocks."
        kept = [i for i in range(sizes["layers"]) if sizes["heads"][i] or sizes["mlp_width"][i] is not None]
        old = {name: state.pop(name) for name in list(state) if name.startswith(stem)}
        for new, i in enumerate(kept):
            block = f"{stem}{i}."
            state |= {f"{stem}{new}.{n.removeprefix(block)}": value for n, value in old.items() if n.startswith(block)}
        sizes |= {"layers": len(kept)} | {key: [sizes[key][i] for i in kept] for key in ("heads", "mlp_width")}
    smaller = CLIP(**shape)
    smaller.load_state_dict(state)
    return smaller


def first_weights(cfg: Config) -> tuple[CLIP, list[L0Mask]]:
    """The student before its first step, and its masks: random, inherited by hand or at random, whole with open masks,
    or the stage before expanded under masks that close what it lacks."""
    shape = copy.deepcopy(CONFIGS[cfg.model])
    shape["vision"]["image_size"] = cfg.image_size or shape["vision"]["image_size"]
    clip = CLIP(**shape, quick_gelu=cfg.quick_gelu)
    masks = [L0Mask.of(clip.geometry[tower], cfg.mask_types) for tower in ("vision", "text")] if cfg.masks else []
    if cfg.init is None:
        return clip, masks
    source = load_clip(cfg.init, cfg.head_width)
    state, own = source.state_dict(), clip.state_dict()
    table = "visual.positional_embedding"
    if table in state and table in own and len(state[table]) != len(own[table]):
        state[table] = resize_positional_embedding(state[table], round((len(own[table]) - 1) ** 0.5))
    if cfg.masks and any(name not in state or state[name].shape != value.shape for name, value in own.items()):
        expand_pruned(clip, *masks, state)
    elif cfg.inherit == "random":
        generator = torch.Generator().manual_seed(stable_hash(cfg.seed, "inherit"))
        towers = [(source.geometry[tower], clip.geometry[tower]) for tower in ("vision", "text")]
        if not all(isinstance(tower["layers"], int) for pair in towers for tower in pair):
            raise ValueError("--inherit random cuts transformers, and a ResNet is none")
        clip = without_empty_blocks(prune(source, *(random_masks(*pair, generator) for pair in towers), exact=True))
        shapes = {name: value.shape for name, value in clip.state_dict().items()}
        if (
            shapes != {name: value.shape for name, value in own.items()}
            or source.geometry["quick_gelu"] != cfg.quick_gelu
        ):
            raise ValueError(f"--inherit random cannot cut {cfg.model} with these flags out of {cfg.init}")
        clip.logit_scale.data.copy_(own["logit_scale"])
    else:
        head_width = clip.geometry["text"]["width"] // clip.geometry["text"]["heads"]
        clip.load_state_dict(own | inherit_weights(own, state, head_width, cfg.depth_rule))
    return clip, masks
