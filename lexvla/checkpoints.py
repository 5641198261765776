"""Save and load the trained weights of LexVLA; the frozen models are loaded from their own sources.

`weights` are `adapter.*`, `image.codebook`, `lora.<module>.A|B` and `logit_scale`; beside them are `vocab_ids`, `bias`,
a fingerprint of the image backbone and a sample of the language model's weights.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from lexvla.config import Config
from lexvla.model import ImageEncoder, LexVLA
from lexvla.text import Bags, Prompts, States, load_lm, of_same_lm
from lexvla.towers import create_model, text_input
from shared import checkpoints, data
from shared.errors import UserError


def _renamed(name: str) -> str:
    """Name of a parameter of LexVLA -> its name in a checkpoint."""
    for prefix, short in (("image.adapter.", "adapter."), ("text.lm.", "lora.")):
        if name.startswith(prefix):
            return short + name.removeprefix(prefix)
    return name


def backbone_fingerprint(image: ImageEncoder) -> str:
    """Fingerprint of the image backbone, which a checkpoint names but does not contain."""
    return data.fingerprint(*(x.cpu().numpy().tobytes() for x in image.backbone.state_dict().values()))


def check_lm(lm: nn.Module, state: dict, folder: str | Path) -> None:
    """UserError if `lm` is another LM than the checkpoint's."""
    if not of_same_lm(state["lm"], lm):
        raise UserError(f"{folder} was trained with another language model than {state['config']['lm']} holds now")


class Trained:
    """The trained weights of a model as one object of a checkpoint."""

    def __init__(self, model: LexVLA):
        self.model = model

    def state_dict(self) -> dict[str, Tensor]:
        """The trained weights, by their names in the checkpoint."""
        return {_renamed(name): p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def load_state_dict(self, weights: dict[str, Tensor]) -> None:
        """Copy weights into the model; UserError if they belong to another model."""
        own = self.state_dict()
        if own.keys() != weights.keys() or any(own[name].shape != weights[name].shape for name in own):
            raise UserError("the checkpoint does not hold the weights of the model that its configuration describes")
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def load_run(
    folder: str | Path,
    dtype: torch.dtype = torch.float32,
    config: type[Config] = Config,
    create: Callable[..., LexVLA] = create_model,
) -> tuple[LexVLA, Config, object, Prompts | Bags | States]:
    """(model in eval mode, its configuration, tokenizer, text input) of a run folder; `dtype` of the LM's weights.

    config, create: of a model other than LexVLA that the same script trained.
    """
    state = checkpoints.load_checkpoint(Path(folder) / "checkpoint.pt")
    if "weights" not in state or "vocab_ids" not in state:
        raise UserError(f"{folder}/checkpoint.pt is no LexVLA checkpoint")
    cfg = checkpoints.config_in(state, config, folder)
    lm, tokenizer = load_lm(cfg.lm, dtype)
    check_lm(lm, state, folder)
    model = create(cfg, lm, state["vocab_ids"], state["bias"])
    if backbone_fingerprint(model.image) != state["backbone"]:
        raise UserError(f"{folder} was trained on another backbone than {cfg.backbone} holds now")
    Trained(model).load_state_dict(state["weights"])
    return model.eval(), cfg, tokenizer, text_input(cfg, lm, tokenizer, state["vocab_ids"])
