"""One OpenAI-compatible chat endpoint: the client that the verifiers and the language models over HTTP share.

It contacts only the address it is given, and only when asked.
"""

from rflow_jax.openai_client.client import Chat
from rflow_jax.openai_client.endpoint import Endpoint, public_url
from rflow_jax.openai_client.messages import (
    CLOSED,
    Answer,
    ChatError,
    ChatRequest,
    ResponseSchema,
    UnusableAnswer,
    png_bytes,
    vision_messages,
)

__all__ = [
    "CLOSED",
    "Answer",
    "Chat",
    "ChatError",
    "ChatRequest",
    "Endpoint",
    "ResponseSchema",
    "UnusableAnswer",
    "png_bytes",
    "public_url",
    "vision_messages",
]
