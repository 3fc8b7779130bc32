"""Where to put checkpoints: exact placement for a limit on their number, a price for each, or both.

Reads top to bottom: the public call, then how a limit is turned into a price. The dynamic programming itself is the
compiled `_planner.Problem` (see `_planner.pyx`); reached through `compiled.py`. Symbols as in the paper
(arXiv 2605.05219): N positions, M checkpoints, weights w of overlap depths, prefill cost G.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import numpy as np

from ..checks import shown
from ..hub import Shareable
from ..stats import html_table
from .compiled import Problem, sound


if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

# Savings carry rounding errors of about 1e-15 of everything that can be saved. When the cost that is left is this many
# times smaller, the slower solver that works on costs takes over.
_TRUSTED_RATIO = 1e5


_SHOWN_POSITIONS = 32


@dataclass(frozen=True)
class CheckpointPlan(Shareable):
    """Checkpoints for one distribution of overlap depths.

    Attributes:
        positions: where to keep a checkpoint, in tokens, ascending.
        expected_cost: mean cost of prefilling from the last checkpoint to the overlap depth, per unit of weight and in
            the unit of `prefill_cost` (tokens by default). The price of the checkpoints is not in it.
    """

    file_name: ClassVar[str] = "checkpoint_plan.json"

    positions: tuple[int, ...]
    expected_cost: float

    def to_dict(self) -> dict[str, Any]:
        """Positions as a list, and the cost."""
        return {"positions": list(self.positions), "expected_cost": self.expected_cost}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """The plan from `to_dict`; unknown keys are ignored.

        Raises:
            ValueError: a field is missing or is not what it should be; the message names it.
        """
        for name in ("positions", "expected_cost"):
            if name not in content:
                raise ValueError(f"{name} is missing: a plan has positions and expected_cost, this is {dict(content)}")
        found = content["positions"]
        if not isinstance(found, list | tuple):
            raise ValueError(f"positions is {shown(found)}: give a list of positions")
        positions = [_count("positions", position) for position in found]
        if any(here <= before for before, here in zip([0, *positions], positions, strict=False)):
            raise ValueError(f"positions is {positions}: give positions of at least 1 in ascending order")
        return cls(tuple(positions), _price("expected_cost", content["expected_cost"]))

    def _repr_html_(self) -> str:
        """What a notebook shows: the first positions, and how far each is from the one before."""
        shown = self.positions[:_SHOWN_POSITIONS]
        rows = [
            (f"{number:,}", f"{position:,}", f"{position - before:,}")
            for number, (before, position) in enumerate(zip([0, *shown], shown, strict=False), start=1)
        ]
        more = len(self.positions) - len(shown)
        note = f"{f'And {more:,} more. ' if more else ''}Expected cost {self.expected_cost:,.4g} for a unit of weight."
        return html_table(("checkpoint", "position", "behind the one before"), rows, title="Plan", note=note)

    def card(self) -> str:
        """The positions and how to use them."""
        return (
            f"# A checkpoint plan\n\n{len(self.positions)} positions, in tokens, at which a prefix cache keeps the "
            f"state of a recurrent language model: {', '.join(f'{p:,}' for p in self.positions) or 'none'}. "
            f"Expected cost {self.expected_cost:g} for a unit of weight.\n\n```python\nfrom hf_sparse_cache import "
            'CheckpointPlan\n\nplan = CheckpointPlan.from_pretrained("this repository or folder")\n```\n'
        )


def plan_checkpoints(
    weights: ArrayLike,
    max_checkpoints: int | None = None,
    *,
    prefill_cost: ArrayLike | None = None,
    checkpoint_cost: float = 0.0,
    candidates: ArrayLike | None = None,
) -> CheckpointPlan:
    """Place checkpoints exactly: minimise `sum_d w_d (G(d) - G(last checkpoint <= d)) + checkpoint_cost * count`.

    Args:
        weights: w, shape `(N + 1,)`: weight of the overlap depths 0..N. They need not sum to one.
        max_checkpoints: M, the largest number of checkpoints. No limit when `None`.
        prefill_cost: G, shape `(N + 1,)`: cost of prefilling t tokens, never decreasing. The default is t.
        checkpoint_cost: price of each checkpoint, in the unit of weight times prefill cost.
        candidates: allowed positions, ascending within 1..N. The default is all of them.

    Returns:
        The plan. Of plans that cost the same, one with the fewest checkpoints.

    Raises:
        ValueError: an argument is out of range; the message names it.

    Source: the placement problem of arXiv 2605.05219. Time is O(N) for a price, and a few times that for a limit.
    """
    w = _vector("weights", weights)
    n_positions = len(w) - 1
    if n_positions < 0:
        raise ValueError("weights is empty: give the weights of the overlap depths 0, ..., N")
    if prefill_cost is None:
        g = np.arange(n_positions + 1, dtype=np.float64)
    else:
        g = _vector("prefill_cost", prefill_cost)
        if len(g) != n_positions + 1:
            raise ValueError(f"prefill_cost has {len(g)} entries but weights has {len(w)}: give G(0), ..., G(N)")
    if not sound(w, g):
        _refuse("weights", w, ~(np.isfinite(w) & (w >= 0)), "weights must be finite and not negative")
        _refuse("prefill_cost", g, ~np.isfinite(g), "costs must be finite")
        _refuse("prefill_cost", g[1:], g[1:] < g[:-1], "costs must not decrease", first=1)
        raise ValueError(f"prefill_cost spans from {g[0]} to {g[-1]}: the difference must be finite, rescale it")
    allowed = None if candidates is None else _positions("candidates", candidates, n_positions)
    limit = n_positions if max_checkpoints is None else _count("max_checkpoints", max_checkpoints)
    price = _price("checkpoint_cost", checkpoint_cost)

    problem = Problem(w, g, allowed)
    nodes = list(_solve(problem, limit, price))
    return CheckpointPlan(tuple(problem.positions(nodes)), problem.expected_cost(nodes))


class _Placement(NamedTuple):
    """Nodes that are best at a price, and the cost they leave."""

    nodes: Sequence[int]
    cost: float
    price: float


def _solve(problem: Problem, limit: int, checkpoint_cost: float) -> Sequence[int]:
    """The best nodes, at most `limit` of them."""
    limit = min(limit, problem.nodes)
    savable = problem.cost([])
    try:
        price = math.ldexp(checkpoint_cost, problem.shift)
    except OverflowError:  # more than anything that can be saved
        price = math.inf
    if limit == 0 or price >= savable:
        return []

    def place(trial_price: float) -> _Placement:
        nodes = problem.most_saved(trial_price)
        cost = problem.cost(nodes)
        if (cost + price * len(nodes)) * _TRUSTED_RATIO < savable:
            nodes = problem.least_paid(trial_price)
            cost = problem.cost(nodes)
        return _Placement(nodes, cost, trial_price)

    nothing = _Placement([], savable, savable)
    everything = _Placement(range(1, problem.nodes + 1), 0.0, 0.0)
    best = place(price) if price > 0 else everything
    return best.nodes if len(best.nodes) <= limit else _search(place, nothing, best, limit)


def _search(place: Callable[[float], _Placement], few: _Placement, many: _Placement, limit: int) -> Sequence[int]:
    """Find a price at which `limit` nodes are best, closing in from one placement with too few and one with too many.

    The cost left by k nodes is convex in k, and `place` finds the k that minimises cost + price * k: k falls as the
    price rises, and the best k nodes at any price are the best k nodes.
    """
    trial_price = few.cost / (limit + 1) ** 2  # right when the cost left falls like 1 / (k + 1)
    for step in count(1):
        # The price of the chord between the two finds a placement strictly between them, or proves there is none.
        gap = len(many.nodes) - len(few.nodes)
        on_chord = gap <= 3 or step % 4 == 0 or not many.price < trial_price < few.price
        if on_chord:
            trial_price = (few.cost - many.cost) / gap
        trial = place(trial_price)
        if len(trial.nodes) == limit:
            break
        if on_chord and not len(few.nodes) < len(trial.nodes) < len(many.nodes):
            return _spliced(few.nodes, many.nodes, limit)
        few, many = (trial, many) if len(trial.nodes) < limit else (few, trial)
        trial_price = _price_between(few, many, limit, step)
    # Solvers are precise relative to cost + price * k, and the price may dwarf the cost: ask at the lowest safe one.
    while 0 < trial.cost < trial.price and len((lower := place(trial.cost)).nodes) == limit:
        trial = lower
    return trial.nodes


def _price_between(few: _Placement, many: _Placement, limit: int, step: int) -> float:
    """A guess between two prices, on log scales. None of the three suits all shapes of weights, so they alternate."""
    missing = math.log((limit + 1) / (len(few.nodes) + 1))
    if many.price == 0:  # a power law, with ever larger strides until the other side is found
        return few.price * math.exp(-min(2.0**step, 700.0) * missing)
    if step % 4 == 1:  # k falls like a power of the price, as for smooth weights
        part = missing / math.log((len(many.nodes) + 1) / (len(few.nodes) + 1))
    elif step % 4 == 2:  # k falls like the logarithm of the price, as for weights over many orders of magnitude
        part = (limit - len(few.nodes)) / (len(many.nodes) - len(few.nodes))
    else:
        part = 0.5
    return few.price * math.exp(part * (math.log(many.price) - math.log(few.price)))


def _spliced(few: Sequence[int], many: Sequence[int], limit: int) -> list[int]:
    """A placement of `limit` nodes from two that tie at one price, where every number in between ties as well.

    It follows `many` and changes over to `few` inside a step of `few` that contains a whole step of `many`: costs obey
    the quadrangle inequality, so crossing there loses nothing. Such a step exists by the pigeonhole principle.
    """
    extra = limit - len(few)
    crossing = next((i for i in range(len(few)) if many[i + extra] <= few[i]), len(few))
    return [*many[: crossing + extra], *few[crossing:]]


def _vector(name: str, value: ArrayLike) -> NDArray[np.float64]:
    try:
        vector = np.ascontiguousarray(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{name} must be a vector of numbers, got {type(value).__name__}: {error}") from None
    if np.ndim(value) != 1:
        raise ValueError(f"{name} must have one dimension, got shape {np.shape(value)}")
    return vector


def _positions(name: str, value: ArrayLike, n_positions: int) -> NDArray[np.int64]:
    floats = _vector(name, value)
    _refuse(name, floats, ~((floats >= 1) & (floats <= n_positions)), f"positions go from 1 to {n_positions}")
    _refuse(name, floats, floats != np.floor(floats), "positions must be whole numbers")
    _refuse(name, floats[1:], floats[1:] < floats[:-1], "positions must be in ascending order", first=1)
    return floats.astype(np.int64)


def _refuse(name: str, values: NDArray[Any], bad: NDArray[np.bool_], rule: str, first: int = 0) -> None:
    """Raise for the first entry that is bad, if there is one; `first` is the index of the first of them."""
    if bad.any():
        index = int(bad.argmax())
        raise ValueError(f"{name}[{first + index}] is {values[index]}: {rule}")


def _count(name: str, value: int) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = -1
    if number < 0:
        raise ValueError(f"{name} is {shown(value)}: give a whole number of at least 0, or None for no limit")
    return number


def _price(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not 0 <= number < math.inf:
        raise ValueError(f"{name} is {shown(value)}: give a finite number of at least 0")
    return number
