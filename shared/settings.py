"""The settings of every run, once for all papers, and the limits of a setting as part of its type.

@dataclasses.dataclass
class Config(RunConfig):
    episodes: Count = 400
    '''Number of episodes.'''
"""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_type_hints

from shared.errors import UserError
from shared.evalsets import EvalSet
from shared.run import folder_of


class Limits(NamedTuple):
    """Limits of a number; infinity and NaN are always outside."""

    least: float = -math.inf
    above: float = -math.inf
    most: float = math.inf
    below: float = math.inf

    def missed_by(self, number: float) -> str | None:
        """What the number must be; None if it is within the limits."""
        if not math.isfinite(number):
            return "finite"
        if number < self.least:
            return f"at least {self.least}"
        if number <= self.above:
            return f"above {self.above}"
        if number > self.most:
            return f"at most {self.most}"
        return f"below {self.below}" if number >= self.below else None


Count = Annotated[int, Limits(least=1)]
Whole = Annotated[int, Limits(least=0)]
Number = Annotated[float, Limits()]
Rate = Annotated[float, Limits(least=0)]
Positive = Annotated[float, Limits(above=0)]
Share = Annotated[float, Limits(least=0, most=1)]
Beta = Annotated[float, Limits(least=0, below=1)]  # of AdamW


@dataclasses.dataclass
class BaseConfig:
    """Settings of every training script."""

    out: str = ""
    """Run folder: config.json, metrics.jsonl, tensorboard/, checkpoint.pt; by default runs/PAPER/PRESET. With a
    checkpoint in it, the run resumes."""
    data: str = ""
    """Training pairs: shards 'cc3m/{00000..00331}.tar', a folder of them, or a .tsv with columns title and filepath."""
    dataset_size: Count | None = None
    """Number of samples to use, from the start of the data; None uses all."""
    cache: str = "data/cache"
    """Folder for copies of remote shards and for indices."""
    keep_in_memory: bool = False
    """Decode a small corpus once. Off: decode every sample at every step."""
    distinct_captions: bool = False
    """No batch holds a caption twice, as far as the samples allow."""
    stream: bool = False
    """Read the shards in a shuffled order by webdataset's pipeline: for data that are remote or larger than the disk.
    Needs --dataset-size. Off: read samples by row."""
    workers: Whole = 8
    """Loader processes per training process; they do not change the order of samples."""
    strict: bool = False
    """Stop at the first broken sample instead of counting and replacing it."""

    batch_size: Count = 512
    """Samples per step, over all processes together."""
    accumulate: Count = 1
    """Micro-batches a step, to save memory. Gradients equal those of one batch, except that batch norms normalise each
    micro-batch separately; the forward pass runs twice."""
    grad_checkpointing: bool = False
    """Recompute the towers' activations in the backward pass: less memory, one more forward pass."""
    seed: Whole = 0
    """Seed of initial weights, samples, shuffles and views."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    """auto: bf16 where the processor supports it. Losses are always in fp32."""

    save_every: Count = 1000
    """Steps between checkpoints; there is one at the end, too."""
    keep_every: Whole = 0
    """Keep the checkpoint of every N-th step as checkpoint-STEP.pt; 0 keeps none."""
    log_every: Count = 10
    """Steps between lines of metrics.jsonl."""
    dry_run: bool = False
    """Print sizes, schedule and a memory estimate, and stop; needs no data."""

    def check(self, world_size: int) -> None:
        """UserError for settings that cannot work, before work starts. A dry run looks at no file."""
        check_limits(self)
        check_batch(self, world_size)
        if self.stream and (self.keep_in_memory or self.distinct_captions):
            raise UserError("--stream reads a corpus that fits neither memory nor disk: leave out --keep-in-memory and "
                            "--distinct-captions")  # fmt: skip
        if self.stream and not self.dataset_size:
            raise UserError("--stream needs --dataset-size, the number of samples of an epoch")
        if not self.dry_run:
            check_data(self.data)


@dataclasses.dataclass
class RunConfig(BaseConfig):
    """Settings of a training script that evaluates zero-shot between its passes."""

    eval_every: Whole = 0
    """Passes between zero-shot evaluations on `eval_set`, with class names as prompts; 0: never during training."""
    eval_set: str = ""
    """Classification set in the CLIP-benchmark webdataset layout, for `eval_every`."""

    def check(self, world_size: int) -> None:
        super().check(world_size)
        if not self.dry_run:
            check_eval_set(self)


# -------------------------------------------------------------------------------------------------------------- checks


def check_limits(cfg: Any) -> None:
    """UserError that names the first field outside the limits of its type. None passes."""
    for name, hint in get_type_hints(type(cfg), include_extras=True).items():
        value = getattr(cfg, name)
        for number in value if isinstance(value, tuple) else (value,):
            for limits in limits_of(hint) if isinstance(number, (int, float)) else ():
                if what := limits.missed_by(number):
                    raise UserError(f"--{name.replace('_', '-')} must be {what}, not {number}")


def limits_of(hint: Any) -> list[Limits]:
    """The limits in a type such as `Count` or `Count | None`."""
    own = [note for note in getattr(hint, "__metadata__", ()) if isinstance(note, Limits)]
    return own + [limits for part in get_args(hint) if part is not hint for limits in limits_of(part)]


def check_batch(cfg: Any, world_size: int) -> None:
    """UserError if the batch cannot be divided evenly over processes and micro-batches."""
    if cfg.batch_size % (equal := world_size * cfg.accumulate):
        next_size = (cfg.batch_size // equal + 1) * equal
        each = f" and {cfg.accumulate} micro-batches in each" if cfg.accumulate > 1 else ""
        shares = f"{world_size} processes{each}"
        raise UserError(f"--batch-size {cfg.batch_size} cannot be divided evenly among {shares}; {next_size} can")


def check_max_length(length: int, model: Any, tokenizer: Any, name: str) -> None:
    """UserError if a Hugging Face model takes fewer tokens than --max-length.

    Its tokenizer's limit counts, too: RoBERTa has 514 positions, but the first two are not for tokens.
    """
    most = min(getattr(model.config, "max_position_embeddings", None) or length, tokenizer.model_max_length)
    if length > most:
        raise UserError(f"--max-length {length} is more than the {most} tokens that {name} takes")


BUILT = {  # corpora that commands build: folder -> the command
    "data/emoji": "'make data' builds the embedded corpus",
    "data/scenes": "'make scenes' builds the scenes",
}


def check_data(data: str) -> None:
    """UserError if --data is missing, or names a corpus that is not built yet."""
    if not data:
        raise UserError(
            "--data is missing: it takes image-text shards in img2dataset layout, e.g. --data "
            "'cc3m/{00000..00331}.tar'; 'python -m shared.pack' makes them of your own pictures"
        )
    folder = Path(str(folder_of(data)).partition(":")[0])  # before the split in DIR:SPLIT
    if folder.is_relative_to("data") and not folder.exists():
        advice = next((advice for built, advice in BUILT.items() if folder.is_relative_to(built)), None)
        raise UserError(f"{data} does not exist: {advice or 'the study that trains on it (make help) builds it'}")


def check_eval_set(cfg: Any) -> None:
    """UserError if --eval-every is on and --eval-set is missing or no classification set."""
    if cfg.eval_every and not cfg.eval_set:
        raise UserError("--eval-set is missing: --eval-every needs a folder in the CLIP-benchmark layout")
    if cfg.eval_every and not Path(cfg.eval_set).is_dir():
        raise UserError(f"--eval-set {cfg.eval_set} does not exist: name a folder, or pass --eval-every 0")
    if cfg.eval_every and (kind := EvalSet(cfg.eval_set, None).kind) != "classification":
        raise UserError(f"--eval-set {cfg.eval_set} is a {kind} set: it must be a classification set")
