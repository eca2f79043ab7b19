"""Fine-tuning of a Qwen2.5-VL on chats, such as GenRef-CoT for the reflection generator."""
