"""TL;DR against the numbers of the authors' code (tests/golden/tldr_reduction/README.md), and properties beyond them.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import re

import numpy as np
import pytest
import torch
from conftest import Case
from PIL import Image

from tldr_reduction.model import (
    BLIP,
    CodebookCaptioner,
    EMAVectorQuantizer,
    TextDecoder,
    TextTransformer,
    VectorQuantizer,
    VisionTransformer,
    codebook_perplexity,
    resize_pos_embed,
)

golden = pytest.mark.golden


def leaf(x) -> torch.Tensor:
    return torch.as_tensor(x).clone().requires_grad_()


def depth(state: dict, pattern: str) -> int:
    return len({m[1] for key in state if (m := re.match(pattern + r"(\d+)\.", key))})


def vision_of(case: Case, state: dict) -> VisionTransformer:
    width, _, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
    grid = round((state["visual_encoder.pos_embed"].shape[1] - 1) ** 0.5)
    layers = depth(state, r"visual_encoder\.blocks\.")
    return VisionTransformer(grid * patch, patch, width, layers, case["num_heads_vision"])


def text_of(case: Case, state: dict, prefix: str) -> TextTransformer:
    """Dropout off: the golden numbers were made without."""
    vocab, width = state[f"{prefix}embeddings.word_embeddings.weight"].shape
    return TextTransformer(
        vocab,
        width,
        depth(state, re.escape(prefix) + r"encoder\.layer\."),
        case["num_heads_text"],
        len(state[f"{prefix}embeddings.position_embeddings.weight"]),
        state[f"{prefix}encoder.layer.0.crossattention.self.key.weight"].shape[1],
        dropout=0.0,
        intermediate_size=len(state[f"{prefix}encoder.layer.0.intermediate.dense.weight"]),
    )


def captioner_of(case: Case) -> CodebookCaptioner:
    state = case.group("param/")
    quantize = None
    if "quantize.embedding.weight" in state:
        quantize = VectorQuantizer(*state["quantize.embedding.weight"].shape, case["beta"], bool(case["legacy"]))
    decoder = TextDecoder(text_of(case, state, "text_decoder.bert."))
    sep = case.get("sep_token_id", 102)
    model = CodebookCaptioner(vision_of(case, state), decoder, quantize, case["bos_token_id"], sep)
    load(model, state)
    return model


def blip_of(case: Case) -> BLIP:
    state = case.group("param/")
    queue = state.get("image_queue", torch.zeros(1, 8)).shape[1]
    decoder = "text_decoder.bert." if "text_decoder.cls.predictions.bias" in state else "text_encoder."
    texts = text_of(case, state, "text_encoder."), text_of(case, state, decoder)
    embed_dim = len(state["vision_proj.weight"])
    model = BLIP(vision_of(case, state), *texts, embed_dim, queue, case.get("momentum", 0.995))
    load(model, state)
    return model


def load(model: torch.nn.Module, state: dict) -> None:
    """Every array of the case must find its place; what the case lacks (BLIP's decoder in ITM cases) stays."""
    problems = model.load_state_dict({k: v for k, v in state.items() if not k.endswith("position_ids")}, strict=False)
    assert not problems.unexpected_keys, problems.unexpected_keys


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """By every name that a shared parameter has."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named}


# ------------------------------------------------------------------------------------------------ golden: quantisers


@golden("tldr_reduction", "vq")
def test_vector_quantizer(case):
    weight = case["param/embedding.weight"]
    quantize = VectorQuantizer(*weight.shape, case["beta"], bool(case["legacy"]))
    quantize.load_state_dict(case.group("param/"))
    for what in ("grad_loss", "grad_total"):
        z = leaf(case["z"])
        quantize.zero_grad()
        z_q, loss, codes = quantize(z)
        (loss if what == "grad_loss" else loss + (case["w"] * z_q).sum()).backward()
        case.close(f"{what}/z", z.grad, atol=1e-5)
        case.close(f"{what}/embedding.weight", quantize.embedding.weight.grad, atol=1e-5)
    case.close("z_q", z_q, atol=1e-5)
    case.close("loss", loss, atol=1e-5)
    case.close("codes", codes)
    case.close("indices", codes.flatten())
    case.close("mse", (quantize.embedding(codes).view(z.shape) - z).square().mean(), atol=1e-5)
    assert torch.equal(quantize.encode(z), codes)


@golden("tldr_reduction", "vq_perplexity")
def test_codebook_perplexity(case):
    weight = case["param/embedding.weight"]
    quantize = VectorQuantizer(*weight.shape, case["beta"], legacy=True)
    quantize.load_state_dict(case.group("param/"))
    b, _, h, w = case["z_nchw"].shape
    z = case["z_nchw"].flatten(2).transpose(1, 2)
    z_q, loss, codes = quantize(z)
    nchw = lambda x: x.detach().transpose(1, 2).reshape(b, -1, h, w)  # noqa: E731
    case.close("perplexity", codebook_perplexity(codes, len(weight)), atol=1e-5)
    case.close("indices", codes)
    case.close("loss", loss, atol=1e-5)
    case.close("z_q_nchw", nchw(z_q), atol=1e-5)
    case.close("entry_nchw", nchw(quantize.embedding(codes)), atol=1e-5)
    case.close("one_hot", torch.nn.functional.one_hot(codes.flatten(), len(weight)).float(), atol=1e-5)


@golden("tldr_reduction", "vq_ema")
def test_ema_quantizer(case):
    weight = case["param/weight"]
    quantize = EMAVectorQuantizer(*weight.shape, case["beta"], case["decay"], case["eps"], start_size=0.0)
    quantize.load_state_dict({"weight": weight, "cluster_size": torch.zeros(len(weight)), "embed_avg": weight})
    _, b, _, h, w = case["z_nchw"].shape
    nchw = lambda x: x.detach().transpose(1, 2).reshape(b, -1, h, w)  # noqa: E731
    for step, batch in enumerate(case["z_nchw"]):
        z = leaf(batch.flatten(2).transpose(1, 2))
        z_q, loss, codes = quantize(z)
        loss.backward()
        case.close(f"step{step}/z_q_nchw", nchw(z_q), atol=1e-5, rtol=1e-4 if step else 0.0)
        case.close(f"step{step}/loss", loss, atol=1e-5, rtol=1e-4 if step else 0.0)
        case.close(f"step{step}/indices", codes)
        case.close(f"step{step}/perplexity", codebook_perplexity(codes, len(weight)), atol=1e-5)
        case.close(f"step{step}/grad_z", nchw(z.grad), atol=1e-5, rtol=1e-4 if step else 0.0)
        case.close(f"step{step}/weight", quantize.weight, rtol=1e-4, atol=1e-5)
        case.close(f"step{step}/cluster_size", quantize.cluster_size, atol=1e-5)
        case.close(f"step{step}/embed_avg", quantize.embed_avg, atol=1e-5)
    z_q, loss, codes = quantize.eval()(case["z_nchw"][0].flatten(2).transpose(1, 2))
    case.close("eval/z_q_nchw", nchw(z_q), atol=1e-5, rtol=1e-4)
    case.close("eval/indices", codes)
    case.close("eval/loss", loss, atol=1e-5, rtol=1e-4)


# ----------------------------------------------------------------------------------------------- golden: captioner


@golden("tldr_reduction", "captioner_forward")
def test_captioner_forward(case):
    model = captioner_of(case).train()
    inputs = case["image"], case["input_ids"], case["attention_mask"]
    loss_lm, loss_emb = model(*inputs)
    (loss_lm + loss_emb).backward()
    case.close("loss_lm", loss_lm, atol=2e-5)
    case.close("loss_emb", loss_emb, atol=2e-5)
    case.close_group("grad/", gradients(model), atol=1e-5)
    with torch.no_grad():
        states, _, codes = model.image_states(case["image"])
        ids = case["input_ids"].clone()
        ids[:, 0] = case["bos_token_id"]
        case.close("image_embeds", model.visual_encoder(case["image"]), atol=2e-5)
        case.close("z_q", states, atol=2e-5)
        case.close("codes", codes)
        case.close("logits", model.text_decoder(ids, case["attention_mask"], states), atol=2e-5)
        case.close("loss_lm_smooth0.1", model(*inputs, label_smoothing=0.1)[0], atol=2e-5)
    assert torch.equal(model.encode(case["image"]), codes)


@golden("tldr_reduction", "caption_decoder")
def test_caption_decoder(case):
    model = captioner_of(case).train()
    inputs = case["image"], case["input_ids"], case["attention_mask"]
    loss_lm, loss_emb = model(*inputs, prompt_length=case["prompt_length"])
    (loss_lm + loss_emb).backward()
    assert loss_emb == 0
    case.close("loss_lm", loss_lm, atol=2e-5)
    case.close_group("grad/", gradients(model), atol=2e-5)
    lengths = case["max_length"], case["min_length"]
    prompts = case["prompt_ids"]
    for name in [name for name in case if name.startswith("generate_beams")]:
        beams = int(name.removeprefix("generate_beams"))
        case.close(name, model.eval().generate(case["image"], prompts[0], beams, *lengths))


@golden("tldr_reduction", "pos_embed")
def test_resize_pos_embed(case):
    case.close("out", resize_pos_embed(case["pos_embed"], case["new_grid"]), atol=1e-5)


# ----------------------------------------------------------------------------------------------------- golden: BLIP


@golden("tldr_reduction", "itm_itc")
@torch.no_grad()
def test_itm_itc(case):
    model = blip_of(case).eval()
    image, ids, mask = case["image"], case["input_ids"], case["attention_mask"]
    for suffix in ("", "_enc_token"):
        if suffix:
            ids = ids.clone()
            ids[:, 0] = case["enc_token_id"]
        logits = model.itm(image, ids, mask)
        case.close(f"itm_logits{suffix}", logits, atol=2e-5)
        case.close(f"itm_score{suffix}", logits.softmax(1)[:, 1], atol=2e-5)
    case.close("itc_sim", model.itc(image, case["input_ids"], mask), atol=2e-5)


@golden("tldr_reduction", "blip_vlp_losses")
def test_blip_losses(case):
    from tldr_reduction.blip import negative_weights

    model = blip_of(case).train()
    model.bos_token_id, model.enc_token_id = case["bos_token_id"], case["enc_token_id"]
    inputs = case["image"], case["input_ids"], case["attention_mask"], case["alpha"]
    seen = {}
    contrast = model.contrast

    def spy(*arguments):
        loss, seen["i2t"], seen["t2i"] = contrast(*arguments)
        return loss, seen["i2t"], seen["t2i"]

    model.contrast = spy
    losses = model(*inputs, negatives=(case["neg_image_index"], case["neg_text_index"]))
    sum(losses).backward()
    for name, loss in zip(("loss_ita", "loss_itm", "loss_lm"), losses, strict=True):
        case.close(name, loss, atol=5e-5)
    case.close_group("grad/", gradients(model), atol=5e-5)
    case.close_group("after/", model.state_dict(), atol=5e-5)
    case.close("weights_t2i", negative_weights(seen["t2i"]), atol=5e-5)
    case.close("weights_i2t", negative_weights(seen["i2t"]), atol=5e-5)
