"""The captioner's codebook: its start by keywords of the captions (paper, sec. 3.1) or by tokens of images, and the
restart of unused codes.

Shapes: K codes, c code dimension, n tokens.
"""

from collections import Counter
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shared import checkpoints, run
from shared.errors import UserError
from shared.run import stable_hash
from tldr_reduction.config import CaptionerConfig, read_lines
from tldr_reduction.datasets import eval_transform, in_order
from tldr_reduction.model import CodebookCaptioner, VectorQuantizer
from tldr_reduction.tokenizer import pre_caption

BERT = "bert-base-uncased"  # text encoder that embeds the keywords


@torch.no_grad()
def start_codebook(captioner: CodebookCaptioner, cfg: CaptionerConfig, pairs, process: run.Process) -> None:
    """Initialise the codebook by `codebook_init`: uniform (as built), xavier, data (image tokens), or keywords (their
    text embeddings, shifted and scaled to image tokens). Random draws depend only on the seed.
    """
    generator = torch.Generator().manual_seed(stable_hash(cfg.seed, "codebook"))
    weight = captioner.quantize.embedding.weight
    if cfg.codebook_init == "uniform":
        return
    if cfg.codebook_init == "xavier":
        weight.copy_(nn.init.xavier_uniform_(torch.empty(weight.shape), generator=generator))
        return
    codes_per_image = captioner.visual_encoder.pos_embed.shape[1] * cfg.width // cfg.code_dim
    rows = torch.randperm(len(pairs), generator=generator)[: -(-4 * cfg.num_codes // codes_per_image)].numpy()
    images = (batch.images for batch in in_order(pairs, rows, eval_transform(cfg.image_size), 64, 0, process.device))
    tokens = torch.cat([captioner.visual_encoder(few).float() for few in images]).reshape(-1, cfg.code_dim)
    if cfg.codebook_init == "data":
        weight.copy_(sampled_codebook(tokens, cfg.num_codes, generator))
        return
    codebook = None
    if process.main:  # reads all captions, while the others wait
        if cfg.keywords is not None:
            keywords = read_lines(cfg.keywords, "--keywords")[: cfg.num_codes]
        else:
            keywords = frequent_keywords(map(pairs.caption, range(len(pairs))), cfg.num_codes)
        codebook = text_embedder(BERT, cfg.code_dim)(keywords).float()
    codebook = run.broadcast(codebook, process)
    weight.copy_(rescaled(codebook.to(process.device), tokens))


def text_embedder(name: str, dim: int) -> Callable[[list[str]], Tensor]:
    """Return a function texts -> (n, dim): the mean last hidden state of a text encoder, mapped by a seeded random
    orthogonal matrix if its width is not `dim`."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer, encoder = AutoTokenizer.from_pretrained(name), AutoModel.from_pretrained(name).eval()
    except Exception as error:  # the hub and the network raise all kinds
        why = checkpoints.one_line(error, 120)
        raise UserError(f"{name}, which embeds the codebook's keywords, cannot be loaded ({why})") from error

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        means = []
        for first in range(0, len(texts), 256):
            batch = tokenizer(texts[first : first + 256], padding=True, return_tensors="pt")
            mask = batch["attention_mask"][..., None]
            means.append((encoder(**batch).last_hidden_state * mask).sum(1) / mask.sum(1))
        embedded = torch.cat(means)
        if embedded.shape[1] != dim:
            random = torch.randn(max(embedded.shape[1], dim), dim, generator=torch.Generator().manual_seed(0))
            embedded = embedded @ torch.linalg.qr(random).Q[: embedded.shape[1]]
        return embedded

    return embed


def frequent_keywords(captions: Iterable[str], count: int) -> list[str]:
    """The `count` most frequent keywords and two-word phrases of the captions.

    Stop words are left out and end a phrase; a keyword counts once per caption; ties are in alphabetical order.
    """
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

    counts: Counter[str] = Counter()
    for caption in captions:
        words = [word.strip(",'?") for word in pre_caption(caption).split()]
        plain = [bool(word) and word.isalpha() and word not in ENGLISH_STOP_WORDS for word in words]
        found = {word for word, good in zip(words, plain, strict=True) if good}
        found |= {f"{words[i]} {words[i + 1]}" for i in range(len(words) - 1) if plain[i] and plain[i + 1]}
        counts.update(found)
    if len(counts) < count:
        raise UserError(
            f"the captions hold {len(counts)} keywords, fewer than {count} codes: lower --num-codes, or choose "
            "another --codebook-init"
        )
    return [keyword for keyword, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:count]]


def rescaled(codebook: Tensor, tokens: Tensor) -> Tensor:
    """The codebook (K, c), shifted to the mean of the tokens (n, c) and scaled by one factor: the standard deviation of
    all numbers in the centred tokens, over that of all numbers in the codebook as given."""
    standard = (codebook - codebook.mean(0)) / codebook.std().clamp(min=1e-6)
    return standard * (tokens - tokens.mean(0)).std() + tokens.mean(0)


def sampled_codebook(tokens: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """(K, c) drawn from the tokens (n, c), without replacement if there are enough."""
    repeats = -(-num_codes // len(tokens))
    order = torch.cat([torch.randperm(len(tokens), generator=generator) for _ in range(repeats)])
    return tokens[order[:num_codes].to(tokens.device)].clone()


@torch.no_grad()
def restart_unused(quantize: VectorQuantizer, used: Tensor, tokens: Tensor, generator: torch.Generator) -> int:
    """Replace codes whose count in `used` (K,) is 0 by random tokens (n, c), against collapse; return their number."""
    unused = (used == 0).nonzero().flatten()
    if len(unused):
        quantize.embedding.weight[unused] = sampled_codebook(tokens.float(), len(unused), generator)
    if dist.is_initialized():
        dist.broadcast(quantize.embedding.weight.data, src=0)
    return len(unused)
