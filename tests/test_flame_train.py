"""python -m flame.recaption, .embed, .train and .eval, end to end on real emoji shards, in processes of their own.

A language model of two tiny layers stands in for SmolLM2. Every arm, kill -9 and resume of the embedding and of
training, two processes against one, broken shards, command-line errors, dry runs. Scripts start in forks of a server
that has imported torch and the rest already.
"""

import ast
import dataclasses
import io
import json
import os
import random
import re
import shutil
import signal
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scripts import ROOT, ended, finished, held, kill_at, metrics, one_sentence, same, start_two

from flame import config, embed, longsets, train
from flame import eval as evaluation
from flame.bank import AuthorsBank, Bank, open_bank
from flame.embed import embed_captions, read_prompts
from flame.recaption import read_captions
from shared import checkpoints, data, run

SHARDS = ROOT / "data/emoji/train"
EVAL = ROOT / "data/emoji/eval"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
SCRIPT, SECONDS = "flame.train", 120
PRELOAD = ["flame.model", "flame.bank", "shared.zeroshot", "transformers", "torch.utils.tensorboard"]
IMAGES, STEPS, PER_EPOCH = 160, 15, 5


@pytest.fixture(scope="module", autouse=True)
def corpus():
    if not (SHARDS / "00000.tar").is_file():
        pytest.fail(f"{SHARDS} is missing: `make test` makes it with 'python -m shared.corpora.emoji'", pytrace=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("flame")
    yield path
    shutil.rmtree(path)


# --------------------------------------------------------------------------------------------------------- embedding


@pytest.fixture(scope="module")
def tiny_llm(folder: Path) -> Path:
    """A folder as transformers saves them: a Llama of two layers over bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<pad>", "<s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bpe = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    out = folder / "llm"
    PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", pad_token="<pad>").save_pretrained(out)
    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), num_key_value_heads=2, **sizes)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def captions(cli, folder: Path) -> Path:
    out = folder / "captions"
    finished(cli("--data", SHARDS / "00000.tar", "--out", out, module="flame.recaption"))
    return out


@pytest.fixture(scope="module")
def embed_flags(tiny_llm: Path, captions: Path) -> list:
    flags = [
        "emoji",
        "--data",
        SHARDS / "00000.tar",
        "--dataset-size",
        IMAGES,
        "--llm",
        tiny_llm,
        "--precision",
        "fp32",
    ]
    for kind in ("raw", "short", "long"):
        flags += [f"--{kind}", captions / f"{kind}.json"]
    flags += ["--shard-size", "32", "--sets", EVAL / "groups_ood"]
    return [*flags, EVAL / "retrieval_long_ood", "--gallery", "8", "--language-sets", "--batch-size", "16"]


@pytest.fixture(scope="module")
def bank(cli, embed_flags: list, folder: Path) -> Path:
    result = finished(cli(*embed_flags, "--out", folder / "banks/bank", module="flame.embed"))
    assert re.search(r"480 captions in \d+ s, [\d.]+ captions/s", result.out) or "captions/s" in result.out
    return folder / "banks/bank"


def test_recaptions_are_the_same_for_all_drawings_of_an_emoji(captions: Path):
    lists = {kind: read_captions(captions / f"{kind}.json") for kind in ("raw", "short", "long")}
    pairs = data.open_pairs(str(SHARDS / "00000.tar"))
    assert all(set(found) == set(pairs.keys.tolist()) for found in lists.values())
    by_name: dict[str, set] = {}
    for key, name in lists["raw"].items():
        by_name.setdefault(name, set()).add((lists["short"][key], lists["long"][key]))
    assert all(len(texts) == 1 for texts in by_name.values()) and len(by_name) < len(pairs)
    words = [np.mean([len(text.split()) for text in lists[kind].values()]) for kind in ("raw", "short", "long")]
    assert words[0] < words[1] < words[2]


def test_bank_holds_the_embeddings_of_each_sample(bank: Path, captions: Path, tiny_llm: Path):
    opened = Bank(bank)
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), IMAGES)
    opened.check(pairs.keys)
    llm = embed.load_llm(embed.Config(llm=str(tiny_llm), precision="fp32"))
    lists = [read_captions(captions / f"{kind}.json") for kind in ("raw", "short", "long")]
    for key in pairs.keys[[0, 7, IMAGES - 1]].tolist():
        rows = embed_captions(llm, *[[found[key]] for found in lists])[0]
        torch.testing.assert_close(opened[key], rows, rtol=1e-3, atol=1e-3)
    assert opened.count == 11 and opened.dim == 16 and opened.index["images"] < IMAGES
    assert np.load(bank / "00000.npy").dtype == np.float16
    stored = torch.cat([torch.from_numpy(np.load(file)).float() for file in sorted(bank.glob("0*.npy"))])
    multi = F.normalize(stored[:, 4:].mean(1), dim=-1).mean(0)
    torch.testing.assert_close(opened.centres, torch.cat([stored.mean(0), multi[None]]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no row for sample nobody"):
        opened["nobody"]


def test_embedding_goes_on_where_it_stopped(bank: Path, embed_flags: list, start, cli, folder: Path):
    out = folder / "killed/bank"
    process, deadline = start(*embed_flags, "--out", out, module="flame.embed"), time.monotonic() + 60
    while process.is_alive() and not (out / "00001.npy").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not (out / "centres.npy").exists():
        with pytest.raises(ValueError, match="not finished"):
            Bank(out)
    began = (out / "00000.npy").stat().st_mtime_ns
    finished(cli(*embed_flags, "--out", out, module="flame.embed"))
    assert (out / "00000.npy").stat().st_mtime_ns == began
    for file in sorted(bank.glob("*.npy")):
        assert np.array_equal(np.load(file), np.load(out / file.name)), file.name
    assert "nothing to do" in finished(cli(*embed_flags, "--out", out, module="flame.embed")).out


def test_two_processes_embed_the_same_bank(bank: Path, embed_flags: list, start, folder: Path):
    out = folder / "two/bank"
    for process in start_two(start, *embed_flags, "--out", out, module="flame.embed"):
        finished(ended(process))
    for file in sorted(bank.glob("*.npy")):
        np.testing.assert_allclose(np.load(file), np.load(out / file.name), atol=1e-3) if file.stem not in (
            "keys",
        ) else None


def test_other_settings_do_not_mix_into_a_bank(bank: Path, embed_flags: list, in_process):
    result = in_process(*embed_flags, "--out", bank, "--mask", "causal", module="flame.embed")
    assert result.code == 2 and "was made with another mask" in result.err and one_sentence(result.err)
    result = in_process(*embed_flags, "--out", bank, "--precision", "bf16", module="flame.embed")
    assert result.code == 2 and "was made with another precision" in result.err and one_sentence(result.err)


def test_a_bank_has_one_writer_and_no_stray_shards(bank: Path, embed_flags: list, in_process, folder: Path):
    out = folder / "stray/bank"
    shutil.copytree(bank, out)
    with held(out):
        assert in_process(*embed_flags, "--out", out, module="flame.embed").code == 0  # finished: nothing to write
        (out / "centres.npy").unlink()
        result = in_process(*embed_flags, "--out", out, module="flame.embed")
        assert result.code == 2 and "belongs to a run that is still going" in result.err and one_sentence(result.err)
    (out / "index.json").unlink()  # nothing says what the shards are of
    np.save(out / "00000.npy", np.zeros(3))
    assert in_process(*embed_flags, "--out", out, module="flame.embed").code == 0
    assert all(np.array_equal(np.load(file), np.load(out / file.name)) for file in bank.glob("*.npy"))


def test_authors_banks_are_read(tmp_path: Path):
    for key, home in (("000001234", "00000"), ("123_456", "123")):
        (tmp_path / home).mkdir()
        torch.save(torch.arange(22.0).view(11, 2).half(), tmp_path / home / f"{key}.pth")
    theirs = open_bank(tmp_path)
    assert isinstance(theirs, AuthorsBank) and (theirs.count, theirs.dim) == (11, 2)
    assert theirs["000001234"].dtype == torch.float32 and torch.equal(theirs["123_456"][10], torch.tensor([20.0, 21.0]))
    with pytest.raises(ValueError, match="000009.pth is missing"):
        theirs["000009"]
    theirs.check(np.array(["000001234", "123_456"]))
    with pytest.raises(ValueError, match="000009.pth is missing"):
        theirs.check(np.array(["000001234", "000009", "123_456"]))


def test_null_captions_are_empty_and_counted(captions: Path, tmp_path: Path, capsys):
    entries = json.loads((captions / "short.json").read_text())
    entries[0]["caption"], entries[1]["caption"] = None, " "
    (tmp_path / "short.json").write_text(json.dumps(entries))
    files = {kind: str(captions / f"{kind}.json") for kind in ("raw", "long")}
    cfg = embed.Config(data=f"{SHARDS}/00000.tar", dataset_size=10, short=str(tmp_path / "short.json"), **files)
    keys, triples = embed.captions_of(cfg)
    assert len(keys) == len(triples) == 10 and [triple[1] for triple in triples[:2]] == ["", " "]
    assert "short.json: 2 of 10 captions are empty" in capsys.readouterr().out


def test_texts_need_the_language_model_once(bank: Path, monkeypatch: pytest.MonkeyPatch):
    texts = embed.texts_of_bank(bank)
    first = texts(["a cat", "two dogs"])
    assert first.shape == (2, 16) and torch.allclose(first.norm(dim=1), torch.ones(2))
    multi = texts(["a cat"], multi=True)
    llm = texts.llm()
    mean = llm(["a cat"], embed.LONG).mean(1)  # not normalised before the mean
    torch.testing.assert_close(multi, F.normalize(mean, dim=-1), rtol=0, atol=2e-3)
    monkeypatch.setattr(embed, "load_llm", lambda *args: pytest.fail("the language model was loaded"))
    again = embed.texts_of_bank(bank)
    assert torch.equal(again(["a cat", "two dogs"]), first) and torch.equal(again(["a cat"], multi=True), multi)


# -------------------------------------------------------------------------------------------------------- end to end


@pytest.fixture(scope="module")
def tiny(bank: Path, captions: Path) -> list:
    flags = f"""--data {SHARDS}/00000.tar --dataset-size {IMAGES} --image-size 16 --hidden-dim 32 --epochs 3
        --batch-size 32 --warmup 2 --lr 1e-3 --eps 1e-4 --precision fp32 --workers 0 --eval-every 0 --log-every 1
        --text-width 32 --text-layers 1 --embed-dim 16 --max-length 32""".split()
    files = [captions / f"{kind}.json" for kind in ("raw", "short", "long")]
    return [*flags, "--bank", bank, "--captions", *files]


ARMS = {
    "clip": ["emoji-clip"],
    "flame": ["emoji"],
    "raw": ["emoji", "--rows", "0", "--facets", "1"],
    "summary": ["emoji", "--rows", "0", "1", "4", "--facets", "3"],
    "nce": ["emoji", "--loss", "mp-nce"],
}


@pytest.fixture(scope="module")
def arms(cli, tiny: list, folder: Path) -> dict[str, Path]:
    def train_arm(arm: str) -> Path:
        finished(cli(*ARMS[arm], *tiny, "--out", folder / f"{arm}-seed0"))
        return folder / f"{arm}-seed0"

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(ARMS, pool.map(train_arm, ARMS), strict=True))


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(arms: dict[str, Path], arm: str):
    out = arms[arm]
    assert {path.name for path in out.iterdir()} == {"config.json", "metrics.jsonl", "tensorboard", "checkpoint.pt"}
    lines = metrics(out)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert all(np.isfinite(value) for line in lines for value in line.values())
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert ("logit_bias" in lines[0]) == (arm != "clip")
    state = checkpoints.load_checkpoint(out / "checkpoint.pt")
    assert (state["epoch"], state["batch"]) == (3, 0)
    assert any(name.startswith("text.") for name in state["state_dict"]) == (arm == "clip")


def test_training_never_loads_the_language_model(tiny: list, folder: Path, bank: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(embed, "load_llm", lambda *args: pytest.fail("the language model was loaded"))
    cfg = dataclasses.replace(
        config.EMOJI, data=f"{SHARDS}/00000.tar", dataset_size=64, bank=str(bank), out=str(folder / "curve"), epochs=2,
        batch_size=32, hidden_dim=16, image_size=16, precision="fp32", eval_every=1, eval_set=str(EVAL / "groups_ood"),
    )  # fmt: skip
    train.main(cfg)
    top1 = [line["zero_shot_top1"] for line in metrics(folder / "curve") if "zero_shot_top1" in line]
    settings = evaluation.Config((), sets=(cfg.eval_set,), language_sets=(), probe=None, precision="fp32")
    measured = evaluation.evaluate_run(cfg.out, settings, run.Process(0, 1, torch.device("cpu")))
    assert len(top1) == 2 and top1[-1] == measured["groups_ood/top1"]


def test_facets_change_from_visit_to_visit_and_images_do_not_depend_on_them(bank: Path):
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), IMAGES)
    cfg = dataclasses.replace(config.EMOJI, bank=str(bank), centre=False)
    opened = Bank(bank)
    first, second = (train.FacetDataset(pairs, cfg, 16, (0, epoch), opened) for epoch in range(2))
    image, facets, _ = first[3]
    assert facets.shape == (6, 16) and torch.equal(facets, first[3][1]) and not torch.equal(facets, second[3][1])
    rows = opened[str(pairs.keys[3])]
    assert all((rows == facet).all(1).any() for facet in facets)
    raw = train.FacetDataset(pairs, dataclasses.replace(cfg, rows=(0,), facets=1), 16, (0, 0), opened)
    assert torch.equal(raw[3][0], image) and torch.equal(raw[3][1], rows[:1])
    centred = train.FacetDataset(pairs, dataclasses.replace(cfg, rows=(0,), facets=1, centre=True), 16, (0, 0), opened)
    torch.testing.assert_close(centred[3][1], F.normalize(rows[:1] - opened.centres[:1], dim=-1))


def test_a_finished_run_is_not_run_twice(arms: dict[str, Path], tiny: list, cli):
    out = arms["flame"]
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()}
    result = finished(cli(*ARMS["flame"], *tiny, "--out", out))
    assert "is finished (3 epochs); nothing to do" in result.out
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in out.rglob("*") if path.is_file()} == before


def test_evaluation_of_all_arms_and_report(arms: dict[str, Path], cli, folder: Path):
    sets = ["--sets", EVAL / "groups_ood", EVAL / "retrieval_long_ood", "--gallery", "8"]
    sets += ["--language-sets", EVAL / "retrieval_xm_en", EVAL / "retrieval_xm_ja", "--language-gallery", "6"]
    sets += ["--few-shot", EVAL / "groups_ood", "--episodes", "3"]
    flags = [*sets, "--probe", EVAL / "groups_id", "--report", folder / "report/results.json"]
    runs = [arms["clip"], arms["flame"], arms["summary"]]
    cfg_error = cli(*runs, *flags, module="flame.eval")
    assert cfg_error.code == 0, cfg_error.err
    summary = json.loads((folder / "report/results.json").read_text())
    assert set(summary["arms"]) == {"clip", "flame", "summary"} and summary["seeds"] == [0]
    flat = summary["arms"]["flame"]
    names = "groups_ood/top1 retrieval_long_ood/text_to_image_R@1 language_ja/image_to_text_R@1 seconds"
    for name in [*names.split(), "languages/text_to_image_R@1", "languages/other_chance", "groups_id/probe_final"]:
        assert np.isfinite(flat[name]["mean"]), name
    assert 0 <= flat["groups_ood/few_shot"]["mean"] <= 100 and "groups_ood/few_shot" not in summary["arms"]["clip"]
    assert flat["retrieval_long_ood/chance"]["mean"] == 12.5
    for name in ("flame_languages.png", "flame_facets.png", "flame_curves.png", "flame_arms.png"):
        assert Image.open(folder / "report" / name).size[0] > 300
    assert "| flame" in cfg_error.out and "| claim" in cfg_error.out


# -------------------------------------------------------------------------------------------------- kill and resume


@pytest.mark.parametrize("arm, workers", [("flame", 0), ("flame", 2), ("clip", 0)])
def test_kill_and_resume_equals_uninterrupted(arms, tiny: list, start, folder: Path, arm: str, workers: int):
    out = folder / f"killed-{arm}-{workers}"
    command = [*ARMS[arm], *tiny, "--save-every", "2", "--workers", workers, "--out", out]
    kills = [random.randint(2, 6), random.randint(8, 13)]
    for line in kills:
        kill_at(start(*command), out, line)
    finished(ended(start(*command)))
    assert metrics(out) == metrics(arms[arm]), kills
    state, expected = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (out, arms[arm]))
    for part in ("state_dict", "optimizer", "epoch", "batch"):
        assert same(state[part], expected[part]), (part, kills)


# ------------------------------------------------------------------------------------------------------ two processes


@pytest.mark.parametrize("arm", ["flame", "nce", "clip"])
def test_two_processes_equal_one(arms: dict[str, Path], tiny: list, start, folder: Path, arm: str):
    """The processes get what torchrun would tell them."""
    out = folder / f"two-{arm}"
    both = start_two(start, *ARMS[arm], *tiny, "--out", out)
    for process in both:
        finished(ended(process))
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt")["state_dict"] for path in (arms[arm], out))
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-4, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


# --------------------------------------------------------------------------------------------------- broken shards


def test_broken_shards_are_reported_and_the_run_finishes(tiny: list, cli, folder: Path):
    mixed = folder / "mixed.tar"
    with tarfile.open(SHARDS / "00000.tar") as source, tarfile.open(mixed, "w") as target:
        members = sorted((m for m in source if m.name.endswith((".png", ".txt"))), key=lambda m: m.name)[:80]
        for i, member in enumerate(members):
            content = source.extractfile(member).read()
            content = {4: b"?", 9: b"", 10: b"?"}.get(i, content)  # an image, a caption, an image
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    result = finished(cli("emoji", *tiny, "--data", mixed, "--out", folder / "broken"))
    reports = [line for line in result.out.splitlines() if "broken samples" in line]
    assert len(reports) == 3 and all("unreadable image" in line for line in reports)
    result = cli("emoji", *tiny, "--data", mixed, "--strict", "--out", folder / "strict")
    assert result.code == 2 and "--strict: sample" in result.err and one_sentence(result.err)


# ---------------------------------------------------------------------------------------------------- command lines

ERRORS = {
    "paper preset without data": (["cc3m-vitb16"], "--data is missing: it takes image-text shards"),
    "paper preset without bank": (["cc3m-vitb16", "--data", f"{SHARDS}/00000.tar"], "--bank is missing"),
    "missing shard": (["emoji", "--data", "/nowhere/{0..3}.tar"], "shard /nowhere/0.tar does not exist"),
    "missing bank": (["emoji", "--bank", "/nowhere"], "no bank of caption embeddings at /nowhere"),
    "bank of other data": (["emoji", "--data", f"{SHARDS}/00001.tar"], "has no row for sample"),
    "no caption file": (["emoji-clip", "--captions", "no.json"], "caption file no.json does not exist"),
    "unknown model": (["emoji", "--model", "RN50"], "--model is one of ViT-B-16"),
    "image that patches do not tile": (["emoji", "--image-size", "41"], "patches of 8 pixels do not tile"),
    "more facets than rows": (["emoji", "--rows", "0", "1", "--facets", "3"], "--facets 3 cannot be drawn from 2"),
    "rows beyond the bank": (["emoji", "--rows", "11", "--facets", "1"], "has 11 rows an image"),
    "rows twice": (["emoji", "--rows", "1", "1", "--facets", "1"], "should be different numbers"),
    "cooldown without its schedule": (["emoji", "--cooldown", "5"], "go together"),
    "less than a batch": (["emoji", "--batch-size", "161"], "less than one batch of 161"),
    "no steps between logs": (["emoji", "--log-every", "0"], "--log-every must be at least 1"),
    "fp16 on a CPU": (["emoji", "--precision", "fp16", "--device", "cpu"], "fp16 needs a GPU"),
    "no learning": (["emoji", "--lr", "0"], "--lr must be above 0"),
    "no width": (["emoji", "--hidden-dim", "0"], "--hidden-dim must be at least 1, not 0"),
    "negative decay": (["emoji", "--weight-decay", "-1"], "--weight-decay must be at least 0"),
    "scale beyond its clamp": (["emoji", "--logit-scale", "1000"], "--logit-scale must be in 1..100"),
    "negative size": (["emoji", "--dataset-size", "-3"], "--dataset-size must be at least 1"),
    "no text layers": (["emoji-clip", "--text-layers", "0"], "--text-layers must be at least 1"),
    "no room for a word": (["emoji-clip", "--max-length", "2"], "--max-length must be at least 3"),
    "cooldown beyond the run": (
        ["emoji", "--schedule", "const-cooldown", "--cooldown", "16"],
        "--cooldown 16 is longer than the 15 steps",
    ),
    "curve of a retrieval set": (
        ["emoji-clip", "--eval-every", "1", "--eval-set", EVAL / "retrieval_ood"],
        "is a retrieval set where a classification set is wanted",
    ),
    "curve of texts that are not embedded": (
        ["emoji", "--eval-every", "1", "--eval-set", EVAL / "subgroups_ood"],
        "the texts of this evaluation set are not embedded",
    ),
    "no evaluation set": (["emoji", "--eval-every", "1", "--eval-set", "/nowhere"], "/nowhere does not exist"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_command_line_errors(in_process, tiny: list, tmp_path: Path, case: str):
    (preset, *options), message = ERRORS[case]
    defaults = tiny if preset.startswith("emoji") else ["--precision", "fp32"]
    result = in_process(preset, *defaults, "--out", tmp_path / "run", *options)
    assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_embed_command_line_errors(in_process, embed_flags: list, tmp_path: Path):
    (tmp_path / "bad.json").write_text('{"a": 1}')
    cases = {
        "--data is missing": ["cc3m-mistral-nemo", "--precision", "fp32"],
        "--short is missing": ["cc3m-mistral-nemo", "--precision", "fp32", "--data", SHARDS / "00000.tar"],
        "has no caption of sample": [*embed_flags, "--data", SHARDS / "00001.tar"],
        "is no caption file": [*embed_flags, "--long", tmp_path / "bad.json"],
        "--llm no.gguf does not exist": [*embed_flags, "--llm", "no.gguf"],
        "could not be loaded": [*embed_flags, "--llm", tmp_path / "nothing"],
        "--mask is decoupled or causal": [*embed_flags, "--mask", "none"],
        "is no clone": [*embed_flags, "--upstream", tmp_path],
        "must be at least 1, not 0": [*embed_flags, "--gallery", "0"],
        "--dataset-size must be at least 1": [*embed_flags, "--dataset-size", "-1"],
        "is a classification set where a retrieval": [*embed_flags, "--language-sets", EVAL / "groups_ood"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, "--out", tmp_path / "bank", module="flame.embed")
        assert result.code == 2 and message in result.err and one_sentence(result.err), result.err


def test_evaluation_command_line_errors(in_process, arms: dict[str, Path], tmp_path: Path):
    torch.save({"state_dict": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    (tmp_path / "other").mkdir()
    torch.save({"config": {"protos": 3}, "text_dim": 3}, tmp_path / "other/checkpoint.pt")
    flame = [arms["flame"], "--probe", "None", "--sets", "--language-sets"]
    classes, pairs = EVAL / "groups_ood", EVAL / "retrieval_ood"
    cases = {
        "is no run of flame.train": [tmp_path / "other"],
        "should end in .json": [*flame, "--report", tmp_path / "results.png"],
        "--episodes must be at least 1": [*flame, "--few-shot", classes, "--episodes", "0"],
        "groups_ood is a classification set": [*flame, "--language-sets", classes],
        "retrieval_ood is a retrieval set": [*flame, "--few-shot", pairs],
        "--gallery and --language-gallery must be": [*flame, "--sets", pairs, "--gallery", "-1"],
        "long-sets photos:x should be one of urban1k": [*flame, "--long-sets", "photos:x"],
        "name at least one run folder": [],
        "no checkpoint at": [tmp_path],
        "holds no weights of FLAME": [tmp_path / "other.pt"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, module="flame.eval")
        assert result.code == 2 and message in result.err and one_sentence(result.err), result.err


@pytest.mark.parametrize("arguments", [["emoji", "--lerning-rate", "1"], ["emoji", "--lr", "fast"], ["imagenet"], []])
def test_wrong_flags(in_process, arguments: list[str]):
    result = in_process(*arguments)
    assert result.code == 2 and "Traceback" not in result.err
    assert all(word in result.err for word in arguments[1:2])


def test_run_folders_of_other_runs_are_refused(in_process, arms: dict[str, Path], tiny: list):
    result = in_process(*ARMS["flame"], *tiny, "--lr", "1e-4", "--out", arms["flame"])
    assert result.code == 2 and "lr (was 0.001, now 0.0001)" in result.err and one_sentence(result.err)


def test_help_documents_every_field(in_process):
    for module in (config, embed):
        tree = ast.parse(Path(module.__file__).read_text())
        fields = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Config").body
        documented = 0
        for field, text in zip(fields, [*fields[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                assert isinstance(text, ast.Expr), f"{field.target.id} has no docstring"
                documented += 1
        assert documented == len(dataclasses.fields(module.Config))
    result = in_process("emoji", "--help")
    assert result.code == 0 and "--bank" in result.out


# ----------------------------------------------------------------------------------------------------------- dry run


@pytest.mark.parametrize("preset", ["emoji", "emoji-clip", "cc3m-vitb16"])
def test_dry_run(in_process, preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)  # where there is no data
    result = in_process(preset, "--dry-run")
    assert result.code == 0 and not list(tmp_path.iterdir()), result.err
    words = ("parameters", "learning rate", "samples", "batch", "steps")
    assert all(word in result.out for word in words)
    assert float(re.search(r"memory estimate +([\d.]+) GiB", result.out)[1]) > 0
    if preset == "cc3m-vitb16":
        assert "steps              30,240 (945 an epoch)" in result.out and "327.3 GB" in result.out
        assert re.search(r"learning rate +5.000e-04 at step 2,000", result.out)


def test_dry_run_of_embedding(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = in_process("yfcc15m-mistral-nemo", "--dry-run", module="flame.embed")
    assert result.code == 0 and "112,640 bytes an image" in result.out and "1,697 GB" in result.out, result


def test_presets_are_the_published_settings():
    cfg = config.PRESETS["cc3m-vitb16"][1]
    assert (cfg.lr, cfg.beta1, cfg.beta2, cfg.eps, cfg.weight_decay) == (5e-4, 0.9, 0.95, 1e-8, 0.5)
    assert (cfg.batch_size, cfg.epochs, cfg.warmup, cfg.facets, cfg.crop_scale) == (3072, 32, 2000, 6, 0.9)
    assert (cfg.model, cfg.hidden_dim, cfg.dataset_size) == ("ViT-B-16", None, 2_905_954)


# --------------------------------------------------------------------------------------------- sets as they are shipped


def test_long_sets_are_read_as_upstream_does(tmp_path: Path):
    root = tmp_path / "urban"
    (root / "caption").mkdir(parents=True)
    for name, text in (("1", "one\nmore"), ("10", "ten"), ("2", "two")):
        (root / "caption" / f"{name}.txt").write_text(text)
    pairs = longsets.urban1k(root)
    assert [text.strip() for _, text in pairs] == ["one", "two", "ten"] and pairs[2][0] == root / "image/10.jpg"

    record = {"image": "coco/1.jpg", "conversations": [{"value": "?"}, {"value": "a\nb"}]}
    (tmp_path / "share-captioner_coco_lcs_sam_1246k_1107.json").write_text(json.dumps([record] * 1002))
    pairs = longsets.sharegpt4v(tmp_path)
    assert len(pairs) == 1000 and pairs[0] == (tmp_path / "coco/1.jpg", "a b")

    lines = [{"split": split, "image_file": f"{split}.jpg", "description": "x\ny"} for split in ("train", "test")]
    (tmp_path / "docci_descriptions.jsonlines").write_text("\n".join(map(json.dumps, lines)) + "\n")
    assert longsets.docci(tmp_path) == [(tmp_path / "images/test.jpg", "x y")]

    home = tmp_path / "densely_captioned_images"
    (home / "annotations").mkdir(parents=True)
    (home / "splits.json").write_text(json.dumps({"train": ["a.json"], "test": ["b.json"]}))
    for name in "ab":
        about = {"image": f"{name}.jpg", "short_caption": "Short. one", "extra_caption": " extra</s>two\n"}
        (home / "annotations" / f"{name}.json").write_text(json.dumps(about))
    assert longsets.dci(tmp_path) == [(home / "photos" / f"{n}.jpg", "Short. one. extra. two") for n in "ab"]

    (tmp_path / "images").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "images/k.jpg")
    about = [{"image/key": key, "sw": {"caption": ["moja", "mbili"]}} for key in ("k", "gone")]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, about)))
    assert longsets.crossmodal3600(tmp_path, "sw") == [(tmp_path / "images/k.jpg", "moja")]
    assert longsets.read_image(tmp_path / "images/k.jpg").size == (4, 4)
    for reader in longsets.LONG_SET_READERS.values():
        with pytest.raises(FileNotFoundError, match="is missing"):
            longsets.read_set(reader, tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is no crossmodal3600 as its authors ship it .KeyError"):
        longsets.read_set(longsets.crossmodal3600, tmp_path, "quz")
    (tmp_path / "images/k.jpg").unlink()
    with pytest.raises(ValueError, match="no image with a caption for crossmodal3600 sw"):
        longsets.read_set(longsets.crossmodal3600, tmp_path, "sw")
    (root / "caption/1.txt").write_text("")
    assert longsets.read_set(longsets.urban1k, root)[0][1] == ""


def test_crossmodal_images_are_encoded_once_and_a_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "images").mkdir()
    lines = []
    for i, key in enumerate("abcde"):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"images/{key}.jpg")
        lines.append({"image/key": key} | {name: {"caption": [f"{name} {key}", "?"]} for name in config.LANGUAGES})
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    sizes, seen = [], {}

    class Red(torch.nn.Module):
        visual = SimpleNamespace(image_size=(8, 8))

        def encode_image(self, images, visual_only=False):
            sizes.append(len(images))
            return F.one_hot((images[:, 0].mean((1, 2)) * 5.8).round().long() % 7, 7).float()

    def texts(strings, multi):
        seen[strings[0].split()[0]] = strings, multi
        return torch.randn(len(strings), 7)

    cfg = evaluation.Config(runs=(), crossmodal=str(tmp_path), batch_size=2)
    flat = evaluation.languages(Red(), texts, cfg, "cpu", torch.float32)
    assert sizes == [2, 2, 1] and set(seen) == set(config.LANGUAGES)
    assert seen["quz"] == ([f"quz {key}" for key in "abcde"], False) and flat["languages/other_chance"] == 20


def test_authors_prompts_from_a_clone(upstream: Path):
    raw, short, long = read_prompts(upstream)
    assert [len(p.facets) for p in (raw, short, long)] == [1, 3, 7]
    assert (raw.bos_before_facets, short.bos_before_facets, long.bos_before_facets) == (False, True, True)
