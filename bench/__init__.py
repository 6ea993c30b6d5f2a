"""Benchmarks: rows that name what is compared, runners that print results with machine, versions and commit."""
