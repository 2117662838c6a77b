"""Typed, checked, frozen configuration. `compose` is imported by the shell and the API only, so that no step sees Hydra."""
