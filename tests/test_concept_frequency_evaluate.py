"""Scores of concepts in the authors' layout."""

import dataclasses
import multiprocessing
import shutil
from pathlib import Path

import pytest
from concept_frequency_runs import EVAL, PIPELINE, arms, shards  # noqa: F401
from scripts import ROOT, one_sentence
from short_runs import small_set

from concept_frequency import evaluate
from concept_frequency.concepts import read_concepts
from concept_frequency.curve import read_scores
from shared import checkpoints


def test_scores_are_written_the_authors_layout(arms, tmp_path):
    sets = tuple(small_set(name, tmp_path / "sets") for name in ("groups_id", "retrieval_xm_en"))
    cfg = evaluate.Config(
        str(arms["zipf"]),
        sets,
        label="tiny|zipf",
        spacy=PIPELINE,
        out=str(tmp_path / "out"),
        device="cpu",
        precision="authors",
        prompts=("class", "simple", "ensemble", "ensemble80"),
    )
    evaluate.main(cfg)
    for prompts in cfg.prompts:
        scores = read_scores(tmp_path / f"out/groups_id_{prompts}_results.json")[0].values
        assert set(scores) <= set(read_concepts(sets[0])) and all(0 <= value <= 100 for value in scores.values())
    kept = (tmp_path / "out/groups_id_class_results.json").read_bytes()
    other = shutil.copytree(arms["zipf"], tmp_path / "other"), small_set("groups_id", tmp_path / "elsewhere")
    for change in ({"model": str(other[0])}, {"sets": other[1:]}):  # with the same label or name
        with pytest.raises(ValueError, match="another --label or --out"):
            evaluate.main(dataclasses.replace(cfg, **change))
    assert (tmp_path / "out/groups_id_class_results.json").read_bytes() == kept
    for title in ("t2i_k=1", "i2t_k=10"):
        assert read_scores(tmp_path / f"out/retrieval_xm_en_{title}_results.json")[0].values


def add(folder: Path, key: str) -> None:
    for number in range(20):
        evaluate.write(folder, "set_class", f"{key}{number}", {"full": 1.0})


def test_processes_that_write_one_file_lose_no_result(tmp_path):
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=add, args=(tmp_path, key)) for key in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(checkpoints.read_json(tmp_path / "set_class_results.json")) == 40


def test_command_lines_end_in_one_sentence(in_process):
    result = in_process("RN50|cc3m", "--sets", EVAL, module="concept_frequency.evaluate")
    assert result.code == 2 and "--pretrained FILE" in result.err and one_sentence(result.err), result.err


def test_a_set_that_is_named_twice_is_refused(arms, in_process, tmp_path):
    sets = [small_set("groups_id", tmp_path)] * 2
    result = in_process(arms["zipf"], "--sets", *sets, "--out", tmp_path, module="concept_frequency.evaluate")
    assert result.code == 2 and "named twice" in result.err and one_sentence(result.err), result.err


def test_a_missing_pipeline_is_an_error_before_images_are_encoded(arms, in_process, monkeypatch, tmp_path):
    def encode(*args):
        raise AssertionError("images were encoded first")

    monkeypatch.setattr(evaluate, "extract_image_features", encode)
    sets = ROOT / "data/emoji/eval/retrieval_xm_en"
    result = in_process(
        arms["zipf"], "--sets", sets, "--spacy", "nowhere", "--out", tmp_path, module="concept_frequency.evaluate"
    )
    assert result.code == 2 and "pipeline nowhere" in result.err, result.err
