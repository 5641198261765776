"""The study of TinyCLIP on photographs: `python -m studies.tinyclip --corpus photos --photos DIR`.

A small ResNet teacher and its students of half the size are trained from scratch on the 30,000 English captions of
Flickr8k, at 32 pixels, and compared by retrieval of the usual 1,000 test photographs. The teacher has the size of a
student in study.py, and the students have half of that, so that a seed takes some twenty minutes of one core.

Why the effects can appear: for the same reasons as in study.py; the teacher trains three times as long. But the teacher
is small and has few pairs. If it retrieves little better than raw pixels, students can gain little from it.
"""

from collections.abc import Sequence

from studies import tinyclip as study
from studies.harness import photos, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Study
from studies.harness.verdicts import Claim
from studies.tinyclip import IA, IC, RA, RC, macs_in_millions
from tinyclip import eval as evaluation

# Unlike on emoji, crops stay within the image; equal captions are too rare to be kept apart. Photographs are decoded
# once and kept in memory. The teacher sees the crops, so its features are computed in each step.
DATA = f"--data {photos.SINGLE} --eval-every 0 --border 0 --crop-ratio 0.75 1.33 --no-distinct-captions"
STUDENT = f"{DATA} --model emoji-resnet-25 --steps 232"  # four epochs
AFFINITY = f"train emoji-resnet {STUDENT} --teacher {{teacher}}"
CONTRASTIVE = f"train emoji-resnet-contrastive {STUDENT}"
ARMS = (
    Arm(
        "teacher",
        f"train emoji-resnet-teacher {DATA} --model emoji-resnet-50 --steps 696",
        heading="ResNet teacher (100 %)",
    ),
    Arm("random-contrastive", f"{CONTRASTIVE} --init None", heading="50 %: random weights, contrastive"),
    Arm("random-affinity", f"{AFFINITY} --init None", heading="50 %: random weights, affinity"),
    Arm("inherited-contrastive", f"{CONTRASTIVE} --init {{teacher}}", heading="50 %: inherited, contrastive"),
    Arm("inherited-affinity", f"{AFFINITY} --init {{teacher}}", heading="50 %: inherited, affinity = TinyCLIP by hand"),
)
RECALL, TEN = "retrieval_en/mean_recall", "retrieval_en/text_to_image_R@10"
CLAIMS = (  # worded as in study.py, which has the same claims on ViTs
    Claim("inherited above random weights, contrastive", "claimed", RECALL, IC, RC, 1, None, True, 0.3),
    Claim("affinity above contrastive, inherited", "claimed", RECALL, IA, IC, 1, None, True, 0.3),
    Claim("affinity above contrastive, random weights", "claimed", RECALL, RA, RC, 1, None, True, 0.3),
    Claim("both together", "claimed", RECALL, IA, RC, 1, None, True, 0.3),
    Claim("inherited above random weights, affinity", "claimed", RECALL, IA, RA, negligible=0.3),
    Claim("half the size above the teacher, by hand", None, RECALL, IA, "teacher"),
)


def more_rows(found: Comparison) -> list[dict]:
    """Rows for results that this scale cannot show."""
    after = "accuracy is measured after training only"
    vit = "masks act on ViTs, which learn too little from 30,000 pairs"
    why = {study.TOP1_SCENES: vit, study.STEPS: after, study.TIME: after}
    tested = {claim.claim for claim in CLAIMS}
    rows = [
        verdicts.not_testable(claim.claim, claim.paper, why[claim.metric], primary=True)
        for claim in study.CLAIMS
        if claim.primary and claim.claim not in tested
    ]
    needs = "needs LAION-400M, YFCC-15M"
    return [*rows, verdicts.not_testable("ImageNet zero-shot of the model zoo", "41.1 to 64.5", needs)]


def evaluate(runs: Sequence[str]) -> list[dict]:
    return evaluation.main(evaluation.Config(tuple(runs), sets=(photos.RETRIEVAL,), throughput=False))


STUDY = Study(
    folder="tinyclip",
    on="photos",
    paper="TinyCLIP (arXiv 2309.12314)",
    stands_for="LAION-400M",
    before=(photos.FLICKR8K, photos.CAPTIONS),
    arms=ARMS,
    corpus=f"Flickr8k, {photos.RESIZED}, seen at 32 pixels, a sample for each English caption; all towers from scratch",
    minutes={"core": 12, "all": 12},
    passes="step",
    evaluate=evaluate,
    alone=True,
    derive=macs_in_millions,
    metrics={
        RECALL: "mean recall",
        TEN: "T2I R@10",
        "retrieval_en/image_to_text_R@10": "I2T R@10",
        "parameters_m": "parameters (M)",
        "macs_m": "MACs (M)",
        "seconds": "seconds",
    },
    sets=(photos.RETRIEVAL,),
    floors=(
        *photos.floors_on(photos.RETRIEVAL, of="raw pixels", pixels=True),
        Floor(
            "canonical correlation of EfficientNet-Lite0, pretrained, with words",
            lambda: photos.by_correlation([photos.RETRIEVAL]),
            ceiling=True,
        ),
    ),
    claims=CLAIMS,
    more_rows=more_rows,
)
