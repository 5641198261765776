"""LexVLA's training against a loop in NumPy: `pytest tests/parity/test_lexvla.py`. It needs no clone, since the
authors have released no code. The parts are in tests/adapters/lexvla.py.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lexvla.config import Config
from lexvla.model import ImageEncoder, LexVLA, LoRALinear, lexical_map
from lexvla.tokens import Precomputed
from lexvla.train import BETAS, rates, train_step
from tests.adapters.lexvla import numpy_map, numpy_nce, numpy_penalty

from . import Table, trajectory


class TextTower(torch.nn.Module):
    """The trained part of the text tower: LoRA, here on one linear map of states (B, d), then the frozen codebook."""

    def __init__(self, codebook: torch.Tensor):
        super().__init__()
        self.linear = LoRALinear(torch.nn.Linear(*codebook.shape[1:] * 2, bias=False), rank=4, alpha=16)
        self.register_buffer("codebook", codebook)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return lexical_map(self.linear(states), self.codebook)


def numpy_gradients(
    p: dict[str, np.ndarray], y: np.ndarray, h: np.ndarray, weights: tuple[float, float]
) -> tuple[float, dict[str, np.ndarray]]:
    """Loss of eq. 8 for tokens y (N, n, D) and states h (N, d), and its gradients, derived by hand."""
    z = y @ p["image.adapter.weight"].T + p["image.adapter.bias"]
    logits, scale = z @ p["image.codebook"].T, 4.0
    A, B, words = p["text.linear.A"], p["text.linear.B"], p["text.codebook"]
    s_img, back_img = numpy_map(logits.max(1))
    s_txt, back_txt = numpy_map((h @ p["text.linear.linear.weight"].T + scale * h @ A.T @ B.T) @ words.T)

    losses, slopes = numpy_nce(s_img, s_txt, p["logit_scale"])
    penalties = numpy_penalty(s_img), numpy_penalty(s_txt)
    loss = sum(losses.values()) + sum(w * c for w, (c, _) in zip(weights, penalties, strict=True))
    dx_img = back_img(slopes["s_img"] + weights[0] * penalties[0][1])
    dx_txt = back_txt(slopes["s_txt"] + weights[1] * penalties[1][1])
    d_logits = (np.arange(y.shape[1])[:, None] == logits.argmax(1)[:, None]) * dx_img[:, None]
    dz, d_state = d_logits @ p["image.codebook"], dx_txt @ words
    return loss, {
        "logit_scale": slopes["logit_scale"],
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
