"""Typed, checked, frozen configuration. Only the shell and the API import `compose`: no step sees Hydra."""
