"""A channel with confirms: many tasks are on their way at once, and each is kept until RabbitMQ has confirmed it.

pika's BlockingChannel waits for each confirm: a round trip per task. The channel inside of it doesn't wait. So this
publishes there, runs pika's loop when too many tasks wait, and sends again what a lost connection left unconfirmed.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from pika.exceptions import ConnectionBlockedTimeout

from task_queue import QUEUE, QUORUM, console, declaration
from task_queue.address import BLOCKED_SECONDS, Lost, Refused, Unreachable, close_socket, connect, lost_rabbitmq

# How many bytes may wait for a confirm: they are held in memory. A task counts as at least SMALL, so there are at most
# 2000. When the window is full, ROOM bytes must be confirmed before sending goes on: task by task would be slow.
WINDOW, SMALL, ROOM = 32_000_000, 16_000, 3_200_000
# This many tasks leave together, in one system call; fewer, if the last ones left more than so many seconds ago.
BATCH, BATCH_SECONDS = 100, 0.05
# When to give up, if nothing is confirmed: a RabbitMQ that restarts is back well before that. And how long to pause
# before another attempt to connect. If STOPPED_SECONDS pass between two looks at the clock, this program was suspended.
GIVE_UP_SECONDS, PAUSE, STOPPED_SECONDS = 60, 0.5, 6
# How much is read at once, and the longest line: the largest message that RabbitMQ takes, by default.
CHUNK, LONGEST_LINE = 1 << 16, 128 << 20


class NotConfirmed(Exception):
    """RabbitMQ has not confirmed all tasks. The message says why; `confirmed` counts the leading ones that it has.

    Later tasks may have arrived as well: sending them again may double some, but loses none.
    """

    def __init__(self, why: str, confirmed: int):
        super().__init__(why)
        self.confirmed = confirmed


class Channel(contextlib.AbstractContextManager["Channel"]):
    """A channel with pika's names that outlives its connection. Use it in a `with` block, on one thread of one process.

    name: what RabbitMQ will call the connection.
    Each call raises NotConfirmed if RabbitMQ can't be reached at first, refuses, or confirms nothing for
    GIVE_UP_SECONDS; what was not confirmed is given up then. A channel may be kept, and lie idle.
    """

    def __init__(self, name: str):
        self._name, self._queue = name, QUEUE
        self._connection: Any = None
        self._frames: list[bytes] = []  # what is not passed on to the network
        self._messages: dict[int, tuple[int, int, Any]] = {}  # what is not confirmed, by delivery tag: see _publish()
        self._nacked = set[int]()  # those that RabbitMQ could not store: they must be sent again
        self._tag = self._size = 0  # the last delivery tag of this connection, and the size of what is not confirmed
        self._refusal = ""  # why RabbitMQ gave a task back
        self._file: int | None = None  # where each() reads the tasks, if it is a file
        self._number = 0  # how many tasks came since each()
        self._began = self._drawn_at = 0.0  # when that was, and when the progress was drawn
        self._waited = self._looked_at = 0.0  # how long nothing was confirmed, and the time when we looked last
        self._problem, self._told = "", False  # why nothing is confirmed, if we know, and whether the user does

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        if isinstance(error, KeyboardInterrupt):
            error.args = self._not_confirmed("interrupted.").args  # what new_task.py tells
        elif not error:  # RabbitMQ logs a warning about a connection that just ends
            with contextlib.suppress(Exception):  # there may be none; and all that was waited for is confirmed
                self._connection.close()
        self._drop()
        if self._drawn_at > self._began and os.isatty(2):
            console.say("\x1b[K", end="", to=2)  # the progress

    def queue_declare(self, queue: str, durable: bool = True, arguments: Any = QUORUM) -> None:
        """Declare a durable quorum queue (see declaration.py), now and on each new connection. One for a channel."""
        if queue != self._queue:
            self._drop()
        self._queue = queue
        self._on_a_connection(lambda: None)

    def confirm_delivery(self) -> None:
        """As pika's. There is nothing left to do, as this channel asks for confirms on each connection."""

    def each(self, tasks: Iterable[bytes] | IO[bytes]) -> Iterator[bytes]:
        """Yield each of the tasks; of a file, each line that is not empty, as soon as it comes, without its newline."""
        self._file, self._number = tasks.fileno() if hasattr(tasks, "fileno") else None, 0
        self._began = self._drawn_at = time.monotonic()
        yield from tasks if self._file is None else filter(None, self._lines(self._file))

    def basic_publish(
        self, exchange: str, routing_key: str, body: bytes, properties: Any = None, mandatory: bool = False
    ) -> None:
        """Send a task. It is kept until it is confirmed, and sent again if need be: see wait_for_confirms()."""
        size = max(len(body), SMALL)
        if self._size + size > WINDOW or self._nacked or not self._connection:
            self.wait_for_confirms(but=max(1, WINDOW - ROOM - size))
        self._publish(self._number + 1, size, (exchange, routing_key, body, properties, mandatory))
        self._number += 1  # only now: what was not handed over must not look confirmed
        if self._tag % BATCH == 1 or time.monotonic() > self._looked_at + BATCH_SECONDS:
            self._on_a_connection(lambda: self._until(lambda: not self._frames))

    def wait_for_confirms(self, but: int = 0) -> None:
        """Return when RabbitMQ has confirmed every task, or all but so many bytes of them."""
        self._on_a_connection(lambda: self._until(lambda: self._size <= but and not self._nacked))
        if not but:
            self._file = None  # all that each() gave is confirmed, and its file may be closed now

    def _on_a_connection(self, step: Callable[[], None]) -> None:
        """Do step(), on as many connections as it takes. NotConfirmed if there is no hope in another one."""
        while True:
            try:
                with lost_rabbitmq(hopeless=(403, 405, 406)):  # no permission, not our queue, or too large a task
                    if not self._connection:
                        self._connect()
                    return step()
            except Refused as problem:
                raise self._not_confirmed(str(problem)) from None
            except BaseException as problem:  # Ctrl+C, too: it may have hit pika's code anywhere
                self._drop()
                if not isinstance(problem, Unreachable):
                    raise
                self._pause(problem)

    def _pause(self, problem: Unreachable) -> None:
        """Wait before another attempt, and say why. NotConfirmed if there is no hope in that."""
        if isinstance(problem.__cause__, ConnectionBlockedTimeout):
            raise self._not_confirmed(f"{self._problem} Free some there; rabbitmq-diagnostics alarms tells more.")
        if not isinstance(problem, Lost) and not self._looked_at:  # never connected: the user wants to know at once
            raise self._not_confirmed(str(problem))
        if not self._told:
            console.warn(f"{problem} Trying again for up to {GIVE_UP_SECONDS} s.")
        self._problem, self._told = str(problem), True
        time.sleep(PAUSE)
        self._look()

    def _connect(self) -> None:
        """Make a connection, and send again what the one before left without a confirm."""
        self._drop()  # once more, as a Ctrl+C may have cut it short
        self._connection, self._problem, confirms = connect(self._name), "", list[Any]()
        self._connection._impl.add_on_connection_blocked_callback(self._on_blocked)
        self._channel, _ = declaration.declare(self._connection, self._queue)
        self._channel._impl.add_on_return_callback(self._on_return)
        self._channel._impl.confirm_delivery(self._on_confirm, callback=confirms.append)
        self._until(lambda: bool(confirms))
        self._messages = dict(enumerate(self._messages.values(), 1))
        for message in list(self._messages.values()):
            self._publish(*message)

    def _publish(self, number: int, size: int, arguments: Any) -> None:
        """Hand a task over to pika: its number since each(), its size, and the arguments of pika's basic_publish()."""
        connection = self._connection._impl
        # pika makes a system call for each frame, three for a task: keep them here, to be passed on joined.
        connection._adapter_emit_data = self._frames.append
        try:
            self._channel._impl.basic_publish(*arguments)
            self._tag += 1
            self._messages[self._tag] = number, size, arguments
            self._size += size
        except BaseException:  # Ctrl+C, or what pika can't encode: some frames, or the tag, may be missing
            self._drop()
            raise
        del connection._adapter_emit_data

    def _until(self, condition: Callable[[], bool]) -> None:
        """Run pika's loop until condition() holds. Raise what ended the connection, if it did."""
        while not condition():
            connection = self._connection._impl
            if self._frames:
                connection._adapter_emit_data(b"".join(self._frames))
                self._frames.clear()
            connection.ioloop.poll()
            connection.ioloop.process_timeouts()
            if not self._channel.is_open:
                raise self._channel._closing_reason
            self._look()

    def _look(self) -> None:
        """Draw the progress. NotConfirmed if there is no hope, Unreachable if there is none on this connection."""
        now = time.monotonic()
        self._waited += min(now - self._looked_at, STOPPED_SECONDS)
        self._looked_at = now
        if self._file is not None and now > self._drawn_at + console.PROGRESS_SECONDS:
            self._drawn_at = now
            console.draw(self._file, now - self._began, self._number, max(0, self._number - len(self._messages)))
        if self._refusal:
            raise self._not_confirmed(self._refusal)
        if self._nacked and len(self._nacked) == len(self._messages):  # all others are answered
            raise Unreachable("RabbitMQ could not store a task, as its queue is full or has no leader.")
        if self._connection and not self._messages:
            self._waited, self._problem, self._told = 0, "", False
        if self._waited > GIVE_UP_SECONDS:
            cure = f"rabbitmqctl delete_queue {QUEUE} deletes a queue that can't come back."
            why = self._problem or f"RabbitMQ confirms nothing. In a cluster, are most of its nodes up? {cure}"
            raise self._not_confirmed(f"gave up after {GIVE_UP_SECONDS} s: {why}")

    def _drop(self) -> None:
        """Let go of the connection, whatever state it is in. What it has not confirmed must be sent again."""
        connection, self._connection = self._connection, None
        self._frames, self._nacked, self._tag, self._size, self._refusal = [], set(), 0, 0, ""
        if connection:
            close_socket(connection)
            connection._cleanup()

    def _not_confirmed(self, why: str) -> NotConfirmed:
        """Give up what is not confirmed, and return what to raise."""
        self._drop()
        confirmed = min((number - 1 for number, _, _ in self._messages.values()), default=self._number)
        self._messages, self._waited, self._number = {}, 0, confirmed  # what is given up counts no more
        if self._file is not None:
            rest = f"to send the others: tail -n +{confirmed + 1} FILE | python new_task.py -"
            why += f" The first {confirmed} lines are confirmed; {rest}"
        return NotConfirmed(why, confirmed)

    def _lines(self, file: int) -> Iterator[bytes]:
        rest, chunk = bytearray(), b"\n"
        while chunk:
            self._on_a_connection(lambda: self._wait_for_input(file))
            try:
                chunk = os.read(file, CHUNK)
            except OSError as error:
                raise self._not_confirmed(f"can't read standard input ({error.strerror}).") from None
            rest += chunk
            if b"\n" in chunk:
                *lines, rest = rest.split(b"\n")
                yield from map(bytes, lines)
            elif len(rest) > LONGEST_LINE:
                self.wait_for_confirms(but=1)  # for all, as no task is that small; after 0 the file would be forgotten
                raise self._not_confirmed(f"a line is longer than {LONGEST_LINE >> 20} MiB, which no RabbitMQ accepts.")
        if rest:
            yield bytes(rest)

    def _wait_for_input(self, file: int) -> None:
        loop, readable = self._connection._impl.ioloop, list[int]()
        try:
            loop.add_handler(file, lambda _file, events: readable.append(events), loop.READ)
        except PermissionError:  # epoll takes neither a file nor /dev/null, and to read these never takes long
            return
        self._until(lambda: bool(readable))
        loop.remove_handler(file)

    def _on_confirm(self, frame: Any) -> None:
        """pika calls this for a basic.ack or basic.nack, for one task or for all up to that one."""
        last = frame.method.delivery_tag
        up_to_last = itertools.takewhile(lambda tag: tag <= last, self._messages)  # they are in order
        for tag in list(up_to_last) if frame.method.multiple else [last]:
            if frame.method.NAME == "Basic.Nack":
                self._nacked.add(tag)
            elif tag not in self._nacked and not self._refusal:  # RabbitMQ confirms a task that it gave back, too
                self._waited = 0
                self._size -= self._messages.pop(tag)[1]  # its size

    def _on_return(self, _channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        self._refusal = f"RabbitMQ gave a task back ({method.reply_text}). Was the queue deleted just now?"

    def _on_blocked(self, _connection: Any, frame: Any) -> None:
        self._problem = f"RabbitMQ takes no tasks for now: {frame.method.reason}."
        console.warn(f"{self._problem} Waiting up to {BLOCKED_SECONDS} s.")
