"""report.html of a reduction: kept and dropped samples with reasons, clusters, duplicates, captions and their scores.

The page is one file without scripts. Its examples are drawn by the seed, and their thumbnails are embedded.
"""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from shared import checkpoints, data
from tldr_reduction.config import ReduceConfig
from tldr_reduction.report import check_line, self_score

SIDE = 96  # pixels of an example's longer side
CLUSTERS, MEMBERS = 8, 10  # clusters on the page, and samples of each
EXAMPLES = 10  # samples for each reason, and samples with refined captions
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
h2 { margin-top: 2em } table { border-collapse: collapse } td, th { padding: .2em .8em .2em 0; text-align: left }
svg { max-width: 100%; height: auto }
.row { display: flex; flex-wrap: wrap; gap: 10px; margin: 8px 0 18px }
figure { width: 132px; margin: 0; padding: 5px; border: 3px solid #ccc; border-radius: 4px; font-size: 11px;
  line-height: 1.25; overflow-wrap: anywhere }
figure.kept { border-color: #2a9d4a } figure img { display: block; margin: 0 auto 4px; max-width: 100% }
figure.dropped img { opacity: .65 } .new { color: #1d6f35 } .note { color: #666 }
"""


def write_page(path: Path, cfg: ReduceConfig, pairs, report: dict, columns: dict[str, Sequence]) -> None:
    """Write the page from the entries of report.json and the columns of report.csv; `pairs` has the images."""
    rng = np.random.default_rng(cfg.seed)
    show = Examples(pairs, columns)
    kept = f"{report['kept']:,} of {report['samples']:,} samples kept ({100 * report['kept_share']:.1f} %)"
    body = [f"<h1>{html.escape(cfg.data)}</h1>", f"<p><b>{kept}</b></p>"]
    body += [f"<p>{html.escape(note)}</p>" for note in report["notes"]] + [facts(cfg, report)]
    if report.get("checks"):
        body += ["<h2>Is it better than a random selection?</h2>", checks(report["checks"])]
    if "itm" in report:
        body += ["<h2>Scores of captions, before and after</h2>", histogram(report["itm"])]
    if written := [row for row, text in enumerate(columns["generated"]) if text]:
        body += ["<h2>Refined captions</h2>", show.row(drawn(rng, written, EXAMPLES))]
    body += ["<h2>Why samples were kept or dropped</h2>", *reasons(columns, show, rng)]
    if copies := [row for row, key in enumerate(columns["duplicate_of"]) if key]:
        body += [f"<h2>Identical images: {len(copies):,}</h2>"]
        for row in drawn(rng, copies, EXAMPLES // 2):
            body += [show.row([columns["key"].index(columns["duplicate_of"][row]), row])]
    if "cluster" in columns:
        body += ["<h2>Clusters</h2>", *clusters(columns, show, rng)]
    page = f"<!doctype html><html lang=en><meta charset=utf-8><title>Reduction</title><style>{STYLE}</style>"
    with checkpoints.replaced(path) as file:
        file.write((page + "\n".join(body) + "</html>\n").encode())


class Examples:
    """Renders samples as HTML: thumbnails with captions, scores and reasons."""

    def __init__(self, pairs, columns: dict[str, Sequence]):
        self.pairs, self.columns = pairs, columns

    def row(self, rows: Iterable[int]) -> str:
        """HTML of samples side by side; kept ones have a green frame."""
        return f'<div class="row">{"".join(map(self.one, rows))}</div>'

    def one(self, row: int) -> str:
        """HTML of one sample."""
        line = {name: values[row] for name, values in self.columns.items()}
        words = [f"<b>{html.escape(str(line['key']))}</b>"]
        try:
            pair = self.pairs.read(row)
        except data.BrokenSample:
            picture, caption = "", ""
        else:
            picture, caption = f'<img alt="" src="{thumbnail(pair.image)}">', pair.caption
        words += [html.escape(caption[:160])]
        if line["generated"]:
            words += [f'<span class="new">{html.escape(str(line["generated"])[:160])}</span>']
        if line.get("itm", "") != "":
            after = f" to {line['itm_after']:.2f}" if line["itm_after"] != "" else ""
            words += [f'<span class="note">score {line["itm"]:.2f}{after}</span>']
        words += [f'<span class="note">{html.escape(line["reason"])}</span>']
        state = "kept" if line["kept"] else "dropped"
        return f'<figure class="{state}">{picture}{"<br>".join(word for word in words if word)}</figure>'


def thumbnail(image) -> str:
    """A PIL image as a data URL of a small JPEG."""
    small, buffer = image.copy(), io.BytesIO()
    small.thumbnail((SIDE, SIDE))
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def drawn(rng: np.random.Generator, rows: Sequence[int], count: int) -> list[int]:
    """At most `count` of the rows, drawn at random, ascending."""
    return np.sort(rng.permutation(np.asarray(rows, dtype=np.int64))[:count]).tolist()


def facts(cfg: ReduceConfig, report: dict) -> str:
    """HTML table of counts and settings."""
    made_by = cfg.captioner or cfg.encoder
    rows = [
        ("unreadable", f"{report['broken']:,}"),
        ("identical images", f"{report['identical_images']:,}"),
        ("selection", f"{cfg.select}, {cfg.keep:g}"),
        ("captions", ", by ".join(filter(None, (cfg.captions, cfg.caption_model or cfg.predictions)))),
        ("scorer", (cfg.scorer or "none") + (f" (self-score: {why})" if (why := self_score(cfg)) else "")),
    ]
    if "codes_used" in report:
        rows += [("codes", f"of {made_by}: {report['codes_used']:,} used, perplexity {report['perplexity']:.1f}")]
    if "clusters" in report:
        low, _, middle, _, high = report["cluster_sizes"]
        rows += [("clusters", f"{report['clusters']:,} of {low:.0f} to {high:.0f} samples, median {middle:.0f}")]
    return f"<table>{''.join(f'<tr><th>{a}</th><td>{html.escape(b)}</td></tr>' for a, b in rows)}</table>"


def checks(found: dict[str, dict]) -> str:
    """HTML of cohesion and coverage, one line for each kind of features."""
    lines = "".join(f"<li>{html.escape(check_line(name, check))}</li>" for name, check in found.items())
    what = (
        "Cohesion: mean cosine of two members of a cluster. Coverage: mean best cosine from a dropped sample to a kept "
        "one. Both are computed on features that were not used for the clusters. If they are no higher than at "
        "random, a random selection is as good."
    )
    return f'<p class="note">{what}</p><ul>{lines}</ul>'


def histogram(itm: dict) -> str:
    """SVG histogram of the scores of all samples before, and of the kept ones after."""
    before, after = (itm[when]["histogram"] for when in ("before", "after"))
    top, (low, high), bars = max(*before, *after, 1e-6), itm["before"]["span"], []
    for i, pair in enumerate(zip(before, after, strict=True)):
        for shift, (value, colour) in enumerate(zip(pair, ("#aaa", "#2a9d4a"), strict=True)):
            tall = 140 * value / top
            x = 40 * i + 18 * shift
            bars += [f'<rect x="{x}" y="{150 - tall:.1f}" width="16" height="{tall:.1f}" fill="{colour}"/>']
    wide = 40 * len(before)
    ends = f'<text x="0" y="168">{low:.2f}</text><text x="{wide - 40}" y="168">{high:.2f}</text>'
    words = "; ".join(
        f"{when}: mean {itm[when]['mean']:.3f}, {itm[when]['below_cut']:.1f} % below {itm[when]['cut']:.2f}"
        for when in ("before", "after")
    )
    plot = f'<svg viewBox="0 0 {wide} 175" width="{wide}">{"".join(bars)}{ends}</svg>'
    return f"<p>{words} (grey: all samples before, green: kept ones after)</p>{plot}"


def reasons(columns: dict[str, Sequence], show: Examples, rng: np.random.Generator) -> list[str]:
    """HTML of each reason with its count and examples, except identical images, which have their own section."""
    groups: dict[str, list[int]] = {}
    for row, reason in enumerate(columns["reason"]):
        if not reason.startswith("same image"):
            groups.setdefault(reason, []).append(row)
    sections = []
    for reason, rows in sorted(groups.items(), key=lambda item: -len(item[1])):
        sections += [f"<h3>{html.escape(reason or 'dropped')}: {len(rows):,}</h3>"]
        sections += [show.row(drawn(rng, rows, EXAMPLES))]
    return sections


def clusters(columns: dict[str, Sequence], show: Examples, rng: np.random.Generator) -> list[str]:
    """HTML of some clusters, from small to large, with some members of each."""
    members: dict[int, list[int]] = {}
    for row, cluster in enumerate(columns["cluster"]):
        if cluster != "":
            members.setdefault(cluster, []).append(row)
    by_size = sorted(members, key=lambda cluster: (len(members[cluster]), cluster))
    places = np.linspace(0, len(by_size) - 1, min(CLUSTERS, len(by_size))).astype(int)
    sections = []
    for cluster in (by_size[place] for place in np.unique(places)):
        rows = members[cluster]
        kept = sum(columns["kept"][row] for row in rows)
        sections += [f"<h3>cluster {cluster}: {kept} of {len(rows)} kept</h3>", show.row(drawn(rng, rows, MEMBERS))]
    return sections
