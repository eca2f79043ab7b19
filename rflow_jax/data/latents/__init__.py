"""GenRef as the encoders see it."""
