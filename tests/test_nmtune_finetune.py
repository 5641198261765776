"""Full and LoRA fine-tuning, killed and resumed, with recomputed activations."""

import sys

import pytest
from nmtune_runs import corpus, images, in_process, start  # noqa: F401
from scripts import ended, finished, kill_at, metrics, same

from nmtune import finetune
from shared import checkpoints

SCRIPT = "nmtune.train"


@pytest.mark.parametrize("preset", ["full", "lora"])
def test_fine_tuning_kill_and_resume(in_process, start, tmp_path, images, preset):
    encoder = {"full": "timm:resnet_emoji", "lora": "open_clip:ViT-emoji"}[preset]
    command = [
        preset, "--encoder", encoder, "--data", images, "--tests", f"again={images}", "--epochs", "2", "--batch-size",
        "16", "--workers", "0", "--log-every", "1", "--save-every", "2", "--out",
    ]  # fmt: skip
    code, _, err = in_process("nmtune.finetune", *command, tmp_path / "whole")
    assert code == 0, err
    kill_at(start("nmtune.finetune", *command, tmp_path / "killed"), tmp_path / "killed", 4)
    finished(ended(start("nmtune.finetune", *command, tmp_path / "killed")))
    code, _, err = in_process("nmtune.finetune", *command, tmp_path / "recomputed", "--grad-checkpointing")
    if preset == "full":
        assert code == 2 and "batch norms" in err  # whose statistics would be counted twice
    else:
        assert code == 0, err
    whole = checkpoints.load_checkpoint(tmp_path / "whole" / "checkpoint.pt")
    for name in ("killed", "recomputed")[: 1 if preset == "full" else 2]:  # activations computed again change nothing
        assert metrics(tmp_path / name) == metrics(tmp_path / "whole")
        state = checkpoints.load_checkpoint(tmp_path / name / "checkpoint.pt")
        assert all(same(state[part], whole[part]) for part in ("state_dict", "optimizer", "epoch"))


def test_lora_without_peft_names_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ValueError, match=r"peft.*pip install '\.\[nmtune\]'"):
        finetune.add_lora(None, "timm")
