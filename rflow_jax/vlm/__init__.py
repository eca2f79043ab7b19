"""Vision-language models in this process: pictures and chats as arrays, padded so that few programs are compiled."""
