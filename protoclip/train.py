"""Train ProtoCLIP, or its CLIP baseline: `python -m protoclip.train PRESET [--overrides]`.

ProtoCLIP (arXiv 2206.10996); authors' code megvii-research/protoclip@fde1933, cited as `U:` (its `src/`).
The paper's contribution in this file is episodic training. One episode is:
  1. draw N samples with replacement                                    `episodes.sample_episode`
  2. cache h_I, h_T of the whole episode in eval mode                   `extract_features`
  3. cluster, back-translate                                            `model.build_prototypes`
  4. train one pass over the same samples, new shuffle and new views    `train_episode`
Losses, heads and prototypes are in model.py, settings in config.py, sampling and views in episodes.py,
the teacher's features in teacher.py.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import faiss
import numpy as np
import open_clip
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from protoclip.config import PRESETS, Config, check, check_settings
from protoclip.episodes import (  # noqa: F401
    BatchTransform,
    EpisodeDataset,
    EpisodeSampler,
    ascii_caption,
    episode_batches,
    identity,
    image_transform,
    sample_episode,
)
from protoclip.model import (
    ProtoCLIPOutput,
    Prototypes,
    build_prototypes,
    create_model,
    image_statistics,
    kmeans_error,
    protoclip_loss,
)
from protoclip.teacher import Teacher
from shared import accumulate, checkpoints, cli, data, evaluation, memory, run, windows
from shared.clip import image_side, set_grad_checkpointing, trimmed
from shared.pretrained import cached_lite0_features, efficientnet_lite0, lite0_features
from shared.run import gather
from shared.zeroshot import quick_top1

# -------------------------------------------------------------------------------------------- schedules and optimizer


def loss_weights(
    episode: int, weights: tuple[float, float, float], infonce_warmup: int, lit_start: int | None
) -> tuple[float, float, float]:
    """The current (w_clip, w_proto, w_external); (1, 0, 0) in InfoNCE warm-up and LiT. U:training/train.py:67-85."""
    lit = lit_start is not None and lit_start > 0 and episode >= lit_start - 1
    return (1.0, 0.0, 0.0) if episode < infonce_warmup or lit else tuple(weights)


def weights_in(cfg: Config, episode: int) -> tuple[float, float, float]:
    """`loss_weights` with the settings of `cfg`."""
    return loss_weights(episode, (cfg.w_clip, cfg.w_proto, cfg.w_external), cfg.infonce_warmup, cfg.lit_start)


def learning_rates(
    step: int,
    *,
    lr: float,
    lr_text: float,
    warmup: int,
    total_steps: int,
    visual_steps: int,
    text_start: int = 0,
    text_end: int | None = None,
) -> tuple[float, float]:
    """(visual, rest) learning rates at a global step; all horizons in steps. U:training/scheduler.py:35.

    Linear warm-up, then half a cosine to 0 at the group's own horizon: `visual_steps` for the image tower (fewer than
    `total_steps` with LiT), text_start..text_end for text tower, heads and scales.
    """
    text_end = total_steps if text_end is None else text_end

    def cosine(step: int, base: float, horizon: int) -> float:
        if step < warmup:
            return base * (step + 1) / warmup
        if step > horizon:
            return 0.0
        return 0.5 * base * (1 + math.cos(math.pi * (step - warmup) / max(horizon - warmup, 1)))

    rest = 0.0 if step < text_start else cosine(step - text_start, lr_text, text_end - text_start)
    return cosine(step, lr, visual_steps), rest


def schedule(cfg: Config, step: int) -> tuple[float, float]:
    """`learning_rates` with the horizons of U:training/main.py:285-299."""
    per_episode = cfg.steps_per_episode()
    return learning_rates(
        step,
        lr=cfg.lr,
        lr_text=cfg.lr if cfg.lr_text is None else cfg.lr_text,
        warmup=cfg.warmup,
        total_steps=per_episode * cfg.episodes,
        visual_steps=per_episode * (cfg.episodes if cfg.lit_start is None else cfg.lit_start - 1),
        text_start=per_episode * cfg.text_start,
        text_end=per_episode * (cfg.episodes if cfg.text_end is None else cfg.text_end),
    )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """AdamW's four groups, image tower and rest, each without and with decay. U:training/main.py:188-225.

    The image tower is all names with `visual`. Both projection heads are in the rest, without decay.
    """

    def decays(name: str, parameter: nn.Parameter) -> bool:
        return parameter.ndim >= 2 and not any(
            word in name for word in ("bn", "ln", "bias", "logit_scale", "projection_head")
        )

    named = [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {
            "params": [p for n, p in named if ("visual" in n) == visual and decays(n, p) == decay],
            "weight_decay": weight_decay * decay,
        }
        for visual in (True, False)
        for decay in (False, True)
    ]


# ------------------------------------------------------------------------------------------------ one episode's passes


def share_gradient(output: ProtoCLIPOutput, world_size: int) -> ProtoCLIPOutput:
    """The same output, with the gradient of its features divided by W.

    Gradients then equal those of upstream, which gathers features without gradient to other ranks' features
    (U:training/loss.py:50-58): the encoders' are W times smaller than the global batch's, the temperatures' are not.
    """

    def share(x: Tensor | None) -> Tensor | None:
        return x if x is None or x.ndim != 2 else x.detach() + (x - x.detach()) / world_size

    return ProtoCLIPOutput(*map(share, output))


@torch.no_grad()
def extract_features(
    model: nn.Module, loader: Iterable, episode_size: int, device: torch.device | str, precision: str = "fp32"
) -> tuple[Tensor, Tensor]:
    """h_I, h_T (N, P) fp32 on the CPU, where row i is sample i of the episode. U:training/train.py:288.

    Eval mode, no gradient. `loader` yields this rank's (index, images, tokens, ...). Every rank returns the features of
    all ranks.
    """
    model = model.module if isinstance(model, DistributedDataParallel) else model
    device = torch.device(device)
    if dist.is_initialized():
        for buffer in model.buffers():  # BatchNorm statistics differ between ranks
            dist.broadcast(buffer, src=0)
    was_training = model.training
    model.eval()
    h_image = h_text = None
    for index, images, tokens, *_ in loader:
        with run.autocast(precision, device):
            output = model(images.to(device, non_blocking=True), trimmed(tokens, model, device))
        if h_image is None:
            h_image, h_text = (
                torch.zeros(episode_size, output.image_projected.shape[1], device=device) for _ in range(2)
            )
        index = index.to(device, non_blocking=True)
        h_image[index], h_text[index] = output.image_projected, output.text_projected
    model.train(was_training)
    if dist.is_initialized():
        dist.all_reduce(h_image)
        dist.all_reduce(h_text)
    return h_image.cpu(), h_text.cpu()


def train_episode(
    model: nn.Module,
    loader: Iterable,
    optimizer: torch.optim.Optimizer,
    prototypes: Prototypes | None,
    episode: int,
    cfg: Config,
    process: run.Process,
    start: int = 0,
    scaler: torch.amp.GradScaler | None = None,
    precision: str = "fp32",
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """One pass over an episode from batch `start` on; yields (global step, losses) per step. U:training/train.py:49."""
    bare, device = model.module if isinstance(model, DistributedDataParallel) else model, process.device
    weights = weights_in(cfg, episode)
    scaler = scaler or torch.amp.GradScaler(device.type, enabled=False)
    if prototypes is not None:
        prototypes = Prototypes(*(x if x is None else x.to(device) for x in prototypes))
    model.train()
    for i, (index, images, tokens, *_) in enumerate(loader, start):
        if i >= cfg.episode_size // cfg.batch_size:
            continue  # skip the short last batch, on every rank
        step = cfg.steps_per_episode() * episode + i
        visual, rest = schedule(cfg, step)
        for group, lr in zip(optimizer.param_groups, (visual, visual, rest, rest), strict=True):
            group["lr"] = lr
        torch.manual_seed(data.stable_hash(cfg.seed, step, process.rank))  # so that dropout is the same after a resume
        inputs = images.to(device, non_blocking=True), trimmed(tokens, model, device)
        index = index.to(device, non_blocking=True)
        output, backward = accumulate.forward(model, inputs, cfg, precision)
        features = output if cfg.gather_with_grad else share_gradient(output, process.world_size)
        losses = protoclip_loss(features, index, prototypes, weights, cfg.target_temperature, gather)
        optimizer.zero_grad()
        backward(scaler.scale(losses["loss"]))
        scaler.unscale_(optimizer)
        losses["gradient_norm"] = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
        scaler.step(optimizer)
        scaler.update()
        bare.clamp_logit_scales()
        yield step, losses | batch_statistics(output)


@torch.no_grad()
def batch_statistics(output: ProtoCLIPOutput) -> dict[str, Tensor]:
    """Logit scales; spread and modality gap of the local batch's features. U:training/train.py:234-256."""
    image, text = output.image_features, output.text_features
    found = {
        "logit_scale": output.logit_scale,
        "image_feature_std": image.std(0).mean(),
        "text_feature_std": text.std(0).mean(),
        "modality_gap": (image.mean(0) - text.mean(0)).norm(),
    }
    return found | ({} if output.logit_scale_proto is None else {"logit_scale_proto": output.logit_scale_proto})


# -------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int = 1) -> None:
    """Print the plan of a run: parameters, steps, learning rates, samples, memory of the training step."""
    check_settings(cfg, world_size)
    model = create_model(cfg.model, cfg.heads, cfg.hidden_dim, cfg.projection_dim, cfg.num_layers, cfg.image_size)
    if cfg.lock_image:
        model.lock_trunk()
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    heads = sum(p.numel() for n, p in model.named_parameters() if "projection_head" in n)
    total, samples = cfg.steps_per_episode() * cfg.episodes, cfg.episode_size * cfg.episodes
    pairs = f"{cfg.dataset_size:,}" if cfg.dataset_size else "all"
    episodes = sorted({0, min(cfg.infonce_warmup, cfg.episodes - 1), cfg.episodes - 1})
    size = image_side(model)
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, model.context_length, dtype=torch.long)
    if cfg.lock_image and cfg.keep_in_memory:
        images = torch.zeros(2, model.visual.trunk.num_features)
    cli.show_plan(
        [
            ("parameters", f"{parameters:,} (projection heads {heads:,})"),
            ("samples", f"{samples:,} in {cfg.episodes} episodes of {cfg.episode_size:,}, drawn from {pairs} pairs"),
            cli.disk_row(cfg.dataset_size, trained, parameters - trained),
            cli.batch_row(cfg, world_size),
            cli.step_row(total, cfg.steps_per_episode(), "episode"),
            *cli.rate_rows(
                lambda step: "{:.3e} image tower, {:.3e} rest,".format(*schedule(cfg, step)), cfg.warmup, total
            ),
            *(
                (
                    "loss weights",
                    "clip {:g}, proto {:g}, external {:g} in episode {}".format(*weights_in(cfg, episode), episode),
                )
                for episode in episodes
            ),
            *cli.memory_rows(
                lambda: model(images, tokens),
                cfg.batch_size / world_size / cfg.accumulate,
                trained,
                4 * (parameters - trained) + (24 * cfg.k * cfg.projection_dim if cfg.heads else 0),
                "gradients, AdamW, prototypes",
                model if cfg.grad_checkpointing else None,
            ),
        ]
    )


def locked_features(
    cfg: Config, pairs: data.Shards, size: int, tokenize: Callable, process: run.Process
) -> memory.InMemory:
    """`memory.read`, with a locked trunk's features (N, C) of the uncropped images at `size` pixels in place of pixels.

    They are computed once and stored in --cache.
    """
    precision = run.resolve_precision(cfg.precision, process.device)
    path = Path(cfg.cache) / f"lite0-{evaluation.images_of(pairs)}-{len(pairs)}-{size}-{precision}.npy"
    if not path.exists():
        found = memory.read(pairs, size, tokenize, process)
        if process.device.type == "cpu" and cfg.precision == "auto":  # equal images are computed once
            features = cached_lite0_features(found.pixels.split(256), cfg.cache)
        else:
            features = lite0_features(found.pixels, device=process.device, precision=cfg.precision)
        if process.main and not found.broken:  # a file would not record that another image replaced a broken one
            path.parent.mkdir(parents=True, exist_ok=True)
            checkpoints.save_array(path, features.numpy(), f".{os.getpid()}.tmp")  # several runs may start together
        return found._replace(pixels=features)
    captions = [pairs.caption(row) for row in range(len(pairs))]
    tokens = torch.cat([tokenize(captions[i : i + 1024]) for i in range(0, len(captions), 1024)])
    features = torch.from_numpy(np.load(path, allow_pickle=False))
    return memory.InMemory(features, tokens, np.unique(captions, return_inverse=True)[1], [])


class EpisodicData:
    """Data of the current episode: the batches of its extraction pass, then those of its training pass."""

    def __init__(self, cfg: Config, process: run.Process, model: nn.Module, tokenizer: Callable):
        size, statistics = image_side(model), image_statistics(model)
        self.cfg, self.process, self.tokenizer, self.broken = cfg, process, tokenizer, []
        self.sampler = EpisodeSampler(cfg)
        pairs = self.sampler.pairs
        shards = data.fingerprint("\n".join(self.sampler.shards).encode()) if pairs is None else None
        fingerprint, self.dataset_size = (shards, None) if pairs is None else (pairs.fingerprint, len(pairs))
        if pairs is not None:
            data.say_size(pairs, cfg, process)
        self.teacher = Teacher(cfg.external_teacher) if cfg.w_external != 0 else None
        self.about = {"data": fingerprint, "teacher": self.teacher and self.teacher.digest()}  # kept in checkpoints
        if self.teacher is not None and pairs is not None and process.main:  # only rank 0 reads the teacher's features
            self.teacher.find(pairs, np.arange(len(pairs)))  # an error before training starts if a sample has none
            if self.teacher.keys is None and not isinstance(pairs, data.TSV):
                print(f"{cfg.external_teacher} has no sample keys: its rows must be in the order of the samples")
        view_of = BatchTransform if cfg.keep_in_memory else image_transform
        self.train_view = view_of(size, True, cfg.augmentation == "light", cfg.crop, cfg.crop_ratio, statistics)
        self.eval_view = view_of(size, train=False, statistics=statistics)
        self.in_memory = None
        if cfg.keep_in_memory:
            tokenize = lambda captions: tokenizer([ascii_caption(caption) for caption in captions])  # noqa: E731
            if cfg.lock_image:
                self.in_memory = locked_features(cfg, pairs, size, tokenize, process)
                self.train_view = self.eval_view = identity
            else:
                self.in_memory = memory.read(pairs, 2 * size, tokenize, process)
            self.in_memory = self.in_memory.to(process.device)

    def draw(self, episode: int, start: int = 0, known: bool = False) -> None:
        """Draw the samples of an episode and start to read them: first the extraction pass, then the training pass from
        batch `start` on. There is no extraction pass if the prototypes are `known` or their losses have weight 0."""
        cfg, self.reading = self.cfg, iter(())  # ends the workers of the last episode
        self.episode, (self.pairs, self.samples) = episode, self.sampler.episode(episode)
        self.broken = list(self.pairs.broken) + (self.in_memory.broken if self.in_memory else [])
        self.kmeans_errors: dict[str, float] = {}
        views = {"train": self.train_view}
        if not known and any(weights_in(cfg, episode)[1:]):
            views = {"extract": self.train_view if cfg.extraction_view == "train" else self.eval_view, **views}
        pairs, passes = self.in_memory or self.pairs, {}
        for what, view in views.items():
            seed = (cfg.seed, episode, int(what == "train"))
            passes[what] = EpisodeDataset(pairs, self.samples, view, self.tokenizer, seed)
        counts, self.reading = episode_batches(cfg, self.process, list(passes.values()), start)
        self.count, self.normalise = dict(zip(passes, counts, strict=True)), passes["train"].normalise
        self.sampler.fetch(episode + 1)  # starts threads: after the workers, which must not be forked beside them
        run.wait()  # fetching an episode may take long; later collectives would time out

    def loader(self, what: str) -> Iterable:
        """Batches of the pass `what`: "extract", and then "train"; images are on the device."""
        label = f"{Path(self.cfg.out).name} {what} {self.episode + 1}/{self.cfg.episodes}"
        bar = run.progress(self.batches(), self.count[what], label, self.cfg.batch_size, self.process)
        return data.collect_broken(bar, self.broken) if what == "train" else bar

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor, list[data.Broken]]]:
        """The remaining batches of the episode. Uses `next`: a for loop would keep the workers of `reading` alive."""
        while True:
            index, images, tokens, broken = next(self.reading)
            yield index, self.normalise(images.to(self.process.device, non_blocking=True)), tokens, broken

    def prototypes(self, model: nn.Module, precision: str) -> Prototypes | None:
        """The episode's prototypes; None if their losses have weight 0."""
        cfg, weights = self.cfg, weights_in(self.cfg, self.episode)
        if weights[1] == 0 and weights[2] == 0:
            return None
        found = None
        h_image, h_text = extract_features(
            model, self.loader("extract"), len(self.samples), self.process.device, precision
        )
        if self.process.main:
            external = self.teacher.features_of(self.pairs, self.samples) if weights[2] != 0 else None
            found = build_prototypes(h_image, h_text, cfg.k, external, cfg.back_translate, cfg.niter, cfg.nredo)
            kinds = ("image", h_image, found.image_labels, found.image), ("text", h_text, found.text_labels, found.text)
            self.kmeans_errors = {f"kmeans_error_{kind}": kmeans_error(*of_kind) for kind, *of_kind in kinds}
        return run.broadcast(found, self.process)


def main(cfg: Config) -> Path | None:
    """Train to the end, resuming from the run folder's last checkpoint if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    precision, per_episode = run.resolve_precision(cfg.precision, process.device), cfg.steps_per_episode()

    # Model, tokenizer, optimizer; from the checkpoint if there is one
    model = create_model(cfg.model, cfg.heads, cfg.hidden_dim, cfg.projection_dim, cfg.num_layers, cfg.image_size)
    if cfg.lock_image:
        model.visual.trunk.load_state_dict(efficientnet_lite0().state_dict())
        model.lock_trunk()
    set_grad_checkpointing(model.to(process.device), cfg.grad_checkpointing)
    tokenizer = data.RememberingTokenizer(open_clip.get_tokenizer(cfg.model, context_length=model.context_length))
    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=cfg.lr, **cfg.adamw(), fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")
    folder = run.RunFolder(cfg, process, episode=0, batch=0, prototypes=None)
    folder.restore(state_dict=model, optimizer=optimizer, scaler=scaler)
    if folder.finished(episode=cfg.episodes):
        return folder.path
    first, start, prototypes = (folder.state[name] for name in ("episode", "batch", "prototypes"))

    # Data
    episodes = EpisodicData(cfg, process, model, tokenizer)
    whole_image = image_transform(image_side(model), train=False, statistics=image_statistics(model))
    folder.check_same("data", episodes.about["data"], f"on other data than {cfg.data} holds")
    folder.check_same("teacher", episodes.about["teacher"], f"with another teacher than {cfg.external_teacher} is")
    if process.main and process.world_size > 1:
        faiss.omp_set_num_threads(os.cpu_count() or 1)  # torchrun gives each process one thread; K-means runs on rank 0
    total = per_episode * cfg.episodes
    folder.start(per_episode * first + start, total, episodes.dataset_size, **episodes.about, name=cfg.out)
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model

    for episode in range(first, cfg.episodes):
        episodes.draw(episode, start, known=bool(prototypes))
        prototypes = Prototypes(**prototypes) if prototypes else episodes.prototypes(ddp, precision)
        kept = prototypes and prototypes._asdict()
        loader = episodes.loader("train")
        steps = train_episode(ddp, loader, optimizer, prototypes, episode, cfg, process, start, scaler, precision)
        for step, losses in steps:
            batch = step - per_episode * episode + 1
            if (step + 1) % cfg.log_every == 0 or batch == 1:
                visual, rest = optimizer.param_groups[0]["lr"], optimizer.param_groups[2]["lr"]
                once = episodes.kmeans_errors if batch == 1 else {}
                folder.log(step + 1, episode=episode, lr_visual=visual, lr_rest=rest, **run.over_ranks(losses), **once)
            if folder.due(step + 1) and batch < per_episode:
                folder.save(step + 1, episode=episode, epoch=episode, batch=batch, prototypes=kept)

        done, last, start, prototypes = per_episode * (episode + 1), episode + 1 == cfg.episodes, 0, None
        if process.main and cfg.eval_every and ((episode + 1) % cfg.eval_every == 0 or last):
            with folder.evaluation(done, episode=episode, epoch=episode, batch=per_episode, prototypes=kept):
                dtype, workers = run.DTYPES[precision], windows.evaluation_workers(cfg)
                top1 = quick_top1(model, tokenizer, whole_image, cfg.eval_set, process.device, dtype, workers)
            folder.log(done, episode=episode, zero_shot_top1=top1)
        data.report_broken(episodes.broken, process, f"episode {episode + 1}")
        if folder.due(done) or last:
            folder.save(done, episode=episode + 1, epoch=episode + 1, batch=0, prototypes=None)
    folder.close("--sets FOLDER --gap FOLDER --probe")
    return folder.path


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
