"""Label maturity: the age from which the label of a row can be expected to be known."""

from __future__ import annotations

import numpy as np

from engine.features.instants import NEVER

ARRIVED = 0.95  # share of the labels that will ever arrive
AT_RISK = 0.01  # the curve ends where fewer than this share of the rows are at risk


def label_horizon(event: np.ndarray, known: np.ndarray, now: int, share: float = ARRIVED) -> int:
    """Age in microseconds by which `share` of the labels that arrive at all have arrived, from what is known at `now`.

    Kaplan-Meier over label delays (Kaplan & Meier, 1958): a row without a label yet is censored at its present age, so
    that the newest rows, of which only the fast labels are known, do not make labels look fast.
    Shape: event, known int64[n] microseconds UTC, known is NEVER where there is no label. 0 without any label.
    """
    past = event < now
    event, known = event[past], known[past]
    observed = (known != NEVER) & (known <= now)
    age = np.where(observed, np.maximum(known - event, 0), now - event)
    if not observed.any():
        return 0
    order = np.lexsort((~observed, age))  # at equal ages labels come before censored rows
    age, observed = age[order], observed[order]
    at_risk = len(age) - np.arange(len(age))
    arrived = 1.0 - np.cumprod(1.0 - observed / at_risk)
    firm = max(1, int(np.count_nonzero(at_risk >= AT_RISK * len(age))))
    return int(age[np.searchsorted(arrived[:firm], share * arrived[firm - 1])])
