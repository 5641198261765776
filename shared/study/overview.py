"""One page of all results: `python -m shared.study.overview` writes RESULTS.md, and report.html with the plots in it.

Both are made of results/*.json and results/*.png alone; nothing is typed. The HTML page holds its pictures and opens
offline. `python -m shared.study.overview runs` makes runs/report.html of what was reproduced here.
"""

import argparse
import base64
import html
import importlib
from collections import Counter
from pathlib import Path
from typing import Any

from shared import cli, presets
from shared.checkpoints import read_json
from shared.evaluation import table
from shared.study import report
from shared.study.runner import Study
from shared.study.verdicts import VERDICTS, shown

INTRODUCTION = (
    "Everything here was measured on the embedded emoji corpus, a stand-in for the papers' data that fits on a laptop: "
    "it shows whether an effect is there at its scale, never a paper's number. Intervals are of differences paired by "
    "seed, unless a row says by what (encoders, concepts)."
)


def study_of(folder: str) -> Study:
    return importlib.import_module(f"{folder}.study").STUDY


def command(folder: str, summary: dict) -> str:
    """The command that measures a folder's results again."""
    seeds, core = " ".join(map(str, summary["seeds"])), {arm.name for arm in study_of(folder).chosen("core")}
    every = "" if set(summary["arms"]) <= core else " ARMS=all"
    return f'make reproduce-{folder.replace("_", "-")} SEEDS="{seeds}"{every} RESULTS=results/{folder}.json'


def provenance(summary: dict) -> str:
    seeds = ", ".join(map(str, summary["seeds"]))
    return f"Seeds {seeds}; measured {summary['date']} at commit {summary['commit']} on {summary['machine']}."


def counts(summary: dict) -> dict[str, int]:
    """How many of a paper's claims have each verdict."""
    found = Counter(row["verdict"] for row in shown(summary["claims"]))
    return {verdict: found[verdict] for verdict in VERDICTS}


def primary_rows(summaries: dict[str, dict]) -> list[dict[str, Any]]:
    """What the abstracts state, a row a claim: floor, means of both arms, difference, seeds, verdict."""
    rows = []
    for folder, summary in summaries.items():
        primary = [row for row in summary["claims"] if row.get("primary")]
        for row, line in zip(primary, shown(primary), strict=True):
            numbers = {name: row.get(name) for name in ("floor", "baseline", "method")}
            about = {"paper": folder, "claim": row["claim"], "the paper's": row["paper"]}
            about |= {name: "-" if number is None else f"{number:.2f}" for name, number in numbers.items()}
            rows.append(about | {"difference": line["here"], "seeds": len(summary["seeds"]), "verdict": row["verdict"]})
    return rows


def settled(rows: list[dict[str, Any]]) -> str:
    """How many of the primary claims have an answer."""
    n = sum(row["verdict"] not in ("not testable here", "has not learned", "not resolved") for row in rows)
    return (
        f"Of {len(rows)} claims of abstracts, {n} have a verdict that seeds resolve ({n / len(rows):.0%}). Floor: what "
        "chance, raw pixels or the pretrained tower itself reach in the metric by which a claim's arms are known to "
        "have learned, mostly the claim's own."
    )


def named_arms(folder: str, summary: dict) -> tuple[dict[str, dict], dict[str, str]]:
    """(metrics of each arm by its heading, heading of each metric), as the folder's README shows them."""
    study = study_of(folder)
    return {study.headings.get(arm, arm): values for arm, values in summary["arms"].items()}, study.metrics


def arms_table(folder: str, summary: dict) -> str:
    """Floors, ceilings and arms as a Markdown table."""
    arms, metrics = named_arms(folder, summary)
    return table(report.arms_rows(arms, metrics, summary["floors"]))


# ------------------------------------------------------------------------------------------------------------ Markdown


def markdown(summaries: dict[str, dict]) -> str:
    """RESULTS.md: how the claims of each paper came out, then claim by claim."""
    overview = [
        {"paper": f"[{summary['paper']}](#{folder})"} | {verdict: n or "" for verdict, n in counts(summary).items()}
        for folder, summary in summaries.items()
    ]
    primary = primary_rows(summaries)
    page = ["# Results", INTRODUCTION]
    page += [settled(primary), table(primary)] if primary else []
    page += ["## All claims", table(overview)]
    page.append("\n".join(f"- **{verdict}**: {meaning}" for verdict, meaning in VERDICTS.items()))
    page.append(report.STARS.strip())
    for folder, summary in summaries.items():
        page += [
            f'<a id="{folder}"></a>\n\n## {summary["paper"]}',
            f"{provenance(summary)} More in [{folder}/README.md]({folder}/README.md). Again:",
            f"    {command(folder, summary)}",
            *([f"{summary['corpus']}.", arms_table(folder, summary)] if "floors" in summary else []),
            table(shown(summary["claims"])),
        ]
    return "\n\n".join(page) + "\n"


# ---------------------------------------------------------------------------------------------------------------- HTML

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem } th { text-align: left; background: #f2f2f2 }
th, td { border-bottom: 1px solid #ddd; padding: 0.25rem 0.6rem; vertical-align: top } img { max-width: 100% }
.wide { overflow-x: auto } code { background: #f2f2f2; padding: 0.1rem 0.3rem } nav a { margin-right: 1rem }
.reproduced { color: #176f2c } .same-direction { color: #6b6b00 } .not-reproduced { color: #b00020 }
"""


def html_table(rows: list[dict[str, Any]]) -> str:
    """Rows as an HTML table; a cell that is a verdict gets its colour."""
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in rows[0])
    body = []
    for row in rows:
        cells = []
        for value in map(str, row.values()):
            kind = f' class="{value.replace(" ", "-")}"' if value in VERDICTS else ""
            cells.append(f"<td{kind}>{html.escape(value)}</td>")
        body.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def picture(path: Path) -> str:
    """A PNG inside the page."""
    content = base64.b64encode(path.read_bytes()).decode()
    return f'<img src="data:image/png;base64,{content}" alt="{html.escape(path.stem.replace("_", " "))}">'


def html_page(summaries: dict[str, dict], pictures: Path) -> str:
    """report.html: the page of RESULTS.md with the arms' tables and the plots, in one file."""
    overview = [{"paper": summary["paper"]} | counts(summary) for summary in summaries.values()]
    links = "".join(f'<a href="#{folder}">{html.escape(folder)}</a>' for folder in summaries)
    meanings = "".join(f"<li><b>{verdict}</b>: {meaning}</li>" for verdict, meaning in VERDICTS.items())
    page, primary = [f"<h1>Results</h1><p>{INTRODUCTION}</p><nav>{links}</nav>"], primary_rows(summaries)
    page += [f"<p>{settled(primary)}</p>{html_table(primary)}"] if primary else []
    page.append(f"<h2>All claims</h2>{html_table(overview)}<ul>{meanings}</ul>")
    page.append(f"<p>{html.escape(report.STARS.strip())}</p>")
    for folder, summary in summaries.items():
        arms, metrics = named_arms(folder, summary)
        page.append(f'<h2 id="{folder}">{html.escape(summary["paper"])}</h2><p>{html.escape(provenance(summary))}</p>')
        if "corpus" in summary:
            page.append(f"<p>{html.escape(summary['corpus'])}.</p>")
        page.append(
            f"<p><code>{html.escape(command(folder, summary))}</code></p>{html_table(shown(summary['claims']))}"
        )
        page.append(html_table(report.arms_rows(arms, metrics, summary.get("floors"))))
        found = [*pictures.glob(f"{folder}_*.png"), *pictures.glob(f"{folder}/{folder}_*.png")]
        page += [picture(path) for path in sorted(found)]
    head = f'<meta charset="utf-8"><title>paper-clips: results</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(page)}</body></html>\n'


def read(folder: Path) -> dict[str, dict]:
    """{paper: its results}, of folder/PAPER.json or folder/PAPER/results.json."""
    files = {paper: (folder / f"{paper}.json", folder / paper / "results.json") for paper in sorted(presets.folders())}
    return {paper: read_json(path) for paper, paths in files.items() for path in paths if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=Path("results"), help="results, or runs")
    folder = parser.parse_args().folder
    if not (found := read(folder)):
        raise ValueError(f"{folder} holds no results: 'make reproduce-all' makes some")
    committed = folder == Path("results")
    if committed:
        Path("RESULTS.md").write_text(markdown(found))
        for paper in found:
            report.update_readme(paper)
    page = Path("report.html") if committed else folder / "report.html"
    page.write_text(html_page(found, folder))
    print(f"{'READMEs, RESULTS.md and ' * committed}{page}: {len(found)} papers")


if __name__ == "__main__":
    cli.command_line(main)
