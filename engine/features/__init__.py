"""Feature specification, point-in-time joins and windows, fitted encoding, feature store."""
