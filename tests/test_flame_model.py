"""The text side (captions, prompts, masks, frozen LLM), the image tower, the losses, checkpoints.

Golden tests compare with numbers of the authors' code (tests/golden/flame/README.md): one for each family of cases,
everything about a case is read from its file, tolerances are those of the README.
"""

import math
import re

import pytest
import torch
import torch.nn.functional as F
from authors_files import beside_weights
from conftest import Case, leaf
from open_clip.transformer import VisionTransformer
from scripts import in_ranks
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel

from flame import model as flame_model
from flame.llm import LONG, RAW, SHORT, FrozenLLM, clean_caption, facet_decoupled_mask, render
from flame.model import FLAME, TrainedText, image_tower, load_checkpoint, mp_nce_loss, mp_sigmoid_loss
from shared.clip import open_clip_config

# ------------------------------------------------------------------------------------------------------- from a case


def llm_of(case: Case, attention: str = "sdpa", **options) -> FrozenLLM:
    """The case's language model; Llama's blocks equal Mistral's."""
    settings = {name.removeprefix("cfg/"): case[name] for name in case if name.startswith("cfg/")}
    config = LlamaConfig(**settings, attention_bias=False, tie_word_embeddings=False)
    config._attn_implementation = attention
    lm = LlamaModel(config)
    lm.load_state_dict(case.group("param/"))
    llm = FrozenLLM(lm, None, **options)
    assert [llm.block is block for block in lm.layers].index(True) + 1 == case["layers"].item()
    return llm


def numbered(case: Case, name: str) -> list[torch.Tensor]:
    """name_0, name_1, ..."""
    return [case[f"{name}_{i}"] for i in range(len(case)) if f"{name}_{i}" in case]


def left_padded(ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    size = max(map(len, ids))
    return (
        torch.stack([F.pad(x, (size - len(x), 0)) for x in ids]),
        torch.stack([F.pad(torch.ones_like(x), (size - len(x), 0)) for x in ids]),
    )


def tower(shapes: dict[str, torch.Size], patch: int, heads: int = 1, image_size: tuple[int, ...] = ()) -> FLAME:
    """A model whose weights have these shapes, for square images unless their size (H, W) is given."""
    visual = {k.removeprefix("visual."): v for k, v in shapes.items() if k.startswith("visual.")}
    width, output_dim = visual["proj"]
    image_size = image_size or patch * math.isqrt(visual["positional_embedding"][0] - 1)
    vision = VisionTransformer(
        image_size=image_size, patch_size=patch, width=width,
        layers=1 + max(int(m[1]) for k in visual if (m := re.match(r"transformer\.resblocks\.(\d+)\.", k))),
        heads=heads, mlp_ratio=visual["transformer.resblocks.0.mlp.c_fc.weight"][0] / width, output_dim=output_dim,
        pool_type="avg",
    )  # fmt: skip
    return FLAME(vision, width, shapes["mm.3.weight"][0], shapes["mm.0.weight"][0])


def tower_of(case: Case) -> FLAME:
    state = case.group("param/")
    shapes, images = {name: value.shape for name, value in state.items()}, case.get("image", case.get("images"))
    model = tower(shapes, case["patch_size"], case["heads"], tuple(images.shape[-2:]))
    model.load_state_dict(state)
    return model


# ------------------------------------------------------------------------------------------------------------- texts


@pytest.mark.golden("flame", "caption_clean")
def test_clean_caption(case):
    for entry in case.json:
        assert clean_caption(entry["in"]) == entry["out"], entry["in"]


# position_ids: the default of the library, not an output of the authors' code
@pytest.mark.golden("flame", "facet_mask", unused=("position_ids",))
def test_facet_decoupled_mask(case):
    masks, lens = numbered(case, "mask"), case["facet_lens"].tolist()
    for i, mask in enumerate(masks):
        size = len(mask)
        visible = facet_decoupled_mask(torch.ones(1, size, dtype=torch.long), lens)
        case.close(f"mask_{i}", visible[0, 0].long())
        assert size - sum(lens) == case["prefix_len"][i]
        ends = size - sum(lens) + torch.tensor(lens).cumsum(0) - 1
        assert torch.equal(ends, case["readout"][i])
    # together, padded on the left: the same among real tokens, and padding is read by nobody but itself
    _, real = left_padded([torch.ones(len(mask), dtype=torch.long) for mask in masks])
    visible = facet_decoupled_mask(real, lens)[:, 0]
    for mask, row, seen in zip(masks, real.bool(), visible, strict=True):
        assert torch.equal(seen[row][:, row].long(), mask) and not seen[row][:, ~row].any()
        assert torch.equal(seen[~row], torch.eye(len(row), dtype=torch.bool)[~row])


@pytest.mark.golden("flame", "facet_hidden")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_facet_hidden(case, attention):
    llm, ids, lens = llm_of(case, attention), numbered(case, "input_ids"), case["facet_lens"].tolist()
    assert [len(x) - sum(lens) for x in ids] == case["prefix_len"].tolist()
    alone = torch.cat([llm.encode_ids(x[None], torch.ones_like(x)[None], lens) for x in ids])
    together = llm.encode_ids(*left_padded(ids), lens)
    for hidden in (alone, together):
        case.close("embeds", hidden, atol=1e-4)
        case.close("embeds_l2", F.normalize(hidden, dim=-1), atol=1e-5)
        case.close("infer_mean_0", hidden[0].mean(0), atol=1e-4)
        case.close("separate_gapped", hidden, atol=1e-4)
    restarted = [[facet_alone(llm, x, lens, k, gapped=False) for k in range(len(lens))] for x in ids]
    case.close("separate_contiguous", torch.stack([torch.stack(rows) for rows in restarted]), atol=1e-4)
    causal = llm_of(case, attention, decoupled=False).encode_ids(*left_padded(ids), lens)
    torch.testing.assert_close(causal[:, 0], together[:, 0], rtol=0, atol=1e-4)  # the first facet sees no other
    if len(lens) > 1:
        assert (F.normalize(causal, dim=-1) - F.normalize(together, dim=-1)).abs().max() > 1e-2


def facet_alone(llm: FrozenLLM, ids: torch.Tensor, lens: list[int], k: int, gapped: bool = True) -> torch.Tensor:
    """A causal pass of the library over prefix and facet k, at their positions in the whole sequence, or with positions
    that restart at the facet."""
    prefix = len(ids) - sum(lens)
    start = prefix + sum(lens[:k])
    places = torch.cat([torch.arange(prefix), torch.arange(start, start + lens[k])])[None]
    positions, states = places if gapped else torch.arange(prefix + lens[k])[None], []

    def keep(block, inputs, output):
        states.append((output[0] if isinstance(output, tuple) else output)[0, -1])

    handle = llm.block.register_forward_hook(keep)
    with torch.no_grad():
        llm.lm(input_ids=ids[places], attention_mask=torch.ones_like(places), position_ids=positions)
    handle.remove()
    return states[0]


# the outputs are compared by the test above; here the case gives weights and tokens
@pytest.mark.golden("flame", "facet_hidden", unused=("embeds*", "infer_mean_0", "prefix_len", "separate_*"))
def test_one_pass_equals_one_pass_a_facet(case):
    """One pass with the decoupled mask equals a separate pass for each facet."""
    llm, lens = llm_of(case), case["facet_lens"].tolist()
    for ids in numbered(case, "input_ids"):
        together = llm.encode_ids(ids[None], torch.ones_like(ids)[None], lens)[0]
        for k in range(len(lens)):
            torch.testing.assert_close(together[k], facet_alone(llm, ids, lens, k), rtol=1e-4, atol=1e-4)


ARCHITECTURES = {  # rotary positions, windows, learned positions
    "mistral": {"sliding_window": 64},
    "qwen3": {},
    "gemma2": {},
    "gemma3_text": {},
    "olmo2": {},
    "gpt_neox": {},
    "gpt2": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
}
ATTENTIONS = [
    (name, kind) for name in ARCHITECTURES for kind in ("sdpa", "eager") if (name, kind) != ("gemma2", "sdpa")
]


@pytest.mark.parametrize("architecture, attention", ATTENTIONS)
def test_any_causal_lm_serves(architecture: str, attention: str):
    """Also for other families of models, one pass of a padded batch equals a pass for each caption and facet."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, vocab_size=100, bos_token_id=1)
    sizes |= dict(eos_token_id=2, pad_token_id=0) | ARCHITECTURES[architecture]
    if architecture not in ("gpt_neox", "gpt2", "opt"):
        sizes |= dict(num_key_value_heads=2, head_dim=8)
    config = AutoConfig.for_model(architecture, **sizes)
    llm = FrozenLLM(AutoModelForCausalLM.from_config(config, attn_implementation=attention), None)
    with torch.no_grad():
        for parameter in llm.lm.parameters():
            parameter.mul_(4)  # states that depend on the text
    captions, lens = [torch.randint(3, 100, (n,)) for n in (30, 41)], [5, 7, 4]
    together = llm.encode_ids(*left_padded(captions), lens)
    for ids, rows in zip(captions, together, strict=True):
        for k in range(len(lens)):
            torch.testing.assert_close(rows[k], facet_alone(llm, ids, lens, k), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.golden("flame", "single_prompt_hidden")
def test_single_prompt_hidden(case):
    llm, ids, real = llm_of(case), case["input_ids"], case["attention_mask"]
    case.close("embeds", llm.encode_ids(ids, real)[:, 0], atol=1e-4)
    alone = [llm.encode_ids(x[m.bool()][None], m[m.bool()][None])[0, 0] for x, m in zip(ids, real, strict=True)]
    case.close("embeds_alone", torch.stack(alone), atol=1e-4)


@pytest.mark.golden("flame", "upstream_padded")
def test_padding_does_not_leak_as_upstream(case):
    """Records upstream's mask of padded batches: padding keys are visible, and padding rows see everything."""
    visible, real = case["visible"].bool(), case["attention_mask_2d"].bool()
    size = real.shape[1]
    for seen, row in zip(visible, real, strict=True):
        if not row.all():
            assert not torch.equal(seen[row][:, ~row], torch.zeros_like(seen[row][:, ~row]))
    companion = case.path.with_name(case.path.name.replace("upstream_padded", "facet_hidden"))
    if companion.exists():
        model = Case(companion)
        ours = llm_of(model).encode_ids(case["input_ids"], real.long(), model["facet_lens"].tolist())
        full = real.sum(1) == size
        torch.testing.assert_close(ours[full], case["embeds"][full], rtol=0, atol=1e-4)
        gap = (F.normalize(ours, dim=-1) - F.normalize(case["embeds"], dim=-1)).abs().amax((1, 2))
        assert (gap[~full] > 1e-2).all()


class Letters:
    """A tokenizer of bytes with a start token, which the text may contain as `<s>`; pads with 0."""

    bos_token_id, pad_token_id = 1, 0

    def __call__(self, text, add_special_tokens: bool = True):
        if not isinstance(text, str):
            return {"input_ids": [self(each, add_special_tokens)["input_ids"] for each in text]}
        ids = [byte + 2 for byte in text.encode()]
        return {"input_ids": [1] * add_special_tokens + ids}

    def decode(self, ids, skip_special_tokens: bool = False) -> str:
        return bytes(i - 2 for i in ids if i > 1).decode(errors="ignore")


def letters_llm(**options) -> FrozenLLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=258, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2,
    )  # fmt: skip
    return FrozenLLM(LlamaModel(config), Letters(), **options)


def text_of(ids: list[int]) -> str:
    return "".join("<s>" if i == 1 else chr(i - 2) for i in ids)


def test_prompts_are_put_together_as_written():
    llm, joined = letters_llm(), []
    for prompt in (RAW, SHORT, LONG):
        (prefix,) = llm.prefix_ids(['a "big" cat , or two?'], prompt, 1000)
        facets = llm.facet_ids(prompt)
        assert text_of(prefix) == "<s>" + prompt.head.replace("{caption}", "a 'big' cat , or two.")
        assert [text_of(ids).removeprefix(" <s>") for ids in facets] == list(prompt.facets)
        assert text_of(facets[0]).startswith(" <s>") == prompt.bos_before_facets == (prompt is not RAW)
        joined.append(text_of(prefix + sum(facets, [])))
        assert joined[-1] == "<s>" + render(prompt, "a 'big' cat , or two.")
    assert [len(p.facets) for p in (RAW, SHORT, LONG)] == [1, 3, 7]
    assert all(facet.startswith(" ") and facet.endswith(':"') for facet in LONG.facets)
    assert LONG.facets[:3] == SHORT.facets and SHORT.facets[:1] == RAW.facets and RAW.head == SHORT.head


@pytest.mark.parametrize("prompt", [RAW, SHORT, LONG], ids=["raw", "short", "long"])
def test_batch_equals_each_caption_alone(prompt):
    llm = letters_llm()
    captions = ["a", "a rather long caption, with , commas", "", "ein Bär"]
    together = llm(captions, prompt)
    assert together.shape == (4, len(prompt.facets), 16)
    for caption, rows in zip(captions, together, strict=True):
        torch.testing.assert_close(llm([caption], prompt)[0], rows, rtol=1e-4, atol=1e-4)
    assert llm([], prompt).shape == (0, len(prompt.facets), 16)


def test_too_long_captions_are_cut_and_prompts_are_not():
    llm = letters_llm(max_caption=20, max_length=1000)
    (prefix,) = llm.prefix_ids(["x" * 50], RAW, 1000)
    assert text_of(prefix) == "<s>" + RAW.head.replace("{caption}", "x" * 19 + ".")  # the start token is the 20th
    llm = letters_llm(max_length=600)
    prefix = llm.prefix_ids(["y" * 5000], LONG, 600 - sum(map(len, llm.facet_ids(LONG))))[0]
    assert len(prefix) + sum(map(len, llm.facet_ids(LONG))) <= 600 and text_of(prefix).endswith(LONG.head[-12:])


def test_readout_is_before_the_last_block():
    llm = letters_llm()
    ids = torch.randint(2, 258, (2, 9))
    llm.encode_ids(ids, torch.ones_like(ids))
    assert not any(m._forward_hooks for m in llm.modules())  # upstream's pile up
    states = llm.lm(input_ids=ids, output_hidden_states=True).hidden_states
    torch.testing.assert_close(llm.encode_ids(ids, torch.ones_like(ids))[:, 0], states[2][:, -1])


def test_the_language_model_is_frozen():
    llm = letters_llm()
    assert not any(p.requires_grad for p in llm.parameters()) and not llm(["a"], RAW).requires_grad


# ------------------------------------------------------------------------------------------------------------ towers


def small(text_dim: int, hidden_dim: int | None = None, **options) -> FLAME:
    return FLAME(*image_tower(open_clip_config("FLAME-emoji")), text_dim, hidden_dim, **options)


@pytest.mark.golden("flame", "image_tower")
def test_image_tower(case):
    model, image = tower_of(case), leaf(case["image"])
    case.close("tokens", torch.cat([case["tokens"][:, :1], model.patch_tokens(image)], dim=1), atol=1e-5)
    case.close("projected_cls", model.mm(case["tokens"][:, 0]), atol=1e-5)
    case.close("pooled", model.encode_image(image), atol=1e-5)
    case.close("visual_only", model.encode_image(image, visual_only=True), atol=1e-5)
    embeds = model.encode_image(image, normalize=True)
    case.close("embeds", embeds, atol=1e-5)
    torch.testing.assert_close(model(image).image_features, embeds)
    (embeds * case["cotangent"]).sum().backward()
    case.close("grad_image", image.grad, rtol=1e-4, atol=1e-6)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    case.close_group("grad/", gradients, rtol=1e-4, atol=1e-6)
    unused = {name for name, p in model.named_parameters() if p.grad is None}
    assert unused == {"visual.proj", "visual.ln_post.weight", "visual.ln_post.bias", "logit_scale", "logit_bias"}
    assert (len(model.mm[0].weight), len(model.mm[3].weight)) == (case["hidden_dim"], case["projector_dim"])
    layers, width = len(model.visual.transformer.resblocks), model.visual.positional_embedding.shape[1]
    assert (layers, width) == (case["layers"], case["width"])


def test_flame_starts_as_published():
    model = small(576)
    assert len(model.mm[0].weight) == 4096 and model.mm[3].normalized_shape == (576,)
    assert small(5120).mm[0].out_features == 5120
    assert math.isclose(model.logit_scale.exp().item(), 10, rel_tol=1e-6) and model.logit_bias.item() == -10
    model.logit_scale.data.fill_(9.0)
    model.clamp_logit_scale()
    assert math.isclose(model.logit_scale.exp().item(), 100, rel_tol=1e-5)


def test_image_features_do_not_depend_on_the_class_token_after_the_vit():
    model = small(32, 64).eval()
    images, seen = torch.randn(2, 3, 32, 32), []
    model.mm[0].register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    model.encode_image(images)
    assert seen == [(2, 16, 64)]  # upstream maps the class token as well, and drops it


def test_trained_text_leaves_padding_out():
    torch.manual_seed(0)
    text = {"context_length": 16, "vocab_size": 100, "width": 16, "heads": 2, "layers": 2}
    model = TrainedText(*image_tower(open_clip_config("FLAME-emoji")), 24, 32, text).eval()
    tokens = torch.tensor([[98, 5, 99] + [0] * 13, [98, 5, 6, 7, 99] + [0] * 11])
    torch.testing.assert_close(model.encode_text(tokens), model.text(tokens), rtol=1e-4, atol=1e-5)
    image, texts, scale, bias = model(torch.randn(2, 3, 32, 32), tokens)
    assert image.shape == texts.shape == (2, 24) and math.isclose(scale.item(), 1 / 0.07, rel_tol=1e-5)
    assert bias is None


def test_the_bias_is_the_sigmoid_losss_alone():
    torch.manual_seed(0)
    plain = small(16, 32, bias=False)
    assert plain.logit_bias is None and "logit_bias" not in plain.state_dict()
    image, _, scale, bias = plain(torch.zeros(2, 3, 32, 32))
    assert image.shape == (2, 16) and scale > 1 and bias is None
    load_checkpoint(plain, {"state_dict": plain.state_dict()})
    assert small(16, 32)(torch.zeros(2, 3, 32, 32)).logit_bias.item() == -10


def test_towers_of_other_sizes():
    with pytest.raises(ValueError, match="ViT-B-33"):
        open_clip_config("ViT-B-33")
    with pytest.raises(ValueError, match="patches of 8 pixels"):
        image_tower(open_clip_config("FLAME-emoji"), 41)
    model = FLAME(*image_tower(open_clip_config("FLAME-convnet")), 16, 32).eval()  # of timm
    assert model.patch_tokens(torch.zeros(2, 3, 32, 32)).shape == (2, 4, 256)


# ------------------------------------------------------------------------------------------------------------ losses


def sigmoid_gradients(case: Case) -> dict[str, torch.Tensor]:
    names = ("image_features", "text_features", "logit_scale", "logit_bias")
    inputs = {name: leaf(case[name]) for name in names}
    loss = mp_sigmoid_loss(*inputs.values())
    loss.backward()
    short = {"image_features": "grad_image", "text_features": "grad_text"}
    return {"loss": loss} | {short.get(name, f"grad_{name}"): value.grad for name, value in inputs.items()}


@pytest.mark.golden("flame", "mp_sigmoid_loss", "siglip_loss")
def test_mp_sigmoid_loss(case):
    assert len(case["text_features"]) == case["num_facets"] * len(case["image_features"])
    results = sigmoid_gradients(case)
    case.close("loss", results.pop("loss"), rtol=1e-5)
    for name, value in results.items():
        case.close(name, value, rtol=1e-4, atol=1e-5)


@pytest.mark.golden("flame", "mp_sigmoid_negative_only")
def test_mp_sigmoid_negative_only(case, monkeypatch):
    """The texts of another process add this to the loss: here they are gathered beside texts that add nothing."""
    image, text, scale, bias = (case[name] for name in ("image_features", "text_features", "logit_scale", "logit_bias"))
    far = 1e3 * image.repeat_interleave(case["num_facets"], 0)  # own texts, surely matched
    image, text = leaf(image), leaf(text)
    own = mp_sigmoid_loss(image[:1], far[: case["num_facets"]], scale, bias)
    assert own == 0
    losses = []
    for i in range(len(image)):  # one image at a time, whose own texts are the only other ones
        k = slice(i * case["num_facets"], (i + 1) * case["num_facets"])
        monkeypatch.setattr(flame_model, "gather", lambda own: torch.cat([own, text]))
        losses.append(mp_sigmoid_loss(image[i : i + 1], far[k], scale, bias))
    loss = torch.stack(losses).mean()
    loss.backward()
    case.close("loss", loss, rtol=1e-5)
    case.close("grad_image", image.grad, rtol=1e-4, atol=1e-6)
    case.close("grad_text", text.grad, rtol=1e-4, atol=1e-6)
    n, k = len(case["image_features"]), case["num_facets"]
    own = torch.eye(n).repeat_interleave(k, dim=1)
    case.close("labels_pos", 2 * own - 1)
    case.close("labels_neg", -torch.ones(n, n * k))


@pytest.mark.golden("flame", "mp_nce_loss", "clip_loss")
def test_mp_nce_loss(case):
    inputs = [leaf(case[name]) for name in ("image_features", "text_features", "logit_scale")]
    assert len(inputs[1]) == case["num_facets"] * len(inputs[0])
    loss = mp_nce_loss(*inputs)
    loss.backward()
    case.close("loss", loss, rtol=1e-5)
    for name, value in zip(("grad_image", "grad_text", "grad_logit_scale"), inputs, strict=True):
        case.close(name, value.grad, rtol=1e-4, atol=1e-5)


def sigmoid_of_rank(rank: int, case: dict) -> dict[str, torch.Tensor]:
    return {n: v.detach() for n, v in sigmoid_gradients(
        {name: value[rank] if torch.is_tensor(value) and value.ndim == 3 else value for name, value in case.items()}
    ).items()}  # fmt: skip


@pytest.mark.golden("flame", "mp_sigmoid_distributed")
def test_mp_sigmoid_distributed(case, tmp_path):
    world_size = len(case["image_features"])
    inputs = {n: case[n] for n in ("image_features", "text_features", "logit_scale", "logit_bias")}
    assert inputs["text_features"].shape[1] == case["num_facets"] * inputs["image_features"].shape[1]
    ranks = in_ranks(sigmoid_of_rank, world_size, tmp_path, inputs)
    stacked = {name: torch.stack([rank[name] for rank in ranks]) for name in ranks[0]}
    case.close("loss_per_rank", stacked.pop("loss"), rtol=1e-5)
    for name, value in stacked.items():
        case.close(name, value, rtol=1e-5, atol=1e-7)
    whole = {n: v.flatten(0, 1) if torch.is_tensor(v) else v for n, v in inputs.items()}
    torch.testing.assert_close(sigmoid_gradients(whole)["loss"], case["loss_per_rank"].mean(), rtol=1e-5, atol=0)


def nce_of_rank(rank: int, image: torch.Tensor, text: torch.Tensor, world_size: int) -> dict[str, torch.Tensor]:
    inputs = [leaf(image.chunk(world_size)[rank]), leaf(text.chunk(world_size)[rank]), leaf(9.0)]
    loss = mp_nce_loss(*inputs)
    (loss / world_size).backward()  # as DistributedDataParallel averages
    return {"loss": loss.detach(), **{f"grad{i}": x.grad for i, x in enumerate(inputs)}}


def test_mp_nce_of_two_processes_equals_one(tmp_path):
    torch.manual_seed(0)
    image, text = F.normalize(torch.randn(6, 5), dim=-1), F.normalize(torch.randn(18, 5), dim=-1)
    one, two = nce_of_rank(0, image, text, 1), in_ranks(nce_of_rank, 2, tmp_path, image, text, 2)
    torch.testing.assert_close(sum(rank["loss"] for rank in two) / 2, one["loss"])
    torch.testing.assert_close(torch.cat([rank["grad0"] for rank in two]), one["grad0"])
    torch.testing.assert_close(torch.cat([rank["grad1"] for rank in two]), one["grad1"])
    torch.testing.assert_close(sum(rank["grad2"] for rank in two), one["grad2"])


def test_sigmoid_loss_is_the_formula():
    torch.manual_seed(0)
    n, k = 4, 3
    image, text = F.normalize(torch.randn(n, 5), dim=-1), F.normalize(torch.randn(n * k, 5), dim=-1)
    total = sum(
        F.logsigmoid((1 if j // k == i else -1) * (7 * image[i] @ text[j] - 3)) for i in range(n) for j in range(n * k)
    )
    torch.testing.assert_close(mp_sigmoid_loss(image, text, torch.tensor(7.0), torch.tensor(-3.0)), -total / (n * k))


def test_losses_are_in_fp32_under_autocast():
    image, text = F.normalize(torch.randn(4, 8), dim=-1), F.normalize(torch.randn(8, 8), dim=-1)
    for loss in (mp_sigmoid_loss(image.bfloat16(), text.half(), 10.0, -10.0), mp_nce_loss(image.half(), text, 10.0)):
        assert loss.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- checkpoints


def authors_file(model: FLAME, path) -> None:
    """A checkpoint with a language model, in the format of upstream's main.py."""
    state = {"module." + name: value for name, value in model.state_dict().items()}
    state |= {
        "module.text.model.embed_tokens.weight": torch.zeros(4, 2),
        "module.text.lm_head.weight": torch.zeros(4, 2),
    }
    torch.save(beside_weights(epoch=32, state_dict=state), path)


# *: only the weights are of interest; test_image_tower compares the rest
@pytest.mark.golden("flame", "image_tower", unused=("*",))
def test_authors_checkpoints_load(case, tmp_path):
    theirs, ours = tower_of(case), tower_of(case)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    authors_file(theirs, tmp_path / "epoch_32.pt")
    load_checkpoint(ours, tmp_path / "epoch_32.pt")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    without = {name: value for name, value in theirs.state_dict().items() if name != "logit_bias"}
    load_checkpoint(ours, without)
    assert {name: tuple(v.shape) for name, v in ours.state_dict().items()} == {
        name: tuple(v.shape) for name, v in case.group("param/").items()
    }


def test_wrong_weights_are_refused_in_one_sentence(tmp_path):
    model = small(32, 16)
    torch.save({"state_dict": small(24, 16).state_dict()}, tmp_path / "other.pt")
    (tmp_path / "none.pt").write_bytes(b"no checkpoint")
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    for name, message in {"other.pt": "does not hold the weights of this FLAME", "none.pt": "none.pt is not a"}.items():
        with pytest.raises(ValueError, match=message) as error:
            load_checkpoint(model, tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="holds no weights"):
        load_checkpoint(model, {"state_dict": 3})


def test_visual_loads_into_open_clip():
    model = small(32, 16)
    sizes = dict(width=128, layers=3, heads=4, patch_size=8, image_size=32, output_dim=128)
    theirs = VisionTransformer(mlp_ratio=4.0, pool_type="avg", **sizes)
    theirs.load_state_dict(model.visual.state_dict())
