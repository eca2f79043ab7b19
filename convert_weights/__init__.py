"""Command line that converts checkpoints: ``python -m convert_weights --help``."""
