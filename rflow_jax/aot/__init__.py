"""Ahead-of-time compilation for absent accelerators, and memory, traffic and time bounds of the compiled programs."""
