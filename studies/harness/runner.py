"""Runs a study: trains each arm of a paper with each seed, in parallel, then evaluates and compares them.

studies/PAPER.py declares a `Study`; `python -m studies.PAPER` (`make reproduce-PAPER`) runs it. Arms are commands
that resume by themselves. If an arm needs the run of a stage or of another arm, that is trained first.
"""

import contextlib
import importlib
import importlib.util
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

from shared import cli, evaluation
from shared.checkpoints import read_json, write_json
from shared.errors import UserError
from shared.run import QUIET, cores
from studies.harness import logs, protocol, report
from studies.harness.floors import Floor
from studies.harness.verdicts import Claim

PLACE = re.compile(r"\{([^}]+)\}")  # {seed}, {out}, or {NAME}: run folder of this stage or arm with the same seed

# --------------------------------------------------------------------------------------------- what a study declares


@dataclass(frozen=True)
class Stage:
    """A command that runs for each seed and makes what arms need; its own result is not compared.

    `command` is the text after `python -m PAPER.`: script, preset, overrides; or the text after `python -m `, if it
    starts with `studies.`. `{captioner}` stands for the run folder
    of the stage or arm named captioner with the same seed, which then runs first. `--seed` and `--out` are appended,
    unless the command contains `{out}`. Several commands run one after the other.
    """

    name: str
    command: str | tuple[str, ...]
    after: tuple[str, ...] = ()  # names of stages and arms that must finish first, if they run at all

    @property
    def commands(self) -> tuple[str, ...]:
        return (self.command,) if isinstance(self.command, str) else self.command

    @property
    def needs(self) -> set[str]:
        """Names of the stages and arms that the commands need."""
        return set(PLACE.findall(" ".join(self.commands))) - {"seed", "out"}


@dataclass(frozen=True)
class Arm(Stage):
    """A stage whose metrics are compared. `heading`: its name in tables; `core`: whether it runs by default."""

    heading: str = ""
    core: bool = True


@dataclass(frozen=True)
class Once:
    """A command that runs before all arms, on all cores, such as one that builds data or computes features.

    It runs at every start of the study, and so must not repeat finished work.

    `command` is the text after `python -m `. With `arms`, it runs only if one of these arms is trained. `{photos}`
    stands for the value of --photos.
    """

    command: str
    arms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Study:
    """Declares what `make reproduce-FOLDER` does and how its results are shown."""

    folder: str
    paper: str
    """The paper's title in results."""
    stands_for: str
    """The paper's data, for which the study's corpus stands in."""
    arms: tuple[Arm, ...]
    minutes: dict[str, float]
    """Measured minutes per seed on two cores, for "core" and "all" arms."""
    evaluate: Callable[[Sequence[str]], list[dict[str, Any]]]
    """Run folders -> {metric: number} of each, in the same order."""
    metrics: dict[str, str]
    """Metrics of the table of arms: key -> heading."""
    alone: bool = False
    """Whether `evaluate` measures each run independently and caches the result; runs are then measured in parallel."""
    derive: Callable[[report.Comparison], None] = lambda found: None
    """Adds metrics that need several runs to `found.arms`, before claims are judged."""
    claims: tuple[Claim, ...] = ()
    """Differences between two arms, or within one, paired by seed."""
    made: Callable[[dict], "Study"] | None = None
    """Results file -> the study as it made these results, if that depends on a choice such as a language model's."""
    seeds: tuple[int, ...] = tuple(range(1000, 1010))
    """Seeds of the runs that count, fixed before any of them."""
    terms: str = ""
    """Abbreviations in the names of primary claims, explained."""
    small: tuple[str, ...] = ()
    """Metrics of primary claims whose sets have fewer than `verdicts.SMALL` pictures. Intervals of those that are no
    means over pictures are over seeds alone."""
    variables_of: Callable[[dict], str] = lambda summary: ""
    """Results file -> the variables of make that reproduce it, such as the language model that was chosen."""
    notes: Callable[[dict], dict[str, str]] = lambda summary: {}
    """Results file -> {claim: what has to be known of its difference, such as that it is a lower bound}."""
    changed: str = ""
    """What arms train since results were committed that were made before the protocol."""
    more_rows: Callable[..., list[dict[str, Any]]] = lambda found: []
    """Further rows of the table of claims, computed from a `report.Comparison`."""
    plot: Callable[[report.Comparison, Path], None] = lambda found, out: None
    """Draws plots into a folder."""
    before: tuple[Once, ...] = ()
    stages: tuple[Stage, ...] = ()
    corpus: str = "Embedded emoji corpus"
    """The training data of the arms, and the data on which their pretrained models were trained."""
    sets: tuple[str, ...] = ()
    """Evaluation sets of the floors. Floors are measured again if a set or one of `floor_files` has changed."""
    floor_files: Callable[[Sequence[int]], Sequence[Path]] = lambda seeds: ()
    """Seeds -> further files that floors are computed from."""
    floors: tuple[Floor, ...] = ()
    """Floors, which the stronger arm of a claim must exceed, and ceilings."""
    upstream: Callable[[Path], dict[str, Any]] | None = None
    """Clone of the authors' repository (--upstream) -> keyword arguments of `more_rows`."""
    on: Literal["emoji", "photos"] = "emoji"
    """Name of the corpus in --corpus. Runs and results on photographs are in runs/photos and results/photos."""
    pilot: str = ""
    """A pilot's name for its folder of runs."""

    @property
    def home(self) -> str:
        """Path of the study's runs and results below runs/ and results/."""
        return self.folder if self.on == "emoji" else f"{self.on}/{self.folder}"

    @property
    def runs(self) -> str:
        """Folder of the runs; pilots have their own."""
        return f"runs/{self.home}/pilots/{self.pilot}" if self.pilot else f"runs/{self.home}"

    def as_in(self, summary: dict) -> "Study":
        """The study as it made these results."""
        return self.made(summary) if self.made else self

    @property
    def headings(self) -> dict[str, str]:
        return {arm.name: arm.heading for arm in self.arms}

    def chosen(self, arms: str) -> list[Arm]:
        """The arms for words separated by spaces: core, all, names of arms. UserError for others."""
        words, known = set(arms.split()), ", ".join(self.headings)
        if unknown := words - {"core", "all"} - set(self.headings):
            raise UserError(f"there is no arm {sorted(unknown)[0]!r}: --arms is core, all, or some of {known}")
        if not words:
            raise UserError(f"--arms names no arm: it is core, all, or some of {known}")
        return [arm for arm in self.arms if "all" in words or arm.core and "core" in words or arm.name in words]

    def jobs(self, arms: Sequence[Stage]) -> list[Stage]:
        """`arms`, and all stages and arms that they need, which come first."""
        known = {job.name: job for job in (*self.stages, *self.arms)}
        found: dict[str, Stage] = {}

        def add(job: Stage) -> None:
            for name in sorted(job.needs, key=list(known).index):
                add(known[name])
            found.setdefault(job.name, job)

        for arm in arms:
            add(arm)
        return list(found.values())

    def out(self, name: str, seed: int) -> str:
        """Run folder of an arm or stage."""
        return f"{self.runs}/{name}-seed{seed}"

    def words(self, job: Stage, seed: int) -> list[list[str]]:
        """The job's commands as lists of words, each starting with the name of the script's module."""

        def fill(match: re.Match) -> str:
            name = match[1]
            return {"seed": str(seed), "out": self.out(job.name, seed)}.get(name) or self.out(name, seed)

        lines = []
        for command in job.commands:
            if "{out}" not in command:
                command += " --seed {seed} --out {out}"
            whole = command if command.startswith("studies.") else f"{self.folder}.{command}"
            lines.append(PLACE.sub(fill, whole).split())
        return lines


# ------------------------------------------------------------------------------------------------- floors and verdicts


def measured_floors(study: Study, path: Path, found: report.Comparison) -> tuple[dict, dict]:
    """({floor: {metric: value}}, {floor: its seeds}) of the floors for the arms in `found`, cached in floors.json.

    Measuring a ceiling takes as long as training an arm, so ceilings are read from the committed results, unless
    `path` replaces these. Only floors that depend on seeds have some: those of the runs.
    """
    committed, kept = Path(f"results/{study.home}.json"), Path(f"{study.runs}/floors.json")
    floors = [floor for floor in study.floors if not floor.arms or set(floor.arms) & found.arms.keys()]
    if not floors:
        return {}, {}
    other = committed.is_file() and path.resolve() != committed.resolve()
    before = read_json(committed).get("floors", {}) if other else {}
    known = {floor.name: before.get(floor.name) for floor in floors if floor.ceiling}
    seeds = {floor.name: found.seeds for floor in floors if floor.by_seed}

    def measure() -> dict[str, dict[str, float]]:
        return {floor.name: known.get(floor.name) or floor.values(seeds.get(floor.name, ())) for floor in floors}

    sources = [file for folder in study.sets for file in evaluation.files_of(folder)]
    sources += study.floor_files(found.seeds if seeds else ())
    setting = {"floors": [floor.name for floor in floors], "known": known, "seeds": seeds}
    return evaluation.measured(f"studies.{study.folder}", kept, setting, sources, measure), seeds


def judged_again(study: Study, summary: dict) -> dict:
    """Results, judged again from their numbers by the study's current claims and rules; the same if only rounding
    differs, since versions of SciPy round quantiles differently.

    Other rows are kept, since judging them may need the runs. All rows are kept if the study lacks a floor
    of the results: without it, an arm that is not above that floor could count as learned.
    """
    study = study.as_in(summary)
    if not set(summary["floors"]) <= {floor.name for floor in study.floors}:
        return summary
    rows = report.rows_again(study, summary, report.by_seed(summary))
    was, now = (
        json.loads(json.dumps(each), parse_float=lambda digits: round(float(digits), 9))
        for each in (summary["claims"], rows)
    )
    return summary if was == now else summary | {"claims": rows}


def compare(study: Study, runs: Sequence[str], results: Sequence[dict], path: Path, **more: Any) -> None:
    """Group runs by arm and seed, judge the claims, print the tables, write `path`, the plots and the logs beside it.

    more: keyword arguments of `Study.more_rows`.
    """
    found = report.compare_runs(runs, results, study.headings)
    study.derive(found)
    floors, seeds = measured_floors(study, path, found)
    rows = report.judged(study, found.arms, floors) + study.more_rows(found, **more)
    rows.sort(key=lambda row: not row["primary"])  # primary claims first
    about = {"corpus": study.corpus, "protocol": protocol.digest(study), "floors": floors, "settings": found.settings}
    about |= {"headings": {arm: study.headings[arm] for arm in found.folders}}
    about |= {"floor_seeds": seeds} if seeds else {}
    about |= {"by_picture": scores} if (scores := report.by_picture(study, found.arms)) else {}
    minutes = core_minutes(study, found.folders, found.seeds)
    about |= {} if minutes is None else {"core_minutes": minutes}
    summary = report.results(study.paper, found, rows, **about)
    write_json(path, summary)
    logs.write(study, found, logs.beside(path))
    report.write_packages(path.with_name(f"{path.stem}_packages.txt"))
    study.plot(found, path.parent)
    report.show(summary, study, path)
    committed = Path(f"results/{study.home}.json")
    if committed.is_file() and committed.resolve() != path.resolve():
        logs.show_band(study, found, committed, path.with_name(f"{study.folder}_band.png"))


# ------------------------------------------------------------------------------------------------------------ training


def in_order(jobs: Sequence[Stage]) -> list[Stage]:
    """Jobs sorted by depth of their dependencies: each comes after those that it waits for."""
    chosen = {job.name: job for job in jobs}

    def depth(job: Stage) -> int:
        return max((1 + depth(chosen[name]) for name in waits_for(job, chosen)), default=0)

    return sorted(jobs, key=depth)


def waits_for(job: Stage, chosen: Container[str]) -> list[str]:
    """Names of the `chosen` jobs that must finish before this one starts."""
    return [name for name in sorted(job.needs | set(job.after)) if name in chosen]


def environment_of(at_once: int) -> dict[str, str]:
    """Environment variables for `at_once` parallel runs, which share the cores.

    If runs in parallel have several threads each, these wait passively (OMP_WAIT_POLICY), since active waiting would
    take the cores of other runs.
    """
    threads = max(cores() // at_once, 1)
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if at_once > 1 and threads > 1 else {}
    return waiting | os.environ | {"OMP_NUM_THREADS": str(threads)}


def clock(study: Study, name: str, seed: int) -> Path:
    """File with the core seconds of a run: {"seconds", "finished"}, written by `clocked`."""
    return Path(f"{study.runs}/seconds/{name}-seed{seed}.json")


@contextlib.contextmanager
def clocked(file: Path, out: Path, cores: int) -> Iterator[None]:
    """Context that adds its seconds times `cores` to `file`, unless a run that has finished is timed again.

    Nothing is added for a run that has a folder `out` but no `file`, since its earlier time is not known.
    """
    kept = read_json(file) if file.is_file() else {"seconds": 0.0, "finished": out.exists()}
    start, finished = time.perf_counter(), False
    try:
        yield
        finished = True
    finally:
        if not kept["finished"]:
            file.parent.mkdir(parents=True, exist_ok=True)
            seconds = kept["seconds"] + cores * (time.perf_counter() - start)
            write_json(file, {"seconds": seconds, "finished": finished})


def core_minutes(study: Study, arms: Container[str], seeds: Sequence[int]) -> float | None:
    """Minutes of one core for a seed of these arms and their stages, or None if a run's time is not known."""
    jobs = study.jobs([arm for arm in study.arms if arm.name in arms])
    files = [clock(study, job.name, seed) for job in jobs for seed in seeds]
    clocks = [read_json(file) for file in files if file.is_file()]
    if len(clocks) < len(files) or not all(each["finished"] for each in clocks):
        return None
    return sum(each["seconds"] for each in clocks) / 60 / len(seeds)


RUNNING: set[subprocess.Popen] = set()
PATIENCE = 3.0  # seconds between the signals that end interrupted scripts


def run_script(words: Sequence[str], environment: Mapping[str, str]) -> None:
    """Run `python -m WORDS` with our stdout and stderr; threads may do so in parallel. UserError if it fails."""
    process = subprocess.Popen([sys.executable, "-m", *words], env=environment)
    RUNNING.add(process)
    try:
        code = process.wait()
    finally:
        RUNNING.remove(process)
    if code:
        failed = f"'python -m {' '.join(words)}' failed (exit code {code})"
        raise UserError(f"{failed}; finished work is kept: run the study again to resume")


def interrupt(futures: Sequence[Future]) -> None:
    """End the scripts that these futures wait for: by SIGINT, which Ctrl+C in a terminal has sent them already, then
    by SIGTERM, then by SIGKILL."""
    signals = itertools.chain((signal.SIGINT, signal.SIGTERM), itertools.repeat(signal.SIGKILL))
    while wait(futures, PATIENCE).not_done:
        stop = next(signals)
        for process in list(RUNNING):
            process.send_signal(stop)


def train(study: Study, arms: Sequence[Arm], seeds: Sequence[int], at_once: int, minutes: float | None) -> None:
    """Train arms and the jobs that they need, `at_once` in parallel. UserError names a failed command."""
    jobs = in_order(study.jobs(arms))
    names = {job.name for job in jobs}
    environment = environment_of(at_once) | {QUIET: "1"}  # lines of parallel runs would mix
    total, start, cores = len(jobs) * len(seeds), time.perf_counter(), int(environment["OMP_NUM_THREADS"])
    begun = sum(Path(study.out(job.name, seed)).exists() for job, seed in itertools.product(jobs, seeds))
    left = "" if minutes is None else f"; about {minutes * len(seeds) * (1 - begun / total):.0f} minutes on two cores"
    print(f"{study.home}: {total} runs, {begun} started before, {at_once} in parallel{left}", flush=True)
    futures: dict[tuple[str, int], Future] = {}
    finished, stopped = itertools.count(1), threading.Event()

    def work(job: Stage, seed: int) -> None:
        for name in waits_for(job, names):
            futures[name, seed].result()
        if stopped.is_set():
            return
        try:
            run_job(study, job, seed, environment, cores)
        except BaseException:
            stopped.set()
            raise
        done, minutes = next(finished), (time.perf_counter() - start) / 60
        left = f"{minutes:.1f} minutes so far, about {minutes / done * (total - done):.0f} left"
        print(f"[{done}/{total}] {study.out(job.name, seed)}: {left}", flush=True)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for job, seed in itertools.product(jobs, seeds):
                futures[job.name, seed] = pool.submit(work, job, seed)
            wait(futures.values())  # after a failure, runs that have begun may end
        except KeyboardInterrupt:
            print("interrupted; finished work is kept: run the study again to resume", file=sys.stderr, flush=True)
            stopped.set()
            interrupt(list(futures.values()))
            raise
    for future in futures.values():
        future.result()


def run_job(study: Study, job: Stage, seed: int, environment: dict[str, str], cores: int) -> None:
    """Run the commands of a stage or an arm, and keep their time. UserError names one that failed."""
    commands = study.words(job, seed)
    if study.alone and isinstance(job, Arm):
        corpus = [] if study.on == "emoji" else ["--corpus", study.on]
        commands.append([f"studies.{study.folder}", *corpus, "--measure", study.out(job.name, seed)])
    with clocked(clock(study, job.name, seed), Path(study.out(job.name, seed)), cores):
        for words in commands:
            run_script(words, environment)


def prepare(study: Study, arms: Sequence[str], photos: str | None = None) -> None:
    """Run the study's commands that run once before these arms. UserError names a failed command."""
    for once in study.before:
        if not once.arms or set(arms) & set(once.arms):
            run_script([word.replace("{photos}", str(photos)) for word in once.command.split()], os.environ)


# -------------------------------------------------------------------------------------------------------- command line


@dataclass
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm; 100 to 199 are pilots, whose settings and scores are added to results/pilots."""
    arms: str = "core"
    """core, all or names of arms, separated by spaces."""
    results: str | None = None
    """File for the results; by default results.json beside the runs."""
    upstream: str | None = None
    """Clone of the authors' repository, for studies that read it."""
    settings: str = ""
    """Settings to try in a pilot, as on the command line of the arms' scripts: --settings='--lr 1e-3'."""
    corpus: Literal["emoji", "photos"] = "emoji"
    """emoji: the embedded corpus. photos: photographs and captions from the folder --photos."""
    photos: str | None = None
    """Folder with flickr8k, multi30k, pacs, cifar10 and coco, each in its authors' layout; only those that the study
    reads are needed."""
    jobs: int = min(cores(), 4)
    """Number of parallel runs; they share the cores."""
    measure: str | None = None
    """Only evaluate this run folder."""


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds without duplicates. UserError if there are none, or one is negative."""
    if not seeds or min(seeds) < 0:
        raise UserError("--seeds names at least one seed, each 0 or more")
    return tuple(dict.fromkeys(seeds))


def check_results(study: Study, path: Path) -> None:
    """UserError if results cannot be written to `path`, or would replace anything but results of this study."""
    if path.suffix != ".json":
        raise UserError(f"--results {path} should end in .json")
    if path.is_dir() or path.parent.is_file():
        raise UserError(f"--results {path} cannot be written there: name a file")
    if path.exists():
        advice = "name another file, or remove that one"
        there = read_json(path, advice)
        if there.get("paper") != study.paper:
            raise UserError(f"--results {path} would replace a file without results of {study.paper}: {advice}")
        if there.get("corpus") != study.corpus:
            other = f"results on another corpus, {there.get('corpus')!r}, or its description has changed"
            raise UserError(f"--results {path} would replace {other}: {advice}")


def check(study: Study, options: Options) -> None:
    """UserError if options do not fit each other or the study."""
    if options.results is not None:
        check_results(study, Path(options.results))
    if options.upstream is not None and study.upstream is None:
        raise UserError(f"{study.folder}'s study does not use a clone: leave out --upstream")
    if study.on == "photos" and options.photos is None:
        raise UserError(
            "--corpus photos needs your own copy of the photographs: --photos DIR (PHOTOS=DIR with make), which holds "
            "flickr8k, pacs, ..."
        )
    if study.on != "photos" and options.photos is not None:
        raise UserError("--photos is used only with --corpus photos (CORPUS=photos with make)")
    if options.photos is not None and not (options.photos and Path(options.photos).is_dir()):
        raise UserError(f"--photos {options.photos!r} is no folder: name the one that holds flickr8k, pacs, ...")
    if options.settings and not protocol.is_pilot(options.seeds):
        raise UserError("--settings is for pilots: --seeds are 100 to 199")
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")


def run(study: Study, options: Options) -> None:
    """Run the whole study: `before`, training, evaluation, comparison."""
    if options.measure is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # results are printed when all runs are compared
            study.evaluate([options.measure])
        return
    arms, seeds = study.chosen(options.arms), checked_seeds(options.seeds)
    check(study, options)
    if protocol.is_pilot(seeds):
        study = protocol.pilot_of(study, options.settings)
        arms = study.chosen(options.arms)
    more = study.upstream(Path(options.upstream)) if options.upstream is not None else {}
    prepare(study, [arm.name for arm in arms], options.photos)
    train(study, arms, seeds, options.jobs, study.minutes.get(options.arms))
    compared = [job for job in study.jobs(arms) if isinstance(job, Arm)]
    runs = [study.out(arm.name, seed) for seed in seeds for arm in compared]
    path, results = Path(options.results or f"{study.runs}/results.json"), study.evaluate(runs)
    compare(study, runs, results, path, **more)
    if protocol.is_pilot(seeds):
        protocol.record(study, path, options.settings)


def study_of(folder: str, on: str = "emoji") -> Study:
    """A paper's study: STUDY of studies/PAPER.py; on photographs its PHOTOS, or that of studies/PAPER_photos.py.
    UserError if it has none on photographs."""
    module = importlib.import_module(f"studies.{folder}")
    if on == "emoji":
        return module.STUDY
    if not hasattr(module, "PHOTOS") and importlib.util.find_spec(f"{module.__name__}_photos"):
        module = importlib.import_module(f"{module.__name__}_photos")
    if not hasattr(module, "PHOTOS"):
        raise UserError(f"{folder} has no study on photographs: leave out --corpus")
    return module.PHOTOS


def main(study: Study) -> None:
    """The command line of a study. SIGTERM ends a study as Ctrl+C does, with the scripts that it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work() -> None:
        options = tyro.cli(Options, description=f"{study.paper}.")
        run(study if options.corpus == study.on else study_of(study.folder, options.corpus), options)

    cli.command_line(work)
