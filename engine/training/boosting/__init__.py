"""Boosted trees: a library grows each round's trees, everything around them is the engine's.

Gradients, row sampling, margins, early stopping and checkpoints are here, the same for every library. A library is given binned
rows and one gradient and hessian a row, and gives back trees; it keeps no state from round to round, so a run that was killed
continues at any round. Gradients are multiples of a power of two that float64 adds without rounding: the trees do not depend on
the order of rows, on threads, or on how rows are divided among workers.
"""
