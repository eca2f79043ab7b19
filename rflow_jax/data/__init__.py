"""GenRef training data: record sources, sampling, transforms and batching."""
