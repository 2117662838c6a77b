"""Optimizers on the flat buffer: AdamW, SGD, Lion and Muon, and the moving average of weights.

Each changes weights in place, on one thread or within a CUDA graph, and keeps its state as named tensors of fixed memory. They
are called below `torch.optim`, whose constructors import torch._dynamo (one second).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.config.sections.training import TrainConfig
from engine.training.flat import LANE, FlatWeights

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
LION1, LION2 = 0.9, 0.99
NEWTON_SCHULZ, ITERATIONS = (
    (3.4445, -4.775, 2.0315),
    5,
)  # of Muon: coefficients that bring singular values near 1 quickly
MUON_SCALE = 0.2  # root mean square of an update of AdamW, which that of Muon is scaled to
AVERAGE = "average_weights"


class Optimizer(Protocol):
    """Changes weights by gradients."""

    def state(self) -> dict[str, Tensor]:
        """The state for a checkpoint."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the values of a `state` into this one's memory."""

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """One update in place of values [size] by a gradient [size]; none where `skip`, a number in the memory of the
        weights, is 1.
        """


Part = tuple[slice, float]  # of the flat buffer, and the weight decay there


def make_optimizer(weights: FlatWeights, config: TrainConfig) -> Optimizer:
    """The optimizer of a config for a flat buffer, on torch's default device."""
    size, last = weights.size, weights.decayed
    parts = _used([(slice(0, last), config.weight_decay), (slice(last, size), 0.0)])
    made: dict[str, Callable[[], Optimizer]] = {
        "adamw": lambda: AdamW(size, parts),
        "sgd": lambda: Sgd(size, parts, config.momentum),
        "lion": lambda: Lion(size, parts),
        "muon": lambda: Muon(weights, parts, config),
    }
    optimizer = made[config.optimizer]()
    return Averaged(optimizer, weights.values, config.ema) if config.ema else optimizer


def _used(parts: Sequence[Part]) -> list[Part]:
    return [(part, decay) for part, decay in parts if part.stop > part.start]


def _by_place(size: int, parts: Sequence[Part]) -> Tensor:
    """The weight decay of every place of the buffer."""
    found = torch.zeros(size)
    for part, decay in parts:
        found[part] = decay
    return found


class _Kept:
    """State tensors by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def state(self) -> dict[str, Tensor]:
        """See Optimizer."""
        return dict(self._tensors)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See Optimizer."""
        for name, tensor in self.state().items():
            tensor.copy_(state[name])


class AdamW(_Kept):
    """Torch's fused kernel, by parts of the buffer.

    Loshchilov, Hutter: Decoupled weight decay regularization, ICLR 2019.
    """

    def __init__(self, size: int, parts: Sequence[Part]) -> None:
        self._parts = parts
        self.exp_avg = torch.zeros(size)
        self.exp_avg_sq = torch.zeros(size)
        self.count = torch.zeros(())
        super().__init__({"exp_avg": self.exp_avg, "exp_avg_sq": self.exp_avg_sq, "count": self.count})

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """See Optimizer."""
        self.count.add_(1.0 if skip is None else 1.0 - skip)
        for part, decay in self._parts:
            torch._fused_adamw_(
                [values[part]],
                [gradient[part]],
                [self.exp_avg[part]],
                [self.exp_avg_sq[part]],
                [],
                [self.count],
                lr=lr,
                beta1=BETA1,
                beta2=BETA2,
                weight_decay=decay,
                eps=EPSILON,
                amsgrad=False,
                maximize=False,
                found_inf=skip,
            )


class Sgd(_Kept):
    """Stochastic gradient descent with momentum, as torch.optim.SGD without dampening; weight decay is added to the gradient.

    Polyak: Some methods of speeding up the convergence of iteration methods, USSR Comp. Math. and Math. Phys., 1964.
    """

    def __init__(self, size: int, parts: Sequence[Part], momentum: float) -> None:
        self._decay, self._momentum = _by_place(size, parts), momentum
        self._velocity, self._scratch = (
            torch.zeros(size),
            torch.zeros(size),
        )  # new memory for every step would cost more
        super().__init__({"momentum": self._velocity})

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """See Optimizer."""
        found = torch.mul(self._decay, values, out=self._scratch).add_(gradient)
        _write(self._velocity, found.add_(self._velocity, alpha=self._momentum), skip)
        _write(values, torch.sub(values, found.mul_(lr), out=found), skip)


class Lion(_Kept):
    """The sign of an interpolated momentum, and decoupled weight decay.

    Chen et al.: Symbolic discovery of optimization algorithms, NeurIPS 2023, algorithm 2.
    """

    def __init__(self, size: int, parts: Sequence[Part]) -> None:
        self._decay = _by_place(size, parts)
        self._momentum, self._scratch = torch.zeros(size), torch.zeros(size)
        super().__init__({"momentum": self._momentum})

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """See Optimizer."""
        found = torch.mul(self._momentum, LION1, out=self._scratch).add_(gradient, alpha=1 - LION1).sign_()
        found.addcmul_(self._decay, values).mul_(lr)
        _write(values, torch.sub(values, found, out=found), skip)
        _write(self._momentum, torch.mul(self._momentum, LION2, out=found).add_(gradient, alpha=1 - LION2), skip)


class Muon(_Kept):
    """Orthogonalised momentum for hidden matrices, AdamW for all else.

    Jordan: Muon, an optimizer for hidden layers in neural networks, 2024; updates have the size of AdamW's, as Liu et al.: Muon
    is scalable for LLM training, arXiv 2502.16982, 2025, so that `lr` means the same for both.
    """

    def __init__(self, weights: FlatWeights, parts: Sequence[Part], config: TrainConfig) -> None:
        self._matrices = [
            (slice(offset, offset + shape.numel()), shape) for offset, shape in weights.matrices().values()
        ]
        self._rest = AdamW(weights.size, _without(parts, [_padded(part) for part, _ in self._matrices]))
        self._momentum, self._decay = config.momentum, config.weight_decay
        super().__init__(self._rest.state())  # momentum of the matrices is in `exp_avg`, which AdamW leaves alone there

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """See Optimizer."""
        self._rest.step(values, gradient, lr, skip)
        for part, shape in self._matrices:
            weight, slope, momentum = (flat[part].view(shape) for flat in (values, gradient, self._rest.exp_avg))
            mixed = self._momentum * momentum + (1 - self._momentum) * slope
            ahead = self._momentum * mixed + (1 - self._momentum) * slope  # Nesterov's
            size = MUON_SCALE * math.sqrt(max(shape))
            changed = weight * (1 - lr * self._decay) - lr * size * orthogonalised(ahead)
            _write(momentum, mixed, skip)
            _write(weight, changed, skip)


def _padded(part: slice) -> slice:
    return slice(part.start, part.start + -(-(part.stop - part.start) // LANE) * LANE)


def _without(parts: Sequence[Part], holes: Sequence[slice]) -> list[Part]:
    """The parts of the buffer that lie in no hole; holes rise and lie within parts."""
    found: list[Part] = []
    for part, decay in parts:
        start = part.start
        for hole in holes:
            if part.start <= hole.start < part.stop:
                found.append((slice(start, hole.start), decay))
                start = hole.stop
        found.append((slice(start, part.stop), decay))
    return _used(found)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Nearly U V' of a matrix U S V' [a, b], by Newton-Schulz steps in float32 (singular values end in about 0.7 to 1.2)."""
    first, second, third = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / torch.clamp(torch.linalg.vector_norm(x), min=1e-7)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = first * x + (second * square + third * square @ square) @ x
    return x.T if tall else x


class Averaged:
    """An optimizer and a moving average of the weights that it leaves: each update moves the average a share 1 - decay of the
    way, where decay is at most (1 + n) / (10 + n) after n updates.

    Polyak, Juditsky: Acceleration of stochastic approximation by averaging, SIAM J. Control Optim., 1992; the rise of the decay
    is that of TensorFlow's ExponentialMovingAverage.
    """

    def __init__(self, inner: Optimizer, values: Tensor, decay: float) -> None:
        self._inner, self._decay = inner, decay
        self._average, self._count = values.clone(), torch.zeros(())

    def state(self) -> dict[str, Tensor]:
        """See Optimizer; the average is `average_weights`."""
        return {**self._inner.state(), AVERAGE: self._average, "average_count": self._count}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """See Optimizer."""
        self._inner.load(state)
        self._average.copy_(state[AVERAGE])
        self._count.copy_(state["average_count"])

    def step(self, values: Tensor, gradient: Tensor, lr: float | Tensor, skip: Tensor | None = None) -> None:
        """See Optimizer."""
        self._inner.step(values, gradient, lr, skip)
        used = 1.0 if skip is None else 1.0 - skip
        self._count.add_(used)
        share = 1 - torch.clamp((1 + self._count) / (10 + self._count), max=self._decay)
        self._average.lerp_(values, share * used)


def _write(target: Tensor, found: Tensor, skip: Tensor | None) -> None:
    target.copy_(found if skip is None else torch.where(skip > 0, target, found))
