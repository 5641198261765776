"""TinyCLIP's small models and training runs, for its tests."""

from pathlib import Path

import pytest
import torch
import tyro
from scripts import SHARDS
from short_runs import small_set

from tinyclip import config, train
from tinyclip.model import CLIP

VISION = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 3, "head_width": 8}
TEXT = {"context_length": 8, "vocab_size": 30, "width": 24, "heads": 3, "layers": 3}


def tiny(seed: int = 0, quick_gelu: bool = False) -> CLIP:
    torch.manual_seed(seed)
    model = CLIP(12, VISION, TEXT, quick_gelu)
    for parameter in model.parameters():
        if parameter.ndim:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


def some_masks(tower: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Soft masks with a layer without heads, one without attention, one without neurons and one without MLP."""
    generator = torch.Generator().manual_seed(seed)
    heads = tower["width"] // 8

    def soft(*shape):
        z = torch.rand(*shape, generator=generator)
        return torch.where(z < 0.3, 0.0, z)

    masks = {"hidden": soft(tower["width"]), "heads": soft(3, heads), "intermediate": soft(3, 4 * tower["width"])}
    masks |= {"mha": torch.tensor([0.7, 0.9, 0.0]), "ffn": torch.tensor([0.5, 0.0, 0.8])}
    if seed % 2:  # the bias that the second layer loses has only the first attention before it
        masks["ffn"][0] = 0
    masks["heads"][1] = 0
    masks["heads"][0, 0] = masks["heads"][2, 0] = 1.0
    masks["intermediate"][2] = 0
    return masks


def example(n: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(5)
    tokens = torch.randint(1, 29, (n, 8)).scatter(1, torch.randint(2, 8, (n, 1)), 29)
    return torch.randn(n, 3, 16, 16), tokens


STEPS = 8
TINY = f"""--data {SHARDS}/00000.tar --dataset-size 96 --image-size 16 --steps {STEPS} --batch-size 32 --eval-every 0
    --warmup 2 --precision fp32 --log-every 1""".split()
MASKS = "--prune-step 4 --sparsity-warmup 2 --mask-lr 1.0 --lambda-lr -1.0".split()
MODELS = {"emoji-teacher": "test-100", "emoji-auto": "test-100", "emoji-convnet-teacher": "test-convnet-100"}


def preset(name: str) -> list[str]:
    """A preset with a smaller model of its kind."""
    return [name, "--model", MODELS.get(name, "test-convnet-50" if "convnet" in name else "test-50")]


def inheriting(teacher: Path) -> list:
    """Options of a student that inherits from its teacher and mimics it, at the authors' scale."""
    return ["--teacher", teacher, "--init", teacher, "--logit-scale", "50"]


def arms(folder: Path) -> dict[str, list]:
    """A teacher and all kinds of later stages; the second automatic stage starts from the first."""
    given, of_convnet = (inheriting(folder / f"{name}-seed0") for name in ("teacher", "convnet-teacher"))
    commands = {
        "teacher": preset("emoji-teacher"),
        "convnet-teacher": preset("emoji-convnet-teacher"),
        "convnet": [*preset("emoji-convnet"), *of_convnet],
        "convnet-image": [*preset("emoji-convnet"), *of_convnet, "--inherit-only", "image"],
        "random-contrastive": [*preset("emoji-contrastive"), "--init", "None", "--ignore-equal-captions"],
        "inherited-affinity": [*preset("emoji"), *given],
        "random-channels": [*preset("emoji"), *given, "--inherit", "random"],
        "crops": [*preset("emoji"), *given, "--augmentation", "crop", "--no-keep-in-memory"],
        "auto": [*preset("emoji-auto"), *given, *MASKS],
        "auto-progressive": [
            *(*preset("emoji-auto"), *given, *MASKS, "--init", folder / "auto-seed0"),
            *("--start-sparsity", "0.5", "--target-sparsity", "0.75"),
        ],
    }
    return {arm: [*words, *TINY, "--out", folder / f"{arm}-seed0"] for arm, words in commands.items()}


@pytest.fixture(scope="module")
def sets(folder: Path) -> tuple[str, ...]:
    return tuple(small_set(name, folder / "sets") for name in ("groups_id", "retrieval_xm_en"))


def trained(*arguments) -> Path:
    """Run tinyclip.train in this process."""
    return train.main(tyro.extras.overridable_config_cli(config.PRESETS, args=[str(word) for word in arguments]))
