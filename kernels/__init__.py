"""Loops compiled by Numba, and nothing else: no configuration, no files, no framework.

    jit         compilation policy, cache, threads        order       keyed permutation of row indices
    hashing     64-bit hashes equal everywhere            gather      rows of a block into a buffer
    sort        stable counting and radix sorts           windows     trailing aggregates per entity
    asof        latest known row per entity               encode      columns into one float32 block
    dropout     keyed dropout masks                       metrics     ROC AUC, average precision, ...
    profile     mergeable counts per column               statistics  distances between two profiles
    exact       integer accumulators for exact sums       warmup      compile everything once
    trees       scores of decision trees                  sweep       the loops of windows over sorted rows
    compiling   seconds spent on compiling so far         folds       aggregates of a caller's own
    text        hashed n-grams of texts, norms of vectors
    contributions  what columns add to the scores of trees

Every public function checks its input, documents shapes, types, units and errors, then calls a private compiled loop. A
result never depends on the number of threads.
"""

# Of `windows`, listed here so that a config can name them without loading Numba; their places are codes, exponential ones last.
# A new one also needs its code and its computation in sweep.py, its slow twin `aggregate` in tests/naive.py and, if its value
# grows with the window, a place in GROWING of engine/monitoring/rising_columns.py. Not here: `quantile`, which needs a parameter.
AGGREGATES = (
    "count", "sum", "mean", "std", "min", "max", "last", "first", "recency", "distinct", "ewm_sum", "ewm_mean",
)  # fmt: skip
OWNER = "tabular-engine"  # PyPI has another package named kernels: the engine checks that it imported this one
