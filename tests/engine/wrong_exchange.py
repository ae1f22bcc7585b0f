"""The training command, with a fault in the attention of rows that are divided among ranks.

python tests/engine/wrong_exchange.py FAULT RUN.toml …
"""

from __future__ import annotations

import sys

from megatron_vocagno import pretrain
from megatron_vocagno.engine import sequence
from megatron_vocagno.model import ulysses

exchange_over = ulysses.exchange_over


def main(arguments: list[str]) -> int:
    fault, *rest = arguments

    def faulty(group: object) -> ulysses.Exchange:
        right = exchange_over(group)  # type: ignore[arg-type]
        if fault == "masks":
            return lambda x_NX: x_NX.clone()
        if fault == "heads":
            return lambda x_NX: right(x_NX.flip(0))
        return lambda x_NX: x_NX + (right(x_NX) - x_NX).detach()

    sequence.exchange_over = faulty
    return pretrain.main(rest)


if __name__ == "__main__":
    pretrain.run_process(lambda: main(sys.argv[1:]))
