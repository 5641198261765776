"""Write a CLIP for other programs: `python -m tinyclip.eval RUN --export DIR`, for open_clip or for transformers.

For transformers, DIR has config.json and model.safetensors, which CLIPModel.from_pretrained(DIR) loads, and
preprocessor_config.json and a tokenizer, which CLIPProcessor.from_pretrained(DIR) loads. `load_clip` reads both kinds
of folders again.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
from safetensors.torch import save
from torch import Tensor

from shared import export
from shared.checkpoints import replaced, write_json, write_text
from shared.errors import UserError
from tinyclip.geometry import TRANSFORMERS, open_clip_config
from tinyclip.model import CLIP
from tinyclip.train import image_transform

START, END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of open_clip's last two tokens


def write_open_clip(folder: str | Path, model: CLIP, statistics: Sequence[Sequence[float]], source: str) -> None:
    """Write a model for open_clip. statistics: mean and standard deviation of its images. UserError, which names
    `source`, if open_clip has no such towers."""
    mean, std = statistics
    transform = image_transform(model.geometry["vision"]["image_size"], statistics=(mean, std))
    export.write(folder, model, regular(model, source), model.state_dict(), transform, mean=mean, std=std)


def regular(model: CLIP, source: str) -> dict[str, Any]:
    """The model as an open_clip config. UserError if open_clip has no such towers."""
    config = open_clip_config(model.geometry)
    if config is None:
        plain = "block" in model.geometry["vision"]
        why = "its image tower is a plain ResNet" if plain else "its masks left layers of different widths"
        raise UserError(f"{source} cannot be exported: {why}, which other programs do not support")
    return config


# -------------------------------------------------------------------------------------------------------- transformers


def to_transformers(sd: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a CLIP of transformers, in OpenAI's layout -> those of a `CLIPModel`; the inverse of
    `geometry.from_transformers`."""
    found = {}
    for key, value in sd.items():
        name = key
        for theirs, ours in TRANSFORMERS.items():
            name = name.replace(ours, theirs)
        if key in ("visual.proj", "text_projection"):
            value = value.T
        elif key != "logit_scale":
            tower = "vision_model." if name.startswith("visual.") else "text_model."
            name = tower + name.removeprefix("visual.")
        if "in_proj_" in name:
            parts = zip("qkv", value.chunk(3), strict=True)
            found |= {name.replace("in_proj_", f"{part}_proj."): each for part, each in parts}
        else:
            found[name] = value
    return {name: value.detach().cpu().clone().contiguous() for name, value in found.items()}


def transformers_config(model: CLIP, source: str) -> dict[str, Any]:
    """config.json of a `CLIPModel`. UserError for a ResNet, or a model whose layers differ."""
    config, shape = regular(model, source), model.geometry
    if isinstance(shape["vision"]["layers"], Sequence):
        raise UserError(f"{source} cannot be exported: transformers has no CLIP with a ResNet")
    act = "quick_gelu" if shape["quick_gelu"] else "gelu"

    def tower(name: str, heads: int, **more: Any) -> dict[str, Any]:
        cfg = config[f"{name}_cfg"]
        return {
            "hidden_size": cfg["width"],
            "intermediate_size": round(cfg["width"] * cfg["mlp_ratio"]),
            "num_hidden_layers": cfg["layers"],
            "num_attention_heads": heads,
            "hidden_act": act,
            "layer_norm_eps": 1e-5,
            "projection_dim": shape["embed_dim"],
            **more,
        }

    vision, text = config["vision_cfg"], config["text_cfg"]
    end = text["vocab_size"] - 1
    return {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "projection_dim": shape["embed_dim"],
        "logit_scale_init_value": model.logit_scale.item(),
        "vision_config": tower(
            "vision", vision["width"] // vision["head_width"], image_size=vision["image_size"],
            patch_size=vision["patch_size"], model_type="clip_vision_model",
        ),
        "text_config": tower(
            "text", text["heads"], vocab_size=text["vocab_size"], max_position_embeddings=text["context_length"],
            bos_token_id=end - 1, eos_token_id=end, pad_token_id=end, model_type="clip_text_model",
        ),
    }  # fmt: skip


def write_transformers(folder: str | Path, model: CLIP, statistics: Sequence[Sequence[float]], source: str) -> None:
    """Write a model, its image preprocessing and its tokenizer for transformers. UserError as `transformers_config`."""
    config, (mean, std) = transformers_config(model, source), statistics
    folder, side, length = export.new_folder(folder), model.geometry["vision"]["image_size"], model.context_length
    with replaced(folder / "model.safetensors") as file:
        file.write(save(to_transformers(model.state_dict()), metadata={"format": "pt"}))
    write_json(folder / "config.json", config)
    images = {"do_resize": True, "size": {"shortest_edge": side}, "resample": 3, "do_center_crop": True}
    images |= {"crop_size": {"height": side, "width": side}, "do_rescale": True, "rescale_factor": 1 / 255}
    images |= {"do_normalize": True, "image_mean": list(mean), "image_std": list(std), "do_convert_rgb": True}
    write_json(folder / "preprocessor_config.json", images | {"image_processor_type": "CLIPImageProcessor"})
    simple = open_clip.SimpleTokenizer()
    words = {"<start_of_text>": START, "<end_of_text>": END}
    write_json(folder / "vocab.json", {words.get(token, token): number for token, number in simple.encoder.items()})
    write_text(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in simple.bpe_ranks))
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special},
    )
    print(f"{folder}: transformers loads it with CLIPModel.from_pretrained('{folder}')")
