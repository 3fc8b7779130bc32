"""The planner against its oracles: the best objective to 1e-9 relative, and the fewest checkpoints on ties."""

import importlib.util
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_sparse_cache import _planner
from hf_sparse_cache.planning import planner
from hf_sparse_cache.planning.planner import CheckpointPlan, plan_checkpoints


# Problems compared with an oracle: 10,500, each with the solver the planner picks and with the costs-only solver.
BRUTE_FORCE_CASES = 6_000
RECURRENCE_CASES = 4_500
RATIOS = (planner._TRUSTED_RATIO, 0.0)


def cases(count):
    quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=count, deadline=None, database=None, derandomize=True, suppress_health_check=quiet)


whole = st.integers(0, 4).map(float)  # zeros and ties
real = st.floats(1e-3, 1e3)
wild = st.integers(-40, 40).map(lambda e: 10.0**e) | st.floats(1e-30, 1e30)


@st.composite
def problems(draw, max_positions):
    """(weights, prefill_cost or None, candidates or None, max_checkpoints or None, checkpoint_cost, exact)."""
    n = draw(st.integers(0, 1) | st.integers(2, max_positions) | st.integers(max_positions // 2, max_positions))
    numbers = draw(st.sampled_from([whole, whole, real, wild]))
    exact = numbers is whole
    if draw(st.integers(0, 9)) == 0:  # a single spike
        weights = [0.0] * (n + 1)
        weights[draw(st.integers(0, n))] = draw(numbers)
    else:
        weights = draw(st.lists(numbers, min_size=n + 1, max_size=n + 1))
    shape = draw(st.sampled_from(["default", "quadratic", "steps"]))
    costs = None
    if shape == "quadratic":
        costs = [float(t * t + 3 * t) for t in range(n + 1)]
    elif shape == "steps":
        costs = np.cumsum(draw(st.lists(numbers, min_size=n + 1, max_size=n + 1))).tolist()
    candidates = None
    if n and draw(st.integers(0, 2)) == 0:
        candidates = sorted(draw(st.sets(st.integers(1, n))))
    limit = draw(st.sampled_from([None, None, 0, 1, 1, 2, 2, 3, 4, 5, n, n + 2]))
    price = draw(st.just(0.0) | numbers)
    return weights, costs, candidates, limit, price, exact


def arguments_of(problem):
    """The arguments of the oracles, defaults filled in."""
    weights, costs, candidates, limit, price, _ = problem
    costs = list(range(len(weights))) if costs is None else costs
    return weights, costs, list(range(1, len(weights))) if candidates is None else candidates, limit, price


def solve(problem, trusted_ratio):
    """The plan, and its objective as the definition has it."""
    weights, costs, candidates, limit, price, _ = problem
    with mock.patch.object(planner, "_TRUSTED_RATIO", trusted_ratio):
        plan = plan_checkpoints(weights, limit, prefill_cost=costs, checkpoint_cost=price, candidates=candidates)
    weights, costs, candidates, limit, price = arguments_of(problem)
    cost = reference.placement_cost(weights, costs, plan.positions)
    assert list(plan.positions) == sorted(set(plan.positions))
    assert set(plan.positions) <= set(candidates)
    assert limit is None or len(plan.positions) <= limit
    assert math.isclose(plan.expected_cost, cost / sum(weights) if sum(weights) else 0.0, rel_tol=1e-9)
    return plan, cost + price * len(plan.positions)


@cases(BRUTE_FORCE_CASES)
@given(problem=problems(max_positions=7))
def test_equals_brute_force(problem):
    best, fewest = reference.brute_force(*arguments_of(problem))
    for trusted_ratio in RATIOS:
        plan, objective = solve(problem, trusted_ratio)
        assert math.isclose(objective, best, rel_tol=1e-9)
        if problem[-1]:  # small integers: ties are exact
            assert len(plan.positions) == fewest


@cases(RECURRENCE_CASES)
@given(problem=problems(max_positions=16))
def test_equals_the_plain_recurrence(problem):
    best = reference.recurrence(*arguments_of(problem))
    for trusted_ratio in RATIOS:
        assert math.isclose(solve(problem, trusted_ratio)[1], best, rel_tol=1e-9)


HARD = {
    "flat": lambda n: np.ones(n),
    "two levels": lambda n: np.where(np.arange(n) % 50 == 0, 10.0, 1.0),
    "halving": lambda n: 0.5 ** np.arange(n),
    "rising": lambda n: 1.5 ** np.arange(n),
    "lognormal": lambda n: np.random.default_rng(1).lognormal(0, 12, n),
    "counts": lambda n: np.random.default_rng(2).poisson(0.3, n),
}


@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("limit", [1, 3, 40, 150, 290])
def test_both_solvers_agree(name, limit):
    weights = HARD[name](300)
    objectives = [solve((weights, None, None, limit, 0.0, False), trusted_ratio)[1] for trusted_ratio in RATIOS]
    assert math.isclose(*objectives, rel_tol=1e-9)


@pytest.mark.parametrize("name", HARD)
def test_the_search_is_short(name):
    problem = _planner.Problem(np.asarray(HARD[name](300), float), np.arange(300.0), None)
    for limit in range(1, problem.nodes):
        counted = Counted(problem)
        assert len(planner._solve(counted, limit, 0.0)) == limit
        assert counted.passes <= 30


class Counted:
    def __init__(self, problem):
        self.passes, self.nodes, self.shift, self.cost = 0, problem.nodes, problem.shift, problem.cost
        self.least_paid, self._most_saved = problem.least_paid, problem.most_saved

    def most_saved(self, price):
        self.passes += 1
        return self._most_saved(price)


def test_one_table_of_known_answers():
    weights = np.zeros(101)
    weights[[20, 60, 100]] = [1, 5, 2]
    assert plan_checkpoints(weights) == CheckpointPlan((20, 60, 100), 0.0)
    assert plan_checkpoints(weights, 0) == CheckpointPlan((), (20 + 300 + 200) / 8)
    assert plan_checkpoints(weights, 1) == CheckpointPlan((60,), (20 + 80) / 8)
    assert plan_checkpoints(weights, 2) == CheckpointPlan((60, 100), 20 / 8)
    assert plan_checkpoints(weights, checkpoint_cost=20.0) == CheckpointPlan((60, 100), 20 / 8)  # 20 saves nothing net
    assert plan_checkpoints(weights, 1, checkpoint_cost=20.0).positions == (60,)
    assert plan_checkpoints(weights, candidates=[50]) == CheckpointPlan((50,), (20 + 50 + 100) / 8)
    assert plan_checkpoints([0.0, 0.0]) == plan_checkpoints([3.0]) == CheckpointPlan((), 0.0)


@pytest.mark.parametrize("exponent", [-1000, 1000])
def test_the_scale_does_not_matter(exponent):
    weights = np.random.default_rng(0).random(200)
    scaled = plan_checkpoints(weights * 2.0**exponent, 9)
    assert scaled.positions == plan_checkpoints(weights, 9).positions
    assert scaled.expected_cost == pytest.approx(plan_checkpoints(weights, 9).expected_cost, rel=1e-12)
    costs = np.arange(200.0) * 2.0**exponent
    assert plan_checkpoints(weights, 9, prefill_cost=costs).positions == scaled.positions
    assert plan_checkpoints(weights, checkpoint_cost=1e308).positions == ()


def test_plans_are_plain_immutable_values():
    plan = plan_checkpoints(np.arange(5), 2)
    assert all(type(position) is int for position in plan.positions)
    assert type(plan.expected_cost) is float
    with pytest.raises(AttributeError):
        plan.positions = ()


def test_any_array_of_numbers_is_taken_and_left_alone():
    weights = [0, 3, 1, 4, 1, 5]
    expected = plan_checkpoints(weights, 2)
    for given_weights in (np.array(weights)[::-1][::-1], np.array(weights, np.float32), torch.tensor(weights)):
        before = given_weights.copy() if isinstance(given_weights, np.ndarray) else given_weights.clone()
        assert plan_checkpoints(given_weights, 2) == expected
        assert bool((before == given_weights).all())
    read_only = np.array(weights, float)
    read_only.setflags(write=False)
    assert plan_checkpoints(read_only, 2) == expected


NAN, INF = math.nan, math.inf
BAD = [
    ("weights", [1, -1, 2]),
    ("weights", [1, NAN]),
    ("weights", [1, INF]),
    ("weights", []),
    ("weights", [[1, 2], [3, 4]]),
    ("weights", 1.0),
    ("weights", ["a", "b"]),
    ("weights", [[1], [2, 3]]),
    ("prefill_cost", [0, 2, 1, 3]),
    ("prefill_cost", [0, 1, NAN, 3]),
    ("prefill_cost", [0, 1, 2, INF]),
    ("prefill_cost", [0, 1, 2]),
    ("prefill_cost", [-1e308, 0, 1, 1e308]),
    ("candidates", [2, 1]),
    ("candidates", [0, 1]),
    ("candidates", [1, 4]),
    ("candidates", [1.5]),
    ("candidates", [NAN]),
    ("candidates", [[1]]),
    ("max_checkpoints", -1),
    ("max_checkpoints", 2.5),
    ("checkpoint_cost", -0.1),
    ("checkpoint_cost", NAN),
    ("checkpoint_cost", INF),
    ("checkpoint_cost", "free"),
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_input_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        plan_checkpoints(**{"weights": [1.0, 2.0, 3.0, 4.0], name: value})


def test_the_compiled_module_defends_its_arrays():
    ones = np.ones(4)
    with pytest.raises(ValueError, match="prefill_cost"):
        _planner.Problem(ones, np.ones(3), None)
    for outside in ([0], [4], [2, 1], [-1]):
        with pytest.raises(ValueError, match="candidates"):
            _planner.Problem(ones, ones, np.array(outside))


def test_a_missing_extension_names_the_fix():
    code = "import sys; sys.modules['hf_sparse_cache._planner'] = None; import hf_sparse_cache.planning.planner"
    run = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert "ImportError" in run.stderr
    assert "pip install -e ." in run.stderr


def test_no_index_leaves_its_array(tmp_path):
    """The same source, built with the checks on: what runs unchecked in production never needed them."""
    source = tmp_path / "_planner.pyx"
    text = (Path(__file__).parents[2] / "_planner.pyx").read_text(encoding="utf-8")
    source.write_text(
        text.replace("boundscheck=False", "boundscheck=True").replace("cdivision=True", "cdivision=False")
    )
    build = [sys.executable, "-m", "Cython.Build.Cythonize", "--inplace", source.name]
    env = {**os.environ, "CFLAGS": "-O1"}
    done = subprocess.run(build, check=False, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert "__Pyx_RaiseBufferIndexError(" in (tmp_path / "_planner.c").read_text()
    built = next(path for path in tmp_path.iterdir() if path.suffix in (".so", ".pyd"))
    spec = importlib.util.spec_from_file_location("_planner", built)
    checked = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(checked)

    draw = random.Random(0)
    for _ in range(400):
        n = draw.choice([0, 1, 2, 3, 7, 8, 9, 60, 64, 65])
        weights = [draw.choice([0.0, 1.0, draw.random(), 10 ** draw.uniform(-9, 9)]) for _ in range(n + 1)]
        candidates = sorted(draw.sample(range(1, n + 1), draw.randint(0, n))) if draw.random() < 0.5 else None
        problem = (weights, None, candidates, draw.choice([None, 0, 1, 2, 5, n]), draw.choice([0.0, 1.0]), False)
        for trusted_ratio in RATIOS:
            expected = solve(problem, trusted_ratio)[0]
            with mock.patch.object(planner, "Problem", checked.Problem):
                assert solve(problem, trusted_ratio)[0] == expected


def test_a_plan_is_read_back_and_what_is_none_is_refused_by_name():
    plan = CheckpointPlan((1, 5, 9), 2.5)
    assert plan.to_dict() == {"positions": [1, 5, 9], "expected_cost": 2.5}
    assert CheckpointPlan.from_dict({**plan.to_dict(), "more": 1}) == plan
    assert CheckpointPlan.from_dict({"positions": (), "expected_cost": 0}) == CheckpointPlan((), 0.0)
    assert type(CheckpointPlan.from_dict({"positions": [np.int64(3)], "expected_cost": 1}).positions[0]) is int
    for name in ("positions", "expected_cost"):
        with pytest.raises(ValueError, match=f"{name} is missing: a plan has positions and expected_cost"):
            CheckpointPlan.from_dict({key: value for key, value in plan.to_dict().items() if key != name})
    for positions in (7, "12", None, [1, 1], [2, 1], [0, 1], [-1], [1.5], ["1"]):
        with pytest.raises(ValueError, match="positions is"):
            CheckpointPlan.from_dict({"positions": positions, "expected_cost": 1.0})
    for cost in (-1.0, NAN, INF, None, "much", 10**400):
        with pytest.raises(ValueError, match="expected_cost is"):
            CheckpointPlan.from_dict({"positions": [1], "expected_cost": cost})


def test_a_plan_shows_its_first_positions_and_how_many_more_there_are():
    rows = CheckpointPlan(tuple(range(2, 66, 2)), 0.5)._repr_html_()
    assert rows.count("<tr>") == 33 and "more" not in rows and "0.5 for a unit of weight" in rows
    rows = CheckpointPlan(tuple(range(1000, 34001, 1000)), 0.5)._repr_html_()
    assert rows.count("<tr>") == 33 and "And 2 more." in rows and "33,000" not in rows
    cells = CheckpointPlan((4, 1009), 1.0)._repr_html_()
    assert [cells.index(f">{cell}<") for cell in ("4", "2", "1,009", "1,005")] == sorted(
        cells.index(f">{cell}<") for cell in ("4", "2", "1,009", "1,005")
    )
    assert "none" in CheckpointPlan((), 0.0).card() and "2 positions" in CheckpointPlan((4, 1009), 1.0).card()
    assert "4, 1,009" in CheckpointPlan((4, 1009), 1.0).card()


def test_bad_entries_are_named_by_their_place():
    ones = [1.0, 1.0, 1.0, 1.0]
    for said, options in (
        (r"weights\[2\] is -1.0: weights must be finite and not negative", {"weights": [1, 1, -1, -2]}),
        (r"weights\[0\] is nan", {"weights": [NAN, -1, 1, 1]}),
        (r"prefill_cost\[1\] is inf: costs must be finite", {"prefill_cost": [0, INF, 2, 3]}),
        (r"prefill_cost\[2\] is 1.0: costs must not decrease", {"prefill_cost": [0, 2, 1, 3]}),
        (r"prefill_cost spans from", {"prefill_cost": [-1e308, 0, 1, 1e308]}),
        (r"candidates\[1\] is 4.0: positions go from 1 to 3", {"candidates": [1, 4]}),
        (r"candidates\[0\] is 0.0: positions go from 1 to 3", {"candidates": [0, 1]}),
        (r"candidates\[1\] is 1.5: positions must be whole", {"candidates": [1, 1.5]}),
        (r"candidates\[2\] is 1.0: positions must be in ascending order", {"candidates": [2, 3, 1]}),
        (r"prefill_cost has 3 entries but weights has 4", {"prefill_cost": [0, 1, 2]}),
        (r"weights is empty", {"weights": []}),
        (r"max_checkpoints is -1: give a whole number of at least 0", {"max_checkpoints": -1}),
        (r"must be a vector of numbers, got list", {"weights": [10**400, 1]}),
    ):
        with pytest.raises(ValueError, match=said):
            plan_checkpoints(**{"weights": ones, **options})
    assert plan_checkpoints(ones, candidates=[1, 3]).positions == (1, 3)
    assert plan_checkpoints(ones, candidates=[2, 2]).positions == (2,)


def test_no_price_is_beyond_what_a_float_holds():
    weights = np.full(5, 1e-300)
    assert plan_checkpoints(weights, checkpoint_cost=1e308).positions == ()
    assert plan_checkpoints(weights, checkpoint_cost=0.0).positions == (1, 2, 3, 4)
    flat = [0.0, 1.0, 0.0, 0.0]
    assert plan_checkpoints(flat, checkpoint_cost=1.0).positions == ()  # it saves no more than it costs
    assert plan_checkpoints(flat, checkpoint_cost=0.999).positions == (1,)
