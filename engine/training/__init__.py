"""Models, row order, loop, checkpoints, evaluation."""
