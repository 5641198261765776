"""Quantisers and the captioner: gradients, codebooks, generation."""

import dataclasses

import pytest
import torch
from tldr_reduction_ports import build_vocab
from tldr_reduction_runs import tiny_captioner

from tldr_reduction import config
from tldr_reduction.codebook import frequent_keywords, rescaled, restart_unused, sampled_codebook
from tldr_reduction.model import VectorQuantizer, build_for, codebook_perplexity
from tldr_reduction.tokenizer import PROMPT, tokenizer_of


def test_ties_go_to_the_lowest_code():
    quantize = VectorQuantizer(6, 4)
    with torch.no_grad():
        quantize.embedding.weight.copy_(torch.ones(6, 4))
    whole = torch.randint(-9, 9, (2, 3, 4)).float()  # integers, so that distances have no rounding errors
    assert quantize(whole)[2].eq(0).all()


def test_quantizer_is_fp32_under_autocast():
    quantize = VectorQuantizer(7, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_q, loss, _ = quantize(torch.randn(2, 3, 4).bfloat16())
    assert z_q.dtype == loss.dtype == torch.float32


def test_codes_must_divide_the_width():
    with pytest.raises(ValueError, match="codes of 4"):
        VectorQuantizer(7, 4)(torch.randn(2, 3, 6))


def test_frequent_keywords():
    captions = ["A red car!", "the red car; a dog", "red dog and the car", "dog"]
    assert frequent_keywords(captions, 4) == ["car", "dog", "red", "red car"]  # by count, then by name
    assert frequent_keywords(reversed(captions), 4) == frequent_keywords(captions, 4)
    with pytest.raises(ValueError, match="99 codes"):
        frequent_keywords(captions, 99)


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


def test_generation_by_hand():
    """Greedy search with the cache follows the argmax without cache; beams of an image do not depend on the batch."""
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
    with pytest.raises(ValueError, match="max-length 3"):
        model.generate(image, prompt, 3, 3)


def test_a_learned_caption_is_written(tmp_path):
    """Fine-tuning, tokenizer and generation agree on the id of [SEP], which depends on the vocabulary."""
    (tmp_path / "vocab.txt").write_text("\n".join(build_vocab(["red apple", "blue car"])) + "\n")
    cfg = dataclasses.replace(
        config.PRESETS["small-finetune"][1], vocab=str(tmp_path / "vocab.txt"), image_size=16, patch_size=8, width=32,
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


def test_captions_have_5_to_20_ids_before_their_end():
    """A captioner that would end a caption at once, and one that never would."""
    model = tiny_captioner(quantize=False).eval()
    lengths = []
    for bias in (1e4, -1e4):
        model.text_decoder.cls["predictions"].bias.data[3] = bias
        ids = model.generate(torch.zeros(1, 3, 16, 16), torch.tensor([2, 5, 6, 3]))[0].tolist()
        lengths.append(ids.index(3) if 3 in ids else len(ids))
    assert lengths == [5, 20]


def test_codes_start_between_plus_and_minus_one_over_their_number():
    codes = VectorQuantizer(50, 200).embedding.weight
    assert 0.019 < codes.max() <= 0.02 and -0.02 <= codes.min() < -0.019 and codes.mean().abs() < 1e-3
