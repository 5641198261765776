"""Write a run's towers as a model that open_clip loads: `python -m attentive_mask_clip.eval RUN --export FOLDER`."""

from pathlib import Path

from torch import Tensor

from attentive_mask_clip.crops import MEAN, STD, eval_transform
from attentive_mask_clip.model import ACLIP, CLIP, PRESETS, Towers
from shared import checkpoints, export

TIMM_TOWERS = {"vit_b16": "vit_base_patch16_224", "vit_l16": "vit_large_patch16_224"}  # our presets: timm's names


def open_clip_weights(model: CLIP) -> dict[str, Tensor]:
    """The evaluated towers with open_clip's key names: a timm image tower with a linear head, and CLIP's text tower."""
    ema = isinstance(model, ACLIP)
    visual, transformer = (model.visual_ema, model.transformer_e) if ema else (model.visual, model.transformer)
    image_projection, text_projection = (
        (model.image_projection_e, model.text_projection_e) if ema else (model.image_projection, model.text_projection)
    )
    return {
        **{f"visual.trunk.{name}": value for name, value in visual.state_dict().items()},
        "visual.head.proj.weight": image_projection.T,
        **{f"transformer.{name}": value for name, value in transformer.state_dict().items()},
        "token_embedding.weight": model.token_embedding.weight,
        "positional_embedding": model.positional_embedding,
        **{f"ln_final.{name}": value for name, value in model.ln_final.state_dict().items()},
        "text_projection": text_projection,
        "logit_scale": model.logit_scale,
    }


def export_model(model: CLIP, folder: str | Path) -> None:
    """Write the towers that evaluation uses as an open_clip model.

    timm knows the paper's ViT-B and ViT-L by name. For other shapes a config.json in the folder describes the tower.
    open_clip_config.json contains the folder's absolute path: change it there if you move the folder.
    """
    visual, text = model.visual, model.transformer
    shape = {
        "img_size": model.image_size,
        "patch_size": model.patch_size,
        "embed_dim": visual.cls_token.shape[-1],
        "depth": len(visual.blocks),
        "num_heads": visual.blocks[0].attn.num_heads,
    }
    name = next((TIMM_TOWERS[preset] for preset in TIMM_TOWERS if same_shape(shape, PRESETS[preset])), None)
    if name is None:
        name = f"local-dir:{Path(folder).resolve()}"
        Path(folder).mkdir(parents=True, exist_ok=True)
        tower = {"architecture": "vit_base_patch16_224", "pretrained_cfg": {"num_classes": 0}, "model_args": shape}
        checkpoints.write_json(Path(folder) / "config.json", tower)
    width = model.token_embedding.embedding_dim
    config = {
        "embed_dim": model.image_projection.shape[1],
        "quick_gelu": True,  # of the text tower; timm's has GELU
        "vision_cfg": {"timm_model_name": name, "timm_pool": "token", "image_size": model.image_size},
        "text_cfg": {
            "context_length": model.context_length,
            "vocab_size": model.token_embedding.num_embeddings,
            "width": width,
            "heads": text.resblocks[0].attn.num_heads,
            "layers": len(text.resblocks),
        },
    }
    transform = eval_transform(model.image_size)
    bilinear = {"mean": MEAN, "std": STD, "interpolation": "bilinear"}
    export.write(folder, Towers(model), config, open_clip_weights(model), transform, **bilinear)


def same_shape(shape: dict, preset: dict) -> bool:
    """Whether a tower has the shape of the preset's timm model, at 224 pixels in patches of 16."""
    paper = [224, 16, *(preset[f"vision_{name}"] for name in ("width", "layers", "heads"))]
    return list(shape.values()) == paper
