"""Attention behind one function, whatever computes it."""
