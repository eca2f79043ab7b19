"""Ahead-of-time compilation for accelerators that are not there, and what the compiled programs tell of a run."""
