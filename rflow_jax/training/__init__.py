"""Training: the loop's parts, and what can be trained."""
