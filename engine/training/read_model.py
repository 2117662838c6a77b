"""Reads the model of a bundle: its record is compared with the tensors of the file before memory is taken."""

from __future__ import annotations

from typing import Any

from engine.config.sections.training import BLEND
from engine.runtime import records
from engine.training import kinds
from engine.training.blend import SHARES, Blend, Member, check_blend, check_shares
from engine.training.finished import FITTED, FinishedNetwork, Model, PartRecord
from engine.training.model import declared, give_memory
from engine.training.path_gradients import Typical
from engine.training.tensors import Tensors
from engine.training.trees import check_description, is_trees, read_trees

TILE_BYTES = 2**32  # of the widest layer of one tile


def check_part(part: PartRecord, where: str) -> None:
    """Raise Damaged where the record of a model is of another shape, or a tile would not fit in memory. Runs no plug-in."""
    described = part["architecture"]
    if described["kind"] == BLEND:
        for place, member in enumerate(check_blend(described, where)):
            check_part(member, f"{where}: settings: members[{place}]: architecture")
        return
    if (typical := part.get("typical")) is not None:
        sizes, pairs = described["cardinalities"], zip(typical["codes"], described["cardinalities"], strict=False)
        lengths = len(typical["numeric"]), len(typical["codes"])
        if lengths != (described["numeric_width"], len(sizes)) or not all(0 <= code < size for code, size in pairs):
            raise records.Damaged(
                f"{where.removesuffix(': architecture')}: typical must be a row as the model reads it"
            )
    if is_trees(described):
        check_description(described, where)
        return
    if described["kind"] not in kinds.BUILT_IN:
        return  # its code has not run
    widest = declared(described, where).widest
    if 4 * part["tile_rows"] * widest > TILE_BYTES:
        raise records.Damaged(
            f"{where.removesuffix(': architecture')}: tile_rows must be at most {TILE_BYTES // 4 // widest:,} for layers of up "
            f"to {widest:,} columns, found {part['tile_rows']:,}"
        )


def read_model(tensors: Tensors, part: PartRecord, where: str) -> Model:
    """The model of a record and its tensors, ready to predict. Raises Damaged, UserError for code that may not run here."""
    described = part["architecture"]
    if described["kind"] == BLEND:
        return _read_blend(tensors, part, where)
    if is_trees(described):
        return read_trees(tensors, described, where)
    built_in = described["kind"] in kinds.BUILT_IN
    fitted: dict[str, Any] = {}
    if not built_in:
        fitted = {name: tensor.numpy() for name, tensor in tensors.below(FITTED).load().items()}
    network = declared(described, where, fitted)
    wanted = {name: list(value.shape) for name, value in network.state_dict().items()}
    wanted |= {FITTED + name: list(array.shape) for name, array in fitted.items()}
    found = {name: shape for name, (_, shape) in tensors.found.items()}
    for name in {**wanted, **found}:
        if wanted.get(name) != found.get(name):
            raise records.Damaged(
                f"{where} must describe the tensors of {tensors.path.name}: {name} is {wanted.get(name)} in the one, "
                f"{found.get(name)} in the other. Restore the bundle, or train again"
            )
    if built_in:
        give_memory(network.module)
    network.load_state_dict(tensors.load())
    typical = Typical.read(part["typical"]) if "typical" in part else None
    return FinishedNetwork(network, part["precision"], part["tile_rows"], typical)


def _read_blend(tensors: Tensors, part: PartRecord, where: str) -> Blend:
    records_of = check_blend(part["architecture"], where)
    known = (SHARES, *(f"{place}/" for place in range(len(records_of))))
    for name in tensors.found:
        if name != SHARES and not name.startswith(known[1:]):
            raise records.Damaged(
                f"{tensors.path} must hold the weights of {len(records_of)} members, found tensor {name!r}"
            )
    if tensors.found.get(SHARES) != ("F64", [len(records_of)]):
        raise records.Damaged(
            f"{tensors.path}: {SHARES} must be {len(records_of)} numbers, found {tensors.found.get(SHARES)}"
        )
    shares = check_shares(tensors.one(SHARES).tolist(), len(records_of), str(tensors.path))
    members = [
        Member(
            read_model(tensors.below(f"{place}/"), record, f"{where}: settings: members[{place}]: architecture"), record
        )
        for place, record in enumerate(records_of)
    ]
    return Blend(tuple(members), shares)
