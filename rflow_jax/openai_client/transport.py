"""The HTTP client below a chat: which proxies it uses, and how much it reads of a reply."""

from typing import Any

from rflow_jax.openai_client.messages import UnfitReply
from rflow_jax.utils.network import uses_environment

LONGEST_REPLY, LONGEST_ERROR = 16 * 2**20, 64 * 2**10  # bytes, unpacked
_REDIRECTS = 5
_READ = ("retry-after", "retry-after-ms")  # headers of a reply


def http_client(address: str | None) -> Any:
    """A client for an address, whose replies are bounded; no proxy of the environment is used for this machine's own.

    A longer reply ends in :class:`UnfitReply`, and so does a redirection to another host; of a longer error, the
    beginning is read.
    """
    import openai

    class Bounded(openai.DefaultAsyncHttpxClient):
        async def send(self, request: Any, *, stream: bool = False, **how: Any) -> Any:
            how["follow_redirects"] = False  # their bodies would be read whole
            response = await super().send(request, stream=True, **how)
            for _ in range(_REDIRECTS):
                if response.next_request is None:
                    break
                await response.aclose()
                # Keys may be in any header, and pictures are in the body.
                to = response.next_request.url
                if to.host != request.url.host or (request.url.scheme, to.scheme) == ("https", "http"):
                    where = f"{to.scheme}://{to.host}"
                    raise UnfitReply(f"the server redirects to another one, {where}: a login, or another base_url")
                response = await super().send(response.next_request, stream=True, **how)
            try:
                content = await _beginning(response, LONGEST_REPLY if response.is_success else LONGEST_ERROR)
            finally:
                await response.aclose()
            # The content is unpacked and read as UTF-8, whatever else the headers say.
            headers = {name: value for name in _READ if (value := response.headers.get(name, "")).isascii()}
            return type(response)(response.status_code, headers=headers, content=content, request=response.request)

    return Bounded(trust_env=uses_environment(address))


async def _beginning(response: Any, limit: int) -> bytes:
    """At most ``limit`` bytes of a reply's content; raises UnfitReply if a reply that is no error has more."""
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > limit:
            if response.is_success:
                raise UnfitReply(f"the server's reply is longer than {limit // 2**20} MB; the rest was not read")
            break
    return bytes(content[:limit])
