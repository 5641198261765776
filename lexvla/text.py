"""Captions as inputs of the text towers: the in-context prompt, the vocabulary, bags of words, states of a frozen LM.

A frozen LM gives a caption the same state in every epoch. So for small experiments each distinct caption is run through
it once, up to the last block's MLP, which training may adapt (`States`, model.py `LastMLPTextEncoder`). The part of the
prompt before the caption is the same for all captions: it is run once, and its keys and values are reused in every
batch.
"""

import copy
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from filelock import FileLock
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor, nn

from lexvla.config import SMOLLM2
from lexvla.model import LexVLA, last_token
from shared import checkpoints, pretrained, run
from shared.errors import UserError
from shared.run import stable_hash

# Nouns, adjectives and verbs in scikit-learn's list of stop words
CONTENT = """amount back bill bottom call con cry describe detail empty fill find fire first found front full get give
    go interest keep last made mill move name next part put see seem seemed seeming seems serious show side sincere
    system take thick thin third top"""
STOP_WORDS = ENGLISH_STOP_WORDS - set(CONTENT.split())

# -------------------------------------------------------------------------------------------------- the language model


def load_lm(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """(causal LM, its tokenizer) of a folder or hub name; UserError if there is none. Makes the folder SMOLLM2."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns in every loader process
    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    if name == SMOLLM2:
        pretrained.smollm2(Path(name))
    try:
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--lm {name} is no folder or hub name of a causal language model here") from error
    if not hasattr(getattr(lm, "model", None), "layers"):
        raise UserError(f"--lm {name} is a {type(lm).__name__}; a model in Llama's layout is needed")
    return lm, tokenizer


def lm_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Number type of the LM's frozen weights: 16 bits on a GPU, float32 on a CPU."""
    return run.DTYPES[precision] if device.type == "cuda" else torch.float32


def lm_sample(lm: nn.Module) -> Tensor:
    """A thousand evenly spaced weights of the LM's head, by which checkpoints and states recognise their LM."""
    weights = lm.get_output_embeddings().weight.detach().flatten()
    return weights[:: max(len(weights) // 1000, 1)].float().cpu()


def of_same_lm(then: Tensor, lm: nn.Module) -> bool:
    """Whether a sample is of `lm`, up to the rounding of its number type."""
    now = lm_sample(lm)
    return then.shape == now.shape and torch.allclose(then, now, rtol=0.02, atol=1e-4)


@torch.no_grad()
def encode_texts(
    model: LexVLA, read: Callable, texts: Sequence[str], batch_size: int = 256, device="cpu", dtype=torch.float32
) -> Tensor:
    """Representations of captions (N, V); `read` makes the text tower's input."""
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model.text(*(x.to(device) for x in read(batch))).float().cpu() for batch in batches])


# ---------------------------------------------------------------------------------------------------------- the prompt

FOCUS = 'The focus of "{}" lies on important words:'
EXAMPLE = FOCUS.format("The man is riding a white horse.") + '"man", "riding", "white", "horse". '


def lexical_prompt(caption: str) -> str:
    """The in-context prompt of section 3.2.1: one solved example, then the caption, for the model to continue with its
    words."""
    return EXAMPLE + FOCUS.format(caption)


class Prompts:
    """Captions -> (input_ids (B, T), attention_mask (B, T)) of the lexical prompt, padded on the right to `max_length`.

    If a prompt exceeds `max_length` tokens, its caption is cut, never the prompt's end, which states the task. A prompt
    starts with BOS if the tokenizer adds one, and has no EOS. UserError if `max_length` is too short for an empty
    caption.
    """

    def __init__(self, tokenizer, max_length: int = 128):
        self.tokenizer, self.max_length = tokenizer, max_length

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption's prompt, without padding."""
        found = self.tokenizer([lexical_prompt(caption) for caption in captions])["input_ids"]
        pairs = zip(captions, found, strict=True)
        return [ids if len(ids) <= self.max_length else self._cut(caption) for caption, ids in pairs]

    def _cut(self, caption: str) -> list[int]:
        """Ids of the prompt with as many of the caption's tokens as fit."""
        pieces = self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0, *(end for _, end in pieces["offset_mapping"])]
        frame = len(self.tokenizer(lexical_prompt(""))["input_ids"])
        for room in range(self.max_length - frame, -1, -1):  # pieces at a caption's ends may merge with the prompt's
            ids = self.tokenizer(lexical_prompt(caption[: ends[min(room, len(ends) - 1)]]))["input_ids"]
            if len(ids) <= self.max_length:
                return ids
        raise UserError(f"--max-length {self.max_length} leaves no room: the prompt alone has {frame} tokens")

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, mask = pad(self.ids(captions))
        more = 0, self.max_length - ids.shape[1]
        return nn.functional.pad(ids, more), nn.functional.pad(mask, more)


def pad(texts: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> (ids (B, T) padded with `value` on the right to the longest, mask (B, T))."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(text, dtype=torch.long) for text in texts], batch_first=True, padding_value=value
    )
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])).long()


# ------------------------------------------------------------------------------------------- states of the frozen LM


class States:
    """Captions -> (states (B, d),), kept in `file`. The LM computes those of new captions, which the file keeps, too.

    A state is the last block's residual stream after attention, at the last token of the caption's prompt. UserError if
    the file was made with another LM, prompt or `max_length`. Processes take turns at the file.
    """

    def __init__(self, file: str, name: str, lm: nn.Module, prompts: Prompts):
        self.file, self.lm, self.prompts = Path(file), lm, prompts
        prompt = f"{stable_hash(EXAMPLE, FOCUS):016x}"
        self.made = {"lm": name, "prompt": prompt, "max_length": prompts.max_length, "lm_sample": lm_sample(lm)}
        self.row, self.states = {}, torch.empty(0, lm.config.hidden_size)
        self.read()

    def read(self) -> None:
        """Take over what the file holds."""
        if not self.file.exists():
            return
        kept = checkpoints.load_checkpoint(self.file)
        for name in ("lm", "prompt", "max_length"):
            if kept.get(name) != self.made[name]:
                raise UserError(
                    f"--states {self.file} was made with {name} {kept.get(name)!r}, this run has {self.made[name]!r}"
                )
        if not of_same_lm(kept["lm_sample"], self.lm):
            raise UserError(f"--states {self.file} was made with another language model than {kept['lm']} holds now")
        self.row, self.states = {text: row for row, text in enumerate(kept["texts"])}, kept["states"].float()

    def add(self, captions: Iterable[str]) -> None:
        """Compute the states of captions that are missing, and write them to the file."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.file}.lock"):
            self.read()
            if missing := [caption for caption in dict.fromkeys(captions) if caption not in self.row]:
                self.states = torch.cat([self.states, compute_states(self.lm, self.prompts, missing)])
                self.row |= {caption: len(self.row) + i for i, caption in enumerate(missing)}
                checkpoints.save_checkpoint(self.file, self.made | {"texts": list(self.row), "states": self.states})

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor]:
        if any(caption not in self.row for caption in captions):
            self.add(captions)
        return (self.states[[self.row[caption] for caption in captions]],)

    def __getstate__(self) -> dict:
        return vars(self) | {"lm": None}  # loader processes only look up


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all texts start; the last token of the shortest text is not counted."""
    shortest = min(map(len, texts))
    columns = zip(*(text[: shortest - 1] for text in texts), strict=True)
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))


@torch.no_grad()
def compute_states(lm: nn.Module, prompts: Prompts, captions: Sequence[str], batch_size: int = 32) -> Tensor:
    """States of captions (N, d), as in `States`, in float32.

    32 captions per forward pass are fastest on a CPU. The LM's device and number type are its own.
    """
    from transformers import DynamicCache

    renamed = "cache" in inspect.signature(lm.model.forward).parameters  # renamed during transformers 5
    keyword = "cache" if renamed else "past_key_values"
    device, texts = next(lm.parameters()).device, prompts.ids(captions)
    length = common_prefix(texts)
    caught: list[Tensor] = []
    hook = lm.model.layers[-1].post_attention_layernorm.register_forward_pre_hook(
        lambda module, inputs: caught.append(inputs[0])
    )
    states = torch.empty(len(texts), lm.config.hidden_size)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    try:
        prefix = DynamicCache()
        if length:
            lm.model(torch.tensor([texts[0][:length]], device=device), use_cache=True, **{keyword: prefix})
        starts = range(0, len(texts), batch_size)
        for start in run.progress(starts, len(starts), "captions", batch_size, unit="caption"):
            chosen = order[start : start + batch_size]
            ids, mask = (x.to(device) for x in pad([texts[i][length:] for i in chosen]))
            cache = copy.deepcopy(prefix)
            if length:
                cache.batch_repeat_interleave(len(chosen))
            whole = torch.cat([mask.new_ones(len(chosen), length), mask], dim=1)
            caught.clear()
            lm.model(ids, attention_mask=whole, use_cache=True, **{keyword: cache})
            states[chosen] = last_token(caught[0], mask).float().cpu()
    finally:
        hook.remove()
    return states


# ----------------------------------------------------------------------------------------------------------- vocabulary


def leading_space(tokenizer) -> str:
    """A space if the tokenizer marks word starts by it (SmolLM2), nothing if the tokenizer adds it itself (Llama)."""
    return "" if tokenizer.tokenize("a")[0] == "▁a" else " "


def pieces(tokenizer, ids: Iterable[int]) -> list[str]:
    """The tokenizer's pieces with these ids; a leading space stands for the start of a word."""
    return [str(piece).replace("▁", " ").replace("Ġ", " ") for piece in tokenizer.convert_ids_to_tokens(list(ids))]


def piece_counts(tokenizer, captions: Iterable[str]) -> Tensor:
    """(K,) int64: how often each of the tokenizer's K pieces occurs in the captions."""
    size, space = len(tokenizer), leading_space(tokenizer)
    counts, captions = torch.zeros(size, dtype=torch.long), iter(captions)
    while batch := list(itertools.islice(captions, 10_000)):
        ids = tokenizer([space + caption for caption in batch], add_special_tokens=False)["input_ids"]
        counts += torch.bincount(torch.tensor(list(itertools.chain(*ids)), dtype=torch.long), minlength=size)
    return counts


def refine_vocabulary(
    counts: Tensor, special_ids: Iterable[int], min_count: int = 1, max_size: int | None = None
) -> Tensor:
    """Token ids (V,) to keep, ascending: those with counts (K,) of at least `min_count`, and not special, section 3.1.

    `max_size` keeps the most frequent (ties: lower ids). The paper drops "unused and meaningless" pieces, leaving
    17,149 of Llama 2's 32,000; its rule is not stated.
    """
    counts = torch.as_tensor(counts).clone()
    counts[torch.as_tensor(list(special_ids), dtype=torch.long)] = -1
    kept = (counts >= max(min_count, 0)).nonzero()[:, 0]
    if max_size is not None:
        kept = kept[counts[kept].argsort(descending=True, stable=True)[:max_size]]
    return kept.sort().values


def caption_vocabulary(
    tokenizer, counts: Tensor, min_count: int = 1, max_size: int | None = None, pattern: str | None = None
) -> Tensor:
    """Token ids (V,) to keep, from the counts (K,) of all pieces: `refine_vocabulary` without special and byte pieces.

    pattern: a regular expression that must match the whole piece (see `pieces`). UserError if fewer than two are left.
    """
    texts = pieces(tokenizer, range(len(counts)))
    refused = set(tokenizer.all_special_ids) | {i for i, text in enumerate(texts) if re.fullmatch("<0x..>", text)}
    if pattern is not None:
        refused |= {i for i, text in enumerate(texts) if not re.fullmatch(pattern, text)}
    kept = refine_vocabulary(counts, [i for i in refused if i < len(counts)], min_count, max_size)
    if len(kept) < 2:
        raise UserError(f"{len(kept)} pieces of the vocabulary are left: lower --min-count or change --pattern")
    return kept


# --------------------------------------------------------------------------------------------------------- bag of words


def bag_of_words(token_ids: Tensor, vocab_ids: Tensor) -> Tensor:
    """Unit multi-hot vectors (N, V) of token ids (N, L), for the ablation without an LLM.

    Ids outside the vocabulary are ignored; negative ids are padding. V:src/ir/utils/sparsify_utils.py:21.
    """
    size = 1 + max(int(vocab_ids.max()), int(token_ids.max()) if token_ids.numel() else 0)
    hot = torch.zeros(len(token_ids), size + 1, dtype=torch.float64, device=token_ids.device)
    hot.scatter_(1, torch.where(token_ids < 0, size, token_ids), 1.0)
    hot = hot[:, vocab_ids]
    return (hot / hot.sum(1, keepdim=True).clamp(min=1).sqrt()).float()


class Bags:
    """Captions -> (s (B, V),): bags of the pieces of their content words.

    The paper keeps nouns, adjectives and non-auxiliary verbs, by a tagger that it does not name. Here, all words are
    kept except scikit-learn's stop words; stop words in `CONTENT` are kept, too.
    """

    def __init__(self, tokenizer, vocab_ids: Tensor):
        self.tokenizer, self.vocab_ids, self.space = tokenizer, vocab_ids, leading_space(tokenizer)

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor]:
        words = [re.findall(r"[^\W_]+", caption.lower()) for caption in captions]
        kept = [" ".join(word for word in of_caption if word not in STOP_WORDS) for of_caption in words]
        texts = [self.space + text if text else "" for text in kept]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return (bag_of_words(pad(ids, value=-1)[0], self.vocab_ids),)
