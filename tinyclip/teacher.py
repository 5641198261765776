"""Load the teacher, and the models that a student inherits from.

A teacher only computes features, so any dual encoder with CLIP's tokenizer can be one (another paper's run, an
export, a model of open_clip). A model to inherit from must have the layout of `model.CLIP`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import checkpoints, data, export
from shared.clip import STATISTICS, cuts, image_side
from shared.errors import UserError
from shared.evaluation import named
from tinyclip.geometry import statistics_beside, weights_file
from tinyclip.model import CLIP, OPEN_CLIP, load_clip

VOCABULARY = 49408  # tokens of CLIP's tokenizer


def as_clip(source: str) -> str | Path | None:
    """What `load_clip` can load for a source: itself, or the export of another paper's run, which is written first.
    None if its towers are not those of `CLIP`."""
    folder = export.local_folder(source)
    if folder is None and export.trained_by(source) not in (None, "tinyclip"):
        folder = export.exported(source)
    if folder is None:
        return source if not named(source) or source.partition("@")[0] in OPEN_CLIP else None
    config = checkpoints.read_json(folder / "open_clip_config.json").get("model_cfg", {})
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    strange = "timm_model_name" in vision or "hf_model_name" in text or config.get("custom_text", False)
    # a ResNet's image size is read from its weights, as a multiple of 32
    odd = isinstance(vision.get("layers"), list) and vision.get("image_size", 224) % 32 > 0
    return None if strange or odd else folder


def load_init(source: str) -> CLIP:
    """The model that initial weights come from. UserError if its towers cannot be cut."""
    path = as_clip(source)
    if path is None and named(source):
        raise UserError(f"--init {source}: of open_clip's models, only {', '.join(OPEN_CLIP)} are loaded by name")
    if path is None:
        raise UserError(
            f"--init {source} has towers without inheritable weights: it must be a CLIP with transformers or a ResNet"
        )
    # the student has GELU whatever the activation of the file, as upstream
    return checked_clip(path, f"--init {source}", quick_gelu=False)


def checked_clip(path: str | Path, source: str, head_width: int = 64, quick_gelu: bool | None = None) -> CLIP:
    """`load_clip(path)`; UserError that names `source` if a weight is not finite, or the vocabulary is not CLIP's."""
    model = load_clip(path, head_width, quick_gelu)
    check_weights(model, source)
    if (size := model.geometry["text"]["vocab_size"]) != VOCABULARY:
        raise UserError(f"{source} has a vocabulary of {size:,} tokens, and CLIP's tokenizer {VOCABULARY:,}")
    return model


def check_weights(model: nn.Module, source: str) -> None:
    """UserError if a weight of the model is not finite."""
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(f"{source} holds {name} with numbers that are not finite: its training had diverged")


def digest_of(model: nn.Module | None) -> str | None:
    """Hash of a model's weights; None without a model."""
    return model and data.fingerprint(*(value.flatten().cpu().numpy() for value in model.state_dict().values()))


class Teacher(nn.Module):
    """A dual encoder that fits a student's images and tokens to its own image statistics, side and context length.

    model: `encode_image(images)`, `encode_text(tokens)`, `logit_scale`. statistics: mean and std of its images.
    whole_texts: the model needs texts padded to `context`.
    """

    def __init__(self, model: nn.Module, side: int, context: int, statistics: tuple, whole_texts: bool = False):
        super().__init__()
        self.model, self.side, self.context, self.whole_texts = model, side, context, whole_texts
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in statistics)
        own_mean, own_std = (torch.tensor(each).view(3, 1, 1) for each in STATISTICS)
        self.register_buffer("scale", own_std / std)
        self.register_buffer("shift", (own_mean - mean) / std)

    def forward(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, S, S) in CLIP's statistics, token ids (B, L) -> unit features (B, D) of both, exp(scale)."""
        images = images * self.scale + self.shift
        if images.shape[-1] != self.side:
            images = F.interpolate(images, (self.side, self.side), mode="bicubic", antialias=True)
        tokens = fitted(tokens, self.context, self.whole_texts)
        image, text = self.model.encode_image(images), self.model.encode_text(tokens)
        unit = (F.normalize(x.float(), dim=-1) for x in (image, text))
        return *unit, self.model.logit_scale.exp()


def fitted(tokens: Tensor, context: int, whole: bool = False) -> Tensor:
    """Token ids (B, L) cut to `context`; cut texts get the end token (the highest id) at the last position. With
    `whole`, shorter texts are padded to `context`."""
    if tokens.shape[1] > context:
        end, tokens = tokens.amax(dim=1), tokens[:, :context].clone()
        tokens[:, -1] = torch.where(tokens.amax(dim=1) < end, end, tokens[:, -1])
    return F.pad(tokens, (0, context - tokens.shape[1])) if whole else tokens


def load_teacher(source: str, side: int, context: int) -> CLIP | Teacher:
    """The teacher of a student with images of `side` pixels and `context` tokens: a `CLIP` if the sizes and the images'
    statistics are equal, else wrapped in `Teacher`. UserError if it has another tokenizer, or is not finite."""
    path = as_clip(source)
    if path is not None:
        model = checked_clip(path, f"--teacher {source}")
        model.cuts_padding = False  # the corpus has cut it from the tokens
        own = model.geometry["vision"]["image_size"], model.geometry["text"]["context_length"]
        statistics, whole = STATISTICS if named(str(path)) else statistics_beside(weights_file(Path(path))), False
        if (own, statistics) == ((side, context), STATISTICS):
            return model
    else:
        model, _, tokenizer = export.load_model(source)
        if getattr(tokenizer, "vocab_size", VOCABULARY) != VOCABULARY:
            raise UserError(f"--teacher {source} uses another tokenizer than the student, which uses CLIP's")
        own, whole = (image_side(model), model.context_length), not cuts(model)
        statistics = tuple(model.visual.preprocess_cfg[name] for name in ("mean", "std"))
        check_weights(model, f"--teacher {source}")
    return Teacher(model, *own, statistics, whole)
