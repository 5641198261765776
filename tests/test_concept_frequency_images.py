"""Tagging of captions and images, and the tags of a shard."""

import dataclasses
import functools
import io
import json
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from concept_frequency_runs import PIPELINE, arms, shards, write_shard  # noqa: F401
from PIL import Image
from scripts import SHARDS
from torchvision.transforms import Compose

from concept_frequency import captions, count, images, model
from concept_frequency.concepts import load_json
from concept_frequency.config import CountConfig
from shared import data


def first_captions(n: int) -> list[str]:
    """Captions of the first n samples of a shard."""
    shard = data.Shards([str(SHARDS / "00000.tar")], n)
    return [shard.caption(i) for i in range(len(shard))]


def test_exact_tagging_equals_that_of_the_whole_pipeline():
    nlp, texts = captions.load_spacy(PIPELINE), list(dict.fromkeys(first_captions(200)))
    whole = [model.noun_set((t.lemma_, t.pos_) for t in doc) for doc in nlp.pipe(texts)]
    assert list(captions.tag_captions(texts + texts[:5], PIPELINE, batch_size=64)) == whole + whole[:5]


def test_clip_tagger_prefers_the_right_concept(arms, tmp_path):
    """On a trained arm, the right concept outscores a plain picture more often than a wrong concept does."""
    names = list(load_json(arms["zipf"] / "frequencies.json"))
    cfg = CountConfig(tagger="clip", model=str(arms["zipf"]), pretrained="")
    made = images.load_tagger(cfg, names, "cpu")
    shard = data.Shards([str(SHARDS / "00000.tar")], 8)
    pictures = torch.stack([made.transform(shard.read(i).image) for i in range(8)])
    p = images.tag_images(pictures, made)
    assert p.shape == (8, len(names)) and p.dtype == np.float16 and 0 <= p.min() <= p.max() <= 1
    (tmp_path / "d.json").write_text(json.dumps([{name: [f"a {name}.", "an icon"]} for name in names]))
    described = dataclasses.replace(cfg, descriptions=str(tmp_path / "d.json"))
    assert not np.array_equal(images.tag_images(pictures, images.load_tagger(described, names, "cpu")), p)
    with pytest.raises(ValueError, match="but not of 'unknown'"):
        images.load_tagger(described, ["unknown"], "cpu")
    with pytest.raises(ValueError, match="clip, ram"):
        images.load_tagger(dataclasses.replace(cfg, tagger="other"), names, "cpu")


def in_ram_plus_layout(made: model.RAMPlus) -> dict[str, torch.Tensor]:
    """The model's weights with the keys of Microsoft's and RAM++'s files."""
    state = made.head.state_dict()
    for key, value in made.visual_encoder.state_dict().items():
        stage = key.split(".")
        if stage[0] == "layers" and stage[2] == "downsample":  # timm has it at the start of the next stage
            key = ".".join(["layers", str(int(stage[1]) - 1), *stage[2:]])
        state[f"visual_encoder.{key}"] = value
    return state


def test_ram_plus_loads_its_layout():
    """Swin-T instead of Swin-L."""
    torch.manual_seed(0)
    made = model.RAMPlus("swin_tiny_patch4_window7_224", 224)
    state = {key: torch.randn_like(value) * 0.02 for key, value in in_ram_plus_layout(made).items()}
    state |= {"label_embed": torch.zeros(51, 512), "visual_encoder.layers.0.blocks.1.attn_mask": torch.zeros(1)}
    other = model.RAMPlus("swin_tiny_patch4_window7_224", 224).eval()
    other.load_checkpoint(state)
    moved = other.visual_encoder.layers[1].downsample.reduction.weight
    torch.testing.assert_close(moved, state["visual_encoder.layers.0.downsample.reduction.weight"])
    with torch.no_grad():
        one = torch.nn.functional.normalize(torch.randn(6, 1, 512), dim=-1)
        p = other(torch.randn(2, 3, 224, 224), one)
        q = other(torch.randn(2, 3, 224, 224), one.expand(6, 5, 512))
    assert p.shape == q.shape == (2, 6) and 0 < p.min() < p.max() < 1
    del state["fc.bias"]
    with pytest.raises(ValueError, match="not a checkpoint of RAM"):
        other.load_checkpoint(state)


def test_the_ram_plus_tagger_reads_its_file(tmp_path, monkeypatch):
    """Weights of the file, one averaged description for each concept, squashed images with ImageNet's statistics."""
    small = functools.partial(model.RAMPlus, "swin_tiny_patch4_window7_224")
    torch.manual_seed(0)
    made, vectors = small(image_size=224).eval(), torch.randn(4, 512)
    torch.save({"model": in_ram_plus_layout(made)}, tmp_path / "ram.pth")
    texts = ["a dog", "a puppy", "a cat", "a kitten"]
    (tmp_path / "d.json").write_text(json.dumps([{"dog": texts[:2]}, {"cat": texts[2:]}]))
    clip = SimpleNamespace(encode_text=lambda rows: vectors[rows[:, 0]])
    monkeypatch.setattr(images, "RAMPlus", small)
    tokenizer = lambda given: torch.tensor([[texts.index(text)] for text in given])  # noqa: E731
    monkeypatch.setattr(images, "load_model", lambda *_: (clip, None, tokenizer))
    cfg = CountConfig(tagger="ram++", checkpoint=str(tmp_path / "ram.pth"), descriptions=str(tmp_path / "d.json"))
    tagger = images.load_ram_plus(cfg, ["cat", "dog"], torch.device("cpu"), image_size=224)

    seen = tagger.transform(Image.new("RGB", (50, 30), (255, 0, 51)))
    by_hand = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(seen, torch.tensor(by_hand)[:, None, None].expand(3, 224, 224), atol=1e-5, rtol=0)
    unit = vectors / vectors.norm(dim=1, keepdim=True)
    means = torch.stack([unit[2] + unit[3], unit[0] + unit[1]])  # of cat and dog
    pictures = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = made(pictures, (means / means.norm(dim=1, keepdim=True))[:, None])
    assert expected.std() > 1e-4
    np.testing.assert_allclose(images.tag_images(pictures, tagger), expected.half(), atol=1e-3)


def red_blue(names, device):
    """A tagger for tests: concept 0 is a red image, concept 1 a blue one."""
    transform = lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255  # noqa: E731
    return transform, lambda images: torch.stack([images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))], 1)


def test_images_are_counted(tmp_path, monkeypatch):
    red, blue, both = (255, 0, 0), (0, 0, 255), (255, 0, 255)
    write_shard(tmp_path / "0.tar", [("000", "a dog", red), ("001", "a cat", red), ("002", "", both)])
    write_shard(tmp_path / "1.tar", [("000", "a dog and a cat", blue), ("001", "a cat", blue)])
    monkeypatch.setitem(sys.modules, "colours", sys.modules[__name__])
    np.save(tmp_path / "keep.npy", np.array([0, 3, 3]))
    cfg = CountConfig(
        data=(str(tmp_path),), spacy=PIPELINE, query_spacy=PIPELINE, out=str(tmp_path / "out"), workers=1,
        tagger="colours:red_blue", keep=str(tmp_path / "keep.npy"),
    )  # fmt: skip
    found = count.count_corpus(cfg, ["dog", "cat"])
    assert found.text.tolist() == [2, 3] and found.image.tolist() == [3, 3] and found.both.tolist() == [1, 2]
    assert found.kept.tolist() == [1, 2]
    assert (found.documents, found.with_text, found.with_image, found.misaligned) == (5, 4, 5, 1)

    # captions in a file of their own, images in shards whose keys say the row
    (tmp_path / "captions.tsv").write_text("a dog\tu0\na cat\tu1\n\tu2\na dog and a cat\tu3\na cat\tu4\n")
    write_shard(tmp_path / "images.tar", [("00004", "a cat", blue), ("00000", "a dog", red)])
    separate = dataclasses.replace(
        cfg, data=(str(tmp_path / "captions.tsv"),), caption_column="0", images=(str(tmp_path / "images.tar"),),
        ids="cc3m",
        keep="", out=str(tmp_path / "separate"),
    )  # fmt: skip
    dataclasses.replace(separate, concepts=("x",)).check()
    found = count.count_corpus(separate, ["dog", "cat"])
    assert found.image.tolist() == [1, 1] and found.both.tolist() == [1, 1] and found.misaligned == 0
    by_caption = dataclasses.replace(separate, ids="cc12m", out=str(tmp_path / "bycaption"))
    assert count.count_corpus(by_caption, ["dog", "cat"]).both.tolist() == [1, 1]  # `a cat` is row 4, the last
    (tmp_path / "captions.tsv").write_text("a cat\tu0\na dog\tu1\na cat and a dog\tu2\n")  # other rows
    assert count.count_corpus(by_caption, ["dog", "cat"]).both.tolist() == [1, 1]
    with pytest.raises(ValueError, match="leave --also out"):
        dataclasses.replace(by_caption, concepts=("x",), tagger="x", also="1").check()


def test_images_of_any_partition_of_the_captions(tmp_path, monkeypatch):
    """Captions in partitions, images in shards of another order: only tags of a partition's documents are read."""
    rng = np.random.default_rng(0)
    texts = [("a dog", "a cat", "a dog and a cat", "")[i] for i in rng.integers(4, size=1300)]
    (tmp_path / "captions.tsv").write_text("".join(f"{text}\n" for text in texts))
    rows = [(0, 5, 20), (600, 601, 1299), (7, 700, 9999)]  # the last has no caption
    colors = {row: ((255, 0, 0), (0, 0, 255), (255, 0, 255))[row % 3] for shard in rows for row in shard}
    for i, shard in enumerate(rows):
        write_shard(tmp_path / f"{i}.tar", [(f"{row:05}", "?", colors[row]) for row in shard])
    monkeypatch.setitem(sys.modules, "colours", sys.modules[__name__])
    read: dict[int, set[str]] = {}
    whole = count.count_partition
    monkeypatch.setattr(
        count, "count_partition",
        lambda job: read.update({job.base: {Path(path).stem[0] for path, _ in job.tags}}) or whole(job),
    )  # fmt: skip
    cfg = CountConfig(
        data=(str(tmp_path / "captions.tsv"),), caption_column="0", images=(str(tmp_path / "{0..2}.tar"),), ids="cc3m",
        spacy=PIPELINE, query_spacy=PIPELINE, out=str(tmp_path / "out"), workers=1, tagger="colours:red_blue",
        partition=524,
    )  # fmt: skip
    found = count.count_corpus(cfg, ["dog", "cat"])
    assert read == {0: {"0", "2"}, 524: {"1", "2"}, 1048: {"1", "2"}}  # 9999 is beyond the end, in the last partition
    both = [
        sum(word in texts[row] and colors[row][channel] > 0 for row in colors if row < 1300)
        for word, channel in (("dog", 0), ("cat", 2))
    ]
    assert found.both.tolist() == both and sum(both) > 2
    assert found.image.tolist() == [sum(color[channel] > 0 for color in colors.values()) for channel in (0, 2)]


def test_decoders_change_nothing(tmp_path, monkeypatch):
    """Decoding in separate processes gives the same tags, with broken images and images without captions."""
    shades = [(f"{row:05}", "?", (row % 256, 0, 255 - row % 256)) for row in range(150)]
    write_shard(tmp_path / "0.tar", [*shades, ("cover", "?", (0, 0, 0))])
    with tarfile.open(tmp_path / "0.tar", "a") as tar:
        for name, content in (("00900.png", b"no image"), ("00900.txt", b"?")):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    monkeypatch.setitem(sys.modules, "colours", sys.modules[__name__])
    monkeypatch.setattr(images, "BATCH", 32)
    (partition,) = captions.list_partitions([str(tmp_path / "0.tar")], 1000, tmp_path)
    cfg = CountConfig(images=(str(tmp_path / "0.tar"),), ids="cc3m", tagger="colours:red_blue")
    done, tags = [], []
    for decoders in (0, 1, 2):
        monkeypatch.setattr(count.Worker, "decoders", decoders)
        done.append(count.tag_partition(count.Job(partition, cfg, str(tmp_path / f"{decoders}.npz"), ("dog", "cat"))))
        with np.load(done[-1].target) as file:
            tags.append({name: file[name].tolist() for name in file.files})
    assert tags[0] == tags[1] == tags[2] and set(tags[0]["concept"]) == {0, 1}
    assert [each[1:] for each in done] == [done[0][1:]] * 3 and done[0].documents == 152
    assert sorted(done[0].broken) == [
        ("00900", data.NO_PICTURE),
        ("cover", "not among the captions"),
    ]


def test_decoders_give_uint8(tmp_path, monkeypatch):
    """If a transform ends in normalising, decoders give uint8, and the tags are the same."""
    write_shard(tmp_path / "0.tar", [(f"{row:05}", "?", (row, 0, 255 - row)) for row in range(0, 256, 4)])
    (partition,) = captions.list_partitions([str(tmp_path / "0.tar")], 1000, tmp_path)
    seen, whole = set(), images.collate
    monkeypatch.setattr(images, "collate", lambda items: seen.add(items[0][1].dtype) or whole(items))
    plain, probabilities = red_blue((), None)
    halves = Compose([data.ToNormalizedTensor((0.5,) * 3, (0.25,) * 3)])
    monkeypatch.setattr(sys.modules[__name__], "other", lambda names, device: (
        halves, lambda images: probabilities(images * 0.25 + 0.5)), raising=False)  # fmt: skip
    monkeypatch.setitem(sys.modules, "colours", sys.modules[__name__])
    tags = []
    for tagger in ("red_blue", "other"):
        cfg = CountConfig(images=(str(tmp_path / "0.tar"),), tagger=f"colours:{tagger}")
        done = count.tag_partition(count.Job(partition, cfg, str(tmp_path / f"{tagger}.npz"), ("dog", "cat")))
        with np.load(done.target) as file:
            tags.append({name: file[name].tolist() for name in file.files})
    assert seen == {torch.float32, torch.uint8} and tags[0] == tags[1] and len(tags[0]["document"]) == 64
