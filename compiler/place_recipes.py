"""Forced residency: what others do with memory, as restrictions of the places a plan may choose from.

    auto                everything the solver may choose (no restriction)
    keep                all on the device; only sharding saves memory
    checkpoint          per-block activation checkpointing (torch's checkpoint_wrapper): what leaves a repeated block is kept, everything
                        inside is made again; state stays on the device
    selective:F         an activation memory budget: of the bytes saved for the backward pass the share F (0 to 1) is made again, those with
                        the least seconds per byte first; state stays on the device
    offload-optimizer   ZeRO-Offload: the optimizer state of every parameter off the device, activations on it
    offload-all         ZeRO-Infinity: parameters, optimizer state and the blocks' activations off the device

A recipe restricts the same problem the solver solves otherwise, so it is priced by the same model, and within it the solver picks the
cheapest: which tier, whether the CPU updates, whether what nobody saves is kept or made again. It combines with a forced sharding
(`force`). What is too small to be worth a decision (`price_places`) stays on the device under every recipe.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import fx

from .residency import DEVICE, HOST, KEEP, RECOMPUTE, StatePlace, Uses

AUTO, NO_PLACES = "auto", "keep"
DROP = "drop"
"""What a unit's results may have instead of "recompute" where nobody reads them behind the forward pass: nothing."""

CHECKPOINT, OFFLOAD_OPTIMIZER, OFFLOAD_ALL = "checkpoint", "offload-optimizer", "offload-all"
_SELECTIVE = "selective:"
RECIPES = (AUTO, NO_PLACES, CHECKPOINT, f"{_SELECTIVE}F", OFFLOAD_OPTIMIZER, OFFLOAD_ALL)

Places = list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaceRestriction:
    """What a recipe leaves in. units: forward op → the places its results may have (others: as the solver likes). state: may a parameter
    have this place?"""

    units: Mapping[fx.Node, frozenset[str]] = field(default_factory=dict)
    state: Callable[[StatePlace], bool] = lambda place: True

    def of_unit(self, unit: fx.Node, places: Places) -> Places:
        """Those of the places that are left for a unit."""
        allowed = self.units.get(unit)
        return places if allowed is None else [place for place in places if place in allowed]

    def of_state(self, places: Sequence[StatePlace]) -> list[StatePlace]:
        """Those of the places that are left for a parameter."""
        return [place for place in places if self.state(place)]


def check_recipe(name: str, tiers: Sequence[str]) -> None:
    """Raises ValueError for an unknown name, a share that is none, and a recipe that needs a tier where there is none."""
    if name.startswith(_SELECTIVE):
        _share(name)
        return
    if name not in RECIPES or name == RECIPES[3]:
        raise ValueError(f"places is {name!r}; known are {', '.join(RECIPES)} (F from 0 to 1, e.g. selective:0.5)")
    if name in (OFFLOAD_OPTIMIZER, OFFLOAD_ALL) and not tiers:
        raise ValueError(
            f"places={name!r} moves memory off the device, but there is no other pool to move it to: give one, "
            'e.g. memory_limit="device=4GiB,disk=100GiB"'
        )


def place_restriction(
    name: str, uses: Uses, saved_bytes: Mapping[fx.Node, int], seconds: Callable[[fx.Node], float], tiers: Sequence[str]
) -> PlaceRestriction:
    """The restriction of a recipe. saved_bytes: the units that are decided, with their global bytes. seconds: of running a unit once.

    Raises what `check_recipe` raises.
    """
    check_recipe(name, tiers)
    kept = {unit: frozenset({KEEP}) for unit in saved_bytes if uses.later[unit]}
    if name == CHECKPOINT:
        return PlaceRestriction(units=_checkpointed(uses, saved_bytes), state=_on_device)
    if name.startswith(_SELECTIVE):
        again = _cheapest_again(_share(name), uses, kept.keys() & saved_bytes.keys(), saved_bytes, seconds)
        return PlaceRestriction(units=kept | dict.fromkeys(again, frozenset({RECOMPUTE})), state=_on_device)
    if name == OFFLOAD_OPTIMIZER:
        return PlaceRestriction(units=kept, state=_state_off_device)
    if name == OFFLOAD_ALL:
        moved = {unit: frozenset(tiers) for unit in kept if _in_block(unit)}
        # Parameters in the type they are read in are no results: they are fetched, once or twice.
        narrow = dict.fromkeys(uses.casts.values(), frozenset({KEEP, RECOMPUTE}))
        return PlaceRestriction(units=kept | moved | narrow, state=lambda place: DEVICE not in (place.param, place.state))
    return PlaceRestriction()


def _share(name: str) -> float:
    text = name.removeprefix(_SELECTIVE)
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"places is {name!r}; after {_SELECTIVE!r} comes the share of bytes to make again, from 0 to 1: selective:0.5")
    return share


def _in_block(unit: fx.Node) -> bool:
    """Whether a unit is inside one of the repeated (numbered) modules."""
    return any(part.isdigit() for part in unit.meta["op"].path.split("."))


def _on_device(place: StatePlace) -> bool:
    return place == StatePlace()


def _state_off_device(place: StatePlace) -> bool:
    """Fetched for an update on the device, or updated by the CPU, whose copy of the parameter is then the one that is kept."""
    return place.state != DEVICE and (place.param == DEVICE or place.update == HOST)


def _checkpointed(uses: Uses, units: Mapping[fx.Node, int]) -> dict[fx.Node, frozenset[str]]:
    """Inside a block nothing is kept; what is read outside of it is, and so is what belongs to no block."""
    out = {}
    for unit in units:
        leaves = any(uses.segment[user] != uses.segment[unit] for user in uses.consumers[unit])
        if leaves or not _in_block(unit):
            out[unit] = frozenset({KEEP})
        else:
            out[unit] = frozenset({RECOMPUTE, DROP})
    return out


def _cheapest_again(
    share: float, uses: Uses, candidates: set[fx.Node], num_bytes: Mapping[fx.Node, int], seconds: Callable[[fx.Node], float]
) -> set[fx.Node]:
    """The units to make again: least seconds per byte first, until they hold the share. One block's results are made from what the other
    blocks left, so of two units that read each other across a boundary only one is taken."""
    wanted = share * sum(num_bytes[unit] for unit in candidates)
    taken: set[fx.Node] = set()
    total = 0
    for unit in sorted(candidates, key=lambda u: (seconds(u) / num_bytes[u], uses.order[u])):
        if total >= wanted:
            break
        beside = (*uses.producers[unit], *uses.consumers[unit])
        if not any(other in taken and uses.segment[other] != uses.segment[unit] for other in beside):
            taken.add(unit)
            total += num_bytes[unit]
    return taken
