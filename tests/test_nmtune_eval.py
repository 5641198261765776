"""Heads that do not fit a run end in one sentence."""

import dataclasses

import torch
from nmtune_runs import corpus, features_file, in_process, one_sentence  # noqa: F401

from nmtune import config
from nmtune.model import NMTuneHead


def test_heads_and_checkpoints_of_something_else_end_in_one_sentence(in_process, features_file, tmp_path):
    run, head, pretrained = tmp_path / "run", tmp_path / "head.pt", dataclasses.asdict(config.PretrainConfig())
    command = ["lp", "--features", features_file, "--epochs", "1", "--out", run]
    assert in_process("nmtune.train", *command)[0] == 0  # 24 features, 6 classes

    def exported(dim: int, num_classes: int) -> dict:
        state = NMTuneHead(dim, num_classes, ratio=0.5).state_dict()
        return {key if key.startswith("cl") else f"image_encoder.{key}": value for key, value in state.items()}

    torch.save(exported(24, 6), head)
    code, out, err = in_process("nmtune.eval", run, "--head", head)
    assert code == 0 and "test" in out, err
    for content, message in (
        (exported(12, 6), "12 features and 6 classes"),
        (exported(24, 5), "24 features and 5 classes"),
        ({"weight": torch.zeros(6, 24)}, "holds no head"),
        ({"epoch": 3}, "holds no weights"),
        ([1], "holds no weights"),
    ):
        torch.save(content, head)
        code, _, err = in_process("nmtune.eval", run, "--head", head)
        assert code == 2 and message in err and one_sentence(err), err
    for content, message in (({"head": {}}, "not a run of nmtune"), ({"config": pretrained}, "holds no head")):
        torch.save(content, run / "checkpoint.pt")
        code, _, err = in_process("nmtune.eval", run)
        assert code == 2 and message in err and one_sentence(err), err
    code, _, err = in_process("nmtune.eval", run, "--sets", "x")
    assert code == 2 and "is no CLIP" in err and one_sentence(err), err
    torch.save({"a": 1}, run / "checkpoint.pt")
    encoder = ["--encoder", "timm:resnet_emoji", "--data", "data/emoji/eval/groups_id:test"]
    for module, *arguments in (
        ["nmtune.eval", run, "--sets", "x"],
        ["nmtune.train", *encoder, "--checkpoint", run / "checkpoint.pt", "--out", tmp_path / "new"],
    ):
        code, _, err = in_process(module, *arguments)
        assert code == 2 and str(run) in err and one_sentence(err), err
