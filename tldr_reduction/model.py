"""TL;DR: Too Large; Data Reduction for Vision-Language Pre-Training (arXiv 2305.20087, ICCV 2023).

Authors' code: showlab/datacentric.vlp@a488102, a partial fork of BLIP, cited as `U:`, its `vq_compress_model/` as `V:`.
The paper's contribution in this file:
  - a captioner that reads the image through a codebook, whose code ids describe the image   `VectorQuantizer`,
    `CodebookCaptioner` (without the codebook, it generates the captions T_g)
  - the initialisation of the codebook by keywords of the captions                           `keyword_codebook`
Clusters of codes and the selection are in cluster.py, refined captions in reduce.py. The towers are BLIP's (blip.py).

Shapes: B batch, L image tokens with [CLS], D image width, K codes, c code dimension, L' = L*D/c codes an image,
T text tokens, V words.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import open_clip
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from torch import Tensor, nn

import shared.resnet  # noqa: F401  (registers its model with timm)
from shared import clip
from shared.errors import UserError
from tldr_reduction.blip import (
    BLIP,
    PAD,
    SEP,
    RetrievalBLIP,
    TextDecoder,
    TextTransformer,
    VisionTransformer,
    beam_search,
    nucleus_sampling,
    resize_pos_embed,  # noqa: F401  of this file's contract
    token_mean,
)
from tldr_reduction.config import Common
from tldr_reduction.tokenizer import pre_caption

BLOCK = 2048  # tokens compared with the codebook at a time

# --------------------------------------------------------------------------------------------------------- quantiser


def nearest_codes(z: Tensor, codebook: Tensor) -> Tensor:
    """i_n = argmin_k |z_n|^2 + |e_k|^2 - 2 z_n e_k, ties to the lowest k: (n, c), (K, c) -> (n,) int64.

    V:models/quantize.py:282-286. Works on blocks of tokens, so that the n x K distances are never in memory at once.
    """
    squares, indices = codebook.square().sum(1), []
    for tokens in z.split(BLOCK):
        distances = torch.addmm(tokens.square().sum(1, keepdim=True) + squares, tokens, codebook.T, alpha=-2)
        indices.append(distances.argmin(dim=1))
    return torch.cat(indices)


class StraightThrough(torch.autograd.Function):
    """z -> (z_q, loss, codes) with closed-form gradients (README, detail 2); N = B*L*D elements.

    q = e[i], z_q = z + sg[q - z], loss = a mean((sg[q] - z)^2) + b mean((q - sg[z])^2);
    d/dz = grad z_q + 2 a (z - q)/N, d/de_k = sum over i_n = k of 2 b (e_k - z_n)/N. Only q - z is kept.
    """

    @staticmethod
    def forward(ctx, z: Tensor, codebook: Tensor, a: float, b: float):
        codes = nearest_codes(z, codebook)
        difference = codebook[codes].sub_(z)
        loss = (a + b) * torch.linalg.vector_norm(difference).square() / difference.numel()
        ctx.save_for_backward(difference, codes)
        ctx.sizes = a, b, codebook.shape
        ctx.mark_non_differentiable(codes)
        return z + difference, loss, codes

    @staticmethod
    def backward(ctx, grad_z_q: Tensor, grad_loss: Tensor, _):
        difference, codes = ctx.saved_tensors
        a, b, shape = ctx.sizes
        scale = 2 * grad_loss / difference.numel()
        grad_z = torch.addcmul(grad_z_q, difference, scale, value=-a) if ctx.needs_input_grad[0] else None
        grad_codebook = None
        if ctx.needs_input_grad[1]:
            grad_codebook = difference.new_zeros(shape).index_add_(0, codes, difference).mul_(b * scale)
        return grad_z, grad_codebook, None, None


class VectorQuantizer(nn.Module):
    """Quantise image tokens: z (B, L, D) -> z_q (B, L, D), loss (), codes (B, L'). V:models/quantize.py:213-333.

    Every token, including [CLS], is split into D/c pieces, and each is replaced by the nearest of K codes, without
    projection or normalisation. With `legacy` (upstream's default), beta weights the codebook term, without it the
    commitment term, as in VQ-VAE's paper. The gradient of z_q passes to z unchanged.
    """

    def __init__(self, num_codes: int = 1024, code_dim: int = 768, beta: float = 0.25, legacy: bool = True):
        super().__init__()
        self.beta, self.legacy = beta, legacy
        self.embedding = nn.Embedding(num_codes, code_dim)
        nn.init.uniform_(self.embedding.weight, -1 / num_codes, 1 / num_codes)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        code_dim = self.embedding.embedding_dim
        if z.shape[-1] % code_dim:
            raise UserError(f"tokens of width {z.shape[-1]} cannot be cut into codes of {code_dim} dimensions")
        a, b = (1.0, self.beta) if self.legacy else (self.beta, 1.0)
        with torch.autocast(z.device.type, enabled=False):
            flat = z.float().reshape(-1, code_dim)
            z_q, loss, codes = StraightThrough.apply(flat, self.embedding.weight, a, b)
        return z_q.view(z.shape), loss, codes.view(len(z), -1)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, L') of z (B, L, D)."""
        flat = z.float().reshape(-1, self.embedding.embedding_dim)
        return nearest_codes(flat, self.embedding.weight).view(len(z), -1)


class EMAVectorQuantizer(nn.Module):
    """A codebook that follows the tokens by moving averages instead of gradients. V:models/quantize.py:335-448.

    The authors ship it, but do not use it and cannot construct it. Equal to theirs with `start_size` 0, which inflates
    every code after one step; 1 avoids this. z (B, L, c) -> z_q, loss beta mean((sg[q] - z)^2), codes.
    """

    def __init__(self, num_codes, code_dim, beta=0.25, decay=0.99, eps=1e-5, start_size: float = 1.0):
        super().__init__()
        self.beta, self.decay, self.eps = beta, decay, eps
        weight = torch.randn(num_codes, code_dim)
        self.register_buffer("weight", weight)
        self.register_buffer("cluster_size", torch.full((num_codes,), start_size))
        self.register_buffer("embed_avg", weight.clone())

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = z.float().reshape(-1, self.weight.shape[1])
        codes = nearest_codes(flat.detach(), self.weight)
        q = self.weight[codes].view(z.shape)  # read before the update
        if self.training:
            self.update(flat.detach(), codes)
        return z + (q - z).detach(), self.beta * F.mse_loss(z.float(), q), codes.view(len(z), -1)

    @torch.no_grad()
    def update(self, flat: Tensor, codes: Tensor) -> None:
        """size, sum <- moving averages over the batch; e = sum / smoothed size."""
        counts = torch.bincount(codes, minlength=len(self.weight)).to(flat.dtype)
        sums = torch.zeros_like(self.embed_avg).index_add_(0, codes, flat)
        self.cluster_size.mul_(self.decay).add_(counts, alpha=1 - self.decay)
        self.embed_avg.mul_(self.decay).add_(sums, alpha=1 - self.decay)
        total = self.cluster_size.sum()
        smoothed = (self.cluster_size + self.eps) / (total + len(self.weight) * self.eps) * total
        self.weight.copy_(self.embed_avg / smoothed[:, None])


def codebook_perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """exp(-sum_k p_k log(p_k + 1e-10)) of the codes' frequencies, () fp32. V:models/quantize.py:84-85."""
    p = torch.bincount(codes.flatten(), minlength=num_codes).float() / codes.numel()
    return torch.exp(-(p * torch.log(p + 1e-10)).sum())


# ------------------------------------------------------------------------------ initialisation and restart of codebooks


def frequent_keywords(captions: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent keywords and two-word phrases of the captions.

    Stop words are left out and end a phrase; a keyword counts once per caption; ties are in alphabetical order.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts: Counter[str] = Counter()
    for caption in captions:
        words = [word.strip(",'?") for word in pre_caption(caption).split()]
        plain = [bool(word) and word.isalpha() and word not in ENGLISH_STOP_WORDS for word in words]
        found = {word for word, good in zip(words, plain, strict=True) if good}
        found |= {f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1) if plain[i] and plain[i + 1]}
        counts.update(found)
    if len(counts) < count:
        raise UserError(
            f"the captions hold {len(counts)} keywords, fewer than {count} codes: lower --num-codes, or choose "
            "another --codebook-init"
        )
    return [keyword for keyword, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]]


def keyword_codebook(captions: Iterable[str], num_codes: int, embed: Callable[[list[str]], Tensor]) -> Tensor:
    """Text embeddings (K, c) of the K most frequent keywords of the captions (paper, sec. 3.1)."""
    return embed(frequent_keywords(captions, num_codes)).float()


def rescaled(codebook: Tensor, tokens: Tensor) -> Tensor:
    """The codebook (K, c) shifted and scaled to the mean and variance of the tokens (n, c)."""
    standard = (codebook - codebook.mean(0)) / codebook.std().clamp(min=1e-6)
    return standard * (tokens - tokens.mean(0)).std() + tokens.mean(0)


def sampled_codebook(tokens: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """(K, c) drawn from the tokens (n, c), without replacement if there are enough."""
    repeats = -(-num_codes // len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(repeats)])
    return tokens[order[:num_codes].to(tokens.device)].clone()


@torch.no_grad()
def restart_unused(quantize: VectorQuantizer, used: Tensor, tokens: Tensor, generator: torch.Generator) -> int:
    """Replace codes whose count in `used` (K,) is 0 by random tokens (n, c), against collapse; return their number."""
    unused = (used == 0).nonzero().flatten()
    if len(unused):
        quantize.embedding.weight[unused] = sampled_codebook(tokens.float(), len(unused), generator)
    if dist.is_initialized():
        dist.broadcast(quantize.embedding.weight.data, src=0)
    return len(unused)


# --------------------------------------------------------------------------------------------------------- captioner


class CodebookCaptioner(nn.Module):
    """ViT, codebook, text decoder: the model that TL;DR encodes images with.
    V:models/blip_pretrain_vq_compress.py:101-134.

    With `quantize` None it is the captioner that is fine-tuned on clean captions and writes T_g (V:models/blip.py:71).
    The id of [DEC] defaults to the last but one of the vocabulary, as in BLIP.
    """

    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_decoder: TextDecoder | TextTransformer,
        quantize: VectorQuantizer | None,
        bos_token_id: int | None = None,
        sep_token_id: int = SEP,
    ):
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_decoder = text_decoder if isinstance(text_decoder, TextDecoder) else TextDecoder(text_decoder)
        self.quantize = quantize
        self.bos_token_id = self.text_decoder.bert.vocab_size - 2 if bos_token_id is None else bos_token_id
        self.sep_token_id = sep_token_id

    def image_states(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The decoder's input (B, L, D), loss_emb, codes (B, L') or None."""
        x = self.visual_encoder(image)
        return (x, x.new_zeros((), dtype=torch.float32), None) if self.quantize is None else self.quantize(x)

    def forward(
        self,
        image: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        prompt_length: int = 0,
        label_smoothing: float = 0.0,
        return_codes: bool = False,
        places: Tensor | None = None,
    ):
        """(loss_lm, loss_emb); input_ids (B, T) begin with [CLS], which becomes [DEC] here.

        Padding and the first `prompt_length` positions are not targets. `places`: `target_places` of the ids, if known
        beforehand. `return_codes` adds the codes (B, L') to the result.
        """
        states, loss_emb, codes = self.image_states(image)
        ids = input_ids.clone()
        ids[:, 0] = self.bos_token_id
        losses = self.text_decoder.losses(ids, attention_mask, states, prompt_length, label_smoothing, places)
        return (token_mean(losses), loss_emb, codes) if return_codes else (token_mean(losses), loss_emb)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Code vector of each image, (B, L') int64. U:codebook_extractor.py:36-42."""
        if self.quantize is None:
            raise UserError("this captioner has no codebook: codes come from one trained by captioner.py")
        return self.quantize.encode(self.visual_encoder(image))

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        prompt_ids: Tensor,
        num_beams: int = 3,
        max_length: int = 20,
        min_length: int = 5,
        sample: bool = False,
        top_p: float = 0.9,
    ) -> Tensor:
        """Ids (B, <= max_length) of captions with the prompt, which the lengths include. V:models/blip.py:121-162.

        prompt_ids (P,) may begin with [CLS] and end with [SEP], as a tokenizer gives them: [CLS] becomes [DEC], and
        [SEP] is dropped. `sample` draws by nucleus sampling instead of beam search.
        """
        prompt = prompt_ids[:-1] if prompt_ids[-1] == self.sep_token_id else prompt_ids
        prompt = prompt.clone()
        prompt[0] = self.bos_token_id
        states, _, _ = self.image_states(image)
        states = states if sample else states.repeat_interleave(num_beams, dim=0)
        decoder, cache = self.text_decoder, self.text_decoder.bert.new_cache()

        def next_logits(ids: Tensor, order: Tensor) -> Tensor:
            for layer in cache:
                if own := layer["attention"]:
                    own.update({name: kept[order] for name, kept in own.items()})
            fresh = ids if not cache[0]["attention"] else ids[:, -1:]
            hidden = decoder.bert(fresh, torch.ones_like(ids), states, True, cache)[:, -1]
            return decoder.cls["predictions"](hidden).float()

        lengths = max_length, min_length, self.sep_token_id, PAD
        if sample:
            return nucleus_sampling(next_logits, prompt, len(image), *lengths, top_p)
        return beam_search(next_logits, prompt, len(image), num_beams, *lengths)


# --------------------------------------------------------------------------------------------------- model of a stage


class LockedTower(TimmModel):
    """open_clip's tower of a timm network, with a frozen trunk. Input: images, or the trunk's features (B, C)."""

    def lock_trunk(self) -> None:
        self.trunk.requires_grad_(False).to(memory_format=torch.channels_last)
        self.train(self.training)

    def train(self, mode: bool = True) -> "LockedTower":
        super().train(mode)
        self.trunk.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x if x.ndim == 2 else self.trunk(x.contiguous(memory_format=torch.channels_last)))


class BagOfWords(nn.Module):
    """A text tower without word order: token ids (B, T) of open_clip's tokenizer -> features (B, E).

    Averages the tokens' embeddings, without start, end and padding, and adds the outputs of a linear layer and of an
    MLP on this mean. In training, each token is left out with probability `drop`.
    """

    def __init__(self, vocab_size: int, context_length: int, width: int, embed_dim: int, drop: float = 0.3):
        super().__init__()
        self.vocab_size, self.context_length, self.drop = vocab_size, context_length, drop
        self.token_embedding = nn.Embedding(vocab_size, width)
        nn.init.normal_(self.token_embedding.weight, std=0.3)
        self.projection = nn.Linear(width, embed_dim, bias=False)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, embed_dim)
        )

    def forward(self, ids: Tensor) -> Tensor:
        words = (ids > 0) & (ids < self.vocab_size - 2)  # the last two ids are start and end
        if self.training:
            words &= torch.rand(ids.shape, device=ids.device) >= self.drop
        words = words[..., None].float()
        mean = (self.token_embedding(ids) * words).sum(1) / words.sum(1).clamp(min=1)
        return self.projection(mean) + self.mlp(mean)


def build(cfg: Common, vocab_size: int, sep_token_id: int = SEP) -> nn.Module:
    """The model of a stage, randomly initialised; `sep_token_id` is the id of [SEP], which ends a caption."""
    if cfg.stage == "clip":
        settings = open_clip.get_model_config(cfg.clip_model)
        if settings is None or "hf_model_name" in settings["text_cfg"] or settings.get("custom_text"):
            raise UserError(f"--clip-model {cfg.clip_model} is no open_clip config with its plain text tower")
        towers = settings["vision_cfg"], settings["text_cfg"]
        kind = open_clip.CustomTextCLIP if cfg.bag_of_words else open_clip.CLIP
        model = kind(settings["embed_dim"], *towers, settings.get("quick_gelu", False))
        if cfg.bag_of_words:
            sizes = model.vocab_size, model.context_length, settings["text_cfg"]["width"], settings["embed_dim"]
            model.text = BagOfWords(*sizes)
        if cfg.lock_image:
            model.visual.__class__ = LockedTower
            model.visual.lock_trunk()
        return clip.without_padding(model)
    vision = VisionTransformer(cfg.image_size, cfg.patch_size, cfg.width, cfg.layers, cfg.heads, cfg.drop_path)
    sizes = vocab_size, cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.max_positions, cfg.width, cfg.dropout
    text = TextTransformer(*sizes)
    if cfg.stage == "blip":
        return BLIP(vision, text, TextTransformer(*sizes), cfg.embed_dim, cfg.queue_size, cfg.momentum)
    if cfg.stage == "retrieval":
        return RetrievalBLIP(vision, text, cfg.embed_dim, cfg.queue_size, cfg.momentum)
    quantize = None
    if cfg.stage == "captioner" or cfg.quantize:
        quantize = VectorQuantizer(cfg.num_codes, cfg.code_dim, cfg.beta, cfg.legacy)
    return CodebookCaptioner(vision, TextDecoder(text), quantize, sep_token_id=sep_token_id)


def build_for(cfg: Common, tokenizer) -> nn.Module:
    """`build` for that tokenizer's vocabulary."""
    return build(cfg, 0) if cfg.stage == "clip" else build(cfg, len(tokenizer), tokenizer.sep)


def image_side(model: nn.Module, cfg: Common) -> int:
    """Side in pixels of the model's input images."""
    return clip.image_side(model) if cfg.stage == "clip" else cfg.image_size
