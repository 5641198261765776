"""Weights from elsewhere: BLIP's and the authors' files, Hugging Face's BLIP, DeiT, BERT.

`U:` is showlab/datacentric.vlp@a488102:vq_compress_model/, `BLIP:` salesforce/BLIP@056a169.
"""

import math
import re
from pathlib import Path

from torch import Tensor, nn

from shared import run
from tldr_reduction.towers import TextTransformer, VisionTransformer, resize_pos_embed

HUGGING_FACE = (  # key patterns of transformers' BLIP -> BLIP's own, in this order
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"visual_encoder.blocks.\1."),
    (r"^text_decoder\.cls\.", "text_decoder.cls."),
)


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of transformers' BLIP (Salesforce/blip-itm-base-coco, -image-captioning-base) under BLIP's names."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in HUGGING_FACE:
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        renamed[key] = value
    if "visual_encoder.cls_token" in renamed:
        renamed["visual_encoder.cls_token"] = renamed["visual_encoder.cls_token"].view(1, 1, -1)
    return renamed


def load_blip(model: nn.Module, source: str | Path | dict) -> list[str]:
    """Load a BLIP or TL;DR checkpoint into a captioner or BLIP; returns the parameters that it lacked.

    Layouts: {"model": ...} (theirs), {"state_dict": ...} (ours), transformers' BLIP. Positions are resized to the
    model's grid; keys of other shapes are left out, as upstream does (U:models/blip.py:224-236), and so are keys that
    the model has no place for (the codebook in a captioner without one, momentum copies, queues).
    """
    state = run.load_checkpoint(source) if not isinstance(source, dict) else source
    state = state.get("model", state.get("state_dict", state))
    if any(key.startswith("vision_model.") for key in state):
        state = from_hugging_face(state)
    own = model.state_dict()
    if not set(own) & set(state):
        raise ValueError(f"{source} holds none of the model's parameters: it is no BLIP or TL;DR checkpoint")
    state = {key: value for key, value in state.items() if key in own}
    for key in [key for key in state if key.endswith("pos_embed")]:
        state[key] = resize_pos_embed(state[key], math.isqrt(own[key].shape[1] - 1))
    state = {key: value for key, value in state.items() if value.shape == own[key].shape}
    model.load_state_dict(state, strict=False)
    return sorted(set(own) - set(state))


def init_vision(tower: VisionTransformer, name: str) -> None:
    """Supervised ImageNet weights of a timm model (deit_base_patch16_224); the head is dropped. U:...compress.py:36."""
    import timm

    state = timm.create_model(name, pretrained=True).state_dict()
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], math.isqrt(tower.pos_embed.shape[1] - 1))
    tower.load_state_dict({key: state[key] for key in tower.state_dict()})


def init_text(tower: TextTransformer, name: str) -> None:
    """BERT's weights (bert-base-uncased) where BERT has them: not the cross-attention, not [DEC] and [ENC]."""
    import transformers

    state = transformers.AutoModel.from_pretrained(name).state_dict()
    own = tower.state_dict()
    for key, value in own.items():
        if key in state:
            rows = slice(len(state[key])) if "word_embeddings" in key else slice(None)
            value[rows].copy_(state[key])
