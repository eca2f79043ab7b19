"""GenRef in shards that are read once, from beginning to end."""
