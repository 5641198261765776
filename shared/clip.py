"""The text tower of open_clip's CLIP, without the positions that nothing reads."""

import functools

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def encode_text(clip: open_clip.CLIP, text: Tensor, normalize: bool = False) -> Tensor:
    """`open_clip.CLIP.encode_text` of token ids (B, L) -> (B, E), up to the batch's longest text instead of all L.

    Attention is causal and the end token is read, so the padding behind it changes nothing but the time. Towers that
    read or attend otherwise are open_clip's own.
    """
    if clip.text_pool_type != "argmax" or clip.attn_mask is None:
        return open_clip.CLIP.encode_text(clip, text, normalize)
    end = text.argmax(dim=-1)  # the end token has the highest id
    length, dtype = int(end.max()) + 1, clip.transformer.get_cast_dtype()
    x = clip.token_embedding(text[:, :length]).to(dtype) + clip.positional_embedding[:length].to(dtype)
    x = clip.transformer(x, attn_mask=clip.attn_mask[:length, :length])
    x = clip.ln_final(x[torch.arange(len(x), device=x.device), end])
    if clip.text_projection is not None:
        linear = isinstance(clip.text_projection, nn.Linear)
        x = clip.text_projection(x) if linear else x @ clip.text_projection
    return F.normalize(x, dim=-1) if normalize else x


def without_padding(model: nn.Module) -> nn.Module:
    """The model; if it is open_clip's CLIP, its `encode_text` is the one above."""
    if isinstance(model, open_clip.CLIP):
        model.encode_text = functools.partial(encode_text, model)
    return model
