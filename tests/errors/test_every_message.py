"""Whatever a user can be told is met by a test: a new message without one fails here."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PROGRAM = [file for folder in ("megatron_vocagno", "tools") for file in sorted((ROOT / folder).rglob("*.py"))]
# messages that begin as these do, and reach the user in another error's words
OTHERS = {"UserError", "HubError", "BrokenInputError", "_NoText", "ArgumentTypeError"}


def name_of(node: ast.AST) -> str:
    return getattr(node, "id", getattr(node, "attr", ""))


def user_errors() -> set[str]:
    """Names of all classes whose message is for the user."""
    bases = {
        node.name: {name_of(base) for base in node.bases}
        for file in PROGRAM
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    }
    found = set(OTHERS)
    while more := {name for name, above in bases.items() if above & found} - found:
        found |= more
    return found


def strings(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def clause(message: ast.expr) -> str:
    """The longest part of a message between two marks of punctuation: what no other message says."""
    return max((part.strip() for text in strings(message) for part in re.split(r"[.:;,?()'\n]", text)), key=len, default="")


def messages() -> Iterator[tuple[str, str]]:
    """Where a user's error is raised, and its longest clause."""
    errors = user_errors()
    for file in PROGRAM:
        # a ValueError there is pydantic's way to refuse a run file
        kinds = errors | {"ValueError"} if file.name == "config.py" else errors
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and name_of(node.exc.func) in kinds:
                for message in node.exc.args:
                    if said := clause(message):
                        yield f"{file.relative_to(ROOT)}:{node.lineno}", said


def test_every_message_to_a_user_is_met_by_a_test() -> None:
    tests = "\0".join(
        # a test may have a message as a pattern
        text.replace("\\", "")
        for file in sorted((ROOT / "tests").rglob("*.py"))
        for text in strings(ast.parse(file.read_text(encoding="utf-8")))
    )
    found = list(messages())
    assert len(found) > 200
    unmet = [f"{where}: … {said} …" for where, said in found if said not in tests]
    assert not unmet, "no test meets these messages:\n" + "\n".join(unmet)
