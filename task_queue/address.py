"""Where RabbitMQ is (AMQP_URL), how to connect to it, and pika's errors in plain words."""

import contextlib
import os
import random
import ssl
import struct
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import pika
import pika.data
from pika.exceptions import AMQPError, ProbableAccessDeniedError, ProbableAuthenticationError

from task_queue import QUEUE

# Where RabbitMQ is, unless the environment variable AMQP_URL says otherwise.
DEFAULT_URL = "amqp://guest:guest@localhost:5672/%2F"
# How often the two ends show each other that they are alive: RabbitMQ advises 5 to 20 s. And how long to wait while
# RabbitMQ takes no tasks, as it is short of memory or disk: with connecting on top, less than 30 s.
HEARTBEAT_SECONDS, BLOCKED_SECONDS = 20, 25
# What pika's calls raise when RabbitMQ or the network fails: the last two on a connection that has just closed.
# Catch them at calls of pika's only: in other code they are bugs.
PIKAS_ERRORS = (AMQPError, OSError, ValueError, AssertionError)


class Refused(Exception):
    """RabbitMQ, or this program, refuses for a reason that waiting won't cure. The message is for the user."""


class Unreachable(Exception):
    """No node of RabbitMQ can be reached now; later one may be. The message is for the user."""


class Lost(Unreachable):
    """The connection or the channel has ended."""


@contextlib.contextmanager
def lost_rabbitmq(hopeless: tuple[int, ...] = (403,)) -> Iterator[None]:
    """Turn what pika's calls raise into Lost; or Refused, for reply codes that are hopeless (403: no permission)."""
    try:
        yield
    except PIKAS_ERRORS as error:
        text, code = _in_words(error), getattr(error, "reply_code", None)
        if code in hopeless:
            raise Refused(f"RabbitMQ refuses: {text}.") from error
        if code != 541:  # INTERNAL_ERROR
            raise Lost(f"Lost RabbitMQ ({text}).") from error
        cure = f"If the queue can't come back, rabbitmqctl delete_queue {QUEUE} deletes it, tasks and all."
        raise Lost(f"RabbitMQ can't serve the queue {QUEUE!r} ({text}): its log tells more. {cure}") from error


def connect(name: str) -> pika.BlockingConnection:
    """Return a connection, of that name, to the first node that lets us in. Unreachable or Refused if none does."""
    problems = []
    for node in nodes(name):
        try:
            return pika.BlockingConnection(node)
        except Exception as error:  # pika has no common base class for what can happen here
            wrapper = error.args[0] if error.args else None  # of ConnectionRefusedError, say
            problems.append(_explained(getattr(wrapper, "exception", error), node))
    raise next((problem for problem in problems if isinstance(problem, Unreachable)), problems[0])


def close_socket(connection: Any) -> None:
    """Let go of a connection without a word to RabbitMQ, whatever state it is in."""
    with contextlib.suppress(AttributeError, OSError):  # there is none, or it has no socket
        connection._impl._transport._sock.close()


def nodes(name: str) -> list[pika.URLParameters]:
    """Return the nodes of AMQP_URL in random order, so that many workers spread. Refused if it is not well formed."""
    # An empty AMQP_URL is what `AMQP_URL=$UNSET python worker.py` gives: as good as none.
    urls = [url.strip() for url in (os.environ.get("AMQP_URL") or DEFAULT_URL).split(";") if url.strip()]
    try:
        for parts in map(urlsplit, urls or [""]):
            # An @ after the host belongs to a password that was not encoded: what looks like the host is part of it.
            if parts.scheme not in ("amqp", "amqps") or "@" in parts.path + parts.query + parts.fragment:
                raise ValueError
        found = [pika.URLParameters(url) for url in urls]
    except Exception:  # ValueError, TypeError, IndexError, ...; not quoted, as it may show a password
        raise Refused(
            "AMQP_URL is not a valid AMQP URL. It must read amqp://USER:PASSWORD@HOST:PORT/VIRTUAL_HOST, with special "
            "characters percent-encoded, pika's parameters behind a ?, and ; between the nodes of a cluster."
        ) from None
    for node in found:
        node.heartbeat = HEARTBEAT_SECONDS if node.heartbeat is None else node.heartbeat
        node.blocked_connection_timeout = node.blocked_connection_timeout or BLOCKED_SECONDS
        node.client_properties = {"connection_name": name} | (node.client_properties or {})
    return random.sample(found, len(found))


def _explained(error: Any, node: pika.URLParameters) -> Unreachable | Refused:
    """Turn what pika raises when it can't connect into one line with a remedy."""
    where, user, text = f"{node.host}:{node.port}", node.credentials.username, _in_words(error)
    # RabbitMQ answers 403 to wrong credentials, 530 to a virtual host that isn't there or isn't ours. pika raises the
    # same two classes when the connection merely breaks at that moment, which waiting does cure.
    if isinstance(error, ProbableAuthenticationError) and "(403)" in text:
        remedy = "Check user and password in AMQP_URL; by default, guest may connect only from RabbitMQ's own machine."
        return Refused(f"RabbitMQ at {where} refuses user {user!r}. {remedy}")
    if isinstance(error, ProbableAccessDeniedError) and "(530)" in text:
        if "limit (" in text:  # so many connections, for now
            return Unreachable(f"RabbitMQ at {where} accepts no more connections ({text}).")
        what = f"has no virtual host {node.virtual_host!r}, or user {user!r} may not use it"
        return Refused(f"RabbitMQ at {where} {what}. Check what follows the port in AMQP_URL.")
    # A connection that breaks while TLS is set up is an SSLError as well.
    if isinstance(error, ssl.SSLError) and "EOF" not in text:
        return Refused(f"TLS with {where} fails ({text}). Check AMQP_URL; SSL_CERT_FILE names your own CA's file.")
    return Unreachable(f"can't reach RabbitMQ at {where} ({text}). Is it running (make rabbitmq)? Check AMQP_URL.")


def _in_words(error: Any) -> str:
    """Return an exception of pika's as a few words."""
    if hasattr(error, "reply_code"):  # RabbitMQ's own words
        return f"{error.reply_text} ({error.reply_code})"
    # pika's own prose about the state of its connection helps nobody.
    prose = any(words in str(error) for words in ("prev_state", "StreamLostError", "indicated EOF"))
    return "it ended the connection" if prose else getattr(error, "strerror", "") or str(error) or type(error).__name__


def _decode_value(encoded: bytes, offset: int, pikas: Any = pika.data.decode_value) -> tuple[Any, int]:
    """Decode a header's value. pika 1.4.4 drops the connection over a timestamp after 9999: return that as a number.

    Remove this when a release of pika has the cure (pika issue 1698).
    """
    try:
        return pikas(encoded, offset)
    except (ValueError, OverflowError, OSError, RecursionError):
        kind = encoded[offset : offset + 1]
        if kind == b"T":
            return struct.unpack_from(">q", encoded, offset + 1)[0], offset + 9
        if kind not in (b"A", b"F"):
            raise
        # Arrays or tables a thousand deep in each other: do without the innermost.
        return None, offset + 5 + struct.unpack_from(">I", encoded, offset + 1)[0]


pika.data.decode_value = _decode_value
