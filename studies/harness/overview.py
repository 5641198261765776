"""All results: `python -m studies.harness.overview` writes RESULTS.md, report.html, and the tables in READMEs and
results/PAPER.md.

They are generated from the .json and .png files in results/ and results/photos/. The HTML page embeds its plots and
opens offline. `python -m studies.harness.overview runs` writes only runs/report.html, from the results in runs.
"""

import argparse
import base64
import re
import textwrap
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import pandas as pd
from markupsafe import Markup

from shared import cli, presets
from shared.checkpoints import write_json, write_text
from shared.errors import UserError
from shared.evaluation import table
from studies.harness import pages, report, runner
from studies.harness.runner import Options, Study, study_of
from studies.harness.verdicts import VERDICTS, shown

GROUPS = {  # in the order in which verdicts are counted
    "hold here": ("reproduced", "same direction"),
    "do not hold": ("not reproduced",),
    "equal within d": ("no difference above d",),
    "open": ("not resolved", "has not learned", "not testable here"),
}
ORDER = [verdict for verdicts in GROUPS.values() for verdict in verdicts]
GROUP_OF = {verdict: group for group, verdicts in GROUPS.items() for verdict in verdicts}
COLUMNS = ["paper", "claim", "verdict", "difference", "d", "in the paper", "floor", "baseline", "method"]
COLUMNS += ["seeds", "pictures"]  # of the table of claims of abstracts
Summaries = dict[str, dict]  # {folder: results}

# -------------------------------------------------------------------------------------------------------------- claims


def pictures_of(summary: dict) -> str:
    """The study's pictures, from its text about the corpus: emoji, scenes (made of emoji) or photographs."""
    text = summary["corpus"].lower()
    if text.startswith("scenes"):
        return "scenes"
    return ", ".join(kind for kind in ("emoji", "scenes", "photographs") if kind in text)


def claims_of(summaries: Summaries) -> pd.DataFrame:
    """A row per claim: `COLUMNS`, and whether it is `primary` (of an abstract), and the `group` of its verdict.

    The floor is shown if it is in the claim's metric, not if the arms are compared with it in another one.
    """
    rows = []
    for folder, summary in summaries.items():
        for row, line in zip(summary["claims"], shown(summary["claims"]), strict=True):
            numbers = {name: row.get(name) for name in ("floor", "baseline", "method")}
            if numbers["floor"] not in [floor.get(row["metric"]) for floor in summary["floors"].values()]:
                numbers["floor"] = None
            about = {"paper": folder, "claim": row["claim"], "verdict": row["verdict"], "difference": line["here"]}
            about |= {"d": line["d"], "in the paper": row["paper"]}
            about |= {name: "-" if number is None else f"{number:.2f}" for name, number in numbers.items()}
            about |= {"seeds": row.get("seeds", "-"), "pictures": pictures_of(summary)}
            rows.append(about | {"primary": row["primary"], "group": GROUP_OF.get(row["verdict"])})
    return pd.DataFrame(rows, columns=[*COLUMNS, "primary", "group"])


def abstracts(claims: pd.DataFrame) -> pd.DataFrame:
    """The claims of abstracts, by paper."""
    return claims[claims.primary.astype(bool)]


def in_words(verdicts: Iterable[str], order: Iterable[str]) -> str:
    """The number of verdicts of each kind, such as "2 reproduced, 1 not resolved"."""
    counts = pd.Series(list(verdicts), dtype=object).value_counts()
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in order if verdict in counts)


def elsewhere(primary: pd.DataFrame, beside: pd.DataFrame) -> pd.DataFrame:
    """The claims of `primary` that are resolved on photographs, with a verdict of another group, such as open; this
    verdict is in the column `there`."""
    resolved = beside[beside.group != "open"].rename(columns={"verdict": "there", "group": "group_there"})
    both = primary.merge(resolved[["paper", "claim", "there", "group_there"]], on=["paper", "claim"])
    return both[both.group != both.group_there]


def totals(primary: pd.DataFrame, beside: pd.DataFrame) -> str:
    """Sentences with the number of claims of abstracts that hold, that do not, and that are open.

    beside: the claims of abstracts on photographs.
    """
    found = {group: in_words(primary.verdict, verdicts) for group, verdicts in GROUPS.items()}
    numbers = "; ".join(f"{group}: {words}" for group, words in found.items() if words)
    resolved, others = int((primary.group != "open").sum()), elsewhere(primary, beside)
    too = int((others.group == "open").sum())
    photographs = (
        f" On photographs, {too} of the open ones are resolved, so {resolved + too} "
        f"({(resolved + too) / len(primary):.0%}) have a resolved verdict on pictures of at least one kind; "
        f"{len(others) - too} of those that are resolved on both come out differently on photographs."
    )
    return (
        f"Of {len(primary)} claims of abstracts, {resolved} have a resolved verdict on emoji or scenes "
        f"({resolved / len(primary):.0%}). {numbers[0].upper()}{numbers[1:]}.{photographs if len(others) else ''}"
    )


def by_paper(primary: pd.DataFrame, beside: pd.DataFrame) -> str:
    """A list with an item for each paper: its claims by verdict, differences of the open ones, the verdicts of
    `elsewhere`, and what abbreviations mean."""
    there = elsewhere(primary, beside).set_index(["paper", "claim"]).there
    lines = []
    for paper, of_paper in primary.groupby("paper"):
        texts = []
        for verdict in ORDER:
            names = []
            for row in of_paper[of_paper.verdict == verdict].itertuples():
                notes = [row.difference] if row.group == "open" else []
                if (paper, row.claim) in there:
                    notes.append(f"on photographs: {there[paper, row.claim]}")
                names.append(row.claim + (f" ({'; '.join(notes)})" if notes else ""))
            texts += [f"**{verdict.capitalize()}**: {'; '.join(names)}"] if names else []
        lines.append(f"- [{paper}](#{paper}). {'. '.join(texts)}. {study_of(paper).terms}".rstrip())
    return "\n".join(lines)


def asked_twice(claims: pd.DataFrame, photographs: pd.DataFrame) -> pd.DataFrame:
    """The claims that were tested both on emoji or scenes and on photographs, with both verdicts."""
    untested = ("no claim", "not testable here")
    here, there = (each[~each.verdict.isin(untested)][["paper", "claim", "verdict"]] for each in (claims, photographs))
    both = there.merge(here, on=["paper", "claim"], suffixes=(" there", " here"))
    both = both.rename(columns={"verdict here": "on emoji or scenes", "verdict there": "on photographs"})
    return both[["paper", "claim", "on emoji or scenes", "on photographs"]]


def counts_table(summaries: Summaries) -> str:
    """Table of the number of claims of each paper by verdict."""
    claims = claims_of(summaries)
    counts = pd.crosstab(claims.paper, claims.verdict).reindex(index=list(summaries), columns=list(VERDICTS)).fillna(0)
    papers = {folder: f"[{summary['paper']}](#{folder})" for folder, summary in summaries.items()}
    return table([{"paper": papers[folder]} | {name: int(n) or "" for name, n in counts.loc[folder].items()}
                  for folder in papers])  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- pages


def command(study: Study, summary: dict, file: str = "") -> str:
    """The command that reproduces the results in `file`, by default the study's in results/; arms with more seeds than
    others have a command of their own, which writes into runs/."""
    runs, name = {arm: len(each) for arm, each in report.by_seed(summary).items()}, study.folder.replace("_", "-")
    file, variables = file or f"results/{study.home}.json", study.variables_of(summary)
    where = f" {variables}" if variables else ""
    where += "" if study.on == "emoji" else f" CORPUS={study.on} PHOTOS=FOLDER"

    def line(seeds: Sequence[int], arms: Collection[str]) -> str:
        core = {arm.name for arm in study.chosen("core")}
        more = [arm.name for arm in study.arms if arm.name in arms and not arm.core]
        words = [*(["core"] if core <= set(arms) else [arm for arm in arms if arm in core]), *more]
        names = "all" if len(arms) == len(study.arms) else f'"{" ".join(words)}"'
        chosen = ("" if words == ["core"] else f" ARMS={names}") + where
        return f'make reproduce-{name} SEEDS="{" ".join(map(str, seeds))}"{chosen}'

    first, *more = sorted(set(runs.values()))
    lines = [f"{line(summary['seeds'][:first], list(runs))} RESULTS={file}"]
    lines += [line(summary["seeds"][:n], [arm for arm in runs if runs[arm] >= n]) for n in more]
    return " && ".join(lines)


def parts_of(folder: str, here: Summaries, photographs: Summaries) -> list[tuple[Study, dict, dict | None]]:
    """(study, results, results of the same paper on emoji) of a paper on each of its corpora."""
    found = [(study_of(folder), here[folder], None)] if folder in here else []
    if folder in photographs:
        found.append((study_of(folder, "photos"), photographs[folder], here.get(folder)))
    return found


def sections(here: Summaries, photographs: Summaries, home: str = "results") -> dict[str, str]:
    """{folder: Markdown} of all papers: provenance, command, both tables, of each corpus. home: folder of the results,
    which decides where commands write."""
    found = {}
    for folder in sorted(here | photographs):
        paragraphs = [f"## {(here | photographs)[folder]['paper']}"]
        for study, summary, other in parts_of(folder, here, photographs):
            file = "" if home == "results" else f"runs/{study.home}/results.json"
            paragraphs += ["### On photographs"] if study.on == "photos" else []
            paragraphs += [
                f"{report.provenance(summary)} More in [results/{folder}.md](results/{folder}.md). Command:",
                f"    {command(study, summary, file)}",
                f"{summary['corpus']}.",
                report.named_arms(study, summary),
                report.claims_table(summary, other),
            ]
        found[folder] = "\n\n".join(paragraphs)
    return found


def first_part(here: Summaries, photographs: Summaries) -> str:
    """Markdown of what comes before the papers' sections: claims of abstracts, counts of verdicts, definitions."""
    claims, beside = claims_of(here), claims_of(photographs)
    both, primary, primary_beside = asked_twice(claims, beside), abstracts(claims), abstracts(beside)
    same = both[both["on photographs"] == both["on emoji or scenes"]]
    return pages.rendered(
        "results.md",
        totals=totals(primary, primary_beside) if len(primary) else "",
        by_paper=by_paper(primary, primary_beside) if len(primary) else "",
        primary=table(primary[COLUMNS].to_dict("records")) if len(primary) else "",
        counts=counts_table(here),
        beside=table(primary_beside[COLUMNS].to_dict("records")) if len(primary_beside) else "",
        counts_beside=counts_table(photographs) if photographs else "",
        asked=len(both),
        same=len(same),
        open_on_both=sum(GROUP_OF[verdict] == "open" for verdict in same["on photographs"]),
        both=table(both.to_dict("records")) if len(both) else "",
        verdicts=VERDICTS,
    )


def markdown(here: Summaries, photographs: Summaries) -> str:
    """Text of RESULTS.md."""
    papers = (f'<a id="{folder}"></a>\n\n{text}' for folder, text in sections(here, photographs).items())
    return "\n\n".join([first_part(here, photographs), *papers]) + "\n"


def html_page(here: Summaries, photographs: Summaries, home: Path) -> str:
    """Text of report.html: RESULTS.md with the plots in `home`, as a page that needs no other file."""

    def to_html(text: str) -> Markup:
        html = str(pages.to_html(text)).replace(" ± ", "&nbsp;±&nbsp;")  # stays in one line
        html = re.sub(
            f"<td>({'|'.join(VERDICTS)})</td>",
            lambda cell: cell[0].replace("<td", f'<td class="{cell[1].replace(" ", "-")}"'),
            html,
        )  # noqa: E501
        return Markup(re.sub(r"<table>.*?</table>", r'<div class="wide">\g<0></div>', html, flags=re.DOTALL))

    def plots(folder: str) -> list[tuple[str, str]]:
        homes = [home] * (folder in here) + [home / "photos"] * (folder in photographs)
        names = [f"{folder}_*.png", f"{folder}/{folder}_*.png"]
        files = [file for each in homes for name in names for file in sorted(each.glob(name))]
        return [(file.stem.replace("_", " "), base64.b64encode(file.read_bytes()).decode()) for file in files]

    papers = sections(here, photographs, home.name).items()
    return pages.rendered(
        "report.html",
        first=to_html(first_part(here, photographs)),
        papers=[(folder, to_html(text), plots(folder)) for folder, text in papers],
    )


def with_verdicts(readme: str, here: Summaries, photographs: Summaries) -> str:
    """The root README, with `totals` between its marks, and with the last two cells of each paper's table row filled:
    minutes of the default study on two cores, and the counts of verdicts on the paper's claims of the abstract."""
    primary = abstracts(claims_of(here))
    if "<!-- totals -->\n" in readme:
        text = textwrap.fill(totals(primary, abstracts(claims_of(photographs))), 128)
        readme = between(readme, "totals", f"{text}\n")
    for folder in here:
        words = in_words(primary[primary.paper == folder].verdict, ORDER)
        cells = f"{study_of(folder).minutes['core'] * len(Options().seeds):.0f} | {words}"
        row = rf"^(\| \[`{folder}/`\].*?\|)[^|\n]*\|[^|\n]*\|$"
        readme = re.sub(row, rf"\g<1> {cells} |", readme, flags=re.MULTILINE)
    return readme


def between(page: str, mark: str, text: str) -> str:
    """A page with `text` between its comments <!-- mark --> and <!-- /mark -->."""
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->"
    head, rest = page.split(begin, 1)
    return head + begin + text + end + rest.split(end, 1)[1]


def claims_block(here: dict | None, photographs: dict | None) -> str:
    """Table of a paper's claims of the abstract, on emoji or scenes and on photographs."""
    found = [each for each in (here, photographs) if each]
    rows = {row["claim"]: {} for each in found for row in each["claims"] if row["primary"]}
    for summary in found:
        for row, line in zip(summary["claims"], shown(summary["claims"]), strict=True):
            if row["claim"] in rows:
                on, about = pictures_of(summary), {"claim": row["claim"], "in the paper": row["paper"]}
                found_here = {f"on {on}": line["here"], f"verdict on {on}": row["verdict"]}
                rows[row["claim"]] = about | rows[row["claim"]] | found_here
    columns = dict.fromkeys(name for row in rows.values() for name in row)
    return table([{name: row.get(name, "-") for name in columns} for row in rows.values()])


def with_claims(readme: str, folder: str, here: Summaries, photographs: Summaries) -> str:
    """A paper's README, with its claims of the abstract between their comments."""
    return between(readme, "claims", claims_block(here.get(folder), photographs.get(folder)) + "\n")


def with_results(page: str, folder: str, here: Summaries, photographs: Summaries) -> str:
    """results/<folder>.md, with its results, and with results/bench/<folder>.md if there is one, between comments."""
    found = [pages.rendered("block.md", study=study, summary=summary, provenance=report.provenance(summary),
                            arms=report.named_arms(study, summary), claims=report.claims_table(summary, other)) + "\n"
             for study, summary, other in parts_of(folder, here, photographs)]  # fmt: skip
    page = between(page, "results", "\n".join(found))
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
    here, photographs = read(folder), read(folder / "photos")
    if not (papers := sorted(here | photographs)):
        raise UserError(f"{folder} holds no results: run 'make reproduce-all'")
    if committed:
        write_text("RESULTS.md", markdown(here, photographs))
        for paper in papers:
            for path, filled in ((Path(paper, "README.md"), with_claims), (folder / f"{paper}.md", with_results)):
                write_text(path, filled(path.read_text(encoding="utf-8"), paper, here, photographs))
        write_text("README.md", with_verdicts(Path("README.md").read_text(encoding="utf-8"), here, photographs))
    page = Path("report.html") if committed else folder / "report.html"
    write_text(page, html_page(here, photographs, folder))
    print(f"{'READMEs, RESULTS.md and ' * committed}{page}: {len(papers)} papers")


if __name__ == "__main__":
    cli.command_line(main)
