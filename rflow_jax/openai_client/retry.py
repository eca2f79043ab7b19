"""Failed requests: whether to retry, when, and the reason in words."""

import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rflow_jax.openai_client.endpoint import Endpoint
from rflow_jax.openai_client.messages import UnusableAnswer
from rflow_jax.utils.file_kinds import web_page
from rflow_jax.utils.network import asked_pause, printable

if TYPE_CHECKING:
    import openai
    import tenacity

LONGEST_RETRY_AFTER = 120.0
_FIRST_PAUSE, LONGEST_PAUSE = 0.5, 10.0
_TRANSIENT = {408, 409, 429}
_AWAY = {502, 503, 504, 529}
_UNREACHABLE = {"ConnectError", "ConnectTimeout", "ProxyError"}  # of httpx
_REFUSALS = {401, 402, 404, 405, 410}
# What servers call an account that may ask nothing more, under statuses from 200 to 529.
_ENDED = {
    *("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "access_terminated"),
    *("account_deactivated", "invalid_api_key", "insufficient_user_quota", "insufficient_balance"),
}
_ABOUT_ACCOUNT = re.compile(
    r"insufficient[ _](?:\w+[ _])?(?:quota|credits?|balance|funds)|balance (?:is )?(?:too low|not enough)"
    r"|billing[ _](?:hard[ _]limit|limit|is not active|not[ _]active)"
    r"|access[ _](?:is |has been |was )?terminated|(?:account|key)[ _](?:is |has been |was )?"
    r"(?:deactivated|disabled|suspended|terminated|revoked|expired|banned)|out of credits?|no credits? left|arrears",
    re.IGNORECASE,
)
_ABOUT_FORM = re.compile(r"response_format|json|schema|grammar|guided|structured", re.IGNORECASE)


def is_retryable(error: BaseException) -> bool:
    """Whether asking again may help."""
    import openai

    if isinstance(error, openai.APIStatusError):
        return (error.status_code in _TRANSIENT or error.status_code >= 500) and not _is_about_account(error)
    return isinstance(error, UnusableAnswer | TimeoutError | openai.APIConnectionError)


def is_missing(error: BaseException) -> bool:
    """Whether no answer came, so that nothing is known of what was asked."""
    return is_retryable(error) and not isinstance(error, UnusableAnswer)


def is_busy(error: BaseException) -> bool:
    """Whether a server asks to come back later."""
    import openai

    return isinstance(error, openai.APIStatusError) and error.status_code == 429 and is_retryable(error)


def is_absent(error: BaseException) -> bool:
    """Whether there is no server, or one that asks to come back later, whatever the question is."""
    return is_busy(error) or type(error.__cause__).__name__ in _UNREACHABLE


def is_away(error: BaseException) -> bool:
    """Whether there seems to be no server behind an address, or one that can answer nothing now."""
    import openai

    away = isinstance(error, openai.APIStatusError) and error.status_code in _AWAY and is_retryable(error)
    return away or is_absent(error)


def refuses_all(error: BaseException) -> bool:
    """Whether a server refuses this key, account, model or address, and so would refuse every question."""
    import openai

    if not isinstance(error, openai.APIStatusError):
        return False
    return error.status_code in _REFUSALS or bool({str(error.code), str(error.type)} & _ENDED)


def _is_about_account(error: "openai.APIStatusError") -> bool:
    """Whether a server's words are about a key or an account, so that waiting will not help.

    They may be a question's own, repeated: only another question can tell.
    """
    return refuses_all(error) or bool(_ABOUT_ACCOUNT.search(said(error)))


def backoff(state: "tenacity.RetryCallState") -> float:
    """Seconds until the next attempt: exponential with jitter, and not before the server's ``Retry-After``."""
    longest = min(LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (state.attempt_number - 1))
    error = state.outcome.exception() if state.outcome else None
    wanted = retry_after(getattr(getattr(error, "response", None), "headers", {}))
    # Clients that got the same Retry-After must not return at the same moment.
    return max(random.uniform(0, longest), wanted * random.uniform(1, 1.2))


def retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a server asks to wait, at most ``LONGEST_RETRY_AFTER``; 0 if absent or invalid."""
    return asked_pause(headers, LONGEST_RETRY_AFTER)


def refuses_form(error: "openai.APIStatusError") -> bool:
    """Whether a server rejects the requested response format."""
    return error.status_code in (400, 422) and bool(_ABOUT_FORM.search(said(error)))


def reason(error: BaseException, endpoint: Endpoint) -> str:
    """Why there is no answer, in one line; secrets in it are not yet hidden."""
    import openai

    if isinstance(error, TimeoutError | openai.APITimeoutError):
        text = f"no answer within {endpoint.timeout:g} s"
    elif isinstance(error, openai.APIStatusError):
        hints = {
            401: f"the key in {endpoint.api_key_env} is not accepted",
            402: "the account has no credit left",
            403: f"the key in {endpoint.api_key_env} may not do this",
            404: f"no model {endpoint.model_name} here, or a wrong base_url",
            429: "too many requests, or no quota left",
        }
        # A server's message about a key is mostly that key.
        message = "" if error.status_code == 401 else said(error)
        text = ": ".join(filter(None, (f"HTTP {error.status_code}", hints.get(error.status_code), message)))
    elif isinstance(error, openai.APIConnectionError):
        text = f"no connection, or it broke: {error.__cause__ or error}"
    else:
        text = str(error) or type(error).__name__
    return printable(text)


def said(error: "openai.APIStatusError") -> str:
    """The server's message: {error: {message}}, {message}, {error}, {detail} or plain text; the title of a web page."""
    body: Any = error.body
    if isinstance(body, Mapping):
        body = body.get("message") or body.get("detail") or body
    elif isinstance(body, str):
        body = web_page(body.encode()) or body
    return str(body) if body else ""
