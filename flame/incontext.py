"""Images as words of the LLM, and few-shot classification in its context (FLAME, arXiv 2411.11927).

Patches are mapped into the space of the LLM, so its output head turns each into a word. Authors' code
MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/.
"""

import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.model import FLAME
from shared.errors import UserError


def pool_patches(tokens: Tensor, kernel: int, padding: int = 0) -> Tensor:
    """(B, N, D) patches of a square grid -> (B, M, D): means of kernel x kernel patches, including padding zeros.

    U:training/eval_semantic_interpretation.py:55 (kernel 2: 196 -> 49), eval_fs_classification.py:133 (kernel 4,
    padding 1: 196 -> 16).
    """
    grid = math.isqrt(tokens.shape[1])
    maps = tokens.transpose(1, 2).unflatten(2, (grid, grid))
    return F.avg_pool2d(maps, kernel, kernel, padding).flatten(2).transpose(1, 2)


@torch.no_grad()
def nearest_tokens(
    model: FLAME, lm_head: torch.nn.Module, image: Tensor, kernel: int = 2, padding: int = 0, rank: int = 0
) -> Tensor:
    """Token ids (B, M) of the LLM's head for pooled patches of images (B, 3, H, H); rank 0 is the best token.

    Upstream's script prints rank 49, U:training/eval_semantic_interpretation.py:65. As upstream, the head gets the
    features without the final norm that precedes it in the LLM.
    """
    logits = lm_head(
        pool_patches(model.mm(model.patch_tokens(image)), kernel, padding).to(lm_head.weight.dtype)
    ).float()
    return logits.topk(rank + 1, dim=-1).indices[..., rank]


@torch.no_grad()
def few_shot(
    lm: torch.nn.Module,
    tokenizer,
    words: Sequence[str],
    classes: Sequence[str],
    names: Sequence[str] | None = None,
    repeat: int = 3,
) -> str:
    """The class that a causal LM names for the last image, after examples of (words of an image, its class).

    words: for each image, the words of its patches (`nearest_tokens`), the query last. classes: the examples' classes.
    names: the classes to choose from (default: those of the examples). Each generated token is the likeliest one that
    continues a name; upstream allows any token that some name has at this position. The examples are shown 1 + repeat
    times. U:training/eval_fs_classification.py:84-165, 263-290.
    """
    names = sorted(set(classes)) if names is None else list(names)
    options = " or ".join(f"'{name}'" for name in names)
    text = f"Every input below has an output, which is {options}.\n"
    shots = "".join(
        f"###\nInput: < {shown} >\nOutput: {name}\n" for shown, name in zip(words[:-1], classes, strict=True)
    )
    text += shots * (1 + repeat) + f"###\nInput: < {words[-1]} >\nOutput: "
    ids = tokenizer(text)["input_ids"]
    left = {name: tokenizer(name, add_special_tokens=False)["input_ids"] for name in names}
    place = 0
    while len(left) > 1 and all(len(tokens) > place for tokens in left.values()):
        logits = lm(input_ids=torch.tensor([ids], device=next(lm.parameters()).device), use_cache=False).logits[0, -1]
        best = max({tokens[place] for tokens in left.values()}, key=lambda token: logits[token].item())
        left = {name: tokens for name, tokens in left.items() if tokens[place] == best}
        ids, place = [*ids, best], place + 1
    return min(left, key=lambda name: len(left[name]))


def episodes(labels: Tensor, ways: int, shots: int, count: int, seed: int = 0) -> Iterator[list[int]]:
    """`count` lists of ways * shots + 1 indices into `labels`: shuffled examples of `ways` classes, then one more image
    of one of these classes, the query."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(places: Tensor, number: int) -> list[int]:
        return places[torch.randperm(len(places), generator=generator)[:number]].tolist()

    classes, sizes = labels.unique(return_counts=True)
    if (sizes > shots).sum() < ways:
        raise UserError(f"episodes of {ways} classes need as many with more than {shots} images each")
    for _ in range(count):
        chosen = drawn(classes[sizes > shots], ways)
        examples = [drawn((labels == one).nonzero()[:, 0], shots + 1) for one in chosen]
        query = examples[0].pop()  # classes are in random order
        shown = [place for of_class in examples for place in of_class[:shots]]
        yield [*drawn(torch.tensor(shown), len(shown)), query]


@torch.no_grad()
def few_shot_accuracy(
    model: FLAME, lm: torch.nn.Module, tokenizer, images: Sequence[Tensor], labels: Tensor, names: Sequence[str],
    ways: int = 2, shots: int = 1, count: int = 100,
) -> float:  # fmt: skip
    """Percent of queries whose class the LLM names correctly; images (3, H, H), each as at most 16 words."""
    grid = model.visual.grid_size[0]
    kernel = -(-grid // 4)
    padding = min((4 * kernel - grid) // 2, kernel // 2)
    device, hits = next(model.parameters()).device, 0
    for places in episodes(labels, ways, shots, count):
        batch = torch.stack([images[place] for place in places]).to(device)
        ids = nearest_tokens(model, lm.get_output_embeddings(), batch, kernel, padding)
        words = [" ".join(tokenizer.decode([token]).strip() for token in of_image) for of_image in ids.tolist()]
        *classes, answer = [names[int(labels[place])] for place in places]
        hits += few_shot(lm, tokenizer, words, classes) == answer
    return 100 * hits / count
