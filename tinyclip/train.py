"""Train one TinyCLIP stage, or a small teacher: `python -m tinyclip.train PRESET [--overrides]`.

TinyCLIP (arXiv 2309.12314); authors' code wkcn/TinyCLIP@ad981bf, cited as `U:` (its `src/`). In a stage
  1. the student starts from the teacher's weights, or from the stage before it     `initialise_student`
  2. with masks: learn them together with the weights, then cut                     `train_step`, `cut_masks`
  3. continue distillation with a new optimizer                                     `train_step`
The paper's algorithm 1. Progressive distillation is several stages, each starting from the one before (--init), with
the same teacher.
Losses and towers are in model.py, inheritance in inheritance.py and masks.py, settings in config.py.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from shared import checkpoints, cli, data, run
from shared.clip import STATISTICS, RememberingTokenizer, blank_inputs, image_side, set_grad_checkpointing
from shared.corpus import Corpus, open_corpus
from shared.errors import UserError
from shared.views import SmallView
from shared.zeroshot import quick_top1
from tinyclip.config import PRESETS, Config
from tinyclip.inheritance import initialise_student, random_student
from tinyclip.masks import (
    L0Mask,
    expected_sparsity,
    reached_sparsity,
    sparsity_loss,
    sparsity_warning,
    target_sparsity,
)
from tinyclip.model import CLIP, Student, distillation_loss, equal_captions, parameter_counts
from tinyclip.teacher import Teacher, digest_of, fitted, load_teacher

# -------------------------------------------------------------------------------------------------------- the teacher


class TeacherFeatures(NamedTuple):
    image: Tensor  # (B, D') unit features
    text: Tensor  # (B, D')
    scale: Tensor | float


@torch.no_grad()
def teacher_forward(teacher: CLIP | Teacher, images: Tensor, tokens: Tensor, cfg: Config) -> TeacherFeatures:
    """Features of the frozen teacher, and the fixed scale (1 / tau), or else the teacher's. U:training/train.py:409."""
    micro_batches = zip(images.chunk(cfg.accumulate), tokens.chunk(cfg.accumulate), strict=True)
    with run.autocast(cfg.precision, images.device):
        image, text, (own, *_) = zip(*(teacher(*inputs) for inputs in micro_batches), strict=True)
    return TeacherFeatures(torch.cat(image), torch.cat(text), own if cfg.logit_scale is None else cfg.logit_scale)


def teacher_features(teacher: CLIP | Teacher, corpus: Corpus, view: transforms.Compose, cfg: Config) -> TeacherFeatures:
    """The teacher's features of all samples, (N, D') of each modality in the order of the data."""
    image, text, scale = None, None, None
    for rows, images, tokens in corpus.batches(np.arange(len(corpus)), view, seed=(cfg.seed, 0)):
        found = teacher_forward(teacher, images, tokens, cfg)
        if image is None:
            image, text = (features.new_zeros(len(corpus), features.shape[1]) for features in found[:2])
        image[rows], text[rows], scale = found
    return TeacherFeatures(run.sum_over_ranks(image), run.sum_over_ranks(text), scale)


# ---------------------------------------------------------------------------------------------------------- one step


def train_step(
    network: nn.Module,
    teacher: TeacherFeatures | None,
    images: Tensor,
    tokens: Tensor,
    step: int,
    optimizers: "Optimizers",
    scaler: torch.amp.GradScaler,
    cfg: Config,
) -> dict[str, Tensor | float]:
    """One step of this rank's batch, images (B, 3, R, R) and tokens (B, S); returns the values to log.
    U:training/train.py:329.

    `network` is a `Student` with the wrappers of `run.distributed` and of micro-batches. A step with gradients that are
    not finite is skipped, on all processes.
    """
    student, gather = run.bare(network), run.gather if run.world_size() > 1 else None
    lr = learning_rate(cfg, step)
    for group in optimizers.weights.param_groups:
        group["lr"] = lr
    with run.autocast(cfg.precision, images.device):
        image, text, scale = network(images, tokens, student.uniforms())
    left_out = None
    if cfg.ignore_equal_captions:
        left_out = equal_captions(fitted(tokens, student.clip.context_length, whole=True), gather)
    loss = distillation_loss(
        image, text, scale, *(teacher or (None, None, None)), cfg.alpha, cfg.weight, gather, left_out
    )
    logged = {"loss": loss.detach(), "distillation": loss.detach(), "lr": lr, "logit_scale": scale.detach()}
    if student.masks:
        constraint, of_masks = mask_constraint(student, step, cfg)
        loss = loss + constraint
        logged |= of_masks | {"loss": loss.detach()}

    used = [optimizer for optimizer in optimizers if optimizer is not None]
    for optimizer in used:
        optimizer.zero_grad()
    scaler.scale(loss).backward()
    for optimizer in used:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(student.parameters(), cfg.max_grad_norm or math.inf)
    finite = norm.isfinite()
    for optimizer in used:
        step_if(finite, optimizer)
    scaler.update()
    for mask in student.masks:
        mask.clamp_()
    clamp_logit_scale(student.clip, cfg.logit_scale)
    return logged | {"gradient_norm": norm.detach(), "skipped": (~finite).float()}


def mask_constraint(student: Student, step: int, cfg: Config) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The sparsity loss of the masks at a step, and the values to log."""
    target = target_sparsity(step, cfg.start_sparsity, cfg.target_sparsity, cfg.sparsity_warmup)
    loss, expected = sparsity_loss(student.masks, target, cfg.two_sided)
    logged = {"constraint": loss.detach(), "target_sparsity": target, "expected_sparsity": expected.detach()}
    for tower, mask in (("image", student.image_mask), ("text", student.text_mask)):
        logged[f"{tower}_sparsity"] = expected_sparsity([mask]).detach()
        logged[f"{tower}_lambda_1"] = mask.lambda_1.detach().clone()
    return loss, logged


@torch.no_grad()
def clamp_logit_scale(clip: CLIP, fixed: float | None) -> None:
    """Set exp(logit_scale) to `fixed`, or clamp it to 1..100. U:training/train.py:526."""
    if fixed is None:
        clip.logit_scale.clamp_(0, math.log(100))
    else:
        clip.logit_scale.fill_(math.log(fixed))


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if `finite` () is True. On a GPU the fused optimizers check `found_inf` themselves and change
    nothing if it is 1, without synchronisation."""
    if finite.is_cuda:
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()


def check_skipped(skipped: Tensor, step: int, last: bool) -> None:
    """UserError if more than 100 steps in a row were skipped, or all steps of a run."""
    if skipped > 100 or (last and skipped > step):
        text = f"gradients were not finite {int(skipped)} times in a row up to step {step}"
        raise UserError(f"{text}: lower --lr, or use --precision fp32")


# -------------------------------------------------------------------------------------- learning rates and optimizers


def warmup_of(cfg: Config) -> int:
    """Steps of warm-up; with masks it ends at `prune_step`, where the cosine starts at the full rate."""
    return cfg.prune_step if cfg.masks else cfg.warmup


def learning_rate(cfg: Config, step: int) -> float:
    """Linear warm-up, then half a cosine to 0. U:training/scheduler.py:17, 46."""
    warmup = warmup_of(cfg)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - warmup) / (cfg.steps - warmup)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Gains, biases, temperature without decay; all others, embeddings included, with decay.

    Source: U:training/optimizer.py:23.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias", "logit_scale"))

    named = list(model.named_parameters())
    return [
        {"params": [p for n, p in named if decays(n, p) == decay], "weight_decay": weight_decay * decay}
        for decay in (False, True)
    ]


def mask_parameter_groups(masks: Iterable[L0Mask], lr: float, lambda_lr: float) -> list[dict]:
    """Masks use gradient descent, their multipliers ascent (by a negative rate). U:training/optimizer.py:71."""
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


def make_optimizers(student: Student, cfg: Config) -> Optimizers:
    """AdamW for the weights (upstream's three have the same settings), a second one for the masks."""
    groups, betas = parameter_groups(student.clip, cfg.weight_decay), (cfg.beta1, cfg.beta2)
    weights = torch.optim.AdamW(groups, lr=cfg.lr, betas=betas, eps=cfg.eps, fused=True)
    if not student.masks:
        return Optimizers(weights, None)
    fused = True if student.clip.logit_scale.is_cuda else None  # `step_if` needs it
    masks = torch.optim.AdamW(mask_parameter_groups(student.masks, cfg.mask_lr, cfg.lambda_lr), fused=fused)
    return Optimizers(weights, masks)


# -------------------------------------------------------------------------------------------------------------- images


def image_transform(size: int, statistics: tuple[Sequence[float], Sequence[float]] = STATISTICS) -> transforms.Compose:
    """PIL RGB -> its centre square (3, size, size), normalised by mean and std. U:open_clip/transform.py:71."""
    steps = [transforms.Resize(size, InterpolationMode.BICUBIC), transforms.CenterCrop(size)]
    return transforms.Compose([*steps, data.ToNormalizedTensor(*statistics)])


def training_view(cfg: Config, size: int) -> Callable[[Image.Image], Tensor]:
    """PIL RGB -> random crop (3, size, size), normalised; no flip, no colours. U:open_clip/transform.py:71."""
    if cfg.augmentation == "none":
        return image_transform(size)
    if cfg.augmentation == "small":
        return SmallView(size, *STATISTICS)
    crop = transforms.RandomResizedCrop(size, (0.9, 1.0), interpolation=InterpolationMode.BICUBIC)
    return transforms.Compose([crop, data.ToNormalizedTensor(*STATISTICS)])


# ---------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, process: run.Process) -> None:
    """Print the plan of a run; downloads nothing."""
    if cfg.epochs:
        per_epoch = data.planned_size(cfg) // cfg.batch_size
        cfg = cfg.in_steps(per_epoch) if per_epoch else cfg
    with torch.device("meta"):
        student = random_student(cfg).train()
    student.to_empty(device="cpu")  # memory, but no initial weights, which take a while
    counts = parameter_counts(student.clip)
    rows = [
        ("towers", "image {image:,}, text {text:,} without tokens".format(**counts)),
        ("loss", f"{cfg.alpha:g} affinity + {1 - cfg.alpha:g} contrastive, times {cfg.weight:g}"),
    ]
    if cfg.alpha == 0:
        rows.append(cli.first_loss_row(cfg.batch_size))
    if cfg.masks:
        prunable = sum(mask.prunable_params for mask in student.masks)
        left = counts["image"] + counts["text"] - cfg.target_sparsity * prunable
        rows += [
            ("masks", f"on {prunable:,} prunable parameters"),
            ("sparsity", f"{cfg.start_sparsity:g} -> {cfg.target_sparsity:g} in {cfg.sparsity_warmup:,} steps"),
            ("pruned", f"at step {cfg.prune_step:,}, to about {left / 1e6:.1f}M without tokens"),
        ]
    inputs = *blank_inputs(student.clip), student.uniforms()
    total = 0 if cfg.epochs and not per_epoch else cfg.steps
    rates = lambda at: {"": learning_rate(cfg, at)}  # noqa: E731
    cli.show_run(cfg, process, student, inputs, total, rates, rows, warmup_of(cfg))


def restored(state: dict) -> Student:
    """The student of a checkpoint; its towers may have been pruned since the run began.

    Removes the weights from `state`, to free their memory.
    """
    clip, masks = CLIP(**state["geometry"]), []
    clip.load_state_dict(state.pop("state_dict"))
    for tower, values in zip(("vision", "text"), state.pop("masks") or (), strict=False):
        masks.append(L0Mask.of(state["geometry"][tower]))
        masks[-1].load_state_dict(values)
    return Student(clip, *masks)


def frozen_teacher(cfg: Config, student: CLIP, process: run.Process) -> CLIP | Teacher | None:
    """The teacher, or None if the stage needs none."""
    if cfg.alpha == 0:
        return None
    if not process.main:
        run.wait()  # until rank 0 has exported the teacher, if it is a run of another paper
    side, context = image_side(student), student.context_length
    teacher = load_teacher(cfg.teacher, side, context)
    if process.main:
        run.wait()
    if isinstance(teacher, Teacher) and (teacher.side, teacher.context) != (side, context):
        sizes = f"{teacher.side} pixels and {teacher.context} tokens, the student {side} and {context}"
        run.say(f"the teacher sees {sizes}: its images are resized, its captions cut", process)
    return teacher.to(process.device).requires_grad_(False)


def cut_masks(student: Student, cfg: Config, folder: run.RunFolder, epoch: int) -> Student:
    """Prune the student by its masks at `prune_step`; writes masks.pt and logs what was cut."""
    if folder.process.main:
        masks = dict(zip(("image", "text"), student.eval_masks(), strict=True))
        checkpoints.save_checkpoint(folder.path / "masks.pt", masks)
        reached = float(reached_sparsity(student.masks))
        folder.log(cfg.prune_step + 1, epoch=epoch, sparsity_reached=reached)
        if warning := sparsity_warning(reached, cfg.target_sparsity):
            print(f"{warning}: raise --prune-step, or --mask-lr and --lambda-lr")
        if reached - cfg.target_sparsity > 0.1:
            asked = f"where {cfg.target_sparsity:.3f} was asked for"
            print(f"the masks reached a sparsity of {reached:.3f}, {asked}: lower --mask-lr and --lambda-lr")
    student = student.pruned()
    set_grad_checkpointing(student.clip, cfg.grad_checkpointing)
    return student


def weights_of(student: Student) -> dict:
    """The content of model.pt, from which `load_clip` rebuilds the network."""
    return {"state_dict": student.clip.state_dict(), "geometry": student.clip.geometry}


def main(cfg: Config) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    cfg.check(process.world_size)
    if cfg.dry_run:
        return dry_run(cfg, process)

    # Student, teacher and optimizers, with the state of the last checkpoint if there is one
    folder = run.RunFolder(cfg, process, step=0, epoch=0)
    first, unevaluated = folder.state["step"], folder.state.get("unevaluated", False)
    if not unevaluated and folder.finished(**({"epoch": cfg.epochs} if cfg.epochs else {"step": cfg.steps})):
        return folder.path
    student = restored(folder.state) if folder.resumed else initialise_student(cfg)
    teacher = frozen_teacher(cfg, student.clip, process)
    set_grad_checkpointing(student.to(process.device).train().clip, cfg.grad_checkpointing)
    optimizers, scaler = make_optimizers(student, cfg), run.grad_scaler(cfg, process)
    folder.restore(optimizers=optimizers, scaler=scaler)

    # Data
    side = image_side(student.clip)
    tokenizer = RememberingTokenizer(open_clip.SimpleTokenizer(context_length=student.clip.context_length))
    view, whole_image = training_view(cfg, side), image_transform(side)
    varied = cfg.augmentation != "none"
    text = lambda pair: tokenizer(pair.caption)[0]  # noqa: E731
    corpus = open_corpus(cfg, process, text, cut_padding=True, side=2 * side if varied else side)
    cfg, per_epoch = cfg.in_steps(corpus.steps), corpus.steps
    digest = digest_of(teacher)
    folder.start(first, cfg.steps, len(corpus), warmup=warmup_of(cfg), data=corpus.fingerprint, teacher=digest)
    if process.main and not folder.resumed:  # it may be of an earlier run, whose checkpoint.pt was removed
        (folder.path / "model.pt").unlink(missing_ok=True)
    known = None
    if teacher is not None and cfg.keep_in_memory and not varied:
        known = teacher_features(teacher, corpus, view, cfg)

    def contents(done: int) -> dict:
        masks = [mask.state_dict() for mask in student.masks] or None
        return weights_of(student) | {"masks": masks, "step": done, "epoch": done // per_epoch}

    def evaluate(done: int) -> None:
        if folder.evaluates(done, cfg.steps):
            with folder.evaluation(done, unevaluated=True, **contents(done)):
                where = whole_image, cfg.eval_set, process.device
                top1 = quick_top1(student, tokenizer, *where, cfg.precision)
            folder.log(done, epoch=(done - 1) // per_epoch, zero_shot_top1=top1)

    if unevaluated:
        evaluate(first)
    network, skipped = run.distributed(student, process, cfg.accumulate), 0
    for epoch in range(first // per_epoch, math.ceil(cfg.steps / per_epoch)):
        start = max(first, epoch * per_epoch)
        batches = corpus.epoch(epoch, view, start - epoch * per_epoch)
        for step, (rows, images, tokens) in zip(range(start, cfg.steps), batches, strict=False):
            done, last = step + 1, step + 1 == cfg.steps
            if student.masks and step == cfg.prune_step:
                student = cut_masks(student, cfg, folder, epoch)
                optimizers = folder.objects["optimizers"] = make_optimizers(student, cfg)
                network = run.distributed(student, process, cfg.accumulate)
            torch.manual_seed(run.stable_hash(cfg.seed, step))  # equal mask samples on all ranks and after a resume
            if teacher is None:
                features = None
            elif known is None:
                features = teacher_forward(teacher, images, tokens, cfg)
            else:
                features = TeacherFeatures(known.image[rows], known.text[rows], known.scale)
            logged = train_step(network, features, images, tokens, step, optimizers, scaler, cfg)
            skipped = (skipped + 1) * logged["skipped"]
            if done % cfg.log_every == 0 or done == 1 or last:  # also skipped steps, whose losses may not be finite
                check_skipped(skipped, step, last)
                logged |= run.over_ranks({name: logged[name] for name in ("loss", "distillation")})
                folder.write(done, epoch=epoch, **logged)
            evaluate(done)
            if folder.due(done) and not last:
                folder.save(done, **contents(done))
        corpus.report_broken(f"epoch {epoch + 1}")
    if process.main:  # before the last checkpoint, which marks the run as finished
        checkpoints.save_checkpoint(folder.path / "model.pt", weights_of(student))
    folder.save(cfg.steps, **contents(cfg.steps))
    folder.close()
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
