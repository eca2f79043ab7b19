"""Requests to one endpoint and their replies, in the form that its server takes; what is said of it holds no secret."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from rflow_jax.openai_client.accepted import FORMATS, Accepted
from rflow_jax.openai_client.endpoint import OPENAI, Endpoint, Secrets, public_url, without_query
from rflow_jax.openai_client.messages import Answer, ChatRequest, UnusableAnswer
from rflow_jax.openai_client.protocol import read_answer, read_body, read_error, read_usage, request
from rflow_jax.openai_client.retry import reason
from rflow_jax.openai_client.transport import http_client
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.utils.network import printable
from rflow_jax.utils.shown import one_line

_LONGEST_REASON = 300
_LONGEST_SAID = 120
_CONNECT = 10.0  # seconds for a connection


class Requester:
    """Sends requests, any number at once.

    Args:
        meter: counts the requests and the tokens.

    Attributes:
        name: of model and address, for messages.

    Raises:
        InputError: no key for OpenAI's own address, or no usable address or header.
    """

    def __init__(self, endpoint: Endpoint, meter: UsageTracker) -> None:
        import openai

        self._endpoint, self._meter = endpoint, meter
        key, address = endpoint.api_key(), endpoint.address()
        headers = endpoint.headers()
        # What is written out in the settings is no secret; what they take from the environment may be.
        hidden = [value for name, value in headers.items() if endpoint.extra_headers.get(name, "$").startswith("$")]
        words = {word for value in hidden for word in (value, value.split()[-1])}
        self._secrets = Secrets(key, address, words)
        self.name = f"{endpoint.model_name} at {public_url(address or OPENAI)}"
        root, query = without_query(address or OPENAI)
        # Retries and time limits are handled by whoever asks, because unusable answers count as well.
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=root,
            default_query=query,
            timeout=openai.Timeout(None, connect=_CONNECT),
            max_retries=0,
            default_headers=headers,
            http_client=http_client(address),
        )
        self._accepted = Accepted(0 if endpoint.structured == "auto" else FORMATS.index(endpoint.structured))
        # The client's own log lines name every request; a run of thousands has a progress bar instead.
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)

    async def close(self) -> None:
        await self._client.close()

    async def reply(self, question: ChatRequest) -> Mapping[str, Any]:
        """The reply to a question; what the server refuses in its form is asked in another one."""
        import openai

        accepted = self._accepted
        while True:
            fields = request(self._endpoint, question, accepted)
            try:
                body = await self._send(fields)
                break
            except openai.APIStatusError as error:
                other = accepted.after(error, fields, auto=self._endpoint.structured == "auto")
                if other is None:
                    raise
                accepted = other
        # Remembered only now: a rejection for another reason must not change later questions.
        self._accepted = self._accepted.with_all(accepted)
        return body

    def parsed(self, question: ChatRequest, body: Mapping[str, Any]) -> Any:
        """The value of the answer in a reply; raises UnusableAnswer, with the words of the answer if there are any."""
        answer = Answer("")
        try:
            answer = read_answer(body)
            answer = replace(answer, text=self._secrets.blank(answer.text))
            return question.parse(answer)
        except UnusableAnswer as error:
            error.said = answer.text
            raise

    def reason(self, error: BaseException, attempts: int) -> str:
        """Why there is no answer, in one line."""
        # Hidden before truncation: a truncated key is not recognised.
        text = self._secrets.hide(reason(error, self._endpoint))
        if len(text) > _LONGEST_REASON:
            text = text[: _LONGEST_REASON - 3] + "..."
        return f"{text} ({attempts} attempt{'s' if attempts > 1 else ''})"

    def words_of(self, error: UnusableAnswer) -> str:
        """The beginning of an answer that cannot be used, in quotation marks; "nothing" if it has no words."""
        words = one_line(self._secrets.hide(printable(error.said)), _LONGEST_SAID)
        return repr(words) if words else "nothing"

    async def _send(self, fields: dict[str, Any]) -> Mapping[str, Any]:
        import openai

        self._meter.add(Usage(attempts=1, in_flight=1))
        try:
            async with asyncio.timeout(self._endpoint.timeout):
                reply = await self._client.chat.completions.with_raw_response.create(
                    **fields, extra_body=self._endpoint.extra_body or None
                )
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, UnusableAnswer):  # of a reply that is too long
                raise error.__cause__ from None
            raise
        finally:
            self._meter.add(Usage(in_flight=-1))
        body = read_body(reply.content)
        self._meter.add(read_usage(body, self._endpoint))
        if failed := read_error(body):
            status, words = failed
            error = openai.APIStatusError(str(words.get("message")), response=reply.http_response, body=words)
            error.status_code = status
            raise error
        return body
