"""open_clip's CLIP: its text tower without the positions that nothing reads, the side of its images, checkpointing."""

import functools

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

GROUPS = 4  # of texts of similar length, on a CPU, where time follows the number of tokens


def cuts(model: nn.Module) -> bool:
    """Whether padding changes nothing in the model's text tower: attention is causal and the end token is read."""
    return isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax" and model.attn_mask is not None


def encode_text(clip: open_clip.CLIP, text: Tensor, normalize: bool = False) -> Tensor:
    """`open_clip.CLIP.encode_text` of token ids (B, L) -> (B, E), without padding.

    Texts are sorted by length and cut into groups; each is computed up to its longest text instead of all L. On a GPU,
    texts of a training and those that `trimmed` has cut are taken as they come. Towers that `cuts` excludes are
    open_clip's own.
    """
    if not cuts(clip):
        return open_clip.CLIP.encode_text(clip, text, normalize)
    end = text.argmax(dim=-1)  # the end token has the highest id
    dtype, pooled = clip.transformer.get_cast_dtype(), []
    end, order = end.sort(stable=True)
    # to ask a GPU for the length would wait for all that it has to do
    stalls = text.is_cuda and (clip.training or text.shape[1] < clip.context_length)
    length = text.shape[1] if stalls else int(end[-1]) + 1
    embedded = clip.token_embedding(text[order, :length]).to(dtype) + clip.positional_embedding[:length].to(dtype)
    groups = GROUPS if text.device.type == "cpu" and len(text) >= 64 else 1
    for x, last in zip(embedded.tensor_split(groups), end.tensor_split(groups), strict=True):
        length = x.shape[1] if groups == 1 else int(last[-1]) + 1
        x = clip.transformer(x[:, :length], attn_mask=clip.attn_mask[:length, :length])
        pooled.append(x[torch.arange(len(x), device=x.device), last])
    x = clip.ln_final(torch.cat(pooled)[order.argsort()])
    if clip.text_projection is not None:
        linear = isinstance(clip.text_projection, nn.Linear)
        x = clip.text_projection(x) if linear else x @ clip.text_projection
    return F.normalize(x, dim=-1) if normalize else x


def cut_padding(text: Tensor, device: torch.device) -> Tensor:
    """Token ids (B, L) on the CPU -> on the device, up to their longest text: a GPU is not asked for its length."""
    length = int(text.argmax(dim=-1).max()) + 1  # the end token has the highest id
    return text.to(device, non_blocking=True)[:, :length]  # cut there: a part of pinned memory would be copied first


def trimmed(text: Tensor, model: nn.Module, device: torch.device) -> Tensor:
    """`cut_padding` of token ids (B, L), if `encode_text` of the model cuts them; else all on the device."""
    model = getattr(model, "module", model)  # of DistributedDataParallel
    return cut_padding(text, device) if cuts(model) else text.to(device, non_blocking=True)


def image_side(model: nn.Module) -> int:
    """Side in pixels of the square images that open_clip's model reads; it keeps a number or a pair."""
    size = model.visual.image_size
    return size[0] if isinstance(size, tuple) else size


def without_padding(model: nn.Module) -> nn.Module:
    """The model; if it is open_clip's CLIP, its `encode_text` is the one above."""
    if isinstance(model, open_clip.CLIP):
        model.encode_text = functools.partial(encode_text, model)
    return model


def set_grad_checkpointing(model: nn.Module, on: bool = True) -> None:
    """Compute the activations of every block again in the backward pass instead of keeping them.

    Of open_clip's and timm's towers, and others with a switch `grad_checkpointing`; of open_clip's ResNet, which has
    none, too. Where blocks have batch norms, the backward pass belongs inside `accumulate.frozen_statistics`.
    ValueError if the model has no such block.
    """
    switches = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    resnets = [module for module in model.modules() if isinstance(module, ModifiedResNet)]
    if on and not switches and not resnets:
        raise ValueError(f"--grad-checkpointing: {type(model).__name__} has no blocks that can be computed again")
    for module in switches:
        module.grad_checkpointing = on
    for resnet in resnets if on else ():
        resnet.stem = functools.partial(checkpoint, resnet.stem, use_reentrant=False)
        for block in (*resnet.layer1, *resnet.layer2, *resnet.layer3, *resnet.layer4):
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
