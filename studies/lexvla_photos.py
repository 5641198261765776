"""The study of LexVLA on photographs: `python -m studies.lexvla --corpus photos --photos DIR`.

Arms train on the 30,000 English captions of Flickr8k, a stand-in for CC12M. They are compared by retrieval on the usual
1,000 test photographs, and by PatchDis on COCO photographs with instance masks.

Arms and their floors, canonical correlations with words, see photographs at the size of the preset. No verdict uses two
further rows: this correlation at the size of the other studies' photographs, and one with the LM's frozen states in
place of words.

Why the effects can appear: for the same reasons as in study.py, except for new words: test captions use the words of
the training captions, so a bag of words has no disadvantage.
"""

from collections.abc import Sequence

from lexvla.config import PRESETS
from lexvla.text import Prompts, States, load_lm
from studies.harness import photos, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim
from studies.lexvla import ALL, MOST, PRESENT, TABLE_1, TABLE_2, patches_by_labels, random_patches, rarer
from studies.lexvla import evaluate as measured

DATA, STATES = photos.SINGLE, "data/lexvla/photos-states.pt"
COCO, COCO_TRAIN = (f"data/photos-coco/eval/patchdis_{split}" for split in ("val", "train"))
LENGTH = f"--data {DATA} --epochs 4 --batch-size 256 --warmup 30"
# Epochs, learning rates and the least count of a word were chosen by recall on development photographs, with seed 100
WORDS = f"{LENGTH} --lr 3e-3 --min-count 10"
LM = f"--states {STATES}"
SIDE = PRESETS["emoji"][1].image_size  # pixels of a photograph
ARMS = (
    Arm("none", f"train emoji-none {WORDS} {LM}", heading="no penalty"),
    Arm("flops", f"train emoji-flops {WORDS} {LM}", heading="FLOPs loss"),
    Arm("overuse", f"train emoji {WORDS} {LM}", heading="LexVLA: overuse penalty"),
    Arm("bow", f"train emoji-bow {WORDS} {LM}", heading="bag of words for text"),
    Arm(
        "dense",
        f"studies.lexvla_dense emoji-dense {LENGTH} --lr 1.4e-3 {LM}",
        heading="latent baseline, 512 dimensions",
    ),
)

# -------------------------------------------------------------------------------------------------------------- claims

SET = "retrieval_en"
RECALL, SHARED = f"{SET}/mean_recall", f"{SET}/max_document_frequency"
IMAGE_DF, TEXT_DF = (f"{SET}/{side}/max_document_frequency" for side in ("image", "text"))


CLAIMS = (  # worded as in study.py, which has the same claims
    rarer("overuse: most used word rarer than with FLOPs", SHARED, "flops", True, RECALL),
    rarer("overuse: most used word rarer than without", SHARED, "none", True, RECALL),
    Claim("overuse retrieves better than FLOPs", MOST, RECALL, "overuse", "flops", 1, None, True, 1.0),
    Claim("words retrieve better than 512 dimensions", "Fig. 5", RECALL, "overuse", "dense", 1, None, True, 1.0),
    Claim("PatchDis, all classes: words above latent dimensions", TABLE_2, ALL, "overuse", "dense", 1, None, True, 0.5),
    Claim("LLM better than bags of words, known words", TABLE_1, RECALL, "overuse", "bow", negligible=1.0),
    rarer("overuse: images' most used word rarer than with FLOPs", IMAGE_DF, "flops", False, RECALL),
    rarer("overuse: images' most used word rarer than without", IMAGE_DF, "none", False, RECALL),
    Claim("overuse retrieves better than no penalty", None, RECALL, "overuse", "none"),
    Claim("PatchDis of present classes: words, latent dimensions", None, PRESENT, "overuse", "dense"),
)


def more_rows(found: Comparison) -> list[dict]:
    """Table rows of claims that cannot be tested at this scale."""
    needs = "needs CC12M, Llama 2"
    return [
        verdicts.not_testable(
            "LLM better than bags of words, on new words", TABLE_1, "tests have the training's words", primary=True
        ),
        verdicts.not_testable("absolute recalls and mIoU on Flickr30k and COCO", "Tables 1, 2", needs),
        verdicts.not_testable("above CLIP at 0.4B and 1.1B pairs, VDR, STAIR", TABLE_1, needs),
    ]


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    """Measurements of each run on photographs."""
    return measured(runs, (photos.RETRIEVAL,), COCO)


def by_states() -> dict[str, float]:
    """Canonical correlation of EfficientNet-Lite0, at the size of the arms' photographs, with the LM's frozen states of
    single captions."""
    cfg = PRESETS["emoji"][1]
    lm, tokenizer = load_lm(cfg.lm)
    states = States(STATES, cfg.lm, lm, Prompts(tokenizer, cfg.max_length))
    return photos.by_correlation([photos.RETRIEVAL], train=DATA, side=SIDE, own=True, of_texts=lambda x: states(x)[0])


STUDY = Study(
    folder="lexvla",
    on="photos",
    paper="LexVLA (arXiv 2407.17827)",
    stands_for="CC12M",
    before=(
        photos.FLICKR8K,
        photos.CAPTIONS,
        Once("studies.corpora.photos coco --root {photos}/coco --train-masks --out data/photos-coco"),
        Once("shared.pretrained smollm2"),
        Once("shared.pretrained efficientnet_lite0"),
        Once(f"studies.lexvla_states --data {DATA} --sets {photos.RETRIEVAL} {COCO} --states {STATES}"),
    ),
    arms=ARMS,
    corpus=f"Flickr8k, {photos.RESIZED}, seen at {SIDE} pixels, a sample for each English caption; PatchDis on 79 "
    "photographs of COCO of a shorter side of 256 pixels; frozen EfficientNet-Lite0 (ImageNet-1k) in DINOv2's place, "
    "SmolLM2-135M-Instruct in Llama 2's",
    minutes={"core": 20, "all": 20},
    evaluate=evaluate,
    alone=True,
    metrics={
        RECALL: "mean recall",
        f"{SET}/image_to_text_R@1": "I2T R@1",
        f"{SET}/text_to_image_R@1": "T2I R@1",
        f"{SET}/dense/mean_recall": "... all words",
        IMAGE_DF: "most used word, images",
        TEXT_DF: "most used word, texts",
        f"{SET}/image/active": "active words, images",
        f"{SET}/text/active": "active words, texts",
        f"{SET}/top5_in_caption": "top-5 words in caption",
        ALL: "PatchDis, all classes",
        PRESENT: "... present classes",
        "seconds": "seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=(
        *photos.floors_on(photos.RETRIEVAL, of=f"EfficientNet-Lite0 at {SIDE} pixels, as in the arms,", side=SIDE),
        Floor(
            f"canonical correlation of EfficientNet-Lite0 at {photos.SIDE} pixels with words",
            lambda: photos.by_correlation([photos.RETRIEVAL]),
            ceiling=True,
        ),
        Floor(
            f"canonical correlation of EfficientNet-Lite0 at {SIDE} pixels with the LM's states, each caption alone",
            by_states,
            ceiling=True,
        ),
        Floor("random patches", lambda: random_patches(COCO)),
        Floor(
            "patches by least squares on labels of 80 photographs",
            lambda: patches_by_labels(COCO_TRAIN, COCO),
            ceiling=True,
        ),
    ),
    claims=CLAIMS,
    more_rows=more_rows,
)
