"""The probe: what a model does that promises do not bear, found on a few training rows before the first step.

A row's output must not depend on other rows, on its place, on earlier calls or on the thread: not at all when it scores, and
only on the other rows of its shard when it trains. Weights are perturbed first, because gates that begin at zero would hide
what is behind them.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from engine.config import plugins
from engine.errors import UserError
from engine.runtime import purity
from engine.training import kinds
from engine.training.examples import Examples
from engine.training.model import Network, Traits
from engine.training.objectives import Objective, label_inputs, row_losses
from engine.training.randomness import AllKept, ShardMasks, backward_begins, drawn_from
from engine.training.schedule import Schedule

ROWS = 256
CLOSE = 1e-4  # of the largest output: how far another number of rows may move it, since matrix kernels round by it
PERTURBED = 0.02  # standard deviation of what is added to each weight


def probe(
    network: Network,
    data: Examples,
    schedule: Schedule,
    objectives: tuple[Objective, ...],
    precision: str,
    warn: Callable[[str], None] = lambda _: None,
) -> Traits:
    """The traits of a network in training, from the first training rows.

    Raises UserError, naming the layer, for what can be neither trained nor scored with equal bits; warns of weights that no
    gradient reaches.
    """
    check_module(network)
    # Always as many: in a tail of a few rows, matrix kernels round by place. Scoring has no tails, and a shard has its places.
    rows = np.arange(ROWS) % len(data)
    inputs = torch.from_numpy(data.numeric[rows]), torch.from_numpy(data.codes[rows])
    looked = _Probe(network, precision, inputs, plugins.split(network.kind)[0])
    looked.mode(False)
    # In fp32, where a small difference is no rounding.
    (looked if precision == "fp32" else _Probe(network, "fp32", inputs, looked.name)).number_of_rows()
    traits = looked.mode(True)
    looked.rebuilt()
    labels = label_inputs(objectives, data.target[rows], None if data.weight is None else data.weight[rows])
    unused = looked.gradients(objectives, labels, data.rows[rows], schedule)
    if unused:
        warn(
            f"no gradient reaches {', '.join(unused[:5])} of model {looked.name}: they keep the weights that they began with"
        )
    return traits


def check_module(network: Network) -> None:
    """Raise UserError for parameters that cannot be trained: none, of another type than float32, lazy, sparse, or hidden in a
    list.
    """
    name, module = plugins.split(network.kind)[0], network.module
    parameters = dict(module.named_parameters())
    for where, parameter in parameters.items():
        if isinstance(parameter, UninitializedParameter):
            raise UserError(
                f"model {name}: {where} must have its shape when it is built, but is lazy: name its input width"
            )
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise UserError(
                f"model {name}: {where} must be float32, found {parameter.dtype}: train.precision=bf16 is the way"
            )
    if not any(parameter.requires_grad for parameter in parameters.values()):
        raise UserError(f"model {name} must have parameters that are trained, found none")
    for where, part in module.named_modules():
        if getattr(part, "sparse", False) is True:
            raise UserError(
                f"model {name}: {where} must have sparse=False: its gradient is added to those of other shards"
            )
        for key, value in vars(part).items():
            items = (
                value if isinstance(value, (list, tuple)) else value.values() if isinstance(value, dict) else [value]
            )
            hidden = key[:1] != "_" and any(isinstance(item, Tensor) and item.requires_grad for item in items)
            if hidden:
                raise UserError(
                    f"model {name}: {f'{where}.' if where else ''}{key} must be a parameter, or it is not trained: put its "
                    "tensors into nn.ParameterList or nn.Parameter"
                )


def _bits(tensor: Tensor | None) -> bytes | None:
    if tensor is None:
        return None
    plain = tensor.detach().reshape(-1).contiguous()
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _plain_state(module: nn.Module) -> dict[str, str]:
    """Plain attributes of all parts, which no checkpoint holds."""
    kinds_of = (bool, int, float, str, list, tuple)
    return {
        f"{where}.{key}".lstrip("."): repr(value)
        for where, part in module.named_modules()
        for key, value in vars(part).items()
        if key[:1] != "_" and isinstance(value, kinds_of)
    }


@dataclass
class _Seen:
    """Inputs and outputs of the parts of one forward pass, in the order in which they ended."""

    parts: list[tuple[str, list[Tensor], list[Tensor]]]


class _Moved(NamedTuple):
    """Inputs whose rows `there` are the rows `here` of the first ones."""

    numeric: Tensor
    codes: Tensor
    here: Tensor
    there: Tensor


class _Probe:
    def __init__(self, network: Network, precision: str, inputs: tuple[Tensor, Tensor], name: str) -> None:
        self.network, self.name, self.inputs, self.rows = network, name, inputs, len(inputs[0])
        self._arithmetic = network.arithmetic(precision)
        generator = torch.Generator().manual_seed(1)
        self._weights = {
            key: tensor.detach() + PERTURBED * torch.randn(tensor.shape, generator=generator)
            for key, tensor in network.trained.items()
        }
        self._order = torch.randperm(self.rows, generator=generator)

    def _module(self, training: bool) -> nn.Module:
        module = self._arithmetic.prepared(self.network.build()).train(training)
        parameters = dict(module.named_parameters())
        with torch.no_grad():
            for key, tensor in self._weights.items():
                parameters[key].copy_(tensor)
        return module

    def _call(self, module: nn.Module, numeric: Tensor, codes: Tensor, seen: _Seen | None = None) -> Tensor:
        """The output in the way of scoring, or of training without dropout."""
        inference = torch.inference_mode() if not module.training else torch.no_grad()
        masks = AllKept()
        watched = _watched(module, seen) if seen is not None else contextlib.nullcontext()
        with drawn_from(masks), inference, self._arithmetic.applied("cpu"), self._told(module), watched:
            out = module(numeric.clone(), codes.clone())
        if masks.calls and not module.training:
            raise UserError(
                f"model {self.name} must draw no dropout when it scores: give F.dropout the argument training=self.training"
            )
        return out  # type: ignore[no-any-return]

    @contextlib.contextmanager
    def _told(self, module: nn.Module) -> Iterator[None]:
        """Errors of a forward pass name the layer that was running."""
        running: list[str] = []
        handles = []
        for where, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(lambda *_, where=where: running.append(where)))
            handles.append(part.register_forward_hook(lambda *_: _end(running)))
        try:
            yield
        except UserError as error:
            raise UserError(f"model {self.name}, {_layer(running)}: {error}") from error
        except Exception as error:
            raise UserError(
                f"model {self.name}, {_layer(running)} must run on numbers and codes: {kinds.raised(error)}"
            ) from error
        finally:
            for handle in handles:
                handle.remove()

    def rebuilt(self) -> None:
        """Raise unless everything that decides a score is a parameter or buffer: the constructor under another seed."""
        shape, settings, fitted = self.network.shape, self.network.settings, self.network.fitted
        other = Network(self.network.kind, shape, settings, self.network.module, fitted, self.network.seed + 1)
        outputs = []
        for network in (self.network, other):
            module = self._arithmetic.prepared(network.build()).eval()
            parameters = dict(module.named_parameters())
            with torch.no_grad():
                for key, tensor in self._weights.items():
                    parameters[key].copy_(tensor)
            outputs.append(self._call(module, *self.inputs))
        if _bits(outputs[0]) != _bits(outputs[1]):
            raise UserError(
                f"model {self.name} must keep the random numbers of its constructor in parameters or buffers "
                "(register_buffer), or a bundle would lack them: built again with the same weights it gives other outputs"
            )

    def _check_shape(self, out: Tensor) -> None:
        outputs = self.network.outputs
        good = isinstance(out, Tensor) and out.is_floating_point() and out.dim() in (2, 3)
        if not good or out.shape[0] != self.rows or out.shape[-1] != outputs:
            found = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UserError(
                f"model {self.name} must give float32 [rows, {outputs}], or [rows, members, {outputs}], found {found} for "
                f"{self.rows} rows"
            )

    def mode(self, training: bool) -> Traits:
        """What the forward pass changes and depends on. Raises UserError where that may not be."""
        words = "in training" if training else "when it scores"
        module = self._module(training)
        before = {key: _bits(tensor) for key, tensor in module.named_buffers()}
        weights = {key: _bits(tensor) for key, tensor in module.named_parameters()}
        attributes = _plain_state(module)
        whole = self._call(module, *self.inputs)
        self._check_shape(whole)
        buffers = [key for key, tensor in module.named_buffers() if _bits(tensor) != before[key]]
        moved = [key for key, tensor in module.named_parameters() if _bits(tensor) != weights[key]]
        changed = [key for key, value in _plain_state(module).items() if attributes.get(key) != value]
        if moved or changed or (buffers and not training):
            raise UserError(
                f"model {self.name} must change nothing {words}{' but buffers' if training else ''}, found that its forward "
                f"changes {', '.join([*moved, *changed, *buffers][:3])}"
            )
        held = dict(module.named_buffers())
        for key in buffers:
            if held[key].is_floating_point() and held[key].dtype != torch.float32:
                raise UserError(
                    f"model {self.name}: buffer {key} changes in training and must be float32, found {held[key].dtype}"
                )
        module = self._module(training)
        file = getattr(type(module).forward, "__code__", None)
        again, called = purity.watched(
            lambda: self._call(module, *self.inputs), None if file is None else file.co_filename
        )
        if called:
            raise UserError(
                f"model {self.name} must compute its output from the rows and its weights alone {words}, found that its forward "
                f"calls {', '.join(called)}"
            )
        if _bits(again) != _bits(whole):
            raise UserError(
                f"model {self.name} must give the same output for the same rows {words}, found other bits the second time "
                f"({self._first(training)}): numbers are drawn outside of torch, or memory is read before it is written"
            )
        other = self._other(training, whole)
        if other is not None and not training:
            raise UserError(
                f"model {self.name} must score each row alone, but a row's output depends on the others or on its place "
                f"({self._first(False, other)})"
            )
        return Traits(other is not None, tuple(buffers))

    def number_of_rows(self) -> None:
        """Raise where an output depends on how many rows there are, which rows alone or elsewhere do not show."""
        numeric, codes = (torch.cat([given, given]) for given in self.inputs)
        whole = self._call(self._module(False), *self.inputs)
        found = self._call(self._module(False), numeric, codes)[: self.rows]
        most = float(torch.nan_to_num(whole, posinf=0.0, neginf=0.0).abs().max())
        if not torch.allclose(found, whole, rtol=0.0, atol=CLOSE * most, equal_nan=True):
            raise UserError(
                f"model {self.name} must score each row alone, but a row's output depends on the number of rows"
            )

    def _other(self, training: bool, whole: Tensor) -> _Moved | None:
        """Rows among others, elsewhere, or alone, that have other bits than in the `whole`; None where there are none."""
        numeric, codes = self.inputs
        moved = [_Moved(numeric[self._order], codes[self._order], self._order, torch.arange(self.rows))]
        for row, place in ((self.rows // 3, 0), (self.rows // 3, self.rows - 1), (self.rows // 2, self.rows // 4)):
            lone = _Moved(
                torch.zeros_like(numeric), torch.zeros_like(codes), torch.tensor([row]), torch.tensor([place])
            )
            lone.numeric[place], lone.codes[place] = numeric[row], codes[row]
            moved.append(lone)
        for item in moved:
            found = self._call(self._module(training), item.numeric, item.codes)
            if _bits(found[item.there]) != _bits(whole[item.here]):
                return item
        return None

    def _first(self, training: bool, moved: _Moved | None = None) -> str:
        """Where rows first have other outputs when they are moved (None: computed again), in words."""
        every = torch.arange(self.rows)
        moved = moved or _Moved(*self.inputs, every, every)
        one, two = _Seen([]), _Seen([])
        self._call(self._module(training), *self.inputs, one)
        self._call(self._module(training), moved.numeric, moved.codes, two)

        def agree(ours: list[Tensor], theirs: list[Tensor]) -> bool:
            for a, b in zip(ours, theirs, strict=True):
                axis = next((at for at, size in enumerate(a.shape) if size == self.rows), None)
                if axis is not None and _bits(a.index_select(axis, moved.here)) != _bits(
                    b.index_select(axis, moved.there)
                ):
                    return False
            return True

        for (where, given, made), (_, given_two, made_two) in zip(one.parts, two.parts, strict=False):
            if not agree(made, made_two):
                if agree(given, given_two):
                    return f"first in {_layer([where])}"
                return f"first between the layers of {_layer([where.rpartition('.')[0]])}, before {where}"
        return f"in {_layer([''])}"

    def gradients(
        self,
        objectives: tuple[Objective, ...],
        labels: tuple[NDArray[np.float32], NDArray[np.float32]],
        rows: NDArray[np.int64],
        schedule: Schedule,
    ) -> list[str]:
        """Names of trained parameters that no gradient reaches. Raises UserError where a second computation, or another
        thread, gives other gradients.
        """
        found: list[tuple[Tensor | None, ...]] = []
        target, weight = map(torch.from_numpy, labels)

        def work() -> None:
            module = self._module(True)
            leaves = [tensor for tensor in module.parameters() if tensor.requires_grad]
            with drawn_from(ShardMasks(rows, schedule.config.seed, 0, 0)), self._told(module):
                with self._arithmetic.applied("cpu"):
                    out = module(*[given.clone() for given in self.inputs])
                losses = row_losses(objectives, out, target, weight)
                backward_begins()
                found.append(torch.autograd.grad(losses.mean(), leaves, allow_unused=True))

        work()
        work()
        error = _elsewhere(work)
        if error is not None:
            raise error
        for other in found[1:]:
            if any(_bits(a) != _bits(b) for a, b in zip(found[0], other, strict=True)):
                raise UserError(
                    f"model {self.name} must have the same gradient for the same rows, found other bits the second time or on "
                    "another thread"
                )
        return [key for key, gradient in zip(self.network.trained, found[0], strict=True) if gradient is None]


def _elsewhere(work: Callable[[], None]) -> BaseException | None:
    errors: list[BaseException] = []

    def call() -> None:
        torch.set_num_threads(1)
        try:
            work()
        except BaseException as error:  # raised by the caller
            errors.append(error)

    thread = threading.Thread(target=call, name="probe")
    thread.start()
    thread.join()
    return errors[0] if errors else None


def _end(running: list[str]) -> None:
    running.pop()


def _layer(running: list[str]) -> str:
    return f"layer {running[-1]}" if running and running[-1] else "its forward"


@contextlib.contextmanager
def _watched(module: nn.Module, seen: _Seen) -> Iterator[None]:
    def ended(where: str, given: Any, made: Any) -> None:
        ins, outs = ([tensor.detach().clone() for tensor in _tensors(item)] for item in (given, made))
        seen.parts.append((where, ins, outs))

    handles = [
        part.register_forward_hook(lambda _, given, made, where=where: ended(where, given, made))
        for where, part in module.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.dim():
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
