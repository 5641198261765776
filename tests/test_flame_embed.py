"""python -m flame.embed: prompts, embedding captions with the LLM into a bank, cached texts of evaluations.

A language model of two tiny layers replaces SmolLM2. Scripts are forks of a server that has already imported torch and
other packages; other test files train on this bank.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scripts import ROOT, SHARDS, ended, finished, held, one_sentence, start_two
from test_flame_model import left_padded, llm_of, numbered

from flame import embed
from flame.bank import Bank
from flame.embed import embed_captions, parse_prompt, read_prompts, render
from flame.model import Prompt
from flame.recaption import read_captions
from shared import checkpoints, data

EVAL = ROOT / "data/emoji/eval"
SCRIPT, SECONDS = "flame.embed", 120
IMAGES = 160
pytestmark = pytest.mark.usefixtures("embedded_corpus")


@pytest.fixture(scope="module")
def folder(embedded_corpus: None, tmp_path_factory: pytest.TempPathFactory):
    path = tmp_path_factory.mktemp("flame")
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def tiny_llm(folder: Path) -> Path:
    """A Llama of two layers over bytes, in transformers' format."""
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


# ----------------------------------------------------------------------------------------------------------- prompts


@pytest.mark.golden("flame", "template_fingerprints")
def test_template_fingerprints(case):
    for name, about in case.json.items():
        assert embed.FINGERPRINTS[name] == about["sha256"]
        ours = dict(zip(("raw", "short", "long"), embed.PROMPTS, strict=True))[name]
        assert len(ours.facets) == about["closers"]


def test_parse_prompt_reads_the_authors_notation():
    template = 'An_image_:_"*sent_0*"_._So_,_<s>_it_is_one_word:"_its_colour_is:"'
    prompt = parse_prompt(template)
    assert prompt == Prompt('An image : "{caption}" . So ,', (' it is one word:"', ' its colour is:"'), True)
    assert render(prompt, "CAPTION") == template.replace("_", " ").replace("*sent 0*", "CAPTION")
    assert not parse_prompt('An_image_:_"*sent_0*"_,_it_is:"').bos_before_facets


def test_read_prompts_refuses_other_words(tmp_path):
    with pytest.raises(ValueError, match="no clone"):
        embed.read_prompts(tmp_path)
    (tmp_path / "src/training").mkdir(parents=True)
    (tmp_path / "src/training/embed_cc3m_mask.py").write_text('long_template = "a_*sent_0*_,_b:\\""\n')
    with pytest.raises(ValueError, match="4d2b9a9"):
        embed.read_prompts(tmp_path)
    assert hashlib.sha256(b"").hexdigest() not in embed.FINGERPRINTS.values()


def test_authors_prompts_from_a_clone(upstream: Path):
    raw, short, long = read_prompts(upstream)
    assert [len(p.facets) for p in (raw, short, long)] == [1, 3, 7]
    assert (raw.bos_before_facets, short.bos_before_facets, long.bos_before_facets) == (False, True, True)


# -------------------------------------------------------------------------------------------------------------- bank


@pytest.mark.golden("flame", "embed_bank")
def test_embed_bank(case):
    """`embed_captions` with a language model that looks up its captions' ids in the case."""
    llm = llm_of(case)
    lens = {1: [1], 3: case["facet_lens_short"].tolist(), 7: case["facet_lens_long"].tolist()}
    kinds = {1: "raw", 3: "short", 7: "long"}

    def lookup(captions: list[str], prompt: Prompt) -> torch.Tensor:
        k = len(prompt.facets)
        return llm.encode_ids(*left_padded([case[f"ids_{kinds[k]}_{caption}"] for caption in captions]), lens[k])

    names = [str(i) for i in range(len(numbered(case, "ids_raw")))]
    bank = embed_captions(lookup, names, names, names)
    case.close("bank", bank, atol=1e-5)
    case.close("bank", embed_captions(lookup, names, names, names, batch_size=1), atol=1e-5)
    torch.testing.assert_close(bank.half().float(), case["bank"], rtol=1e-3, atol=1e-4)  # as stored


def test_equal_captions_are_embedded_once():
    asked, ticks = [], []

    def lengths(captions: list[str], prompt: Prompt) -> torch.Tensor:
        asked.extend(captions)
        return torch.tensor([[[float(len(caption))]] for caption in captions])

    captions = ["a dog", "two brown dogs", "a dog", "a cat on a mat", "a dog", "two brown dogs"]
    embeddings = embed.embed_batches(lengths, captions, embed.SHORT, batch_size=2, tick=ticks.append)
    assert embeddings.flatten().tolist() == [len(caption) for caption in captions]
    assert sorted(asked) == sorted(set(captions)) and sum(ticks) == len(captions)


def test_bank_holds_the_embeddings_of_each_sample(bank: Path, captions: Path, tiny_llm: Path):
    opened = Bank(bank)
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), IMAGES)
    opened.check(pairs.keys)
    llm = embed.load_llm(embed.Config(llm=str(tiny_llm), precision="fp32"))
    lists = [read_captions(captions / f"{kind}.json") for kind in ("raw", "short", "long")]
    for key in pairs.keys[[0, 7, IMAGES - 1]].tolist():
        embeddings = embed_captions(llm, *[[found[key]] for found in lists])[0]
        torch.testing.assert_close(opened[key], embeddings, rtol=1e-3, atol=1e-3)
    assert opened.facets == 11 and opened.dim == 16 and opened.index["images"] < IMAGES
    assert len(checkpoints.read_json(bank / "captions.json")) == 3
    assert np.load(bank / "00000.npy").dtype == np.float16
    stored = torch.cat([torch.from_numpy(np.load(file)).float() for file in sorted(bank.glob("0*.npy"))])
    multi = F.normalize(stored[:, 4:].mean(1), dim=-1).mean(0)
    torch.testing.assert_close(opened.centres, torch.cat([stored.mean(0), multi[None]]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="no embeddings of sample nobody"):
        opened["nobody"]


def test_embedding_goes_on_where_it_stopped(bank: Path, embed_flags: list, start, cli, folder: Path):
    out = folder / "killed/bank"
    process, deadline = start(*embed_flags, "--out", out), time.monotonic() + 60
    while process.is_alive() and not (out / "00001.npy").exists():
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    if not (out / "centres.npy").exists():
        with pytest.raises(ValueError, match="not finished"):
            Bank(out)
    began = (out / "00000.npy").stat().st_mtime_ns
    finished(cli(*embed_flags, "--out", out))
    assert (out / "00000.npy").stat().st_mtime_ns == began
    for file in sorted(bank.glob("*.npy")):
        assert np.array_equal(np.load(file), np.load(out / file.name)), file.name
    assert "nothing to do" in finished(cli(*embed_flags, "--out", out)).out


def test_two_processes_embed_the_same_bank(bank: Path, embed_flags: list, start, folder: Path):
    out = folder / "two/bank"
    for process in start_two(start, *embed_flags, "--out", out):
        finished(ended(process))
    for file in sorted(bank.glob("*.npy")):
        np.testing.assert_allclose(np.load(file), np.load(out / file.name), atol=1e-3) if file.stem not in (
            "keys",
        ) else None


def test_other_settings_do_not_mix_into_a_bank(bank: Path, embed_flags: list, in_process):
    result = in_process(*embed_flags, "--out", bank, "--mask", "causal")
    assert result.code == 2 and "was made with another mask" in result.err and one_sentence(result.err)
    result = in_process(*embed_flags, "--out", bank, "--precision", "bf16")
    assert result.code == 2 and "was made with another precision" in result.err and one_sentence(result.err)


def test_a_bank_has_one_writer_and_no_stray_shards(bank: Path, embed_flags: list, in_process, folder: Path):
    out = folder / "stray/bank"
    shutil.copytree(bank, out)
    with held(out):
        assert in_process(*embed_flags, "--out", out).code == 0  # finished: nothing to write
        (out / "centres.npy").unlink()
        result = in_process(*embed_flags, "--out", out)
        assert result.code == 2 and "belongs to a run that is still going" in result.err and one_sentence(result.err)
    (out / "index.json").unlink()  # nothing says what the shards are of
    np.save(out / "00000.npy", np.zeros(3))
    assert in_process(*embed_flags, "--out", out).code == 0
    assert all(np.array_equal(np.load(file), np.load(out / file.name)) for file in bank.glob("*.npy"))


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


def test_texts_are_embedded_in_the_precision_of_the_bank(tmp_path: Path):
    """Precision is part of the cache key; banks and texts without a stated precision have `auto`."""
    paths = {}
    for precision in ("fp16", "fp32", "auto", None):
        made = {"llm": "a", "layers": [3], "mask": "causal", "prompts": [list(prompt) for prompt in embed.PROMPTS]}
        index = made | ({"precision": precision} if precision else {})
        (tmp_path / "index.json").write_text(json.dumps(index))
        assert embed.bank_config(tmp_path).precision == (precision or "auto")
        paths[precision] = embed.texts_of_bank(tmp_path).path(["a cat"], multi=False)
    assert len(set(paths.values())) == 3 and paths["auto"] == paths[None]


def test_captions_that_a_file_lacks_are_the_raw_ones(tmp_path: Path, capsys):
    shard = f"{SHARDS}/00000.tar"
    keys = data.open_pairs(shard, 4).keys.tolist()
    entries = [{"__key__": key, "caption": f"short {key}"} for key in keys[:3]]
    (tmp_path / "short.json").write_text(json.dumps(entries))
    cfg = embed.Config(data=shard, dataset_size=4, short=str(tmp_path / "short.json"), long="raw")
    _, found = embed.captions_of(cfg)
    raw, short, long = zip(*found, strict=True)
    assert list(short) == [*(entry["caption"] for entry in entries), raw[3]] and long == raw
    assert f"lacks 1 of 4 samples, such as {keys[3]}: raw captions are used" in capsys.readouterr().out


def test_a_sentence_encoder_has_one_row_a_caption(embed_flags: list, in_process, folder: Path, monkeypatch):
    """minilm: three embeddings per image, of its captions without prompts; the same for texts of evaluations."""
    from transformers import BertConfig, BertModel, BertTokenizerFast

    (home := folder / "minilm").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz"]
    words += [f"##{letter}" for letter in words[5:]]
    (home / "vocab.txt").write_text("\n".join(words) + "\n")
    BertTokenizerFast.from_pretrained(home).save_pretrained(home)
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(home)
    monkeypatch.setattr(embed.pretrained, "minilm", lambda: home)
    finished(in_process(*embed_flags, "--llm", "minilm", "--out", folder / "sentences/bank"))
    found = Bank(folder / "sentences/bank")
    assert (found.facets, found.dim) == (3, 16) and found.centres.shape == (4, 16)
    texts = embed.texts_of_bank(folder / "sentences/bank", load=False)
    pairs = data.open_pairs(f"{SHARDS}/00000.tar", 1)
    assert torch.allclose(found[pairs.keys[0]].norm(dim=1), torch.ones(3), atol=1e-3)
    classes = [
        f"a {name}" for name in (EVAL / "groups_ood/classnames.txt").read_text().splitlines()
    ]  # not what was embedded
    with pytest.raises(ValueError, match="are not embedded"):
        texts(classes)


def test_gemma_is_loaded_by_name_and_its_terms_are_shown(tiny_llm: Path, monkeypatch, capsys):
    monkeypatch.setattr(embed.pretrained, "gemma3_270m", lambda out: tiny_llm)
    lm, _ = embed.load_causal_lm(embed.Config(llm="gemma", precision="fp32"))
    assert lm.config.hidden_size == 16 and "Gemma terms of use" in capsys.readouterr().out
    monkeypatch.setattr(embed.pretrained, "smollm2", lambda out: tiny_llm)
    embed.load_causal_lm(embed.Config(llm="smollm2", precision="fp32"))
    assert capsys.readouterr().out == ""


# ----------------------------------------------------------------------------------------------------- command line


def test_embed_command_line_errors(in_process, embed_flags: list, tmp_path: Path):
    (tmp_path / "bad.json").write_text('{"a": 1}')
    cases = {
        "--data is missing": ["cc3m-mistral-nemo", "--precision", "fp32"],
        "--short is missing": ["cc3m-mistral-nemo", "--precision", "fp32", "--data", SHARDS / "00000.tar"],
        "has no caption of sample": [*embed_flags, "--data", SHARDS / "00001.tar"],
        "`--short raw` for the raw captions again": [*embed_flags, "--short", "None"],
        "is no caption file": [*embed_flags, "--long", tmp_path / "bad.json"],
        "--llm no.gguf does not exist": [*embed_flags, "--llm", "no.gguf"],
        "could not be loaded": [*embed_flags, "--llm", tmp_path / "nothing"],
        "--mask is decoupled or causal": [*embed_flags, "--mask", "none"],
        "is no clone": [*embed_flags, "--upstream", tmp_path],
        "must be at least 1, not 0": [*embed_flags, "--gallery", "0"],
        "--dataset-size must be at least 1": [*embed_flags, "--dataset-size", "-1"],
        "is a classification set, but a retrieval": [*embed_flags, "--language-sets", EVAL / "groups_ood"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, "--out", tmp_path / "bank")
        assert result.code == 2 and message in result.err and one_sentence(result.err), result.err


def test_dry_run_of_embedding(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = in_process("yfcc15m-mistral-nemo", "--dry-run")
    assert result.code == 0 and "112,640 bytes an image" in result.out and "1,697 GB" in result.out, result
    result = in_process("yfcc15m-mistral-nemo", "--dry-run", "--batch-size", "-1")
    assert result.code == 2 and "--batch-size must be at least 1, not -1" in result.err, result
    for llm, facets in (("minilm", 3), ("smollm2", 11)):
        result = in_process("emoji", "--llm", llm, "--dry-run")
        assert result.code == 0 and f"{facets} embeddings of its width" in result.out, result
