"""A stand-in for CUDA graphs on the CPU: operations are taped with the memory they used, and replayed without Python.

Like a capture it refuses whatever brings a value back to the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

HOST_VALUES = {"_local_scalar_dense", "nonzero", "item", "is_nonzero"}


class CapturedError(RuntimeError):
    """What a capture does not permit."""


class Tape(TorchDispatchMode):
    """`with tape:` records, `tape.replay()` runs the same operations into the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket.__name__ in HOST_VALUES:
            raise CapturedError(f"{func} brings a value back to the host")
        result = func(*args, **kwargs)
        self._operations.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Every operation again, its result written where the recorded one lies."""
        with torch.no_grad():
            for func, args, kwargs, recorded in self._operations:
                inputs = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if _is_tensor(t)}
                fresh = func(*args, **kwargs)
                pairs = zip(tree_flatten(recorded)[0], tree_flatten(fresh)[0], strict=True)
                for old, new in pairs:
                    # A view, or the result of an operation in place, lies in its input already.
                    if _is_tensor(old) and old.untyped_storage().data_ptr() not in inputs and old.numel():
                        old.copy_(new)

    def pool(self) -> None:
        """Memory is not shared."""


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


class Taped:
    """What `Graphed` takes in the place of CudaGraphs."""

    def __init__(self) -> None:
        self.captures = 0

    def warm_up(self, call: Callable[[], None], stream: Any = None) -> None:
        call()

    def capture(self, call: Callable[[], None], earlier: Any = None, stream: Any = None) -> Tape:
        tape = Tape()
        with tape:
            call()
        self.captures += 1
        return tape


class Broken(Taped):
    """A device that cannot capture."""

    def capture(self, call: Callable[[], None], earlier: Any = None, stream: Any = None) -> Tape:
        raise RuntimeError("operation not permitted when stream is capturing")
