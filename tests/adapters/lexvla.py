"""LexVLA's parts and a reference: the paper's equations in NumPy and float64, since its authors have released no code.

Where a predecessor computes the same quantity, its code is run, too: jzhoubu/VDR@12c3e7a and naver/splade@8dcd33a, a
clone beside it. Language models and backbones are transformers', in float64.
"""

import ast
import contextlib
import functools
import importlib
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Union
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr
from scipy.special import erf
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from transformers import AutoTokenizer, Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from lexvla import eval as evaluation
from lexvla import model, patchdis, plots, text, train
from shared import pretrained
from shared.zeroshot import retrieval_ranks_from_scores
from tests.adapters import Case, Part, gradients, leaf, prefixed
from tests.parity import check_commit

CLONE = "jzhoubu/VDR", "12c3e7a", "src/ir/utils/sparsify_utils.py"
AGAINST = "the equations in float64, VDR and SPLADE"
GRADIENT = (1e-4, 1e-6)


# ------------------------------------------------------------------------------------------------------- predecessors


def take(file: Path, *names: str) -> list:
    """Functions, classes or assigned values of a file whose imports are not installed."""
    nodes = [node for node in ast.parse(file.read_text()).body if not isinstance(node, (ast.Import, ast.ImportFrom))]
    targets = {ast.unparse(target): node for node in nodes for target in getattr(node, "targets", [])}
    known = targets | {node.name: node for node in nodes if hasattr(node, "name")}
    helpers = [node for node in nodes if isinstance(node, ast.FunctionDef)] if file.name == "sparsify_utils.py" else []
    scope = {"torch": torch, "F": F, "T": Tensor, "Tuple": tuple, "List": list, "Union": Union, "np": np, "Any": Any}
    exec(compile(ast.Module([*helpers, *(known[name] for name in names)], []), str(file), "exec"), scope)
    return [scope[name] for name in names]


@functools.cache
def load(vdr: Path) -> SimpleNamespace:
    splade = vdr.with_name("splade")
    if not splade.is_dir():
        pytest.skip("needs a clone of naver/splade at 8dcd33a beside that of VDR")
    check_commit(splade, "8dcd33a")
    up = SimpleNamespace()
    sparse, losses = vdr / "src/ir/utils/sparsify_utils.py", splade / "splade/losses/regularization.py"
    names = "elu1p", "build_topk_mask", "topk_sparsify", "build_bow_mask"
    up.elu1p, up.topk_mask, up.topk_sparsify, up.bow = take(sparse, *names)
    (up.nll,) = take(vdr / "src/ir/training/loss_utils.py", "SymmetryBiEncoderNllLoss")
    (up.left_out,) = take(vdr / "src/ir/encoder/vdr_crossmodal_text.py", "INVALID_TOKEN_IDS")
    names = "L0", "FLOPS", "RegWeightScheduler", "SparsityRatio"
    up.l0, up.flops, up.scheduler, up.sparsity = take(losses, *names)
    (up.pruning,) = take(splade / "splade/utils/utils.py", "pruning")
    package = ModuleType("vdr_ir")
    package.__path__ = [str(vdr / "src/ir")]
    with (
        mock.patch.dict(sys.modules, {"vdr_ir": package}),
        mock.patch.object(AutoTokenizer, "from_pretrained", lambda *_, **__: None),  # it would be downloaded
    ):
        up.image = importlib.import_module("vdr_ir.encoder.vdr_crossmodal_image")
    return up


@contextlib.contextmanager
def authors(path: Path) -> Iterator[SimpleNamespace]:
    yield load(path)


# ---------------------------------------------------------------------------------------------------------- equations


def double(case: dict, *names: str) -> list[np.ndarray]:
    return [np.asarray(case[name], dtype=np.float64) for name in names]


def numpy_map(x: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """normalize(elu1p(x)) of logits (.., V), eq. 2, and a function from its gradient to that of x."""
    positive = x >= 0
    slope = np.where(positive, 1, np.exp(np.where(positive, 0, x)))
    e = np.where(positive, x + 1, slope)
    norm = np.sqrt((e**2).sum(-1, keepdims=True))
    s = e / norm
    return s, lambda ds: (ds - s * (s * ds).sum(-1, keepdims=True)) / norm * slope


def numpy_penalty(s: np.ndarray) -> tuple[float, np.ndarray]:
    """V sum m^3 / sum m of s (N, V) with column means m, eq. 7, and its gradient with respect to s."""
    m, V = s.mean(0), s.shape[1]
    total, cubes = m.sum(), (m**3).sum()
    return V * cubes / total, V * (3 * m**2 / total - cubes / total**2)[None].repeat(len(s), 0) / len(s)


def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def numpy_nce(s_img: np.ndarray, s_txt: np.ndarray, logit_scale: np.ndarray) -> tuple[dict, dict]:
    """Losses of eq. 5, and gradients of their sum."""
    n, scale = len(s_img), np.exp(logit_scale)
    pairs = scale * s_img @ s_txt.T
    rows, columns = log_softmax(pairs, 1), log_softmax(pairs, 0)
    d_pairs = (np.exp(rows) + np.exp(columns) - 2 * np.eye(n, dtype=s_img.dtype)) / n
    losses = {"i2t": -np.trace(rows) / n, "t2i": -np.trace(columns) / n}
    found = {"s_img": scale * d_pairs @ s_txt, "s_txt": scale * d_pairs.T @ s_img}
    return losses, found | {"logit_scale": (d_pairs * pairs).sum()}


def largest(s: np.ndarray, k: int) -> np.ndarray:
    """s (.., V) with all but the k largest of each row set to 0; of ties, the first stay."""
    order = np.argsort(-s, axis=-1, kind="stable")[..., :k]
    kept = np.zeros(s.shape, dtype=bool)
    np.put_along_axis(kept, order, True, axis=-1)
    return s * kept


def layer_norm(x: np.ndarray, state: dict, name: str, eps: float) -> np.ndarray:
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def mlp(x: np.ndarray, state: dict, name: str) -> np.ndarray:
    x = linear(x, state, f"{name}.fc1")
    return linear(x * (1 + erf(x / math.sqrt(2))) / 2, state, f"{name}.fc2")


def numpy_adapter(y: np.ndarray, state: dict, heads: int) -> np.ndarray:
    """A pre-norm transformer block and a two-layer MLP: (B, n, D) -> (B, n, d)."""
    B, n, D = y.shape
    qkv = linear(layer_norm(y, state, "block.norm1", 1e-6), state, "block.attn.qkv")
    q, k, v = qkv.reshape(B, n, 3, heads, D // heads).transpose(2, 0, 3, 1, 4)
    weights = np.exp(log_softmax(q @ k.swapaxes(-1, -2) / math.sqrt(D // heads), -1))
    y = y + linear((weights @ v).swapaxes(1, 2).reshape(B, n, D), state, "block.attn.proj")
    y = y + mlp(layer_norm(y, state, "block.norm2", 1e-6), state, "block.mlp")
    return mlp(y, state, "proj")


def numpy_group(case: Case, prefix: str) -> dict[str, np.ndarray]:
    return {name: value.numpy().astype(np.float64) for name, value in case.group(prefix).items()}


# ------------------------------------------------------------------------------------------------------------ the map


def sparse_rows(*shape: int) -> Tensor:
    return F.normalize(torch.rand(shape) ** 3, dim=-1)


class Elu1p(Part):
    files = {"elu1p": {}}
    functions = "lexvla.model.elu1p"
    authors = "below eq. 2, VDR/src/ir/utils/sparsify_utils.py:6"
    tolerances = {"vdr_y": (1e-6, 1e-7), "*": (1e-6, 0)}

    def inputs(self):
        return {"x": torch.cat([torch.linspace(-30, 30, 62), torch.tensor([0.0, -1e-4, 1e-4])])}

    def ours(self, case):
        x = leaf(case["x"])
        y = model.elu1p(x)
        grad = gradients(y.sum(), {"x": x})["grad_x"]
        return {"y": y, "grad": grad, "vdr_y": y}

    def theirs(self, up, case):
        (x,) = double(case, "x")
        e = np.exp(np.minimum(x, 0))
        return {"y": np.where(x >= 0, x + 1, e), "grad": e, "vdr_y": up.elu1p(case["x"])}


class MapText(Part):
    files = {"map_text": {}}
    functions = "lexvla.model.lexical_map"
    authors = "eq. 2"
    tolerances = {"grad*": GRADIENT, "*": (0, 1e-6)}

    def inputs(self):
        return {"z": torch.randn(5, 24), "codebook": 0.3 * torch.randn(61, 24), "w": torch.randn(5, 61), "bias": -1.5}

    def ours(self, case):
        x = case.leaves("z", "codebook")
        z, codebook = case["z"], case["codebook"]
        s = model.lexical_map(*x.values())
        found = {"s": s, "s_centered": model.lexical_map(z, codebook - codebook.mean(0))}
        if "w" in case:
            found |= gradients((s * case["w"]).sum(), x)
        if "bias" in case:
            found["s_bias"] = model.lexical_map(z, codebook, bias=case["bias"])
        return found

    def theirs(self, up, case):
        z, codebook, w, bias = double(case, "z", "codebook", "w", "bias")
        s, back = numpy_map(z @ codebook.T)
        dx = back(w)
        found = {"s": s, "grad_z": dx @ codebook, "grad_codebook": dx.T @ z}
        found["s_bias"] = numpy_map(z @ codebook.T + bias)[0]
        return found | {"s_centered": numpy_map(z @ (codebook - codebook.mean(0)).T)[0]}


class MapImage(Part):
    files = {"map_image": {}}
    functions = "lexvla.model.lexical_map lexvla.fast.MaxLogits"
    authors = "eq. 4"
    tolerances = {"grad*": GRADIENT, "*": (0, 1e-6)}

    def inputs(self):
        x = {"z": torch.randn(3, 10, 16), "codebook": 0.3 * torch.randn(53, 16)}
        return {**x, "w": torch.randn(3, 53), "bias": -1.5}

    def ours(self, case):
        x = case.leaves("z", "codebook")
        z, codebook = case["z"], case["codebook"]
        s = model.lexical_map(*x.values(), pool=True)
        found = {"s": s, "s_no_cls": model.lexical_map(z[:, 1:], codebook, pool=True)}
        found["s_patch"] = model.lexical_map(z, codebook)
        if "w" in case:
            found |= gradients((s * case["w"]).sum(), x)
        if "bias" in case:
            found["s_bias"] = model.lexical_map(z, codebook, pool=True, bias=case["bias"])
        return found

    def theirs(self, up, case):
        z, codebook, w, bias = double(case, "z", "codebook", "w", "bias")
        logits = z @ codebook.T
        s, back = numpy_map(logits.max(1))
        d_logits = (np.arange(z.shape[1])[:, None] == logits.argmax(1)[:, None]) * back(w)[:, None]
        found = {"s": s, "grad_z": d_logits @ codebook, "grad_codebook": np.einsum("bnv,bnd->vd", d_logits, z)}
        found["s_bias"] = numpy_map(logits.max(1) + bias)[0]
        found["s_no_cls"] = numpy_map(logits[:, 1:].max(1))[0]
        return found | {"s_patch": numpy_map(logits)[0]}


class Head(nn.Linear):
    """The output embedding of a language model that has nothing else."""

    def get_output_embeddings(self):
        return self


class MapWord(Part):
    files = {"map_word": {}}
    functions = "lexvla.model.TextEncoder"
    gradient_left = True
    authors = "eq. 2 of a codebook's row"
    atol = 1e-6

    def inputs(self):
        return {"codebook": 0.3 * torch.randn(53, 16), "word_ids": torch.tensor([7, 0, 52, 7])}

    def ours(self, case):
        codebook = case["codebook"]
        lm = Head(*codebook.shape[::-1], bias=False)
        lm.weight.data.copy_(codebook)
        return {"s": model.TextEncoder(lm, torch.arange(len(codebook))).word(case["word_ids"])}

    def theirs(self, up, case):
        (codebook,) = double(case, "codebook")
        return {"s": numpy_map(codebook[case["word_ids"].numpy()] @ codebook.T)[0]}


class VdrImage(Part):
    """VDR's representation of an image, from its tokens on."""

    files = {"vdr_image": {}}
    functions = "lexvla.model.lexical_map lexvla.fast.MaxLogits lexvla.model.sparsify"
    authors = "VDR/src/ir/encoder/vdr_crossmodal_image.py:212"
    atol = 1e-6

    def inputs(self):
        return {"features": torch.randn(3, 16, 16), "codebook": 0.3 * torch.randn(120, 16), "topk": 11}

    def ours(self, case):
        s = model.lexical_map(case["features"], case["codebook"], pool=True)
        return {"s": s, "embed": model.sparsify(s, topk=case["topk"])}

    def theirs(self, up, case):
        class Tokens(SimpleNamespace):
            def __call__(self, images):
                return images

        encoder = Tokens(proj=case["codebook"], dtype=torch.float32, device="cpu", config=None)
        features, codebook = double(case, "features", "codebook")
        embed = up.image.VDRImageEncoder.embed(encoder, case["features"], topk=case["topk"])
        return {"s": numpy_map((features @ codebook.T).max(1))[0], "embed": embed}


class VdrTower(Part):
    more = {"vdr_tower": {}}
    functions = "lexvla.patchdis.VDRImage"
    authors = "VDR/src/ir/encoder/vdr_crossmodal_image.py:200"
    rtol, atol = 1e-4, 1e-5
    sizes = dict(width=16, layers=2, heads=2)

    def inputs(self):
        tower = patchdis.VDRImage(27_623, side=32, patch=8, **self.sizes)
        nn.init.normal_(tower.proj)
        nn.init.normal_(tower.positional_embedding)
        return {"images": torch.randn(2, 3, 32, 32), **prefixed("param/", tower.state_dict())}

    def ours(self, case):
        tower = patchdis.VDRImage(27_623, side=32, patch=8, **self.sizes).eval()
        tower.load_state_dict(case.group("param/"))
        return {"patches": tower(case["images"])}

    def theirs(self, up, case):
        settings = up.image.VDRImageEncoderConfig(resolution=32, patch_size=8, topk=100, **self.sizes)
        with mock.patch.object(AutoTokenizer, "from_pretrained", lambda *_, **__: None):
            tower = up.image.VDRImageEncoder(settings).eval()
        tower.load_state_dict(case.group("param/"))
        return {"patches": F.normalize(up.elu1p(tower(case["images"]) @ tower.proj.T), dim=-1)}


class VdrVocabulary(Part):
    """The pieces of BERT that VDR keeps."""

    more = {"vdr_vocabulary": {}}
    functions = "lexvla.patchdis.vdr_vocabulary"
    authors = "VDR/src/ir/encoder/vdr_crossmodal_text.py:156"

    def inputs(self):
        return {"size": 30_522}

    def ours(self, case):
        tokenizer = AutoTokenizer.from_pretrained(pretrained.minilm())
        return {"kept": patchdis.vdr_vocabulary(tokenizer.convert_ids_to_tokens(list(range(case["size"]))))}

    def theirs(self, up, case):
        left_out = set(up.left_out)
        return {"kept": [i for i in range(case["size"]) if i not in left_out]}


class Sparsify(Part):
    files = {"sparsify": {}}
    functions = "lexvla.model.sparsify"
    authors = "sec. 3.1, VDR/src/ir/utils/sparsify_utils.py:8, splade/splade/utils/utils.py:74"
    tolerances = {"*sparsity*": (1e-6, 0), "*": (0, 0)}
    unused = ("threshold",)  # in s_threshold

    def inputs(self):
        return {"s": sparse_rows(6, 64), "topk": 9}

    def ours(self, case):
        s, k = case["s"], case.get("topk")
        by_value, by_rank = model.sparsify(s), model.sparsify(s, topk=k)
        active = (by_value != 0).sum(-1)
        ratio = 1 - active.float().mean() / s.shape[-1]
        found = {"s_threshold": by_value, "active_threshold": active, "sparsity_threshold": ratio}
        found |= {"splade_sparsity_ratio": ratio, "splade_l0": active.float().mean(), "s_topk": by_rank}
        found["vdr_topk_mask"] = (by_rank != 0).long()
        return found | {"vdr_topk_sparse": by_rank, "splade_pruned": by_rank}

    def theirs(self, up, case):
        s, k, V = case["s"], case["topk"], case["s"].shape[-1]
        kept = s.double() > 1 / math.sqrt(V)
        found = {"s_threshold": s * kept, "active_threshold": kept.sum(-1), "s_topk": largest(s.numpy(), k)}
        found |= {"threshold": 1 / math.sqrt(V), "sparsity_threshold": 1 - kept.sum(-1).double().mean().item() / V}
        found["splade_sparsity_ratio"] = up.sparsity(V)(found["s_threshold"])
        found |= {"splade_l0": up.l0()(found["s_threshold"]), "splade_pruned": up.pruning(s, k, -1)}
        return found | {"vdr_topk_mask": up.topk_mask(s, k), "vdr_topk_sparse": up.topk_sparsify(s, k)}


# ------------------------------------------------------------------------------------------------------------- losses


class Loss(Part):
    """Gradients may differ by rtol of the largest entry: small entries are differences of large ones."""

    rtol = 1e-5

    def tolerance(self, name, case):
        if "grad" not in name:
            return self.rtol, 0.0
        return self.rtol, self.rtol * torch.as_tensor(dict.__getitem__(case, name)).abs().max().item()


class Penalties(Loss):
    files = {"penalties": {}}
    functions = "lexvla.model.overuse_penalty lexvla.model.flops_loss"
    authors = "eq. 6, 7, splade/splade/losses/regularization.py:18"
    # in overuse; of a variant that ours does not have, without a gradient through the weight
    unused = ("overuse_weight", "overuse_detached_grad")

    def inputs(self):
        return {"s": sparse_rows(8, 40)}

    def ours(self, case):
        found = {}
        for name, loss in (("overuse", model.overuse_penalty), ("flops", model.flops_loss)):
            s = leaf(case["s"])
            found[name] = loss(s)
            found[f"{name}_grad"] = gradients(found[name], {"s": s})["grad_s"]
        return found | {"splade_flops": found["flops"]}

    def theirs(self, up, case):
        (s,) = double(case, "s")
        (overuse, grad), m = numpy_penalty(s), s.mean(0)
        rows, weight = np.ones((len(s), 1)) / len(s), m / m.sum()
        found = {"overuse": overuse, "overuse_grad": grad, "overuse_weight": weight}
        found["overuse_detached_grad"] = rows * (len(m) * weight * 2 * m)
        found |= {"flops": (m**2).sum(), "flops_grad": rows * 2 * m}
        return found | {"splade_flops": up.flops()(case["s"])}


class Contrastive(Loss):
    files = {"contrastive": dict(tau=0.07)}
    more = {"contrastive_scale_100": dict(tau=0.01)}
    functions = "lexvla.model.contrastive_loss lexvla.fast.info_nce"
    authors = "eq. 5, VDR/src/ir/training/loss_utils.py:266"

    def tolerance(self, name, case):
        at_100 = dict.__getitem__(case, "logit_scale") > math.log(50)
        return tuple((10 if at_100 else 1) * x for x in super().tolerance(name, case))

    def inputs(self, tau):
        return {"s_img": sparse_rows(6, 50), "s_txt": sparse_rows(6, 50), "logit_scale": math.log(1 / tau)}

    def ours(self, case):
        x = case.leaves("s_img", "s_txt", "logit_scale")
        i2t, t2i = model.contrastive_loss(*x.values())
        loss = i2t + t2i
        found = {"loss_i2t": i2t, "loss_t2i": t2i, "loss": loss, "vdr_symmetric_nll": loss / 2}
        return found | gradients(loss, x)

    def theirs(self, up, case):
        losses, grads = numpy_nce(*double(case, "s_img", "s_txt", "logit_scale"))
        nll, _ = up.nll().calc(case["s_img"], case["s_txt"], temperature=math.exp(-case["logit_scale"]))
        found = {**prefixed("loss_", losses), "loss": sum(losses.values()), "vdr_symmetric_nll": nll}
        return found | prefixed("grad_", grads)


class TotalLoss(Loss):
    files = {"total_loss": {}}
    functions = "lexvla.model.total_loss"
    authors = "eq. 8"

    def inputs(self):
        x = {"s_img": sparse_rows(5, 45), "s_txt": sparse_rows(5, 45), "logit_scale": math.log(1 / 0.07)}
        return {**x, "lambda_img": 0.05, "lambda_txt": 0.1, "step": 700, "warmup_steps": 2000}

    def ours(self, case):
        x, sides = case.leaves("s_img", "s_txt", "logit_scale"), ("img", "txt")
        ramp = case["step"], case["warmup_steps"]
        weights = [train.quadratic_warmup(ramp[0], case[f"lambda_{side}"], ramp[1]) for side in sides]
        losses = model.total_loss(*x.values(), *weights)
        found = {f"lambda_{side}_t": weight for side, weight in zip(sides, weights, strict=True)}
        found |= {"overuse_img": losses["overuse_image"], "overuse_txt": losses["overuse_text"]}
        found |= {"loss": losses["loss"], "loss_contrastive": losses["i2t"] + losses["t2i"]}
        return found | gradients(losses["loss"], x)

    def theirs(self, up, case):
        x = dict(zip(("s_img", "s_txt"), double(case, "s_img", "s_txt"), strict=True))
        losses, grads = numpy_nce(*x.values(), *double(case, "logit_scale"))
        found = {"loss_contrastive": sum(losses.values())}
        found["loss"] = found["loss_contrastive"]
        for side in ("img", "txt"):
            weight = case[f"lambda_{side}"] * min(1, case["step"] / case["warmup_steps"]) ** 2
            value, grad = numpy_penalty(x[f"s_{side}"])
            found |= {f"lambda_{side}_t": weight, f"overuse_{side}": value}
            found["loss"] = found["loss"] + weight * value
            grads[f"s_{side}"] = grads[f"s_{side}"] + weight * grad
        return found | prefixed("grad_", grads)


# ---------------------------------------------------------------------------------------------- words, adapter, towers


class Prompt(Part):
    """Token ids of Llama's, which the file has, too, are of another program."""

    files = {"prompt": {}}
    functions = "lexvla.text.lexical_prompt"
    authors = "sec. 3.2.1"
    json = True

    def inputs(self):
        captions = ["a red apple", "Two kids play chess in the park.", "flag: Japan", "smiling face with heart-eyes"]
        return {"note": "prompt text printed in section 3.2.1", "cases": [{"caption": each} for each in captions]}

    def run(self, function, case):
        assert case["note"]
        return {"cases": [one | {"prompt": function(one["caption"])} for one in case["cases"]]}

    our = staticmethod(text.lexical_prompt)

    def their(self, up):
        printed = 'The focus of "The man is riding a white horse." lies on important words:"man", "riding", "white", '
        return lambda caption: f'{printed}"horse". The focus of "{caption}" lies on important words:'


class LastToken(Part):
    files = {"last_token": {}}
    functions = "lexvla.model.last_token"
    authors = "sec. 3.2.1"

    def inputs(self):
        lengths, places = torch.tensor([[3], [7], [1], [5]]), torch.arange(7)
        masks = {"mask_right": (places < lengths).long(), "mask_left": (places >= 7 - lengths).long()}
        return {"hidden": torch.randn(4, 7, 6), **masks}

    def ours(self, case):
        sides = [side for side in ("right", "left") if f"mask_{side}" in case]
        return {f"z_{side}": model.last_token(case["hidden"], case[f"mask_{side}"]) for side in sides}

    def theirs(self, up, case):
        found = {}
        for side in ("right", "left"):
            rows = zip(case["hidden"], case[f"mask_{side}"].bool(), strict=True)
            found[f"z_{side}"] = torch.stack([hidden[real][-1] for hidden, real in rows])
        return found


class Vocabulary(Part):
    files = {"vocabulary": {}}
    functions = "lexvla.text.refine_vocabulary"
    authors = "sec. 3.1"

    def inputs(self):
        counts = torch.randint(0, 5, (40,))
        return {"counts": counts, "special_ids": torch.tensor([0, 1, 2]), "min_count": 1, "max_size": 12}

    def ours(self, case):
        inputs = case["counts"], torch.as_tensor(case["special_ids"]).view(-1).tolist(), case["min_count"]
        kept = text.refine_vocabulary(*inputs)
        return {"kept": kept, "kept_max_size": text.refine_vocabulary(*inputs, case.get("max_size"))}

    def theirs(self, up, case):
        counts, special = case["counts"].tolist(), case["special_ids"].tolist()
        kept = [i for i, count in enumerate(counts) if count >= case["min_count"] and i not in special]
        return {"kept": kept, "kept_max_size": sorted(sorted(kept, key=lambda i: -counts[i])[: case["max_size"]])}


class Bags(Part):
    files = {"bow": {}}
    functions = "lexvla.text.bag_of_words"
    authors = "sec. 4.1, VDR/src/ir/utils/sparsify_utils.py:21"

    def inputs(self):
        ids, kept = torch.randint(0, 40, (4, 9)), torch.randperm(40)[:20].sort().values
        return {"token_ids": ids, "vocab_size": 40, "vocab_ids": kept}

    def ours(self, case):
        s = text.bag_of_words(case["token_ids"], case["vocab_ids"])
        assert max(case["token_ids"].max(), case["vocab_ids"].max()) < case.get("vocab_size", math.inf)
        return {"s": s, "bow": (s > 0).float(), "vdr_bow": (s > 0).float()}

    def theirs(self, up, case):
        rows = [[float(word in set(ids)) for word in case["vocab_ids"].tolist()] for ids in case["token_ids"].tolist()]
        bow = np.array(rows)
        s = (bow / np.sqrt(np.maximum(bow.sum(1, keepdims=True), 1))).astype(np.float32)
        return {"s": s, "bow": bow, "vdr_bow": up.bow(case["token_ids"], case["vocab_size"])[:, case["vocab_ids"]]}


class Lora(Part):
    files = {"lora": {}}
    functions = "lexvla.model.LoRALinear"
    authors = "sec. 3.3"
    rtol, atol = GRADIENT

    def inputs(self):
        x = {"x": torch.randn(4, 3, 7), "weight": torch.randn(9, 7), "bias": torch.randn(9), "alpha": 6.0}
        return {**x, "A": torch.randn(3, 7), "B": torch.randn(9, 3), "w": torch.randn(4, 3, 9)}

    def ours(self, case):
        case = {name: torch.as_tensor(case[name]).double() for name in self.inputs() if name in case}
        plain = nn.Linear(*case["weight"].shape[::-1], bias="bias" in case).double()
        plain.load_state_dict({name: case[name] for name in ("weight", "bias") if name in case})
        lora, x = model.LoRALinear(plain, len(case["A"]), case["alpha"].item()).double(), leaf(case["x"])
        lora.A.data = case["A"]
        found = {"y_zero_B": lora(x)}
        lora.B.data = case["B"]
        found["y"] = lora(x)
        assert plain.weight.grad is None
        leaves = {"A": lora.A, "B": lora.B, "x": x}
        found |= gradients((found["y"] * case["w"]).sum(), leaves)
        return found | {"merged": plain.weight + lora.scale * lora.B @ lora.A}

    def theirs(self, up, case):
        x, weight, bias, A, B, w = double(case, "x", "weight", "bias", "A", "B", "w")
        scale = case["alpha"] / len(A)
        merged = weight + scale * B @ A
        flat_x, flat_w = x.reshape(-1, x.shape[-1]), w.reshape(-1, w.shape[-1])
        found = {"y": x @ merged.T + bias, "y_zero_B": x @ weight.T + bias, "merged": merged, "grad_x": w @ merged}
        return found | {"grad_A": scale * B.T @ flat_w.T @ flat_x, "grad_B": scale * flat_w.T @ flat_x @ A.T}


def adapter_of(state: dict[str, Tensor], num_heads: int) -> model.VisualAdapter:
    hidden, dim = state["proj.fc1.weight"].shape
    adapter = model.VisualAdapter(dim, num_heads, hidden, len(state["proj.fc2.weight"]))
    adapter.load_state_dict(state)
    return adapter


def loud(module: nn.Module) -> dict[str, Tensor]:
    """Its weights, none of them small."""
    return {name: x + 0.2 * torch.randn_like(x) for name, x in module.state_dict().items()}


class Adapter(Part):
    files = {"adapter": {}}
    functions = "lexvla.model.VisualAdapter"
    gradient_left = True
    authors = "sec. 3.2.2, of an inferred layout; timm's Block and Mlp"

    def tolerance(self, name, case):
        return 0.0, 1e-4 * torch.as_tensor(dict.__getitem__(case, "z")).abs().max().item()

    def inputs(self):
        state = loud(model.VisualAdapter(24, 4, 20, 32))
        return {"y": torch.randn(2, 7, 24), "num_heads": 4, **prefixed("param/", state)}

    def ours(self, case):
        z = adapter_of(case.group("param/"), case["num_heads"])(case["y"])
        return {"z": z, "timm_z": z}

    def theirs(self, up, case):
        (y,), state, heads = double(case, "y"), case.group("param/"), case["num_heads"]
        hidden, dim = state["proj.fc1.weight"].shape
        norm = functools.partial(nn.LayerNorm, eps=1e-6)
        timm = {"block": Block(dim, heads, qkv_bias=True, norm_layer=norm)}
        timm = nn.ModuleDict(timm | {"proj": Mlp(dim, hidden, len(state["proj.fc2.weight"]))})
        timm.load_state_dict(state)
        with torch.no_grad():
            found = timm["proj"](timm["block"](case["y"]))
        return {"z": numpy_adapter(y, numpy_group(case, "param/"), heads), "timm_z": found}


OLDER = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value", "o_proj": "output.dense"}


def as_installed(state: dict[str, Tensor], backbone: Dinov2Model) -> dict[str, Tensor]:
    """Weights with transformers' present names -> with those of the installed version, which may be older."""
    if not state.keys() <= backbone.state_dict().keys():
        state = {re.sub("[qkvo]_proj", lambda match: OLDER[match[0]], name): array for name, array in state.items()}
    return state


def as_present(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights with the names of the installed version of transformers, which may be older -> with its present names."""
    for now, older in OLDER.items():
        state = {name.replace(older, now): array for name, array in state.items()}
    return state


def backbone_of(case: Case) -> Dinov2Model:
    backbone = Dinov2Model(Dinov2Config(**{name: value.item() for name, value in case.group("cfg/").items()})).eval()
    backbone.load_state_dict(as_installed(case.group("param/backbone."), backbone))
    return backbone


class ImageEncoder(Part):
    files = {"image_encoder": {}}
    functions = "lexvla.model.ImageEncoder"
    gradient_left = True
    authors = "eq. 3, 4; transformers' Dinov2Model"
    atol = 2e-5

    def inputs(self):
        cfg = dict(hidden_size=24, num_hidden_layers=2, num_attention_heads=4, mlp_ratio=2, image_size=16)
        cfg |= dict(patch_size=4, layerscale_value=1.0)
        backbone = as_present(Dinov2Model(Dinov2Config(**cfg)).state_dict())
        adapter = loud(model.VisualAdapter(24, 4, 18, 20))
        x = {"pixel_values": torch.randn(2, 3, 16, 16), "codebook": 0.3 * torch.randn(37, 20), **prefixed("cfg/", cfg)}
        return {**x, **prefixed("param/backbone.", backbone), **prefixed("param/adapter.", adapter)}

    def ours(self, case):
        adapter = adapter_of(case.group("param/adapter."), case["cfg/num_attention_heads"])
        encoder, pixels = model.ImageEncoder(backbone_of(case), adapter, case["codebook"]), case["pixel_values"]
        found = {"features": encoder.frozen(pixels), "z": encoder.tokens(pixels), "s": encoder(pixels)}
        every = torch.ones(len(pixels), found["z"].shape[1] - 1, dtype=torch.bool)
        return found | {"s_patch": encoder.patches(pixels), "s_no_cls": encoder.patch_set(pixels, every)}

    def theirs(self, up, case):
        with torch.no_grad():
            features = backbone_of(case).double()(pixel_values=case["pixel_values"].double()).last_hidden_state.numpy()
        (codebook,), heads = double(case, "codebook"), case["cfg/num_attention_heads"]
        z = numpy_adapter(features, numpy_group(case, "param/adapter."), heads)
        logits = z @ codebook.T
        found = {"features": features, "z": z, "s": numpy_map(logits.max(1))[0]}
        return found | {"s_patch": numpy_map(logits[:, 1:])[0], "s_no_cls": numpy_map(logits[:, 1:].max(1))[0]}


def lm_of(case: Case) -> LlamaForCausalLM:
    cfg = {name: value.item() for name, value in case.group("cfg/").items()}
    cfg = {name: value if name == "rms_norm_eps" else int(value) for name, value in cfg.items()}
    lm = LlamaForCausalLM(LlamaConfig(**cfg, tie_word_embeddings=bool(case["tied"]))).eval()
    found = lm.load_state_dict(case.group("param/"), strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}
    return lm


class TextTower(Part):
    """In float64 on both sides: rounding in float32 uses up the tolerance."""

    files = {"text_encoder": dict(tied=0)}
    more = {"text_encoder_tied": dict(tied=1)}
    functions = "lexvla.model.TextEncoder lexvla.model.add_lora lexvla.model.last_token"
    gradient_left = True
    authors = "sec. 3.2.1, 3.3; transformers' LlamaForCausalLM"
    atol = 3e-5

    def inputs(self, tied):
        cfg = dict(vocab_size=80, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
        cfg |= dict(num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5)
        lm = LlamaForCausalLM(LlamaConfig(**cfg, tie_word_embeddings=bool(tied), initializer_range=0.2))
        state, lengths = lm.state_dict(), torch.tensor([[8], [5], [3]])
        lora = {}
        for name, module in lm.model.named_modules(prefix="lora/model"):
            if isinstance(module, nn.Linear):
                lora[f"{name}.A"] = 0.2 * torch.randn(2, module.in_features)
                lora[f"{name}.B"] = 0.2 * torch.randn(module.out_features, 2)
        mask = (torch.arange(8) < lengths).long()
        x = {"input_ids": torch.randint(1, 80, (3, 8)) * mask, "attention_mask": mask, "tied": tied}
        x |= {"vocab_ids": torch.randperm(80)[:31].sort().values, "lora_alpha": 4.0, "lora_rank": 2}
        return {**x, **prefixed("cfg/", cfg), **prefixed("param/", state), **lora}

    def ours(self, case):
        lm, ids, mask = lm_of(case), case["input_ids"], case["attention_mask"]
        encoder = model.TextEncoder(lm, case["vocab_ids"])
        found, lora = {"codebook": encoder.codebook.clone()}, case.group("lora/")
        encoder.double()
        for end in ("_base", ""):
            if not end:
                targets = tuple(sorted({path.split(".")[-2] for path in lora}))
                model.add_lora(lm, case["lora_rank"], case["lora_alpha"], targets).double()
                for path, value in lora.items():
                    lm.get_parameter(path).data.copy_(value)
            with torch.no_grad():
                hidden = lm.model(ids, attention_mask=mask).last_hidden_state
                found |= {f"z{end}": encoder.hidden(ids, mask), f"s{end}": encoder(ids, mask)}
            padding = torch.as_tensor(case[f"hidden{end}"]).double()  # means nothing there
            found[f"hidden{end}"] = torch.where(mask[..., None].bool(), hidden, padding)
        return found

    def theirs(self, up, case):
        lm, mask = lm_of(case).double(), case["attention_mask"]
        codebook = lm.lm_head.weight[case["vocab_ids"]].detach().numpy()
        found, lora = {"codebook": codebook}, case.group("lora/")
        for end in ("_base", ""):
            for path in {path.rpartition(".")[0] for path in lora} if not end else ():
                A, B = lora[f"{path}.A"].double(), lora[f"{path}.B"].double()
                lm.get_submodule(path).weight.data += case["lora_alpha"] / case["lora_rank"] * B @ A
            with torch.no_grad():
                hidden = lm.model(case["input_ids"], attention_mask=mask).last_hidden_state.numpy()
            z = hidden[np.arange(len(mask)), mask.sum(1).numpy() - 1]
            found |= {f"hidden{end}": hidden, f"z{end}": z, f"s{end}": numpy_map(z @ codebook.T)[0]}
        return found


# ------------------------------------------------------------------------------------------------ schedules, evaluation


class Schedules(Part):
    files = {"schedules": dict(warmup=0)}
    more = {"schedules_warmup": dict(warmup=30)}
    functions = "lexvla.train.quadratic_warmup lexvla.train.learning_rate"
    authors = "sec. 4, splade/splade/losses/regularization.py:27, open_clip_train/scheduler.py:cosine_lr"
    rtol = 1e-6

    def inputs(self, warmup):
        x = {"lambda_steps": torch.tensor([1, 2, 10, 500, 1000, 1999, 2000, 2001, 2500]), "lambda_final": 5e-4}
        x |= {"lambda_warmup": 2000, "lr_steps": torch.arange(0, 200, 7), "lr_base": 5e-4}
        return {**x, "lr_total": 200, "lr_warmup": warmup}

    def ours(self, case):
        found = {}
        if "lambda_t" in case:
            ramp = case["lambda_final"], case["lambda_warmup"]
            weights = [train.quadratic_warmup(t, *ramp) for t in case["lambda_steps"].tolist()]
            found = {"lambda_t": weights, "splade_lambda_t": weights}
        if "lr" in case:
            schedule = case["lr_base"], case["lr_total"], case["lr_warmup"]
            rates = [train.learning_rate(step, *schedule) for step in case["lr_steps"].tolist()]
            found |= {"lr": rates, "openclip_lr": rates}
        return found

    def theirs(self, up, case):
        value, steps, base = case["lambda_final"], case["lambda_warmup"], case["lr_base"]
        total, warmup, at = case["lr_total"], case["lr_warmup"], case["lr_steps"].tolist()
        scheduler, times = up.scheduler(value, steps), case["lambda_steps"].tolist()
        splade = [0.0, *(scheduler.step() for _ in range(max(times)))]
        found = {"lambda_t": [value * min(1, t / steps) ** 2 for t in times]}
        found["splade_lambda_t"] = [splade[t] for t in times]
        half = [(1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2 for step in at]
        pairs = zip(at, half, strict=True)
        found["lr"] = [base * ((step + 1) / warmup if step < warmup else cosine) for step, cosine in pairs]
        openclip = cosine_lr(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), base, warmup, total)
        return found | {"openclip_lr": [float(openclip(step)) for step in at]}


def numpy_ranks(sim: np.ndarray, owner: np.ndarray, strict: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """0-based ranks of the best caption of each image, and of each caption's image; ties count against, or not."""
    beside = np.greater if strict else np.greater_equal
    own = owner[None] == np.arange(len(sim))[:, None]
    best = np.where(own, sim, -np.inf).max(1, keepdims=True)
    of_text = sim[owner, np.arange(len(owner))]
    return (beside(sim, best) & ~own).sum(1), (beside(sim, of_text) & ~own).sum(0)


class Retrieval(Part):
    files = {"retrieval": {}}
    functions = "lexvla.eval.retrieval_recall lexvla.eval.sparsity_sweep"
    authors = "sec. 4.1, 4.3"
    rtol = 1e-6
    unused = ("sweep_recall1_optimistic",)  # what it would be if ties were hits

    def inputs(self):
        owner = torch.arange(60) // 5
        s_img = sparse_rows(12, 70)
        s_txt = F.normalize(s_img[owner] + 0.7 * sparse_rows(60, 70), dim=-1)
        x = {"s_img": s_img, "s_txt": s_txt, "image_of_text": owner, "ks": torch.tensor([1, 5, 10])}
        return {**x, "sweep_topk": torch.tensor([1, 2, 4, 8, 16, 32, 70])}

    def ours(self, case):
        owner, ks = case["image_of_text"], torch.as_tensor(case.get("ks", 1)).view(-1).tolist()
        s_img, s_txt, names = case.get("s_img"), case.get("s_txt"), ("i2t", "t2i")
        sim = case["sim"] if "sim" in case else s_img @ s_txt.T
        ranks = retrieval_ranks_from_scores(sim, owner)
        found = {f"{name}_rank": each for name, each in zip(names, ranks, strict=True)}
        if s_img is None:
            recalls = evaluation.retrieval_recall(sim, owner, ks)
            return found | {f"{name}_recall": recall for name, recall in zip(names, recalls, strict=True)}
        sparse = model.sparsify(s_img), model.sparsify(s_txt)
        for prefix, each in (("", sim), ("threshold_", sparse[0] @ sparse[1].T)):
            recalls = evaluation.retrieval_recall(each, owner, ks)
            found |= {f"{prefix}{name}_recall": recall for name, recall in zip(names, recalls, strict=True)}
        if "sweep_topk" in case:
            found["sweep_recall1"] = evaluation.sparsity_sweep(s_img, s_txt, owner, case["sweep_topk"].tolist())
        return found | {f"threshold_active_{a}": (s > 0).sum(1) for a, s in zip(("img", "txt"), sparse, strict=True)}

    def theirs(self, up, case):
        s_img, s_txt, owner = case["s_img"].numpy(), case["s_txt"].numpy(), case["image_of_text"].numpy()

        def recalls(a, b, ks, strict=False):
            ranks = numpy_ranks(a.astype(np.float64) @ b.T.astype(np.float64), owner, strict)
            return ranks, [[(each < k).mean() for k in ks] for each in ranks]

        found, ks, names = {}, case["ks"].view(-1).tolist(), ("i2t", "t2i")
        ranks, recall = recalls(s_img, s_txt, ks)
        found |= {f"{name}_rank": each for name, each in zip(names, ranks, strict=True)}
        sparse = [s * (s > 1 / math.sqrt(s.shape[1])) for s in (s_img, s_txt)]
        for prefix, pair in (("", recall), ("threshold_", recalls(*sparse, ks)[1])):
            found |= {f"{prefix}{name}_recall": each for name, each in zip(names, pair, strict=True)}
        for end, strict in (("", False), ("_optimistic", True)):
            pairs = [(largest(s_img, k), largest(s_txt, k)) for k in case["sweep_topk"].tolist()]
            found[f"sweep_recall1{end}"] = np.array([recalls(*pair, [1], strict)[1] for pair in pairs])[..., 0]
        return found | {f"threshold_active_{a}": (s > 0).sum(1) for a, s in zip(("img", "txt"), sparse, strict=True)}


class PatchDis(Part):
    files = {"patchdis": {}}
    functions = "lexvla.patchdis.patchdis"
    authors = "sec. 3.4"
    tolerances = {"miou*": (1e-6, 0), "iou": (1e-6, 0), "*": (0, 0)}
    unused = ("sim", "pred*")  # in the counts
    variants = {"": {}, "_present": {"present_only": True}, "_bg": {"background": True}}

    def inputs(self):
        masks = torch.randint(0, 4, (3, 2, 2)).repeat_interleave(4, 1).repeat_interleave(4, 2)  # class 4 occurs nowhere
        masks = torch.where(torch.rand(3, 8, 8) < 0.2, 255, masks)
        x = {"s_patch": sparse_rows(3, 16, 40), "s_class": sparse_rows(5, 40), "grid": torch.tensor([4, 4])}
        return {**x, "masks": masks, "num_classes": 5}

    def ours(self, case):
        inputs, found = (case["s_patch"], case["s_class"], tuple(case["grid"].tolist()), case["masks"]), {}
        assert len(case["s_class"]) == case.get("num_classes", len(case["s_class"]))
        for end, options in self.variants.items():
            counts = patchdis.patchdis(*inputs, case.get("ignore", 255), **options)
            found |= {f"{n}{end}": x for n, x in zip(("intersection", "union", "miou"), counts, strict=True)}
        return found | {"iou": found["intersection"] / found["union"]}

    def theirs(self, up, case):
        (s_patch, s_class), masks = double(case, "s_patch", "s_class"), case["masks"].numpy()
        (gh, gw), C, (_, H, W) = case["grid"].tolist(), case["num_classes"], masks.shape
        sim = s_patch @ s_class.T
        present = np.array([[(mask == c).any() for c in range(C)] for mask in masks])
        restricted = np.where(present[:, None], sim, -np.inf)
        found = {"sim": sim} | {
            f"pred{end}": x.argmax(-1).reshape(-1, gh, gw) for end, x in (("", sim), ("_present", restricted))
        }
        rows, columns = np.arange(H) * gh // H, np.arange(W) * gw // W
        for end in self.variants:
            grid = found["pred_present" if end == "_present" else "pred"]
            pred = grid[:, rows][:, :, columns]
            counted = np.ones(masks.shape, dtype=bool) if end == "_bg" else masks != 255
            both = [((pred == c) & (masks == c)).sum() for c in range(C)]
            either = [(((pred == c) | (masks == c)) & counted).sum() for c in range(C)]
            both, either = np.array(both, dtype=np.float64), np.array(either, dtype=np.float64)
            with np.errstate(invalid="ignore"):
                iou = both / either
            found |= {f"intersection{end}": both, f"union{end}": either, f"miou{end}": np.nanmean(iou)}
            found |= {"iou": iou} if not end else {}
        return found


class Usage(Part):
    files = {"usage": {}}
    functions = "lexvla.eval.usage"
    authors = "ours, for fig. 6"
    rtol = 1e-5

    def inputs(self):
        return {"s": sparse_rows(16, 50), "topk": 5}

    def ours(self, case):
        found = evaluation.usage(case["s"], case["topk"])
        return found | {"usage_entropy": found.pop("entropy")}

    def theirs(self, up, case):
        (s,) = double(case, "s")
        frequency, mean = (largest(s, case["topk"]) > 0).mean(0), s.mean(0)
        share = mean / mean.sum()
        found = {"document_frequency": frequency, "max_document_frequency": frequency.max(), "mean_activation": mean}
        return found | {"usage_entropy": -(share * np.log(share)).sum()}


class Explain(Part):
    files = {"explain": {}}
    functions = "lexvla.plots.explain"
    authors = "fig. 1"
    atol = 1e-7
    unused = ("contribution", "similarity")  # of which the five largest are compared; their sum

    def inputs(self):
        return {"s_img": sparse_rows(2, 30), "s_txt": sparse_rows(2, 30)}

    def ours(self, case):
        values, index = plots.explain(case["s_img"], case["s_txt"], case["top_index"].shape[-1])
        return {"top_value": values, "top_index": index}

    def theirs(self, up, case):
        s_img, s_txt = double(case, "s_img", "s_txt")
        each = s_img * s_txt
        index = np.argsort(-each, axis=-1, kind="stable")[:, :5]
        found = {"contribution": each, "similarity": each.sum(-1), "top_index": index}
        return found | {"top_value": np.take_along_axis(each, index, -1)}
