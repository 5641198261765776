"""PatchDis (section 3.4, Table 2): classify each patch of an image by the most similar class text.

    python -m lexvla.patchdis ViT-B-16-quickgelu@openai --folder data/coco/eval/patchdis_val
    python -m lexvla.patchdis vdr:vsearch/vdr-cross-modal local-dir:my-export --folder data/coco/eval/patchdis_val

Measures dual encoders whose patches and class texts lie in one space: open_clip's ViTs, folders written by `--export`
of the other papers, and VDR's published weights. eval.py measures runs of LexVLA. A PatchDis folder has

    classnames.txt     one class per line
    images/KEY.png     or .jpg
    masks/KEY.png      class of each pixel; the largest value of the mask's type, 255 or 65535, means no class

`make photos-coco` and `python -m studies.lexvla_scenes` write such folders.
"""

import dataclasses
import io
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
import tyro
from open_clip.transformer import QuickGELU, Transformer
from PIL import Image
from torch import Tensor, nn
from torchvision import transforms

from lexvla.model import lexical_map
from lexvla.plots import ClassMap, plot_class_maps
from shared import checkpoints, cli, data, evaluation, export, run
from shared.clip import quiet_open_clip
from shared.errors import UserError
from shared.settings import Count, check_limits

IGNORE = 65535  # value of unlabelled pixels in 16-bit masks; in 8-bit masks 255
DRAWN = 6  # number of images with drawn predictions


@dataclasses.dataclass
class Config:
    """Measure PatchDis of dual encoders, print a table, and draw maps of predicted classes."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Dual encoders: MODEL@TAG of open_clip, local-dir:FOLDER, or vdr:FOLDER (or name on the hub) for VDR's weights."""
    folder: str
    """Folder of images, masks and classnames.txt."""
    out: str = "runs/lexvla/patchdis"
    """Folder for patchdis.json and a picture for each model."""
    template: str = "{}"
    """Prompt for a class, with {} for its name. Not stated in the paper."""
    background: bool = False
    """Count unlabelled pixels as false positives instead of ignoring them. Not stated in the paper."""
    batch_size: Count = 16
    """Images per forward pass."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""


# --------------------------------------------------------------------------------------------------------- the measure


def present_classes(masks: Tensor, classes: int, ignore: int) -> Tensor:
    """(N, C) bool: the classes that occur in masks (N, H, W)."""
    present = torch.zeros(len(masks), classes + 1, dtype=torch.bool, device=masks.device)
    present.scatter_(1, torch.where(masks != ignore, masks, classes).flatten(1), True)
    return present[:, :classes]


def patch_of_pixels(grid: tuple[int, int], height: int, width: int) -> Tensor:
    """(H, W) int64: number of the patch that is nearest to each pixel, with patches numbered row by row."""
    y, x = (torch.arange(size) * g // size for size, g in zip((height, width), grid, strict=True))
    return y[:, None] * grid[1] + x


def patchdis(
    s_patch: Tensor,
    s_class: Tensor,
    grid: tuple[int, int],
    masks: Tensor,
    ignore: int = 255,
    present_only: bool = False,
    background: bool = False,
) -> tuple[Tensor, Tensor, float]:
    """Assign each patch its most similar class, section 3.4: (intersection (C,), union (C,), mIoU in 0..1).

    s_patch (N, P, V), s_class (C, V), masks (N, H, W) of class ids. A pixel has the class of its patch, by
    `patch_of_pixels`. Intersection and union are pixel counts over the N images: add them over batches before
    `mean_iou`. Not stated in the paper: pixels labelled `ignore` are left out (with `background`, predictions there
    count as false); all classes compete (with `present_only`, only those in the image's mask, and images without any
    class are left out).
    """
    C = len(s_class)
    sim = s_patch @ s_class.T  # (N, P, C)
    if present_only:
        sim = sim.masked_fill(~present_classes(masks, C, ignore)[:, None], -math.inf)
    pred = sim.argmax(-1)[:, patch_of_pixels(grid, *masks.shape[1:]).to(masks.device)]  # (N, H, W)
    labelled = masks != ignore
    truth, seen = masks[labelled], pred[labelled]
    if background:  # with `present_only`, images without any class have no candidates
        seen = pred[labelled.flatten(1).any(1) | (not present_only)]
    intersection = torch.bincount(truth[pred[labelled] == truth], minlength=C)
    union = torch.bincount(seen.flatten(), minlength=C) + torch.bincount(truth, minlength=C) - intersection
    return intersection.float(), union.float(), mean_iou(intersection, union)


def mean_iou(intersection: Tensor, union: Tensor) -> float:
    """Mean IoU over the classes that occur in masks or predictions; NaN if there is none."""
    return (intersection / union)[union > 0].mean().item()


@torch.no_grad()
def measure(
    patches: Callable[[Tensor], Tensor],
    s_class: Tensor,
    images: Iterator[tuple[Tensor, Tensor, int]],
    background: bool = False,
    batch_size: int = 16,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, float], list[ClassMap]]:
    """PatchDis over a data set: ({"miou", "miou_present", "random_miou", "random_miou_present"} in percent, maps of the
    first images, for Fig. 3).

    patches: function of pixels (B, 3, S, S) -> (B, P, V), with square grids; s_class (C, V); images: output of
    `labelled_images`. In `miou` all classes compete, in `miou_present` only those in the image's mask. `random_`: the
    same for random similarities of patches to classes.
    """
    totals: dict[str, Tensor] = {}  # float64: there may be more pixels than float32 can count
    maps: list[ClassMap] = []
    noise, C, s_class = torch.Generator().manual_seed(0), len(s_class), s_class.to(device)
    while batch := list(itertools.islice(images, batch_size)):
        found = patches(torch.cat([pixels for pixels, _, _ in batch]).to(device)).float()
        side = math.isqrt(found.shape[1])
        for s_patch, (pixels, mask, ignore) in zip(found, batch, strict=True):
            if len(maps) < DRAWN:
                predicted = (s_patch @ s_class.T).argmax(-1).view(side, side).cpu()
                maps.append(ClassMap(pixels[0], torch.where(mask[0] == ignore, -1, mask[0]), predicted))
            mask, random = mask.to(device), torch.rand(1, side * side, C, generator=noise).to(device)
            for name, values, classes in (("", s_patch[None], s_class), ("random_", random, torch.eye(C).to(device))):
                for kind, present_only in (("miou", False), ("miou_present", True)):
                    counts = patchdis(values, classes, (side, side), mask, ignore, present_only, background)[:2]
                    totals[name + kind] = totals.get(name + kind, 0) + torch.stack(counts).double()
    return {name: 100 * mean_iou(*sums) for name, sums in totals.items()}, maps


# ---------------------------------------------------------------------------------------------------- labelled images


def classnames(folder: str | Path) -> list[str]:
    """The classes of a PatchDis folder, in the order of their ids."""
    if not (names := Path(folder) / "classnames.txt").is_file():
        raise UserError(
            f"{names} does not exist: 'python -m studies.lexvla_scenes' and 'make photos-coco' write PatchDis folders"
        )
    if not (found := names.read_text(encoding="utf-8").splitlines()):
        raise UserError(f"{names} is empty: it needs one class per line")
    return found


def labelled_files(folder: str | Path) -> Iterator[tuple[Path, np.ndarray, int]]:
    """(image file, mask (H, W), value to ignore) of each mask of a PatchDis folder.

    The image may be a smaller or larger copy of what the mask was drawn on. UserError if a mask has no image, a file
    cannot be read, a class is out of range, or the aspect ratios of image and mask differ by more than the rounding of
    a side.
    """
    classes, masks = len(classnames(folder)), sorted((Path(folder) / "masks").glob("*.png"))
    if not masks:
        raise UserError(f"{folder}/masks holds no .png")
    pictures = {image.stem: image for image in sorted((Path(folder) / "images").glob("*.*"))}
    for file in masks:
        if (image := pictures.get(file.stem)) is None:
            raise UserError(f"{folder}/images has no picture for masks/{file.name}")
        mask = read_mask(file)
        if mask.ndim != 2:
            raise UserError(f"{file} has {mask.shape[-1]} channels; a mask has one, with the class id of each pixel")
        ignore = 255 if mask.dtype == np.uint8 else IGNORE
        if (largest := mask[mask != ignore].max(initial=0)) >= classes:
            raise UserError(f"{file} has class {largest}, but classnames.txt has {classes} lines")
        (height, width), (of_image, by) = mask.shape, image_size(image)
        if abs(of_image * height - width * by) > max(width, height, of_image, by):
            raise UserError(
                f"{file} has {width}x{height} pixels, but {image} {of_image}x{by}, which is another aspect ratio: make"
                " masks of their images' size"
            )
        yield image, mask, ignore


def check_folder(folder: str | Path) -> None:
    """Read all masks of a PatchDis folder, so that the errors of `labelled_files` come before other measurements."""
    for _ in labelled_files(folder):
        pass


def labelled_images(folder: str, side: int, normalise: Callable[[Any], Tensor]) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(pixels (1, 3, side, side), mask (1, H, W) int64, value to ignore) of each image of a PatchDis folder.

    UserError as in `labelled_files`, and for an image that cannot be decoded.
    """
    resize = transforms.Resize((side, side), interpolation=transforms.InterpolationMode.BICUBIC)
    transform = transforms.Compose([resize, normalise])
    for image, mask, ignore in labelled_files(folder):
        try:
            picture = data.decode_image(data.read_file(image))
        except data.BrokenSample as error:
            raise UserError(f"{image}: {error}") from error
        yield transform(picture)[None], torch.from_numpy(mask.astype(np.int64))[None], ignore


def read_mask(file: Path) -> np.ndarray:
    """The values of a .png as they are. UserError if it cannot be read, or has more pixels than an image may have."""
    try:
        image = Image.open(io.BytesIO(data.read_file(file)), formats=("PNG",))
        if image.width * image.height > data.MAX_PIXELS:
            raise data.BrokenSample(f"more than the {data.MAX_PIXELS} pixels allowed")
        return np.asarray(image)
    except Exception as error:  # PIL raises many kinds
        raise UserError(f"{file} cannot be read as a mask: {error}") from error


def image_size(file: Path) -> tuple[int, int]:
    """(width, height) of an image that is not decoded. UserError if the file cannot be read."""
    try:
        return Image.open(io.BytesIO(data.read_file(file)), formats=data.FORMATS).size
    except Exception as error:  # PIL raises many kinds
        raise UserError(f"{file} cannot be read as an image: {error}") from error


# ------------------------------------------------------------------------------------------------------- dual encoders


class DualEncoder(NamedTuple):
    """The functions of a model that PatchDis calls: unit vectors of patches and of texts; dot product = similarity."""

    patches: Callable[[Tensor], Tensor]
    """Pixels (B, 3, S, S) -> (B, P, E)."""
    classes: Callable[[Sequence[str]], Tensor]
    """Texts -> (C, E)."""
    side: int
    """Pixels of an image's side."""
    normalise: data.ToNormalizedTensor


def open_clip_encoder(name: str, device: torch.device) -> DualEncoder:
    """Load MODEL@TAG or local-dir:FOLDER; patch tokens go through the last LayerNorm and the projection of [CLS].

    This is the usual definition of CLIP's patch features; the paper does not state its own. UserError for towers that
    are not open_clip's ViT.
    """
    model_name, _, tag = name.partition("@")
    if not tag and not name.startswith("local-dir:"):
        raise UserError(f"{name} names no weights: it takes MODEL@TAG, such as ViT-B-32@openai, or local-dir:FOLDER")
    try:
        with quiet_open_clip():
            quick = export.quick_gelu(model_name, tag)
            model = open_clip.create_model(model_name, pretrained=tag or None, force_quick_gelu=quick).to(device).eval()
            tokenizer = open_clip.get_tokenizer(model_name)
    except Exception as error:  # open_clip, safetensors and pickle raise many kinds
        raise UserError(f"{name} is no MODEL@TAG that open_clip can load: {error}") from error
    visual = model.visual
    if not isinstance(visual, open_clip.transformer.VisionTransformer) or visual.attn_pool is not None:
        raise UserError(f"{name} has a {type(visual).__name__}: PatchDis needs a ViT whose patches can be projected")
    visual.output_tokens = True
    about = open_clip.get_model_preprocess_cfg(model)

    def patches(pixels: Tensor) -> Tensor:
        tokens = visual(pixels)[1]
        tokens = visual.ln_post(tokens) if visual.final_ln_after_pool else tokens
        return F.normalize(tokens if visual.proj is None else tokens @ visual.proj, dim=-1)

    def classes(texts: Sequence[str]) -> Tensor:
        return model.encode_text(tokenizer(list(texts)).to(device), normalize=True)

    return DualEncoder(patches, classes, visual.image_size[0], data.ToNormalizedTensor(about["mean"], about["std"]))


class VDRImage(nn.Module):
    """VDR's image tower, a ViT without [CLS] and with a codebook at the end.
    V:src/ir/encoder/vdr_crossmodal_image.py:200."""

    def __init__(
        self, words: int, side: int = 224, patch: int = 32, width: int = 768, layers: int = 12, heads: int = 12
    ):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, act_layer=QuickGELU)
        self.proj = nn.Parameter(torch.zeros(words, width))
        self.side = side

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, S, S) -> (B, P, V), without pooling over patches."""
        x = self.conv1(pixels).flatten(2).transpose(1, 2) + self.positional_embedding
        return lexical_map(self.ln_post(self.transformer(self.ln_pre(x))), self.proj)


class VDRText(nn.Module):
    """VDR's text tower, BERT and its input embedding as codebook. V:src/ir/encoder/vdr_crossmodal_text.py:39-57.

    The maximum over tokens includes padding up to `max_len`, as in its training.
    """

    def __init__(self, config: Any, vocab_ids: Tensor):
        from transformers import BertModel

        super().__init__()
        self.ln = nn.LayerNorm(config.hidden_size)
        self.bert_model = BertModel(config, add_pooling_layer=False)
        self.register_buffer("vocab_ids", vocab_ids, persistent=False)

    def forward(self, **encoded: Tensor) -> Tensor:
        """The tokenizer's `input_ids`, `token_type_ids` and `attention_mask` -> (N, V)."""
        codebook = self.bert_model.embeddings.word_embeddings.weight[self.vocab_ids]
        return lexical_map(self.ln(self.bert_model(**encoded).last_hidden_state), codebook, pool=True)


def vdr_vocabulary(pieces: Sequence[str]) -> Tensor:
    """Ids of the BERT pieces that VDR keeps, 27,623 of 30,522: pieces of ASCII characters that are not special.

    V:src/ir/encoder/vdr_crossmodal_text.py:156 lists the ids that it drops.
    """
    return torch.tensor([i for i, piece in enumerate(pieces) if piece.isascii() and not re.fullmatch(r"\[.+\]", piece)])


# arguments of VDRImage: their names in VDR's config.json
VDR_SIZES = {"side": "resolution", "patch": "patch_size", "width": "width", "layers": "layers", "heads": "heads"}
CLIP_STATISTICS = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD


def vdr_encoder(name: str, device: torch.device) -> DualEncoder:
    """Load VDR's published towers from a folder or the hub, in the format of VDR's own `from_pretrained`.

    config.json describes `encoder_q` (text) and `encoder_p` (image); the names of weights start with these names.
    UserError if the folder cannot be read or its weights do not fit.
    """
    from transformers import AutoTokenizer, BertConfig

    try:
        folder = Path(name) if Path(name).is_dir() else Path(from_hub(name))
        about = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        text, image = about["encoder_q"], about["encoder_p"]
        files = [folder / file for file in ("model.safetensors", "pytorch_model.bin") if (folder / file).is_file()]
        state = checkpoints.load_checkpoint(files[0])
        own = folder if (folder / "vocab.txt").is_file() or (folder / "tokenizer.json").is_file() else None
        tokenizer = AutoTokenizer.from_pretrained(own or text.get("model_id", "bert-base-uncased"))
        kept = vdr_vocabulary(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
        sizes = {ours: image[theirs] for ours, theirs in VDR_SIZES.items() if theirs in image}
        towers = VDRText(BertConfig(**text), kept), VDRImage(len(state["encoder_p.proj"]), **sizes)
        for tower, prefix in zip(towers, ("encoder_q.", "encoder_p."), strict=True):
            weights = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            weights.pop("bert_model.embeddings.position_ids", None)  # of older versions
            tower.load_state_dict(weights)
            tower.to(device).eval()
        if len(kept) != len(towers[1].proj):
            raise UserError(f"{len(kept)} words in the text tower, {len(towers[1].proj)} in the image tower")
    except Exception as error:  # transformers, safetensors and pickle raise many kinds
        raise UserError(f"vdr:{name} is no folder or hub name of VDR's cross-modal weights: {error}") from error
    length = text.get("max_len", 256)

    def classes(texts: Sequence[str]) -> Tensor:
        options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
        return torch.cat([towers[0](**tokenizer([text], **options).to(device)) for text in texts])

    return DualEncoder(towers[1], classes, towers[1].side, data.ToNormalizedTensor(*CLIP_STATISTICS))


def from_hub(name: str) -> str:
    """Download a repository of the Hugging Face hub if it is not in the cache, and return its folder."""
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.safetensors", "*.bin"])


# ---------------------------------------------------------------------------------------------------------- the script


@torch.no_grad()
def main(cfg: Config) -> dict[str, dict[str, float]]:
    """Measure each model, print a table, and draw the predicted class of each patch of a few images."""
    if not cfg.models:
        raise UserError("name at least one model: MODEL@TAG of open_clip, local-dir:FOLDER or vdr:FOLDER")
    if "{}" not in cfg.template:
        raise UserError(f"--template {cfg.template!r} has no {{}} for the class's name")
    check_limits(cfg)
    check_folder(cfg.folder)
    device, names = run.setup(0, cfg.device).device, classnames(cfg.folder)
    found: dict[str, dict[str, float]] = {}
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    for name in cfg.models:
        encoder = vdr_encoder(name[4:], device) if name.startswith("vdr:") else open_clip_encoder(name, device)
        s_class = encoder.classes([cfg.template.replace("{}", one) for one in names]).float()
        images = labelled_images(cfg.folder, encoder.side, encoder.normalise)
        found[name], maps = measure(encoder.patches, s_class, images, cfg.background, cfg.batch_size, device)
        plot_class_maps(maps, names, Path(cfg.out) / f"{re.sub(r'[^A-Za-z0-9@._-]+', '-', name)}.png")
    print(evaluation.table(table_rows(found)))
    checkpoints.write_json(Path(cfg.out) / "patchdis.json", {"setting": dataclasses.asdict(cfg), "models": found})
    print(f"written to {cfg.out}")
    return found


def table_rows(found: dict[str, dict[str, float]]) -> list[dict[str, str]]:
    """Table rows, one per model, random patches first; columns: all classes compete, or only the image's own."""
    random = {key.removeprefix("random_"): v for key, v in next(iter(found.values())).items() if "random" in key}
    heads = {"miou": "mIoU, all classes", "miou_present": "mIoU, present classes"}
    return [
        {"model": name} | {head: f"{values[key]:.2f}" for key, head in heads.items()}
        for name, values in ({"random patches": random} | found).items()
    ]


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
