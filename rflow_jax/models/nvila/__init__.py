"""NVILA-Lite: a SigLIP tower, a projector and Qwen2, which together look at one picture and answer."""
