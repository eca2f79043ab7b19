"""Scoring of existing images: which images, their verdicts, and the file that keeps these."""
