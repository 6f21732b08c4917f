"""One file per figure we claim: `python -m benchmarks.NAME` prints one JSON line last."""
