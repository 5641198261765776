"""TinyCLIP's manual inheritance (arXiv 2309.12314): the student's initial weights are cut out of the teacher's by rule.

Authors' code: wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`. The paper's contribution:
every k-th layer, with its first channels and heads (`depth_indices`, `inherit_weights`). `inherit_at_random` is the
control. Automatic inheritance, which learns what to keep, is in masks.py.
"""

import copy
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from tinyclip.geometry import block_sizes
from tinyclip.masks import prune, resized

# ------------------------------------------------------------------------------------------------------------- by hand


def depth_indices(teacher_depth: int, student_depth: int, rule: str = "interval_front") -> list[int]:
    """Indices of the teacher's layers that the student's layers start from. U:open_clip/weight_inherit.py:84.

    interval_front: every (teacher_depth // student_depth)-th, so 12 -> 9 takes the first nine; uniform: an even spread.
    """
    if not 0 < student_depth <= teacher_depth:
        raise UserError(f"{student_depth} layers cannot inherit from {teacher_depth}")
    if rule == "interval_front":
        return [i * (teacher_depth // student_depth) for i in range(student_depth)]
    if rule == "uniform":
        return [i * teacher_depth // student_depth for i in range(student_depth)]
    raise UserError(f"depth rule {rule!r} is neither interval_front nor uniform")


BLOCK = re.compile(r"(.*(?:resblocks|layer\d))\.(\d+)\.(.+)")  # transformer blocks, and blocks of a ResNet's stages


def inherit_weights(
    student_sd: Mapping[str, Tensor],
    teacher_sd: Mapping[str, Tensor],
    head_dim: int = 64,
    depth_rule: str = "interval_front",
) -> dict[str, Tensor]:
    """The student's state dict, cut out of the teacher's; logit_scale is not inherited.
    U:open_clip/weight_inherit.py:71.

    Takes the layers of `depth_indices` in each transformer or ResNet stage, and of each tensor the front slice on every
    axis; of the fused (3 h d, H) projection the first heads of q, k and v. Uses only names and shapes of `student_sd`.
    UserError if a tensor of the student is larger than the teacher's or has no counterpart there.
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
            raise UserError(f"the student's {name} has nothing to inherit from: the teacher has no {source}")
        value = teacher_sd[source]
        if "visual" in name and name.endswith("positional_embedding") and len(value) != len(target):
            raise UserError(
                f"{name} has {len(target)} positions and the teacher's {len(value)}: another patch grid, "
                "which cannot be sliced; resize it first (resize_positional_embedding)"
            )
        if ".attn.in_proj_" in name:
            heads = value.unflatten(0, (3, -1, head_dim))
            value = heads[:, : len(target) // (3 * head_dim)].flatten(0, 2)
        if any(have < need for have, need in zip(value.shape, target.shape, strict=True)):
            raise UserError(
                f"{name} is {tuple(target.shape)} in the student, more than {tuple(value.shape)} of the teacher"
            )
        inherited[name] = value[tuple(slice(0, size) for size in target.shape)].clone()
    return inherited


def resize_positional_embedding(table: Tensor, grid: int) -> Tensor:
    """(1 + g*g, H) -> (1 + grid*grid, H), bicubic over the grid with aligned corners. U:open_clip/model.py:1261."""
    side = round((len(table) - 1) ** 0.5)
    patches = table[1:].T.reshape(1, -1, side, side)
    patches = F.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=True)
    return torch.cat([table[:1], patches[0].flatten(1).T])


# ------------------------------------------------------------------------------------- the control: at random places


def inherit_at_random(teacher: nn.Module, student: Mapping, generator: torch.Generator) -> nn.Module:
    """A `model.CLIP` of the student's geometry from random layers, channels, heads and neurons of the teacher.

    UserError if a tower of teacher or student is a ResNet.
    """
    towers = [(teacher.geometry[tower], student[tower]) for tower in ("vision", "text")]
    if not all(isinstance(tower["layers"], int) for pair in towers for tower in pair):
        raise UserError("--inherit random works on transformers, not on a ResNet")
    masks = [random_masks(*pair, generator) for pair in towers]
    return without_empty_blocks(prune(teacher, *masks, exact=True))


def random_masks(tower: Mapping, small: Mapping, generator: torch.Generator) -> dict[str, Tensor]:
    """Random 0/1 masks that reduce a tower of geometry `tower` to the sizes of `small`.

    Layers beyond the small tower's depth lose attention and MLP.
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


def without_empty_blocks(clip: nn.Module) -> nn.Module:
    """The same network without layers that have neither attention nor MLP."""
    shape, state = copy.deepcopy(clip.geometry), clip.state_dict()
    for tower, prefix in (("vision", "visual."), ("text", "")):
        sizes, stem = shape[tower], f"{prefix}transformer.resblocks."
        kept = [i for i in range(sizes["layers"]) if sizes["heads"][i] or sizes["mlp_width"][i] is not None]
        old = {name: state.pop(name) for name in list(state) if name.startswith(stem)}
        for new, i in enumerate(kept):
            block = f"{stem}{i}."
            state |= {f"{stem}{new}.{n.removeprefix(block)}": value for n, value in old.items() if n.startswith(block)}
        sizes |= {"layers": len(kept)} | {key: [sizes[key][i] for i in kept] for key in ("heads", "mlp_width")}
    return resized(clip, shape, state)
