"""FLAME: Frozen Large Language Models Enable Data-Efficient Language-Image Pre-training (arXiv 2411.11927).

Authors' code: MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. The paper's own components are the prompts
with several facets (`Prompt`), reading all facets in one pass (`facet_decoupled_mask`, `FrozenLLM`), the image tower
whose MLP maps every token into the space of the LLM (`FLAME`), and the losses with several texts per image
(`mp_sigmoid_loss`, `mp_nce_loss`). `TrainedText` is the baseline. Only for the study: `SentenceEncoder` instead of the
LLM, `Convolutional` instead of the ViT. Letters: B or N images, K facets (texts of an image), D width of the LLM, W of
the ViT, S tokens.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import timm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

import shared.resnet  # noqa: F401  (registers its network with timm)
from shared import checkpoints
from shared.errors import UserError
from shared.memory import CLIP_STATISTICS
from shared.pretrained import LITE0, LITE0_MEAN, LITE0_STD
from shared.run import gather, own_columns

# ----------------------------------------------------------------------------------------------------------- prompts

SLOT = "{caption}"


class Prompt(NamedTuple):
    """A prefix with the placeholder `{caption}`, and K facets, each a request for one word;
    U:training/embed_cc3m_mask.py:224.

    The hidden state at a facet's last token, which would predict that word, is the embedding of the facet.
    """

    head: str
    facets: tuple[str, ...]
    bos_before_facets: bool  # a space and the start token come before the first facet and belong to it


_SUMMARY = ' the whole image, in one word:"'
_MAIN = (' the kind of its main object, in one word:"', ' the look of its main object, in one word:"')
_REST = (
    ' the kind of its second object, in one word:"',
    ' the look of its second object, in one word:"',
    ' what happens in it, in one word:"',
    ' its mood, in one word:"',
)
# Our own prompts. The authors' checkpoint needs theirs, which `embed.read_prompts` reads from a clone.
RAW = Prompt(f'Caption of an image: "{SLOT}" . In short ,', (_SUMMARY,), False)
SHORT = Prompt(f'Caption of an image: "{SLOT}" . In short ,', (_SUMMARY, *_MAIN), True)
LONG = Prompt(f'Detailed caption of an image: "{SLOT}" . In short ,', (_SUMMARY, *_MAIN, *_REST), True)
PLAIN = Prompt(SLOT, ("",), False)  # only the caption, for encoders without prompts


def clean_caption(text: str) -> str:
    """Add a full stop, replace double quotes, replace a final question mark; the order matters.

    U:open_clip/multiprompteol_embeddings.py:46-50.
    """
    if text and text[-1] not in ".?\"'":
        text += "."
    text = text.replace('"', "'")
    return text[:-1] + "." if text.endswith("?") else text


# ------------------------------------------------------------------------------------------------------- frozen LLM


def facet_decoupled_mask(attention_mask: Tensor, facet_lens: Sequence[int]) -> Tensor:
    """Left-padded (B, S) 0/1 -> visible (B, 1, S, S) bool; the last sum(facet_lens) tokens are the facets.

    With f(i) = 0 before the facets and k in facet k: visible(i, j) = (j <= i) and (f(j) = 0 or f(j) = f(i)), and j is
    not padding. Facets attend to the prefix and themselves, never to each other. A pad token attends to itself, so that
    no row is empty. Upstream masks rows of padding instead of columns, so facets see each other through the padding;
    U:open_clip/multiprompteol_embeddings.py:76-114.
    """
    size, device = attention_mask.shape[1], attention_mask.device
    if sum(facet_lens) > size:
        raise UserError(f"facets of {sum(facet_lens)} tokens do not fit a sequence of {size}")
    facet = torch.zeros(size, dtype=torch.long, device=device)
    lengths = torch.tensor(facet_lens, device=device)
    facet[size - sum(facet_lens) :] = torch.arange(1, len(lengths) + 1, device=device).repeat_interleave(lengths)
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    visible = causal & ((facet == 0) | (facet == facet[:, None]))
    visible = visible & attention_mask.bool()[:, None, None, :]
    return visible | torch.eye(size, dtype=torch.bool, device=device)


class _Done(Exception):
    """Ends a forward pass at the last block that is read."""


class FrozenLLM(nn.Module):
    """A causal LM from Hugging Face as text encoder, without gradients; U:open_clip/multiprompteol_embeddings.py.

    layers: 1-based numbers of the blocks whose outputs are averaged (before the final norm); by default the
    second-to-last. `decoupled=False` lets each facet attend to earlier facets (plain causal mask). With
    `restart_positions` the positions of every facet continue those of the prefix; upstream numbers the whole sequence.
    """

    def __init__(
        self,
        lm: nn.Module,
        tokenizer,
        layers: Sequence[int] | None = None,
        decoupled: bool = True,
        restart_positions: bool = False,
        max_caption: int = 1024,
        max_length: int = 1536,
    ):
        super().__init__()
        self.lm, self.tokenizer = lm.base_model.eval().requires_grad_(False), tokenizer
        depth = lm.config.get_text_config().num_hidden_layers
        self.layers = tuple(layers) if layers else (max(depth - 1, 1),)
        if not all(1 <= n <= depth for n in self.layers):
            raise UserError(f"layers {self.layers} are not all in 1..{depth}, the blocks of this language model")
        self.blocks = next(m for m in self.lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        self.decoupled, self.restart_positions = decoupled, restart_positions
        self.max_caption, self.max_length = max_caption, max_length

    @property
    def dim(self) -> int:
        return self.lm.config.get_text_config().hidden_size

    @torch.no_grad()
    def encode_ids(self, input_ids: Tensor, attention_mask: Tensor, facet_lens: Sequence[int] = (1,)) -> Tensor:
        """Left-padded ids (B, S), mask (B, S) -> hidden states (B, K, D) float32 at the last token of each facet.

        By default only the last token is read, as for a prompt with one facet. Position ids skip padding and number the
        whole sequence, so later facets are further from the caption. A facet's state equals that of a pass over prefix
        and facet alone at these positions.
        """
        facet_lens, size, device = list(facet_lens), input_ids.shape[1], input_ids.device
        visible = facet_decoupled_mask(attention_mask, facet_lens if self.decoupled else [sum(facet_lens)])
        dtype = next(self.lm.parameters()).dtype
        additive = torch.zeros(visible.shape, dtype=dtype, device=device)  # eager attention misreads a boolean mask
        additive.masked_fill_(~visible, torch.finfo(dtype).min)
        positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
        lengths = torch.tensor(facet_lens, device=device)
        starts = size - sum(facet_lens) + lengths.cumsum(0) - lengths
        if self.restart_positions:
            back = (starts - starts[0]).repeat_interleave(lengths)
            positions[:, starts[0] :] -= back
        outputs: dict[int, Tensor] = {}

        def keep(number: int):
            def hook(module, inputs, output):
                hidden = output[0] if isinstance(output, tuple) else output
                outputs[number] = hidden[:, starts + lengths - 1].float()
                if number == max(self.layers):
                    raise _Done

            return hook

        handles = [self.blocks[number - 1].register_forward_hook(keep(number)) for number in set(self.layers)]
        try:
            self.lm(input_ids=input_ids, attention_mask=additive, position_ids=positions, use_cache=False)
        except _Done:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return torch.stack([outputs[number] for number in self.layers]).mean(0)

    def facet_ids(self, prompt: Prompt) -> list[list[int]]:
        """Token ids of each facet."""
        ids = [self.tokenizer(facet, add_special_tokens=False)["input_ids"] for facet in prompt.facets]
        if prompt.bos_before_facets:
            space = self.tokenizer(" ", add_special_tokens=False)["input_ids"]
            bos = [] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
            ids[0] = space + bos + ids[0]
        return ids

    def prefix_ids(self, captions: list[str], prompt: Prompt, room: int) -> list[list[int]]:
        """Token ids of the prefix with each caption inserted, at most `room`; captions are cut, never the prompt.

        As upstream, special tokens are removed from captions, and the start token counts in `max_caption`.
        """
        head, tail = prompt.head.lstrip().split(SLOT)
        room -= len(self.tokenizer(head)["input_ids"]) + len(
            self.tokenizer(tail, add_special_tokens=False)["input_ids"]
        )
        limit = self.max_caption - len(self.tokenizer("")["input_ids"])
        room = max(min(limit, room - 4), 0)  # joined text may be tokenized differently
        if not captions:
            return []
        ids = self.tokenizer(captions, add_special_tokens=False)["input_ids"]
        texts = [self.tokenizer.decode(each[:room], skip_special_tokens=True) for each in ids]
        return self.tokenizer([head + clean_caption(text) + tail for text in texts])["input_ids"]

    def forward(self, captions: list[str], prompt: Prompt) -> Tensor:
        """Captions -> (B, K, D) float32, not normalised; a caption's embeddings do not depend on the batch."""
        facets = self.facet_ids(prompt)
        lengths = [len(ids) for ids in facets]
        prefixes = self.prefix_ids(captions, prompt, self.max_length - sum(lengths))
        if not prefixes:
            return torch.zeros(0, len(facets), self.dim)
        after = [token for ids in facets for token in ids]
        width = max(map(len, prefixes))
        pad = self.tokenizer.pad_token_id or 0
        device = next(self.lm.parameters()).device
        ids = torch.tensor([[pad] * (width - len(p)) + p + after for p in prefixes], device=device)
        real = torch.tensor([[0] * (width - len(p)) + [1] * (len(p) + len(after)) for p in prefixes], device=device)
        return self.encode_ids(ids, real, lengths)


class SentenceEncoder(nn.Module):
    """A small frozen sentence encoder instead of the LLM (ours): the mean of a caption's last hidden states.

    It reads the caption without a prompt, so a caption has one facet.
    """

    def __init__(self, encoder: nn.Module, tokenizer, max_caption: int = 256):
        super().__init__()
        self.encoder, self.tokenizer, self.max_caption = encoder.eval().requires_grad_(False), tokenizer, max_caption

    @property
    def dim(self) -> int:
        return self.encoder.config.hidden_size

    @torch.no_grad()
    def forward(self, captions: list[str], prompt: Prompt = PLAIN) -> Tensor:
        """Captions -> (B, 1, D) float32, not normalised; a caption's embedding does not depend on the batch."""
        if not captions:
            return torch.zeros(0, 1, self.dim)
        texts = [prompt.head.replace(SLOT, caption) for caption in captions]
        options = dict(padding=True, truncation=True, max_length=self.max_caption, return_tensors="pt")
        inputs = self.tokenizer(texts, **options).to(self.encoder.device)
        hidden = self.encoder(**inputs).last_hidden_state.float()
        real = inputs["attention_mask"][..., None]
        return ((hidden * real).sum(1) / real.sum(1))[:, None]


# -------------------------------------------------------------------------------------------------------- image tower

TOWERS = {  # those of the released configs, ViT-L-16, and small ones
    "ViT-B-16": dict(width=768, layers=12, heads=12, patch_size=16, image_size=224, output_dim=512),
    "ViT-L-14": dict(width=1024, layers=24, heads=16, patch_size=14, image_size=224, output_dim=768),
    "ViT-L-16": dict(width=1024, layers=24, heads=16, patch_size=16, image_size=224, output_dim=768),
    "emoji": dict(width=128, layers=3, heads=4, patch_size=8, image_size=32, output_dim=128),
    "ResNet-emoji": dict(width=256, network="resnet7_small", grid=2, image_size=32),
    "Lite0-emoji": dict(width=1280, network=LITE0, grid=2, image_size=128, drop=0.2),
}


class Convolutional(nn.Module):
    """A timm network instead of the ViT (ours): the cells of its last feature map are the tokens.

    The map is averaged to `grid` x `grid` cells; training applies dropout with rate `drop`. A locked trunk keeps its
    weights and batch norm statistics. The input may also be the tokens that a locked trunk has computed.
    """

    def __init__(self, network: str, width: int, grid: int, image_size: int, drop: float = 0.0):
        super().__init__()
        self.trunk, self.drop = timm.create_model(network, num_classes=0), nn.Dropout(drop)
        self.image_size, self.grid_size, self.width, self.locked = (image_size,) * 2, (grid,) * 2, width, False
        self.statistics = (LITE0_MEAN, LITE0_STD) if network == LITE0 else CLIP_STATISTICS

    def lock(self) -> None:
        self.trunk.requires_grad_(False).eval()
        self.locked = True

    def train(self, mode: bool = True) -> "Convolutional":
        super().train(mode)
        if self.locked:
            self.trunk.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.trunk.set_grad_checkpointing(enable)

    def tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) -> (B, G * G, W)."""
        maps = F.adaptive_avg_pool2d(self.trunk.forward_features(image), self.grid_size)
        return maps.flatten(2).transpose(1, 2)

    def forward(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, H), or tokens (B, G * G, W) -> tokens."""
        return self.drop(self.tokens(image) if image.ndim == 4 else image)


def image_tower(name: str, image_size: int | None = None) -> VisionTransformer | Convolutional:
    """An image tower by its name in TOWERS; a ViT is open_clip's.

    A ViT's final norm and projection exist, as upstream, but are not used.
    """
    if name not in TOWERS:
        raise UserError(f"model {name!r} is none of {', '.join(TOWERS)}")
    sizes = TOWERS[name] | ({} if image_size is None else {"image_size": image_size})
    if "network" in sizes:
        return Convolutional(**sizes)
    if sizes["image_size"] % sizes["patch_size"]:
        raise UserError(f"patches of {sizes['patch_size']} pixels do not tile an image of {sizes['image_size']}")
    return VisionTransformer(mlp_ratio=4.0, pool_type="avg", **sizes)


class FLAME(nn.Module):
    """ViT -> MLP on every token -> mean of patches, in the space of the LLM; U:open_clip/model.py:191-206,442-448.

    The hidden width is at least 4096 upstream, for any LLM. Weights have upstream's names. `bias`: whether there is a
    logit_bias, which only the sigmoid loss uses.
    """

    def __init__(
        self,
        visual: VisionTransformer | Convolutional,
        width: int,
        text_dim: int,
        hidden_dim: int | None = None,
        bias: bool = True,
    ):
        super().__init__()
        hidden_dim = max(text_dim, 4096) if hidden_dim is None else hidden_dim
        self.visual = visual
        self.mm = nn.Sequential(
            nn.Linear(width, hidden_dim), nn.GELU(), nn.Linear(hidden_dim, text_dim), nn.LayerNorm(text_dim)
        )
        self.logit_scale = nn.Parameter(torch.tensor(math.log(10)))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if bias else None

    def patch_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, H, H) -> patch tokens (B, N, W) of the last block: no class token, no final norm."""
        if isinstance(self.visual, Convolutional):
            return self.visual(image)
        output = self.visual.forward_intermediates(image, indices=1, intermediates_only=True, output_fmt="NLC")
        return output["image_intermediates"][-1]

    def encode_image(self, image: Tensor, visual_only: bool = False, normalize: bool = False) -> Tensor:
        """(B, D); `visual_only`: the mean of raw patch tokens (B, W), the input of the linear probe."""
        tokens = self.patch_tokens(image)
        features = (tokens if visual_only else self.mm(tokens)).mean(dim=1)
        return F.normalize(features.float(), dim=-1) if normalize else features

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Unit image features (B, D) float32, t = exp(logit_scale), and b = logit_bias if it exists."""
        # a clone, because DistributedDataParallel counts a returned parameter as unused
        bias = [] if self.logit_bias is None else [self.logit_bias.clone()]
        return self.encode_image(image, normalize=True), self.logit_scale.exp(), *bias

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Clamp t to [1, 100]; called after each step. U:training/train.py:205."""
        self.logit_scale.clamp_(0, math.log(100))


class TrainedText(FLAME):
    """The baseline: the same image tower, and a text transformer that is trained with it, as in CLIP."""

    def __init__(
        self,
        visual: VisionTransformer | Convolutional,
        width: int,
        embed_dim: int,
        hidden_dim: int,
        text: dict[str, int],
    ):
        super().__init__(visual, width, embed_dim, hidden_dim, bias=False)
        self.text = TextTransformer(output_dim=embed_dim, **text)
        self.logit_scale.data.fill_(math.log(1 / 0.07))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """CLIP tokens (B, T) -> (B, E), in four groups of similar length, each cut to its longest text.

        In training on a GPU there is one group, because finding the lengths would wait for the GPU; `cut_padding` has
        cut the batch before.
        """
        ends = tokens.argmax(dim=1)  # the end token has the highest id
        waits = not (tokens.is_cuda and self.training)
        embedded, _ = self.text._embeds(tokens[:, : int(ends.max()) + 1] if waits else tokens)
        order, groups = ends.argsort(), []
        for group in order.chunk(4 if waits else 1):
            length = int(ends[group].max()) + 1 if waits else tokens.shape[1]
            hidden = self.text.transformer(embedded[group, :length], attn_mask=self.text.attn_mask[:length, :length])
            groups.append(hidden[torch.arange(len(group), device=group.device), ends[group]])
        return self.text.ln_final(torch.cat(groups)[order.argsort()]) @ self.text.text_projection

    def forward(self, image: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Unit features (B, E) float32 of images and texts, t."""
        text = F.normalize(self.encode_text(tokens).float(), dim=-1)
        return self.encode_image(image, normalize=True), text, self.logit_scale.exp()


def create_model(cfg, text_dim: int) -> FLAME:
    """The model of a configuration; `text_dim` is the bank's width (the clip method has its own)."""
    width = TOWERS.get(cfg.model, {}).get("width", 0)
    visual = image_tower(cfg.model, cfg.image_size)
    if cfg.method == "flame":
        model = FLAME(visual, width, text_dim, cfg.hidden_dim, bias=cfg.loss == "mp-sigmoid")
        model.logit_scale.data.fill_(math.log(cfg.logit_scale))
        if model.logit_bias is not None:
            model.logit_bias.data.fill_(cfg.logit_bias)
        return model
    text = {"context_length": cfg.max_length, "vocab_size": 49408, "width": cfg.text_width}
    text |= {"heads": max(cfg.text_width // 64, 1), "layers": cfg.text_layers}
    return TrainedText(visual, width, cfg.embed_dim, cfg.hidden_dim or max(cfg.embed_dim, 4096), text)


# ------------------------------------------------------------------------------------------------------------ losses


def mp_sigmoid_loss(
    image: Tensor, text: Tensor, logit_scale: Tensor, logit_bias: Tensor, negative_only: bool = False
) -> Tensor:
    """L = -1/(N K) sum_ij log sigmoid(s_ij (t x_i . y_j + b)), s_ij = 1 if text j is of image i, else -1.

    image (N, D) and text (N*K, D) have unit length; text i*K + k is facet k of image i. K = 1 is SigLIP. With several
    processes, each compares its own images with all processes' texts and divides by its own N K: the mean over
    processes equals the loss of one process. `negative_only`: all pairs are negative, and nothing is gathered.
    U:open_clip/loss.py:417-545.
    """
    texts, facets = len(text), len(text) // len(image)
    everyone = text if negative_only else gather(text)
    logits = logit_scale * image.float() @ everyone.float().T + logit_bias
    sign = torch.full_like(logits, -1.0)
    if not negative_only:
        first = dist.get_rank() * texts if dist.is_initialized() else 0
        sign[:, first : first + texts].unflatten(1, (len(image), facets)).diagonal().fill_(1.0)
    return -F.logsigmoid(sign * logits).sum() / texts


def mp_nce_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Mean of two cross-entropies: (a) image to text, among the k-th texts of all images, averaged over k; (b) text to
    image.

    image (N, D), text (N*K, D) as above; K = 1 is CLIP's loss. Each process compares its own images and texts with
    those of all P processes. U:open_clip/loss.py:548-635.
    """
    n, facets = len(image), len(text) // len(image)
    image, text = image.float(), text.float()
    target = own_columns(image)
    to_text = logit_scale * image @ gather(text).T  # (N, P*N*K)
    to_text = to_text.unflatten(1, (-1, facets))  # cross-entropy over dimension 1, for each facet
    to_image = logit_scale * text @ gather(image).T  # (N*K, P*N)
    image_finds = F.cross_entropy(to_text, target[:, None].expand(n, facets))
    text_finds = F.cross_entropy(to_image, target.repeat_interleave(facets))
    return (image_finds + text_finds) / 2


# ------------------------------------------------------------------------------------------------------- checkpoints


def load_checkpoint(model: FLAME, source: str | Path | dict) -> None:
    """Load the weights of one of our runs or of the authors' file, without the prefix `module.` and the LLM (`text.*`).

    UserError if the other weights do not match the model. Upstream loads with strict=False, and its evaluation models
    have no logit_bias; here only logit_bias may be missing.
    """
    state = source if isinstance(source, dict) else checkpoints.load_checkpoint(source)
    state = state.get("state_dict", state)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{'this' if isinstance(source, dict) else source} holds no weights")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    if not isinstance(model, TrainedText):
        state = {name: value for name, value in state.items() if not name.startswith("text.")}
        if model.logit_bias is not None:
            state.setdefault("logit_bias", model.logit_bias.detach())
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        what = checkpoints.one_line(error, 300)
        raise UserError(f"the file does not hold the weights of this {type(model).__name__}: {what}") from error
