"""The training script, with stand-ins for the modules of Megatron-LM that are in no package. megatron-core is real."""

from __future__ import annotations

import importlib.util
import logging
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.megatron.test_rows import arguments
from tests.runs import REPOSITORY, Case

if importlib.util.find_spec("megatron") is None:
    pytest.skip("megatron-core is not installed", allow_module_level=True)


@pytest.fixture
def args() -> Namespace:
    """What Megatron-LM has parsed."""
    return Namespace(check_for_nan_in_loss_and_grad=True, check_for_spiky_loss=True)


@pytest.fixture
def script(args: Namespace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from megatron.core import rerun_state_machine as machine

    own: dict[str, dict[str, Any]] = {
        "megatron.training": {"arguments": None, "get_args": lambda: args, "pretrain": None, "print_rank_0": print},
        "gpt_builders": {"gpt_builder": None},
        "model_provider": {"model_provider": None},
    }
    for name, content in own.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    machine.initialize_rerun_state_machine(mode=machine.RerunMode.DISABLED)
    spec = importlib.util.spec_from_file_location("megatron_script", REPOSITORY / "examples/megatron/pretrain_vocagno.py")
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    yield loaded
    machine.destroy_rerun_state_machine()


def told(total: float, nonfinite: int = 0, evaluation: bool = False) -> Any:
    """A loss_func that returns these."""
    report = {} if evaluation else {"guidance/share_nonfinite": torch.tensor([nonfinite, 64.0], dtype=torch.float64)}
    return lambda _: (torch.tensor(total), torch.tensor(26), report)


def test_a_loss_that_is_not_finite_stops_the_script(script: Any, args: Namespace) -> None:
    """The sum shows an infinite loss, and not a NaN, which has weight 0."""
    output = torch.zeros(1, 64)
    loss, number, _ = script.checked(told(180.0), output)
    assert (float(loss), int(number)) == (180.0, 26)
    for bad in (told(180.0, nonfinite=1), told(float("inf"), evaluation=True), told(float("nan"), evaluation=True)):
        with pytest.raises(RuntimeError, match="found tokens whose loss is NaN or infinite"):
            script.checked(bad, output)
    args.check_for_nan_in_loss_and_grad = False
    script.checked(told(180.0, nonfinite=1), output)


def test_a_spike_is_logged(script: Any, args: Namespace, caplog: pytest.LogCaptureFixture) -> None:
    output = torch.zeros(1, 64)
    with caplog.at_level(logging.WARNING):
        for step in range(100):
            script.checked(told(100.0 + step), output)
        script.checked(told(1_980.0), output)
        assert "Spiky loss" not in caplog.text
        script.checked(told(1_991.0), output)
        assert caplog.text.count("Spiky loss") == 1
        args.check_for_spiky_loss = False
        script.checked(told(1_991.0), output)
    assert caplog.text.count("Spiky loss") == 1


def test_the_provider_gives_the_rows_of_the_flags(
    script: Any, args: Namespace, scored_case: Case, capsys: pytest.CaptureFixture[str]
) -> None:
    data: Path = scored_case.train
    vars(args).update(vars(arguments(data, "--unit=chunk", "--keep=0.6")))
    train, valid, test = script.datasets_provider([12, 0, 0])
    assert len(train) == 12 and "chunk_guide" in train[0] and valid is test is None
    assert script.datasets_provider.is_distributed
    assert f"> guided rows of {train.data}" in capsys.readouterr().out and script.rule().keep == 0.6
