"""Images of the controlled experiment: broken samples and views."""

import dataclasses
import io
import itertools
import tarfile

import pytest
import torch
from concept_frequency_runs import EVAL, PIPELINE, shards  # noqa: F401
from PIL import Image
from scripts import SHARDS

from concept_frequency import assigned, count
from concept_frequency.concepts import read_concepts
from concept_frequency.config import CountConfig


def test_broken_samples_are_counted(tmp_path, capsys):
    shard = tmp_path / "broken"
    shard.mkdir()
    with tarfile.open(SHARDS / "00000.tar") as source, tarfile.open(shard / "0.tar", "w") as target:
        spoiled = set()
        for member in itertools.islice(source, 900):
            content = source.extractfile(member).read()
            if member.name.endswith(".json") and len(spoiled) < 2:
                spoiled.add(member.name)
                content = b"{" if len(spoiled) == 1 else b"{}"
            member.size = len(content)
            target.addfile(member, io.BytesIO(content))
    whole = (shard / "0.tar").read_bytes()
    (shard / "0.tar").write_bytes(whole.rstrip(b"\0")[:-3000])  # the padding at the end says nothing
    names = read_concepts(EVAL)
    corpus = assigned.read_corpus(str(shard), names, (), 20, False)
    reasons = [b.reason for b in corpus.broken]
    assert reasons.count("no image, or no .json with a name") >= 2 and "truncated or damaged tar" in reasons
    with pytest.raises(ValueError, match="--strict"):
        assigned.read_corpus(str(shard), names, (), 20, True)
    (tmp_path / "names.txt").write_text("\n".join(names[:50]))
    cfg = CountConfig(
        data=(str(shard),),
        concepts=(str(tmp_path / "names.txt"),),
        workers=1,
        out=str(tmp_path / "brokencount"),
        spacy=PIPELINE,
        query_spacy=PIPELINE,
    )
    count.main(cfg)
    assert "truncated or damaged tar" in capsys.readouterr().out
    for out in ("strictcount", "brokencount"):  # counted before or not
        with pytest.raises(ValueError, match="--strict"):
            count.main(dataclasses.replace(cfg, out=str(tmp_path / out), strict=True))


def test_the_plain_view_is_the_image():
    pixels = torch.randint(256, (3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    torch.testing.assert_close(assigned.plain_view(64)(image), pixels / 127.5 - 1, rtol=0, atol=1e-4)


def test_other_words_of_a_list_or_of_a_cell():
    assert assigned.other_words(["a b", 3, " "]) == assigned.other_words(" a b ,3,") == ["a b", "3"]
    assert assigned.other_words(None) == assigned.other_words({"a": 1}) == assigned.other_words("") == []
