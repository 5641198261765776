"""LexVLA: Unified Lexical Representation for Interpretable Visual-Language Alignment (arXiv 2407.17827, NeurIPS 2024).

The authors have released no code (Clementine24/LexVLA holds a README). Equations and sections are the camera-ready's;
`V:` is jzhoubu/VDR@12c3e7a and `S:` naver/splade@8dcd33a, predecessors that compute the same quantities. Anything that
the paper does not state is marked here and numbered in README.md. This file contains the paper's whole contribution:
  - an image and a caption as sparse, non-negative vectors over one vocabulary     `lexical_map`, `sparsify`
  - two codebooks over it: the LLM's own, frozen, and a trained copy for images    `TextEncoder`, `ImageEncoder`
  - the overuse penalty, so that words do not become mere shared dimensions        `overuse_penalty`
The in-context prompt and the vocabulary are in text.py.

Shapes: B batch, N samples, n = 1 + P image tokens ([CLS], patches), D backbone width, d lexical width, V words, T text
tokens.
"""

import functools
import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.nn
import torch.nn.functional as F
from timm.layers import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from lexvla import fast
from shared import run
from shared.errors import UserError

FAST = True  # eq. 4 and 5 by fast.py: the same numbers in less memory and to more digits

# ------------------------------------------------------------------------------------ lexical representation, eq. 2, 4


def elu1p(x: Tensor) -> Tensor:
    """x + 1 for x >= 0, e^x below: positive, with derivative 1 at 0. Below eq. 2; V:src/ir/utils/sparsify_utils.py:6.

    `F.elu(x) + 1`, as VDR has it, cancels to 0 below -17 in float32 and below -6 in bfloat16.
    """
    return torch.where(x >= 0, x + 1, x.clamp(max=0).exp())  # without the clamp, exp overflows in the unused branch


def lexical_map(z: Tensor, codebook: Tensor, pool: bool = False, bias: float = 0.0) -> Tensor:
    """s = normalize(elu1p(z Z^T + bias)): (.., d) -> (.., V), eq. 2. With a row of the text codebook as z: the
    representation of this word.

    With `pool`, z (B, n, d) -> (B, V): the maximum over tokens, eq. 4, taken before elu1p, which is increasing (as in
    V:src/ir/encoder/vdr_crossmodal_image.py:221). Float32 from elu1p on. `bias` is ours, 0 in the paper: a constant
    added to all logits changes elu1p, but no softmax, so a language model leaves it undetermined.
    """
    if pool and FAST:
        logits = fast.MaxLogits.apply(z, codebook)
    elif pool:
        logits = (z @ codebook.T).amax(dim=1)
    else:
        logits = z @ codebook.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) + bias
    # If all logits of a sample are negative, shift their maximum to 0, so that e^x cannot vanish: the norm cancels the
    # shift.
    return F.normalize(elu1p(logits - logits.detach().amax(-1, keepdim=True).clamp(max=0)), dim=-1)


def sparsify(s: Tensor, topk: int | None = None) -> Tensor:
    """Set weak words of s (.., V) to zero, section 3.1; the others keep their values, without renormalising.

    Keeps those above 1/sqrt(V), the entry of a uniform unit vector, or the `topk` largest, ties in favour of the first.
    Used in evaluation; the paper does not say that training is sparse, too. S:splade/utils/utils.py:74,
    V:src/ir/utils/sparsify_utils.py:8.
    """
    V = s.shape[-1]
    if topk is None:
        return s * (s > 1 / math.sqrt(V))
    if topk == 0 or topk >= V:
        return s * (topk > 0)
    kth = s.topk(topk).values[..., -1:]
    above, tied = s > kth, s == kth
    return s * (above | tied & (tied.cumsum(-1) <= topk - above.sum(-1, keepdim=True)))


# -------------------------------------------------------------------------------------------------- losses, eq. 5 to 8


# Losses are in float32 and over the batch of all processes: each rank scores its own pairs against the images and
# captions of all ranks, which are gathered with their gradients. The mean of the ranks' losses is the loss of the
# global batch, and the mean of their gradients, which DDP computes, is its gradient.


def contrastive_loss(s_img: Tensor, s_txt: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Eq. 5, InfoNCE image -> text and text -> image of this rank's pairs (B, V); logit_scale is ln(1/tau).

    LexVLA adds the two; CLIP takes their mean (V:src/ir/training/loss_utils.py:266).
    """
    info_nce = fast.info_nce if FAST else F.cross_entropy
    s_img, s_txt, scale = s_img.float(), s_txt.float(), logit_scale.float().exp()
    images, texts, own = run.gather(s_img), run.gather(s_txt), run.own_columns(s_img)
    to_text = scale * (s_img @ texts.T)  # (B, W*B)
    to_image = to_text.T if images is s_img else scale * (s_txt @ images.T)
    return info_nce(to_text, own), info_nce(to_image, own)


def mean_activation(s: Tensor) -> Tensor:
    """(V,) mean over the samples of the global batch, from this rank's (B, V); the gradient reaches those of all
    ranks."""
    m = s.float().mean(0)
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return m
    return torch.distributed.nn.all_reduce(m / dist.get_world_size())


def flops_loss(s: Tensor) -> Tensor:
    """Eq. 6 of (B, V): sum_j m_j^2, m_j the batch's mean activation. S:splade/losses/regularization.py:18."""
    return mean_activation(s).square().sum()


def overuse_penalty(s: Tensor) -> Tensor:
    """Eq. 7 of (B, V): V sum_j w_j m_j^2, w_j = m_j / sum_k m_k, so V sum m^3 / sum m.

    1 if all words are used alike, V if all samples use only one word (FLOPs: 1 in both cases). The gradient flows
    through w, which is part of the formula.
    """
    m = mean_activation(s)
    w = m / m.sum().clamp_min(torch.finfo(m.dtype).tiny)
    return len(m) * (w * m.square()).sum()


PENALTIES = {"overuse": overuse_penalty, "flops": flops_loss}


def total_loss(
    s_img: Tensor,
    s_txt: Tensor,
    logit_scale: Tensor,
    lambda_img: float,
    lambda_txt: float,
    penalty: str = "overuse",
) -> dict[str, Tensor]:
    """Eq. 8: L = l_i2t + l_t2i + lambda_I penalty(S_img) + lambda_T penalty(S_txt), of this rank's pairs (B, V).

    `penalty` is overuse, flops (the ablation) or none. Returns `loss` and its unweighted terms.
    """
    i2t, t2i = contrastive_loss(s_img, s_txt, logit_scale)
    losses = {"loss": i2t + t2i, "i2t": i2t, "t2i": t2i}
    if penalty != "none":
        for name, s, weight in (("image", s_img, lambda_img), ("text", s_txt, lambda_txt)):
            losses[f"{penalty}_{name}"] = PENALTIES[penalty](s)
            losses["loss"] = losses["loss"] + weight * losses[f"{penalty}_{name}"]
    return losses


# ------------------------------------------------------------------------------------------------------- LoRA, adapter


class LoRALinear(nn.Module):
    """y = x W^T + b + (alpha / r) x A^T B^T, with W and b frozen and B = 0 at first (section 3.3)."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.linear, self.scale = linear.requires_grad_(False), alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)


LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(
    module: nn.Module, rank: int = 8, alpha: float = 16, targets: tuple[str, ...] = LLAMA_LINEARS
) -> nn.Module:
    """Replace, in place, linear layers whose name ends in one of `targets` by `LoRALinear`; freeze everything else.

    Rank, alpha and targets are not stated in the paper; these give its 0.30 % of Llama 2. They leave out lm_head, which
    is the text codebook. UserError if no layer has such a name.
    """
    module.requires_grad_(False)
    found = [(name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear)]
    found = [(name, m) for name, m in found if name.rpartition(".")[2] in targets]
    if not found:
        raise UserError(f"--lora-rank: none of {', '.join(targets)} is a linear layer of this {type(module).__name__}")
    for name, linear in found:
        parent, _, child = name.rpartition(".")
        setattr(module.get_submodule(parent), child, LoRALinear(linear, rank, alpha))
    return module


class VisualAdapter(nn.Module):
    """g_img, section 3.2.2: "a self-attention layer and 2 multi-layer perceptrons", (B, n, D) -> (B, n, d).

    Not stated in the paper: the layout. A pre-norm transformer block (attention, first MLP), then a two-layer MLP D ->
    `hidden` -> d; at 768, 12 heads, 2,048 and 4,096 these are 17.06M parameters, and the paper has 17M. Tokens of
    another width, `in_dim`, are mapped to D first, which is ours.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int, out_dim: int, in_dim: int | None = None):
        super().__init__()
        self.reduce = nn.Identity() if in_dim in (None, dim) else nn.Linear(in_dim, dim)
        self.block = Block(dim, num_heads, qkv_bias=True, norm_layer=functools.partial(nn.LayerNorm, eps=1e-6))
        self.proj = Mlp(dim, hidden, out_dim)

    def forward(self, y: Tensor) -> Tensor:
        return self.proj(self.block(self.reduce(y)))


# -------------------------------------------------------------------------------------------------------------- towers


class ImageEncoder(nn.Module):
    """Pixels -> frozen backbone -> adapter -> eq. 4, with an image codebook of its own, trained from a copy.

    `backbone`: a transformers ViT (Dinov2Model) or a timm one, read after the final LayerNorm. It stays in eval mode.
    [CLS] is one of the tokens of the maximum, as in eq. 3 and 4; the text's "image patch token" would leave it out.
    """

    def __init__(self, backbone: nn.Module, adapter: nn.Module, codebook: Tensor, bias: float = 0.0):
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.adapter = adapter
        self.codebook = nn.Parameter(codebook.detach().float().clone())  # (V, d) Z_img
        self.bias = bias
        self.train(self.training)

    def train(self, mode: bool = True) -> "ImageEncoder":
        super().train(mode)
        self.backbone.eval()  # no drop path in the frozen backbone
        return self

    @torch.no_grad()
    def frozen(self, pixels: Tensor) -> Tensor:
        """y_img (B, n, D), the backbone's tokens after its final norm; token 0 is [CLS]."""
        if hasattr(self.backbone, "forward_features"):  # timm
            return self.backbone.forward_features(pixels)
        return self.backbone(pixel_values=pixels).last_hidden_state

    def tokens(self, pixels: Tensor) -> Tensor:
        """z_img (B, n, d), eq. 3, of pixels (B, 3, H, W)."""
        return self.adapter(self.frozen(pixels))

    def forward(self, pixels: Tensor) -> Tensor:
        """s_img (B, V)."""
        return lexical_map(self.tokens(pixels), self.codebook, pool=True, bias=self.bias)

    def patches(self, pixels: Tensor) -> Tensor:
        """s_patch (B, P, V): each patch alone, without pooling (section 3.4)."""
        return lexical_map(self.tokens(pixels)[:, 1:], self.codebook, bias=self.bias)

    def patch_set(self, pixels: Tensor, chosen: Tensor) -> Tensor:
        """s (B, V) of a set of patches, chosen (B, P) bool, at least one of each image: eq. 4 restricted to the set."""
        first = chosen.long().argmax(dim=1, keepdim=True)  # takes the other patches' places: the maximum is the same
        index = torch.where(chosen, torch.arange(chosen.shape[1], device=chosen.device), first).to(pixels.device)
        z = self.tokens(pixels)[:, 1:]
        z = z.gather(1, index[..., None].expand_as(z))
        return lexical_map(z, self.codebook, pool=True, bias=self.bias)


def last_token(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, T, d) at the last position that is not padding, on either side: (B, d)."""
    position = torch.arange(1, attention_mask.shape[1] + 1, device=attention_mask.device)
    last = (attention_mask * position).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


class TextEncoder(nn.Module):
    """Prompt -> LLM -> last token -> eq. 2 over the LLM's own output embedding, frozen and reduced to `vocab_ids`.

    `lm`: a causal LM of transformers, with or without `add_lora`. z_txt is its state after the final norm at the last
    token, which predicts the next token; there is no pooling over text tokens.
    """

    def __init__(self, lm: nn.Module, vocab_ids: Tensor, bias: float = 0.0):
        super().__init__()
        self.lm, self.bias = lm, bias
        for name, parameter in lm.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("A", "B"))
        head = lm.get_output_embeddings().weight
        self.register_buffer("vocab_ids", vocab_ids)
        self.register_buffer("codebook", head.detach()[vocab_ids.to(head.device)].float())  # (V, d) Z_txt
        self.train(self.training)

    def train(self, mode: bool = True) -> "TextEncoder":
        super().train(mode)
        checkpointing = any(getattr(module, "gradient_checkpointing", False) for module in self.lm.modules())
        self.lm.train(mode and checkpointing)  # transformers recomputes blocks only in train mode
        return self

    def hidden(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """z_txt (B, d) of token ids (B, T). What is padding in all texts, on the right, is cut off."""
        length = int(attention_mask.any(0).nonzero()[-1]) + 1
        input_ids, attention_mask = input_ids[:, :length], attention_mask[:, :length]
        output = self.lm.model(input_ids, attention_mask=attention_mask, use_cache=False)
        return last_token(output.last_hidden_state, attention_mask)

    def forward(self, *text: Tensor) -> Tensor:
        """s_txt (B, V) of what `hidden` takes."""
        return self.represent(self.hidden(*text))

    def represent(self, z: Tensor) -> Tensor:
        """Representations (.., V) of states z (.., d), eq. 2."""
        return lexical_map(z, self.codebook, bias=self.bias)

    def word(self, ids: Tensor) -> Tensor:
        """Representations of single words, given their codebook rows: (..) -> (.., V)."""
        return self.represent(self.codebook[ids])


class LastMLPTextEncoder(TextEncoder):
    """The text tower if LoRA adapts only the LM's last MLP: what comes before is frozen and computed once (text.py)."""

    def hidden(self, states: Tensor) -> Tensor:
        """z_txt (B, d) of `states` (B, d): the last block's residual stream between attention and MLP, last token."""
        block = self.lm.model.layers[-1]
        return self.lm.model.norm(states + block.mlp(block.post_attention_layernorm(states)))


class BagOfWords(nn.Module):
    """The text side of the ablation without an LLM: returns its input, (B, V) of `bag_of_words`."""

    def __init__(self, vocab_ids: Tensor):
        super().__init__()
        self.register_buffer("vocab_ids", vocab_ids)

    def forward(self, s: Tensor) -> Tensor:
        return s

    def word(self, ids: Tensor) -> Tensor:
        """Representations of single words: (..) -> (.., V) one-hot."""
        return F.one_hot(ids, len(self.vocab_ids)).float()


class Output(NamedTuple):
    s_img: Tensor
    """(B, V)"""
    s_txt: Tensor
    """(B, V)"""
    logit_scale: Tensor
    """ln(1/tau)"""


class LexVLA(nn.Module):
    """Both towers and the temperature: ln(1/tau) from ln(1/0.07), capped by `clamp_logit_scale`."""

    def __init__(self, image: nn.Module, text: nn.Module):
        super().__init__()
        self.image, self.text = image, text
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def forward(self, pixels: Tensor, *text: Tensor) -> Output:
        """Pixels (B, 3, H, W), and text in the text tower's input format."""
        return Output(self.image(pixels), self.text(*text), self.logit_scale)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Cap 1/tau at 100; called after every step (inside the forward pass, the gradient would be 0 at the cap)."""
        self.logit_scale.clamp_(max=math.log(100))
