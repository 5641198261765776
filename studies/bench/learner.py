"""How fast a small CLIP learns the names of emoji: pilots for the towers and views of the studies' presets.

    python -m studies.bench.learner --what "one convolution a stage" --seeds 100 101
    python -m studies.bench.learner --table

Trains on one core, on all training styles but HELD_OUT, whose drawings then measure it: the studies' unseen style stays
unseen while settings are chosen. Each run adds a line to studies/bench/learner.jsonl; --table writes their means into
studies/bench/records.md.
"""

import contextlib
import json
import tarfile
import time
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path
from unittest import mock

import numpy as np
import open_clip
import pandas as pd
import torch
import torch.nn.functional as F
import tyro
from scipy import stats
from torchvision import transforms

from protoclip.config import PRESETS
from protoclip.model import create_model
from protoclip.train import learning_rates, parameter_groups, train_step
from protoclip.views import whole_image
from shared import clip, data, evaluation, run, zeroshot
from shared.corpus import Corpus
from shared.evalsets import EvalSet
from shared.views import SmallView

TRAIN, TEST, HELD_OUT = "data/emoji/train_names", "data/emoji/eval/bare_names_ood", "fxemoji"
RECORDS = Path(__file__).with_suffix(".jsonl")
PAGE = """# Records of the small learner

`python -m studies.bench.learner`: a CLIP from random weights names the drawings of a training style that is held out,
by 1,595 names. `held_out` is top-1 in percent, `core_seconds` the time of training on one core; means of runs with
different seeds, `sd` their standard deviation, `p` of Welch's test that a row's mean score is the first row's.
The rows took turns, seed by seed, on one machine, two processes at a time: {machine}.

"""
RESULTS = ["core_seconds", "held_out"]


@dataclass
class Pilot:
    what: str = "the presets' towers and views"
    """What is tried, in words; runs with the same words are one row of the table."""
    seeds: tuple[int, ...] = (100,)
    model: str = "ConvNet-emoji"
    """open_clip config."""
    view: str = "small"
    """small: shared/views.py. crop: a crop of 0.5 to 1 of the picture with a white border, no colours."""
    averaging: bool = True
    """The text tower starts as the average of its tokens' embeddings."""
    replacement: bool = False
    """Draw the samples of a pass with replacement, as ProtoCLIP draws its episodes, not in a permutation."""
    steps: int = 140
    lr: float = 6e-3
    warmup: int = 20
    table: bool = False
    """Write the table of all runs and end."""


def styles() -> np.ndarray:
    """(N,) style of each training sample, in the order of the data."""
    found = []
    for shard in sorted(Path(TRAIN).glob("*.tar")):
        with tarfile.open(shard) as tar:
            found += [json.load(tar.extractfile(file))["style"] for file in tar if file.name.endswith(".json")]
    return np.array(found)


def pilot(settings: Pilot, seed: int) -> dict[str, float]:
    """Train and measure one run: seconds of a core for training, data included, and top-1 on the held-out style."""
    cfg = replace(
        PRESETS["emoji-clip"][1], seed=seed, data=TRAIN, precision="bf16", lr=settings.lr, warmup=settings.warmup,
        episodes=1, episode_size=512 * settings.steps,
    )  # fmt: skip
    process = run.setup(seed, "cpu")
    torch.set_num_threads(1)
    with contextlib.nullcontext() if settings.averaging else mock.patch.object(clip, "average_at_start"):
        model = create_model(settings.model, heads=False)
    tokenizer = clip.RememberingTokenizer(open_clip.get_tokenizer(settings.model, context_length=model.context_length))
    corpus = Corpus(cfg, process, lambda pair: tokenizer([pair.caption])[0], cut_padding=True, side=64)
    held_out, size = styles() == HELD_OUT, clip.image_side(model)
    view = SmallView(size, *clip.STATISTICS)
    if settings.view == "crop":
        crop = transforms.RandomResizedCrop(size, (0.5, 1.0), (0.85, 1.18), transforms.InterpolationMode.BICUBIC)
        view = transforms.Compose([transforms.Pad(6, 255), crop, data.ToNormalizedTensor(*clip.STATISTICS)])

    def batches():
        for epoch in count():
            rows = np.flatnonzero(~held_out)
            if settings.replacement:
                rows = np.random.default_rng((seed, epoch)).choice(rows, len(rows))
            yield from islice(corpus.batches(rows, view, seed=(seed, epoch)), len(rows) // cfg.batch_size)

    optimizer = torch.optim.AdamW(parameter_groups(model, cfg.weight_decay), lr=cfg.lr, **cfg.adamw, fused=True)
    scaler, start = run.grad_scaler(cfg, process), time.process_time()
    model.train()
    for step, batch in enumerate(islice(batches(), settings.steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rates(cfg, step)["lr_rest"]
        train_step(model, batch, None, (0.0, 0.0), optimizer, scaler, cfg)
    seconds = time.process_time() - start

    names = EvalSet(TEST, None).classnames
    number, whole = {name: i for i, name in enumerate(names)}, whole_image(model.eval())
    pairs = [corpus.pairs.read(row) for row in np.flatnonzero(held_out)]
    pairs = [pair for pair in pairs if pair.caption in number]
    with torch.no_grad():
        classes = zeroshot.build_classifier(model.encode_text, tokenizer, names, ["{c}"], 256, process.device)
        images = F.normalize(model.encode_image(torch.stack([whole(pair.image) for pair in pairs])), dim=1)
    labels = torch.tensor([number[pair.caption] for pair in pairs])
    hits = zeroshot.label_ranks(images, labels, classes) < 1
    return {"core_seconds": round(seconds, 1), "held_out": round(100 * hits.float().mean().item(), 1)}


def page() -> str:
    """Markdown: PAGE and the means over the seeds of each row."""
    runs = pd.read_json(RECORDS, lines=True)
    groups = runs.groupby("what", sort=False)
    columns = {"steps": groups["steps"].first(), "seeds": groups.size(), **{k: groups[k].mean() for k in RESULTS}}
    scores = groups["held_out"]
    first = scores.get_group(runs["what"][0])
    p = scores.apply(lambda of: stats.ttest_ind(of, first, equal_var=False).pvalue).map("{:.1g}".format)
    rows = pd.DataFrame({**columns, "sd": scores.std(), "p": p}).round(1).reset_index()
    return f"{PAGE.format(machine='; '.join(runs['machine'].unique()))}{evaluation.table(rows.to_dict('records'))}\n"


def main(settings: Pilot) -> None:
    if settings.table:
        RECORDS.with_name("records.md").write_text(page(), encoding="utf-8")
        return
    for seed in settings.seeds:
        made = {name: value for name, value in asdict(settings).items() if name not in ("seeds", "table")}
        line = json.dumps(made | {"seed": seed} | pilot(settings, seed) | {"machine": run.machine()})
        with RECORDS.open("a", encoding="utf-8") as file:
            print(line, file=file)
        print(line)


if __name__ == "__main__":
    main(tyro.cli(Pilot, description=__doc__))
