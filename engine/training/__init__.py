"""Training: models, losses, metrics, row order, training loop, checkpoints, evaluation, bundles."""
