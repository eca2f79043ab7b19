"""Records in JSON lines."""
