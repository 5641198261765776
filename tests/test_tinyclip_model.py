"""Losses, towers and weights from files. tests/adapters/tinyclip.py compares them with the authors' numbers."""

import re
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from authors_files import beside_weights
from PIL import Image
from scripts import ROOT, in_ranks, same
from tinyclip_runs import TEXT, VISION, example, some_masks, tiny

from shared import checkpoints
from shared.clip import set_grad_checkpointing
from shared.run import gather
from tinyclip.geometry import CONFIGS, geometry_of_weights
from tinyclip.masks import L0Mask, prune
from tinyclip.model import (
    CLIP,
    create_model,
    distillation_loss,
    equal_captions,
    load_clip,
    parameter_counts,
)


@pytest.mark.parametrize("hard", [False, True])
def test_equal_captions_that_are_ignored(hard: bool):
    """The loss is the mean over samples of the losses in which the row's other samples of its caption do not occur."""
    tokens = torch.tensor([[1, 9, 0], [2, 9, 0], [1, 9, 0], [1, 2, 9], [1, 9, 0]])
    left_out = equal_captions(tokens)
    assert left_out.nonzero().tolist() == [[0, 2], [0, 4], [2, 0], [2, 4], [4, 0], [4, 2]]
    image, text, *of_teacher = (F.normalize(torch.randn(5, 4), dim=1).requires_grad_() for _ in range(4))
    teacher = *of_teacher, 3.0
    loss = distillation_loss(image, text, 5.0, *teacher, alpha=1.0 - hard, left_out=left_out)
    losses = []
    for row, others in enumerate(~left_out):
        for a, b, a_teacher, b_teacher in ((image, text, *of_teacher), (text, image, *reversed(of_teacher))):
            logits, target = 5 * b[others] @ a[row], (3 * b_teacher[others] @ a_teacher[row]).softmax(0).detach()
            losses.append(F.cross_entropy(logits, others[:row].sum() if hard else target))
    torch.testing.assert_close(loss, sum(losses) / 10)
    gradients = [torch.autograd.grad(x, (image, text)) for x in (loss, sum(losses) / 10)]
    torch.testing.assert_close(*gradients)
    assert not loss.isclose(distillation_loss(image, text, 5.0, *teacher, alpha=1.0 - hard))


def equal_captions_of_rank(rank: int, world: int, tokens: torch.Tensor) -> torch.Tensor:
    return equal_captions(tokens.chunk(world)[rank], gather)


def test_equal_captions_of_two_processes(tmp_path):
    tokens = torch.tensor([[1, 9], [2, 9], [1, 9], [3, 9], [2, 9], [1, 9]])
    parts = in_ranks(equal_captions_of_rank, 2, tmp_path, 2, tokens)
    assert torch.equal(torch.cat(parts), equal_captions(tokens)) and parts[1].sum() == 3


def test_the_text_tower_starts_as_openais():
    """Standard deviations for a width of 64 and two layers."""
    torch.manual_seed(0)
    model = CLIP(32, VISION, {"context_length": 64, "vocab_size": 500, "width": 64, "heads": 2, "layers": 2})
    block = model.transformer.resblocks[1]
    expected = {
        model.token_embedding.weight: 0.02, model.positional_embedding: 0.01, model.text_projection: 64**-0.5,
        block.attn.in_proj_weight: 64**-0.5, block.attn.out_proj.weight: 64**-0.5 * 4**-0.5,
        block.mlp.c_fc.weight: 128**-0.5, block.mlp.c_proj.weight: 64**-0.5 * 4**-0.5,
    }  # fmt: skip
    for parameter, std in expected.items():
        assert parameter.std().item() == pytest.approx(std, rel=0.05)
    assert model.logit_scale.exp().item() == pytest.approx(1 / 0.07)


def test_what_stands_behind_the_end_token_does_not_matter():
    model, (_, tokens) = tiny(), example()
    end = tokens.argmax(1)[:, None]
    other = torch.where(torch.arange(8) > end, 7, tokens)
    torch.testing.assert_close(model.encode_text(other), model.encode_text(tokens))


def test_groups_of_texts_of_similar_length_change_nothing():
    """On a CPU, 64 texts are sorted by length and split into groups; fewer texts are computed unsorted."""
    model, tokens = tiny(), torch.zeros(64, 8, dtype=torch.long)
    for row, end in zip(tokens, torch.arange(64) % 7 + 1, strict=True):
        row[:end], row[end] = torch.randint(1, 29, (int(end),)), 29
    masks = some_masks(TEXT)
    for given in (None, masks):
        parts = torch.cat([model.encode_text(part, given) for part in tokens.split(16)])
        torch.testing.assert_close(model.encode_text(tokens, given), parts, rtol=1e-5, atol=1e-6)
    model.cuts_padding = False
    torch.testing.assert_close(model.encode_text(tokens, masks), parts, rtol=1e-5, atol=1e-6)


def test_small_convolutional_towers_have_a_half_and_a_quarter_of_the_parameters():
    sizes = []
    for share in (100, 50, 25):
        counts = parameter_counts(create_model(f"emoji-convnet-{share}"))
        sizes.append(counts["image"] + counts["text"])
    assert [round(size / sizes[0], 1) for size in sizes] == [1, 0.5, 0.3] and sizes[2] < 0.28 * sizes[0]


def test_checkpointing_changes_no_gradient():
    gradients = []
    for on in (False, True):
        model = tiny().train()
        set_grad_checkpointing(model, on)
        image, text, _ = model(*example())
        (image.sum() + text[:, 0].sum()).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_unknown_names():
    with pytest.raises(ValueError, match="none of"):
        create_model("ViT-nowhere")
    with pytest.raises(ValueError, match="mask type"):
        L0Mask(8, 32, 2, 2, ["layer"])
    with pytest.raises(ValueError, match="not the weights"):
        geometry_of_weights({})
    with pytest.raises(ValueError, match="transformers"):
        resnet = CLIP(8, {"image_size": 32, "width": 8, "layers": [1, 1, 1, 1]}, TEXT)
        resnet.encode_image(torch.zeros(1, 3, 32, 32), some_masks(VISION))


# --------------------------------------------------------------------------------------------------- weights from files


def theirs(model: CLIP, layout: str) -> dict[str, torch.Tensor]:
    """The state dict with the keys of the authors' files."""
    if layout == "openai":
        return {f"module.{name}": value for name, value in model.state_dict().items()}
    state = {}
    for name, value in model.state_dict().items():
        tower = (
            "logit_scale" if name == "logit_scale" else "image_encoder" if name.startswith("visual") else "text_encoder"
        )
        state[f"_{tower}.{'module.' if layout == 'towers, distributed' else ''}{name}"] = value
        if layout == "auto" and tower != "logit_scale":
            state[f"{tower}_without_ddp.{name}"] = value  # registered twice
    return state


@pytest.mark.parametrize("layout", ["openai", "towers", "towers, distributed", "auto"])
def test_checkpoints_in_the_authors_layouts(tmp_path: Path, layout: str):
    model = prune(tiny(), some_masks(VISION), some_masks(TEXT)).eval() if layout == "auto" else tiny()
    kept = beside_weights(
        state_dict=theirs(model, layout), iter_in_epoch=9, num_batches=10, samples_per_epoch=320
    )  # U:training/train.py:673
    kept["optimizer"] = 3 * [kept["optimizer"]]  # of image tower, text tower and temperature
    torch.save(kept, tmp_path / "theirs.pt")
    loaded = load_clip(tmp_path / "theirs.pt", head_width=8, quick_gelu=False)
    assert same(dict(loaded.state_dict()), dict(model.state_dict()))
    images, tokens = example()
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(loaded(images, tokens), model(images, tokens), strict=True))


def test_released_geometries_load(tmp_path: Path):
    """A file with the keys and shapes of each released model by hand."""
    for name in ("TinyCLIP-ViT-8M-16-Text-3M", "TinyCLIP-ResNet-19M-Text-19M"):
        model = create_model(name)
        torch.save({"state_dict": theirs(model, "openai")}, tmp_path / f"{name}.pt")
        loaded = load_clip(tmp_path / f"{name}.pt", quick_gelu=False)
        assert same(dict(loaded.state_dict()), dict(model.state_dict()))
        tower = {key: loaded.geometry["vision"][key] for key in CONFIGS[name]["vision"]}
        assert tower == CONFIGS[name]["vision"]


def test_activation_and_mlp_ratio_come_from_the_file_or_a_flag(tmp_path: Path):
    model = CLIP(12, VISION | {"mlp_width": 48}, TEXT | {"mlp_width": 72}, quick_gelu=True).eval()
    file, kept = tmp_path / "theirs.pt", beside_weights(state_dict=theirs(model, "towers, distributed"))
    torch.save(kept, file)
    with pytest.raises(ValueError, match="theirs.pt .*QuickGELU"):
        load_clip(file, head_width=8)
    loaded = [load_clip(file, head_width=8, quick_gelu=True)]
    for flag, pretrained in ((True, ""), (False, "openai")):  # what their trainer's command line said
        kept["args"].force_quick_gelu, kept["args"].pretrained = flag, pretrained
        torch.save(kept, file)
        loaded.append(load_clip(file, head_width=8))
    with torch.no_grad():
        for other in loaded:
            assert all(torch.equal(a, b) for a, b in zip(other(*example()), model(*example()), strict=True))
    kept["args"].pretrained = ""
    torch.save(kept, file)
    assert load_clip(file, head_width=8).geometry["quick_gelu"] is False


def test_the_lines_of_the_readme_take_a_released_file(tmp_path: Path, monkeypatch, capsys):
    code = re.search(r"```python\n(.*?)```", (ROOT / "tinyclip/README.md").read_text(), re.DOTALL)[1]
    file = tmp_path / re.search(r'load_clip\("(.+?)"', code)[1]
    torch.save({"state_dict": theirs(create_model("TinyCLIP-ViT-8M-16-Text-3M"), "openai")}, file)
    Image.new("RGB", (300, 200)).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    assert capsys.readouterr().out.startswith("tensor([[0.")


@pytest.mark.parametrize(
    "content",
    [[1, 2], {"state_dict": None}, {"state_dict": {1: torch.zeros(1)}}, {"state_dict": {"a": 1}},
     {"positional_embedding": torch.zeros(3)}, {"state_dict": {}, "geometry": {"width": 1}},
     {"state_dict": {}, "geometry": CONFIGS["emoji-25"] | {"vision": CONFIGS["emoji-25"]["vision"] | {"layers": [4]}}}],
    ids=["list", "nothing", "numbered", "no tensor", "too few axes", "strange geometry", "layers of a ResNet"],
)  # fmt: skip
def test_files_that_hold_no_clip(tmp_path: Path, content):
    checkpoints.save_checkpoint(tmp_path / "file.pt", content)
    with pytest.raises(ValueError):
        load_clip(tmp_path / "file.pt")


def test_weights_that_cannot_be_downloaded(monkeypatch):
    def offline(*_, **__):
        raise RuntimeError("Failed to download weights")

    monkeypatch.setattr(open_clip, "create_model", offline)
    with pytest.raises(ValueError, match="ViT-B-32@laion2b_e16"):
        load_clip("ViT-B-32@laion2b_e16")
