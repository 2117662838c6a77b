"""Runs and their surroundings: directory and record, storage, tracking, cluster."""
