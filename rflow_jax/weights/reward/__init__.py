"""Checkpoints of the original's image verifier, read and written."""
