"""Scores of concepts in the authors' layout."""

import dataclasses
import multiprocessing
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from scripts import ROOT, one_sentence
from short_runs import small_set
from test_concept_frequency_model import both
from test_concept_frequency_train import EVAL, PIPELINE, arms, folder, shards  # noqa: F401

from concept_frequency import evaluate
from concept_frequency.concepts import caption_concepts, read_concepts
from concept_frequency.curve import read_scores
from concept_frequency.evaluate import concept_recall, per_class_accuracy
from shared import checkpoints
from shared.zeroshot import build_classifier


@pytest.mark.golden("concept_frequency", "zero_shot")
def test_zero_shot(case):
    prompts = case["prompt_embeddings"]  # (C, T, D); class c in template t is row c T + t
    numbers, templates = [str(c) for c in range(len(prompts))], [f"{{c}} {t}" for t in range(prompts.shape[1])]

    def tokens(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[int(number) for number in text.split()] for text in texts])

    def encode(rows: torch.Tensor) -> torch.Tensor:
        return prompts[rows[:, 0], rows[:, 1]]

    classifier = build_classifier(encode, tokens, numbers, templates, 256, torch.device("cpu"), torch.float32)
    case.close("classifier", classifier, atol=1e-5)
    features = F.normalize(case["image_features_raw"], dim=-1)
    case.close("image_features", features, atol=1e-5)
    logits = 100 * features @ classifier
    case.close("logits", logits, atol=1e-4)
    case.close("predictions", case["logits"].argmax(dim=1))  # of the file's: rounding decides between equal classes
    percent, per_class = per_class_accuracy(case["logits"], case["labels"])
    case.close("accuracy_percent", [percent], atol=1e-5)
    case.close("per_class_accuracy_percent", per_class, atol=1e-5)


@pytest.mark.golden("concept_frequency", "retrieval")
def test_retrieval(case):
    case, truth = both(case)
    images, texts = case["image_embeddings"], case["text_embeddings"]
    found = caption_concepts(truth["docs"], captions_per_image=len(texts) // len(images))
    assert found.names == sorted(truth["concepts"])
    assert found.to_images == truth["concept_to_images"] and found.to_texts == truth["concept_to_texts"]
    recalls = [concept_recall(images, texts, found, k) for k in case["k"].tolist()]
    case.close("text_to_image_recall", [r[0] for r in recalls], atol=1e-6)
    case.close("image_to_text_recall", [r[1] for r in recalls], atol=1e-6)
    for k, (_, _, t2i, i2t) in zip(case["k"].tolist(), recalls, strict=True):
        assert t2i == pytest.approx(truth["conceptwise_text_to_image"][str(k)], abs=1e-6)
        assert i2t == pytest.approx(truth["conceptwise_image_to_text"][str(k)], abs=1e-6)


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


def test_sets_of_one_name_are_refused(arms, in_process, tmp_path):
    sets = [small_set("groups_id", tmp_path / name) for name in ("a", "b")]
    result = in_process(arms["zipf"], "--sets", *sets, "--out", tmp_path, module="concept_frequency.evaluate")
    assert result.code == 2 and "have the same name" in result.err and one_sentence(result.err), result.err


def test_a_missing_pipeline_is_an_error_before_images_are_encoded(arms, in_process, monkeypatch, tmp_path):
    def encode(*args):
        raise AssertionError("images were encoded first")

    monkeypatch.setattr(evaluate, "extract_image_features", encode)
    sets = ROOT / "data/emoji/eval/retrieval_xm_en"
    result = in_process(
        arms["zipf"], "--sets", sets, "--spacy", "nowhere", "--out", tmp_path, module="concept_frequency.evaluate"
    )
    assert result.code == 2 and "pipeline nowhere" in result.err, result.err
