"""Evaluate TL;DR's runs: `python -m tldr_reduction.eval RUN...`.

BLIP's retrieval with re-ranking and its recall, zero-shot classification and retrieval by the shared code.
salesforce/BLIP@056a169 is cited as `B:`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
import tyro
from torch import Tensor, nn

from shared import cli, evaluation, export, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.settings import Count, Whole, check_limits
from shared.zeroshot import evaluate, owners
from tldr_reduction.blip import BLIP
from tldr_reduction.checkpoints import export_blip, load_run
from tldr_reduction.config import Common
from tldr_reduction.datasets import view_of
from tldr_reduction.encoders import scored_tokens
from tldr_reduction.tokenizer import WordPiece, eval_tokenizer, save_tokenizer

METRICS = {  # metrics shown for a run, and their headings
    "names_ood/top1": "names OOD",
    "names_ood/top5": "names OOD, top-5",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/image_to_text_R@1": "I2T R@1 OOD",
    "retrieval_ood/text_to_image_R@1": "T2I R@1 OOD",
    "seconds": "seconds",
}


@dataclasses.dataclass
class Config:
    """Measure runs: print the main numbers, write all to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of clip, blip or retrieval presets."""
    sets: tuple[str, ...] = ()
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval; by default the run's
    eval_set, or the pictures held out from its training data."""
    rerank: tuple[str, ...] = ()
    """Retrieval sets on which a blip's candidates are re-ranked by matching."""
    k_test: Count = 16
    """Number of candidates to re-rank (paper scale: 256 for COCO, 128 for Flickr30K)."""
    export: str | None = None
    """Write the run as a folder that open_clip loads as `local-dir:DIR` (shared/export.py), and measure nothing. For
    runs other than clip: blip.pth, which stock BLIP loads, and folders for transformers."""
    batch_size: Count = 256
    """Images or captions per forward pass."""
    workers: Whole = 0
    """Loader processes."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Autocast of the encoders, as in training."""


# --------------------------------------------------------------------------------------------------------- retrieval


@torch.no_grad()
def rerank_scores(
    blip: BLIP, images: Tensor, input_ids: Tensor, attention_mask: Tensor, k: int, batch_size: int = 64
) -> tuple[Tensor, Tensor]:
    """Scores image -> text (n, m) and text -> image (m, n). B:train_retrieval.py:69-166.

    The k best candidates of each query by cosine get match logit + cosine, all others -100. Texts (m, T) begin with
    [CLS], which is replaced by [ENC] for the matching.
    """
    device = next(blip.parameters()).device
    embeds = torch.cat([blip.visual_encoder(batch.to(device)) for batch in images.split(batch_size)])
    image_features = blip.project(embeds)
    batches = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
    text_features = torch.cat([blip.encode_text(ids.to(device), mask.to(device)) for ids, mask in batches])
    ids, mask = input_ids.to(device).clone(), attention_mask.to(device)
    ids[:, 0] = blip.enc_token_id

    def rerank(similarity: Tensor, texts_of: str) -> Tensor:
        scores = torch.full_like(similarity, -100.0)
        top, index = similarity.topk(min(k, similarity.shape[1]), dim=1)
        query = torch.arange(len(index), device=device)[:, None].expand_as(index)
        image, text = (query, index) if texts_of == "index" else (index, query)
        pairs = zip(image.flatten().split(batch_size), text.flatten().split(batch_size), strict=True)
        logits = torch.cat([blip.match(embeds[i], ids[t], mask[t])[:, 1] for i, t in pairs])
        return scores.scatter_(1, index, logits.view_as(top) + top)

    similarity = image_features @ text_features.T
    return rerank(similarity, "index").cpu(), rerank(similarity.T.contiguous(), "query").cpu()


def retrieval_recall(
    scores_i2t: Tensor,
    scores_t2i: Tensor,
    txt2img: Mapping[int, int] | Sequence[int] | Tensor,
    img2txt: Mapping[int, Sequence[int]] | Sequence[Sequence[int]],
) -> dict[str, float]:
    """Recall in percent, txt_* of texts for an image (the best of its captions counts), img_* of images for a text.

    scores (n, m) and (m, n); txt2img: the image of each text, img2txt: the texts of each image, as BLIP's dicts or as
    sequences. B:train_retrieval.py:171-215, with its order of ties (numpy's argsort, reversed). An image without
    captions is a miss.
    """
    n = len(scores_i2t)
    own = torch.zeros(n, len(scores_t2i), dtype=torch.bool)
    for image in range(n):
        own[image, torch.as_tensor(img2txt[image], dtype=torch.long)] = True
    of_text = torch.tensor([int(txt2img[text]) for text in range(len(scores_t2i))])

    def ranks(scores: Tensor, hits: Tensor) -> Tensor:
        """(q,) rank of the first hit of each query, 10**9 if there is none."""
        places = []
        for rows, hit in zip(torch.as_tensor(scores).split(512), hits.split(512), strict=True):
            order = torch.from_numpy(rows.numpy().argsort(axis=1)[:, ::-1].copy())
            first = hit.gather(1, order).byte().argmax(dim=1)
            places.append(torch.where(hit.any(dim=1), first, 10**9))
        return torch.cat(places)

    to_text, to_image = ranks(scores_i2t, own), ranks(scores_t2i, of_text[:, None] == torch.arange(n))
    result = {}
    for name, places in (("txt", to_text), ("img", to_image)):
        result |= {f"{name}_r{k}": 100 * (places < k).double().mean().item() for k in (1, 5, 10)}
        result[f"{name}_r_mean"] = sum(result[f"{name}_r{k}"] for k in (1, 5, 10)) / 3
    return result | {"r_mean": (result["txt_r_mean"] + result["img_r_mean"]) / 2}


def reranked(blip: BLIP, tokenizer: WordPiece, eval_set: EvalSet, cfg: Config) -> dict:
    """`retrieval_recall` of a retrieval set after re-ranking by matching."""
    batches = list(eval_set.batches(cfg.batch_size, cfg.workers))
    images = torch.cat([images for images, _ in batches])
    captions = [of_image for _, targets in batches for of_image in targets]
    of_text = owners(captions)
    own = [(of_text == image).nonzero().flatten() for image in range(len(captions))]
    ids, mask = scored_tokens(blip, tokenizer, [text for of_image in captions for text in of_image])
    return retrieval_recall(*rerank_scores(blip, images, ids, mask, cfg.k_test), of_text, own)


# ------------------------------------------------------------------------------------------------------ matching scores


def itm_histogram(scores: Tensor, bins: int = 10) -> Tensor:
    """Histogram of scores as a density (bins,) on [0, 1], whose mean is 1."""
    return torch.histc(scores.float(), bins, 0.0, 1.0) * bins / max(len(scores), 1)


# -------------------------------------------------------------------------------------------------------------- one run


def export_run(path: str, folder: str) -> None:
    """Write a clip as an open_clip model, with a tokenizer that prepares captions as `pre_caption` does; write other
    runs by `export_blip`.

    Unlike training, the exported tokenizer does not cut captions to 30 words.
    """
    model, settings, tokenizer = load_run(path)
    if settings.stage != "clip":
        return export_blip(model, settings, tokenizer, folder)
    config = export.named_config(settings.clip_model)
    config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip then takes the tokenizer in the folder
    save_tokenizer(folder)
    export.write(folder, model, config, model.state_dict(), view_of(model, settings), resize_mode="squash")


def measure_model(
    cfg: Config, process: run.Process, model: nn.Module, settings: Common, tokenizer, transform
) -> dict[str, float]:
    """All measurements of a model: {"names_ood/top1": ..., "rerank/retrieval_ood/txt_r1": ..., ...}."""
    model, tokens = model.to(process.device), eval_tokenizer(tokenizer, settings)
    rerank = () if settings.stage == "clip" else cfg.rerank
    candidates = evaluation.open_sets("rerank", rerank, transform, "retrieval")
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    results = evaluate(model, tokens, transform, cfg.sets, process.device, cfg.batch_size, dtype, cfg.workers)
    flat = {f"{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}
    for eval_set in candidates:
        recall = reranked(model, tokenizer, eval_set, cfg)
        flat |= {f"rerank/{eval_set.name}/{key}": value for key, value in recall.items()}
    return flat


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`measure_model` of a run."""
    model, settings, tokenizer = load_run(path)
    if settings.stage not in ("clip", "blip", "retrieval"):
        raise UserError(f"{path} is a run of stage {settings.stage}; clip, blip and retrieval runs are evaluated")
    return measure_model(cfg, process, model, settings, tokenizer, view_of(model, settings))


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, saved beside the checkpoint as results.json and results.md; reused while nothing has changed."""
    if not (Path(path) / "checkpoint.pt").is_file():
        raise UserError(f"{path} is no run folder: it has no checkpoint.pt")
    cfg = dataclasses.replace(cfg, sets=(evaluation.sets_of if cfg.rerank else evaluation.needed)(path, cfg.sets))
    return evaluation.measured_run(path, cfg, (*cfg.sets, *cfg.rerank), lambda _: evaluate_run(path, cfg, process))


def main(cfg: Config) -> list[dict[str, float]] | None:
    """Measure every run. Returns the measurements of each."""
    process = run.setup(0, cfg.device)
    if cfg.export:
        return export_run(export.single(cfg), cfg.export)
    check_limits(cfg)
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
