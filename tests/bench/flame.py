"""FLAME's speed: `python -m tests.bench.flame [--upstream PATH]`.

One process, same inputs, same threads; ours and theirs take turns. Prints a Markdown table of medians, and of the ratio
theirs/ours with its smallest and largest value over the repetitions (above 1: ours is faster). Embedding is with
SmolLM2-135M on captions of the embedded corpus: all facets in one pass against a pass each, and with `--upstream`, a
clone of MIV-XJTU/FLAME@4d2b9a9, against the authors' encoder (same model, same number type). Training is with texts
from a bank, against a step of the image tower alone and against open_clip's step.
"""

import argparse
import contextlib
import dataclasses
import io
import logging
import statistics
import warnings
import zlib
from pathlib import Path
from types import SimpleNamespace

import open_clip
import torch
import torch.nn.functional as F
from open_clip_train.scheduler import cosine_lr
from open_clip_train.train import train_one_epoch

from flame import embed, model, train
from flame.recaption import read_captions
from shared import report, run

from ..parity import check_commit
from ..parity import test_flame as parity
from . import print_row, race

# --------------------------------------------------------------------------------------------------------- embedding


def tokens_of(llm: model.FrozenLLM, captions: list[str], prompt: model.Prompt) -> tuple[int, int]:
    """Tokens of one pass for all facets, and of a pass each."""
    prefix = sum(map(len, llm.prefix_ids(captions, prompt, llm.max_length)))
    facets = sum(map(len, llm.facet_ids(prompt))) * len(captions)
    return prefix + facets, prefix * len(prompt.facets) + facets


def one_pass(llm: model.FrozenLLM, captions: list[str], repetitions: int) -> None:
    prompt = model.LONG
    alone = [model.Prompt(prompt.head, (facet,), k == 0) for k, facet in enumerate(prompt.facets)]

    def ours():
        return embed.embed_batches(llm, captions, prompt)

    def theirs():
        return torch.cat([embed.embed_batches(llm, captions, one) for one in alone], dim=1)

    few, many = tokens_of(llm, captions, prompt)
    name, seconds = race(f"{len(prompt.facets)} facets in one pass against a pass each", ours, theirs, repetitions)
    print_row(name, seconds, f"{0.8 * many / few:.2f} .. {1.2 * many / few:.2f}", f"tokens: {many / few:.2f}")


def against_authors(up, lm, tokenizer, captions: list[str], repetitions: int, batch: int) -> None:
    """The long prompt in their words, on captions of one length and on those of the corpus, in batches as they come."""
    prompt = embed.read_prompts(up.root.parent)[2]
    llm = model.FrozenLLM(lm, tokenizer)
    encoder = parity.their_encoder(up, lm, Encoding(tokenizer), llm.layers[0])
    template = parity.template_of(prompt)

    def theirs(texts: list[str]):
        for start in range(0, len(texts), batch):
            ids = Encoding(tokenizer).batch_encode_plus(texts[start : start + batch]).input_ids
            with torch.no_grad(), contextlib.redirect_stdout(io.StringIO()):
                encoder(ids, "long", True, template, len(prompt.facets), False)

    length = statistics.median_low([len(tokenizer(text)["input_ids"]) for text in captions])
    equal = [tokenizer.decode((tokenizer(text)["input_ids"] * 9)[:length]) for text in captions]
    for name, texts, target in (("of one length", equal, ">= 1"), ("of the corpus", captions, ">= 1.3")):
        own, other = (lambda texts=texts: embed.embed_batches(llm, texts, prompt, batch)), (lambda t=texts: theirs(t))
        print_row(*race(f"long prompt, captions {name}, batches of {batch}", own, other, repetitions), target)


class Encoding:
    """A tokenizer with what their code calls: padding on the left with 0, `batch_encode_plus`."""

    pad_token_id = 0

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, texts, **_):
        return self.batch_encode_plus(texts)

    def batch_encode_plus(self, texts, **_):
        return parity.padded(self.tokenizer(list(texts))["input_ids"])

    def batch_decode(self, rows, **_):
        return [self.tokenizer.decode(row.tolist(), skip_special_tokens=True) for row in rows]


# ---------------------------------------------------------------------------------------------------- training steps


def tower_alone(precision: str, repetitions: int, steps: int, size: int) -> None:
    """A step with texts from the bank against one of the image tower whose loss needs no texts."""
    cfg = dataclasses.replace(train.PRESETS["emoji"][1], precision=precision, batch_size=size)
    network = train.create_model(cfg, 576)
    optimizer = torch.optim.AdamW(train.param_groups(network, 0.2), lr=1e-4, fused=True)
    batches = [
        (torch.randn(size, 3, 32, 32), F.normalize(torch.randn(size, cfg.facets, 576), dim=-1)) for _ in range(steps)
    ]

    def ours():
        for batch in batches:
            train.train_step(network, batch, optimizer, 1e-4, cfg)

    def tower():
        for images, texts in batches:
            optimizer.zero_grad()
            with run.autocast(precision, images.device):
                features = network.encode_image(images, normalize=True)
            (features * texts[:, 0]).sum().backward()
            optimizer.step()

    print_row(*race(f"step, batch {size}, {precision}: image tower alone", ours, tower, repetitions, steps), ">= 0.95")


def clip_step(precision: str, repetitions: int, steps: int, size: int) -> None:
    """FLAME's step, and its trained-text baseline's, against open_clip's with towers of the same sizes."""
    cfg = dataclasses.replace(train.PRESETS["emoji-clip"][1], precision=precision, batch_size=size)
    towers = open_clip.create_model("ViT-emoji-32", output_dict=True)
    flags = SimpleNamespace(
        device="cpu", precision="amp_bf16" if precision == "bf16" else "fp32", distill=False, accum_freq=1, rank=0,
        local_rank=0, world_size=1, horovod=False, distributed=False, skip_scheduler=False, log_every_n_steps=100,
        grad_clip_norm=None, batch_size=size, wandb=False,
    )  # fmt: skip
    images = [torch.randn(size, 3, 32, 32) for _ in range(steps)]
    tokens = torch.zeros(size, 16, dtype=torch.long)
    tokens[:, :12], tokens[:, 12] = torch.randint(1, 49406, (size, 12)), 49407
    theirs_optimizer = torch.optim.AdamW(towers.parameters(), lr=1e-4)
    scheduler = cosine_lr(theirs_optimizer, 1e-4, 10, 1000)
    loss = open_clip.ClipLoss(cache_labels=True)

    class Loader(list):
        num_samples, num_batches = size * steps, steps

    loader = Loader((x, tokens) for x in images)
    data = {"train": SimpleNamespace(dataloader=loader, set_epoch=lambda _: None)}

    def theirs():
        train_one_epoch(towers, data, loss, 1, theirs_optimizer, None, scheduler, None, flags)

    flame_cfg = dataclasses.replace(train.PRESETS["emoji"][1], precision=precision, batch_size=size)
    texts = F.normalize(torch.randn(size, flame_cfg.facets, 576), dim=-1)
    for name, settings, batch in (("FLAME", flame_cfg, texts), ("trained text", cfg, tokens)):
        network = train.create_model(settings, 576)
        optimizer = torch.optim.AdamW(train.param_groups(network, 0.2), lr=1e-4, fused=True)

        def ours(network=network, optimizer=optimizer, settings=settings, batch=batch):
            for x in images:
                train.train_step(network, (x, batch), optimizer, 1e-4, settings)

        note = "with an MLP that theirs lacks" + (", without text encoder" if name == "FLAME" else "")
        print_row(*race(f"step, batch {size}, {precision}: open_clip against {name}", ours, theirs, repetitions, steps),
                  "", note)  # fmt: skip


# ------------------------------------------------------------------------------------------------------------ script


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--upstream", type=Path, help="clone of MIV-XJTU/FLAME at 4d2b9a9")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--captions", type=int, default=64, help="captions embedded a repetition")
    parser.add_argument("--steps", type=int, default=4, help="training steps a repetition")
    options = parser.parse_args()
    if options.upstream is not None and not (options.upstream / "src/open_clip").is_dir():
        parser.error(f"--upstream {options.upstream} is no clone of MIV-XJTU/FLAME")
    long = Path("data/flame/captions/long.json")
    if not long.exists():
        parser.error(f"{long} is missing: run 'python -m flame.recaption' first")
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    run.setup(0, "cpu")
    precision = run.resolve_precision("auto", torch.device("cpu"))
    llm = embed.load_llm(embed.EMOJI)
    every = sorted(set(read_captions(str(long)).values()), key=lambda text: zlib.crc32(text.encode()))
    captions = every[: options.captions]
    print(f"{report.machine()}, {torch.get_num_threads()} threads, LLM in {precision}\n")
    print("| what | ours | theirs | theirs/ours | min .. max | repetitions | target | |\n|" + " --- |" * 8, flush=True)
    one_pass(llm, captions, options.repetitions)
    if options.upstream is not None:
        check_commit(options.upstream, "4d2b9a9")
        up = parity.load(options.upstream)
        lm = SimpleNamespace(model=llm.lm, lm_head=None, base_model=llm.lm, config=llm.lm.config)
        against_authors(up, lm, llm.tokenizer, captions, options.repetitions, 32)
    for name in dict.fromkeys((precision, "fp32")):
        tower_alone(name, options.repetitions, options.steps, 128)
        clip_step(name, options.repetitions, options.steps, 128)
    if options.upstream is None:
        print("\nnot run without --upstream PATH: embedding against the authors' encoder")


if __name__ == "__main__":
    main()
