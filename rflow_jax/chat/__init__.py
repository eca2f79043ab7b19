"""One OpenAI-compatible chat endpoint: the client that the verifiers and the language models over HTTP share.

It contacts only the address it is given, and only when asked.
"""

from rflow_jax.chat.client import Chat
from rflow_jax.chat.endpoint import Endpoint, public_url
from rflow_jax.chat.messages import look_and_say, png_bytes
from rflow_jax.chat.question import CLOSED, Answer, ChatError, Form, Question, UnusableAnswer

__all__ = [
    "CLOSED",
    "Answer",
    "Chat",
    "ChatError",
    "Endpoint",
    "Form",
    "Question",
    "UnusableAnswer",
    "look_and_say",
    "png_bytes",
    "public_url",
]
