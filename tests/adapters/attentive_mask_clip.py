"""A-CLIP's parts, ours and those of microsoft/A-CLIP@0e51942, on the CPU in fp32.

SLIP's are compared if a clone of facebookresearch/SLIP@c6faf5d is at $SLIP or is the folder SLIP beside A-CLIP's.
The installed timm replaces the authors' 0.5.4: blocks get its attributes and its unfused attention.
"""

import contextlib
import functools
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import Tensor

from attentive_mask_clip import crops, model, train
from attentive_mask_clip import eval as evaluation
from shared.clip import RememberingTokenizer
from shared.zeroshot import label_ranks
from tests.adapters import Case, Part, gradients, leaf, prefixed
from tests.parity import check_commit, import_beside, run_line

CLONE = "microsoft/A-CLIP", "0e51942", "docs/aclip.png"
GRID = 14  # a constant in their code
VIT = dict(img_size=28, patch_size=2, embed_dim=24, depth=3, num_heads=3, num_classes=0)
TEXT = dict(context_length=10, vocab_size=60, transformer_width=16, transformer_heads=2, transformer_layers=2)
HEADS = dict(num_heads=3, patch_size=2, text_heads=2)  # what shapes of weights do not say, and a check
JOINT, HIDDEN, OUT = 12, 20, 8
TRAIN = dict(wd=0.5, lr=5e-4, betas=(0.9, 0.98), eps=1e-8, update_freq=1, disable_amp=True, gpu=None, batch_size=4,
             print_freq=1000, wandb=False)  # fmt: skip
EMA = "visual_ema.", "transformer_e.", "im_proj_byol_e.", "image_projection_e", "text_projection_e"


# ----------------------------------------------------------------------------------------------------- their modules


@functools.cache
def load(path: str | Path) -> SimpleNamespace:
    """The authors' modules from a clone, with stand-ins for what is missing or no longer installs."""
    root, stubs = Path(path).resolve(), {"data": ModuleType("data")}
    stubs["data"].GaussianBlur = stubs["data"].Solarize = None  # their data.py is not in the release
    names = ["models", "losses", "utils", "datasets", "tokenizer", "main", "main_linear", "eval_zeroshot"]
    gone = {"torchvision.transforms.functional_tensor": torchvision.transforms._functional_tensor}
    with mock.patch.dict(sys.modules, gone):
        modules = import_beside(root, names, stubs)
    return SimpleNamespace(**modules, root=root)


@functools.cache
def load_slip(path: Path) -> SimpleNamespace:
    check_commit(path, "c6faf5d")
    return SimpleNamespace(**import_beside(path.resolve(), ["models", "losses", "utils"], {}), root=path.resolve())


def slip_of(up) -> SimpleNamespace:
    """SLIP's modules; without its clone the test is skipped."""
    path = Path(os.environ.get("SLIP", up.root.parent / "SLIP"))
    if not (path / "models.py").is_file():
        pytest.skip("needs a clone of facebookresearch/SLIP at c6faf5d, beside the other or at $SLIP")
    return load_slip(path)


@contextlib.contextmanager
def on_cpu():
    """Let `.cuda()` and CUDA's autocast do nothing while their functions run."""
    with (
        mock.patch.object(torch.Tensor, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.nn.Module, "cuda", lambda self, *_, **__: self),
        mock.patch.object(torch.cuda.amp, "autocast", lambda **_: contextlib.nullcontext()),
    ):
        yield


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    with on_cpu(), contextlib.redirect_stdout(None):
        yield load(path)


@contextlib.contextmanager
def results_of(owner, name: str) -> Iterator[list]:
    """The list of what a function of a module, class or object has returned."""
    found, function = [], getattr(owner, name)

    def noted(*arguments, **options):
        found.append(function(*arguments, **options))
        return found[-1]

    with mock.patch.object(owner, name, noted):
        yield found


# ------------------------------------------------------------------------------------------------------ small models


def perturbed(module: torch.nn.Module, noise: float = 0.05) -> torch.nn.Module:
    """Add noise to all parameters, so that none is at a special value such as 0 or 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim:
                parameter += noise * torch.randn_like(parameter)
    return module


def their_vit(up, mask_ratio: float = 0.0, **sizes) -> torch.nn.Module:
    """Their masked ViT on today's timm, with the attributes that blocks had in timm 0.5.4."""
    vit = up.models.MaskVisionTransformer(mask_ratio=mask_ratio, **{**VIT, **sizes})
    vit.head_dist = None
    for block in vit.blocks:
        block.drop_path, block.attn.fused_attn = torch.nn.Identity(), False
    return vit


def our_vit(sizes: dict) -> model.MaskedViT:
    return model.MaskedViT(*(sizes[name] for name in ("img_size", "patch_size", "embed_dim", "depth", "num_heads")))


def their_aclip(up, mask_ratio: float, vit: dict, text: dict, joint: int, hidden: int, out: int) -> torch.nn.Module:
    """Their model, with other widths of the SSL heads, which are constants in their code."""

    class ACLIP(up.models.ACLIP):
        def _build_mlp(self, in_dim, mlp_dim, out_dim):
            return super()._build_mlp(in_dim, hidden, out)

        def _build_mlp_byol(self, num_layers, input_dim, mlp_dim, output_dim, last_bn=True):
            return super()._build_mlp_byol(num_layers, out if input_dim == 256 else input_dim, hidden, out, last_bn)

    vision, ema = their_vit(up, mask_ratio, **vit), their_vit(up, **vit)
    return ACLIP(embed_dim=joint, vision_width=vit["embed_dim"], vision_model=vision, vision_model_ema=ema, **text)


def their_slip(up, vit: dict, text: dict, joint: int, hidden: int, out: int) -> torch.nn.Module:
    with mock.patch.object(torch.nn, "SyncBatchNorm", torch.nn.BatchNorm1d):  # SyncBatchNorm needs a GPU
        vision = timm.models.VisionTransformer(**vit)
        sizes = dict(embed_dim=joint, vision_width=vit["embed_dim"], vision_model=vision, **text)
        return slip_of(up).models.SLIP(hidden, out, **sizes)


def our_towers(vit: dict, text: dict, joint: int) -> dict:
    return dict(
        embed_dim=joint, image_size=vit["img_size"], patch_size=vit["patch_size"], vision_width=vit["embed_dim"],
        vision_layers=vit["depth"], vision_heads=vit["num_heads"], context_length=text["context_length"],
        vocab_size=text["vocab_size"], text_width=text["transformer_width"], text_heads=text["transformer_heads"],
        text_layers=text["transformer_layers"],
    )  # fmt: skip


def tiny(kind: type = model.ACLIP) -> model.ACLIP | model.SLIP:
    return perturbed(kind(ssl_hidden=HIDDEN, ssl_dim=OUT, **our_towers(VIT, TEXT, JOINT)), 0.2)


def twins(up, masked: bool = True, vit: dict = VIT, text: dict = TEXT, joint=JOINT, hidden=HIDDEN, out=OUT):
    """Their A-CLIP and ours with the same weights, none at a special value; EMA and online towers differ."""
    theirs = perturbed(their_aclip(up, 0.5 if masked else 0.0, vit, text, joint, hidden, out))
    mask = "attentive" if masked else "none"
    ours = model.ACLIP(mask=mask, ssl_hidden=hidden, ssl_dim=out, **our_towers(vit, text, joint))
    ours.load_state_dict(theirs.state_dict())
    return theirs.train(), ours.train()


def blocks(state: dict[str, Tensor], pattern: str) -> int:
    return 1 + max(int(m[1]) for name in state if (m := re.match(pattern + r"\.(\d+)\.", name)))


def vit_sizes(state: dict[str, Tensor], case: Case) -> dict:
    """Arguments of their ViT, read from shapes of its weights; the number of heads from the case, if it has one."""
    width, _, _, patch = state["patch_embed.proj.weight"].shape
    assert patch == case.get("patch_size", patch)
    side = patch * math.isqrt(state["pos_embed"].shape[1] - 1)
    heads = case.get("num_heads", 1)
    depth = blocks(state, "blocks")
    return dict(img_size=side, patch_size=patch, embed_dim=width, depth=depth, num_heads=heads, num_classes=0)


def vit_of(case: Case, up=None, mask_ratio: float = 0.5) -> torch.nn.Module:
    """The image tower with weights `param/*`: ours, or with `up` theirs."""
    state = case.group("param/")
    sizes = vit_sizes(state, case)
    vit = our_vit(sizes) if up is None else their_vit(up, mask_ratio, **sizes)
    vit.load_state_dict(state)
    return vit


def network_of(case: Case, up=None, prefix: str = "param/", kind: type = model.ACLIP, mask: str = "attentive"):
    """The model with the weights under `prefix`: ours, or with `up` theirs."""
    state = case.group(prefix)
    vit = vit_sizes({k.removeprefix("visual."): v for k, v in state.items() if k.startswith("visual.")}, case)
    vocab_size, width = state["token_embedding.weight"].shape
    text = dict(
        context_length=len(state["positional_embedding"]), vocab_size=vocab_size, transformer_width=width,
        transformer_heads=case.get("text_heads", 1), transformer_layers=blocks(state, r"transformer\.resblocks"),
    )  # fmt: skip
    hidden, out = len(state["image_mlp.layer1.weight"]), len(state["image_mlp.layer3.weight"])
    sizes = vit, text, state["image_projection"].shape[1]
    if up is None:
        options = dict(mask=mask) if kind is model.ACLIP else {}
        network = kind(ssl_hidden=hidden, ssl_dim=out, **our_towers(*sizes), **options)
    elif kind is model.ACLIP:
        network = their_aclip(up, 0.0 if mask == "none" else 0.5, *sizes, hidden, out)
    else:
        network = their_slip(up, *sizes, hidden, out)
    network.load_state_dict(state)
    return network


def tokens_of(n: int, length: int = 77, end: int = 49407) -> Tensor:
    """Token ids (n, length); the end token, the largest id, is at a random position."""
    ends = torch.randint(3, length - 2, (n, 1))
    tokens = torch.randint(1, end - 1, (n, length)) * (torch.arange(length) < ends)
    return tokens.scatter(1, ends, end)


def boxes_of(n: int, height: int = 375, width: int = 500, released: bool = True) -> Tensor:
    image = Image.new("L", (width, height))
    return torch.stack([crops.three_boxes(image, released_boxes=released) for _ in range(n)])


def batch_of(n: int, side: int = 28, length: int = 77, end: int = 49407) -> tuple[Tensor, ...]:
    """Views (2B, 3, H, W), EMA view, tokens, boxes."""
    views, ema_view = torch.randn(2 * n, 3, side, side), torch.randn(n, 3, side, side)
    return views, ema_view, tokens_of(n, length, end), boxes_of(n)


def batch(n: int) -> dict[str, Tensor]:
    """Inputs of a tiny model, in the files' names."""
    return dict(zip(("views", "ema_view", "text", "boxes"), batch_of(n, length=10, end=59), strict=True))


def picture(height: int, width: int) -> np.ndarray:
    """(H, W, 3) of 0 to 255, with edges and noise."""
    coarse = np.kron(np.random.randint(0, 200, (height // 9 + 1, width // 9 + 1, 3)), np.ones((9, 9, 1), np.int64))
    return coarse[:height, :width] + np.random.randint(0, 56, (height, width, 3))


def kept(removed: Tensor) -> Tensor:
    """Mask (B, N), 1 = removed -> kept patches (B, K), ascending."""
    return (removed == 0).nonzero()[:, 1].view(len(removed), -1)


def removed_of(keep_ids: Tensor, patches: int) -> Tensor:
    return torch.ones(len(keep_ids), patches).scatter(1, keep_ids, 0)


def weight_gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {f"grad/{name}": x.grad for name, x in module.named_parameters() if x.grad is not None}


# ------------------------------------------------------------------------------------------------------------ towers


class AttentionScores(Part):
    files = {"attention_scores": dict(img_size=24, patch_size=4, num_heads=4)}
    more = {"attention_scores_grid_14": dict()}
    functions = "attentive_mask_clip.model.MaskedViT.forward attentive_mask_clip.model.block_with_cls_attention"
    authors = "models.py:574"
    tolerances = {"tokens": (0, 1e-5), "*": (0, 1e-6)}

    def inputs(self, **sizes):
        sizes = {**VIT, **sizes}
        x = {"image": torch.randn(3, 3, sizes["img_size"], sizes["img_size"]), "num_heads": sizes["num_heads"]}
        return x | {"patch_size": sizes["patch_size"], **prefixed("param/", perturbed(our_vit(sizes)).state_dict())}

    def ours(self, case):
        with results_of(model, "block_with_cls_attention") as passes:
            tokens, scores = vit_of(case).train()(case["image"], return_scores=True)
        assert not scores.requires_grad
        return {"tokens": tokens, "scores": scores, "cls_row_attn": torch.stack([row for _, row in passes])}

    def theirs(self, up, case):
        with results_of(up.models, "forward_attn") as passes:
            tokens, scores, _ = vit_of(case, up, 0.0).train()(case["image"], need_attn=True)
        return {"tokens": tokens, "scores": scores, "cls_row_attn": torch.stack([a[:, :, 0] for _, a in passes])}


class MaskedTower(Part):
    files = {"masked_vit": {}}
    functions = "attentive_mask_clip.model.MaskedViT"
    authors = "models.py:531"
    rtol, atol = 1e-5, 2e-5

    def inputs(self):
        removed = removed_of(model.attentive_keep_ids(torch.rand(3, GRID * GRID)), GRID * GRID).long()
        x = {"image": torch.randn(3, 3, 28, 28), "removed": removed, "cotangent_cls": torch.randn(3, 24)}
        x |= {"num_heads": 3, "patch_size": 2}
        return x | prefixed("param/", perturbed(our_vit(VIT)).state_dict())

    def run(self, tower, case):
        """tower: case -> (module, function of images and mask that gives [CLS] and kept patches, ascending)."""
        (vit, forward), x, removed = tower(case), leaf(case["image"]), case["removed"]
        tokens = forward(x, removed)
        loss = (tokens[:, 0] * case["cotangent_cls"]).sum()
        found = {"kept_ids_sorted": kept(removed), "cls_out": tokens[:, 0], "patch_out_sorted": tokens[:, 1:]}
        found |= {"loss": loss, **gradients(loss, {"image": x}), **weight_gradients(vit)}
        vit.eval()
        with torch.no_grad():
            tokens = forward(case["image"], removed)  # all tokens: nothing is masked
        return found | {"eval_cls_out_unmasked": tokens[:, 0], "eval_num_tokens": tokens.shape[1]}

    def our(self, case):
        vit = vit_of(case).train()
        return vit, lambda images, removed: vit(images, kept(removed))[0]

    def their(self, up):
        def tower(case):
            vit = vit_of(case, up).train()

            def forward(images, removed):
                tokens = vit(images, mask=removed.bool())[0]
                patches = tokens[:, 1:]
                if vit.training:  # theirs are in the order of an unstable argsort
                    order = removed.argsort(dim=1)[:, : patches.shape[1]].argsort(dim=1)
                    patches = patches.gather(1, order[..., None].expand_as(patches))
                return torch.cat([tokens[:, :1], patches], dim=1)

            return vit, forward

        return tower


class PositionEmbeddings(Part):
    files = {"pos_embed_resize": dict(grid_out=7)}
    more = {"pos_embed_resize_up": dict(grid_out=20)}
    functions = "attentive_mask_clip.model.resize_pos_embed"
    authors = "utils.py:331"
    atol = 1e-6

    def inputs(self, grid_out):
        return {"pos_embed": torch.randn(1, 197, 6), "grid_in": GRID, "grid_out": grid_out}

    def ours(self, case):
        assert case["pos_embed"].shape[1] == 1 + case["grid_in"] ** 2
        resized = model.resize_pos_embed(case["pos_embed"], case["grid_out"], case["grid_out"])
        return {"pos_embed_resized": resized}

    def theirs(self, up, case):
        patches, state = case["grid_out"] ** 2, {"pos_embed": case["pos_embed"]}
        embed = SimpleNamespace(num_patches=patches)
        up.utils.interpolate_pos_embed(
            SimpleNamespace(patch_embed=embed, pos_embed=torch.zeros(1, 1 + patches, 1)), state
        )
        return {"pos_embed_resized": state["pos_embed"]}


class Encode(Part):
    files = {"encode": {}}
    functions = "attentive_mask_clip.model.CLIP attentive_mask_clip.model.TextTransformer"
    gradient_left = True
    authors = "models.py:413"
    rtol, atol = 1e-5, 1e-5

    def inputs(self):
        text = tokens_of(4, 10, 59)
        text[0] = torch.randint(1, 58, (10,))  # without an end token
        x = {"image": torch.randn(4, 3, 28, 28), "text": text, **HEADS}
        return x | prefixed("param/", tiny().state_dict())

    def run(self, made, case):
        network, found = made(case).eval(), {}
        with torch.no_grad():
            for ema, name in ((False, ""), (True, "_ema")):
                found[f"image_embed{name}"] = network.encode_image(case["image"], ema=ema)
                found[f"text_embed{name}"] = network.encode_text(case["text"], ema=ema)
        return found

    our = staticmethod(network_of)

    def their(self, up):
        return functools.partial(network_of, up=up)


class EmaUpdate(Part):
    files = {"ema_update": {}}
    functions = "attentive_mask_clip.model.ACLIP.update_ema"
    authors = "models.py:360"
    atol = 1e-6

    def inputs(self):
        return {"momentum_0": 0.996, "momentum_1": 0.5, **prefixed("before/", tiny().state_dict())}

    def run(self, made, case):
        (network, update), found, before = made(case), {}, case.group("before/")
        for step in range(2):
            update(case[f"momentum_{step}"])
            state = {name: x.clone() for name, x in network.state_dict().items()}
            found |= {f"after_{step}/{name}": x for name, x in state.items() if name.startswith(EMA)}
            assert all(torch.equal(x, before[name]) for name, x in state.items() if not name.startswith(EMA))
        return found

    def our(self, case):
        network = network_of(case, prefix="before/")
        return network, network.update_ema

    def their(self, up):
        def made(case):
            network = network_of(case, up, "before/")
            return network, network._update_momentum_encoder

        return made


# -------------------------------------------------------------------------------------------------- token selection


class CropScores(Part):
    files = {"crop_attention": dict(n=8)}
    more = {"crop_attention_64": dict(n=64)}
    functions = "attentive_mask_clip.model.crop_scores"
    authors = "models.py:448"
    atol = 1e-6

    def inputs(self, n):
        return {"scores": torch.rand(n, GRID * GRID), "boxes": boxes_of(n)}

    def run(self, function, case):
        boxes = case["boxes"]
        return {f"scores_view{v}": function(case["scores"], boxes[:, v - 1], boxes[:, -1]) for v in (1, 2)}

    def our(self, scores, boxes, ref_boxes):
        return model.crop_scores(scores, boxes, ref_boxes, GRID)

    def their(self, up):
        return functools.partial(up.models.ACLIP.get_mask, None)


class SelectTokens(Part):
    files = {"select_tokens": dict(n=4)}
    more = {"select_tokens_64": dict(n=64)}
    functions = "attentive_mask_clip.model.attentive_keep_ids"
    authors = "models.py:24"
    ratios = 0.25, 0.5, 0.75

    def inputs(self, n):
        return {"scores": torch.rand(n, GRID * GRID)}

    def ours(self, case):
        scores, found, order = case["scores"], {}, []
        for ratio in self.ratios:
            with results_of(F, "avg_pool2d") as pooled:
                ids = model.attentive_keep_ids(scores, ratio)
            found[f"removed_ratio_{ratio}"] = removed_of(ids, scores.shape[1])
        for count in range(1, 50):  # the block that is kept in addition is the next one
            ids = model.attentive_keep_ids(scores, (count - 0.5) / 49)
            chosen = 1 - removed_of(ids, scores.shape[1]).view(-1, 7, 2, 7, 2)[:, :, 0, :, 0].flatten(1)
            order.append((chosen - sum(F.one_hot(block, 49) for block in order)).argmax(1))
        return found | {"block_scores": pooled[0].flatten(1), "block_order": torch.stack(order, 1)}

    def theirs(self, up, case):
        found = {}
        for ratio in self.ratios:
            with results_of(F, "interpolate") as shrunk, results_of(torch, "argsort") as sorted_:
                found[f"removed_ratio_{ratio}"] = up.models.get_att_mask(case["scores"], ratio).long()
        return found | {"block_scores": shrunk[0].flatten(1), "block_order": sorted_[0]}


class RandomMasks(Part):
    files = {"random_masking": {}}
    functions = "attentive_mask_clip.model.random_keep_ids"
    authors = "models.py:538"

    def inputs(self):
        return {"x": torch.randn(3, 196, 5), "noise": torch.rand(3, 196), "mask_ratio": 0.5}

    def ours(self, case):
        ids = model.random_keep_ids(case["noise"], 1 - case["mask_ratio"])
        found = {"x_kept": case["x"].gather(1, ids[..., None].expand(-1, -1, case["x"].shape[2]))}
        restore = case["ids_restore"].scatter(1, ids, torch.arange(ids.shape[1]).expand_as(ids))  # others: theirs
        return found | {"removed": removed_of(ids, ids.shape[1] * 2), "ids_restore": restore}

    def theirs(self, up, case):
        with mock.patch.object(torch, "rand", lambda *_, **__: case["noise"]):
            found = up.models.MaskVisionTransformer.random_masking(None, case["x"], case["mask_ratio"])
        return dict(zip(("x_kept", "removed", "ids_restore"), found, strict=True))


# ------------------------------------------------------------------------------------------------------------ losses


def outputs_of(n: int, width: int, ssl_width: int, scale: float) -> dict:
    x = {"image_embed": (2 * n, width), "text_embed": (n, width), "image_ssl_embed": (2 * n, ssl_width)}
    x |= {"byol_feats": (2 * n, ssl_width), "byol_feats_e": (n, ssl_width)}
    return {name: torch.randn(shape) for name, shape in x.items()} | {"logit_scale": scale}


def two_views(up, outputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their loss with SimCLR between both views; the released code gives it the first one twice."""
    accuracies, halves = {}, outputs["image_ssl_embed"].chunk(2)

    class Cross(up.losses.SIMCLRLoss):
        def forward(self, _):
            found = super().forward(dict(zip(("aug1_embed", "aug2_embed"), halves, strict=True)))
            accuracies["ssl_acc"] = found["ssl_acc"]
            return found

    criterion = up.losses.ACLIPLoss()
    criterion.simclr_loss = Cross()
    return criterion(outputs) | accuracies


def their_simclr(up, first: Tensor, second: Tensor) -> Tensor:
    return up.losses.SIMCLRLoss()({"aug1_embed": first, "aug2_embed": second})["loss"]


class Losses(Part):
    files = {"losses": dict(n=5, width=12, ssl_width=8), "losses_b1": dict(n=1, width=6, ssl_width=4, scale=20.0)}
    more = {"losses_32": dict(n=32, width=32, ssl_width=16)}
    families = ("losses",)
    functions = " ".join(f"attentive_mask_clip.model.{name}_loss" for name in ("aclip", "clip", "simclr", "byol"))
    authors = "losses.py:32"
    rtol = atol = 1e-5
    unused = ("twoview/ssl_acc",)  # which nobody logs

    def inputs(self, n, width, ssl_width, scale=1 / 0.07):
        return prefixed("in/", outputs_of(n, width, ssl_width, scale))

    def run(self, functions, case):
        """functions: total losses as released, with two views, SimCLR, SimSiam."""
        released, twoview, simclr, simsiam = functions
        n, found = len(case["in/text_embed"]), {}

        def differentiate(name: str, function: Callable, *inputs: str) -> None:
            x = {key: leaf(value) for key, value in case.group("in/").items()}
            value = function(x)
            losses = value if isinstance(value, dict) else {"loss": value}
            grads = gradients(losses["loss"], x, f"{name}_grad/")
            names = [f"{name}_grad/{key}" for key in inputs or x]
            found.update({**prefixed(f"{name}/", losses), **{key: grads[key] for key in names}})

        differentiate("released", released)
        differentiate("twoview", twoview)
        for name, second in (("simclr_only", slice(n, None)), ("simclr_same_view", slice(n))):
            two = lambda x, second=second: simclr(x["image_ssl_embed"][:n], x["image_ssl_embed"][second])  # noqa: E731
            differentiate(name, two, "image_ssl_embed")
        targets = lambda x: x["byol_feats_e"].detach().repeat(2, 1)  # noqa: E731
        differentiate("simsiam", lambda x: simsiam(x["byol_feats"], targets(x)), "byol_feats")
        return found | {"simsiam_loss": found["simsiam/loss"]}

    # SimSiam's form of BYOL's loss is the negative cosine
    our = (
        functools.partial(model.aclip_loss, simclr_pair="same"),
        functools.partial(model.aclip_loss, simclr_pair="cross"),
        model.simclr_loss,
        lambda p, z: model.byol_loss(p, z) / 2 - 1,
    )

    def their(self, up):
        both, simclr = (functools.partial(each, up) for each in (two_views, their_simclr))
        return up.losses.ACLIPLoss(), both, simclr, up.losses.cal_simsiam_loss


def losses_of_rank(x: dict[str, Tensor], total: Callable, simclr: Callable) -> dict[str, Tensor]:
    leaves = {name: leaf(value) for name, value in x.items()}
    losses = total(leaves)
    found = prefixed("released/", {name: value.detach() for name, value in losses.items()})
    found |= gradients(losses["loss"], leaves, "released_grad/")
    ssl = {"image_ssl_embed": leaf(x["image_ssl_embed"])}
    loss = simclr(*ssl["image_ssl_embed"].chunk(2))
    return found | {"simclr_twoview": loss.detach(), **gradients(loss, ssl, "simclr_twoview_grad/")}


def our_rank(rank: int, inputs: list[dict]) -> dict:
    total = functools.partial(model.aclip_loss, simclr_pair="same")
    return losses_of_rank(inputs[rank], total, model.simclr_loss)


def their_rank(rank: int, inputs: list[dict], path: str) -> dict:
    with authors(Path(path)) as up:
        return losses_of_rank(inputs[rank], up.losses.ACLIPLoss(), functools.partial(their_simclr, up))


class DistributedLosses(Part):
    files = {"losses_distributed": {}}
    functions = "shared.run.gather attentive_mask_clip.model.aclip_loss attentive_mask_clip.model.simclr_loss"
    authors = "utils.py:208"
    rtol = atol = 1e-5

    def inputs(self):
        ranks = [prefixed(f"rank{rank}/in/", outputs_of(3, 8, 6, 1 / 0.07)) for rank in range(2)]
        return {**ranks[0], **ranks[1], "world_size": 2}

    def run(self, function, case, *arguments):
        from scripts import in_ranks

        inputs = [case.group(f"rank{rank}/in/") for rank in range(case["world_size"])]
        with tempfile.TemporaryDirectory() as folder:
            ranks = in_ranks(function, len(inputs), Path(folder), inputs, *arguments)
        return {f"rank{rank}/{name}": x for rank, found in enumerate(ranks) for name, x in found.items()}

    our = staticmethod(our_rank)

    def theirs(self, up, case):
        return self.run(their_rank, case, str(up.root))


# ------------------------------------------------------------------------------------------------ whole forward pass


def margins(scores: list[Tensor]) -> list[Tensor]:
    """The smallest relative gap between the last block that is kept and the first that is not, by view."""
    ranked = [F.avg_pool2d(x.view(-1, 1, GRID, GRID), 2).flatten(1).sort(descending=True).values for x in scores]
    return [(1 - x[:, 25] / x[:, 24]).min() for x in ranked]


def after_forward(network: torch.nn.Module) -> dict[str, Tensor]:
    """EMA weights and all buffers of BatchNorm."""
    buffer = re.compile(r"running_|num_batches")
    state = {name: x.clone() for name, x in network.state_dict().items()}
    return {f"after/{name}": x for name, x in state.items() if name.startswith(EMA) or buffer.search(name)}


class Forward(Part):
    files = {"full_forward": dict(n=4, momentum=0.99)}
    functions = " ".join(
        f"attentive_mask_clip.model.{name}"
        for name in ("ACLIP.forward", "ACLIP.keep_ids", "simclr_head", "byol_head", "SyncBatchNorm1d")
    )
    authors = "models.py:472"
    tolerances = {
        "grad/*": (1e-4, 1e-4), "loss*": (5e-6, 2e-5), "*_scores": (0, 1e-6), "*_removed": (0, 0), "*": (0, 2e-5),
    }  # fmt: skip
    mask = "attentive"

    def inputs(self, n, momentum):
        return {**batch(n), "momentum": momentum, **HEADS, **prefixed("param/", tiny().state_dict())}

    def outputs(self, network, out, released, twoview, scores, removed, ema_scores):
        found = {"ema_scores": ema_scores, "selection_margin": torch.stack(margins(scores))}
        for v, (of_view, mask) in enumerate(zip(scores, removed, strict=True), 1):
            found |= {f"view{v}_scores": of_view, f"view{v}_removed": mask.long()}
        found |= prefixed("out/", out) | prefixed("loss/", released) | after_forward(network)
        found |= {f"loss_twoview/{name}": twoview[name] for name in ("simclr_loss", "loss")}
        released["loss"].backward()
        return found | weight_gradients(network)

    def ours(self, case):
        network, boxes = network_of(case, mask=self.mask).train(), case["boxes"]
        network.update_ema(case["momentum"])
        with torch.no_grad():
            _, ema_scores = network.visual_ema(case["ema_view"], return_scores=True)
        scores = [model.crop_scores(ema_scores, boxes[:, v], boxes[:, -1], GRID) for v in range(2)]
        with results_of(network, "keep_ids") as kept_ids:
            out = network(case["views"], case["ema_view"], case["text"], boxes)
        ids = model.attentive_keep_ids(torch.cat(scores)) if self.mask == "none" else kept_ids[0]
        released, twoview = (model.aclip_loss(out, simclr_pair=pair) for pair in ("same", "cross"))
        removed = removed_of(ids, GRID * GRID).chunk(2)
        return self.outputs(network, out, released, twoview, scores, removed, ema_scores)

    def theirs(self, up, case):
        network = network_of(case, up, mask=self.mask).train()
        with (
            results_of(up.models.MaskVisionTransformer, "forward_features") as passes,
            results_of(up.models.ACLIP, "get_mask") as scores,
            results_of(up.models, "get_att_mask") as removed,
        ):
            out = network(case["views"], case["ema_view"], case["text"], case["boxes"], case["momentum"])
        released, twoview = up.losses.ACLIPLoss()(out), two_views(up, out)
        return self.outputs(network, out, released, twoview, scores, removed, passes[0][1])


class ForwardUnmasked(Forward):
    """With --mask-ratio 0, as in their README: masks are computed, but no token is dropped."""

    files = {"full_forward_unmasked": dict(n=3, momentum=0.9)}
    mask = "none"


class SlipForward(Part):
    files = {"slip_full_forward": {}}
    functions = "attentive_mask_clip.model.SLIP attentive_mask_clip.model.baseline_loss"
    authors = "SLIP models.py:224"
    tolerances = {"grad/*": (1e-4, 1e-4), "*": (0, 2e-5)}
    unused = ("loss/ssl_acc",)  # which nobody logs

    def inputs(self):
        x = {name: torch.randn(4, 3, 28, 28) for name in ("image", "aug1", "aug2")}
        return {**x, "text": tokens_of(4, 10, 59), **HEADS, **prefixed("param/", tiny(model.SLIP).state_dict())}

    def run(self, made, case):
        network, loss = made(case)
        out = network.train()(case["image"], case["text"], case["aug1"], case["aug2"])
        losses = loss(out)
        losses["loss"].backward()
        return prefixed("out/", out) | prefixed("loss/", losses) | weight_gradients(network)

    def our(self, case):
        return network_of(case, kind=model.SLIP), model.baseline_loss

    def their(self, up):
        losses = slip_of(up).losses
        criterion = losses.SLIPLoss(losses.SIMCLRLoss(temperature=0.1), 1.0)
        return lambda case: (network_of(case, up, kind=model.SLIP), criterion)


# ---------------------------------------------------------------------------------------------------------- training


def their_steps(up, theirs, batches, optimizer, lrs, momenta, args) -> dict:
    """Run their training loop -> means of the losses."""
    inputs = [([*images.chunk(2), ema], boxes, tokens) for images, ema, tokens, boxes in batches]
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with contextlib.redirect_stdout(None):
        return up.main.train(inputs, theirs, up.losses.ACLIPLoss(), optimizer, scaler, 0, lrs, momenta, args)


class TrainSteps(Part):
    files = {"train_steps": dict(steps=4)}
    functions = "attentive_mask_clip.train.train_step"
    gradient_left = True
    authors = "main.py:291"
    tolerances = {"losses": (1e-5, 5e-6), "*": (0, 5e-6)}
    names = "loss simclr_loss im_byol_loss contra_loss_1 contra_loss_2 clip_acc".split()
    # the true gradient is 0, as that of keys' biases: there AdamW turns rounding errors into steps
    before_batch_norm = re.compile(r"final/image_mlp\.(layer[12]\.bias|bn[12]\.running_mean)")

    def inputs(self, steps):
        x = {"lr": 5e-4 * torch.rand(8), "momentum": 0.9 + 0.1 * torch.rand(8), **HEADS}
        for step in range(steps):
            x |= prefixed(f"step{step}/", batch(4))
        return x | prefixed("param/", tiny().state_dict())

    def batches(self, case: Case) -> list[tuple[Tensor, ...]]:
        names, steps = ("views", "ema_view", "text", "boxes"), sum(name.endswith("/boxes") for name in case)
        return [tuple(case[f"step{step}/{name}"] for name in names) for step in range(steps)]

    def ours(self, case):
        network, log = network_of(case).train(), []
        cfg = train.Config(simclr_pair="same", precision="fp32", weight_decay=0.5)
        optimizer = torch.optim.AdamW(train.parameter_groups(network, 0.5), lr=1, **cfg.adamw, fused=True)
        for (views, ema_view, text, boxes), *rates in zip(
            self.batches(case), case["lr"].tolist(), case["momentum"].tolist(), strict=False
        ):
            data = [*views.chunk(2), ema_view], boxes, text
            losses = train.train_step(network, data, optimizer, torch.amp.GradScaler(enabled=False), *rates, cfg)
            log.append([losses[name] for name in self.names])
        found = {"losses": torch.tensor(log)} | prefixed("final/", network.state_dict())
        for name, value in found.items():
            if self.before_batch_norm.fullmatch(name):
                found[name] = case[name]
            elif name.endswith(("qkv.bias", "in_proj_bias")):
                value = found[name] = value.clone()
                value.chunk(3)[1].copy_(case[name].chunk(3)[1])
        return found

    def theirs(self, up, case):
        network, args = network_of(case, up).train(), SimpleNamespace(**TRAIN)
        optimizer, lrs, momenta = up.main.get_optim(args, network), case["lr"].tolist(), case["momentum"].tolist()
        with results_of(up.losses.ACLIPLoss, "forward") as log:
            their_steps(up, network, self.batches(case), optimizer, lrs, momenta, args)
        found = {"losses": torch.tensor([[losses[name].item() for name in self.names] for losses in log])}
        return found | prefixed("final/", network.state_dict())


class ParameterGroups(Part):
    """Names of parameters that decay, that do not, and that are frozen."""

    files = {"param_groups": {}}
    functions = "attentive_mask_clip.train.parameter_groups"
    authors = "main.py:110"
    json = True

    def inputs(self):
        return {}

    def names(self, network, groups) -> dict[str, list[str]]:
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        decayed, others = ([names[id(parameter)] for parameter in group["params"]] for group in groups)
        assert [group["weight_decay"] for group in groups] == [0.3, 0]
        frozen = [name for name, parameter in network.named_parameters() if not parameter.requires_grad]
        return {"decay": decayed, "no_decay": others, "frozen": frozen}

    def ours(self, case):
        vit = {**VIT, "depth": blocks(case["decay"], r"visual\.blocks")}
        text = {**TEXT, "transformer_layers": blocks(case["decay"], r"transformer\.resblocks")}
        network = model.ACLIP(ssl_hidden=HIDDEN, ssl_dim=OUT, **our_towers(vit, text, JOINT))
        found = self.names(network, train.parameter_groups(network, 0.3))
        return {  # in their order
            name: sorted(each, key=lambda x, name=name: (x not in case[name], x in case[name] and case[name].index(x)))
            for name, each in found.items()
        }

    def theirs(self, up, case):
        network = their_aclip(up, 0.5, VIT, TEXT, JOINT, HIDDEN, OUT)
        return self.names(network, up.main.get_optim(SimpleNamespace(**{**TRAIN, "wd": 0.3}), network).param_groups)


class Schedules(Part):
    files = {"schedules": {}}
    functions = "attentive_mask_clip.train.cosine_schedule"
    authors = "utils.py:249"
    rtol = 1e-6

    def inputs(self):
        rows = [5e-4, 1e-5, 25, 40, 1, 1e-6], [0.996, 1, 25, 40, 0, 0], [3e-3, 1e-5, 3, 7, 1, 1e-6]
        return {f"args_{number}": torch.tensor(row) for number, row in enumerate(rows)}

    def run(self, function, case):
        found = {}
        for number, row in case.group("args_").items():
            base, final, epochs, per_epoch, warmup, start = row.tolist()
            found[f"values_{number}"] = function(base, final, int(epochs), int(per_epoch), int(warmup), start)
        return found

    def our(self, base, final, epochs, per_epoch, warmup, start):
        return train.cosine_schedule(base, final, epochs * per_epoch, warmup * per_epoch, start)

    def their(self, up):
        return up.utils.cosine_scheduler


# -------------------------------------------------------------------------------------------------------------- data


class ThreeCrops(Part):
    files = {"three_crops": {}}
    functions = " ".join(f"attentive_mask_clip.crops.{name}" for name in ("three_boxes", "crop", "view_transform"))
    only = {"attentive_mask_clip.crops.view_transform": "the EMA view, without augmentation"}
    authors = "datasets.py:240"
    tolerances = {"ema_view_tensor": (0, 1e-6), "*": (0, 0)}

    def inputs(self):
        sizes = torch.randint(20, 200, (24, 2))
        return {"seed": torch.arange(100, 124), "height_width": sizes, "image_u8": picture(45, 60)}

    def run(self, functions, case):
        """functions: image -> (boxes, crops); transform of the EMA view."""
        crop, transform = functions
        boxes = []
        for seed, (height, width) in zip(case["seed"].tolist(), case["height_width"].tolist(), strict=True):
            torch.manual_seed(seed)
            boxes.append(crop(Image.new("RGB", (width, height)))[0])
        torch.manual_seed(case["seed"][0])
        own, images = crop(Image.fromarray(case["image_u8"].numpy().astype(np.uint8)))
        found = {"boxes": torch.stack(boxes), "pil_boxes": own, "pil_crops_u8": np.stack(images)}
        return found | {"ema_view_tensor": transform(images[-1])}

    def ours(self, case):
        def crop(image):
            boxes = crops.three_boxes(image, released_boxes=True)
            return boxes, [crops.crop(image, box, 32) for box in boxes]

        return self.run((crop, crops.view_transform("plain")), case)

    def theirs(self, up, case):
        view = up.datasets.GetThreeRandomResizedCrop(32, scale=(0.5, 1.0))

        def crop(image):
            images, boxes = zip(*view(image), strict=True)
            return torch.tensor(boxes), images

        transform = run_line(up.datasets, "ema_transform", normalize=run_line(up.datasets, "normalize"))
        return self.run((crop, transform), case)


class EvalTransform(Part):
    files = {"eval_transform": {}}
    functions = "attentive_mask_clip.crops.eval_transform"
    authors = "eval_zeroshot.py:68"
    atol = 1e-6

    def inputs(self):
        return {"image_u8": picture(40, 61)}

    def run(self, transforms, case):
        image = Image.fromarray(case["image_u8"].numpy().astype(np.uint8))
        names = "zeroshot_224_every7", "linear_val_256_224_every7"
        return {name: each(image)[:, ::7, ::7] for name, each in zip(names, transforms, strict=True)}

    def ours(self, case):
        crops.eval_transform.cache_clear()  # so that it runs
        return self.run((crops.eval_transform(224), crops.eval_transform(224, 256)), case)

    def their(self, up):
        normalize = run_line(up.main_linear, "normalize")
        probe = run_line(up.main_linear, "val_transform", normalize=normalize)
        return run_line(up.eval_zeroshot, "val_transform"), probe


class Tokenizer(Part):
    files = {"tokenizer": {}}
    functions = "shared.clip.RememberingTokenizer"
    authors = "tokenizer.py:137"

    def inputs(self):
        texts = ["a photo of a cat.", "TWO   dogs!! isn't it", "", "caf\u00e9 \u2014 na\u00efve", "smile \U0001f600"]
        return {"json": [*texts, "&amp;lt;i&amp;gt; 1984", "word " * 75, "word " * 76, "\u732b \u0438 cat"]}

    def ours(self, case):
        if case.path.suffix == ".json":  # texts of the .npz
            return {}
        texts = case.json or Case(case.path.with_name("tokenizer_texts.json")).json
        ids = RememberingTokenizer(open_clip.SimpleTokenizer(context_length=77))(texts)
        # Where a text is cut, ours differs on purpose in one id: the last is the end token, where the tower pools
        cut = (case["ids"] != 49407).all(dim=1)
        assert (ids[cut, -1] == 49407).all()
        ids[cut, -1] = case["ids"][cut, -1]
        return {"ids": ids}

    def theirs(self, up, case):
        return {"ids": up.tokenizer.SimpleTokenizer()(case.json)}


# -------------------------------------------------------------------------------------------------------- evaluation


class ZeroShot(Part):
    files = {"zeroshot": {}}
    functions = "attentive_mask_clip.eval.zero_shot"
    authors = "eval_zeroshot.py:112"
    tolerances = {"logits": (0, 1e-5), "*": (1e-6, 0)}

    def inputs(self):
        x = {"class_text": tokens_of(18, 10, 59), "texts_per_class": torch.tensor([6, 3, 3, 3, 3])}
        x |= {"images": torch.randn(14, 3, 28, 28), "targets": torch.randint(0, 5, (14,)), **HEADS}
        return x | prefixed("param/", tiny().state_dict())

    def run(self, function, case):
        prompts = case["class_text"].split(case["texts_per_class"].tolist())
        loader = list(zip(case["images"].split(5), case["targets"].split(5), strict=True))
        logits, top1 = function(case, loader, prompts)
        return {"logits": logits, "top1_percent": top1}

    def our(self, case, loader, prompts):
        network = network_of(case).train()  # in train mode, which evaluation must leave and restore
        found = evaluation.zero_shot(network, loader, prompts)
        assert found["metric"] == found["top1"] and network.training
        return found["logits"], found["top1"]

    def their(self, up):
        class Tokens:
            """Token ids of the class whose number is its name; they reshape ids to their context length, 77."""

            def __init__(self, ids):
                self.ids = ids

            def cuda(self, **_):
                return self

            view, contiguous = lambda self, *_: self, lambda self: self.ids

        def function(case, loader, prompts):
            tokenizer, labels = lambda texts: Tokens(prompts[int(texts[0])]), [str(c) for c in range(len(prompts))]
            validate = functools.partial(up.eval_zeroshot.validate_zeroshot, loader, ["{}"], labels)
            network = network_of(case, up)
            return validate(network, tokenizer, False)[0], validate(network, tokenizer, True)

        return function


class Metrics(Part):
    files = {"metrics": dict(n=40)}
    more = {"metrics_300": dict(n=300)}
    functions = "attentive_mask_clip.eval.roc_auc shared.zeroshot.classification_metrics"
    authors = "eval_zeroshot.py:165"
    atol = 1e-4

    def inputs(self, n):
        labels = torch.cat([torch.arange(7), torch.randint(0, 7, (n - 7,))])  # theirs needs all classes
        binary = torch.randn(n, 2), torch.randint(0, 2, (n,))
        x = {"logits": torch.randn(n, 7), "targets": labels, "k": 5}
        return x | dict(zip(("logits_binary", "targets_binary"), binary, strict=True))

    def ours(self, case):
        logits, targets = case["logits"], case["targets"]
        found = evaluation.classification_metrics(logits, targets)
        topk = 100 * (label_ranks(logits, targets) < case["k"]).double().mean()
        values = {"top1": [found["top1"]], "topk": [topk], "mean_top1_top5": [(found["top1"] + topk) / 2]}
        values |= {"mean_per_class": found["mean_per_class"]}
        return values | {"roc_auc": evaluation.roc_auc(case["logits_binary"], case["targets_binary"])}

    def theirs(self, up, case):
        module, (logits, targets) = up.eval_zeroshot, (case["logits"], case["targets"])
        top1, topk = module.accuracy(logits, targets, (1, case["k"]))
        values = {"top1": top1, "topk": topk, "mean_top1_top5": (top1 + topk) / 2}
        values |= {"mean_per_class": module.mean_per_class(logits, targets)}
        return values | {"roc_auc": module.roc_auc(case["logits_binary"], case["targets_binary"])}


class ProbeRate(Part):
    files = {"linear_probe_lr": dict()}
    more = {"linear_probe_lr_8": dict(world_size=8)}
    functions = "attentive_mask_clip.eval.linear_probe_lr"
    authors = "main_linear.py:432"
    rtol = 1e-6

    def inputs(self, **world):
        return {"base_lr": 0.1, "batch_size": 128, "epochs": 90, **world}

    def ours(self, case):
        given = case["base_lr"], case["batch_size"], case.get("world_size", 1)
        epochs = case["epochs"]
        return {"lr": [evaluation.linear_probe_lr(*given, epoch, epochs) for epoch in range(epochs)]}

    def theirs(self, up, case):
        args = SimpleNamespace(lr=case["base_lr"], batch_size=case["batch_size"], epochs=case["epochs"])
        world = SimpleNamespace(get_world_size=lambda: case.get("world_size", 1))
        first, group, found = run_line(up.main_linear, "init_lr", args=args, utils=world), {}, []
        for epoch in range(args.epochs):
            up.main_linear.adjust_learning_rate(SimpleNamespace(param_groups=[group]), first, epoch, args)
            found.append(group["lr"])
        return {"lr": found}
