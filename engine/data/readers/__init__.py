"""Readers of files and tables, one module per format, and the splitting of text into rows."""
