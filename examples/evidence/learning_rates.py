"""The learning rate of each arm, chosen on a seed and data that no table uses.

learning_rates.json   {experiment: {arm: rate}}; `python -m examples.evidence tune` writes it, every other run reads it
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vocagno.errors import UserError

FILE = Path(__file__).parent / "learning_rates.json"
SEED = 100
"""The seed of the runs that choose."""
FALLBACK = "guided"
"""The arm whose rate untuned arms have. The ablations change only one choice of the method."""


def learning_rate(experiment: str, arm: str, file: Path = FILE) -> float:
    """Raises UserError if no rate of the experiment was chosen yet."""
    rates: dict[str, float] | None = json.loads(file.read_text(encoding="utf-8")).get(experiment)
    if rates is None:
        raise UserError(f"{file} has no rates of {experiment}: choose them first, python -m examples.evidence tune {experiment}")
    return rates.get(arm, rates[FALLBACK])


def choose(experiment: str, rows: Sequence[dict[str, Any]], judge: str, higher_is_better: bool, file: Path = FILE) -> list[str]:
    """Record for each arm the rate whose last step scores best, or the lower rate if two are equal.

    rows: the rows of runs at several rates

    Returns the arms whose rate is the lowest or the highest that was tried.
    Raises ValueError if a run used another seed than SEED.
    """
    last: dict[tuple[str, float, str], tuple[int, float]] = {}
    for row in rows:
        if row["seed"] != SEED:
            raise ValueError(f"{row['arm']} was tuned on seed {row['seed']}, which the tables may use: tune on seed {SEED}")
        key = row["arm"], row["learning_rate"], row["setting"]
        last[key] = max(last.get(key, (0, 0.0)), (row["step"], row["scores"][judge]))
    found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (arm, rate, _), (_, score) in last.items():
        found[arm][rate].append(score if higher_is_better else -score)
    chosen = {
        arm: max(sorted(scores), key=lambda rate: sum(scores[rate]) / len(scores[rate])) for arm, scores in sorted(found.items())
    }
    recorded = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    recorded[experiment] = chosen
    file.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return [arm for arm, rate in chosen.items() if len(found[arm]) > 1 and rate in (min(found[arm]), max(found[arm]))]
