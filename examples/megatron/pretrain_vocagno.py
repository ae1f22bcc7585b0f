"""Guided pretraining in Megatron-LM: its pretrain_gpt.py with the rows and the loss of a dataset that a teacher has scored.

    torchrun … examples/megatron/pretrain_vocagno.py --vocagno-data DATASET --keep 0.4 --calculate-per-token-loss …

Start it as you start pretrain_gpt.py, with Megatron-LM's folder in PYTHONPATH and with the flags of your model and layout.
docs/megatron.md has a run, and the flags of Megatron-LM that are refused. The releases of Megatron-LM differ in how they are
started: 0.16 and 0.17, 0.18, and 0.19 each in their own way (`main`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import torch
from gpt_builders import gpt_builder
from megatron.core.enums import ModelType
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.training import arguments, get_args, pretrain, print_rank_0
from model_provider import model_provider
from torch import Tensor

from megatron_vocagno.integrations.megatron.arguments import add_arguments, notes, open_datasets, require_supported, rule_of
from megatron_vocagno.integrations.megatron.step import Loss
from megatron_vocagno.integrations.megatron.step import forward_step as guided_step
from megatron_vocagno.objective import Rule

SPIKE = 10
"""As in pretrain_gpt.py: the sum of a micro-batch is a spike if it is this many times the largest of the first hundred."""


def datasets_provider(samples: list[int], vp_stage: int | None = None) -> tuple[Any, Any, None]:
    """The rows for training and for evaluation, on every rank: reading a row is a pure function of its number."""
    train, valid = open_datasets(get_args(), samples[0], samples[1])
    print_rank_0(f"> guided rows of {train.data}: {rule()}")
    for note in notes(get_args()):
        print_rank_0(note)
    return train, valid, None


datasets_provider.is_distributed = True  # type: ignore[attr-defined]


@cache
def rule() -> Rule:
    return rule_of(get_args())


def forward_step(data_iterator: Iterator[dict[str, Tensor]], model: torch.nn.Module) -> tuple[Tensor, Any]:
    output, loss_func = guided_step(data_iterator, model, rule())
    return output, None if loss_func is None else partial(checked, loss_func)


def checked(loss_func: Callable[[Tensor], Loss], output_tensor: Tensor) -> Loss:
    """The loss, with the checks of pretrain_gpt.py that the flags ask for.

    The loss of each token must be finite, because the sum leaves out a NaN, which has weight 0.
    """
    loss = loss_func(output_tensor)
    validate = partial(get_rerun_state_machine().validate_result, tolerance=0.0)
    if get_args().check_for_nan_in_loss_and_grad:
        count = loss[2]["guidance/share_nonfinite"][0] if "guidance/share_nonfinite" in loss[2] else ~loss[0].isfinite()
        validate(result=count, rejection_func=bool, message="found tokens whose loss is NaN or infinite", fatal=True)
    if get_args().check_for_spiky_loss:
        large = partial(get_rerun_state_machine().is_unexpectedly_large, threshold=SPIKE, context="loss")
        validate(result=loss[0], rejection_func=large, message="Spiky loss", fatal=False)
    return loss


def main() -> None:
    own = {"extra_args_provider": add_arguments, "args_defaults": {"tokenizer_type": "HuggingFaceTokenizer"}}
    build = partial(model_provider, gpt_builder)
    if not hasattr(arguments, "parse_and_validate_args"):  # up to 0.17
        pretrain(datasets_provider, build, ModelType.encoder_or_decoder, forward_step, **own)
        return
    from megatron.training import argument_utils

    args = arguments.parse_and_validate_args(**own)
    require_supported(args)
    if hasattr(argument_utils, "gpt_config_from_args"):  # from 0.19 on
        config = argument_utils.pretrain_cfg_container_from_args(args, argument_utils.gpt_config_from_args(args))
        pretrain(config, datasets_provider, ModelType.encoder_or_decoder, forward_step)
    else:
        config = argument_utils.pretrain_cfg_container_from_args(args)
        pretrain(config, datasets_provider, build, ModelType.encoder_or_decoder, forward_step)


if __name__ == "__main__":
    main()
