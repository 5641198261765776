"""Evaluate TL;DR's runs: `python -m tldr_reduction.eval RUN...`.

BLIP's retrieval with re-ranking and its recall, ITM score histograms, zero-shot classification and retrieval by the
shared code, and what a reduction kept. salesforce/BLIP@056a169 is cited as `B:`.
"""

import csv
import dataclasses
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from sklearn.metrics import adjusted_mutual_info_score, roc_auc_score
from torch import Tensor

from shared import checkpoints, cli, data, evaluation, export, run, tars
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.zeroshot import evaluate, owners
from tldr_reduction.checkpoints import export_blip, load_run
from tldr_reduction.config import Common, total_steps
from tldr_reduction.datasets import local_pairs, view_of
from tldr_reduction.model import BLIP
from tldr_reduction.scorers import scored_tokens
from tldr_reduction.tokenizer import WordPiece, eval_tokenizer, save_tokenizer

EMOJI = "data/emoji/eval/"
METRICS = {  # metrics shown for a run, and their headings
    "names_ood/top1": "names OOD",
    "names_ood/top5": "names OOD, top-5",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_ood/image_to_text_R@1": "I2T R@1 OOD",
    "retrieval_ood/text_to_image_R@1": "T2I R@1 OOD",
    "data/pairs": "pairs",
    "steps": "steps",
    "data/emoji": "distinct emoji",
    "data/scenes": "distinct scenes",
    "data/named": "true T_o",
    "itm/before_mean": "score before (kept pairs)",
    "itm/after_mean": "score after",
    "itm/before_below_cut": "scores below the cut, before",
    "itm/after_below_cut": "scores below the cut, after",
    "itm/auc": "ITM AUC, true names against others'",
    "data/generated_right": "T_g is the name",
    "data/ami": "adjusted mutual information of clusters and scenes",
    "pixels/cohesion": "cohesion of clusters on pixels",
    "pixels/coverage": "coverage on pixels",
    "codes/codes_used": "codes used",
    "early_loss_ita": "ITC loss, epochs 0-2",
    "seconds": "seconds",
}


@dataclasses.dataclass
class Config:
    """Measure runs: print the main numbers, write all to RUN/results.json and RUN/results.md."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Run folders of train.py (clip, blip) or retrieval.py."""
    sets: tuple[str, ...] = tuple(EMOJI + name for name in ("names_id", "names_ood", "subgroups_ood", "retrieval_ood"))
    """Evaluation sets in the CLIP-benchmark webdataset layout, for classification or retrieval."""
    rerank: tuple[str, ...] = (EMOJI + "retrieval_ood",)
    """Retrieval sets on which a blip's candidates are re-ranked by matching."""
    k_test: int = 16
    """Number of candidates to re-rank (paper scale: 256 for COCO, 128 for Flickr30K)."""
    export: str | None = None
    """Write the run as a folder that open_clip loads as `local-dir:DIR` (shared/export.py), and measure nothing. For
    runs other than clip: blip.pth, which stock BLIP loads, and folders for transformers."""
    batch_size: int = 256
    """Images or captions per forward pass."""
    workers: int = 0
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
    """Scores image -> text (n, m) and text -> image (m, n). B:train_retrieval.py:69-167.

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
    sequences. B:train_retrieval.py:171-225, with its order of ties (numpy's argsort, reversed). An image without
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


def reranked(blip: BLIP, tokenizer: WordPiece, transform, folder: str, cfg: Config) -> dict:
    """`retrieval_recall` of a retrieval set after re-ranking by matching."""
    batches = list(EvalSet(folder, transform).batches(cfg.batch_size, cfg.workers))
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


# ---------------------------------------------------------------------------------------------------- the data of a run


def plain(text: str) -> str:
    """The text's letters and digits, in lower case and without accents, for comparison with captions from WordPiece,
    which drops accents and puts spaces around hyphens."""
    return "".join(character for character in unicodedata.normalize("NFKD", text.lower()) if character.isalnum())


CHECKED_ON = {"images at 8 x 8 pixels": "pixels", "captions": "captions"}  # features of a reduction's checks


def quality_metrics(summary: dict) -> dict[str, float]:
    """Cohesion and coverage of a reduction and of random ones as cosines times 100; `summary` is its report.json."""
    metrics = {}
    for features, short in CHECKED_ON.items():
        for name, value in summary.get("checks", {}).get(features, {}).items():
            if name != "samples":
                metrics[f"{short}/{name}"] = 100 * float(np.mean(value))
    return metrics


def score_metrics(summary: dict, lines: Sequence[Mapping[str, str]]) -> dict[str, float]:
    """Mean scores of the kept pairs with their captions before and after, and percent below the cut.

    summary: report.json, whose cut is 0.5 for probabilities of a match, and for cosines the median of all pairs before.
    lines: report.csv.
    """
    kept = [line for line in lines if line.get("itm") and line.get("itm_after")]
    if "itm" not in summary or not kept:
        return {}
    metrics, cut = {}, summary["itm"]["before"]["cut"]
    for when, column in (("before", "itm"), ("after", "itm_after")):
        scores = np.array([float(line[column]) for line in kept])
        metrics |= {f"itm/{when}_mean": 100 * scores.mean(), f"itm/{when}_below_cut": 100 * (scores < cut).mean()}
    return {name: float(value) for name, value in metrics.items()}


def descriptions(spec: str) -> dict[str, dict]:
    """{key: content of its .json} of the samples of shards. If the shards are remote, missing or damaged: {}, and the
    reason is printed."""
    try:
        shards = data.expand_shards(spec)
        if any(map(data.is_remote, shards)):
            raise UserError("they are remote")
        return dict(tars.descriptions(shards))
    except (OSError, ValueError) as error:
        print(f"metrics of the samples in {spec} are left out: {error}")
        return {}


def data_metrics(cfg: Common) -> dict[str, float]:
    """Metrics of a run's training data: pairs, distinct emoji, scores before and after, cohesion and coverage;
    agreement of clusters with scenes or subgroups, of generated captions with true names, and of scores with the kind
    of caption. {} if the data are not on this machine."""
    limit = None if cfg.window_shards else cfg.dataset_size
    pairs = local_pairs(cfg.data, cfg.image_root, limit, cfg.cache)
    metrics = {} if pairs is None else {"data/pairs": len(pairs)}
    if not isinstance(pairs, data.Shards):
        return metrics
    everything = descriptions(cfg.data)
    samples = [everything[key] for key in pairs.keys if key in everything]
    if emoji := {d["hexcode"] for d in samples if "hexcode" in d}:  # otherwise it is another corpus
        metrics["data/emoji"] = len(emoji)
    if samples and all("original" in d for d in samples):
        metrics["data/scenes"] = len({d["original"] for d in samples})
    if samples and all("noise" in d for d in samples):
        metrics["data/named"] = 100 * sum(d["noise"] == "name" for d in samples) / len(samples)
    folder = Path(pairs.paths[0]).parent.parent
    whole = list(map(Path, pairs.paths)) == sorted((folder / "shards").glob("*.tar"))
    return metrics | reduction_metrics(folder) if whole and (folder / "report.json").is_file() else metrics


def reduction_metrics(folder: Path) -> dict[str, float]:
    """The `data_metrics` of a reduction, from its report.json, config.json and report.csv."""
    summary, settings = (checkpoints.read_json(folder / name) for name in ("report.json", "config.json"))
    metrics = quality_metrics(summary)
    metrics |= {f"codes/{name}": summary[name] for name in ("codes_used", "perplexity") if name in summary}
    everything = descriptions(settings["data"])
    with open(folder / "report.csv", newline="", encoding="utf-8") as file:
        lines = [everything.get(line["key"], {}) | line for line in csv.DictReader(file)]
    metrics |= score_metrics(summary, lines)
    truth = "original" if "original" in lines[0] else "subgroup"  # scenes, or subgroups of emoji
    if clustered := [line for line in lines if line.get("cluster") and truth in line]:
        labels = ([line[name] for line in clustered] for name in (truth, "cluster"))
        metrics["data/ami"] = 100 * adjusted_mutual_info_score(*labels)
    if settings["captions"] != "original":  # T_g that is the emoji's true name
        written = [line for line in lines if line["kept"] == "1" and "name" in line]
        right = sum(plain(line["name"]) == plain(line["generated"]) for line in written)
        metrics |= {"data/generated_right": 100 * right / len(written)} if written else {}
    scored = [line for line in lines if line.get("itm") and line.get("noise") in ("name", "other")]
    if len({line["noise"] for line in scored}) == 2:  # do scores separate true names from those of other emoji?
        labels, scores = zip(*((line["noise"] == "name", float(line["itm"])) for line in scored), strict=True)
        metrics["itm/auc"] = 100 * roc_auc_score(labels, scores)
    return metrics


def training_metrics(folder: Path, cfg: Common) -> dict[str, float]:
    """`data_metrics` of a run, its number of steps (without --steps, its data must be on this machine), and the mean
    contrastive loss of its first three epochs, if it was logged."""
    metrics = data_metrics(cfg)
    pairs = cfg.dataset_size if cfg.window_shards else metrics.get("data/pairs", 0)
    if steps := total_steps(cfg, pairs // cfg.batch_size):
        metrics["steps"] = steps
    if early := [line["loss_ita"] for line in run.read_metrics(folder, "loss_ita") if line["epoch"] < 3]:
        metrics["early_loss_ita"] = sum(early) / len(early)
    return metrics


# -------------------------------------------------------------------------------------------------------------- one run


def export_run(path: str, folder: str) -> None:
    """Write a clip as an open_clip model, with a tokenizer that prepares captions as `pre_caption` does; write other
    runs by `export_blip`.

    Unlike training, the exported tokenizer does not cut captions to `max_words` words.
    """
    model, settings, tokenizer = load_run(path)
    if settings.stage != "clip":
        return export_blip(model, settings, tokenizer, folder)
    if settings.bag_of_words:
        raise UserError(f"{path} cannot be exported: open_clip has no text tower like that of --bag-of-words")
    config = export.named_config(settings.clip_model)
    config["text_cfg"]["hf_tokenizer_name"] = "."  # open_clip then takes the tokenizer in the folder
    save_tokenizer(folder)
    export.write(folder, model, config, model.state_dict(), view_of(model, settings), resize_mode="squash")


def evaluate_run(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """All measurements of one run: {"names_ood/top1": ..., "rerank/retrieval_ood/txt_r1": ..., ...}."""
    model, settings, tokenizer = load_run(path)
    if settings.stage not in ("clip", "blip", "retrieval"):
        raise UserError(f"{path} is a run of stage {settings.stage}; clip, blip and retrieval runs are evaluated")
    model = model.to(process.device)
    transform = view_of(model, settings)
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, process.device)]
    tokens = eval_tokenizer(tokenizer, settings)
    evaluation.open_sets("rerank", () if settings.stage == "clip" else cfg.rerank, transform, "retrieval")
    results = evaluate(model, tokens, transform, cfg.sets, process.device, cfg.batch_size, dtype, cfg.workers)
    flat = {f"{name}/{key}": value for name, metrics in results.items() for key, value in metrics.items()}
    if settings.stage != "clip":
        for folder in cfg.rerank:
            recall = reranked(model, tokenizer, transform, folder, cfg)
            flat |= {f"rerank/{Path(folder).name}/{key}": value for key, value in recall.items()}
    return flat | training_metrics(Path(path), settings)


def evaluated(path: str, cfg: Config, process: run.Process) -> dict[str, float]:
    """`evaluate_run`, saved beside the checkpoint as results.json and results.md; reused while nothing has changed."""
    if not (Path(path) / "checkpoint.pt").is_file():
        raise UserError(f"{path} is no run folder: it has no checkpoint.pt")
    return evaluation.measured_run(path, cfg, (*cfg.sets, *cfg.rerank), lambda _: evaluate_run(path, cfg, process))


def main(cfg: Config) -> list[dict[str, float]] | None:
    """Measure every run. Returns the measurements of each."""
    process = run.setup(0, cfg.device)
    if cfg.export:
        return export_run(export.single(cfg), cfg.export)
    cli.check_counts(cfg, "k_test", "batch_size")
    cli.check_counts(cfg, "workers", least=0)
    return evaluation.evaluate_runs(cfg, lambda path: evaluated(path, cfg, process), METRICS)


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
