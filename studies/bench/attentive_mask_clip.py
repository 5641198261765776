"""A-CLIP's speed, memory: `python -m studies.bench.attentive_mask_clip [--upstream PATH] [--geometry small vit_b16]`.

Ours and theirs take turns on the same inputs, each side at its best thread setting. Prints Markdown tables: medians,
their ratio theirs/ours with its extremes over the repetitions (above 1: ours is faster), peak memory of a step beyond
weights and optimizer state; then the time of the steps of A-CLIP and its baselines at ViT-B/16, and of their parts.
`--upstream` is a clone of microsoft/A-CLIP@0e51942; without it, only open_clip's training step is compared.

Their code runs on the installed timm, with the unfused attention of timm 0.5.4, which it requires.
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace

import open_clip
import torch
from open_clip_train.scheduler import cosine_lr

from attentive_mask_clip import eval as evaluation
from attentive_mask_clip import model, train
from attentive_mask_clip.config import PRESETS, Config
from studies import attentive_mask_clip as study
from studies import attentive_mask_clip_timing as timing
from studies.bench import (
    CPU,
    arguments,
    at_least,
    attention,
    bench,
    peak_memory,
    print_row,
    race,
    shown,
    speed_of,
    step_row,
)
from studies.bench.baselines import baseline_rows
from studies.bench.open_clip_loop import open_clip_loop
from studies.harness.report import with_means
from tests.adapters import attentive_mask_clip as parity

UNSCALED = torch.amp.GradScaler(enabled=False)

GEOMETRIES = {  # image tower, text tower, joint width, SSL widths, batch; both sides run in fp32
    "small": (
        dict(img_size=28, patch_size=2, embed_dim=128, depth=4, num_heads=4, num_classes=0),
        dict(context_length=77, vocab_size=49408, transformer_width=128, transformer_heads=4, transformer_layers=2),
        128, 512, 64, 16,
    ),
    "vit_b16": (
        dict(img_size=224, patch_size=16, embed_dim=768, depth=12, num_heads=12, num_classes=0),
        dict(context_length=77, vocab_size=49408, transformer_width=512, transformer_heads=8, transformer_layers=12),
        512, 4096, 256, 4,
    ),
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- against the authors


def selection(up, repetitions: int, batch: int = 64) -> None:
    """Mapping an EMA view's scores to another view, and selecting its patches."""
    scores, boxes = torch.rand(batch, 196), parity.boxes_of(batch)

    def ours():
        of_view = model.crop_scores(scores, boxes[:, 0], boxes[:, 2], 14)
        return model.attentive_keep_ids(of_view)

    def theirs():
        return up.models.get_att_mask(up.models.ACLIP.get_mask(None, scores, boxes[:, 0], boxes[:, 2]))

    removed = torch.ones(batch, 196, dtype=torch.bool).scatter(1, ours(), False)
    same = (removed == theirs()).all(1).double().mean().item()
    name = f"scores into a view and selection, B={batch}"
    print_row(*race(name, ours, theirs, repetitions), "> 1", f"{same:.0%} of the masks equal")


def aclip_step(up, geometry: str, repetitions: int) -> None:
    """A whole training step: EMA, forward, losses, backward, AdamW, clamp. Theirs is the loop of their `main.py`."""
    vit, text, joint, hidden, out, B = GEOMETRIES[geometry]
    torch.manual_seed(0)
    theirs, ours = parity.twins(up, True, vit, text, joint, hidden, out)
    batch = parity.batch_of(B, vit["img_size"])
    args = SimpleNamespace(**parity.TRAIN)
    optimizer = up.main.get_optim(args, theirs)
    cfg = Config(simclr_pair="same", precision="fp32", weight_decay=args.wd, batch_size=B)
    adamw = torch.optim.AdamW(train.parameter_groups(ours, args.wd), betas=args.betas, eps=args.eps, fused=True)
    images, ema_view, tokens, boxes = batch
    inputs, losses_seen = ([*images.chunk(2), ema_view], boxes, tokens), {}

    def our_step():
        losses_seen["ours"] = train.train_step(ours, inputs, adamw, UNSCALED, 1e-5, 0.99, cfg)["loss"].item()

    def their_step():
        losses_seen["theirs"] = parity.their_steps(up, theirs, [batch], optimizer, [1e-5], [0.99], args)["loss"]

    name = f"A-CLIP step, {geometry}, batch {B}, fp32"
    seconds = race(name, our_step, their_step, repetitions)[1]
    speed = speed_of(our_step, statistics.median(mine for mine, _ in seconds), B, "fp32")
    peaks = []
    for each, step in ((ours, our_step), (theirs, their_step)):
        each.zero_grad()
        peaks.append(peak_memory(step))
    memory = "" if None in peaks else f"; peak memory {peaks[0]:,.0f} against {peaks[1]:,.0f} MiB"
    gap = abs(losses_seen["ours"] - losses_seen["theirs"]) / losses_seen["theirs"]
    print_row(name, seconds, ">= 1.3", f"{speed}; losses after all steps within {gap:.0e} of each other{memory}")


# ------------------------------------------------------------------------------------------------- against open_clip


def clip_step(precision: str, repetitions: int, steps: int = 4, batch: int = 128) -> None:
    """The CLIP arm's step on the emoji towers against open_clip_train's on towers of the same size (open_clip's ViT has
    one more LayerNorm and one bias less)."""
    towers = model.PRESETS["emoji"]
    cfg = Config(method="clip", model="emoji", precision=precision, batch_size=batch)
    torch.manual_seed(0)
    network = model.create_model("clip", "emoji")
    adamw = torch.optim.AdamW(train.parameter_groups(network, 0.2), fused=True)
    vision = open_clip.CLIPVisionCfg(
        layers=towers["vision_layers"], width=towers["vision_width"], patch_size=towers["patch_size"],
        head_width=towers["vision_width"] // towers["vision_heads"], image_size=towers["image_size"],
    )  # fmt: skip
    text = open_clip.CLIPTextCfg(
        context_length=towers["context_length"], width=towers["text_width"], heads=towers["text_heads"],
        layers=towers["text_layers"],
    )  # fmt: skip
    other = open_clip.CLIP(towers["embed_dim"], vision, text, quick_gelu=True, output_dict=True)
    optimizer = torch.optim.AdamW(train.parameter_groups(other, 0.2), lr=1e-5)
    images = torch.randn(batch, 3, towers["image_size"], towers["image_size"])
    tokens = parity.tokens_of(batch, towers["context_length"])
    scheduler = cosine_lr(optimizer, 1e-5, 0, 100)
    their_loop = open_clip_loop(other, [(images, tokens)] * steps, optimizer, scheduler, precision)

    def ours():
        with attention(False):
            for _ in range(steps):
                boxes = tokens  # not read
                train.train_step(network, ([images], boxes, tokens), adamw, UNSCALED, 1e-5, 0.0, cfg)

    for flash, what in ((False, "with our attention setting"), (True, "as it comes")):

        def theirs(flash=flash):
            with attention(flash):
                their_loop()

        name = f"CLIP step, emoji towers, batch {batch}, {precision}: open_clip {what}"
        step_row(name, batch, precision, ours, theirs, repetitions, steps, ">= 1")


# ------------------------------------------------------------------------------------------- where the time is spent

ARMS = {"clip": "1.00", "aclip-eff": "0.86", "aclip": "1.16", "slip": "2.67"}


def parts_of(arm: str, geometry: str, batch: int) -> dict[str, Callable]:
    """Functions that run the step of an arm, and its parts separately."""
    settings = timing.ARMS[arm]
    cfg = dataclasses.replace(Config(model=geometry, batch_size=batch, precision="fp32"), **settings)
    network = model.create_model(cfg.method, geometry, **cfg.model_settings()).train()
    adamw = torch.optim.AdamW(train.parameter_groups(network, cfg.weight_decay), lr=1e-5, fused=True)
    aclip, size = cfg.method == "aclip", network.image_size
    side = size // 2 if arm == "aclip-eff" else size
    views = [torch.randn(batch, 3, size, size) for _ in range({"clip": 1, "aclip": 2, "slip": 3}[cfg.method])]
    ema_view = torch.randn(batch, 3, side, side)
    tokens, boxes = parity.tokens_of(batch, network.context_length), parity.boxes_of(batch, released=False)
    together, inputs = torch.cat(views), ([*views, ema_view][: len(views) + aclip], boxes, tokens)
    cls = torch.randn(len(views) * batch, network.image_projection.shape[0], requires_grad=True)

    def step():
        train.train_step(network, inputs, adamw, UNSCALED, 1e-5, 0.99, cfg)

    def ema_pass():
        with torch.no_grad():
            out, seen["scores"] = network.visual_ema(ema_view, return_scores=True, cls_only=True)
            network.im_proj_byol_e(out[:, 0])

    def select():
        noise = torch.rand(len(together), (size // network.patch_size) ** 2)
        seen["keep_ids"] = network.keep_ids(seen["scores"], boxes, noise)

    def image_tower():
        network.visual(together, seen.get("keep_ids"), cls_only=True)[0].sum().backward()

    def heads():
        out = network.image_mlp(cls).sum()
        if aclip:
            out = out + network.im_pred_byol(network.im_proj_byol(cls)).sum()
        out.backward()

    seen: dict = {}
    parts = {
        "step": step,
        "image tower": image_tower,
        "text tower": lambda: network.encode_text(tokens).sum().backward(),
    }
    if aclip:
        parts = {"step": step, "EMA pass": ema_pass, "selection": select} | parts
        parts["EMA update"] = lambda: network.update_ema(0.99)
    if cfg.method != "clip":
        parts["SSL heads"] = heads
    return parts | {"AdamW": adamw.step}


def profile(geometry: str, batch: int, repetitions: int) -> None:
    """Print the time of each arm's step, its ratio to CLIP's, the paper's ratio, and the time of its parts.

    CLIP is timed again beside each arm; besides CLIP, only one arm is in memory at a time.
    """
    columns = ["EMA pass", "selection", "image tower", "text tower", "SSL heads", "EMA update", "AdamW"]
    threads = f"{torch.get_num_threads()} threads"
    print(f"\nSteps at {geometry}, batch {batch}, fp32, {threads}; ratios to CLIP's step; parts timed on their own\n")
    print(
        "| arm | step | / CLIP | min .. max | paper | " + " | ".join(columns) + " |\n|" + " --- |" * (5 + len(columns))
    )
    clip = parts_of("clip", geometry, batch)
    for arm, paper in ARMS.items():
        parts = clip if arm == "clip" else parts_of(arm, geometry, batch)
        seconds: dict[str, list[float]] = {}
        for repetition in range(-1, repetitions):
            for name, function in [("clip", clip["step"])] * (arm != "clip") + [*parts.items()]:
                start = time.perf_counter()
                function()
                if repetition >= 0:
                    seconds.setdefault(name, []).append(time.perf_counter() - start)
        cells = [shown(statistics.median(seconds[name])) if name in seconds else "-" for name in ("step", *columns)]
        cells[1:1] = "-", "-", paper
        if arm != "clip":  # its ratio to itself would be noise
            ratios = [own / other for own, other in zip(seconds["step"], seconds["clip"], strict=True)]
            cells[1:3] = f"{statistics.median(ratios):.2f}", f"{min(ratios):.2f} .. {max(ratios):.2f}"
        print("| " + " | ".join([arm, *cells]) + " |", flush=True)


# --------------------------------------------------------------------------------------------- seconds to the floor


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until CLIP names scenes better than the nearest training scene by raw pixels does."""

    def top1(folder: str) -> float:
        cfg = evaluation.Config((folder,), sets=tuple(study.sets_of("one")), probe=None, foreground=None)
        return with_means(evaluation.evaluate_run(folder, cfg, CPU), study.MEANS)[study.ONLINE]

    baseline_rows(
        study.STUDY, "clip", PRESETS, train.main, seeds, "names of scenes, ViT from scratch",
        {"the pixel floor": "nearest neighbour on raw pixels"}, study.ONLINE, top1,
        without=("studies.attentive_mask_clip_timing",), save_every=125,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ script


def measure(options: argparse.Namespace) -> None:
    if options.upstream is not None:
        with parity.on_cpu():
            up = parity.load(options.upstream)
            selection(up, options.repetitions)
            for geometry in options.geometry:
                aclip_step(up, geometry, options.repetitions)
    for precision in ("bf16", "fp32"):
        clip_step(precision, options.repetitions)


def steps_of_arms(options: argparse.Namespace) -> None:
    if options.profile != "none":
        profile(options.profile, options.batch_size, options.repetitions)


def main() -> None:
    parser = arguments(__doc__, 3, ("microsoft/A-CLIP", "0e51942", "models.py"))
    parser.add_argument("--geometry", nargs="*", default=list(GEOMETRIES), choices=GEOMETRIES, help="of A-CLIP's step")
    parser.add_argument(
        "--profile", default="vit_b16", choices=[*model.PRESETS, "none"], help="towers of the last table"
    )
    parser.add_argument("--batch-size", type=at_least(2), default=4, help="of the last table")
    left_out = "selection and A-CLIP's step against the authors'"
    bench(measure, parser.parse_args(), left_out, steps_of_arms, to_the_floor)


if __name__ == "__main__":
    main()
