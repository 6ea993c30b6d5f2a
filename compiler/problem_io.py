"""Selection problems as files: opweave's own JSON with all features, and that of the ASPLOS 2025 / EuroSys 2025 contest."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from .collector import collector_paused
from .problem import FORBIDDEN, SelectionProblem, check, concatenate

FORMAT = "opweave.selection/1"


def load(path: str | Path) -> SelectionProblem:
    """Read a problem in opweave's own JSON or the contest's, by its content; ``.gz`` is unpacked. Raises ValueError where malformed."""
    data = _read_json(path)
    return _from_native(data) if isinstance(data, Mapping) and data.get("format") == FORMAT else from_contest(data)


def save(problem: SelectionProblem, path: str | Path) -> None:
    """Write opweave's own JSON (all features); packed if the name ends in ``.gz``."""
    text = json.dumps(_to_native(problem))
    target = Path(path)
    if target.suffix == ".gz":
        with gzip.open(target, "wt", compresslevel=6) as out:
            out.write(text)
    else:
        target.write_text(text)


def _read_json(path: str | Path) -> Any:
    """Parse a JSON file, ``.gz`` or plain; ``ValueError`` with the file's name if it is not JSON."""
    source = Path(path)
    try:
        raw = source.read_bytes()
        with collector_paused():  # millions of small lists
            return json.loads(gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw)
    except (json.JSONDecodeError, UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{source}: not a JSON file: {error}") from error
    except RecursionError as error:
        raise ValueError(f"{source}: JSON nested too deeply") from error


def _flat(lists: Iterable[Any], what: str) -> np.ndarray:
    try:
        return np.fromiter(chain.from_iterable(lists), dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what}: expected lists of numbers: {error}") from error


def _section(data: Any, *keys: str) -> Any:
    at = data
    for i, key in enumerate(keys):
        if not isinstance(at, Mapping) or key not in at:
            raise ValueError(f"malformed problem: {'.'.join(keys[: i + 1])} is missing")
        at = at[key]
    return at


def _list_of_lists(data: Any, *keys: str) -> list[Any]:
    value = _section(data, *keys)
    check(isinstance(value, list), f"malformed problem: {'.'.join(keys)} must be a list")
    for i, item in enumerate(value):
        if not isinstance(item, list):
            raise ValueError(f"malformed problem: {'.'.join(keys)}[{i}] must be a list, it is {item!r:.40}")
    return value


def _pairs(lists: list[Any], what: str) -> np.ndarray:
    for i, item in enumerate(lists):
        if len(item) != 2 or not (type(item[0]) is int and type(item[1]) is int and abs(item[0]) < 2**62 and abs(item[1]) < 2**62):
            raise ValueError(f"malformed problem: {what}[{i}] must be two integers, it is {item!r:.40}")
    return np.array(lists, dtype=np.int64).reshape(-1, 2)


def _lengths(lists: list[Any]) -> np.ndarray:
    return np.fromiter(map(len, lists), dtype=np.int64, count=len(lists))


def _contest_limit(problem: Mapping[str, Any]) -> float:
    limit = problem.get("usage_limit")
    if limit is None:
        return math.inf
    number = isinstance(limit, int | float) and not isinstance(limit, bool)
    check(number, f"malformed problem: usage_limit must be a number, it is {limit!r:.40}")
    check(not math.isnan(limit) and abs(limit) < 2**63, f"usage_limit {limit:g} overflows 64-bit bytes; leave it out for no limit")
    return float(limit)


def from_contest(data: Any) -> SelectionProblem:
    """A verified problem from the contest's JSON object. Raises ValueError for what is malformed, naming the place."""
    problem = _section(data, "problem")
    check(isinstance(problem, Mapping), "malformed problem: 'problem' must be an object")
    costs, usages = _list_of_lists(data, "problem", "nodes", "costs"), _list_of_lists(data, "problem", "nodes", "usages")
    intervals = _pairs(_list_of_lists(data, "problem", "nodes", "intervals"), "problem.nodes.intervals")
    sizes, usage_sizes = _lengths(costs), _lengths(usages)
    check(
        len(sizes) == len(usage_sizes) == len(intervals),
        f"malformed problem: {len(sizes)} node costs, {len(usage_sizes)} usages, {len(intervals)} intervals; these must be equally many",
    )
    if (sizes != usage_sizes).any():
        n = int(np.flatnonzero(sizes != usage_sizes)[0])
        raise ValueError(f"malformed problem: node {n} has {sizes[n]} costs and {usage_sizes[n]} usages")
    has_edges = "edges" in problem
    edges = _pairs(_list_of_lists(data, "problem", "edges", "nodes"), "problem.edges.nodes") if has_edges else np.zeros((0, 2), np.int64)
    edge_costs = _list_of_lists(data, "problem", "edges", "costs") if has_edges else []
    _check_contest_edges(edges, _lengths(edge_costs), sizes)
    live = (intervals[:, 1] > intervals[:, 0]) & (sizes > 0)
    usage_bytes = _flat(usages, "problem.nodes.usages")[np.repeat(live, sizes)]
    result = SelectionProblem(
        name=str(problem.get("name", "problem")),
        num_strategies=sizes.astype(np.int32),
        node_cost=_flat(costs, "problem.nodes.costs"),
        edges=edges.astype(np.int32),
        edge_cost=_flat(edge_costs, "problem.edges.costs"),
        pools=("memory",),
        limits=np.array([_contest_limit(problem)]),
        usage_node=np.flatnonzero(live),
        usage_pool=np.zeros(int(live.sum()), dtype=np.int64),
        usage_start=intervals[live, 0],
        usage_end=intervals[live, 1],
        usage_bytes=usage_bytes,
    )
    result.verify()
    return result


def _check_contest_edges(edges: np.ndarray, cost_sizes: np.ndarray, sizes: np.ndarray) -> None:
    check(len(edges) == len(cost_sizes), f"malformed problem: {len(edges)} edges but {len(cost_sizes)} edge cost lists")
    bad = ((edges < 0) | (edges >= len(sizes))).any(axis=1)
    if bad.any():
        e = int(np.flatnonzero(bad)[0])
        raise ValueError(f"edge {e} joins nodes {edges[e].tolist()}, valid node indices are 0 to {len(sizes) - 1}")
    expected = sizes[edges[:, 0]] * sizes[edges[:, 1]]
    if (expected != cost_sizes).any():
        e = int(np.flatnonzero(expected != cost_sizes)[0])
        shape = f"{sizes[edges[e, 0]]} x {sizes[edges[e, 1]]}"
        raise ValueError(f"malformed problem: edge {e} has {cost_sizes[e]} costs, its nodes have {shape} strategies")


def _numbers(array: np.ndarray) -> list[Any]:
    """JSON numbers: whole values as integers, infinity as the contest's 1e18."""
    clipped = np.where(array >= FORBIDDEN, FORBIDDEN, array)
    if np.all(np.floor(clipped) == clipped):
        return clipped.astype(np.int64).tolist()
    return clipped.tolist()


def _split(values: list[Any], offsets: np.ndarray) -> list[list[Any]]:
    bounds = offsets.tolist()
    return [values[a:b] for a, b in pairwise(bounds)]


def to_contest(p: SelectionProblem) -> dict[str, Any]:
    """The problem as the contest's JSON object. Raises ValueError if it has features the contest's form lacks."""
    check(not p.streams, f"the contest's form has no streams, the problem has {len(p.streams)}")
    check(len(p.pools) <= 1, f"the contest's form has one pool, the problem has {len(p.pools)}")
    single = len(np.unique(p.usage_node)) == len(p.usage_node)
    check(single, "the contest's form has one live interval per node, this problem has nodes with several")
    offsets = p.node_offsets()
    usage, intervals = np.zeros(p.node_cost.size), np.zeros((p.num_nodes, 2), dtype=np.int64)
    intervals[p.usage_node, 0], intervals[p.usage_node, 1] = p.usage_start, p.usage_end
    usage[np.repeat(np.isin(np.arange(p.num_nodes), p.usage_node), p.num_strategies)] = _usage_by_node(p)
    problem: dict[str, Any] = {
        "name": p.name,
        "nodes": {
            "intervals": intervals.tolist(),
            "costs": _split(_numbers(p.node_cost), offsets),
            "usages": _split(_numbers(usage), offsets),
        },
        "edges": {"nodes": p.edges.tolist(), "costs": _split(_numbers(p.edge_cost), p.edge_offsets())},
    }
    if len(p.pools) and math.isfinite(p.limits[0]):
        problem["usage_limit"] = _numbers(p.limits)[0]
    return {"problem": problem}


def _usage_by_node(p: SelectionProblem) -> np.ndarray:
    """The rows' bytes in the order of their nodes (one row per node)."""
    offsets = p.usage_offsets()
    parts = [p.usage_bytes[offsets[r] : offsets[r + 1]] for r in np.argsort(p.usage_node, kind="stable")]
    return concatenate(parts)


_ARRAYS: dict[str, type] = {
    "num_strategies": np.int32,
    "node_cost": np.float64,
    "edges": np.int32,
    "edge_cost": np.float64,
    "limits": np.float64,
    "usage_node": np.int64,
    "usage_pool": np.int64,
    "usage_start": np.int64,
    "usage_end": np.int64,
    "usage_bytes": np.float64,
    "node_stream": np.float64,
    "edge_stream": np.float64,
}


def _to_native(p: SelectionProblem) -> dict[str, Any]:
    arrays = {key: getattr(p, key).tolist() for key in _ARRAYS}
    return {"format": FORMAT, "name": p.name, "pools": list(p.pools), "streams": list(p.streams), **arrays}


def _from_native(data: Mapping[str, Any]) -> SelectionProblem:
    unknown = set(data) - set(_ARRAYS) - {"format", "name", "pools", "streams"}
    check(not unknown, f"malformed problem: unknown key {sorted(unknown)[:1]}")
    arrays: dict[str, Any] = {}
    for key, dtype in _ARRAYS.items():
        try:
            arrays[key] = np.array(_section(data, key), dtype=dtype)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"malformed problem: {key}: {error}") from error
    num_streams = len(_section(data, "streams"))
    arrays["edges"] = arrays["edges"].reshape(-1, 2)
    for key, width in (("node_stream", arrays["node_cost"].size), ("edge_stream", arrays["edge_cost"].size)):
        if arrays[key].size == 0:
            arrays[key] = arrays[key].reshape(num_streams, width if num_streams else 0)
    pools, streams = tuple(_section(data, "pools")), tuple(data["streams"])
    result = SelectionProblem(name=str(data.get("name", "problem")), pools=pools, streams=streams, **arrays)
    result.verify()
    return result
