"""A client of OpenAI-compatible chat endpoints, shared by verifiers and language models over HTTP.

It contacts only the given address, and only when asked.
"""

from rflow_jax.openai_client.client import Chat
from rflow_jax.openai_client.endpoint import Endpoint, public_url
from rflow_jax.openai_client.messages import (
    Answer,
    ChatError,
    ChatRequest,
    ResponseSchema,
    UnusableAnswer,
    vision_messages,
)

__all__ = [
    "Answer",
    "Chat",
    "ChatError",
    "ChatRequest",
    "Endpoint",
    "ResponseSchema",
    "UnusableAnswer",
    "public_url",
    "vision_messages",
]
