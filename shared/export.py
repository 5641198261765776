"""Exports dual encoders to folders that open_clip loads: `python -m FOLDER.eval RUN --export DIR`.

    DIR/open_clip_config.json       architecture and preprocessing
        open_clip_model.safetensors weights

    model, _, transform = open_clip.create_model_and_transforms("local-dir:DIR")
    tokenizer = open_clip.get_tokenizer("local-dir:DIR")

    clip_benchmark eval --model local-dir:DIR --pretrained "" --no_amp --batch_size 256 --num_workers 1 \\
        --dataset wds/names_ood --dataset_root 'data/emoji/eval/{dataset}' --task zeroshot_classification \\
        --output names_ood.json

`load_model` loads such a folder, MODEL@TAG of open_clip, or a run folder of any paper (exported by its eval.py).
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from shared import checkpoints
from shared.checkpoints import ROOT, trained_by
from shared.clip import open_clip_config, without_padding
from shared.errors import UserError
from shared.evaluation import check_own, named
from shared.layout import one_process

LOCAL = "local-dir:"
KINDS = "a run folder, local-dir:DIR written by --export, or MODEL@TAG of open_clip"
TOLERANCE = 1e-5  # largest difference of unit features that passes as rounding


def single(cfg: Any) -> str:
    """The only one of `cfg.runs`. UserError if there is not exactly one, or if it is another paper's run."""
    if len(cfg.runs) != 1:
        raise UserError(f"--export takes one run or checkpoint, not {len(cfg.runs)}")
    check_own(cfg.runs[0], cfg)
    return cfg.runs[0]


def named_config(name: str, image_size: int | None = None, **changes: Any) -> dict:
    """open_clip's config of this name, with its image size and top-level entries replaced."""
    config = open_clip_config(name)
    if image_size is not None:
        config["vision_cfg"]["image_size"] = image_size
    return config | changes


# ------------------------------------------------------------------------------------------- any model of these papers


def local_folder(source: str | Path) -> Path | None:
    """The folder of `local-dir:DIR` or DIR if it holds an export, else None."""
    path = Path(str(source).removeprefix(LOCAL))
    return path if (path / "open_clip_config.json").is_file() else None


def foreign(source: str | Path, paper: str) -> bool:
    """Whether `source` is another paper's run, an export or MODEL@TAG of open_clip."""
    return named(source) or local_folder(source) is not None or trained_by(source) not in (None, paper)


def exported(run: str | Path) -> Path:
    """RUN/open_clip, a folder that open_clip loads; the paper's eval.py writes it if it is missing or older than the
    checkpoint. UserError if the run cannot be exported."""
    run, folder = Path(run), Path(run) / "open_clip"
    if (paper := trained_by(run)) is None:
        raise UserError(
            f"{run}/checkpoint.pt does not name its paper: export it first, python -m FOLDER.eval {run} --export DIR"
        )
    if "\n    export: " not in (ROOT / paper / "eval.py").read_text(encoding="utf-8"):
        raise UserError(f"{run}, a run of {paper}, cannot be used here: open_clip has no such model")
    made, new = folder / "open_clip_config.json", run / "open_clip-unfinished"
    with one_process(folder):
        if made.is_file() and made.stat().st_mtime >= (run / "checkpoint.pt").stat().st_mtime:
            return folder
        shutil.rmtree(new, ignore_errors=True)
        alone = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "SLURM_NTASKS")}
        alone["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [alone.get("PYTHONPATH")])])
        command = [sys.executable, "-m", f"{paper}.eval", str(run), "--export", str(new), "--device", "cpu"]
        done = subprocess.run(command, env=alone, capture_output=True, text=True)
        if done.returncode:
            shutil.rmtree(new, ignore_errors=True)
            why = (done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("error: ")
            raise UserError(f"{run}, a run of {paper}, cannot be used here: {why}")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)
    return folder


def quick_gelu(name: str, tag: str) -> bool:
    """Whether open_clip's weights NAME@TAG were trained with QuickGELU; if NAME's config has GELU, it only warns."""
    return bool(open_clip.get_pretrained_cfg(name, tag).get("quick_gelu"))


def load_model(source: str, device: str | torch.device = "cpu") -> tuple[nn.Module, Callable, Callable]:
    """(model in eval mode, image transform, tokenizer) of `source`, one of KINDS. UserError if it cannot be loaded."""
    folder = local_folder(source)
    if folder is None and (Path(source) / "checkpoint.pt").is_file():
        folder = exported(source)
    name, _, tag = (f"{LOCAL}{folder}", "", "") if folder else source.partition("@")
    if not folder and (not named(source) or tag not in open_clip.list_pretrained_tags_by_model(name)):
        raise UserError(f"{source} is not a model that can be used here: name {KINDS}")
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name, pretrained=tag or None, force_quick_gelu=quick_gelu(name, tag)
        )
    except (RuntimeError, OSError) as error:
        raise UserError(f"{source} could not be loaded: {str(error).splitlines()[0]}") from error
    return without_padding(model).to(device).eval(), transform, open_clip.get_tokenizer(name)


# ---------------------------------------------------------------------------------------------------------- exporting


def new_folder(path: str | Path) -> Path:
    """The folder for an export; makes it if it is missing. NotADirectoryError or UserError for a file or a run."""
    folder = Path(path)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--export {folder} is a file: name a folder")
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"--export {folder} is a run folder: name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(
    folder: str | Path,
    model: Any,
    config: Mapping,
    weights: Mapping[str, Tensor],
    transform: Callable[[Image.Image], Tensor],
    **preprocess: Any,
) -> dict[str, float]:
    """Write the folder, load it with open_clip, and print and return its largest differences from `model`.

    model: `encode_image(images)` and `encode_text(tokens)` on the CPU, in eval mode. config: embed_dim, vision_cfg,
    text_cfg, quick_gelu. weights: by open_clip's names. transform: PIL RGB -> (3, S, S) of `model`. preprocess:
    open_clip's settings of this transform that differ from the default (shorter side to S, bicubic, centre crop,
    OpenAI's statistics). The differences are those of unit image and text features and of a preprocessed image.
    RuntimeError if those of features exceed TOLERANCE, UserError for a model without an image tower.
    """
    if config["vision_cfg"].get("timm_model_name") == "precomputed_features":
        raise UserError("a model of precomputed features has no image tower: there is no --export for it")
    folder = new_folder(folder)
    statistics = {"mean": open_clip.OPENAI_DATASET_MEAN, "std": open_clip.OPENAI_DATASET_STD}
    settings = statistics | {"interpolation": "bicubic", "resize_mode": "shortest"} | preprocess
    temporary = folder / "open_clip_model.safetensors.tmp"
    save_file({name: value.detach().cpu().clone().contiguous() for name, value in weights.items()}, temporary)
    os.replace(temporary, folder / "open_clip_model.safetensors")
    checkpoints.write_json(folder / "open_clip_config.json", {"model_cfg": dict(config), "preprocess_cfg": settings})

    differences = compare(folder, model, transform)
    if max(differences["image features"], differences["text features"]) > TOLERANCE:
        raise RuntimeError(f"features of {folder} differ from those of the exported model: {differences}")
    shown = ", ".join(f"{name} {value:.1e}" if value else f"{name} 0" for name, value in differences.items())
    print(f"{folder}: open_clip loads it as 'local-dir:{folder}', then call its eval(); largest differences: {shown}")
    if config["vision_cfg"].get("timm_model_name", "").startswith("convnet_small"):
        print(f"{folder}: clip_benchmark alone cannot load this image tower: timm needs `import shared.convnet`")
    return differences


@torch.no_grad()
def compare(folder: Path, model: Any, transform: Callable[[Image.Image], Tensor]) -> dict[str, float]:
    """Largest differences between `model` and open_clip's model of the folder, on seeded noise."""
    loaded, _, loaded_transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    loaded.eval()
    generator = torch.Generator().manual_seed(0)
    pixels = np.random.default_rng(0).integers(0, 256, (96, 64, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    length, vocabulary = loaded.context_length, loaded.vocab_size
    tokens = torch.randint(1, vocabulary - 2, (8, length), generator=generator)
    tokens[:, 0] = vocabulary - 2
    for row, end in zip(tokens, torch.linspace(1, length - 1, len(tokens)).long(), strict=True):
        row[end], row[end + 1 :] = vocabulary - 1, 0
    images = torch.randn(8, *loaded_transform(image).shape, generator=generator)

    def difference(method: str, inputs: Tensor) -> float:
        ours, theirs = (F.normalize(getattr(each, method)(inputs).float(), dim=-1) for each in (model, loaded))
        return (ours - theirs).abs().max().item()

    return {
        "image features": difference("encode_image", images),
        "text features": difference("encode_text", tokens),
        "preprocessing": (transform(image) - loaded_transform(image)).abs().max().item(),
    }
