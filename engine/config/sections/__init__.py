"""The config tree, a module a room: every key with its type, default, bounds and meaning."""
