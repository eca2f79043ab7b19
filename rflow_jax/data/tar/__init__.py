"""GenRef in tar shards with random access."""
