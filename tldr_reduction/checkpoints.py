"""Weights of our runs, and from elsewhere: BLIP's and the authors' files, Hugging Face's BLIP, DeiT, BERT.

`python -m tldr_reduction.checkpoints FILE --stage blip --out RUN` makes a run folder of a file, which reduce.py takes
as --scorer, --caption-model or --captioner, and train.py as --init.

`V:` is showlab/datacentric.vlp@a488102:vq_compress_model/, `B:` salesforce/BLIP@056a169.
"""

import dataclasses
import math
import re
from pathlib import Path
from typing import Annotated, Literal

import open_clip
import timm
import torch
import tyro
from torch import Tensor, nn

from shared import checkpoints, cli
from tldr_reduction import config
from tldr_reduction.blip import VisionTransformer, resize_pos_embed
from tldr_reduction.model import build_for
from tldr_reduction.tokenizer import WordPiece, tokenizer_of

HUGGING_FACE = (  # key patterns of transformers' BLIP -> BLIP's own, in this order
    (r"^vision_model\.embeddings\.class_embedding$", "visual_encoder.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding$", "visual_encoder.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (r"^vision_model\.post_layernorm\.", "visual_encoder.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.qkv\.", r"visual_encoder.blocks.\1.attn.qkv."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.projection\.", r"visual_encoder.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"visual_encoder.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.", r"visual_encoder.blocks.\1."),
    (r"^text_decoder\.cls\.", "text_decoder.cls."),
)
NEEDED = {  # what a stage does not work without
    "blip": ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"),
    "finetune": ("visual_encoder", "text_decoder"),
    "captioner": ("visual_encoder", "quantize"),
}


def load_run(path: str | Path) -> tuple[nn.Module, config.Config, WordPiece | open_clip.SimpleTokenizer]:
    """Model in eval mode, settings and tokenizer of a run folder."""
    if not (Path(path) / "checkpoint.pt").is_file():
        raise FileNotFoundError(f"{path} is no run folder: it has no checkpoint.pt")
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    cfg = checkpoints.config_in(state, config.Config, path)
    tokenizer = tokenizer_of(cfg)
    model = build_for(cfg, tokenizer)
    model.load_state_dict(state["state_dict"])
    return model.eval(), cfg, tokenizer


# ------------------------------------------------------------------------------------------- BLIP's and the authors'


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of transformers' BLIP (Salesforce/blip-itm-base-coco, -image-captioning-base) under BLIP's names."""
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in HUGGING_FACE:
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        renamed[key] = value
    if "visual_encoder.cls_token" in renamed:
        renamed["visual_encoder.cls_token"] = renamed["visual_encoder.cls_token"].view(1, 1, -1)
    return renamed


def blip_state(source: str | Path | dict) -> dict[str, Tensor]:
    """State dict under BLIP's names of any of the layouts: {"model": ...} (theirs), {"state_dict": ...} (ours),
    transformers' BLIP, or a bare state dict."""
    state = checkpoints.load_checkpoint(source) if not isinstance(source, dict) else source
    state = state.get("model", state.get("state_dict", state))
    return from_hugging_face(state) if any(key.startswith("vision_model.") for key in state) else state


def load_blip(model: nn.Module, source: str | Path | dict) -> list[str]:
    """Load a BLIP or TL;DR checkpoint into a captioner or BLIP; returns the parameters that it lacked.

    Positions are resized to the model's grid; keys of other shapes are left out, as upstream does
    (V:models/blip.py:224-236), and so are keys that the model has no place for (the codebook in a captioner without
    one, momentum copies, queues).
    """
    state, own = blip_state(source), model.state_dict()
    if not set(own) & set(state):
        raise ValueError(f"{source} holds none of the model's parameters: it is no BLIP or TL;DR checkpoint")
    state = {key: value for key, value in state.items() if key in own}
    for key in [key for key in state if key.endswith("pos_embed")]:
        state[key] = resize_pos_embed(state[key], math.isqrt(own[key].shape[1] - 1))
    state = {key: value for key, value in state.items() if value.shape == own[key].shape}
    model.load_state_dict(state, strict=False)
    return sorted(set(own) - set(state))


# --------------------------------------------------------------------------------------------------- DeiT and BERT


def init_vision(tower: VisionTransformer, name: str) -> None:
    """Supervised ImageNet weights of a timm model (deit_base_patch16_224); the head is dropped.

    V:models/blip_pretrain_vq_compress.py:38.
    """
    state = timm.create_model(name, pretrained=True).state_dict()
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], math.isqrt(tower.pos_embed.shape[1] - 1))
    tower.load_state_dict({key: state[key] for key in tower.state_dict()})


@torch.no_grad()
def init_text(model: nn.Module, name: str) -> None:
    """BERT's weights (bert-base-uncased), LM head included, in the text towers of a captioner or BLIP.

    Cross-attention, [DEC] and [ENC], which BERT lacks, stay random. V:models/blip_pretrain_vq_compress.py:52, 90.
    """
    import transformers

    state = transformers.AutoModelForMaskedLM.from_pretrained(name).state_dict()
    for key, value in model.state_dict().items():
        tower, _, rest = key.partition(".")
        source = state.get({"text_encoder": "bert.", "text_decoder": ""}.get(tower, "?") + rest)
        if source is not None:
            if source.shape[1:] != value.shape[1:] or len(source) > len(value):
                raise ValueError(
                    f"--text-init {name} does not fit: its {rest} is {tuple(source.shape)}, here {tuple(value.shape)}"
                )
            value[: len(source)].copy_(source)


# ------------------------------------------------------------------------------------------- a run folder of a file


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """Fields of config.Config that a state dict shows; heads are 64 wide, as in ViT-B, ViT-L and BERT."""
    text = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in state else "text_decoder.bert."

    def layers(prefix: str) -> int:
        return 1 + max(int(key.removeprefix(prefix).split(".")[0]) for key in state if key.startswith(prefix))

    try:
        width, _, patch, _ = state["visual_encoder.patch_embed.proj.weight"].shape
        positions, text_width = state[f"{text}embeddings.position_embeddings.weight"].shape
        sizes = dict(width=width, layers=layers("visual_encoder.blocks."), heads=max(width // 64, 1), patch_size=patch)
        sizes |= dict(text_width=text_width, text_layers=layers(f"{text}encoder.layer."), max_positions=positions)
        sizes |= dict(text_heads=max(text_width // 64, 1), image_size=0)
        sizes["image_size"] = patch * math.isqrt(state["visual_encoder.pos_embed"].shape[1] - 1)
    except (KeyError, ValueError) as error:
        raise ValueError("the file is no BLIP or TL;DR checkpoint") from error
    if "vision_proj.weight" in state:
        sizes["embed_dim"] = len(state["vision_proj.weight"])
    if "quantize.embedding.weight" in state:
        sizes["num_codes"], sizes["code_dim"] = state["quantize.embedding.weight"].shape
    return sizes


@dataclasses.dataclass
class Config:
    source: Annotated[str, tyro.conf.Positional]
    """BLIP's, the authors' or transformers' file (.pth, .pt, .bin)."""
    out: str
    """Run folder to write."""
    stage: Literal["blip", "finetune", "captioner"] = "blip"
    """blip: scores matching (model_base_retrieval_coco.pth). finetune: writes captions
    (model_base_caption_capfilt_large.pth). captioner: has a codebook."""
    image_size: int | None = None
    """Image side that the model is to be used at, for which its positions are resized; None: its own."""
    vocab: str = "bert-base-uncased"
    """WordPiece vocabulary: a vocab.txt, or the name of a tokenizer on the Hugging Face hub."""


def main(cfg: Config) -> None:
    """Write the run folder."""
    if not Path(cfg.source).is_file():
        raise FileNotFoundError(f"{cfg.source} does not exist")
    folder = Path(cfg.out)
    if (folder / "checkpoint.pt").exists():
        raise ValueError(f"{folder} holds a run already: choose another --out")
    state = checkpoints.load_checkpoint(cfg.source)
    if "stage" in state.get("config", {}):
        raise ValueError(f"{cfg.source} is of a run folder already")
    state = blip_state(state)
    sizes = sizes_of(state) | ({"image_size": cfg.image_size} if cfg.image_size else {})
    settings = config.Config(
        stage=cfg.stage, out=cfg.out, init=cfg.source, vocab=cfg.vocab, queue_size=1, epochs=1, batch_size=1, **sizes
    )
    if settings.image_size % settings.patch_size:
        raise ValueError(f"--image-size {cfg.image_size} is no multiple of the patches' {settings.patch_size} pixels")
    model = build_for(settings, tokenizer_of(settings))
    missing = [name for name in load_blip(model, state) if "_m." not in name and "queue" not in name]
    if lost := [name for name in missing if name.startswith(NEEDED[cfg.stage])]:
        raise ValueError(f"{cfg.source} lacks {', '.join(lost[:3])}: it cannot serve as --stage {cfg.stage}")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(folder / "config.json", dataclasses.asdict(settings))
    (folder / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.0}\n')  # as of a run that took no time
    position = {"epoch": 1, "batch": 0, "seconds": 0.0, "config": dataclasses.asdict(settings)}
    checkpoints.save_checkpoint(folder / "checkpoint.pt", {**position, "state_dict": model.state_dict()})
    print(f"{folder}: stage {cfg.stage}, {sum(p.numel() for p in model.parameters()):,} parameters, {sizes}")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
