"""Train one TinyCLIP stage, or a small teacher: `python -m tinyclip.train PRESET [--overrides]`.

TinyCLIP (arXiv 2309.12314); authors' code wkcn/TinyCLIP@ad981bf, cited as `U:` (its `src/`). The paper's contribution
in this file is what happens in a stage:
  1. the student starts from the teacher's weights, or from the stage before it     `first_weights`
  2. with masks: learn them together with the weights, then cut                     `train_step`, `cut_masks`
  3. continue distillation with a new optimizer                                     `train_step`
Progressive distillation is several stages, each starting from the one before (--init), with the same teacher.
Losses and towers are in model.py, inheritance in inheritance.py and masks.py, settings in config.py.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from shared import accumulate, checkpoints, cli, data, memory, run, windows
from shared.clip import cut_padding, set_grad_checkpointing
from shared.errors import UserError
from shared.memory import CLIP_STATISTICS
from shared.zeroshot import quick_top1
from tinyclip.config import PRESETS, STAGES, Config, Stage, check, check_stage, in_steps  # noqa: F401
from tinyclip.geometry import CONFIGS, block_sizes, tower_of
from tinyclip.inheritance import inherit_at_random, inherit_weights, resize_positional_embedding
from tinyclip.masks import (
    L0Mask,
    expand_pruned,
    expected_sparsity,
    reached_sparsity,
    resized,
    sparsity_loss,
    target_sparsity,
    too_little,
)
from tinyclip.model import CLIP, Student, distillation_loss, equal_captions, parameter_counts
from tinyclip.teacher import Teacher, digest_of, first_source, fitted, load_teacher

# -------------------------------------------------------------------------------------------- schedules and optimizers


def lr_at(step: int, base: float, warmup: int, total: int, prune_step: int | None = None) -> float:
    """Linear warm-up, then half a cosine to 0. U:training/scheduler.py:17, 46.

    With masks the warm-up ends at `prune_step`, where the cosine starts at the full rate.
    """
    warmup = warmup if prune_step is None else prune_step
    if step < warmup:
        return base * (step + 1) / warmup
    return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def mask_lr_at(step: int, prune_step: int, base: float = 0.02) -> float:
    """Constant up to `prune_step`, then 0. U:training/scheduler.py:59."""
    return base if step <= prune_step else 0.0


def param_groups(model: nn.Module, wd: float = 0.2) -> list[dict]:
    """Gains, biases, temperature without decay; all others, embeddings included, with decay.

    Source: U:training/optimizer.py:23.
    """
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


def make_optimizers(student: Student, stage: Stage) -> Optimizers:
    """AdamW for the weights (upstream's three have the same settings), a second one for the masks."""
    betas = (stage.beta1, stage.beta2)
    groups = param_groups(student.clip, stage.weight_decay)
    weights = torch.optim.AdamW(groups, lr=stage.lr, betas=betas, eps=stage.eps, fused=True)
    if not student.masks:
        return Optimizers(weights, None)
    fused = True if student.clip.logit_scale.is_cuda else None  # `step_if` needs it
    masks = torch.optim.AdamW(mask_param_groups(student.masks, stage.mask_lr, stage.lambda_lr), fused=fused)
    return Optimizers(weights, masks)


# ------------------------------------------------------------------------------------------ the student's first weights


def student_shape(cfg: Config) -> dict:
    """The geometry of --model, with --image-size."""
    shape = copy.deepcopy(CONFIGS[cfg.model])
    shape["vision"]["image_size"] = cfg.image_size or shape["vision"]["image_size"]
    return shape


def open_masks(shape: dict, stage: Stage) -> list[L0Mask]:
    """Fully open masks for the image and text tower of a geometry; none if the stage learns no masks."""
    return [L0Mask.of(shape[tower], stage.mask_types) for tower in ("vision", "text")] if stage.masks else []


def first_weights(cfg: Config) -> tuple[CLIP, list[L0Mask]]:
    """The student before its first step, and its masks.

    Without --init its weights are random. Otherwise they are inherited, by hand or at random. With masks the student
    takes all weights of the source, and the masks are open; a pruned source is expanded, and the masks of the removed
    slots are closed.
    """
    clip = CLIP(**student_shape(cfg), quick_gelu=cfg.quick_gelu)
    masks = open_masks(clip.geometry, cfg)
    if cfg.init is None:
        return clip, masks
    source = first_source(cfg.init, cfg.head_width, cfg.quick_gelu)  # with the student's activation
    for tower in ("vision", "text"):
        sizes = [each.geometry[tower] for each in (source, clip)]
        if all(isinstance(each["layers"], int) for each in sizes):
            theirs, ours = (block_sizes(each)[0] for each in sizes)
            if theirs != ours:
                raise UserError(
                    f"--init {cfg.init}: heads of its {tower} tower are {theirs} wide, and those of --model "
                    f"{cfg.model} {ours}; choose a --model with heads of that width"
                )
    state, own = source.state_dict(), clip.state_dict()
    table = "visual.positional_embedding"
    if table in state and table in own and len(state[table]) != len(own[table]):
        state[table] = resize_positional_embedding(state[table], round((len(own[table]) - 1) ** 0.5))
    if cfg.masks and any(name not in state or state[name].shape != value.shape for name, value in own.items()):
        expand_pruned(clip, *masks, state)
    elif cfg.inherit == "random":
        generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, "inherit"))
        clip = inherit_at_random(source, clip.geometry, generator)
        shapes, wanted = ({name: value.shape for name, value in each.items()} for each in (clip.state_dict(), own))
        if shapes != wanted or source.geometry["quick_gelu"] != cfg.quick_gelu:
            raise UserError(
                f"--inherit random cannot cut {cfg.model} out of {cfg.init}: their sizes or activations do not fit"
            )
        clip.logit_scale.data.copy_(own["logit_scale"])
    else:
        head_width = clip.geometry["text"]["width"] // clip.geometry["text"]["heads"]
        try:
            taken = inherit_weights(own, state, head_width, cfg.depth_rule)
        except ValueError as error:
            raise UserError(f"--model {cfg.model} cannot start from --init {cfg.init}: {error}") from error
        towers = {None: ("vision", "text"), "image": ("vision",), "text": ("text",)}[cfg.inherit_only]
        clip.load_state_dict(own | {name: value for name, value in taken.items() if tower_of(name) in towers})
    return clip, masks


def trained_towers(clip: CLIP, teacher: CLIP | None, stage: Stage) -> CLIP:
    """The student of a stage. With --use-teacher-* the teacher's tower replaces the student's. Such a tower, or a
    locked one, gets no gradients. U:open_clip/model.py:947, 1015.

    UserError if the teacher's tower does not fit the student's other tower.
    """
    taken = {"vision": stage.use_teacher_image, "text": stage.use_teacher_text}
    shape, state = copy.deepcopy(clip.geometry), clip.state_dict()
    for tower in (tower for tower, theirs in taken.items() if theirs):
        for key in ("embed_dim", "quick_gelu"):
            if teacher.geometry[key] != shape[key]:
                raise UserError(
                    f"the teacher's {tower} tower does not fit this student: {key} is {teacher.geometry[key]} "
                    f"in the teacher and {shape[key]} in the student"
                )
        shape[tower] = teacher.geometry[tower]
        state = {name: value for name, value in state.items() if tower_of(name) != tower}
        state |= {name: value for name, value in teacher.state_dict().items() if tower_of(name) == tower}
    if any(taken.values()):
        clip = resized(clip, shape, state)
    clip.lock(stage.lock_image or stage.use_teacher_image, stage.lock_text or stage.use_teacher_text)
    return clip


def restored(state: dict, cfg: Config) -> tuple[CLIP, list[L0Mask]]:
    """The student of a checkpoint and its masks; its towers may have been pruned since the run began.

    Removes the weights from `state`, to free their memory.
    """
    clip, masks = CLIP(**state["geometry"]), []
    clip.load_state_dict(state.pop("state_dict"))
    for tower, values in zip(("vision", "text"), state.pop("masks") or (), strict=False):
        masks.append(L0Mask.of(state["geometry"][tower], cfg.mask_types))
        masks[-1].load_state_dict(values)
    return clip, masks


# -------------------------------------------------------------------------------------------------------------- a step


class TeacherOutput(NamedTuple):
    image: Tensor  # (B, D') unit features
    text: Tensor  # (B, D')
    scale: Tensor | float


@torch.no_grad()
def ask_teacher(
    teacher: CLIP | Teacher, images: Tensor, tokens: Tensor, stage: Stage, precision: str = "fp32"
) -> TeacherOutput:
    """Features of the frozen teacher, and the fixed temperature, or else the teacher's. U:training/train.py:409."""
    micro_batches = zip(images.chunk(stage.accumulate), tokens.chunk(stage.accumulate), strict=True)
    with run.autocast(precision, images.device):
        image, text, (own, *_) = zip(*(teacher(*inputs) for inputs in micro_batches), strict=True)
    return TeacherOutput(torch.cat(image), torch.cat(text), own if stage.logit_scale is None else stage.logit_scale)


def step_if(finite: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """`optimizer.step()` if `finite` () is True. On a GPU the fused optimizers check `found_inf` themselves and change
    nothing if it is 1, without synchronisation."""
    if finite.is_cuda:
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        optimizer.step()
    elif finite:
        optimizer.step()


def mask_constraint(student: Student, step: int, stage: Stage) -> tuple[Tensor, dict[str, Tensor | float]]:
    """The sparsity loss of the masks at a step, and the values to log."""
    target = target_sparsity(step, stage.start_sparsity, stage.target_sparsity, stage.sparsity_warmup)
    loss, expected = sparsity_loss(student.masks, target, stage.joint, stage.two_sided)
    logged = {"constraint": loss.detach(), "target_sparsity": target, "expected_sparsity": expected.detach()}
    for tower, mask in (("image", student.image_mask), ("text", student.text_mask)):
        logged[f"{tower}_sparsity"] = expected_sparsity([mask]).detach()
        logged[f"{tower}_lambda_1"] = mask.lambda_1.detach().clone()
    return loss, logged


def train_step(
    student: nn.Module, teacher: TeacherOutput | None, images: Tensor, tokens: Tensor, step: int, stage: Stage,
    optimizers: Optimizers, precision: str = "fp32", scaler: torch.amp.GradScaler | None = None, u: dict | None = None,
) -> dict[str, Tensor | float]:  # fmt: skip
    """One optimizer step of a `Student`, bare or in DistributedDataParallel; returns the values to log.
    U:training/train.py:329.

    Order: learning rates, forward, loss with the masks' constraint, backward, clipping over all gradients, optimizers
    of weights and masks, clamps, temperature. A step with gradients that are not finite is skipped, on all processes.
    For a tower taken from the teacher, the teacher's features are used.
    """
    bare = student.module if isinstance(student, DistributedDataParallel) else student
    masks = bare.masks
    lr = lr_at(step, stage.lr, stage.warmup, stage.steps, stage.prune_step if stage.masks else None)
    for group in optimizers.weights.param_groups:
        group["lr"] = lr
    if stage.accumulate > 1 and u is None:
        u = bare.uniforms()  # one draw for all micro-batches
    given = None if stage.use_teacher_image else images, None if stage.use_teacher_text else tokens
    (image, text, scale), backward = accumulate.forward(student, (*given, u), stage, precision)
    image = teacher.image if stage.use_teacher_image else image
    text = teacher.text if stage.use_teacher_text else text
    gather = run.gather if isinstance(student, DistributedDataParallel) else None
    left_out = None
    if stage.ignore_equal_captions:
        context = bare.clip.geometry["text"]["context_length"]
        left_out = equal_captions(fitted(tokens, context, whole=True), gather)
    answer = teacher or (None, None, None)
    loss = distillation_loss(image, text, scale, *answer, stage.alpha, stage.weight, gather, left_out)
    logged = {"loss": loss.detach(), "distillation": loss.detach(), "lr": lr, "logit_scale": scale.detach()}
    constraint = None
    if masks:
        constraint, values = mask_constraint(bare, step, stage)
        logged |= values | {"loss": (loss + constraint).detach()}

    used = [optimizer for optimizer in optimizers if optimizer is not None]
    scaler = scaler or torch.amp.GradScaler(images.device.type, enabled=False)
    for optimizer in used:
        optimizer.zero_grad()
    backward(scaler.scale(loss), constraint if constraint is None else scaler.scale(constraint))
    for optimizer in used:
        scaler.unscale_(optimizer)
    limit = math.inf if stage.max_grad_norm is None else stage.max_grad_norm
    norm = nn.utils.clip_grad_norm_(student.parameters(), limit)
    finite = norm.isfinite()
    for optimizer in used:
        step_if(finite, optimizer)
    scaler.update()
    for mask in masks:
        mask.clamp_()
    with torch.no_grad():
        if stage.logit_scale is None:
            bare.clip.logit_scale.clamp_(0, math.log(100))
        else:
            bare.clip.logit_scale.fill_(math.log(stage.logit_scale))
    return logged | {"gradient_norm": norm.detach(), "skipped": (~finite).float()}


def train_stage(
    student: CLIP | Student,
    teacher: CLIP | None,
    batches: Iterable,
    stage: Stage,
    uniforms: Iterable[dict] | None = None,
) -> CLIP:
    """Train a whole stage on batches of (images, tokens), without run folder; returns the student after its last step.

    A plain CLIP gets open masks and locked towers if the stage has them. `uniforms` has the uniform numbers of the
    mask samples, one {tower: {kind: u}} per step.
    """
    if isinstance(student, CLIP):
        student = Student(trained_towers(student, teacher, stage), *open_masks(student.geometry, stage))
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


# ------------------------------------------------------------------------------------------------- images and captions


def image_and_context(clip: CLIP) -> tuple[int, int]:
    """A CLIP's image side in pixels and context length in tokens."""
    return clip.geometry["vision"]["image_size"], clip.geometry["text"]["context_length"]


def image_transform(
    size: int,
    train: bool = False,
    crop: tuple[float, float] = (0.9, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    statistics: tuple[Sequence[float], Sequence[float]] = CLIP_STATISTICS,
) -> transforms.Compose:
    """PIL RGB -> (3, size, size), normalised by mean and std; no flip, no colours. U:open_clip/transform.py:71.

    In training a random crop with shares of the area from `crop` and width/height ratios from `ratio`.
    """
    bicubic = InterpolationMode.BICUBIC
    if train:
        steps = [transforms.RandomResizedCrop(size, crop, ratio, interpolation=bicubic)]
    else:
        steps = [transforms.Resize(size, bicubic), transforms.CenterCrop(size)]
    normalise = data.ToNormalizedTensor(*statistics)
    return transforms.Compose([*steps, normalise])


class PairDataset(Dataset):
    """Item i of a run -> (uint8 image (3, R, R), tokens (S,), list of skipped broken samples).

    `normalise` normalises a batch of images. A crop depends on seed, epoch and sample only.
    """

    def __init__(self, pairs: data.Shards | data.TSV | windows.Windowed, transform, tokenizer, seed: int = 0):
        self.pairs, self.tokenizer, self.seed = pairs, tokenizer, seed
        self.transform, self.normalise = data.split_normalisation(transform)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, list[data.Broken]]:
        pair, broken = data.read_item(self.pairs, i, self.seed)
        return self.transform(pair.image), self.tokenizer(pair.caption)[0], broken


def collate(items: list) -> tuple[Tensor, Tensor, list[data.Broken]]:
    images, tokens, broken = zip(*items, strict=True)
    return torch.stack(images), torch.stack(tokens), [b for each in broken for b in each]


class Corpus:
    """A run's training pairs in the order of its steps, read during training or once before it (--keep-in-memory)."""

    def __init__(self, cfg: Config, process: run.Process, student: CLIP, state: dict):
        self.process, self.memory, self.answer = process, None, None
        self.pairs = windows.open_pairs(cfg, process)
        data.check_pairs(self.pairs, cfg, state, process)
        self.broken, self.steps_per_epoch = list(self.pairs.broken), len(self.pairs) // cfg.batch_size
        self.cfg = in_steps(cfg, self.steps_per_epoch)
        self.size, context = image_and_context(student)
        self.tokenizer = data.RememberingTokenizer(open_clip.SimpleTokenizer(context_length=context))
        self.crops, self.whole_image = cfg.augmentation == "crop", image_transform(self.size)
        transform = image_transform(self.size, self.crops, cfg.crop, cfg.crop_ratio)
        self.dataset = PairDataset(self.pairs, transform, self.tokenizer, cfg.seed)

    def remember(self, teacher: CLIP | None, precision: str) -> None:
        """Decode all images once (for crops at twice their side) and keep images and tokens on the device; without
        crops also the teacher's features."""
        device = self.process.device
        self.memory = memory.read(self.pairs, self.size * (1 + self.crops), self.tokenizer, self.process).to(device)
        data.report_broken([*self.broken, *self.memory.broken], self.process, "epoch 1")
        self.broken.clear()
        if teacher is not None and not self.crops:
            batches = zip(self.memory.pixels.split(256), self.memory.tokens.split(256), strict=True)
            inputs = ((self.dataset.normalise(pixels), cut_padding(tokens, device)) for pixels, tokens in batches)
            answers = [ask_teacher(teacher, *each, self.cfg, precision) for each in inputs]
            image, text, scales = zip(*answers, strict=True)
            self.answer = TeacherOutput(torch.cat(image), torch.cat(text), scales[0])

    def batches(
        self, start: int, teacher: CLIP | None, precision: str
    ) -> Iterator[tuple[Tensor, Tensor, TeacherOutput | None]]:
        """(images, tokens, the teacher's features) of every step from `start` on, on the process's device."""
        cfg, device = self.cfg, self.process.device
        epoch, first = divmod(start, self.steps_per_epoch)
        epochs = range(epoch, math.ceil(cfg.steps / self.steps_per_epoch))
        read = self.read if self.memory is None else self.recall
        for images, tokens, answer in read(epochs, first):
            images, tokens = images.to(device, non_blocking=True), cut_padding(tokens, device)
            if answer is None and teacher is not None:
                answer = ask_teacher(teacher, images, tokens, cfg, precision)
            yield images, tokens, answer

    def read(self, epochs: range, first: int) -> Iterator[tuple[Tensor, Tensor, None]]:
        """Shuffled batches of these epochs, from batch `first` of the first on; read by `workers` processes."""
        loader = windows.training_batches(self.dataset, collate, self.cfg, self.process, epochs, first)
        for images, tokens, _ in data.collect_broken(loader, self.broken):
            yield self.dataset.normalise(images.to(self.process.device, non_blocking=True)), tokens, None

    def recall(self, epochs: range, first: int) -> Iterator[tuple[Tensor, Tensor, TeacherOutput | None]]:
        """The same batches from memory, with the teacher's features if there are no crops."""
        samples, answer = np.arange(len(self.pairs)), self.answer
        view, count = (self.random_views, 4) if self.crops else (lambda pixels, _: self.dataset.normalise(pixels), 0)
        for epoch in epochs:
            order = self.order(epoch, first if epoch == epochs[0] else 0)
            views = memory.Views(self.memory, samples, view, count, (self.cfg.seed, epoch), order)
            for index, images, tokens, _ in views:
                found = answer and TeacherOutput(answer.image[index], answer.text[index], answer.scale)
                yield images, tokens, found

    def order(self, epoch: int, start: int) -> list[np.ndarray]:
        """This process's batches of samples in an epoch, as indices, from batch `start` on."""
        (rank, world_size, _), n, batch = self.process, len(self.pairs), self.cfg.batch_size
        size, seed = batch // world_size, (self.cfg.seed, epoch)
        if not self.cfg.distinct_captions:
            return data.batches(n, size, seed, rank, world_size, start)[: self.steps_per_epoch - start]
        whole = memory.distinct_batches(np.random.default_rng(seed).permutation(n), self.memory.labels, batch)
        return [samples[rank * size : (rank + 1) * size] for samples in whole[start : self.steps_per_epoch]]

    def random_views(self, pixels: Tensor, u: Tensor) -> Tensor:
        """Random crops (B, 3, R, R) of images (B, 3, 2R, 2R) uint8, by random numbers (B, 4)."""
        boxes = memory.random_crops(u, self.cfg.crop, self.cfg.crop_ratio)
        return memory.normalized(memory.crop_and_resize(pixels, boxes, self.size))

    def zero_shot_top1(self, student: Student, precision: str) -> float:
        """Top-1 on `eval_set` in percent, with class names as prompts."""
        where = self.whole_image, self.cfg.eval_set, self.process.device
        workers = windows.evaluation_workers(self.cfg)
        return quick_top1(student, self.tokenizer, *where, run.DTYPES[precision], workers)


# ---------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print the plan of a run: parameters, steps, learning rates, samples, memory of the training step."""
    check_stage(cfg)
    cli.check_batch(cfg, world_size)
    cfg, shape = planned(cfg), student_shape(cfg)
    with torch.device("meta"):
        student = Student(CLIP(**shape), *open_masks(shape, cfg))
    counts = parameter_counts(student.to_empty(device="cpu").clip)  # memory, but no initial weights, which take a while
    size, context = image_and_context(student.clip)
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, context, dtype=torch.long)
    tokens[:, -1] = 2  # the end token, at the end
    trained = sum(p.numel() for p in student.parameters())
    cli.show_plan(
        [
            ("parameters", "{total:,} (image {image:,}, text {text:,} without tokens)".format(**counts)),
            *(mask_rows(cfg, student, counts) if cfg.masks else ()),
            *locked_rows(cfg),
            ("loss", f"{cfg.alpha:g} affinity + {1 - cfg.alpha:g} contrastive, times {cfg.weight:g}"),
            cli.batch_row(cfg, world_size),
            *schedule_rows(cfg),
            cli.disk_row(cfg.dataset_size, trained),
            *cli.memory_rows(
                lambda: student(images, tokens),
                cfg.batch_size / world_size / cfg.accumulate,
                trained,
                included="gradients, AdamW, no teacher",
                checkpointed=student.clip if cfg.grad_checkpointing else None,
            ),
        ]
    )


def planned(cfg: Config) -> Config:
    """The settings of a dry run, with `epochs` converted to steps if the number of samples is known."""
    samples = data.planned_size(cfg) if cfg.epochs else 0
    return replace(in_steps(cfg, samples // cfg.batch_size), epochs=0) if samples >= cfg.batch_size else cfg


def schedule_rows(cfg: Config) -> list[tuple[str, str]]:
    """Rows of a dry run about steps, samples and learning rates."""
    if cfg.epochs:
        return [("steps", f"{cfg.epochs} epochs of --data" + ("" if cfg.data else ", which is not named"))]
    prune_step = cfg.prune_step if cfg.masks else None
    rate = lambda step: f"{lr_at(step, cfg.lr, cfg.warmup, cfg.steps, prune_step):.3e}"  # noqa: E731
    rows = [("steps", f"{cfg.steps:,}"), ("samples", f"{cfg.steps * cfg.batch_size:,}")]
    return rows + cli.rate_rows(rate, prune_step or cfg.warmup, cfg.steps)


def mask_rows(cfg: Config, student: Student, counts: dict[str, int]) -> list[tuple[str, str]]:
    """Rows of a dry run about masks."""
    gates = sum(p.numel() for mask in student.masks for p in mask.parameters())
    prunable = sum(mask.prunable_params for mask in student.masks)
    left = counts["image"] + counts["text"] - cfg.target_sparsity * prunable
    return [
        ("masks", f"{gates:,} gates and multipliers, on {prunable:,} prunable parameters"),
        ("sparsity", f"{cfg.start_sparsity:g} -> {cfg.target_sparsity:g} in {cfg.sparsity_warmup:,} steps"),
        ("pruned", f"at step {cfg.prune_step:,}, to about {left / 1e6:.1f}M without tokens"),
    ]


def locked_rows(cfg: Config) -> list[tuple[str, str]]:
    """Rows of a dry run about towers that are not trained."""
    return [
        (f"{tower} tower", "the teacher's, not trained" if theirs else "locked")
        for tower, theirs, locked in (
            ("image", cfg.use_teacher_image, cfg.lock_image),
            ("text", cfg.use_teacher_text, cfg.lock_text),
        )
        if theirs or locked
    ]


def frozen_teacher(cfg: Config, student: CLIP, process: run.Process) -> CLIP | Teacher | None:
    """The teacher, or None if the stage needs none. UserError if the student uses the teacher's tower but has another
    image size or context length."""
    borrowed, (side, context) = cfg.use_teacher_image or cfg.use_teacher_text, image_and_context(student)
    if cfg.alpha == 0 and not borrowed:
        return None
    if not process.main:
        run.wait()  # until rank 0 has exported the teacher, if it is a run of another paper
    teacher = load_teacher(cfg.teacher, cfg.head_width, cfg.teacher_quick_gelu, side, context)
    if process.main:
        run.wait()
    if isinstance(teacher, Teacher):
        sizes = f"{teacher.side} pixels and {teacher.context} tokens, the student {side} and {context}"
        if borrowed and (teacher.side, teacher.context) == (side, context):
            raise UserError(
                "--use-teacher-* need a teacher with towers like tinyclip.model.CLIP's, and CLIP's image statistics"
            )
        if borrowed:
            raise UserError(f"--use-teacher-* need a teacher with the student's sizes: the teacher sees {sizes}")
        if (teacher.side, teacher.context) != (side, context):
            run.say(f"the teacher sees {sizes}: its images are resized, its captions cut", process)
    return teacher.to(process.device).requires_grad_(False)


def distributed(student: Student, process: run.Process) -> nn.Module:
    """The student, wrapped in DistributedDataParallel if there are several processes."""
    return DistributedDataParallel(student) if process.world_size > 1 else student


def check_skipped(skipped: Tensor, step: int, last: bool) -> None:
    """UserError if more than 100 steps in a row were skipped, or all steps of a run."""
    if skipped > 100 or (last and skipped > step):
        text = f"gradients were not finite {int(skipped)} times in a row up to step {step}"
        raise UserError(f"{text}: lower --lr, or use --precision fp32")


def cut_masks(student: Student, cfg: Config, folder: run.RunFolder, epoch: int) -> Student:
    """Prune the student by its masks at `prune_step`; writes masks.pt and logs what was cut."""
    if folder.process.main:
        masks = dict(zip(("image", "text"), student.eval_masks(), strict=True))
        checkpoints.save_checkpoint(folder.path / "masks.pt", masks)
        reached = float(reached_sparsity(student.masks))
        folder.log(cfg.prune_step + 1, epoch=epoch, sparsity_reached=reached)
        if warning := too_little(reached, cfg.target_sparsity):
            print(f"{warning}: raise --prune-step, or --mask-lr and --lambda-lr")
        if reached - cfg.target_sparsity > 0.1:
            asked = f"where {cfg.target_sparsity:.3f} was asked for"
            print(f"the masks reached a sparsity of {reached:.3f}, {asked}: lower --mask-lr and --lambda-lr")
    student = student.pruned(cfg.exact_prune)
    set_grad_checkpointing(student.clip, cfg.grad_checkpointing)
    return student


def weights_of(student: Student) -> dict:
    """The content of model.pt, from which `load_clip` rebuilds the network."""
    return {"state_dict": student.clip.state_dict(), "geometry": student.clip.geometry}


def contents(student: Student, corpus: Corpus, done: int) -> dict:
    """What a checkpoint after `done` steps holds besides optimizers and settings."""
    masks = [mask.state_dict() for mask in student.masks] or None
    return weights_of(student) | {"masks": masks, "step": done, "epoch": done // corpus.steps_per_epoch}


def evaluate(student: Student, corpus: Corpus, folder: run.RunFolder, done: int, precision: str) -> None:
    """Log the zero-shot accuracy after `done` steps. If the evaluation fails, a checkpoint is saved, from which the run
    repeats only the evaluation."""
    if folder.process.main:
        with folder.evaluation(done, unevaluated=True, **contents(student, corpus, done)):
            top1 = corpus.zero_shot_top1(student, precision)
        folder.log(done, epoch=(done - 1) // corpus.steps_per_epoch, zero_shot_top1=top1)
    run.wait()


def main(cfg: Config) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    device, precision = process.device, run.resolve_precision(cfg.precision, process.device)

    # Student, teacher, optimizers, pairs; from the checkpoint if there is one
    folder = run.RunFolder(cfg, process, step=0, epoch=0)
    first, unevaluated = folder.state["step"], folder.state.get("unevaluated", False)
    if not unevaluated and folder.finished(**({"epoch": cfg.epochs} if cfg.epochs else {"step": cfg.steps})):
        return folder.path
    clip, masks = restored(folder.state, cfg) if folder.resumed else first_weights(cfg)
    teacher = frozen_teacher(cfg, clip, process)
    student = Student(trained_towers(clip, teacher, cfg), *masks).to(device).train()
    set_grad_checkpointing(student.clip, cfg.grad_checkpointing)
    optimizers = make_optimizers(student, cfg)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    folder.restore(optimizers=optimizers, scaler=scaler)
    corpus = Corpus(cfg, process, student.clip, folder.state)
    cfg = corpus.cfg  # in steps
    folder.check_same("teacher", digest := digest_of(teacher), f"with another teacher than {cfg.teacher} is")
    folder.start(first, cfg.steps, len(corpus.pairs), data=corpus.pairs.fingerprint, teacher=digest)
    if process.main and not folder.resumed:  # it may be of an earlier run, whose checkpoint.pt was removed
        (folder.path / "model.pt").unlink(missing_ok=True)
    if cfg.keep_in_memory:  # after the start of the clock: a run's seconds include its teacher's forward passes
        corpus.remember(teacher, precision)

    if unevaluated and cfg.eval_every:
        evaluate(student, corpus, folder, first, precision)
    network, skipped, steps = distributed(student, process), 0, range(first, cfg.steps)
    batches = zip(steps, corpus.batches(first, teacher, precision), strict=False)
    for step, batch in run.progress(batches, len(steps), folder.path.name, cfg.batch_size, process):
        epoch, done, last = step // corpus.steps_per_epoch, step + 1, step + 1 == cfg.steps
        if student.masks and step == cfg.prune_step:
            student = cut_masks(student, cfg, folder, epoch)
            optimizers = folder.objects["optimizers"] = make_optimizers(student, cfg)
            network = distributed(student, process)
        images, tokens, answer = batch
        torch.manual_seed(data.stable_hash(cfg.seed, step))  # equal mask samples in all processes and after a resume
        logged = train_step(network, answer, images, tokens, step, cfg, optimizers, precision, scaler)
        skipped = (skipped + 1) * logged["skipped"]
        if done % cfg.log_every == 0 or done == 1 or last:  # also skipped steps, whose losses may not be finite
            check_skipped(skipped, step, last)
            folder.write(done, epoch=epoch, **logged)
        if cfg.eval_every and (done % cfg.eval_every == 0 or last):
            evaluate(student, corpus, folder, done, precision)
        if done % corpus.steps_per_epoch == 0 or last:
            data.report_broken(corpus.broken, process, f"epoch {epoch + 1}")
        if folder.due(done) and not last:
            folder.save(done, **contents(student, corpus, done))
    if process.main:  # before the last checkpoint, which marks the run as finished
        checkpoints.save_checkpoint(folder.path / "model.pt", weights_of(student))
    folder.save(cfg.steps, **contents(student, corpus, cfg.steps))
    folder.close("--sets FOLDER")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
