"""Real, varied text for the benchmarks, as JSON lines: prose, mathematics, manuals, other languages, code.

    installed   text that is installed with the project's requirements: mostly code and its documentation
    debian      documentation packages of Debian 12, downloaded and unpacked into a folder, not installed: closer to web text

Markup is removed, long texts are cut at blank lines, and exact duplicates are dropped. Texts are ordered by their hashes. Any
part of the corpus is therefore mixed like the complete corpus, and the order does not depend on the file system.
"""

from __future__ import annotations

import gzip
import hashlib
import html
import itertools
import re
import subprocess
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, TypeAlias, get_args

import orjson

Kind: TypeAlias = Literal["prose", "mathematics", "manuals", "languages", "code"]

KINDS: tuple[Kind, ...] = get_args(Kind)
# of the corpus; code fills what a kind lacks
SHARES: dict[Kind, float] = {"prose": 0.3, "mathematics": 0.25, "manuals": 0.15, "languages": 0.15, "code": 0.15}
SHORTEST, LONGEST = 100, 32_000  # characters of a document
# lengths in characters at which long texts are cut, in turn: median and mean are like those of web pages
CUTS = [1 << n for n in range(9, 15)]

# per package: the files that contain its text once
PACKAGES: dict[str, tuple[Kind, str]] = {
    "anarchism": ("prose", "**/html/*.html"),
    "debian-handbook": ("prose", "**/en-US/*.html"),
    "dict-gcide": ("prose", "**/*.dz"),
    "gap-doc": ("mathematics", "**/chap*[0-9].html"),
    "maxima-doc": ("mathematics", "**/*.html"),
    "pari-doc": ("mathematics", "**/*.tex"),
    "sagemath-doc": ("mathematics", "**/*.html"),
    "linux-doc-6.1": ("manuals", "**/*.rst.gz"),
    "perl-doc": ("manuals", "**/*.pod"),
    "manpages-de": ("languages", "**/man[1-8]/*"),
    "manpages-fr": ("languages", "**/man[1-8]/*"),
    "manpages-ja": ("languages", "**/man[1-8]/*"),
    "manpages-ru": ("languages", "**/man[1-8]/*"),
    "manpages-zh": ("languages", "**/man[1-8]/*"),
    "debian-reference-ja": ("languages", "**/*.html"),
}
GENERATED = re.compile(r"genindex|searchindex|/_modules/", re.IGNORECASE)


@dataclass(frozen=True)
class Text:
    """One document. `source` is its package and file."""

    kind: Kind
    source: str
    text: str


@dataclass(frozen=True)
class Content:
    """Contents of a corpus. `bytes` are UTF-8 bytes by kind."""

    documents: int
    bytes: dict[Kind, int]
    ascii_bytes: int
    median_bytes: int
    longest_bytes: int

    @property
    def total(self) -> int:
        return sum(self.bytes.values())

    def __str__(self) -> str:
        kinds = ", ".join(f"{kind} {n / self.total:.0%}" for kind, n in self.bytes.items() if n)
        return (
            f"{self.total / 1e6:,.1f} MB in {self.documents:,} documents (median {self.median_bytes / 1e3:.1f} kB, longest "
            f"{self.longest_bytes / 1e3:.0f} kB), {self.ascii_bytes / self.total:.1%} of the bytes in ASCII documents; {kinds}"
        )


def write(file: Path, texts: Iterable[Text], size: int) -> Content:
    """Write about `size` bytes of text to `file`. Raises ValueError if `texts` has fewer bytes."""
    chosen = choose(texts, size)
    lengths = [len(text.text.encode()) for text in chosen]
    with file.open("wb") as lines:
        for number, text in enumerate(chosen):
            lines.write(orjson.dumps({"id": f"{text.source}#{number}", "text": text.text}) + b"\n")
    return Content(
        documents=len(chosen),
        bytes={k: sum(n for t, n in zip(chosen, lengths, strict=True) if t.kind == k) for k in KINDS},
        ascii_bytes=sum(n for t, n in zip(chosen, lengths, strict=True) if t.text.isascii()),
        median_bytes=int(median(lengths)),
        longest_bytes=max(lengths),
    )


def choose(texts: Iterable[Text], size: int) -> list[Text]:
    """Choose each text at most once, ordered by hash, with the `SHARES` of the kinds. Code replaces what a kind lacks."""
    by_hash = {hashlib.sha256(text.text.encode()).digest(): text for text in texts}
    ordered = [by_hash[digest] for digest in sorted(by_hash)]
    room: dict[Kind, float] = {kind: share * size for kind, share in SHARES.items()}
    chosen = set()
    for kind in KINDS:
        if kind == "code":
            room[kind] += sum(left for left in room.values() if left > 0) - room[kind]
        for i, text in enumerate(ordered):
            if text.kind == kind and room[kind] > 0:
                chosen.add(i)
                room[kind] -= len(text.text.encode())
    if (missing := room["code"]) > 0:
        raise ValueError(f"only {(size - missing) / 1e6:,.1f} MB of text were found, but {size / 1e6:,.1f} MB are required")
    return [ordered[i] for i in sorted(chosen)]


# ---- sources of texts


def installed() -> Iterator[Text]:
    """Texts of Python, its packages, and the manuals of the system if there are any."""
    paths = sysconfig.get_paths()
    for root in (Path(paths["purelib"]), Path(paths["stdlib"])):
        yield from _folder("code", root, "**/*.py")
        for suffix in ("md", "rst", "txt", "html"):
            yield from _folder("manuals", root, f"**/*.{suffix}")
    manuals = Path("/usr/share/man")
    yield from _folder("manuals", manuals, "man[1-8]/*.gz")
    yield from _folder("languages", manuals, "*/man[1-8]/*.gz")


def debian(cache: Path) -> Iterator[Text]:
    """Texts of documentation packages. A package that is not in `cache` is downloaded by apt-get."""
    for package, (kind, pattern) in PACKAGES.items():
        if not (cache / package).is_dir():
            _download(package, cache / package)
        yield from _folder(kind, cache / package, pattern)


def _download(package: str, folder: Path) -> None:
    archives = folder.with_name("archives")
    archives.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", "-qq", package], cwd=archives, check=True)
    (archive,) = archives.glob(f"{package}_*.deb")
    unpacked = folder.with_name(f".{package}")
    subprocess.run(["dpkg-deb", "--extract", str(archive), str(unpacked)], check=True)
    unpacked.rename(folder)
    archive.unlink()


def _folder(kind: Kind, root: Path, pattern: str) -> Iterator[Text]:
    """The texts of a folder's files. A long file gives several texts."""
    for file in sorted(root.glob(pattern)):
        if file.is_symlink() or not file.is_file() or GENERATED.search(str(file)):
            continue
        data, name = file.read_bytes(), file.name
        if data.startswith(b"\x1f\x8b"):
            data, name = gzip.decompress(data), name.removesuffix(".gz")
        source = f"{root.name}/{file.relative_to(root).as_posix()}"
        for part in _cut(_plain(name, data.decode(errors="replace"))):
            if len(part) >= SHORTEST:
                yield Text(kind, source, part)


# ---- a file -> plain texts


def _plain(name: str, text: str) -> str:
    if name.endswith(".html"):
        text = html.unescape(re.sub(r"<(head|script|style)\b.*?</\1>|<[^>]*>", "", text, flags=re.DOTALL))
    elif re.search(r"\.[1-8]$", name):
        # roff: remove comments, names of macros, fonts and escaped hyphens
        text = re.sub(r"^(\.|')?\\\".*\n|^\.[A-Za-z]+ ?", "", text, flags=re.MULTILINE)
        text = re.sub(r"\\f(\(..|.)|\\[,/&]", "", text).replace("\\-", "-")
    return re.sub(r"\n\s*\n\s*\n", "\n\n", text).strip()


def _cut(text: str) -> Iterator[str]:
    """Cut a long text into parts, at blank lines if possible."""
    start = 0
    for length in itertools.cycle(CUTS):
        if len(text) - start <= LONGEST:
            break
        at = text.find("\n\n", start + length, start + LONGEST)
        stop = at if at > 0 else start + length
        yield text[start:stop].strip()
        start = stop
    yield text[start:].strip()
