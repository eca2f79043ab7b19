"""Training of the image verifier: a Qwen2.5-VL with a reward head, on pairs of images."""
