"""One OpenAI-compatible chat endpoint: the client that the verifier and the language models over HTTP share.

It contacts only the address it is given, and only when asked.
"""

import base64
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from PIL.Image import Image

from rflow_jax.errors import InputError

T = TypeVar("T")
R = TypeVar("R")

_DEFAULT_MODEL = "gpt-4o"
_LONGEST_REASON = 300
_LONGEST_PAUSE = 10.0


class ChatError(Exception):
    """A question that got no usable answer within its retries; the message is the reason, in one line."""


class UnusableAnswer(Exception):
    """An answer that arrived but cannot be used; asking again may help."""


@dataclass(frozen=True)
class Endpoint:
    """Where a model is asked, and how patiently.

    Attributes:
        base_url: address of an OpenAI-compatible API; null takes OPENAI_BASE_URL, then OpenAI's own.
        model: name of the model; null takes OPENAI_MODEL, then gpt-4o.
        api_key_env: name of the environment variable that holds the key (never the key itself).
        temperature: sampling temperature; null leaves it to the server.
        timeout: seconds to wait for one answer.
        concurrency: questions in flight at once.
        max_retries: further attempts after a timeout, a dropped connection, a busy or failing server, and
            after an answer that cannot be parsed.
    """

    base_url: str | None = None
    model: str | None = None
    api_key_env: str = "OPENAI_API_KEY"
    temperature: float | None = None
    timeout: float = 60.0
    concurrency: int = 8
    max_retries: int = 5

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            # The value is not repeated: it may be a key pasted into the wrong place.
            raise InputError("api_key_env must be the name of an environment variable, such as OPENAI_API_KEY")
        if self.base_url is not None and not self.base_url.startswith(("http://", "https://")):
            raise InputError("base_url must begin with http:// or https://, such as http://localhost:8000/v1")
        if self.timeout <= 0 or self.concurrency < 1 or self.max_retries < 0:
            raise InputError("timeout must be positive, concurrency at least 1 and max_retries at least 0")

    @property
    def model_name(self) -> str:
        """The model that is asked: from the config, else from the environment, else gpt-4o."""
        return self.model or os.environ.get("OPENAI_MODEL") or _DEFAULT_MODEL

    def api_key(self) -> str:
        """The key from the environment; a local server needs none.

        Raises:
            InputError: no key, and the address is OpenAI's own.
        """
        key = os.environ.get(self.api_key_env)
        if key:
            return key
        if self.base_url or os.environ.get("OPENAI_BASE_URL"):
            return "none"
        raise InputError(f"no API key: set the environment variable {self.api_key_env}, or base_url to a local server")


class Chat:
    """Asks one endpoint, from several threads at once.

    Timeouts, dropped connections and the statuses 408, 409, 429 and 5xx are retried by the ``openai`` client
    (it honours ``Retry-After``); unusable answers are retried here.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        import openai

        self.endpoint = endpoint
        self._key = endpoint.api_key()
        self._client = openai.OpenAI(
            api_key=self._key,
            base_url=endpoint.base_url,
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        )
        self._workers = ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="chat")
        self._closed = threading.Event()
        # The client's own log lines name every request; a run of thousands has a progress bar instead.
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        parse: Callable[[str], T],
        response_format: Mapping[str, Any] | None = None,
    ) -> T:
        """One question; ``parse`` turns the answer's text into a value or raises ``UnusableAnswer``.

        Raises:
            ChatError: no usable answer within the retries.
        """
        import openai
        import tenacity

        retry = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(self.endpoint.max_retries + 1)
            | tenacity.stop_when_event_set(self._closed),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE),
            sleep=tenacity.sleep_using_event(self._closed),
            retry=tenacity.retry_if_exception_type(UnusableAnswer),
            reraise=True,
        )
        try:
            return retry(lambda: parse(self._answer(messages, response_format)))
        except (UnusableAnswer, openai.OpenAIError) as error:
            raise ChatError(self._reason(error)) from error

    def map(self, function: Callable[[T], R], items: Sequence[T]) -> list[R]:
        """``function`` of every item, at most ``concurrency`` at once over all callers; results in order."""
        return list(self._workers.map(function, items))

    def close(self) -> None:
        """Gives up what is waiting; called when a run ends early."""
        self._closed.set()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _answer(self, messages: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None) -> str:
        request: dict[str, Any] = {"model": self.endpoint.model_name, "messages": list(messages)}
        if response_format is not None:
            request["response_format"] = response_format
        if self.endpoint.temperature is not None:
            request["temperature"] = self.endpoint.temperature
        try:
            message = self._client.chat.completions.create(**request).choices[0].message
            content, refusal = message.content, message.refusal
        except (ValueError, AttributeError, IndexError, TypeError) as error:
            # The client hands on whatever a server sent: cut JSON, plain text, no choices.
            raise UnusableAnswer(f"the server's reply is not a chat completion ({error})") from error
        if refusal:
            raise UnusableAnswer(f"the model refused: {refusal}")
        if not isinstance(content, str) or not content.strip():
            raise UnusableAnswer("the answer is empty")
        return content

    def _reason(self, error: BaseException) -> str:
        text = f"{error} ({error.__cause__})" if error.__cause__ and str(error).endswith("error.") else str(error)
        text = " ".join(text.split()) or type(error).__name__
        if self._key != "none":
            text = text.replace(self._key, "***")
        return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def png_bytes(image: Image) -> bytes:
    """The image as a PNG file; the same bytes are stored and sent."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def question(system: str, text: str, image: Image) -> list[dict[str, Any]]:
    """Chat messages: instructions, then a text with an image."""
    url = "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def public_url(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
