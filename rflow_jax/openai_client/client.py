"""The client of one endpoint."""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rflow_jax.errors import ServiceError, served_role
from rflow_jax.openai_client.endpoint import Endpoint
from rflow_jax.openai_client.messages import PLAIN_QUESTION, ChatError, ChatRequest, UnfitReply, UnusableAnswer
from rflow_jax.openai_client.requester import Requester
from rflow_jax.openai_client.retry import (
    LONGEST_PAUSE,
    backoff,
    is_absent,
    is_away,
    is_busy,
    is_missing,
    is_retryable,
    refuses_all,
)
from rflow_jax.openai_client.usage import Usage, UsageTracker
from rflow_jax.utils.batching import CLOSED

if TYPE_CHECKING:
    import tenacity

_IN_A_ROW = 3  # so many without an answer, or without a usable one, and it is not for the questions
_ASKED_AGAIN = 3  # attempts, at least, of a question that was answered before
# Of a first question: attempts, the seconds after which there is no other, and those between two at most.
_PROBES, _PROBE_TIME, _PROBE_PAUSE = 3, 10.0, 2.0
_BUSY_TIME = 60.0  # seconds for which a busy server is asked a first question
log = logging.getLogger(__name__)


class Chat:
    """Asks one endpoint; threads may share it.

    One budget of retries covers all transient failures: timeouts, broken connections, truncated replies, the statuses
    408, 409, 429 and 5xx, and unusable answers. ``Retry-After`` is honoured. A server that is away for all is waited
    for, for the seconds of ``patience``.

    A refusal may be for one question or for all. So one that was answered before is asked again: only if that is
    answered, the refusal is of its question.

    Args:
        meter: counts the usage.
        first: a question that the server should be able to answer.

    Raises:
        InputError: no key for OpenAI's own address, or no usable address or header.
    """

    def __init__(
        self, endpoint: Endpoint, meter: UsageTracker | None = None, first: ChatRequest = PLAIN_QUESTION
    ) -> None:
        self.endpoint = endpoint
        self._meter = meter or UsageTracker()
        self._requester = Requester(endpoint, self._meter)
        self.name = self._requester.name  # of model and address, for messages
        self._slots, self._finding_out = asyncio.Semaphore(endpoint.concurrency), asyncio.Lock()
        self._asking: set[asyncio.Task[Any]] = set()
        # Since when the server has been away, and how many replies there were.
        self._away_since: float | None = None
        self._replies = 0
        # Those in a row without an answer, and without a usable one.
        self._unanswered, self._unusable = 0, 0
        # The question that had the last usable answer, and when the latest of such questions was sent.
        self._first = self._answered = first
        self._answered_sent = -math.inf
        self._refusal: str | None = None  # why no further question is asked
        self._loop = asyncio.new_event_loop()
        self._closing = threading.Lock()
        self._closed = False
        # A daemon, so that an interrupted process does not wait for answers.
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="chat", daemon=True)
        self._thread.start()

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

    def probe(self) -> None:
        """Asks the first question: whether the server is there, takes key, model and form, and gives a usable answer.

        A busy server is asked again for a minute at most.

        Raises:
            ServiceError: there is no such server, or it refuses the question or gives no usable answer.
        """
        asyncio.run_coroutine_threadsafe(self._probe(), self._loop).result()

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
        await self._requester.close()

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
            failed, text = time.monotonic(), self._requester.reason(error, attempts)
            self._unanswered += is_missing(error)
            if await self._is_away(error, before, waited):
                await self._wait_for_service(text)
                waited = True
                continue
            if (waited or is_away(error)) and not back:  # it may have come back just now
                back = True
                continue
            self._meter.add(Usage(failures=1))
            if await self._is_of_question(error, failed, text):
                return ChatError(text)
            return ChatError(f"{self.name}: {text}", missing=True)

    def _retrying(self, least: int = 1) -> "tenacity.AsyncRetrying":
        """The retries of a question.

        Args:
            least: attempts, at least.
        """
        import tenacity

        return tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(max(self.endpoint.max_retries + 1, least)),
            wait=backoff,
            retry=tenacity.retry_if_exception(is_retryable),
            reraise=True,
        )

    async def _probe(self) -> None:
        import openai
        import tenacity

        def pause(state: tenacity.RetryCallState) -> float:
            wanted = backoff(state)
            return wanted if _was_busy(state) else min(wanted, _PROBE_PAUSE)

        def stop(state: tenacity.RetryCallState) -> bool:
            passed = state.seconds_since_start or 0.0
            if _was_busy(state):
                return passed + state.upcoming_sleep > min(_BUSY_TIME, self.endpoint.patience)
            attempts = min(self.endpoint.max_retries + 1, _PROBES)
            return state.attempt_number >= attempts or passed > _PROBE_TIME

        def say(state: tenacity.RetryCallState) -> None:
            if _was_busy(state) and state.attempt_number == 1:
                log.warning("%s: %s is busy; asking it again in %.0f s", served_role(), self.name, state.upcoming_sleep)

        self._meter.add(Usage(calls=1))
        again = tenacity.retry_if_exception(is_retryable)
        retry = tenacity.AsyncRetrying(stop=stop, wait=pause, retry=again, before_sleep=say, reraise=True)
        try:
            await retry(self._attempt, self._first)
            return
        except (UnusableAnswer, TimeoutError, openai.OpenAIError) as failure:
            error = failure
        self._meter.add(Usage(failures=1))
        text = self._requester.reason(error, retry.statistics["attempt_number"])
        if isinstance(error, UnusableAnswer) and (error.said or not isinstance(error, UnfitReply)):
            text += f"; expected {self._first.expected}, and it answered {self._requester.words_of(error)}"
            hint = "mend it or take another model"
        elif is_busy(error):
            hint = "wait"
        else:
            hint = "start it or mend base_url, or wait for it with --no-probe" if is_missing(error) else "mend it"
        raise ServiceError(f"{self.name}: {text}; {hint}, and give the same command again")

    async def _is_of_question(self, error: BaseException, failed: float, text: str) -> bool:
        """Whether a failure is of what was asked, since others are answered; if not, no answer came.

        Args:
            failed: when it came.
            text: its reason.

        Raises:
            ServiceError: the server would refuse every question, now and later.
        """
        if refuses_all(error):
            raise self._refuse(text)
        if is_missing(error):
            return False
        if isinstance(error, UnusableAnswer) and not isinstance(error, UnfitReply):
            self._unusable += 1
            if self._unusable < _IN_A_ROW:
                return True
        other = await self._failure_of_another(failed)
        if other is not None and not is_missing(other):
            before = self._answered_sent > -math.inf
            raise self._refuse(f"{text}, also to a question that was answered before" if before else text)
        return other is None and not isinstance(error, UnfitReply)

    def _refuse(self, text: str) -> ServiceError:
        """The error that ends all questions."""
        self._refusal = f"{self.name}: {text}; mend it and give the same command again"
        return ServiceError(self._refusal)

    async def _failure_of_another(self, failed: float) -> BaseException | None:
        """Why a question that was answered before is not any more; None if it is, or if one sent later was.

        It is asked at once, beside the ``concurrency`` others.
        """
        import openai

        async with self._finding_out:
            if self._answered_sent > failed:
                return None
            try:
                await self._retrying(_ASKED_AGAIN)(self._attempt, self._answered, nullcontext())
            except (UnusableAnswer, TimeoutError, openai.OpenAIError) as failure:
                return failure
            return None

    async def _is_away(self, error: BaseException, before: int, waited: bool) -> bool:
        """Whether a server fails at any question, and not at the one that it just left unanswered.

        Args:
            before: replies that had come before that was asked.
            waited: whether it has been waited for on account of that question.
        """
        if is_absent(error) or (is_away(error) and not waited):
            return True
        if is_away(error) or self._unanswered >= _IN_A_ROW:
            return not await self._still_answers(before)
        return False

    async def _still_answers(self, before: int) -> bool:
        """Whether further replies have come, or the server answers again what it has answered."""
        import openai

        async with self._finding_out:
            if self._replies > before:
                return True
            try:
                await self._attempt(self._answered, nullcontext())
            except UnfitReply:
                return False
            except UnusableAnswer:  # an answer all the same
                return True
            except (TimeoutError, openai.OpenAIError):
                return False
            return True

    async def _wait_for_service(self, text: str) -> None:
        """Waits a little; raises ServiceError if the server has been away for too long."""
        now = time.monotonic()
        if self._away_since is None:
            self._away_since = now
            seconds, role = self.endpoint.patience, served_role()
            log.warning("waiting up to %.0f s for %s: %s: %s", seconds, role, self.name, text)
        away = now - self._away_since
        left = self.endpoint.patience - away
        if left <= 0:
            again = "give the same command again when it is back"
            self._refusal = f"{self.name}: {text}; no answer for {away:.0f} s; {again}"
            raise ServiceError(self._refusal)
        await asyncio.sleep(min(LONGEST_PAUSE, left))

    async def _attempt(self, question: ChatRequest, slots: AbstractAsyncContextManager[Any] | None = None) -> Any:
        """The answer to a question, asked once, when it is its turn (``slots``)."""
        async with slots or self._slots:
            if self._refusal is not None:
                raise ServiceError(self._refusal)
            sent = time.monotonic()
            body = await self._requester.reply(question)
        try:
            value = self._requester.parsed(question, body)
        except UnusableAnswer as error:
            if not isinstance(error, UnfitReply):
                self._count_reply()
            raise
        self._count_reply()
        self._unusable, self._answered, self._answered_sent = 0, question, max(self._answered_sent, sent)
        return value

    def _count_reply(self) -> None:
        self._away_since, self._unanswered = None, 0
        self._replies += 1


def _was_busy(state: "tenacity.RetryCallState") -> bool:
    error = state.outcome.exception() if state.outcome else None
    return error is not None and is_busy(error)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()
