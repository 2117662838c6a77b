"""Batch training and scoring on tabular and event data. Importing this loads nothing heavy."""

__version__ = "0.1.0"
