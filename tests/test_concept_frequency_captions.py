"""Partitions of files, their captions, and the caption row of each image."""

import pytest
from concept_frequency_runs import write_captions

from concept_frequency import captions as corpus
from concept_frequency import images


def test_a_folder_of_two_kinds_is_refused(tmp_path):
    """img2dataset writes a table with the captions of each shard beside it; they would be counted twice."""
    for name in ("00000.tar", "00000.parquet"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(ValueError, match=r".parquet and .tar"):
        corpus.expand([str(tmp_path)])


def test_partitions_of_a_parquet_file(tmp_path):
    captions = [str(i) for i in range(230)]
    path = write_captions(tmp_path, captions)["parquet"]
    for size in (7, 50, 100, 1000):
        partitions = corpus.list_partitions([path], size, tmp_path)
        rows = [c for partition in partitions for c in corpus.read_captions(partition, "caption", "", [])]
        assert rows == captions and len({partition.name() for partition in partitions}) == len(partitions)
    with pytest.raises(ValueError, match="has no column 'TEXT'"):
        list(corpus.read_captions(partitions[0], "TEXT", "", []))


@pytest.mark.parametrize("kind", ["tsv", "txt"])
@pytest.mark.parametrize("step", [1, 2, 3, 7, 100])
def test_partitions_of_a_text_file_start_at_row_boundaries(tmp_path, kind, step):
    """Rows with quotation marks, with multi-byte characters, and with bytes that are not UTF-8."""
    rows = ["a", "über", '"open', 'a 5" pipe', '"closed"', "", "日本", *["x\ty"] * (kind == "tsv"), "last"]
    path = tmp_path / f"a.{kind}"
    path.write_bytes("\n".join(rows).encode() + b" \xff\n")
    found = corpus.list_partitions([str(path)], step, tmp_path)
    assert [partition.stop - partition.start for partition in found][:-1] == [step] * (len(found) - 1)
    texts = [text for partition in found for text in corpus.read_captions(partition, "0", "", [])]
    assert texts == [row.partition("\t")[0] for row in rows[:-1]] + ["last \ufffd"]
    path.write_text("")
    assert corpus.list_partitions([str(path)], step, tmp_path) == []


def test_columns_of_tsv_are_numbers(tmp_path):
    (tmp_path / "a.tsv").write_text("u\tcaption\tv\n\tno url\tv\n")
    (partition,) = corpus.list_partitions([str(tmp_path / "a.tsv")], 10, tmp_path)
    assert list(corpus.read_captions(partition, "1", "0", [])) == ["caption"]
    with pytest.raises(ValueError, match="numbers from 0, not caption"):
        list(corpus.read_captions(partition, "caption", "", []))


def test_sample_ids():
    assert images.sample_id("cc3m", "000123.jpg") == 123 and images.sample_id("laion400m", "414079999") == 414079999
    assert images.sample_id("synthci30m", "cat/77.jpg") == 77
    assert images.sample_id("laion_aesthetics", "00012.jpg", shard=3) == 30012
    table = images.CaptionRows.build(["a", "b", "a"])
    assert (images.sample_id("cc12m", "a", rows=table), images.sample_id("yfcc15m", "b", rows=table)) == (2, 1)
    with pytest.raises(KeyError):
        images.sample_id("cc12m", "c", rows=table)
