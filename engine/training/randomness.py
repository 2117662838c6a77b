"""Randomness of any torch module as a function of (seed, step, row): the random kernels of torch itself are replaced.

Every dropout of torch on a CPU, also those inside LSTM and attention, ends in the kernel `bernoulli_.float`. `install` puts one
in its place, once a process, that asks the masks of the calling thread; every other random kernel is refused there. Threads
without masks get torch's own kernels, so nothing changes outside a training step.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.errors import UserError
from kernels.dropout import dropout_mask

# Kernels that draw from a generator, apart from those that dropout ends in.
REFUSED = (
    "bernoulli_.Tensor", "bernoulli.out", "uniform_", "normal_", "normal.Tensor_float", "normal.float_Tensor",
    "normal.Tensor_Tensor", "random_", "random_.from", "random_.to", "exponential_", "geometric_", "cauchy_", "log_normal_",
    "multinomial", "poisson", "randperm.generator_out", "rrelu_with_noise", "rrelu_with_noise_", "_standard_gamma",
    "_sample_dirichlet", "binomial",
)  # fmt: skip
_THREAD = threading.local()
_INSTALLING = threading.Lock()  # one that is replaced while another replaces it would be gone


class Masks(Protocol):
    """Where the dropout of a forward pass takes its masks from."""

    def mask(self, like: Tensor, p: float, kept: float) -> Tensor:
        """A tensor of the shape and type of `like`: 0 with probability p, else `kept`."""


class ShardMasks:
    """Masks of one shard: functions of (seed, step, call, row id, element).

    A tensor whose first dimension is no multiple of the rows (a sequence before its batch) has masks by (seed, step, call,
    shard, element): the same ones too whoever computes the shard.
    """

    def __init__(
        self, rows: NDArray[np.int64], seed: int, step: int, shard: int, memory: dict[int, Tensor] | None = None
    ) -> None:
        """`memory`: masks of an earlier step by call, which are written over where they have the shape."""
        self._rows, self._seed, self._step, self._shard = rows, seed, step, shard
        self._memory = {} if memory is None else memory
        self.calls = 0

    def mask(self, like: Tensor, p: float, kept: float) -> Tensor:
        """See Masks."""
        n, call = len(self._rows), self.calls
        self.calls += 1
        out = self._memory.get(call)
        if out is None or out.shape != like.shape or out.dtype != like.dtype:
            out = self._memory[call] = torch.empty(like.shape, dtype=like.dtype)
        if not out.numel():
            return out
        if like.dim() and like.shape[0] % n == 0:
            rows, part, flat = self._rows, 0, out.view(n, -1)
        else:
            flat = out.view(-1, like.shape[-1] if like.dim() else 1)
            rows, part = np.arange(len(flat)), 1 + self._shard
        words = (flat.view(torch.int16) if like.dtype == torch.bfloat16 else flat).numpy()
        dropout_mask(rows, words.shape[1], self._seed, self._step, call, p, words, kept=kept, part=part)
        return out


class AllKept:
    """Masks that keep everything; they count the calls."""

    def __init__(self) -> None:
        self.calls = 0

    def mask(self, like: Tensor, p: float, kept: float) -> Tensor:  # noqa: ARG002
        """See Masks."""
        self.calls += 1
        return torch.full(like.shape, kept, dtype=like.dtype, device=like.device)


@contextlib.contextmanager
def drawn_from(masks: Masks) -> Iterator[None]:
    """Randomness of this thread comes from `masks`; any but dropout raises UserError."""
    install()
    _THREAD.masks, _THREAD.backward = masks, False
    try:
        yield
    finally:
        _THREAD.masks = None


def backward_begins() -> None:
    """From now on a mask of this step is refused: computing a layer again would give it another one."""
    _THREAD.backward = True


def moved(before: Tensor) -> None:
    """Raise UserError where torch's default generator has drawn a number since `before`, its state then."""
    if not torch.equal(before, torch.default_generator.get_state()):
        raise UserError(
            "a model must draw no random numbers but by dropout in the thread that calls it, but during a step a thread of its "
            "own (or of this process) drew from torch's generator: weights would depend on the order of threads"
        )


def state() -> Tensor:
    """The state of torch's default generator."""
    return torch.default_generator.get_state()


def install() -> torch.library.Library:
    """Replace the random kernels of this process, once; the result keeps them replaced."""
    with _INSTALLING:
        return _installed()


@functools.cache
def _installed() -> torch.library.Library:
    library = torch.library.Library("aten", "IMPL")
    devices = ["CPU", *(["CUDA"] if torch.cuda.is_available() else [])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels of torch are replaced
        for device in devices:
            _replace(library, "bernoulli_.float", device, _bernoulli)
            for key in (f"Autograd{device}", device):
                _replace(library, "dropout", key, _dropout)
            for name in REFUSED:
                _replace(library, name, device, functools.partial(_refuse, name))
    return library


def _replace(library: torch.library.Library, name: str, key: str, kernel: Any) -> None:
    own = torch.library.get_kernel(f"aten::{name}", key)

    def call(keys: Any, *args: Any, **kwargs: Any) -> Any:
        masks = getattr(_THREAD, "masks", None)
        if masks is None:
            return own.call_boxed(keys, *args, **kwargs)
        return kernel(masks, lambda: own.call_boxed(keys, *args, **kwargs), *args, **kwargs)

    library.impl(name, call, key, with_keyset=True, allow_override=True)


def _bernoulli(masks: Masks, own: Any, tensor: Tensor, p: float = 0.5, *, generator: Any = None) -> Tensor:
    if generator is not None:
        return _refuse("bernoulli_ with a generator of its own", masks, own)
    like = tensor if tensor.is_floating_point() else torch.empty(tensor.shape, device=tensor.device)
    return tensor.copy_(_drawn(masks, like, 1.0 - p, 1.0)) if p < 1.0 else tensor.fill_(1.0)


def _dropout(masks: Masks, own: Any, tensor: Tensor, p: float, train: bool) -> Any:
    """In one pass less than torch's own."""
    if not train or p in (0.0, 1.0) or not tensor.numel():
        return own()
    return tensor * _drawn(masks, tensor, p, 1.0 / (1.0 - p))


def _drawn(masks: Masks, like: Tensor, p: float, kept: float) -> Tensor:
    if _THREAD.backward:
        raise UserError(
            "a model must not compute dropout again during the backward pass (activation checkpointing), because it would get "
            "another mask: leave out torch.utils.checkpoint"
        )
    if like.dtype not in (torch.float32, torch.bfloat16):
        raise UserError(f"dropout must act on float32 or bfloat16, found {like.dtype}: convert before it")
    if p >= 1.0:
        return torch.zeros_like(like)
    return masks.mask(like, p, kept)


def _refuse(name: str, *_: Any, **__: Any) -> Any:
    raise UserError(
        f"a model must have no randomness but dropout, because its weights would depend on threads and resumes; its forward "
        f"calls torch's aten::{name}. Use torch.nn.functional.dropout, or draw the numbers in __init__ and keep them in a buffer"
    )
