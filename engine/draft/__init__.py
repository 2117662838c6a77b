"""Drafts of configs: `engine init` reads files and writes data, features and experiment for them, to be reviewed."""
