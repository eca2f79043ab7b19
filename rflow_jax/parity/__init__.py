"""Holds this package against recordings of the original: ``rflow parity DIR``."""
