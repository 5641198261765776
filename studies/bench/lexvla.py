"""LexVLA's speed and memory: `python -m studies.bench.lexvla`. Sides take turns on the same inputs, each at its best
thread setting.

- the pooled map at the paper's size, forward and backward, against the same map by autograd, as VDR writes it
  (vdr_crossmodal_image.py:220): seconds, and peak memory;
- a training step of the emoji preset with either map, and InfoNCE against open_clip's ClipLoss;
- seconds until the study's arm without a penalty is above a floor.

At a ratio above 1, ours is faster or smaller. LexVLA's authors have released no code to compare with.
"""

import argparse
from collections.abc import Callable

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from lexvla import eval as evaluation
from lexvla import fast, model, train
from lexvla.config import EMOJI, PRESETS
from lexvla.model import contrastive_loss, lexical_map, total_loss
from lexvla.towers import create_image_encoder
from studies import lexvla as study
from studies.bench import CPU, arguments, at_least, bench, peak_memory, print_row, race, step_row
from studies.bench.baselines import baseline_rows


def vdr_map(z: torch.Tensor, codebook: torch.Tensor, pool: bool = True, bias: float = 0.0) -> torch.Tensor:
    """The same map by autograd, which stores all logits at once, and in the backward pass all their gradients."""
    logits = z @ codebook.T
    return F.normalize(model.elu1p((logits.max(1)[0] if pool else logits) + bias), dim=-1)


def pooled_map(B: int, n: int, V: int, d: int, repetitions: int) -> None:
    z, codebook = (torch.randn(*shape).requires_grad_() for shape in ((B, n, d), (V, d)))

    def step(function: Callable) -> Callable:
        def one() -> None:
            z.grad = codebook.grad = None
            function(z, codebook, pool=True).square().mul(torch.arange(V)).sum().backward()

        return one

    name = f"pooled map, forward and backward, B={B}, n={n}, V={V:,}, d={d:,}"
    step_row(name, B, "fp32", step(lexical_map), step(vdr_map), repetitions, target="> 1")


def pooled_memory(B: int, n: int, V: int, d: int) -> None:
    z, codebook = (torch.randn(*shape).requires_grad_() for shape in ((B, n, d), (V, d)))

    def step(function: Callable) -> float:
        z.grad = codebook.grad = None
        return peak_memory(lambda: function(z, codebook, pool=True).sum().backward())

    saved: list[int] = []
    keep = torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x)
    with keep:
        lexical_map(z, codebook, pool=True)
    peaks = [step(function) for function in (lexical_map, vdr_map)]
    if None in peaks:
        return
    inputs = (z.nbytes + codebook.nbytes) / 2**20
    note = (
        f"without the gradients' own {inputs:.0f} MiB; all logits {4 * B * n * V / 2**20:.0f} MiB, blocks here at most "
        f"{4 * fast.CHUNK / 2**20:.0f}; kept for backward beyond the inputs {sum(saved) / 2**20 - inputs:.0f}"
    )
    print_row(f"pooled map, peak memory, B={B}", [tuple(peak - inputs for peak in peaks)], "> 2", note, "MiB")


def training_step(repetitions: int) -> None:
    """Adapter, codebook and losses of the emoji preset, with fixed tokens of the frozen backbone."""
    torch.manual_seed(0)
    V, d, B = 2000, 576, EMOJI.batch_size
    image, z = create_image_encoder(EMOJI, torch.randn(V, d) / 8, -5.0, pretrained=False), torch.randn(B, d)
    z, codebook, scale = nn.Parameter(z), torch.randn(V, d) / 8, nn.Parameter(torch.tensor(2.66))
    tokens = image.frozen(torch.randn(B, 3, EMOJI.image_size, EMOJI.image_size))
    optimizer = torch.optim.AdamW([*(p for p in image.parameters() if p.requires_grad), z, scale], lr=1e-3, fused=True)

    def step(function: Callable) -> Callable:
        def one() -> None:
            optimizer.zero_grad()
            s_img = function(image.adapter(tokens), image.codebook, pool=True, bias=-5.0)
            total_loss(s_img, lexical_map(z, codebook, bias=-5.0), scale, 0.1, 0.1)["loss"].backward()
            optimizer.step()

        return one

    name = f"training step, emoji preset, batch {B}, V={V:,}"
    step_row(name, B, "fp32", step(lexical_map), step(vdr_map), repetitions, target="> 1")


def infonce(repetitions: int) -> None:
    a, b = (F.normalize(torch.rand(512, 17_149), dim=-1).requires_grad_() for _ in range(2))
    scale, clip = torch.tensor(14.0), open_clip.ClipLoss()
    sides = lambda: sum(contrastive_loss(a, b, scale.log())).backward(), lambda: clip(a, b, scale).backward()  # noqa: E731
    name = "InfoNCE, 512 x 17,149, forward and backward"
    print_row(*race(name, *sides, repetitions), ">= 0.9", "open_clip's is half the sum")


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until the arm without a penalty retrieves scenes better than the canonical correlation of the
    same frozen features with words does."""

    def recall(folder: str) -> float:
        cfg = evaluation.Config((folder,), study.SETS[:1], precision="fp32")
        return evaluation.evaluate_run(folder, cfg, CPU)[study.RECALL]

    baseline_rows(
        study.STUDY, "none", PRESETS, train.main, seeds, "mean recall of scenes, EfficientNet-Lite0 locked",
        {"the canonical correlation": "canonical correlation of EfficientNet-Lite0 with words"}, study.RECALL, recall,
        note="the language model has read the captions before", save_every=25,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    pooled_map(options.images, 257, 17_149, 4096, min(options.repetitions, 2))
    pooled_memory(16 * options.images, 257, 17_149, 4096)
    training_step(options.repetitions)
    infonce(options.repetitions)


def main() -> None:
    parser = arguments(__doc__, 3)
    parser.add_argument("--images", type=at_least(1), default=2, help="batch of the pooled map")
    bench(measure, parser.parse_args(), to_the_floor=to_the_floor)


if __name__ == "__main__":
    main()
