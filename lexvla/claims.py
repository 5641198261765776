"""What LexVLA claims, in the terms of the embedded corpus, and the comparison of its arms.

The arms are run folders ARM-seedN that reproduce.mk trains and eval.py measures. Verdicts are computed by
`shared.statistics.judge` from differences paired by seed. The paper's tables are pictures that could not be read, so its
side of a row is a direction and where it stands.
"""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from shared import checkpoints
from shared.study import report, statistics

SET = "retrieval_ood"
ARMS = {  # run folders ARM-seedN, in the order of the paper's argument
    "none": "no penalty",
    "flops": "FLOPs loss",
    "overuse": "LexVLA: overuse penalty",
    "overuse-weak": "overuse, weight / 10",
    "overuse-strong": "overuse, weight x 10",
    "flops-strong": "FLOPs, weight x 10",
    "frozen-codebook": "overuse, image codebook frozen",
    "bow": "bag of words for text",
    "dense": "latent baseline, 512 dimensions",
}
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
RECALL, IMAGE_DF, TEXT_DF = (
    f"{SET}/{name}" for name in ("mean_recall", "image/max_document_frequency", "text/max_document_frequency")
)


def claims() -> list[statistics.Claim]:
    """Differences of arms; document frequencies and recalls in percent."""
    figure6, table1, table2 = "Fig. 6: shared words removed", "Table 1", "Table 2"
    return [
        statistics.Claim("overuse: images' top word rarer than with FLOPs", figure6, IMAGE_DF, "overuse", "flops", -1),
        statistics.Claim("... the captions' too", figure6, TEXT_DF, "overuse", "flops", -1),
        statistics.Claim("overuse: images' top word rarer than without", figure6, IMAGE_DF, "overuse", "none", -1),
        statistics.Claim("... the captions' too", figure6, TEXT_DF, "overuse", "none", -1),
        statistics.Claim("overuse retrieves better than FLOPs", f"{table1}: in most cases", RECALL, "overuse", "flops"),
        statistics.Claim("overuse retrieves better than no penalty", None, RECALL, "overuse", "none"),
        statistics.Claim("LLM text retrieves better than bags of words", table1, RECALL, "overuse", "bow"),
        statistics.Claim("sparse words retrieve better than 512 latent dimensions", "Fig. 5", RECALL, "overuse", "dense"),
        statistics.Claim("a tuned image codebook better than a frozen one", None, RECALL, "overuse", "frozen-codebook"),
        statistics.Claim(
            "PatchDis: words above the latent baseline", table2, "patchdis/miou_present", "overuse", "dense"
        ),
        statistics.Claim("... among all classes", table2, "patchdis/miou", "overuse", "dense"),
    ]  # fmt: skip


def within(arms: dict[str, list[dict]]) -> list[dict[str, str]]:
    """Comparisons of two measurements of one arm."""
    rows = []

    def row(arm: str, claim: str, paper: str | None, ours: str, theirs: str) -> None:
        if arm in arms and ours in arms[arm][0] and theirs in arms[arm][0]:
            values = ([run_[key] for run_ in arms[arm]] for key in (ours, theirs))
            rows.append(statistics.judge(statistics.Claim(claim, paper, "", "", ""), *values))

    row(
        "overuse",
        "recall with words above 1/sqrt(V) alone, against all words",
        None,
        RECALL,
        f"{SET}/dense/mean_recall",
    )
    for arm in ("overuse", "dense"):
        claim = f"PatchDis above random: {ARMS[arm]}"
        paper = "Table 2" if arm == "overuse" else "Table 2: slightly"
        row(arm, claim, paper, "patchdis/miou_present", "patchdis/random_miou_present")
    return rows


def compare(runs: list[str], results: list[dict[str, float]], path: Path) -> None:
    """Judge the claims, print the tables, write `path` and the plots beside it."""
    arms, seeds, folders, commits = report.compare_runs(runs, results, ARMS)
    if any(RECALL not in seed for of_arm in arms.values() for seed in of_arm):
        raise ValueError(f"--report compares runs on {SET}: have it among --sets")
    known = [c for c in claims() if all(c.metric in arms[arm][0] for arm in (c.method, c.baseline) if arm in arms)]
    rows = statistics.judge_all(known, arms) + within(arms)  # of the sets that were measured
    rows.append(
        statistics.untestable("absolute recalls and mIoU on Flickr30k and COCO", "Tables 1, 2", "needs CC12M, Llama 2")
    )
    rows.append(
        statistics.untestable("above CLIP at 0.4B and 1.1B pairs, VDR, STAIR", "Table 1", "needs CC12M, Llama 2")
    )
    summary = report.results("LexVLA (arXiv 2407.17827)", seeds, arms, rows, commits)
    checkpoints.write_json(path, summary)
    plot_sweep(arms, path.parent / "lexvla_sparsity.png")
    plot_usage(folders, path.parent / "lexvla_words.png")
    if "overuse" in folders:  # what the method's first seed says, as eval.py drew it
        for file, name in ((f"words_{SET}.png", "clouds"), ("patches.png", "patches")):
            if (drawn := folders["overuse"][0] / file).exists():
                shutil.copyfile(drawn, path.parent / f"lexvla_{name}.png")
    report.show(summary, METRICS, "CC12M", path)


def plot_sweep(arms: dict[str, list[dict]], path: Path) -> None:
    """Recall against active words (Fig. 5); a dot where the threshold stands, a dashed line for the latent baseline."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2))
    for axis, way in zip(axes, ("image_to_text", "text_to_image"), strict=True):
        for color, (arm, seeds) in zip(plt.get_cmap("tab10").colors, arms.items(), strict=False):
            levels = [int(key.split("/")[1][3:]) for key in seeds[0] if key.startswith(f"{SET}/top") and way in key]
            recall = np.mean([seed[f"{SET}/{way}_R@1"] for seed in seeds])
            if not levels:
                axis.axhline(recall, color=color, ls="--", label=ARMS.get(arm, arm))
                continue
            mean = [np.mean([seed[f"{SET}/top{k}/{way}_R@1"] for seed in seeds]) for k in levels]
            axis.plot(levels, mean, color=color, label=ARMS.get(arm, arm))
            active = np.mean([(seed[f"{SET}/image/active"] + seed[f"{SET}/text/active"]) / 2 for seed in seeds])
            axis.plot(active, recall, "o", color=color)
        axis.set(xscale="log", xlabel="words kept on both sides", ylabel=f"{way.replace('_', ' ')} R@1 (%), OOD")
        axis.grid(alpha=0.3)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_usage(folders: dict[str, list[Path]], path: Path) -> None:
    """The most used words of each lexical arm (first seed), and the share of samples they are in (Fig. 6)."""
    lexical = {arm: of_arm[0] for arm, of_arm in folders.items() if (of_arm[0] / f"words_{SET}.json").exists()}
    if not lexical:
        return
    figure, axes = plt.subplots(2, len(lexical), figsize=(2.3 * len(lexical), 5), squeeze=False, sharex="row")
    for column, (arm, folder) in zip(axes.T, lexical.items(), strict=True):
        most = checkpoints.read_json(folder / f"words_{SET}.json")
        for axis, side in zip(column, ("image", "text"), strict=True):
            words, shares = zip(*reversed(most[side]), strict=True)
            axis.barh(range(len(words)), shares)  # by number: a piece may be there with and without its space
            axis.set_yticks(range(len(words)), [word.strip() or word for word in words])
            axis.set_title(f"{arm}: {side}s", fontsize=8)
            axis.tick_params(labelsize=7)
    figure.supxlabel("among the ten strongest words of so many percent", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
