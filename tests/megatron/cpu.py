"""megatron-core on a CPU: what it asks of CUDA is answered by the CPU. That is tensors, streams and random states."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class _OnCpu(TorchFunctionMode):
    """Each tensor that is made or moved to a GPU is on the CPU, and says that it is on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.Tensor.cuda:
            return args[0]
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        result = function(*args, **kwargs)
        # megatron-core sorts gradients by these names
        if function is torch.Tensor.type and isinstance(result, str):
            return result.replace("torch.", "torch.cuda.")
        return result


class _Nothing:
    """A stream or an event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        return _nothing


def _nothing(*_: Any, **__: Any) -> None:
    return None


def pretend() -> None:
    """From here on, in this process."""
    cuda: Any = torch.cuda
    cuda.current_device = lambda: torch.device("cpu")
    cuda.get_rng_state = cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = cuda.random.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    cuda.default_generators = (torch.default_generator,)
    cuda.is_current_stream_capturing = lambda: False
    cuda.Stream = cuda.Event = _Nothing
    cuda.current_stream = _Nothing
    for name in ("synchronize", "set_device", "empty_cache", "_lazy_init"):
        setattr(cuda, name, _nothing)
    cuda.nvtx.range_push = cuda.nvtx.range_pop = _nothing
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    _OnCpu().__enter__()
