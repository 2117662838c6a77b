"""Registry, retraining, backtest, reproduction, comparison."""
