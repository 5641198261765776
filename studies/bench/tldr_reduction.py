"""TL;DR's costly parts against the authors' code: `python -m studies.bench.tldr_reduction [--upstream PATH]`.

Prints ratios of times, measured in turns on the same inputs, each side at its best thread setting; memory is the growth
of the process's peak. The authors' functions: VectorQuantizer2 (vq_compress_model/models/quantize.py:213) and
Kmeans.cluster (fast_cluster.py:10) of showlab/datacentric.vlp@a488102, on the CPU. Clustering a million code vectors is
timed without theirs, which would need 13 GB.
"""

import argparse
import tempfile
import time
from pathlib import Path

import faiss
import numpy as np
import open_clip
import torch

from shared import run
from shared.data import open_pairs
from studies import tldr_reduction as study
from studies import tldr_reduction_learner as learner
from studies.bench import arguments, at_least, bench, one_thread, peak_memory, print_row, race, step_row
from studies.bench.baselines import baseline_rows
from tests.adapters import tldr_reduction as parity
from tldr_reduction import cluster, model, reduce, train
from tldr_reduction.config import PRESETS, ReduceConfig


def grown(memory: float | None) -> str:
    """The result of `peak_memory` for a note."""
    return "" if memory is None else f"+{memory:.0f} MiB, "


def quantiser(up, repetitions: int) -> None:
    """Forward and backward pass at [64, 197, 768] with 1,024 codes of 768 dimensions."""
    torch.manual_seed(0)
    theirs, ours = up.quantize.VectorQuantizer2(1024, 768, 0.25), model.VectorQuantizer(1024, 768)
    with torch.no_grad():
        theirs.embedding.weight.normal_()
    ours.load_state_dict(theirs.state_dict())
    z = torch.randn(64, 197, 768, requires_grad=True)
    w = torch.randn_like(z)

    def step(side):
        z.grad = side.embedding.weight.grad = None
        z_q, loss, _ = side(z)
        torch.autograd.backward([z_q, loss], [w, torch.ones(())])

    step(theirs)
    expected = z.grad.clone(), theirs.embedding.weight.grad.clone()
    step(ours)
    both = zip(expected, (z.grad, ours.embedding.weight.grad), strict=True)
    difference = max((a - b).abs().max().item() for a, b in both)
    del expected
    memory = [peak_memory(lambda side=side: step(side)) for side in (ours, theirs)]
    name = "quantiser forward + backward, [64, 197, 768], K=1024"
    seconds = race(name, lambda: step(ours), lambda: step(theirs), repetitions)
    print_row(*seconds, "", f"gradients within {difference:.0e}")
    if None not in memory:
        share = f"{100 * memory[0] / memory[1]:.0f} %"
        print_row("quantiser, peak memory", [tuple(memory)], "", share, "MiB")


def code_vectors(n: int, length: int, patterns: int = 500) -> np.ndarray:
    """Noisy copies of some patterns."""
    rng = np.random.default_rng(0)
    of = rng.integers(0, 1024, (patterns, length), dtype=np.uint16)
    codes = of[rng.integers(0, patterns, n)]
    for first in range(0, n, 2**16):
        part = codes[first : first + 2**16]
        part[...] = np.where(
            rng.random(part.shape, dtype=np.float32) < 0.3, rng.integers(0, 1024, part.shape, dtype=np.uint16), part
        )
    return codes


def clustering(up, n: int, k: int, repetitions: int) -> None:
    """Whitening to 64 axes and k-means, theirs from int64 code vectors as their extractor stores them."""
    codes = code_vectors(n, 197)
    wide = codes.astype(np.int64)
    preprocess = up.fast_cluster.preprocess_features
    up.fast_cluster.preprocess_features = lambda data: preprocess(data, pca=64)
    objectives = {}

    def theirs():
        np.random.seed(0)
        objectives["theirs"] = up.fast_cluster.Kmeans(k).cluster(wide)

    seed = np.random.RandomState(0).randint(1234)

    def ours():
        features = cluster.whitened(cluster.fit_whitening(codes, 64), codes)
        centroids, objective = cluster.train_kmeans(features, k, seed)
        cluster.nearest(features, centroids)
        objectives["ours"] = objective[-1].item()

    seconds = race(f"whitening + k-means, {n:,} x 197, k={k}", ours, theirs, repetitions)
    note = f"objective {objectives['ours']:.1f}, theirs {objectives['theirs']:.1f}; faiss {faiss.__version__}"
    print_row(*seconds, ">= 1", note)


def a_million(n: int, k: int, folder: Path) -> None:
    """Clustering `n` memory-mapped code vectors, and selecting from the clusters."""
    path = folder / "codes.npy"
    np.save(path, code_vectors(n, 197))
    codes = np.load(path, mmap_mode="r")
    kept = []

    def reduce():
        clusters = cluster.cluster_codes(codes, k)
        kept.append(len(cluster.select_fraction(clusters.assignment, k, 0.25)))

    began = time.perf_counter()
    memory = peak_memory(reduce)
    seconds = time.perf_counter() - began
    path.unlink()
    size = n * 197 * 2 / 2**20
    note = f"{grown(memory)}codes in file {size:.0f} MiB; {kept[0]:,} kept; k={k}, 20 iterations on 256 k rows"
    print_row(f"{n:,} code vectors clustered, selected", [(seconds, None)], "bounded", note)


def reduction(shards: str, folder: str) -> None:
    """`tldr_reduction.reduce` with the codes of EfficientNet-Lite0, on one core."""
    cfg = ReduceConfig(shards, f"{folder}/out", keep=0.25, check=False, work=f"{folder}/work")
    began = time.perf_counter()
    memory = peak_memory(lambda: reduce.main(cfg))
    seconds, n = time.perf_counter() - began, len(open_pairs(shards))
    hours = ", ".join(f"{size} M {size * 1e6 * seconds / n / 3600:,.0f} h of one core" for size in (15, 400))
    note = f"{grown(memory)}{n / seconds:.0f} samples/s; at this rate {hours}"
    print_row(f"reduction of {n:,} pairs from shards to shards", [(seconds, None)], "", note)


def clip_step(repetitions: int, batch: int = 64) -> None:
    """The CLIP arm's training step against open_clip's loss and model, called as by open_clip's trainer."""
    cfg = PRESETS["small-clip"][1]
    clip = model.build(cfg, 0)
    side = clip.visual.image_size
    images = torch.randn(batch, 3, *(side if isinstance(side, tuple) else (side, side)))
    ids = torch.randint(1, 49406, (batch, clip.context_length))
    ids[:, -1] = 49407
    optimizers = [torch.optim.AdamW(clip.parameters(), lr=1e-5, fused=True) for _ in range(2)]
    loss = open_clip.ClipLoss(cache_labels=True)
    precision = run.resolve_precision("auto", torch.device("cpu"))

    def ours():
        losses = train.losses_of(clip, images, ids, cfg)
        optimizers[0].zero_grad()
        losses["loss_ita"].backward()
        optimizers[0].step()

    def theirs():
        optimizers[1].zero_grad()
        with run.autocast(precision, torch.device("cpu")):
            total = loss(*clip(images, ids))
        total.backward()
        optimizers[1].step()

    name = f"CLIP step, {cfg.clip_model}, batch {batch}, {precision}: open_clip"
    step_row(name, batch, precision, ours, theirs, repetitions, target=">= 1")


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until the arm on the whole pool with its original captions names scenes better than the
    nearest scene by raw pixels."""
    baseline_rows(
        study.STUDY, "full", {"train": ("", learner.SETTINGS)}, learner.main, seeds, "names of scenes, unseen style",
        {"the pixel floor": "nearest neighbour on raw pixels"}, study.SCORE, eval_set=study.SETS[1], eval_every=1,
    )  # fmt: skip


def measure(options: argparse.Namespace) -> None:
    faiss.omp_set_num_threads(torch.get_num_threads())
    wanted = lambda part: options.only in (None, part)  # noqa: E731
    if options.upstream is not None:
        up = parity.load(options.upstream)
        if wanted("quantiser"):
            quantiser(up, options.repetitions)
        if wanted("clustering"):
            clustering(up, options.samples, options.clusters, min(options.repetitions, 3))
    if wanted("clip"):
        clip_step(options.repetitions)
    if options.million and wanted("million"):
        a_million(options.million, 1000, options.folder)
    if wanted("reduction") and one_thread():
        with tempfile.TemporaryDirectory() as folder:
            reduction(options.shards, folder)


def main() -> None:
    parser = arguments(__doc__, 3, ("showlab/datacentric.vlp", "a488102", "fast_cluster.py"))
    parser.add_argument("--samples", type=int, default=20_000, help="code vectors of the k-means comparison")
    parser.add_argument("--clusters", type=int, default=500)
    parser.add_argument(
        "--million", type=at_least(0), default=1_000_000, help="code vectors of the run at scale; 0 leaves it out"
    )
    parser.add_argument("--only", choices=("quantiser", "clustering", "million", "clip", "reduction"), help="one part")
    parser.add_argument("--shards", default="data/emoji/train", help="pairs to reduce")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="for the code vectors' file")
    left_out = "quantiser and clustering against the authors'"
    options = parser.parse_args()
    bench(measure, options, left_out, to_the_floor=None if options.only else to_the_floor)


if __name__ == "__main__":
    main()
