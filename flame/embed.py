"""The offline stage: encodes every caption once with the frozen LLM. `python -m flame.embed PRESET [--overrides]`.

FLAME (arXiv 2411.11927); authors' code MIV-XJTU/FLAME@4d2b9a9, cited as `U:` with paths under src/
(training/embed_cc3m_mask.py). Captions are streamed block by block into the bank that training reads (bank.py); then
the texts of evaluation sets are embedded (zeroshot.py). An interrupted run resumes at the first missing block; torchrun
distributes the blocks.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flame.bank import BLOCK, mapped
from flame.captions import Captions
from flame.config import EMBED_PRESETS, EmbedConfig
from flame.llm import GEMMA, OURS, SMOLLM2, FrozenLLM, Prompts, embed_captions, llm_digest, load_llm, read_prompts
from flame.zeroshot import texts_of_bank, texts_of_set
from shared import checkpoints, cli, data, run
from shared.errors import UserError
from shared.index import Strings, fingerprint
from shared.settings import check_limits

# ---------------------------------------------------------------------------------------------------------- captions

Column = Callable[[int], str]  # number of a sample -> its caption


def open_captions(cfg: EmbedConfig) -> tuple[Strings, tuple[Column, Column, Column]]:
    """Sample keys, and the raw, short and long caption of each. UserError if a file is missing or of other samples."""
    pairs = data.open_pairs(cfg.data, cfg.dataset_size)
    data.say_left_out(pairs)
    raw: Column = pairs.caption
    if cfg.raw is not None:
        of_raw = Captions(cfg.raw)
        of_raw.check(pairs.keys, cfg.data)
        raw = column(of_raw, pairs.keys, pairs.caption)
    columns = [raw]
    for kind in ("short", "long"):
        path = getattr(cfg, kind)
        if path is None:
            raise UserError(
                f'--{kind} is missing: a file with a JSON list of {{"__key__": sample, "caption": {kind} caption}}, or '
                f"`--{kind} raw` for the raw captions again"
            )
        columns.append(raw if path == "raw" else column(Captions(path), pairs.keys, raw))
    return pairs.keys, tuple(columns)


def column(captions: Captions, keys: Strings, otherwise: Column) -> Column:
    """Captions of the samples `keys`; those that the file lacks are from `otherwise`. UserError if it lacks all."""
    rows = captions.lookup.find(keys)
    missing = np.flatnonzero(rows < 0)
    if missing.size == len(keys):
        captions.check(keys, "--data")
    if missing.size:
        example = keys[int(missing[0])]
        lacks = f"lacks {missing.size:,} of {len(keys):,} samples, such as {example}"
        print(f"{captions.path} {lacks}: raw captions are used")
    return lambda sample: captions.texts[int(rows[sample])] if rows[sample] >= 0 else otherwise(sample)


def distinct_rows(count: int, columns: tuple[Column, ...]) -> tuple[np.ndarray, str]:
    """(row of each of `count` samples in the bank (N,) int64, digest of all captions).

    Samples with the same three captions share a row; rows are in the order of their first samples.
    """
    hashes, empty = np.empty((count, 2), dtype=np.uint64), [0] * len(columns)
    for sample in range(count):
        captions = [column(sample) for column in columns]
        hashes[sample] = np.frombuffer(data.file_hash(json.dumps(captions).encode()), dtype=np.uint64)
        empty = [n + (not caption.strip()) for n, caption in zip(empty, captions, strict=True)]
    for kind, n in zip(("raw", "short", "long"), empty, strict=True):
        if n:
            print(f"{n:,} of {count:,} {kind} captions are empty")
    _, firsts, groups = np.unique(hashes, axis=0, return_index=True, return_inverse=True)
    ranks = np.empty(len(firsts), dtype=np.int64)
    ranks[firsts.argsort()] = np.arange(len(firsts))
    return ranks[groups.reshape(-1)], fingerprint(hashes.tobytes())


# -------------------------------------------------------------------------------------------------------------- bank


def begin(out: Path, keys: Strings, rows: np.ndarray, about: dict, facets: int, llm: Callable[[], FrozenLLM]) -> None:
    """Write the files of an empty bank, unless it was begun before. UserError if it was begun with other settings."""
    about = json.loads(json.dumps(about))
    if (out / "index.json").exists():
        index = checkpoints.read_json(out / "index.json")
        if changed := [name for name in about if index.get(name) != about[name]]:
            raise UserError(
                f"{out} was made with another {', '.join(changed)}: choose another --out, or remove the folder"
            )
        return
    distinct = int(rows.max()) + 1
    checkpoints.save_array(out / "keys.npy", keys.text[: int(keys.ends[-1])])
    checkpoints.save_array(out / "ends.npy", keys.ends)
    checkpoints.save_array(out / "rows.npy", rows)
    checkpoints.save_array(out / "done.npy", np.zeros(-(-distinct // BLOCK), dtype=bool))
    shape = (distinct, facets, llm().dim)
    np.lib.format.open_memmap(out / "embeddings.npy", mode="w+", dtype=np.float16, shape=shape)
    checkpoints.write_json(out / "index.json", about)


def embed_bank(
    cfg: EmbedConfig, prompts: Prompts, digest: str, llm: Callable[[], FrozenLLM], process: run.Process
) -> None:
    """Write the missing blocks of the bank. `digest`: that of the language model; `llm` loads it."""
    out = Path(cfg.out)
    keys, columns = open_captions(cfg)
    rows, captions = run.broadcast(distinct_rows(len(keys), columns) if process.main else None, process)
    about = {"llm": cfg.llm, "digest": digest, "mask": cfg.mask, "precision": cfg.precision, "prompts": prompts}
    about["captions"] = fingerprint(captions.encode(), keys.text[: int(keys.ends[-1])].tobytes())
    facets = sum(len(prompt.facets) for prompt in prompts)
    if is_finished(out):
        begin(out, keys, rows, about, facets, llm)  # compares the settings
        return print(f"{out} holds {len(keys):,} samples already; nothing to do") if process.main else None
    with run.lock(out, process):
        if process.main:
            begin(out, keys, rows, about, facets, llm)
        run.wait()
        embeddings, done = mapped(out / "embeddings.npy"), mapped(out / "done.npy", "r+")
        _, firsts = np.unique(rows, return_index=True)  # a sample of each row
        mine = run.broadcast(np.flatnonzero(~done), process)[process.rank :: process.world_size]
        total, start = 3 * sum(len(firsts[block * BLOCK :][:BLOCK]) for block in mine), time.perf_counter()
        with run.counting(total, str(out), "caption", process) as tick:
            for block in mine:
                samples = firsts[block * BLOCK :][:BLOCK].tolist()
                texts = [[column(sample) for sample in samples] for column in columns]
                found = embed_captions(llm(), *texts, prompts, cfg.batch_size, tick)
                if not found.isfinite().all():
                    raise UserError("the language model gave NaN: use --precision bf16 or fp32")
                write_rows(out / "embeddings.npy", embeddings, block * BLOCK, found.half().numpy())
                done[block] = True
                done.flush()
        seconds = time.perf_counter() - start
        total = sum(run.gather_lists([total], process))  # waits for all blocks
        if process.main:
            print(f"{out}: {total:,} captions in {seconds:.0f} s, {total / max(seconds, 1e-9):.1f} captions/s")


def is_finished(out: Path) -> bool:
    return (out / "index.json").exists() and bool(mapped(out / "done.npy").all())


def write_rows(path: Path, whole: np.memmap, first: int, rows: np.ndarray) -> None:
    """Write rows of the array `whole`, which is in the file `path`, from row `first` on.

    By a file, not by the memory map, whose writes to a full disk would end the process.
    """
    with open(path, "r+b") as file:
        file.seek(whole.offset + first * whole[:1].nbytes)
        file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


# ------------------------------------------------------------------------------------------------------------ script

CAPTIONS, FACETS = 3, 11  # of an image: raw, short and long caption, whose prompts have 1, 3 and 7 facets
DIMS = {"mistralai/Mistral-Nemo-Instruct-2407": 5120, SMOLLM2: 576, GEMMA: 640}


def dry_run(cfg: EmbedConfig) -> None:
    """Print the size of the bank."""
    images = cfg.dataset_size
    if images is None or cfg.llm not in DIMS:
        return print(f"language model {cfg.llm}: per image, {FACETS} embeddings of its width in fp16")
    size = FACETS * 2 * DIMS[cfg.llm]
    print(f"images         {images:,}, {CAPTIONS} captions each, {FACETS} facets")
    print(f"bank           {images * size / 1e9:,.0f} GB, {size:,} bytes an image")


def main(cfg: EmbedConfig) -> None:
    """Write the bank and the embeddings of the evaluation texts."""
    process = run.setup(0, cfg.device)
    check_limits(cfg)
    if cfg.dry_run:
        return dry_run(cfg) if process.main else None
    if not cfg.data:
        raise UserError("--data is missing: it takes the shards that will be trained on, e.g. 'cc3m/{0000..0575}.tar'")
    sets = [texts_of_set(folder) for folder in cfg.sets] if process.main else []  # first, so that errors come early
    prompts = OURS if cfg.prompts == "ours" else read_prompts(cfg.prompts)
    llm = functools.cache(lambda: load_llm(cfg.llm, cfg.mask == "decoupled", cfg.precision, process.device))
    digest = run.broadcast(llm_digest(cfg.llm) if process.main else None, process)
    embed_bank(cfg, prompts, digest, llm, process)
    if sets:
        texts = texts_of_bank(cfg.out, llm)
        for strings, multi in sets:
            texts(strings, multi)  # written to files, for eval.py and for evaluations during training


if __name__ == "__main__":
    cli.command_line(lambda: main(cli.preset_cli(EMBED_PRESETS)))
