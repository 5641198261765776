"""The stock towers that TL;DR builds on: timm's ViT, and BLIP's BERT with cross-attention, LM head and beam search.

TL;DR (arXiv 2305.20087); authors' code showlab/datacentric.vlp@a488102, `U:` below for its `vq_compress_model/`.
Nothing here is the paper's contribution. Parameters are named as in BLIP's checkpoints, which load without a mapping.

Shapes: B batch, S image side, N patches, D image width, T text tokens, C text width, V words, H heads.
"""

import math
from collections.abc import Callable
from functools import partial

import timm.models.vision_transformer as timm_vit
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

PAD, SEP = 0, 102  # of bert-base-uncased

# ------------------------------------------------------------------------------------------------------------- image


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's pre-LN ViT, [CLS] included, final LayerNorm, learned positions: (B, 3, S, S) -> (B, 1+N, D).

    Source: U:models/vit.py:104-186. `drop_path` is 0 for base, 0.1 for large (U:models/blip.py:190-202).
    """

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int, drop_path: float = 0.0):
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            num_classes=0,
            global_pool="",
            drop_path_rate=drop_path,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_features(image)


def resize_pos_embed(pos_embed: Tensor, grid: int) -> Tensor:
    """Bicubic resize of the patch positions: (1, 1+g*g, D) -> (1, 1+n*n, D). U:models/vit.py:273."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return pos_embed
    square = patches.transpose(1, 2).unflatten(2, (side, side))
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2).transpose(1, 2)], dim=1)


# -------------------------------------------------------------------------------------------------------------- text


class Attention(nn.Module):
    """Post-LN multi-head attention of queries (B, T, C) over `context` (B, L, E). U:models/med.py:87-280."""

    def __init__(self, width: int, heads: int, context_width: int, dropout: float):
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.self = nn.ModuleDict(
            {
                "query": nn.Linear(width, width),
                "key": nn.Linear(context_width, width),
                "value": nn.Linear(context_width, width),
            }
        )
        self.output = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, context: Tensor | None, bias: Tensor | None = None, cache: dict | None = None):
        """`bias` (B, 1, T, L) is added to the scores. `cache` keeps keys and values of earlier calls in generation:
        self-attention (context None) appends to them, cross-attention computes them once."""
        split = lambda y: y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # noqa: E731  (B, L, C) -> (B, H, L, C/H)
        own = context is None
        if not own and cache:
            key, value = cache["key"], cache["value"]
        else:
            source = x if own else context
            key, value = split(self.self["key"](source)), split(self.self["value"](source))
            if own and cache:
                key, value = torch.cat([cache["key"], key], 2), torch.cat([cache["value"], value], 2)
            if cache is not None:
                cache.update(key=key, value=value)
        drop = self.dropout if self.training else 0.0
        bias = bias if bias is None else bias.to(key.dtype)
        attended = F.scaled_dot_product_attention(split(self.self["query"](x)), key, value, bias, drop)
        attended = self.output["dense"](attended.transpose(1, 2).flatten(2))
        return self.output["LayerNorm"](x + F.dropout(attended, self.dropout, self.training))


class TextLayer(nn.Module):
    """Self-attention, cross-attention if there are image tokens, feed-forward. U:models/med.py:312-375."""

    def __init__(self, width: int, heads: int, hidden: int, vision_width: int, dropout: float):
        super().__init__()
        self.dropout = dropout
        self.attention = Attention(width, heads, width, dropout)
        self.crossattention = Attention(width, heads, vision_width, dropout)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(width, hidden)})
        self.output = nn.ModuleDict({"dense": nn.Linear(hidden, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})

    def forward(self, x: Tensor, bias: Tensor, image_embeds: Tensor | None, cache: dict | None) -> Tensor:
        own, cross = (None, None) if cache is None else (cache["attention"], cache["crossattention"])
        x = self.attention(x, None, bias, own)
        if image_embeds is not None:
            x = self.crossattention(x, image_embeds, cache=cross)
        hidden = self.output["dense"](F.gelu(self.intermediate["dense"](x)))
        return self.output["LayerNorm"](x + F.dropout(hidden, self.dropout, self.training))


class TextTransformer(nn.Module):
    """BLIP's BERT: ids (B, T) -> (B, T, C). U:models/med.py:42-94, 410-790.

    No token types. Text alone (image_embeds None skips the cross-attention), with image (B, L, D), or `causal`, which
    makes it the decoder. Masked scores get -10000 as upstream, not -inf.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        layers: int,
        heads: int,
        max_positions: int,
        vision_width: int,
        dropout: float = 0.1,
        intermediate_size: int | None = None,
    ):
        super().__init__()
        self.dropout = dropout
        self.embeddings = nn.ModuleDict(
            {
                "word_embeddings": nn.Embedding(vocab_size, width, padding_idx=PAD),
                "position_embeddings": nn.Embedding(max_positions, width),
                "LayerNorm": nn.LayerNorm(width, eps=1e-12),
            }
        )
        hidden = intermediate_size or 4 * width
        blocks = [TextLayer(width, heads, hidden, vision_width, dropout) for _ in range(layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(blocks)})
        self.apply(bert_init)

    @property
    def vocab_size(self) -> int:
        return self.embeddings["word_embeddings"].num_embeddings

    @property
    def width(self) -> int:
        return self.embeddings["word_embeddings"].embedding_dim

    def new_cache(self) -> list[dict]:
        """Empty cache of keys and values for generation, one entry a layer."""
        return [{"attention": {}, "crossattention": {}} for _ in self.encoder["layer"]]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_embeds: Tensor | None = None,
        causal: bool = False,
        cache: list[dict] | None = None,
    ) -> Tensor:
        """With a `cache`, input_ids are the last ids only; attention_mask (B, T) counts those before them, too."""
        end, device = attention_mask.shape[1], input_ids.device
        if end > self.embeddings["position_embeddings"].num_embeddings:
            limit = self.embeddings["position_embeddings"].num_embeddings
            raise ValueError(f"a text of {end} tokens is longer than the {limit} positions of the text transformer")
        positions = torch.arange(end - input_ids.shape[1], end, device=device)
        x = self.embeddings["word_embeddings"](input_ids) + self.embeddings["position_embeddings"](positions)
        x = F.dropout(self.embeddings["LayerNorm"](x), self.dropout, self.training)
        allowed = attention_mask[:, None, None, :].float()  # (B, 1, 1, T)
        if causal:
            allowed = allowed * (torch.arange(end, device=device) <= positions[:, None])
        bias = -10000.0 * (1.0 - allowed)
        for i, layer in enumerate(self.encoder["layer"]):
            x = layer(x, bias, image_embeds, None if cache is None else cache[i])
        return x


def bert_init(module: nn.Module) -> None:
    """BERT's initialisation: N(0, 0.02), zero biases, zero [PAD]."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
    if isinstance(module, nn.Embedding) and module.padding_idx is not None:
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()


class LMHead(nn.Module):
    """Hidden states (..., C) -> logits (..., V): dense, GELU, LayerNorm, tied word embeddings. U:models/med.py:493."""

    def __init__(self, word_embeddings: nn.Embedding):
        super().__init__()
        vocab_size, width = word_embeddings.weight.shape
        self.transform = nn.ModuleDict({"dense": nn.Linear(width, width), "LayerNorm": nn.LayerNorm(width, eps=1e-12)})
        self.apply(bert_init)
        self.bias = nn.Parameter(torch.zeros(vocab_size))
        self.decoder = nn.Linear(width, vocab_size)
        self.decoder.weight, self.decoder.bias = word_embeddings.weight, self.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.transform["LayerNorm"](F.gelu(self.transform["dense"](x))))


class TextDecoder(nn.Module):
    """A causal `TextTransformer` with an LM head. U:models/med.py:803-947."""

    def __init__(self, bert: TextTransformer):
        super().__init__()
        self.bert = bert
        self.cls = nn.ModuleDict({"predictions": LMHead(bert.embeddings["word_embeddings"])})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor, cache=None) -> Tensor:
        """Logits (B, T, V)."""
        return self.cls["predictions"](self.bert(input_ids, attention_mask, image_embeds, True, cache))

    def losses(self, input_ids, attention_mask, image_embeds, prompt_length: int = 0, label_smoothing: float = 0.0):
        """Cross-entropy of each next token that is neither padding nor prompt: (M,) fp32. U:models/med.py:901-908.

        Logits are computed at those M positions only.
        """
        hidden = self.bert(input_ids, attention_mask, image_embeds, True)[:, :-1]
        targets = input_ids[:, 1:]
        wanted = (targets != PAD) & (torch.arange(1, input_ids.shape[1], device=targets.device) >= prompt_length)
        logits = self.cls["predictions"](hidden[wanted]).float()
        return F.cross_entropy(logits, targets[wanted], reduction="none", label_smoothing=label_smoothing)


def token_mean(losses: Tensor) -> Tensor:
    """Mean over the tokens of all ranks, scaled so that DDP's average of gradients is that of one large batch."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return losses.mean()
    count = torch.tensor(float(losses.numel()), device=losses.device)
    dist.all_reduce(count)
    return losses.sum() * dist.get_world_size() / count


# -------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
def beam_search(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    prompt_ids: Tensor,
    batch: int,
    num_beams: int,
    max_length: int,
    min_length: int,
    eos: int,
    pad: int,
) -> Tensor:
    """Beam search as transformers 4.15 has it: (B, <= max_length) ids, prompt included, [SEP] and padding behind.

    `next_logits(ids (B*n, t), order (B*n,))` -> (B*n, V) of the next token; `order` says which rows of the last call
    these rows continue. Lengths count the prompt. Scores of finished captions are sums of log-probabilities divided by
    length, [SEP] not counted. A [SEP] ranked below the n best candidates is ignored. A sample ends when it has n
    captions and the worst is no worse than this step's best candidate divided by the present length. One beam: greedy.
    """
    n, device, length = num_beams, prompt_ids.device, len(prompt_ids)
    if not 0 < length < max_length:
        raise ValueError(f"--max-length {max_length} must exceed the prompt's {length} tokens")
    ids = prompt_ids.expand(batch * n, length)
    order = torch.arange(batch * n, device=device)
    beam_scores = torch.full((batch, n), -1e9, device=device)
    beam_scores[:, 0] = 0.0
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    kept = torch.full((batch, n), -math.inf, device=device)  # scores of the n best finished captions, descending
    kept_ids = torch.full((batch, n, max_length), pad, device=device)
    kept_length = torch.zeros(batch, n, dtype=torch.long, device=device)

    def keep(scores: Tensor, candidates: Tensor, rows: Tensor, length: int) -> None:
        """Merge finished captions (B, m) into the n kept ones of the samples `rows`; -inf marks none."""
        nonlocal kept, kept_ids, kept_length
        scores = torch.where(rows[:, None], scores / length, -math.inf)
        padded = F.pad(candidates, (0, max_length - candidates.shape[2]), value=pad)
        all_scores, all_ids = torch.cat([kept, scores], 1), torch.cat([kept_ids, padded], 1)
        all_lengths = torch.cat([kept_length, torch.full_like(scores, length, dtype=torch.long)], 1)
        best = all_scores.argsort(dim=1, descending=True, stable=True)[:, :n]
        kept, kept_length = all_scores.gather(1, best), all_lengths.gather(1, best)
        kept_ids = all_ids.gather(1, best[..., None].expand(-1, -1, max_length))

    while True:
        scores = next_logits(ids, order).float().log_softmax(1)
        vocab = scores.shape[1]
        if length < min_length:
            scores[:, eos] = -math.inf
        scores = (scores.view(batch, n, vocab) + beam_scores[..., None]).flatten(1)
        top, index = scores.topk(2 * n, dim=1)  # (B, 2n), descending
        token, beam = index % vocab, index // vocab
        sequences = ids.view(batch, n, length)
        ended = token[:, :n] == eos
        candidates = sequences.gather(1, beam[:, :n, None].expand(-1, -1, length))
        keep(top[:, :n].masked_fill(~ended, -math.inf), candidates, ~done, length)
        full = kept[:, -1] > -math.inf
        done = done | (full & (kept[:, -1] >= top[:, 0] / length))
        # the n best candidates that go on
        going = (token == eos).byte().argsort(dim=1, stable=True)[:, :n]
        beam_scores, token, beam = top.gather(1, going), token.gather(1, going), beam.gather(1, going)
        order = (beam + n * torch.arange(batch, device=device)[:, None]).flatten()
        ids = torch.cat([ids[order], token.flatten()[:, None]], dim=1)
        length += 1
        if bool(done.all()) or length >= max_length:
            break
    keep(beam_scores, ids.view(batch, n, length), ~done, length)

    best_ids, best_length = kept_ids[:, 0], kept_length[:, 0]
    width = min(int(best_length.max()) + 1, max_length)
    position = torch.arange(max_length, device=device)
    best_ids = torch.where(position == best_length[:, None], eos, best_ids)
    return best_ids[:, :width]


@torch.no_grad()
def nucleus_sampling(
    next_logits: Callable[[Tensor, Tensor], Tensor],
    prompt_ids: Tensor,
    batch: int,
    max_length: int,
    min_length: int,
    eos: int,
    pad: int,
    top_p: float = 0.9,
    repetition_penalty: float = 1.1,
) -> Tensor:
    """Samples from the smallest set of tokens with probability `top_p`: as `beam_search`. U:models/blip.py:135-147."""
    ids, order = prompt_ids.expand(batch, -1), torch.arange(batch, device=prompt_ids.device)
    done = torch.zeros(batch, dtype=torch.bool, device=prompt_ids.device)
    while ids.shape[1] < max_length and not bool(done.all()):
        scores = next_logits(ids, order).float()
        seen = scores.gather(1, ids)
        scores = scores.scatter(1, ids, torch.where(seen < 0, seen * repetition_penalty, seen / repetition_penalty))
        if ids.shape[1] < min_length:
            scores[:, eos] = -math.inf
        ranked, index = scores.softmax(1).sort(dim=1, descending=True)
        ranked = ranked.masked_fill(ranked.cumsum(1) - ranked > top_p, 0.0)
        token = index.gather(1, torch.multinomial(ranked, 1))[:, 0]
        token = torch.where(done, pad, token)
        done = done | (token == eos)
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids
