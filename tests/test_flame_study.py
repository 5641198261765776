"""FLAME's study: what it runs, and how its claims are judged."""

import torch

from flame import config
from flame.study import CLAIMS, SCRIPTS, STUDY, above_chance, facet_similarity, more_rows
from shared.study import statistics
from shared.study.report import Comparison


def test_arms_are_flags_of_one_preset_each():
    words = {arm.name: " ".join(STUDY.words(arm, 3)[0][2:]) for arm in STUDY.arms}
    out = "--seed 3 --out runs/flame/{}-seed3"
    assert words == {
        "clip": f"flame.train emoji-clip {out.format('clip')}",
        "raw": f"flame.train emoji --rows 0 --facets 1 {out.format('raw')}",
        "summary": f"flame.train emoji --rows 0 1 4 --facets 3 {out.format('summary')}",
        "causal": f"flame.train emoji --bank data/flame/bank-causal {out.format('causal')}",
        "flame": f"flame.train emoji {out.format('flame')}",
        "flame-raw-states": f"flame.train emoji --no-centre {out.format('flame-raw-states')}",
    }
    assert [arm.name for arm in STUDY.chosen("core")] == ["clip", "flame"]


def test_the_bank_of_a_causal_mask_is_made_for_its_arm_alone():
    made = [(once.command, once.arms) for once in STUDY.before]
    causal = "flame.embed emoji --mask causal --out data/flame/bank-causal"
    assert made == [("flame.recaption", ()), ("flame.embed emoji", ()), (causal, ("causal",))]


def test_languages_are_compared_with_chance_by_script():
    assert sorted([*sum(SCRIPTS.values(), []), "en"]) == sorted(config.LANGUAGES)
    chance, flat = 0.8, {"languages/other_chance": 0.8, "languages/chance": 0.8}
    for language in config.LANGUAGES:
        recall = 5.8 if language in SCRIPTS["Latin script"] else chance
        flat |= {f"language_{language}/{way}_R@1": recall for way in ("image_to_text", "text_to_image")}
    latin, other = above_chance({"flame": [flat, flat]})
    assert latin["here"].startswith("+5.00") and "FLAME: 22 languages in Latin script" in latin["claim"]
    assert other["here"].startswith("+0.00") and "FLAME: 13 languages in other scripts" in other["claim"]
    assert above_chance({"raw": [flat]}) == []
    rows = more_rows(Comparison({"flame": [flat]}, [0], {}, set(), {}))
    assert [row["verdict"] for row in rows[-2:]] == ["not testable at this scale"] * 2 and len(rows) == 4


def test_claims_count_with_an_effect_of_the_papers_size():
    metric = "retrieval_long_ood/image_to_text_R@1"
    arms = {"flame": [{metric: 20.0}, {metric: 20.1}], "clip": [{metric: 10.0}, {metric: 10.0}]}
    (row,) = statistics.judge_all([claim for claim in CLAIMS if claim.metric == metric], arms)
    assert row["verdict"] == "same direction"  # far from the paper's +54.6


def test_facets_of_an_image_are_compared_with_each_other():
    facets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert facet_similarity(facets).tolist() == [[1.0, 0.5], [0.5, 1.0]]
