"""Load CLIP models that are evaluated or tag images: open_clip's, CyCLIP's and SLIP's checkpoint files, run folders.

`config.MODELS` lists the paper's models. Authors' code: bethgelab/frequency_determines_performance@11ef009, `U:`.
"""

from collections.abc import Callable
from pathlib import Path

import open_clip
import torch
import torchvision.transforms.v2 as transforms
from torch import Tensor, nn

from concept_frequency.assigned import plain_view
from concept_frequency.train import load_run
from shared import checkpoints, export
from shared.clip import image_side
from shared.data import ToNormalizedTensor
from shared.errors import UserError
from shared.evaluation import named


def load_model(name: str, pretrained: str, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
    """(model in eval mode, image transform, tokenizer) of an open_clip model, a checkpoint file, or any source that
    `shared.export.load_model` accepts. UserError if no such model exists."""
    if export.trained_by(name) == "concept_frequency":
        cfg, model = load_run(name, device)
        transform = plain_view(image_side(model))
        tokenizer = open_clip.get_tokenizer(cfg.model, context_length=model.context_length)
    elif known(name):
        model, transform, tokenizer = export.load_model(name)
    elif Path(pretrained).is_file():
        model, transform, tokenizer = load_file(name, pretrained)
    else:
        if open_clip.get_model_config(name) is None and not name.startswith("hf-hub:"):
            raise UserError(f"model {name!r} is not an open_clip config, a model of the paper or a run folder")
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                name, pretrained=pretrained or None, force_quick_gelu=pretrained == "openai"
            )
        except RuntimeError as error:
            raise UserError(f"{name}: {str(error).splitlines()[0]}") from error
        tokenizer = open_clip.get_tokenizer(name)
    return model.to(device).eval(), transform, tokenizer


def known(name: str) -> bool:
    """Whether `name` is MODEL@TAG, `local-dir:DIR` or a folder. Their scores are stored under this name."""
    return named(name) or name.startswith(export.LOCAL) or Path(name).is_dir()


def load_file(name: str, path: str) -> tuple[nn.Module, Callable, Callable]:
    """(model, image transform, tokenizer) of a checkpoint file in open_clip's or SLIP's layout.

    The weights may be under the key `state_dict`, and their names may begin with `module.`.
    """
    state = checkpoints.load_checkpoint(path)
    weights = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    if "image_projection" in weights:
        return slip(weights)
    model, _, transform = open_clip.create_model_and_transforms(name, load_weights=False)
    load_weights(model, weights, path, name)
    return model, transform, open_clip.get_tokenizer(name)


def load_weights(model: nn.Module, weights: dict[str, Tensor], path: str, name: str) -> None:
    """Load weights into a model. UserError names the file and the model if they do not match."""
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        why = str(error).splitlines()[-1].strip()[:200]
        raise UserError(f"{path} does not hold the weights of {name}: {why}") from error


def slip(weights: dict[str, Tensor]) -> tuple[nn.Module, Callable, Callable]:
    """CLIP of the SLIP repository (ViT-B-16 in the paper) as an open_clip model with timm's vision transformer.

    Source: U:src/slip/models.py. Projections are matrices (width, embed_dim); the text tower uses QuickGELU.
    """
    width, layers = weights["ln_final.weight"].shape[0], {key.split(".")[2] for key in weights if ".resblocks." in key}
    size = {384: "small", 768: "base", 1024: "large"}[weights["visual.cls_token"].shape[-1]]
    context, vocabulary = len(weights["positional_embedding"]), len(weights["token_embedding.weight"])
    side = 16 * round((weights["visual.pos_embed"].shape[1] - 1) ** 0.5)
    vision = {"timm_model_name": f"vit_{size}_patch16_224", "timm_pool": "token", "timm_proj": "linear"}
    text = {"context_length": context, "vocab_size": vocabulary, "width": width, "heads": width // 64}
    model = open_clip.CustomTextCLIP(
        weights["text_projection"].shape[1],
        vision | {"image_size": side},
        text | {"layers": len(layers)},
        quick_gelu=True,
    )
    state = {"logit_scale": weights["logit_scale"], "text.text_projection": weights["text_projection"]}
    for key, value in weights.items():
        if key == "image_projection":
            state["visual.head.proj.weight"] = value.T
        elif key.startswith("visual."):
            state[f"visual.trunk.{key.removeprefix('visual.')}"] = value
        elif key.startswith(("transformer.", "token_embedding.", "positional_embedding", "ln_final.")):
            state[f"text.{key}"] = value
    load_weights(model, state, "the checkpoint", "SLIP's CLIP")
    transform = transforms.Compose(
        [
            transforms.Resize(side),
            transforms.CenterCrop(side),
            ToNormalizedTensor((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    return model, transform, open_clip.SimpleTokenizer(context_length=context)
