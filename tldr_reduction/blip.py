"""BLIP (arXiv 2201.12086), stock: the ViT, the BERT with cross-attention and the beam search that TL;DR builds on, and
the pre-training whose ITM head scores image-text matching.

This file holds none of TL;DR's contribution. Authors' code: salesforce/BLIP@056a169, cited as `B:`, and the fork of it
in showlab/datacentric.vlp@a488102, `V:` for its `vq_compress_model/`. Parameters are named as in BLIP's checkpoints,
which load without a mapping.

Shapes: B batch of this process, W processes, S image side, N patches, L image tokens with [CLS], D image width, T text
tokens, C text width, H heads, V words, E embedding, Q queue.
"""

import copy
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import timm.models.vision_transformer as timm_vit
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shared.errors import UserError
from shared.run import Process, gather, gather_lists

PAD, SEP = 0, 102  # of bert-base-uncased

# ------------------------------------------------------------------------------------------------------------- image


class VisionTransformer(timm_vit.VisionTransformer):
    """timm's pre-LN ViT, [CLS] included, final LayerNorm, learned positions: (B, 3, S, S) -> (B, 1+N, D).

    Source: V:models/vit.py:104-186.
    """

    def __init__(self, image_size: int, patch_size: int, width: int, layers: int, heads: int):
        super().__init__(
            img_size=image_size,
            patch_size=patch_size,
            embed_dim=width,
            depth=layers,
            num_heads=heads,
            num_classes=0,
            global_pool="",
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
        )

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_features(image)


def resize_pos_embed(pos_embed: Tensor, grid: int) -> Tensor:
    """Bicubic resize of the patch positions: (1, 1+g*g, D) -> (1, 1+n*n, D). V:models/vit.py:273."""
    cls, patches = pos_embed[:, :1], pos_embed[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side == grid:
        return pos_embed
    square = patches.transpose(1, 2).unflatten(2, (side, side))
    square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, square.flatten(2).transpose(1, 2)], dim=1)


# -------------------------------------------------------------------------------------------------------------- text


class Attention(nn.Module):
    """Post-LN multi-head attention of queries (B, T, C) over `context` (B, L, D). V:models/med.py:87-280."""

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
        """x (B, T, C) -> (B, T, C); without `context`, x attends to itself.

        `bias` (B, 1, T, L) is added to the scores. `cache` keeps keys and values of earlier calls in generation:
        self-attention appends to them, cross-attention computes them once.
        """
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
    """Self-attention, cross-attention if there are image tokens, feed-forward. V:models/med.py:312-375."""

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
    """BLIP's BERT: ids (B, T) -> (B, T, C). V:models/med.py:42-94, 410-790.

    There are no token types. Cross-attention reads image_embeds (B, L, D); None skips it. `causal` masks later
    positions, as the decoder needs. -10000 is added to masked scores, as upstream, not -inf.
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
        self.dropout, self.grad_checkpointing = dropout, False
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

    @property
    def max_positions(self) -> int:
        return self.embeddings["position_embeddings"].num_embeddings

    def new_cache(self) -> list[dict]:
        """Empty cache of keys and values for generation, one entry per layer."""
        return [{"attention": {}, "crossattention": {}} for _ in self.encoder["layer"]]

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_embeds: Tensor | None = None,
        causal: bool = False,
        cache: list[dict] | None = None,
    ) -> Tensor:
        """Ids (B, T) -> states (B, T, C). With a `cache`, input_ids are only the new ids; attention_mask (B, T) also
        covers earlier ones."""
        end, device = attention_mask.shape[1], input_ids.device
        if end > self.max_positions:
            raise UserError(f"a text of {end} tokens is longer than the model's {self.max_positions} positions")
        positions = torch.arange(end - input_ids.shape[1], end, device=device)
        x = self.embeddings["word_embeddings"](input_ids) + self.embeddings["position_embeddings"](positions)
        x = F.dropout(self.embeddings["LayerNorm"](x), self.dropout, self.training)
        allowed = attention_mask[:, None, None, :].float()  # (B, 1, 1, T)
        if causal:
            allowed = allowed * (torch.arange(end, device=device) <= positions[:, None])
        bias = -10000.0 * (1.0 - allowed)
        for i, layer in enumerate(self.encoder["layer"]):
            if self.grad_checkpointing and cache is None:
                x = checkpoint(layer, x, bias, image_embeds, None, use_reentrant=False)
            else:
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
    """Hidden states (..., C) -> logits (..., V): dense, GELU, LayerNorm, tied word embeddings. V:models/med.py:493."""

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
    """A causal `TextTransformer` with an LM head. V:models/med.py:803-947."""

    def __init__(self, bert: TextTransformer):
        super().__init__()
        self.bert = bert
        self.cls = nn.ModuleDict({"predictions": LMHead(bert.embeddings["word_embeddings"])})

    def forward(self, input_ids: Tensor, attention_mask: Tensor, image_embeds: Tensor, cache=None) -> Tensor:
        """Logits (B, T, V) of each next token."""
        return self.cls["predictions"](self.bert(input_ids, attention_mask, image_embeds, True, cache))

    def loss(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_embeds: Tensor,
        prompt_length: int = 0,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Mean cross-entropy of the next tokens that are neither padding nor prompt, (). V:models/med.py:901-908.

        It is the mean over the tokens of all ranks, scaled so that DDP's average of gradients is that of one batch.
        """
        hidden = self.bert(input_ids, attention_mask, image_embeds, True)[:, :-1]
        targets = input_ids[:, 1:].masked_fill(input_ids[:, 1:] == PAD, -100)
        targets[:, : max(prompt_length - 1, 0)] = -100
        logits = self.cls["predictions"](hidden).float().flatten(0, 1)
        total = F.cross_entropy(logits, targets.flatten(), reduction="sum", label_smoothing=label_smoothing)
        count = (targets != -100).sum().float()
        if dist.is_initialized():
            dist.all_reduce(count)
            count /= dist.get_world_size()
        return total / count


# -------------------------------------------------------------------------------------------------------- generation


class FinishedCaptions:
    """The n best finished captions of each sample, by score, descending."""

    def __init__(self, batch: int, n: int, max_length: int, pad: int, device: torch.device):
        self.max_length, self.pad = max_length, pad
        self.scores = torch.full((batch, n), -math.inf, device=device)
        self.ids = torch.full((batch, n, max_length), pad, device=device)
        self.lengths = torch.zeros(batch, n, dtype=torch.long, device=device)

    def add(self, scores: Tensor, ids: Tensor, samples: Tensor) -> None:
        """Add captions `ids` (B, m, t) with summed log-probabilities `scores` (B, m), where -inf marks no caption, to
        those samples for which `samples` (B,) is True."""
        n, length = self.scores.shape[1], ids.shape[2]
        scores = torch.where(samples[:, None], scores / length, -math.inf)
        padded = F.pad(ids, (0, self.max_length - length), value=self.pad)
        all_scores, all_ids = torch.cat([self.scores, scores], 1), torch.cat([self.ids, padded], 1)
        all_lengths = torch.cat([self.lengths, torch.full_like(scores, length, dtype=torch.long)], 1)
        best = all_scores.argsort(dim=1, descending=True, stable=True)[:, :n]
        self.scores, self.lengths = all_scores.gather(1, best), all_lengths.gather(1, best)
        self.ids = all_ids.gather(1, best[..., None].expand(-1, -1, self.max_length))

    def cannot_improve(self, bound: Tensor) -> Tensor:
        """(B,) bool: the sample has n captions, whose lowest score is at least `bound` (B,)."""
        return (self.scores[:, -1] > -math.inf) & (self.scores[:, -1] >= bound)

    def best(self, eos: int) -> Tensor:
        """(B, <= max_length) ids of each sample's best caption, followed by [SEP] and padding."""
        length = self.lengths[:, 0]
        width = min(int(length.max()) + 1, self.max_length)
        position = torch.arange(self.max_length, device=length.device)
        return torch.where(position == length[:, None], eos, self.ids[:, 0])[:, :width]


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
    """Beam search as in transformers 4.15: (B, <= max_length) ids with the prompt, followed by [SEP] and padding.

    `next_logits(ids (B*n, t), order (B*n,))` returns logits (B*n, V) of the next token; `order` is, for each row of
    ids, the row of the previous call that it continues. Lengths include the prompt. Scores of finished captions are
    sums of log-probabilities divided by the length without [SEP]. A [SEP] ranked below the n best candidates is
    ignored. A sample ends when it has n captions, and the lowest of their scores is at least the sum of this step's
    best candidate divided by the present length. One beam is greedy search.
    """
    n, device, length = num_beams, prompt_ids.device, len(prompt_ids)
    if not 0 < length < max_length:
        raise UserError(f"--max-length {max_length} must exceed the prompt's {length} tokens")
    ids = prompt_ids.expand(batch * n, length)
    order = torch.arange(batch * n, device=device)
    beam_scores = torch.full((batch, n), -1e9, device=device)
    beam_scores[:, 0] = 0.0
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    finished = FinishedCaptions(batch, n, max_length, pad, device)

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
        finished.add(top[:, :n].masked_fill(~ended, -math.inf), candidates, ~done)
        done = done | finished.cannot_improve(top[:, 0] / length)
        # the n best candidates that go on
        going = (token == eos).byte().argsort(dim=1, stable=True)[:, :n]
        beam_scores, token, beam = top.gather(1, going), token.gather(1, going), beam.gather(1, going)
        order = (beam + n * torch.arange(batch, device=device)[:, None]).flatten()
        ids = torch.cat([ids[order], token.flatten()[:, None]], dim=1)
        length += 1
        if bool(done.all()) or length >= max_length:
            break
    finished.add(beam_scores, ids.view(batch, n, length), ~done)
    return finished.best(eos)


# ----------------------------------------------------------------------------------------------------------------- BLIP


def tie_decoder(encoder: TextTransformer, decoder: TextTransformer) -> None:
    """Let the decoder use the encoder's embeddings, cross-attention and feed-forward. B:models/blip_pretrain.py:270.

    The decoder keeps its own self-attention, including its output LayerNorm.
    """
    decoder.embeddings = encoder.embeddings
    for of_encoder, of_decoder in zip(encoder.encoder["layer"], decoder.encoder["layer"], strict=True):
        for module in ("crossattention", "intermediate", "output"):
            setattr(of_decoder, module, getattr(of_encoder, module))


def negative_weights(similarity: Tensor, own: int = 0) -> Tensor:
    """Weights for drawing hard negatives: softmax of similarities (B, W*B) + 1e-4, 0 for the matching pair.
    B:models/blip_pretrain.py:155-158.

    `own` is the index of this process's first pair in the global batch.
    """
    weights = similarity.softmax(dim=1) + 1e-4
    weights.diagonal(own).zero_()
    return weights


def drawn(weights: Tensor) -> Tensor:
    """Draw an index in 0..N-1 for each row of weights (B, N), with probabilities proportional to them: (B,).

    Like `torch.multinomial`, but without its check of the weights, which waits for the GPU.
    """
    return (weights / torch.empty_like(weights).exponential_()).argmax(dim=1)


class BLIPLosses(NamedTuple):
    loss_ita: Tensor
    loss_itm: Tensor
    loss_lm: Tensor


class RetrievalLosses(NamedTuple):
    loss_ita: Tensor
    loss_itm: Tensor


class BLIP(nn.Module):
    """ITC with momentum queue, ITM with hard negatives, LM. B:models/blip_pretrain.py:20-245.

    Negatives are drawn from the batches of all processes. The contrastive keys are the momentum features of these
    batches and the queue. So W processes equal one process with W times the batch (upstream takes negatives and keys
    from the process's own batch). Tokens [DEC] and [ENC] have the last two ids of the vocabulary.
    """

    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_encoder: TextTransformer,
        text_decoder: TextDecoder | TextTransformer | None,
        embed_dim: int = 256,
        queue_size: int = 57600,
        momentum: float = 0.995,
    ):
        super().__init__()
        self.momentum = momentum
        self.bos_token_id, self.enc_token_id = text_encoder.vocab_size - 2, text_encoder.vocab_size - 1
        self.visual_encoder, self.text_encoder = visual_encoder, text_encoder
        self.vision_proj = nn.Linear(visual_encoder.embed_dim, embed_dim)
        self.text_proj = nn.Linear(text_encoder.width, embed_dim)
        self.itm_head = nn.Linear(text_encoder.width, 2)
        for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
            setattr(self, f"{name}_m", copy.deepcopy(getattr(self, name)).requires_grad_(False))
        self.register_buffer("image_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("text_queue", F.normalize(torch.randn(embed_dim, queue_size), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        self.temp = nn.Parameter(torch.tensor(0.07))
        if text_decoder is not None:
            bert = text_decoder.bert if isinstance(text_decoder, TextDecoder) else text_decoder
            tie_decoder(text_encoder, bert)
            self.text_decoder = TextDecoder(bert)

    # ------------------------------------------------------------------------------------------------------ features

    def encode_image(self, image: Tensor) -> Tensor:
        """Projection of [CLS], unit (B, E)."""
        return self.project(self.visual_encoder(image))

    def project(self, image_embeds: Tensor) -> Tensor:
        """`encode_image` of encoded images (B, L, D)."""
        return F.normalize(self.vision_proj(image_embeds[:, 0]).float(), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projection of [CLS] of the text alone, unit (B, E); without a mask, id 0 is padding."""
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        return F.normalize(self.text_proj(self.text_encoder(input_ids, mask)[:, 0]).float(), dim=-1)

    def itc(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosines (B, B) of images (rows) and texts (columns). V:models/blip_itm.py:57-66."""
        return self.encode_image(image) @ self.encode_text(input_ids, attention_mask).T

    def itm(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2) of mismatch and match; score = softmax[:, 1]. V:models/blip_itm.py:41-55.

        The ids are used as given. BLIP trains with [ENC] at position 0; upstream's scorer leaves [CLS] there.
        """
        return self.match(self.visual_encoder(image), input_ids, attention_mask)

    def match(self, image_embeds: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`itm` of encoded images (B, L, D)."""
        return self.itm_head(self.text_encoder(input_ids, attention_mask, image_embeds)[:, 0]).float()

    # -------------------------------------------------------------------------------------------------------- losses

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> BLIPLosses:
        """Losses, scalars. B:models/blip_pretrain.py:97-212; input_ids (B, T) begin with [CLS].

        negatives: for each pair of this process, the indices in the global batch of an image for its text and of a text
        for its image; None draws them.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_embeds = self.visual_encoder(image)
        features = self.project(image_embeds), self.encode_text(input_ids, attention_mask)
        loss_ita, sim_i2t, sim_t2i = self.contrast(*features, image, input_ids, attention_mask, alpha)
        if negatives is None:
            negatives = self.draw_negatives(sim_i2t, sim_t2i)
        loss_itm = self.matching_loss(image_embeds, input_ids, attention_mask, negatives)

        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.bos_token_id
        loss_lm = self.text_decoder.loss(decoder_ids, attention_mask, image_embeds, label_smoothing=0.1)
        return BLIPLosses(loss_ita, loss_itm, loss_lm)

    def contrast(self, image_features, text_features, image, input_ids, attention_mask, alpha: float, image_ids=None):
        """loss_ita and the in-batch similarities (B, W*B); updates the momentum encoders, then the queues.

        y = alpha softmax(momentum similarities / temp) + (1 - alpha) onehot; loss = mean of both directions' -sum y log
        softmax(f keys / temp). With `image_ids` (B,), as in `RetrievalBLIP`, onehot is replaced by an equal share for
        all keys of the same image.
        """
        with torch.no_grad():
            self.update_momentum()
            embeds = self.visual_encoder_m(image)[:, 0]
            image_m = F.normalize(self.vision_proj_m(embeds).float(), dim=-1)
            text_m = F.normalize(self.text_proj_m(self.text_encoder_m(input_ids, attention_mask)[:, 0]).float(), dim=-1)
        with torch.autocast(image.device.type, enabled=False):
            return self.contrast_keys(image_features, text_features, image_m, text_m, alpha, image_ids)

    def contrast_keys(self, image_features, text_features, image_m, text_m, alpha: float, image_ids=None):
        """`contrast` in fp32, from the features (B, E) of the online and the momentum encoders."""
        with torch.no_grad():
            all_image, all_text = gather(image_m), gather(text_m)
            image_keys = torch.cat([all_image.T, self.image_queue], dim=1)  # (E, W*B + Q)
            text_keys = torch.cat([all_text.T, self.text_queue], dim=1)
            own = self.offset(len(image_m)) + torch.arange(len(image_m), device=image_m.device)
            positives = F.one_hot(own, image_keys.shape[1]) if image_ids is None else self.of_same_image(image_ids)
            targets_i2t = alpha * (image_m @ text_keys / self.temp).softmax(1) + (1 - alpha) * positives
            targets_t2i = alpha * (text_m @ image_keys / self.temp).softmax(1) + (1 - alpha) * positives
        sim_i2t, sim_t2i = image_features @ text_keys / self.temp, text_features @ image_keys / self.temp
        loss = (F.cross_entropy(sim_i2t, targets_i2t) + F.cross_entropy(sim_t2i, targets_t2i)) / 2
        self.enqueue(all_image, all_text, image_ids)
        return loss, sim_i2t[:, : len(all_text)].detach(), sim_t2i[:, : len(all_image)].detach()

    def draw_negatives(self, sim_i2t: Tensor, sim_t2i: Tensor) -> tuple[Tensor, Tensor]:
        """Indices in the global batch of a hard negative image for each text, and of a text for each image."""
        own = self.offset(len(sim_i2t))
        image_index = drawn(negative_weights(sim_t2i, own))
        return image_index, drawn(negative_weights(sim_i2t, own))

    def matching_loss(self, image_embeds, input_ids, attention_mask, negatives) -> Tensor:
        """Cross-entropy over 3B examples: B pairs (label 1), B texts with a wrong image, B images with a wrong text
        (label 0)."""
        ids = input_ids.clone()
        ids[:, 0] = self.enc_token_id
        image_index, text_index = negatives
        batch = len(ids)
        if dist.is_initialized() and dist.get_world_size() > 1:
            process = Process(dist.get_rank(), dist.get_world_size(), ids.device)
            widest = max(gather_lists([ids.shape[1]], process))  # compared on the CPUs, without waiting for a GPU
            ids, attention_mask = (F.pad(x, (0, widest - x.shape[1])) for x in (ids, attention_mask))
        wrong_images = gather(image_embeds)[image_index]
        wrong_ids, wrong_mask = gather(ids)[text_index], gather(attention_mask)[text_index]
        logits = self.match(
            torch.cat([image_embeds, wrong_images, image_embeds]),
            torch.cat([ids, ids, wrong_ids]),
            torch.cat([attention_mask, attention_mask, wrong_mask]),
        )
        labels = (torch.arange(3 * batch, device=ids.device) < batch).long()
        return F.cross_entropy(logits, labels)

    # ---------------------------------------------------------------------------------------------- momentum and queue

    def offset(self, batch: int) -> int:
        """Index of this process's first pair in the global batch."""
        return batch * dist.get_rank() if dist.is_initialized() else 0

    @torch.no_grad()
    def update_momentum(self) -> None:
        """p_m <- m p_m + (1 - m) p. B:models/blip_pretrain.py:225."""
        for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
            online = list(getattr(self, name).parameters())
            slow = list(getattr(self, f"{name}_m").parameters())
            torch._foreach_mul_(slow, self.momentum)
            torch._foreach_add_(slow, online, alpha=1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor, image_ids: Tensor | None = None) -> None:
        """Replace the oldest keys by those of the global batch. B:models/blip_pretrain.py:232."""
        size, count = self.image_queue.shape[1], len(image_features)
        if count > size:
            raise UserError(f"a queue of {size} keys is smaller than the batch of {count}: raise --queue-size")
        places = (self.queue_ptr + torch.arange(count, device=self.queue_ptr.device)) % size
        self.image_queue[:, places], self.text_queue[:, places] = image_features.T, text_features.T
        if image_ids is not None:
            self.idx_queue[0, places] = gather(image_ids)
        self.queue_ptr[0] = (self.queue_ptr[0] + count) % size


class RetrievalBLIP(BLIP):
    """BLIP for fine-tuning on retrieval, without decoder; all pairs with the same image match each other.

    B:models/blip_retrieval.py. `idx_queue` holds the image ids of the queued keys, -100 for empty entries.
    """

    def __init__(self, visual_encoder, text_encoder, embed_dim: int = 256, queue_size: int = 57600, momentum=0.995):
        super().__init__(visual_encoder, text_encoder, None, embed_dim, queue_size, momentum)
        self.register_buffer("idx_queue", torch.full((1, queue_size), -100))

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        alpha: float,
        image_ids: Tensor,
        negatives: tuple[Tensor, Tensor] | None = None,
    ) -> RetrievalLosses:
        """Losses, scalars. B:models/blip_retrieval.py:72-225; image_ids (B,) int64 identifies images.

        `negatives` as in BLIP; None draws them from pairs of other images, by similarity to momentum features
        (upstream: to features of the online encoders).
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_embeds = self.visual_encoder(image)
        features = self.project(image_embeds), self.encode_text(input_ids, attention_mask)
        loss_ita, sim_i2t, sim_t2i = self.contrast(*features, image, input_ids, attention_mask, alpha, image_ids)
        if negatives is None:
            others = image_ids[:, None] != gather(image_ids)[None]
            negatives = tuple(drawn(sim.softmax(dim=1) * others) for sim in (sim_t2i, sim_i2t))
        return RetrievalLosses(loss_ita, self.matching_loss(image_embeds, input_ids, attention_mask, negatives))

    def of_same_image(self, image_ids: Tensor) -> Tensor:
        """Targets (B, W*B + Q): each pair has equal weights, summing to 1, on the keys of its own image."""
        same = (image_ids[:, None] == torch.cat([gather(image_ids), self.idx_queue[0]])[None]).float()
        return same / same.sum(dim=1, keepdim=True)
