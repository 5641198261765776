"""Evaluate LexVLA: `python -m lexvla.eval RUN... --sets FOLDER... --patchdis FOLDER`.

The paper's evaluations: retrieval with sparse representations and at all levels of sparsity (Table 1, Fig. 5), PatchDis
(section 3.4), and word clouds (Fig. 1). Ours: the frequency of the most used words, which the overuse penalty should
reduce. PatchDis is in patchdis.py; plots.py draws, and has the patches of a word (Fig. 4).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor

from lexvla.checkpoints import load_run
from lexvla.model import LexVLA, sparsify
from lexvla.patchdis import DRAWN, check_folder, classnames, labelled_images, measure
from lexvla.plots import PairWords, plot_class_maps, plot_words, top_words
from lexvla.text import encode_texts, leading_space, lm_dtype, pieces
from lexvla.towers import eval_transform, normalize, patch_side
from shared import checkpoints, cli, evaluation, export, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.pictures import by_picture, of_pictures
from shared.settings import Count, Whole, check_limits
from shared.zeroshot import (
    classification_metrics,
    evaluate,
    extract_image_features,
    owners,
    retrieval_ranks_from_scores,
    say_shared,
)

KS = (1, 5, 10)
HEADINGS = {"patchdis/miou": "PatchDis, all classes", "patchdis/miou_present": "... present classes"}


@dataclasses.dataclass
class Config:
    """Measure runs: print the main numbers, write all to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders. Also, for zero-shot classification and retrieval only, another paper's run folder, local-dir:DIR
    written by another paper's --export, or MODEL@TAG of open_clip."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval; by default the run's
    eval_set, or the pictures held out from its training data."""
    patchdis: str | None = None
    """Folder of images and masks for PatchDis (see patchdis.py)."""
    patchdis_side: Count | None = None
    """Side in pixels to which PatchDis' images are resized, as squares; masks keep their size. None: the run's image
    size. Not stated in the paper."""
    background: bool = False
    """PatchDis counts unlabelled pixels as false positives instead of ignoring them. Not stated in the paper."""
    topk: Count | None = None
    """Words kept in each representation; None: those above 1/sqrt(V). The paper's ablation keeps 512."""
    batch_size: Count = 256
    """Images or captions per forward pass."""
    workers: Whole = 0
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
    say_shared(eval_set.name, captions)
    texts = [caption for of_image in captions for caption in of_image]
    return s_img, encode_texts(model, read, texts, batch_size, device, dtype), owners(captions), texts


# ----------------------------------------------------------------------------------------------------------- retrieval


def retrieval_recall(sim: Tensor, image_of_text: Tensor, ks: Sequence[int]) -> tuple[Tensor, Tensor]:
    """R@k of image -> text and of text -> image, (len(ks),) each, in 0..1; sim (Ni, Nt), image_of_text (Nt,).

    An image is a hit if any of its captions is in its top k. Ties count as misses: at high sparsity most scores are 0,
    and counting them as hits would reward empty representations.
    """
    both = retrieval_ranks_from_scores(sim, image_of_text)
    return tuple(torch.stack([(ranks < k).double().mean() for k in ks]) for ranks in both)


def sparsity_sweep(
    s_img: Tensor, s_txt: Tensor, image_of_text: Tensor, levels: Sequence[int], ks: Sequence[int] = (1,)
) -> Tensor:
    """R@k with only the strongest words of both sides (Fig. 5): (len(levels), 2 len(ks)), image -> text first.

    levels: numbers of words kept.
    """
    sparse = ((sparsify(s_img, kept), sparsify(s_txt, kept)) for kept in levels)
    return torch.stack([torch.cat(retrieval_recall(img @ txt.T, image_of_text, ks)) for img, txt in sparse])


def sweep_levels(words: int) -> list[int]:
    """Numbers of words kept in a sweep: the powers of two below `words`, and `words`."""
    return [2**i for i in range((words - 1).bit_length())] + [words]


def retrieval(s_img: Tensor, s_txt: Tensor, image_of_text: Tensor) -> dict[str, float]:
    """R@1/5/10 both ways and their mean, in percent; of small sets the mean also by picture."""
    sim = s_img @ s_txt.T
    found = named_recalls(torch.cat(retrieval_recall(sim, image_of_text, KS)))
    shares = [
        100 * torch.stack([ranks < k for k in KS]).double().mean(0)
        for ranks in retrieval_ranks_from_scores(sim, image_of_text)
    ]
    scores = (shares[0] + of_pictures(shares[1], image_of_text, len(s_img))) / 2
    return found | by_picture("mean_recall", scores)


def named_recalls(recalls: Tensor) -> dict[str, float]:
    """Recalls (2 len(KS),) in the order of `sparsity_sweep`, by name and in percent, with their mean."""
    names = [f"{way}_R@{k}" for way in ("image_to_text", "text_to_image") for k in KS]
    values = dict(zip(names, (100 * recalls).tolist(), strict=True))
    return values | {"mean_recall": sum(values.values()) / len(values)}


def retrieval_of_run(s_img: Tensor, s_txt: Tensor, image_of_text: Tensor, topk: int | None) -> dict[str, float]:
    """Recall of sparse representations, of dense ones, and of the sweep; number and usage of active words."""
    sparse = [sparsify(s, topk) for s in (s_img, s_txt)]
    flat = retrieval(*sparse, image_of_text)
    flat |= {f"dense/{key}": value for key, value in retrieval(s_img, s_txt, image_of_text).items()}
    levels = sweep_levels(s_img.shape[1])
    for kept, recalls in zip(levels, sparsity_sweep(s_img, s_txt, image_of_text, levels, KS), strict=True):
        flat |= {f"top{kept}/{name}": value for name, value in named_recalls(recalls).items()}
    for side, s, kept in zip(("image", "text"), (s_img, s_txt), sparse, strict=True):
        used = usage(s)
        flat[f"{side}/active"] = (kept > 0).sum(-1).float().mean().item()
        flat[f"{side}/sparsity"] = 100 * (1 - flat[f"{side}/active"] / s.shape[1])
        flat[f"{side}/max_document_frequency"] = 100 * used["max_document_frequency"]
        flat[f"{side}/entropy"] = used["entropy"]
    flat["max_document_frequency"] = sum(flat[f"{side}/max_document_frequency"] for side in ("image", "text")) / 2
    return flat


# ----------------------------------------------------------------------------------------------------- use of the words


def usage(s: Tensor, k: int = 10) -> dict:
    """How evenly samples (N, V) use the words; ours, for the overuse claim.

    document_frequency (V,): share of samples with the word in their top k; max_document_frequency: its maximum;
    mean_activation (V,); entropy of mean_activation as a distribution, in nats, at most ln V.
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


def top_words_in_captions(
    s_img: Tensor, image_of_text: Tensor, texts: list[str], tokenizer, vocab_ids: Tensor
) -> float:
    """Percent of the images' five strongest words that are pieces of one of their captions in lower case; words with
    capitals (`cc12m` keeps some) never are."""
    space = leading_space(tokenizer)
    texts = [space + text.lower() for text in texts]
    occurs = torch.zeros(len(s_img), len(tokenizer), dtype=torch.bool)  # (image, token id): in one of its captions
    for image, ids in zip(image_of_text.tolist(), tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True):
        occurs[image, ids] = True
    top = vocab_ids.cpu()[s_img.topk(5).indices]
    return 100 * occurs.gather(1, top).float().mean().item()


def draw_words(
    folder: Path, eval_set: EvalSet, s_img: Tensor, s_txt: Tensor, image_of_text: Tensor, words: list[str]
) -> None:
    """Draw the first images with word clouds of images and captions in words_{name}.png; write the most used words of
    both sides to words_{name}.json."""
    pairs, name = [], eval_set.name
    for i, (_, pixels, captions) in enumerate(itertools.islice(eval_set, DRAWN)):
        first = int((image_of_text == i).nonzero()[0])
        clouds = (dict(top_words(s, words, 40)) for s in (s_img[i], s_txt[first]))
        pairs.append(PairWords(pixels, captions[0], *clouds))
    plot_words(pairs, folder / f"words_{name}.png")
    most = {
        side: [(word, round(100 * share, 1)) for word, share in top_words(usage(s)["document_frequency"], words, 10)]
        for side, s in (("image", s_img), ("text", s_txt))
    }
    checkpoints.write_json(folder / f"words_{name}.json", most)


# ------------------------------------------------------------------------------------------------------ one checkpoint


def other_model(path: str, cfg: Config, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Zero-shot and retrieval metrics of a dual encoder: another paper's run, an export or MODEL@TAG."""
    model, transform, tokenizer = export.load_model(path, device)
    found = evaluate(model, tokenizer, transform, cfg.sets, device, cfg.batch_size, dtype, cfg.workers)
    return {f"{name}/{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}


@torch.no_grad()
def evaluate_run(path: str, cfg: Config, process: run.Process, load: Callable = load_run) -> dict[str, float]:
    """Measure one run, which `load` loads: {"flickr30k/image_to_text_R@1": ..., "patchdis/miou": ..., ...}."""
    precision, device = run.resolve_precision(cfg.precision, process.device), process.device
    dtype = run.DTYPES[precision]
    if export.foreign(path, "lexvla"):
        return other_model(path, cfg, device, dtype)
    model, train_cfg, tokenizer, read = load(path, lm_dtype(precision, device))
    model.to(device)
    if cfg.patchdis:
        side = cfg.patchdis_side or train_cfg.image_size
        if side % (step := patch_side(model.image.backbone)):
            raise UserError(f"--patchdis-side {side} is no multiple of {step}, which the backbone of {path} needs")
        check_folder(cfg.patchdis)
    transform = eval_transform(train_cfg.backbone, train_cfg.image_size)
    words = pieces(tokenizer, model.text.vocab_ids.tolist())
    flat: dict[str, float] = {}
    sets = evaluation.open_sets("sets", cfg.sets, transform, "retrieval", "classification")
    for number, eval_set in enumerate(sets):
        name = eval_set.name
        if eval_set.kind == "retrieval":
            s_img, s_txt, image_of_text, texts = encode_pairs(
                model, read, eval_set, cfg.batch_size, cfg.workers, device, dtype
            )
            found = retrieval_of_run(s_img, s_txt, image_of_text, cfg.topk)
            share = top_words_in_captions(s_img, image_of_text, texts, tokenizer, model.text.vocab_ids)
            found["top5_in_caption"] = share
            if number == 0:
                draw_words(Path(path), eval_set, s_img, s_txt, image_of_text, words)
        else:
            batches = eval_set.batches(cfg.batch_size, cfg.workers, device)
            s_img, labels = extract_image_features(model.image, batches, device, dtype, name)
            s_class = encode_texts(model, read, eval_set.classnames, cfg.batch_size, device, dtype)
            found = classification_metrics(sparsify(s_img, cfg.topk) @ sparsify(s_class, cfg.topk).T, labels)
        flat |= {f"{name}/{key}": value for key, value in found.items()}
    if cfg.patchdis:
        names = classnames(cfg.patchdis)
        s_class = encode_texts(model, read, names, cfg.batch_size, device, dtype)
        images = labelled_images(cfg.patchdis, side, normalize(train_cfg.backbone))
        found, maps = measure(model.image.patches, s_class, images, cfg.background, device=device)
        flat |= {f"patchdis/{name}": value for name, value in found.items()}
        plot_class_maps(maps, names, Path(path) / "classes.png")
    return evaluation.without_nan(flat)


def evaluated(path: str, cfg: Config, process: run.Process, evaluate_run: Callable = evaluate_run) -> dict[str, float]:
    """`evaluate_run`, saved in the run folder as results.json and results.md; read from there if nothing changed."""
    if not (checkpoint := Path(path) / "checkpoint.pt").is_file() and not export.foreign(path, "lexvla"):
        raise UserError(f"{checkpoint} does not exist: train the run first")
    cfg = dataclasses.replace(cfg, sets=(evaluation.sets_of if cfg.patchdis else evaluation.needed)(path, cfg.sets))
    files = [file for file in Path(cfg.patchdis).rglob("*") if file.is_file()] if cfg.patchdis else []
    return evaluation.measured_run(path, cfg, cfg.sets, lambda _: evaluate_run(path, cfg, process), files)


def main(cfg: Config) -> list[dict[str, float]]:
    """Measure every run. Returns the measurements of each."""
    process = run.setup(0, cfg.device)
    check_limits(cfg)
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), HEADINGS, foreign=True)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
