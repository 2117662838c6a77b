"""Dropout masks of GPU steps: those of the CPU for the same rows, from tables of keys on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.training.gpu.inputs import numba_stream
from engine.training.gpu.order import combine64, dropout_mask, lane_steps
from kernels import cuda as twins


class TableMasks:
    """Masks of one step (see `randomness.Masks`), by the keys int64[steps, calls] in the line at `cursor`; no value comes back
    to the host, so that a CUDA graph may hold them.

    `fused`: by one kernel each. A tensor whose first dimension is no multiple of the rows has masks by place and worker.
    """

    def __init__(
        self, ids: Tensor, keys: Tensor, cursor: Tensor, steps: dict[int, Tensor], rank: int, fused: bool
    ) -> None:
        self._ids, self._keys, self._cursor, self._steps, self._rank, self._fused = (
            ids,
            keys,
            cursor,
            steps,
            rank,
            fused,
        )
        self._line = keys.index_select(0, cursor)[0]
        self.calls = 0

    def mask(self, like: Tensor, p: float, kept: float) -> Tensor:
        """See randomness.Masks."""
        n, call = len(self._ids), self.calls
        self.calls += 1
        by_row = like.dim() > 0 and like.shape[0] % n == 0
        width = like.numel() // n if by_row else like.shape[-1]
        if self._fused and by_row:
            out = torch.empty((n, width), dtype=like.dtype, device=like.device)
            words = torch.int16 if like.dtype == torch.bfloat16 else torch.int32
            bits = torch.tensor(kept, dtype=torch.float32).to(like.dtype).view(words).item()
            stream = numba_stream() if like.device.type == "cuda" else 0
            twins.dropout_mask(self._ids, self._keys, self._cursor, call, p, int(bits), out.view(words), stream)
            return out.view(like.shape)
        if width not in self._steps:
            self._steps[width] = lane_steps(width, like.device)
        rows, key = self._ids, self._line[call]
        if not by_row:
            rows = torch.arange(like.numel() // width, device=like.device)
            key = combine64(key, torch.full((), 1 + self._rank, device=like.device))
        return dropout_mask(rows, width, key, p, like.dtype, self._steps[width], kept).view(like.shape)
