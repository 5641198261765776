"""TinyCLIP's weight inheritance (arXiv 2309.12314): the student before its first step, `initialise_student`.

Authors' code: wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`. The paper's contribution
by hand: every k-th layer, with its first channels and heads (`depth_indices`, `inherit_weights`). `inherit_at_random`
is the control. Automatic inheritance, which learns what to keep, is in masks.py.
"""

import copy
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared.errors import UserError
from shared.run import stable_hash
from tinyclip.config import Config
from tinyclip.geometry import CONFIGS, block_sizes, tower_of
from tinyclip.masks import L0Mask, expand_pruned, prune, resized
from tinyclip.model import CLIP, Student
from tinyclip.teacher import load_init

# ------------------------------------------------------------------------------------- the student's initial weights


def random_student(cfg: Config) -> Student:
    """The student of --model and --image-size with random weights, and with --masks two open masks."""
    shape = copy.deepcopy(CONFIGS[cfg.model])
    shape["vision"]["image_size"] = cfg.image_size or shape["vision"]["image_size"]
    return Student(CLIP(**shape), *[L0Mask.of(shape[tower]) for tower in ("vision", "text") if cfg.masks])


def initialise_student(cfg: Config) -> Student:
    """The student before its first step.

    Without --init its weights are random. Otherwise they are inherited, by hand or at random. With masks the student
    takes all weights of the source, and the masks are open; a pruned source is expanded, and the masks of the removed
    slots are closed. UserError if the student does not fit into the source.
    """
    student = random_student(cfg)
    if cfg.init is None:
        return student
    clip = student.clip
    source = load_init(cfg.init)
    check_head_widths(clip, source, cfg)
    state, own = source.state_dict(), clip.state_dict()
    table = "visual.positional_embedding"
    if table in state and table in own and len(state[table]) != len(own[table]):
        state[table] = resize_positional_embedding(state[table], round((len(own[table]) - 1) ** 0.5))
    if cfg.masks and any(name not in state or state[name].shape != value.shape for name, value in own.items()):
        expand_pruned(clip, *student.masks, state)
    elif cfg.inherit == "random":
        generator = torch.Generator().manual_seed(stable_hash(cfg.seed, "inherit"))
        taken = inherit_at_random(source, clip.geometry, generator).state_dict()
        shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (taken, own))
        if shapes != wanted or source.geometry["quick_gelu"]:
            raise UserError(
                f"--inherit random cannot cut {cfg.model} out of {cfg.init}: their sizes or activations do not fit"
            )
        clip.load_state_dict(taken | {"logit_scale": own["logit_scale"]})
    else:
        try:
            taken = inherit_weights(own, state, block_sizes(clip.geometry["text"])[0])
        except ValueError as error:
            raise UserError(f"--model {cfg.model} cannot start from --init {cfg.init}: {error}") from error
        towers = {None: ("vision", "text"), "image": ("vision",), "text": ("text",)}[cfg.inherit_only]
        clip.load_state_dict(own | {name: value for name, value in taken.items() if tower_of(name) in towers})
    return student


def check_head_widths(clip: CLIP, source: CLIP, cfg: Config) -> None:
    """UserError if heads of student and source differ in width: shapes would allow a slice that mixes heads."""
    for tower in ("vision", "text"):
        sizes = [each.geometry[tower] for each in (source, clip)]
        if all(isinstance(each["layers"], int) for each in sizes):
            theirs, ours = (block_sizes(each)[0] for each in sizes)
            if theirs != ours:
                raise UserError(
                    f"--init {cfg.init}: heads of its {tower} tower are {theirs} wide, and those of --model "
                    f"{cfg.model} {ours}; choose a --model with heads of that width"
                )


# ------------------------------------------------------------------------------------------------------------- by hand


def depth_indices(teacher_depth: int, student_depth: int) -> list[int]:
    """Indices of the teacher's layers that the student's layers start from. U:open_clip/weight_inherit.py:84.

    Every (teacher_depth // student_depth)-th, so 12 -> 9 takes the first nine.
    """
    if not 0 < student_depth <= teacher_depth:
        raise UserError(f"{student_depth} layers cannot inherit from {teacher_depth}")
    return [i * (teacher_depth // student_depth) for i in range(student_depth)]


BLOCK = re.compile(r"(.*(?:resblocks|layer\d))\.(\d+)\.(.+)")  # transformer blocks, and blocks of a ResNet's stages


def inherit_weights(
    student_sd: Mapping[str, Tensor], teacher_sd: Mapping[str, Tensor], head_dim: int = 64
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
    layers = {stage: depth_indices(theirs.get(stage, 0), depth) for stage, depth in ours.items()}
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
