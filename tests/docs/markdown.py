"""Markdown as GitHub reads it, as far as the tests of the documentation ask: headings, links, code, tables."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

FENCE = re.compile(r"^( *)(`{3,}|~{3,}).*?^\1\2`*[ ]*$", re.DOTALL | re.MULTILINE)
INDENTED = re.compile(r"(?:(?<=\n\n)|\A)(?: {4}.*\n(?:\n(?= {4}))*)+", re.MULTILINE)
SPAN = re.compile(r"(`+)(.+?)\1(?!`)", re.DOTALL)


@cache
def prose(page: Path) -> str:
    """The page without blocks of code."""
    return INDENTED.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))


def blocks(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    yield from (match[0] for match in FENCE.finditer(text))
    yield from (match[0] for match in INDENTED.finditer(FENCE.sub("", text)))


def code_spans(page: Path) -> Iterator[str]:
    """What stands in backticks."""
    yield from (match[2] for match in SPAN.finditer(prose(page)))


def links(page: Path) -> Iterator[str]:
    """Targets of links and images that stay in the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", SPAN.sub("code", prose(page))):
        if not re.match(r"\w+:", target):
            yield target


@cache
def anchors(page: Path) -> frozenset[str]:
    """Of the headings, by GitHub's rules: lower case, no punctuation, hyphens for spaces.

    Not of headings that a page has twice: GitHub and the site number them differently.
    """
    if page.suffix != ".md":
        return frozenset()
    headings = re.findall(r"^#{1,6} +(.+?) *#*$", prose(page), re.MULTILINE)
    plain = (re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading) for heading in headings)
    return frozenset(re.sub(r"[^\w\- ]", "", re.sub(r"[*`]", "", text).lower()).replace(" ", "-") for text in plain)


def tables(page: Path) -> Iterator[list[list[str]]]:
    """Rows of cells; the first row is the head, the line beneath it is left out."""
    for block in re.findall(r"(?:^\|.*\|\n)+", prose(page), re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|\n").split(" | ")] for line in block.splitlines()]
        yield [row for i, row in enumerate(rows) if i != 1]
