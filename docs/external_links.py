"""The links of the documentation that lead out of the repository, one per line with the pages that have them.

python docs/external_links.py          the list
python docs/external_links.py --ask    request each link; exit code 1 if one does not answer. Needs a network
"""

from __future__ import annotations

import argparse
import re
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"https?://[^\s)>\]`\"']+[^\s)>\]`\"'.,;:]")
# examples, and addresses inside a cluster
OURS = re.compile(r"https?://(HEAD|HOST|localhost|127\.)")


def main() -> int:
    parser = argparse.ArgumentParser(description="List the external links of the documentation.")
    parser.add_argument("--ask", action="store_true", help="request each link (needs a network)")
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
    """The error of a request, or an empty text if the link answers."""
    request = urllib.request.Request(link, headers={"User-Agent": "links of a documentation"})
    try:
        with urllib.request.urlopen(request, timeout=20):
            return ""
    except (OSError, ValueError) as error:
        return str(error)


if __name__ == "__main__":
    sys.exit(main())
