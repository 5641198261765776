"""Time and operations of a step of A-CLIP and its baselines: `python -m studies.attentive_mask_clip_timing`.

The paper's main table has training times relative to CLIP. This script times `train.train_step` at the paper's
geometry: ViT-B/16, views of 224 pixels (A-CLIP-eff's EMA view: 112), captions of 77 tokens, all random. Arms take turns
in one process, on the same threads; a ratio compares an arm's step with CLIP's step of the same round. A round that is
not timed counts the operations. The paper's four methods need about 10 GB of memory.
"""

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from attentive_mask_clip.config import Config as TrainConfig
from attentive_mask_clip.model import CLIP, create_model
from attentive_mask_clip.model import PRESETS as MODELS
from attentive_mask_clip.train import blank_batch, parameter_groups, train_step
from shared import checkpoints, cli, evaluation, run
from shared.errors import UserError
from shared.settings import Count, check_limits

ARMS = {  # changed training settings; `step_times` also halves the EMA view of aclip-eff
    "clip": dict(method="clip"),
    "random": dict(mask="random", views=1, ssl=False),
    "attentive": dict(views=1, ssl=False),
    "high-drop": dict(mask="high", views=1, ssl=False),
    "random-2x50": dict(mask="random", ssl=False),
    "attentive-2x50": dict(ssl=False),
    "aclip-eff": dict(),
    "aclip": dict(),
    "slip": dict(method="slip"),
}
PAPER = {"clip": "1.00x", "slip": "2.67x", "aclip": "1.16x", "aclip-eff": "0.86x"}


@dataclasses.dataclass
class Config:
    model: str = "vit_b16"
    """Towers: vit_s16, vit_b16, vit_l16, emoji or scenes."""
    batch_size: Count = 8
    """Pairs a step."""
    arms: tuple[str, ...] = tuple(PAPER)
    """Arms to time; clip is always timed."""
    rounds: Count = 6
    """Timed rounds after the one that counts operations; each arm runs one step a round."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast, as in training."""
    out: str | None = None
    """JSON file for the results; one of the same arms, geometry and rounds is kept, and nothing is timed."""

    @property
    def timed(self) -> str:
        return f"{self.model}, batch {self.batch_size}, {self.rounds} rounds"


Trained = tuple[CLIP, torch.optim.Optimizer]


def trained(cfg: TrainConfig, device: torch.device) -> Trained:
    """An arm's model and its optimizer."""
    model = create_model(cfg.method, cfg.model, **cfg.model_settings()).to(device)
    return model, torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), fused=True)


def stepper(model: CLIP, optimizer: torch.optim.Optimizer, cfg: TrainConfig) -> Callable[[], dict[str, torch.Tensor]]:
    """A function that runs one training step of the arm on random tensors and returns its losses."""
    images, boxes, tokens = blank_batch(model, cfg, cfg.batch_size)
    device = model.logit_scale.device
    images = [torch.randn(view.shape, device=device) for view in images]
    tokens = torch.randint(1, 49406, tokens.shape, device=device)
    tokens[:, -1] = 49407  # the end token: no caption is cut
    batch = images, boxes.to(device), tokens
    scaler = torch.amp.GradScaler(enabled=False)
    return lambda: train_step(model, batch, optimizer, scaler, 1e-4, 0.99, cfg)


def step_times(cfg: Config) -> dict[str, dict]:
    """Arm -> {"seconds": median of a step, "ratio": median over rounds of step / CLIP's, "low", "high": its extremes,
    "rounds": seconds of a step in each round, "flops": multiplications and additions of a step's matrix products,
    convolutions and attention, for a pair; "timed": the geometry}.

    UserError for an unknown arm.
    """
    check_limits(cfg)
    device = run.setup(0, cfg.device).device
    precision = run.resolve_precision(cfg.precision, device)
    names = ["clip", *(arm for arm in cfg.arms if arm != "clip")]
    base = TrainConfig(model=cfg.model, batch_size=cfg.batch_size, precision=precision)
    if cfg.model not in MODELS:
        raise UserError(f"--model is one of {', '.join(MODELS)}, not {cfg.model!r}")
    models: dict[str, Trained] = {}  # arms that differ only in their views share one
    steps: dict[str, tuple[Trained, Callable]] = {}
    for arm in names:
        if arm not in ARMS:
            raise UserError(f"--arms takes {', '.join(ARMS)}, not {arm!r}")
        setting = dataclasses.replace(base, **ARMS[arm])
        if arm == "aclip-eff":
            setting.ema_image_size = MODELS[cfg.model].get("image_size", 224) // 2
        shared = f"{setting.method} {setting.model_settings()}"
        if shared not in models:
            models[shared] = trained(setting, device)
        steps[arm] = models[shared], stepper(*models[shared], setting)
    times: dict[str, list[float]] = {arm: [] for arm in names}
    flops = {}
    for turn in range(cfg.rounds + 1):
        for arm, ((_, optimizer), step) in steps.items():
            gc.collect()
            start = time.perf_counter()
            if turn:
                step()["loss"].item()  # waits until a GPU has finished
                times[arm].append(time.perf_counter() - start)
            else:  # the counter does not know all kernels of fused attention
                with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                    step()
                flops[arm] = counter.get_total_flops() / cfg.batch_size
            optimizer.zero_grad()  # frees the memory of gradients for the next arm
    results = {}
    for arm, seconds in times.items():
        ratios = [own / clip for own, clip in zip(seconds, times["clip"], strict=True)]
        results[arm] = {
            "seconds": statistics.median(seconds),
            "ratio": statistics.median(ratios),
            "low": min(ratios),
            "high": max(ratios),
            "rounds": seconds,
            "flops": flops[arm],
            "timed": cfg.timed,
        }
    return results


def ratio(times: dict[str, float]) -> str:
    """Ratio of an arm's step to CLIP's, with the extremes over rounds: "1.42x (1.31-1.49)"."""
    return f"{times['ratio']:.2f}x ({times['low']:.2f}-{times['high']:.2f})"


def main(cfg: Config) -> None:
    if cfg.out and Path(cfg.out).exists():
        kept = checkpoints.read_json(cfg.out, "remove it")
        if all(kept.get(arm, {}).get("timed") == cfg.timed for arm in ("clip", *cfg.arms)):
            return print(f"{cfg.out} exists; remove it to time the steps again")
    results = step_times(cfg)
    rows = [
        {
            "arm": arm,
            "paper": PAPER.get(arm, "-"),
            "step / CLIP's": ratio(times),
            "seconds": f"{times['seconds']:.3f}",
            "operations / CLIP's": f"{times['flops'] / results['clip']['flops']:.2f}x",
            "GFLOP a pair": f"{times['flops'] / 1e9:.1f}",
        }
        for arm, times in results.items()
    ]
    print(f"{cfg.model}, batch {cfg.batch_size}, {torch.get_num_threads()} threads, {run.machine()}\n")
    print(evaluation.table(rows))
    if cfg.out:
        checkpoints.write_json(Path(cfg.out), results)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
