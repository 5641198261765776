"""Train one TinyCLIP stage, or the teacher of the emoji presets: `python -m tinyclip.train PRESET [--overrides]`.

TinyCLIP (arXiv 2309.12314); authors' code wkcn/TinyCLIP@ad981bf, cited as `U:` (its `src/`). The paper's contribution
in this file is the course of a stage:
  1. the student starts from the teacher's weights, or from the stage before it     `first_weights`
  2. with masks: learn them together with the weights, then cut                    `train_step`, `main`
  3. distil on with a new optimizer                                                `train_step`
Several stages, each from the one before (--init), are progressive distillation; the teacher stays the big model.
Losses are in model.py, inheritance in inheritance.py and masks.py, towers in network.py, settings in config.py.
"""

import copy
import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

from shared import checkpoints, cli, data, run
from shared.run import gather
from shared.zeroshot import quick_top1
from tinyclip.checkpoints import load_clip
from tinyclip.config import PRESETS, STAGES, Config, Stage, check, check_stage  # noqa: F401
from tinyclip.inheritance import first_weights
from tinyclip.masks import L0Mask, expected_sparsity, reached_sparsity, sparsity_loss, target_sparsity
from tinyclip.model import Student, distillation_loss
from tinyclip.network import CLIP, CONFIGS, parameter_counts
from tinyclip.pairs import Pairs, collate, image_transform, loaded, remembered

# -------------------------------------------------------------------------------------------- schedules and optimizers


def lr_at(step: int, base: float, warmup: int, total: int, prune_step: int | None = None) -> float:
    """Linear warm-up, then half a cosine to 0. U:training/scheduler.py:17, 46.

    With masks the warm-up is as long as they live: the cosine starts at `prune_step`, at the full rate.
    """
    warmup = warmup if prune_step is None else prune_step
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def mask_lr_at(step: int, prune_step: int, base: float = 0.02) -> float:
    """Constant up to `prune_step`, then 0. U:training/scheduler.py:59."""
    return base if step <= prune_step else 0.0


def param_groups(model: nn.Module, wd: float = 0.2) -> list[dict]:
    """Gains, biases, temperature without decay; all else, embeddings too, with it. U:training/optimizer.py:23."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale")) for name, p in named]
    return [
        {
            "params": [p for (_, p), is_plain in zip(named, plain, strict=True) if is_plain == without],
            "weight_decay": decay,
        }
        for without, decay in ((True, 0.0), (False, wd))
    ]


def mask_param_groups(masks: Iterable[L0Mask], lr: float = 0.02, lambda_lr: float = -0.02) -> list[dict]:
    """The masks descend, their multipliers climb by a negative rate. U:training/optimizer.py:71."""
    groups = []
    for mask in masks:
        groups.append({"params": list(mask.logas().values()), "weight_decay": 0.0, "lr": lr})
        groups.append({"params": [mask.lambda_1, mask.lambda_2], "weight_decay": 0.0, "lr": lambda_lr})
    return groups


class Optimizers(NamedTuple):
    weights: torch.optim.Optimizer
    masks: torch.optim.Optimizer | None

    def state_dict(self) -> list[dict | None]:
        return [None if optimizer is None else optimizer.state_dict() for optimizer in self]

    def load_state_dict(self, states: list[dict | None]) -> None:
        for optimizer, state in zip(self, states, strict=True):
            if optimizer is not None:
                optimizer.load_state_dict(state)


def make_optimizers(student: Student, stage: Stage) -> Optimizers:
    """AdamW for the weights (upstream's three have the same settings), a second one for the masks."""
    betas = (stage.beta1, stage.beta2)
    groups = param_groups(student.clip, stage.weight_decay)
    weights = torch.optim.AdamW(groups, lr=stage.lr, betas=betas, eps=stage.eps, fused=True)
    if not student.masks:
        return Optimizers(weights, None)
    return Optimizers(weights, torch.optim.AdamW(mask_param_groups(student.masks, stage.mask_lr, stage.lambda_lr)))


# -------------------------------------------------------------------------------------------------------------- a step


class TeacherOutput(NamedTuple):
    image: Tensor  # (B, D') unit rows
    text: Tensor  # (B, D')
    scale: float


@torch.no_grad()
def ask_teacher(teacher: CLIP, images: Tensor, tokens: Tensor, stage: Stage, precision: str = "fp32") -> TeacherOutput:
    """The frozen teacher on the same views; its temperature is the fixed one, or its own. U:training/train.py:409."""
    with run.autocast(precision, images.device):
        image, text, own = teacher(images, tokens)
    return TeacherOutput(image, text, own.item() if stage.logit_scale is None else stage.logit_scale)


def train_step(
    student: nn.Module, teacher: TeacherOutput | None, images: Tensor, tokens: Tensor, step: int, stage: Stage,
    optimizers: Optimizers, precision: str = "fp32", scaler: torch.amp.GradScaler | None = None, u: dict | None = None,
) -> dict[str, Tensor | float]:  # fmt: skip
    """One optimizer step of student (a `Student`, or one in DistributedDataParallel); returns what is logged.
    U:training/train.py:329.

    Order: learning rates, forward, loss with the masks' constraint, backward, clip over everything, weights and masks,
    clamps, temperature. A step whose gradients are not finite is skipped, on all processes.
    """
    bare = student.module if isinstance(student, DistributedDataParallel) else student
    masks = bare.masks
    lr = lr_at(step, stage.lr, stage.warmup, stage.steps, stage.prune_step if stage.masks else None)
    for group in optimizers.weights.param_groups:
        group["lr"] = lr
    with run.autocast(precision, images.device):
        image, text, scale = student(images, tokens, u)
    spread = gather if isinstance(student, DistributedDataParallel) else None
    loss = distillation_loss(image, text, scale, *(teacher or (None, None, None)), stage.alpha, stage.weight, spread)
    logged = {"distillation": loss.detach(), "lr": lr, "logit_scale": scale.detach()}
    if masks:
        target = target_sparsity(step, stage.start_sparsity, stage.target_sparsity, stage.sparsity_warmup)
        constraint, expected = sparsity_loss(masks, target, stage.joint, stage.two_sided)
        loss = loss + constraint
        logged |= {"target_sparsity": target, "expected_sparsity": expected.detach(), "constraint": constraint.detach()}
        for tower, mask in (("image", bare.image_mask), ("text", bare.text_mask)):
            logged[f"{tower}_sparsity"] = expected_sparsity([mask]).detach()
            logged[f"{tower}_lambda_1"] = mask.lambda_1.detach().clone()

    used = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in used:
        optimizer.zero_grad()
    if scaler is None:
        loss.backward()
    else:
        scaler.scale(loss).backward()
        for optimizer in used:
            scaler.unscale_(optimizer)
    limit = math.inf if stage.max_grad_norm is None else stage.max_grad_norm
    norm = nn.utils.clip_grad_norm_(student.parameters(), limit)
    if finite := bool(norm.isfinite()):
        for optimizer in used:
            optimizer.step() if scaler is None else scaler.step(optimizer)
    if scaler is not None:
        scaler.update()
    for mask in masks:
        mask.clamp_()
    with torch.no_grad():
        if stage.logit_scale is None:
            bare.clip.logit_scale.clamp_(0, math.log(100))
        else:
            bare.clip.logit_scale.fill_(math.log(stage.logit_scale))
    return logged | {"loss": loss.detach(), "gradient_norm": norm.detach(), "skipped": float(not finite)}


def train_stage(
    student: CLIP | Student,
    teacher: CLIP | None,
    batches: Iterable,
    stage: Stage,
    uniforms: Iterable[dict] | None = None,
) -> CLIP:
    """A whole stage on batches of (images, tokens), without run folder: the student after its last step.

    A plain CLIP gets open masks if the stage has them. `uniforms` are the mask samples' numbers, one
    {tower: {kind: u}} a step.
    """
    if isinstance(student, CLIP):
        masks = [L0Mask.of(student.geometry[t], stage.mask_types) for t in ("vision", "text")] if stage.masks else []
        student = Student(student, *masks)
    if teacher is not None:
        teacher = teacher.eval().requires_grad_(False)
    optimizers = make_optimizers(student.train(), stage)
    uniforms = None if uniforms is None else iter(uniforms)
    for step, (images, tokens, *_) in zip(range(stage.steps), batches, strict=False):
        if student.masks and step == stage.prune_step:
            student = student.pruned(stage.exact_prune)
            optimizers = make_optimizers(student, stage)
        answer = None if teacher is None else ask_teacher(teacher, images, tokens, stage)
        u = next(uniforms) if uniforms is not None and student.masks else None
        train_step(student, answer, images, tokens, step, stage, optimizers, u=u)
    return student.clip


# ----------------------------------------------------------------------------------------- the corpus in memory


class Memory(NamedTuple):
    """All pairs, and what the teacher makes of them."""

    images: Tensor  # (n, 3, R, R)
    tokens: Tensor  # (n, S)
    teacher: TeacherOutput | None  # of (n, D') features

    @classmethod
    def read(
        cls, pairs: Pairs, teacher: CLIP | None, cfg: Config, process: run.Process, precision: str, broken: list
    ) -> "Memory":
        loader = DataLoader(pairs, 256, num_workers=cfg.workers, collate_fn=collate)
        bar = run.progress(loader, len(loader), "reading", 256, process)
        images, tokens, answers = [], [], []
        for _, image, token, _ in data.watch(bar, broken):
            images.append(image)
            tokens.append(token)
            if teacher is not None:
                device = process.device
                answers.append(ask_teacher(teacher, image.to(device), token.to(device), cfg, precision))
        answer = None
        if answers:
            image, text, scales = zip(*answers, strict=True)
            answer = TeacherOutput(torch.cat(image), torch.cat(text), scales[0])
        return cls(torch.cat(images), torch.cat(tokens), answer)


# ---------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print what a run would be: parameters, steps, learning rates, samples, memory of the training step."""
    shape = copy.deepcopy(CONFIGS[cfg.model])
    shape["vision"]["image_size"] = size = cfg.image_size or shape["vision"]["image_size"]
    with torch.device("meta"):
        masks = [L0Mask.of(shape[tower], cfg.mask_types) for tower in ("vision", "text")] if cfg.masks else []
        student = Student(CLIP(**shape), *masks)
    counts = parameter_counts(student.to_empty(device="cpu").clip)  # memory, but no initial weights, which take a while
    print(f"parameters         {counts['total']:,} (image {counts['image']:,}, text {counts['text']:,} without tokens)")
    if cfg.masks:
        gates = sum(p.numel() for mask in student.masks for p in mask.parameters())
        prunable = sum(mask.prunable_params for mask in student.masks)
        print(f"masks              {gates:,} gates and multipliers, on {prunable:,} prunable parameters")
        print(f"sparsity           {cfg.start_sparsity:g} -> {cfg.target_sparsity:g} in {cfg.sparsity_warmup:,} steps")
        left = counts["image"] + counts["text"] - cfg.target_sparsity * prunable
        print(f"pruned             at step {cfg.prune_step:,}, to about {left / 1e6:.1f}M without tokens")
    print(f"loss               {cfg.alpha:g} affinity + {1 - cfg.alpha:g} contrastive, times {cfg.weight:g}")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {cfg.steps:,}")
    print(f"samples            {cfg.steps * cfg.batch_size:,}")
    prune_step = cfg.prune_step if cfg.masks else None
    for step in sorted({0, min(prune_step or cfg.warmup, cfg.steps - 1), cfg.steps // 2, cfg.steps - 1}):
        print(f"learning rate      {lr_at(step, cfg.lr, cfg.warmup, cfg.steps, prune_step):.3e} at step {step:,}")
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, shape["text"]["context_length"], dtype=torch.long)
    tokens[:, -1] = 2  # the end token, at the end
    gib = 2**30
    activations = cli.activation_bytes(lambda: student(images, tokens)) / 2 * cfg.batch_size / world_size / gib
    weights = 16 * sum(p.numel() for p in student.parameters()) / gib
    print(
        f"memory estimate    {weights + activations:.1f} GiB a process in fp32, the teacher and checkpointing left out:"
    )
    print(f"                   {weights:.1f} weights, gradients, AdamW; {activations:.1f} activations")


def restore(state: dict, cfg: Config) -> tuple[CLIP, list[L0Mask]]:
    """The student of a checkpoint and its masks: its towers may have been pruned since the run began."""
    clip, masks = CLIP(**state["geometry"]), []
    clip.load_state_dict(state["state_dict"])
    for tower, values in zip(("vision", "text"), state["masks"] or (), strict=False):
        masks.append(L0Mask.of(state["geometry"][tower], cfg.mask_types))
        masks[-1].load_state_dict(values)
    return clip, masks


def main(cfg: Config) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        check_stage(cfg)
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    device, precision, folder = process.device, run.resolve_precision(cfg.precision, process.device), Path(cfg.out)

    # Student and teacher
    state = checkpoints.resume(folder, cfg)
    step = 0 if state is None else state["step"]
    if step >= cfg.steps:
        if process.main:
            print(f"{folder} is finished ({cfg.steps} steps); nothing to do")
        return folder
    clip, masks = first_weights(cfg) if state is None else restore(state, cfg)
    student = Student(clip, *masks).to(device).train()
    student.clip.set_grad_checkpointing(cfg.grad_checkpointing)
    teacher = None if cfg.alpha == 0 else load_clip(cfg.teacher, cfg.head_width).to(device).requires_grad_(False)
    size, context = student.clip.geometry["vision"]["image_size"], student.clip.geometry["text"]["context_length"]
    if teacher is not None:
        seen = teacher.geometry["vision"]["image_size"], teacher.geometry["text"]["context_length"]
        if seen != (size, context):
            raise ValueError(
                f"the teacher sees {seen[0]} pixels and {seen[1]} tokens, the student {size} and {context}"
            )
    optimizers = make_optimizers(student, cfg)
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    if state is not None:
        optimizers.load_state_dict(state["optimizers"])
        if scaler is not None:
            scaler.load_state_dict(state["scaler"])

    # Data
    broken: list[data.Broken] = []
    source = data.open_pairs(cfg.data, cfg.dataset_size, cfg.strict, Path(cfg.cache))
    data.check_pairs(source, cfg, state or {}, process)
    tokenizer = data.RememberingTokenizer(open_clip.SimpleTokenizer(context_length=context))
    pairs = Pairs(source, image_transform(size, cfg.augmentation == "crop"), tokenizer)
    broken += source.broken
    memory = Memory.read(pairs, teacher, cfg, process, precision, broken) if cfg.keep_in_memory else None

    log = run.RunLog(folder, cfg, process, step)
    clock, commit = run.Stopwatch(0.0 if state is None else state["seconds"]), run.commit()

    def save(step: int) -> None:
        if process.main:
            content = {
                "step": step,
                "state_dict": student.clip.state_dict(),
                "geometry": student.clip.geometry,
                "masks": [mask.state_dict() for mask in student.masks] or None,
                "optimizers": optimizers.state_dict(),
                **({"scaler": scaler.state_dict()} if scaler is not None else {}),
                "seconds": clock.read(),
                "commit": commit,
                "data": source.fingerprint,
                "config": dataclasses.asdict(cfg),
            }
            checkpoints.save_checkpoint(folder / "checkpoint.pt", content)

    def wrapped() -> nn.Module:
        return DistributedDataParallel(student) if process.world_size > 1 else student

    # The stage
    network, skipped, saved, per_epoch = wrapped(), 0, step, len(source) // cfg.batch_size
    if memory is None:
        stream = data.watch(loaded(cfg, pairs, process, step), broken)
    else:
        data.report_broken(broken, process, "epoch 1")
        stream = remembered(cfg, memory.images, memory.tokens, process, step)
    steps = range(step, cfg.steps)
    bar: tqdm = run.progress(zip(steps, stream, strict=False), len(steps), folder.name, cfg.batch_size, process)
    for step, (rows, images, tokens, *_) in bar:
        epoch = step // per_epoch
        if student.masks and step == cfg.prune_step:
            if process.main:
                checkpoints.save_checkpoint(
                    folder / "masks.pt", dict(zip(("image", "text"), student.eval_masks(), strict=True))
                )
                reached = reached_sparsity(student.masks)
                log.write(step + 1, epoch=epoch, seconds=clock.read(), sparsity_reached=reached)
            student = student.pruned(cfg.exact_prune)
            student.clip.set_grad_checkpointing(cfg.grad_checkpointing)
            optimizers, network = make_optimizers(student, cfg), wrapped()
        images, tokens = images.to(device, non_blocking=True), tokens.to(device, non_blocking=True)
        if teacher is None:
            answer = None
        elif memory is None:
            answer = ask_teacher(teacher, images, tokens, cfg, precision)
        else:
            answer = TeacherOutput(memory.teacher.image[rows], memory.teacher.text[rows], memory.teacher.scale)
        torch.manual_seed(
            data.stable_hash(cfg.seed, step)
        )  # mask samples: the same on all processes, and after a resume
        logged = train_step(network, answer, images, tokens, step, cfg, optimizers, precision, scaler)
        skipped = skipped + 1 if logged["skipped"] else 0
        if skipped > 100:
            raise ValueError(
                f"gradients were not finite 100 times in a row up to step {step}: lower --lr, or --precision fp32"
            )
        done = step + 1
        if done % cfg.log_every == 0 or done in (1, cfg.steps):
            log.write(done, epoch=epoch, seconds=clock.read(), **logged)
        if cfg.eval_every and (done % cfg.eval_every == 0 or done == cfg.steps) and process.main:
            with clock.paused():
                top1 = quick_top1(
                    student, tokenizer, image_transform(size), cfg.eval_set, device, run.DTYPES[precision]
                )
            log.write(done, epoch=epoch, seconds=clock.read(), zero_shot_top1=top1)
        if done % per_epoch == 0 or done == cfg.steps:
            data.report_broken(broken, process, f"epoch {epoch + 1}")
        if done == cfg.steps and process.main:  # before the last checkpoint, which is what says that all is done
            weights = {"state_dict": student.clip.state_dict(), "geometry": student.clip.geometry}
            checkpoints.save_checkpoint(folder / "model.pt", weights)
        if done - saved >= cfg.save_every or done == cfg.steps:
            save(done)
            saved = done
    log.close()
    return folder


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
