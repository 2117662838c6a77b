"""Sections of the config tree, one module per room: every key with its type, default, bounds and meaning."""
