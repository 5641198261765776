"""The CLIP that TinyCLIP (arXiv 2309.12314) teaches and shrinks: towers whose every width may differ from layer to
layer.

Authors' code: wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`. What is the paper's
here: gates
on hidden dimensions, heads and neurons (`Gates`, `gated_linear`, `LayerNorm`); a network without gates is a plain CLIP.
Parameter names are OpenAI's and open_clip's.

Shapes: B batch, S tokens, H width, L layers, h heads, d head width, I neurons of an MLP, D embedding.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Masks = Mapping[str, Tensor]  # hidden (H,), heads (L, h), intermediate (L, I), and maybe mha (L,), ffn (L,)

# ---------------------------------------------------------------------------------------------------------- geometries


def _config(embed_dim: int, vision: dict, text_width: int, text_heads: int, text_layers: int, **text) -> dict:
    text = {"context_length": 77, "vocab_size": 49408} | text
    text |= {"width": text_width, "heads": text_heads, "layers": text_layers}
    return {"embed_dim": embed_dim, "vision": vision, "text": text}


def _vit(width: int, layers: int, patch: int, image_size: int = 224, head_width: int = 64) -> dict:
    return {
        "image_size": image_size, "patch_size": patch, "width": width, "layers": layers, "head_width": head_width
    }  # fmt: skip


def _resnet(width: int) -> dict:
    return {"image_size": 224, "width": width, "layers": [3, 4, 6, 3], "head_width": 64}


_EMOJI_TEXT = {"context_length": 24}
CONFIGS: dict[str, dict] = {  # U:open_clip/model_configs/*.json; the emoji-* ones are ours
    "ViT-B-32": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "ViT-B-16": _config(512, _vit(768, 12, 16), 512, 8, 12),
    "RN50": _config(1024, _resnet(64), 512, 8, 12),
    "TinyCLIP-ViT-61M-32-Text-29M": _config(512, _vit(640, 12, 32), 512, 8, 9),
    "TinyCLIP-ViT-40M-32-Text-19M": _config(512, _vit(512, 12, 32), 512, 8, 6),
    "TinyCLIP-ViT-39M-16-Text-19M": _config(512, _vit(512, 12, 16), 512, 8, 6),
    "TinyCLIP-ViT-8M-16-Text-3M": _config(512, _vit(256, 10, 16), 256, 4, 3),
    "TinyCLIP-ResNet-30M-Text-29M": _config(1024, _resnet(56), 512, 8, 9),
    "TinyCLIP-ResNet-19M-Text-19M": _config(1024, _resnet(44), 512, 8, 6),
    # Automatic inheritance starts from ViT-B/32 with masks; the size in the name is what is left after pruning.
    "TinyCLIP-auto-ViT-63M-32-Text-31M": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "TinyCLIP-auto-ViT-45M-32-Text-18M": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "TinyCLIP-auto-ViT-22M-32-Text-10M": _config(512, _vit(768, 12, 32), 512, 8, 12),
    "emoji-100": _config(128, _vit(128, 6, 8, 40, 32), 128, 4, 4, **_EMOJI_TEXT),
    "emoji-50": _config(128, _vit(96, 6, 8, 40, 32), 128, 4, 2, **_EMOJI_TEXT),
    "emoji-25": _config(128, _vit(64, 6, 8, 40, 32), 128, 4, 1, **_EMOJI_TEXT),
}


def block_sizes(tower: Mapping) -> tuple[int, list[int], list[int | None]]:
    """(d, heads of each layer, neurons of each layer) of a transformer's `vision` or `text` dict.

    `heads` and `mlp_width` may be lists, as in pruned networks: 0 heads is a block without attention, None neurons one
    without MLP, and 0 neurons an MLP of which the bias is left.
    """
    layers, heads = tower["layers"], tower.get("heads")
    head_width = tower.get("head_width") or tower["width"] // heads
    heads = tower["width"] // head_width if heads is None else heads
    neurons = tower.get("mlp_width", 4 * tower["width"])
    spread = lambda x: list(x) if isinstance(x, (list, tuple)) else [x] * layers  # noqa: E731
    return head_width, spread(heads), spread(neurons)


# ---------------------------------------------------------------------------------------------------------------- gates


class Gates(NamedTuple):
    """One layer's share of the masks of a tower."""

    hidden: Tensor | None = None  # (H,) z_h, the same in all layers
    kept: Tensor | None = None  # (H,) bool, z_h != 0
    share: float = 1.0  # of the H dimensions that are kept
    heads: Tensor | None = None  # (h,)
    intermediate: Tensor | None = None  # (I,)
    mha: Tensor | None = None  # ()
    ffn: Tensor | None = None  # ()

    def rows(self, block: Tensor | None) -> Tensor | None:
        """(H,) or (): what multiplies the output of a block, z_h times its own gate."""
        return self.hidden if block is None else block if self.hidden is None else self.hidden * block


def gates(masks: Masks | None) -> Gates:
    """The gates that all layers share; `layer_gates` adds the others."""
    if not masks or "hidden" not in masks:
        return Gates()
    kept = masks["hidden"] != 0
    return Gates(masks["hidden"], kept, kept.float().mean().item())


def layer_gates(shared: Gates, masks: Masks | None, layer: int) -> Gates:
    return shared._replace(**{name: z[layer] for name, z in (masks or {}).items() if name != "hidden"})


def gated_linear(x: Tensor, linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """rows * (W (columns * x) + b). The gates go into W (out, in) and b, which are smaller than a batch's activations;
    pruning writes the same products down for good. U:open_clip/model.py:121, 238.
    """
    weight, bias = linear.weight, linear.bias
    if columns is not None:
        weight = weight * columns
    if rows is not None:
        weight, bias = weight * rows.reshape(-1, 1), bias * rows
    return F.linear(x, weight, bias)


class LayerNorm(nn.LayerNorm):
    """Over the kept dimensions only; the others are 0 in the input and stay 0. No gradient reaches z_h from here.

    The removed dimensions are set to the mean of the kept, so that the plain kernel finds the right mean, and a
    variance that is too small by the known factor `share`. U:open_clip/model.py:43 gathers and scatters instead.
    """

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        if gates is None or gates.kept is None or gates.share == 1.0:
            return super().forward(x)
        mean = x.sum(-1, keepdim=True) / (gates.share * x.shape[-1])
        x = torch.where(gates.kept, x, mean)
        weight = self.weight * (gates.kept * gates.share**0.5)
        return F.layer_norm(x, self.normalized_shape, weight, self.bias * gates.kept, self.eps * gates.share)


# --------------------------------------------------------------------------------------------------------------- towers


class Attention(nn.Module):
    """Self-attention of `heads` heads of width d, which need not fill the width H. U:open_clip/model.py:169, 238."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * heads * head_width))
        self.out_proj = nn.Linear(heads * head_width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool, gates: Gates) -> Tensor:
        """(B, S, H) -> (B, S, H): every head times z_head, the output with its bias times z_h."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)  # (B, h, S, d) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        columns = None if gates.heads is None else gates.heads.repeat_interleave(self.head_width)
        return gated_linear(out, self.out_proj, gates.rows(gates.mha), columns)


class MLP(nn.Module):
    def __init__(self, width: int, neurons: int, activation: nn.Module):
        super().__init__()
        self.c_fc, self.c_proj, self.activation = nn.Linear(width, neurons), nn.Linear(neurons, width), activation

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """(B, S, H) -> (B, S, H): every neuron times z_int, the output with its bias times z_h."""
        hidden = self.activation(self.c_fc(x))
        return gated_linear(hidden, self.c_proj, gates.rows(gates.ffn), gates.intermediate)


class Block(nn.Module):
    """x + attention, then x + MLP, either of which may have been pruned away. U:open_clip/model.py:208."""

    def __init__(self, width: int, heads: int, head_width: int, neurons: int | None, activation: nn.Module):
        super().__init__()
        self.ln_1 = LayerNorm(width) if heads else None
        self.attn = Attention(width, heads, head_width) if heads else None
        self.ln_2 = None if neurons is None else LayerNorm(width)
        self.mlp = None if neurons is None else MLP(width, neurons, activation)

    def forward(self, x: Tensor, causal: bool, gates: Gates) -> Tensor:
        if self.attn is not None:
            x = x + self.attn(self.ln_1(x, gates), causal, gates)
        if self.mlp is not None:
            x = x + self.mlp(self.ln_2(x, gates), gates)
        return x


class Transformer(nn.Module):
    def __init__(self, tower: Mapping, activation: nn.Module, causal: bool = False):
        super().__init__()
        head_width, heads, neurons = block_sizes(tower)
        sizes = zip(heads, neurons, strict=True)
        self.resblocks = nn.ModuleList(Block(tower["width"], h, head_width, n, activation) for h, n in sizes)
        self.causal, self.checkpointing = causal, False

    def forward(self, x: Tensor, shared: Gates, masks: Masks | None) -> Tensor:
        for i, block in enumerate(self.resblocks):
            layer = layer_gates(shared, masks, i)
            if self.checkpointing and self.training:
                x = checkpoint(block, x, self.causal, layer, use_reentrant=False)
            else:
                x = block(x, self.causal, layer)
        return x


class VisionTransformer(nn.Module):
    """Patches -> (B, D). U:open_clip/model.py:442."""

    def __init__(self, tower: Mapping, embed_dim: int, activation: nn.Module):
        super().__init__()
        width, patch, self.image_size = tower["width"], tower["patch_size"], tower["image_size"]
        if self.image_size % patch:
            raise ValueError(f"image_size {self.image_size} is no multiple of patch_size {patch}")
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (self.image_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = Transformer(tower, activation)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, image: Tensor, masks: Masks | None = None) -> Tensor:
        shared = gates(masks)
        x = self.conv1(image).flatten(2).transpose(1, 2)  # (B, S-1, H)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        if shared.hidden is not None:
            x = x * shared.hidden
        x = self.transformer(self.ln_pre(x, shared), shared, masks)
        return self.ln_post(x[:, 0], shared) @ self.proj


class CLIP(nn.Module):
    """Two towers and a temperature, OpenAI's parameter names; loads open_clip's ViT, QuickGELU and ResNet weights.

    vision: image_size, width, layers, and patch_size (ViT) or a list of four `layers` (ResNet); text: context_length,
    vocab_size, width, layers, heads. `block_sizes` says how a pruned network's layers are given.
    U:open_clip/model.py:1073.
    """

    def __init__(self, embed_dim: int, vision: Mapping, text: Mapping, quick_gelu: bool = False):
        super().__init__()
        self.geometry = {"embed_dim": embed_dim, "vision": dict(vision), "text": dict(text), "quick_gelu": quick_gelu}
        activation = QuickGELU() if quick_gelu else nn.GELU()
        if isinstance(vision["layers"], int):
            self.visual = VisionTransformer(vision, embed_dim, activation)
        else:
            width = vision["width"]
            heads = width * 32 // vision.get("head_width", 64)
            self.visual = ModifiedResNet(vision["layers"], embed_dim, heads, vision["image_size"], width)
        self.transformer = Transformer(text, activation, causal=True)
        self.token_embedding = nn.Embedding(text["vocab_size"], text["width"])
        self.positional_embedding = nn.Parameter(torch.empty(text["context_length"], text["width"]))
        self.ln_final = LayerNorm(text["width"])
        self.text_projection = nn.Parameter(torch.empty(text["width"], embed_dim))
        self.logit_scale = nn.Parameter(torch.tensor(1 / 0.07).log())
        self.init_text()

    def init_text(self) -> None:
        """OpenAI's initial text tower; the image towers have theirs at construction. U:open_clip/model.py:737."""
        width, layers = self.ln_final.normalized_shape[0], len(self.transformer.resblocks)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        nn.init.normal_(self.text_projection, std=width**-0.5)
        for block in self.transformer.resblocks:
            if block.attn is not None:
                nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
                nn.init.normal_(block.attn.out_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)
            if block.mlp is not None:
                nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
                nn.init.normal_(block.mlp.c_proj.weight, std=width**-0.5 * (2 * layers) ** -0.5)

    def encode_image(self, image: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """(B, 3, R, R) -> (B, D)."""
        if masks and not isinstance(self.visual, VisionTransformer):
            raise ValueError("masks act on transformers; a ResNet tower inherits by hand (inherit_weights)")
        features = self.visual(image, masks) if masks else self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """(B, S) int64 -> (B, D) at the end token, the largest id. U:open_clip/model.py:764.

        Attention is causal: what stands behind the last end token of the batch is not computed.
        """
        shared, end = gates(masks), text.argmax(dim=-1)
        length = min(int(end.max()) + 1, text.shape[1])
        x = self.token_embedding(text[:, :length]) + self.positional_embedding[:length]
        if shared.hidden is not None:
            x = x * shared.hidden
        x = self.transformer(x, shared, masks)
        features = self.ln_final(x[torch.arange(len(x), device=x.device), end], shared) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self, image: Tensor, text: Tensor, image_masks: Masks | None = None, text_masks: Masks | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features (B, D) of both, fp32 even under autocast, and exp(logit_scale)."""
        image_features = F.normalize(self.encode_image(image, image_masks).float(), dim=-1)
        text_features = F.normalize(self.encode_text(text, text_masks).float(), dim=-1)
        return image_features, text_features, self.logit_scale.exp()

    def set_grad_checkpointing(self, on: bool = True) -> None:
        """Recompute transformer blocks in the backward pass (ResNet towers keep their activations)."""
        for module in self.modules():
            if isinstance(module, Transformer):
                module.checkpointing = on


def create_model(name: str, quick_gelu: bool = False) -> CLIP:
    """A randomly initialised CLIP of one of `CONFIGS`."""
    if name not in CONFIGS:
        raise ValueError(f"model {name!r} is none of {', '.join(CONFIGS)}")
    return CLIP(**CONFIGS[name], quick_gelu=quick_gelu)


def parameter_counts(model: CLIP) -> dict[str, int]:
    """Parameters of the image tower, of the text tower with and without token embedding, and of all."""
    total, image = (sum(p.numel() for p in module.parameters()) for module in (model, model.visual))
    text, embedding = total - image - 1, model.token_embedding.weight.numel()
    return {"image": image, "text": text - embedding, "text_with_token_embedding": text, "total": total}


def named_towers(model: CLIP) -> Iterator[tuple[str, str, dict]]:
    """("image", "visual.", geometry) and ("text", "", geometry): the transformer towers, as keys name them."""
    if isinstance(model.visual, VisionTransformer):
        yield "image", "visual.", model.geometry["vision"]
    yield "text", "", model.geometry["text"]
