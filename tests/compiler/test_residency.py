"""Who reads what (`Uses`), when updates are due, names of places; and plans for small steps whose best places are known."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from residual_blocks import ACTIVATIONS, STATE, analysed

import opweave as ow
from opweave.compiler.lower_updates import due_after, needed_again
from opweave.compiler.place_recipes import RECIPES, check_recipe
from opweave.compiler.planner import DoesNotFitError, plan_step
from opweave.compiler.residency import ON_DEVICE, RECOMPUTE, StatePlace, Uses, results, unit_of
from opweave.compiler.rule import tensor_args
from opweave.compiler.rule_table import op_name
from opweave.cost_model.cluster import Cluster, Disk, Link


def uses_of(sizes: tuple[int, int, int, int]) -> Uses:
    return Uses(analysed(*sizes).step)


def named(uses: Uses, op: str, path: str) -> list:
    """Forward units by the start of their op's name, and their module."""
    return [u for u in uses.units if op_name(u).startswith(op) and u.meta["op"].path == path]


# -- who reads what -------------------------------------------------------------------------------------------------------


def test_units_make_memory_and_views_do_not():
    uses = uses_of(ACTIVATIONS)
    assert uses.units and all(u.meta["op"].phase == "fwd" for u in uses.units)
    assert not [u for u in uses.units if op_name(u).split(".")[0] in ("aten::view", "aten::t", "view", "t", "permute")]
    assert all(unit_of(value) is u for u in uses.units for value in results(u))


def test_readers_of_an_activation():
    """gelu reads the product in front of it, and so does its backward; the product behind it reads gelu's result, and so does its own
    weight's gradient."""
    uses = uses_of(ACTIVATIONS)
    up, down = named(uses, "addmm", "blocks.1.up")[0], named(uses, "addmm", "blocks.1.down")[0]
    gelu = next(u for u in uses.units if uses.order[up] < uses.order[u] < uses.order[down])
    assert uses.producers[gelu] == [up] and uses.consumers[up] == [gelu] and uses.last_fwd[up] is gelu
    assert [op_name(op).split(".")[0] for op in uses.later[up]] == ["gelu_backward"]
    assert uses.consumers[gelu] == [down] and uses.last_fwd[gelu] is down
    assert [op_name(op).split(".")[0] for op in uses.later[gelu]] == ["mm"], "the gradient of the weight, through a view"
    assert not uses.later[down], "a sum needs no operand for its gradient"


def test_the_last_reader_is_behind_all_others():
    uses = uses_of(ACTIVATIONS)
    for unit in uses.units:
        assert uses.order[uses.last_fwd[unit]] == max([uses.order[unit], *(uses.order[c] for c in uses.consumers[unit])])
        assert all(uses.order[op] > uses.order[uses.last_fwd[unit]] for op in uses.later[unit])


def test_segments_are_the_repeated_blocks():
    uses = uses_of(ACTIVATIONS)
    of_block = {i: {uses.segment[u] for u in uses.units if u.meta["op"].path.split(".")[:2] == ["blocks", str(i)]} for i in range(8)}
    assert all(len(segments) == 1 for segments in of_block.values())
    assert len(set.union(*of_block.values())) == 8
    assert [s for u in uses.units for s in [uses.segment[u]]] == sorted(uses.segment.values()), "numbers run with the program"


def test_what_leaves_the_step_is_an_output():
    uses = uses_of(ACTIVATIONS)
    loss = next(n for n in uses.step.graph.nodes if n.op == "output").args[0][0]
    assert uses.outputs == {unit_of(loss)}


def test_parameters_and_their_readers():
    uses = uses_of(STATE)
    params = dict(uses.parameters())
    assert len(params) == 16 and all(op_name(op) == "opweave::update.default" for op in params.values())
    weight = next(p for p in params if p.name == "param_blocks_1_up_weight")
    phases = [op.meta["op"].phase for op in uses.readers_of_inputs[weight]]
    assert phases[0] == "fwd" and "bwd" in phases and "update" not in phases


# -- when updates are due -------------------------------------------------------------------------------------------------


def test_updates_are_due_once_gradient_and_last_reader_are_through():
    uses = uses_of(STATE)
    due = due_after(uses, {})
    found = {op: after for after, ops in due.items() for op in ops}
    assert set(found) == {op for _, op in uses.parameters()}
    for param, op in uses.parameters():
        grad = unit_of(tensor_args(op)[1])
        readers = [uses.order[r] for r in uses.readers_of_inputs[param]]
        assert uses.order[found[op]] == max(uses.order[grad], *readers) or uses.order[found[op]] > uses.order[grad]
        assert all(uses.order[found[op]] >= at for at in readers), "the old value is read after the update"


def test_updates_wait_for_what_is_made_again():
    """The first product of a block, made again for the gradient of its activation, reads its weight then."""
    uses = uses_of(STATE)
    up = named(uses, "addmm", "blocks.0.up")[0]
    again = needed_again(uses, {up: RECOMPUTE})
    assert list(again) == [up] and again[up] == max(uses.order[op] for op in uses.later[up])
    found = {op: uses.order[after] for after, ops in due_after(uses, {up: RECOMPUTE}).items() for op in ops}
    weight_op = next(op for param, op in uses.parameters() if up in uses.readers_of_inputs[param])
    assert found[weight_op] >= again[up]


def test_chains_are_needed_again_as_long_as_their_users():
    uses = uses_of(ACTIVATIONS)
    up, down = named(uses, "addmm", "blocks.1.up")[0], named(uses, "addmm", "blocks.1.down")[0]
    gelu = next(u for u in uses.units if uses.order[up] < uses.order[u] < uses.order[down])
    again = needed_again(uses, {up: RECOMPUTE, gelu: RECOMPUTE})
    assert again[up] == max(again[gelu], *(uses.order[op] for op in uses.later[up]))
    assert needed_again(uses, {gelu: "disk"}) == {}


# -- names ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [ON_DEVICE, StatePlace("host", "disk", "device"), StatePlace("host", "host", "host")])
def test_places_of_state_read_back(place):
    assert StatePlace.parse(place.text) == place


@pytest.mark.parametrize("text", ["", "param device", "param tape, state host, update host", "param host, state host, update disk", "host"])
def test_what_is_no_place_is_refused(text):
    with pytest.raises(ValueError, match="is no place of a parameter; one reads 'param device, state device, update device'"):
        StatePlace.parse(text)


# -- plans whose places are known -----------------------------------------------------------------------------------------


def machine(disk_bytes_per_s: float, flops_per_s: float = 1e11) -> Cluster:
    link = Link(latency_s=1e-5, bandwidth_bytes_per_s=disk_bytes_per_s)
    cpu = Cluster.preset("cpu", devices=1)
    device = dataclasses.replace(cpu.device, memory_bytes=1 << 40, peak_flops={"float32": flops_per_s})
    return dataclasses.replace(cpu, device=device, disk=Disk(capacity_bytes=10**13, read=link, write=link))


def planned(sizes: tuple[int, int, int, int], cluster: Cluster, share: float = 1.0, places: str = "auto", disk: bool = True) -> ow.Plan:
    """A plan for a share of the memory that keeping everything takes."""
    whole = plan_step(analysed(*sizes), cluster, places="keep").predicted["peak_bytes"]["device"]
    limit = {"device": share * whole} | ({"disk": 1e13} if disk else {})
    return plan_step(analysed(*sizes), cluster, memory_limit=limit, places=places)


def counts(plan: ow.Plan) -> dict[str, int]:
    return {name: row["count"] for name, row in plan.residency.items()}


def moved(plan: ow.Plan) -> dict[str, int]:
    """Bytes of parameters and state by place, without those that stay."""
    return {text: row["bytes"] for text, row in plan.state.items() if text != ON_DEVICE.text}


def units_with(plan: ow.Plan, text: str) -> set[str]:
    """Names of the units with a residency."""
    return {name for d in plan.decisions if d.kind == "residency" and d.text == text for name in d.nodes}


FAST, SLOW = 1e12, 1e5
"""Bytes per second of a disk that costs nothing, and of one that costs more than anything."""


def test_without_need_everything_is_kept():
    plan = planned(ACTIVATIONS, machine(FAST), 1.01)
    assert {name for name, count in counts(plan).items() if count} == {"keep"} and not moved(plan)


def test_a_slow_disk_makes_again():
    plan = planned(ACTIVATIONS, machine(SLOW), 0.6)
    found = counts(plan)
    assert found["recompute"] > 0 and found["offload_disk"] == 0 and not moved(plan)


def test_a_fast_disk_and_a_slow_processor_offload():
    plan = planned(ACTIVATIONS, machine(FAST, flops_per_s=1e8), 0.6)
    found = counts(plan)
    assert found["offload_disk"] > 0 and found["recompute"] == 0


def test_without_a_disk_there_is_only_making_again():
    plan = planned(ACTIVATIONS, machine(FAST, flops_per_s=1e8), 0.6, disk=False)
    found = counts(plan)
    assert found["recompute"] > 0 and found["offload_disk"] == 0 and not moved(plan)


def test_cheap_results_are_made_again_first():
    """gelu's result costs less than half of the product's in front of it, which it is made from."""
    plan = planned(ACTIVATIONS, machine(SLOW, flops_per_s=3e10), 0.85)
    uses, again = uses_of(ACTIVATIONS), units_with(plan, RECOMPUTE)
    made = [op_name(u).split(".")[0] for u in uses.units if u.name in again and uses.later[u]]
    assert "gelu" in made and "addmm" not in made, "what nobody asks for again is made again for nobody"


def test_state_goes_to_disk_first_and_parameters_last():
    """Each byte of state is read and written once a step; a parameter is read once more."""
    cluster = machine(1e9)
    some, most = planned(STATE, cluster, 0.75), planned(STATE, cluster, 0.35)
    assert moved(some) and all(text.startswith("param device, state disk") for text in moved(some))
    assert any(text.startswith("param disk") for text in moved(most))
    assert sum(moved(most).values()) > sum(moved(some).values())


def test_tighter_limits_never_cost_less():
    cluster = machine(1e9)
    for sizes in (ACTIVATIONS, STATE):
        plans = [planned(sizes, cluster, share) for share in (1.01, 0.8, 0.6, 0.45)]
        times = [plan.solver["objective_s"] for plan in plans]
        assert all(a <= b * (1 + 2e-4) for a, b in itertools.pairwise(times)), times
        assert all(plan.predicted["peak_bytes"]["device"] <= plan.limits["device"] for plan in plans)


# -- recipes --------------------------------------------------------------------------------------------------------------


def test_checkpoint_makes_everything_inside_again_and_keeps_what_leaves():
    plan = planned(ACTIVATIONS, machine(FAST), 1.2, "checkpoint")
    uses = uses_of(ACTIVATIONS)
    again = units_with(plan, RECOMPUTE)
    for unit in uses.units:
        block = unit.meta["op"].path.startswith("blocks")
        leaves = any(uses.segment[c] != uses.segment[unit] for c in uses.consumers[unit])
        if uses.later[unit] and unit not in uses.outputs:
            assert (unit.name in again) == (block and not leaves), unit.name
    assert not moved(plan) and counts(plan)["offload_disk"] == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 1.0])
def test_selective_makes_its_share_again(share):
    plan = planned(ACTIVATIONS, machine(FAST), 1.2, f"selective:{share}")
    uses = uses_of(ACTIVATIONS)
    saved = {u.name: sum(v.meta["val"].nbytes for v in results(u)) for u in uses.units if uses.later[u] and u not in uses.outputs}
    again = sum(saved.get(name, 0) for name in units_with(plan, RECOMPUTE))
    largest = max(saved.values())
    assert again <= share * sum(saved.values()) + largest
    assert again >= min(share, 0.6) * sum(saved.values()) - largest, "results that leave a block cannot be made again beside each other"
    assert (again == 0) == (share == 0) and not moved(plan)


def test_offload_optimizer_moves_all_state_and_nothing_else():
    plan = planned(STATE, machine(FAST), 1.2, "offload-optimizer")
    assert set(moved(plan)) == {"param device, state disk, update device"}
    kept = plan.state.get(ON_DEVICE.text, {"bytes": 0})["bytes"]
    assert kept < 0.01 * sum(moved(plan).values()), "only what is too small to be worth a copy stays"
    assert counts(plan)["recompute"] == counts(plan)["offload_disk"] == 0


def test_offload_all_moves_parameters_state_and_the_blocks_activations():
    plan = planned(ACTIVATIONS, machine(FAST), 1.2, "offload-all")
    assert all(text.startswith("param disk, state disk") for text in moved(plan)) and moved(plan)
    found = counts(plan)
    assert found["offload_disk"] > 0 and found["recompute"] == 0
    assert plan.residency["keep"]["bytes"] < 0.2 * plan.residency["offload_disk"]["bytes"]


@pytest.mark.parametrize("sizes", [ACTIVATIONS, STATE])
def test_no_recipe_is_faster_than_the_free_choice(sizes):
    cluster = machine(1e9)
    for share in (0.9, 0.6):
        free = planned(sizes, cluster, share).solver["objective_s"]
        for recipe in ("keep", "checkpoint", "selective:0.5", "offload-optimizer", "offload-all"):
            try:
                assert free <= planned(sizes, cluster, share, recipe).solver["objective_s"] * (1 + 1e-4), recipe
            except DoesNotFitError:
                continue


def test_a_recipe_combines_with_a_forced_sharding():
    cluster = dataclasses.replace(machine(FAST), devices_per_node=2)
    a = analysed(*STATE)
    plan = plan_step(a, cluster, mesh=(2,), force="zero3", places="offload-all", memory_limit={"device": 1e12, "disk": 1e13})
    assert plan.patterns.get("ZeRO-3", 0) >= 8 and all(text.startswith("param disk, state disk") for text in moved(plan))


def test_keep_fits_or_is_refused():
    with pytest.raises(DoesNotFitError, match="the leanest plan needs"):
        planned(ACTIVATIONS, machine(FAST), 0.5, "keep")


@pytest.mark.parametrize("name", ["", "zero3", "selective", "selective:F", "selective:2", "selective:x", "Checkpoint"])
def test_unknown_recipes_are_refused(name):
    with pytest.raises(ValueError, match=r"places is '.*'; (known are auto, keep, checkpoint|after 'selective:' comes)"):
        check_recipe(name, ["disk"])


def test_recipes_that_move_need_somewhere_to_move_to():
    for name in ("offload-optimizer", "offload-all"):
        with pytest.raises(ValueError, match="there is no other pool to move it to: give one"):
            plan_step(analysed(*STATE), machine(FAST), places=name)
    for name in RECIPES:
        if not name.startswith("selective"):
            check_recipe(name, ["disk"])
