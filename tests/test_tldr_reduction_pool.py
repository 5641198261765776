"""The study's pools: shares of bad captions and of the oracle's wrong captions, the json of each sample, refusals."""

import json
from collections import Counter

from scripts import refused

from shared import tars
from studies import tldr_reduction_pool as pool
from tldr_reduction.datasets import open_pairs

NAMES = [f"n{i}" for i in range(20)]


def test_shares_are_as_declared_and_bad_ones_stay_bad():
    kinds = {}
    for percent in (0, 30, 60):
        kinds[percent] = [pool.caption(str(key), "true one", NAMES, "n3", percent) for key in range(3000)]
        counts = Counter(kind for _, kind in kinds[percent])
        assert abs(counts["other"] + counts["generic"] - 30 * percent) < 120
        assert abs(counts["other"] - counts["generic"]) < 130
        for text, kind in kinds[percent]:
            assert (text == "true one") == (kind == "name") and (text in NAMES) == (kind == "other") and text != "n3"
    assert all(more == less for less, more in zip(kinds[30], kinds[60], strict=True) if less[1] != "name")
    for percent in (0, 20, 80):
        wrong = sum(pool.oracle_caption(str(key), NAMES, "n3", percent) != "n3" for key in range(3000))
        assert abs(wrong - 30 * percent) < 120


def test_bad_captions_of_one_kind():
    for kind in ("other", "generic", "mixed"):
        found = [pool.caption(str(key), "true one", NAMES, "n3", 30, kind) for key in range(3000)]
        bad = [text for text, noise in found if noise != "name"]
        assert {noise for _, noise in found} == {"name", kind} and abs(len(bad) - 900) < 120
        assert [noise == "name" for _, noise in found] == [
            pool.caption(str(key), "true one", NAMES, "n3", 30)[1] == "name" for key in range(3000)
        ]  # the same samples have bad captions
        if kind == "mixed":
            both = [sorted(text.split()) for text in bad]
            assert all("n3" in words and len(set(words)) == 2 and set(words) <= set(NAMES) for words in both)
            assert 300 < sum(text.startswith("n3 ") for text in bad) < 600
        else:
            assert set(bad) <= set(pool.GENERIC if kind == "generic" else NAMES) - {"n3"}


def test_a_pool_is_written(in_process, tmp_path):
    samples = []
    for i in range(8):
        captions = {"tags": f"n{i % 4} tag"}
        about = {"names": [f"n{i % 4}"], "original": i // 2, "captions": captions}
        samples.append({"__key__": f"{i:03}", "png": b"png", "mask.png": b"mask", "txt": "", "json": json.dumps(about)})
    (tmp_path / "scenes/train").mkdir(parents=True)
    tars.write_tar(tmp_path / "scenes/train/00000.tar", samples)
    (tmp_path / "scenes/manifest.json").write_text("{}")
    command = ["--source", tmp_path / "scenes", "--out", tmp_path / "out", "--noise", "0", "100", "--oracle", "0"]
    assert in_process(*command, module="studies.tldr_reduction_pool").code == 0
    assert "is complete" in in_process(*command, module="studies.tldr_reduction_pool").out
    clean, noisy = (open_pairs(str(tmp_path / f"out/noise-{name}")) for name in ("00", "100"))
    assert [clean.caption(row) for row in range(8)] == [f"n{i % 4} tag" for i in range(8)]
    assert all(not noisy.caption(row).endswith(" tag") for row in range(8))
    said = dict(tars.descriptions([str(tmp_path / "out/noise-00/00000.tar")]))
    assert said["005"] == {"original": 2, "name": "n1", "noise": "name"}
    spoken = json.loads((tmp_path / "out/oracle-00.json").read_text())
    assert spoken[5] == {"image_id": "005", "caption": "n1"}
    refused(in_process(*command, "50", module="studies.tldr_reduction_pool"), "other scenes or shares")
    refused(in_process("--source", tmp_path, module="studies.tldr_reduction_pool"), "holds no scenes")
