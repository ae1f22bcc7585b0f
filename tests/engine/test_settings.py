"""A DeepSpeed configuration that this machine cannot run is refused with the reason."""

from __future__ import annotations

import pytest
import torch

from megatron_vocagno.engine import build
from megatron_vocagno.errors import RunError


@pytest.mark.parametrize("supported", [False, True])
def test_fp16_is_refused_where_the_device_has_none(monkeypatch: pytest.MonkeyPatch, supported: bool) -> None:
    monkeypatch.setattr(type(build.get_accelerator()), "is_fp16_supported", lambda _: supported)
    half, cpu = {"fp16": {"enabled": True}}, torch.device("cpu")
    build.check_precision({}, cpu)
    build.check_precision({"bf16": {"enabled": True}}, cpu)
    if supported:
        build.check_precision(half, cpu)
    else:
        with pytest.raises(RunError, match="this cpu cannot multiply matrices in fp16"):
            build.check_precision(half, cpu)
