"""Servers of shards that send too much, redirect for ever, or speak to the terminal; and the environment's proxies."""

import contextlib
import socket
import threading

import pytest

from rflow_jax.data.sources.stream_shards import read_shard
from rflow_jax.data.storage import http
from rflow_jax.data.storage.http import http_range, probe_http
from rflow_jax.data.storage.retry import LONGEST_RETRY_AFTER, RetryPolicy, TransientError, with_retries
from rflow_jax.data.storage.shards import Shard, expand
from rflow_jax.errors import InputError
from rflow_jax.utils.network import asked_pause

QUICK = RetryPolicy(timeout=3.0, max_retries=1, max_backoff=0.01)
ENDLESS = 2**27


@pytest.fixture
def server():
    """Makes a server with one answer to everything, whose body has no end; (its address, the bytes that it sent)."""
    listeners = []

    def start(head: bytes, endless: bool = True):
        listeners.append(listener := socket.create_server(("127.0.0.1", 0)))
        sent = [0]

        def answer(connection):
            with connection, contextlib.suppress(OSError):
                connection.recv(2**16)
                connection.sendall(head + b"\r\n\r\n")
                while endless and sent[0] < ENDLESS:
                    connection.sendall(b"x" * 2**16)
                    sent[0] += 2**16

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/a.tar", sent

    yield start
    for listener in listeners:
        listener.close()


def test_more_bytes_than_were_asked_for_are_cut_off(server):
    url, sent = server(b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-99/1000")
    with pytest.raises(InputError, match=r"a\.tar: the server sends more bytes than were asked for"):
        http_range(url, 0, 100, 1000, QUICK)
    assert sent[0] < ENDLESS // 2


def test_redirections_end_and_their_bodies_are_not_read(server):
    url, sent = server(b"HTTP/1.1 302 X\r\nLocation: /a.tar?signature=secret")
    with pytest.raises(InputError, match=r"a\.tar: is redirected more than 10 times") as caught:
        http_range(url, 0, 100, 1000, QUICK)
    assert "secret" not in str(caught.value)
    assert sent[0] < ENDLESS // 2


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-0/" + b"9" * 5000,
        b"HTTP/1.1 206 X\r\nContent-Range: \x1b]0;owned\x07",
        b"HTTP/1.1 302 X\r\nLocation: ftp://\x1b[2Jhost/",
        b"HTTP/1.1 302 X\r\nLocation: http://[",
        b"HTTP/1.1 200 \x1b[2J\x07\r\nETag: \x1b[2J\r\nContent-Length: 99999999999999999999999",
        b"\x1b[31mgarbage",
    ],
)
def test_nonsense_is_one_line_without_escape_sequences(server, head):
    url, _ = server(head, endless=False)
    with contextlib.suppress(InputError):  # the length may be believed
        probe_http(url, QUICK)
    with pytest.raises(InputError) as caught:
        http_range(url, 0, 1, 1000, QUICK)
    assert str(caught.value).isprintable()
    assert "a.tar: " in str(caught.value)


IN_PLACE = {
    "page": (b"text/html", b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", r"a web page \('Sign in'\)"),
    "bare": (b"application/octet-stream", b"  <HTML><body>no", "a web page"),
    "comment": (b"text/html", b"<!-- portal --><html lang=en>", "a web page"),
    "json": (b"application/json", b'{"error": "no\x1b[2J such token"}', r"JSON \(.*no such token.*\)"),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_a_page_in_place_of_a_shard_is_named(server, kind):
    type_, body, what = IN_PLACE[kind]
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\nContent-Length: %d\r\n\r\n%s" % (type_, len(body), body)
    url, _ = server(head, endless=False)
    words = rf"a\.tar: the server sends {what}, not the file; sign in"
    with pytest.raises(InputError, match=words):
        expand(url + "?token=hidden", retry=QUICK)
    with pytest.raises(InputError, match=words):
        http_range(url, 0, 1, 1000, QUICK)
    (sample,) = read_shard(Shard(url, None, ""), QUICK)
    assert "the server sends" in sample.trouble


def test_words_of_a_server_are_printable():
    def attempt():
        raise TransientError("\x1b[2Jgone\x07\nfar")

    with pytest.raises(InputError, match=r"^x: gone far \(2 attempts\)"):
        with_retries(attempt, "x", QUICK)


@pytest.mark.parametrize(
    "value", ["Fri, 01 Jan 2099 00:00:00 GMT", "9" * 1000, "-5", "-1e9", "nan", "inf", "\u0663", ""]
)
def test_waits_are_bounded(value):
    assert 0 <= asked_pause({"retry-after": value}, LONGEST_RETRY_AFTER) <= LONGEST_RETRY_AFTER


@pytest.fixture
def fresh_clients(monkeypatch):
    monkeypatch.setattr(http, "_clients", {})


def test_proxies_of_the_environment_are_checked_and_loopback_uses_none(server, fresh_clients, monkeypatch):
    url, _ = server(b"HTTP/1.1 206 X\r\nContent-Range: bytes 0-0/1\r\nContent-Length: 1\r\n\r\nx", endless=False)
    monkeypatch.setenv("HTTP_PROXY", "http://me:hidden@127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "socks://nowhere")
    assert http_range(url, 0, 1, 1, QUICK) == b"x"
    with pytest.raises(InputError, match="the environment variable HTTPS_PROXY must be a proxy"):
        expand("https://example.org/a.tar", retry=QUICK)
