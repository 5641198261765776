"""The study on photographs: students of one teacher, trained for equally many steps."""

from shared.study import verdicts
from tinyclip import photos_study as study


def test_students_start_from_their_teacher_and_train_alike():
    lines = {arm.name: study.STUDY.words(arm, 3)[0] for arm in study.ARMS}
    teacher = "runs/photos/tinyclip/teacher-seed3"
    for name, words in lines.items():
        assert words[words.index("--steps") + 1] == ("1160" if name == "teacher" else "232")
        if name.startswith("inherited"):
            assert words[words.index("--init") + 1] == teacher
        if name.endswith("affinity"):
            assert words[words.index("--teacher") + 1] == teacher


def test_claims_compare_recalls():
    recalls = {"teacher": 5.0, study.RC: 2.0, study.RA: 2.5, study.IC: 3.0, study.IA: 4.0}
    arms = {arm: [{study.RECALL: value + 0.1 * seed} for seed in range(3)] for arm, value in recalls.items()}
    rows = {row["claim"]: row for row in verdicts.judged(study.CLAIMS, arms, [((), {study.RECALL: 1.0})], True)}
    assert rows["both together"]["primary"] and rows["both together"]["verdict"] == "reproduced"
    assert rows["half the size above the teacher, by hand"]["verdict"] == "no claim"
