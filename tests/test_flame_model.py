"""The text side (prompts, masks, frozen LLM), the image tower, the losses, checkpoints, on numbers of our own.

The authors' numbers are compared in tests/adapters/flame.py.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from authors_files import beside_weights
from conftest import leaf
from flame_runs import small
from open_clip.transformer import VisionTransformer
from scripts import in_ranks
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaModel

from flame.config import PRESETS
from flame.llm import LONG, RAW, SHORT, FrozenLLM, facet_decoupled_mask, render
from flame.model import FLAME, TrainedText, create_model, image_tower, load_checkpoint, mp_nce_loss, mp_sigmoid_loss
from flame.zeroshot import tokenizer_of
from shared.clip import open_clip_config
from tests.adapters.flame import facet_alone, padded, tiny

# ------------------------------------------------------------------------------------------------------------- texts


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
    batch = padded(captions)
    together = llm.encode_ids(batch.input_ids, batch.attention_mask, lens)
    for ids, rows in zip(captions, together, strict=True):
        for k in range(len(lens)):
            torch.testing.assert_close(rows[k], facet_alone(llm.block, llm.lm, ids, lens, k), rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_padding_sees_itself_alone_and_facets_do_not_see_each_other():
    """Two tokens of padding, a prefix of one, facets of one and of two."""
    visible = facet_decoupled_mask(torch.tensor([[0, 0, 1, 1, 1, 1]]), [1, 2])
    rows = ["100000", "010000", "001000", "001100", "001010", "001011"]
    assert visible.shape == (1, 1, 6, 6)
    assert visible[0, 0].int().tolist() == [list(map(int, row)) for row in rows]


def test_with_a_causal_mask_later_facets_see_earlier_ones():
    captions = ["a cat", "two rather old dogs"]
    apart, causal = (letters_llm(decoupled=each)(captions, SHORT) for each in (True, False))
    torch.testing.assert_close(causal[:, 0], apart[:, 0], rtol=0, atol=1e-6)
    assert (causal - apart)[:, 1:].abs().amax(-1).min() > 1e-4


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


def test_a_trained_text_tower_of_one_layer_starts_as_an_average():
    """The order of a caption's words does not matter before training."""
    torch.manual_seed(0)
    model = create_model(PRESETS["emoji-clip"][1], None).eval()
    tokens = tokenizer_of(model)(["a red cat", "cat a red"])
    torch.testing.assert_close(*model.encode_text(tokens))


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


def test_authors_checkpoints_load(tmp_path):
    theirs, ours = tiny(), tiny()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
    authors_file(theirs, tmp_path / "epoch_32.pt")
    load_checkpoint(ours, tmp_path / "epoch_32.pt")
    assert all(torch.equal(a, b) for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True))
    without = {name: value for name, value in theirs.state_dict().items() if name != "logit_bias"}
    load_checkpoint(ours, without)


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
