"""Hook of mkdocs: the pages of the site, with equations as MathML, which needs no script.

Every file keeps its path in the repository, so that relative links lead to the same places as on GitHub.
"""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from shared import presets
from studies.harness import companion, overview

ROOT = Path(__file__).parents[2]
PAGES = ("*.md", "*/README.md", "docs/*.md", "results/*.md", "results/machines/*.md")
LINK = re.compile(r"\[([^]]*)\]\(([^)#\s]+)")


def made() -> dict[str, str]:
    """{path: HTML} of the report and of the companion pages, without the authors' source."""
    results = ROOT / "results"
    found, photographs = overview.read(results), overview.read(results / "photos")
    html = {"report.html": overview.html_page((ROOT / "RESULTS.md").read_text(), found, photographs, results)}
    for folder in presets.folders():
        tests = companion.tests_in(results / f"parity/{folder}.json")
        html[f"companion/{folder}.html"] = companion.page(companion.read(folder), {}, tests)
    return html


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """The files of the theme, the pages, and what they show or link to."""
    theme = [file for file in files if file.src_dir != config.docs_dir]
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {(page.parent / link[2]).resolve() for page in pages for link in LINK.finditer(page.read_text())}
    paths = pages | {ROOT / "docs/site.css"} | {path for path in linked if path.is_file()}
    names = sorted(str(path.relative_to(ROOT)) for path in paths)
    own = [File.generated(config, name, abs_src_path=str(ROOT / name)) for name in names]
    return Files([*theme, *own, *(File.generated(config, name, content=html) for name, html in made().items())])


def on_page_markdown(text: str, page: Page, **_) -> str:
    """A page with its equations, with lists that do not end the paragraph above them, and without links to folders."""
    name = Path(page.file.src_uri)
    if str(name.parent) in presets.folders():
        text = text.replace("\n", f"\n\n[Equations beside the source](../companion/{name.parent}.html)\n", 1)
    if name.name == "RESULTS.md":
        text = text.replace("\n", "\n\n[All tables and plots on one page](report.html)\n", 1)
    for link in LINK.finditer(text):
        if (ROOT / name.parent / link[2]).is_dir():
            text = text.replace(f"{link[0]})", link[1])
    text = re.sub(r"^(?![- ])(.+)\n(?=- )", r"\1\n\n", text, flags=re.MULTILINE)
    equation = re.compile(r"^\$\$\n(.*?)\n\$\$$", flags=re.MULTILINE | re.DOTALL)
    return equation.sub(lambda found: companion.equation(found[1]), text)
