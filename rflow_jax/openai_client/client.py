"""The client of one endpoint."""

import asyncio
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rflow_jax.errors import ServiceError
from rflow_jax.openai_client.accepted import FORMATS, Accepted
from rflow_jax.openai_client.endpoint import Endpoint, Secrets
from rflow_jax.openai_client.messages import ChatError, ChatRequest, UnusableAnswer
from rflow_jax.openai_client.protocol import read_answer, read_body, read_error, read_usage, request
from rflow_jax.openai_client.retry import (
    LONGEST_PAUSE,
    backoff,
    is_absent,
    is_away,
    is_busy,
    is_missing,
    is_retryable,
    is_unfit,
    reason,
    refuses_all,
    refuses_settings,
)
from rflow_jax.openai_client.transport import http_client
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.utils.batching import CLOSED

if TYPE_CHECKING:
    import tenacity

_LONGEST_REASON = 300
_REJECTIONS = 3  # so many at the beginning, and the settings are to blame
_UNANSWERED = 3  # so many in a row, and it is not for the questions
# Of a first question: attempts, the seconds after which there is no other, and those between two at most.
_PROBES, _PROBE_TIME, _PROBE_PAUSE = 3, 10.0, 2.0
_CONNECT = 10.0  # seconds for a connection
log = logging.getLogger(__name__)


class Chat:
    """Asks one endpoint; threads may share it.

    One budget of retries covers all transient failures: timeouts, broken connections, truncated replies, the statuses
    408, 409, 429 and 5xx, and unusable answers. ``Retry-After`` is honoured. A server that is away for all is waited
    for, for the seconds of ``patience``.

    Args:
        meter: counts the usage.

    Raises:
        InputError: no key for OpenAI's own address, or no usable address.
    """

    def __init__(self, endpoint: Endpoint, meter: UsageTracker | None = None) -> None:
        import openai

        self.endpoint = endpoint
        self._meter = meter or UsageTracker()
        key, address = endpoint.api_key(), endpoint.address()
        headers = endpoint.headers()
        self._secrets = Secrets(key, address, (value for value in headers.values() if len(value) >= 8))
        # Retries and time limits are handled here, because unusable answers count as well.
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=address,
            timeout=openai.Timeout(None, connect=_CONNECT),
            max_retries=0,
            default_headers=headers,
            http_client=http_client(address),
        )
        self._accepted = Accepted(0 if endpoint.structured == "auto" else FORMATS.index(endpoint.structured))
        self._slots, self._finding_out = asyncio.Semaphore(endpoint.concurrency), asyncio.Lock()
        self._asking: set[asyncio.Task[Any]] = set()
        # Since when the server has been away, the question that it answered last, and how many: replies, rejected
        # questions, and those in a row without an answer.
        self._away_since: float | None = None
        self._answered: ChatRequest | None = None
        self._replies, self._rejected, self._unanswered = 0, 0, 0
        self._refusal: str | None = None  # why no further question is asked
        self._loop = asyncio.new_event_loop()
        self._closing = threading.Lock()
        self._closed = False
        # A daemon, so that an interrupted process does not wait for answers.
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="chat", daemon=True)
        self._thread.start()
        # The client's own log lines name every request; a run of thousands has a progress bar instead.
        for name in ("httpx", "httpx2"):
            logging.getLogger(name).setLevel(logging.WARNING)

    def ask_all(self, questions: Sequence[ChatRequest]) -> list[Any]:
        """The parsed answers in the order of the questions; a ``ChatError`` in place of an unusable one.

        At most ``concurrency`` requests are in flight, over all callers. After ``close``, and for questions waiting
        then, the error is ``CLOSED``.

        Raises:
            ServiceError: the server refuses the key, the account, the model or the settings, or was away for too long.
        """
        with self._closing:
            if self._closed:
                return [ChatError(CLOSED) for _ in questions]
            answers = asyncio.run_coroutine_threadsafe(self._gather(questions), self._loop)
        return answers.result()

    def probe(self, question: ChatRequest) -> None:
        """Asks a first question, which waits for no one: whether the server is there and takes key, model and form.

        An answer that cannot be used will do, and so will a server that is busy.

        Raises:
            ServiceError: there is no such server, or it refuses the question or does not answer it.
        """
        asyncio.run_coroutine_threadsafe(self._probe(question), self._loop).result()

    def close(self) -> None:
        """Cancels all waiting questions, of any thread; called when a run ends."""
        with self._closing:
            if not self._closed:
                self._closed = True
                asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
                self._loop.call_soon_threadsafe(self._loop.stop)
                self._thread.join()

    async def _gather(self, questions: Sequence[ChatRequest]) -> list[Any]:
        tasks = [asyncio.create_task(self._ask(question)) for question in questions]
        self._asking.update(tasks)
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        self._asking.difference_update(tasks)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, ChatError | asyncio.CancelledError):
                raise answer
        return [ChatError(CLOSED) if isinstance(answer, asyncio.CancelledError) else answer for answer in answers]

    async def _stop(self) -> None:
        for task in self._asking:
            task.cancel()
        # The gathering tasks must finish first, so that they can return the answers.
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.gather(*waiting, return_exceptions=True)
        await self._client.close()

    async def _ask(self, question: ChatRequest) -> Any:
        import openai

        self._meter.add(Usage(calls=1))
        attempts, waited, back = 0, False, False
        while True:
            retry, before = self._retrying(), self._replies
            try:
                return await retry(self._attempt, question)
            except (UnusableAnswer, TimeoutError, openai.OpenAIError) as failure:
                error = failure
            # Here, so that nothing raised below has the client's error, and the key in its headers, as its context.
            attempts += retry.statistics["attempt_number"]
            text = self._reason(error, attempts)
            self._unanswered += is_missing(error)
            if await self._is_away(error, before, waited):
                await self._wait_for_service(text)
                waited = True
                continue
            if is_away(error) and not back:  # it may have come back just now
                back = True
                continue
            self._meter.add(Usage(failures=1))
            self._refuse(error, text)
            return ChatError(text, missing=is_missing(error))

    def _retrying(self) -> "tenacity.AsyncRetrying":
        import tenacity

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.endpoint.max_retries + 1),
            wait=backoff,
            retry=tenacity.retry_if_exception(is_retryable),
            reraise=True,
        )

    async def _probe(self, question: ChatRequest) -> None:
        import openai
        import tenacity

        self._meter.add(Usage(calls=1))
        attempts = min(self.endpoint.max_retries + 1, _PROBES)
        retry = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(attempts) | tenacity.stop_after_delay(_PROBE_TIME),
            wait=lambda state: min(backoff(state), _PROBE_PAUSE),
            retry=tenacity.retry_if_exception(lambda error: is_unfit(error) and not is_busy(error)),
            reraise=True,
        )
        try:
            await retry(self._attempt, question)
            return
        except (UnusableAnswer, TimeoutError, openai.OpenAIError) as failure:
            error = failure
        if is_busy(error) or (isinstance(error, UnusableAnswer) and not is_unfit(error)):
            return
        text = self._reason(error, retry.statistics["attempt_number"])
        hint = "start it or mend base_url, or wait for it with --no-probe" if is_missing(error) else "mend it"
        raise ServiceError(f"{self.endpoint.model_name}: {text}; {hint}, and give the same command again")

    def _refuse(self, error: BaseException, text: str) -> None:
        """Raises ServiceError if the server would refuse every question, now and later."""
        self._rejected += refuses_settings(error)
        if refuses_all(error) or (self._answered is None and self._rejected >= _REJECTIONS):
            self._refusal = f"{self.endpoint.model_name}: {text}; mend it and give the same command again"
            raise ServiceError(self._refusal)

    async def _is_away(self, error: BaseException, before: int, waited: bool) -> bool:
        """Whether a server fails at any question, and not at the one that it just left unanswered.

        Args:
            before: replies that had come before that was asked.
            waited: whether it has been waited for on account of that question.
        """
        if is_absent(error) or (is_away(error) and not waited):
            return True
        if is_away(error) or self._unanswered >= _UNANSWERED:
            return not await self._still_answers(before)
        return False

    async def _still_answers(self, before: int) -> bool:
        """Whether further replies have come, or the server answers again what it has answered."""
        import openai

        async with self._finding_out:
            if self._answered is None or self._replies > before:
                return self._answered is not None
            try:
                with suppress(UnusableAnswer):  # an answer all the same
                    await self._attempt(self._answered)
            except (TimeoutError, openai.OpenAIError):
                return False
            return True

    async def _wait_for_service(self, text: str) -> None:
        """Waits a little; raises ServiceError if the server has been away for too long."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            seconds, name = self.endpoint.patience, self.endpoint.model_name
            log.warning("waiting up to %.0f s for the server of %s: %s", seconds, name, text)
        away = now - self._away_since
        left = self.endpoint.patience - away
        if left <= 0:
            name, again = self.endpoint.model_name, "give the same command again when it is back"
            self._refusal = f"{name}: {text}; no answer for {away:.0f} s; {again}"
            raise ServiceError(self._refusal)
        await asyncio.sleep(min(LONGEST_PAUSE, left))

    async def _attempt(self, question: ChatRequest) -> Any:
        async with self._slots:
            if self._refusal is not None:
                raise ServiceError(self._refusal)
            body = await self._exchange(question)
        self._away_since, self._unanswered = None, 0
        self._replies += 1
        answer = read_answer(body)
        self._answered = question
        return question.parse(replace(answer, text=self._secrets.blank(answer.text)))

    async def _exchange(self, question: ChatRequest) -> Mapping[str, Any]:
        """The reply to a question; what the server refuses in its form is asked in another one."""
        import openai

        accepted = self._accepted
        while True:
            fields = request(self.endpoint, question, accepted)
            try:
                body = await self._send(fields)
                break
            except openai.APIStatusError as error:
                other = accepted.after(error, fields, auto=self.endpoint.structured == "auto")
                if other is None:
                    raise
                accepted = other
        # Remembered only now: a rejection for another reason must not change later questions.
        self._accepted = self._accepted.with_all(accepted)
        return body

    async def _send(self, fields: dict[str, Any]) -> Mapping[str, Any]:
        import openai

        self._meter.add(Usage(attempts=1, in_flight=1))
        try:
            async with asyncio.timeout(self.endpoint.timeout):
                reply = await self._client.chat.completions.with_raw_response.create(
                    **fields, extra_body=self.endpoint.extra_body or None
                )
        except openai.APIConnectionError as error:
            if isinstance(error.__cause__, UnusableAnswer):  # of a reply that is too long
                raise error.__cause__ from None
            raise
        finally:
            self._meter.add(Usage(in_flight=-1))
        body = read_body(reply.content)
        self._meter.add(read_usage(body, self.endpoint))
        if failed := read_error(body):
            status, words = failed
            error = openai.APIStatusError(str(words.get("message")), response=reply.http_response, body=words)
            error.status_code = status
            raise error
        return body

    def _reason(self, error: BaseException, attempts: int) -> str:
        # Hidden before truncation: a truncated key is not recognised.
        text = self._secrets.hide(reason(error, self.endpoint))
        if len(text) > _LONGEST_REASON:
            text = text[: _LONGEST_REASON - 3] + "..."
        return f"{text} ({attempts} attempt{'s' if attempts > 1 else ''})"


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
