"""The links of the documentation that lead out of the repository, one a line with the pages that have them.

python docs/external_links.py          the list
python docs/external_links.py --ask    asks each whether it is there; exit code 1 where one is not. Needs a network
"""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"https?://[^\s)>\]`\"']+[^\s)>\]`\"'.,;:]")
# examples, and addresses inside of a cluster
OURS = re.compile(r"https?://(HEAD|HOST|localhost|127\.)")


def main() -> int:
    parser = argparse.ArgumentParser(description="List the external links of the documentation.")
    parser.add_argument("--ask", action="store_true", help="ask each whether it is there (needs a network)")
    options = parser.parse_args()
    missing = 0
    for link, pages in sorted(collect().items()):
        answer = ask(link) if options.ask else ""
        missing += bool(answer)
        print(f"{link}  {', '.join(pages)}" + (f"  {answer}" if answer else ""))
    if missing:
        print(f"{missing} do not answer", file=sys.stderr)
    return 1 if missing else 0


def collect() -> dict[str, list[str]]:
    """Link -> the pages that have it."""
    found: dict[str, list[str]] = {}
    for page in sorted({*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/**/README.md")}):
        for link in sorted(set(LINK.findall(page.read_text(encoding="utf-8")))):
            if not OURS.match(link):
                found.setdefault(link, []).append(str(page.relative_to(ROOT)))
    return found


def ask(link: str) -> str:
    """What is wrong with it; nothing where it answers."""
    request = urllib.request.Request(link, headers={"User-Agent": "links of a documentation"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return ""
    except (OSError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
