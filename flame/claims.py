"""What FLAME claims, in the terms of the embedded corpus, and the comparison of its arms.

The arms are run folders ARM-seedN that reproduce.mk trains and eval.py measures. Verdicts are computed by
`shared.statistics.judge` from differences paired by seed.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import checkpoints, run
from shared.study import report, statistics

ARMS = {  # run folders ARM-seedN, in the order of the paper's argument
    "clip": "CLIP: trained text encoder",
    "raw": "frozen LLM, raw caption, 1 facet",
    "summary": "frozen LLM, 3 captions, 1 facet each",
    "causal": "FLAME with a plain causal mask",
    "flame": "FLAME: 3 captions, 11 facets, decoupled",
    "flame-raw-states": "FLAME, states not centred",
}
SCRIPTS = {  # of the languages of Crossmodal-3600 other than English
    "Latin script": "cs da de es fi fil fr hr hu id it mi nl no pl pt quz ro sv sw tr vi".split(),
    "other scripts": "ar bn el fa he hi ja ko ru te th uk zh".split(),
}
METRICS = {
    "names_ood/top1": "names OOD",
    "names_id/top1": "names ID",
    "subgroups_ood/top1": "subgroups OOD",
    "retrieval_long_ood/image_to_text_R@1": "long I2T OOD",
    "retrieval_long_ood/text_to_image_R@1": "long T2I OOD",
    "languages/image_to_text_R@1": "36 languages I2T",
    "languages/text_to_image_R@1": "36 languages T2I",
    "subgroups_ood/probe_final": "probe OOD",
    "seconds": "seconds",
}


def claims() -> list[statistics.Claim]:
    """Differences of arms, all trained on the same images.

    The paper's numbers: ImageNet over the best before; Urban-1k over CLIP on the same CC3M; Crossmodal-3600 over a CLIP
    on 400M other pairs. Long captions and languages here are easier to come by than the paper's (composed sentences, an
    English LLM): these claims count as reproduced only with an effect as large as the paper's.
    """
    names, names_id = "names_ood/top1", "names_id/top1"
    to_text, to_image = "retrieval_long_ood/image_to_text_R@1", "retrieval_long_ood/text_to_image_R@1"
    i2t, t2i = "languages/other_image_to_text_R@1", "languages/other_text_to_image_R@1"
    return [
        statistics.Claim(
            "zero-shot above a trained text encoder, unseen style", "+4.9 IN (CC3M)", names, "flame", "clip", 1
        ),
        statistics.Claim(
            "zero-shot above a trained text encoder, seen styles", "+4.9 IN (CC3M)", names_id, "flame", "clip", 1
        ),
        statistics.Claim("long captions, image to text", "+54.6 Urban-1k", to_text, "flame", "clip", 1, 54.6),
        statistics.Claim("long captions, text to image", "+57.0 Urban-1k", to_image, "flame", "clip", 1, 57.0),
        statistics.Claim("35 other languages, image to text", "+44.4 XM3600", i2t, "flame", "clip", 1, 44.4),
        statistics.Claim("35 other languages, text to image", "+44.5 XM3600", t2i, "flame", "clip", 1, 44.5),
        statistics.Claim("several facets above one of each caption", "claimed", names, "flame", "summary", 1),
        statistics.Claim("three captions above the raw one", "claimed", names, "summary", "raw", 1),
        statistics.Claim("decoupled facets above a causal mask, zero-shot", "claimed", names, "flame", "causal", 1),
        statistics.Claim(
            "decoupled facets above a causal mask, long captions", "claimed", to_image, "flame", "causal", 1
        ),
        statistics.Claim("centring (not in the paper)", None, names, "flame", "flame-raw-states", 1),
    ]


def above_chance(arms: dict[str, list[dict]]) -> list[dict[str, str]]:
    """Each arm's text-to-image recall in the other languages less chance; Latin script may help by names that look
    alike, other scripts cannot."""
    rows = []
    for arm in ("flame", "clip"):
        for script, languages in SCRIPTS.items():
            keys = [f"language_{language}/text_to_image_R@1" for language in languages]
            if arm not in arms or not all(key in arms[arm][0] for key in keys):
                continue
            ours = [sum(values[key] for key in keys) / len(keys) for values in arms[arm]]
            chance = [values["languages/other_chance"] for values in arms[arm]]
            text = f"{ARMS[arm].split(':')[0]}: {len(keys)} languages in {script} above chance"
            rows.append(statistics.judge(statistics.Claim(text, None, "", "", ""), ours, chance))
    return rows


def compare(runs: list[str], results: list[dict[str, float]], path: Path) -> None:
    """Judge the claims, print the tables, write `path` and the plots beside it."""
    arms, seeds, folders, commits = report.compare_runs(runs, results, ARMS)
    known = set(next(iter(arms.values()))[0])  # evaluations with other sets judge what they can
    rows = statistics.judge_all([claim for claim in claims() if claim.metric in known], arms) + above_chance(arms)
    rows.append(
        statistics.untestable("absolute ImageNet, COCO, Urban-1k, Crossmodal-3600 numbers", "51.7 XM3600", "needs CC3M")
    )
    rows.append(statistics.untestable("languages of a 12B multilingual LLM", "claimed", "SmolLM2 is English"))
    summary = report.results("FLAME (arXiv 2411.11927)", seeds, arms, rows, commits)
    checkpoints.write_json(path, summary)
    plot_curves(folders, path.parent)
    plot_arms(arms, path.parent)
    plot_languages(arms, path.parent)
    report.show(summary, METRICS, "CC3M", path)


def plot_curves(folders: dict[str, list[Path]], out: Path) -> None:
    """flame_curves.png: zero-shot accuracy of each arm over steps and seconds; mean of seeds."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for color, (arm, of_arm) in zip(plt.get_cmap("tab10").colors, folders.items(), strict=False):
        points = [run.read_metrics(folder, "zero_shot_top1") for folder in of_arm]
        if not all(points):
            continue
        mean = {key: np.mean([[p[key] for p in each] for each in points], axis=0) for key in ("step", "seconds")}
        top1 = np.mean([[p["zero_shot_top1"] for p in each] for each in points], axis=0)
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            axis.plot(mean[key], top1, color=color, marker="o", ms=3, label=ARMS.get(arm, arm))
    for axis, name in zip(axes, ("step", "training seconds"), strict=True):
        axis.set(xlabel=name, ylabel="emoji names OOD, top-1 (%)")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "flame_curves.png", dpi=110)
    plt.close(figure)


def plot_arms(arms: dict[str, list[dict]], out: Path) -> None:
    """flame_arms.png: each arm's accuracy and recall; mean of seeds, bars of one standard deviation."""
    shown = [key for key in METRICS if key != "seconds" and key in next(iter(arms.values()))[0]]
    figure, axis = plt.subplots(figsize=(11, 3.8))
    width = 0.8 / len(arms)
    for i, (arm, seeds) in enumerate(arms.items()):
        values = np.array([[seed[key] for key in shown] for seed in seeds])
        places = np.arange(len(shown)) + (i - (len(arms) - 1) / 2) * width
        axis.bar(places, values.mean(0), width, yerr=values.std(0), label=ARMS.get(arm, arm))
    axis.set_xticks(range(len(shown)), [METRICS[key] for key in shown], fontsize=8)
    axis.set(ylabel="top-1 and R@1 (%)")
    axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(out / "flame_arms.png", dpi=110)
    plt.close(figure)


def plot_languages(arms: dict[str, list[dict]], out: Path) -> None:
    """flame_languages.png: recall of each language both ways, and chance; mean of seeds, other scripts on the right."""
    first = next(iter(arms.values()))[0]
    names = [name[9:].partition("/")[0] for name in first if name.startswith("language_")]
    names = sorted(dict.fromkeys(names), key=lambda name: (name in SCRIPTS["other scripts"], name))
    if not names:
        return
    figure, axes = plt.subplots(2, 1, figsize=(11, 6), sharex=True)
    shown = [arm for arm in ("clip", "flame") if arm in arms] or list(arms)[:2]
    width = 0.8 / len(shown)
    directions = {"image_to_text_R@1": "R@1 image to text (%)", "text_to_image_R@1": "R@1 text to image (%)"}
    for axis, (key, label) in zip(axes, directions.items(), strict=True):
        for i, arm in enumerate(shown):
            values = [np.mean([seed[f"language_{name}/{key}"] for seed in arms[arm]]) for name in names]
            places = np.arange(len(names)) + (i - (len(shown) - 1) / 2) * width
            axis.bar(places, values, width, label=ARMS.get(arm, arm))
        axis.axhline(first["languages/chance"], color="black", lw=0.8, ls="--", label="chance")
        axis.set_ylabel(label)
    axes[1].set_xticks(range(len(names)), names, fontsize=8)
    axes[0].set_title("trained in English; SmolLM2 is an English language model")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(out / "flame_languages.png", dpi=110)
    plt.close(figure)
