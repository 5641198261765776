"""The small-scale study of LexVLA: `python -m lexvla.study` (`make reproduce-lexvla`).

Arms are trained on the embedded emoji corpus, a stand-in for CC12M, and compared seed by seed. The paper's tables are
pictures that could not be read, so its side of a row is a direction and where it stands.
"""

import shutil
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from lexvla import eval as evaluation
from lexvla.eval import METRICS, SET
from shared.checkpoints import read_json
from shared.study import runner, statistics
from shared.study.report import Comparison
from shared.study.runner import Arm, Once, Study
from shared.study.statistics import Claim

BEFORE = (  # the frozen models run once: the language model over all captions, the backbone's own training
    Once("shared.pretrained smollm2"),
    Once("lexvla.text"),
    Once("lexvla.backbone"),
    Once("lexvla.scenes"),
)
ARMS = (
    Arm("none", "train emoji-none", heading="no penalty"),
    Arm("flops", "train emoji-flops", heading="FLOPs loss"),
    Arm("overuse", "train emoji", heading="LexVLA: overuse penalty"),
    Arm(
        "overuse-weak",
        "train emoji --lambda-image 0.03 --lambda-text 0.03",
        heading="overuse, weight / 10",
        core=False,
    ),
    Arm("overuse-strong", "train emoji --lambda-image 3 --lambda-text 3", heading="overuse, weight x 10", core=False),
    Arm(
        "flops-strong", "train emoji-flops --lambda-image 30 --lambda-text 30", heading="FLOPs, weight x 10", core=False
    ),
    Arm("frozen-codebook", "train emoji --no-tune-codebook", heading="overuse, image codebook frozen", core=False),
    Arm("bow", "train emoji-bow", heading="bag of words for text", core=False),
    Arm("dense", "train emoji-dense", heading="latent baseline, 512 dimensions", core=False),
)

RECALL, IMAGE_DF, TEXT_DF = (
    f"{SET}/{name}" for name in ("mean_recall", "image/max_document_frequency", "text/max_document_frequency")
)
PRESENT, ALL = "patchdis/miou_present", "patchdis/miou"
FIGURE_6, TABLE_1, TABLE_2 = "Fig. 6: shared words removed", "Table 1", "Table 2"
CLAIMS = (  # document frequencies and recalls in percent
    Claim("overuse: images' top word rarer than with FLOPs", FIGURE_6, IMAGE_DF, "overuse", "flops", -1),
    Claim("... the captions' too", FIGURE_6, TEXT_DF, "overuse", "flops", -1),
    Claim("overuse: images' top word rarer than without", FIGURE_6, IMAGE_DF, "overuse", "none", -1),
    Claim("... the captions' too", FIGURE_6, TEXT_DF, "overuse", "none", -1),
    Claim("overuse retrieves better than FLOPs", f"{TABLE_1}: in most cases", RECALL, "overuse", "flops"),
    Claim("overuse retrieves better than no penalty", None, RECALL, "overuse", "none"),
    Claim("LLM text retrieves better than bags of words", TABLE_1, RECALL, "overuse", "bow"),
    Claim("sparse words retrieve better than 512 latent dimensions", "Fig. 5", RECALL, "overuse", "dense"),
    Claim("a tuned image codebook better than a frozen one", None, RECALL, "overuse", "frozen-codebook"),
    Claim("PatchDis: words above the latent baseline", TABLE_2, PRESENT, "overuse", "dense"),
    Claim("... among all classes", TABLE_2, ALL, "overuse", "dense"),
)
WITHIN = (  # two measurements of one arm: (arm, claim, paper, ours, theirs)
    ("overuse", "recall with words above 1/sqrt(V) alone, against all words", None, RECALL, f"{SET}/dense/mean_recall"),
    ("overuse", "PatchDis above random: LexVLA: overuse penalty", TABLE_2, PRESENT, "patchdis/random_miou_present"),
    (
        "dense",
        "PatchDis above random: latent baseline, 512 dimensions",
        f"{TABLE_2}: slightly",
        PRESENT,
        "patchdis/random_miou_present",
    ),
)


def more_rows(found: Comparison) -> list[dict[str, str]]:
    """Comparisons of two measurements of one arm, and what this scale cannot show."""
    rows, arms = [], found.arms
    for arm, claim, paper, ours, theirs in WITHIN:
        if arm in arms and ours in arms[arm][0] and theirs in arms[arm][0]:
            values = ([seed[key] for seed in arms[arm]] for key in (ours, theirs))
            rows.append(statistics.judge(Claim(claim, paper, "", "", ""), *values))
    needs = "needs CC12M, Llama 2"
    return [
        *rows,
        statistics.untestable("absolute recalls and mIoU on Flickr30k and COCO", "Tables 1, 2", needs),
        statistics.untestable("above CLIP at 0.4B and 1.1B pairs, VDR, STAIR", "Table 1", needs),
    ]


def plot(found: Comparison, out: Path) -> None:
    """lexvla_{sparsity,words,clouds,patches}.png, as far as the arms and sets were measured."""
    if all(RECALL in seed for seeds in found.arms.values() for seed in seeds):
        plot_sweep(found.arms, out / "lexvla_sparsity.png")
    plot_usage(found.folders, out / "lexvla_words.png")
    if "overuse" in found.folders:  # what the method's first seed says, as eval.py drew it
        for file, name in ((f"words_{SET}.png", "clouds"), ("patches.png", "patches")):
            if (drawn := found.folders["overuse"][0] / file).exists():
                shutil.copyfile(drawn, out / f"lexvla_{name}.png")


def plot_sweep(arms: dict[str, list[dict]], path: Path) -> None:
    """Recall against active words (Fig. 5); a dot where the threshold stands, a dashed line for the latent baseline."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 4.2))
    for axis, way in zip(axes, ("image_to_text", "text_to_image"), strict=True):
        for color, (arm, seeds) in zip(plt.get_cmap("tab10").colors, arms.items(), strict=False):
            levels = [int(key.split("/")[1][3:]) for key in seeds[0] if key.startswith(f"{SET}/top") and way in key]
            recall = np.mean([seed[f"{SET}/{way}_R@1"] for seed in seeds])
            if not levels:
                axis.axhline(recall, color=color, ls="--", label=STUDY.headings.get(arm, arm))
                continue
            mean = [np.mean([seed[f"{SET}/top{k}/{way}_R@1"] for seed in seeds]) for k in levels]
            axis.plot(levels, mean, color=color, label=STUDY.headings.get(arm, arm))
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
        most = read_json(folder / f"words_{SET}.json")
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


STUDY = Study(
    folder="lexvla",
    paper="LexVLA (arXiv 2407.17827)",
    stands_for="CC12M",
    before=BEFORE,
    arms=ARMS,
    minutes={"core": 11, "all": 16},
    # fp32: in bf16 words tie at the edge of the ten strongest
    evaluate=lambda runs: evaluation.main(evaluation.Config(runs=tuple(runs), precision="fp32")),
    metrics=METRICS,
    claims=CLAIMS,
    more_rows=more_rows,
    plot=plot,
)

if __name__ == "__main__":
    runner.main(STUDY)
