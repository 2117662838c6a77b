"""Readers of files and tables: one module a format, and how text is split into rows."""
