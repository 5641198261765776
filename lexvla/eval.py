"""Evaluate LexVLA: `python -m lexvla.eval RUN... [--report FILE]`; `python -m lexvla.eval search RUN "red fruit"`;
`python -m lexvla.eval explain RUN apple.png "red fruit"`.

The paper's evaluations: retrieval with sparse representations and at all levels of sparsity (Fig. 5), PatchDis (section
3.4), and what words say: word clouds, the patches of a word, the words that make a pair similar. Ours: how often the
most used words are used, which is what the overuse penalty is about; and search in an inverted index. Search and the
explanation of a pair are in search.py, pictures of words in plots.py.
"""

import dataclasses
import io
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from torchvision import transforms

from lexvla.checkpoints import load_run
from lexvla.model import LexVLA, sparsify
from lexvla.plots import plot_patches, plot_words
from lexvla.search import Explain, Search, explain, explain_pair, search, top_words  # noqa: F401
from lexvla.text import encode_texts, leading_space, lm_dtype, pieces
from lexvla.towers import eval_transform, normalize, patch_side
from shared import checkpoints, cli, data, evaluation, export, run
from shared.evalsets import EvalSet
from shared.zeroshot import (
    classification_metrics,
    evaluate,
    extract_image_features,
    owners,
    retrieval_ranks_from_scores,
)

EMOJI = "data/emoji/eval/"
SET = "retrieval_ood"  # on which arms are compared
METRICS = {
    f"{SET}/image_to_text_R@1": "I2T R@1",
    f"{SET}/text_to_image_R@1": "T2I R@1",
    f"{SET}/mean_recall": "mean recall",
    f"{SET}/dense/mean_recall": "... all words",
    f"{SET}/image/max_document_frequency": "most used word, images",
    f"{SET}/text/max_document_frequency": "most used word, texts",
    f"{SET}/image/entropy": "usage entropy, images",
    f"{SET}/image/active": "active words, images",
    f"{SET}/text/active": "active words, texts",
    f"{SET}/top5_in_caption": "top-5 words in caption",
    "names_ood/top1": "names OOD",
    "patchdis/miou_present": "PatchDis, present classes",
    "patchdis/miou": "PatchDis, all classes",
    "seconds": "seconds",
}
IGNORE = 65535  # in masks of 16 bits; 255 in those of 8
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # active words on both sides


@dataclasses.dataclass
class Config:
    """Measure runs; the numbers are printed, and all of them are kept in RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders. For zero-shot and retrieval alone also another paper's, local-dir:DIR with what --export wrote, or
    MODEL@TAG of open_clip."""
    sets: tuple[str, ...] = (EMOJI + "retrieval_ood", EMOJI + "names_ood")
    """Retrieval and classification sets in the CLIP-benchmark webdataset layout."""
    patchdis: str | None = "data/lexvla/scenes"
    """Folder of images and masks (see scenes.py) for PatchDis; None leaves it out."""
    patchdis_side: int = 96
    """Pixels of PatchDis' images, squared; masks keep their size. Not stated in the paper."""
    topk: int | None = None
    """Words kept of each representation; None: as the run's configuration says."""
    renormalize: bool = False
    """Unit rows again after sparsifying. Not stated in the paper; VDR and SPLADE leave values as they are."""
    class_text: str = "prompt"
    """Classes of PatchDis: prompt (name in the LM's prompt), or word (its pieces' codebook rows, averaged). Not stated
    in the paper."""
    background: bool = False
    """PatchDis counts unlabelled pixels as false positives instead of ignoring them. Not stated in the paper."""
    export: str | None = None
    """Refused: open_clip has no towers like LexVLA's."""
    report: str | None = None
    """Also compare all runs, named ARM-seedN, and write this file with claims and verdicts."""
    batch_size: int = 256
    """Images or captions per forward pass."""
    workers: int = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


# ------------------------------------------------------------------------------------------------------------ encoding


def encode_pairs(
    model: LexVLA, read: Callable, eval_set: EvalSet, batch_size: int, workers: int, device, dtype
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """(s_img (Ni, V), s_txt (Nt, V), image_of_text (Nt,), captions) of a retrieval set."""
    batches = eval_set.batches(batch_size, workers, device)
    s_img, captions = extract_image_features(model.image, batches, device, dtype, eval_set.name)
    texts = [caption for of_image in captions for caption in of_image]
    image_of_text = owners(captions)
    return s_img, encode_texts(model, read, texts, batch_size, device, dtype), image_of_text, texts


# ----------------------------------------------------------------------------------------------------------- retrieval


def retrieval_recall(sim: Tensor, image_of_text: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """R@k, image -> text and text -> image, (len ks,) each in 0..1; sim (Ni, Nt), image_of_text (Nt,).

    An image is a hit if any of its captions is in its top k. Ties count against: at high sparsity most scores are 0,
    and counting them as hits would reward representations for saying nothing.
    """
    both = retrieval_ranks_from_scores(sim, image_of_text)
    return tuple(torch.stack([(ranks < k).float().mean() for k in ks]) for ranks in both)


def sparsity_sweep(s_img: Tensor, s_txt: Tensor, image_of_text: Tensor, levels: Sequence[int]) -> Tensor:
    """R@1 (len levels, 2), image -> text and text -> image, with the top k words of both sides kept (Fig. 5)."""
    return torch.stack(
        [torch.cat(retrieval_recall(sparsify(s_img, k) @ sparsify(s_txt, k).T, image_of_text, (1,))) for k in levels]
    )


def retrieval(s_img: Tensor, s_txt: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """R@1/5/10 both ways and their mean, in percent."""
    recalls = retrieval_recall(s_img @ s_txt.T, image_of_text, (1, 5, 10))
    ways = ("image_to_text", "text_to_image")
    values = {
        f"{way}_R@{k}": 100 * r.item()
        for way, rs in zip(ways, recalls, strict=True)
        for k, r in zip((1, 5, 10), rs, strict=True)
    }
    return values | {"mean_recall": sum(values.values()) / len(values)}


# ---------------------------------------------------------------------------------------------------------------- usage


def usage(s: Tensor, k: int = 10) -> dict:
    """How words are used over samples (N, V); ours, for the overuse claim.

    document_frequency (V,): share of samples with the word among their top k; its maximum; mean_activation (V,);
    entropy: of it as a distribution, in nats, at most ln V.
    """
    document_frequency = (sparsify(s, k) > 0).float().mean(0)
    mean = s.float().mean(0)
    share = mean.double() / mean.double().sum()
    return {
        "document_frequency": document_frequency,
        "max_document_frequency": document_frequency.max().item(),
        "mean_activation": mean,
        "entropy": torch.special.entr(share).sum().item(),
    }


# ------------------------------------------------------------------------------------------------------------- PatchDis


def patchdis(
    s_patch: Tensor,
    s_class: Tensor,
    grid: tuple[int, int],
    masks: Tensor,
    ignore: int = 255,
    present_only: bool = False,
    background: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """Section 3.4: each patch gets the class most similar to it; (intersection (C,), union (C,), mIoU in 0..1).

    s_patch (N, P, V), s_class (C, V), masks (N, H, W) of class ids. Pixels take the class of their patch (nearest:
    row floor(y gh / H)). Both counts add up over images, so that batches can be added, see `mean_iou`. Not stated in
    the paper: pixels labelled `ignore` are left out (`background`: what is predicted there counts as false); all
    classes compete (`present_only`: those in the image's mask).
    """
    (gh, gw), (N, H, W), C = grid, masks.shape, len(s_class)
    sim = s_patch @ s_class.T  # (N, P, C)
    labelled = masks != ignore
    if present_only:
        present = torch.zeros(N, C + 1, dtype=torch.bool, device=masks.device)
        present.scatter_(1, torch.where(labelled, masks, C).view(N, -1), True)
        sim = sim.masked_fill(~present[:, None, :C], -math.inf)
    pred = sim.argmax(-1).view(N, gh, gw)
    rows, columns = (torch.arange(size, device=masks.device) * g // size for size, g in ((H, gh), (W, gw)))
    pred = pred[:, rows[:, None], columns]  # (N, H, W)
    truth, seen = masks[labelled], pred if background else pred[labelled]
    intersection = torch.bincount(truth[pred[labelled] == truth], minlength=C)
    union = torch.bincount(seen.flatten(), minlength=C) + torch.bincount(truth, minlength=C) - intersection
    return intersection.float(), union.float(), mean_iou(intersection, union)


def labelled_images(folder: str, side: int, backbone: str) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(pixels (1, 3, side, side), mask (1, H, W) int64, value to ignore) of each image of a PatchDis folder."""
    resize = transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, normalize(backbone)])
    classes = len((Path(folder) / "classnames.txt").read_text(encoding="utf-8").splitlines())
    masks = sorted((Path(folder) / "masks").glob("*.png"))
    if not masks:
        raise FileNotFoundError(f"{folder}/masks holds no .png; 'python -m lexvla.scenes' makes such a folder")
    for file in masks:
        image = next((Path(folder) / "images").glob(f"{file.stem}.*"), None)
        if image is None:
            raise FileNotFoundError(f"{folder}/images has no picture for masks/{file.name}")
        mask = read_mask(file)
        if mask.ndim != 2:
            raise ValueError(f"{file} has {mask.ndim} dimensions, a mask holds one class id a pixel")
        ignore = 255 if mask.dtype == np.uint8 else IGNORE
        if (largest := mask[mask != ignore].max(initial=0)) >= classes:
            raise ValueError(f"{file} has class {largest}, but classnames.txt has {classes} lines")
        try:
            picture = data.decode_image(data.read_file(image))
        except data.BrokenSample as error:
            raise ValueError(f"{image}: {error}") from error
        yield transform(picture)[None], torch.from_numpy(mask.astype(np.int64))[None], ignore


def read_mask(file: Path) -> np.ndarray:
    """The values of a .png as they are. ValueError if it cannot be read, or has more pixels than an image may have."""
    try:
        image = Image.open(io.BytesIO(data.read_file(file)), formats=("PNG",))
        if image.width * image.height > data.MAX_PIXELS:
            raise data.BrokenSample(f"more than the {data.MAX_PIXELS} pixels allowed")
        return np.asarray(image)
    except Exception as error:  # PIL's are of many kinds
        raise ValueError(f"{file} cannot be read as a mask: {error}") from error


def mean_iou(intersection: Tensor, union: Tensor) -> float:
    """Mean over the classes that occur; NaN if none does."""
    return (intersection / union)[union > 0].mean().item()


@torch.no_grad()
def patchdis_of_run(model: LexVLA, s_class: Tensor, cfg: Config, backbone: str, device) -> dict[str, float]:
    """mIoU in percent over a folder: of the model, with the image's classes only, and of random patches."""
    totals: dict[str, list[Tensor]] = {}
    noise, C = torch.Generator().manual_seed(0), len(s_class)
    for pixels, mask, ignore in labelled_images(cfg.patchdis, cfg.patchdis_side, backbone):
        s_patch = model.image.patches(pixels.to(device)).float().cpu()
        side = math.isqrt(s_patch.shape[1])
        random = torch.rand(1, side * side, C, generator=noise)
        for name, patches, classes in (("", s_patch, s_class), ("random_", random, torch.eye(C))):
            for kind, present_only in (("miou", False), ("miou_present", True)):
                counts = patchdis(patches, classes, (side, side), mask, ignore, present_only, cfg.background)[:2]
                sums = totals.setdefault(name + kind, [torch.zeros(C), torch.zeros(C)])
                for total, count in zip(sums, counts, strict=True):
                    total += count
    return {f"patchdis/{name}": 100 * mean_iou(*sums) for name, sums in totals.items()}


def class_words(model: LexVLA, tokenizer, names: Sequence[str]) -> Tensor:
    """(C, V): the mean of the codebook rows of a name's pieces, mapped as a word is; unknown pieces count nothing."""
    row = torch.full((len(tokenizer),), -1)
    row[model.text.vocab_ids.cpu()] = torch.arange(len(model.text.vocab_ids))
    space, rows = leading_space(tokenizer), []
    for ids in tokenizer([space + name for name in names], add_special_tokens=False)["input_ids"]:
        known = row[torch.tensor(ids)]
        rows.append(model.text.codebook[known[known >= 0]].sum(0) / max(int((known >= 0).sum()), 1))
    return model.text.read(torch.stack(rows)).detach().cpu()


# ------------------------------------------------------------------------------------------------------ one checkpoint


def other_model(path: str, cfg: Config, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Zero-shot and retrieval of another paper's run, an export or MODEL@TAG: a dual encoder without words to show."""
    model, transform, tokenizer = export.load_model(path, device)
    found = evaluate(model, tokenizer, transform, cfg.sets, device, cfg.batch_size, dtype, cfg.workers)
    return {f"{name}/{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}


@torch.no_grad()
def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """Every measurement of one run, flat: {"retrieval_ood/image_to_text_R@1": ..., "patchdis/miou": ..., ...}."""
    precision = run.resolve_precision(cfg.precision, process.device)
    dtype = run.DTYPES[precision]
    if export.foreign(path, "lexvla"):
        return other_model(path, cfg, process.device, dtype)
    model, train_cfg, tokenizer, read = load_run(path, lm_dtype(precision, process.device))
    model.to(process.device)
    if cfg.patchdis:
        if not (names := Path(cfg.patchdis) / "classnames.txt").is_file():
            raise FileNotFoundError(f"{names} does not exist: 'python -m lexvla.scenes' makes it")
        if cfg.patchdis_side % (patch := patch_side(model.image.backbone)):
            raise ValueError(
                f"--patchdis-side {cfg.patchdis_side} is no multiple of {path}'s patches of {patch} pixels"
            )
    transform = eval_transform(train_cfg.backbone, train_cfg.image_size)
    lexical, topk = train_cfg.head == "lexical", cfg.topk or train_cfg.topk

    def few(s: Tensor) -> Tensor:
        sparse = sparsify(s, topk)
        return F.normalize(sparse, dim=-1) if cfg.renormalize else sparse

    words = pieces(tokenizer, model.text.vocab_ids.tolist())
    flat: dict[str, float] = {}
    for folder in cfg.sets:
        eval_set = EvalSet(folder, transform)
        name = eval_set.name
        if eval_set.kind == "retrieval":
            encoded = encode_pairs(model, read, eval_set, cfg.batch_size, cfg.workers, process.device, dtype)
            flat |= {f"{name}/{key}": v for key, v in retrieval_of_run(*encoded, lexical, few).items()}
            if lexical:
                s_img, s_txt, image_of_text, texts = encoded
                said = said_in_captions(s_img, image_of_text, texts, tokenizer, model.text.vocab_ids)
                flat[f"{name}/top5_in_caption"] = said
                word_plots(Path(path), name, *encoded, words)
        elif eval_set.kind == "classification":
            loader = eval_set.batches(cfg.batch_size, cfg.workers, process.device)
            features, labels = extract_image_features(model.image, loader, process.device, dtype, name)
            classes = encode_texts(model, read, eval_set.classnames, cfg.batch_size, process.device, dtype)
            if lexical:
                features, classes = few(features), few(classes)
            flat |= {f"{name}/{key}": v for key, v in classification_metrics(features @ classes.T, labels).items()}
        else:
            raise ValueError(f"{folder} is a {eval_set.kind} set; retrieval and classification sets are evaluated")
    if cfg.patchdis:
        classnames = names.read_text(encoding="utf-8").splitlines()
        if cfg.class_text == "word" and lexical and train_cfg.text == "lm":
            s_class = class_words(model, tokenizer, classnames)
        else:
            s_class = encode_texts(model, read, classnames, cfg.batch_size, process.device, dtype)
        flat |= patchdis_of_run(model, s_class, cfg, train_cfg.backbone, process.device)
        if lexical:
            few_images = itertools.islice(labelled_images(cfg.patchdis, cfg.patchdis_side, train_cfg.backbone), 6)
            plot_patches(model, few_images, words, s_class, classnames, Path(path) / "patches.png")
    return {name: value for name, value in flat.items() if not math.isnan(value)}


def retrieval_of_run(
    s_img: Tensor, s_txt: Tensor, image_of_text: Tensor, texts: list[str], lexical: bool, few: Callable
) -> dict[str, float]:
    """Recall of sparse representations few(s), of dense ones, over the sweep; active words and their use."""
    if not lexical:
        return retrieval(s_img, s_txt, image_of_text)
    sparse = [few(s) for s in (s_img, s_txt)]
    flat = retrieval(*sparse, image_of_text)
    flat |= {f"dense/{key}": value for key, value in retrieval(s_img, s_txt, image_of_text).items()}
    levels = [k for k in LEVELS if k < s_img.shape[1]]
    for k, recalls in zip(levels, sparsity_sweep(s_img, s_txt, image_of_text, levels), strict=True):
        flat |= {
            f"top{k}/{way}_R@1": 100 * r.item()
            for way, r in zip(("image_to_text", "text_to_image"), recalls, strict=True)
        }
    for side, s, kept in zip(("image", "text"), (s_img, s_txt), sparse, strict=True):
        used = usage(s)
        flat[f"{side}/active"] = (kept > 0).sum(-1).float().mean().item()
        flat[f"{side}/sparsity"] = 100 * (1 - flat[f"{side}/active"] / s.shape[1])
        flat[f"{side}/max_document_frequency"] = 100 * used["max_document_frequency"]
        flat[f"{side}/entropy"] = used["entropy"]
    return flat


def said_in_captions(s_img: Tensor, image_of_text: Tensor, texts: list[str], tokenizer, vocab_ids: Tensor) -> float:
    """Percent of the images' five strongest words that are pieces of one of their captions."""
    space = leading_space(tokenizer)
    rows = tokenizer([space + text.lower() for text in texts], add_special_tokens=False)["input_ids"]
    said = torch.zeros(len(s_img), len(tokenizer), dtype=torch.bool)
    for image, ids in zip(image_of_text.tolist(), rows, strict=True):
        said[image, ids] = True
    top = vocab_ids.cpu()[s_img.topk(5).indices]
    return 100 * said.gather(1, top).float().mean().item()


def word_plots(
    folder: Path, name: str, s_img: Tensor, s_txt: Tensor, image_of_text: Tensor, texts: list[str], words: list[str]
) -> None:
    """Word clouds of a few images and captions, and words.json: the most used words of both sides."""
    chosen = torch.linspace(0, len(s_img) - 1, 6).long()
    captions = [texts[int((image_of_text == i).nonzero()[0])] for i in chosen]
    first = [int((image_of_text == i).nonzero()[0]) for i in chosen]
    rows = [(f"image of: {c}", dict(top_words(s_img[i], words, 40))) for i, c in zip(chosen, captions, strict=True)]
    rows += [(f"caption: {c}", dict(top_words(s_txt[i], words, 40))) for i, c in zip(first, captions, strict=True)]
    plot_words(rows, folder / f"words_{name}.png")
    most = {
        side: [(word, round(100 * share, 1)) for word, share in top_words(usage(s)["document_frequency"], words, 10)]
        for side, s in (("image", s_img), ("text", s_txt))
    }
    checkpoints.write_json(folder / f"words_{name}.json", most)


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, kept beside the checkpoint as results.json and results.md; not repeated while nothing changed."""
    if not (checkpoint := Path(path) / "checkpoint.pt").is_file() and not export.foreign(path, "lexvla"):
        raise FileNotFoundError(f"{checkpoint} does not exist: train the run first")
    scenes = [Path(cfg.patchdis) / "classnames.txt"] if cfg.patchdis else []
    return evaluation.measured_run(path, cfg, cfg.sets, lambda _: evaluate_run(path, cfg, process), scenes)


def main(cfg: Config) -> list[dict[str, float]]:
    """Measure every run; compare them if a report is asked for. Returns what was measured of each."""
    process = run.setup(0, cfg.device)
    if cfg.export:
        raise ValueError("--export: open_clip has no towers that end in a vocabulary, as LexVLA's do")
    cli.check_counts(cfg, "batch_size", "patchdis_side", "topk")
    if cfg.class_text not in ("prompt", "word"):
        raise ValueError(f"--class-text is prompt or word, not {cfg.class_text!r}")
    results = evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS)
    if cfg.report:
        evaluation.compare("lexvla", cfg.runs, results, cfg.report)
    return results


if __name__ == "__main__":
    commands = {"search": (Search, search), "explain": (Explain, explain_pair)}
    if sys.argv[1:2] and sys.argv[1] in commands:
        name = sys.argv[1]
        cls, function = commands[name]
        cli.command_line(lambda: function(tyro.cli(cls, args=sys.argv[2:], prog=f"lexvla.eval {name}")))
    else:
        cli.command_line(lambda: main(tyro.cli(Config)))
