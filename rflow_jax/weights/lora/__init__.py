"""LoRA files, read and written."""
