"""Load weights of our runs, BLIP's and the authors' files, Hugging Face's BLIP, DeiT and BERT; export BLIP.

`python -m tldr_reduction.checkpoints FILE --stage blip --out RUN` converts a file to a run folder. reduce.py takes it
as --scorer, --caption-model or --captioner, train.py as --init. `export_blip` goes the other way (`python -m
tldr_reduction.eval RUN --export DIR`).

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

from shared import checkpoints, cli, export
from shared.errors import UserError
from tldr_reduction import config
from tldr_reduction.blip import VisionTransformer, resize_pos_embed
from tldr_reduction.model import build, build_for
from tldr_reduction.tokenizer import WordPiece, not_on_hub, tokenizer_of

HUGGING_FACE = (  # parts of names of parameters: BLIP's, and transformers' in its place
    ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
    ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
    ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
    ("visual_encoder.norm.", "vision_model.post_layernorm."),
    ("visual_encoder.blocks.", "vision_model.encoder.layers."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".attn.proj.", ".self_attn.projection."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)
NEEDED = {  # stage: prefixes of the weights that it needs
    "blip": ("visual_encoder", "text_encoder", "vision_proj", "text_proj", "itm_head"),
    "finetune": ("visual_encoder", "text_decoder"),
    "captioner": ("visual_encoder", "quantize"),
}


def load_run(path: str | Path) -> tuple[nn.Module, config.Common, WordPiece | open_clip.SimpleTokenizer]:
    """Model in eval mode, settings and tokenizer of a run folder."""
    if not (Path(path) / "checkpoint.pt").is_file():
        raise UserError(f"{path} is no run folder: it has no checkpoint.pt")
    state = checkpoints.load_checkpoint(Path(path) / "checkpoint.pt")
    kept = state.get("config") if isinstance(state, dict) else None
    stage = kept.get("stage") if isinstance(kept, dict) else None
    cfg = checkpoints.config_in(state, config.STAGES.get(stage, config.Config), path)
    tokenizer = tokenizer_of(cfg)
    if state.get("vocabulary") not in (None, getattr(tokenizer, "fingerprint", None)):
        raise UserError(f"{path} was trained with another vocabulary than {cfg.vocab} holds now: restore that file")
    model = build_for(cfg, tokenizer)
    model.load_state_dict(state["state_dict"])
    return model.eval(), cfg, tokenizer


def load_model(path: str, stage: str) -> tuple[nn.Module, config.Common, WordPiece]:
    """Load the model, settings and tokenizer of a run folder, or of transformers' BLIP (a folder, or a name on the
    Hugging Face hub), as captioner, finetune (writes captions) or blip (scores matching).

    Raise ValueError or UserError if the model is missing or cannot serve as that stage.
    """
    folder = Path(path)
    if stage != "captioner" and not (folder / "checkpoint.pt").is_file():
        if is_hugging_face(folder) or (not folder.exists() and re.fullmatch(r"\w[\w.-]*/[\w.-]+", path)):
            return load_hugging_face(path, stage)
        raise UserError(
            f"{path} is no run folder (it has no checkpoint.pt), and no transformers' BLIP: a folder with its "
            "config.json, or a name on the Hugging Face hub"
        )
    model, settings, tokenizer = load_run(path)
    if settings.stage != stage and (settings.stage, stage) != ("retrieval", "blip"):  # retrieval also scores
        raise UserError(f"{path} is a run of stage {settings.stage}, where one of stage {stage} is needed")
    return model, settings, tokenizer


def weights_of(path: str) -> Path | None:
    """The file of weights of a run folder, an export or a folder of transformers; None if the weights come from a
    package or a hub."""
    names = ("open_clip_model.safetensors", "checkpoint.pt", "model.safetensors", "pytorch_model.bin")
    folder = Path(path.removeprefix("local-dir:"))
    return next((folder / name for name in names if (folder / name).is_file()), None)


# -------------------------------------------------------------------------------------------------- transformers' BLIP


def is_hugging_face(folder: Path) -> bool:
    """Whether a folder holds transformers' BLIP."""
    file = folder / "config.json"
    return file.is_file() and checkpoints.read_json(file).get("model_type") == "blip"


def hub_folder(name: str) -> Path:
    """Folder of a model's files from the Hugging Face hub, downloaded if they are not on this machine; code is never
    downloaded."""
    from huggingface_hub import snapshot_download

    try:
        for weights in ("model.safetensors", "pytorch_model.bin"):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "vocab.txt", weights]))
            if weights_of(str(folder)) is not None:
                return folder
    except Exception as error:  # the hub and the network raise all kinds
        instead = "a folder with its config.json, tokenizer.json and model.safetensors"
        raise not_on_hub(f"{name} is no run folder", error, instead) from error
    raise UserError(f"{name} on the Hugging Face hub has no model.safetensors")


def load_hugging_face(path: str, stage: str) -> tuple[nn.Module, config.Common, WordPiece]:
    """`load_model` for transformers' BLIP: BlipForConditionalGeneration writes captions, BlipForImageTextRetrieval
    scores matching."""
    from transformers import BlipConfig

    folder = Path(path) if Path(path).exists() else hub_folder(path)
    file, theirs = weights_of(str(folder)), BlipConfig.from_pretrained(folder)
    if file is None:
        raise UserError(f"{folder} has no model.safetensors")
    vision, text = theirs.vision_config, theirs.text_config
    sizes = dict(image_size=vision.image_size, patch_size=vision.patch_size, width=vision.hidden_size)
    sizes |= dict(layers=vision.num_hidden_layers, heads=vision.num_attention_heads, text_width=text.hidden_size)
    sizes |= dict(text_layers=text.num_hidden_layers, text_heads=text.num_attention_heads)
    sizes |= dict(max_positions=text.max_position_embeddings, vocab=str(folder))
    if stage == "finetune":
        settings: config.Common = config.FinetuneConfig(**sizes)
    else:
        settings = config.RetrievalConfig(embed_dim=theirs.image_text_hidden_size, queue_size=1, batch_size=1, **sizes)
    tokenizer = WordPiece(folder)
    model = build(settings, text.vocab_size, tokenizer.sep)
    missing = load_blip(model, checkpoints.load_checkpoint(file))
    if lost := [name for name in missing if name.startswith(NEEDED[stage]) and "_m." not in name]:
        what = "write captions" if stage == "finetune" else "score matching"
        raise UserError(f"{path} cannot {what}: it lacks {lost[0]}")
    return model.eval(), settings, tokenizer


# ------------------------------------------------------------------------------------------- BLIP's and the authors'


def from_hugging_face(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """State dict of transformers' BLIP (Salesforce/blip-itm-base-coco, -image-captioning-base) under BLIP's names."""
    found = {}
    for key, value in state.items():
        for ours, theirs in HUGGING_FACE:
            key = key.replace(theirs, ours)
        found[key] = value.view(1, 1, -1) if key == "visual_encoder.cls_token" else value
    return found


def blip_state(source: str | Path | dict) -> dict[str, Tensor]:
    """State dict under BLIP's names, from {"model": ...} (BLIP's and the authors' layout), {"state_dict": ...} (ours),
    transformers' BLIP, or a bare state dict."""
    state = checkpoints.load_checkpoint(source) if not isinstance(source, dict) else source
    state = state.get("model", state.get("state_dict", state))
    return from_hugging_face(state) if any(key.startswith("vision_model.") for key in state) else state


def load_blip(model: nn.Module, source: str | Path | dict) -> list[str]:
    """Load a BLIP or TL;DR checkpoint into a captioner or BLIP; return the parameters that the checkpoint lacks.

    Position embeddings are resized to the model's grid. Skipped are tensors of another shape, as upstream
    (V:models/blip.py:224-236), and tensors that the model does not have (the codebook for a captioner without one,
    momentum copies, queues). Of tied parameters the checkpoint needs one.
    """
    state, own = blip_state(source), model.state_dict()
    if not set(own) & set(state):
        raise UserError(f"{source} holds none of the model's parameters: it is no BLIP or TL;DR checkpoint")
    state = {key: value for key, value in state.items() if key in own}
    for key in [key for key in state if key.endswith("pos_embed")]:
        state[key] = resize_pos_embed(state[key], math.isqrt(own[key].shape[1] - 1))
    state = {key: value for key, value in state.items() if value.shape == own[key].shape}
    model.load_state_dict(state, strict=False)
    shared = {own[key].data_ptr() for key in state}  # a file may hold only one of several tied tensors
    return sorted(key for key in set(own) - set(state) if own[key].data_ptr() not in shared)


# -------------------------------------------------------------------------------------- to stock BLIP and transformers

EXPORTS = {  # folder of an export: transformers' class, and its modules besides the image tower
    "retrieval": ("BlipForImageTextRetrieval", ("text_encoder.", "vision_proj.", "text_proj.", "itm_head.")),
    "captioning": ("BlipForConditionalGeneration", ("text_decoder.",)),
}


def to_hugging_face(state: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """Convert a state dict under BLIP's names to the names of transformers' BLIP of that kind (EXPORTS)."""
    found = {}
    for key, value in state.items():
        if key.startswith(("visual_encoder.", *EXPORTS[kind][1])):
            for ours, theirs in HUGGING_FACE:
                key = key.replace(ours, theirs)
            found[key] = value
    return found


def hugging_face_config(cfg: config.Common, tokenizer: WordPiece):
    """transformers' BlipConfig of a run."""
    from transformers import BlipConfig

    vision = dict(hidden_size=cfg.width, intermediate_size=4 * cfg.width, num_hidden_layers=cfg.layers)
    vision |= dict(num_attention_heads=cfg.heads, image_size=cfg.image_size, patch_size=cfg.patch_size)
    text = dict(hidden_size=cfg.text_width, intermediate_size=4 * cfg.text_width, num_hidden_layers=cfg.text_layers)
    text |= dict(num_attention_heads=cfg.text_heads, max_position_embeddings=cfg.max_positions)
    text |= dict(vocab_size=len(tokenizer), bos_token_id=tokenizer.dec, sep_token_id=tokenizer.sep)
    text |= dict(eos_token_id=tokenizer.sep, pad_token_id=tokenizer.pad, encoder_hidden_size=cfg.width)
    return BlipConfig(
        vision_config=vision | {"layer_norm_eps": 1e-6},
        text_config=text,
        image_text_hidden_size=getattr(cfg, "embed_dim", 256),
    )


@torch.no_grad()
def export_blip(model: nn.Module, cfg: config.Common, tokenizer: WordPiece, folder: str | Path) -> None:
    """Write the weights of a captioner, a blip or a retrieval run for other code, and check that they load there.

    folder/blip.pth       {"model": ...}: what stock BLIP's and the authors' scripts take as `pretrained`
    folder/retrieval/     transformers' BlipForImageTextRetrieval, if the run has a text encoder
    folder/captioning/    transformers' BlipForConditionalGeneration, if the run has a decoder and no codebook

    transformers' BlipModel has a pooler that BLIP lacks, so there is no export to it. RuntimeError if transformers'
    model computes other numbers than the run.
    """
    import transformers

    folder = export.new_folder(folder)
    state, shown = model.state_dict(), []
    checkpoints.save_checkpoint(folder / "blip.pth", {"model": state, "epoch": cfg.epochs - 1})
    kinds = ["retrieval"] * hasattr(model, "itm_head")
    kinds += ["captioning"] * (hasattr(model, "text_decoder") and getattr(model, "quantize", None) is None)
    view = {"height": cfg.image_size, "width": cfg.image_size}
    processor = transformers.BlipImageProcessor(
        size=view, image_mean=open_clip.OPENAI_DATASET_MEAN, image_std=open_clip.OPENAI_DATASET_STD
    )
    for kind in kinds:
        theirs = getattr(transformers, EXPORTS[kind][0])(hugging_face_config(cfg, tokenizer)).eval()
        missing, unexpected = theirs.load_state_dict(to_hugging_face(state, kind), strict=False)
        if lost := [name for name in (*missing, *unexpected) if "position_ids" not in name]:
            raise RuntimeError(f"transformers' {EXPORTS[kind][0]} has other parameters: {', '.join(lost[:3])}")
        theirs.save_pretrained(folder / kind)
        processor.save_pretrained(folder / kind)
        tokenizer.save(folder / kind)
        loaded = type(theirs).from_pretrained(folder / kind).eval()
        shown.append(f"{kind} {largest_difference(model, loaded, cfg, tokenizer):.1e}")
    for_transformers = f"for transformers, with largest differences: {', '.join(shown)}"
    none = "nothing for transformers, whose BLIP has no codebook"
    print(f"{folder}: blip.pth for BLIP's scripts; {for_transformers if shown else none}")


def largest_difference(model: nn.Module, theirs: nn.Module, cfg: config.Common, tokenizer: WordPiece) -> float:
    """Run the model and transformers' one on noise; return the largest absolute difference of their outputs.

    Outputs are matching logits and cosines if transformers' model has a matching head, else logits of the next words.
    RuntimeError if the difference is above 1e-3.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, cfg.image_size, cfg.image_size, generator=generator)
    ids = torch.randint(5, tokenizer.dec, (2, min(6, cfg.max_positions)), generator=generator)
    ids[:, 0], mask = tokenizer.enc, torch.ones_like(ids)
    if hasattr(theirs, "itm_head"):
        inputs = dict(input_ids=ids, pixel_values=images, attention_mask=mask)
        ours = model.itm(images, ids, mask), model.itc(images, ids, mask)
        found = [theirs(**inputs, use_itm_head=matching).itm_score for matching in (True, False)]
    else:
        ours = (model.text_decoder(ids, mask, model.visual_encoder(images)),)
        found = [theirs(pixel_values=images, input_ids=ids, attention_mask=mask).logits]
    difference = max((a - b).abs().max().item() for a, b in zip(ours, found, strict=True))
    if difference > 1e-3:
        raise RuntimeError(f"transformers' BLIP gives other numbers than the run, by {difference}")
    return difference


# --------------------------------------------------------------------------------------------------- DeiT and BERT


def unavailable(flag: str, name: str, error: Exception) -> str:
    """Error message for initial weights that cannot be loaded."""
    why = checkpoints.one_line(error, 120)
    return f"the weights of {flag} {name} cannot be loaded ({why}); {flag} None starts at random"


def init_vision(tower: VisionTransformer, name: str) -> None:
    """Load supervised ImageNet weights of a timm model (deit_base_patch16_224) without its head.

    V:models/blip_pretrain_vq_compress.py:38.
    """
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    except Exception as error:  # the hub and the network raise all kinds
        raise UserError(unavailable("--vision-init", name, error)) from error
    state["pos_embed"] = resize_pos_embed(state["pos_embed"], math.isqrt(tower.pos_embed.shape[1] - 1))
    tower.load_state_dict({key: state[key] for key in tower.state_dict()})


@torch.no_grad()
def init_text(model: nn.Module, name: str) -> None:
    """Load BERT's weights (bert-base-uncased), including the LM head, into the text towers of a captioner or BLIP.

    Cross-attention, [DEC] and [ENC], which BERT lacks, stay random. V:models/blip_pretrain_vq_compress.py:52, 90.
    """
    import transformers

    try:
        state = transformers.AutoModelForMaskedLM.from_pretrained(name).state_dict()
    except Exception as error:  # the hub and the network raise all kinds
        raise UserError(unavailable("--text-init", name, error)) from error
    for key, value in model.state_dict().items():
        tower, _, rest = key.partition(".")
        source = state.get({"text_encoder": "bert.", "text_decoder": ""}.get(tower, "?") + rest)
        if source is not None:
            if source.shape[1:] != value.shape[1:] or len(source) > len(value):
                raise UserError(
                    f"--text-init {name} does not fit: its {rest} is {tuple(source.shape)}, here {tuple(value.shape)}"
                )
            value[: len(source)].copy_(source)


def start_weights(model: nn.Module, cfg: config.Common) -> None:
    """Load the initial weights that the settings name; print the parameters that start at random because the
    checkpoint of --init lacks them."""
    if isinstance(cfg, config.Warm) and cfg.vision_init:
        init_vision(model.visual_encoder, cfg.vision_init)
    if isinstance(cfg, config.Warm) and cfg.text_init:
        init_text(model, cfg.text_init)
    if cfg.init:
        path = Path(cfg.init)
        missing = load_blip(model, path / "checkpoint.pt" if path.is_dir() else path)
        lost = [name for name in missing if "_m." not in name and "queue" not in name]
        if lost:
            print(
                f"--init {cfg.init} lacks {len(lost)} of the parameters, which start at random: {', '.join(lost[:3])}"
            )
    if cfg.stage in ("blip", "retrieval"):  # momentum encoders start as copies
        model.momentum, kept = 0.0, model.momentum
        model.update_momentum()
        model.momentum = kept


# ------------------------------------------------------------------------------------------- a run folder of a file


def sizes_of(state: dict[str, Tensor]) -> dict[str, int]:
    """Fields of config.Config, inferred from a state dict; heads are taken to be 64 wide, as in ViT-B, ViT-L, BERT."""
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
        raise UserError("the file is no BLIP or TL;DR checkpoint") from error
    if "vision_proj.weight" in state:
        sizes["embed_dim"] = len(state["vision_proj.weight"])
    if "quantize.embedding.weight" in state:
        sizes["num_codes"], sizes["code_dim"] = state["quantize.embedding.weight"].shape
    return sizes


@dataclasses.dataclass
class Config:
    """Convert a file of weights to a run folder."""

    source: Annotated[str, tyro.conf.Positional]
    """BLIP's, the authors' or transformers' file (.pth, .pt, .bin)."""
    out: str
    """Run folder to write."""
    stage: Literal["blip", "finetune", "captioner"] = "blip"
    """blip: scores matching (model_base_retrieval_coco.pth). finetune: writes captions
    (model_base_caption_capfilt_large.pth). captioner: has a codebook."""
    image_size: int | None = None
    """Image side to use the model at; its position embeddings are resized. None: its own side."""
    vocab: str = "bert-base-uncased"
    """WordPiece vocabulary: a vocab.txt, or the name of a tokenizer on the Hugging Face hub."""


def main(cfg: Config) -> None:
    """Write the run folder."""
    if not Path(cfg.source).is_file():
        raise UserError(f"{cfg.source} does not exist")
    folder = Path(cfg.out)
    if (folder / "checkpoint.pt").exists():
        raise UserError(f"{folder} holds a run already: choose another --out")
    state = checkpoints.load_checkpoint(cfg.source)
    if "seconds" in state:
        raise UserError(f"{cfg.source} belongs to a run folder already: it needs no conversion")
    state = blip_state(state)
    sizes = sizes_of(state) | ({"image_size": cfg.image_size} if cfg.image_size else {})
    known = config.STAGES[cfg.stage]
    fields = {field.name for field in dataclasses.fields(known)}
    sizes = {name: size for name, size in sizes.items() if name in fields}
    queue = {"queue_size": 1} if cfg.stage == "blip" else {}
    settings = known(
        out=cfg.out, init=cfg.source, vocab=cfg.vocab, epochs=1, batch_size=1, stage=cfg.stage, **queue, **sizes
    )
    if settings.image_size % settings.patch_size:
        raise UserError(f"--image-size {cfg.image_size} is no multiple of the patches' {settings.patch_size} pixels")
    model = build_for(settings, tokenizer_of(settings))
    missing = [name for name in load_blip(model, state) if "_m." not in name and "queue" not in name]
    if lost := [name for name in missing if name.startswith(NEEDED[cfg.stage])]:
        raise UserError(f"{cfg.source} lacks {', '.join(lost[:3])}: it cannot serve as --stage {cfg.stage}")
    folder.mkdir(parents=True, exist_ok=True)
    checkpoints.write_json(folder / "config.json", dataclasses.asdict(settings))
    (folder / "metrics.jsonl").write_text('{"step": 0, "seconds": 0.0}\n')  # read as a run of 0 seconds
    position = {"epoch": 1, "batch": 0, "seconds": 0.0, "config": dataclasses.asdict(settings)}
    checkpoints.save_checkpoint(folder / "checkpoint.pt", {**position, "state_dict": model.state_dict()})
    print(f"{folder}: stage {cfg.stage}, {sum(p.numel() for p in model.parameters()):,} parameters, {sizes}")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
