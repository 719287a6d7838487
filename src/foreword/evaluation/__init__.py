"""Label scoring, metrics with intervals, baselines."""
