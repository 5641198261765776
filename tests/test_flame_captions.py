"""Caption files are read entry by entry, whatever their length and the name of the caption."""

import io
import json
from pathlib import Path

import pytest

from flame import captions
from flame.captions import Captions
from shared.index import Strings

LAYOUTS = ("no JSON", "3", "[", '["text"]', '[{"caption": "no key"}]', '[{"__key__": "a"}]', '[{"__key__": "a"')
TWO = '[{"__key__": "a", "caption": "x", "other": "y"}]'


@pytest.mark.parametrize("content", [*LAYOUTS, TWO])
def test_files_of_another_layout_are_refused(content: str, tmp_path: Path):
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(ValueError, match="bad.json is no caption file"):
        Captions(tmp_path / "bad.json")


def test_the_name_of_a_caption_does_not_matter(tmp_path: Path):
    entries = [{"__key__": "a", "minicpm": "A cat."}, {"__key__": "b", "x": None}, {"__key__": "c", "caption": "漢字"}]
    (tmp_path / "theirs.json").write_text(json.dumps(entries, indent=1))
    found = Captions(tmp_path / "theirs.json")
    assert dict(found) == {"a": "A cat.", "b": "", "c": "漢字"} and found.get("d") is None
    found.check(Strings.of(["c", "a"]), "--data")
    with pytest.raises(ValueError, match="theirs.json has no caption of sample d"):
        found.check(Strings.of(["a", "d"]), "--data")
    with pytest.raises(ValueError, match="none.json does not exist"):
        Captions(tmp_path / "none.json")


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_entries_may_be_cut_anywhere(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(captions, "CHUNK", chunk)
    entries = [{"__key__": f"{i}", "caption": 'a "b" ] , [ \\ ü'} for i in range(5)]
    for indent in (None, 2):
        assert list(captions.entries(io.StringIO(json.dumps(entries, indent=indent)))) == entries
    assert list(captions.entries(io.StringIO("[]"))) == []
