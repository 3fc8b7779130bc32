# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""Exact placement of checkpoints when each of them has a price (the placement problem of arXiv 2605.05219).

Reached through `planning/compiled.py`; `planning/planner.py` also turns a limit on the number into a price. May be
touched: the two solvers, as long as `tests/planning/test_planner.py` agrees. Arguments are checked before the
unchecked loops. Behind the solvers stand the inner loops of every request, which `tests/planning/test_compiled.py`
holds against numpy and plain Python.

    w[d]      weight of overlap depth d, d = 0..N (p_d in the paper)
    G[t]      cost of prefilling t tokens, increasing; a request of depth d pays G[d] - G[last checkpoint <= d]
    node      a position where a checkpoint is of use; node 0 is the start of the prompt
    g[b]      G at node b, strictly increasing
    m[b] > 0  mass of the depths from node b up to the next candidate of use; tail[b] = m[b] + m[b + 1] + ...

The two solvers of the same recurrence over the nodes:

1. `most_saved`, O(nodes): saved(j) = max over i < j of saved(i) + (g[j] - g[i]) * tail[j] - price. Seen from j, every
   i is a line of slope -g[i] at x = tail[j]. Slopes and x fall together, so the best line only moves forward along
   the upper hull of the points (g[i], saved(i)).
2. `least_paid`, O(nodes * log(nodes)^2): the same on costs. It only ever adds numbers that are not negative, so the
   best cost keeps its relative precision where it is a tiny part of all that is saved. Rarely needed.
"""

from cpython.array cimport array
from cpython.mem cimport PyMem_Free, PyMem_Malloc
from libc.limits cimport INT_MAX
from libc.math cimport INFINITY, NAN, fabs, frexp, ldexp, pow

from numpy import asarray, empty  # at run time only: large arrays come in huge pages, and the build needs no numpy

# Inputs are scaled by powers of two (exact) until their maxima sit here: no product overflows, tiny inputs survive.
cdef int SCALED_EXPONENT = 300
# Ways in which views look, for comparisons in C.
cdef enum:
    UNIFORM_ = 1, ABSOLUTE_, RATIO_, FROM_END_, CUTS_FROM_END_, BEYOND_, AGAIN_, JUNCTIONS_
# Two costs this close (relative) may be in the wrong order: `relax` then keeps the later predecessor reachable.
cdef double TIE = 1e-14
# Passes that are fewer than this: the forecast sees nobody.
cdef double LEAST_ENTERING = 1e-9
# A view with less credit for a depth does not learn from it.
cdef double LEAST_CREDIT = 1e-3


def sound(const double[::1] weights not None, const double[::1] prefill_cost not None):
    """Whether weights are finite and not negative, and costs finite, never decreasing, and not too far apart."""
    cdef Py_ssize_t d
    for d in range(weights.shape[0]):
        if not 0.0 <= weights[d] < INFINITY:
            return False
    for d in range(prefill_cost.shape[0]):
        if not fabs(prefill_cost[d]) < INFINITY or (d > 0 and prefill_cost[d] < prefill_cost[d - 1]):
            return False
    return not prefill_cost.shape[0] or prefill_cost[prefill_cost.shape[0] - 1] - prefill_cost[0] < INFINITY


cdef class Problem:
    """Weights, prefill costs and candidates, reduced to nodes. Costs and prices inside are scaled by 2**shift.

    Args:
        weights: w, shape (N + 1,), finite and not negative.
        prefill_cost: G, shape (N + 1,), finite, never decreasing.
        candidates: allowed positions within 1..N, ascending, or None for all of them.

    Raises:
        ValueError: when lengths or the range of the candidates would lead outside the arrays.
    """

    cdef readonly Py_ssize_t nodes  # the last node; nodes are 0..nodes
    cdef readonly int shift
    cdef int cost_shift
    cdef double total, unavoidable  # mass of all depths; what checkpoints at every node would leave
    cdef double[::1] g, m, tail, saved, slope
    cdef int[::1] position, hull, previous

    def __init__(
        self, const double[::1] weights not None, const double[::1] prefill_cost not None,
        const long long[::1] candidates,
    ):
        cdef Py_ssize_t d, last = weights.shape[0] - 1
        cdef Py_ssize_t size = 1 + (last if candidates is None else candidates.shape[0])
        cdef double largest = 0.0
        if not 0 <= last < INT_MAX - 2 or prefill_cost.shape[0] != last + 1:
            raise ValueError(f"weights and prefill_cost need one length, got {last + 1} and {prefill_cost.shape[0]}")
        for d in range(size - 1 if candidates is not None else 0):
            if not (candidates[d - 1] if d > 0 else 1) <= candidates[d] <= last:
                raise ValueError(f"candidates[{d}] is {candidates[d]}: not ascending within 1..{last}")
        for d in range(last + 1):
            largest = max(largest, weights[d])
        self.shift = shift_for(largest)
        self.cost_shift = shift_for(max(fabs(prefill_cost[0]), fabs(prefill_cost[last])))
        cdef double[:, ::1] numbers = empty((5, size))
        cdef int[:, ::1] places = empty((3, size), "i")
        self.g, self.m, self.tail, self.saved, self.slope = numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]
        self.position, self.hull, self.previous = places[0], places[1], places[2]
        self.reduce(weights, prefill_cost, candidates, ldexp(1.0, self.shift), ldexp(1.0, self.cost_shift))
        self.shift += self.cost_shift
        tail_sums(self.m, self.tail, self.nodes)

    cdef int reduce(
        self, const double[::1] weights, const double[::1] prefill_cost, const long long[::1] candidates,
        double weight_unit, double cost_unit,
    ) except -1:
        """Fill g, m, position and the totals."""
        cdef bint every = candidates is None
        cdef Py_ssize_t c, d, s, after, end = weights.shape[0]
        cdef Py_ssize_t n_candidates = end - 1 if every else candidates.shape[0]
        cdef double weight, mass, level
        self.nodes, self.total, self.unavoidable = -1, 0.0, 0.0
        for c in range(-1, n_candidates):
            s = 0 if c < 0 else c + 1 if every else candidates[c]
            after = end if c + 1 == n_candidates else c + 2 if every else candidates[c + 1]
            level = prefill_cost[s] * cost_unit
            mass = 0.0
            for d in range(s, after):
                weight = weights[d] * weight_unit
                mass += weight
                self.unavoidable += weight * (prefill_cost[d] * cost_unit - level)
            self.total += mass
            if c >= 0 and level == self.g[self.nodes]:  # saves nothing over the node before
                self.m[self.nodes] += mass
            elif c < 0 or mass > 0:  # without mass, the next candidate is at least as good
                self.nodes += 1
                self.g[self.nodes] = level
                self.m[self.nodes] = mass
                self.position[self.nodes] = <int> s
        return 0

    def positions(self, list chosen not None):
        """Positions of the chosen nodes."""
        return [self.position[<Py_ssize_t> node] for node in chosen]

    def cost(self, list chosen not None):
        """Sum over the nodes of m[b] * (g[b] - g[last chosen <= b]), scaled. The price is not in it."""
        cdef Py_ssize_t b, following, last = 0
        cdef double cost = 0.0
        for following in [*chosen, self.nodes + 1]:
            for b in range(last + 1, following):
                cost += (self.g[b] - self.g[last]) * self.m[b]
            last = following
        return cost

    def expected_cost(self, list chosen not None):
        """Mean over all depths of G[d] - G[last chosen <= d], not scaled; 0 when the weights are all zero."""
        cdef double cost = self.unavoidable + self.cost(chosen)
        return ldexp(cost / self.total, -self.cost_shift) if self.total > 0 else 0.0

    def most_saved(self, double price):
        """Solver 1: the nodes, ascending, that save most after their price; the fewest of them when that is a tie."""
        cdef Py_ssize_t j, best = 0
        with nogil:
            hull_pass(self.g, self.tail, self.nodes, price, self.saved, self.hull, self.slope, self.previous)
            for j in range(1, self.nodes + 1):
                if self.saved[j] > self.saved[best]:  # the first of equals has the fewest predecessors
                    best = j
        return trace_back(self.previous, best)

    def least_paid(self, double price):
        """Solver 2, with the contract of `most_saved`."""
        cdef Py_ssize_t j, block, leaves = 1, end = self.nodes + 1  # everything ends in one more node
        while leaves < end:
            leaves *= 2
        cdef double[:, ::1] tree = empty((2, 2 * leaves))
        cdef double[::1] paid = empty(end + 1), scratch = empty(end + 1)
        cdef int[::1] pivot = empty(end + 1, "i"), previous = empty(end + 1, "i")
        with nogil:
            build_tree(self.g, self.m, self.nodes, leaves, tree)
            for j in range(1, end + 1):
                paid[j] = INFINITY
            paid[0] = 0.0
            # paid(j) needs every paid(i), i < j. Each pair i < j meets once, in the blocks around their common prefix.
            for j in range(1, end + 1):
                block = j & -j
                relax(self.g, self.m, tree, leaves, j - block, j, min(j + block - 1, end), price,
                      paid, scratch, pivot, previous)
        return trace_back(previous, previous[end])


cdef int hull_pass(
    const double[::1] g, const double[::1] tail, Py_ssize_t nodes, double price,
    double[::1] saved, int[::1] hull, double[::1] slope, int[::1] previous,
) except -1 nogil:
    """Fill saved[0..nodes] and previous[1..nodes]; hull and slope are scratch."""
    cdef Py_ssize_t i, j, head = 0, top = 0  # hull[head..top] is still of use; slope[t] leads from t - 1 to t
    cdef double rise, x
    saved[0] = 0.0
    hull[0] = 0
    for j in range(1, nodes + 1):
        i = j - 1
        if saved[i] > saved[hull[top]]:  # otherwise it is dominated: it costs more and has saved no more
            rise = (saved[i] - saved[hull[top]]) / (g[i] - g[hull[top]])
            while top > head and rise >= slope[top]:
                top -= 1
                rise = (saved[i] - saved[hull[top]]) / (g[i] - g[hull[top]])
            top += 1
            hull[top] = <int> i
            slope[top] = rise
        x = tail[j]
        while head < top and slope[head + 1] > x:
            head += 1
        i = hull[head]
        previous[j] = <int> i
        saved[j] = saved[i] + (g[j] - g[i]) * x - price
    return 0


cdef int relax(
    const double[::1] g, const double[::1] m, const double[:, ::1] tree, Py_ssize_t leaves,
    Py_ssize_t first_i, Py_ssize_t first_j, Py_ssize_t last_j, double price,
    double[::1] paid, double[::1] scratch, int[::1] pivot, int[::1] previous,
) except -1 nogil:
    """paid[j] = min of itself and paid[i] + price + cost in between, for first_i <= i < first_j <= j <= last_j.

    The best i never moves back as j grows, so the middle j splits the work for the others, level by level.
    """
    cdef Py_ssize_t i, j, low, high, best, step = 1
    cdef double cost, mass, least
    while 2 * step <= last_j - first_j + 1:
        step *= 2
    while step > 0:
        j = first_j + step - 1
        while j <= last_j:
            low = pivot[j - step] if j - step >= first_j else first_i
            high = pivot[j + step] if j + step <= last_j else first_j - 1
            cost = tree_cost(g, tree, leaves, high, j, &mass)
            least = INFINITY
            best = high
            for i in range(high, low - 1, -1):
                if i < high:
                    mass += m[i + 1]
                    cost += (g[i + 1] - g[i]) * mass
                scratch[i] = paid[i] + cost
                if scratch[i] <= least:
                    least = scratch[i]
                    best = i
            if least + price < paid[j]:
                paid[j] = least + price
                previous[j] = <int> best
            while high > low and scratch[high] > least * (1 + TIE):
                high -= 1
            pivot[j] = <int> high
            j += 2 * step
        step //= 2
    return 0


cdef int build_tree(
    const double[::1] g, const double[::1] m, Py_ssize_t nodes, Py_ssize_t leaves, double[:, ::1] tree
) except -1 nogil:
    """Binary tree over the nodes: tree[0] is the mass below, tree[1] its cost from a checkpoint at its first node."""
    cdef Py_ssize_t n, right, start, width = 1, first = leaves
    for n in range(leaves):
        tree[0, leaves + n] = m[n] if n <= nodes else 0.0
        tree[1, leaves + n] = 0.0
    while first > 1:
        for n in range(first // 2, first):
            right = 2 * n + 1
            start = (right - first) * width
            tree[0, n] = tree[0, right - 1] + tree[0, right]
            tree[1, n] = tree[1, right - 1] + tree[1, right]
            if start <= nodes:
                tree[1, n] += (g[start] - g[start - width]) * tree[0, right]
        first //= 2
        width *= 2
    return 0


cdef double tree_cost(
    const double[::1] g, const double[:, ::1] tree, Py_ssize_t leaves, Py_ssize_t i, Py_ssize_t j, double *mass
) except -1 nogil:
    """Cost of the nodes i + 1..j - 1 when i is the last checkpoint; `mass` receives their mass."""
    cdef Py_ssize_t n, left = leaves + i + 1, right = leaves + j, width = 1, first = leaves
    cdef double cost = 0.0
    mass[0] = 0.0
    while left < right:
        if left & 1:
            cost += tree[1, left] + (g[(left - first) * width] - g[i]) * tree[0, left]
            mass[0] += tree[0, left]
            left += 1
        if right & 1:
            n = right - 1
            cost += tree[1, n] + (g[(n - first) * width] - g[i]) * tree[0, n]
            mass[0] += tree[0, n]
        left //= 2
        right //= 2
        first //= 2
        width *= 2
    return cost


cdef int tail_sums(const double[::1] m, double[::1] tail, Py_ssize_t nodes) except -1 nogil:
    """tail[b] = m[b] + ... + m[nodes], compensated: a plain sum drifts over a million nodes."""
    cdef Py_ssize_t b
    cdef double total = 0.0, lost = 0.0, grown
    for b in range(nodes, 0, -1):
        grown = total + m[b]
        lost += (total - grown) + m[b] if total >= m[b] else (m[b] - grown) + total
        total = grown
        tail[b] = total + lost
    return 0


cdef list trace_back(const int[::1] previous, Py_ssize_t node):
    """The chain of predecessors that ends at `node`, ascending, without node 0."""
    chain = []
    while node > 0:
        chain.append(node)
        node = previous[node]
    return chain[::-1]


cdef int shift_for(double largest) noexcept nogil:
    """The power of two that brings the largest value of an input to SCALED_EXPONENT."""
    cdef int exponent = 0
    frexp(largest, &exponent)
    return min(SCALED_EXPONENT - exponent, 1023)


# -- what a request looks up one by one -------------------------------------------------------------------------------
#
# A path has a handful of checkpoints and a prompt a few dozen cuts: arrays of numpy take longer to call than to
# compute on these. Every sum has its terms in one order, as decisions compare them.


cdef class Histogram:
    """Decayed counts over fixed edges, read as a piecewise linear distribution function.

    Args:
        edges: ascending, of shape (B + 1,).
        prior: mass that the bins share before anything is counted.
    """

    cdef public array borders, counts, total

    def __init__(self, edges, double prior = 1.0):
        cdef Py_ssize_t bins = len(edges) - 1
        if bins < 1:
            raise ValueError(f"edges has {bins + 1} entries: give at least two")
        self.borders = array("d", edges.tolist())
        self.counts = array("d", [prior / bins]) * bins
        self.total = array("d", [0.0]) * (bins + 1)
        self.sum_up()

    cdef int sum_up(self) except -1:
        cdef Py_ssize_t i
        cdef double mass = 0.0
        for i in range(len(self.counts)):
            mass += self.counts.data.as_doubles[i]
            self.total.data.as_doubles[i + 1] = mass
        return 0

    def add(self, double value, double credit, double decay):
        """Counts one value; old counts fade by `decay` for each full unit of credit."""
        self.count(value, credit, decay)

    cdef int count(self, double value, double credit, double decay) except -1:
        cdef Py_ssize_t i, bins = len(self.counts)
        cdef Py_ssize_t index = min(bin_of(self.borders.data.as_doubles, bins, value, 0) + 1, bins) - 1
        cdef double keep = pow(decay, credit)
        for i in range(bins):
            self.counts.data.as_doubles[i] *= keep
        if index >= 0:
            self.counts.data.as_doubles[index] += credit
        else:
            self.counts.data.as_doubles[bins - 1] += credit
        return self.sum_up()

    def upto(self, const double[:] values not None):
        """Unnormalised mass below each value, of shape (n,)."""
        found = empty(values.shape[0])
        self.fill(values, found)
        return found

    cdef int fill(self, const double[:] values, double[::1] mass) except -1:
        cdef Py_ssize_t i, at = 0, bins = len(self.counts), n = values.shape[0]
        cdef const double *x = self.borders.data.as_doubles
        cdef const double *y = self.total.data.as_doubles
        for i in range(n):
            at = bin_of(x, bins, values[i], at)
            if at < 0:
                mass[i] = y[0]
                at = 0
            elif at >= bins:
                mass[i] = y[bins]
            elif x[at] == values[i]:
                mass[i] = y[at]
            else:
                mass[i] = (y[at + 1] - y[at]) / (x[at + 1] - x[at]) * (values[i] - x[at]) + y[at]
        return 0

    def mass(self, double value):
        """The same for one value."""
        return self.upto_one(value)

    cdef double upto_one(self, double value) except? -1.0:
        cdef Py_ssize_t bins = len(self.counts), at = bin_of(self.borders.data.as_doubles, bins, value, 0)
        cdef const double *x = self.borders.data.as_doubles
        cdef const double *y = self.total.data.as_doubles
        if at >= bins:
            return y[bins]
        if at < 0:
            return y[0]
        return (y[at + 1] - y[at]) / (x[at + 1] - x[at]) * (value - x[at]) + y[at]


cdef Py_ssize_t bin_of(const double *borders, Py_ssize_t bins, double value, Py_ssize_t near) noexcept nogil:
    """The last of `bins` + 1 ascending borders that is at most `value`, -1 for none; looks around `near` first."""
    cdef Py_ssize_t low = 0, high = bins + 1, middle
    if 0 <= near <= bins and borders[near] <= value:
        low = near + 1
        while low <= near + 4:
            if low > bins or borders[low] > value:
                return low - 1
            low += 1
    while low < high:
        middle = (low + high) // 2
        if borders[middle] <= value:
            low = middle + 1
        else:
            high = middle
    return low - 1


# How a view looks at a depth (see `planning/views.py`); 0 for one that is not compiled.
UNIFORM, ABSOLUTE, RATIO, FROM_END = UNIFORM_, ABSOLUTE_, RATIO_, FROM_END_
CUTS_FROM_END, BEYOND, AGAIN, JUNCTIONS = CUTS_FROM_END_, BEYOND_, AGAIN_, JUNCTIONS_


def viewed(list views not None, const double[::1] depths not None, shape not None):
    """P(next overlap < depth) as each view has it, of shape (V, n).

    Args:
        views: with `looks`, one of the constants above or 0, and `seen`, its histogram or None.
        depths: ascending, of shape (n,).
        shape: of the prompt.
    """
    cdef Py_ssize_t v, n = depths.shape[0]
    cdef const long long[::1] cuts = shape.cuts, ends = shape.ends, stops = shape.stops
    cdef double length = shape.length, overlap = shape.overlap
    if ends.shape[0] != stops.shape[0]:
        raise ValueError(f"{ends.shape[0]} ends need as many stops, got {stops.shape[0]}")
    found = empty((len(views), n))
    cdef double[:, ::1] below = found
    cdef double[::1] scratch = empty(n)
    for v in range(len(views)):
        view = views[v]
        if not view.looks:
            found[v] = view.below(asarray(depths.base), shape)
        else:
            look(view.looks, view.seen, depths, length, overlap, cuts, ends, stops, below[v], scratch)
    return found


cdef int look(
    int how, Histogram seen, const double[::1] depths, double length, double overlap, const long long[::1] cuts,
    const long long[::1] ends, const long long[::1] stops, double[::1] below, double[::1] scratch,
) except -1:
    """One row of `viewed`."""
    cdef Py_ssize_t i, n = depths.shape[0], place = 0
    cdef double whole
    cdef long long total = 0, gone = 0
    if how == UNIFORM_ or how == JUNCTIONS_:
        for i in range(stops.shape[0] if how == JUNCTIONS_ else 0):
            total += stops[i]
        for i in range(n):
            if not total:
                below[i] = depths[i] / (length + 1)
                continue
            while place < ends.shape[0] and ends[place] < depths[i]:
                gone += stops[place]
                place += 1
            below[i] = <double> gone / <double> total
        return 0
    if how == AGAIN_:
        for i in range(n):
            below[i] = depths[i] > overlap
        return 0
    if seen is None:
        raise ValueError(f"a view that looks in way {how} has no histogram")
    if how == ABSOLUTE_:
        whole = max(seen.upto_one(length + 1.0), 1e-9)
        seen.fill(depths, below)
    elif how == BEYOND_:
        whole = max(seen.upto_one(length + 1.0 - overlap), 1e-9)
        for i in range(n):
            scratch[i] = max(depths[i] - overlap, 0.0)
        seen.fill(scratch, below)
    elif how == RATIO_:
        whole = seen.upto_one(1.0)
        for i in range(n):
            scratch[i] = depths[i] / (length + 1)
        seen.fill(scratch, below)
    elif how == FROM_END_:
        whole = seen.upto_one(length + 1.0)
        for i in range(n):
            scratch[i] = length + 1 - depths[i]
        seen.fill(scratch, below)
    elif how == CUTS_FROM_END_:
        whole = seen.upto_one(cuts.shape[0] + 1.0)
        for i in range(n):
            while place < cuts.shape[0] and cuts[place] < depths[i]:
                place += 1
            scratch[i] = cuts.shape[0] - place
        seen.fill(scratch, below)
    else:
        raise ValueError(f"no view looks in way {how}")
    for i in range(n):
        below[i] /= whole
        if how == FROM_END_ or how == CUTS_FROM_END_:
            below[i] = 1.0 - below[i] if how == FROM_END_ or depths[i] > 0.0 else 0.0
    return 0


def leaning(const double[:, ::1] shares not None, list seen not None, Py_ssize_t kind, double lean):
    """Shares of a context, of shape (V,), leaning on those of all, the last row, while it was seen little.

    Args:
        shares: one row a context, of shape (K, V).
        seen: how often each context was.
        kind: of the context.
        lean: observations with which it leans on the shares of all.
    """
    found = empty(shares.shape[1])
    cdef double[::1] mixed = found
    lean_on(shares, seen, kind, lean, mixed)
    return found


cdef int lean_on(const double[:, ::1] shares, list seen, Py_ssize_t kind, double lean, double[::1] mixed) except -1:
    cdef Py_ssize_t v, last = shares.shape[0] - 1
    if not 0 <= kind <= last or len(seen) != last + 1:
        raise ValueError(f"kind={kind} and {len(seen)} counts do not fit shares of {last + 1} contexts")
    cdef double often = seen[kind]
    for v in range(shares.shape[1]):
        mixed[v] = (often * shares[kind, v] + lean * shares[last, v]) / (often + lean)
    return 0


def credited(model not None, long long depth, const long long[::1] cuts not None, shape not None, double lean):
    """Credits the views for one depth at which a prompt left another, moves their shares that way, and lets them
    learn from it.

    Args:
        model: its `views`, `shares` and `seen`, which change, `rate` and `decay`, as of `OverlapModel`.
        depth: at most the length of the prompt that was left.
        cuts: of the later prompt: those around the depth bound the cell that it fell into.
        shape: of the prompt that was left.
        lean: as of `leaning`.

    Returns:
        The credit of each view; the sum is 1. Nothing where no cut lies before the depth: no checkpoint could have
        helped, so there is nothing to learn for placing them.
    """
    cdef list views = model.views, seen = model.seen
    cdef double[:, ::1] shares = model.shares
    cdef Py_ssize_t v, row, kind = shape.kind, last = shares.shape[0] - 1, n = shares.shape[1]
    cdef Py_ssize_t index = first_from(cuts, depth + 1)
    cdef long long behind = <long long> shape.length + 1
    cdef double total, step, rate = model.rate
    if n != len(views) or n > 128:
        raise ValueError(f"{len(views)} views do not fit shares of {n}: give one column a view, 128 at most")
    if not index:
        return []
    cdef array ends = array("d", [cuts[index - 1], min(cuts[index], behind) if index < cuts.shape[0] else behind])
    cdef double[:, ::1] edges = viewed(views, ends, shape)
    cdef array credits = array("d", [0.0]) * n
    cdef double[::1] credit = credits
    lean_on(shares, seen, kind, lean, credit)
    for v in range(n):
        credit[v] *= max(edges[v, 1] - edges[v, 0], 1e-6)
    total = sum_of(&credit[0], n)
    for v in range(n):
        credit[v] /= total
    for row in (kind, last):
        seen[row] += 1
        step = max(1.0 / (<double> seen[row] + 4.0), rate)
        for v in range(n):
            shares[row, v] += step * (credit[v] - shares[row, v])
    for v in range(n):
        if credit[v] > LEAST_CREDIT:
            view = views[v]
            if view.looks:
                counted(view, depth, shape, credit[v], model.decay)
            else:
                view.learn(depth, shape, credit[v], model.decay)
    return credits.tolist()


def counted(view not None, long long depth, shape not None, double credit, double decay):
    """Lets a compiled view learn that a prompt of this shape was left at `depth`: it counts what it looks at."""
    cdef int how = view.looks
    cdef const long long[::1] cuts
    cdef double value = depth
    cdef long long length = shape.length, overlap = shape.overlap
    cdef Histogram seen = view.seen
    if seen is None or (how == BEYOND_ and depth < overlap):
        return
    if how == RATIO_:
        value = <double> depth / <double> (length + 1)
    elif how == FROM_END_:
        value = length - depth
    elif how == CUTS_FROM_END_:
        cuts = shape.cuts
        value = cuts.shape[0] - first_from(cuts, depth + 1)
    elif how == BEYOND_:
        value = depth - overlap
    seen.count(value, credit, decay)


cdef double sum_of(const double *terms, Py_ssize_t n) noexcept nogil:
    """The sum of up to 128 terms in the order in which numpy adds them: eight sums side by side, then what is left."""
    cdef double sums[8]
    cdef double total = 0.0
    cdef Py_ssize_t i, k
    if n < 8:
        for i in range(n):
            total += terms[i]
        return total
    for k in range(8):
        sums[k] = terms[k]
    for i in range(8, n - n % 8, 8):
        for k in range(8):
            sums[k] += terms[i + k]
    total = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]))
    for i in range(n - n % 8, n):
        total += terms[i]
    return total


def shares(
    const double[::1] below not None, const long long[::1] cuts not None, list positions not None,
    list starts not None, list following not None,
):
    """What `Forecast.shares` says, as two lists; below[c] is P(next overlap < cut c)."""
    cdef Py_ssize_t i, n = len(positions)
    cdef double here, behind, entering, follows, onward, stopping
    cdef bint seen
    if below.shape[0] != cuts.shape[0]:
        raise ValueError(f"below has {below.shape[0]} entries for {cuts.shape[0]} cuts: give one a cut")
    stop, go = [], []
    behind = reaching(below, cuts, positions[0]) if n else 0.0
    for i in range(n):
        here = behind
        behind = reaching(below, cuts, positions[i + 1]) if i + 1 < n else 0.0
        entering = reaching(below, cuts, <long long> starts[i] + 1)
        follows = min(<double> following[i], 1.0)
        onward = follows * behind
        seen = entering > LEAST_ENTERING
        # Where the forecast sees nobody enter, only the rates say who goes on.
        stopping = (here - onward) / entering if seen else 1.0 - follows
        stop.append(max(stopping, 0.0))
        go.append(onward / entering if seen else follows)
    return stop, go


cdef double reaching(const double[::1] below, const long long[::1] cuts, long long position) noexcept nogil:
    """P(next overlap >= position); between two cuts a position counts as the deeper one, behind the last as none."""
    cdef Py_ssize_t cut = first_from(cuts, position)
    return 1.0 - below[cut] if cut < cuts.shape[0] else 0.0


cdef Py_ssize_t first_from(const long long[:] cuts, long long position) noexcept nogil:
    """How many of ascending cuts lie before a position."""
    cdef Py_ssize_t low = 0, high = cuts.shape[0], middle
    while low < high:
        middle = (low + high) // 2
        if cuts[middle] < position:
            low = middle + 1
        else:
            high = middle
    return low


def junctions(const long long[:] ends not None, const long long[:] passes not None, long long overlap):
    """Where earlier prompts left a path or ended on it, up to `overlap`, and how many did, each of shape (J,).

    Args:
        ends: of the edges of the path, ascending, of shape (n,).
        passes: earlier prompts along the whole of each edge.
        overlap: tokens of the path.
    """
    cdef Py_ssize_t i, n = ends.shape[0], known = first_from(ends, overlap + 1)
    if passes.shape[0] != n:
        raise ValueError(f"{n} ends need as many passes, got {passes.shape[0]}")
    found, left = empty(known, "q"), empty(known, "q")
    cdef long long[::1] places = found, stops = left
    for i in range(known):
        places[i] = ends[i]
        stops[i] = max(passes[i] - (passes[i + 1] if i + 1 < n else 0), 0)
    return found, left


def edges_of(list path not None):
    """The ends of the edges of a path, and how often each was passed, of shape (n,)."""
    cdef Py_ssize_t i, n = len(path)
    found, often = empty(n, "q"), empty(n, "q")
    cdef long long[::1] ends = found, passes = often
    for i in range(n):
        ends[i] = path[i].end
        passes[i] = path[i].passes
    return found, often


def segment_ends(const long long[::1] cuts not None, long long start, long long length):
    """The cuts between two positions, with the second one behind them."""
    cdef Py_ssize_t i, first = first_from(cuts, start + 1), last = first_from(cuts, length)
    found = empty(max(last - first, 0) + 1, "q")
    cdef long long[::1] ends = found
    for i in range(first, last):
        ends[i - first] = cuts[i]
    ends[ends.shape[0] - 1] = length
    return found


def appended(const long long[:] first not None, const long long[:] then not None):
    """One array of positions behind another."""
    cdef Py_ssize_t i, n = first.shape[0]
    found = empty(n + then.shape[0], "q")
    cdef long long[::1] all_ = found
    for i in range(n):
        all_[i] = first[i]
    for i in range(then.shape[0]):
        all_[n + i] = then[i]
    return found


def walk(dict children not None, const int[::1] ids not None):
    """Follows `ids` through a radix tree, token by token.

    Args:
        children: of the root, by first token; nodes as of `store.tree`.
        ids: the tokens.

    Returns:
        The nodes entered, shallow to deep, and the number of tokens shared; the last node may be shared in part.
    """
    cdef Py_ssize_t i, span, depth = 0, length = ids.shape[0]
    cdef const int[::1] tokens
    path = []
    while depth < length:
        child = children.get(ids[depth])
        if child is None:
            break
        path.append(child)
        tokens = child.tokens
        span = min(tokens.shape[0], length - depth)
        i = 0
        while i < span and tokens[i] == ids[depth + i]:
            i += 1
        depth += i
        if i < tokens.shape[0]:
            break
        children = child.children
    return path, depth


def levels(path not None, Py_ssize_t least):
    """Which turn each edge of a path is: the number of edges up to it of at least `least` tokens."""
    cdef Py_ssize_t level = 0
    found = []
    for node in path:
        level += <Py_ssize_t> node.end - <Py_ssize_t> node.start >= least
        found.append(max(level, 1))
    return found


cdef class Waits:
    """Individuals that wait for their next event, by row and by how long, and what happened to them meanwhile.

    Args:
        alive: how many entered each row at a tick and still wait, of shape (W, rows), by tick modulo W.
        waiting: the same by bin of their ages now, of shape (A, rows).
        events: how many met their event, by bin of their age then; of the same shape.
        exposure: ticks that were waited, by bin; of the same shape. True where `accrue` has just been called: few of
            those who wait change their bin at a tick, and the rest is multiplied.
        ages: the least age of each bin, ascending from 0 to W, of shape (A,); those who come to W are forgotten.

    All of these arrays are changed in place. Copies keep what they share with whoever is copied along with them.

    Attributes:
        clock: ticks so far.
    """

    cdef readonly long long clock
    cdef long long accrued  # the tick up to which exposure is true for who waits now
    cdef short[:, ::1] alive
    cdef double[:, ::1] waiting, events, exposure
    cdef const long long[::1] ages

    def __init__(self, alive not None, waiting not None, events not None, exposure not None, ages not None, clock=0):
        self.alive, self.waiting, self.events, self.exposure, self.ages = alive, waiting, events, exposure, ages
        self.clock = self.accrued = clock
        cdef Py_ssize_t bins = self.ages.shape[0], rows = self.alive.shape[1]
        for counts in (waiting, events, exposure):
            if counts.shape != (bins, rows):
                raise ValueError(f"{bins} ages and {rows} rows need counts of that shape, got {counts.shape}")
        if bins < 2 or self.ages[0] or self.ages[bins - 1] != self.alive.shape[0] or clock < 0:
            raise ValueError(f"give ages from 0 to {self.alive.shape[0]}, and a clock of at least 0")

    def __reduce__(self):
        self.accrue()
        arrays = (self.alive.base, self.waiting.base, self.events.base, self.exposure.base, self.ages.base)
        return Waits, (*arrays, self.clock)

    def tick(self):
        """Those that come of the least age of a bin move there; then each waits one tick more."""
        cdef Py_ssize_t bin, row, when, bins = self.ages.shape[0], rows = self.alive.shape[1]
        cdef int number
        for bin in range(bins - 1):
            when = (self.clock + 1 + self.alive.shape[0] - self.ages[bin + 1]) % self.alive.shape[0]
            for row in range(rows):
                number = self.alive[when, row]
                if number:
                    self.add(bin, row, -number)
                    if bin + 2 < bins:  # the last fall out of the window
                        self.add(bin + 1, row, number)
        self.clock += 1
        when = self.clock % self.alive.shape[0]
        for row in range(rows):
            self.alive[when, row] = 0

    def accrue(self):
        """Brings exposure up to this tick."""
        cdef Py_ssize_t bin, row
        for bin in range(self.ages.shape[0]):
            for row in range(self.alive.shape[1]):
                self.exposure[bin, row] += self.waiting[bin, row] * (self.clock - self.accrued)
        self.accrued = self.clock

    cdef void add(self, Py_ssize_t bin, Py_ssize_t row, int number) noexcept:
        """So many more wait in a bin, from the next tick on."""
        self.waiting[bin, row] += number
        self.exposure[bin, row] -= number * (self.clock - self.accrued)

    def enter(self, Py_ssize_t row):
        """One waits in a row from now on."""
        self.count(row, self.clock, 1)

    def leave(self, Py_ssize_t row, long long since):
        """One that entered a row at tick `since` waits no longer."""
        self.count(row, since, -1)

    def move(self, Py_ssize_t row, Py_ssize_t other, long long since):
        """One that entered a row at tick `since` waits in another one from now on, as old as it is."""
        self.count(row, since, -1)
        self.count(other, since, 1)

    def hit(self, Py_ssize_t row, long long since, bint split=False):
        """One that entered a row at tick `since` met its event now; `split`: another part of it goes on waiting."""
        cdef long long age = self.clock - since
        cdef Py_ssize_t bin, last = self.bin_at(row, age)
        age = min(age, self.alive.shape[0])
        self.events[last, row] += 1.0
        if split:  # the part that met it waited as well, and is counted nowhere else
            for bin in range(last):
                self.exposure[bin, row] += self.ages[bin + 1] - self.ages[bin]
            self.exposure[last, row] += age - self.ages[last]

    cdef int count(self, Py_ssize_t row, long long since, int number) except -1:
        cdef long long age = self.clock - since
        cdef Py_ssize_t bin = self.bin_at(row, age)
        if age < self.alive.shape[0]:
            self.alive[since % self.alive.shape[0], row] += number
            self.add(bin, row, number)
        return 0

    cdef Py_ssize_t bin_at(self, Py_ssize_t row, long long age) except -1:
        if age < 0 or age > self.clock or not 0 <= row < self.alive.shape[1]:
            raise ValueError(f"row {row} of {self.alive.shape[1]} has none of age {age} at tick {self.clock}")
        return first_from(self.ages, age + 1) - 1


def looked_up(
    const double[:, ::1] index not None, const long long[::1] cells not None, const long long[::1] ticks not None,
    long long now, const unsigned char[::1] bins not None,
):
    """index[cell, bins[age]] for each, the age being how long before `now` its tick was; of shape (n,)."""
    cdef Py_ssize_t i, n = cells.shape[0]
    cdef long long age, most = bins.shape[0] - 1
    if ticks.shape[0] != n or most < 0:
        raise ValueError(f"{n} cells need as many ticks, got {ticks.shape[0]}")
    found = empty(n)
    cdef double[::1] rates = found
    for i in range(n):
        age = min(now - ticks[i], most)
        if age < 0 or not 0 <= cells[i] < index.shape[0] or not 0 <= bins[age] < index.shape[1]:
            raise ValueError(f"cell {cells[i]} of age {age} is none of the {index.shape[0]}")
        rates[i] = index[cells[i], bins[age]]
    return found


# -- what comes free, and what is lost, if checkpoints go -------------------------------------------------------------


def nearest_above(checkpoint):
    """The nearest checkpoint nearer to the start of the prompt; None where there is none."""
    return above_of(checkpoint)


cdef object above_of(checkpoint):
    cdef long long position = checkpoint.position
    node = checkpoint.node
    found = None
    for other in <list> node.checkpoints:
        if <long long> other.position >= position:
            break
        found = other
    node = node.parent
    while found is None and node is not None:
        stored = <list> node.checkpoints
        if stored:  # all of them lie above
            found = stored[len(stored) - 1]
        node = node.parent
    return found


def held_bytes(checkpoint):
    """Bytes of a state, and of its KV chain down to the first segment that something else needs."""
    cdef long long total = checkpoint.nbytes
    segment = checkpoint.kv
    while segment is not None and <long long> segment.refs <= 1:
        total += <long long> segment.nbytes
        segment = segment.parent
    return total


def chain_bytes(list ends not None):
    """Bytes of the KV segments of some chains, each counted once; their ends, or None for one of nothing."""
    cdef long long total = 0
    counted = set()
    for segment in ends:
        while segment is not None and segment not in counted:
            counted.add(segment)
            total += <long long> segment.nbytes
            segment = segment.parent
    return total


def gained(checkpoint, double least):
    """Tokens that a checkpoint saves a pass, times its share, at least `least`, for each byte that goes with it."""
    cdef double share = checkpoint.share
    cdef long long held = checkpoint.held, saved = checkpoint.position
    above = above_of(checkpoint)
    if above is not None:
        saved -= <long long> above.position
    # Without a state of fixed size, a checkpoint under deeper ones holds nothing alone.
    return saved * (share if share > least else least) / max(held, 1)


cdef class Leaving:
    """A set of checkpoints that are to go, in the order in which they were added. Nothing goes yet.

    Checkpoints of one path share keys and values, which come free only when all of them have gone; and whoever resumed
    at one that goes resumes at the one above it. So the bytes and the value of a set are not the sums over its
    members: they are counted here while the set grows.

    Args:
        least: of the prompts that enter its edge, the share that each checkpoint is taken to serve.

    Attributes:
        gone: the set.
        freed: bytes that come free when all of it has gone.
        lost: what all of it is worth, as `until` counts it.
        looked_at: how often a checkpoint was valued so far.
    """

    cdef readonly dict gone
    cdef readonly long long freed, looked_at
    cdef readonly double lost
    cdef double least
    cdef dict references, shares, known  # references that are left, where some are gone; what was given; what is above

    def __init__(self, double least):
        self.gone, self.references, self.shares, self.known = {}, {}, {}, {}
        self.freed = self.looked_at = 0
        self.lost = 0.0
        self.least = least

    def bytes_of(self, checkpoint):
        """What comes free if it goes as well: its state, and the keys and values that nothing else needs then."""
        return self.bytes_with(checkpoint)

    cdef long long bytes_with(self, checkpoint) except -1:
        cdef long long total = checkpoint.nbytes, references
        segment = checkpoint.kv
        while segment is not None and not segment.holds:
            references = segment.refs
            if references > 1:
                left = self.references.get(segment)
                if left is None or <long long> left > 1:
                    break
            total += <long long> segment.nbytes
            segment = segment.parent
        return total

    def above(self, checkpoint):
        """The nearest one nearer to the start of the prompt that stays."""
        return self.staying(checkpoint)

    cdef object staying(self, checkpoint):
        found = self.known[checkpoint] if checkpoint in self.known else above_of(checkpoint)
        while found is not None and found in self.gone:
            found = self.known[found] if found in self.known else above_of(found)
        self.known[checkpoint] = found
        return found

    cdef double valued(self, checkpoint, above, double rate, double *value) except? -1.0:
        """Tokens that a checkpoint saves over the one above while others leave; and in `value` for each byte."""
        cdef double share = checkpoint.share, worth
        cdef long long nbytes, saved = checkpoint.position
        self.looked_at += 1
        rate *= (share if share > self.least else self.least) + self.given(checkpoint)
        if above is not None:
            saved -= <long long> above.position
        worth = rate * saved
        nbytes = self.bytes_with(checkpoint)
        value[0] = worth / (nbytes if nbytes else 1)
        return worth

    cdef double given(self, checkpoint) except? -1.0:
        """Of the prompts that enter its edge, those that resume here as what they would have resumed at is gone."""
        given = self.shares.get(checkpoint)
        return 0.0 if given is None else given

    def add(self, checkpoint):
        """Lets one go."""
        cdef long long freed = checkpoint.nbytes, left
        segment = checkpoint.kv
        while segment is not None:
            known = self.references.get(segment)
            left = <long long> (segment.refs if known is None else known) - 1
            self.references[segment] = left
            if left or segment.holds:
                break
            freed += <long long> segment.nbytes
            segment = segment.parent
        self.freed += freed
        self.gone[checkpoint] = None

    def until(
        self, double need, list items not None, const double[::1] gains not None, const double[::1] rates not None,
    ):
        """Lets go until `need` bytes come free, or all that can: the least value a byte first, the first of equals.

        One that stays takes over who resumed at one that goes, and the bytes that they shared: it is ranked again.

        Args:
            need: bytes.
            items: the checkpoint of each slot, None in a free one.
            gains: tokens saved a pass for each byte, of shape (n,).
            rates: of passes, of shape (n,).
        """
        cdef Py_ssize_t slot, n = len(items), size = 0
        cdef double value = 0.0, worth
        cdef Ranked least
        cdef Ranked *ranks
        cdef double *latest
        if rates.shape[0] != n or gains.shape[0] != n:
            raise ValueError(f"{n} items need as many rates and gains, got {rates.shape[0]} and {gains.shape[0]}")
        ranks = <Ranked *> PyMem_Malloc((n + 1) * sizeof(Ranked))  # one that is ranked again has left its place
        latest = <double *> PyMem_Malloc((n + 1) * sizeof(double))  # of those whose value changed meanwhile
        if ranks is NULL or latest is NULL:
            PyMem_Free(ranks)
            PyMem_Free(latest)
            raise MemoryError
        try:
            for slot in range(n):
                latest[slot] = NAN
                if items[slot] is not None:
                    ranks[size] = Ranked(rates[slot] * gains[slot], slot, False)
                    size += 1
            for slot in range(size // 2 - 1, -1, -1):
                sink(ranks, size, slot)
            while self.freed < need and size > 0:
                least = ranks[0]
                slot = least.slot
                checkpoint = items[slot]
                if (
                    (latest[slot] != least.value if least.again else latest[slot] == latest[slot])
                    or checkpoint.pins or checkpoint in self.gone
                ):
                    size -= 1
                    ranks[0] = ranks[size]
                    sink(ranks, size, 0)
                    continue
                above = self.staying(checkpoint)
                worth = self.valued(checkpoint, above, rates[slot], &value)
                if value > 1.001 * least.value:
                    latest[slot] = value
                    ranks[0] = Ranked(value, slot, True)
                    sink(ranks, size, 0)
                    continue
                size -= 1
                ranks[0] = ranks[size]
                sink(ranks, size, 0)
                self.lost += worth
                self.add(checkpoint)
                if above is not None:
                    self.shares[above] = self.given(above) + given_back(checkpoint, above, self.given(checkpoint))
                    slot = above.slot
                    if not 0 <= slot < n:
                        raise ValueError(f"a checkpoint has slot {slot} of {n}")
                    self.valued(above, self.staying(above), rates[slot], &value)
                    latest[slot] = value
                    ranks[size] = Ranked(value, slot, True)
                    size += 1
                    rise(ranks, size - 1)
        finally:
            PyMem_Free(ranks)
            PyMem_Free(latest)


def returned(checkpoint, above):
    """Of the prompts that enter the edge of the checkpoint above, those that stop there once this one has gone.

    The latest prompt's path alone was taken off the share of the one above.
    """
    return given_back(checkpoint, above, 0.0)


cdef double given_back(checkpoint, above, double given) except? -1.0:
    """The same, where `given` was given to this one meanwhile."""
    cdef double share, passing
    node, home = checkpoint.node, above.node
    while node is not home:
        parent = node.parent
        if parent is None or parent.recent is not node:
            return 0.0
        node = parent
    share = checkpoint.share
    passing = share + <double> checkpoint.onward
    return <double> above.onward * (share + given) / passing if passing > 0.0 else 0.0


cdef struct Ranked:
    double value
    Py_ssize_t slot
    bint again  # whether it was ranked anew; of equals it comes later


cdef bint before(Ranked a, Ranked b) noexcept nogil:
    if a.value != b.value:
        return a.value < b.value
    return a.slot < b.slot if a.slot != b.slot else a.again < b.again


cdef void sink(Ranked *ranks, Py_ssize_t size, Py_ssize_t place) noexcept nogil:
    """Moves one down a heap, the least at the top, to where it belongs."""
    cdef Ranked moved = ranks[place]
    cdef Py_ssize_t below = 2 * place + 1
    while below < size:
        if below + 1 < size and before(ranks[below + 1], ranks[below]):
            below += 1
        if not before(ranks[below], moved):
            break
        ranks[place] = ranks[below]
        place, below = below, 2 * below + 1
    ranks[place] = moved


cdef void rise(Ranked *ranks, Py_ssize_t place) noexcept nogil:
    """Moves one up a heap to where it belongs."""
    cdef Ranked moved = ranks[place]
    while place > 0 and before(moved, ranks[(place - 1) // 2]):
        ranks[place] = ranks[(place - 1) // 2]
        place = (place - 1) // 2
    ranks[place] = moved
