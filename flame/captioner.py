"""Caption your own images with any image-to-text model: `python -m flame.captioner --data SHARDS --out short.json`.

The paper has MiniCPM-Llama3-V-2.5 write a short and a long caption of every image; the instructions given to it are
not published. Here any model that transformers loads by `AutoModelForImageTextToText` writes such a file, a list of
{"__key__": sample, "caption": text}. `flame.embed` reads it as --short or --long: run this script twice, with one
instruction for each. Captions are first written in shards of --shard-size images: an interrupted run resumes at the
first missing shard, and torchrun distributes the shards. OUT.about.json holds the settings of a finished file.
"""

import dataclasses
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from PIL import Image

from shared import checkpoints, cli, data, evaluation, run
from shared.errors import UserError


@dataclasses.dataclass
class Config:
    data: str = ""
    """Shards, or one .tsv, whose images are described; their keys name the captions."""
    out: str = "data/flame/own/short.json"
    """Caption file to write. Its shards lie in OUT.shards until it is complete."""
    dataset_size: int | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    model: str = "Salesforce/blip-image-captioning-base"
    """Hugging Face id or folder of an image-to-text model."""
    instruction: str | None = None
    """Instruction for a chat model, such as "Describe the image in a sentence."; a plain captioner continues this text.
    None: a plain captioner starts without text, and a chat model is asked for a description."""
    max_length: int = 64
    """Maximum number of tokens generated for a caption."""
    batch_size: int = 16
    """Images per forward pass."""
    shard_size: int = 1024
    """Images per shard of captions; an interrupted run resumes at the next shard."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: str = "auto"
    """Number type of the model: bf16, fp16, fp32, or auto."""


class Captioner:
    """Images -> captions, by a model and processor of transformers; decoding is greedy, so runs give equal captions."""

    def __init__(self, model: torch.nn.Module, processor: Any, instruction: str | None, max_length: int):
        self.model, self.processor, self.max_length = model.eval(), processor, max_length
        self.converses = getattr(processor, "chat_template", None) is not None
        self.text = instruction
        if self.converses:
            processor.tokenizer.padding_side = "left"  # generation starts after the prompt's last token
            asked = [{"type": "image"}, {"type": "text", "text": instruction or "Describe this image."}]
            turns = [{"role": "user", "content": asked}]
            self.text = processor.apply_chat_template(turns, add_generation_prompt=True)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> list[str]:
        texts = {} if self.text is None else {"text": [self.text] * len(images), "padding": True}
        pictures = [[image] for image in images] if self.converses else list(images)
        inputs = self.processor(images=pictures, return_tensors="pt", **texts)
        inputs = inputs.to(self.model.device, self.model.dtype)
        ids = self.model.generate(**inputs, max_new_tokens=self.max_length, do_sample=False)
        if self.converses:
            ids = ids[:, inputs["input_ids"].shape[1] :]
        return [" ".join(text.split()) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]


def load_captioner(cfg: Config, device: torch.device) -> Captioner:
    """Load the captioner named by `cfg`. UserError if it cannot be loaded."""
    import transformers

    transformers.logging.set_verbosity_error()
    dtype = run.DTYPES[run.resolve_precision(cfg.precision, device)]
    try:
        processor = transformers.AutoProcessor.from_pretrained(cfg.model)
        model = transformers.AutoModelForImageTextToText.from_pretrained(cfg.model, dtype=dtype)
    except (OSError, ValueError) as error:
        what = checkpoints.one_line(error, 200)
        raise UserError(f"--model {cfg.model} could not be loaded as an image-to-text model: {what}") from error
    return Captioner(model.to(device), processor, cfg.instruction, cfg.max_length)


def described(
    pairs: data.Shards | data.TSV, samples: range, captioner: Captioner, cfg: Config,
    tick: Callable[[int], object] = lambda count: None,
) -> list[dict[str, str]]:  # fmt: skip
    """Entries of the caption file for these samples. An unreadable image gets an empty caption."""
    found = {}
    for first in range(samples.start, samples.stop, cfg.batch_size):
        images = {}
        for i in range(first, min(first + cfg.batch_size, samples.stop)):
            try:
                images[i] = pairs.read(i).image
            except data.BrokenSample:
                found[i] = ""
        if images:
            found |= dict(zip(images, captioner(list(images.values())), strict=True))
        tick(min(cfg.batch_size, samples.stop - first))
    return [{"__key__": str(pairs.keys[i]), "caption": found[i]} for i in samples]


def main(cfg: Config) -> None:
    process = run.setup(0, cfg.device)
    cli.check_counts(cfg, "batch_size", "shard_size", "max_length", "dataset_size")
    if not cfg.data:
        raise UserError("--data is missing: it takes image-text shards, e.g. --data 'mine/{00000..00009}.tar'")
    pairs = data.open_pairs(cfg.data, cfg.dataset_size)
    out, shards, setting = Path(cfg.out), Path(f"{cfg.out}.shards"), dataclasses.asdict(cfg)
    setting["data"] = evaluation.images_of(pairs)
    for name in ("out", "device", "batch_size", "dataset_size"):
        del setting[name]
    finished, made = out.exists(), Path(f"{out}.about.json")
    about = made if finished else shards / "about.json"
    if process.main and about.exists() and checkpoints.read_json(about) != setting:
        there = out if finished else shards
        raise UserError(f"{there} holds captions of other settings or data: remove it, or choose another --out")
    if finished:
        return print(f"{out} is there already; nothing to do") if process.main else None
    if process.main:
        data.say_left_out(pairs)
        checkpoints.write_json(about, setting)
    run.wait()
    starts = range(0, len(pairs), cfg.shard_size)
    mine = [start for start in starts[process.rank :: process.world_size] if not (shards / f"{start}.json").exists()]
    captioner = load_captioner(cfg, process.device) if mine else None
    samples_of = {start: range(start, min(start + cfg.shard_size, len(pairs))) for start in mine}
    with run.counting(sum(map(len, samples_of.values())), cfg.out, "image", process) as tick:
        for start, samples in samples_of.items():
            captions = described(pairs, samples, captioner, cfg, tick)
            checkpoints.write_json(shards / f"{start}.json", {"captions": captions})
    run.wait()
    if process.main:
        of_shards = (checkpoints.read_json(shards / f"{start}.json")["captions"] for start in starts)
        entries = [entry for of_shard in of_shards for entry in of_shard]
        checkpoints.write_json(made, setting)
        checkpoints.write_json(out, entries)
        shutil.rmtree(shards)
        empty = sum(not entry["caption"] for entry in entries)
        print(f"{cfg.out}: {len(entries):,} captions" + (f", {empty:,} of them empty" if empty else ""))


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(Config, description=__doc__)))
