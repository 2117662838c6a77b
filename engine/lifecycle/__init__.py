"""Model lifecycle: registry, retraining, backtest, reproduction, comparison, clean-up of runs."""
