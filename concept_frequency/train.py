"""The controlled experiment: train a small CLIP on a corpus whose concept frequencies we choose.

    python -m concept_frequency.train PRESET [--overrides]

The paper (arXiv 2404.04125; authors' code bethgelab/frequency_determines_performance@11ef009) correlates accuracies of
published models with counts in their corpora. Here frequency is the treatment: ranks are given to concepts at random,
pairs are drawn, and accuracy is measured on a drawing style that no arm has seen. The arms differ in `exponent` and
`assignment` alone. This file is all ours; counts, curves and tests are
the paper's.
"""

import dataclasses
import json
import logging
import math
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from concept_frequency.config import PRESETS, Config, check
from shared import data, run
from shared.evalsets import EvalSet
from shared.zeroshot import build_classifier, label_ranks, per_class_accuracy

SIDE = 64  # pixels of the images kept in memory
NOISE = 7  # random numbers of one view

# ------------------------------------------------------------------------------------------------ frequencies and pairs


def permutation(n: int, generator: torch.Generator | np.random.Generator | None) -> np.ndarray:
    """A random order of range(n)."""
    if isinstance(generator, np.random.Generator):
        return generator.permutation(n)
    return torch.randperm(n, generator=generator).numpy()


def zipf_counts(
    num_concepts: int, total: int, exponent: float, generator: torch.Generator | np.random.Generator | None
) -> np.ndarray:
    """f (K,) int64, sum = total, each at least 1: f_c ~ rank_c^-exponent, ranks given to concepts at random.

    Rounded down, then the largest remainders get what is missing; where raising zeros to 1 took too much, the most
    frequent pay for it.
    """
    if total < num_concepts:
        raise ValueError(f"{total} pairs cannot hold each of {num_concepts} concepts")
    share = np.arange(1, num_concepts + 1, dtype=np.float64) ** -exponent
    exact = share / share.sum() * total
    counts = np.maximum(np.floor(exact), 1).astype(np.int64)
    missing = total - counts.sum()
    counts[np.argsort(counts - exact, kind="stable")[: max(missing, 0)]] += 1
    while missing < 0:
        payers = np.flatnonzero(counts > 1)[:-missing]
        counts[payers] -= 1
        missing += len(payers)
    return counts[permutation(num_concepts, generator)]


class Concept(NamedTuple):
    name: str
    tags: list[str]
    images: list[int]  # rows of the corpus


class Corpus(NamedTuple):
    """Labelled images in memory: those of the chosen concepts."""

    concepts: list[Concept]
    keys: list[str]  # (I,) sample keys
    images: Tensor  # (I, 3, SIDE, SIDE) uint8
    broken: list[data.Broken]


class Pairs(NamedTuple):
    """The corpus that an arm trains on; row i is document i of the count."""

    concept: np.ndarray  # (N,) int64 what the image shows
    image: np.ndarray  # (N,) int64 row of Corpus.images
    caption: list[str]


def read_corpus(spec: str, names: Sequence[str], groups: Sequence[str], num_concepts: int, strict: bool) -> Corpus:
    """The images of `num_concepts` concepts, drawn from those of `names` that the shards hold.

    The draw depends on the names alone, so that all arms and seeds have the same concepts.
    """
    wanted, broken = set(names), []
    rows: dict[str, list[tuple[str, bytes]]] = {}
    words: dict[str, list[str]] = {}
    for path in data.expand_shards(spec):
        for key, about, image in read_labelled(data.fetch(path, Path("data/cache")), broken):
            if about["name"] in wanted and (not groups or about.get("group") in groups):
                rows.setdefault(about["name"], []).append((key, image))
                words[about["name"]] = list(about.get("tags", ()))
    if len(rows) < num_concepts:
        raise ValueError(
            f"{spec} holds {len(rows)} concepts of the evaluation set, fewer than --num-concepts {num_concepts}"
        )
    chosen = sorted(sorted(rows, key=lambda name: data.stable_hash("concept", name))[:num_concepts])
    concepts, keys, images = [], [], []
    for name in chosen:
        first = len(keys)
        for key, encoded in rows[name]:
            try:
                image = data.decode_image(encoded).resize((SIDE, SIDE))
            except data.BrokenSample as error:
                broken.append(data.Broken(key, str(error)))
                continue
            keys.append(key)
            images.append(torch.from_numpy(np.array(image)).permute(2, 0, 1))
        if len(keys) == first:
            raise ValueError(f"concept {name!r} has no readable image in {spec}")
        concepts.append(Concept(name, words[name], list(range(first, len(keys)))))
    if strict and broken:
        raise ValueError(f"--strict: sample {broken[0].key}: {broken[0].reason}")
    return Corpus(concepts, keys, torch.stack(images), broken)


def read_labelled(path: str, broken: list[data.Broken]) -> Iterator[tuple[str, dict, bytes]]:
    """(key, .json, image bytes) of a shard's samples; what cannot be read is appended to `broken`."""
    members: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in filter(tarfile.TarInfo.isfile, tar):
                key, _, extension = member.name.rpartition(".")
                content = tar.extractfile(member).read()
                if len(content) < member.size:
                    raise tarfile.ReadError("truncated")
                members.setdefault(key, {})[extension] = content
            if not data.ended_whole(tar):
                raise tarfile.ReadError("truncated")
    except (tarfile.TarError, EOFError):
        broken.append(data.Broken(path, "truncated or damaged tar"))
    for key, files in members.items():
        image = next((files[e] for e in data.IMAGE_EXTENSIONS if e in files), None)
        try:
            about = json.loads(files["json"])
            if image is None or "name" not in about:
                raise KeyError
        except (KeyError, ValueError):
            broken.append(data.Broken(key, "no image, or no .json with a name"))
            continue
        yield key, about, image


def sample_pairs(counts: np.ndarray, concepts: Sequence[Concept], misaligned: float, seed: int) -> Pairs:
    """N = sum(counts) pairs: of concept c, f_c times one of its images in turn, each with a caption drawn anew.

    A share `misaligned` of the pairs, drawn at random, exchange their captions among each other in a circle.
    """
    rng = np.random.default_rng(seed)
    concept = np.repeat(np.arange(len(concepts)), counts)
    image = np.empty(len(concept), dtype=np.int64)
    for c, start in enumerate(np.cumsum(counts) - counts):
        order = rng.permutation(concepts[c].images)
        image[start : start + counts[c]] = np.resize(order, counts[c])
    caption = [make_caption(concepts[c], rng) for c in concept.tolist()]
    moved = rng.permutation(len(concept))[: round(misaligned * len(concept))]
    for row, text in zip(moved, [caption[i] for i in np.roll(moved, 1)], strict=True):
        caption[row] = text
    order = rng.permutation(len(concept))
    return Pairs(concept[order], image[order], [caption[i] for i in order])


FORMS = (
    "{name}",
    "a drawing of {name}",
    "{name} icon",
    "picture of {name}",
    "{name}, {tags}",
    "{tags} {name}",
    "the {name}",
)


def make_caption(concept: Concept, rng: np.random.Generator) -> str:
    """The concept's name in a phrase, half of the time among one to three of its other words."""
    tags = [tag for tag in concept.tags if tag != concept.name]
    some = rng.permutation(tags)[: rng.integers(1, 4)] if tags else []
    form = FORMS[rng.integers(len(FORMS) if len(some) else 4)]
    return form.format(name=concept.name, tags=" ".join(some))


def make_pairs(cfg: Config, corpus: Corpus) -> tuple[np.ndarray, Pairs]:
    """(frequencies, pairs) of an arm: a function of its settings."""
    generator = torch.Generator().manual_seed(data.stable_hash("assignment", cfg.seed, cfg.assignment))
    counts = zipf_counts(cfg.num_concepts, cfg.total, cfg.exponent, generator)
    return counts, sample_pairs(
        counts, corpus.concepts, cfg.misaligned, data.stable_hash("pairs", cfg.seed, cfg.assignment)
    )


def write_pairs(path: Path, corpus: Corpus, pairs: Pairs) -> None:
    """pairs.parquet (key, caption, concept): what `concept_frequency.count` counts."""
    names = [concept.name for concept in corpus.concepts]
    table = pa.table(
        {
            "key": [corpus.keys[i] for i in pairs.image],
            "caption": pairs.caption,
            "concept": [names[c] for c in pairs.concept],
        }
    )
    pq.write_table(table, path)


# ------------------------------------------------------------------------------------------------------ views and model


def views(images: Tensor, noise: Tensor, size: int) -> Tensor:
    """uint8 (B, 3, H, W) and uniform noise (B, 7) -> float (B, 3, size, size) in -1..1; noise 0.5 is the plain image.

    Zoom of 0.8 to 1.25, shift of up to a tenth, rotation of up to 15 degrees, and a tint; white outside.
    """
    u = 2 * noise - 1  # (B, 7) in -1..1
    zoom, angle = 1.25 ** u[:, 0], u[:, 1] * math.pi / 12
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    theta = torch.stack([torch.stack([cos, -sin, 0.2 * u[:, 2]], 1), torch.stack([sin, cos, 0.2 * u[:, 3]], 1)], 1)
    grid = F.affine_grid(theta, [len(images), 3, size, size], align_corners=False)
    ink = F.grid_sample(1 - images.float() / 255, grid, align_corners=False)  # zeros outside: white
    return (1 - ink * (1 + 0.3 * u[:, 4:7, None, None])).clamp(0, 1) * 2 - 1


def create_model(name: str, image_size: int | None = None) -> nn.Module:
    """A randomly initialised open_clip model, with a plain text tower's context length."""
    if open_clip.get_model_config(name) is None:
        raise ValueError(f"model {name!r} is no open_clip config; open_clip.list_models() lists the names")
    override = {} if image_size is None else {"force_image_size": image_size}
    logging.disable(logging.WARNING)  # of random weights, which are meant
    try:
        return open_clip.create_model(name, load_weights=False, **override)
    finally:
        logging.disable(logging.NOTSET)


def image_side(model: nn.Module) -> int:
    size = model.visual.image_size
    return size[0] if isinstance(size, tuple) else size


def gather(features: Tensor) -> Tensor:
    """Rows of all ranks in rank order, with their gradients: (B, D) -> (W*B, D)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    return torch.cat(torch.distributed.nn.all_gather(features))


def clip_loss(image_features: Tensor, text_features: Tensor, logit_scale: Tensor) -> Tensor:
    """Symmetric InfoNCE of unit rows (B, D), in fp32."""
    logits = logit_scale.float() * image_features.float() @ text_features.float().T
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def learning_rate(step: int, cfg: Config) -> float:
    """Linear warm-up, then half a cosine to 0."""
    total = cfg.epochs * cfg.steps_per_epoch()
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / cfg.warmup
    return 0.5 * cfg.lr * (1 + math.cos(math.pi * (step - cfg.warmup) / max(total - cfg.warmup, 1)))


# ----------------------------------------------------------------------------------------------------------- evaluation


class TestSet(NamedTuple):
    images: Tensor  # (T, 3, SIDE, SIDE) uint8
    labels: Tensor  # (T,) int64 concept


def read_test_set(folder: str, names: Sequence[str]) -> TestSet:
    """The evaluation set's images of these concepts."""
    place = {name: c for c, name in enumerate(names)}
    evaluation = EvalSet(folder, lambda image: torch.from_numpy(np.array(image.resize((SIDE, SIDE)))).permute(2, 0, 1))
    rows = [(image, place[evaluation.classnames[y]]) for _, image, y in evaluation if evaluation.classnames[y] in place]
    return TestSet(torch.stack([image for image, _ in rows]), torch.tensor([label for _, label in rows]))


@torch.no_grad()
def zero_shot(
    model: nn.Module,
    tokenizer,
    test: TestSet,
    names: Sequence[str],
    num_views: int,
    device: torch.device,
    precision: str,
) -> Tensor:
    """Percent (K,) of each concept among all K, prompt `{c}`, over `num_views` fixed views of each test image."""
    was_training = model.training
    model.eval()
    dtype = run.DTYPES[precision]
    classifier = build_classifier(model.encode_text, tokenizer, list(names), ["{c}"], 256, device, dtype)
    noise = torch.rand(num_views, NOISE, generator=torch.Generator().manual_seed(0))
    noise[0] = 0.5
    hits = []
    for view in noise:
        for rows in torch.arange(len(test.labels)).split(256):
            x = views(test.images[rows].to(device), view.expand(len(rows), NOISE).to(device), image_side(model))
            with run.autocast(precision, device):
                features = F.normalize(model.encode_image(x).float(), dim=-1).cpu()
            hits.append(label_ranks(features, test.labels[rows], classifier) < 1)
    model.train(was_training)
    return per_class_accuracy(torch.cat(hits), test.labels.repeat(num_views), len(names))


# ----------------------------------------------------------------------------------------------------------- the script


def dry_run(cfg: Config, world_size: int) -> None:
    """Print what a run would be: parameters, steps, learning rates, frequencies, memory of the training step."""
    model = create_model(cfg.model, cfg.image_size)
    parameters = sum(p.numel() for p in model.parameters())
    per_epoch = cfg.steps_per_epoch()
    total, size = per_epoch * cfg.epochs, image_side(model)
    counts = np.sort(zipf_counts(cfg.num_concepts, cfg.total, cfg.exponent, None))[::-1]
    print(f"parameters         {parameters:,}")
    print(f"samples            {cfg.total:,} pairs of {cfg.num_concepts:,} concepts, {cfg.epochs} times")
    print(f"frequencies        {counts[0]:,} (most), {counts[len(counts) // 2]:,} (median), {counts[-1]:,} (least)")
    print(f"batch              {cfg.batch_size} ({cfg.batch_size // world_size} in each of {world_size} processes)")
    print(f"steps              {total:,} ({per_epoch:,} an epoch)")
    for step in sorted({0, min(cfg.warmup, total - 1), total // 2, total - 1}):
        print(f"learning rate      {learning_rate(step, cfg):.3e} at step {step:,}")
    images, tokens = torch.zeros(2, 3, size, size), torch.ones(2, model.context_length, dtype=torch.long)
    activations = run.activation_bytes(lambda: model(images, tokens)) / 2 * cfg.batch_size / world_size / 2**30
    weights = 16 * parameters / 2**30
    print(f"memory estimate    {weights + activations:.1f} GiB a process in fp32: {weights:.1f} weights and AdamW;")
    print(f"                   {activations:.1f} activations")


def main(cfg: Config) -> Path | None:
    """Train to the end, from the last checkpoint in the run folder if there is one. Returns the run folder."""
    process = run.setup(cfg.seed, cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, process.world_size) if process.main else None
    check(cfg, process.world_size)
    precision = run.resolve_precision(cfg.precision, process.device)
    folder = Path(cfg.out)
    steps, total_steps = cfg.steps_per_epoch(), cfg.epochs * cfg.steps_per_epoch()

    # Model, tokenizer, optimizer
    model = create_model(cfg.model, cfg.image_size).to(process.device)
    tokenizer = open_clip.get_tokenizer(cfg.model, context_length=model.context_length)
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if (p.ndim >= 2) == decay], "weight_decay": cfg.weight_decay * decay}
        for decay in (False, True)
    ]
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)
    scaler = torch.amp.GradScaler(process.device.type, enabled=precision == "fp16")

    # Resume
    state = run.resume(folder, cfg) or {"step": 0, "seconds": 0.0}
    if "state_dict" in state:
        model.load_state_dict(state["state_dict"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
    if state["step"] >= total_steps:
        if process.main:
            print(f"{folder} is finished ({total_steps} steps); nothing to do")
        return folder

    # Data: the arm's corpus, in memory
    evaluation = EvalSet(cfg.eval_set, lambda image: image)
    corpus = read_corpus(cfg.data, evaluation.classnames, cfg.groups, cfg.num_concepts, cfg.strict)
    names = [concept.name for concept in corpus.concepts]
    counts, pairs = make_pairs(cfg, corpus)
    fingerprint = data.fingerprint(corpus.images.numpy().tobytes(), "\n".join(pairs.caption).encode())
    if state.get("data", fingerprint) != fingerprint:
        raise ValueError(f"{folder} was trained on other data than {cfg.data} holds now: choose another --out")
    if process.main:
        if line := data.broken_report(corpus.broken):
            print(line.replace("replaced by their neighbours", "left out"))
        folder.mkdir(parents=True, exist_ok=True)
        write_pairs(folder / "pairs.parquet", corpus, pairs)
        run.write_json(folder / "frequencies.json", dict(zip(names, counts.tolist(), strict=True)))
    tokens = tokenizer(pairs.caption)
    test = read_test_set(cfg.eval_set, names)
    size = image_side(model)

    log = run.RunLog(folder, cfg, process, step=state["step"])
    ddp = DistributedDataParallel(model) if process.world_size > 1 else model
    clock, commit = run.Stopwatch(state["seconds"]), run.commit()

    def save(step: int) -> None:
        if process.main:
            run.save_checkpoint(
                folder / "checkpoint.pt",
                {
                    "name": cfg.out,
                    "epoch": step // steps,
                    "step": step,
                    "state_dict": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "scaler": scaler.state_dict(),
                    "seconds": clock.read(),
                    "commit": commit,
                    "data": fingerprint,
                    "config": dataclasses.asdict(cfg),
                },
            )

    ddp.train()
    rank, local = process.rank, cfg.batch_size // process.world_size
    for epoch in range(state["step"] // steps, cfg.epochs):
        start = state["step"] - epoch * steps if epoch == state["step"] // steps else 0
        batches = data.batches(cfg.total, local, (cfg.seed, epoch), rank, process.world_size, start)
        label = f"{folder.name} {epoch + 1}/{cfg.epochs}"
        bar = run.progress(batches[: steps - start], steps - start, label, cfg.batch_size, process)
        for step, rows in enumerate(bar, epoch * steps + start):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, cfg)
            # the views of the whole batch are drawn alike on all ranks, so that processes together see what one would
            generator = torch.Generator().manual_seed(data.stable_hash(cfg.seed, step))
            noise = torch.rand(cfg.batch_size, NOISE, generator=generator)[rank * local : (rank + 1) * local]
            x = views(corpus.images[pairs.image[rows]].to(process.device), noise.to(process.device), size)
            torch.manual_seed(data.stable_hash(cfg.seed, step, rank))  # for towers with dropout: resume agrees
            with run.autocast(precision, process.device):
                image_features, text_features, scale, *_ = ddp(x, tokens[rows].to(process.device))
            loss = clip_loss(gather(image_features), gather(text_features), scale)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.max_grad_norm)
            scaler.step(optimizer)
            scaler.update()
            with torch.no_grad():
                model.logit_scale.clamp_(0, math.log(100))
            if (step + 1) % cfg.log_every == 0 or step == 0:
                log.write(step + 1, seconds=clock.read(), lr=learning_rate(step, cfg), loss=loss, gradient_norm=norm)
                if not torch.isfinite(loss):
                    raise ValueError(f"the loss is {loss.item()} at step {step}: lower --lr, or use --precision fp32")
            if (step + 1) % cfg.save_every == 0 and step + 1 < total_steps:
                save(step + 1)
        if process.main and (epoch + 1 == cfg.epochs or (cfg.eval_every and (epoch + 1) % cfg.eval_every == 0)):
            with clock.paused():
                accuracy = zero_shot(model, tokenizer, test, names, 1, process.device, precision).nanmean().item()
            log.write((epoch + 1) * steps, seconds=clock.read(), zero_shot_top1=accuracy)
    save(total_steps)
    log.close()
    return folder


if __name__ == "__main__":
    run.command_line(lambda: main(tyro.extras.overridable_config_cli(PRESETS)))
