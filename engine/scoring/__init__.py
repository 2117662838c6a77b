"""Scoring: predictions of a model bundle on a dataset, for batches and in Python."""
