"""Names on the Hub that lead nowhere: one line each."""

import huggingface_hub
import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from rflow_jax.errors import InputError
from rflow_jax.weights.hub import resolve, resolve_lora


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (GatedRepoError, "gated on the Hub; accept its licence there and set HF_TOKEN"),
        (RepositoryNotFoundError, "not on the Hub"),
        (RevisionNotFoundError, "owner/name is on the Hub, but has no revision v2"),
        (HfHubHTTPError, r"the Hub does not answer \(503 Server Error\)"),
    ],
)
@pytest.mark.parametrize("resolve", [resolve, resolve_lora])
def test_errors_of_the_hub_are_one_line(monkeypatch, resolve, kind, message):
    def download(repository, *, local_files_only=False, **_):
        if local_files_only:
            raise LocalEntryNotFoundError("not in the cache")
        # Without its constructor, which wants a response of whichever HTTP library this version of the Hub's uses.
        error = kind.__new__(kind)
        error.args = ("503 Server Error\n\nfor url",)
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=f"^owner/name@v2: .*{message}") as error:
        resolve("owner/name@v2")
    assert "\n" not in str(error.value)


def test_an_error_without_words(monkeypatch):
    def download(*_, local_files_only=False, **__):
        raise LocalEntryNotFoundError("not in the cache") if local_files_only else TimeoutError()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(InputError, match=r"the Hub does not answer \(TimeoutError\)"):
        resolve("owner/name")
