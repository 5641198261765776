"""TinyCLIP's parts, ours and those of wkcn/TinyCLIP@ad981bf, on the CPU in fp32. Names of weights are the authors'."""

import ast
import contextlib
import copy
import functools
import inspect
import json
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from shared import run, zeroshot
from tests.adapters import Case, Part, gradients, leaf, prefixed
from tests.parity import import_beside, run_block, unit
from tinyclip import geometry, inheritance, masks, model, train
from tinyclip.config import Config

CLONE = "wkcn/TinyCLIP", "ad981bf", "src/open_clip/l0module.py"
VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 3, "layers": 2}
RESNET = {"image_size": 64, "width": 8, "layers": [1, 2, 1, 1], "head_width": 64}
EMBED = 16
TOWERS = "image", "text"
LOSS = dict(local_loss=True, gather_with_grad=True, cache_labels=True)


# ----------------------------------------------------------------------------------------------------- their modules


@functools.cache
def load(path: str | Path) -> SimpleNamespace:
    """The authors' modules from a clone."""
    root = Path(path).resolve() / "src"
    names = [f"open_clip.{n}" for n in ("model", "l0module", "weight_inherit", "clip_soft_loss", "loss", "transform")]
    names += [f"training.{name}" for name in ("optimizer", "scheduler", "train", "zero_shot")] + ["open_clip.tokenizer"]
    modules = import_beside(root, names, {})
    return SimpleNamespace(**{name.rpartition(".")[2]: module for name, module in modules.items()}, root=root)


@contextlib.contextmanager
def on_cpu(up):
    """Stand-ins for the GPU, disk and plotting functions that their training loop calls; hides what it prints."""
    viz = ModuleType("training.viz")
    viz.plot = lambda *_: None
    with (
        mock.patch.dict(sys.modules, {"training": ModuleType("training"), "training.viz": viz}),
        mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (0, 1)),
        mock.patch.object(torch.cuda.amp, "autocast", lambda *_, **__: contextlib.nullcontext()),
        mock.patch.object(up.train.psutil, "disk_usage", lambda _: SimpleNamespace(free=0)),
        contextlib.redirect_stdout(None),
    ):
        yield


@contextlib.contextmanager
def process_group():
    """A group of one process, which their losses need."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from torch.distributed.nn
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            yield
        finally:
            torch.distributed.destroy_process_group()


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    up = load(path)
    with process_group(), contextlib.redirect_stdout(None):
        yield up


def inner(module: ModuleType, name: str, **names) -> Callable:
    """A function that a function of a module defines, with values for the variables that it takes from there."""
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.FunctionDef) and node.name == name:
            scope = {**vars(module), **names}
            exec(compile(ast.Module([node], []), module.__file__, "exec"), scope)
            return scope[name]
    raise LookupError(f"{module.__file__} has no function {name}")


@contextlib.contextmanager
def drawn(*uniforms: Tensor) -> Iterator[None]:
    """Let `Tensor.uniform_` give these numbers, in turn."""
    left = iter(uniforms)
    with mock.patch.object(torch.Tensor, "uniform_", lambda self, *_: self.copy_(next(left))):
        yield
    assert next(left, None) is None


# ------------------------------------------------------------------------------------------------------ small models


def inputs(n=4, vision=VISION, text=TEXT):
    """Images and tokens; the end token, the largest id, is at a random position in the second half."""
    side, length, last = vision["image_size"], text["context_length"], text["vocab_size"] - 1
    tokens = torch.randint(1, last, (n, length))
    return torch.randn(n, 3, side, side), tokens.scatter(1, torch.randint(length // 2, length, (n, 1)), last)


def perturbed(network: torch.nn.Module, spread: float = 1.0) -> torch.nn.Module:
    """The network with noise on all weights, so that none is at a special value, and random gates."""
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "loga" in name:
                parameter.normal_(0.5, spread)
            elif parameter.ndim and "lambda" not in name:
                parameter += 0.02 * torch.randn_like(parameter)
    return network


def their_clip(up, embed: int, vision: dict, text: dict, quick_gelu: bool = False, masked: bool = False):
    names = "image_size", "patch_size", "width", "layers", "head_width"
    cfg = {"patch_size": None, **{name: vision[name] for name in names if name in vision}}
    words = {name: text[name] for name in ("context_length", "vocab_size", "width", "heads", "layers")}
    return up.model.CLIP(embed, cfg, words, quick_gelu, mask_image=masked, mask_text=masked)


def twins(up, vision=VISION, text=TEXT, embed=EMBED, masked=False, quick_gelu=False, spread=1.0):
    """Their model and our `Student` with the same weights, none at a special value."""
    theirs = perturbed(their_clip(up, embed, vision, text, quick_gelu, masked), spread)
    student = made_student(embed, vision, text, quick_gelu, masked)
    state = geometry.convert_state_dict(theirs.state_dict())
    student.load_state_dict({name if "mask." in name else f"clip.{name}": value for name, value in state.items()})
    return theirs, student


def made_student(embed, vision, text, quick_gelu=False, masked=False) -> model.Student:
    clip = model.CLIP(embed, vision, text, quick_gelu)
    return model.Student(clip, *[masks.L0Mask.of(cfg) for cfg in (vision, text)] if masked else [])


def their_name(name: str) -> str:
    """Our name of a weight or gate -> theirs."""
    if name.startswith(("image_mask.", "text_mask.")):
        tower, _, gate = name.partition("_mask.")
        return f"_{tower}_encoder.l0_module.{gate}"
    name = name.removeprefix("clip.")
    place = "image_encoder" if name.startswith("visual.") else "text_encoder"
    return f"_{'logit_scale' if name == 'logit_scale' else place}.{name}"


def in_their_names(prefix: str, state: dict) -> dict:
    return {prefix + their_name(name): value for name, value in state.items()}


def weights(prefix: str, vision=VISION, text=TEXT, embed=EMBED, **options) -> dict[str, Tensor]:
    return in_their_names(prefix, perturbed(made_student(embed, vision, text, **options)).state_dict())


def head_widths(state: dict) -> tuple[int, int]:
    """Head widths (image, text), which shapes do not determine: 8 from the README, or those of the case's masks."""
    widths = []
    for tower, prefix in (("image", "visual."), ("text", "")):
        loga = state.get(f"{tower}_mask.heads_loga")
        qkv = state.get(f"{prefix}transformer.resblocks.0.attn.in_proj_bias")
        widths.append(8 if loga is None or qkv is None else len(qkv) // (3 * loga.shape[1]))
    return tuple(widths)


def only_weights(state: dict) -> dict:
    return {key: value for key, value in state.items() if "mask." not in key}


def shape_of(state: dict, **changes) -> dict:
    """Geometry of a state dict in our names; a ResNet's pooling heads are 64 wide."""
    shape = geometry.geometry_of_weights(only_weights(state), head_widths(state))
    if "visual.conv3.weight" in state:
        shape["vision"]["head_width"] = 64
    shape["vision"] |= changes
    return shape


def pooling_widths(state: dict) -> list[int]:
    """Possible head widths of a ResNet's attention pool; files do not state them, so the best fit is used."""
    pool = state.get("visual.attnpool.c_proj.weight")
    return [64] if pool is None else [width for width in (8, 16, 32, 64, 128) if pool.shape[1] % width == 0]


def clip_of(state: dict, quick_gelu: bool = False, **changes) -> model.CLIP:
    """The CLIP with the weights of a state dict in our names."""
    clip = model.CLIP(**shape_of(state, **changes), quick_gelu=quick_gelu)
    clip.load_state_dict(only_weights(state))
    return clip


def masks_of(state: dict, clip: model.CLIP) -> list[masks.L0Mask]:
    found = []
    for tower, name in (("vision", "image"), ("text", "text")):
        values = {k.removeprefix(f"{name}_mask."): v for k, v in state.items() if k.startswith(f"{name}_mask.")}
        mask = masks.L0Mask.of(clip.geometry[tower], [kind for kind in masks.KINDS if f"{kind}_loga" in values])
        mask.load_state_dict(mask.state_dict() | values)
        found.append(mask)
    return found


def theirs_of(up, state: dict, quick_gelu: bool = False, **changes):
    """Their CLIP with a state dict in their names, with masks if this has gates."""
    own = geometry.convert_state_dict(state)
    shape, masked = shape_of(own, **changes), len(own) > len(only_weights(own))
    theirs = their_clip(up, shape["embed_dim"], shape["vision"], shape["text"], quick_gelu, masked)
    theirs.load_state_dict(state)
    return theirs


def student_gradients(student: model.Student) -> dict:
    return {name.removeprefix("clip."): p.grad for name, p in student.named_parameters() if p.grad is not None}


def their_gradients(theirs) -> dict:
    return geometry.convert_state_dict({name: p.grad for name, p in theirs.named_parameters() if p.grad is not None})


def with_gradients(function, *tensors):
    tensors = [x.clone().requires_grad_() for x in tensors]
    value = function(*tensors)
    return value.detach(), torch.autograd.grad(value, tensors)


# ------------------------------------------------------------------------------------------------------------ losses


def variants(case: Case) -> list[str]:
    return sorted({name.partition("/")[0] for name in case})


class Loss(Part):
    """Tolerances are relative to the largest entry, or 1e-6 if that is only rounding (student equals teacher)."""

    def tolerance(self, name, case):
        return 0.0, max(1e-5 * torch.as_tensor(dict.__getitem__(case, name)).abs().max().item(), 1e-6)

    def inputs(self, teacher=True):
        found = {}
        for v, n, width, of_teacher, scale in (
            ("base", 8, 16, 24, 50.0), ("unequal_scale", 6, 16, 16, 1 / 0.07), ("same_as_teacher", 5, 8, 8, 50.0),
        ):  # fmt: skip
            x = {"image": unit(n, width), "text": unit(n, width), "scale": scale}
            same = v == "same_as_teacher"
            y = x if same else {"image": unit(n, of_teacher), "text": unit(n, of_teacher), "scale": 50.0}
            found |= prefixed(f"{v}/", x) | (prefixed(f"{v}/teacher_", y) if teacher else {})
        return found

    def student(self, case, v) -> dict[str, Tensor]:
        return {name: leaf(case[f"{v}/{name}"]) for name in ("image", "text", "scale")}

    def teacher(self, case, v) -> list:
        return [case[f"{v}/teacher_{name}"] for name in ("image", "text", "scale")]


def their_affinity(up):
    loss = up.clip_soft_loss.ClipSoftLoss(**LOSS, rank=0, world_size=1)
    return functools.partial(loss, average_two_losses=False)


def their_contrast(up):
    return up.loss.ClipLoss(**LOSS, rank=0, world_size=1)


class Affinity(Loss):
    files = {"affinity_loss": {}}
    functions = "tinyclip.model.affinity_mimicking_loss"
    authors = "open_clip/clip_soft_loss.py:54"

    def run(self, function, case):
        found = {}
        for v in variants(case):
            x = self.student(case, v)
            i2t, t2i = function(*x.values(), *self.teacher(case, v))
            loss = (i2t + t2i) / 2
            found |= prefixed(f"{v}/", {"loss_i2t": i2t, "loss_t2i": t2i, "loss": loss, **gradients(loss, x)})
        return found

    our, their = staticmethod(model.affinity_mimicking_loss), staticmethod(their_affinity)


class Contrast(Loss):
    files = {"clip_loss": {"teacher": False}}
    functions = "tinyclip.model.clip_loss"
    authors = "open_clip/loss.py:132"

    def run(self, function, case):
        found = {}
        for v in variants(case):
            x = self.student(case, v)
            loss = function(*x.values())
            found |= prefixed(f"{v}/", {"loss": loss, **gradients(loss, x)})
        return found

    our, their = staticmethod(model.clip_loss), staticmethod(their_contrast)


class Mixture(Loss):
    files = {"distill_loss_mix": {}}
    functions = "tinyclip.model.distillation_loss"
    authors = "training/train.py:161"
    settings = (0.7, 1.0), (0.0, 1.0), (1.0, 2.0)

    def run(self, function, case):
        """function(student, teacher, alpha, weight) -> soft part, hard part, their sum."""
        found = {}
        for v in variants(case):
            for alpha, weight in self.settings:
                x = self.student(case, v)
                soft, hard, loss = function(list(x.values()), self.teacher(case, v), alpha, weight)
                values = {"soft": soft, "hard": hard, "loss": loss, **gradients(loss, x)}
                found |= prefixed(f"{v}/alpha{alpha}_weight{weight}/", values)
        return found

    def our(self, student, teacher, alpha, weight):
        with torch.no_grad():
            soft = alpha * weight * sum(model.affinity_mimicking_loss(*student, *teacher)) / 2
            hard = (1 - alpha) * weight * model.clip_loss(*student)
        return soft, hard, model.distillation_loss(*student, *teacher, alpha=alpha, weight=weight)

    def their(self, up):
        def function(student, teacher, alpha, weight):
            args = SimpleNamespace(distillation_alpha=alpha, distillation_weight=weight)
            parts = dict(soft_loss_fn=up.clip_soft_loss.ClipSoftLoss(**LOSS), hard_loss_fn=their_contrast(up))
            metrics = defaultdict(up.train.AverageMeter)
            loss = inner(up.train, "loss_fn", distillation=True, args=args, metrics=metrics, **parts)
            names = "image_features", "text_features", "logit_scale"
            outputs = [dict(zip(names, each, strict=True)) for each in (student, teacher)]
            total = loss(outputs[0], {**outputs[1], "labels": None})
            return metrics["soft_loss"].val, metrics["hard_loss"].val, total

        return function


def losses_of_rank(rank: int, world: int, x: dict, affinity: Callable, contrast: Callable) -> dict:
    rows = slice(rank * len(x["image"]) // world, (rank + 1) * len(x["image"]) // world)
    x = {name: value if "scale" in name else value[rows] for name, value in x.items()}
    student = {name: leaf(x[name]) for name in ("image", "text", "scale")}
    i2t, t2i = affinity(*student.values(), *(x[f"teacher_{name}"] for name in student))
    loss = (i2t + t2i) / 2
    found = {"loss_i2t": i2t.detach(), "loss_t2i": t2i.detach(), "loss": loss.detach(), **gradients(loss, student)}
    student = {name: leaf(x[name]) for name in student}
    loss = contrast(*student.values())
    hard = gradients(loss, student, "hard_grad_")
    return found | {"hard_loss": loss.detach(), **{name: g for name, g in hard.items() if "scale" not in name}}


def our_rank(rank: int, world: int, x: dict) -> dict:
    affinity = lambda *features: model.affinity_mimicking_loss(*features, run.gather)  # noqa: E731
    return losses_of_rank(rank, world, x, affinity, lambda *features: model.clip_loss(*features, run.gather))


def their_rank(rank: int, world: int, x: dict, path: str) -> dict:
    up, options = load(path), dict(**LOSS, rank=rank, world_size=world)
    affinity = functools.partial(up.clip_soft_loss.ClipSoftLoss(**options), average_two_losses=False)
    return losses_of_rank(rank, world, x, affinity, up.loss.ClipLoss(**options))


class DistributedLosses(Part):
    files = {"affinity_loss_distributed": {}}
    functions = "shared.run.gather tinyclip.model.affinity_mimicking_loss"
    authors = "open_clip/loss.py:71"
    atol = 1e-5

    def inputs(self):
        x = {name: unit(8, 8) for name in TOWERS} | {"scale": 50.0, "teacher_scale": 50.0}
        return x | {f"teacher_{name}": unit(8, 11) for name in TOWERS}

    def run(self, function, case, *arguments):
        from scripts import in_ranks

        x = {name: case[name] for name in case if not name.startswith("rank")}
        with tempfile.TemporaryDirectory() as folder:
            ranks = in_ranks(function, 2, Path(folder), 2, x, *arguments)
        return {f"rank{rank}/{name}": value for rank, found in enumerate(ranks) for name, value in found.items()}

    our = staticmethod(our_rank)

    def theirs(self, up, case):
        return self.run(their_rank, case, str(up.root.parent))


# ------------------------------------------------------------------------------------------------------------ towers


class Forward(Part):
    files = {"forward_vit": dict(), "forward_vit_quickgelu": dict(quick_gelu=True)}
    functions = "tinyclip.model.VisionTransformer.forward tinyclip.model.CLIP.encode_text tinyclip.model.MLP"
    authors = "open_clip/model.py:990"

    def tolerance(self, name, case):
        """Relative to the largest entry if that exceeds 1: features of 400 have a resolution of 3e-5."""
        largest = max(1.0, torch.as_tensor(dict.__getitem__(case, name)).abs().max().item())
        return (1e-4, 2e-5) if name.startswith("grad/") else (0.0, 1e-5 * largest)

    def inputs(self, vision=VISION, quick_gelu=False):
        images, tokens = inputs(4, vision)
        return {"image": images, "text": tokens, **weights("param/", vision)}

    def run(self, network, case):
        with torch.no_grad():
            features = network.eval().encode_image(case["image"]), network.encode_text(case["text"])
            image, text, scale = network(case["image"], case["text"])
        found = {f"{tower}_features": x for tower, x in zip(TOWERS, features, strict=True)}
        found |= {"image_features_norm": image, "text_features_norm": text, "logit_scale_exp": scale}
        if case.fresh:  # files have no gradients
            image, text, _ = network(case["image"], case["text"])
            (image.sum() + (text * text[:, :1].detach()).sum()).backward()
            grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
            found |= {
                f"grad/{name if name.startswith('_') else their_name(name)}": grad for name, grad in grads.items()
            }
        if any("bn1.running_mean" in name for name in case):
            with torch.no_grad():
                found["train/image_features"] = network.train().encode_image(case["image"])
            state = {n if n.startswith("_") else their_name(n): x for n, x in network.state_dict().items()}
            buffers = ("running_mean", "running_var", "num_batches_tracked")
            found |= {f"train_buffers/{n}": x.clone() for n, x in state.items() if n.endswith(buffers)}
        return found

    def options(self, case) -> dict:
        return dict(quick_gelu="quickgelu" in case.path.stem, image_size=case["image"].shape[-1])

    def ours(self, case):
        state, options = geometry.convert_state_dict(case.group("param/")), self.options(case)
        network = clip_of(state, **options)
        if "visual.conv3.weight" in state:
            fits = [clip_of(state, **options, head_width=width).eval() for width in pooling_widths(state)]
            with torch.no_grad():
                gaps = [(fit.encode_image(case["image"]) - case["image_features"]).abs().max() for fit in fits]
            network = fits[int(torch.stack(gaps).argmin())]
        with torch.no_grad():
            unit_text = network.eval().encode_text(case["text"], normalize=True)
        found = self.run(network, case)
        torch.testing.assert_close(unit_text, found["text_features_norm"])
        return found

    def theirs(self, up, case):
        return self.run(theirs_of(up, case.group("param/"), **self.options(case)), case)


class ForwardResnet(Forward):
    """Ours has open_clip's ResNet."""

    files = {"forward_resnet": dict(vision=RESNET)}
    functions = "tinyclip.model.CLIP.encode_image"
    authors = "open_clip/resnet.py:96"


class ParameterCounts(Part):
    files = {"param_counts": {}}
    functions = "tinyclip.geometry.CONFIGS tinyclip.model.parameter_counts"
    authors = "open_clip/model_configs"
    names = "RN50", "ViT-B-16", "ViT-B-32", *(
        f"TinyCLIP-{each}"
        for each in (
            "ResNet-19M-Text-19M", "ResNet-30M-Text-29M", "ViT-8M-16-Text-3M", "ViT-39M-16-Text-19M",
            "ViT-40M-32-Text-19M", "ViT-61M-32-Text-29M",
        )
    )  # fmt: skip

    def inputs(self):
        return {}

    def row(self, embed_dim, vision, text) -> list[int]:
        layers = vision["layers"] if isinstance(vision["layers"], list) else [vision["layers"]]
        words = [text[name] for name in ("width", "heads", "layers", "context_length", "vocab_size")]
        return [embed_dim, vision["image_size"], vision["width"], vision.get("patch_size") or 0, *words, *layers]

    def ours(self, case):
        found = {}
        for name in self.names:
            shape = geometry.CONFIGS[name]
            with torch.device("meta"):
                clip = model.CLIP(**shape)
            counts = model.parameter_counts(clip)
            values = {each: counts[each] for each in ("total", "image", "text_with_token_embedding")}
            values |= {"image_buffers": sum(b.numel() for b in clip.visual.buffers())}
            values |= {"token_embedding": clip.token_embedding.weight.numel()}
            values |= {"text_transformer": sum(p.numel() for p in clip.transformer.parameters())}
            found |= prefixed(f"{name}/", values | {"config": self.row(**shape)})
        return found

    def theirs(self, up, case):
        def size(tensors) -> int:
            return sum(x.numel() for x in tensors)

        found = {}
        for name in self.names:
            shape = json.loads((up.root / f"open_clip/model_configs/{name}.json").read_text())
            row = self.row(shape["embed_dim"], shape["vision_cfg"], shape["text_cfg"])
            with torch.device("meta"):
                clip = up.model.CLIP(shape["embed_dim"], shape["vision_cfg"], shape["text_cfg"])
            image, text = clip.image_encoder_without_ddp, clip.text_encoder_without_ddp
            values = {"total": size(clip.parameters()), "image": size(image.parameters())}
            values |= {"image_buffers": size(image.visual.buffers())}
            values |= {"text_with_token_embedding": size(text.parameters())}
            values |= {"token_embedding": text.token_embedding.weight.numel()}
            values |= {"text_transformer": size(text.transformer.parameters())}
            found |= prefixed(f"{name}/", values | {"config": row})
        return found


# ------------------------------------------------------------------------------------------------------- inheritance


class Depth(Part):
    """Which blocks of the teacher a student gets: the file's arrays are named by both depths."""

    files = {"inherit_depth": {}}
    functions = "tinyclip.inheritance.depth_indices"
    authors = "open_clip/weight_inherit.py:84"
    pairs = (12, 12), (12, 10), (12, 9), (12, 6), (12, 3), (9, 6), (6, 3), (12, 1)

    def inputs(self):
        return {}

    def run(self, function, case):
        return {f"{teacher}_to_{student}": function(teacher, student) for teacher, student in self.pairs}

    our = staticmethod(inheritance.depth_indices)

    def their(self, up):
        def function(teacher, student):
            blocks = {f"transformer.resblocks.{i}.ln_1.bias": torch.tensor([float(i)]) for i in range(teacher)}
            found = up.weight_inherit.weight_inherit(dict(list(blocks.items())[:student]), blocks, 8)
            return [int(x) for x in found.values()]

        return function


class Inherit(Part):
    files = {
        "inherit_vit": dict(vision={**VISION, "layers": 8}),
        "inherit_resnet": dict(vision={**RESNET, "layers": [2, 2, 2, 2]}),
    }
    functions = "tinyclip.inheritance.inherit_weights"
    authors = "open_clip/weight_inherit.py:71"
    small = {
        "inherit_vit": {**VISION, "width": 16, "layers": 4},
        "inherit_resnet": {**RESNET, "width": 4, "layers": [1, 2, 1, 1]},
    }

    def inputs(self, vision):
        teacher = weights("teacher/", vision, {**TEXT, "layers": 4}, 24)
        return {**teacher, "head_dim_image": 8, "head_dim_text": 8}

    def run(self, function, case, student):
        """function(student's and teacher's state dict of a tower, head width) -> the student's."""
        teacher, found = geometry.convert_state_dict(case.group("teacher/")), {}
        for tower in TOWERS:
            of_tower = [
                {name: torch.full_like(x, -7) if blank else x for name, x in state.items()
                 if name.startswith("visual") == (tower == "image") and name != "logit_scale"}
                for state, blank in ((student, True), (teacher, False))
            ]  # fmt: skip
            found |= function(*of_tower, case[f"head_dim_{tower}"])
        return in_their_names("student/", found)

    def ours(self, case):
        return self.run(inheritance.inherit_weights, case, geometry.convert_state_dict(case.group("student/")))

    def theirs(self, up, case):
        text = {**TEXT, "width": 16, "heads": 2, "layers": 3}
        student = model.CLIP(EMBED, self.small[case.path.stem], text).state_dict()
        return self.run(up.weight_inherit.weight_inherit, case, student)


class PositionTable(Part):
    files = {"pos_embed_resize": {}}
    functions = "tinyclip.inheritance.resize_positional_embedding"
    authors = "open_clip/model.py:1261"
    atol = 1e-5

    def inputs(self):
        return {"7to14/in": torch.randn(50, 6), "4to3/in": torch.randn(17, 5)}

    def run(self, function, case):
        return {f"{v}/out": function(case[f"{v}/in"], int(v.partition("to")[2])) for v in variants(case)}

    our = staticmethod(inheritance.resize_positional_embedding)

    def their(self, up):
        def function(table, grid):
            state = {"visual.positional_embedding": table}
            up.model.resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(grid, grid))))
            return state["visual.positional_embedding"]

        return function


class CheckpointKeys(Part):
    """Names of weights in four layouts of files -> their names."""

    files = {"checkpoint_keys": {}}
    functions = "tinyclip.geometry.convert_state_dict"
    authors = "open_clip/model.py:1115"
    json = True

    def inputs(self):
        return {}

    def ours(self, case):
        found = {}
        for layout in case:
            keys = case[layout]
            numbers = geometry.convert_state_dict({key: torch.tensor(i) for i, key in enumerate(keys)})
            names = {int(i): their_name(name) for name, i in numbers.items()}
            found[layout] = {key: names[i] for i, key in enumerate(keys)}
        return found

    def theirs(self, up, case):
        plain = model.CLIP(EMBED, VISION, TEXT).state_dict()
        layouts = {
            "openai_layout": list(plain), "openai_layout_module_prefix": [f"module.{name}" for name in plain],
            "upstream_layout": [their_name(name) for name in plain],
            "upstream_layout_ddp": [their_name(name).replace(".", ".module.", 1) for name in plain],
        }  # fmt: skip
        found = {}
        for layout, keys in layouts.items():
            numbers = up.model.convert_to_new_checkpoint({key: i for i, key in enumerate(keys)})
            found[layout] = {keys[i]: name for name, i in numbers.items()}
        return found


# ------------------------------------------------------------------------------------------------------------- masks


def their_l0(up, config: list[int], kinds: list[str], start=0.0, target=0.6, warmup=7):
    """Their masks of a tower of (width, neurons, heads, layers)."""
    names = "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
    sizes = SimpleNamespace(**dict(zip(names, config, strict=True)))
    types = [kind for kind in kinds if kind not in ("ffn", "mha")] + ["layer"] * ("ffn" in kinds)
    return up.l0module.L0Module(sizes, start, target, warmup, pruning_type=types)


class Gates(Part):
    files = {"hard_concrete": {}}
    functions = " ".join(f"tinyclip.masks.{name}" for name in ("hard_concrete", "hard_concrete_cdf", "eval_gate"))
    gradients = "dz_w", "dscore"
    authors = "open_clip/l0module.py:230"
    tolerances = {"expected_num_zeros": (0, 1e-5), "limits": (1e-6, 0), "*": (0, 1e-6)}
    points = 0.0, 0.25, 0.5, 0.9

    def inputs(self):
        edges = torch.tensor([-20.0, -5, -1, 0, 1, 5, 20]).repeat_interleave(5)
        x = {f"w{i}": torch.randn(28) for i in range(4)}
        x |= {"loga": 3 * torch.randn(28), "u": torch.rand(4, 28), "edge_loga": edges}
        return x | {"edge_u": torch.tensor([1e-6, 0.01, 0.5, 0.99, 1 - 1e-6]).repeat(7)}

    def run(self, side, case):
        rows, grads = [], []
        for i, u in enumerate(case["u"]):
            loga = leaf(case["loga"])
            rows.append(side.sample(loga, u))
            grads.append(torch.autograd.grad((rows[-1] * case[f"w{i}"]).sum(), loga)[0])
        loga = leaf(case["loga"])
        score = side.score(loga)
        found = {"limits": side.limits, "z": torch.stack(rows), "dz_w": torch.stack(grads), "score": score}
        found |= {"dscore": torch.autograd.grad(score.sum(), loga)[0]}
        found |= {"edge_z": side.sample(case["edge_loga"], case["edge_u"])}
        found |= {f"cdf_at_{x}": side.cdf(x, case["loga"]) for x in self.points}
        found |= {"det_mask": side.gate(case["loga"], True), "det_soft": side.gate(case["loga"], False)}
        return found | {"expected_num_zeros": len(score) - score.sum()}

    our = SimpleNamespace(
        limits=[masks.GAMMA, masks.ZETA, masks.EPSILON, masks.BETA, masks.MAGIC],
        sample=masks.hard_concrete,
        score=masks.L0Mask.open_prob,
        cdf=masks.hard_concrete_cdf,
        gate=lambda loga, soft: masks.eval_gate(loga[None], soft)[0],
    )

    def their(self, up):
        l0 = their_l0(up, [24, 96, 3, 2], ["hidden"])

        def sample(loga, u):
            with drawn(u):
                return l0._sample_z(loga)

        return SimpleNamespace(
            limits=[l0.limit_a, l0.limit_b, l0.epsilon, l0.temperature, l0.magical_number], sample=sample,
            score=l0.score_loga, cdf=l0.cdf_qz, gate=lambda loga, soft: l0._deterministic_z(len(loga), loga, soft),
        )  # fmt: skip


def gate_inputs(config: list[int], kinds: list[str]) -> dict[str, Tensor]:
    """Random gates by kind."""
    width, neurons, heads, layers = config
    shapes = {"hidden": (width,), "heads": (layers, heads), "intermediate": (layers, neurons)}
    return {kind: torch.randn(shapes.get(kind, (layers,))) * 2 + 1 for kind in kinds}


def set_gates(l0: torch.nn.Module, case: Case, prefix: str):
    """Give their masks or ours the gates and multipliers of a case."""
    for name in [name for name in case if name.startswith(f"{prefix}/loga/")]:
        kind = name.removeprefix(f"{prefix}/loga/")
        getattr(l0, f"{kind}_loga").data.copy_(torch.as_tensor(case[name]))
    l0.lambda_1.data, l0.lambda_2.data = case[f"{prefix}/lambda"].clone()
    return l0


class SparsityOfATower(Part):
    files = {"l0_module": {}}
    functions = "tinyclip.masks.L0Mask tinyclip.masks.sparsity_loss tinyclip.masks.target_sparsity"
    authors = "open_clip/l0module.py:209"
    tolerances = {
        "*/loss_expected_target": (0, 5e-6), "*/expected_params*": (1e-6, 0), "*/prunable": (0, 0), "*": (0, 1e-6),
    }  # fmt: skip

    def inputs(self):
        found = {}
        for v, config, count in (
            ("upstream_types", [24, 96, 3, 2], 3), ("near_full", [16, 64, 2, 2], 3), ("with_layer", [24, 96, 3, 3], 5),
        ):  # fmt: skip
            kinds = list(masks.KINDS[:count])
            loga = gate_inputs(config, kinds)
            x = {"config": torch.tensor(config), "types": torch.arange(count), "lambda": torch.tensor([10.0, 8.0])}
            x |= prefixed("loga/", {k: z + 4 * (v == "near_full") for k, z in loga.items()})
            x |= prefixed("u/", {k: 0.01 + 0.98 * torch.rand(z.shape) for k, z in loga.items()})
            x |= {"steps": torch.tensor([0, 1, 2, 3, 5, 8, 9, 10, 20])}
            found |= prefixed(f"{v}/", x | {"start_target_warmup": torch.tensor([0.25, 0.5, 10.0])})
        return found

    def of_variants(self, function, case):
        found = {}
        for v in variants(case):
            kinds = [masks.KINDS[number] for number in case[f"{v}/types"].tolist()]
            start, target, warmup = case[f"{v}/start_target_warmup"].tolist()
            values = function(case, v, case[f"{v}/config"].tolist(), kinds, start, target, int(warmup))
            found |= prefixed(f"{v}/", values)
        return found

    def steps(self, l0, case, v, loss) -> dict:
        """Values of the sparsity loss at steps, with gradients; loss(step) -> (loss, expected, target)."""
        rows, grads = [], defaultdict(list)
        for step in case[f"{v}/steps"].tolist():
            l0.zero_grad()
            row = loss(step)
            row[0].backward()
            rows.append([torch.as_tensor(x).item() for x in row])
            for name, parameter in l0.named_parameters():
                grads[f"grad/{name.removesuffix('_loga')}"].append(parameter.grad.clone())
        found = {"loss_expected_target": rows, "target_at_step": [row[2] for row in rows]}
        return found | {name: torch.stack(each) for name, each in grads.items()}

    def ours(self, case):
        def values(case, v, config, kinds, start, target, warmup):
            mask = masks.L0Mask(*config, kinds)
            assert kinds == list(mask.types)
            found = {f"init/{kind}": getattr(mask, f"{kind}_loga").clone() for kind in kinds}
            set_gates(mask, case, v)
            found |= {"prunable": mask.prunable_params, "params_per_head": mask.params_per_head}
            found |= {"params_per_intermediate": mask.params_per_mlp // mask.intermediate}
            found |= {"expected_params": mask.expected_params()}
            found |= {"expected_params_no_hidden_term": mask.expected_params(hidden=False)}

            def loss(step):
                goal = masks.target_sparsity(step, start, target, warmup)
                return *masks.sparsity_loss([mask], goal), goal

            found |= self.steps(mask, case, v, loss)
            uniforms = {kind: case[f"{v}/u/{kind}"] for kind in kinds}
            made = {"eval_mask": mask.eval_masks(), "eval_soft": mask.eval_masks(soft=False)}
            made |= {"train_mask": mask.sample(uniforms)}
            for way, gates in made.items():
                for kind, z in gates.items():
                    name = f"{way}/{kind}_z"
                    found[name] = z.reshape(dict.__getitem__(case, f"{v}/{name}").shape)
            mask.clamp_()
            return found | {f"constrained/{kind}": loga for kind, loga in mask.logas().items()}

        return self.of_variants(values, case)

    def theirs(self, up, case):
        def values(case, v, config, kinds, start, target, warmup):
            l0 = their_l0(up, config, kinds, start, target, warmup)
            found = {f"init/{kind}": getattr(l0, f"{kind}_loga").detach().clone() for kind in kinds}
            set_gates(l0, case, v)
            found |= {"prunable": l0.prunable_model_size, "params_per_head": l0.params_per_head}
            found |= {"params_per_intermediate": l0.params_per_intermediate_dim}
            found |= {"expected_params": l0.get_num_parameters_and_constraint("hidden" in l0.types)}
            found |= {"expected_params_no_hidden_term": l0.get_num_parameters_and_constraint(False)}
            found |= self.steps(l0, case, v, l0.lagrangian_regularization)
            with drawn(*(case[f"{v}/u/{kind}"] for kind in l0.types)):
                found |= prefixed("train_mask/", l0.train()())
            found |= prefixed("eval_mask/", l0.eval()()) | prefixed("eval_soft/", l0(soft=False))
            l0.constrain_parameters()
            return found | {f"constrained/{kind}": getattr(l0, f"{kind}_loga") for kind in kinds}

        return self.of_variants(values, case)


class SparsityOfBoth(Part):
    files = {"joint_lagrangian": {}}
    functions = "tinyclip.masks.sparsity_loss tinyclip.masks.target_sparsity"
    authors = "training/train.py:260"
    atol = 1e-5
    kinds = list(masks.KINDS[:3])

    def inputs(self):
        found = {}
        for v, step in (("active", 6), ("inactive", 0)):
            found[f"{v}/step"] = step
            for tower, config in (("image", [32, 128, 4, 2]), ("text", [24, 96, 3, 2])):
                x = {"config": torch.tensor(config), "lambda": torch.tensor([10.0, 9.0])}
                x |= {"start_target_warmup": torch.tensor([0.0 if v == "inactive" else 0.25, 0.5, 10.0])}
                found |= prefixed(f"{v}/{tower}/", x | prefixed("loga/", gate_inputs(config, self.kinds)))
        return found

    def run(self, function, case):
        """function(towers' (config, kinds, start, target, warmup), step, set) -> masks, expected, target, loss."""
        found = {}
        for v in variants(case):
            options = []
            for tower in TOWERS:
                start, target, warmup = case[f"{v}/{tower}/start_target_warmup"].tolist()
                options.append((case[f"{v}/{tower}/config"].tolist(), self.kinds, start, target, int(warmup)))
            prefixes = [f"{v}/{tower}" for tower in TOWERS]
            fill = lambda both, prefixes=prefixes: [set_gates(each, case, p) for each, p in zip(both, prefixes)]  # noqa: B905, E731
            both, expected, target, loss = function(options, case[f"{v}/step"], fill)
            loss.backward()
            found |= {f"{v}/expected": expected, f"{v}/target": target, f"{v}/loss": loss}
            for prefix, l0 in zip(prefixes, both, strict=True):
                grads = {name.removesuffix("_loga"): p.grad for name, p in l0.named_parameters()}
                found |= prefixed(f"{prefix}/grad/", grads)
        return found

    def our(self, options, step, fill):
        both = fill([masks.L0Mask(*config, kinds) for config, kinds, *_ in options])
        target = sum(masks.target_sparsity(step, *of_tower) for _, _, *of_tower in options) / 2
        loss, expected = masks.sparsity_loss(both, target)
        return both, expected, target, loss

    def their(self, up):
        def function(options, step, fill):
            image, text = fill([their_l0(up, *each) for each in options])
            towers = {
                f"{n}_encoder_without_ddp": SimpleNamespace(l0_module=x) for n, x in (("image", image), ("text", text))
            }
            scope = run_block(
                up.train, "total_loss_flag and use_image_mask and use_text_mask", model=SimpleNamespace(**towers),
                step=step, loss=torch.zeros(()), metrics=defaultdict(up.train.AverageMeter),
            )  # fmt: skip
            return (image, text), scope["expected_sparsity"], scope["target_sparsity"], scope["loss"]

        return function


class MaskedClip(Part):
    files = {"masked_clip": {}}
    functions = "tinyclip.model.Attention tinyclip.model.LayerNorm tinyclip.masks.prune"
    authors = "open_clip/model.py:40"
    tolerances = {"train/grad/*": (0, 2e-5), "pruned/param/*": (0, 0), "*": (0, 1e-5)}

    def inputs(self):
        images, tokens = inputs(3)
        x = {"image": images, "text": tokens, **weights("param/", masked=True)}
        for tower, cfg in (("image", VISION), ("text", TEXT)):
            config = [cfg["width"], 4 * cfg["width"], cfg["width"] // 8, cfg["layers"]]
            for kind, z in gate_inputs(config, list(masks.KINDS[:3])).items():
                x[f"train/u_{tower}_{kind}"] = 0.01 + 0.98 * torch.rand(z.shape)
            x[f"train/w_{tower}"] = torch.randn(3, EMBED)
        return x

    def masked_loss(self, image, text, case):
        return (image * case["train/w_image"]).sum() + (text * case["train/w_text"]).sum()

    def ours(self, case):
        state, found = geometry.convert_state_dict(case.group("param/")), {}
        clip = clip_of(state)
        gates = masks_of(state, clip)
        uniforms = {
            tower: {kind: case[f"train/u_{tower}_{kind}"] for kind in mask.types}
            for tower, mask in zip(TOWERS, gates, strict=True)
        }
        for tower, mask in zip(TOWERS, gates, strict=True):
            for way, z in (("eval", mask.eval_masks()), ("train", mask.sample(uniforms[tower]))):
                names = {f"{way}/{tower}_{kind}_z": value for kind, value in z.items()}
                found |= {name: value.reshape(dict.__getitem__(case, name).shape) for name, value in names.items()}
        eval_masks = [mask.eval_masks() for mask in gates]
        with torch.no_grad():
            found["eval/image_features"] = clip.encode_image(case["image"], eval_masks[0])
            found["eval/text_features"] = clip.encode_text(case["text"], eval_masks[1])
        student = model.Student(clip, *gates).train()
        image, text, _ = student(case["image"], case["text"], uniforms)
        found |= {"train/image_features_norm": image, "train/text_features_norm": text}
        self.masked_loss(image, text, case).backward()
        for name, p in student.named_parameters():
            found[f"train/grad/{their_name(name)}"] = torch.zeros_like(p) if p.grad is None else p.grad
        small, exact = masks.prune(clip, *eval_masks), masks.prune(clip, *eval_masks, exact=True)
        with torch.no_grad():
            found["pruned/image_features"] = small.encode_image(case["image"])
            found["pruned/text_features"] = small.encode_text(case["text"])
            for name, of_exact in (("image", exact.encode_image), ("text", exact.encode_text)):
                torch.testing.assert_close(of_exact(case[name]), found[f"eval/{name}_features"], rtol=0, atol=1e-5)
        found |= in_their_names("pruned/param/", small.state_dict())
        for tower, name in (("vision", "image"), ("text", "text")):
            for key, kept in (("heads", "heads"), ("mlp_width", "ffn")):
                found[f"pruned/{name}_{kept}"] = small.geometry[tower][key]
        return found

    def theirs(self, up, case):
        network, found = theirs_of(up, case.group("param/")), {}
        encoders = network.image_encoder_without_ddp, network.text_encoder_without_ddp
        with torch.no_grad():
            found["eval/image_features"] = network.eval().encode_image(case["image"])
            found["eval/text_features"] = network.encode_text(case["text"])
        draws = [
            [case[f"train/u_{t}_{kind}"] for kind in e.l0_module.types] for t, e in zip(TOWERS, encoders, strict=True)
        ]
        for tower, encoder, u in zip(TOWERS, encoders, draws, strict=True):
            found |= prefixed(f"eval/{tower}_", encoder.l0_module.eval()())
            with drawn(*u):
                found |= prefixed(f"train/{tower}_", encoder.l0_module.train()())
        full = copy.deepcopy(network)
        with drawn(*draws[0], *draws[1]):
            image, text, _ = network.train()(case["image"], case["text"])
        found |= {"train/image_features_norm": image, "train/text_features_norm": text}
        self.masked_loss(image, text, case).backward()
        for name, p in network.named_parameters():
            found[f"train/grad/{name}"] = torch.zeros_like(p) if p.grad is None else p.grad
        pruned = up.model.prune_model(full.eval())
        with torch.no_grad():
            found["pruned/image_features"] = pruned.encode_image(case["image"])
            found["pruned/text_features"] = pruned.encode_text(case["text"])
        state = in_their_names("", geometry.convert_state_dict(pruned.state_dict()))
        found |= prefixed("pruned/param/", {name: x.clone() for name, x in state.items()})
        for tower in TOWERS:
            of_tower = {name: len(x) for name, x in state.items() if name.startswith(f"_{tower}_")}
            found[f"pruned/{tower}_heads"] = [n // 24 for name, n in of_tower.items() if name.endswith("in_proj_bias")]
            found[f"pruned/{tower}_ffn"] = [n for name, n in of_tower.items() if name.endswith("c_fc.bias")]
        return found


class ReloadPruned(Part):
    """A pruned network becomes a masked one of the full size again, which is pruned once more."""

    files = {"reload_pruned": {}}
    functions = "tinyclip.masks.expand_pruned"
    authors = "open_clip/model.py:1300"
    tolerances = {"full/*": (0, 0), "repruned_shape/*": (0, 0), "*": (0, 1e-4)}

    def inputs(self):
        images, tokens = inputs(3)
        student = perturbed(made_student(EMBED, VISION, TEXT, masked=True)).eval()
        return {"image": images, "text": tokens, **in_their_names("pruned/", student.pruned().clip.state_dict())}

    def values(self, full, encoded, small, state):
        found = {f"full_features_{tower}": x for tower, x in zip(TOWERS, encoded, strict=True)} | prefixed(
            "full/", full
        )
        found |= {f"repruned_features_{tower}": x for tower, x in zip(TOWERS, small, strict=True)}
        return found | {f"repruned_shape/{name}": list(x.shape) or [] for name, x in state.items()}

    def ours(self, case):
        pruned, full = (geometry.convert_state_dict(case.group(f"{name}/")) for name in ("pruned", "full"))
        clip = model.CLIP(**geometry.geometry_of_weights(only_weights(full), head_widths(full)))
        gates = masks_of(full, clip)
        for parameter in [parameter for mask in gates for parameter in mask.parameters()]:
            parameter.data.fill_(10.0)
        masks.expand_pruned(clip, *gates, pruned)
        eval_masks = [mask.eval_masks() for mask in gates]
        small = masks.prune(clip, *eval_masks)
        with torch.no_grad():
            encoded = clip.encode_image(case["image"], eval_masks[0]), clip.encode_text(case["text"], eval_masks[1])
            again = small.encode_image(case["image"]), small.encode_text(case["text"])
        state = in_their_names("", model.Student(clip, *gates).state_dict())
        return self.values(state, encoded, again, in_their_names("", small.state_dict()))

    def theirs(self, up, case):
        network = their_clip(up, EMBED, VISION, TEXT, masked=True).eval()
        up.model.load_pruned_model(network, case.group("pruned/"))
        full = {name: x.clone() for name, x in network.state_dict().items()}
        with torch.no_grad():
            encoded = network.encode_image(case["image"]), network.encode_text(case["text"])
            small = up.model.prune_model(network)
            again = small.encode_image(case["image"]), small.encode_text(case["text"])
        state = in_their_names("", geometry.convert_state_dict(small.state_dict()))
        return self.values(full, encoded, again, state)


# ---------------------------------------------------------------------------------------------------------- training


class Scaler:
    """A gradient scaler that scales by 1, with the interface that their loop uses."""

    def __init__(self):
        self._per_optimizer_states = {}

    def scale(self, loss):
        return loss

    def unscale_(self, optimizer):
        self._per_optimizer_states[id(optimizer)] = {"found_inf_per_device": {}}

    def step(self, optimizer):
        optimizer.step()

    def update(self):
        pass

    def state_dict(self):
        return {"scale": 1.0}


class Enough(Exception):
    """Raised to end their epoch before its last batch, after which it would evaluate."""


class Loader:
    """Batches in memory with the interface of their loader."""

    def __init__(self, batches, num_batches=100):
        self.batches, self.num_batches, self.batch_size = batches, num_batches, len(batches[0][0])
        self.num_samples = self.num_batches * self.batch_size

    def __iter__(self):
        yield from self.batches
        yield self.batches[0]  # their loop reads one batch ahead
        raise Enough


def their_args(stage: Config) -> SimpleNamespace:
    return SimpleNamespace(
        device="cpu", precision="fp32", image_precision="fp32", text_precision="fp32", logit_precision="fp32",
        distillation=True, local_loss=True, gather_with_grad=True, rank=0, world_size=1, local_rank=0, horovod=False,
        distributed=False, epochs=1, distillation_alpha=stage.alpha, distillation_weight=stage.weight,
        lock_image=False, lock_text=False, prune_step=stage.prune_step, prune_image=stage.masks, prune_text=stage.masks,
        logit_scale=stage.logit_scale, use_teacher_image=False, use_teacher_text=False, total_loss_flag=True,
        save_logs=False, wandb=False, norm_gradient_clip=stage.max_grad_norm, wd=stage.weight_decay, lr=stage.lr,
        beta1=stage.beta1, beta2=stage.beta2, eps=stage.eps, l0lr=stage.lambda_lr,
    )  # fmt: skip


def their_trainer(up, theirs, teacher, stage: Config, **flags):
    """(function that runs their train_one_epoch over batches, {(name, step): logged value})."""
    if not theirs.used_ddp:
        theirs.ddpify(up.model.FakeDDP)
    theirs.teacher = [teacher.eval().requires_grad_(False)]
    args, logged = SimpleNamespace(**vars(their_args(stage)) | flags), {}
    for tower in (theirs.image_encoder_without_ddp, theirs.text_encoder_without_ddp) if stage.masks else ():
        tower.l0_module.start_sparsity, tower.l0_module.target_sparsity = stage.start_sparsity, stage.target_sparsity
        tower.l0_module.lagrangian_warmup = stage.sparsity_warmup
    optimizer = up.optimizer.build_optimizer(args, theirs)
    scheduler_l0 = up.scheduler.step_lr(optimizer[-1], stage.prune_step) if stage.masks else None
    warmup = stage.prune_step if stage.masks else stage.warmup
    scheduler = up.scheduler.cosine_lr(optimizer[:3], stage.lr, warmup, stage.steps)
    writer = SimpleNamespace(add_scalar=lambda name, value, step: logged.update({(name, step): float(value)}))

    def one_pass(batches, epoch=0):
        loader = Loader(batches, stage.steps)
        data = {"train": SimpleNamespace(dataloader=loader, sampler=None, set_epoch=lambda _: None)}
        with on_cpu(up), contextlib.suppress(Enough):
            up.train.train_one_epoch(theirs, data, epoch, optimizer, Scaler(), scheduler, scheduler_l0, args, writer)

    return one_pass, logged


def our_stage(student, teacher, batches, stage: Config):
    """(student after a stage of our steps, what each step logs)."""
    optimizers, rows = train.make_optimizers(student.train(), stage), []
    scaler, teacher = torch.amp.GradScaler("cpu", enabled=False), teacher.eval().requires_grad_(False)
    for step, batch in enumerate(batches):
        if student.masks and step == stage.prune_step:
            student = student.pruned()
            optimizers = train.make_optimizers(student, stage)
        features = train.teacher_forward(teacher, *batch, stage)
        rows.append(train.train_step(student, features, *batch, step, optimizers, scaler, stage))
    return student, rows


class LearningRates(Part):
    files = {"lr_schedules": {}}
    functions = "tinyclip.train.learning_rate"
    authors = "training/scheduler.py:17"
    tolerances = {"*": (1e-6, 1e-12)}

    def inputs(self):
        rows = {"a": [1e-4, 5, 40], "b": [5e-4, 3, 17]}
        return {f"cosine/{v}/base_warmup_total": torch.tensor(row) for v, row in rows.items()}

    def run(self, function, case):
        found = {}
        for v in ("a", "b"):
            base, warmup, total = case[f"cosine/{v}/base_warmup_total"].tolist()
            for kind, rates in function(v, base, int(warmup), int(total), case).items():
                found[f"{kind}/{v}/lr"] = rates
        return found

    def our(self, v, base, warmup, total, case):
        plain = Config(lr=base, warmup=warmup, steps=total)
        masked = Config(lr=base, warmup=1, steps=total, masks=True, prune_step=warmup)
        # before the masks are cut out theirs has a constant, and afterwards ours has no masks
        first, last = (case[f"{kind}/{v}/lr"] for kind in ("after_prune", "mask_lr"))
        after = [train.learning_rate(masked, step) for step in range(warmup, total)]
        gates = torch.cat([torch.full((warmup,), plain.mask_lr), torch.as_tensor(last)[warmup:]])
        rates = {"cosine": [train.learning_rate(plain, step) for step in range(total)]}
        return rates | {"after_prune": [*torch.as_tensor(first)[:warmup].tolist(), *after], "mask_lr": gates}

    def their(self, up):
        def function(v, base, warmup, total, case):
            optimizer = SimpleNamespace(param_groups=[{"lr": 0.02}])
            fixed, gates = up.scheduler.step_lr(optimizer, warmup), []
            for step in range(total):
                fixed(step)
                gates.append(float(optimizer.param_groups[0]["lr"]))
            plain = up.scheduler.cosine_lr(optimizer, base, warmup, total)
            after = up.scheduler.cosine_lr_start_nowarmup(optimizer, base, total, warmup)
            rates = {"cosine": plain, "after_prune": after}
            return {"mask_lr": gates} | {k: [float(each(s)) for s in range(total)] for k, each in rates.items()}

        return function


class OptimizerGroups(Part):
    """Optimizer (0 image, 1 text, 2 both, 3 gates) and its settings of each parameter."""

    files = {"optimizer_groups": {}}
    functions = "tinyclip.train.parameter_groups tinyclip.train.mask_parameter_groups"
    authors = "training/optimizer.py:22"
    rtol = 1e-6
    json = True

    def inputs(self):
        return {}

    def settings(self, names: dict[int, str], optimizers) -> dict[str, dict]:
        found = {}
        for number, optimizer in enumerate(optimizers):
            for group in optimizer.param_groups:
                values = {"betas_eps": [*group["betas"], group["eps"]], "lr": group["lr"], "optimizer": number}
                values |= {"weight_decay": group["weight_decay"]}
                found |= {names[id(parameter)]: values for parameter in group["params"]}
        return found

    def ours(self, case):
        found = {}
        for name in case:
            groups = case[name]
            numbers = re.findall(r"_text_encoder\.transformer\.resblocks\.(\d+)\.ln_1\.bias", " ".join(groups))
            text = {**TEXT, "layers": len(numbers)}
            numbers = re.findall(r"visual\.transformer\.resblocks\.(\d+)\.ln_1\.bias", " ".join(groups))
            student = made_student(EMBED, {**VISION, "layers": len(numbers)}, text, masked="masked" in name)
            optimizers = train.make_optimizers(student, Config())
            names = {id(parameter): their_name(each) for each, parameter in student.named_parameters()}
            values = self.settings(names, [optimizers.weights])
            for each in values:  # one optimizer of ours is three of theirs
                values[each] = values[each] | {"optimizer": groups[each]["optimizer"]}
                assert groups[each]["optimizer"] != 3
            if optimizers.masks is not None:
                of_masks = self.settings(names, [optimizers.masks])
                values |= {each: row | {"optimizer": 3} for each, row in of_masks.items()}
            found[name] = values
        return found

    def theirs(self, up, case):
        found = {}
        for name, masked in (("vit", False), ("vit_masked", True)):
            network = their_clip(up, EMBED, VISION, TEXT, masked=masked)
            stage = Config()
            stage.masks = masked
            names = {id(parameter): each for each, parameter in network.named_parameters()}
            found[name] = self.settings(names, up.optimizer.build_optimizer(their_args(stage), network))
        return found


# -------------------------------------------------------------------------------------------- pictures and evaluation


class WholeImage(Part):
    files = {"preprocess_val": {}}
    functions = "tinyclip.train.image_transform"
    authors = "open_clip/transform.py:71"
    atol = 1e-5

    def inputs(self):
        def pixels(height, width):
            return np.random.randint(0, 256, (height, width, 3))

        return {"0/image_hwc_uint8": pixels(40, 60), "1/image_hwc_uint8": pixels(57, 33), "resolution": 32}

    def run(self, made, case):
        found, transform = {}, made(case["resolution"])
        for name in [name for name in case if name.endswith("image_hwc_uint8")]:
            image = Image.fromarray(case[name].numpy().astype(np.uint8))
            found[name.replace("image_hwc_uint8", "out")] = transform(image)
        return found

    our = staticmethod(train.image_transform)

    def their(self, up):
        return functools.partial(up.transform.image_transform, is_train=False)


class Tokenizer(Part):
    """open_clip's tokenizer, which train.py's `main` uses: no function of ours."""

    files = {"tokenizer": {}}
    authors = "open_clip/tokenizer.py:159"

    def inputs(self):
        texts = ["A Photo of a  cat", "it&amp;s", "caf\u00e9", "word " * 100, "", "3 & 12"]
        return {"json": texts, "context_length": 77}

    def ours(self, case):
        if case.path.suffix == ".json":  # texts of the .npz
            return {}
        texts = case.json or Case(case.path.with_name("tokenizer_texts.json")).json
        return {"tokens": open_clip.SimpleTokenizer(context_length=case["context_length"])(texts)}

    def theirs(self, up, case):
        return {"tokens": up.tokenizer.tokenize(case.json, case["context_length"])}


class ZeroShot(Part):
    files = {"zero_shot": {}}
    functions = "shared.zeroshot.build_classifier shared.zeroshot.classification_metrics"
    authors = "training/zero_shot.py:29"
    tolerances = {"logits": (0, 1e-4), "*": (0, 1e-5)}

    def inputs(self):
        x = {"text_features": torch.randn(12, 7, 16) + torch.randn(12, 1, 16), "target": torch.randint(0, 12, (64,))}
        images = x["text_features"].mean(1)[x["target"]] + torch.randn(64, 16)
        return x | {"image_features_norm": F.normalize(images, dim=-1), "k": torch.tensor([1, 5])}

    def ours(self, case):
        """The text of class c in template t is "c t"."""
        prompts = case["text_features"]
        names, templates = [str(c) for c in range(len(prompts))], [f"{{c}} {t}" for t in range(prompts.shape[1])]

        def tokenizer(texts):
            return torch.tensor([[int(number) for number in text.split()] for text in texts])

        def encode_text(rows):
            return prompts[rows[:, 0], rows[:, 1]]

        classifier = zeroshot.build_classifier(encode_text, tokenizer, names, templates)
        logits = 100 * case["image_features_norm"] @ classifier
        found = zeroshot.classification_metrics(logits, case["target"])
        top1, topk = (found[f"top{k}"] / 100 for k in case["k"].tolist())
        return {"classifier": classifier, "logits": logits, "top1": top1, "topk": topk}

    def theirs(self, up, case):
        """Their functions with a table in place of the text tower: the text of a class is its number."""
        prompts, module = case["text_features"], up.zero_shot
        encoder = SimpleNamespace(encode_text=lambda texts: prompts[int(texts[0])])
        classes, templates = [str(c) for c in range(len(prompts))], ["{}"] * prompts.shape[1]
        with (
            mock.patch.object(module, "tokenize", lambda texts: SimpleNamespace(cuda=lambda **_: texts)),
            mock.patch.object(module, "unwrap_model", lambda network: network),
            mock.patch.object(module, "float", lambda x: float(np.asarray(x).item()), create=True),
        ):
            args = SimpleNamespace(rank=0, world_size=1)
            classifier = module.zero_shot_classifier(encoder, classes, templates, args)
            logits = 100 * case["image_features_norm"] @ classifier
            hits = module.accuracy(logits, case["target"], case["k"].tolist())
        top1, topk = (each / len(logits) for each in hits)
        return {"classifier": classifier, "logits": logits, "top1": top1, "topk": topk}


class Retrieval(Part):
    """Ranks from 1 and recalls from 0 to 1 of one caption an image."""

    files = {"retrieval_metrics": {}}
    functions = "shared.zeroshot.retrieval_metrics"
    authors = "training/train.py:754"
    atol = 1e-5

    def inputs(self):
        image, noise = unit(40, 16), torch.randn(2, 40, 16)
        found = {"easy/image": image, "easy/text": F.normalize(image + 0.2 * noise[0], dim=-1)}
        return found | {"hard/image": unit(40, 16), "hard/text": F.normalize(image + 2 * noise[1], dim=-1)}

    def run(self, function, case):
        found = {}
        for v in variants(case):
            found |= prefixed(f"{v}/", function(case[f"{v}/image"], case[f"{v}/text"]))
        return found

    def our(self, image, text):
        found, ranks = {}, zeroshot.retrieval_ranks(image, text, torch.arange(len(image)))
        recalls = zeroshot.retrieval_metrics(image, text, torch.arange(len(image)))
        for way, rank in zip(("image_to_text", "text_to_image"), ranks, strict=True):
            found[f"{way}_mean_rank"] = rank.double().mean() + 1
            found[f"{way}_median_rank"] = rank.double().quantile(0.5).floor() + 1
            found |= {f"{way}_R@{k}": recalls[f"{way}_R@{k}"] / 100 for k in (1, 5, 10)}
        return found

    def their(self, up):
        return lambda image, text: up.train.get_metrics(image, text, torch.tensor(100.0))
