"""TinyCLIP's automatic inheritance (arXiv 2309.12314): learned masks select the teacher's weights that are kept.

Authors' code: wkcn/TinyCLIP@ad981bf, cited as `U:<path>:<line>` with paths under its `src/`. The paper's contribution:
  - masks on hidden dimensions, heads and neurons under a sparsity constraint       `L0Mask`, `sparsity_loss`
  - pruning a masked network to a smaller one                                       `prune`
  - expanding it to a masked network for the next stage of distillation             `expand_pruned`
Where the masks act in a forward pass is in model.py; a network here is a `model.CLIP`.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shared.errors import UserError
from tinyclip.geometry import block_sizes, convert_state_dict, named_towers

Masks = Mapping[str, Tensor]  # of a tower: hidden (H,), heads (L, h), intermediate (L, I); also mha (L,), ffn (L,)

# --------------------------------------------------------------------------- hard-concrete gates (Louizos et al., CoFi)

BETA, GAMMA, ZETA, EPSILON, MAGIC = 2 / 3, -0.1, 1.1, 1e-6, 0.8  # U:open_clip/l0module.py:12-25
KINDS = ("hidden", "heads", "intermediate", "ffn", "mha")


def hard_concrete(loga: Tensor, u: Tensor) -> Tensor:
    """z = clip(sigmoid((ln u - ln(1-u) + a) / beta) (zeta - gamma) + gamma, 0, 1). U:open_clip/l0module.py:230."""
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + loga) / BETA)
    return torch.nn.functional.hardtanh(s * (ZETA - GAMMA) + GAMMA, 0.0, 1.0)


def hard_concrete_cdf(x: float, loga: Tensor) -> Tensor:
    """P(z <= x), clamped to [epsilon, 1 - epsilon]. U:open_clip/l0module.py:141."""
    stretched = (x - GAMMA) / (ZETA - GAMMA)
    logit = math.log(stretched) - math.log(1 - stretched)
    return torch.sigmoid(logit * BETA - loga).clamp(EPSILON, 1 - EPSILON)


def eval_gate(loga: Tensor, soft: bool = True) -> Tensor:
    """a (groups, n) -> gates for evaluation and pruning: sigmoid(0.8 a / beta), the smallest ones set to 0.

    The number of gates set to 0 in a group is the expected number of closed gates (rounded half to even); of equal
    gates those with the lowest index are closed first. `soft=False` closes none. U:open_clip/l0module.py:241.
    """
    gate = torch.sigmoid(loga / BETA * MAGIC)
    if not soft:
        return gate
    opened = (1 - hard_concrete_cdf(0.0, loga)).sum(-1, keepdim=True).double()
    closed = (loga.shape[-1] - opened).round()
    order = gate.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(loga.shape[-1], device=loga.device).expand_as(order)
    )
    return gate.masked_fill(rank < closed, 0.0)


class L0Mask(nn.Module):
    """The masks of one tower: log-alphas a of its gates, and the two multipliers of the sparsity constraint.

    hidden (H,) is shared by all layers; heads (L, h) and intermediate (L, I) are per layer; `ffn` and `mha` (L,) close
    whole blocks; the authors' code has these two but does not use them. U:open_clip/l0module.py:11.
    """

    def __init__(
        self, hidden: int, intermediate: int, heads: int, layers: int,
        types: Sequence[str] = ("hidden", "heads", "intermediate"), init: float = 10.0,
    ):  # fmt: skip
        super().__init__()
        if unknown := set(types) - set(KINDS):
            raise UserError(f"mask type {', '.join(sorted(unknown))} is none of {', '.join(KINDS)}")
        self.hidden, self.intermediate, self.heads, self.layers = hidden, intermediate, heads, layers
        self.types = tuple(types)
        shapes = {"hidden": (hidden,), "heads": (layers, heads), "intermediate": (layers, intermediate)}
        for kind in self.types:
            self.register_parameter(f"{kind}_loga", nn.Parameter(torch.full(shapes.get(kind, (layers,)), float(init))))
        self.lambda_1, self.lambda_2 = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(10.0))
        # Biases are in both costs; LayerNorms, embeddings and projections are in neither. U:open_clip/l0module.py:39-52
        self.params_per_head = (4 * hidden * hidden + 4 * hidden) // heads
        self.params_per_mlp = 2 * hidden * intermediate + hidden + intermediate
        attention, mlp = layers * heads * self.params_per_head, layers * self.params_per_mlp
        self.prunable_params = attention * ("heads" in self.types) + mlp * ("intermediate" in self.types)

    @classmethod
    def of(cls, tower: Mapping, types: Sequence[str] = ("hidden", "heads", "intermediate")) -> "L0Mask":
        """Masks for an unpruned tower's geometry."""
        _, heads, neurons = block_sizes(tower)
        return cls(tower["width"], neurons[0], heads[0], tower["layers"], types)

    def logas(self) -> dict[str, Tensor]:
        return {kind: getattr(self, f"{kind}_loga") for kind in self.types}

    def sample(self, u: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Training masks, one draw for the whole batch; `u` are the uniform numbers, drawn if None."""
        u = self.uniforms() if u is None else u
        return {kind: hard_concrete(loga, u[kind]) for kind, loga in self.logas().items()}

    @torch.no_grad()
    def uniforms(self) -> dict[str, Tensor]:
        """The uniform numbers of one draw."""
        return {kind: torch.empty_like(loga).uniform_(EPSILON, 1 - EPSILON) for kind, loga in self.logas().items()}

    @torch.no_grad()
    def eval_masks(self, soft: bool = True) -> dict[str, Tensor]:
        """Deterministic masks by `eval_gate`; its groups are all hidden gates, and the other gates of each layer."""
        masks = {}
        for kind, loga in self.logas().items():
            groups = loga.reshape(1 if kind == "hidden" else self.layers, -1)
            masks[kind] = eval_gate(groups, soft).view_as(loga)
        return masks

    @staticmethod
    def open_prob(loga: Tensor) -> Tensor:
        """P(z > 0). U:open_clip/l0module.py:147."""
        return 1 - hard_concrete_cdf(0.0, loga)

    def expected_params(self, hidden: bool | None = None) -> Tensor:
        """R (), the expected number of kept prunable parameters, with gradient. U:open_clip/l0module.py:150.

        R = (sum p_hidden) (sum p_heads p_mha) c_head / H + 2 (sum p_hidden) (sum p_int p_ffn); without the hidden
        factors (`hidden=False`, or no such masks) c_head (sum p_heads p_mha) + (c_mlp // I) (sum p_int p_ffn).
        """
        open_ = {kind: self.open_prob(loga) for kind, loga in self.logas().items()}
        one = self.lambda_1.new_ones(self.layers, 1)
        heads = open_.get("heads", one.expand(-1, self.heads)) * open_.get("mha", one[:, 0])[:, None]
        neurons = open_.get("intermediate", one.expand(-1, self.intermediate)) * open_.get("ffn", one[:, 0])[:, None]
        if hidden is None:
            hidden = "hidden" in self.types
        if not hidden:
            return heads.sum() * self.params_per_head + neurons.sum() * (self.params_per_mlp // self.intermediate)
        width = open_["hidden"].sum() if "hidden" in open_ else self.lambda_1.new_full((), float(self.hidden))
        return width * heads.sum() * (self.params_per_head / self.hidden) + 2 * width * neurons.sum()

    def kept_params(self) -> int:
        """Number of prunable weights that the evaluation masks keep, without biases. U:open_clip/l0module.py:266 tries
        to log it."""
        kept = {kind: z != 0 for kind, z in self.eval_masks().items()}
        one = torch.ones(self.layers, 1, dtype=torch.bool, device=self.lambda_1.device)
        heads = kept.get("heads", one.expand(-1, self.heads)) & kept.get("mha", one[:, 0])[:, None]
        neurons = kept.get("intermediate", one.expand(-1, self.intermediate)) & kept.get("ffn", one[:, 0])[:, None]
        width = int(kept["hidden"].sum()) if "hidden" in kept else self.hidden
        attention = 4 * (self.hidden // self.heads) * int(heads.sum()) * width
        return attention * ("heads" in self.types) + 2 * int(neurons.sum()) * width * ("intermediate" in self.types)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Clamp a to +-ln 100, after every optimizer step. U:open_clip/l0module.py:136."""
        for loga in self.logas().values():
            loga.clamp_(math.log(1e-2), math.log(1e2))


def target_sparsity(step: int, start: float, end: float, warmup: int) -> float:
    """q_t: linear from start to end in `warmup` steps. U:open_clip/l0module.py:204."""
    return end if warmup <= 0 else start + (end - start) * min(1.0, step / warmup)


def expected_sparsity(masks: Sequence[L0Mask]) -> Tensor:
    """e = 1 - R / P over all towers together, (): 1 minus the paper's equation 8 with expected masks."""
    return 1 - sum(m.expected_params() for m in masks) / sum(m.prunable_params for m in masks)


def sparsity_warning(reached: float, asked: float) -> str | None:
    """A warning if the reached sparsity is far below the target `asked`, else None."""
    if asked - reached < 0.05:
        return None
    return f"the masks reached a sparsity of {reached:.3f}, where {asked:.3f} was asked for"


def reached_sparsity(masks: Sequence[L0Mask]) -> float:
    """Share of the prunable parameters of all towers that pruning now would remove."""
    return 1 - sum(m.kept_params() for m in masks) / sum(m.prunable_params for m in masks)


def sparsity_loss(masks: Sequence[L0Mask], target: float, two_sided: bool = False) -> tuple[Tensor, Tensor]:
    """(L_sparsity, e): lambda_1 g + lambda_2 g^2 with g = max(q - e, 0), e over all towers, means of their lambdas.
    U:training/train.py:260, U:open_clip/l0module.py:209.

    The lambdas (equation 7's lambda and beta) follow gradient ascent: their learning rate is negative. two_sided: the
    paper's equation 7, g = q - e, which also reduces sparsity. There p - q is our q - e, since p is the share kept.
    """
    expected = expected_sparsity(masks)
    gap = target - expected if two_sided else (target - expected).clamp(min=0)
    lambda_1, lambda_2 = (sum(getattr(m, name) for m in masks) / len(masks) for name in ("lambda_1", "lambda_2"))
    return lambda_1 * gap + lambda_2 * gap.square(), expected


# ------------------------------------------------------------------------------------------ masks -> a smaller network


@torch.no_grad()
def prune(model: nn.Module, masks_image: Masks | None, masks_text: Masks | None, exact: bool = False) -> nn.Module:
    """Cut out the kept rows and columns and multiply them by their soft gates. U:open_clip/model.py:1415.

    exact=False is the authors' way: it also multiplies the rows of `proj` and `text_projection` by z_h, unlike the
    masked forward pass, and an attention without heads loses its output bias. exact=True keeps the outputs of the
    masked model. A tower whose masks are None is not pruned.
    """
    state, shape = dict(model.state_dict()), copy.deepcopy(model.geometry)
    for name, prefix, tower in named_towers(model.geometry):
        masks = masks_image if name == "image" else masks_text
        if masks is not None:
            state, sizes = prune_tower(state, prefix, tower, masks, exact)
            shape["vision" if name == "image" else "text"] |= sizes
    return resized(model, shape, state).train(model.training)


def resized(model: nn.Module, geometry: Mapping, state: Mapping[str, Tensor]) -> nn.Module:
    """A network of the class and on the device of `model`, with another geometry and these weights."""
    other = type(model)(**geometry).to(model.logit_scale.device)
    other.load_state_dict(state)
    return other


def prune_tower(state: dict, prefix: str, tower: Mapping, masks: Masks, exact: bool) -> tuple[dict, dict]:
    """(state dict with this tower pruned, its new sizes). The scaling rules are U:open_clip/model.py:70, 139, 170,
    317, 545, 820."""
    head_width, heads, _ = block_sizes(tower)
    z = masks.get("hidden", torch.ones(tower["width"], device=state["logit_scale"].device))
    kept = z.nonzero().squeeze(1)
    if not len(kept):
        raise UserError("the masks leave no hidden dimension: lower the target sparsity")
    zk = z[kept]
    state = prune_ends(dict(state), prefix, kept, zk, exact)
    # The last bias before the block, to which the output bias of an attention without heads is added
    before = "visual.ln_pre.bias" if prefix else "positional_embedding"
    new_heads, new_neurons = [], []
    for i, h in enumerate(heads):
        stem = f"{prefix}transformer.resblocks.{i}."
        block = {name.removeprefix(stem): state.pop(name) for name in list(state) if name.startswith(stem)}
        mha, ffn = (masks[kind][i] if kind in masks else torch.ones_like(z[0]) for kind in ("mha", "ffn"))
        z_heads = masks["heads"][i] if "heads" in masks else torch.ones(h, device=z.device)
        new_heads.append(0 if mha == 0 else int(z_heads.count_nonzero()))
        if new_heads[-1]:
            attention = prune_attention(block, kept, zk, z_heads, mha, head_width)
            state |= {stem + name: value for name, value in attention.items()}
            before = f"{stem}attn.out_proj.bias"
        elif exact and "attn.out_proj.bias" in block:
            state[before] = state[before] + block["attn.out_proj.bias"][kept] * zk * mha
        if ffn == 0 or "mlp.c_fc.weight" not in block:
            new_neurons.append(None)
        else:
            size = len(block["mlp.c_fc.bias"])
            z_int = masks["intermediate"][i] if "intermediate" in masks else torch.ones(size, device=z.device)
            new_neurons.append(int(z_int.count_nonzero()))
            mlp = prune_mlp(block, kept, zk, z_int, ffn)
            state |= {stem + name: value for name, value in mlp.items()}
            before = f"{stem}mlp.c_proj.bias"
    sizes = {"width": len(kept), "head_width": head_width, "heads": new_heads, "mlp_width": new_neurons}
    return state, sizes


def prune_ends(state: dict, prefix: str, kept: Tensor, zk: Tensor, exact: bool) -> dict:
    """Reduce a tower's embeddings, LayerNorms outside of blocks and projection to the hidden dimensions `kept` with
    gates `zk`; changes `state`."""
    if prefix:
        state["visual.conv1.weight"] = state["visual.conv1.weight"][kept] * zk.view(-1, 1, 1, 1)
        state["visual.class_embedding"] = state["visual.class_embedding"][kept] * zk
    else:
        state["token_embedding.weight"] = state["token_embedding.weight"][:, kept] * zk
    state[prefix + "positional_embedding"] = state[prefix + "positional_embedding"][:, kept] * zk
    for name in ("visual.ln_pre", "visual.ln_post") if prefix else ("ln_final",):
        for key in (f"{name}.weight", f"{name}.bias"):
            state[key] = state[key][kept]
    projection = "visual.proj" if prefix else "text_projection"
    state[projection] = state[projection][kept] * (1 if exact else zk[:, None])
    return state


def prune_attention(block: dict, kept: Tensor, zk: Tensor, z_heads: Tensor, mha: Tensor, head_width: int) -> dict:
    """The weights of a block's attention and its LayerNorm, reduced to the open heads."""
    open_heads, split = z_heads.nonzero().squeeze(1), (len(z_heads), head_width)
    new = {name: block[name][kept] for name in ("ln_1.weight", "ln_1.bias")}
    weight = block["attn.in_proj_weight"].unflatten(0, (3, *split))
    new["attn.in_proj_weight"] = weight[:, open_heads][..., kept].flatten(0, 2)
    new["attn.in_proj_bias"] = block["attn.in_proj_bias"].unflatten(0, (3, *split))[:, open_heads].flatten()
    weight = (block["attn.out_proj.weight"][kept] * zk[:, None]).unflatten(1, split)
    new["attn.out_proj.weight"] = (weight * z_heads[:, None])[:, open_heads].flatten(1) * mha
    new["attn.out_proj.bias"] = block["attn.out_proj.bias"][kept] * zk * mha
    return new


def prune_mlp(block: dict, kept: Tensor, zk: Tensor, z_int: Tensor, ffn: Tensor) -> dict:
    """The weights of a block's MLP and its LayerNorm, reduced to the open neurons."""
    open_int = z_int.nonzero().squeeze(1)
    new = {name: block[name][kept] for name in ("ln_2.weight", "ln_2.bias")}
    new["mlp.c_fc.weight"] = block["mlp.c_fc.weight"][open_int][:, kept]
    new["mlp.c_fc.bias"] = block["mlp.c_fc.bias"][open_int]
    weight = (block["mlp.c_proj.weight"] * z_int)[kept] * zk[:, None]
    new["mlp.c_proj.weight"] = weight[:, open_int] * ffn
    new["mlp.c_proj.bias"] = block["mlp.c_proj.bias"][kept] * zk * ffn
    return new


# Tensors with an axis of positions, tokens, embedding dimensions or pixels, which pruning does not shorten: that axis
WHOLE = {
    "visual.positional_embedding": 0, "positional_embedding": 0, "token_embedding.weight": 0, "visual.proj": 1,
    "text_projection": 1, "visual.conv1.weight": 2,
}  # fmt: skip


@torch.no_grad()
def expand_pruned(model: nn.Module, image_mask: L0Mask, text_mask: L0Mask, pruned_sd: Mapping[str, Tensor]) -> None:
    """Copy a pruned network into the front corner of a full-size one for the next stage. U:open_clip/model.py:1300.

    The rest of `model` is set to 0. Gates are open (a = 10) for the slots of the pruned network and closed (a = -10)
    elsewhere; the multipliers restart at 10. The slots do not record which channels of the teacher they were.
    UserError if the pruned network does not fit into `model`.
    """
    small = convert_state_dict(pruned_sd)
    state = model.state_dict()  # shares the model's memory
    if strange := small.keys() - state.keys():
        raise UserError(f"the pruned network has {min(strange)}, but the full-size one does not")
    for name, full in state.items():
        full.zero_()
        if name not in small:
            if "resblocks" not in name:
                raise UserError(f"the pruned weights lack {name}")
            continue
        pruned = small[name].to(full.device)
        if ".attn.in_proj_" in name and pruned.numel():
            tower = model.geometry["vision" if name.startswith("visual") else "text"]
            split = (3, -1, block_sizes(tower)[0])
            full, pruned = full.unflatten(0, split), pruned.unflatten(0, split)
        sizes = enumerate(zip(full.shape, pruned.shape, strict=True))
        if any(a < b or (a > b and axis == WHOLE.get(name)) for axis, (a, b) in sizes):
            raise UserError(
                f"{name} of the pruned network, {tuple(small[name].shape)}, does not fit {tuple(state[name].shape)}"
            )
        full[tuple(slice(0, size) for size in pruned.shape)] = pruned
    masks = {"image": image_mask, "text": text_mask}
    for tower, prefix, shape in named_towers(model.geometry):
        mask, head_width = masks[tower], block_sizes(shape)[0]
        for loga in mask.logas().values():
            loga.fill_(10.0)
        mask.lambda_1.fill_(10.0)
        mask.lambda_2.fill_(10.0)
        if "hidden" in mask.types:
            mask.hidden_loga[small[prefix + "positional_embedding"].shape[1] :] = -10.0
        for i in range(mask.layers):
            block = f"{prefix}transformer.resblocks.{i}."
            qkv, c_fc = (small.get(block + name, torch.empty(0)) for name in ("attn.in_proj_bias", "mlp.c_fc.bias"))
            if "heads" in mask.types:
                mask.heads_loga[i, len(qkv) // (3 * head_width) :] = -10.0
            if "intermediate" in mask.types:
                mask.intermediate_loga[i, len(c_fc) :] = -10.0
            for kind, weight in (("mha", "attn.in_proj_weight"), ("ffn", "mlp.c_fc.weight")):
                if kind in mask.types and block + weight not in small:
                    mask.logas()[kind][i] = -10.0
