"""TinyCLIP's speed against the authors' code and open_clip: `python -m studies.bench.tinyclip [--upstream PATH]`.

Ours and theirs take turns on the same inputs, each side at its best thread setting. Prints a Markdown table of medians
and their ratio theirs/ours with its extremes over the repetitions (above 1: ours is faster); then a second table: at
the paper's geometry, measured throughput against MACs. `--upstream` is a clone of wkcn/TinyCLIP@ad981bf; without it the
masked step is left out.
"""

import argparse
import itertools
import statistics
from functools import partial

import open_clip
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr

from studies import tinyclip as study
from studies.bench import arguments, at_least, attention, bench, print_row, race, step_row
from studies.bench.baselines import baseline_rows
from studies.bench.open_clip_loop import open_clip_loop
from tests.adapters import tinyclip as parity
from tinyclip import model, train
from tinyclip.config import PRESETS, Config
from tinyclip.eval import macs, throughput
from tinyclip.geometry import CONFIGS, open_clip_config
from tinyclip.inheritance import random_masks
from tinyclip.masks import prune

SCALER = torch.amp.GradScaler("cpu", enabled=False)


def captions(n: int, context: int, vocabulary: int, low: int, high: int) -> torch.Tensor:
    """(n, context) token ids whose end token stands at positions low..high-1."""
    ends = torch.randint(low, high, (n, 1))
    tokens = torch.randint(1, vocabulary - 2, (n, context)) * (torch.arange(context) < ends)
    return tokens.scatter(1, ends, vocabulary - 1)


# ------------------------------------------------------------------------------------------------------------ against


def affinity(up, n: int, repetitions: int) -> None:
    """The affinity loss of n pairs with its gradient, D = 512."""
    features, teacher = ([F.normalize(torch.randn(n, 512), dim=-1) for _ in range(2)] for _ in range(2))
    soft_loss = up.clip_soft_loss.ClipSoftLoss(local_loss=True, gather_with_grad=True, rank=0, world_size=1)
    functions = (
        lambda *x: sum(model.affinity_mimicking_loss(*x, 50.0, *teacher, 50.0)) / 2,
        lambda *x: soft_loss(*x, 50.0, *teacher, 50.0),
    )
    ours, theirs = (partial(parity.with_gradients, function, *features) for function in functions)
    print_row(*race(f"affinity mimicking, {n} pairs, forward and backward", ours, theirs, repetitions))


def masked_step(up, batch: int, length: tuple[int, int], repetitions: int, what: str) -> None:
    """A step of learning masks on ViT-B/32 with a ViT-B/32 teacher, fp32: their train_one_epoch against
    `train_step`."""
    shape = CONFIGS["ViT-B-32"]
    cfg = Config(masks=True, target_sparsity=0.5, sparsity_warmup=1, precision="fp32")
    theirs, student = parity.twins(up, shape["vision"], shape["text"], shape["embed_dim"], masked=True)
    for mask in student.masks:
        mask.clamp_()
    teacher, own = parity.twins(up, shape["vision"], shape["text"], shape["embed_dim"])
    steps = 1
    tokens = [captions(batch, 77, 49408, *length) for _ in range(steps)]
    batches = [(torch.randn(batch, 3, 224, 224), each) for each in tokens]
    one_pass, _ = parity.their_trainer(up, theirs, teacher, cfg)
    optimizers = train.make_optimizers(student.train(), cfg)

    def ours():
        for step, (images, text) in enumerate(batches, 1000):
            features = train.teacher_forward(own.clip.eval(), images, text, cfg)
            train.train_step(student, features, images, text, step, optimizers, SCALER, cfg)

    epochs = iter(range(10, 10**6))
    name = f"masked step, ViT-B/32, batch {batch}, fp32, {what}"
    step_row(name, batch, "fp32", ours, lambda: one_pass(batches, next(epochs)), repetitions, steps, ">= 1.2")


def contrastive_step(precision: str, repetitions: int, steps: int = 4, batch: int = 256) -> None:
    """The contrastive arm's step against open_clip_train's on the same towers, from the same weights."""
    clip = model.create_model("emoji-50")
    cfg = Config(alpha=0.0, logit_scale=None, steps=1000, warmup=30, lr=1e-3, precision=precision)
    plain = open_clip.CLIP(**open_clip_config(clip.geometry), output_dict=True)
    plain.load_state_dict(clip.state_dict())
    student = model.Student(clip).train()
    optimizers = train.make_optimizers(student, cfg)
    groups = train.parameter_groups(plain, cfg.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), eps=cfg.eps)
    scheduler = cosine_lr(optimizer, cfg.lr, cfg.warmup, cfg.steps)
    batches = [(torch.randn(batch, 3, 40, 40), captions(batch, 24, 49408, 4, 20)) for _ in range(steps)]

    their_loop = open_clip_loop(plain, batches, optimizer, scheduler, precision, cfg.max_grad_norm)

    def theirs(flash):
        with attention(flash):
            their_loop()

    def ours():
        for step, (images, tokens) in enumerate(batches):
            train.train_step(student, None, images, tokens, step, optimizers, SCALER, cfg)

    for flash, what in ((False, "with our attention setting"), (True, "as it comes")):
        name = f"contrastive step, emoji-50, batch {batch}, {precision}: open_clip {what}"
        step_row(name, batch, precision, ours, partial(theirs, flash), repetitions, steps, ">= 1")


# --------------------------------------------------------------------------------------------------------- throughput


def uneven(shape: dict, millions: float, choice: tuple[int, int, int]) -> float:
    """Score of a tower with `choice` of (heads, width, neurons), smaller is better: distance from `millions` of
    parameters, plus how much the kept shares of the three differ."""
    heads, width, neurons = choice
    blocks = shape["layers"] * (4 * width * 64 * heads + 2 * width * neurons)
    ends = 512 * width + (3 * 32 * 32 + 50 if "patch_size" in shape else 77) * width
    kept = (heads * 64 / shape["width"], width / shape["width"], neurons / (4 * shape["width"]))
    return abs((blocks + ends) / 1e6 - millions) + 3 * (max(kept) - min(kept))


def pruned_like(image_m: float, text_m: float) -> model.CLIP:
    """ViT-B/32 pruned at random to about the sizes (M parameters) of a released automatic student.

    Which heads and neurons a released student kept is known only from its file. Here every layer keeps the same numbers
    of heads and neurons, and the width is a multiple of a head's.
    """
    whole = model.create_model("ViT-B-32")
    masks = []
    for tower, size in (("vision", image_m), ("text", text_m)):
        shape = whole.geometry[tower]
        choices = itertools.product(
            range(1, shape["width"] // 64 + 1),
            range(64, shape["width"] + 1, 64),
            range(128, 4 * shape["width"] + 1, 128),
        )
        heads, width, neurons = min(choices, key=partial(uneven, shape, size))
        small = {"width": width, "layers": shape["layers"], "head_width": 64, "heads": heads, "mlp_width": neurons}
        masks.append(random_masks(shape, small, torch.Generator().manual_seed(0)))
    return prune(whole, *masks)


def proportions(rounds: int) -> str:
    """Table of the pairs per second of ViT-B/32 and its students, beside what their MACs predict."""
    models = {
        "ViT-B-32": model.create_model("ViT-B-32"),
        "TinyCLIP-ViT-61M-32-Text-29M": model.create_model("TinyCLIP-ViT-61M-32-Text-29M"),
        "TinyCLIP-ViT-40M-32-Text-19M": model.create_model("TinyCLIP-ViT-40M-32-Text-19M"),
        "pruned to 63M + 31M": pruned_like(63, 31),
        "pruned to 45M + 18M": pruned_like(45, 18),
        "pruned to 22M + 10M": pruned_like(22, 10),
    }
    rates = {name: [] for name in models}
    for _ in range(rounds):
        for name, network_ in models.items():
            rates[name].append(throughput(network_.eval(), seconds=1.0)["pairs_per_second"])
    base, work = statistics.median(rates["ViT-B-32"]), macs(models["ViT-B-32"])
    lines = [
        f"Throughput at batch 32, fp32, {torch.get_num_threads()} threads, in pairs of an image and a caption of 77 "
        "tokens. The pruned models have the sizes of the released automatic students and keep randomly chosen slots.",
        "\n| model | image + text (M) | MACs (G) | pairs/s | faster | by its MACs | share of it |\n|" + " --- |" * 7,
    ]
    for name, network_ in models.items():
        counts, rate = model.parameter_counts(network_), statistics.median(rates[name])
        expected = work / macs(network_)
        sizes = f"{counts['image'] / 1e6:.1f} + {counts['text'] / 1e6:.1f}"
        cells = name, sizes, f"{macs(network_) / 1e9:.2f}", f"{rate:.1f}", f"{rate / base:.2f}x", f"{expected:.2f}x"
        lines.append("| " + " | ".join([*cells, f"{rate / base / expected:.2f}"]) + " |")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- seconds to the floor


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until a quarter of a ViT, with random weights and the contrastive loss, names scenes better
    than the nearest training scene by raw pixels does."""
    baseline_rows(
        study.STUDY, study.RC, PRESETS, train.main, seeds,
        "names of scenes, unseen style, a quarter of a ViT from scratch",
        {"the pixel floor": "nearest neighbour on raw pixels"}, study.STYLES[study.TOP1][0], eval_every=25,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- script


def measure(options: argparse.Namespace) -> None:
    if options.upstream is not None:
        up = parity.load(options.upstream)
        with parity.process_group():
            affinity(up, 1024, options.repetitions)
            masked_step(up, options.batch, (8, 30), options.repetitions, "captions of 8 to 30 tokens")
            masked_step(up, options.batch, (76, 77), options.repetitions, "captions of 77 tokens")
    for precision in ("bf16", "fp32"):
        contrastive_step(precision, options.repetitions)


def main() -> None:
    parser = arguments(__doc__, 2, ("wkcn/TinyCLIP", "ad981bf", "src/training"))
    parser.add_argument("--batch", type=at_least(2), default=8, help="pairs of a masked ViT-B/32 step")
    parser.add_argument("--rounds", type=at_least(0), default=3, help="of the table of throughput; 0 leaves it out")
    options, left_out = parser.parse_args(), "affinity mimicking, masked step against the authors'"
    after = (lambda options: proportions(options.rounds)) if options.rounds else None
    bench(measure, options, left_out, after, to_the_floor)


if __name__ == "__main__":
    main()
