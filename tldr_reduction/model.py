"""TL;DR: Too Large; Data Reduction for Vision-Language Pre-Training (arXiv 2305.20087, ICCV 2023).

Authors' code: showlab/datacentric.vlp@a488102, a partial fork of BLIP, cited as `U:`, its `vq_compress_model/` as `V:`.
The paper's contribution in this file:
  - a captioner that reads the image through a codebook, whose code ids describe the image   `VectorQuantizer`,
    `CodebookCaptioner` (without the codebook, it generates the captions T_g)
The start of the codebook is in codebook.py, clusters of codes and the selection are in cluster.py, refined captions in
reduce.py. The towers are BLIP's (blip.py).

Shapes: B batch, L image tokens with [CLS], D image width, K codes, c code dimension, L' = L*D/c codes an image,
T text tokens, V words.
"""

from typing import NamedTuple

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
)
from tldr_reduction.config import Common

BLOCK = 2048  # tokens compared with the codebook at a time
MAX_LENGTH = 20  # tokens of a generated caption, including the prompt

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
            codes = nearest_codes(flat.detach(), self.embedding.weight.detach())
            q = self.embedding(codes)
            loss = a * F.mse_loss(flat, q.detach()) + b * F.mse_loss(q, flat.detach())
            z_q = flat + (q - flat).detach()  # straight-through estimator
        return z_q.view(z.shape), loss, codes.view(len(z), -1)

    @torch.no_grad()
    def encode(self, z: Tensor) -> Tensor:
        """Codes (B, L') of z (B, L, D)."""
        flat = z.float().reshape(-1, self.embedding.embedding_dim)
        return nearest_codes(flat, self.embedding.weight).view(len(z), -1)


def codebook_perplexity(codes: Tensor, num_codes: int) -> Tensor:
    """exp(-sum_k p_k log(p_k + 1e-10)) of the codes' frequencies, () fp32. V:models/quantize.py:84-85."""
    p = torch.bincount(codes.flatten(), minlength=num_codes).float() / codes.numel()
    return torch.exp(-(p * torch.log(p + 1e-10)).sum())


# --------------------------------------------------------------------------------------------------------- captioner


class CaptionerLosses(NamedTuple):
    loss_lm: Tensor
    loss_emb: Tensor  # 0 without a codebook
    codes: Tensor | None


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
    ) -> CaptionerLosses:
        """Losses, and the codes (B, L'); input_ids (B, T) begin with [CLS], which becomes [DEC] here.

        Padding and the first `prompt_length` positions are not targets.
        """
        states, loss_emb, codes = self.image_states(image)
        ids = input_ids.clone()
        ids[:, 0] = self.bos_token_id
        return CaptionerLosses(self.text_decoder.loss(ids, attention_mask, states, prompt_length), loss_emb, codes)

    @torch.no_grad()
    def encode(self, image: Tensor) -> Tensor:
        """Code vector of each image, (B, L') int64. U:codebook_extractor.py:36-42."""
        if self.quantize is None:
            raise UserError("this captioner has no codebook: codes come from one that `train.py captioner-...` trained")
        return self.quantize.encode(self.visual_encoder(image))

    @torch.no_grad()
    def generate(
        self,
        image: Tensor,
        prompt_ids: Tensor,
        num_beams: int = 3,
        max_length: int = MAX_LENGTH,
        min_length: int = 5,
    ) -> Tensor:
        """Ids (B, <= max_length) of captions with the prompt, which the lengths include. V:models/blip.py:121-162.

        prompt_ids (P,) may begin with [CLS] and end with [SEP], as a tokenizer gives them: [CLS] becomes [DEC], and
        [SEP] is dropped.
        """
        prompt = prompt_ids[:-1] if prompt_ids[-1] == self.sep_token_id else prompt_ids
        prompt = prompt.clone()
        prompt[0] = self.bos_token_id
        states, _, _ = self.image_states(image)
        states = states.repeat_interleave(num_beams, dim=0)
        decoder, cache = self.text_decoder, self.text_decoder.bert.new_cache()

        def next_logits(ids: Tensor, order: Tensor) -> Tensor:
            for layer in cache:
                if own := layer["attention"]:
                    own.update({name: kept[order] for name, kept in own.items()})
            fresh = ids if not cache[0]["attention"] else ids[:, -1:]
            hidden = decoder.bert(fresh, torch.ones_like(ids), states, True, cache)[:, -1]
            return decoder.cls["predictions"](hidden).float()

        lengths = max_length, min_length, self.sep_token_id, PAD
        return beam_search(next_logits, prompt, len(image), num_beams, *lengths)


# --------------------------------------------------------------------------------------------------- model of a stage


def build(cfg: Common, vocab_size: int, sep_token_id: int = SEP) -> nn.Module:
    """The model of a stage, randomly initialised; `sep_token_id` is the id of [SEP], which ends a caption."""
    if cfg.stage == "clip":
        settings = open_clip.get_model_config(cfg.clip_model)
        if settings is None or "hf_model_name" in settings["text_cfg"] or settings.get("custom_text"):
            raise UserError(f"--clip-model {cfg.clip_model} is no open_clip config with its plain text tower")
        towers = settings["vision_cfg"], settings["text_cfg"]
        return clip.without_padding(open_clip.CLIP(settings["embed_dim"], *towers, settings.get("quick_gelu", False)))
    vision = VisionTransformer(cfg.image_size, cfg.patch_size, cfg.width, cfg.layers, cfg.heads)
    sizes = vocab_size, cfg.text_width, cfg.text_layers, cfg.text_heads, cfg.max_positions, cfg.width, cfg.dropout
    text = TextTransformer(*sizes)
    if cfg.stage == "blip":
        return BLIP(vision, text, TextTransformer(*sizes), cfg.embed_dim, cfg.queue_size)
    if cfg.stage == "retrieval":
        return RetrievalBLIP(vision, text, cfg.embed_dim, cfg.queue_size)
    quantize = None
    if cfg.stage == "captioner":
        quantize = VectorQuantizer(cfg.num_codes, cfg.code_dim, cfg.beta, cfg.legacy)
    return CodebookCaptioner(vision, TextDecoder(text), quantize, sep_token_id=sep_token_id)


def build_for(cfg: Common, tokenizer) -> nn.Module:
    """`build` for that tokenizer's vocabulary."""
    return build(cfg, 0) if cfg.stage == "clip" else build(cfg, len(tokenizer), tokenizer.sep)


def image_side(model: nn.Module, cfg: Common) -> int:
    """Side in pixels of the model's input images."""
    return clip.image_side(model) if cfg.stage == "clip" else cfg.image_size
