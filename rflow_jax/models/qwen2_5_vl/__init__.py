"""Qwen2.5-VL: a language model that looks at pictures."""
