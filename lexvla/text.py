"""Turn captions into inputs of the text towers: prompts, bags of words, or cached states of the frozen LM.

    python -m lexvla.text          # SmolLM2-135M's states of the study's captions, for training and evaluation

A frozen LM gives a caption the same state in every epoch. So for small experiments each distinct caption is run through
it once, up to the last block's MLP, which training may adapt (`TextEncoder.hidden_of_states`). The part of the prompt
before the caption is the same for all captions: it is run once, and its keys and values are reused in every batch.
`encode_texts` runs a whole text tower over captions.
"""

import contextlib
import copy
import dataclasses
import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import tyro
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from torch import Tensor, nn

from lexvla.model import EXAMPLE, FOCUS, LexVLA, bag_of_words, last_token, lexical_prompt, refine_vocabulary
from shared import checkpoints, cli, data, run
from shared.errors import UserError
from shared.evalsets import EvalSet

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise it warns in every loader process
SCENES = "data/lexvla/scenes"
EMOJI_NAMES = "data/emoji/eval/retrieval_xm_en"  # a drawing in an unseen style and its English name
SETS = (*(f"{SCENES}/eval/retrieval_{words}" for words in ("known", "mixed", "new")), EMOJI_NAMES)  # of the study
# Nouns, adjectives and verbs in scikit-learn's list of stop words
CONTENT = """amount back bill bottom call con cry describe detail empty fill find fire first found front full get give
    go interest keep last made mill move name next part put see seem seemed seeming seems serious show side sincere
    system take thick thin third top"""
STOP_WORDS = ENGLISH_STOP_WORDS - set(CONTENT.split())


@dataclasses.dataclass
class Config:
    """Run the frozen LM over all captions once, and write its states to a file."""

    lm: str = "data/smollm2-135m"
    """Folder or hub name of a causal LM; the default is made by 'python -m shared.pretrained smollm2'."""
    data: str = f"{SCENES}/train"
    """Shards whose captions are encoded."""
    sets: tuple[str, ...] = (*SETS, f"{SCENES}/eval/patchdis")
    """Evaluation sets and PatchDis folders whose captions and class names are encoded, too."""
    out: str = "data/lexvla/states.pt"
    """File to write. A finished one is not changed; it is an error if its settings differ."""
    max_length: int = 128
    """Tokens of a prompt, as in training."""
    prompt_end: str = ""
    """Text after the prompt's "words:", as in training."""
    batch_size: int = 32
    """Captions per forward pass. 32 are fastest on a CPU, more on a GPU."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Number type of the LM's weights: bf16, fp16, fp32, or auto."""


def load_lm(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, object]:
    """(causal LM, its tokenizer) of a folder or hub name; UserError if there is none."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        lm, tokenizer = AutoModelForCausalLM.from_pretrained(name, dtype=dtype), AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        hint = "; 'python -m shared.pretrained smollm2' makes it" if "smollm2" in name else ""
        raise UserError(f"--lm {name} is no folder or hub name of a causal language model here{hint}") from error
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


def of_same_lm(then: Tensor | None, lm: nn.Module) -> bool:
    """Whether a sample is of `lm`, up to the rounding of its number type; None, of older files, is unknown."""
    now = lm_sample(lm)
    return then is None or (then.shape == now.shape and torch.allclose(then, now, rtol=0.02, atol=1e-4))


# ------------------------------------------------------------------------------------------- captions -> model inputs


class Prompts:
    """Captions -> (input_ids (B, T), attention_mask (B, T)) of the lexical prompt, padded on the right.

    If a prompt exceeds `max_length` tokens, its caption is cut, never the prompt's end, which states the task. A prompt
    starts with BOS if the tokenizer adds one, and has no EOS. UserError if `max_length` is too short for an empty
    caption.
    """

    def __init__(self, tokenizer, max_length: int = 128, end: str = ""):
        self.tokenizer, self.max_length, self.end = tokenizer, max_length, end

    def ids(self, captions: Sequence[str]) -> list[list[int]]:
        """Token ids of each caption's prompt, without padding."""
        found = self.tokenizer([lexical_prompt(caption) + self.end for caption in captions])["input_ids"]
        pairs = zip(captions, found, strict=True)
        return [ids if len(ids) <= self.max_length else self._cut(caption) for caption, ids in pairs]

    def _cut(self, caption: str) -> list[int]:
        """Ids of the prompt with as many of the caption's tokens as fit."""
        pieces = self.tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True)
        ends = [0, *(end for _, end in pieces["offset_mapping"])]
        frame = len(self.tokenizer(lexical_prompt("") + self.end)["input_ids"])
        for room in range(self.max_length - frame, -1, -1):  # pieces at a caption's ends may merge with the prompt's
            ids = self.tokenizer(lexical_prompt(caption[: ends[min(room, len(ends) - 1)]]) + self.end)["input_ids"]
            if len(ids) <= self.max_length:
                return ids
        raise UserError(f"--max-length {self.max_length} leaves no room: the prompt alone has {frame} tokens")

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        return pad(self.ids(captions))


def pad(texts: Sequence[Sequence[int]], value: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids of B texts -> (ids (B, T) padded with `value` on the right, mask (B, T))."""
    ids = nn.utils.rnn.pad_sequence(
        [torch.tensor(text, dtype=torch.long) for text in texts], batch_first=True, padding_value=value
    )
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])).long()


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


def made_with(lm_name: str, max_length: int, end: str) -> dict[str, str | int]:
    """The settings on which states depend, besides the captions; `States` compares them with those of its file."""
    prompt = data.stable_hash(EXAMPLE, FOCUS + end)
    return {"lm": lm_name, "prompt": f"{prompt:016x}", "max_length": max_length}


class States:
    """Captions -> (states (B, d),), looked up in a file of this script.

    Captions missing in the file are encoded by the attribute `lm`, if it is set; otherwise they are a ValueError.
    """

    def __init__(self, file: str, lm_name: str, max_length: int = 128, end: str = ""):
        if not Path(file).is_file():
            raise UserError(f"--states {file} does not exist: make it with 'python -m lexvla.text --out {file}'")
        kept = checkpoints.load_checkpoint(file)
        made = made_with(lm_name, max_length, end)
        for name, value in made.items():
            if kept.get(name) != value:
                raise UserError(f"--states {file} was made with {name} {kept.get(name)!r}, this run has {value!r}")
        self.file, self.states, self.max_length, self.end = file, kept["states"].float(), max_length, end
        self.row = {text: row for row, text in enumerate(kept["texts"])}
        self.precision, self.sample = kept.get("precision"), kept.get("lm_sample")  # older files lack them
        self.lm = self.tokenizer = None

    def check_lm(self, lm: nn.Module, name: str) -> None:
        """UserError if the states were computed by another LM than `lm`, which `name` holds now."""
        if not of_same_lm(self.sample, lm):
            raise UserError(f"--states {self.file} was made with another language model than {name} holds now")

    @contextlib.contextmanager
    def unknown_through(self, lm: nn.Module, tokenizer) -> Iterator[None]:
        """Context in which captions missing in the file are encoded by `lm`, whose LoRA comes after the states."""
        self.lm, self.tokenizer = lm, tokenizer
        yield
        self.lm = self.tokenizer = None

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor]:
        unknown = [caption for caption in dict.fromkeys(captions) if caption not in self.row]
        if unknown and self.lm is None:
            raise UserError(f"--states {self.file} lacks the caption {unknown[0]!r}: make the file from the same data")
        if unknown:
            device = next(self.lm.parameters()).device
            prompts = Prompts(self.tokenizer, self.max_length, self.end)
            new = compute_states(self.lm, prompts, unknown, device=device)
            self.row |= {text: len(self.states) + i for i, text in enumerate(unknown)}
            self.states = torch.cat([self.states, new.to(self.states)])
        return (self.states[[self.row[caption] for caption in captions]],)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """Number of tokens with which all texts start; the last token of the shortest text is not counted."""
    shortest = min(map(len, texts))
    columns = zip(*(text[: shortest - 1] for text in texts), strict=True)
    return sum(1 for _ in itertools.takewhile(lambda tokens: len(set(tokens)) == 1, columns))


@torch.no_grad()
def compute_states(
    lm: nn.Module,
    prompts: Prompts,
    captions: Sequence[str],
    batch_size: int = 32,
    device: str | torch.device = "cpu",
) -> Tensor:
    """States of captions (N, d): the last block's residual stream after attention, at the last token of each prompt.

    Computed in the number type of the LM's weights, returned as float32.
    """
    from transformers import DynamicCache

    renamed = "cache" in inspect.signature(lm.model.forward).parameters  # renamed during transformers 5
    keyword = "cache" if renamed else "past_key_values"
    device, texts = torch.device(device), prompts.ids(captions)
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


# ------------------------------------------------------------------------------------------------------------- encoding


@torch.no_grad()
def encode_texts(
    model: LexVLA, read: Callable, texts: Sequence[str], batch_size: int = 256, device="cpu", dtype=torch.float32
) -> Tensor:
    """Representations of captions (N, V), or (N, E) of the latent baseline; `read` makes the text tower's input."""
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    with torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32):
        return torch.cat([model.text(*(x.to(device) for x in read(batch))).float().cpu() for batch in batches])


# ----------------------------------------------------------------------------------------------------------- vocabulary


def leading_space(tokenizer) -> str:
    """A space if the tokenizer marks word starts by it (SmolLM2), nothing if the tokenizer adds it itself (Llama)."""
    return "" if tokenizer.tokenize("a")[0] == "▁a" else " "


def pieces(tokenizer, ids: Iterable[int]) -> list[str]:
    """The tokenizer's pieces with these ids; a leading space stands for the start of a word."""
    return [str(piece).replace("▁", " ").replace("Ġ", " ") for piece in tokenizer.convert_ids_to_tokens(list(ids))]


def piece_counts(tokenizer, captions: Iterable[str]) -> Tensor:
    """(V,) int64: how often each piece of the tokenizer occurs in the captions."""
    size, space = len(tokenizer), leading_space(tokenizer)
    counts, captions = torch.zeros(size, dtype=torch.long), iter(captions)
    while batch := list(itertools.islice(captions, 10_000)):
        ids = tokenizer([space + caption for caption in batch], add_special_tokens=False)["input_ids"]
        counts += torch.bincount(torch.tensor(list(itertools.chain(*ids)), dtype=torch.long), minlength=size)
    return counts


def caption_vocabulary(
    tokenizer, counts: Tensor, min_count: int = 1, max_size: int | None = None, pattern: str | None = None
) -> Tensor:
    """Token ids to keep, from the counts (V,) of all pieces: `refine_vocabulary` without special and byte pieces.

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


# ----------------------------------------------------------------------------------------------------------- the script


def texts_of(cfg: Config) -> list[str]:
    """The distinct captions and class names to encode."""
    pairs = data.open_pairs(cfg.data)
    data.say_left_out(pairs)
    texts = [pairs.caption(row) for row in range(len(pairs))]
    for folder in cfg.sets:
        if (Path(folder) / "masks").is_dir():
            texts += (Path(folder) / "classnames.txt").read_text(encoding="utf-8").splitlines()
            continue
        eval_set = EvalSet(folder, lambda image: torch.zeros(1))
        texts += eval_set.classnames or [text for _, _, captions in eval_set for text in captions]
    return list(dict.fromkeys(filter(None, texts)))


def check_made(cfg: Config) -> None:
    """UserError if the finished file was made with other settings, or lacks captions of the data."""
    kept = States(cfg.out, cfg.lm, cfg.max_length, cfg.prompt_end)
    if kept.precision not in (None, cfg.precision):
        raise UserError(
            f"{cfg.out} was made with precision {kept.precision!r}, not {cfg.precision!r}: choose another --out, or"
            " remove it"
        )
    if lacking := [text for text in texts_of(cfg) if text not in kept.row]:
        raise UserError(
            f"{cfg.out} lacks {len(lacking):,} captions of --data and --sets, such as {lacking[0][:80]!r}: it was made"
            " from other data; choose another --out, or remove it"
        )


def main(cfg: Config) -> None:
    cli.check_counts(cfg, "batch_size", "max_length")
    out = Path(cfg.out)
    if out.exists():
        check_made(cfg)
        return print(f"{out} is there already")
    process = run.setup(0, cfg.device)
    texts = texts_of(cfg)
    lm, tokenizer = load_lm(cfg.lm, run.DTYPES[run.resolve_precision(cfg.precision, process.device)])
    lm.eval().requires_grad_(False).to(process.device)
    prompts = Prompts(tokenizer, cfg.max_length, cfg.prompt_end)
    states = compute_states(lm, prompts, texts, cfg.batch_size, process.device)
    out.parent.mkdir(parents=True, exist_ok=True)
    made = made_with(cfg.lm, cfg.max_length, cfg.prompt_end)
    made |= {"precision": cfg.precision, "lm_sample": lm_sample(lm)}
    checkpoints.save_checkpoint(out, made | {"texts": texts, "states": states})
    print(f"{len(texts):,} captions written to {out}")


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config)))
