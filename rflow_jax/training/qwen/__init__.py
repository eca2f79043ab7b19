"""Common parts of the tasks that train a Qwen2.5-VL."""
