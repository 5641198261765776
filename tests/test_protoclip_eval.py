"""python -m protoclip.eval on run folders and on checkpoints in the authors' layout, with real emoji sets."""

import dataclasses
import json
from pathlib import Path

import open_clip
import pytest
import torch
from authors_files import beside_weights
from open_clip.transformer import QuickGELU
from protoclip_runs import cfg, runs  # noqa: F401
from scripts import ROOT
from short_runs import small_set

from protoclip import eval as evaluation
from protoclip.model import create_model
from shared import cli


def test_towers_load_into_open_clip(runs: list[str]):
    """open_clip's model loads our towers and computes the same features."""
    model, name = evaluation.load_model(runs[2])
    plain = open_clip.create_model(name, force_image_size=16).eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("projection_head" in key or key == "logit_scale_proto" for key in unexpected)
    images, tokens = torch.rand(2, 3, 16, 16), open_clip.get_tokenizer(name)(["a cat", "a dog"])[:, :24]
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_image(images), model.encode_image(images))
        torch.testing.assert_close(plain.encode_text(tokens), model.encode_text(tokens))


def test_other_protocols_of_the_probe(cfg: evaluation.Config):
    """Logistic regression, which is off unless asked for."""
    one = dataclasses.replace(cfg, runs=cfg.runs[2:3])
    usual = evaluation.main(one)[0]
    (found,) = evaluation.main(dataclasses.replace(one, logistic=True))
    more = {"groups_id/probe_logistic"}
    assert set(found) - set(usual) == more and all(0 <= found[key] <= 100 for key in more)
    assert found["groups_id/probe_best"] == usual["groups_id/probe_best"]


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_in_the_authors_layout(tmp_path: Path, prefix: str):
    """A file with upstream's keys and shapes of RN50 (tests/golden), in the format of upstream's torch.save."""
    shapes = json.loads((ROOT / "tests/golden/protoclip/state_dict_layout_RN50.json").read_text())
    weights = {prefix + k: torch.full((), 0.01).expand(shape) for k, shape in shapes.items()}
    path = tmp_path / "epoch_400.pt"
    torch.save(beside_weights(epoch=400, state_dict=weights), path)
    model, name = evaluation.load_model(path)
    assert name == "RN50" and sum(p.numel() for p in model.parameters()) == 106_738_274
    assert model.state_dict()["visual.conv1.weight"].unique().item() == pytest.approx(0.01)
    with pytest.raises(ValueError, match="another --model"):
        evaluation.load_model(path, "ViT-emoji")


def test_a_file_without_heads_has_the_activation_of_the_flag(tmp_path: Path):
    """Weights fit QuickGELU and GELU; only files with heads are certainly ProtoCLIP's."""
    path = tmp_path / "epoch_32.pt"
    torch.save({"state_dict": create_model("ViT-test", heads=False).state_dict()}, path)
    with pytest.raises(ValueError, match="epoch_32.pt .*QuickGELU"):
        evaluation.load_model(path, "ViT-test")
    for quick_gelu in (True, False):
        model, _ = evaluation.load_model(path, "ViT-test", quick_gelu)
        found = {isinstance(module, QuickGELU) for module in model.modules() if "GELU" in type(module).__name__}
        assert found == {quick_gelu} == {model.quick_gelu}


def test_weights_of_open_clip_are_measured_beside_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    """MODEL@PRETRAINED with open_clip's preprocessing; without a network it ends in one sentence.

    The mean is over sets.
    """
    monkeypatch.chdir(tmp_path)

    def unreachable(*_, **__):
        raise OSError("no route to host")

    with monkeypatch.context() as patch:
        patch.setattr(open_clip, "create_model_and_transforms", unreachable)
        with pytest.raises(ValueError, match=r"RN50@openai could not be loaded"):
            evaluation.load_any("RN50@openai", "")
    made = open_clip.create_model_and_transforms
    activations = []

    def small(name, pretrained, force_quick_gelu):  # an architecture of the same kind, without a download
        activations.append(force_quick_gelu)
        return made("ViT-emoji")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", small)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name: open_clip.SimpleTokenizer(context_length=24))
    sets = tuple(small_set(name, tmp_path / "sets") for name in ("groups_id", "subgroups_id"))
    cfg = evaluation.Config(runs=("RN50@openai",), sets=sets, probe=(), gap=None, device="cpu")
    (found,) = evaluation.main(cfg)
    assert found["mean_top1"] == pytest.approx((found["groups_id/top1"] + found["subgroups_id/top1"]) / 2)
    kept = Path("runs/protoclip/RN50@openai")
    assert json.loads((kept / "results.json").read_text())["metrics"] == found
    assert f"{kept}/results.md" in (printed := capsys.readouterr().out)
    assert f"{found['groups_id/top1']:.2f}" in printed and "mean_top1" in printed
    assert activations == [True]  # OpenAI's weights were trained with QuickGELU, which the name alone does not say


def test_errors_are_one_sentence(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture):
    for arguments, words in (
        ((str(tmp_path / "nowhere"),), "no checkpoint"),
        ((runs[0], "--sets", str(tmp_path)), str(tmp_path)),
        ((), "at least one run folder"),
        (("RN50@nowhere",), "RN50@nowhere"),
        (("RN51@openai",), "RN51@openai"),
    ):
        with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["protoclip.eval", *arguments])
            cli.command_line(lambda: evaluation.main(evaluation.tyro.cli(evaluation.Config)))
        assert exit.value.code == 2
        assert words in capsys.readouterr().err
