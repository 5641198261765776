"""Fine-tuning keeps the codebook on request and needs --init."""

import pytest
import torch
from test_tldr_reduction_train import CODES, SCRIPT, SECONDS, chain, command, folder, refused, tiny  # noqa: F401

from shared import checkpoints


def test_codebook_is_kept_on_request(chain, in_process, folder, tiny):
    short = ["--epochs", "1", "--dataset-size", "32", "--quantize", "--out", folder / "quantized"]
    words = command("finetune", tiny, "--init", chain["captioner"], *short)
    assert in_process(*words, module="tldr_reduction.finetune").code == 0
    state = checkpoints.load_checkpoint(folder / "quantized/checkpoint.pt")["state_dict"]
    assert state["quantize.embedding.weight"].shape == (32, 16)
    assert torch.isfinite(state["quantize.embedding.weight"]).all()


@pytest.mark.parametrize(("init", "words"), [([], "--init is missing"), (["--init", "gone"], "gone does not exist")])
def test_it_starts_from_a_captioner(in_process, tiny, init, words):
    refused(in_process(*command("finetune", tiny, *init), module="tldr_reduction.finetune"), words)
