"""One head with several seeds: `python -m studies.nmtune_heads --run RUN`, after `nmtune.train` has tuned RUN.

NMTune (arXiv 2309.17002). The authors tune each head with one seed. On features in memory, tuning is quick, so a study
can have many heads for each of its seeds. This script tunes the run's head again with the seeds that follow its own, as
`nmtune.train` would, and writes the accuracies of all heads to RUN/heads.json; `nmtune.eval --report` compares their
means.
"""

import dataclasses
from pathlib import Path

import tyro

from nmtune.config import Config, HeadStudyConfig
from nmtune.eval import test_metrics
from nmtune.features import RunFeatures
from nmtune.model import head_from
from nmtune.train import tuned_head
from shared import checkpoints, cli, evaluation, run
from shared.errors import UserError
from shared.settings import check_limits


def main(cfg: HeadStudyConfig) -> None:
    """Write heads.json, {"seeds", "sources", "tests": {"TEST/METRIC": one number per seed}}, unless it has these seeds
    of the same head and features."""
    process = run.setup(0, cfg.device)
    check_limits(cfg)
    folder = Path(cfg.run)
    state = checkpoints.load_checkpoint(folder / "checkpoint.pt")
    first = checkpoints.config_in(state, Config, folder)
    if state["epoch"] < first.epochs:
        raise UserError(f"{folder} is not finished: {state['epoch']} of {first.epochs} epochs")
    seeds = list(range(first.seed, first.seed + cfg.heads))
    file, encoder = folder / "heads.json", Path(first.encoder) / "checkpoint.pt"
    weights = [folder / "checkpoint.pt", encoder, *map(Path, filter(None, (first.features, first.checkpoint)))]
    made_of = {"seeds": seeds, "sources": evaluation.stamp(weights)}
    if file.exists() and made_of.items() <= checkpoints.read_json(file).items():
        print(f"{file} exists for this checkpoint and these seeds; nothing to do")
        return
    source = RunFeatures(first, process, run.resolve_precision(first.precision, process.device))
    source.encode_training_set()
    if source.bank is None:
        raise UserError(f"{folder} drew new views in every step: tune it on --features, --bank V or --views eval")
    if state["data"] != source.fingerprint:
        raise UserError(f"{folder} was trained on other data than there is now: tune it again with another --out")
    first, tests = dataclasses.replace(first, **state["chosen"]), {}
    for seed in run.progress(seeds, len(seeds), f"{folder.name} heads", 1, process):
        if seed == first.seed:
            head = head_from(state["head"]).to(process.device)
        else:
            cfg_of_seed = dataclasses.replace(first, seed=seed)
            head = tuned_head(cfg_of_seed, source.bank, len(source.classnames), source.views, process.device)
        for metric, value in test_metrics(head, source).items():
            tests.setdefault(metric, []).append(value)
    checkpoints.write_json(file, made_of | {"tests": tests})


if __name__ == "__main__":
    cli.command_line(lambda: main(tyro.cli(HeadStudyConfig)))
