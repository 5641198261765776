"""PatchDis of any dual encoder: open_clip's ViTs and VDR's weights; folders of images and masks."""

import json
import shutil
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from scripts import one_sentence
from tokenizers import BertWordPieceTokenizer
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

from lexvla import patchdis
from lexvla.model import lexical_map

SCRIPT, CPU = "lexvla.patchdis", torch.device("cpu")
PIECES = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[unused1]",
    "a",
    "##b",
    "[",
    "]",
    "é",
    "car",
    "##s",
    "dog",
    "語",
]


@pytest.fixture(scope="module")
def labelled(folder: Path) -> Path:
    """Three pictures of two classes, of different sizes."""
    out, rng = folder / "labelled", np.random.default_rng(0)
    for part in ("images", "masks"):
        (out / part).mkdir(parents=True)
    (out / "classnames.txt").write_text("car\ndog\n")
    for i, size in enumerate(((40, 30), (32, 32), (16, 64))):
        Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(out / f"images/{i}.png")
        Image.fromarray(rng.choice([0, 1, 255], size).astype(np.uint8)).save(out / f"masks/{i}.png")
    return out


@pytest.fixture(scope="module")
def exported(folder: Path) -> Path:
    """A small random CLIP as `--export` of the other papers writes it."""
    out = folder / "clip"
    out.mkdir()
    vision = dict(image_size=32, layers=2, width=64, head_width=16, patch_size=8)
    text = dict(context_length=16, vocab_size=49408, width=32, heads=2, layers=1)
    about = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": text, "quick_gelu": True}
    statistics = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
    (out / "open_clip_config.json").write_text(json.dumps({"model_cfg": about, "preprocess_cfg": statistics}))
    torch.manual_seed(0)
    save_file(open_clip.CLIP(**about).state_dict(), out / "open_clip_model.safetensors")
    return out


def test_patches_of_open_clip_are_its_tokens_projected(exported: Path):
    encoder = patchdis.open_clip_encoder(f"local-dir:{exported}", CPU)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{exported}")
    model.eval()
    pixels, seen = torch.randn(2, 3, 32, 32), []
    model.visual.ln_post.register_forward_hook(lambda *inputs: seen.append(inputs[-1]))
    with torch.no_grad():
        pooled = F.normalize(model.encode_image(pixels), dim=-1)
        found = encoder.patches(pixels)
        torch.testing.assert_close(found, F.normalize(seen[0][:, 1:] @ model.visual.proj, dim=-1))
        torch.testing.assert_close(pooled, F.normalize(seen[0][:, 0] @ model.visual.proj, dim=-1))
        tokens = open_clip.get_tokenizer(f"local-dir:{exported}")(["car", "dog"])
        torch.testing.assert_close(encoder.classes(["car", "dog"]), model.encode_text(tokens, normalize=True))
    assert encoder.side == 32 and found.shape == (2, 16, 24)
    mean, std = next(iter(encoder.normalise.values.values()))
    assert mean.flatten().tolist() == pytest.approx([0.5, 0.4, 0.3]) and std.flatten().tolist()[0] == pytest.approx(0.2)


@pytest.fixture(scope="module")
def vdr(folder: Path) -> Path:
    """Small towers over seven words with random weights, saved under the names of VDR's `BiEncoder`."""
    out = folder / "vdr"
    out.mkdir()
    tokenizer = BertWordPieceTokenizer({piece: i for i, piece in enumerate(PIECES)})._tokenizer
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "UNK", "CLS", "SEP", "MASK")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(out)
    text = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, max_len=12)
    text |= {"vocab_size": len(PIECES), "type": "vdr_crossmodal_text", "model_id": "bert-base-uncased"}
    image = dict(type="vdr_crossmodal_image", resolution=32, patch_size=8, width=32, layers=2, heads=4)
    (out / "config.json").write_text(json.dumps({"encoder_q": text, "encoder_p": image, "shared_encoder": False}))
    torch.manual_seed(0)
    towers = {"encoder_q": patchdis.VDRText(BertConfig(**text), patchdis.vdr_vocabulary(PIECES)),
              "encoder_p": patchdis.VDRImage(7, side=32, patch=8, width=32, layers=2, heads=4)}  # fmt: skip
    for parameter in towers["encoder_p"].parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = {f"{name}.{key}": value for name, tower in towers.items() for key, value in tower.state_dict().items()}
    state["encoder_q.bert_model.embeddings.position_ids"] = torch.arange(512)[None]
    torch.save(state, out / "pytorch_model.bin")
    return out


def test_vdr_keeps_ascii_pieces_that_are_not_special():
    assert [PIECES[i] for i in patchdis.vdr_vocabulary(PIECES)] == ["a", "##b", "[", "]", "car", "##s", "dog"]


def test_vdrs_weights_load_and_give_its_rows(vdr: Path):
    """Text: BERT's states, LayerNorm, input embedding, maximum over all positions with padding. Image: each patch."""
    encoder = patchdis.vdr_encoder(str(vdr), CPU)
    state = torch.load(vdr / "pytorch_model.bin", weights_only=True)
    with torch.no_grad():
        patches, classes = encoder.patches(torch.randn(2, 3, 32, 32)), encoder.classes(["car", "cars dog"])
        about = json.loads((vdr / "config.json").read_text())["encoder_q"]
        bert = BertModel(BertConfig(**about), add_pooling_layer=False).eval()
        weights = {key.removeprefix("encoder_q.bert_model."): value for key, value in state.items() if "bert_m" in key}
        bert.load_state_dict({key: value for key, value in weights.items() if "position_ids" not in key})
        ids = torch.tensor([[2, 11, 3, *[0] * 9]])
        hidden = bert(input_ids=ids, attention_mask=(ids > 0).long()).last_hidden_state
        z = F.layer_norm(hidden, (16,), state["encoder_q.ln.weight"], state["encoder_q.ln.bias"])
        rows = state["encoder_q.bert_model.embeddings.word_embeddings.weight"][patchdis.vdr_vocabulary(PIECES)]
        torch.testing.assert_close(classes[0], lexical_map(z, rows, pool=True)[0], rtol=1e-4, atol=1e-5)
    assert patches.shape == (2, 16, 7) and classes.shape == (2, 7) and encoder.side == 32
    torch.testing.assert_close(patches.norm(dim=-1), torch.ones(2, 16))


def test_models_are_measured_and_drawn(labelled: Path, exported: Path, vdr: Path, in_process, tmp_path: Path):
    options = ["--folder", labelled, "--out", tmp_path / "out", "--device", "cpu"]
    models = f"local-dir:{exported}", f"vdr:{vdr}"
    result = in_process(*models, *options, "--template", "a {}")
    assert result.code == 0, result.err
    found = json.loads((tmp_path / "out/patchdis.json").read_text())["models"]
    assert list(found) == [f"local-dir:{exported}", f"vdr:{vdr}"]
    for values in found.values():
        assert all(0 <= value <= 100 for value in values.values()) and len(values) == 4
    assert found[f"vdr:{vdr}"]["random_miou"] == found[f"local-dir:{exported}"]["random_miou"]  # the same grid
    assert len(list((tmp_path / "out").glob("*.png"))) == 2
    again = in_process(f"local-dir:{exported}", *options, "--template", "a {}", "--batch-size", "1")
    assert again.code == 0, again.err
    kept = json.loads((tmp_path / "out/patchdis.json").read_text())["models"][f"local-dir:{exported}"]
    assert kept == pytest.approx(found[f"local-dir:{exported}"])


def test_perfect_patches_have_full_miou_and_random_ones_do_not(labelled: Path):
    """Perfect: each pixel is a patch, represented by its class."""
    masks = [mask for _, mask, _ in patchdis.labelled_images(str(labelled), 32, lambda image: torch.zeros(3, 32, 32))]
    square = [(torch.zeros(1, 3, 4, 4), mask[:, :16, :16], 255) for mask in masks]
    answers = iter(mask.flatten(1).clamp(max=1) for _, mask, _ in square)
    found, maps = patchdis.measure(
        lambda pixels: F.one_hot(next(answers), 2).float(), torch.eye(2), iter(square), batch_size=1
    )
    assert all((each.predicted == each.truth)[each.truth >= 0].all() for each in maps) and len(maps) == 3
    assert found["miou"] == found["miou_present"] == 100 and 10 < found["random_miou"] < 60


def test_a_masks_image_has_the_same_name(tmp_path: Path):
    """The whole name counts, not only its beginning, and it may have any characters."""
    names = "1", "1.5", "a[1]", "b*"
    for part in ("images", "masks"):
        (tmp_path / part).mkdir()
    (tmp_path / "classnames.txt").write_text("".join(f"{name}\n" for name in names))
    for i, name in enumerate(reversed(names)):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"images/{name}.png")
        Image.new("L", (8, 8), i).save(tmp_path / f"masks/{name}.png")
    for pixels, mask, _ in patchdis.labelled_images(str(tmp_path), 8, lambda image: torch.tensor(np.asarray(image))):
        assert (pixels[0, ..., 0] == mask[0]).all()


def test_all_masks_are_checked_first(labelled: Path, tmp_path: Path):
    """Also for what is no error while images are resized: a mask of another shape than its image. A photograph may be a
    smaller copy of that on which its mask was drawn."""
    folder = shutil.copytree(labelled, tmp_path / "labelled")
    patchdis.check_folder(folder)
    Image.new("RGB", (385, 256)).save(folder / "images/2.png")
    Image.new("L", (640, 426)).save(folder / "masks/2.png")
    patchdis.check_folder(folder)
    Image.new("RGB", (64, 16)).save(folder / "images/2.png")
    Image.new("L", (30, 20)).save(folder / "masks/2.png")
    with pytest.raises(ValueError, match=r"masks/2.png .*30x20 .*64x16"):
        patchdis.check_folder(folder)
    (folder / "images/2.png").write_bytes(b"?")
    with pytest.raises(ValueError, match="images/2.png cannot be read"):
        patchdis.check_folder(folder)
    (folder / "images/2.png").unlink()
    with pytest.raises(ValueError, match="no picture for masks/2.png"):
        patchdis.check_folder(folder)


def test_an_image_without_classes_has_no_candidates():
    """With `background`, its predictions count as false if all classes compete, and are left out if only the image's
    own classes do."""
    masks = torch.tensor([[[0, 1]], [[255, 255]]])
    s_patch = torch.eye(2)[torch.tensor([[0, 1], [0, 0]])]
    for present_only, union in ((False, [3, 1]), (True, [1, 1])):
        found = patchdis.patchdis(s_patch, torch.eye(2), (1, 2), masks, 255, present_only, background=True)
        assert found[0].tolist() == [1, 1] and found[1].tolist() == union


def test_command_lines_end_in_one_sentence(in_process, labelled: Path, exported: Path, vdr: Path, tmp_path: Path):
    bad, resnet = tmp_path / "bad", tmp_path / "resnet"
    bad.mkdir()
    resnet.mkdir()
    about = json.loads((exported / "open_clip_config.json").read_text())
    about["model_cfg"]["vision_cfg"] = dict(image_size=64, layers=[1, 1, 1, 1], width=8, head_width=16)
    (resnet / "open_clip_config.json").write_text(json.dumps(about))
    save_file(open_clip.CLIP(**about["model_cfg"]).state_dict(), resnet / "open_clip_model.safetensors")
    (bad / "config.json").write_text("{}")
    (bad / "classnames.txt").write_text("")
    (bad / "open_clip_config.json").write_text((exported / "open_clip_config.json").read_text())
    (bad / "open_clip_model.safetensors").write_bytes((exported / "open_clip_model.safetensors").read_bytes()[:1000])
    for arguments, words in (
        (("--folder", labelled), "name at least one model"),
        ((f"local-dir:{exported}", "--folder", tmp_path), "classnames.txt does not exist"),
        ((f"local-dir:{exported}", "--folder", bad), "classnames.txt is empty"),
        ((f"local-dir:{exported}", "--folder", labelled, "--template", "a photo"), "{}"),
        ((f"local-dir:{exported}", "--folder", labelled, "--batch-size", "0"), "--batch-size must be at least 1"),
        ((f"vdr:{bad}", "--folder", labelled), "hub name"),
        ((f"local-dir:{bad}", "--folder", labelled), "is no MODEL@TAG"),
        (("RN50", "--folder", labelled), "RN50 names no weights"),
        ((f"local-dir:{resnet}", "--folder", labelled), "PatchDis needs a ViT"),
        (("ViT-nothing@x", "--folder", labelled), "is no MODEL@TAG"),
    ):
        result = in_process(*arguments, "--out", tmp_path / "out")
        assert result.code == 2 and words in result.err and one_sentence(result.err), result.err
