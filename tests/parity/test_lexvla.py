"""LexVLA beside its predecessors' functions: `pytest tests/parity/test_lexvla.py -s --upstream PATH`.

LexVLA's authors have released no code. PATH is a folder with clones of the code that computes the same quantities,
PATH/VDR (jzhoubu/VDR@12c3e7a) and PATH/splade (naver/splade@8dcd33a), or one of these two. Prints the table of
differences and time ratios.
"""

import ast
import copy
import importlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr as openclip_cosine_lr
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lexvla.config import Config
from lexvla.fast import MaxLogits
from lexvla.model import (
    ImageEncoder,
    LexVLA,
    LoRALinear,
    TextEncoder,
    contrastive_loss,
    elu1p,
    flops_loss,
    lexical_map,
    sparsify,
)
from lexvla.patchdis import VDRImage, vdr_vocabulary
from lexvla.text import bag_of_words
from lexvla.tokens import Precomputed
from lexvla.train import BETAS, learning_rate, quadratic_warmup, rates, train_step
from shared import pretrained

from . import Table, check_commit, race, trajectory

COMMITS = {"VDR": "12c3e7a", "splade": "8dcd33a"}


def take(file: Path, name: str) -> Any:
    """A function, class or assigned value of a file whose imports are not installed."""
    nodes = ast.parse(file.read_text()).body
    found = next(n for n in nodes if name in (getattr(n, "name", None), *(ast.unparse(t) for t in targets(n))))
    scope = {"torch": torch, "F": F, "T": torch.Tensor, "Tuple": tuple, "Union": Any, "np": Any}
    scope["Union"] = importlib.import_module("typing").Union
    scope["np"] = importlib.import_module("numpy")
    helpers = [n for n in nodes if isinstance(n, ast.FunctionDef)] if file.name == "sparsify_utils.py" else []
    exec(compile(ast.Module([*helpers, found], []), str(file), "exec"), scope)
    return scope[name]


def targets(node: ast.AST) -> list[ast.expr]:
    return node.targets if isinstance(node, ast.Assign) else []


def vdr_image_encoder(root: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The module of VDR's image tower, without its tokenizer, which would be downloaded on import."""
    package = ModuleType("vdr_ir")
    package.__path__ = [str(root / "src/ir")]
    monkeypatch.setitem(sys.modules, "vdr_ir", package)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **kwargs: None)
    return importlib.import_module("vdr_ir.encoder.vdr_crossmodal_image")


@pytest.fixture(scope="module")
def roots(request: pytest.FixtureRequest) -> dict[str, Path]:
    upstream = request.config.getoption("upstream") or pytest.skip("needs --upstream PATH")
    home = upstream.parent if upstream.name in COMMITS else upstream  # one of the clones, or the folder of both
    roots = {name: home / name for name in COMMITS}
    for name, root in roots.items():
        if not root.is_dir():
            pytest.fail(f"{root} is missing: --upstream is a folder with clones named {' and '.join(COMMITS)}")
        check_commit(root, COMMITS[name])
    return roots


@pytest.fixture(scope="module")
def table(roots: dict[str, Path]):
    table = Table(next(iter(roots.values())).parent)
    yield table
    print(f"\n{table}")


def gradients(function, *leaves: torch.Tensor) -> list[torch.Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in leaves]
    torch.manual_seed(0)
    value = function(*leaves)
    (value * torch.randn_like(value)).sum().backward()
    return [x.grad for x in leaves]


def test_map_and_pooling(roots, table, monkeypatch):
    their_elu1p = take(roots["VDR"] / "src/ir/utils/sparsify_utils.py", "elu1p")
    torch.manual_seed(0)
    x = 5 * torch.randn(64, 5000)
    (a, b), seconds = race(lambda: their_elu1p(x), lambda: elu1p(x))
    table.compare("elu1p", their_elu1p, "elu1p", a, b, rtol=1e-6, atol=1e-7, seconds=seconds)

    def their_pool(z, codebook):
        return F.normalize(their_elu1p((z @ codebook.t()).max(1)[0]))

    z, codebook = torch.randn(8, 50, 64), 0.2 * torch.randn(3000, 64)
    (a, b), _ = race(lambda: their_pool(z, codebook), lambda: lexical_map(z, codebook, pool=True))
    grads, seconds = race(lambda: gradients(their_pool, z, codebook),
                          lambda: gradients(lambda *x: lexical_map(*x, pool=True), z, codebook))  # fmt: skip
    where = "VDR/src/ir/encoder/vdr_crossmodal_image.py:220"
    table.compare(
        "map with pooling", where, "lexical_map", a, b, gradients=grads, rtol=1e-4, atol=1e-6, seconds=seconds
    )
    assert MaxLogits.apply(z, codebook).equal((z @ codebook.T).amax(1))


def test_image_tower(roots, table, monkeypatch):
    module = vdr_image_encoder(roots["VDR"], monkeypatch)
    config = module.VDRImageEncoderConfig(resolution=32, patch_size=8, width=16, layers=2, heads=2, topk=100)
    torch.manual_seed(0)
    encoder = module.VDRImageEncoder(config).eval()
    torch.nn.init.normal_(encoder.proj)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        s = lexical_map(encoder(images), encoder.proj, pool=True)
        ours = VDRImage(len(encoder.proj), side=32, patch=8, width=16, layers=2, heads=2).eval()
        ours.load_state_dict(encoder.state_dict())
        patches = F.normalize(module.elu1p(encoder(images) @ encoder.proj.T), dim=-1)
        table.compare(
            "patches", module.VDRImageEncoder.forward, "VDRImage", patches, ours(images), rtol=1e-4, atol=1e-5
        )
        table.compare("sparse image representation", module.VDRImageEncoder.embed, "lexical_map, sparsify",
                      encoder.embed(images), sparsify(s, topk=100), rtol=1e-5, atol=1e-6)  # fmt: skip


def test_vocabulary(roots, table):
    """Our vocabulary leaves out the pieces in VDR's list."""
    pieces = AutoTokenizer.from_pretrained(pretrained.minilm()).convert_ids_to_tokens(list(range(30_522)))
    left_out = take(roots["VDR"] / "src/ir/encoder/vdr_crossmodal_text.py", "INVALID_TOKEN_IDS")
    kept = [i for i in range(30_522) if i not in set(left_out)]
    table.compare("vocabulary", "VDR/src/ir/encoder/vdr_crossmodal_text.py:156", "vdr_vocabulary", kept,
                  vdr_vocabulary(pieces), rtol=0, atol=0)  # fmt: skip


def test_sparsification(roots, table):
    torch.manual_seed(0)
    s = F.normalize(torch.rand(32, 4000), dim=-1)
    for root, file, name in (
        ("VDR", "src/ir/utils/sparsify_utils.py", "topk_sparsify"),
        ("splade", "splade/utils/utils.py", "pruning"),
    ):
        theirs = take(roots[root] / file, name)
        arguments = (100,) if root == "VDR" else (100, -1)
        (a, b), seconds = race(lambda f=theirs, k=arguments: f(s, *k), lambda: sparsify(s, topk=100))
        table.compare("top-k", theirs, "sparsify", a, b, rtol=0, atol=0, seconds=seconds)
    few = sparsify(s)
    ratio = take(roots["splade"] / "splade/losses/regularization.py", "SparsityRatio")
    table.compare("sparsity ratio", ratio.__call__, "1 - l0 / V", ratio(4000)(few),
                  1 - (few != 0).sum(-1).float().mean() / 4000)  # fmt: skip


def test_losses(roots, table):
    torch.manual_seed(0)
    s_img, s_txt = (F.normalize(torch.rand(32, 500), dim=-1) for _ in range(2))
    theirs = take(roots["VDR"] / "src/ir/training/loss_utils.py", "SymmetryBiEncoderNllLoss")

    def their_loss(a, b):
        result = theirs().calc(a, b, temperature=0.07)
        return 2 * (result[0] if isinstance(result, tuple) else result)

    def our_loss(a, b):
        return sum(contrastive_loss(a, b, torch.tensor(1 / 0.07).log()))

    (a, b), seconds = race(lambda: their_loss(s_img, s_txt), lambda: our_loss(s_img, s_txt))
    grads = gradients(their_loss, s_img, s_txt), gradients(our_loss, s_img, s_txt)
    table.compare("InfoNCE, both ways, summed", theirs.calc, "contrastive_loss", a, b, gradients=grads, seconds=seconds)
    flops = take(roots["splade"] / "splade/losses/regularization.py", "FLOPS")
    (a, b), seconds = race(lambda: flops()(s_img), lambda: flops_loss(s_img))
    grads = gradients(flops(), s_img), gradients(flops_loss, s_img)
    table.compare("FLOPs", flops.__call__, "flops_loss", a, b, gradients=grads, rtol=1e-5, atol=1e-9, seconds=seconds)


def test_bags(roots, table):
    torch.manual_seed(0)
    ids, kept = torch.randint(0, 3000, (64, 20)), torch.arange(5, 3000, 2)
    theirs = take(roots["VDR"] / "src/ir/utils/sparsify_utils.py", "build_bow_mask")
    (a, b), seconds = race(lambda: F.normalize(theirs(ids, 3000)[:, kept]), lambda: bag_of_words(ids, kept))
    table.compare("bag of words", theirs, "bag_of_words", a, b, rtol=1e-6, atol=1e-7, seconds=seconds)


def test_schedules(roots, table):
    theirs = take(roots["splade"] / "splade/losses/regularization.py", "RegWeightScheduler")
    scheduler = theirs(5e-4, 2000)
    a, b = [scheduler.step() for _ in range(2500)], [quadratic_warmup(t, 5e-4, 2000) for t in range(1, 2501)]
    table.compare("penalty's warm-up", theirs.step, "quadratic_warmup", a, b, rtol=1e-9, atol=0)
    parameter = torch.nn.Parameter(torch.zeros(1))
    for warmup in (0, 30):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        set_lr = openclip_cosine_lr(optimizer, 5e-4, warmup, 200)
        a, b = [set_lr(step) for step in range(200)], [learning_rate(step, 5e-4, 200, warmup) for step in range(200)]
        table.compare(
            "learning rate", "open_clip_train/scheduler.py cosine_lr", "learning_rate", a, b, rtol=1e-9, atol=1e-15
        )


def test_text_tower_is_next_token_logits(table):
    torch.manual_seed(0)
    lm = LlamaForCausalLM(LlamaConfig(vocab_size=90, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
                                      num_attention_heads=4)).eval()  # fmt: skip
    ids, mask = torch.randint(0, 90, (3, 7)), torch.ones(3, 7, dtype=torch.long)
    with torch.no_grad():
        a = F.normalize(elu1p(lm(ids).logits[:, -1]), dim=-1)
        b = TextEncoder(lm, torch.arange(90))(ids, mask)
    table.compare("text representation", "transformers LlamaForCausalLM.forward", "TextEncoder", a, b, atol=1e-6)


# ------------------------------------------------------------------------------------------------- training trajectory


class TextTower(torch.nn.Module):
    """The trained part of the text tower: LoRA, here on one linear map of states (B, d), then the frozen codebook."""

    def __init__(self, codebook: torch.Tensor):
        super().__init__()
        self.linear = LoRALinear(torch.nn.Linear(*codebook.shape[1:] * 2, bias=False), rank=4, alpha=16)
        self.register_buffer("codebook", codebook)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return lexical_map(self.linear(states), self.codebook)


def numpy_map(x: np.ndarray) -> tuple[np.ndarray, Callable[[np.ndarray], np.ndarray]]:
    """normalize(elu1p(x)) of logits (N, V), eq. 2, and a function from its gradient to that of x."""
    positive = x >= 0
    slope = np.where(positive, 1, np.exp(np.where(positive, 0, x)))
    e = np.where(positive, x + 1, slope)
    norm = np.sqrt((e**2).sum(1, keepdims=True))
    s = e / norm
    return s, lambda ds: (ds - s * (s * ds).sum(1, keepdims=True)) / norm * slope


def numpy_penalty(s: np.ndarray) -> tuple[float, np.ndarray]:
    """V sum m^3 / sum m of s (N, V) with column means m, eq. 7, and its gradient with respect to s."""
    m, V = s.mean(0), s.shape[1]
    total, cubes = m.sum(), (m**3).sum()
    return V * cubes / total, V * (3 * m**2 / total - cubes / total**2)[None].repeat(len(s), 0) / len(s)


def log_softmax(x: np.ndarray, axis: int) -> np.ndarray:
    x = x - x.max(axis, keepdims=True)
    return x - np.log(np.exp(x).sum(axis, keepdims=True))


def numpy_gradients(
    p: dict[str, np.ndarray], y: np.ndarray, h: np.ndarray, weights: tuple[float, float]
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of eq. 8 for tokens y (N, n, D) and states h (N, d), and its gradients, derived by hand."""
    z = y @ p["image.adapter.weight"].T + p["image.adapter.bias"]
    logits, scale = z @ p["image.codebook"].T, 4.0
    A, B, words = p["text.linear.A"], p["text.linear.B"], p["text.codebook"]
    s_img, back_img = numpy_map(logits.max(1))
    s_txt, back_txt = numpy_map((h @ p["text.linear.linear.weight"].T + scale * h @ A.T @ B.T) @ words.T)

    pairs, n = np.exp(p["logit_scale"]) * s_img @ s_txt.T, len(y)
    rows, columns = log_softmax(pairs, 1), log_softmax(pairs, 0)
    penalties = numpy_penalty(s_img), numpy_penalty(s_txt)
    loss = -(np.trace(rows) + np.trace(columns)) / n + sum(w * c for w, (c, _) in zip(weights, penalties, strict=True))

    d_pairs = (np.exp(rows) + np.exp(columns) - 2 * np.eye(n, dtype=y.dtype)) / n
    scaled = np.exp(p["logit_scale"]) * d_pairs
    dx_img = back_img(scaled @ s_txt + weights[0] * penalties[0][1])
    dx_txt = back_txt(scaled.T @ s_img + weights[1] * penalties[1][1])
    d_logits = (np.arange(y.shape[1])[:, None] == logits.argmax(1)[:, None]) * dx_img[:, None]
    dz, d_state = d_logits @ p["image.codebook"], dx_txt @ words
    return loss, {
        "logit_scale": (d_pairs * pairs).sum(),
        "image.codebook": np.einsum("bnv,bnd->vd", d_logits, z),
        "image.adapter.weight": np.einsum("bnd,bnk->dk", dz, y),
        "image.adapter.bias": dz.sum((0, 1)),
        "text.linear.A": scale * (d_state @ B).T @ h,
        "text.linear.B": scale * d_state.T @ (h @ A.T),
    }


def numpy_loop(start: dict[str, np.ndarray], batches: Iterable, steps: int, cfg: Config) -> Iterator[float]:
    """Losses of Adam on eq. 8, with warm-up and half a cosine, quadratic warm-up of penalties, capped `logit_scale`."""
    p, first, second = dict(start), {}, {}
    for t, (y, h) in enumerate(batches, 1):
        ramp = min(1.0, t / cfg.penalty_warmup) ** 2
        loss, gradients = numpy_gradients(p, y, h, (ramp * cfg.lambda_image, ramp * cfg.lambda_text))
        lr = cfg.lr * t / cfg.warmup
        if t > cfg.warmup:
            lr = cfg.lr * (1 + np.cos(np.pi * (t - 1 - cfg.warmup) / (steps - cfg.warmup))) / 2
        for name, g in gradients.items():
            first[name] = BETAS[0] * first.get(name, 0) + (1 - BETAS[0]) * g
            second[name] = BETAS[1] * second.get(name, 0) + (1 - BETAS[1]) * g**2
            root = np.sqrt(second[name] / (1 - BETAS[1] ** t)) + cfg.eps
            p[name] = (p[name] - float(lr) * first[name] / (1 - BETAS[0] ** t) / root).astype(y.dtype)
        p["logit_scale"] = np.minimum(p["logit_scale"], np.log(100).astype(y.dtype))
        yield float(loss)


def test_trajectory():
    """Our training step against a loop in NumPy with gradients derived by hand: the authors have released no code.

    Needs no clone. Tokens are patches of the images of a shard, and the adapter is linear; a caption's state is the
    mean of its words' rows in the text codebook, which is random; LoRA is on one linear map of it.
    """
    steps, side, patch, d = trajectory.STEPS, 16, 4, 24
    _, pixels, captions = trajectory.shard(side)
    torch.manual_seed(0)
    patches = F.unfold(pixels, patch, stride=patch).mT
    y = torch.cat([patches.mean(1, keepdim=True), patches], dim=1)
    split = [re.findall(r"\w+", caption.lower()) for caption in captions]
    common = [word for word, _ in Counter(word for words in split for word in words).most_common(300)]
    hot = torch.tensor([[float(word in words) for word in common] for words in split])
    codebook = torch.randn(len(common), d)
    h = hot @ codebook / hot.sum(1, keepdim=True).clamp(min=1)
    image = ImageEncoder(Precomputed(), torch.nn.Linear(y.shape[2], d), codebook)
    start, rows = LexVLA(image, TextTower(codebook)), trajectory.orders(len(captions), 32, steps)
    cfg = Config(lr=1e-2, warmup=20, penalty_warmup=100, lambda_image=0.3, lambda_text=0.3, precision="fp32")

    def theirs(dtype):
        state = {name: value.to(dtype).numpy() for name, value in start.state_dict().items()}
        return numpy_loop(state, ((y[b].to(dtype).numpy(), h[b].to(dtype).numpy()) for b in rows), steps, cfg)

    def ours(dtype):
        model = copy.deepcopy(start).to(dtype)
        trained = [p for p in model.parameters() if p.requires_grad]
        adam = torch.optim.Adam(trained, lr=cfg.lr, betas=BETAS, eps=cfg.eps, fused=True)
        scaler = torch.amp.GradScaler(enabled=False)
        for step, b in enumerate(rows):
            now = rates(cfg, step, steps)
            adam.param_groups[0]["lr"] = now["lr"]
            lambdas = now["lambda_image"], now["lambda_text"]
            yield train_step(model, (y[b].to(dtype), (h[b].to(dtype),)), lambdas, adam, scaler, cfg)

    table = Table(Path(__file__).parent)
    curves, against = trajectory.run(theirs, ours), "a loop in NumPy"
    trajectory.compare(table, "lexvla", numpy_loop, "train_step, total_loss", curves, against=against)
    print(f"\n{table}")
