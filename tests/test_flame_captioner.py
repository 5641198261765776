"""python -m flame.captioner writes caption files of a user's images with a tiny captioner, also after an
interruption."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from scripts import finished, one_sentence
from test_flame_embed import SECONDS, SHARDS, folder  # noqa: F401

from flame import captioner
from flame.recaption import read_captions
from shared import data

SCRIPT = "flame.captioner"


@pytest.fixture(scope="module")
def tiny_blip(folder: Path) -> Path:
    """A random BLIP with one small layer per tower and a vocabulary of letters, in transformers' format."""
    from transformers import (
        BertTokenizerFast,
        BlipConfig,
        BlipForConditionalGeneration,
        BlipImageProcessor,
        BlipProcessor,
        BlipTextConfig,
        BlipVisionConfig,
    )

    out = folder / "blip"
    out.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", *"abcdefghijklmnopqrstuvwxyz"]
    (out / "vocab.txt").write_text("\n".join(words) + "\n")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    ends = dict(bos_token_id=5, pad_token_id=0, sep_token_id=3, eos_token_id=3, encoder_hidden_size=16)
    text = BlipTextConfig(vocab_size=len(words), projection_dim=16, **sizes, **ends)
    vision = BlipVisionConfig(image_size=32, patch_size=16, projection_dim=16, **sizes)
    torch.manual_seed(0)
    config = BlipConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    BlipForConditionalGeneration(config).save_pretrained(out)
    tokenizer = BertTokenizerFast.from_pretrained(out)
    BlipProcessor(BlipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(out)
    return out


def test_captions_of_shards_are_a_file_that_embedding_reads(tiny_blip: Path, cli, folder: Path):
    out = folder / "captions/short.json"
    flags = f"--data {SHARDS}/00000.tar --dataset-size 10 --precision fp32 --max-length 5 --batch-size 4 --shard-size 4"
    flags = [*flags.split(), "--model", tiny_blip, "--out", out]
    result = finished(cli(*flags))
    assert "10 captions" in result.out and not Path(f"{out}.shards").exists()
    found, keys = read_captions(str(out)), data.open_pairs(f"{SHARDS}/00000.tar", 10).keys.tolist()
    assert list(found) == keys and all(isinstance(text, str) for text in found.values())
    assert "nothing to do" in finished(cli(*flags)).out
    (again := folder / "again").mkdir()  # a shard that is there is not made again, others are the same
    (again / "short.json.shards").mkdir()
    kept = [{"__key__": key, "caption": "kept"} for key in keys[:4]]
    (again / "short.json.shards/0.json").write_text(json.dumps({"captions": kept}))
    finished(cli(*flags[:-1], again / "short.json"))
    assert list(read_captions(str(again / "short.json")).items()) == [
        *((key, "kept") for key in keys[:4]), *list(found.items())[4:]
    ]  # fmt: skip


def test_a_model_that_converses_is_asked_and_only_its_answer_is_kept():
    asked = {}

    class Processor:
        chat_template, tokenizer = "{}", SimpleNamespace(padding_side="right")

        def apply_chat_template(self, turns, add_generation_prompt):
            asked["turns"] = turns
            return "<image> what?"

        def __call__(self, images, text, return_tensors, padding):
            asked["images"], asked["text"] = images, text
            return Inputs(input_ids=torch.tensor([[7, 8]] * len(text)))

        def batch_decode(self, ids, skip_special_tokens):
            return [" ".join(f"w{i}" for i in row) + "\n" for row in ids.tolist()]

    class Inputs(dict):
        def to(self, *_):
            return self

    class Model(torch.nn.Module):
        device, dtype = torch.device("cpu"), torch.float32

        def generate(self, input_ids, max_new_tokens, do_sample):
            return torch.cat([input_ids, torch.tensor([[1, 2]] * len(input_ids))], dim=1)

    images = [Image.new("RGB", (8, 8))] * 3
    assert captioner.Captioner(Model(), Processor(), "What is it?", 8)(images) == ["w1 w2"] * 3
    assert asked["turns"][0]["content"][1]["text"] == "What is it?" and asked["text"] == ["<image> what?"] * 3
    assert Processor.tokenizer.padding_side == "left" and asked["images"] == [[image] for image in images]


def test_broken_images_have_empty_captions():
    class Pairs:
        keys = ["a", "b", "c"]

        def read(self, row):
            if row == 1:
                raise data.BrokenSample("no image")
            return SimpleNamespace(image=row)

    cfg = captioner.Config(batch_size=2)
    entries = captioner.described(Pairs(), range(3), lambda images: [f"picture {image}" for image in images], cfg)
    assert [entry["caption"] for entry in entries] == ["picture 0", "", "picture 2"]


def test_captioner_command_line_errors(in_process, tiny_blip: Path, tmp_path: Path):
    (tmp_path / "short.json.shards").mkdir()
    (tmp_path / "short.json.shards/about.json").write_text('{"model": "another"}')
    shards, out = ["--data", SHARDS / "00000.tar", "--dataset-size", "4"], tmp_path / "short.json"
    (tmp_path / "long.json").write_text("[]")
    (tmp_path / "long.json.about.json").write_text('{"instruction": "another"}')
    cases = {
        "long.json holds captions of other settings": [*shards, "--model", tiny_blip, "--out", tmp_path / "long.json"],
        "--data is missing": ["--out", tmp_path / "x.json"],
        "--shard-size must be at least 1": [*shards, "--shard-size", "0", "--out", tmp_path / "x.json"],
        "could not be loaded as an image-to-text model": [*shards, "--model", tmp_path, "--out", tmp_path / "x.json"],
        "short.json.shards holds captions of other settings or data": [*shards, "--model", tiny_blip, "--out", out],
    }
    for message, arguments in cases.items():
        result = in_process(*arguments, module=SCRIPT)
        assert result.code == 2 and message in result.err and one_sentence(result.err), result.err
