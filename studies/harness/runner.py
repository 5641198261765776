"""Runs a study: trains each arm of a paper with each seed, in parallel, then evaluates and compares them.

studies/PAPER.py declares a `Study`; `python -m studies.PAPER` (`make reproduce-PAPER`) runs it. Arms are commands
that resume by themselves. If an arm needs the run of a stage or of another arm, that is trained first.
"""

import contextlib
import dataclasses
import importlib
import importlib.util
import io
import itertools
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, Literal

import tyro

from shared import cli, evaluation
from shared.checkpoints import read_json, write_json
from shared.errors import UserError
from shared.run import QUIET, machine
from studies.harness import report, scripts, verdicts
from studies.harness.floors import Floor
from studies.harness.verdicts import Claim, measured

PLACE = re.compile(r"\{([^}]+)\}")  # {seed}, {out}, or {NAME}: run folder of this stage or arm with the same seed


def equal_but_for_rounding(a: Any, b: Any) -> bool:
    """Whether two JSON values are equal, floats to 1e-9, since versions of SciPy round quantiles differently."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(equal_but_for_rounding(a[name], b[name]) for name in a)
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(equal_but_for_rounding, a, b))
    return a == b


def appended(text: str, separator: str, new: str) -> str:
    """`text`, a list joined by `separator`, with `new` at its end unless it is in the list."""
    return text if new in text.split(separator) else f"{text}{separator}{new}"


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
    derived_from: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """{arm: other arms from whose runs `derive` computes metrics of this arm}."""
    claims: tuple[Claim, ...] = ()
    """Differences between two arms, or within one, paired by seed."""
    claims_of: Callable[[dict], tuple[Claim, ...]] | None = None
    """Results file -> its claims, if they depend on how it was made; by default `claims`."""
    terms: str = ""
    """Abbreviations in the names of primary claims, explained."""
    variables_of: Callable[[dict], str] = lambda summary: ""
    """Results file -> the variables of make that reproduce it, such as the language model that was chosen."""
    more_rows: Callable[..., list[dict[str, Any]]] = lambda found: []
    """Further rows of the table of claims, computed from a `report.Comparison`."""
    plot: Callable[[report.Comparison, Path], None] = lambda found, out: None
    """Draws plots of arms into a folder."""
    plot_arms: Callable[[dict[str, list[dict]], Path], None] = lambda arms, out: None
    """Draws plots that need only the metrics of arms, by seed."""
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
    passes: str = "epoch"
    """Unit in which checkpoints count progress: epoch, episode or step."""
    upstream: Callable[[Path], dict[str, Any]] | None = None
    """Clone of the authors' repository (--upstream) -> keyword arguments of `more_rows`."""
    on: Literal["emoji", "photos"] = "emoji"
    """Name of the corpus in --corpus. Runs and results on photographs are in runs/photos and results/photos."""

    @property
    def home(self) -> str:
        """Path of the study's runs and results below runs/ and results/."""
        return self.folder if self.on == "emoji" else f"{self.on}/{self.folder}"

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
        return f"runs/{self.home}/{name}-seed{seed}"

    def clock(self, name: str, seed: int) -> Path:
        """File with the core seconds of a run: {"seconds", "finished"}, written by `clocked`."""
        return Path(f"runs/{self.home}/seconds/{name}-seed{seed}.json")

    def core_minutes(self, arms: Container[str], seeds: Sequence[int]) -> float | None:
        """Minutes of one core for a seed of these arms and their stages, or None if a run's time is not known."""
        jobs = self.jobs([arm for arm in self.arms if arm.name in arms])
        files = [self.clock(job.name, seed) for job in jobs for seed in seeds]
        clocks = [read_json(file) for file in files if file.is_file()]
        if len(clocks) < len(files) or not all(clock["finished"] for clock in clocks):
            return None
        return sum(clock["seconds"] for clock in clocks) / 60 / len(seeds)

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

    def compare(
        self, runs: Sequence[str], results: Sequence[dict], path: Path, earlier: dict | None = None, **more: Any
    ) -> None:
        """Group runs by arm and seed, judge the claims, print the tables, write `path` and the plots beside it.

        earlier: results that these runs add seeds or arms to; then plots that need all runs are not drawn.
        """
        found = report.compare_runs(runs, results, self.headings, self.passes)
        self.derive(found)
        if earlier:
            found = report.joined(earlier, found, self.headings)
        trained = [claim for claim in self.claims if {claim.method, claim.baseline} <= set(found.arms)]
        if left_out := {claim.metric for claim in trained if not measured(claim, found.arms)}:
            print(f"claims about {', '.join(sorted(left_out))} are left out: they need other --sets or --arms")
        summary = self.judged(found, path, earlier, **more)
        write_json(path, summary)
        report.write_packages(path.with_name(f"{path.stem}_packages.txt"), keep=earlier is not None)
        self.plot_arms(found.arms, path.parent)
        if earlier:
            print(f"plots beside {path} that need all runs are unchanged: they show earlier ones only")
        else:
            self.plot(found, path.parent)
        report.show(summary, self.metrics, self.stands_for, path)

    def floor_seeds(self, found: report.Comparison, earlier: Container[str]) -> dict[str, list[int]]:
        """{floor: seeds of its arms} of the floors for these arms that depend on seeds, but are not in `earlier`."""
        seeds = {}
        for floor in self.floors:
            runs = max((len(found.arms[arm]) for arm in floor.arms if arm in found.arms), default=0)
            if floor.by_seed and runs and floor.name not in earlier:
                seeds[floor.name] = found.seeds[:runs]  # an arm with n runs has the first n seeds
        return seeds

    def measured_floors(
        self, path: Path, arms: Container[str], earlier: Container[str], seeds: dict[str, list[int]]
    ) -> dict[str, dict[str, float]]:
        """{floor: {metric: value}} of the floors for these arms that are not in `earlier`; cached in floors.json.

        earlier: names of floors whose values are known. seeds: those of the floors that depend on seeds.

        Measuring a ceiling takes as long as training an arm, so ceilings are read from the committed results, unless
        `path` replaces these.
        """
        committed, kept = Path(f"results/{self.home}.json"), Path(f"runs/{self.home}/floors.json")
        known = {} if path.resolve() == committed.resolve() or not committed.is_file() else read_json(committed)
        floors = [floor for floor in self.floors if not floor.arms or any(arm in arms for arm in floor.arms)]
        floors = [floor for floor in floors if floor.name not in earlier]
        if not floors:
            return {}
        known = {floor.name: known.get("floors", {}).get(floor.name) for floor in floors if floor.ceiling}

        def measure() -> dict[str, dict[str, float]]:
            return {floor.name: known.get(floor.name) or floor.values(seeds.get(floor.name, ())) for floor in floors}

        used = sorted({seed for of_floor in seeds.values() for seed in of_floor})
        sources = [file for folder in self.sets for file in evaluation.files_of(folder)] + [*self.floor_files(used)]
        setting = {"floors": [floor.name for floor in floors], "known": known, "seeds": seeds}
        return evaluation.measured(self.folder, kept, setting, sources, measure)

    def rows(
        self, arms: dict[str, list[dict]], floors: dict[str, dict[str, float]], earlier: dict | None = None
    ) -> list[dict]:
        """Rows of this study's claims about the metrics of arms by seed, with these measured floors."""
        bars = [(floor.arms, floors[floor.name]) for floor in self.floors if floor.name in floors and not floor.ceiling]
        return verdicts.judged(self.claims, arms, bars, earlier)

    def judged_again(self, summary: dict) -> dict:
        """Results, judged again from their numbers by the study's current claims and rules; the same if only rounding
        differs.

        Rows of other claims are kept, since judging them may need the runs. All rows are kept if the study lacks a
        floor of the results: without it, an arm that is not above that floor could count as learned.
        """
        if not set(summary["floors"]) <= {floor.name for floor in self.floors}:
            return summary
        claims = self.claims_of(summary) if self.claims_of else self.claims
        study, known = dataclasses.replace(self, claims=claims), {claim.claim for claim in claims}
        rows = study.rows(report.by_seed(summary), summary["floors"])
        rows += [row for row in summary["claims"] if row["claim"] not in known]
        rows = sorted(rows, key=lambda row: not row["primary"])
        return summary if equal_but_for_rounding(rows, summary["claims"]) else summary | {"claims": rows}

    def judged(self, found: report.Comparison, path: Path, earlier: dict | None = None, **more: Any) -> dict[str, Any]:
        """Results: floors, intervals from pooled standard deviations, and primary claims first.

        earlier: results that are part of `found`, and whose floors are kept.
        """
        floors = earlier["floors"] if earlier else {}
        floor_seeds = self.floor_seeds(found, floors)
        floors = self.measured_floors(path, found.arms, floors, floor_seeds) | floors
        floors = {floor.name: floors[floor.name] for floor in self.floors if floor.name in floors}
        committed = Path(f"results/{self.home}.json")
        more_seeds = report.earlier_arms(committed, found)
        if more_seeds:
            print(f"intervals may use the standard deviation of {committed}, which has more seeds of the same settings")
        rows = self.rows(found.arms, floors, more_seeds) + self.more_rows(found, **more)
        known = {row["claim"] for row in rows}
        known |= {claim.claim for claim in self.claims}
        # such as step times, which are no metrics of the arms
        rows += [row for row in (earlier or {}).get("claims", ()) if row["claim"] not in known]
        rows.sort(key=lambda row: not row["primary"])
        about = {"corpus": self.corpus, "floors": floors, "settings": found.settings}
        if floor_seeds := (earlier or {}).get("floor_seeds", {}) | floor_seeds:
            about["floor_seeds"] = floor_seeds
        if earlier:
            about["machine"] = appended(earlier["machine"], ", then ", machine())
            about["date"] = appended(earlier["date"], ", ", date.today().isoformat())
        if not earlier and (minutes := self.core_minutes(found.arms, found.seeds)) is not None:
            about["core_minutes"] = minutes
        return report.results(self.paper, found, rows, **about)


@dataclass
class Options:
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of every arm."""
    arms: str = "core"
    """core, all or names of arms, separated by spaces."""
    results: str | None = None
    """File for the results; by default results.json beside the runs."""
    extend: bool = False
    """Add to the file of --results instead of replacing it: more seeds of all or some of its arms, with the same
    settings, or new arms, with all of the file's seeds or the first few."""
    upstream: str | None = None
    """Clone of the authors' repository, for studies that read it."""
    corpus: Literal["emoji", "photos"] = "emoji"
    """emoji: the embedded corpus. photos: photographs and captions from the folder --photos."""
    photos: str | None = None
    """Folder with flickr8k, multi30k, pacs, cifar10 and coco, each in its authors' layout; only those that the study
    reads are needed."""
    jobs: int = min(cli.cores(), 4)
    """Number of parallel runs; they share the cores."""
    measure: str | None = None
    """Only evaluate this run folder."""


def checked_seeds(seeds: Sequence[int]) -> tuple[int, ...]:
    """The seeds without duplicates. UserError if there are none, or one is negative."""
    if not seeds or min(seeds) < 0:
        raise UserError("--seeds names at least one seed, each 0 or more")
    return tuple(dict.fromkeys(seeds))


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
    threads = max(cli.cores() // at_once, 1)
    waiting = {"OMP_WAIT_POLICY": "PASSIVE"} if at_once > 1 and threads > 1 else {}
    return waiting | os.environ | {"OMP_NUM_THREADS": str(threads)}


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
            scripts.interrupt(futures.values())
            raise
    for future in futures.values():
        future.result()


def run_job(study: Study, job: Stage, seed: int, environment: dict[str, str], cores: int) -> None:
    """Run the commands of a stage or an arm, and keep their time. UserError names one that failed."""
    commands = study.words(job, seed)
    if study.alone and isinstance(job, Arm):
        corpus = [] if study.on == "emoji" else ["--corpus", study.on]
        commands.append([f"studies.{study.folder}", *corpus, "--measure", study.out(job.name, seed)])
    with clocked(study.clock(job.name, seed), Path(study.out(job.name, seed)), cores):
        for module, *words in commands:
            if code := scripts.run_script(module, words, environment):
                failed = f"'{' '.join(['python -m', module, *words])}' failed (exit code {code})"
                raise UserError(f"{failed}; finished work is kept: run the study again to resume")


def prepare(study: Study, arms: Sequence[str], photos: str | None = None) -> None:
    """Run the study's commands that run once before these arms. UserError names a failed command."""
    for once in study.before:
        if not once.arms or set(arms) & set(once.arms):
            words = [word.replace("{photos}", str(photos)) for word in once.command.split()]
            if code := subprocess.run([sys.executable, "-m", *words]).returncode:
                raise UserError(f"'python -m {' '.join(words)}' failed (exit code {code})")


def run(study: Study, options: Options) -> None:
    """Run the whole study: `before`, training, evaluation, comparison."""
    if options.measure is not None:
        with contextlib.redirect_stdout(io.StringIO()):  # results are printed when all runs are compared
            study.evaluate([options.measure])
        return
    arms = study.chosen(options.arms)
    path, clone = options.results, options.upstream
    if path is not None and not path.endswith(".json"):
        raise UserError(f"--results {path} should end in .json")
    if path is not None and (Path(path).is_dir() or Path(path).parent.is_file()):
        raise UserError(f"--results {path} cannot be written there: name a file")
    if clone is not None and study.upstream is None:
        raise UserError(f"{study.folder}'s study does not use a clone: leave out --upstream")
    seeds = checked_seeds(options.seeds)
    earlier = results_to_extend(study, options, arms, seeds) if options.extend else None
    if path is not None and not options.extend and Path(path).exists():
        advice = "name another file, or remove that one"
        there = read_json(path, advice)
        if there.get("paper") != study.paper:
            raise UserError(f"--results {path} would replace a file without results of {study.paper}: {advice}")
        if there.get("corpus") != study.corpus:
            raise UserError(f"--results {path} would replace {other_corpus(there)}: {advice}")
    if study.on == "photos" and options.photos is None:
        raise UserError(
            "--corpus photos needs your own copy of the photographs: --photos DIR (PHOTOS=DIR with make), which holds "
            "flickr8k, pacs, ..."
        )
    if study.on != "photos" and options.photos is not None:
        raise UserError("--photos is used only with --corpus photos (CORPUS=photos with make)")
    if options.photos is not None and not (options.photos and Path(options.photos).is_dir()):
        raise UserError(f"--photos {options.photos!r} is no folder: name the one that holds flickr8k, pacs, ...")
    if options.jobs < 1:
        raise UserError(f"--jobs must be at least 1, not {options.jobs}")
    more = study.upstream(Path(clone)) if clone is not None else {}
    prepare(study, [arm.name for arm in arms], options.photos)
    train(study, arms, seeds, options.jobs, study.minutes.get(options.arms))
    compared = [job for job in study.jobs(arms) if isinstance(job, Arm)]
    runs = [study.out(arm.name, seed) for seed in seeds for arm in compared]
    results = study.evaluate(runs)
    study.compare(runs, results, Path(path or f"runs/{study.home}/results.json"), earlier, **more)


def other_corpus(earlier: dict) -> str:
    """Results of another corpus, in words."""
    return f"results on another corpus, {earlier.get('corpus')!r}, or its description has changed"


def results_to_extend(study: Study, options: Options, arms: Sequence[Arm], seeds: Sequence[int]) -> dict:
    """The results of --results, to which --extend adds other seeds or other arms. UserError if it cannot."""
    if options.results is None or not Path(options.results).is_file():
        raise UserError("--extend needs --results FILE.json, the results that it adds to")
    earlier = report.read_results(options.results, study.paper)
    if earlier["corpus"] != study.corpus:
        raise UserError(f"{options.results} has {other_corpus(earlier)}: train and measure all arms again")
    if other := set(earlier["floors"]) - {floor.name for floor in study.floors}:
        raise UserError(f"{options.results} has another floor, {sorted(other)[0]}: train and measure all arms again")
    compared = [job.name for job in study.jobs(arms) if isinstance(job, Arm)]
    needed, known = set(compared), set(earlier["arms"])
    while sources := {name for arm in needed for name in study.derived_from.get(arm, ())} & known - needed:
        needed |= sources
    if missing := sorted(needed - set(compared)):
        raise UserError(f"metrics of these arms are computed from others: add {', '.join(missing)} to --arms")
    merged, runs = report.extended_seeds(earlier, compared, seeds), report.by_seed(earlier)
    has = {arm: set(earlier["seeds"][: len(each)]) for arm, each in runs.items()}
    for arm in compared:
        added = set(seeds) - has.get(arm, set())
        if old := sorted(name for name in has if arm in study.derived_from.get(name, ()) and added & has[name]):
            raise UserError(
                f"metrics of {', '.join(old)} in {options.results} would be computed from {arm}, too: train and "
                "measure all arms again"
            )
    if merged == earlier["seeds"] and all(len(runs.get(arm, ())) == len(merged) for arm in compared):
        raise UserError(f"{options.results} has these seeds of {', '.join(compared)} already")
    return earlier


def study_of(folder: str, on: str = "emoji") -> Study:
    """A paper's study on a corpus. UserError if it has none on photographs."""
    module = f"studies.{folder}" if on == "emoji" else f"studies.{folder}_photos"
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{folder} has no study on photographs: leave out --corpus")
    return importlib.import_module(module).STUDY


def main(study: Study) -> None:
    """The command line of a study. SIGTERM ends a study as Ctrl+C does, with the scripts that it has started."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def work() -> None:
        options = tyro.cli(Options, prog=f"python -m studies.{study.folder}", description=f"{study.paper}.")
        run(study if options.corpus == study.on else study_of(study.folder, options.corpus), options)

    cli.command_line(work)
