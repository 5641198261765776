"""python -m tldr_reduction.reduce, end to end: every selection, kill -9, two processes against one, broken shards."""

import csv
import io
import json
import shutil
import tarfile

import numpy as np
import open_clip
import torch
from PIL import Image
from scripts import finished, held, kill_when, refused
from tldr_reduction_runs import REDUCE, broken, chain, folder, tiny, two  # noqa: F401

from shared import checkpoints, export, run
from tldr_reduction import reduce
from tldr_reduction.datasets import eval_transform, open_pairs
from tldr_reduction.encoders import Scorer
from tldr_reduction.reduce import write_shards

SCRIPT = "tldr_reduction.train"


def test_only_the_caption_file_is_rewritten(tmp_path):
    """Other text files of a sample are not changed; shards of an earlier selection are replaced."""
    png = io.BytesIO()
    Image.new("RGB", (4, 4)).save(png, "PNG")
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in (("a.png", png.getvalue()), ("a.txt", b"old"), ("a.alt.txt", b"other")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    pairs = open_pairs(str(tmp_path / "in.tar"))
    write_shards(pairs, {0: "new"}, tmp_path / "out", run.Process(0, 1, torch.device("cpu")))
    with tarfile.open(tmp_path / "out/00000.tar") as tar:
        assert [tar.extractfile(name).read() for name in ("a.txt", "a.alt.txt")] == [b"new", b"other"]
    write_shards(pairs, {0: "newer"}, tmp_path / "out", run.Process(0, 1, torch.device("cpu")))
    assert open_pairs(str(tmp_path / "out/00000.tar")).caption(0) == "newer"
    write_shards(pairs, {}, tmp_path / "out", run.Process(0, 1, torch.device("cpu")))
    assert not list((tmp_path / "out").iterdir())  # a later selection may keep nothing of the shard


def test_reduction_keeps_a_share_of_each_cluster(chain, folder):
    out = chain["reduced"]
    report = json.loads((out / "report.json").read_text())
    with open(out / "report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    pairs = open_pairs(str(folder / "pool"))
    assert [line["key"] for line in lines] == pairs.keys.tolist() and report["samples"] == 160
    for cluster in {line["cluster"] for line in lines}:
        members = [line for line in lines if line["cluster"] == cluster]
        distinct = [line["kept"] == "1" for line in members if not line["duplicate_of"]]
        places = np.flatnonzero(distinct)  # every other member, cyclically; a few more replace duplicates
        assert 0 <= len(places) - len(distinct) // 2 <= 2 and (np.diff(places) <= 2).all()
        assert [int(line["position"]) for line in members] == list(range(len(members)))
    kept = [line for line in lines if line["kept"] == "1"]
    assert report["kept"] == len(kept) == len(json.loads((out / "annotation.json").read_text()))
    reduced = open_pairs(str(out / "shards"))
    assert reduced.keys.tolist() == [line["key"] for line in kept]
    before = {str(key): row for row, key in enumerate(pairs.keys)}
    for row, line in enumerate(kept):
        assert reduced.caption(row) == line["caption"]
        original = pairs.caption(before[line["key"]])
        assert line["caption"] == (f"{original}; {line['generated']}" if line["generated"] else original)
        assert reduced.read(row).image.tobytes() == pairs.read(before[line["key"]]).image.tobytes()
    assert set(report["itm"]) == {"before", "after"} and np.isclose(np.mean(report["itm"]["after"]["histogram"]), 1)
    page = (out / "report.html").read_text()
    for words in ("random selection", "Refined captions", "passed over", "<h2>Clusters"):
        assert words in page, words
    checks = report["checks"]
    assert set(checks) == {"images at 8 x 8 pixels", "efficientnet_lite0", "captions"}
    distinct = 160 - report["identical_images"]  # copies are not compared
    assert all(check["samples"] == distinct and len(check["coverage_random"]) == 3 for check in checks.values())
    for words in ("kept", "duplicates", "codebook", "clusters", "against random", "ITM score", "seconds"):
        assert words in chain["printed"]
    entries = json.loads((out / "annotation.json").read_text())
    assert all(entry.keys() == {"image", "caption"} for entry in entries) and not (out / "images").exists()
    assert {entry["image"] for entry in entries} == {
        f"images/{pairs.shard_of(before[line['key']]):05}/{line['key']}.png" for line in kept
    }
    with tarfile.open(out / "shards/00000.tar") as tar:  # the other files of a sample are copied
        assert {name.rpartition(".")[2] for name in tar.getnames()} == {"png", "txt", "json"}


def test_a_finished_reduction_is_not_run_twice(chain, cli):
    out = chain["reduced"]
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    result = finished(cli(*chain["command"], "--out", out, module=REDUCE))
    assert "nothing to do" in result.out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before
    refused(cli(*chain["command"], "--keep", "0.3", "--out", out, module=REDUCE), "another --keep")


def test_a_reduction_is_of_its_data_and_has_one_writer(folder, in_process, tmp_path):
    shutil.copytree(folder / "pool", tmp_path / "pool")
    out = tmp_path / "out"
    command = [tmp_path / "pool", "--keep", "0.5", "--clusters", "2", "--select", "random", "--out", out]
    with held(out):
        refused(in_process(*command, module=REDUCE), "still going")
    assert in_process(*command, module=REDUCE).code == 0
    settings = json.loads((out / "config.json").read_text())
    assert settings["fingerprint"]
    (tmp_path / "pool/00001.tar").unlink()
    refused(in_process(*command, module=REDUCE), "other data")


def test_a_reduction_keeps_as_many_as_the_matched_one(folder, in_process, tmp_path):
    """If that one is made anew and keeps another number, this one is not taken for finished."""
    matched = tmp_path / "matched"
    matched.mkdir()
    command = [folder / "pool", "--select", "random", "--match", matched, "--out", tmp_path / "out"]
    for report, words in ((b"{", "no JSON"), (b"{}", "no report.json")):
        (matched / "report.json").write_bytes(report)
        refused(in_process(*command, module=REDUCE), words)
    (matched / "report.json").write_text('{"kept": 7}')
    finished(in_process(*command, module=REDUCE))
    assert len(open_pairs(str(tmp_path / "out/shards"))) == 7
    (matched / "report.json").write_text('{"kept": 8}')
    refused(in_process(*command, module=REDUCE), f"{matched} had other content")


def test_a_reduction_is_of_the_weights_that_began_it(chain, in_process, tmp_path):
    scorer = tmp_path / "scorer"
    shutil.copytree(chain["scorer"], scorer)
    command = [*chain["command"][:1], "--select", "itm", "--keep", "0.5", "--captions", "original"]
    command += ["--scorer", scorer, "--out", tmp_path / "out"]
    assert in_process(*command, module=REDUCE).code == 0
    assert "nothing to do" in in_process(*command, module=REDUCE).out
    state = checkpoints.load_checkpoint(scorer / "checkpoint.pt")
    next(iter(state["state_dict"].values())).add_(1)
    checkpoints.save_checkpoint(scorer / "checkpoint.pt", state)
    refused(in_process(*command, module=REDUCE), f"{scorer} had other content")


def test_predictions_must_fit_the_samples(in_process, folder, tmp_path):
    file, out = tmp_path / "predictions.json", tmp_path / "out"
    command = [folder / "pool", "--select", "random", "--keep", "0.1", "--predictions", file, "--out", out]
    refused(in_process(*command, module=REDUCE), "predictions.json cannot be read")
    for entries, words in (
        ({"image_id": 0}, "no JSON list"),
        ([{"image_id": 0, "caption": None}], "caption of 0"),
        ([{"image_id": "elsewhere", "caption": "a cat"}], "none of the 160"),
    ):
        file.write_text(json.dumps(entries))
        refused(in_process(*command, module=REDUCE), words)
        assert not out.exists()
    file.write_text(json.dumps([{"image_id": row, "caption": "a cat"} for row in range(80)]))
    shown = finished(in_process(*command, module=REDUCE)).out
    report = json.loads((out / "report.json").read_text())
    lacking = report["captions"]["without_generated"]
    assert 0 < lacking < 16 and f"{lacking} of 16" in shown
    assert "--scorer" in shown and report["notes"][0] in (out / "report.html").read_text()
    file.write_text(json.dumps([{"image_id": row, "caption": "a dog"} for row in range(160)]))
    refused(in_process(*command, module=REDUCE), f"{file} had other content")


def test_a_scorer_must_give_numbers(in_process, folder, tmp_path, monkeypatch):
    def broken(images, captions):
        return torch.full((len(captions),), torch.nan)

    scorer = Scorer(eval_transform(8), broken, broken, broken, True)
    monkeypatch.setattr(reduce.Inference, "scorer", lambda self: scorer)
    command = [folder / "pool", "--select", "random", "--scorer", "mine", "--out", tmp_path / "out"]
    refused(in_process(*command, module=REDUCE), "160 of 160")


def test_an_open_clip_model_scores(in_process, folder):
    """Its cosines are used for selection and reports as matching probabilities are; the cut is the median before."""
    torch.manual_seed(0)
    clip, _, transform = open_clip.create_model_and_transforms("ViT-emoji-32")
    export.write(folder / "clip-export", clip.eval(), export.named_config("ViT-emoji-32"), clip.state_dict(), transform)
    scorer, out = f"local-dir:{folder / 'clip-export'}", folder / "by-cosine"
    words = [folder / "pool", "--select", "itm", "--keep", "0.5", "--scorer", scorer, "--out", out]
    finished(in_process(*words, module=REDUCE))
    itm = json.loads((out / "report.json").read_text())["itm"]
    assert itm["before"]["below_cut"] == 50 and itm["after"]["below_cut"] == 0
    assert itm["before"]["span"] == itm["after"]["span"] and np.isclose(np.mean(itm["before"]["histogram"]), 1)
    assert "nothing to do" in in_process(*words, module=REDUCE).out


ARMS = {
    "random": ["--select", "random", "--captions", "original"],
    "first": ["--select", "first"],
    "itm": ["--select", "itm"],
    "all": ["--select", "all"],
    "from-the-first": ["--start", "first", "--no-drop-duplicates"],
    "farthest": ["--select", "farthest"],
    "image": ["--features", "image"],
    "blip": ["--features", "blip"],
    "text": ["--features", "text"],
    "generated": ["--captions", "generated"],
    "release": ["--recipe", "release_comment", "--clusters", "4"],
}


def test_every_way_to_reduce(chain, cli, folder):
    """All reductions share codes, scores and captions with the first one."""
    work = ["--work", chain["reduced"] / "work"]
    full = json.loads((chain["reduced"] / "report.json").read_text())["kept"]
    kept = {}
    for name, flags in ARMS.items():
        match = ["--match", chain["reduced"]] if name in ("random", "first", "itm") else []
        out = folder / f"reduced-{name}"
        finished(cli(*chain["command"], *work, *flags, *match, "--out", out, module=REDUCE))
        with open(out / "report.csv", newline="") as file:
            kept[name] = [line for line in csv.DictReader(file) if line["kept"] == "1"]
        if match:
            assert len(kept[name]) == full
    assert len(kept["all"]) == 160 and [int(line["key"]) for line in kept["first"]] == list(range(full))
    assert all(line["caption"] == line["generated"] for line in kept["generated"] if line["generated"])
    assert [line["key"] for line in kept["random"]] != [line["key"] for line in kept["first"]]
    assert all(int(line["position"]) % 2 == 0 for line in kept["from-the-first"])
    scores = sorted((float(line["itm"]) for line in kept["all"]), reverse=True)
    assert min(float(line["itm"]) for line in kept["itm"]) >= scores[full - 1] - 1e-4
    assert 0 < len(kept["release"]) < 80
    assert all(float(line["itm"]) >= scores[79] - 1e-4 for line in kept["release"])


def test_images_of_an_annotation_file_are_not_extracted(in_process, tmp_path):
    (tmp_path / "all.json").write_text('[{"image": "a.png", "caption": "a"}]')
    result = in_process(
        tmp_path / "all.json", "--select", "random", "--extract-images", "--out", tmp_path / "out", module=REDUCE
    )
    refused(result, "--extract-images")


def test_annotation_json_in_and_out(chain, cli, folder, tiny):
    """reduce reads an annotation file, the authors' form of a data set, and train.py reads the one it writes."""
    pairs, entries = open_pairs(str(folder / "pool")), []
    (folder / "images").mkdir()
    for row in range(96):
        pair = pairs.read(row)
        pair.image.save(folder / "images" / f"{pair.key}.png")
        entries.append({"image": f"images/{pair.key}.png", "caption": pair.caption})
    (folder / "all.json").write_text(json.dumps(entries))
    out = folder / "from-json"
    options = ["--keep", "0.5", "--clusters", "3", "--captioner", chain["captioner"], "--image-root", folder]
    finished(cli(folder / "all.json", *options, "--out", out, module=REDUCE))
    written = json.loads((out / "annotation.json").read_text())
    assert 48 <= len(written) <= 51 and all(entry in entries for entry in written) and not (out / "shards").exists()
    data_flags = ["--data", out / "annotation.json", "--image-root", folder, "--dataset-size", "32"]
    finished(cli("small-clip", *tiny, *data_flags, "--out", folder / "json-clip"))


def test_extracted_images_are_what_stock_blip_trains_on(in_process, folder):
    """Image files are found by joining image_root and the annotation's image, as in stock BLIP."""
    out = folder / "extracted"
    words = [folder / "pool", "--select", "random", "--keep", "0.1", "--extract-images", "--out", out]
    finished(in_process(*words, module=REDUCE))
    read, shards = open_pairs(str(out / "annotation.json"), str(out)), open_pairs(str(out / "shards"))
    assert len(read) == len(shards) == 16
    of_key = {str(key): shards.read(row) for row, key in enumerate(shards.keys)}
    for row in range(16):
        pair = read.read(row)
        same = of_key[pair.key.rpartition("/")[2].removesuffix(".png")]
        assert pair.caption == same.caption and pair.image.tobytes() == same.image.tobytes()


def test_without_a_captioner_codes_come_from_a_pretrained_encoder(in_process, folder):
    out = folder / "alone"
    command = [folder / "pool", "--keep", "0.25", "--out", out]
    assert "kept" in finished(in_process(*command, module=REDUCE)).out
    assert next(out.glob("work/codebook-*.npz")) and (out / "shards/00000.tar").exists()
    report = json.loads((out / "report.json").read_text())
    assert report["clusters"] == 5 and 40 <= report["kept"] <= 45 and "itm" not in report
    assert set(report["checks"]) == {"images at 8 x 8 pixels", "captions"}  # EfficientNet-Lite0 made the clusters
    assert report["codes_used"] <= 256
    refused(
        in_process(*command[:-2], "--out", folder / "no", "--encoder", "lite", module=REDUCE), "there is no encoder"
    )


def test_identical_images_are_dropped_as_such(in_process, folder):
    """Each image occurs twice, with different keys: the second is dropped as a duplicate, and other images are kept
    instead."""
    copies = folder / "copies"
    copies.mkdir()
    with tarfile.open(folder / "pool/00000.tar") as source, tarfile.open(copies / "00000.tar", "w") as target:
        for copy in ("", "copy-"):
            for member in source:
                content = source.extractfile(member).read()
                member.name, member.size = copy + member.name, len(content)
                target.addfile(member, io.BytesIO(content))
    options = ["--keep", "0.25", "--clusters", "2", "--no-check"]
    lines = {}
    for name, flags in (("dropped", []), ("members", ["--no-drop-duplicates"])):
        out = folder / f"copies-{name}"
        finished(in_process(copies, *options, *flags, "--work", folder / "copies-work", "--out", out, module=REDUCE))
        with open(out / "report.csv", newline="") as file:
            lines[name] = list(csv.DictReader(file))
    kept = {name: [line["key"] for line in rows if line["kept"] == "1"] for name, rows in lines.items()}
    assert 32 <= len(kept["dropped"]) <= 34 and 32 <= len(kept["members"]) <= 34
    assert len({key.removeprefix("copy-") for key in kept["dropped"]}) == len(kept["dropped"])
    duplicates = [line for line in lines["dropped"] if line["duplicate_of"]]
    assert len(duplicates) == 64 and all(line["key"] == f"copy-{line['duplicate_of']}" for line in duplicates)
    assert all(line["reason"] == f"same image as {line['duplicate_of']}" for line in duplicates)
    assert not [line for line in lines["members"] if line["reason"].startswith("same image")]
    more = ["--keep", "0.6", "--clusters", "2", "--work", folder / "copies-work"]
    finished(in_process(copies, *more, "--out", folder / "copies-all", module=REDUCE))
    report = json.loads((folder / "copies-all/report.json").read_text())
    assert report["kept"] == 64 and report["notes"][0].startswith("Only 64 of 128 images are distinct")
    assert report["checks"] == {}  # no distinct image is dropped


def test_a_killed_reduction_resumes(chain, start, cli, folder):
    out = folder / "killed-reduction"
    command = [*chain["command"], "--out", out]

    def begun() -> bool:
        return any(np.load(path, mmap_mode="r")["done"].sum() >= 48 for path in out.glob("work/codes-*.npy"))

    kill_when(start(*command, module=REDUCE), begun, timeout=120)
    (path,) = out.glob("work/codes-*.npy")
    assert path.stat().st_size > 160 * 10  # it has room for all samples from the start
    finished(cli(*command, module=REDUCE))
    assert np.load(path, mmap_mode="r")["done"].all()
    for name in ("report.csv", "annotation.json", "shards/00000.tar", "shards/00001.tar"):
        assert (out / name).read_bytes() == (chain["reduced"] / name).read_bytes(), name


def test_two_processes_reduce_as_one(chain, start, folder):
    out = folder / "reduced-by-two"
    two(start, *chain["command"], "--out", out, module=REDUCE)
    for name in ("report.csv", "annotation.json", "shards/00000.tar", "shards/00001.tar", "shards/00002.tar"):
        assert (out / name).read_bytes() == (chain["reduced"] / name).read_bytes(), name


def test_broken_samples_are_left_out(cli, folder, chain, broken):
    options = ["--clusters", "3", "--captioner", chain["captioner"]]
    result = finished(cli(broken, *options, "--out", folder / "broken-reduction", module=REDUCE))
    assert "broken samples" in result.out and "unreadable image" in result.out
    with open(folder / "broken-reduction/report.csv", newline="") as file:
        lines = {line["key"]: line for line in csv.DictReader(file)}
    assert lines["bad"]["reason"].startswith("broken: unreadable") and lines["bad"]["kept"] == "0"
    assert lines["mute"]["reason"] == "broken: empty caption"
    options = ["--select", "random", "--keep", "1", "--scorer", chain["scorer"], "--out", folder / "broken-random"]
    result = finished(cli(broken, *options, module=REDUCE))
    assert "broken samples" in result.out and "identical images" in result.out
    with open(folder / "broken-random/report.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert {line["key"] for line in lines if line["kept"] == "0"} == {"bad", "mute"}
    assert {line["key"] for line in lines if not line["itm"]} == {"bad", "mute"}  # a broken image has no score
    flags = [broken, *options, "--strict", "--out", folder / "strict-reduction"]
    refused(cli(*flags, module=REDUCE), "--strict")


def test_wrong_reduction_flags(in_process, folder, chain):
    pool, out = folder / "pool", ["--out", folder / "wrong"]
    (folder / "words.json").write_text('[{"image": "a.png", "caption": ["a", "b"]}]')
    (folder / "gone.json").write_text('[{"image": "a.png", "caption": "a"}]')
    for arguments, words in (
        (["nowhere.tar"], "nowhere.tar does not exist"),
        (["x.tsv"], "reduce takes .tar files"),
        ([pool, "--keep", "1.5"], "--keep must be at most 1"),
        ([pool, "--clusters", "161"], "--clusters 161"),
        ([pool, "--select", "first", "--keep", "0.001"], "--keep 0.001"),
        ([pool, "--workers", "-1"], "--workers must be at least 0"),
        ([pool, "--work", pool / "00000.tar"], "00000.tar is a file"),
        ([pool, "--encoder", "lite"], "'lite'"),
        ([pool, "--recipe", "cc4m"], "--recipe cc4m"),
        ([pool, "--captions", "refined"], "needs --caption-model"),
        ([pool, "--select", "itm"], "need --scorer"),
        ([pool, "--captioner", folder], "is no run folder"),
        ([pool, "--scorer", folder], "is no run folder"),
        ([pool, "--captioner", chain["scorer"], "--clusters", "3"], "stage captioner"),
        ([pool, "--match", folder], "holds no report.json"),
        ([pool, "--match", chain["reduced"]], "--match goes"),
        ([chain["reduced"] / "shards", "--match", chain["reduced"], "--select", "all"], "--match goes"),
        ([folder / "words.json"], "caption of a.png"),
        ([folder / "gone.json", "--select", "random"], "none of the 1 images"),
        ([pool, "--precision", "fp16"], "fp16 needs a GPU"),
        ([pool, "--caption-model", chain["captioner"]], "stage finetune"),
    ):
        refused(in_process(*arguments, *out, module=REDUCE), words)
        shutil.rmtree(folder / "wrong", ignore_errors=True)
    refused(in_process(pool, "--out", pool / "00000.tar", module=REDUCE), "is a file")
    refused(in_process(pool, "--out", pool, module=REDUCE), "is the folder of the data")
    shutil.copy(folder / "gone.json", folder / "annotation.json")  # it would be overwritten
    refused(in_process(folder / "annotation.json", "--out", folder, module=REDUCE), "is the folder of the data")
    own = chain["reduced"].parent / "own"  # output shards would be mixed with those of the input
    shutil.copytree(chain["reduced"] / "shards", own / "shards")
    refused(in_process(own / "shards", "--out", own, module=REDUCE), "choose another --out")


def test_dry_run_of_a_reduction(in_process, folder):
    """It prints sizes of the data, or of the recipe's data set if they are missing or remote; it writes nothing."""
    out = folder / "dry"
    printed = finished(in_process(folder / "pool", "--keep", "0.5", "--dry-run", "--out", out, module=REDUCE)).out
    assert "160 (" in printed and "80, " in printed
    printed = finished(
        in_process("gone/{0..9}.tar", "--recipe", "yfcc15m", "--dry-run", "--out", out, module=REDUCE)
    ).out
    assert "14,900,000 (yfcc15m" in printed and "2,488,300" in printed and not out.exists()
    remote = f"pipe:touch {folder}/fetched-{{0..1}}"
    printed = finished(in_process(remote, "--dry-run", "--out", out, module=REDUCE)).out
    assert "(cc3m, as pipe:touch" in printed and not list(folder.glob("fetched-*"))
