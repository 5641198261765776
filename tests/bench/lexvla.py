"""LexVLA's speed and memory: `python -m tests.bench.lexvla`. One process, same inputs, same threads; sides take turns.

- the pooled map at the paper's size against the same map by autograd, as VDR writes it (vdr_crossmodal_image.py
  :220), forward and backward: seconds, and bytes kept for the backward pass;
- search in the inverted index against the dense product, over 100,000 representations of 300 words out of 17,149;
- a training step of the emoji preset with either map, and InfoNCE against open_clip's ClipLoss.

A ratio above 1: ours is faster, or keeps less. LexVLA's authors have released no code to compare with.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import open_clip
import scipy.sparse
import torch
import torch.nn.functional as F
from torch import nn

from lexvla import model
from lexvla.eval import LexicalIndex
from lexvla.model import contrastive_loss, lexical_map, sparsify, total_loss
from shared import run


def vdr_map(z: torch.Tensor, codebook: torch.Tensor, pool: bool = True, bias: float = 0.0) -> torch.Tensor:
    """The same by autograd: all logits are kept."""
    logits = z @ codebook.T
    return F.normalize(model.elu1p((logits.max(1)[0] if pool else logits) + bias), dim=-1)


def race(name: str, ours: Callable, theirs: Callable, repetitions: int, target: str = "", note: str = "") -> None:
    """A row of medians, and of the ratio theirs/ours with its extremes; one repetition before is not counted."""
    seconds = []
    for repetition in range(-1, repetitions):
        turn = {}
        for function in (ours, theirs) if repetition % 2 else (theirs, ours):
            start = time.perf_counter()
            function()
            turn[function] = time.perf_counter() - start
        if repetition >= 0:
            seconds.append((turn[ours], turn[theirs]))
    mine, other = (statistics.median(column) for column in zip(*seconds, strict=True))
    ratios = [b / a for a, b in seconds]
    row(
        name,
        shown(mine),
        shown(other),
        statistics.median(ratios),
        f"{min(ratios):.2f} .. {max(ratios):.2f}",
        target,
        note,
    )


def row(name: str, mine: str, other: str, ratio: float, spread: str, target: str, note: str = "") -> None:
    print(f"| {name} | {mine} | {other} | {ratio:.2f} | {spread} | {target} | {note} |", flush=True)


def shown(seconds: float) -> str:
    return f"{1000 * seconds:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def pooled_map(B: int, n: int, V: int, d: int, repetitions: int) -> None:
    z, codebook = (torch.randn(*shape).requires_grad_() for shape in ((B, n, d), (V, d)))

    def step(function: Callable) -> Callable:
        def one() -> None:
            z.grad = codebook.grad = None
            function(z, codebook, pool=True).square().mul(torch.arange(V)).sum().backward()

        return one

    name = f"pooled map, forward and backward, B={B}, n={n}, V={V:,}, d={d:,}"
    race(name, step(lexical_map), step(vdr_map), repetitions, "> 1")
    kept = [run.activation_bytes(lambda f=f: f(z.detach(), codebook.detach().requires_grad_(), pool=True)) - z.nbytes
            - codebook.nbytes for f in (lexical_map, vdr_map)]  # fmt: skip
    note = f"blocks of at most {4 * model.CHUNK / 2**20:.0f} MiB exist at a time"
    row("... kept for the backward pass", *(f"{x / 2**20:.1f} MiB" for x in kept), kept[1] / kept[0], "", "> 10", note)


def search(N: int, V: int, active: int, dense_rows: int, repetitions: int) -> None:
    rng = np.random.default_rng(0)
    popularity = np.arange(1, V + 1) ** -0.5  # words are used unequally
    columns = np.stack([rng.choice(V, active, replace=False, p=popularity / popularity.sum()) for _ in range(500)])
    columns = columns[rng.integers(0, 500, N)]
    values = rng.random((N, active), dtype=np.float32)
    values /= np.linalg.norm(values, axis=1, keepdims=True)
    rows = scipy.sparse.csr_matrix((values.ravel(), columns.ravel(), np.arange(0, N * active + 1, active)), (N, V))
    index, query = LexicalIndex(rows), sparsify(torch.rand(V) * torch.from_numpy(popularity).float(), topk=active)
    part = torch.from_numpy(rows[:dense_rows].toarray())
    np.testing.assert_allclose(index.scores(query)[:dense_rows], (part @ query).numpy(), rtol=1e-4, atol=1e-6)

    def dense() -> None:  # the product over all rows, `dense_rows` at a time, so that memory suffices
        for _ in range(N // dense_rows):
            part @ query

    race(f"search over {N:,} representations, {active} of {V:,} words", lambda: index.scores(query), dense, repetitions,
         ">= 50")  # fmt: skip
    p = index.postings
    mine, other = p.data.nbytes + p.indices.nbytes + p.indptr.nbytes, 4 * N * V
    row("... memory", f"{mine / 2**20:.0f} MiB", f"{other / 2**20:.0f} MiB", other / mine, "", ">= 10")


def training_step(repetitions: int) -> None:
    """Backbone, adapter, codebook and losses of the emoji preset, text states given."""
    from lexvla.build import create_image_encoder
    from lexvla.config import EMOJI

    torch.manual_seed(0)
    V, d, B = 2000, 576, EMOJI.batch_size
    image, z = create_image_encoder(EMOJI, torch.randn(V, d) / 8, -5.0), nn.Parameter(torch.randn(B, d))
    pixels, codebook, scale = torch.randn(B, 3, 48, 48), torch.randn(V, d) / 8, nn.Parameter(torch.tensor(2.66))
    optimizer = torch.optim.AdamW([*image.parameters(), z, scale], lr=1e-3, fused=True)

    def step(function: Callable) -> Callable:
        def one() -> None:
            optimizer.zero_grad()
            s_img = function(image.tokens(pixels), image.codebook, pool=True, bias=-5.0)
            total_loss(s_img, lexical_map(z, codebook, bias=-5.0), scale, 0.1, 0.1)["loss"].backward()
            optimizer.step()

        return one

    race(f"training step, emoji preset, batch {B}, V={V:,}", step(lexical_map), step(vdr_map), repetitions, "> 1")


def infonce(repetitions: int) -> None:
    a, b = (F.normalize(torch.rand(512, 17_149), dim=-1).requires_grad_() for _ in range(2))
    scale, clip = torch.tensor(14.0), open_clip.ClipLoss()
    race("InfoNCE, 512 x 17,149, forward and backward", lambda: sum(contrastive_loss(a, b, scale.log())).backward(),
         lambda: clip(a, b, scale).backward(), repetitions, ">= 0.9", "open_clip's, halved sum")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", help="not used: there is no code of the authors")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--images", type=int, default=2, help="batch of the pooled map")
    parser.add_argument("--representations", type=int, default=100_000)
    options = parser.parse_args()
    if min(options.repetitions, options.images, options.representations) < 1:
        parser.error("--repetitions, --images and --representations start at 1")
    run.setup(0, "cpu")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| what | ours | theirs | theirs/ours | min .. max | target | |\n|" + " --- |" * 7, flush=True)
    pooled_map(options.images, 257, 17_149, 4096, min(options.repetitions, 3))
    search(options.representations, 17_149, 300, min(10_000, options.representations), options.repetitions)
    training_step(options.repetitions)
    infonce(options.repetitions)


if __name__ == "__main__":
    main()
