"""Seconds on one core until the baseline of a study is above a floor: a row for which no encoder is trained."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import tyro

from shared import run
from studies.bench import print_row
from studies.harness import runner


class Training(NamedTuple):
    """A finished training.

    cfg: its settings. before: seconds before the clock of its metrics starts, which include reading the corpus in some
    trainings. lines: lines of its metrics; their seconds do not include evaluations.
    """

    cfg: Any
    before: float
    lines: list[dict]


def baseline_rows(
    study: runner.Study,
    arm: str,
    presets: dict[str, tuple[str, Any]],
    train: Callable,
    seeds: int,
    name: str,
    floors: dict[str, str],
    metric: str,
    measure: Callable[[str], float] | None = None,
    without: Sequence[str] = (),
    note: str = "",
    **settings: Any,
) -> None:
    """Train an arm of the study with the seeds 0 .. seeds - 1 (see `trained`), and print its `floor_rows`.

    floors: {name of a goal: name of a floor in the study's table, whose `metric` is the goal}. measure: run folder ->
    percent; None if the training itself logs zero_shot_top1. without: modules of commands in the study's `before` that
    this arm does not need.
    """
    before = tuple(once for once in study.before if once.command.split()[0] not in without)
    runner.prepare(dataclasses.replace(study, before=before), [arm])
    measured = {floor.name: floor.measure()[metric] for floor in study.floors if floor.name in floors.values()}
    goals = {what: (measured[floor], "") for what, floor in floors.items()}
    logged = "zero_shot_top1" if measure is None else metric
    watched = contextlib.nullcontext() if measure is None else evaluated(measure, logged, max(measured.values()))
    with watched:
        trainings = [trained(study, arm, presets, train, seed, **settings) for seed in range(seeds)]
    floor_rows(name, goals, trainings, logged, note)


def trained(
    study: runner.Study, arm: str, presets: dict[str, tuple[str, Any]], train: Callable, seed: int, **settings: Any
) -> Training:
    """Train an arm of the study on a CPU, with empty caches; `settings` override those of the arm."""
    command = next(found.commands[0] for found in study.arms if found.name == arm)
    cfg = tyro.extras.overridable_config_cli(presets, args=command.split()[1:])
    with tempfile.TemporaryDirectory() as folder:
        caches = {"cache": f"{folder}/cache"} if hasattr(cfg, "cache") else {}
        cfg = dataclasses.replace(cfg, **caches, out=f"{folder}/run", seed=seed, device="cpu", **settings)
        start = time.time()
        train(cfg)
        before = (Path(cfg.out) / "config.json").stat().st_mtime - start  # it is written when the clock starts
        return Training(cfg, before, run.read_metrics(cfg.out))


@contextlib.contextmanager
def evaluated(measure: Callable[[str], float], metric: str, goal: float) -> Iterator[None]:
    """Context in which trainings log measure(run folder) as `metric` after each checkpoint, until it is above `goal`,
    and at the end of the training. The time for measuring is not counted."""
    save = run.RunFolder.save

    def save_and_measure(folder: run.RunFolder, step: int, /, *more: Any, **values: Any) -> None:
        save(folder, step, *more, **values)
        found = [(line["step"], line[metric]) for line in run.read_metrics(folder.path, metric)]
        last, percent = found[-1] if found else (0, -math.inf)
        if step > last and (percent <= goal or step == folder.total):
            with folder.clock.paused(), torch.random.fork_rng():
                percent = measure(str(folder.path))
            folder.write(step, **{metric: percent})

    with mock.patch.object(run.RunFolder, "save", save_and_measure):
        yield


def floor_rows(
    name: str,
    goals: dict[str, tuple[float, str]],
    trainings: Sequence[Training],
    metric: str = "zero_shot_top1",
    note: str = "",
) -> None:
    """Print a row per goal {what: (percent, target)}: seconds to the first evaluation above it, infinite if none is."""
    for what, (goal, target) in goals.items():
        seconds, notes = [], []
        for _, before, lines in trainings:
            points = [line for line in lines if metric in line]
            above = next((line for line in points if line[metric] > goal), None)
            total = before + points[-1]["seconds"]
            seconds.append(before + above["seconds"] if above else math.inf)
            there = f"reached at step {above['step']} ({above[metric]:.1f} %)" if above else "not reached"
            notes.append(f"{there}, {points[-1][metric]:.1f} % after all steps in {total:.0f} s")
        cfg, before, lines = trainings[-1]
        steps, first = [line["step"] for line in lines if metric in line], lines[0]
        plan = f"{steps[-1]} steps of {cfg.batch_size} samples, measured every {steps[0]} steps"
        begun = f"step {first['step']} ends after {before + first['seconds']:.0f} s"
        about = "; ".join(filter(None, (f"goal {goal:.1f} %: {'; '.join(notes)}", plan, begun, note)))
        print_row(f"seconds to {what}, {name}", [(value, None) for value in seconds], target, about)
