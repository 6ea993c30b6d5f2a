"""SelectionProblem: checks, scoring, the builder, and both JSON forms."""

import copy
import json
import math

import numpy as np
import pytest

from opweave.compiler import problem_io
from opweave.compiler.problem import FORBIDDEN, ProblemBuilder, SelectionProblem
from opweave.compiler.problem_io import from_contest, to_contest

EXAMPLE = {
    "problem": {
        "name": "example",
        "nodes": {
            "intervals": [[30, 70], [40, 70], [50, 120], [110, 140], [110, 150]],
            "costs": [[15], [55, 65], [25, 45, 35], [85, 75], [95]],
            "usages": [[10], [25, 25], [15, 20, 15], [10, 10], [15]],
        },
        "edges": {
            "nodes": [[0, 1], [0, 2], [1, 3], [2, 4], [3, 4]],
            "costs": [[30, 40], [50, 10, 40], [90, 10, 20, 80], [60, 20, 30], [70, 60]],
        },
        "usage_limit": 50,
    }
}


def two_pools() -> SelectionProblem:
    b = ProblemBuilder("two", pools={"device": 100.0, "host": math.inf}, streams=("copy", "reduce"))
    u = b.add_node([1.0, 2.0], streams={"copy": [3.0, 0.0]})
    v = b.add_node([0.5, math.inf, 0.0], streams=np.zeros((2, 3)))
    b.add_edge(u, v, [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], streams={"reduce": np.ones((2, 3))})
    b.add_edge(v, v, np.diag([1.0, 1.0, 7.0]))
    b.add_usage(u, "device", 0, 4, [60, 10])
    b.add_usage(u, "device", 6, 8, [10, 60])
    b.add_usage(v, "device", 3, 7, [50, 0, 30])
    b.add_usage(v, "host", 0, 9, [5, 5, 5])
    return b.build()


def test_evaluate_adds_critical_path_and_busiest_stream() -> None:
    result = two_pools().evaluate([0, 2])
    assert result.node_cost == 1.0
    assert result.edge_cost == 2.0 + 7.0
    assert result.stream_s.tolist() == [3.0, 1.0]
    assert result.objective == 10.0 + 3.0
    assert result.peak_bytes.tolist() == [90.0, 5.0]
    assert result.feasible


def test_negative_streams_hide_nothing_else() -> None:
    b = ProblemBuilder(streams=("s",))
    b.add_node([5.0], streams={"s": [-3.0]})
    assert b.build().evaluate([0]).objective == 5.0


def test_evaluate_names_the_violation() -> None:
    problem = two_pools()
    assert problem.evaluate([0, 0]).reason == "pool 'device' holds 110 bytes at time 3, its limit is 100"
    forbidden = problem.evaluate([0, 1])
    assert forbidden.objective == math.inf
    assert forbidden.reason == "node 1 uses a forbidden strategy"


def test_evaluate_rejects_bad_selections() -> None:
    with pytest.raises(ValueError, match="selection of node 1 is 3, it has strategies 0 to 2"):
        two_pools().evaluate([0, 3])
    with pytest.raises(ValueError, match=r"shape \(1,\), expected \(2,\)"):
        two_pools().evaluate([0])


def test_contest_example_round_trip() -> None:
    problem = from_contest(EXAMPLE)
    assert problem.evaluate([0, 0, 2, 1, 0]).objective == 445
    assert problem.evaluate([0, 0, 1, 1, 0]).reason == "pool 'memory' holds 55 bytes at time 50, its limit is 50"
    assert to_contest(problem) == EXAMPLE


@pytest.mark.parametrize("name", ["p.json", "p.json.gz"])
def test_native_json_round_trip(tmp_path, name) -> None:
    problem = two_pools()
    problem_io.save(problem, tmp_path / name)
    back = problem_io.load(tmp_path / name)
    assert back.pools == problem.pools
    assert back.streams == problem.streams
    for key in ("num_strategies", "node_cost", "edges", "edge_cost", "limits", "usage_bytes", "node_stream", "edge_stream"):
        assert np.array_equal(getattr(back, key), getattr(problem, key)), key


def test_contest_form_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ValueError, match="has no streams, the problem has 2"):
        to_contest(two_pools())


BROKEN = [
    (("nodes", "costs", 1, 0), float("nan"), "node 1 has cost nan"),
    (("nodes", "costs", 1, 0), "x", "expected lists of numbers"),
    (("nodes", "costs", 1), 5, r"problem.nodes.costs\[1\] must be a list"),
    (("nodes", "costs", 1), [5], "node 1 has 1 costs and 2 usages"),
    (("nodes", "usages", 0, 0), -1, r"usage row 0 \(node 0\) has -1.0 bytes"),
    (("nodes", "intervals", 0), [1], "must be two integers"),
    (("nodes", "intervals", 0), [1, 1.5], "must be two integers"),
    (("nodes", "intervals"), [], "these must be equally many"),
    (("edges", "nodes", 0), [0, 9], "valid node indices are 0 to 4"),
    (("edges", "nodes", 0), [-1, 0], "valid node indices are 0 to 4"),
    (("edges", "costs", 0), [1], "edge 0 has 1 costs, its nodes have 1 x 2 strategies"),
    (("edges", "costs"), [], "5 edges but 0 edge cost lists"),
    (("usage_limit",), 2**70, "overflows 64-bit bytes"),
    (("usage_limit",), float("nan"), "usage_limit nan"),
    (("usage_limit",), -1, "has limit -1.0"),
    (("usage_limit",), "many", "usage_limit must be a number"),
    (("nodes",), None, "problem.nodes.costs is missing"),
]


@pytest.mark.parametrize(("where", "value", "message"), BROKEN, ids=lambda p: str(p)[:30])
def test_malformed_contest_json_is_a_clear_error(where, value, message) -> None:
    data = copy.deepcopy(EXAMPLE)
    at = data["problem"]
    for key in where[:-1]:
        at = at[key]
    at[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        from_contest(data)


def test_not_json(tmp_path) -> None:
    path = tmp_path / "p.json"
    path.write_text('{"problem": ')
    with pytest.raises(ValueError, match="not a JSON file"):
        problem_io.load(path)
    path.write_text(json.dumps([1]))
    with pytest.raises(ValueError, match="problem is missing"):
        problem_io.load(path)


def test_builder_errors() -> None:
    b = ProblemBuilder(pools={"device": 1.0}, streams=("copy",))
    n = b.add_node([0.0, 1.0])
    with pytest.raises(ValueError, match="unknown pool 'disk'; the pools of this problem are \\['device'\\]"):
        b.add_usage(n, "disk", 0, 1, [0, 0])
    with pytest.raises(ValueError, match="node 0 has 2 strategies, its usage row has 1 values"):
        b.add_usage(n, "device", 0, 1, [0])
    with pytest.raises(ValueError, match=r"edge \(0, 0\): cost matrix has shape"):
        b.add_edge(n, n, [[1.0]])
    with pytest.raises(ValueError, match="unknown stream 'x'"):
        b.add_node([0.0], streams={"x": [1.0]})


def test_forbidden_is_the_contests_convention() -> None:
    data = copy.deepcopy(EXAMPLE)
    data["problem"]["nodes"]["costs"][1][0] = 10**18
    assert from_contest(data).evaluate([0, 0, 2, 1, 0]).objective == math.inf
    assert FORBIDDEN == 1e18
