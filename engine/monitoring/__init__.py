"""Drift, performance and alarms."""
