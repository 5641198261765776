"""A loaded checkpoint gives the trained weights; wrong weights or another backbone are refused."""

from pathlib import Path

import pytest
import torch
from lexvla_runs import ARMS, arms, backbone, lm, states, tiny, tiny_lm  # noqa: F401
from scripts import same

from lexvla import checkpoints as run_checkpoints
from lexvla import text as texts
from lexvla.model import LoRALinear
from lexvla.text import lm_sample
from shared import checkpoints

SCRIPT = "lexvla.train"


def test_load_run_restores_the_trained_weights(arms: dict[str, Path], monkeypatch: pytest.MonkeyPatch):
    model = run_checkpoints.load_run(arms["overuse"])[0]
    state = checkpoints.load_checkpoint(arms["overuse"] / "checkpoint.pt")
    weights, trained = state["weights"], run_checkpoints.Trained(model)
    assert same(trained.state_dict(), weights) and not model.training and len(state["lm"]) > 900
    with pytest.raises(ValueError, match="does not hold the weights of the model"):
        trained.load_state_dict({k: v for k, v in weights.items() if "lora" not in k})
    monkeypatch.setattr(run_checkpoints, "backbone_fingerprint", lambda image: "another")
    with pytest.raises(ValueError, match="another backbone"):
        run_checkpoints.load_run(arms["overuse"])


def test_another_language_model_of_the_same_name_is_refused():
    lm, other = tiny_lm(), tiny_lm()
    other.get_output_embeddings().weight.data.neg_()
    state = {"lm": lm_sample(lm), "config": {"lm": "data/lm"}}
    for same_lm in (lm, lm.bfloat16()):
        run_checkpoints.check_lm(same_lm, state, "RUN")
    with pytest.raises(ValueError, match="another language model than data/lm"):
        run_checkpoints.check_lm(other, state, "RUN")


def test_transformers_loads_the_language_models_weights(arms: dict[str, Path], lm: Path):
    model = run_checkpoints.load_run(arms["whole-models"])[0]
    plain = texts.load_lm(str(lm))[0]
    for name, module in model.text.lm.named_modules():  # merged, LoRA is an ordinary Llama
        if isinstance(module, LoRALinear):
            plain.get_submodule(name).weight.data = (module.linear.weight + module.scale * module.B @ module.A).detach()
    ids = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(plain(ids).logits, model.text.lm(ids).logits, rtol=1e-4, atol=1e-5)
