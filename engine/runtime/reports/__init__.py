"""Self-contained HTML reports: building blocks and their style."""
