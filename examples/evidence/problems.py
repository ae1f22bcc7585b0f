"""Word problems from templates, with worked answers such as `Answer: 5 + 4 = 9.`

A story with its numbers is in one part only, so no test problem is in the training text. The same numbers occur in other stories.
In a share of the problems the result is wrong, and the rest of the text does not reveal it.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass, replace

import numpy as np

from examples.evidence.corpus import PARTS, Part

NUMBERS = range(2, 6)
"""Operands of sums and products, and the results and second operands of differences and quotients."""
HELD_OUT = 2
"""Of the 16 pairs of numbers of a template, this many are for tests, and the same number is for tuning."""
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Henry", "Julia", "Lucas", "Maria", "Max", "Oscar", "Paul", "Ray", "Tom")
THINGS = ("apples", "bags", "balls", "books", "cards", "coins", "eggs", "flowers", "keys", "lamps", "shells", "stamps")

# {a} and {b} are the operands; {name} and {other} are two persons
TEMPLATES = (
    ("+", "{name} has {a} {things}. {other} gives {name} {b} more. How many does {name} have now?"),
    ("+", "{name} has {a} {things} and {other} has {b}. How many do they have together?"),
    ("+", "{name} has {a} {things} on the table and {b} in the box. How many are there in all?"),
    ("-", "{name} had {a} {things} and gave {b} of them to {other}. How many are left?"),
    ("-", "There were {a} {things} in the box. {name} took {b} of them. How many are left?"),
    ("-", "{name} needs {a} {things} and has found {b}. How many are still missing?"),
    ("*", "{name} has {a} boxes with {b} {things} in each box. How many {things} does {name} have?"),
    ("*", "{name} sells {b} {things} each day. How many {things} does {name} sell in {a} days?"),
    ("*", "{name} buys {a} {things} for {b} dollars each. How much does {name} pay?"),
    ("/", "{name} shares {a} {things} equally among {b} friends. How many does each friend get?"),
    ("/", "{name} puts {a} {things} into boxes of {b}. How many boxes are full?"),
    ("/", "{name} lays {a} {things} in {b} equal rows. How many are in each row?"),
)


@dataclass(frozen=True)
class Problem:
    template: int
    """Index in TEMPLATES."""
    a: int
    b: int
    question: str
    result: int
    wrong: bool = False
    """Whether the result is wrong."""

    @property
    def work(self) -> str:
        """The answer up to the result."""
        return f" {self.a} {TEMPLATES[self.template][0]} {self.b} = "

    @property
    def text(self) -> str:
        return f"{self.question}{self.work}{self.result}."


def invent_problems(count: int, part: Part, seed: int, wrong: float = 0.0) -> list[Problem]:
    """Different problems of one part, with all templates equally frequent.

    wrong: the share that has a wrong result, exact to one problem

    Raises ValueError if a template does not have enough problems.
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
    """The part of a problem, by its template and numbers. a + b and b + a are two instances of a story."""
    return _parts(problem.template, TEMPLATES[problem.template][0])[problem.a, problem.b]


@functools.cache
def _parts(template: int, operation: str) -> dict[tuple[int, int], Part]:
    """The part of each instance (a, b) of a template."""
    instances = [_instance(operation, x, y)[:2] for x, y in itertools.product(NUMBERS, NUMBERS)]
    order = sorted(instances, key=lambda numbers: hashlib.sha256(f"{template}:{numbers}".encode()).digest())
    return {numbers: PARTS[min(place // HELD_OUT, 2)] for place, numbers in enumerate(order)}


def _instance(operation: str, x: int, y: int) -> tuple[int, int, int]:
    """a, b and the result."""
    return {"+": (x, y, x + y), "-": (x + y, y, x), "*": (x, y, x * y), "/": (x * y, y, x)}[operation]


def _invent(template: int, random: np.random.Generator) -> Problem:
    operation, story = TEMPLATES[template]
    a, b, result = _instance(operation, *random.choice(NUMBERS, 2).tolist())
    name, other = random.choice(NAMES, 2, replace=False).tolist()
    question = story.format(name=name, other=other, things=random.choice(THINGS), a=a, b=b)
    return Problem(template, a, b, f"{question}\nAnswer:", result)


def _spoil(problem: Problem, random: np.random.Generator) -> Problem:
    """Another result, at most 10 away and above 0."""
    others = [n for n in range(max(1, problem.result - 10), problem.result + 11) if n != problem.result]
    return replace(problem, result=int(random.choice(others)), wrong=True)
