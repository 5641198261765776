"""The study on photographs: students of one teacher, trained for equally many steps."""

import copy

import pytest

from studies import tinyclip as study
from studies.harness import verdicts
from tinyclip.geometry import CONFIGS
from tinyclip.inheritance import inherit_weights
from tinyclip.model import CLIP, parameter_counts


def test_students_start_from_their_teacher_and_train_alike():
    lines = {arm.name: study.PHOTOS.words(arm, 3)[0] for arm in study.PHOTOS_ARMS}
    teacher = "runs/photos/tinyclip/teacher-seed3"
    for name, words in lines.items():
        assert words[words.index("--steps") + 1] == ("696" if name == "teacher" else "232")
        assert words[words.index("--model") + 1] == f"emoji-convnet-{50 if name == 'teacher' else 25}"
        if name.startswith("inherited"):
            assert words[words.index("--init") + 1] == teacher
        if name.endswith("affinity"):
            assert words[words.index("--teacher") + 1] == teacher


def test_a_student_has_half_of_its_teacher():
    """Half of the weights, each of them a part of the teacher's."""
    teacher, student = (CLIP(**copy.deepcopy(CONFIGS[f"emoji-convnet-{size}"])) for size in (50, 25))
    sizes = [sum(parameter_counts(clip)[tower] for tower in ("image", "text")) for clip in (teacher, student)]
    assert sizes[1] / sizes[0] == pytest.approx(0.5, abs=0.05)
    taken = inherit_weights(student.state_dict(), teacher.state_dict(), 32)
    assert student.load_state_dict(taken, strict=False).missing_keys == ["logit_scale"]


def test_claims_compare_recalls():
    recalls = {"teacher": 5.0, study.RC: 2.0, study.RA: 2.5, study.IC: 3.0, study.IA: 4.0}
    arms = {
        arm: [{study.PHOTOS_RECALL: value + 0.01 * seed * value} for seed in range(3)] for arm, value in recalls.items()
    }
    rows = {row["claim"]: row for row in verdicts.judged(study.PHOTOS_CLAIMS, arms, [((), {study.PHOTOS_RECALL: 1.0})])}
    assert rows["both together"]["primary"] and rows["both together"]["verdict"] == "direction only"
    assert rows["half the size above the teacher, by hand"]["verdict"] == "no claim"


def test_each_primary_claim_of_the_study_is_tested_or_said_not_to_be():
    said = [claim.claim for claim in study.PHOTOS_CLAIMS] + [row["claim"] for row in study.more_rows_on_photos(None)]
    assert len(said) == len(set(said))
    assert {claim.claim for claim in study.CLAIMS if claim.primary} <= set(said)
