"""FLAME's study: its commands with either language model, and the verdicts of its claims."""

import dataclasses
import io
import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import tyro
from PIL import Image

from flame import config
from flame.llm import GEMMA, SMOLLM2
from shared import checkpoints, layout, tars
from studies import flame as study
from studies import flame_photos as photos_study
from studies import flame_towers as towers
from studies.flame import SCRIPTS, facet_similarity
from studies.harness import runner, verdicts
from studies.harness.report import Comparison


def words(llm: str, arm: str) -> str:
    of = study.study(llm)
    return " ".join(of.words(next(each for each in of.arms if each.name == arm), 3)[0])


def test_no_arm_is_trained_twice():
    for llm in (GEMMA, SMOLLM2):
        of = study.study(llm)
        arms = study.without_repeats(of).arms
        assert len({arm.commands for arm in arms}) == len(arms)
        repeated = {arm.name for arm in of.arms} - {arm.name for arm in arms}
        assert repeated == ({"flame-english"} if llm == SMOLLM2 else set())


def test_all_arms_but_one_have_the_papers_loss():
    for of in (study.study(GEMMA), photos_study.study(GEMMA)):
        for arm in of.arms:
            (words,) = of.words(arm, 3)
            cfg = tyro.extras.overridable_config_cli(towers.PRESETS, args=words[1:])
            assert (cfg.loss, cfg.logit_scale) == (
                ("mp-sigmoid", 20) if arm.name == "sigmoid" else ("mp-nce", 1 / 0.07)
            )


def test_arms_on_fewer_pairs_take_fewer_steps_in_proportion():
    steps = {share: arm_settings(f"flame-{share}") for share in study.FEWER}
    steps = {share: cfg.epochs * (cfg.dataset_size // cfg.batch_size) for share, cfg in steps.items()}
    assert steps == {"2": 312, "4": 180, "8": 108}  # of 540: a quarter of the pairs, a third of the steps
    for share, pairs in study.FEWER_PAIRS.items():
        assert arm_settings(f"clip-{share}").dataset_size == pairs == math.floor(7146 / int(share))


def arm_settings(arm: str) -> config.Config:
    return tyro.extras.overridable_config_cli(towers.PRESETS, args=words(GEMMA, arm).split()[1:])


@pytest.mark.parametrize("arm", ["clip-equal-time", "clip-2", "clip-4", "clip-8", "flame-2", "flame-4", "flame-8"])
def test_shorter_runs_warm_up_for_the_same_share_of_their_steps(arm: str):
    def warmup_share(cfg: config.Config) -> float:
        return cfg.warmup / (cfg.epochs * ((cfg.dataset_size or 7146) // cfg.batch_size))

    cfg = arm_settings(arm)
    share = warmup_share(towers.PRESETS["emoji-lite0"][1])
    assert warmup_share(cfg) == pytest.approx(share, rel=0.02)  # whole steps


def test_what_runs_once_is_made_for_the_arms_that_read_it():
    embed = "flame.embed emoji --data data/flame/known/train"
    for llm in (GEMMA, SMOLLM2):
        made = {once.command: once.arms for once in study.before(llm)}
        bank, sets = study.BANKS[llm], f"--sets {' '.join(study.NEW_SETS + study.ZERO_SHOT_SETS)}"
        assert made["studies.flame_recaption"] == made["studies.flame_new_names"] == ()
        assert made[f"{embed} --llm {llm} {sets} --out {bank}"] == ()
        assert made[f"{embed} --llm {llm} --mask causal {sets} --out {bank}-causal"] == ("causal",)
        embedded = {line.split("--out ")[1].split()[0] for line in made if line.startswith("flame.embed")}
        centred = {line.split("--bank ")[1].split()[0] for line in made if line.startswith("studies.flame_banks")}
        wanted = {
            words(llm, arm.name).split("--bank ")[1].split()[0].removesuffix("-centred")
            for arm in study.arms(llm)
            if "clip" not in arm.name
        }
        assert wanted == centred == embedded | {"data/flame/bank-minilm"}


def test_the_language_model_is_what_the_environment_says(monkeypatch: pytest.MonkeyPatch, capsys):
    monkeypatch.setenv("LLM", GEMMA)
    assert study.language_model() == GEMMA
    monkeypatch.setenv("LLM", "gpt")
    with pytest.raises(SystemExit) as stopped:
        study.main()
    assert stopped.value.code == 2 and "gemma or smollm2" in capsys.readouterr().err
    monkeypatch.setenv("LLM", "")  # not said: what is installed
    monkeypatch.setattr(study.importlib.util, "find_spec", lambda name: None)
    assert study.language_model() == SMOLLM2


def test_languages_are_no_claim_of_an_english_model():
    about = {row["claim"]: row for row in study.more_rows(Comparison({}, [0], {}, set(), {}), SMOLLM2)}
    row = about[study.LANGUAGE_CLAIMS[0].claim]
    assert row["verdict"] == "not testable here" and row["primary"]
    assert not set(study.LANGUAGE_CLAIMS) & set(study.claims(SMOLLM2))
    assert study.claims(GEMMA)[0].primary and study.claims(GEMMA)[0].metric == study.OTHER_TO_TEXT
    assert study.LANGUAGE_CLAIMS[0].claim not in {
        row["claim"] for row in study.more_rows(Comparison({}, [0], {}, set(), {}), GEMMA)
    }


def test_arms_with_fewer_pairs_have_a_floor_with_as_few():
    """The claim about the change with fewer pairs is judged by the floor with all pairs."""
    for claim in study.CLAIMS + study.LANGUAGE_CLAIMS:
        assert claim.negligible is None or claim.effect is None or claim.negligible <= claim.effect / 2
    runs = {
        "clip": [42.0, 42.5, 43.0], "flame": [43.0, 43.5, 44.0],
        "clip-8": [10.0, 10.5, 11.0], "flame-8": [20.0, 20.5, 21.1],
    }  # fmt: skip
    arms = {arm: [{study.NEW_ID: value} for value in values] for arm, values in runs.items()}
    found = Comparison(arms, [0, 1, 2], {}, set(), {})
    study.derive(found)
    assert found.arms["flame"][0][study.AT["8"]] == 20.0 and found.arms["clip"][0][study.GROWTH] == -32.0
    bars = [(study.ON_LITE0, {study.NEW_ID: 40.6, study.AT["8"]: 18.0})]
    rows = {row["metric"]: row for row in verdicts.judged(study.CLAIMS, found.arms, bars)}
    assert rows[study.AT["8"]]["difference"] == pytest.approx(10.03, abs=0.01)
    assert rows[study.AT["8"]]["verdict"] == "direction only"
    assert rows[study.GROWTH]["difference"] == pytest.approx(9.03, abs=0.01) and not rows[study.GROWTH]["primary"]
    few = [(study.ON_LITE0, {study.NEW_ID: 50.0, study.AT["8"]: 21.0})]
    judged = verdicts.judged(study.CLAIMS, found.arms, few)
    assert {row["verdict"] for row in judged} == {"has not learned"}


def test_languages_are_averaged_by_script():
    assert sorted([*sum(SCRIPTS.values(), []), "en"]) == sorted(config.LANGUAGES)
    flat = {}
    for language in config.LANGUAGES:
        flat[f"language_{language}/image_to_text_R@1"] = 5.8 if language in SCRIPTS["Latin script"] else 0.8
    found = Comparison({"flame": [flat]}, [0], {}, set(), {})
    study.derive(found)
    assert flat[study.BY_SCRIPT["Latin script"]] == pytest.approx(5.8)
    assert flat[study.BY_SCRIPT["other scripts"]] == pytest.approx(0.8)


@pytest.mark.parametrize("llm, languages", [(GEMMA, study.LANGUAGE_SETS), (SMOLLM2, ())])
def test_languages_are_measured_where_the_language_model_knows_them(llm: str, languages: tuple, monkeypatch):
    asked = []
    monkeypatch.setattr(study, "measured", lambda *given, **galleries: asked.append((given, galleries)) or {})
    study.study(llm).evaluate(["runs/flame/clip-seed0"])
    names, galleries = study.NEW_SETS + study.ZERO_SHOT_SETS, {"gallery": 1000, "language_gallery": 125}
    assert asked == [(("runs/flame/clip-seed0", names, {study.LONG_SET: study.LONG}, languages), galleries)]


def test_floors_name_the_metrics_that_claims_are_about():
    if not all(Path(folder).is_dir() for folder in (study.NAMES[0], *study.NEW_SETS)):
        pytest.skip("the embedded corpus and its split by names are not built")
    chance = study.chance()
    claimed = {claim.learned_by or claim.metric for claim in study.claims(GEMMA)}
    assert claimed <= set(chance) and chance[study.LONG_TO_TEXT] == 0.1 and chance[study.OTHER_TO_TEXT] == 0.8


COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def pictures_of_one_colour(folder: Path) -> list[dict]:
    """Write shards and captions.json of eight pictures of each colour -> the samples, whose captions name it."""
    samples, captions = [], []
    for i, (name, colour) in enumerate(list(COLOURS.items()) * 8):
        png = io.BytesIO()
        Image.new("RGB", (128, 128), colour).save(png, "png")
        samples.append({"png": png.getvalue(), "txt": name})
        captions.append({"__key__": f"{i}", "caption": f"a picture of {name}"})
    tars.write_tar(folder / "train/0.tar", [{"__key__": f"{i}"} | sample for i, sample in enumerate(samples)])
    (folder / "captions.json").write_text(json.dumps(captions))
    return samples


def mean_colours(batches):
    return torch.cat([batch.float().mean((2, 3)) for batch in batches])


def test_correlations_in_closed_form_name_and_find(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The floors for words and for a language model's embeddings, here one number for each colour."""
    samples = pictures_of_one_colour(tmp_path)[:4]
    (tmp_path / "data/flame/captions").mkdir(parents=True)
    for kind in ("raw", "long"):
        (tmp_path / f"data/flame/captions/{kind}.json").write_bytes((tmp_path / "captions.json").read_bytes())
    layout.write_retrieval(tmp_path / "set", samples)
    for name in ("new_names_id", "new_names_ood"):
        labelled = [{"png": sample["png"], "cls": f"{label}"} for label, sample in enumerate(samples)]
        tars.write_split(tmp_path / name / "test", labelled)
        layout.write_classes(tmp_path / name, [*COLOURS], ["{c}"])

    def coloured(texts, multi=False):
        return torch.tensor([[float(colour in text) for colour in COLOURS] for text in texts])

    class Embedded:
        def __init__(self, path):
            self.path = path

        def __getitem__(self, key):
            return torch.eye(4)[int(key) % 4].expand(11, 4)

    cfg = dataclasses.replace(study.PRESETS["emoji-lite0"][1], data=str(tmp_path / "train"))
    monkeypatch.setitem(study.PRESETS, "emoji-lite0", ("", cfg))
    monkeypatch.setattr(study, "LONG_SET", str(tmp_path / "set"))
    monkeypatch.setattr(study, "NEW_SETS", [str(tmp_path / "new_names_id"), str(tmp_path / "new_names_ood")])
    monkeypatch.setattr(study, "FEWER_PAIRS", {"2": 16, "8": 2})
    monkeypatch.setattr(study, "cached_lite0_features", mean_colours)
    monkeypatch.setattr(study, "Bank", Embedded)
    monkeypatch.setattr(study.flame_measure, "text_features", lambda *_: coloured)
    monkeypatch.chdir(tmp_path)
    for llm in (None, SMOLLM2):
        found = study.correlation(llm)
        assert found.pop(study.AT["8"]) < 100  # two colours are known
        wanted = study.NEW_ID, study.NEW_OOD, study.AT["2"], study.LONG_TO_TEXT, study.LONG_TO_IMAGE
        assert found == dict.fromkeys(wanted, 100.0)


def test_arms_are_compared_with_what_a_closed_form_makes_of_their_inputs():
    arms = {floor.name.rpartition(" with ")[2]: floor.arms for floor in study.STUDY.floors}
    assert {"clip", "clip-8"} <= set(arms["words"]) and {"summary", "flame", "flame-8"} <= set(arms["the LLM"])
    assert set(study.ON_LITE0) - set(arms["words"]) - set(arms["the LLM"]) == {"minilm"}


def test_letters_find_words_that_are_spelt_alike(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The floor for languages: names with common letters are found, names of another script are not."""
    samples = pictures_of_one_colour(tmp_path)[:4]
    names = {"en": [*COLOURS], "sv": ["rött", "greens", "blues", "whites"], "el": ["α", "β", "γ", "δ"]}
    for language, words in names.items():
        asked = [sample | {"txt": word} for sample, word in zip(samples, words, strict=True)]
        layout.write_retrieval(tmp_path / f"set_{language}", asked)
    monkeypatch.setattr(study, "cached_lite0_features", mean_colours)
    sets = [str(tmp_path / f"set_{language}") for language in names]
    found = study.letters_of_neighbours(str(tmp_path / "train"), str(tmp_path / "captions.json"), sets)
    ways = "image_to_text_R@1", "text_to_image_R@1"
    recalls = {language: tuple(found[f"set_{language}/{way}"] for way in ways) for language in names}
    assert recalls == {"en": (100, 100), "sv": (100, 100), "el": (0, 0)}
    monkeypatch.setattr(study, "SCRIPTS", {"Latin script": ["sv"], "other scripts": ["el"]})
    monkeypatch.setattr(study, "LANGUAGE_SETS", sets)
    monkeypatch.setattr(study, "letters_of_neighbours", lambda *_: found)
    means = study.neighbour_letters()
    assert means[study.BY_SCRIPT["Latin script"]] == 100 and means[study.BY_SCRIPT["other scripts"]] == 0
    assert means[study.OTHER_TO_TEXT] == 50 and means["languages/image_to_text_R@1"] == pytest.approx(200 / 3)


def write_new_names(folder: Path) -> None:
    """A set of five pictures, each of one colour, and four names."""
    shown = [((250, 10, 0), 1), ((0, 0, 240), 2), ((0, 240, 10), 3), ((255, 255, 255), 0), ((0, 0, 250), 0)]
    samples = []
    for colour, label in shown:
        png = io.BytesIO()
        Image.new("RGB", (128, 128), colour).save(png, "png")
        samples.append({"png": png.getvalue(), "cls": str(label)})
    tars.write_split(folder / "test", samples)
    layout.write_classes(folder, ["blue", "red apple", "deep blue sea", "green leaf"], ["{c}"])


def test_new_names_by_the_words_of_the_neighbours_caption(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The floor of new names, for five pictures by hand.

    The neighbours' captions are red, blue, green, white and blue. Red and green are a word of their names. Blue is all
    of `blue`, so the second picture is wrong. White is no word of a name, so the first name is taken, which is right.
    """
    pictures_of_one_colour(tmp_path)
    (tmp_path / "data/flame/captions").mkdir(parents=True)
    (tmp_path / "captions.json").rename(tmp_path / "data/flame/captions/short.json")
    cfg = dataclasses.replace(study.PRESETS["emoji-lite0"][1], data=str(tmp_path / "train"))
    sets = [str(tmp_path / "new_names_id"), str(tmp_path / "new_names_ood")]
    for folder in map(Path, sets):
        write_new_names(folder)
    monkeypatch.setitem(study.PRESETS, "emoji-lite0", ("", cfg))
    monkeypatch.setattr(study, "NEW_SETS", sets)
    monkeypatch.setattr(study, "cached_lite0_features", mean_colours)
    monkeypatch.chdir(tmp_path)
    assert study.neighbour_words() == {study.NEW_ID: 80.0, study.NEW_OOD: 80.0}
    # White has no contrast: it is as near to all pictures, and takes the first, a red one
    assert study.neighbour_words(pixels=True) == {study.NEW_ID: 60.0, study.NEW_OOD: 60.0}
    # The first pair is red, the first two are red and green; blue is as far from both, and takes the first
    monkeypatch.setattr(study, "FEWER_PAIRS", {"4": 2, "8": 1})
    assert study.neighbour_words_of_fewer() == {study.AT["4"]: 40.0, study.AT["8"]: 20.0}


def test_the_ceiling_is_right_where_labels_follow_the_picture(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Four colours that a network can tell; one of eight test pictures has the label of another colour."""
    colours = [*COLOURS.values()]
    for folder in (sets := [tmp_path / "names_id", tmp_path / "names_ood"]):
        for split, labels in {"train": [0, 1, 2, 3] * 8, "test": [0, 1, 2, 3, 0, 1, 2, 2]}.items():
            samples = []
            for i, label in enumerate(labels):
                png = io.BytesIO()
                Image.new("RGB", (128, 128), colours[i % 4]).save(png, "png")
                samples.append({"png": png.getvalue(), "cls": str(label)})
            tars.write_split(folder / split, samples)
        layout.write_classes(folder, [*COLOURS], ["{c}"])

    def cells(pixels, *_) -> torch.Tensor:
        means = torch.stack([image.float().mean((1, 2)) / 255 for image in pixels])
        return F.pad(means, (0, study.WIDTH - 3))[:, :, None, None].expand(-1, -1, 2, 2)

    monkeypatch.setattr(study, "NAMES", tuple(map(str, sets)))
    monkeypatch.setattr(study, "cells_of", cells)
    assert study.on_labels(epochs=40, batch_size=16) == {"names_id/top1": 87.5, "names_ood/top1": 87.5}


def test_facets_of_an_image_are_compared_with_each_other():
    facets = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])
    assert facet_similarity(facets).tolist() == [[1.0, 0.5], [0.5, 1.0]]


def test_the_study_runs_its_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Arms and their stages run in order; nothing is embedded for arms that are not requested."""
    called = []
    monkeypatch.setattr(runner, "run_script", lambda words, environment: called.append(words))
    of = dataclasses.replace(study.study(GEMMA), evaluate=lambda runs: [{} for _ in runs])
    monkeypatch.setattr(runner, "compare", lambda *_, **__: None)
    monkeypatch.chdir(tmp_path)
    runner.run(of, runner.Options(seeds=(0,), arms="clip flame", jobs=1))
    scripts = [" ".join(line) for line in called]
    assert scripts[:2] == ["studies.flame_recaption", "studies.flame_new_names"]
    assert scripts[2].startswith("flame.embed emoji --data data/flame/known/train --llm gemma ")
    assert scripts[3] == "studies.flame_banks --bank data/flame/bank-gemma"
    assert [line.split()[0] for line in scripts[4:]] == ["studies.flame_towers"] * 2


@pytest.mark.parametrize("installed", (GEMMA, SMOLLM2))
def test_results_are_judged_by_the_claims_of_their_language_model(installed: str):
    """Whatever language model is installed where the claims are judged again."""
    committed = checkpoints.read_json(Path("results/flame.json"))
    assert GEMMA in committed["corpus"].lower() and SMOLLM2 not in committed["corpus"].lower()
    rows = runner.judged_again(study.study(installed), committed)["claims"]
    for row, before in zip(rows, committed["claims"], strict=True):
        rounded = {name: row[name] for name in ("interval", "resolves")}  # versions of SciPy round differently
        assert row | {name: pytest.approx(rounded[name]) for name in rounded} == before
