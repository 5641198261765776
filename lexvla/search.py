"""Search images in an inverted index, and explain a pair: what each word adds to its score.

    python -m lexvla.eval search RUN "red fruit"
    python -m lexvla.eval explain RUN apple.png "red fruit"

The paper shows the words of images, patches and captions as clouds (Fig. 1 and 4). The words' shares of a score and
search are ours.
"""

import contextlib
import dataclasses
import math
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.sparse
import torch
import tyro
from torch import Tensor

from lexvla.checkpoints import load_run
from lexvla.config import Config as TrainConfig
from lexvla.model import LexVLA, sparsify
from lexvla.plots import plot_pair, word_mask, word_rows
from lexvla.text import SCENES, SETS, encode_texts, pieces
from lexvla.towers import eval_transform
from shared import checkpoints, cli, data, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.evaluation import files_of, stamp
from shared.zeroshot import extract_image_features


@dataclasses.dataclass
class Search:
    """Print the best images for a query, and the words behind their scores."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    query: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="QUERY")]
    """Words to search for."""
    images: str = ""
    """Set whose images are searched, in the CLIP-benchmark webdataset layout. Default: the study's retrieval_known, if
    the run was trained on the study's corpus."""
    k: int = 10
    """Images to show."""


@dataclasses.dataclass
class Explain:
    """Print each word's share of the score of an image and a caption, and draw it."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder."""
    image: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE")]
    """Image file."""
    caption: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="CAPTION")]
    """Caption to compare it with."""
    k: int = 10
    """Words to list."""
    out: str = "explain.png"
    """Picture to write: word clouds of the image, of the caption, and of the patches most similar to the word with the
    largest share; below them, each patch's similarity to the words with the largest shares."""


# ------------------------------------------------------------------------------------------------------ words of a pair


def top_words(s: Tensor, words: Sequence[str], k: int = 10) -> list[tuple[str, float]]:
    """The k strongest words of one representation (V,), and their weights; words of weight 0 are left out."""
    values, index = s.sort(descending=True, stable=True)
    return [(words[i], v) for v, i in zip(values[:k].tolist(), index[:k].tolist(), strict=True) if v > 0]


def explain(s_img: Tensor, s_txt: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(values, word indices), (.., k) each: the k largest terms of the score sum_j s_img_j s_txt_j of pairs (.., V)."""
    values, index = (s_img * s_txt).sort(dim=-1, descending=True, stable=True)
    return values[..., :k], index[..., :k]


def reasons(s_img: Tensor, s_txt: Tensor, words: Sequence[str], k: int) -> list[tuple[str, float]]:
    """`explain` with words in place of indices: the k words that add most to the score of a pair (V,), and what they
    add; words that add nothing are left out."""
    values, ids = (x.tolist() for x in explain(s_img, s_txt, k))
    return [(words[i], value) for i, value in zip(ids, values, strict=True) if value > 0]


def listed(weighted: Sequence[tuple[str, float]]) -> str:
    """Words and their numbers as text, such as "dog 0.31, cat 0.08"."""
    return ", ".join(f"{word.strip()} {value:.2f}" for word, value in weighted)


# ---------------------------------------------------------------------------------------------------------------- index


class LexicalIndex:
    """An inverted index of sparse representations: each word's images and weights, as a scipy CSR matrix (V, N)."""

    def __init__(self, s: Tensor | scipy.sparse.csr_matrix):
        """s (N, V): an already `sparsify`-ed tensor, or a sparse matrix."""
        rows = s if scipy.sparse.issparse(s) else scipy.sparse.csr_matrix(s.numpy())
        self.postings = rows.T.tocsr()

    def scores(self, query: Tensor) -> np.ndarray:
        """Scores s_img . s_txt of all images (N,) for a sparse query (V,); reads only the query's posting lists."""
        words = query.nonzero()[:, 0].numpy()
        return self.postings[words].T @ query.numpy()[words]

    def search(self, query: Tensor, k: int = 10) -> list[tuple[int, float]]:
        """(image, score) of the k best images, best first; images that share no word with the query are left out."""
        scores = self.scores(query)
        best = np.argpartition(-scores, min(k, len(scores) - 1))[:k]
        return [(int(i), float(scores[i])) for i in best[np.lexsort((best, -scores[best]))] if scores[i] > 0]

    def common(self, query: Tensor, images: Sequence[int]) -> Tensor:
        """s_img (len(images), V) of the images, restricted to the query's words (0 for all others)."""
        words, s = query.nonzero()[:, 0], torch.zeros(len(images), len(query))
        s[:, words] = torch.from_numpy(self.postings[words.numpy()][:, images].toarray().T)
        return s


@torch.no_grad()
def index_of(folder: Path, model: LexVLA, eval_set: EvalSet, topk: int | None, device) -> tuple[LexicalIndex, list]:
    """(index, names) of a set's images; a name is the image's class, or its first caption.

    Both are cached in the run folder, and computed again if the checkpoint or the set has changed.
    """
    where = eval_set.folder.resolve()
    path = folder / f"index-{eval_set.name}-{data.stable_hash(str(where)) % 16**6:06x}.npz"
    made = stamp([folder / "checkpoint.pt", *files_of(eval_set.folder)])
    if path.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # damaged: written again
            kept = np.load(path)
            if str(kept["made"]) == made:
                rows = scipy.sparse.csr_matrix((kept["values"], kept["words"], kept["starts"]), kept["shape"])
                return LexicalIndex(rows), kept["names"].tolist()
    s_img, targets = extract_image_features(model.image, eval_set.batches(256, 0, device), device, desc=eval_set.name)
    if eval_set.kind == "classification":
        names = [eval_set.classnames[label] for label in targets.tolist()]
    elif eval_set.kind == "retrieval":
        names = [captions[0] for captions in targets]
    else:
        raise UserError(f"{where} is a {eval_set.kind} set; classification and retrieval sets are searched")
    rows = scipy.sparse.csr_matrix(sparsify(s_img, topk).numpy())
    with checkpoints.replaced(path) as file:
        np.savez(
            file,
            values=rows.data,
            words=rows.indices,
            starts=rows.indptr,
            shape=rows.shape,
            names=np.array(names),
            made=np.array(made),
        )
    return LexicalIndex(rows), names


# ---------------------------------------------------------------------------------------------------------- the scripts


def lexical_run(path: str) -> tuple[LexVLA, TrainConfig, Callable, list[str]]:
    """(model, configuration, text input, words) of a run folder, for `search` and `explain`."""
    model, train_cfg, tokenizer, read = load_run(path)
    if train_cfg.head == "dense":
        raise UserError(f"{path} is a latent baseline: its dimensions are no words; name a lexical run")
    return model, train_cfg, read, pieces(tokenizer, model.text.vocab_ids.tolist())


def search(cfg: Search) -> None:
    """Print the best images for a query, and the words behind their scores."""
    cli.check_counts(cfg, "k")
    device = run.setup(0).device
    model, train_cfg, read, words = lexical_run(cfg.run)
    model.to(device)
    images = cfg.images or (SETS[0] if train_cfg.data.startswith(SCENES) else "")
    if not images:
        raise UserError(f"--images is missing: {cfg.run} was trained on {train_cfg.data}; name a set to search")
    eval_set = EvalSet(images, eval_transform(train_cfg.backbone, train_cfg.image_size))
    index, names = index_of(Path(cfg.run), model, eval_set, train_cfg.topk, device)
    query = sparsify(encode_texts(model, read, [cfg.query], device=device)[0], train_cfg.topk)
    if not query.any():
        raise UserError(f"none of the {len(words):,} words that this run knows is in {cfg.query!r}")
    print(f"query: {listed(top_words(query, words, 8))}")
    found = index.search(query, cfg.k)
    if not found:
        print("no image has one of these words")
    common = index.common(query, [i for i, _ in found])
    for (i, score), s_img in zip(found, common, strict=True):
        print(f"{score:.3f}  {names[i]}: {listed(reasons(s_img, query, words, 5))}")


@torch.no_grad()
def explain_pair(cfg: Explain) -> None:
    """Print each word's share of the score of an image and a caption, and draw it."""
    cli.check_counts(cfg, "k")
    if Path(cfg.out).suffix != ".png" or not Path(cfg.out).parent.is_dir():
        raise UserError(f"--out {cfg.out} is no .png in a folder that exists")
    device = run.setup(0).device
    model, train_cfg, read, words = lexical_run(cfg.run)
    model.to(device)
    if not Path(cfg.image).is_file():
        raise UserError(f"{cfg.image} does not exist")
    try:
        picture = data.decode_image(Path(cfg.image).read_bytes())
    except data.BrokenSample as error:
        raise UserError(f"{cfg.image} cannot be read: {error}") from error
    pixels = eval_transform(train_cfg.backbone, train_cfg.image_size)(picture)[None].to(device)
    s_img, s_txt = model.image(pixels)[0].cpu(), encode_texts(model, read, [cfg.caption], device=device)[0]
    sparse_img, sparse_txt = (sparsify(s, train_cfg.topk) for s in (s_img, s_txt))
    score, terms = (sparse_img @ sparse_txt).item(), reasons(sparse_img, sparse_txt, words, cfg.k)
    print(f"score {score:.3f}: image of {(sparse_img > 0).sum()} words, caption of {(sparse_txt > 0).sum()}")
    for word, value in terms:
        print(f"{value:.3f}  {100 * value / score:3.0f} %  {word.strip()}")
    clouds = {"image": dict(top_words(s_img, words, 40)), "caption": dict(top_words(s_txt, words, 40))}
    s_patch, chosen = model.image.patches(pixels)[0].cpu(), explain(sparse_img, sparse_txt, min(4, len(terms)))[1]
    side = math.isqrt(len(s_patch))
    masks = [word_mask(s_patch, s_word, (side, side)) for s_word in word_rows(model, chosen)]
    names = [words[i].strip() for i in chosen]
    for name, mask in zip(names[:1], masks, strict=False):
        s_set = model.image.patch_set(pixels, mask.flatten()[None] > 0.5)[0].cpu()
        clouds[f"patches of {name}"] = dict(top_words(s_set, words, 40))
    plot_pair(pixels[0].cpu(), cfg.caption, clouds, dict(zip(names, masks, strict=True)), Path(cfg.out))
    print(f"drawn in {cfg.out}")
