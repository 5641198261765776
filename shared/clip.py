"""open_clip's CLIP: a text tower that skips padding, tokens, the image size, activation checkpointing, no warnings."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from torch import Tensor, nn
from torch.utils.data import get_worker_info

import shared.convnet  # noqa: F401  (registers its network with timm)
from shared.accumulate import BatchNorm, recomputed
from shared.errors import UserError
from shared.features import PrecomputedFeatures  # likewise
from shared.run import say

open_clip.add_model_config(Path(__file__).parent / "model_configs")  # small towers

STATISTICS = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD  # mean and std of CLIP's images
GROUPS = 4  # groups of texts by length; on a CPU only, where time is proportional to the number of tokens


@contextlib.contextmanager
def quiet_open_clip() -> Iterator[None]:
    """Context that hides open_clip's warnings, such as that about random weights."""
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def open_clip_config(name: str) -> dict:
    """A copy of open_clip's config of this name. UserError if there is none."""
    config = open_clip.get_model_config(name)
    if config is None:
        raise UserError(f"model {name!r} is not an open_clip config; open_clip.list_models() lists the names")
    return config


def cuts(model: nn.Module) -> bool:
    """Whether the model's text tower ignores padding: attention is causal and the feature is that of the end token."""
    return isinstance(model, open_clip.CLIP) and model.text_pool_type == "argmax" and model.attn_mask is not None


def encode_text(clip: open_clip.CLIP, text: Tensor, normalize: bool = False) -> Tensor:
    """Like `open_clip.CLIP.encode_text`, token ids (B, L) -> (B, E), but without computing padding.

    Sorts texts by length and, on a CPU, splits them into groups; each group is computed up to its longest text. On a
    GPU, all L positions are computed in training, and if `trimmed` has cut the texts. Models for which `cuts` is False
    use open_clip's function.
    """
    if not cuts(clip):
        return getattr(open_clip.CLIP, "_encode_text", open_clip.CLIP.encode_text)(clip, text, normalize)
    end = text.argmax(dim=-1)  # the end token has the highest id
    dtype, pooled = clip.transformer.get_cast_dtype(), []
    end, order = end.sort(stable=True)
    # reading the length from a GPU would wait for all its queued work
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


def average_at_start(model: nn.Module) -> None:
    """Let a new text tower of one layer begin as the average of its tokens' embeddings, from which it learns faster.

    model: open_clip's CLIP or TextTransformer. Attention is uniform, its values and outputs are the identity; the MLP
    and the positions add nothing. Larger towers stay as they are.
    """
    if len(model.transformer.resblocks) > 1:
        return
    block, width = model.transformer.resblocks[0], model.ln_final.normalized_shape[0]
    with torch.no_grad():
        block.attn.in_proj_weight[:width].zero_()
        nn.init.eye_(block.attn.in_proj_weight[2 * width :])
        nn.init.eye_(block.attn.out_proj.weight)
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.zero_()
        model.positional_embedding.zero_()


def filled(text: Tensor) -> int:
    """Number of texts whose token ids (B, L) reach the last position; what does not fit of them is cut."""
    return int((text[:, -1] == text.max()).sum())  # the end token has the highest id


def say_filled(count: int, texts: int, length: int, what: str = "captions") -> None:
    """Print how many texts fill all positions, if more than one in a hundred do."""
    if count > texts / 100:
        say(f"{count:,} of {texts:,} {what} fill all {length} tokens of the text tower, and are cut there: CLIP's "
            "tokenizer is made for short English texts")  # fmt: skip


class RememberingTokenizer:
    """An open_clip tokenizer, texts -> ids (N, L), that caches about `size` texts, since tokenizing is slow.

    Calls `say_filled` once, for the different ones of the first `CHECKED` texts or more, in the first process.
    """

    CHECKED = 200

    def __init__(self, tokenizer: Callable, size: int = 2**14):
        self.tokenizer, self.size, self.known = tokenizer, size, {}
        self.seen = self.texts = self.filled = 0

    def __call__(self, texts: str | Sequence[str]) -> torch.Tensor:
        texts = [texts] if isinstance(texts, str) else texts
        before, self.seen = self.seen, self.seen + len(texts)
        if len(self.known) > self.size:
            self.known.clear()
        if new := [text for text in dict.fromkeys(texts) if text not in self.known]:
            ids = self.tokenizer(new)
            self.known |= zip(new, ids, strict=True)
            if before < self.CHECKED:
                self.texts, self.filled = self.texts + len(ids), self.filled + filled(ids)
        if before < self.CHECKED <= self.seen:
            self.say(len(self.known[texts[0]]))
        return torch.stack([self.known[text] for text in texts])

    def say(self, length: int) -> None:
        """`say_filled` of what was counted, in the first process."""
        worker = get_worker_info()
        if os.environ.get("RANK", "0") == "0" and not (worker and worker.id):
            say_filled(self.filled, self.texts, length)


def cut_padding(text: Tensor, device: torch.device) -> Tensor:
    """Token ids (B, L) on the CPU -> (B, length of the longest text) on the device, without waiting for a GPU."""
    length = int((text != 0).any(dim=0).nonzero()[-1]) + 1  # padding is 0
    return text.to(device, non_blocking=True)[:, :length]  # cut after the copy: a slice is not contiguous


def trimmed(text: Tensor, model: nn.Module, device: torch.device) -> Tensor:
    """Copy token ids (B, L) to the device, cut by `cut_padding` if the model's text tower ignores padding."""
    model = getattr(model, "module", model)  # of DistributedDataParallel
    return cut_padding(text, device) if cuts(model) else text.to(device, non_blocking=True)


def image_side(model: nn.Module) -> int:
    """Side in pixels of the model's square input images; open_clip stores a number or a pair."""
    size = model.visual.image_size
    return size[0] if isinstance(size, tuple) else size


def blank_inputs(model: nn.Module, samples: int = 2) -> tuple[Tensor, Tensor]:
    """Blank images, or features of a locked tower, and captions of full length, in the shapes of a training step."""
    side, trunk = image_side(model), getattr(model.visual, "trunk", None)
    shape = (trunk.num_features, 1, 1) if isinstance(trunk, PrecomputedFeatures) else (3, side, side)
    tokens = torch.ones(samples, model.context_length, dtype=torch.long)
    tokens[:, -1] = 2  # the end token, at the end
    return torch.zeros(samples, *shape), tokens


def without_padding(model: nn.Module) -> nn.Module:
    """The model; if it is open_clip's CLIP, its `encode_text` is replaced by the one above.

    The forward pass of open_clip 4 calls `_encode_text` instead.
    """
    if isinstance(model, open_clip.CLIP):
        model.encode_text = model._encode_text = functools.partial(encode_text, model)
    return model


def set_grad_checkpointing(model: nn.Module, on: bool = True) -> None:
    """Recompute the activations of every block in the backward pass instead of storing them.

    Works for modules with an attribute `grad_checkpointing` (transformers of open_clip and timm) and for open_clip's
    ResNet, which lacks it. UserError if the model has no such block, or one of timm's with batch norms, which would
    count every batch twice.
    """
    switches = [module for module in model.modules() if hasattr(module, "grad_checkpointing")]
    resnets = [module for module in model.modules() if isinstance(module, ModifiedResNet)]
    if on and not switches and not resnets:
        raise UserError(f"--grad-checkpointing: {type(model).__name__} has no blocks that can be recomputed")
    for module in switches:
        if on and any(isinstance(part, BatchNorm) for part in module.modules()):
            raise UserError(f"--grad-checkpointing: {type(module).__name__} has batch norms; leave it out")
        module.grad_checkpointing = on
    for resnet in resnets if on else ():
        resnet.stem = functools.partial(recomputed, resnet, resnet.stem)
        for block in (*resnet.layer1, *resnet.layer2, *resnet.layer3, *resnet.layer4):
            block.forward = functools.partial(recomputed, block, block.forward)
