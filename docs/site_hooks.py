"""Hooks of `make docs`: links to files outside of the site lead to the repository, and formulas become MathML.

A page links to `../examples/quickstart.toml` as it does on GitHub. In the site this link leads to `repo_url`; without one
(DOCS_REPO_URL is not set), only its text remains. `mkdocs build --strict` checks all other links.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace the links to files that are not pages of the site. Raises PluginError: such a file does not exist."""

    def in_repository(match: re.Match[str]) -> str:
        text, link, anchor = match.groups()
        path = (ROOT / "docs" / page.file.src_uri).parent.joinpath(link).resolve()
        file = files.get_file_from_path(path.relative_to(ROOT / "docs").as_posix()) if _in_docs(path) else None
        if _in_docs(path) and (file is None or file.inclusion.is_included()):
            return match[0]  # mkdocs checks it
        if not path.exists():
            raise PluginError(f"{page.file.src_uri} links to {link}, which does not exist")
        if not config.repo_url:
            return text
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path.relative_to(ROOT).as_posix()}{anchor or ''})"

    parts = re.split(f"({BLOCK.pattern})", markdown, flags=BLOCK.flags)
    return "".join(part if i % 2 else LINK.sub(in_repository, part) for i, part in enumerate(parts))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas that need no script."""

    def mathml(match: re.Match[str]) -> str:
        kind, formula = match.groups()
        converted: str = convert(html.unescape(formula), display="block" if kind == "div" else "inline")
        return converted

    return FORMULA.sub(mathml, content)


def _in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs")
