"""What new_task.py and worker.py agree on: where RabbitMQ is, which queue holds the tasks, and how a task is shown.

Both scripts import this, so that a task is never sent to one queue and awaited on another.
"""

import io
import os
import random
import ssl
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit

import pika
from pika.exceptions import ChannelClosedByBroker, ProbableAccessDeniedError, ProbableAuthenticationError

# Where RabbitMQ is, unless the environment variable AMQP_URL says otherwise.
DEFAULT_URL = "amqp://guest:guest@localhost:5672/%2F"

# The queue that holds the tasks, and the one for tasks that failed too often.
QUEUE = "task_queue"
DEAD_LETTERS = "task_queue_dead_letters"

# A quorum queue writes each task to disk (on most nodes, in a cluster) before it confirms it, and counts deliveries.
QUORUM = {"x-queue-type": "quorum"}

# RabbitMQ writes the existence of a new queue to disk up to a second after it has said that the queue is declared.
# Were it killed before that, it would forget the queue, with the tasks in it. So nobody uses a queue younger than this.
SETTLE_SECONDS = 2

# How often the two ends show each other that they are alive. RabbitMQ advises 5 to 20 s; its own default is 60.
HEARTBEAT_SECONDS = 20

# How long RabbitMQ may keep us from publishing because it is short of memory or disk. With what else takes time, a
# user waits for less than 30 s.
BLOCKED_SECONDS = 25


class Unreachable(Exception):
    """No node of RabbitMQ can be reached now; later one may be. The message is for the user."""


class Refused(Exception):
    """RabbitMQ, or this program, refuses for a reason that waiting won't cure. The message is for the user."""


def nodes(name: str) -> list[pika.URLParameters]:
    """Return the nodes that AMQP_URL names, in random order, so that many workers spread over a cluster.

    name: what RabbitMQ shall call this connection, e.g. in its management UI. Refused if AMQP_URL is not well formed.
    """
    # An empty AMQP_URL is what `AMQP_URL=$UNSET python worker.py` gives: as good as none.
    urls = [url.strip() for url in (os.environ.get("AMQP_URL") or DEFAULT_URL).split(";") if url.strip()]
    found = [_node(url, name) for url in urls or [""]]
    return random.sample(found, len(found))


def _node(url: str, name: str) -> pika.URLParameters:
    try:
        parts = urlsplit(url)
        # An @ behind the host is one of a password that was not encoded: what is taken for the host is a part of it.
        if parts.scheme not in ("amqp", "amqps") or "@" in parts.path + parts.query + parts.fragment:
            raise ValueError
        node = pika.URLParameters(url)
    except Exception:  # pika lets out ValueError, TypeError, IndexError, SyntaxError, OSError, ...
        # What is wrong can't be quoted: a mistyped URL has its password in the oddest places.
        raise Refused(
            "AMQP_URL is not a valid AMQP URL. It must read amqp://USER:PASSWORD@HOST:PORT/VIRTUAL_HOST, with special "
            "characters percent-encoded, pika's parameters behind a ?, and ; between the nodes of a cluster."
        ) from None
    if node.heartbeat is None:
        node.heartbeat = HEARTBEAT_SECONDS
    if node.blocked_connection_timeout is None:
        node.blocked_connection_timeout = BLOCKED_SECONDS
    node.client_properties = {"connection_name": name} | (node.client_properties or {})
    return node


def first_that_answers(candidates: list[pika.URLParameters], connect):
    """Return connect(node) for the first node that lets us in.

    Unreachable if none does now, Refused if every one refuses for a reason that waiting won't cure.
    """
    problems = []
    for node in candidates:
        try:
            return connect(node)
        except Exception as error:  # pika has no common base class for what can happen here
            problems.append(_explained(error, node))
    worth_waiting = [problem for problem in problems if isinstance(problem, Unreachable)]
    raise (worth_waiting or problems)[0]


def _explained(error: Exception, node: pika.URLParameters) -> Exception:
    """Turn what pika raises when it can't connect into one line with a remedy, as Unreachable or Refused."""
    error = _cause(error)
    where, text = f"{node.host}:{node.port}", describe(error)
    # RabbitMQ answers 403 to wrong credentials, 530 to a virtual host that isn't there or isn't ours. pika raises the
    # same two classes when the connection merely breaks at that moment, which waiting does cure.
    if isinstance(error, ProbableAuthenticationError) and "(403)" in text:
        user = node.credentials.username
        remote_guest = user == "guest" and node.host not in ("localhost", "127.0.0.1", "::1")
        hint = "; by default RabbitMQ lets guest in from its own machine only" if remote_guest else ""
        return Refused(f"RabbitMQ at {where} refuses user {user!r}. Check user and password in AMQP_URL{hint}.")
    # A full house ("connection limit (10) is reached") is a 530 as well, and passes.
    if isinstance(error, ProbableAccessDeniedError) and "(530)" in text and "limit (" not in text:
        vhost = node.virtual_host
        return Refused(
            f"RabbitMQ at {where} has no virtual host {vhost!r}, or none that user {node.credentials.username!r} may "
            "use. Check what follows the port in AMQP_URL."
        )
    if isinstance(error, ssl.SSLCertVerificationError):
        reason = error.verify_message.rstrip(".")
        return Refused(
            f"the certificate of {where} is not to be trusted ({reason}). Correct the host in AMQP_URL, or name "
            "the CA's file in SSL_CERT_FILE."
        )
    # A connection that breaks while TLS is set up is an SSLError as well.
    if isinstance(error, ssl.SSLError) and "EOF" not in text:
        return Refused(f"{where} does not speak TLS ({error.reason}). Use amqp://, or the port that is for amqps://.")
    return Unreachable(f"can't reach RabbitMQ at {where} ({text}). Is it running, and does AMQP_URL say where?")


def describe(error: BaseException) -> str:
    """Return an exception of pika's as a few words."""
    error = _cause(error)
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if len(error.args) == 2 and isinstance(error.args[0], int):  # closed by RabbitMQ: reply code and text
        return f"{error.args[1]} ({error.args[0]})"
    return str(error) or type(error).__name__


def _cause(error: BaseException) -> BaseException:
    """Return what is behind an error of pika's: it wraps, say, ConnectionRefusedError in up to three without a text."""
    while True:
        inner = [*getattr(error, "exceptions", []), getattr(error, "exception", None), *error.args[:1]]
        inner = [cause for cause in inner if isinstance(cause, BaseException)]
        if not inner:
            return error
        error = inner[-1]


def printable(text: str) -> str:
    """Return text with control characters escaped: it may come from anyone, and must not steer the terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shown(task: bytes) -> str:
    """Return a task as it is printed: the repr of its text, or of its bytes where it is not UTF-8."""
    try:
        return repr(task.decode())
    except UnicodeDecodeError:
        return repr(task)


def warn(message: str) -> None:
    """Print one line of diagnosis."""
    print(f" [!] {printable(message)}", file=sys.stderr, flush=True)


def end_line_of_ctrl_c() -> None:
    """Let what comes next begin on a line of its own: a terminal shows ^C where Ctrl+C is pressed."""
    if sys.stderr.isatty():
        print(file=sys.stderr)


def tidy_output() -> None:
    """Print line by line also into a pipe, and never fail: what can't be printed must not decide over tasks."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or Path(os.devnull).open("w")  # noqa: SIM115 - None: the shell closed it
        setattr(sys, name, _Output(stream.detach(), stream.encoding, "backslashreplace", line_buffering=True))


class _Output(io.TextIOWrapper):
    """Standard output or error that goes silent, with one line on the other, when nobody takes it any more."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError as error:  # a reader that is gone (`| head`), or a full disk
            with Path(os.devnull).open("w") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            if self is sys.stdout:
                warn(f"can't write to standard output ({error.strerror}); going on without.")
            return len(text)


def settled_arguments(declare, queue: str = QUEUE) -> dict:
    """Return the arguments for declaring a durable queue, once it is fit for use: there, and old enough.

    That is a quorum queue; or a classic one, if that is what an earlier tutorial left here. declare(**settings) must
    do a queue_declare on a channel of its own. Refused if the queue exists with settings of another kind.
    """
    newborn = f"{queue}_is_new"  # a queue that RabbitMQ deletes by itself, there while `queue` is too young for use
    found = _passive(declare, queue)
    if found is None:
        expires = {"x-queue-type": "classic", "x-expires": SETTLE_SECONDS * 1000}
        declare(queue=newborn, durable=True, arguments=expires)
        declare(queue=queue, durable=True, arguments=QUORUM)
        time.sleep(SETTLE_SECONDS)
    # A queue with tasks or workers has been used, so it is old enough: no need to ask.
    elif found.message_count == found.consumer_count == 0 and _passive(declare, newborn):
        time.sleep(SETTLE_SECONDS)
    return _accepted_arguments(declare, queue)


def _passive(declare, queue: str):
    """Return RabbitMQ's declare-ok (with its counts) for a queue, or None if there is no such queue."""
    try:
        return declare(queue=queue, passive=True)
    except ChannelClosedByBroker as error:
        if error.reply_code != 404:
            raise
        return None


def _accepted_arguments(declare, queue: str) -> dict:
    for arguments in (QUORUM, {}):
        try:
            declare(queue=queue, durable=True, arguments=arguments)
            return arguments
        except ChannelClosedByBroker as error:
            if error.reply_code != 406:  # PRECONDITION_FAILED: it exists with other settings
                raise
    raise Refused(
        f"the queue {queue!r} exists with other settings than ours (durable, quorum or classic, nothing else). "
        f"Use another virtual host, or delete it when it is empty: rabbitmqctl delete_queue {queue} --if-empty"
    )
