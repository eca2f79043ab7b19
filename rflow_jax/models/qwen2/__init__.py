"""The Qwen2 language model, with or without eyes: Qwen2.5-VL and NVILA are built on it."""
