"""All results: `python -m studies.harness.overview` writes RESULTS.md, report.html, two plots, and the tables in
READMEs and results/PAPER.md.

They are generated from the .json and .png files in results/ and results/photos/. The HTML page embeds its plots and
opens offline. `python -m studies.harness.overview runs` writes only runs/report.html and the two plots, from the
results in runs.
"""

import argparse
import base64
import re
import textwrap
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from markupsafe import Markup

from shared import cli, presets
from shared.checkpoints import write_json, write_text
from shared.errors import UserError
from shared.evaluation import table
from studies.harness import drawings, pages, protocol, report, runner, verdicts
from studies.harness.drawings import Summaries
from studies.harness.runner import Options, Study, study_of
from studies.harness.verdicts import VERDICTS

GROUPS = {  # of verdicts, for the first table
    "reproduced": ("reproduced",), "direction only": ("direction only",),
    "no difference above d": ("no difference above d",), "not reproduced": ("not reproduced",), "open": ("open",),
    "not judged": ("has not learned", "not testable here"),
}  # fmt: skip
MARK = " †"  # of results whose arms train something else today

# -------------------------------------------------------------------------------------------------------------- claims


def pictures_of(summary: dict) -> str:
    """The study's pictures, from its text about the corpus: emoji, scenes (made of emoji) or photographs."""
    text = summary["corpus"].lower()
    if text.startswith("scenes"):
        return "scenes"
    return ", ".join(kind for kind in ("emoji", "scenes", "photographs") if kind in text)


def in_words(rows: Iterable[dict]) -> str:
    """The number of rows of each verdict, such as "2 reproduced, 1 open"."""
    counts = Counter(row["verdict"] for row in rows)
    return ", ".join(f"{counts[word]} {word}" for words in GROUPS.values() for word in words if counts[word])


def changed(study: Study, summary: dict) -> str:
    """What arms train since these results were made; empty if nothing has changed or they were made with a protocol."""
    return "" if "protocol" in summary else study.changed


def all_changed(papers: Iterable[str], found: Summaries, photographs: Summaries) -> dict[str, str]:
    """{paper and corpus: `changed`} of the results with marked claims of the abstract."""
    every = [(paper, on, of[paper]) for paper in papers for on, of in (("emoji", found), ("photos", photographs))
             if paper in of]  # fmt: skip
    return {
        f"{paper}, on {pictures_of(summary)}": changed(study_of(paper, on), summary)
        for paper, on, summary in every
        if any(row["primary"] and MARK in row["finding"] for row in findings(paper, on, {paper: summary}).values())
    }


def findings(folder: str, on: str, summaries: Summaries) -> dict[str, dict[str, Any]]:
    """{claim: its row, with the texts that pages show} of a paper's results: the difference with its interval and note,
    the finding, the floors of baseline and method. A row of a claim that the study no longer has keeps its floor."""
    if folder not in summaries:
        return {}
    summary = summaries[folder]
    study = study_of(folder, on).as_in(summary)
    claims, notes = {claim.claim: claim for claim in study.claims}, study.notes(summary)
    prefix, new = protocol.prefix(study, summary), changed(study, summary)
    bars = [(floor.arms, summary["floors"].get(floor.name, {})) for floor in study.floors if not floor.ceiling]
    known = {metric for values in summary["floors"].values() for metric in values}
    found = {}
    for row in summary["claims"]:
        name, floors = row["claim"], [row.get("floor") if row["metric"] in known else None]
        if claim := claims.get(name):
            arms = [arm.partition(":")[0] for arm in (claim.baseline, claim.method)]
            floors = [verdicts.floor_of(claim.metric, bars, arm) for arm in arms]
        mark = MARK if new and row["difference"] is not None else ""
        found[name] = row | {
            "shown": "; ".join([difference(row), *([notes[name]] if name in notes else [])]),
            "finding": prefix + verdicts.worded(row) + mark,
            "floors": " / ".join(dict.fromkeys("-" if floor is None else f"{floor:.2f}" for floor in floors)) or "-",
        }
    return found


def first_table(found: Summaries) -> str:
    """Claims of the abstract of each paper, by what the study found."""

    def entry(claim: str, row: dict) -> str:
        if row["verdict"] in GROUPS["not judged"]:
            return f"{claim} ({row['verdict']})"
        return claim + verdicts.worded(row).removeprefix(row["verdict"]).replace(" in this unit", "")

    rows = []
    for folder, summary in found.items():
        mark = MARK if all_changed([folder], found, {}) else ""
        about = f"[{summary['paper'].partition(' (')[0]}]({folder}/README.md), on {pictures_of(summary)}{mark}"
        names = {
            group: "; ".join(entry(*each) for each in verdicts.primary(summary).items() if each[1]["verdict"] in words)
            or "-"
            for group, words in GROUPS.items()
        }
        rows.append({"paper": f"{about} ([all tables](results/{folder}.md))", **names})
    return table(rows) if rows else ""


def difference(row: dict) -> str:
    """The difference and its interval."""
    if row.get("difference") is None:
        return "-"
    ends = " to ".join(verdicts.number(end, row["resolves"]) for end in row["interval"] or ())
    ends = "; ".join(filter(None, (ends, row["scatter"] if row.get("scatter") in verdicts.MARKED else "")))
    return verdicts.number(row["difference"], row["resolves"]) + (f" ({ends})" if ends else "")


def main_table(found: Summaries, photographs: Summaries) -> str:
    """One row for each claim of an abstract: on emoji or scenes, and on photographs beside it. A claim that is primary
    on one of them only is shown on the other, too, and called secondary there."""
    rows = []
    for paper in sorted(found | photographs):
        ours, theirs = findings(paper, "emoji", found), findings(paper, "photos", photographs)
        for claim in dict.fromkeys([*verdicts.primary(found.get(paper)), *verdicts.primary(photographs.get(paper))]):
            row, there = (
                of[claim] if claim in of and (of[claim]["primary"] or of[claim]["difference"] is not None) else {}
                for of in (ours, theirs)
            )
            about, second = row if row.get("primary") else there, " (secondary)"
            numbers = {name: row.get(name) for name in ("baseline", "method")}
            rows.append(
                {"paper": paper, "claim": claim, "paper's difference": with_effect(about)}
                | {"ours (interval)": row.get("shown", "-"), "d": limit(row)}
                | {"finding": row["finding"] + second * (not row["primary"]) if row else "-"}
                | {"floor": row.get("floors", "-")}
                | {name: "-" if value is None else f"{value:.2f}" for name, value in numbers.items()}
                | {"have learned": learned(row)}
                | {"seeds": row.get("seeds", "-"), "on photographs": beside(row, there) if there else "-"}
                | {"where the mechanism can act": about.get("where") or "-"}
            )
    return table(rows)


def with_effect(row: dict) -> str:
    """The paper's words for a difference, and the difference in our unit if they do not have it."""
    effect = row.get("effect")
    known = effect is None or f"{abs(effect):g}" in row["paper"]
    return row["paper"] if known else f"{row['paper']}; {effect:+.3g}"


def learned(row: dict) -> str:
    """Whether baseline and method of a row have learned, as far as they have a floor."""
    words = [{True: "yes", False: "**no**"}.get(row.get(f"{side}_learned"), "-") for side in ("baseline", "method")]
    return " / ".join(dict.fromkeys(words))


def limit(row: dict) -> str:
    """d of a row."""
    return "-" if row.get("negligible") is None else f"{row['negligible']:.3g}"


def beside(row: dict, there: dict) -> str:
    """What the main table shows of a claim on photographs; d, if it is not that of emoji or scenes."""
    if there["difference"] is None:
        return there["finding"]
    text = there["shown"] + f", d {limit(there)}" * (limit(there) not in ("-", limit(row))) + f", n {there['seeds']}"
    weak = there.get("baseline_learned") is False and there["verdict"] != "has not learned"
    return f"{text}; {there['finding']}" + ", baseline has not learned" * weak + " (secondary)" * (not there["primary"])


def totals(found: Summaries, photographs: Summaries) -> str:
    """Sentences with the number of claims of abstracts by verdict, and what they are by the protocol."""
    rows, beside = (
        [row for each in of.values() for row in verdicts.primary(each).values()] for of in (found, photographs)
    )
    standings = Counter(
        protocol.standing(study_of(folder, on), summary)
        for on, of in (("emoji", found), ("photos", photographs))
        for folder, summary in of.items()
    )
    text = f"{len(rows)} claims of abstracts on emoji and scenes: {in_words(rows)}."
    text += f" On photographs, {len(beside)} claims: {in_words(beside)}." if beside else ""
    weak = [sum(row.get("baseline_learned") is False and row["verdict"] != "has not learned" for row in of)
            for of in (rows, beside)]  # fmt: skip
    text += f" In {sum(weak)} judged rows ({weak[1]} on photographs) the baseline has not learned." if sum(weak) else ""
    if len(standings) == 1:
        return f"{text} All {sum(standings.values())} studies are {next(iter(standings))}."
    return f"{text} Studies by standing: {', '.join(f'{n} {word}' for word, n in sorted(standings.items()))}."


# --------------------------------------------------------------------------------------------------------------- pages


def command(study: Study, summary: dict, file: str = "") -> str:
    """The command that makes the results in `file`, by default the study's in results/."""
    arms, core = set(summary["arms"]) & set(study.headings), {arm.name for arm in study.chosen("core")}
    chosen = "" if arms == core else " ARMS=all" if arms == set(study.headings) else f' ARMS="{" ".join(sorted(arms))}"'
    runs = min(len(values) for arm, values in report.by_seed(summary).items() if arm in arms)
    seeds = " ".join(map(str, summary["seeds"][:runs]))
    where = f" {variables}" if (variables := study.variables_of(summary)) else ""
    where += "" if study.on == "emoji" else f" CORPUS={study.on} PHOTOS=FOLDER"
    name, file = study.folder.replace("_", "-"), file or f"results/{study.home}.json"
    return f'make reproduce-{name} SEEDS="{seeds}"{chosen}{where} RESULTS={file}'


def block(study: Study, summary: dict, file: str = "") -> str:
    """Markdown of a study's results: provenance, command, both tables."""
    return pages.rendered(
        "block.md", study=study, summary=summary, provenance=report.provenance(summary),
        command=command(study, summary, file), standing=(standing := protocol.standing(study, summary)),
        meaning=protocol.STANDING[standing], arms=report.named_arms(study, summary),
        changed=changed(study, summary), notes=study.notes(summary),
        claims=report.claims_table(summary, standing=standing),
    )  # fmt: skip


def blocks(folder: str, found: Summaries, photographs: Summaries, home: str = "results") -> str:
    """`block` of a paper on each of its corpora. home: folder of the results, which decides where commands write."""
    parts = []
    for on, summaries in (("emoji", found), ("photos", photographs)):
        if folder in summaries:
            study = study_of(folder, on)
            file = "" if home == "results" else f"runs/{study.home}/results.json"
            parts.append(block(study, summaries[folder], file))
    return "\n".join(parts)


def runs_table(found: Summaries, photographs: Summaries) -> str:
    """Protocol, commit, number and time of the runs of results that have a protocol; "" if none has."""
    rows = []
    for summaries in (found, photographs):
        for paper, summary in summaries.items():
            if "protocol" not in summary:
                continue
            runs = [len(values) for arm, values in report.by_seed(summary).items() if arm in summary["headings"]]
            minutes = summary.get("core_minutes")
            hours = "-" if minutes is None else f"{minutes * len(summary['seeds']) / 60:.1f}"
            rows.append(
                {"study": f"{paper}, on {pictures_of(summary)}", "protocol": summary["protocol"]}
                | {"commit": summary["commit"], "measured": summary["date"], "seeds": len(summary["seeds"])}
                | {"runs": sum(runs), "hours of one core": hours}
            )
    return table(rows) if rows else ""


def markdown(found: Summaries, photographs: Summaries, redesigns: str) -> str:
    """Text of RESULTS.md. redesigns: Markdown of the log of redesigns."""
    return pages.rendered(
        "results.md", totals=totals(found, photographs), claims=main_table(found, photographs), redesigns=redesigns,
        verdicts=VERDICTS, standings=protocol.STANDING, own=verdicts.OWN, small=verdicts.SMALL,
        papers=first_table(found), terms={paper: study_of(paper).terms for paper in found},
        changed=all_changed(sorted(found | photographs), found, photographs), runs=runs_table(found, photographs),
        logs=any("protocol" in summary for summary in (*found.values(), *photographs.values())),
    )  # fmt: skip


def html_page(text: str, found: Summaries, photographs: Summaries, home: Path) -> str:
    """Text of report.html: RESULTS.md, then each paper's tables with the plots in `home`; it needs no other file."""

    def to_html(markdown_text: str) -> Markup:
        html = re.sub(
            f"<td>([a-z]+: )?({'|'.join(VERDICTS)})( [(†][^<]*)?</td>",
            lambda cell: cell[0].replace("<td", f'<td class="{cell[2].replace(" ", "-")}"'),
            re.sub(r"<p><img[^>]*></p>\n?", "", str(pages.to_html(markdown_text))).replace(" ± ", "&nbsp;±&nbsp;"),
        )
        html = re.sub("<h2>(.*?)</h2>", lambda of: f'<h2 id="{of[1].lower().replace(" ", "-")}">{of[1]}</h2>', html)
        return Markup(re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', html, flags=re.DOTALL))

    def images(files: Iterable[Path]) -> list[tuple[str, str]]:
        return [(file.stem.replace("_", " "), base64.b64encode(file.read_bytes()).decode()) for file in files]

    def plots(folder: str) -> list[tuple[str, str]]:
        homes = [home] * (folder in found) + [home / "photos"] * (folder in photographs)
        names = [f"{folder}_*.png", f"{folder}/{folder}_*.png"]
        return images(file for each in homes for name in names for file in sorted(each.glob(name)))

    return pages.rendered(
        "report.html",
        first=to_html(text),
        overall=images([home / "effects.png", home / "forest.png"]),
        papers=[
            (folder, (found | photographs)[folder]["paper"],
             to_html(blocks(folder, found, photographs, home.name)), plots(folder))
            for folder in sorted(found | photographs)
        ],
    )  # fmt: skip


def between(page: str, mark: str, text: str) -> str:
    """A page with `text` between its comments <!-- mark --> and <!-- /mark -->."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    head, rest = page.split(begin, 1)
    return head + begin + text + end + rest.split(end, 1)[1]


def with_verdicts(readme: str, found: Summaries, photographs: Summaries) -> str:
    """The root README, with `totals` between its marks, and with the last two cells of each paper's table row filled:
    minutes of the default study on two cores, and the counts of verdicts on the paper's claims of the abstract."""
    if "<!-- totals -->\n" in readme:
        readme = between(readme, "totals", textwrap.fill(totals(found, photographs), 128) + "\n")
    for folder, summary in found.items():
        minutes = study_of(folder).minutes["core"] * len(Options().seeds)
        row = rf"^(\| \[`{folder}/`\].*?\|)[^|\n]*\|[^|\n]*\|$"
        prefix = protocol.prefix(study_of(folder), summary)
        cells = rf"\g<1> {minutes:.0f} | {prefix}{in_words(verdicts.primary(summary).values())} |"
        readme = re.sub(row, cells, readme, flags=re.MULTILINE)
    return readme


def with_claims(readme: str, folder: str, found: Summaries, photographs: Summaries) -> str:
    """A paper's README, with its claims of the abstract between their comments."""
    rows: dict[str, dict[str, Any]] = {}
    for kind, summaries in (("emoji", found), ("photos", photographs)):
        if folder not in summaries:
            continue
        summary, of = summaries[folder], findings(folder, kind, summaries)
        for claim in verdicts.primary(summary):
            row, on = of[claim], pictures_of(summary)
            rows.setdefault(claim, {"claim": claim, "in the paper": row["paper"]})
            text = row["where"] if row["difference"] is None else row["shown"]
            rows[claim] |= {f"on {on}": text, f"finding on {on}": row["finding"]}
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    words = sorted({protocol.standing(study_of(folder, on), each[folder])
                    for on, each in (("emoji", found), ("photos", photographs)) if folder in each})  # fmt: skip
    lines = [table([{name: row.get(name, "-") for name in columns} for row in rows.values()])]
    lines += [f"*{word}*: {protocol.STANDING[word]}." for word in words if word != "verdict"]
    new = all_changed([folder], found, photographs)
    lines += [f"† {name.partition(', ')[2]}: since then, {what}." for name, what in new.items()]
    return between(readme, "claims", "\n\n".join(lines) + "\n")


def with_results(page: str, folder: str, found: Summaries, photographs: Summaries) -> str:
    """results/<folder>.md, with its results, and with results/bench/<folder>.md if there is one, between comments."""
    page = between(page, "results", blocks(folder, found, photographs) + "\n")
    bench = Path(f"results/bench/{folder}.md")
    return between(page, "bench", bench.read_text(encoding="utf-8")) if bench.is_file() else page


# --------------------------------------------------------------------------------------------------------------- files


def read(folder: Path) -> Summaries:
    """{paper: results}, read from folder/PAPER.json or folder/PAPER/results.json. UserError if they are not its."""
    files = {paper: (folder / f"{paper}.json", folder / paper / "results.json") for paper in sorted(presets.folders())}
    found = ((paper, path) for paper, paths in files.items() for path in paths if path.is_file())
    return {paper: report.read_results(path, study_of(paper).paper) for paper, path in found}


def judge_again(folder: Path, on: str) -> None:
    """Judge the claims of results files again, with the current studies, and write the files that changed."""
    for paper, summary in read(folder).items():
        if summary != (again := runner.judged_again(study_of(paper, on), summary)):
            write_json(folder / f"{paper}.json", again)
            print(f"{folder / f'{paper}.json'}: its claims were judged again, with the current studies/{paper}.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results or runs")
    folder = parser.parse_args().folder
    committed = folder == Path("results")
    if committed:
        judge_again(folder, "emoji")
        judge_again(folder / "photos", "photos")
    found, photographs = read(folder), read(folder / "photos")
    if not (papers := sorted(found | photographs)):
        raise UserError(f"{folder} holds no results: run 'make reproduce-all'")
    log = folder / "redesigns.md"
    text = markdown(found, photographs, log.read_text(encoding="utf-8") if log.is_file() else "")
    if committed:
        write_text("RESULTS.md", text)
        for paper in papers:
            for path, filled in ((Path(paper, "README.md"), with_claims), (folder / f"{paper}.md", with_results)):
                write_text(path, filled(path.read_text(encoding="utf-8"), paper, found, photographs))
        write_text("README.md", with_verdicts(Path("README.md").read_text(encoding="utf-8"), found, photographs))
    drawings.forest(found, photographs, folder / "forest.png")
    drawings.effects(found, folder / "effects.png")
    page = Path("report.html") if committed else folder / "report.html"
    write_text(page, html_page(text, found, photographs, folder))
    print(f"{'READMEs, RESULTS.md and ' * committed}{page}: {len(papers)} papers")


if __name__ == "__main__":
    cli.command_line(main)
