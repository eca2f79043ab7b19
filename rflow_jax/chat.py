"""One OpenAI-compatible chat endpoint: the client that the verifier and the language models over HTTP share.

It contacts only the address it is given, and only when asked.
"""

import asyncio
import base64
import io
import logging
import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL.Image import Image

from rflow_jax.errors import InputError

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


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        messages: the chat so far.
        parse: turns the answer's text into a value, or raises ``UnusableAnswer``.
        response_format: the form that the answer must have.
    """

    messages: Sequence[Mapping[str, Any]]
    parse: Callable[[str], Any]
    response_format: Mapping[str, Any] | None = None


class Chat:
    """Asks one endpoint; may be used by several threads at once.

    Timeouts, dropped connections and the statuses 408, 409, 429 and 5xx are retried by the ``openai`` client
    (it honours ``Retry-After``); unusable answers are retried here.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        import openai

        self.endpoint = endpoint
        self._key = endpoint.api_key()
        self._client = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=endpoint.base_url,
            timeout=endpoint.timeout,
            max_retries=endpoint.max_retries,
        )
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._loop = asyncio.new_event_loop()
        self._closing = threading.Lock()
        # A daemon: an interrupted process does not wait for answers.
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="chat", daemon=True)
        self._thread.start()
        # The client's own log lines name every request; a run of thousands has a progress bar instead.
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def ask_all(self, questions: Sequence[Question]) -> list[Any]:
        """The parsed answers in the order of the questions; a ``ChatError`` where there is no usable one.

        At most ``concurrency`` questions are in flight, over all callers.
        """

        async def gather() -> list[Any]:
            return list(await asyncio.gather(*map(self._ask, questions)))

        return asyncio.run_coroutine_threadsafe(gather(), self._loop).result()

    def close(self) -> None:
        """Gives up what is waiting; called when a run ends."""

        async def stop() -> None:
            waiting = asyncio.all_tasks() - {asyncio.current_task()}
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
            await self._client.close()

        with self._closing:
            if self._thread.is_alive():
                asyncio.run_coroutine_threadsafe(stop(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()  # a loop that was told to stop, but still runs, would take no second close

    async def _ask(self, question: Question) -> Any:
        import openai
        import tenacity

        retry = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.endpoint.max_retries + 1),
            wait=tenacity.wait_random_exponential(multiplier=0.5, max=_LONGEST_PAUSE),
            retry=tenacity.retry_if_exception_type(UnusableAnswer),
            reraise=True,
        )
        async with self._slots:
            try:
                return await retry(self._attempt, question)
            except (UnusableAnswer, openai.OpenAIError) as error:
                return ChatError(self._reason(error))

    async def _attempt(self, question: Question) -> Any:
        request: dict[str, Any] = {"model": self.endpoint.model_name, "messages": list(question.messages)}
        if question.response_format is not None:
            request["response_format"] = question.response_format
        if self.endpoint.temperature is not None:
            request["temperature"] = self.endpoint.temperature
        try:
            message = (await self._client.chat.completions.create(**request)).choices[0].message
            content, refusal = message.content, message.refusal
        except (ValueError, AttributeError, IndexError, TypeError) as error:
            # The client hands on whatever a server sent: cut JSON, plain text, no choices.
            raise UnusableAnswer(f"the server's reply is not a chat completion ({error})") from error
        if refusal:
            raise UnusableAnswer(f"the model refused: {refusal}")
        if not isinstance(content, str) or not content.strip():
            raise UnusableAnswer("the answer is empty")
        return question.parse(content)

    def _reason(self, error: BaseException) -> str:
        text = f"{error} ({error.__cause__})" if error.__cause__ and str(error).endswith("error.") else str(error)
        text = " ".join(text.split()) or type(error).__name__
        if self._key != "none":
            text = text.replace(self._key, "***")
        return text if len(text) <= _LONGEST_REASON else text[: _LONGEST_REASON - 3] + "..."


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


def png_bytes(image: Image) -> bytes:
    """The image as a PNG file; the same bytes are stored and sent."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def look_and_say(system: str, text: str, image: Image) -> list[dict[str, Any]]:
    """Chat messages: instructions, then a text with an image."""
    url = "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
    parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "system", "content": system}, {"role": "user", "content": parts}]


def public_url(url: str) -> str:
    """An address without what may be secret in it: user, password and query."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))
