"""Benchmarks: each prints a ratio against a reference measured in the same run. Figures are in docs/benchmarks.md."""
