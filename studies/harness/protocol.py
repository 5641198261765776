"""What a study fixes before the runs that count: `python -m studies.harness protocol` prints it for all papers.

A protocol is a study's arms with all settings, claims, d, floors and seeds. Its hash is in each results file; results
of another hash are no verdicts of this protocol.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shared import presets
from shared.checkpoints import FREE, read_json
from shared.evaluation import table

PILOTS = range(100, 200)
STANDING = {
    "verdict": "made with the current protocol and all of its seeds",
    "replication": "made with the current protocol and other seeds, or fewer",
    "exploratory": "made before this protocol was fixed, or with another: settings, metrics and floors were changed "
    "between looks at the same seeds, so the 95 % of an interval is not that of a test planned beforehand",
}


def hashed(value: Any) -> str:
    """Eight hexadecimal digits of a value's JSON."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=4).hexdigest()


def settings_of(study: Any, command: str) -> str:
    """A command, with a hash of its preset's settings, which the text does not show."""
    script, *words = command.split()
    scripts = presets.scripts(study.folder) if study.folder in presets.folders() else {}
    _, settings = scripts.get(script, {}).get(words[0] if words else "", ("", None))
    if settings is None:
        return command
    kept = {key: value for key, value in dataclasses.asdict(settings).items() if key not in FREE | {"seed"}}
    return f"{command} [{hashed(kept)}]"


def declared(study: Any) -> dict[str, Any]:
    """The protocol of a study; texts that explain it are left out."""

    def commands(jobs: Sequence[Any]) -> dict[str, list[str]]:
        return {job.name: [settings_of(study, command) for command in job.commands] for job in jobs}

    return {
        "seeds": study.seeds,
        "arms": commands(study.arms),
        "stages": commands(study.stages),
        "before": [once.command for once in study.before],
        "claims": [{key: value for key, value in each._asdict().items() if key != "where"} for each in study.claims],
        "floors": [[floor.name, *floor.arms] for floor in study.floors if not floor.ceiling],
        "sets": study.sets,
    }


def digest(study: Any) -> str:
    """The hash of the protocol."""
    return hashed(declared(study))


def standing(study: Any, summary: dict) -> str:
    """What the numbers of results are by the current protocol: a key of STANDING."""
    study = study.as_in(summary)
    if summary.get("protocol") != digest(study):
        return "exploratory"
    return "verdict" if set(study.seeds) <= set(summary["seeds"]) else "replication"


def prefix(study: Any, summary: dict) -> str:
    """The word before findings that are no verdicts of the current protocol, such as "exploratory: "; else nothing."""
    word = standing(study, summary)
    return "" if word == "verdict" else f"{word}: "


# --------------------------------------------------------------------------------------------------------------- pilots


def is_pilot(seeds: Sequence[int]) -> bool:
    return all(seed in PILOTS for seed in seeds)


def pilot_of(study: Any, settings: str) -> Any:
    """The study with settings added to its arms' commands, run folders of its own, and neither floors nor plots; the
    study itself without settings."""
    if not settings:
        return study
    arms = tuple(
        dataclasses.replace(arm, command=(*arm.commands[:-1], f"{arm.commands[-1]} {settings}".strip()))
        for arm in study.arms
    )
    plain = {"floors": (), "plot": lambda found, out: None}
    return dataclasses.replace(study, arms=arms, pilot=hashed(settings), **plain)


def record(study: Any, results: Path, settings: str) -> None:
    """Add a line for each run of a pilot to results/pilots/PAPER.jsonl: settings, seed, scores by claims' metrics."""
    summary, file = read_json(results), Path(f"results/pilots/{study.home}.jsonl")
    wanted = {metric for claim in study.claims if claim.primary for metric in (claim.metric, claim.learned_by)}
    lines = [
        {"arm": arm, "settings": settings, "setting": summary["settings"].get(arm), "seed": seed,
         "scores": {key: of[key]["values"][i] for key in sorted(wanted & set(of))},
         "commit": summary["commit"], "date": summary["date"]}
        for arm, of in summary["arms"].items() for i, seed in enumerate(summary["seeds"])
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as kept:
        kept.writelines(json.dumps(line) + "\n" for line in lines)
    print(f"{len(lines)} pilot runs were added to {file}")


def pilots(study: Any) -> dict[str, int]:
    """{arm: number of different settings that its pilots have tried}."""
    file, tried = Path(f"results/pilots/{study.home}.jsonl"), {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
        about = json.loads(line)
        tried.setdefault(about["arm"], set()).add(about["setting"])
    return {arm: len(settings) for arm, settings in tried.items()}


# ---------------------------------------------------------------------------------------------------------------- table


def page(studies: Sequence[Any]) -> str:
    """Markdown of all protocols: the hash of all, and of each study its hash, arms and primary claims."""
    parts = [f"Protocol {hashed([digest(study) for study in studies])} of {len(studies)} studies"]
    for study in studies:
        about, tried = declared(study), pilots(study)
        primary = [claim for claim in study.claims if claim.primary]
        seeds = f"{study.seeds[0]} to {study.seeds[-1]}" if len(study.seeds) > 1 else study.seeds[0]
        parts += [
            f"## {study.home}: {digest(study)}\n\nSeeds {seeds}. Corpus: {study.corpus}. Floors: "
            f"{'; '.join(floor[0] for floor in about['floors'])}. Level of an interval: 0.05 / {max(len(primary), 1)}.",
            table([
                {"arm": arm, "commands [hash of the preset]": "; ".join(commands), "settings tried": tried.get(arm, 0)}
                for arm, commands in about["arms"].items()
            ]),
            table([
                {"claim": claim.claim, "metric": claim.metric, "method": claim.method, "baseline": claim.baseline,
                 "paper": claim.paper, "side": "+" if claim.sign > 0 else "-", "effect": claim.effect or "-",
                 "d": claim.negligible or "-", "learned by": claim.learned_by or claim.metric, "where": claim.where}
                for claim in primary
            ] or [{"claim": "none"}]),
        ]  # fmt: skip
    return "\n\n".join(parts)
