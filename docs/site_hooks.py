"""What `make docs` does beside mkdocs: files outside of docs/ that pages link to become pages, and formulas become MathML.

In the repository a page links to `../examples/quickstart.toml`; in the site that file is a page with its text. A README is a page
as it stands. A link to a folder loses its link, as a site has no folders.
"""

from __future__ import annotations

import html
import os.path
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINKED = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
BLOCK = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)
LANGUAGES = {".py": "python", ".toml": "toml", ".json": "json", ".sh": "bash", ".sbatch": "bash", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what pages link to outside of docs/, and what those link to."""
    todo = [Path(file.abs_src_path) for file in files.documentation_pages() if file.abs_src_path]
    todo += [ROOT / name for name in LINKED]
    seen: set[Path] = set()
    while todo:
        source = todo.pop()
        if source in seen:
            continue
        seen.add(source)
        place = _in_site(source)
        if files.get_file_from_path(place) is None:
            files.append(File.generated(config, place, content=_as_page(source)))
        if source.suffix == ".md":
            links = (source.parent / match[3] for match in LINK.finditer(BLOCK.sub("", source.read_text(encoding="utf-8"))))
            todo += [path for link in links if (path := Path(os.path.normpath(link))).is_file() and not _in_docs(path)]
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    place = Path(page.file.src_uri)
    source = ROOT / place if (ROOT / place).is_file() else ROOT / "docs" / place

    def in_site(match: re.Match[str]) -> str:
        image, text, link, anchor = match.groups()
        target = Path(os.path.normpath(source.parent / link))
        if target.is_dir():
            return text
        if text.endswith(".md") and target.is_file():
            text = _title(target)
        return f"{image}[{text}]({os.path.relpath(_in_site(target), place.parent)}{anchor or ''})"

    parts = re.split(f"({BLOCK.pattern})", markdown, flags=BLOCK.flags)
    return "".join(part if i % 2 else LINK.sub(in_site, part) for i, part in enumerate(parts))


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Formulas that need no script."""

    def mathml(match: re.Match[str]) -> str:
        kind, formula = match.groups()
        converted: str = convert(html.unescape(formula), display="block" if kind == "div" else "inline")
        return converted

    return FORMULA.sub(mathml, content)


def _in_docs(path: Path) -> bool:
    return path.is_relative_to(ROOT / "docs")


def _title(path: Path) -> str:
    """A reader of the site sees titles, and no files."""
    heading = re.search(r"^# (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return heading[1] if heading else path.name


def _in_site(path: Path) -> str:
    """Where a file of the repository is in the site: docs/ is its root, and every page ends in .md."""
    if path == ROOT / "README.md":
        return "index.md"  # the site opens with a page of its own
    if _in_docs(path):
        return path.relative_to(ROOT / "docs").as_posix()
    place = path.relative_to(ROOT).as_posix()
    return place if path.suffix == ".md" else f"{place}.md"


def _as_page(source: Path) -> str:
    text = source.read_text(encoding="utf-8")
    if source.suffix == ".md":
        return text
    name = source.relative_to(ROOT).as_posix()
    return f"# {source.name}\n\n`{name}`\n\n````{LANGUAGES.get(source.suffix, 'text')}\n{text}\n````\n"
