"""opweave: operator-level auto-parallelization compiler for PyTorch."""
