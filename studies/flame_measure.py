"""How the study evaluates FLAME's arms: on galleries of few images, in languages, with centred texts."""

import contextlib
import copy
import io
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flame import eval as evaluation
from flame.config import Config
from flame.model import FLAME, TrainedText
from flame.zeroshot import (
    TextFeatures,
    encode,
    eval_transform,
    llm_of_bank,
    open_set,
    texts_of_bank,
    tokenizer_of,
    trained_texts,
)
from shared import checkpoints, pictures, run
from shared.evalsets import EvalSet
from shared.evaluation import measured_run
from studies.flame_banks import MINILM, centred, load_minilm
from studies.flame_towers import LOCKED, WholeTower, side_of

# --------------------------------------------------------------------------------------------------------- galleries


def evenly_spaced(items: Sequence, limit: int | None) -> list:
    """At most `limit` of the items, evenly spaced; None: all."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, limit)]


def read_captions_of(eval_set: EvalSet, limit: int | None = None) -> list[list[str]]:
    """Captions of a retrieval set's images; at most `limit` images, evenly spaced."""
    return evenly_spaced([captions for _, captions in eval_set.targets()], limit)


def read_images(eval_set: EvalSet, limit: int | None = None) -> list[Tensor]:
    """Images of a set, at most `limit`, evenly spaced; only these are transformed."""
    chosen = set(evenly_spaced(range(sum(1 for _ in eval_set.targets())), limit))
    place, of_chosen = itertools.count(), copy.copy(eval_set)
    of_chosen.transform = lambda image: eval_set.transform(image) if next(place) in chosen else None
    return [image for _, image, _ in of_chosen if image is not None]


# ------------------------------------------------------------------------------------------------------------- texts


def text_features(model: FLAME, cfg: Config, device: torch.device, precision: torch.dtype) -> TextFeatures:
    """The function that embeds texts for an arm.

    Long captions are asked the long caption's prompts that the arm was trained with, which are the first k; an arm that
    has none embeds them with the single prompt, too. Texts are centred if its bank is.
    """
    if isinstance(model, TrainedText):
        return trained_texts(model, tokenizer_of(model), device, precision)
    minilm = checkpoints.read_json(Path(cfg.bank) / "index.json")["llm"] == MINILM
    frozen = texts_of_bank(cfg.bank, load_minilm if minilm else llm_of_bank(cfg.bank, device))
    raw, short, long = frozen.prompts
    before = len(raw.facets) + len(short.facets)
    prompts = len([each for each in cfg.facet_ids if each >= before]) if cfg.facet_ids else len(long.facets)
    frozen.prompts = raw, short, long._replace(facets=long.facets[:prompts])
    file = Path(cfg.bank) / "centres.npy"
    centres = torch.from_numpy(np.load(file)) if file.is_file() else None

    def embedded(texts: Sequence[str], multi: bool = False) -> Tensor:
        multi = multi and prompts > 0
        features = frozen(texts, multi)
        at = before + len(long.facets) + prompts - 1 if multi else 0
        return features if centres is None else centred(features, centres[at])

    return embedded


def less_common(texts: TextFeatures) -> TextFeatures:
    """Texts less what all of a call share, such as their language: it says nothing about an image."""

    def embedded(strings: Sequence[str], multi: bool) -> Tensor:
        features = texts(strings, multi)
        return F.normalize(features - features.mean(0), dim=-1)

    return embedded


# --------------------------------------------------------------------------------------------------------- languages


def all_and_other(languages: Iterable[str]) -> dict[str, list[str]]:
    """Two groups for `language_means`: all languages, and all but English."""
    languages = list(languages)
    return {"languages/": languages, "languages/other_": [language for language in languages if language != "en"]}


def language_means(found: dict[str, dict[str, float]], groups: dict[str, Sequence[str]]) -> dict[str, float]:
    """Means of {language: {metric: value}} over groups {prefix: languages} -> {PREFIX + METRIC: mean of the group}.

    Groups without languages, or with a language that `found` lacks, are left out, and metrics that one of a group's
    languages lacks: scores by picture of small sets, beside a language with a large one.
    """
    return {
        prefix + metric: pictures.mean([found[language][metric] for language in languages])
        for prefix, languages in groups.items()
        if languages and found.keys() >= set(languages)
        for metric in found[languages[0]]
        if all(metric in found[language] for language in languages)
    }


# ------------------------------------------------------------------------------------------------------------- runs


def measure_run(
    path: str, names: Sequence[str], long: dict[str, str], languages: Sequence[str], gallery: int | None = None,
    language_gallery: int | None = None,
) -> dict[str, float]:  # fmt: skip
    """Metrics of a run: classification by `names`, retrieval by long captions on `long` {set: its name in the metrics},
    and by an image's first caption on `languages`, sets whose names end in _LANGUAGE."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = run.DTYPES[run.resolve_precision("auto", device)]
    cfg = evaluation.Config((path,), sets=tuple(names))
    model, trained = evaluation.load_model(path, cfg)
    texts = text_features(model, trained, device, dtype)
    if trained.model == LOCKED:
        model = WholeTower(model, side_of(trained))
    model = model.to(device).eval()
    flat = evaluation.measure(model, texts, cfg, device, dtype)

    def retrieval(folder: str, limit: int | None, texts: TextFeatures, multi: bool) -> dict[str, float]:
        eval_set = open_set(folder, eval_transform(model), "retrieval")
        features = encode(model, read_images(eval_set, limit), device, dtype, 256)
        captions = read_captions_of(eval_set, limit)
        return evaluation.retrieval(features, captions if multi else [each[:1] for each in captions], texts, multi)

    for folder, name in long.items():
        flat |= {f"{name}/{key}": value for key, value in retrieval(folder, gallery, texts, True).items()}
    found = {}
    for folder in languages:
        metrics = retrieval(folder, language_gallery, less_common(texts), False)
        kept = (*evaluation.BOTH_WAYS, *(way + pictures.SUFFIX for way in evaluation.BOTH_WAYS), "chance")
        found[Path(folder).name.rpartition("_")[2]] = {key: metrics[key] for key in kept if key in metrics}
    flat |= {f"language_{each}/{way}": found[each][way] for each in found for way in evaluation.BOTH_WAYS}
    return flat | language_means(found, all_and_other(found))


def measured(path: str, names: Sequence[str], long: dict[str, str], languages: Sequence[str], **more: Any) -> dict:
    """`measure_run`, kept beside the checkpoint and measured again only if something has changed."""
    cfg, sets = evaluation.Config((path,), sets=tuple(names)), (*names, *long, *languages)
    with contextlib.redirect_stdout(io.StringIO()):  # the table of arms shows it
        found: Callable = lambda _: measure_run(path, names, long, languages, **more)  # noqa: E731
        return measured_run(path, cfg, sets, found, study=[dict(long), *languages, more])
