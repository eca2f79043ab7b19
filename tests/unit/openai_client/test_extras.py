"""Further headers: which hold a secret, and which words of answers and errors are hidden for one."""

import pytest

from rflow_jax.errors import InputError
from rflow_jax.openai_client.endpoint import Endpoint, Secrets
from rflow_jax.openai_client.extras import require_headers
from rflow_jax.openai_client.requester import Requester
from rflow_jax.openai_client.usage import UsageTracker


@pytest.mark.parametrize(
    "name", ["x-portkey-provider", "X-Author", "Max-Tokens", "X-Monkey", "X-Cache-Key-Prefix", "Idempotency-Key"]
)
def test_names_that_only_look_like_keys_are_taken(name):
    require_headers({name: "value"})


@pytest.mark.parametrize(
    "name",
    ["Authorization", "X-Api-Key", "apikey", "X-ApiKey", "x-portkey-api-key", "X-Auth-Token", "Cookie"],
)
def test_names_of_secrets_want_a_variable(name):
    with pytest.raises(InputError, match=r"give \$ and the name of an environment variable"):
        require_headers({name: "value"})


def test_only_what_comes_from_the_environment_is_hidden(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "anything")
    monkeypatch.setenv("GATEWAY", "gateway-4711-lighting")
    headers = {"X-Title": "lighting", "X-Gateway": "$GATEWAY", "HTTP-Referer": "https://mysite.org"}
    asked = Requester(
        Endpoint(base_url="http://localhost/v1?api-version=2024-10-21", extra_headers=headers), UsageTracker()
    )
    said = "Make the lighting warmer, remove anything behind the dog"
    assert asked._secrets.blank(f"{said}: gateway-4711-lighting") == f"{said}: ***"
    said = "api-version 2024-10-21 is not supported, see https://docs.example.com/errors"
    assert asked._secrets.hide(f"{said} gateway-4711-lighting") == f"{said} ***"


def test_a_password_of_an_address_is_hidden_and_its_version_is_not():
    secrets = Secrets("none", "http://me:longpassword1@localhost/v1?sig=0123456789abcdef&version=2024-10-21")
    assert secrets.hide("longpassword1 0123456789abcdef 2024-10-21") == "*** *** 2024-10-21"
