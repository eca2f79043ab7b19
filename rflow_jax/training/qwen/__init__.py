"""What the tasks that train a Qwen2.5-VL have in common."""
