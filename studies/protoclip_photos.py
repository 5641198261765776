"""The study of ProtoCLIP on photographs: `python -m studies.protoclip --corpus photos --photos DIR`.

Arms with a locked EfficientNet-Lite0 train on the 30,000 English captions of Flickr8k, a stand-in for CC2.5M. They are
evaluated by retrieval on the usual 1,000 test photographs, by zero-shot classification of PACS's photographs, and by
linear probes on its paintings and cartoons. All of these take features of the locked trunk that are computed once.

The learning rate, its decay, batches and episodes were chosen by CLIP's recall of Flickr8k's development photographs,
on seed 100.

The primary claims are those of the abstract, as on emoji. The floor of the probes is the same probe on the locked
trunk's own features; if it is above both arms, their claims say `has not learned`.

Why the effect can appear: the captions describe a few kinds of scenes (dogs, children, sports) in many different words.
A prototype averages some sixty samples and can stand for such a kind, and the teacher places sentences of similar
meaning close together. The effect would vanish with as many prototypes as captions, or if the locked features already
contained all information of the captions.
"""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from protoclip import eval as evaluation
from shared import run, zeroshot
from studies.harness import photos, verdicts
from studies.harness.floors import Floor
from studies.harness.report import Comparison
from studies.harness.runner import Arm, Once, Study
from studies.harness.verdicts import Claim

DATA, TEACHER = photos.SINGLE, "data/protoclip/photos-teacher.npz"
LOCKED = (
    f"--data {DATA} --lock-image --model Lite0-emoji --image-size {photos.SIDE} --lr 1e-3 --weight-decay 3 "
    "--batch-size 256 --episodes 10 --episode-size 12000 --eval-every 0"
)
METHOD = f"{LOCKED} --external-teacher {TEACHER}"
ARMS = (
    Arm("clip", f"train emoji-clip {LOCKED} --external-teacher None", heading="CLIP"),
    Arm(
        "proto-no-pbt",
        f"train emoji {METHOD} --w-external 0 --no-back-translate",
        heading="+ prototypes, no back translation",
    ),
    Arm("proto-pbt", f"train emoji {METHOD} --w-external 0", heading="+ back translation"),
    Arm("protoclip", f"train emoji {METHOD}", heading="+ external teacher = ProtoCLIP"),
)
PACS = "data/photos-pacs/eval"
ZERO_SHOT, PROBES = f"{PACS}/photo_all", (f"{PACS}/art_painting", f"{PACS}/cartoon")
PROBED = [f"{folder}/{split}" for folder in PROBES for split in ("train", "test")]

# -------------------------------------------------------------------------------------------------------------- claims

RECALL, TOP1, PROBE = "retrieval_en/mean_recall", "photo_all/top1", "probe/mean"
CLAIMS = (  # in the words of study.py; there, only the first two are about arms with a locked EfficientNet-Lite0
    Claim("linear probe above CLIP, locked Lite0", "+5.81 IN", PROBE, "protoclip", "clip", 1, 5.81, True, 2.9),
    Claim("zero-shot above CLIP, locked Lite0", "+2.01 IN", TOP1, "protoclip", "clip", 1, 2.01, True, 1.0),
    Claim("back translation helps the probe", "claimed", PROBE, "proto-pbt", "proto-no-pbt", 1, None, True, 1.0),
    Claim("external teacher helps the probe", "claimed", PROBE, "protoclip", "proto-pbt", 1, None, True, 1.0),
    Claim("retrieval slightly lower", "-0.79 COCO", RECALL, "protoclip", "clip", -1, -0.79, False, 0.39),
    Claim("back translation, retrieval", None, RECALL, "proto-pbt", "proto-no-pbt"),
    Claim("external teacher, retrieval", None, RECALL, "protoclip", "proto-pbt"),
    Claim("back translation helps zero-shot", "claimed", TOP1, "proto-pbt", "proto-no-pbt", negligible=1.0),
    Claim("external teacher helps zero-shot", "claimed", TOP1, "protoclip", "proto-pbt", negligible=1.0),
    Claim("training time, ProtoCLIP / CLIP - 1", "0.79, 1 GPU", "extra_time", "protoclip", "clip", 1, 0.79),
)


def derive(found: Comparison) -> None:
    """Add probe/mean, the probe's mean over both domains, and extra_time: training seconds / CLIP's, minus 1."""
    for runs in found.arms.values():
        for i, values in enumerate(runs):
            values[PROBE] = mean_of_probes(values)
            if "clip" in found.arms:
                values["extra_time"] = values["seconds"] / found.arms["clip"][i]["seconds"] - 1


def mean_of_probes(values: dict[str, float]) -> float:
    return float(np.mean([values[f"{folder.rpartition('/')[2]}/probe_best"] for folder in PROBES]))


def more_rows(found: Comparison) -> list[dict]:
    """Rows for results that this scale cannot show."""
    time, why = "time to CLIP's accuracy / CLIP's time - 1", "accuracy is measured after training only"
    numbers = "55.22 / 21.47 / 22.52"
    return [
        verdicts.not_testable(time, "-0.67 YFCC", why, primary=True),
        verdicts.not_testable("absolute ImageNet, COCO and 10-set numbers", numbers, "needs CC2.5M"),
    ]


# ------------------------------------------------------------------------- measurements on features of the locked trunk


def probed(project: Callable[[Tensor], Tensor]) -> dict[str, float]:
    """Linear probes of PROBES on the projected features: {"SET/probe_best", "SET/probe_final"}."""
    numbers = {}
    for folder in PROBES:
        (train_x, train_y, _), (test_x, test_y, _) = (photos.test_set(folder, split=x) for x in ("train", "test"))
        found = evaluation.linear_probe(project(train_x), train_y, project(test_x), test_y)
        numbers |= {f"{Path(folder).name}/probe_{key}": found[key] for key in ("best", "final")}
    return numbers


def measure_run(folder: Path) -> dict[str, float]:
    """The metrics of eval.py in fp32, from the trunk's features: retrieval, modality gap, zero-shot, linear probes."""
    model, _, tokenizer = evaluation.load_any(str(folder), "")
    project = torch.no_grad()(model.encode_image)
    encode = functools.partial(zeroshot.encode_texts, model.encode_text, tokenizer)

    features, captions, found = photos.test_set(photos.RETRIEVAL)
    image, text = project(features), encode([text for each in captions for text in each])
    metrics = zeroshot.retrieval_metrics(image, text, zeroshot.owners(captions))
    numbers = {f"{found.name}/{metric}": value for metric, value in metrics.items()}
    first = encode([each[0] for each in captions])
    numbers |= evaluation.feature_statistics(F.normalize(image, dim=-1), F.normalize(first, dim=-1))

    features, labels, found = photos.test_set(ZERO_SHOT)
    classifier = zeroshot.build_classifier(model.encode_text, tokenizer, found.classnames, found.templates)
    metrics = zeroshot.classification_metrics(project(features), labels, classifier)
    numbers |= {f"{found.name}/{metric}": value for metric, value in metrics.items()}
    return numbers | probed(project) | {"seconds": run.read_metrics(folder, "seconds")[-1]["seconds"]}


def evaluate(runs: Sequence[str]) -> list[dict[str, float]]:
    return photos.evaluated("protoclip", runs, measure_run, (photos.RETRIEVAL, ZERO_SHOT, *PROBES))


def lite0_probe() -> dict[str, float]:
    """The floor of the probes: the same linear probe on the locked trunk's own features."""
    found = probed(lambda features: features)
    return found | {PROBE: mean_of_probes(found)}


STUDY = Study(
    folder="protoclip",
    on="photos",
    paper="ProtoCLIP (arXiv 2206.10996)",
    stands_for="CC2.5M",
    before=(
        photos.FLICKR8K,
        photos.CAPTIONS,
        photos.PACS,
        Once(f"studies.harness.photos {photos.RETRIEVAL}/test {ZERO_SHOT}/test {' '.join(PROBED)}"),
        Once(f"protoclip.teacher minilm --data {DATA} --out {TEACHER}", arms=("protoclip",)),
    ),
    arms=ARMS,
    corpus=f"Flickr8k, {photos.RESIZED}, a sample for each English caption; EfficientNet-Lite0, pretrained on "
    "ImageNet-1k, is locked, its projection and the text tower are from scratch; the teacher is all-MiniLM-L6-v2",
    minutes={"core": 8, "all": 8},
    passes="episode",
    evaluate=evaluate,
    alone=True,
    derive=derive,
    derived_from={arm.name: ("clip",) for arm in ARMS[1:]},
    metrics={
        RECALL: "mean recall",
        "retrieval_en/image_to_text_R@1": "I2T R@1",
        "retrieval_en/text_to_image_R@1": "T2I R@1",
        TOP1: "PACS photographs",
        PROBE: "probe, paintings and cartoons",
        "modality_gap": "gap (0-2)",
        "seconds": "seconds",
    },
    sets=(photos.RETRIEVAL, ZERO_SHOT, *PROBES),
    floors=(
        *photos.floors_on(photos.RETRIEVAL, ZERO_SHOT),
        Floor("linear probe on EfficientNet-Lite0", lite0_probe),
    ),
    claims=CLAIMS,
    more_rows=more_rows,
)
