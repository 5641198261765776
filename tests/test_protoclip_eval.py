"""python -m protoclip.eval on run folders and on checkpoints in the authors' layout, with real emoji sets."""

import dataclasses
import json
from pathlib import Path

import open_clip
import pytest
import torch
from tiny import small_set

from protoclip import config, study, train
from protoclip import eval as evaluation
from shared import checkpoints, cli
from shared.study import statistics

ROOT = Path(__file__).parent.parent
EMOJI = ROOT / "data/emoji"


def trained(folder: Path, preset: str, seed: int) -> str:
    cfg = dataclasses.replace(
        config.PRESETS[preset][1],
        data=str(EMOJI / "train/00000.tar"),
        external_teacher=str(EMOJI / "teacher.npz"),
        eval_set=str(EMOJI / "eval/groups_id"),
        out=str(folder),
        image_size=16,
        episodes=2,
        episode_size=128,
        batch_size=64,
        k=8,
        hidden_dim=32,
        projection_dim=16,
        warmup=2,
        eval_every=1,
        seed=seed,
    )
    return str(train.main(cfg))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("eval")
    arms = {"clip": "emoji-clip", "protoclip": "emoji"}
    return [trained(folder / f"{arm}-seed{seed}", preset, seed) for arm, preset in arms.items() for seed in (0, 1)]


@pytest.fixture
def cfg(runs: list[str], tmp_path: Path) -> evaluation.Config:
    sets = tuple(small_set(name, tmp_path / "sets") for name in ("groups_id", "retrieval_xm_en"))
    return evaluation.Config(
        runs=tuple(runs), sets=sets, probe=sets[:1], gap=sets[1], report=str(tmp_path / "results.json"), device="cpu"
    )


def test_report_of_two_arms_and_seeds(cfg: evaluation.Config, capsys: pytest.CaptureFixture, monkeypatch):
    metrics = {"groups_id/top1": "groups", "modality_gap": "gap", "seconds": "s"}
    claim = statistics.Claim("higher", "+1", "groups_id/top1", "protoclip", "clip")
    monkeypatch.setattr(study, "STUDY", dataclasses.replace(study.STUDY, metrics=metrics, claims=(claim,)))
    evaluation.main(cfg)
    summary = checkpoints.read_json(cfg.report)
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"clip", "protoclip"}
    top1 = {arm: metrics["groups_id/top1"]["values"] for arm, metrics in summary["arms"].items()}
    for arm, values in top1.items():  # what stands in the report was measured on that arm's checkpoints
        for seed, value in enumerate(values):
            folder = next(Path(path) for path in cfg.runs if path.endswith(f"{arm}-seed{seed}"))
            assert json.loads((folder / "results.json").read_text())["metrics"]["groups_id/top1"] == value
            assert (folder / "results.md").is_file() and (folder / "features.png").is_file()
    expected = statistics.judge(claim, top1["protoclip"], top1["clip"])
    assert summary["claims"][0] == expected
    assert expected["verdict"] in capsys.readouterr().out
    for name in ("protoclip_curves.png", "protoclip_features.png"):
        assert (Path(cfg.report).parent / name).stat().st_size > 10_000

    # A second evaluation reads what the first has kept
    monkeypatch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
    evaluation.main(cfg)


def test_report_refuses_uneven_seeds(cfg: evaluation.Config):
    with pytest.raises(ValueError, match=r"arm protoclip has seeds \[0\], but clip has \[0, 1\]"):
        study.STUDY.compare(list(cfg.runs[:3]), [{"seconds": 1.0}] * 3, Path(cfg.report))
    with pytest.raises(ValueError, match="ARM-seedN"):
        study.STUDY.compare(["runs/other"], [{}], Path(cfg.report))


def test_towers_load_into_open_clip(runs: list[str]):
    """Ours are open_clip's towers: its own model takes them, and encodes to the same features."""
    model, name = evaluation.load_model(runs[2])
    plain = open_clip.create_model(name, force_image_size=16).eval()
    missing, unexpected = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert all("projection_head" in key or key == "logit_scale_proto" for key in unexpected)
    images, tokens = torch.rand(2, 3, 16, 16), open_clip.get_tokenizer(name)(["a cat", "a dog"])[:, :24]
    with torch.no_grad():
        torch.testing.assert_close(plain.encode_image(images), model.encode_image(images))
        torch.testing.assert_close(plain.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_checkpoint_in_the_authors_layout(tmp_path: Path, prefix: str):
    """A file with exactly upstream's keys and shapes for RN50 (tests/golden), as its torch.save writes it."""
    shapes = json.loads((ROOT / "tests/golden/protoclip/state_dict_layout_RN50.json").read_text())
    weights = {prefix + k: torch.full((), 0.01).expand(shape) for k, shape in shapes.items()}
    path = tmp_path / "epoch_400.pt"
    torch.save({"epoch": 400, "name": "x", "state_dict": weights, "optimizer": {}}, path)
    model, name = evaluation.load_model(path)
    assert name == "RN50" and sum(p.numel() for p in model.parameters()) == 106_738_274
    assert model.state_dict()["visual.conv1.weight"].unique().item() == pytest.approx(0.01)
    with pytest.raises(ValueError, match="another --model"):
        evaluation.load_model(path, "ViT-emoji")


def test_errors_are_one_sentence(tmp_path: Path, runs: list[str], capsys: pytest.CaptureFixture):
    for arguments, words in (
        ((str(tmp_path / "nowhere"),), "no checkpoint"),
        ((runs[0], "--sets", str(tmp_path)), str(tmp_path)),
        ((), "name at least one run folder"),
    ):
        with pytest.raises(SystemExit) as exit, pytest.MonkeyPatch.context() as patch:
            patch.setattr("sys.argv", ["protoclip.eval", *arguments])
            cli.command_line(lambda: evaluation.main(evaluation.tyro.cli(evaluation.Config)))
        assert exit.value.code == 2
        assert words in capsys.readouterr().err
