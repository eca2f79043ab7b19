"""Holds this package against recordings of the original: ``python -m convert_weights verify DIR``."""
