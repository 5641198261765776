"""python -m tinyclip.eval: costs, and the metrics of a run folder."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from open_clip import SimpleTokenizer
from PIL import Image
from scripts import SHARDS, one_sentence, same
from tinyclip_runs import TINY, sets, trained  # noqa: F401

from shared.clip import STATISTICS
from tinyclip import eval as evaluation
from tinyclip import train
from tinyclip.export import write_transformers
from tinyclip.model import create_model, load_clip

# ---------------------------------------------------------------------------------------------------------------- costs


def test_linear_probe():
    """Two linearly separable classes; one of three test images of class 1 lies on the side of class 0."""
    train_x, train_y = torch.tensor([[0.0, 2], [1, 2], [0, -2], [1, -2]]), torch.tensor([0, 0, 1, 1])
    test_x, test_y = torch.tensor([[9.0, 1], [0, -1], [5, -3], [2, 1]]), torch.tensor([0, 1, 1, 1])
    found = evaluation.linear_probe(train_x, train_y, test_x, test_y)
    assert found == {"probe_top1": 75.0, "probe_mean_per_class": pytest.approx((100 + 200 / 3) / 2)}


@pytest.mark.parametrize("name, macs", [("TinyCLIP-ViT-61M-32-Text-29M", 5.3), ("TinyCLIP-ResNet-19M-Text-19M", 4.4)])
def test_macs_are_those_of_the_model_zoo(name: str, macs: float):
    assert round(evaluation.macs(create_model(name)) / 1e9, 1) == macs


def test_throughput():
    rates = evaluation.throughput(create_model("emoji-25"), batch=2, seconds=0.05)
    pairs = 1 / (1 / rates["images_per_second"] + 1 / rates["captions_per_second"])
    assert rates["pairs_per_second"] == pytest.approx(pairs)


# ---------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture(scope="module")
def small_run(folder: Path) -> Path:
    return trained("emoji-teacher", *TINY, "--model", "test-25", "--steps", "2", "--out", folder / "small-seed0")


def test_measurements_are_kept_beside_the_checkpoint(small_run: Path, sets, monkeypatch, capsys: pytest.CaptureFixture):
    cfg = evaluation.Config((str(small_run),), sets=sets, throughput=False, device="cpu")
    (values,) = evaluation.main(cfg)
    assert json.loads((small_run / "results.json").read_text())["metrics"] == values
    printed = capsys.readouterr().out
    assert f"{small_run}/results.md" in printed and f" {values['groups_id/top1']:.2f} " in printed
    model = load_clip(small_run)
    assert values["macs_g"] == pytest.approx(evaluation.macs(model) / 1e9)
    assert values["total_parameters_m"] == pytest.approx(sum(p.numel() for p in model.parameters()) / 1e6)
    assert {name.partition("/")[0] for name in values if "/" in name} == {Path(path).name for path in sets}
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    assert evaluation.main(cfg) == [values]


def test_throughput_of_another_machine_is_not_reused(small_run: Path, tmp_path: Path, monkeypatch):
    shutil.copytree(small_run, tmp_path / "run")
    rates = iter([{"pairs_per_second": 1.0}, {"pairs_per_second": 2.0}])
    monkeypatch.setattr(evaluation, "throughput", lambda *_, **__: next(rates))
    cfg = evaluation.Config((str(tmp_path / "run"),), sets=(), device="cpu")
    assert [evaluation.main(cfg)[0]["pairs_per_second"] for _ in range(2)] == [1.0, 1.0]
    monkeypatch.setattr(evaluation.run, "machine", lambda: "another one")
    assert evaluation.main(cfg)[0]["pairs_per_second"] == 2.0


def test_a_short_run_that_pruned_too_little_says_so(tmp_path: Path, capsys: pytest.CaptureFixture):
    """It is compared with the setting, not with the target that had risen so far."""
    lines = {"step": 1, "target_sparsity": 0.0, "expected_sparsity": 0.004}, {"step": 7, "sparsity_reached": 0.011}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.json").write_text(json.dumps({"target_sparsity": 0.39}))
    found = evaluation.sparsities(tmp_path)
    assert found["target_sparsity"] == 0.39 and found["sparsity_missing"] == pytest.approx(0.379)
    assert (said := capsys.readouterr().out) and "0.011" in said and "0.390" in said


def test_probes_of_a_run(small_run: Path, sets, in_process):
    cfg = evaluation.Config((str(small_run),), sets=(), probe=sets[:1], throughput=False, device="cpu")
    (values,) = evaluation.main(cfg)
    assert all(0 <= values[f"groups_id/probe_{metric}"] <= 100 for metric in ("top1", "mean_per_class"))
    result = in_process(small_run, "--probe", sets[1], module="tinyclip.eval")  # without classes to learn
    assert result.code == 2 and sets[1] in result.err and one_sentence(result.err)
    result = in_process(small_run, "--probe", sets[0], sets[0], module="tinyclip.eval")
    assert result.code == 2 and "named twice" in result.err


def test_what_a_file_says_itself_is_not_overruled(small_run: Path, in_process):
    result = in_process(small_run, "--quick-gelu", "True", module="tinyclip.eval")
    assert result.code == 2 and "QuickGELU is False" in result.err and one_sentence(result.err)


def test_files_of_one_stem_are_not_mixed_up(small_run: Path, tmp_path: Path, sets):
    """epoch.1 and epoch.2 have the same folder of results."""
    state = torch.load(small_run / "model.pt", weights_only=True)
    values = []
    for number in (1, 2):
        torch.save(state, tmp_path / f"epoch.{number}")
        state["state_dict"]["visual.proj"] = state["state_dict"]["visual.proj"].flip(0)
        cfg = evaluation.Config((str(tmp_path / f"epoch.{number}"),), sets=sets[1:], throughput=False, device="cpu")
        values += evaluation.main(cfg)
    assert values[0] != values[1]


def test_an_exported_folder_is_measured_like_its_run(small_run: Path, sets, folder: Path):
    cfg = evaluation.Config((str(small_run),), sets=sets[:1], throughput=False, device="cpu")
    exported = folder / "exported"
    evaluation.export_run(str(small_run), str(exported), cfg)
    assert same(dict(load_clip(exported).state_dict()), dict(load_clip(small_run).state_dict()))
    (values,) = evaluation.main(replace(cfg, runs=(str(exported),)))
    (of_run,) = evaluation.main(cfg)
    assert values == {name: of_run[name] for name in values} and (exported / "results.md").exists()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_transformers_and_back(tmp_path: Path, quick_gelu: bool):
    """transformers computes the same features from the same pixels and the same words; load_clip reads the folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = create_model("emoji-25", quick_gelu=quick_gelu).eval()
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) / 50
    write_transformers(tmp_path, model, STATISTICS, "a run")
    theirs, about = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not about["missing_keys"] and not about["unexpected_keys"]
    processor, side = transformers.CLIPProcessor.from_pretrained(tmp_path), model.geometry["vision"]["image_size"]
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8))
    texts = ["A red Circle!", "it's 12, größer; " * 20]
    given = processor(text=texts, images=picture, return_tensors="pt", padding="max_length", truncation=True)
    pixels = train.image_transform(side)(picture)[None]
    torch.testing.assert_close(given["pixel_values"], pixels, rtol=0, atol=1e-6)
    with torch.no_grad():
        found = theirs.eval()(**given)
        image, text, scale = model(pixels, SimpleTokenizer(context_length=model.context_length)(texts))
    for ours, other in ((image, found.image_embeds), (text, found.text_embeds)):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
    torch.testing.assert_close(theirs.logit_scale.exp(), scale)
    back = load_clip(tmp_path)
    assert same(dict(back.state_dict()), dict(model.state_dict())) and back.geometry["quick_gelu"] == quick_gelu


def test_a_resnet_is_refused_by_transformers(tmp_path: Path):
    with pytest.raises(ValueError, match="a run cannot be exported"):
        write_transformers(tmp_path / "out", create_model("TinyCLIP-ResNet-19M-Text-19M"), STATISTICS, "a run")
    assert not (tmp_path / "out").exists()


def test_an_export_keeps_the_statistics_of_its_source(small_run: Path, tmp_path: Path):
    cfg = evaluation.Config((str(small_run),), throughput=False, device="cpu")
    first, second = tmp_path / "first", tmp_path / "second"
    evaluation.export_run(str(small_run), str(first), cfg)
    file = first / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["preprocess_cfg"] |= {"mean": [0.5] * 3, "std": [0.25] * 3}
    file.write_text(json.dumps(config))
    evaluation.export_run(str(first), str(second), cfg)
    exported = json.loads((second / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert (exported["mean"], exported["std"]) == ([0.5] * 3, [0.25] * 3)


def test_weights_that_are_not_finite_are_refused(small_run: Path, tmp_path: Path, in_process):
    state = torch.load(small_run / "model.pt", weights_only=True)
    state["state_dict"]["logit_scale"] = torch.tensor(float("nan"))
    torch.save(state, tmp_path / "nan.pt")
    for words in ([], ["--export", tmp_path / "exported"]):
        result = in_process(tmp_path / "nan.pt", *words, module="tinyclip.eval")
        assert result.code == 2 and "nan.pt holds logit_scale" in result.err


def test_evaluation_errors(in_process, tmp_path: Path, small_run: Path):
    for arguments, words in (
        ((tmp_path / "nowhere",), "no checkpoint"),
        ((small_run, "--sets", tmp_path), str(tmp_path)),
        ((), "at least one run folder"),
        ((f"{SHARDS}/00000.tar",), "is not a checkpoint"),
        ((small_run, "--batch-size", "0"), "--batch-size must be at least 1"),
        ((small_run, "--probe-c", "nan"), "--probe-c must be finite"),
    ):
        result = in_process(*arguments, module="tinyclip.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err)
