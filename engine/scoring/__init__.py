"""From a bundle and a dataset to scored rows."""
