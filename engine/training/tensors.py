"""The tensors of a safetensors file, or those whose names begin with a prefix: names and shapes first, values on demand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import safetensors
from torch import Tensor

from engine.runtime import records


@dataclass(frozen=True)
class Tensors:
    """Tensors by name, without the prefix that they have in the file; `found`: type and shape of each, from the file's header."""

    path: Path
    found: dict[str, tuple[str, list[int]]]
    prefix: str = ""

    @classmethod
    def of(cls, path: Path) -> Tensors:
        """All tensors of a file. Raises Damaged where it is no safetensors."""
        found = {}
        try:
            with safetensors.safe_open(path, "pt") as file:
                for name in file.keys():
                    entry = file.get_slice(name)
                    found[name] = (str(entry.get_dtype()), list(entry.get_shape()))
        except (OSError, safetensors.SafetensorError) as error:
            raise records.Damaged(f"{path} must be safetensors: {error}") from None
        return cls(path, found)

    def below(self, prefix: str) -> Tensors:
        """Those whose names begin with a prefix."""
        found = {name.removeprefix(prefix): entry for name, entry in self.found.items() if name.startswith(prefix)}
        return Tensors(self.path, found, self.prefix + prefix)

    def one(self, name: str) -> Tensor:
        """The value of one. Raises Damaged."""
        return Tensors(self.path, {name: self.found[name]}, self.prefix).load()[name]

    def load(self) -> dict[str, Tensor]:
        """Their values. Raises Damaged."""
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                return {name: file.get_tensor(self.prefix + name) for name in self.found}
        except (OSError, safetensors.SafetensorError) as error:
            raise records.Damaged(f"{self.path} must be safetensors: {error}") from None
