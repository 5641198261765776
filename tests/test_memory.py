"""Corpora in memory: views equal PIL's and depend on (seed, item); batches have no repeated captions."""

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from protoclip.episodes import BatchTransform

from shared import clip, data, layout, memory


def random_pixels(n: int, side: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def test_crops_are_resized_as_by_pil():
    pixels = random_pixels(6)
    boxes = memory.random_crops(memory.uniforms((0, 1), 6, 4), (0.3, 1.0))
    for size in (24, 48, 96):
        ours = memory.crop_and_resize(pixels, boxes, size)
        for image, box, x in zip(pixels, 64 * boxes, ours, strict=True):
            left, top, width, height = box.tolist()
            pil = Image.fromarray(image.permute(1, 2, 0).numpy()).resize(
                (size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height)
            )
            assert (
                np.abs(x.permute(1, 2, 0).numpy() - np.asarray(pil, dtype=np.float32)).max() <= 1.6
            )  # PIL rounds twice


def test_a_corpus_that_does_not_fit_is_refused():
    class Many:
        def __len__(self) -> int:
            return 10**9

    with pytest.raises(ValueError, match=r"1,000,000,000 images of 64 pixels take .* GiB: pass --no-keep-in-memory"):
        memory.read(Many(), 64, lambda texts: None)


def test_images_with_several_captions_are_decoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = [layout.png(pixels.permute(1, 2, 0).numpy()) for pixels in random_pixels(3, 20)]
    pairs = [(0, "a dog"), (0, "it runs"), (1, "a cat"), (2, "snow"), (1, "it sleeps"), (0, "a dog")]
    layout.write_pairs(tmp_path, [{"png": files[i], "txt": text, "json": {}} for i, text in pairs])
    decoded, decode = [], data.decode_image
    monkeypatch.setattr(data, "decode_image", lambda content: decoded.append(content) or decode(content))
    found = memory.read(data.open_pairs(str(tmp_path)), 16, lambda texts: torch.zeros(len(texts), 4))
    assert decoded == files and found.labels.tolist() == [1, 2, 0, 4, 3, 1]
    for pixels, (i, _) in zip(found.pixels, pairs, strict=True):
        assert torch.equal(pixels, memory.square_pixels(decode(files[i]), 16))


def test_flip_mirrors_the_view():
    pixels, boxes = random_pixels(2), torch.tensor([[0.1, 0.2, 0.7, 0.6]] * 2)
    plain = memory.crop_and_resize(pixels, boxes, 32)
    flipped = memory.crop_and_resize(pixels, boxes, 32, torch.tensor([True, False]))
    torch.testing.assert_close(flipped[0], plain[0].flip(2))
    torch.testing.assert_close(flipped[1], plain[1])


def test_boxes_lie_within_the_image():
    boxes = memory.random_crops(memory.uniforms((3,), 5000, 4), (0.5, 1.0))
    assert boxes.min() >= 0 and (boxes[:, :2] + boxes[:, 2:]).max() <= 1 + 1e-6
    assert 0.7 < (boxes[:, 2] * boxes[:, 3]).mean() < 0.76  # a little below 0.75: what does not fit is cut


def test_a_view_is_a_function_of_seed_and_item():
    corpus = memory.InMemory(random_pixels(20), torch.arange(20)[:, None], np.arange(20), [])
    for light in (False, True):
        transform = BatchTransform(32, train=True, light=light)

        def views(batches, seed=(0, 1), transform=transform):
            loader = memory.Views(corpus, np.arange(20), transform, transform.COUNT, seed, batches)
            parts = [(index, images) for index, images, *_ in loader]
            order = torch.cat([index for index, _ in parts]).argsort()
            return torch.cat([images for _, images in parts])[order]

        whole = views([np.arange(20)])
        torch.testing.assert_close(views([np.arange(19, 9, -1), np.arange(10)]), whole)
        assert not torch.allclose(views([np.arange(20)], (0, 2)), whole)


def test_distinct_batches_hold_no_label_twice_while_there_are_enough():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 50, 400)
    batches = memory.distinct_batches(rng.permutation(400), labels, 32)
    assert sorted(np.concatenate(batches).tolist()) == list(range(400))
    assert {len(batch) for batch in batches[:-1]} == {32}
    assert all(len(set(labels[batch])) == len(batch) for batch in batches[:8])


def test_groups_of_texts_change_nothing():
    model = small_clip()
    tokens = open_clip.SimpleTokenizer(context_length=24)([f"{'very ' * (i % 9)}big cat {i}" for i in range(70)])
    with torch.no_grad():
        torch.testing.assert_close(
            clip.encode_text(model, tokens), open_clip.CLIP.encode_text(model, tokens), atol=2e-5, rtol=0
        )


def small_clip() -> open_clip.CLIP:
    torch.manual_seed(0)
    text = {"context_length": 24, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
    return open_clip.CLIP(32, {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}, text)
