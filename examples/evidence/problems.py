"""Word problems with worked answers, invented from templates: `Question: … Answer: 7 + 5 = 12.`

A story and its numbers are in one part alone, so no test is learned from; the same numbers do meet elsewhere, in other stories.
In a share of the problems the result is wrong, and nothing in the text says so.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np

from examples.evidence.corpus import PARTS, Part

HELD_OUT = 10
"""One pair of numbers of a template in so many is for tests, and another one for tuning."""
HIGHEST = 9
"""Of the two numbers that are added or multiplied, or that a difference or quotient leads back to."""
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Julia", "Lucas", "Maria", "Oscar", "Sarah", "Tom")
THINGS = ("apples", "books", "cards", "coins", "cookies", "eggs", "flowers", "marbles", "pencils", "shells", "stamps", "stickers")

# {a} and {b} meet under the operation; {name} and {other} are two persons
TEMPLATES = (
    ("+", "{name} has {a} {things}. {other} gives {name} {b} more. How many {things} does {name} have now?"),
    ("+", "{name} has {a} {things} and {other} has {b}. How many {things} do they have together?"),
    ("+", "There are {a} {things} on the table and {b} in the box. How many {things} are there in all?"),
    ("+", "{name} paid {a} dollars for lunch and {b} dollars for a ticket. How much did {name} pay?"),
    ("-", "{name} had {a} {things} and gave {b} of them to {other}. How many {things} does {name} have left?"),
    ("-", "{name} is {a} years old and {other} is {b}. How many years older is {name}?"),
    ("-", "{name} needs {a} {things} and has found {b}. How many {things} does {name} still need?"),
    ("*", "{name} has {a} boxes with {b} {things} in each box. How many {things} does {name} have?"),
    ("*", "{name} reads {b} pages each day. How many pages does {name} read in {a} days?"),
    ("*", "{name} buys {a} tickets for {b} dollars each. How much does {name} pay?"),
    ("/", "{name} shares {a} {things} equally among {b} children. How many {things} does each child get?"),
    ("/", "{a} {things} lie in {b} equal rows on the table of {name}. How many {things} are in each row?"),
    ("/", "{name} puts {a} {things} into bags of {b}. How many bags does {name} fill?"),
)


@dataclass(frozen=True)
class Problem:
    template: int
    """Its number in TEMPLATES."""
    a: int
    b: int
    question: str
    result: int
    wrong: bool = False
    """Whether the result is."""

    @property
    def work(self) -> str:
        """The answer up to the result."""
        return f" {self.a} {TEMPLATES[self.template][0]} {self.b} = "

    @property
    def text(self) -> str:
        return f"{self.question}{self.work}{self.result}."


def invent_problems(count: int, part: Part, seed: int, wrong: float = 0.0) -> list[Problem]:
    """Different problems of one part; all templates come alike often.

    wrong: the share that has a wrong result, exact to one problem

    Raises ValueError: a template has not so many.
    """
    random = np.random.default_rng([seed, PARTS.index(part)])
    problems: dict[str, Problem] = {}
    tries = 0
    while len(problems) < count:
        template = len(problems) % len(TEMPLATES)
        if (tries := tries + 1) > 100 * count:
            raise ValueError(
                f"{count:,} different problems asked for, {len(problems):,} found: {TEMPLATES[template]} has no more"
            )
        problem = _invent(template, random)
        if part_of(problem) == part:
            problems.setdefault(problem.question, problem)
    is_wrong = random.permutation(np.arange(count) < round(wrong * count)).tolist()
    return [_spoil(problem, random) if bad else problem for problem, bad in zip(problems.values(), is_wrong, strict=True)]


def part_of(problem: Problem) -> Part:
    """By template and numbers; a + b and b + a are two instances of a story."""
    name = f"{problem.template}:{problem.a},{problem.b}"
    return PARTS[min(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]) % HELD_OUT, 2)]


def _invent(template: int, random: np.random.Generator) -> Problem:
    operation, story = TEMPLATES[template]
    a, b = random.integers(2, HIGHEST + 1, 2).tolist()
    a, result = {"+": (a, a + b), "-": (a + b, a), "*": (a, a * b), "/": (a * b, a)}[operation]
    name, other = random.choice(NAMES, 2, replace=False).tolist()
    question = story.format(name=name, other=other, things=random.choice(THINGS), a=a, b=b)
    return Problem(template, a, b, f"Question: {question}\nAnswer:", result)


def _spoil(problem: Problem, random: np.random.Generator) -> Problem:
    """Another result, at most 10 away and above 0."""
    others = [n for n in range(max(1, problem.result - 10), problem.result + 11) if n != problem.result]
    return replace(problem, result=int(random.choice(others)), wrong=True)
