"""Markdown as HTML pages that open offline. Raw HTML in Markdown is shown as text, and comments are left out."""

import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).with_name("templates")),
    autoescape=lambda name: name.endswith(".html"),
    trim_blocks=True,
    lstrip_blocks=True,
)
MARKDOWN = MarkdownIt("commonmark", {"html": False}).enable("table")  # links with javascript: stay text, too


def rendered(template: str, **values: Any) -> str:
    """The text of a template. In .html templates, strings are escaped and `Markup` is not."""
    return TEMPLATES.get_template(template).render(values)


def to_html(markdown: str) -> Markup:
    """Markdown as HTML, without its comments."""
    return Markup(MARKDOWN.render(re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL)))
