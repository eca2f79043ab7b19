"""Training of the corrector: its objective and its optimizers."""
