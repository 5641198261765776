"""BLIP (arXiv 2201.12086), which scores image-text matching and is trained on the reduced data. Stock, not the paper's.

Authors' code: salesforce/BLIP@056a169, cited as `BLIP:`, and the fork of it in showlab/datacentric.vlp@a488102, `U:`.

Shapes: B batch of this process, W processes, L image tokens, T text tokens, E embedding, Q queue, V words.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from shared.run import gather
from tldr_reduction.towers import TextDecoder, TextTransformer, VisionTransformer, token_mean


def tie_decoder(encoder: TextTransformer, decoder: TextTransformer) -> None:
    """Share the decoder's tensors with the encoder, all but those under `attention`. BLIP:models/blip_pretrain.py:270.

    So cross-attention, feed-forward and embeddings are one; self-attention with its output LayerNorm is each its own.
    """
    decoder.embeddings = encoder.embeddings
    for ours, theirs in zip(encoder.encoder["layer"], decoder.encoder["layer"], strict=True):
        for part in ("crossattention", "intermediate", "output"):
            setattr(theirs, part, getattr(ours, part))


def negative_weights(similarity: Tensor, own: int = 0) -> Tensor:
    """Chances of hard negatives: softmax of similarities (B, W*B) + 1e-4, none for the own pair. BLIP:...:155-158.

    `own` is the number of this process's first pair in the global batch.
    """
    weights = similarity.softmax(dim=1) + 1e-4
    weights.diagonal(own).zero_()
    return weights


class BLIP(nn.Module):
    """ITC with momentum queue, ITM with hard negatives, LM. BLIP:models/blip_pretrain.py:20-245.

    `negatives` are drawn from the batches of all processes, and the contrastive keys are the momentum features of all
    plus the queue, so that W processes equal one of W times the batch (upstream: own batch). The special tokens [DEC]
    and [ENC] are the last two ids of the vocabulary.
    """

    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_encoder: TextTransformer,
        text_decoder: TextDecoder | TextTransformer,
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
        bert = text_decoder.bert if isinstance(text_decoder, TextDecoder) else text_decoder
        tie_decoder(text_encoder, bert)
        self.text_decoder = TextDecoder(bert)

    # ------------------------------------------------------------------------------------------------------ features

    def encode_image(self, image: Tensor) -> Tensor:
        """Projection of [CLS], unit (B, E)."""
        return F.normalize(self.vision_proj(self.visual_encoder(image)[:, 0]).float(), dim=-1)

    def encode_text(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Projection of [CLS] of the text alone, unit (B, E); without a mask, id 0 is padding."""
        mask = (input_ids != 0).long() if attention_mask is None else attention_mask
        return F.normalize(self.text_proj(self.text_encoder(input_ids, mask)[:, 0]).float(), dim=-1)

    def itc(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Cosines (B, B), rows images. U:models/blip_itm.py:57-66."""
        return self.encode_image(image) @ self.encode_text(input_ids, attention_mask).T

    def itm(self, image: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits (B, 2) of mismatch and match; score = softmax[:, 1]. U:models/blip_itm.py:41-55.

        Ids are used as given. BLIP trains with [ENC] at position 0; upstream's scorer leaves [CLS] there.
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss_ita, loss_itm, loss_lm). BLIP:models/blip_pretrain.py:97-212; input_ids (B, T) begin with [CLS].

        negatives: for each pair of this process, the number in the global batch of an image for its text and of a text
        for its image; None draws them.
        """
        with torch.no_grad():
            self.temp.clamp_(0.001, 0.5)
        image_embeds = self.visual_encoder(image)
        image_features = F.normalize(self.vision_proj(image_embeds[:, 0]).float(), dim=-1)
        text_features = self.encode_text(input_ids, attention_mask)
        features = image_features, text_features
        loss_ita, sim_i2t, sim_t2i = self.contrast(*features, image, input_ids, attention_mask, alpha)
        if negatives is None:
            negatives = self.draw_negatives(sim_i2t, sim_t2i)
        loss_itm = self.matching_loss(image_embeds, input_ids, attention_mask, negatives)

        decoder_ids = input_ids.clone()
        decoder_ids[:, 0] = self.bos_token_id
        losses = self.text_decoder.losses(decoder_ids, attention_mask, image_embeds, label_smoothing=0.1)
        return loss_ita, loss_itm, token_mean(losses)

    def contrast(self, image_features, text_features, image, input_ids, attention_mask, alpha: float):
        """loss_ita and the in-batch similarities (B, W*B); moves the momentum encoders, then fills the queues.

        y = alpha softmax(momentum similarities / temp) + (1 - alpha) onehot;
        loss = mean of both directions' -sum y log softmax(f keys / temp).
        """
        with torch.no_grad():
            self.update_momentum()
            embeds = self.visual_encoder_m(image)[:, 0]
            image_m = F.normalize(self.vision_proj_m(embeds).float(), dim=-1)
            text_m = F.normalize(self.text_proj_m(self.text_encoder_m(input_ids, attention_mask)[:, 0]).float(), dim=-1)
        with torch.autocast(image.device.type, enabled=False):
            return self.contrast_keys(image_features, text_features, image_m, text_m, alpha)

    def contrast_keys(self, image_features, text_features, image_m, text_m, alpha: float):
        """`contrast` in fp32, from the features (B, E) of the online and the momentum encoders."""
        with torch.no_grad():
            all_image, all_text = gather(image_m), gather(text_m)
            image_keys = torch.cat([all_image.T, self.image_queue], dim=1)  # (E, W*B + Q)
            text_keys = torch.cat([all_text.T, self.text_queue], dim=1)
            own = self.offset(len(image_m)) + torch.arange(len(image_m), device=image_m.device)
            onehot = F.one_hot(own, image_keys.shape[1])
            targets_i2t = alpha * (image_m @ text_keys / self.temp).softmax(1) + (1 - alpha) * onehot
            targets_t2i = alpha * (text_m @ image_keys / self.temp).softmax(1) + (1 - alpha) * onehot
        sim_i2t, sim_t2i = image_features @ text_keys / self.temp, text_features @ image_keys / self.temp
        loss = (F.cross_entropy(sim_i2t, targets_i2t) + F.cross_entropy(sim_t2i, targets_t2i)) / 2
        self.enqueue(all_image, all_text)
        return loss, sim_i2t[:, : len(all_text)].detach(), sim_t2i[:, : len(all_image)].detach()

    def draw_negatives(self, sim_i2t: Tensor, sim_t2i: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers in the global batch of a hard negative image for each text, and of a text for each image."""
        own = self.offset(len(sim_i2t))
        image_index = torch.multinomial(negative_weights(sim_t2i, own), 1)[:, 0]
        return image_index, torch.multinomial(negative_weights(sim_i2t, own), 1)[:, 0]

    def matching_loss(self, image_embeds, input_ids, attention_mask, negatives) -> Tensor:
        """Cross-entropy over 3B rows: pairs as they are (1), text with a wrong image, wrong text with image (0)."""
        ids = input_ids.clone()
        ids[:, 0] = self.enc_token_id
        image_index, text_index = negatives
        batch = len(ids)
        if dist.is_initialized() and dist.get_world_size() > 1:
            widest = torch.tensor(ids.shape[1], device=ids.device)
            dist.all_reduce(widest, dist.ReduceOp.MAX)
            ids, attention_mask = (F.pad(x, (0, int(widest) - x.shape[1])) for x in (ids, attention_mask))
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
        """Number of this process's first pair in the global batch."""
        return batch * dist.get_rank() if dist.is_initialized() else 0

    @torch.no_grad()
    def update_momentum(self) -> None:
        """p_m <- m p_m + (1 - m) p. BLIP:...:225."""
        for name in ("visual_encoder", "vision_proj", "text_encoder", "text_proj"):
            online = list(getattr(self, name).parameters())
            slow = list(getattr(self, f"{name}_m").parameters())
            torch._foreach_mul_(slow, self.momentum)
            torch._foreach_add_(slow, online, alpha=1 - self.momentum)

    @torch.no_grad()
    def enqueue(self, image_features: Tensor, text_features: Tensor) -> None:
        """Replace the oldest keys by those of the global batch. BLIP:...:232."""
        size, count = self.image_queue.shape[1], len(image_features)
        if count > size:
            raise ValueError(f"a queue of {size} keys is smaller than the batch of {count}: raise --queue-size")
        places = (self.queue_ptr + torch.arange(count, device=self.queue_ptr.device)) % size
        self.image_queue[:, places], self.text_queue[:, places] = image_features.T, text_features.T
        self.queue_ptr[0] = (self.queue_ptr[0] + count) % size
