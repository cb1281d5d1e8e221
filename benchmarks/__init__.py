"""Benchmarks: `make bench [OP=name]`. A package, so that no other `benchmarks` on the path is taken for it."""
