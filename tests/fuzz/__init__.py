"""Damaged and hostile versions of every file that is read."""
