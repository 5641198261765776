"""All results: `python -m studies.harness.overview` writes RESULTS.md, report.html and the READMEs' results.

They are generated from the .json and .png files in results/ and results/photos/. The HTML page embeds its plots and
opens offline. `python -m studies.harness.overview runs` writes only runs/report.html, from the results in runs.
"""

import argparse
import base64
import html
import re
import textwrap
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from shared import cli, presets
from shared.checkpoints import write_json, write_text
from shared.errors import UserError
from shared.evaluation import table
from studies.harness import report
from studies.harness.runner import Options, Study, study_of
from studies.harness.verdicts import VERDICTS, shown

INTRODUCTION = (
    "Measured on corpora that fit on a laptop and stand in for the papers' data: emoji, scenes made of them, and small "
    "public sets of photographs. They can show an effect at this scale, but not reproduce a paper's number."
)
COLUMNS = (
    "One row per claim. In the paper: its own number, on its data (IN: ImageNet), or its words. Difference: method "
    "minus baseline, paired by seed unless the row names another unit (encoders, concepts, rounds), ± half of the "
    "95 % interval, which is the smallest difference that these seeds can resolve. d: the largest difference that "
    "counts as none. Scores are percent and differences points, unless the claim names another unit (a slope, a ratio, "
    "r, ρ, a spectrum)."
)
FLOOR = (
    "Floor: the best score in the row's metric that needs no trained arm, such as that of chance, of raw pixels or of "
    "a pretrained tower's features; for a linear probe, a probe on raw pixels. Claims about a slope, a correlation, a "
    "ratio, a spectrum, word usage or rare concepts, and some with fewer pairs, have none: another metric, in the "
    "tables below, shows whether their arms have learned."
)
CERTAINTY = (
    "A verdict is resolved if the stronger arm is above its floors, and the 95 % interval of the difference lies on "
    "one side of zero or within a range fixed beforehand. Intervals are widened so that all verdicts on a paper's "
    "abstract hold together at 95 %. Some arms have more seeds than the paper's other arms: a claim about them was "
    "open, so they got more seeds, in a number fixed in advance, and so did the arms that their metrics are computed "
    "from. Claims that would have needed many more stayed open. The intervals do not account for this second look."
)
OPEN = (
    "Open claims have their difference ± half of the 95 % interval: the smallest difference that these seeds can "
    "resolve. d is the largest difference that counts as none."
)
BESIDE = (
    "Claims of abstracts in the studies on photographs. Some cannot be tested there, and some are worded differently "
    "than above, since these studies differ. In a paper's section, the table of claims on photographs repeats the "
    "verdicts on emoji or scenes."
)
GROUPS = {  # in the order in which verdicts are counted
    "hold here": ("reproduced", "same direction"),
    "do not hold": ("not reproduced",),
    "equal within d": ("no difference above d",),
    "open": ("not resolved", "has not learned", "not testable here"),
}
ORDER = [verdict for verdicts in GROUPS.values() for verdict in verdicts]
RESOLVED = [verdict for verdict in ORDER if verdict not in GROUPS["open"]]


def command(study: Study, summary: dict, file: str = "") -> str:
    """The command that reproduces the results in `file`, by default the study's in results/; further commands add the
    seeds that only some arms have."""
    runs, name = {arm: len(each) for arm, each in report.by_seed(summary).items()}, study.folder.replace("_", "-")
    file, variables = file or f"results/{study.home}.json", study.variables_of(summary)
    where = f" {variables}" if variables else ""
    where += "" if study.on == "emoji" else f" CORPUS={study.on} PHOTOS=FOLDER"

    def line(seeds: Sequence[int], arms: Collection[str], extend: str = "") -> str:
        core = {arm.name for arm in study.chosen("core")}
        more = [arm.name for arm in study.arms if arm.name in arms and not arm.core]
        words = [*(["core"] if core <= set(arms) else [arm for arm in arms if arm in core]), *more]
        names = "all" if len(arms) == len(study.arms) else f'"{" ".join(words)}"'
        chosen = ("" if words == ["core"] else f" ARMS={names}") + where
        values = " ".join(map(str, seeds))
        return f'make reproduce-{name}{extend} SEEDS="{values}"{chosen} RESULTS={file}'

    lines, few = [], 0
    for many in sorted(set(runs.values())):
        arms = [arm for arm, n in runs.items() if n > few]
        lines.append(line(summary["seeds"][few:many], arms, " EXTEND=1" if few else ""))
        few = many
    return " && ".join(lines)


def in_words(rows: Sequence[dict], verdicts: Iterable[str]) -> str:
    """The number of rows with each of these verdicts, such as "2 reproduced, 1 not resolved"."""
    found = counts(rows)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in verdicts if found[verdict])


def counts(rows: Iterable[dict]) -> dict[str, int]:
    """{verdict: number of rows that have it}."""
    found = Counter(row["verdict"] for row in rows)
    return {verdict: found[verdict] for verdict in VERDICTS}


def pictures_of(summary: dict) -> str:
    """The study's pictures, from its text about the corpus: emoji, scenes (made of emoji) or photographs."""
    text = summary["corpus"].lower()
    if text.startswith("scenes"):
        return "scenes"
    return ", ".join(kind for kind in ("emoji", "scenes", "photographs") if kind in text)


def primary_rows(summaries: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per primary claim (of an abstract): floor, means of both arms, difference, seeds, verdict.

    The floor is shown if it is in the claim's metric, not if the arms are compared with it in another one.
    """
    rows = []
    for folder, summary in summaries.items():
        primary = [row for row in summary["claims"] if row["primary"]]
        for row, line in zip(primary, shown(primary), strict=True):
            numbers = {name: row.get(name) for name in ("floor", "baseline", "method")}
            if numbers["floor"] not in [floor.get(row["metric"]) for floor in summary["floors"].values()]:
                numbers["floor"] = None
            about = {"paper": folder, "claim": row["claim"], "verdict": row["verdict"]}
            about |= {"difference": line["here"], "d": line["d"], "in the paper": row["paper"]}
            about |= {name: "-" if number is None else f"{number:.2f}" for name, number in numbers.items()}
            rows.append(about | {"seeds": row.get("seeds", "-"), "pictures": pictures_of(summary)})
    return rows


def elsewhere(rows: list[dict[str, Any]], beside: list[dict[str, Any]]) -> dict[tuple[str, str], str]:
    """{(paper, claim): verdict on photographs} of the claims that are resolved there, and whose verdict in `rows` is of
    another group, such as open."""
    group = {verdict: name for name, verdicts in GROUPS.items() for verdict in verdicts}
    here = {(row["paper"], row["claim"]): group[row["verdict"]] for row in rows}
    there = {(row["paper"], row["claim"]): row["verdict"] for row in beside if row["verdict"] in RESOLVED}
    return {claim: verdict for claim, verdict in there.items() if group[verdict] != here.get(claim, group[verdict])}


def totals(rows: list[dict[str, Any]], beside: list[dict[str, Any]]) -> str:
    """Sentences with the number of primary claims that hold, that do not, and that are open.

    beside: rows of the claims on photographs.
    """
    found = {group: in_words(rows, verdicts) for group, verdicts in GROUPS.items()}
    resolved, others = sum(row["verdict"] in RESOLVED for row in rows), elsewhere(rows, beside)
    still_open = {(row["paper"], row["claim"]) for row in rows if row["verdict"] in GROUPS["open"]}
    too = len(others.keys() & still_open)
    numbers = "; ".join(f"{group}: {words}" for group, words in found.items() if words)
    photographs = (
        f" On photographs, {too} of the open ones are resolved, so {resolved + too} "
        f"({(resolved + too) / len(rows):.0%}) have a resolved verdict on pictures of at least one kind; "
        f"{len(others) - too} of those that are resolved on both come out differently on photographs."
    )
    return (
        f"Of {len(rows)} claims of abstracts, {resolved} have a resolved verdict on emoji or scenes "
        f"({resolved / len(rows):.0%}). {numbers[0].upper()}{numbers[1:]}.{photographs if others else ''}"
    )


def by_paper(rows: list[dict[str, Any]], beside: list[dict[str, Any]]) -> str:
    """A list with an item for each paper: its primary claims by verdict, differences of the open ones, the verdicts of
    `elsewhere`, and what abbreviations mean."""
    items: dict[str, dict[str, list[str]]] = {}
    too = elsewhere(rows, beside)
    for row in sorted(rows, key=lambda row: (row["paper"], ORDER.index(row["verdict"]))):
        also = too.get((row["paper"], row["claim"]))
        notes = [row["difference"]] * (row["verdict"] in GROUPS["open"]) + [f"on photographs: {also}"] * bool(also)
        name = row["claim"] + (f" ({'; '.join(notes)})" if notes else "")
        items.setdefault(row["paper"], {}).setdefault(row["verdict"], []).append(name)
    lines = []
    for paper, claims in items.items():
        text = ". ".join(f"**{verdict.capitalize()}**: {'; '.join(names)}" for verdict, names in claims.items())
        lines.append(f"- [{paper}](#{paper}). {text}. {study_of(paper).terms}".rstrip())
    return "\n".join(lines)


def asked_twice(summaries: dict[str, dict], photographs: dict[str, dict]) -> list[dict[str, str]]:
    """A row for each claim that was tested both on emoji or scenes and on photographs, with both verdicts."""
    rows = []
    for folder, summary in photographs.items():
        first = {row["claim"]: row["verdict"] for row in summaries.get(folder, {"claims": ()})["claims"]}
        for row in summary["claims"]:
            if not {first.get(row["claim"], "no claim"), row["verdict"]} & {"no claim", "not testable here"}:
                verdicts = {"on emoji or scenes": first[row["claim"]], "on photographs": row["verdict"]}
                rows.append({"paper": folder, "claim": row["claim"]} | verdicts)
    return rows


def agreement(rows: list[dict[str, str]]) -> str:
    """Sentence with the number of claims whose two verdicts are equal."""
    same = [row["on photographs"] for row in rows if row["on emoji or scenes"] == row["on photographs"]]
    open_too = sum(verdict in GROUPS["open"] for verdict in same)
    return (
        f"{len(rows)} claims of the same name were tested on both kinds of pictures. {len(same)} have the same verdict "
        f"on both, of which {open_too} are open on both:"
    )


def named_arms(study: Study, summary: dict) -> dict[str, dict]:
    """{heading of an arm: its metrics}."""
    return {study.headings.get(arm, arm): values for arm, values in summary["arms"].items()}


def arms_table(study: Study, summary: dict) -> str:
    """Floors, ceilings and arms as a Markdown table."""
    return table(report.arms_rows(named_arms(study, summary), study.metrics, summary["floors"]))


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(summaries: dict[str, dict], photographs: dict[str, dict]) -> str:
    """Text of RESULTS.md: claims of abstracts, counts of verdicts by paper, photographs, a section for each paper."""
    primary, beside = primary_rows(summaries), primary_rows(photographs)
    page = ["# Results", INTRODUCTION]
    if primary:
        page += [f"{totals(primary, beside)} {CERTAINTY} [Verdicts](#verdicts) are defined below.", OPEN]
        page.append(by_paper(primary, beside))
        page += ["## Claims of abstracts", COLUMNS, FLOOR, table(primary)]
    page += ["## All claims", overview_table(summaries)]
    page += ["## On photographs", BESIDE, table(beside), overview_table(photographs)] if beside else []
    both = asked_twice(summaries, photographs)
    page += [agreement(both), table(both)] if both else []
    page.append("## Verdicts")
    page.append(
        "The verdict on a claim of the paper is the first of these that applies; on other differences it is *no claim*:"
    )
    page.append("\n".join(f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()))
    page.append(report.STARS.strip())
    for folder in sorted(summaries | photographs):
        page.append(f'<a id="{folder}"></a>\n\n## {(summaries | photographs)[folder]["paper"]}')
        for heading, on, found in (((), "emoji", summaries), ((report.PHOTOGRAPHS,), "photos", photographs)):
            if folder in found:
                other = summaries.get(folder) if on == "photos" else None
                page += [*heading, *section(study_of(folder, on), found[folder], other)]
    return "\n\n".join(page) + "\n"


def with_verdicts(readme: str, summaries: dict[str, dict], photographs: dict[str, dict]) -> str:
    """The root README, with `totals` between its marks, and with the last two cells of each paper's table row filled:
    minutes of the default study on two cores, and the counts of verdicts on the paper's primary claims."""
    begin, end = "<!-- totals -->\n", "<!-- /totals -->"
    if begin in readme:
        head, rest = readme.split(begin)
        text = textwrap.fill(totals(primary_rows(summaries), primary_rows(photographs)), 128)
        readme = f"{head}{begin}{text}\n{end}{rest.split(end)[1]}"
    for folder, summary in summaries.items():
        words = in_words([row for row in summary["claims"] if row["primary"]], ORDER)
        cells = f"{study_of(folder).minutes['core'] * len(Options().seeds):.0f} | {words}"
        readme = re.sub(
            rf"^(\| \[`{folder}/`\].*?\|)[^|\n]*\|[^|\n]*\|$", rf"\g<1> {cells} |", readme, flags=re.MULTILINE
        )
    return readme


def overview_table(summaries: dict[str, dict]) -> str:
    """Table of the number of claims of each paper by verdict."""
    return table(
        [
            {"paper": f"[{summary['paper']}](#{folder})"}
            | {verdict: n or "" for verdict, n in counts(summary["claims"]).items()}
            for folder, summary in summaries.items()
        ]
    )


def section(study: Study, summary: dict, other: dict | None) -> list[str]:
    """Paragraphs and tables of one results file; `other`: results of the same paper on emoji."""
    folder = study.folder
    return [
        f"{report.provenance(summary)} More in [{folder}/README.md]({folder}/README.md). Command:",
        f"    {command(study, summary)}",
        f"{summary['corpus']}.",
        arms_table(study, summary),
        table(report.claim_rows(summary, other)),
    ]


# ---------------------------------------------------------------------------------------------------------------- HTML

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem } th { text-align: left; background: #f2f2f2 }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; vertical-align: top } img { max-width: 100% }
.wide { overflow-x: auto } code { background: #f2f2f2; padding: 0.1rem 0.3rem } nav a { margin-right: 1rem }
.reproduced { color: #176f2c } .same-direction { color: #6b6b00 } .not-reproduced { color: #b00020 }
"""


def html_table(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table; verdicts are coloured, and "a ± b" stays in one line."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = []
    for row in rows:
        cells = []
        for value in map(str, row.values()):
            kind = f' class="{value.replace(" ", "-")}"' if value in VERDICTS else ""
            cells.append(f"<td{kind}>{html.escape(value).replace(' ± ', '&nbsp;±&nbsp;')}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def picture(path: Path) -> str:
    """A PNG as an embedded HTML image."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{html.escape(path.stem.replace("_", " "))}">'


def html_page(summaries: dict[str, dict], photographs: dict[str, dict], pictures: Path) -> str:
    """Text of report.html: results as in RESULTS.md, with embedded plots."""
    overview = [{"paper": each["paper"]} | counts(each["claims"]) for each in summaries.values()]
    overview += [
        {"paper": f"{each['paper']}, on photographs"} | counts(each["claims"]) for each in photographs.values()
    ]
    folders = sorted(summaries | photographs)
    links = "".join(f'<a href="#{folder}">{html.escape(folder)}</a>' for folder in folders)
    meanings = "".join(f"<li><b>{verdict}</b>: {meaning}</li>" for verdict, meaning in VERDICTS.items())
    page = [f"<h1>Results</h1><p>{INTRODUCTION}</p><nav>{links}</nav>"]
    primary, beside = primary_rows(summaries), primary_rows(photographs)
    if primary:
        page.append(f"<p>{totals(primary, beside)} {CERTAINTY}</p><p>{COLUMNS} {FLOOR}</p>{html_table(primary)}")
    if beside:
        page.append(f"<h2>On photographs</h2><p>{BESIDE}</p>{html_table(beside)}")
    page.append(f"<h2>All claims</h2>{html_table(overview)}<ul>{meanings}</ul>")
    page.append(f"<p>{html.escape(report.STARS.strip())}</p>")
    for folder in folders:
        page.append(f'<h2 id="{folder}">{html.escape((summaries | photographs)[folder]["paper"])}</h2>')
        if folder in summaries:
            page += html_section(study_of(folder), summaries[folder], None, pictures)
        if folder in photographs:
            page.append(f"<h3>{report.PHOTOGRAPHS.strip('# ')}</h3>")
            page += html_section(
                study_of(folder, "photos"), photographs[folder], summaries.get(folder), pictures / "photos"
            )
    head = f'<meta charset="utf-8"><title>paper-clips: results</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(page)}</body></html>\n'


def html_section(study: Study, summary: dict, other: dict | None, pictures: Path) -> list[str]:
    """HTML of `section`, with the plots of the study."""
    folder = study.folder
    page = [f"<p>{html.escape(text)}</p>" for text in (report.provenance(summary), f"{summary['corpus']}.")]
    claims = html_table(report.claim_rows(summary, other))
    file = "" if (pictures / f"{folder}.json").is_file() else f"runs/{study.home}/results.json"
    page.append(f"<p><code>{html.escape(command(study, summary, file))}</code></p>{claims}")
    page.append(html_table(report.arms_rows(named_arms(study, summary), study.metrics, summary["floors"])))
    found = [*pictures.glob(f"{folder}_*.png"), *pictures.glob(f"{folder}/{folder}_*.png")]
    return page + [picture(path) for path in sorted(found)]


def read(folder: Path) -> dict[str, dict]:
    """{paper: results}, read from folder/PAPER.json or folder/PAPER/results.json. UserError if they are not its."""
    files = {paper: (folder / f"{paper}.json", folder / paper / "results.json") for paper in sorted(presets.folders())}
    found = ((paper, path) for paper, paths in files.items() for path in paths if path.is_file())
    return {paper: report.read_results(path, study_of(paper).paper) for paper, path in found}


def judge_again(folder: Path, on: str) -> None:
    """Judge the claims of results files again, with the current studies, and write the files that changed."""
    for paper, summary in read(folder).items():
        if summary != (again := study_of(paper, on).judged_again(summary)):
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
    if committed:
        write_text("RESULTS.md", markdown(found, photographs))
        readme = Path("README.md")
        write_text(readme, with_verdicts(readme.read_text(encoding="utf-8"), found, photographs))
        for paper in papers:
            report.update_readme(paper)
    page = Path("report.html") if committed else folder / "report.html"
    write_text(page, html_page(found, photographs, folder))
    print(f"{'READMEs, RESULTS.md and ' * committed}{page}: {len(papers)} papers")


if __name__ == "__main__":
    cli.command_line(main)
