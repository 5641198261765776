"""python -m flame.embed: prompts, embedding captions with the LLM into a bank, kept texts of evaluations.

A language model of two tiny layers replaces SmolLM2. Scripts are forks of a server that has already imported torch and
other packages.
"""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flame_runs import IMAGES, bank, captions, embed_flags, tiny_llm  # noqa: F401
from scripts import SHARDS, ended, finished, held, one_sentence, start_two

from flame import config, embed, llm, zeroshot
from flame.bank import Bank
from flame.captions import Captions
from flame.llm import Prompt, embed_captions, parse_prompt, read_prompts, render
from shared import data

SCRIPT = "flame.embed"
pytestmark = pytest.mark.usefixtures("embedded_corpus")


# ----------------------------------------------------------------------------------------------------------- prompts


def test_parse_prompt_reads_the_authors_notation():
    template = 'An_image_:_"*sent_0*"_._So_,_<s>_it_is_one_word:"_its_colour_is:"'
    prompt = parse_prompt(template)
    assert prompt == Prompt('An image : "{caption}" . So ,', (' it is one word:"', ' its colour is:"'), True)
    assert render(prompt, "CAPTION") == template.replace("_", " ").replace("*sent 0*", "CAPTION")
    assert not parse_prompt('An_image_:_"*sent_0*"_,_it_is:"').bos_before_facets


def test_read_prompts_refuses_other_words(tmp_path):
    file = tmp_path / "embed_cc3m_mask.py"
    with pytest.raises(ValueError, match="git clone https://github.com/MIV-XJTU/FLAME"):
        read_prompts(file)
    file.write_text('long_template = "a_*sent_0*_,_b:\\""\n')
    with pytest.raises(ValueError, match="4d2b9a9"):
        read_prompts(file)
    assert hashlib.sha256(b"").hexdigest() not in llm.FINGERPRINTS.values()


def test_authors_prompts_from_a_clone(upstream: Path):
    raw, short, long = read_prompts(upstream / "src/training/embed_cc3m_mask.py")
    assert [len(p.facets) for p in (raw, short, long)] == [1, 3, 7]
    assert (raw.bos_before_facets, short.bos_before_facets, long.bos_before_facets) == (False, True, True)


# -------------------------------------------------------------------------------------------------------------- bank


def test_equal_captions_are_embedded_once():
    asked, ticks = [], []

    def lengths(captions: list[str], prompt: Prompt) -> torch.Tensor:
        asked.extend(captions)
        return torch.tensor([[[float(len(caption))]] for caption in captions])

    captions = ["a dog", "two brown dogs", "a dog", "a cat on a mat", "a dog", "two brown dogs"]
    embeddings = llm.embed_batches(lengths, captions, llm.SHORT, batch_size=2, tick=ticks.append)
    assert embeddings.flatten().tolist() == [len(caption) for caption in captions]
    assert sorted(asked) == sorted(set(captions)) and sum(ticks) == len(captions)


def test_bank_holds_the_embeddings_of_each_sample(bank: Path, captions: Path, tiny_llm: Path):
    opened = Bank(bank)
    pairs = data.open_pairs(str(SHARDS / "00000.tar"), IMAGES)
    opened.check(pairs.keys, "--data")
    model = llm.load_llm(str(tiny_llm), True, "fp32")
    lists = [Captions(captions / f"{kind}.json") for kind in ("raw", "short", "long")]
    for key in pairs.keys[[0, 7, IMAGES - 1]].tolist():
        embeddings = embed_captions(model, *[[found[key]] for found in lists])[0]
        torch.testing.assert_close(opened[key], embeddings, rtol=1e-3, atol=1e-3)
    assert opened.facets == 11 and opened.dim == 16 and len(opened.embeddings) < IMAGES
    assert opened.embeddings.dtype == np.float16
    with pytest.raises(ValueError, match="no embeddings of sample nobody"):
        opened["nobody"]


def arrays(bank: Path) -> dict[str, np.ndarray]:
    return {file.name: np.load(file) for file in sorted(bank.glob("*.npy"))}


def test_embedding_goes_on_where_it_stopped(bank: Path, embed_flags: list, in_process, folder: Path, monkeypatch):
    """Stopped in the third of five blocks; blocks are not the bank's, so embeddings differ by rounding."""
    out, blocks, embed_block = folder / "killed/bank", [], llm.embed_captions

    def counted(model, raw, *others):
        blocks.append(len(raw))
        if len(blocks) == 3:
            raise KeyboardInterrupt
        return embed_block(model, raw, *others)

    size = -(-len(Bank(bank).embeddings) // 5)
    monkeypatch.setattr("flame.bank.BLOCK", size)
    monkeypatch.setattr(llm, "embed_captions", counted)
    assert in_process(*embed_flags, "--out", out).code == 130
    with pytest.raises(ValueError, match="not finished"):
        Bank(out)
    assert np.load(out / "done.npy").tolist() == [True] * 2 + [False] * 3
    kept = np.load(out / "embeddings.npy")[: 2 * size]
    finished(in_process(*embed_flags, "--out", out))
    assert len(blocks) == 6 and np.load(out / "done.npy").all()
    found, expected = arrays(out), arrays(bank)
    assert np.array_equal(found["embeddings.npy"][: 2 * size], kept)
    np.testing.assert_allclose(found.pop("embeddings.npy"), expected.pop("embeddings.npy"), atol=1e-3)
    assert all(np.array_equal(found[name], expected[name]) for name in ("keys.npy", "ends.npy", "rows.npy"))
    assert "nothing to do" in finished(in_process(*embed_flags, "--out", out)).out


def test_two_processes_embed_the_same_bank(bank: Path, embed_flags: list, start, folder: Path):
    out = folder / "two/bank"
    for process in start_two(start, *embed_flags, "--out", out):
        finished(ended(process))
    found, expected = arrays(out), arrays(bank)
    np.testing.assert_allclose(found.pop("embeddings.npy"), expected.pop("embeddings.npy"), atol=1e-3)
    assert all(np.array_equal(found[name], expected[name]) for name in expected)


def test_other_settings_do_not_mix_into_a_bank(bank: Path, embed_flags: list, in_process):
    for option, value in (("mask", "causal"), ("precision", "bf16")):
        result = in_process(*embed_flags, "--out", bank, f"--{option}", value)
        assert result.code == 2 and f"another {option}" in result.err and one_sentence(result.err)


def test_another_language_model_of_the_same_name_is_refused(
    bank: Path, embed_flags, tiny_llm: Path, in_process, folder
):
    """Its weights are others: neither the bank nor texts of evaluations may mix with those of the first."""
    out = folder / "renamed/bank"
    shutil.copytree(bank, out)
    weights = tiny_llm / "model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-4] + b"\0\0\0\0")
    try:
        result = in_process(*embed_flags, "--out", out)
        assert result.code == 2 and "another digest" in result.err and one_sentence(result.err)
        with pytest.raises(ValueError, match="not the language model"):
            zeroshot.llm_of_bank(out)()
    finally:
        weights.write_bytes(before)


def test_a_bank_has_one_writer_and_no_stray_embeddings(bank: Path, embed_flags: list, in_process, folder: Path):
    out = folder / "stray/bank"
    shutil.copytree(bank, out)
    with held(out):
        assert in_process(*embed_flags, "--out", out).code == 0  # finished: nothing to write
        np.save(out / "done.npy", np.zeros(1, dtype=bool))
        result = in_process(*embed_flags, "--out", out)
        assert result.code == 2 and "still going" in result.err and one_sentence(result.err)
    (out / "index.json").unlink()  # nothing says what the embeddings are of
    np.save(out / "embeddings.npy", np.zeros(3))
    assert in_process(*embed_flags, "--out", out).code == 0
    assert all(np.array_equal(array, arrays(out)[name]) for name, array in arrays(bank).items())


def test_captions_are_read_by_sample_and_empty_ones_are_counted(captions: Path, tmp_path: Path, capsys):
    entries = json.loads((captions / "short.json").read_text())
    entries[0]["caption"], entries[1]["caption"] = None, " "
    (tmp_path / "short.json").write_text(json.dumps(entries[::-1]))
    files = {kind: str(captions / f"{kind}.json") for kind in ("raw", "long")}
    cfg = config.EmbedConfig(data=f"{SHARDS}/00000.tar", dataset_size=10, short=str(tmp_path / "short.json"), **files)
    keys, columns = embed.open_captions(cfg)
    assert len(keys) == 10 and [columns[1](sample) for sample in range(2)] == ["", " "]
    assert columns[0](3) == Captions(files["raw"])[keys[3]]
    rows, _ = embed.distinct_rows(10, columns)
    assert "2 of 10" in capsys.readouterr().out
    triples = [tuple(column(sample) for column in columns) for sample in range(10)]
    distinct = list(dict.fromkeys(triples))
    assert rows.tolist() == [distinct.index(triple) for triple in triples]


def test_captions_that_a_file_lacks_are_the_raw_ones(tmp_path: Path, capsys):
    shard = f"{SHARDS}/00000.tar"
    keys = data.open_pairs(shard, 4).keys.tolist()
    entries = [{"__key__": key, "caption": f"short {key}"} for key in keys[:3]]
    (tmp_path / "short.json").write_text(json.dumps(entries))
    cfg = config.EmbedConfig(data=shard, dataset_size=4, short=str(tmp_path / "short.json"), long="raw")
    _, columns = embed.open_captions(cfg)
    raw, short, long = ([column(sample) for sample in range(4)] for column in columns)
    assert short == [*(entry["caption"] for entry in entries), raw[3]] and long == raw
    assert f"1 of 4 samples, such as {keys[3]}" in capsys.readouterr().out


def test_texts_need_the_language_model_once(bank: Path):
    load = zeroshot.llm_of_bank(bank)
    texts = zeroshot.texts_of_bank(bank, load)
    first = texts(["a cat", "two dogs"])
    assert first.shape == (2, 16) and torch.allclose(first.norm(dim=1), torch.ones(2))
    multi = texts(["a cat"], multi=True)
    mean = load()(["a cat"], llm.LONG).mean(1)  # not normalised before the mean
    torch.testing.assert_close(multi, F.normalize(mean, dim=-1), rtol=0, atol=2e-3)
    again = zeroshot.texts_of_bank(bank, zeroshot.no_llm)
    assert torch.equal(again(["a cat", "two dogs"]), first) and torch.equal(again(["a cat"], multi=True), multi)
    with pytest.raises(ValueError, match="are not embedded"):
        again(["a bird"])


@pytest.mark.parametrize("name", ("digest", "mask", "precision"))
def test_texts_are_told_apart_by_what_made_them(name: str, tmp_path: Path):
    """The mask plays no part for one facet."""
    about = {"llm": "a", "digest": "1", "mask": "causal", "precision": "fp32"}
    paths = set()
    for changed in (about, about | {name: "other"}):
        texts = zeroshot.Texts(tmp_path, changed, llm.OURS, zeroshot.no_llm)
        paths |= {texts.path(["a cat"], False), texts.path(["a cat"], True), texts.path(["a dog"], True)}
    assert len(paths) == (5 if name == "mask" else 6)


def test_gemma_is_loaded_by_name_and_its_terms_are_shown(tiny_llm: Path, monkeypatch, capsys):
    monkeypatch.setattr(llm.pretrained, "gemma3_270m", lambda out: tiny_llm)
    assert llm.load_llm("gemma", True, "fp32").dim == 16 and "terms of use" in capsys.readouterr().out
    monkeypatch.setattr(llm.pretrained, "smollm2", lambda out: tiny_llm)
    llm.load_llm("smollm2", True, "fp32")
    assert capsys.readouterr().out == "" and llm.llm_digest("gemma") == llm.llm_digest(str(tiny_llm))


# ----------------------------------------------------------------------------------------------------- command line


def test_embed_command_line_errors(in_process, embed_flags: list, tmp_path: Path):
    (tmp_path / "bad.json").write_text('{"a": 1}')
    paper = ["cc3m-mistral-nemo", "--precision", "fp32"]
    cases = {
        "--data is missing": paper,
        "git clone https://github.com/MIV-XJTU/FLAME": [*paper, "--data", SHARDS / "00000.tar"],
        "--short is missing": [*embed_flags, "--short", "None"],
        "no caption of sample": [*embed_flags, "--data", SHARDS / "00001.tar"],
        "is no caption file": [*embed_flags, "--long", tmp_path / "bad.json"],
        "--llm no.gguf does not exist": [*embed_flags, "--llm", "no.gguf"],
        "could not be loaded": [*embed_flags, "--llm", tmp_path],
        "invalid choice": [*embed_flags, "--mask", "none"],
        "none.py does not exist": [*embed_flags, "--prompts", tmp_path / "none.py"],
        "--dataset-size must be at least 1": [*embed_flags, "--dataset-size", "-1"],
        "nowhere does not exist": [*embed_flags, "--sets", tmp_path / "nowhere"],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, "--out", tmp_path / "bank")
        assert result.code == 2 and message in result.err, result.err
        assert one_sentence(result.err) or message == "invalid choice", result.err


def test_dry_run_of_embedding(in_process, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    result = in_process("yfcc15m-mistral-nemo", "--dry-run")
    assert result.code == 0 and "112,640 bytes" in result.out and "1,697 GB" in result.out, result
    result = in_process("yfcc15m-mistral-nemo", "--dry-run", "--batch-size", "-1")
    assert result.code == 2 and "--batch-size must be at least 1" in result.err, result
    result = in_process("emoji", "--dry-run")
    assert result.code == 0 and "11 embeddings" in result.out, result
