"""TinyCLIP: CLIP Distillation via Affinity Mimicking and Weight Inheritance (ICCV 2023, arXiv 2309.12314).

Authors' code: wkcn/TinyCLIP@ad981bf, cited below as `U:<path>:<line>` with paths under its `src/`.
The paper's contribution:
  - affinity mimicking: the student's image-text similarities follow the teacher's    `affinity_mimicking_loss`
  - weight inheritance, by hand or by learned masks                                  inheritance.py, masks.py
  - gates on hidden dimensions, heads and neurons of both towers                     `gated_linear`, `LayerNorm`
  - progressive distillation in stages of moderate compression                       train.py, config.py `PRESETS`
A network without gates is a plain CLIP with OpenAI's and open_clip's parameter names.

Shapes: B pairs of a process, N pairs of all W processes, D and D' the student's and teacher's embedding; S tokens, H
width, L layers, h heads, d head width, I neurons of an MLP (README: d, N_H, d_h, d_f); z are masks (README: m).
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared import checkpoints, run
from shared.convnet import ConvNet
from shared.errors import UserError
from shared.evaluation import named
from tinyclip.geometry import (
    CONFIGS,
    block_sizes,
    config_beside,
    config_of_trainer,
    convert_state_dict,
    geometry_of_weights,
    of_transformers,
    weights_file,
)
from tinyclip.masks import L0Mask, Masks, prune

Gather = Callable[[Tensor], Tensor]
OPEN_CLIP = ("ViT-B-32", "ViT-B-16", "RN50")  # open_clip's models that `load_clip` loads by name
GROUPS = 4  # of texts of similar length; used on a CPU, where time is proportional to the number of tokens

# --------------------------------------------------------------------------------------------------------------- losses


def affinity_logits(
    image: Tensor, text: Tensor, scale: Tensor | float, gather: Gather | None, left_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A = s I T^T and s T I^T, (B, N) each in fp32: this process's samples (rows) against those of all processes; their
    softmax over a row is the paper's equations 2 and 3, with s = 1 / tau.

    Where `left_out` (B, N) is True, the entry is the smallest number, so that a softmax over a row is 0 there.
    """
    image, text = image.float(), text.float()
    if gather is None:
        to_text = scale * image @ text.T
        to_image = to_text.T
    else:
        to_text, to_image = scale * image @ gather(text).T, scale * text @ gather(image).T
    if left_out is not None:
        least = torch.finfo(torch.float32).min
        to_text, to_image = to_text.masked_fill(left_out, least), to_image.masked_fill(left_out, least)
    return to_text, to_image


def affinity_mimicking_loss(
    image: Tensor, text: Tensor, scale: Tensor | float,
    teacher_image: Tensor, teacher_text: Tensor, teacher_scale: Tensor | float, gather: Gather | None = None,
    left_out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(L_i2t, L_t2i): cross entropy of the student's affinities with the teacher's as soft targets (section 3.1,
    equation 1). U:open_clip/clip_soft_loss.py:54.

    L_i2t = -1/B sum_i sum_j softmax(A')_ij log softmax(A)_ij, with A (B, N) from unit features (B, D) and A' from the
    teacher's (B, D'). The mean over processes is the loss on all N pairs. For a student equal to the teacher the loss
    is the teacher's entropy, not 0.
    """
    to_text, to_image = affinity_logits(image, text, scale, gather, left_out)
    with torch.no_grad():
        targets = affinity_logits(teacher_image, teacher_text, teacher_scale, gather, left_out)
        text_targets, image_targets = (x.softmax(dim=1) for x in targets)
    return F.cross_entropy(to_text, text_targets), F.cross_entropy(to_image, image_targets)


def clip_loss(
    image: Tensor, text: Tensor, scale: Tensor | float, gather: Gather | None = None, left_out: Tensor | None = None
) -> Tensor:
    """L_CLIP, symmetric InfoNCE of unit features (B, D); row i has label rank * B + i. U:open_clip/loss.py:109."""
    to_text, to_image = affinity_logits(image, text, scale, gather, left_out)
    labels = run.own_columns(image, gathered=gather is not None)
    return (F.cross_entropy(to_text, labels) + F.cross_entropy(to_image, labels)) / 2


def equal_captions(tokens: Tensor, gather: Gather | None = None) -> Tensor:
    """(B, N) bool: True at (i, j) if sample j of the global batch is not sample i of this process but has its caption.

    tokens: (B, S), with the same S on all processes.
    """
    equal = (tokens[:, None] == (tokens if gather is None else gather(tokens))).all(dim=-1)
    return equal.scatter(1, run.own_columns(tokens, gathered=gather is not None)[:, None], False)


def distillation_loss(
    image: Tensor, text: Tensor, scale: Tensor | float,
    teacher_image: Tensor, teacher_text: Tensor, teacher_scale: Tensor | float,
    alpha: float = 1.0, weight: float = 1.0, gather: Gather | None = None, left_out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """L = w alpha (L_i2t + L_t2i) / 2 + w (1 - alpha) L_CLIP, without terms of weight 0. U:training/train.py:161.

    Equation 1 does not halve the sum.
    """
    loss = image.new_zeros((), dtype=torch.float32)
    if alpha > 0:
        teacher = teacher_image, teacher_text, teacher_scale
        loss = loss + weight * alpha * sum(affinity_mimicking_loss(image, text, scale, *teacher, gather, left_out)) / 2
    if alpha < 1:
        loss = loss + weight * (1 - alpha) * clip_loss(image, text, scale, gather, left_out)
    return loss


# ---------------------------------------------------------------------------------------------------------------- gates


class Gates(NamedTuple):
    """The masks of one layer of a tower."""

    hidden: Tensor | None = None  # (H,) z_h, the same in all layers
    kept: Tensor | None = None  # (H,) bool, z_h != 0
    share: Tensor | float = 1.0  # share of kept dimensions; on a GPU a tensor (), to avoid synchronisation
    heads: Tensor | None = None  # (h,)
    intermediate: Tensor | None = None  # (I,)
    mha: Tensor | None = None  # ()
    ffn: Tensor | None = None  # ()

    def output(self, block_gate: Tensor | None) -> Tensor | None:
        """(H,) or (): factor of a block's output, z_h times the block's own gate; None without both."""
        if self.hidden is None or block_gate is None:
            return block_gate if self.hidden is None else self.hidden
        return self.hidden * block_gate


def shared_gates(masks: Masks | None) -> Gates:
    """The gates that all layers share; `layer_gates` adds those of a layer."""
    if not masks or "hidden" not in masks:
        return Gates()
    kept = masks["hidden"] != 0
    share = kept.float().mean()
    return Gates(masks["hidden"], kept, share if share.is_cuda else share.item())


def layer_gates(shared: Gates, masks: Masks | None, layer: int) -> Gates:
    return shared._replace(**{name: z[layer] for name, z in (masks or {}).items() if name != "hidden"})


def gated_linear(x: Tensor, linear: nn.Linear, rows: Tensor | None = None, columns: Tensor | None = None) -> Tensor:
    """rows * (W (columns * x) + b). The gates multiply W (out, in) and b, which are smaller than a batch's activations;
    pruning stores the same products as weights. U:open_clip/model.py:121, 238.
    """
    weight, bias = linear.weight, linear.bias
    if columns is not None:
        weight = weight * columns
    if rows is not None:
        weight, bias = weight * rows.reshape(-1, 1), bias * rows
    return F.linear(x, weight, bias)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the kept dimensions; the others are 0 in the input and stay 0. No gradient reaches z_h from here.

    The removed dimensions are set to the mean of the kept ones, and the kept ones' deviations are scaled by
    share^-1/2, so that the plain kernel computes the correct mean and variance. U:open_clip/model.py:43 gathers and
    scatters instead.
    """

    def forward(self, x: Tensor, gates: Gates | None = None) -> Tensor:
        if gates is None or gates.kept is None or (isinstance(gates.share, float) and gates.share == 1.0):
            return super().forward(x)
        kept, scale = gates.kept.to(x.dtype), gates.share**0.5
        mean = x.sum(-1, keepdim=True) / (gates.share * x.shape[-1])
        x = torch.lerp(mean, x, kept / scale)
        return F.layer_norm(x, self.normalized_shape, self.weight * kept * scale, self.bias * kept, self.eps)


# --------------------------------------------------------------------------------------------------------------- towers


class Attention(nn.Module):
    """Self-attention; `heads` times d need not equal the width H. U:open_clip/model.py:169, 238."""

    def __init__(self, width: int, heads: int, head_width: int):
        super().__init__()
        self.heads, self.head_width = heads, head_width
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * heads * head_width))
        self.out_proj = nn.Linear(heads * head_width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, causal: bool, gates: Gates) -> Tensor:
        """(B, S, H) -> (B, S, H): every head times z_head (equation 4), the output with its bias times z_h."""
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, self.heads, self.head_width)).permute(2, 0, 3, 1, 4)  # (B, h, S, d) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
        columns = None if gates.heads is None else gates.heads.repeat_interleave(self.head_width)
        return gated_linear(out, self.out_proj, gates.output(gates.mha), columns)


class MLP(nn.Module):
    def __init__(self, width: int, neurons: int, activation: nn.Module):
        super().__init__()
        self.c_fc, self.c_proj, self.activation = nn.Linear(width, neurons), nn.Linear(neurons, width), activation

    def forward(self, x: Tensor, gates: Gates) -> Tensor:
        """(B, S, H) -> (B, S, H): every neuron times z_int (equation 5), the output with its bias times z_h."""
        hidden = self.activation(self.c_fc(x))
        return gated_linear(hidden, self.c_proj, gates.output(gates.ffn), gates.intermediate)


class Block(nn.Module):
    """x + attention, then x + MLP; pruning can remove either of them. U:open_clip/model.py:208."""

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
        self.causal, self.grad_checkpointing = causal, False

    def forward(self, x: Tensor, shared: Gates, masks: Masks | None) -> Tensor:
        for i, block in enumerate(self.resblocks):
            layer = layer_gates(shared, masks, i)
            if self.grad_checkpointing and self.training:
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
            raise UserError(f"image_size {self.image_size} is not a multiple of patch_size {patch}")
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        tokens = (self.image_size // patch) ** 2 + 1
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(tokens, width))
        self.ln_pre, self.ln_post = LayerNorm(width), LayerNorm(width)
        self.transformer = Transformer(tower, activation)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))

    def forward(self, image: Tensor, masks: Masks | None = None) -> Tensor:
        shared = shared_gates(masks)
        x = self.conv1(image).flatten(2).transpose(1, 2)  # (B, S-1, H)
        x = torch.cat([self.class_embedding.to(x.dtype).expand(len(x), 1, -1), x], dim=1)
        x = x + self.positional_embedding.to(x.dtype)
        if shared.hidden is not None:
            x = x * shared.hidden
        x = self.transformer(self.ln_pre(x, shared), shared, masks)
        return self.ln_post(x[:, 0], shared) @ self.proj


class ConvTower(nn.Module):
    """`shared.convnet`'s network with channels scaled by `width` -> (B, D): for small images on a CPU, where
    `ModifiedResNet` is slow. Its flattened maps lie channel by channel: a front slice has the front channels."""

    def __init__(self, tower: Mapping, embed_dim: int):
        super().__init__()
        self.image_size = tower["image_size"]
        self.trunk = ConvNet(width=tower["width"])
        channels = self.trunk.num_features
        self.proj = nn.Parameter(channels**-0.5 * torch.randn(channels, embed_dim))

    def forward(self, image: Tensor) -> Tensor:
        return self.trunk(image) @ self.proj


class CLIP(nn.Module):
    """Two towers and a temperature, with OpenAI's parameter names; loads open_clip's ViT, QuickGELU and ResNet weights.

    vision: image_size, width, layers, and patch_size (ViT), a list of four `layers` (ResNet), or `block` (a
    `ConvTower`); text: context_length, vocab_size, width, layers, heads. For pruned networks see `block_sizes`.
    U:open_clip/model.py:1073.
    """

    def __init__(self, embed_dim: int, vision: Mapping, text: Mapping, quick_gelu: bool = False):
        super().__init__()
        self.context_length = text["context_length"]
        self.geometry = {"embed_dim": embed_dim, "vision": dict(vision), "text": dict(text), "quick_gelu": quick_gelu}
        activation = QuickGELU() if quick_gelu else nn.GELU()
        if isinstance(vision["layers"], int):
            self.visual = VisionTransformer(vision, embed_dim, activation)
        elif "block" in vision:
            self.visual = ConvTower(vision, embed_dim)
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
        self.cuts_padding = True  # False if texts come without padding
        self.init_text()

    def init_text(self) -> None:
        """OpenAI's text tower initialisation; image towers are initialised in __init__. U:open_clip/model.py:737."""
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
            raise UserError("masks act on transformers, not on a ResNet")
        features = self.visual(image, masks) if masks else self.visual(image)
        return F.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, masks: Masks | None = None, normalize: bool = False) -> Tensor:
        """(B, S) int64 -> (B, D) at the end token, the largest id. U:open_clip/model.py:764.

        Attention is causal, so positions after the last end token of the batch need not be computed. In training on a
        GPU, `cut_padding` has already cut them, to avoid synchronisation. On a CPU, texts are grouped by length, and
        each group is cut to its longest text.
        """
        shared, end = shared_gates(masks), text.argmax(dim=-1)
        cuts = self.cuts_padding and not (text.is_cuda and self.training)
        length = int(end.max()) + 1 if cuts else text.shape[1]
        groups = GROUPS if text.device.type == "cpu" and len(text) >= 64 else 1
        if groups > 1:
            end, order = end.sort(stable=True)
            text = text[order]
        x = self.token_embedding(text[:, :length]) + self.positional_embedding[:length]
        if shared.hidden is not None:
            x = x * shared.hidden
        pooled = []
        for hidden, ends in zip(x.tensor_split(groups), end.tensor_split(groups), strict=True):
            hidden = hidden if groups == 1 else hidden[:, : int(ends[-1]) + 1]
            hidden = self.transformer(hidden, shared, masks)
            pooled.append(hidden[torch.arange(len(hidden), device=hidden.device), ends])
        pooled = torch.cat(pooled) if groups == 1 else torch.cat(pooled)[order.argsort()]
        features = self.ln_final(pooled, shared) @ self.text_projection
        return F.normalize(features, dim=-1) if normalize else features

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_masks: Masks | None = None,
        text_masks: Masks | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features (B, D) of images and texts, fp32 even under autocast, and exp(logit_scale)."""
        image_features = F.normalize(self.encode_image(image, image_masks).float(), dim=-1)
        text_features = F.normalize(self.encode_text(text, text_masks).float(), dim=-1)
        return image_features, text_features, self.logit_scale.exp()


class Student(nn.Module):
    """A CLIP with the masks of its towers while they are learned, and without masks afterwards."""

    def __init__(self, clip: CLIP, image_mask: L0Mask | None = None, text_mask: L0Mask | None = None):
        super().__init__()
        self.clip, self.image_mask, self.text_mask = clip, image_mask, text_mask

    @property
    def masks(self) -> list[L0Mask]:
        return [mask for mask in (self.image_mask, self.text_mask) if mask is not None]

    def uniforms(self) -> dict[str, dict[str, Tensor]] | None:
        """The uniform numbers of one draw of both masks, for all micro-batches of a step; None without masks."""
        return {"image": self.image_mask.uniforms(), "text": self.text_mask.uniforms()} if self.masks else None

    def tower_masks(self, u: dict[str, dict[str, Tensor]] | None = None) -> list[Masks | None]:
        """Masks of (image, text): in training samples by the uniform numbers `u`; else as in `eval_masks`."""
        if not self.masks:
            return [None, None]
        if not self.training:
            return self.eval_masks()
        return [self.image_mask.sample(u["image"]), self.text_mask.sample(u["text"])]

    def forward(self, images: Tensor, tokens: Tensor, u: dict | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """As `CLIP.forward`, with the masks; `u`: see `uniforms`."""
        return self.clip(images, tokens, *self.tower_masks(u))

    def encode_image(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images, self.tower_masks()[0])

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.clip.encode_text(tokens, self.tower_masks()[1])

    def eval_masks(self) -> list[Masks]:
        """(image, text): the deterministic masks of evaluation and pruning."""
        return [mask.eval_masks() for mask in (self.image_mask, self.text_mask)]

    def pruned(self) -> "Student":
        """The smaller network that remains after pruning by the masks."""
        return Student(prune(self.clip, *self.eval_masks()))


# ---------------------------------------------------------------------------------------- models by name or from a file


def create_model(name: str, quick_gelu: bool = False) -> CLIP:
    """A randomly initialised CLIP of one of `CONFIGS`."""
    if name not in CONFIGS:
        raise UserError(f"model {name!r} is none of {', '.join(CONFIGS)}")
    return CLIP(**CONFIGS[name], quick_gelu=quick_gelu)


def parameter_counts(model: CLIP) -> dict[str, int]:
    """Number of parameters of the image tower, of the text tower with and without token embedding, and in total."""
    total, image = (sum(p.numel() for p in module.parameters()) for module in (model, model.visual))
    text, embedding = total - image - 1, model.token_embedding.weight.numel()
    return {"image": image, "text": text - embedding, "text_with_token_embedding": text, "total": total}


def load_clip(source: str | Path, head_width: int = 64, quick_gelu: bool | None = None) -> CLIP:
    """A CLIP in eval mode from a run folder of ours, a checkpoint file in either of the authors' layouts, a folder of
    transformers or open_clip, or `MODEL@WEIGHTS` of open_clip (`ViT-B-32@laion2b_e16`), which it downloads.

    `head_width` and `quick_gelu` are for files that do not state them. UserError if `source` has no CLIP, or if its
    activation is unknown.
    """
    if named(source):
        state, shape = open_clip_weights(str(source))
    else:
        state, shape = checkpoint_weights(Path(source), head_width)
    try:
        model = CLIP(**({"quick_gelu": quick_gelu} | shape))
    except (TypeError, KeyError, IndexError, RuntimeError) as error:
        raise UserError(f"{source} describes a geometry that this code does not support: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"{source} does not hold a CLIP that this code knows (unless the file states the width of heads, it is "
            f"--head-width {head_width}): {checkpoints.one_line(error, 300)}"
        ) from error
    if model.geometry["quick_gelu"] is None:
        raise UserError(
            f"{source} does not say whether its activation is QuickGELU: pass --quick-gelu, True for weights of "
            "OpenAI, False for what the authors of TinyCLIP have released (in training: first write them with "
            "'python -m tinyclip.eval FILE --quick-gelu True --export DIR')"
        )
    return model.eval()


def open_clip_weights(source: str) -> tuple[dict[str, Tensor], dict]:
    """(state dict, arguments of `CLIP`) of MODEL@WEIGHTS. UserError if open_clip lacks them or cannot download."""
    name, _, tag = source.partition("@")
    tags = {known: open_clip.list_pretrained_tags_by_model(known) for known in OPEN_CLIP}
    if tag not in tags.get(name, ()):
        known = "; ".join(f"{model}@ {', '.join(weights)}" for model, weights in tags.items())
        raise UserError(f"{source} is not among the weights of open_clip that fit here: {known}")
    try:
        state = open_clip.create_model(name, pretrained=tag).state_dict()
    except (RuntimeError, OSError) as error:
        why = str(error).splitlines()[0]
        raise UserError(f"{source}: open_clip could not download these weights ({why}); name a file") from error
    quick_gelu = bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu", tag == "openai"))
    return state, {"quick_gelu": quick_gelu} | CONFIGS[name]


def checkpoint_weights(path: Path, head_width: int) -> tuple[dict[str, Tensor], dict]:
    """(state dict in OpenAI's layout, arguments of `CLIP`) of a folder or file. UserError if it has none.

    The arguments lack quick_gelu if the source does not state it.
    """
    file = weights_file(path)
    content = checkpoints.load_checkpoint(file)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in state.items()):
        raise UserError(f"{path} holds no weights by name: a checkpoint is a dict of tensors, or has one as state_dict")
    stated = config_of_trainer(content.get("args")) | config_beside(file, of_transformers(state))
    state = convert_state_dict(state)
    if "masks" in content and content["masks"] is not None:
        raise UserError(f"{path} is in the middle of learning its masks; let it run past its --prune-step")
    if "geometry" in content:
        return state, content["geometry"]
    if any("mask." in key for key in state):
        raise UserError(f"{path} still has its masks; prune it with the authors' code, or load its last stage")
    try:
        return state, geometry_of_weights(state, stated.pop("head_width", head_width)) | stated
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
