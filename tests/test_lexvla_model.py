"""LexVLA's functions compared with golden numbers (tests/golden/lexvla/README.md), and tests of their properties.

One golden test per family; everything about a case is read from its file, tolerances are those of the README.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from conftest import Case, leaf
from scripts import in_ranks
from torch import nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaForCausalLM

from lexvla import fast, model
from lexvla.config import Config
from lexvla.fast import info_nce
from lexvla.model import (
    ImageEncoder,
    LexVLA,
    LoRALinear,
    TextEncoder,
    VisualAdapter,
    add_lora,
    contrastive_loss,
    elu1p,
    flops_loss,
    last_token,
    lexical_map,
    mean_activation,
    overuse_penalty,
    sparsify,
    total_loss,
)
from lexvla.text import bag_of_words, lexical_prompt, refine_vocabulary
from lexvla.tokens import Precomputed
from lexvla.towers import with_lora
from lexvla.train import quadratic_warmup

GRADIENT = dict(rtol=1e-4, atol=1e-6)


def check(case: Case, rtol: float = 0.0, atol: float = 0.0, **computed) -> None:
    """Call `case.close` for each of the computed arrays that the case has."""
    for name, value in computed.items():
        if name in case:
            case.close(name, value, rtol, atol)


def check_gradients(case: Case, rtol: float, **computed) -> None:
    """`check`, with an error of rtol times the largest entry: small entries are differences of large ones."""
    for name, value in computed.items():
        if name in case:
            case.close(name, value, rtol, rtol * torch.as_tensor(case[name]).abs().max().item())


@pytest.fixture(autouse=True)
def something_was_compared(request: pytest.FixtureRequest):
    case = request.getfixturevalue("case") if "case" in request.fixturenames else None
    yield
    if case is not None and case.path.suffix == ".npz":
        assert case.compared


# ---------------------------------------------------------------------------------------------------- golden: the map


@pytest.mark.golden("lexvla", "elu1p")
def test_elu1p(case):
    x = leaf(case["x"])
    y = elu1p(x)
    y.sum().backward()
    case.close("y", y, rtol=1e-6)
    case.close("grad", x.grad, rtol=1e-6)
    check(case, atol=1e-7, rtol=1e-6, vdr_y=y)
    assert (x.grad[x == 0] == 1).all()


def map_gradients(case: Case, pool: bool) -> None:
    z, codebook = leaf(case["z"]), leaf(case["codebook"])
    s = lexical_map(z, codebook, pool)
    case.close("s", s, atol=1e-6)
    if "w" in case:
        (s * case["w"]).sum().backward()
        check(case, **GRADIENT, grad_z=z.grad, grad_codebook=codebook.grad)


@pytest.mark.golden("lexvla", "map_text")
def test_map_text(case):
    map_gradients(case, pool=False)
    z, codebook = case["z"], case["codebook"]
    if "s_bias" in case:
        case.close("s_bias", lexical_map(z, codebook, bias=case["bias"]), atol=1e-6)
    if "s_centered" in case:
        case.close("s_centered", lexical_map(z, codebook - codebook.mean(0)), atol=1e-6)


@pytest.mark.golden("lexvla", "map_image")
def test_map_image(case):
    map_gradients(case, pool=True)
    z, codebook = case["z"], case["codebook"]
    if "s_bias" in case:
        case.close("s_bias", lexical_map(z, codebook, pool=True, bias=case["bias"]), atol=1e-6)
    if "s_patch" in case:
        case.close("s_patch", lexical_map(z, codebook), atol=1e-6)
    if "s_no_cls" in case:
        case.close("s_no_cls", lexical_map(z[:, 1:], codebook, pool=True), atol=1e-6)


@pytest.mark.golden("lexvla", "map_word")
def test_map_word(case):
    codebook, ids = case["codebook"], case["word_ids"]
    case.close("s", lexical_map(codebook[ids], codebook), atol=1e-6)
    lm = tiny_lm(vocab_size=len(codebook), hidden_size=codebook.shape[1])
    lm.lm_head.weight.data.copy_(codebook)
    case.close("s", TextEncoder(lm, torch.arange(len(codebook))).word(ids), atol=1e-6)


@pytest.mark.golden("lexvla", "vdr_image")
def test_vdr_image(case):
    s = lexical_map(case["features"], case["codebook"], pool=True)
    case.close("s", s, atol=1e-6)
    case.close("embed", sparsify(s, topk=case["topk"]), atol=1e-6)


@pytest.mark.golden("lexvla", "sparsify")
def test_sparsify(case):
    s = case["s"]
    by_value = sparsify(s)
    check(case, s_threshold=by_value, active_threshold=(by_value != 0).sum(-1))
    check(case, rtol=1e-6, threshold=1 / math.sqrt(s.shape[-1]), atol=0)
    if "sparsity_threshold" in case:
        ratio = 1 - (by_value != 0).float().sum(-1).mean() / s.shape[-1]
        check(case, rtol=1e-6, sparsity_threshold=ratio, splade_sparsity_ratio=ratio)
        check(case, rtol=1e-6, splade_l0=(by_value != 0).float().sum(-1).mean())
    if "topk" in case:
        by_rank = sparsify(s, topk=case["topk"])
        check(case, s_topk=by_rank, vdr_topk_sparse=by_rank, splade_pruned=by_rank)
        if "vdr_topk_mask" in case:
            case.close("vdr_topk_mask", (by_rank != 0).long())


# ----------------------------------------------------------------------------------------------------- golden: losses


@pytest.mark.golden("lexvla", "penalties")
def test_penalties(case):
    for name, loss in (("overuse", overuse_penalty), ("overuse_detached", detached_overuse), ("flops", flops_loss)):
        s = leaf(case["s"])
        value = loss(s)
        value.backward()
        check_gradients(case, 1e-5, **{f"{name}_grad": s.grad})
        if name in case:
            case.close(name, value, rtol=1e-5)
    if "overuse_weight" in case:
        case.close("overuse_weight", case["s"].mean(0) / case["s"].mean(0).sum(), rtol=1e-5)
    check(case, rtol=1e-5, flops=flops_loss(case["s"]), splade_flops=flops_loss(case["s"]))


def detached_overuse(s: torch.Tensor) -> torch.Tensor:
    """The overuse penalty without a gradient through its weight."""
    m = mean_activation(s)
    return len(m) * ((m / m.sum()).detach() * m.square()).sum()


@pytest.mark.golden("lexvla", "contrastive")
def test_contrastive(case):
    s_img, s_txt, scale = leaf(case["s_img"]), leaf(case["s_txt"]), leaf(case["logit_scale"])
    rtol = 1e-4 if case["logit_scale"] > math.log(50) else 1e-5  # the README's: hidden set at scale 100
    i2t, t2i = contrastive_loss(s_img, s_txt, scale)
    loss = i2t + t2i
    loss.backward()
    check(case, rtol, loss_i2t=i2t, loss_t2i=t2i, loss=loss, vdr_symmetric_nll=loss / 2)
    check_gradients(case, rtol, grad_s_img=s_img.grad, grad_s_txt=s_txt.grad, grad_logit_scale=scale.grad)


@pytest.mark.golden("lexvla", "total_loss")
def test_total_loss(case):
    s_img, s_txt, scale = leaf(case["s_img"]), leaf(case["s_txt"]), leaf(case["logit_scale"])
    weights = [quadratic_warmup(case["step"], case[f"lambda_{side}"], case["warmup_steps"]) for side in ("img", "txt")]
    check(case, rtol=1e-5, lambda_img_t=weights[0], lambda_txt_t=weights[1])
    losses = total_loss(s_img, s_txt, scale, *weights)
    losses["loss"].backward()
    check(
        case,
        rtol=1e-5,
        loss=losses["loss"],
        loss_contrastive=losses["i2t"] + losses["t2i"],
        overuse_img=losses["overuse_image"],
        overuse_txt=losses["overuse_text"],
    )
    check_gradients(case, 1e-5, grad_s_img=s_img.grad, grad_s_txt=s_txt.grad, grad_logit_scale=scale.grad)


# -------------------------------------------------------------------------------------- golden: words, adapter, towers


@pytest.mark.golden("lexvla", "prompt")
def test_prompt(case):
    for one in case.json["cases"]:
        assert lexical_prompt(one["caption"]) == one["prompt"]


@pytest.mark.golden("lexvla", "last_token")
def test_last_token(case):
    for side in ("right", "left"):
        if f"mask_{side}" in case:
            case.close(f"z_{side}", last_token(case["hidden"], case[f"mask_{side}"]))


@pytest.mark.golden("lexvla", "vocabulary")
def test_vocabulary(case):
    counts, special, least = (case.get(name) for name in ("counts", "special_ids", "min_count"))
    check(case, kept=refine_vocabulary(counts, torch.as_tensor(special).tolist(), least))
    if "max_size" in case:
        case.close("kept_max_size", refine_vocabulary(counts, special, least, case["max_size"]))


@pytest.mark.golden("lexvla", "bow")
def test_bow(case):
    s = bag_of_words(case["token_ids"], case["vocab_ids"])
    assert max(case["token_ids"].max(), case["vocab_ids"].max()) < case.get("vocab_size", math.inf)
    check(case, s=s, bow=(s > 0).float(), vdr_bow=(s > 0).float())


@pytest.mark.golden("lexvla", "lora")
def test_lora(case):
    case.update({name: value.double() for name, value in case.group("").items()})  # as the reference was run
    linear = nn.Linear(case["weight"].shape[1], len(case["weight"]), bias="bias" in case)
    linear.weight.data = case["weight"]
    if "bias" in case:
        linear.bias.data = case["bias"]
    lora, x = LoRALinear(linear, len(case["A"]), case["alpha"].item()), leaf(case["x"])
    lora.A.data = case["A"]
    lora.B.data = torch.zeros_like(case["B"])
    check(case, rtol=1e-4, atol=1e-6, y_zero_B=lora(x))
    lora.B.data = case["B"]
    y = lora(x)
    (y * case["w"]).sum().backward()
    merged = linear.weight + lora.scale * lora.B @ lora.A
    check(case, **GRADIENT, y=y, grad_A=lora.A.grad, grad_B=lora.B.grad, grad_x=x.grad, merged=merged)
    assert linear.weight.grad is None


def adapter_of(state: dict[str, torch.Tensor], num_heads: int) -> VisualAdapter:
    hidden, dim = state["proj.fc1.weight"].shape
    adapter = VisualAdapter(dim, num_heads, hidden, len(state["proj.fc2.weight"]))
    adapter.load_state_dict(state)
    return adapter


@pytest.mark.golden("lexvla", "adapter")
def test_adapter(case):
    z = adapter_of(case.group("param/"), case["num_heads"])(case["y"])
    tolerance = 1e-4 * case["z"].abs().max().item()
    check(case, atol=tolerance, z=z, timm_z=z)


def as_installed(state: dict[str, torch.Tensor], model: Dinov2Model) -> dict[str, torch.Tensor]:
    """Weights with transformers' present names -> with those of the installed version, which may be older."""
    older = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    older |= {"o_proj": "output.dense"}
    if not state.keys() <= model.state_dict().keys():
        state = {re.sub("[qkvo]_proj", lambda match: older[match[0]], name): array for name, array in state.items()}
    return state


@pytest.mark.golden("lexvla", "image_encoder")
def test_image_encoder(case):
    cfg = {name: value.item() for name, value in case.group("cfg/").items()}
    backbone = Dinov2Model(Dinov2Config(**cfg)).eval()
    backbone.load_state_dict(as_installed(case.group("param/backbone."), backbone))
    adapter = adapter_of(case.group("param/adapter."), cfg["num_attention_heads"])
    encoder, pixels = ImageEncoder(backbone, adapter, case["codebook"]), case["pixel_values"]
    with torch.no_grad():
        check(case, atol=2e-5, features=backbone(pixel_values=pixels).last_hidden_state)
        check(case, atol=2e-5, z=encoder.tokens(pixels), s=encoder(pixels), s_patch=encoder.patches(pixels))
        if "s_no_cls" in case:
            patches = encoder.tokens(pixels)[:, 1:]
            case.close("s_no_cls", lexical_map(patches, case["codebook"], pool=True), atol=2e-5)


@pytest.mark.golden("lexvla", "text_encoder")
def test_text_encoder(case):
    cfg = {name: value.item() for name, value in case.group("cfg/").items()}
    cfg = {name: value if name == "rms_norm_eps" else int(value) for name, value in cfg.items()}
    lm = LlamaForCausalLM(LlamaConfig(**cfg, tie_word_embeddings=bool(case["tied"]))).eval()
    state = case.group("param/")
    missing = lm.load_state_dict(state, strict=False)
    assert not missing.unexpected_keys and set(missing.missing_keys) <= {"lm_head.weight"}
    ids, mask = case["input_ids"], case["attention_mask"]
    encoder, real = TextEncoder(lm, case["vocab_ids"]), mask.bool()
    case.close("codebook", encoder.codebook)
    encoder.double()  # as the reference was run: rounding in float32 uses up the tolerance

    def hidden() -> torch.Tensor:
        return lm.model(ids, attention_mask=mask).last_hidden_state

    with torch.no_grad():
        for name, suffix in (("hidden_base", "_base"), ("hidden", "")):
            if not suffix:
                add_lora(lm, case["lora_rank"], case["lora_alpha"], lora_targets(case)).double()
                for path, value in case.group("lora/").items():
                    lm.get_parameter(path).copy_(value)
            expected, actual = case[name], hidden()
            torch.testing.assert_close(actual[real], expected[real].double(), rtol=0, atol=3e-5)
            check(case, atol=3e-5, **{f"z{suffix}": encoder.hidden(ids, mask), f"s{suffix}": encoder(ids, mask)})


def lora_targets(case: Case) -> tuple[str, ...]:
    return tuple(sorted({path.split(".")[-2] for path in case.group("lora/")}))


# ---------------------------------------------------------------------------------------------- properties: map, losses


def tiny_lm(**sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    defaults = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    return LlamaForCausalLM(LlamaConfig(**(defaults | sizes), num_key_value_heads=1)).eval()


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


def test_lora_of_the_paper_is_a_third_of_a_percent():
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig())
        base = sum(p.numel() for p in lm.parameters())
        add_lora(lm)
        adapter = VisualAdapter(768, 12, 2048, 4096)
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    assert trained == 19_988_480 and f"{trained / base:.2%}" == "0.30%"
    assert sum(p.numel() for p in adapter.parameters()) == 17_055_488


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
