"""Speed and memory of hyperize, as ratios: `python -m benchmarks`."""
