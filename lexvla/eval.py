"""Evaluate LexVLA: `python -m lexvla.eval RUN... [--report FILE]`; `python -m lexvla.eval search RUN "red fruit"`;
`python -m lexvla.eval explain RUN apple.png "red fruit"`.

The paper's evaluations: retrieval with sparse representations and at all levels of sparsity (Fig. 5), PatchDis (section
3.4), and what words say: word clouds, the patches of a word, the words that make a pair similar. Ours: how often the
most used words are used, which is what the overuse penalty is about; and search in an inverted index. Plots are in
plots.py, the comparison of arms in claims.py.
"""

import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.sparse
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from lexvla.build import eval_transform, load_run, patch_side
from lexvla.claims import ARMS, METRICS, compare  # noqa: F401
from lexvla.config import Config as TrainConfig
from lexvla.model import LexVLA, sparsify
from lexvla.plots import patch_set_words, plot_pair, plot_patches, plot_words, word_mask, word_rows
from lexvla.scenes import labelled_images
from lexvla.text import leading_space, lm_dtype, pieces
from shared import data, report, run
from shared.evalsets import EvalSet
from shared.zeroshot import classification_metrics, extract_image_features, owners, retrieval_ranks_from_scores

EMOJI = "data/emoji/eval/"
LEVELS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # active words on both sides


@dataclasses.dataclass
class Config:
    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders."""
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
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


@dataclasses.dataclass
class Search:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """Words to search for."""
    images: str = EMOJI + "names_ood"
    """Set whose images are searched, in the CLIP-benchmark webdataset layout."""
    k: int = 10
    """Images to show."""


@dataclasses.dataclass
class Explain:
    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""
    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION")]
    """What is said of it."""
    k: int = 10
    """Words to list."""
    out: str = "explain.png"
    """Picture to write: word clouds of the image, of the caption and of the patches where the most important common
    word is; and where in the image this word and the next ones are."""


# ------------------------------------------------------------------------------------------------------------ encoding


@torch.no_grad()
def encode_texts(
    model: LexVLA, read: Callable, texts: Sequence[str], batch_size: int = 256, device="cpu", dtype=torch.float32
) -> Tensor:
    """(N, V) of captions, or (N, E) of the latent baseline."""
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model.text(*(x.to(device) for x in read(part))).float().cpu() for part in parts])


def quick_recall(
    model: LexVLA, read: Callable, transform: Callable, folder: str, device="cpu", dtype=torch.float32
) -> dict[str, float]:
    """R@1 both ways in percent, all words: a point of a learning curve."""
    was_training = model.training
    model.eval()
    s_img, s_txt, image_of_text, _ = encode_pairs(model, read, EvalSet(folder, transform), 256, 0, device, dtype)
    model.train(was_training)
    i2t, t2i = retrieval_recall(s_img @ s_txt.T, image_of_text, (1,))
    return {"image_to_text_R@1": 100 * i2t.item(), "text_to_image_R@1": 100 * t2i.item()}


def encode_pairs(
    model: LexVLA, read: Callable, eval_set: EvalSet, batch_size: int, workers: int, device, dtype
) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """(s_img (Ni, V), s_txt (Nt, V), image_of_text (Nt,), captions) of a retrieval set."""
    batches = eval_set.batches(batch_size, workers)
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


# --------------------------------------------------------------------------------------------------------- words, usage


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


def top_words(s: Tensor, words: Sequence[str], k: int = 10) -> list[tuple[str, float]]:
    """The k strongest words of one representation (V,), and their weights; words of weight 0 are none."""
    values, index = s.sort(descending=True, stable=True)
    return [(words[i], v) for v, i in zip(values[:k].tolist(), index[:k].tolist(), strict=True) if v > 0]


def explain(s_img: Tensor, s_txt: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """What makes a pair similar: the k largest of s_img * s_txt (.., V), which add up to the score, and their words."""
    values, index = (s_img * s_txt).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k]


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


# -------------------------------------------------------------------------------------------------------------- search


class LexicalIndex:
    """An inverted index of sparse representations: for each word the images that have it, as a scipy CSR (V, N)."""

    def __init__(self, s: Tensor | scipy.sparse.csr_matrix):
        """s (N, V): a tensor, which is `sparsify`-ed already, or a sparse matrix."""
        rows = s if scipy.sparse.issparse(s) else scipy.sparse.csr_matrix(s.numpy())
        self.postings = rows.T.tocsr()

    def scores(self, query: Tensor) -> np.ndarray:
        """s_img . s_txt of all images, (N,), for a sparse query (V,): only its words' postings are read."""
        return (scipy.sparse.csr_matrix(query.numpy()[None]) @ self.postings).toarray()[0]

    def search(self, query: Tensor, k: int = 10) -> list[tuple[int, float]]:
        """The k best images and their scores; images without a common word are no results."""
        scores = self.scores(query)
        best = np.argpartition(-scores, min(k, len(scores) - 1))[:k]
        return [(int(i), float(scores[i])) for i in best[np.lexsort((best, -scores[best]))] if scores[i] > 0]

    def common(self, query: Tensor, images: Sequence[int]) -> Tensor:
        """What images say of the query's words: s_img (len(images), V), 0 for all other words."""
        words, s = query.nonzero()[:, 0], torch.zeros(len(images), len(query))
        s[:, words] = torch.from_numpy(self.postings[words.numpy()][:, images].toarray().T)
        return s


@torch.no_grad()
def index_of(folder: Path, model: LexVLA, eval_set: EvalSet, topk: int | None, device) -> tuple[LexicalIndex, list]:
    """(index, names) of a set's images, kept in the run folder as long as checkpoint and images are not newer. A name
    is that of the image's class, or its first caption."""
    where = eval_set.folder.resolve()
    file = folder / f"index-{eval_set.name}-{data.stable_hash(str(where)) % 16**6:06x}.npz"
    sources = [folder / "checkpoint.pt", *eval_set.shards]
    if file.exists() and file.stat().st_mtime > max(source.stat().st_mtime for source in sources):
        kept = np.load(file)
        rows = scipy.sparse.csr_matrix((kept["values"], kept["words"], kept["starts"]), kept["shape"])
        return LexicalIndex(rows), kept["names"].tolist()
    s_img, targets = extract_image_features(model.image, eval_set.batches(256), device, desc=eval_set.name)
    if eval_set.kind == "classification":
        names = [eval_set.classnames[label] for label in targets.tolist()]
    elif eval_set.kind == "retrieval":
        names = [captions[0] for captions in targets]
    else:
        raise ValueError(f"{where} is a {eval_set.kind} set; classification and retrieval sets are searched")
    rows = scipy.sparse.csr_matrix(sparsify(s_img, topk).numpy())
    np.savez(file, values=rows.data, words=rows.indices, starts=rows.indptr, shape=rows.shape, names=np.array(names))
    return LexicalIndex(rows), names


def lexical_run(path: str) -> tuple[LexVLA, TrainConfig, Callable, list[str]]:
    """(model, configuration, text input, words) of a run folder, for `search` and `explain`."""
    model, train_cfg, tokenizer, read = load_run(path)
    if train_cfg.head == "dense":
        raise ValueError(f"{path} is a latent baseline: its dimensions are no words")
    return model, train_cfg, read, pieces(tokenizer, model.text.vocab_ids.tolist())


def search(cfg: Search) -> None:
    """Print the best images for a query, and the words that made them so."""
    run.check_counts(cfg, "k")
    device = run.setup(0).device
    model, train_cfg, read, words = lexical_run(cfg.run)
    model.to(device)
    eval_set = EvalSet(cfg.images, eval_transform(train_cfg.backbone, train_cfg.image_size))
    index, names = index_of(Path(cfg.run), model, eval_set, train_cfg.topk, device)
    query = sparsify(encode_texts(model, read, [cfg.query], device=device)[0], train_cfg.topk)
    if not query.any():
        raise ValueError(f"none of the {len(words):,} words that this run knows is in {cfg.query!r}")
    print(f"query: {listed(top_words(query, words, 8))}")
    found = index.search(query, cfg.k)
    if not found:
        print("no image has one of these words")
    common = index.common(query, [i for i, _ in found])
    for (i, score), s_img in zip(found, common, strict=True):
        print(f"{score:.3f}  {names[i]}: {listed(reasons(s_img, query, words, 5))}")


def reasons(s_img: Tensor, s_txt: Tensor, words: Sequence[str], k: int) -> list[tuple[str, float]]:
    """`explain` in words: the k that add most to the score of a pair (V,), and what they add."""
    values, ids = (x.tolist() for x in explain(s_img, s_txt, k))
    return [(words[i], value) for i, value in zip(ids, values, strict=True) if value > 0]


def listed(weighted: Sequence[tuple[str, float]]) -> str:
    return ", ".join(f"{word.strip()} {value:.2f}" for word, value in weighted)


@torch.no_grad()
def explain_pair(cfg: Explain) -> None:
    """Print what an image and a caption have in common, word by word, and draw it."""
    run.check_counts(cfg, "k")
    if Path(cfg.out).suffix != ".png" or not Path(cfg.out).parent.is_dir():
        raise ValueError(f"--out {cfg.out} is no .png in a folder that exists")
    device = run.setup(0).device
    model, train_cfg, read, words = lexical_run(cfg.run)
    model.to(device)
    if not Path(cfg.image).is_file():
        raise FileNotFoundError(f"{cfg.image} does not exist")
    try:
        picture = data.decode_image(Path(cfg.image).read_bytes())
    except data.BrokenSample as error:
        raise ValueError(f"{cfg.image} cannot be read: {error}") from error
    pixels = eval_transform(train_cfg.backbone, train_cfg.image_size)(picture)[None].to(device)
    s_img, s_txt = model.image(pixels)[0].cpu(), encode_texts(model, read, [cfg.caption], device=device)[0]
    few_img, few_txt = (sparsify(s, train_cfg.topk) for s in (s_img, s_txt))
    score, because = (few_img @ few_txt).item(), reasons(few_img, few_txt, words, cfg.k)
    print(f"score {score:.3f}: image of {(few_img > 0).sum()} words, caption of {(few_txt > 0).sum()}")
    for word, value in because:
        print(f"{value:.3f}  {100 * value / score:3.0f} %  {word.strip()}")
    clouds = {"image": dict(top_words(s_img, words, 40)), "caption": dict(top_words(s_txt, words, 40))}
    s_patch, chosen = model.image.patches(pixels)[0].cpu(), explain(few_img, few_txt, min(4, len(because)))[1]
    side = math.isqrt(len(s_patch))
    masks = [word_mask(s_patch, s_word, (side, side)) for s_word in word_rows(model, chosen)]
    names = [words[i].strip() for i in chosen]
    for name, mask in zip(names[:1], masks, strict=False):
        said = patch_set_words(s_patch, mask.flatten() > 0.5)
        clouds[f"patches of {name}"] = dict(top_words(said, words, 40))
    plot_pair(pixels[0].cpu(), cfg.caption, clouds, dict(zip(names, masks, strict=True)), Path(cfg.out))
    print(f"drawn in {cfg.out}")


# ------------------------------------------------------------------------------------------------------ one checkpoint


@torch.no_grad()
def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """Every measurement of one run, flat: {"retrieval_ood/image_to_text_R@1": ..., "patchdis/miou": ..., ...}."""
    precision = run.resolve_precision(cfg.precision, process.device)
    dtype = run.DTYPES[precision]
    model, train_cfg, tokenizer, read = load_run(path, lm_dtype(precision, process.device))
    model.to(process.device)
    if cfg.patchdis and cfg.patchdis_side % (patch := patch_side(model.image.backbone)):
        raise ValueError(f"--patchdis-side {cfg.patchdis_side} is no multiple of {path}'s patches of {patch} pixels")
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
            features, labels = extract_image_features(
                model.image, eval_set.batches(cfg.batch_size, cfg.workers), process.device, dtype, name
            )
            classes = encode_texts(model, read, eval_set.classnames, cfg.batch_size, process.device, dtype)
            if lexical:
                features, classes = few(features), few(classes)
            flat |= {f"{name}/{key}": v for key, v in classification_metrics(features @ classes.T, labels).items()}
        else:
            raise ValueError(f"{folder} is a {eval_set.kind} set; retrieval and classification sets are evaluated")
    if cfg.patchdis:
        classnames = (Path(cfg.patchdis) / "classnames.txt").read_text(encoding="utf-8").splitlines()
        if cfg.class_text == "word" and lexical and train_cfg.text == "lm":
            s_class = class_words(model, tokenizer, classnames)
        else:
            s_class = encode_texts(model, read, classnames, cfg.batch_size, process.device, dtype)
        flat |= patchdis_of_run(model, s_class, cfg, train_cfg.backbone, process.device)
        if lexical:
            plot_patches(model, cfg, train_cfg, words, s_class, classnames, Path(path) / "patches.png")
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
    run.write_json(folder / f"words_{name}.json", most)


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, kept beside the checkpoint as results.json and results.md; not repeated while nothing changed."""
    scenes = [Path(cfg.patchdis) / "classnames.txt"] if cfg.patchdis else []
    for file in (Path(path) / "checkpoint.pt", *scenes):
        if not file.is_file():
            hint = "'python -m lexvla.scenes' makes it" if file in scenes else "train the run first"
            raise FileNotFoundError(f"{file} does not exist: {hint}")
    return report.measured_run(path, cfg, cfg.sets, lambda _: evaluate_run(path, cfg, process), scenes)


def main(cfg: Config) -> None:
    process = run.setup(0, cfg.device)
    if cfg.export:
        raise ValueError("--export: open_clip has no towers that end in a vocabulary, as LexVLA's do")
    run.check_counts(cfg, "batch_size", "patchdis_side", "topk")
    if cfg.class_text not in ("prompt", "word"):
        raise ValueError(f"--class-text is prompt or word, not {cfg.class_text!r}")
    results = report.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS)
    if cfg.report:
        compare(list(cfg.runs), results, Path(cfg.report))


if __name__ == "__main__":
    commands = {"search": (Search, search), "explain": (Explain, explain_pair)}
    if sys.argv[1:2] and sys.argv[1] in commands:
        name = sys.argv[1]
        cls, function = commands[name]
        run.command_line(lambda: function(tyro.cli(cls, args=sys.argv[2:], prog=f"lexvla.eval {name}")))
    else:
        run.command_line(lambda: main(tyro.cli(Config)))
