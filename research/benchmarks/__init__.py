"""Benchmarks: each prints ratios taken in one interleaved run, and writes a results file."""
