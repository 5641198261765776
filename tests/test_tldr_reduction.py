"""TL;DR against the numbers of the authors' code (tests/golden/tldr_reduction/README.md), and properties beyond them.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import dataclasses
import re

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import Case
from PIL import Image

from tldr_reduction import checkpoints, cluster, config, report
from tldr_reduction.blip import negative_weights
from tldr_reduction.config import RECIPES
from tldr_reduction.datasets import RandomAugment, eval_transform
from tldr_reduction.eval import itm_histogram, rerank_scores, retrieval_recall
from tldr_reduction.model import (
    BLIP,
    CodebookCaptioner,
    EMAVectorQuantizer,
    TextDecoder,
    TextTransformer,
    VectorQuantizer,
    VisionTransformer,
    build_for,
    codebook_perplexity,
    keyword_codebook,
    rescaled,
    resize_pos_embed,
    restart_unused,
    sampled_codebook,
)
from tldr_reduction.reduce import (
    extract_codes,
    keep_top,
    kmeans,
    pre_caption,
    random_subset,
    refine_annotations,
    select_by_distance,
    select_every_nth,
    select_fraction,
    whiten,
)
from tldr_reduction.tokenizer import PROMPT, WordPiece, build_vocab, tokenizer_of
from tldr_reduction.train import alpha_ramp, cosine_lr, warmup_step_lr

golden = pytest.mark.golden


def leaf(x) -> torch.Tensor:
    return torch.as_tensor(x).clone().requires_grad_()


def exact(number: float) -> float:
    """Settings are stored as float32: 0.9, not 0.899999976."""
    return float(f"{number:.6g}")


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
    beta, decay, eps = (exact(case[name]) for name in ("beta", "decay", "eps"))
    quantize = EMAVectorQuantizer(*weight.shape, beta, decay, eps, start_size=0.0)
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


@golden("tldr_reduction", "retrieval_rerank")
def test_rerank_scores(case):
    model = blip_of(case).eval()
    model.enc_token_id = case["enc_token_id"]
    inputs = case["image"], case["input_ids"], case["attention_mask"]
    for batch_size in (3, 64):
        to_text, to_image = rerank_scores(model, *inputs, case["k_test"], batch_size)
        case.close("score_i2t", to_text, atol=2e-5)
        case.close("score_t2i", to_image, atol=2e-5)


@golden("tldr_reduction", "retrieval_metrics")
def test_retrieval_recall(case):
    c = case["captions_per_image"]
    n, m = case["scores_i2t"].shape
    own = torch.arange(m).view(n, c)
    metrics = retrieval_recall(case["scores_i2t"], case["scores_t2i"], torch.arange(m) // c, own)
    for name, value in metrics.items():
        case.close(name, value, atol=1e-4)
    assert set(metrics) == {name for name in case if name.startswith(("txt_r", "img_r", "r_mean"))}


# -------------------------------------------------------------------------------------- golden: schedules, transforms


@golden("tldr_reduction", "schedules")
def test_schedules(case):
    rates = [exact(case[name]) for name in ("init_lr", "min_lr", "warmup_lr", "warmup_steps", "lr_decay_rate")]
    epochs, steps = case["pretrain_lr"].shape
    grid = [(epoch, step) for epoch in range(epochs) for step in range(steps)]
    lr = torch.tensor([warmup_step_lr(*at, *rates) for at in grid], dtype=torch.float64)
    case.close("pretrain_lr", lr.view(epochs, steps), rtol=1e-6)
    ramp = [alpha_ramp(*at, case["steps_per_epoch"], exact(case["alpha"])) for at in grid]
    case.close("alpha_ramp", torch.tensor(ramp, dtype=torch.float64).view(epochs, steps), rtol=1e-6)
    last, ends = case["finetune_max_epoch"], [exact(case[f"finetune_{name}"]) for name in ("init_lr", "min_lr")]
    case.close("finetune_lr", torch.tensor([cosine_lr(e, last, *ends) for e in range(last)]).double(), rtol=1e-6)


@golden("tldr_reduction", "eval_transform")
def test_eval_transform(case):
    image = Image.fromarray(case["image_uint8_hwc"].numpy().astype(np.uint8))
    case.close("out", eval_transform(case["image_size"])(image), atol=1e-4)


# ------------------------------------------------------------------------------------------------- golden: reduction


@golden("tldr_reduction", "kmeans_codes")
def test_kmeans_codes(case):
    ours, theirs = whiten(case["codes"], case["pca_dim"]), case["features"]
    assert ours.shape == theirs.shape
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=0, atol=3e-4)
    assert np.random.RandomState(case["np_random_seed"]).randint(1234) == case["faiss_seed"]
    for start in ({"init_index": case["init_index"]}, {"seed": case["faiss_seed"]}):
        assignment, centroids, objective = kmeans(theirs, case["k"], niter=case["niter"], **start)
        case.close("assignment", assignment)
        case.close("centroids", centroids, atol=1e-4)
        case.close("objective", objective, rtol=1e-4)
        case.close("final_objective", objective[-1], rtol=1e-4)
    case.close("dist2_to_centroid", cluster.nearest(theirs, centroids)[1], atol=1e-4)
    case.close("cluster_sizes", torch.bincount(assignment, minlength=case["k"]))


@golden("tldr_reduction", "selection")
def test_selection(case):
    selected = select_every_nth(case["assignment"], case["num_clusters"], case["every_n"])
    case.close("selected", selected)
    case.close("selected_and_itm", selected[torch.isin(selected, case["itm_keep_index"])])
    assert torch.equal(select_fraction(case["assignment"], case["num_clusters"], 1 / case["every_n"]), selected)


@golden("tldr_reduction", "caption_merge")
def test_caption_merge(case):
    merged = refine_annotations(case.json["original_rows"], case.json["generated"], case.json["success"])
    assert merged == case.json["expected"]


@golden("tldr_reduction", "pre_caption")
def test_pre_caption(case):
    assert [pre_caption(c["caption"], c["max_words"]) for c in case.json] == [c["expected"] for c in case.json]


# -------------------------------------------------------------------------------------------------------- properties


def tiny_captioner(vocab=30, num_codes=20, code_dim=8, quantize=True) -> CodebookCaptioner:
    torch.manual_seed(0)
    quantizer = VectorQuantizer(num_codes, code_dim) if quantize else None
    text = TextTransformer(vocab, 16, 2, 4, 24, 16, dropout=0.0)
    return CodebookCaptioner(VisionTransformer(16, 8, 16, 2, 4), text, quantizer, sep_token_id=3)


def test_ties_go_to_the_lowest_code():
    quantize = VectorQuantizer(6, 4)
    with torch.no_grad():
        quantize.embedding.weight.copy_(torch.ones(6, 4))
    whole = torch.randint(-9, 9, (2, 3, 4)).float()  # distances without rounding
    assert quantize(whole)[2].eq(0).all()


def test_quantizer_gradients_by_autograd():
    """The closed-form gradients are those of the written-out losses, with the straight-through estimator."""
    torch.manual_seed(0)
    for legacy in (True, False):
        quantize = VectorQuantizer(7, 4, 0.3, legacy)
        z, w = leaf(torch.randn(3, 5, 8)), torch.randn(3, 5, 8)
        z_q, loss, codes = quantize(z)
        ours = torch.autograd.grad(loss + (w * z_q).sum(), [z, quantize.embedding.weight])
        q = quantize.embedding(codes).view(z.shape)
        first, second = F.mse_loss(q.detach(), z), F.mse_loss(q, z.detach())
        written = first + 0.3 * second if legacy else 0.3 * first + second
        theirs = torch.autograd.grad(written + (w * (z + (q - z).detach())).sum(), [z, quantize.embedding.weight])
        torch.testing.assert_close(ours, theirs)


def test_quantizer_is_fp32_under_autocast():
    quantize = VectorQuantizer(7, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, loss, _ = quantize(torch.randn(2, 3, 4).bfloat16())
    assert z_q.dtype == loss.dtype == torch.float32


def test_codes_must_divide_the_width():
    with pytest.raises(ValueError, match="width 6 cannot be cut into codes of 4"):
        VectorQuantizer(7, 4)(torch.randn(2, 3, 6))


def test_keyword_codebook():
    captions = ["A red car!", "the red car; a dog", "red dog and the car", "dog"]
    seen = []

    def embed(words):
        seen.append(words)
        return torch.arange(len(words))[:, None].expand(-1, 3)

    codebook = keyword_codebook(captions, 4, embed)
    assert seen == [["car", "dog", "red", "red car"]] and codebook.shape == (4, 3)  # by count, then by name
    keyword_codebook(reversed(captions), 4, embed)
    assert seen[0] == seen[1]
    with pytest.raises(ValueError, match="keywords, fewer than 99 codes"):
        keyword_codebook(captions, 99, embed)


def test_rescaled_and_restarted_codebooks():
    torch.manual_seed(0)
    tokens = 3 + 2 * torch.randn(500, 8)
    codebook = rescaled(torch.randn(64, 8) * 0.02, tokens)
    torch.testing.assert_close(codebook.mean(0), tokens.mean(0))
    assert 1.8 < codebook.std() < 2.2
    sampled = sampled_codebook(tokens, 64, torch.Generator().manual_seed(1))
    assert all((tokens == code).all(1).any() for code in sampled) and len(sampled.unique(dim=0)) == 64
    assert len(sampled_codebook(tokens[:10], 64, torch.Generator())) == 64
    quantize = VectorQuantizer(64, 8)
    used = torch.bincount(quantize(tokens[None])[2].flatten(), minlength=64)
    before = codebook_perplexity(quantize(tokens[None])[2], 64)
    assert restart_unused(quantize, used, tokens, torch.Generator().manual_seed(1)) == int((used == 0).sum())
    assert codebook_perplexity(quantize(tokens[None])[2], 64) > before


def test_ema_quantizer_starts_sane():
    """With cluster sizes that start at 1, one step does not blow the codes up."""
    torch.manual_seed(0)
    quantize = EMAVectorQuantizer(8, 4)
    quantize(torch.randn(4, 5, 4))
    assert quantize.weight.abs().max() < 10


def test_generation_by_hand():
    """Beams of the cached decoder against exhaustive scoring without cache; greedy follows the argmax."""
    model = tiny_captioner(quantize=False).eval()
    torch.manual_seed(1)
    image, prompt = torch.randn(3, 3, 16, 16), torch.tensor([2, 5, 6, 3])
    states = model.image_states(image)[0]
    ids = model.generate(image, prompt, 1, 9, 4)
    assert ids[:, 0].eq(28).all() and ids[:, 1:3].eq(torch.tensor([5, 6])).all()
    row = torch.tensor([[28, 5, 6]])
    while row.shape[1] < 9 and row[0, -1] != 3:
        logits = model.text_decoder(row, torch.ones_like(row), states[:1])[0, -1]
        if row.shape[1] < 4:
            logits[3] = -torch.inf
        row = torch.cat([row, logits.argmax().view(1, 1)], 1)
    assert ids[0, : row.shape[1]].tolist() == row[0].tolist()
    assert torch.equal(
        model.generate(image, prompt, 3, 9, 4)[:1, :5], model.generate(image[:1], prompt, 3, 9, 4)[:, :5]
    )
    torch.manual_seed(0)
    sampled = model.generate(image, prompt, max_length=9, min_length=5, sample=True, top_p=0.5)
    assert sampled.shape[0] == 3 and sampled.shape[1] <= 9
    with pytest.raises(ValueError, match="max-length 3 must exceed"):
        model.generate(image, prompt, 3, 3)


def test_a_learned_caption_is_written(tmp_path):
    """Stage finetune, tokenizer and generation together: [SEP] has another id in every vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(build_vocab(["red apple", "blue car"])) + "\n")
    cfg = dataclasses.replace(
        config.PRESETS["emoji-finetune"][1], vocab=str(tmp_path / "vocab.txt"), image_size=16, patch_size=8, width=32,
        layers=1, heads=2, text_width=32, text_layers=1, text_heads=2, dropout=0.0,
    )  # fmt: skip
    tokenizer = tokenizer_of(cfg)
    torch.manual_seed(0)
    captioner = build_for(cfg, tokenizer)
    images, captions = torch.randn(2, 3, 16, 16), ["red apple", "blue car"]
    ids, mask = tokenizer([PROMPT + caption for caption in captions])
    optimizer = torch.optim.AdamW(captioner.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        captioner(images, ids, mask, prompt_length=4)[0].backward()
        optimizer.step()
    captioner.eval()
    assert tokenizer.sep != 102 and captioner.sep_token_id == tokenizer.sep
    assert tokenizer.decode(captioner.generate(images, tokenizer.prompt_ids())) == captions


def test_extract_codes_is_by_index():
    model = tiny_captioner()
    images = torch.randn(5, 3, 16, 16)
    codes = extract_codes(model, [(torch.tensor([3, 1]), images[[3, 1]]), (torch.tensor([0, 4, 2]), images[[0, 4, 2]])])
    assert codes.dtype == np.uint16 and codes.shape == (5, 5 * 2)
    assert np.array_equal(codes, model.encode(images).numpy())
    many = CodebookCaptioner(model.visual_encoder, model.text_decoder, VectorQuantizer(70_000, 8))
    assert extract_codes(many, [(torch.arange(5), images)]).dtype == np.int32


def test_whitening_of_constant_positions():
    codes = torch.randint(0, 50, (200, 12), generator=torch.Generator().manual_seed(0))
    codes[:, 3], codes[:, 7] = 9, codes[:, 2]  # constant, and rank-deficient
    features = whiten(codes, 256)
    assert features.shape == (200, 10) and features.isfinite().all()
    torch.testing.assert_close(features.norm(dim=1), torch.ones(200))
    constant = whiten(torch.full((20, 4), 7), 256)
    assert constant.isfinite().all() and constant.shape == (20, 1)
    assignment, _, _ = kmeans(constant, 3)
    assert assignment.max() < 3


def test_whitening_is_trained_on_the_rows_that_faiss_takes():
    codes = torch.randint(0, 50, (2600, 2), generator=torch.Generator().manual_seed(0))  # over 1000 rows a dimension
    pca = faiss.PCAMatrix(2, 2, -0.5)
    pca.train(codes.float().numpy())
    theirs = F.normalize(torch.from_numpy(pca.apply(codes.float().numpy())), dim=1)
    ours = whiten(codes, 2)
    torch.testing.assert_close(ours @ ours[:50].T, theirs @ theirs[:50].T, rtol=0, atol=3e-4)


def test_objective_of_zero_does_not_end_k_means_as_it_does_not_in_faiss():
    two = torch.tensor([[1.0], [-1.0]]).repeat(20, 1)
    assert kmeans(two, 2, init_index=torch.tensor([0, 1]))[2].tolist() == [0] * 20


def test_clusters_in_chunks(monkeypatch):
    codes = torch.randint(0, 9, (900, 10), generator=torch.Generator().manual_seed(0)).numpy().astype(np.uint16)
    whole = cluster.cluster_codes(codes, 12)
    monkeypatch.setattr(cluster, "CHUNK", 64)
    parts = cluster.cluster_codes(codes, 12)
    assert (whole.assignment == parts.assignment).float().mean() > 0.99
    assert cluster.cluster_codes(codes, 12, points_per_centroid=20).assignment.shape == (900,)
    with pytest.raises(ValueError, match="cannot make 901 clusters"):
        kmeans(torch.randn(900, 2), 901)


def test_selections():
    generator = torch.Generator().manual_seed(0)
    assignment = torch.randint(0, 7, (300,), generator=generator)
    assignment[assignment == 4] = 5  # an empty cluster
    sizes = torch.bincount(assignment, minlength=7)
    for n in (1, 2, 4, 1000):
        kept = select_every_nth(assignment, 7, n)
        assert torch.equal(torch.bincount(assignment[kept], minlength=7), -(-sizes // n))
    for fraction in (0.0002, 0.22, 0.167, 0.5, 1.0):
        kept = select_fraction(assignment, 7, fraction)
        assert torch.equal(torch.bincount(assignment[kept], minlength=7), (sizes * fraction - 1e-5).ceil().long())
    dist2 = torch.rand(300, generator=generator)
    far, near = (select_by_distance(assignment, dist2, 7, 0.25, largest) for largest in (True, False))
    assert torch.equal(torch.bincount(assignment[far], minlength=7), -(-sizes // 4))
    for c in range(7):
        members = dist2[assignment == c].sort().values
        assert torch.equal(dist2[near[assignment[near] == c]].sort().values, members[: -(-len(members) // 4)])
        assert torch.equal(
            dist2[far[assignment[far] == c]].sort().values, members[len(members) - -(-len(members) // 4) :]
        )
    assert torch.equal(random_subset(100, 0.25, 3), random_subset(100, 0.25, 3))
    assert not torch.equal(random_subset(100, 0.25, 3), random_subset(100, 0.25, 4))
    assert len(random_subset(100, 0.25, 3).unique()) == 25
    assert keep_top(torch.tensor([1.0, 3, 2, 3]), 0.5).tolist() == [False, True, False, True]


def test_duplicates():
    codes = np.random.default_rng(0).integers(0, 99, (500, 20)).astype(np.uint16)
    codes[7], codes[400] = codes[3], codes[3]
    first = report.first_of_equal(report.row_hashes(codes, 64))
    assert first[7] == first[400] == 3 and len(set(first)) == 498


def test_repeated_and_unknown_predictions():
    rows, annotations = [["a", "x_1"], ["b", "2"]], [{"image": "d/1.jpg", "caption": "?"}]
    generated = [{"image_id": 0, "caption": "c"}, {"image_id": 0, "caption": "d"}, {"image_id": 9, "caption": "e"}]
    assert refine_annotations(rows, generated, annotations) == [{"image": "d/1.jpg", "caption": "a; c; d"}]


def test_recall_takes_blips_dicts_and_images_without_captions():
    i2t = np.array([[0.9, 0.1, 0.2], [0.9, 0.1, 0.2], [0.0, 0.3, 0.1]], np.float32)
    own = {0: [0], 1: [], 2: [2, 1]}  # the second image has none: no rank, a miss
    of_text = {0: 0, 1: 2, 2: 2}
    metrics = retrieval_recall(i2t, i2t.T.copy(), of_text, own)
    assert metrics["txt_r1"] == metrics["txt_r10"] == pytest.approx(200 / 3)
    assert metrics == retrieval_recall(torch.tensor(i2t), torch.tensor(i2t.T.copy()), [0, 2, 2], list(own.values()))


def test_itm_histogram_is_a_density():
    scores = torch.tensor([0.0, 0.05, 0.55, 1.0])
    assert itm_histogram(scores).tolist() == [5.0, 0, 0, 0, 0, 2.5, 0, 0, 0, 2.5]


def test_word_pieces(tmp_path):
    assert len(build_vocab(f"word{i}" for i in range(99))) == 5 + 2 * 22 + 2 + 99  # letters, picture, of
    few = build_vocab([chr(0x4E00 + i) for i in range(2000)] + ["rare", *["frequent"] * 3], 2008)
    assert len(few) == 2008 and {"picture", "of", "frequent"} < set(few) and "rare" not in few
    vocab = build_vocab(["a red car", "blue car", "café"])
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(vocab) + "\n")
    tokenizer = WordPiece(path)
    ids, mask = tokenizer(["a picture of red car", "unknownred"], 30)
    assert (tokenizer.dec, tokenizer.enc) == (len(vocab), len(vocab) + 1) and len(tokenizer) == len(vocab) + 2
    assert ids[0, 0] == tokenizer.cls and mask.sum(1).tolist() == [(row != 0).sum() for row in ids]
    assert tokenizer(["red " * 50], 7)[0].shape == (1, 7) and tokenizer(["red " * 50], 7)[0][0, -1] == tokenizer.sep
    prompt = tokenizer.prompt_ids("a red ")
    caption = torch.cat([torch.tensor([[tokenizer.dec]]), tokenizer(["a red blue car"])[0][:, 1:]], 1)
    assert prompt.tolist() == [tokenizer.cls, *caption[0, 1:3].tolist(), tokenizer.sep]
    assert tokenizer.decode(caption, "a red ") == ["blue car"]
    with pytest.raises(FileNotFoundError, match="vocabulary"):
        WordPiece(tmp_path / "missing.txt")


def test_augmentation_is_seeded_and_keeps_size():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 30, 3)).astype(np.uint8))
    seen = set()
    for seed in range(40):
        torch.manual_seed(seed)
        first = RandomAugment()(image)
        torch.manual_seed(seed)
        assert first.size == (30, 24) and first.tobytes() == RandomAugment()(image).tobytes()
        seen.add(first.tobytes())
    assert len(seen) > 8


def test_blip_queue_wraps_around():
    model = tiny_blip(queue_size=6)
    for start in (0, 4, 2):
        assert int(model.queue_ptr) == start
        features = F.normalize(torch.randn(4, 8), dim=1)
        model.enqueue(features, features)
        assert torch.equal(model.image_queue[:, (start + torch.arange(4)) % 6], features.T)
    with pytest.raises(ValueError, match="queue of 6 keys is smaller than the batch of 7"):
        model.enqueue(torch.randn(7, 8), torch.randn(7, 8))


def tiny_blip(queue_size=12, vocab=30) -> BLIP:
    torch.manual_seed(0)
    texts = [TextTransformer(vocab, 16, 2, 4, 24, 16, dropout=0.0) for _ in range(2)]
    return BLIP(VisionTransformer(16, 8, 16, 2, 4), *texts, 8, queue_size)


def test_decoder_shares_all_but_self_attention():
    model = tiny_blip()
    encoder, decoder = dict(model.text_encoder.named_parameters()), dict(model.text_decoder.bert.named_parameters())
    for name, parameter in encoder.items():
        assert (decoder[name] is parameter) == (".attention." not in name), name


# ------------------------------------------------------------------------------------------------------- checkpoints


def test_authors_layout_loads(tmp_path):
    """A file with their keys: momentum copies, queues, position_ids, another grid, a codebook that has no place."""
    torch.manual_seed(1)
    source = tiny_captioner()
    state = {name: torch.randn_like(value) for name, value in source.state_dict().items()}
    state["text_decoder.cls.predictions.decoder.weight"] = state["text_decoder.bert.embeddings.word_embeddings.weight"]
    state["text_decoder.cls.predictions.decoder.bias"] = state["text_decoder.cls.predictions.bias"]
    extra = {"text_decoder.bert.embeddings.position_ids": torch.arange(24)[None], "queue_ptr": torch.zeros(1)}
    extra |= {f"visual_encoder_m.{n}": v for n, v in source.visual_encoder.state_dict().items()}
    torch.save({"model": state | extra, "epoch": 3}, tmp_path / "theirs.pth")
    target = CodebookCaptioner(
        VisionTransformer(24, 8, 16, 2, 4), TextTransformer(30, 16, 2, 4, 24, 16), None, sep_token_id=3
    )
    assert checkpoints.load_blip(target, tmp_path / "theirs.pth") == []
    loaded = target.state_dict()
    pos_embed = resize_pos_embed(state["visual_encoder.pos_embed"], 3)
    assert torch.equal(loaded["visual_encoder.pos_embed"], pos_embed)
    assert all(torch.equal(loaded[name], state[name]) for name in loaded if "pos_embed" not in name)
    assert checkpoints.load_blip(tiny_captioner(), tmp_path / "theirs.pth") == []
    with pytest.raises(ValueError, match="none of the model's parameters"):
        checkpoints.load_blip(target, {"model": {"conv1": torch.zeros(1)}})


def test_hugging_face_blip_agrees():
    """transformers' own BLIP as a second opinion: same weights, same matching logits and cosines."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    text_config = sizes | dict(vocab_size=30, max_position_embeddings=24, encoder_hidden_size=16, projection_dim=8)
    vision_config = sizes | dict(image_size=16, patch_size=8, layer_norm_eps=1e-6)
    settings = transformers.BlipConfig(text_config=text_config, vision_config=vision_config, image_text_hidden_size=8)
    theirs = transformers.BlipForImageTextRetrieval(settings).eval()
    ours = tiny_blip().eval()
    ours.vision_proj, ours.text_proj = torch.nn.Linear(16, 8), torch.nn.Linear(16, 8)
    missing = checkpoints.load_blip(ours, theirs.state_dict())
    assert all(
        name.startswith(("text_decoder", "image_queue", "text_queue", "queue_ptr", "temp")) or "_m." in name
        for name in missing
    ), missing
    image, ids = torch.randn(3, 3, 16, 16), torch.randint(4, 28, (3, 7))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    with torch.no_grad():
        expected = theirs(input_ids=ids, pixel_values=image, attention_mask=mask, use_itm_head=True)
        cosines = theirs(input_ids=ids, pixel_values=image, attention_mask=mask, use_itm_head=False)
        torch.testing.assert_close(ours.itm(image, ids, mask), expected.itm_score, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(ours.itc(image, ids, mask), cosines.itm_score, rtol=1e-4, atol=1e-5)


def test_a_released_file_becomes_a_run(tmp_path, capsys):
    """A scorer's file without decoder, as BLIP's for retrieval are; its sizes are read from the tensors."""
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *map(str, range(24))]) + "\n")
    torch.manual_seed(2)
    source = tiny_blip()
    state = {name: value for name, value in source.state_dict().items() if not name.startswith("text_decoder")}
    torch.save({"model": state}, tmp_path / "retrieval.pth")
    flags = dict(source=str(tmp_path / "retrieval.pth"), vocab=str(tmp_path / "vocab.txt"))
    checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "scorer")))
    model, settings, _ = checkpoints.load_run(tmp_path / "scorer")
    assert settings.stage == "blip" and settings.image_size == 16 and f"{settings.width}" in capsys.readouterr().out
    kept = {name: value for name, value in model.state_dict().items() if name in state and "queue" not in name}
    assert all(torch.equal(value, state[name]) for name, value in kept.items()) and "itm_head.weight" in kept
    checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "larger"), image_size=24))
    assert checkpoints.load_run(tmp_path / "larger")[0].visual_encoder.pos_embed.shape[1] == 10
    with pytest.raises(ValueError, match="cannot serve as --stage finetune"):
        checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "writer"), stage="finetune"))
    with pytest.raises(ValueError, match="holds a run already"):
        checkpoints.main(checkpoints.Config(**flags, out=str(tmp_path / "scorer")))


def test_bert_starts_the_text_towers(tmp_path):
    """Encoder, decoder with its own self-attention, LM head; cross-attention, [DEC] and [ENC] stay as they were."""
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=16, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=28, max_position_embeddings=24, **sizes))
    bert.save_pretrained(tmp_path)
    theirs, model = bert.state_dict(), tiny_blip()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoints.init_text(model, str(tmp_path))
    for name, value in model.state_dict().items():
        if "crossattention" in name or not name.startswith(("text_encoder.", "text_decoder.")):
            assert torch.equal(value, before[name])
        else:
            tower, _, rest = name.partition(".")
            expected = theirs[("bert." if tower == "text_encoder" else "") + rest]
            assert torch.equal(value[: len(expected)], expected)
            assert torch.equal(value[len(expected) :], before[name][len(expected) :])
    with pytest.raises(ValueError, match="does not fit"):
        wider = TextTransformer(30, 32, 2, 4, 24, 16)
        checkpoints.init_text(CodebookCaptioner(VisionTransformer(16, 8, 16, 2, 4), wider, None), str(tmp_path))


def test_vision_tower_is_timms():
    import timm

    tower = VisionTransformer(32, 8, 32, 2, 4).eval()
    theirs = timm.models.vision_transformer.VisionTransformer(32, 8, embed_dim=32, depth=2, num_heads=4).eval()
    state = theirs.state_dict()
    tower.load_state_dict({name: state[name] for name in tower.state_dict()})
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(tower(image), theirs.forward_features(image))


def test_presets_are_the_tables():
    assert {"paper", "release_comment", "cc12m", "yfcc15m", "laion40m", "ratio-10", "clusters-10000"} <= set(RECIPES)
    presets = {name: cfg for name, (_, cfg) in config.PRESETS.items()}
    for name, (full, reduced, size) in config.SETS.items():
        assert (presets[f"blip-{name}"].expected, presets[f"blip-{name}-tldr"].expected) == (full, reduced)
        assert presets[f"blip-{name}"].image_size == size
    starts = {name: presets[f"captioner{name}"] for name in ("", "-paper", "-xavier", "-tags")}
    assert [cfg.num_codes for cfg in starts.values()] == [1024, 3000, 3000, 1600]
    assert [cfg.codebook_init for cfg in starts.values()] == ["uniform", "keywords", "xavier", "keywords"]
    assert all(cfg.text_init == "bert-base-uncased" for cfg in starts.values())
