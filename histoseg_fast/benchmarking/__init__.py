"""What `bench` measures: end to end and engine alone, in one run, with what the machine did meanwhile."""

from .measure import BenchOptions, bench

__all__ = ["BenchOptions", "bench"]
