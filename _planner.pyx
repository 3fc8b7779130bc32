# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: freethreading_compatible=True
"""Exact placement of checkpoints when each of them has a price (the placement problem of arXiv 2605.05219).

Used by `hf_sparse_cache.planner` alone, which also turns a limit on the number into a price. May be touched: the two
solvers, as long as `tests/planning/test_planner.py` agrees. Arguments are checked before the unchecked loops.

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

from libc.limits cimport INT_MAX
from libc.math cimport INFINITY, fabs, frexp, ldexp

from numpy import empty  # at run time only: large arrays come in huge pages, and the build needs no numpy

# Inputs are scaled by powers of two (exact) until their maxima sit here: no product overflows, tiny inputs survive.
cdef int SCALED_EXPONENT = 300
# Two costs this close (relative) may be in the wrong order: `relax` then keeps the later predecessor reachable.
cdef double TIE = 1e-14


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
        self.g, self.m, self.tail = empty(size), empty(size), empty(size)
        self.saved, self.slope = empty(size), empty(size)
        self.position, self.hull, self.previous = empty(size, "i"), empty(size, "i"), empty(size, "i")
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
