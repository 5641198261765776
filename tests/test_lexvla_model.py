"""Properties of LexVLA's functions. Golden numbers are compared in tests/adapters/lexvla.py."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import leaf
from lexvla_runs import tiny_lm
from scripts import in_ranks
from transformers import Dinov2Config, Dinov2Model

from lexvla import fast, model
from lexvla.config import Config
from lexvla.fast import info_nce
from lexvla.model import (
    ImageEncoder,
    LexVLA,
    TextEncoder,
    VisualAdapter,
    add_lora,
    contrastive_loss,
    elu1p,
    flops_loss,
    lexical_map,
    overuse_penalty,
    sparsify,
    total_loss,
)
from lexvla.tokens import Precomputed
from lexvla.towers import with_lora

# ---------------------------------------------------------------------------------------------- properties: map, losses


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elu1p_of_extremes(dtype):
    x = leaf(torch.tensor([-1e4, -80.0, -20.0, -1e-30, -0.0, 0.0, 80.0, 1e4], dtype=dtype))
    y = elu1p(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all() and (x.grad[4:6] == 1).all()
    assert y[2] > 0  # F.elu(x) + 1 is 0 there


def test_max_logits_against_autograd(monkeypatch):
    torch.manual_seed(0)
    z, codebook = leaf(torch.randn(3, 5, 7).double()), leaf(torch.randn(11, 7).double())
    weights = torch.randn(3, 11).double()
    expected = (z @ codebook.T).amax(1)
    gradients = torch.autograd.grad((expected * weights).sum(), (z, codebook))
    for chunk in (1, 40, 2**26):  # a word, a few words, all words at a time
        monkeypatch.setattr(fast, "CHUNK", chunk)
        actual = fast.MaxLogits.apply(z, codebook)
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(torch.autograd.grad((actual * weights).sum(), (z, codebook)), gradients)
    assert torch.autograd.gradcheck(lambda *x: lexical_map(*x, pool=True), (z, codebook))
    (only_z,) = torch.autograd.grad(fast.MaxLogits.apply(z, codebook.detach()).sum(), z)
    (only_codebook,) = torch.autograd.grad(fast.MaxLogits.apply(z.detach(), codebook).sum(), codebook)
    assert only_z.shape == z.shape and only_codebook.shape == codebook.shape


def test_fast_equals_the_printed_equations(monkeypatch):
    """Values and gradients of the total loss of tokens and states, with `FAST` and without."""
    torch.manual_seed(0)
    inputs = [leaf(torch.randn(*shape)) for shape in ((6, 5, 7), (6, 7), (11, 7))]
    found = []
    for chosen in (True, False):
        monkeypatch.setattr(model, "FAST", chosen)
        z_img, z_txt, codebook = inputs
        s_img, s_txt = lexical_map(z_img, codebook, pool=True), lexical_map(z_txt, codebook)
        loss = total_loss(s_img, s_txt, torch.tensor(2.0), 0.3, 0.3)["loss"]
        found.append((loss, *torch.autograd.grad(loss, inputs)))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_all_logits_is_kept():
    z, codebook = leaf(torch.randn(4, 50, 8)), leaf(torch.randn(600, 8))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        lexical_map(z, codebook, pool=True)
    assert max(saved) < 4 * 50 * 600 / 10


def test_representations_of_very_negative_logits_have_norm_one():
    z = torch.tensor([[-300.0], [-30.0], [0.0], [1e4]])
    s = lexical_map(z, torch.tensor([[1.0], [1.1], [0.9]]))
    torch.testing.assert_close(s.norm(dim=-1), torch.ones(4))
    assert (s >= 0).all()


def test_bf16_autocast_ends_in_fp32():
    z, codebook = leaf(torch.randn(2, 5, 8)), leaf(torch.randn(30, 8))
    exact = lexical_map(z, codebook, pool=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        s = lexical_map(z, codebook, pool=True)
        assert lexical_map(z[:, 0], codebook).dtype == torch.float32
    assert s.dtype == torch.float32
    torch.testing.assert_close(s, exact, rtol=0.05, atol=0.02)
    s.square().sum().backward()
    assert z.grad.isfinite().all() and codebook.grad.isfinite().all()


def test_sparsify_edges():
    uniform = torch.full((2, 256), 1 / 16)
    assert not sparsify(uniform).any()  # strict
    assert torch.equal(sparsify(uniform, topk=300), uniform) and not sparsify(uniform, topk=0).any()
    assert sparsify(uniform, topk=3)[0].nonzero().flatten().tolist() == [0, 1, 2]  # of ties, the first
    s = torch.rand(2, 3, 40)
    assert ((sparsify(s, topk=7) > 0).sum(-1) == 7).all()


def test_penalties_of_known_representations():
    V, N = 12, 4
    one_word, hot = torch.eye(V)[[0] * N], torch.eye(V)[:N]
    uniform = torch.full((N, V), V**-0.5)
    for s, overuse, flops in ((uniform, 1, 1), (one_word, V, 1), (hot, V / N**2, 1 / N)):
        torch.testing.assert_close(overuse_penalty(s), torch.tensor(float(overuse)))
        torch.testing.assert_close(flops_loss(s), torch.tensor(float(flops)))
    for _ in range(20):
        s = F.normalize(torch.rand(N, V) ** 3, dim=-1)
        assert overuse_penalty(s) >= flops_loss(s)
    assert overuse_penalty(torch.zeros(N, V)) == 0


def test_loss_of_well_separated_pairs():
    """log(1 + 3 e^-20) = 6.2e-9, which a difference of float32 logits of 20 cannot hold."""
    for loss in contrastive_loss(torch.eye(4), torch.eye(4), torch.tensor(20.0).log()):
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(math.log1p(3 * math.exp(-20)), rel=1e-5)


def test_info_nce_is_cross_entropy():
    torch.manual_seed(0)
    logits, own = leaf(30 * torch.randn(6, 9)), torch.tensor([3, 0, 8, 8, 1, 5])
    loss, expected = info_nce(logits, own), F.cross_entropy(logits.double(), own)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    pairs = [torch.autograd.grad(each, logits)[0] for each in (loss, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-4, atol=1e-7)
    alone = leaf(torch.tensor([[7.0]]))
    info_nce(alone, torch.tensor([0])).backward()
    assert info_nce(alone, torch.tensor([0])) == 0 and alone.grad.item() == 0


def losses_of_rank(rank: int, world: int) -> dict[str, torch.Tensor]:
    """Losses and gradients of the rank's pairs out of six, by penalty; "columns": of the logits that it computes."""
    generator = torch.Generator().manual_seed(0)
    rows = F.normalize(torch.rand(2, 6, 24, generator=generator) ** 3, dim=-1).chunk(world, dim=1)[rank]
    found, whole = {}, fast.info_nce
    for name in model.PENALTIES:
        inputs, shapes = (leaf(rows[0]), leaf(rows[1]), leaf(torch.tensor(2.5))), []
        fast.info_nce = lambda logits, own, shapes=shapes: shapes.append(logits.shape) or whole(logits, own)
        losses = total_loss(*inputs, 0.3, 0.7, name)
        fast.info_nce = whole
        losses["loss"].backward()
        assert shapes == [(6 // world, 6)] * 2 and all(loss.dtype == torch.float32 for loss in losses.values())
        found |= {f"{name}/{part}": loss.detach() for part, loss in losses.items()}
        found |= {f"{name}/gradient{i}": x.grad for i, x in enumerate(inputs)}
    return found


def test_ranks_compute_their_own_rows(tmp_path):
    """The mean over ranks is the loss of the global batch, and so are the gradients that DDP averages."""
    one, ranks = losses_of_rank(0, 1), in_ranks(losses_of_rank, 3, tmp_path, 3)
    for name, expected in one.items():
        found = [rank[name] for rank in ranks]
        rows = torch.cat(found) / 3 if found[0].ndim else sum(found) / 3
        torch.testing.assert_close(rows, expected, rtol=1e-5, atol=1e-7, msg=lambda m, name=name: f"{name}: {m}")
        if "overuse" in name.partition("/")[2] or "flops" in name.partition("/")[2]:
            torch.testing.assert_close(found[0], expected)  # each rank has the penalty of the global batch


def test_total_loss_adds_the_chosen_penalty():
    s, scale = F.normalize(torch.rand(4, 9), dim=-1), torch.tensor(2.0)
    plain = total_loss(s, s, scale, 1.0, 1.0, penalty="none")
    assert set(plain) == {"loss", "i2t", "t2i"}
    torch.testing.assert_close(plain["loss"], sum(contrastive_loss(s, s, scale)))
    flops = total_loss(s, s, scale, 0.5, 2.0, penalty="flops")
    torch.testing.assert_close(flops["loss"], plain["loss"] + 2.5 * flops_loss(s))


# ------------------------------------------------------------------------------------------------- properties: modules


def tiny_model() -> LexVLA:
    lm = add_lora(tiny_lm(), rank=2)
    text = TextEncoder(lm, torch.arange(0, 64, 2))
    backbone = Dinov2Model(Dinov2Config(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8,
                                        patch_size=4, mlp_ratio=2))  # fmt: skip
    return LexVLA(ImageEncoder(backbone, VisualAdapter(8, 2, 12, 16), text.codebook), text)


def test_what_is_trained():
    m = tiny_model().train()
    trained = {name for name, parameter in m.named_parameters() if parameter.requires_grad}
    groups = ("image.adapter.", "image.codebook", "logit_scale", "text.lm.model.layers.")
    assert all(name.startswith(groups) for name in trained)
    assert all(name.endswith((".A", ".B")) for name in trained if name.startswith("text."))
    assert sum(name.endswith(".A") for name in trained) == 14  # seven linear layers in each of two blocks
    assert not any("lm_head" in name for name in trained)
    assert not m.image.backbone.training and not m.text.lm.training and m.image.adapter.training
    torch.testing.assert_close(m.logit_scale.item(), math.log(1 / 0.07))
    s_img, s_txt, scale = m(torch.randn(3, 3, 8, 8), torch.randint(0, 64, (3, 5)), torch.ones(3, 5).long())
    total_loss(s_img, s_txt, scale, 1.0, 1.0)["loss"].backward()
    assert {name for name, p in m.named_parameters() if p.grad is not None} == trained


def test_codebooks_start_equal_and_only_one_moves():
    m = tiny_model()
    assert torch.equal(m.image.codebook, m.text.codebook)
    torch.testing.assert_close(m.text.codebook, m.text.lm.lm_head.weight[m.text.vocab_ids])
    assert m.image.codebook.requires_grad and not m.text.codebook.requires_grad


def test_lora_starts_as_the_pretrained_model():
    lm, ids = tiny_lm(), torch.randint(0, 64, (2, 6))
    before = lm(ids).logits
    add_lora(lm, rank=3)
    torch.testing.assert_close(lm(ids).logits, before)
    with pytest.raises(ValueError, match="none of nothing"):
        add_lora(tiny_lm(), targets=("nothing",))


def test_temperature_is_capped():
    m = tiny_model()
    for value, capped in ((9.0, math.log(100)), (-3.0, -3.0)):
        m.logit_scale.data.fill_(value)
        m.clamp_logit_scale()
        assert m.logit_scale.item() == pytest.approx(capped)


def test_last_token_is_independent_of_padding():
    m, ids = tiny_model(), torch.randint(1, 64, (1, 5))
    alone = m.text(ids, torch.ones_like(ids))
    for side in ((0, 3), (3, 0)):
        mask = F.pad(torch.ones_like(ids), side)
        padded = m.text(F.pad(ids, side), mask)
        torch.testing.assert_close(padded, alone, rtol=1e-4, atol=1e-5)


def test_recomputed_blocks_give_the_same_gradients():
    grads, ids = [], torch.randint(0, 64, (3, 6))
    for checkpointing in (False, True):
        cfg = Config(lora_rank=2, grad_checkpointing=checkpointing)
        text = TextEncoder(with_lora(tiny_lm(), cfg), torch.arange(40)).train()
        calls = []
        text.lm.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        for name, parameter in text.named_parameters():
            if name.endswith(".B"):
                torch.nn.init.constant_(parameter, 0.1)
        text(ids, torch.ones_like(ids)).square().mul(torch.arange(40)).sum().backward()
        assert len(calls) == 1 + checkpointing
        grads.append({name: p.grad for name, p in text.named_parameters() if p.grad is not None and ".B" in name})
    torch.testing.assert_close(grads[0], grads[1])


def test_words_of_a_set_of_patches_are_pooled_before_normalising():
    """They equal eq. 4 of the set's tokens; for all patches, the representation of the image without [CLS]."""
    torch.manual_seed(0)
    tokens, codebook = torch.randn(3, 7, 8), torch.randn(20, 8)
    image = ImageEncoder(Precomputed(), torch.nn.Identity(), codebook, bias=-1.0)
    chosen = torch.rand(3, 6) < 0.5
    chosen[:, 2] = True
    found = image.patch_set(tokens, chosen)
    for row, z, kept in zip(found, tokens, chosen, strict=True):
        torch.testing.assert_close(row, lexical_map(z[None, 1:][:, kept], codebook, pool=True, bias=-1.0)[0])
    whole = lexical_map(tokens[:, 1:], codebook, pool=True, bias=-1.0)
    torch.testing.assert_close(image.patch_set(tokens, torch.ones(3, 6, dtype=torch.bool)), whole)
    assert not torch.allclose(found, image.patches(tokens).where(chosen[..., None], 0.0).amax(1))  # normalised first
