"""Sources, ingest, validation and the dataset manifest."""
