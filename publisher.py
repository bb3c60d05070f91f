"""What makes new_task.py fast and sure: many tasks under way at once, each one counted until RabbitMQ confirms it.

To wait for the confirm of one task before sending the next costs a round trip per task. So a thread of its own
publishes up to WINDOW tasks ahead, keeps those that are not confirmed, and sends them again if the connection is lost.
pika's BlockingConnection can't do that: it waits for each confirm. Its SelectConnection can.
"""

import collections
import threading
import time
import uuid
from typing import NamedTuple

import pika
from pika.adapters.select_connection import IOLoop
from pika.exceptions import (
    ChannelClosedByBroker,
    ChannelClosedByClient,
    ConnectionBlockedTimeout,
    ConnectionClosedByClient,
)
from pika.spec import Basic

from task_queue import BLOCKED_SECONDS, Refused, Unreachable, describe, first_that_answers, nodes, settled_arguments

# How many tasks, and how many bytes of them, may be on their way without a confirm. They are what memory holds.
WINDOW = 2000
WINDOW_BYTES = 32 * 1024 * 1024

# How long to try before giving up, when nothing is confirmed: a RabbitMQ that restarts is back well before that.
GIVE_UP_SECONDS = 60

# The pause before a task goes out again that RabbitMQ could not store, and between two attempts to reconnect.
PAUSE = 0.5

# How often to try that on one connection. A node of RabbitMQ 3.10 that was cut off from its cluster for a while may
# refuse for good what comes over a connection of that time, though the queue is well again.
MAX_RESTS = 10

NOT_STORED = "RabbitMQ could not store a task, as its queue is full or has no leader."


class NotConfirmed(Exception):
    """RabbitMQ has not confirmed all tasks. The message says why; `confirmed` counts the leading tasks that it has.

    Tasks behind those may have arrived as well: sending them again can double them, but loses none.
    """

    def __init__(self, why: str, confirmed: int):
        super().__init__(why)
        self.confirmed = confirmed


class _Task(NamedTuple):
    number: int  # which of the tasks that send() was given, from 1
    message_id: str  # stays the same when the task is sent again, so that a worker can tell
    body: bytes


class Publisher:
    """A connection that publishes tasks and knows which ones RabbitMQ has confirmed. It may be kept and used again.

    set_up(channel, arguments, on_confirm) is called on each new connection; publish(channel, body, message_id) for
    each task; tell(line), if given, with what the user may want to know meanwhile. An idle Publisher keeps its
    connection alive, and makes a new one when needed. One thread at a time may send. A forked process needs its own.
    """

    def __init__(self, set_up, publish, tell=lambda line: None):
        self.sent = self.confirmed = 0  # how many tasks it was given, ever, and how many RabbitMQ has confirmed
        self._set_up, self._publish, self._tell = set_up, publish, tell
        self._last_number = 0  # of the task that came last
        self._outbox = collections.deque()  # tasks to publish
        self._unconfirmed = {}  # delivery tag -> task that is published and not confirmed
        self._bytes_in = self._bytes_out = 0  # how many bytes of tasks came in, ever, and how many were confirmed
        self._progress = 0.0  # when something was confirmed, or there was nothing to confirm
        self._problem = None  # why nothing is confirmed at the moment
        self._told = False  # whether the user knows that
        self._failure = None  # why nothing ever will be
        self._closed = False
        self._resting = True  # whether nothing may be published now
        self._connected = False
        # Someone who runs a command wants to know at once that RabbitMQ can't be reached. Only when it was there
        # before, and something is under way, is it worth waiting for.
        self._patient = False
        self._awake = False  # whether the publishing thread knows that there are tasks
        self._changed = threading.Condition()  # for the two threads to wait on each other
        self._loop = self._thread = self._broken = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def send(self, tasks) -> int:
        """Publish tasks (an iterable of bytes), and return their number once RabbitMQ has confirmed every one.

        NotConfirmed if it can't be reached, refuses, or confirms nothing for GIVE_UP_SECONDS; the Publisher is closed
        then. What iterating over the tasks raises passes through, and closes it, too. ValueError if it was closed
        before. Memory holds a window of tasks, never all.
        """
        return self.send_numbered(enumerate(tasks, 1))

    def send_numbered(self, tasks) -> int:
        """The same for pairs of a number and a task, where NotConfirmed.confirmed shall speak of those numbers.

        The numbers must rise; some may be left out.
        """
        if self._closed:
            raise ValueError("this Publisher is closed")
        before, self._last_number = self.sent, 0
        if not self._connected:
            self._patient = False
        try:
            for number, body in tasks:
                self._wait(self._has_room, len(body))
                self._hand_over(_Task(number, str(uuid.uuid4()), body))
            self._wait(self._is_done)
        except (Unreachable, Refused) as failure:
            self.close()
            raise NotConfirmed(str(failure), self.leading_confirmed()) from None
        except BaseException:
            self.close()  # or the next send() would take the tasks that are under way for its own
            raise
        return self.sent - before

    def leading_confirmed(self) -> int:
        """Return the number up to which all tasks of the last send() are confirmed."""
        pending = [*self._outbox, *self._unconfirmed.values(), *self._outbox]  # whichever way one is moving just now
        return min((task.number for task in pending), default=self._last_number + 1) - 1

    def check(self) -> None:
        """Raise Unreachable or Refused if there is no hope for the tasks on their way."""
        if self._backlog() and time.monotonic() - self._progress > GIVE_UP_SECONDS:
            why = self._problem or "RabbitMQ confirms nothing. In a cluster, are most of its nodes up?"
            self._failure = self._failure or Unreachable(f"gave up after {GIVE_UP_SECONDS} s: {why}")
        if self._failure:
            raise self._failure

    def close(self) -> None:
        """Close the connection. Tasks that are not confirmed are given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._loop:
                self._loop.add_callback_threadsafe(self._loop.stop)
        if self._thread:
            self._thread.join(1)  # the network may hold it for longer; it is a daemon

    # From here to _hand_over() runs in the thread that sends.

    def _backlog(self) -> int:
        # Not by counting them where they are: a task that is nacked moves, and could be missed.
        return self.sent - self.confirmed

    def _has_room(self, size: int) -> bool:
        backlog = self._backlog()
        return not backlog or (backlog < WINDOW and self._bytes_in - self._bytes_out + size <= WINDOW_BYTES)

    def _is_done(self) -> bool:
        return not self._backlog()

    def _wait(self, condition, *arguments) -> None:
        """Return when condition(*arguments) holds."""
        if condition(*arguments) and not self._failure:
            return
        with self._changed:
            while True:
                self.check()
                if condition(*arguments):
                    return
                self._changed.wait(1)

    def _hand_over(self, task: _Task) -> None:
        if not self._backlog():
            self._progress = time.monotonic()
        self.sent += 1
        self._bytes_in += len(task.body)
        self._outbox.append(task)
        self._last_number = task.number  # behind that, so that a Ctrl+C in between doesn't make it look confirmed
        if not self._awake:
            self._awake = True
            with self._changed:
                if not self._thread:
                    self._thread = threading.Thread(target=self._run, name="publisher", daemon=True)
                    self._thread.start()
                elif self._loop:
                    self._loop.add_callback_threadsafe(self._publish_waiting)
                self._changed.notify_all()

    # From here on all runs in the publishing thread.

    def _run(self) -> None:
        """Publish on one connection after the other, until there is no more to hope for, or close()."""
        while not self._closed:
            try:
                self._connection = first_that_answers(nodes("new_task.py"), self._open)
                self._connected = self._patient = True
                self._problem = None
                self._serve()
                return
            except Refused as failure:
                return self._fail(failure)
            except Unreachable as problem:
                if not self._patient:
                    return self._fail(problem)
                self._complain(str(problem), f"Trying for up to {GIVE_UP_SECONDS} s.")
            except Exception as error:  # pika has no common base class for what can happen here
                if self._backlog():
                    lost = f"Lost RabbitMQ ({describe(error)})."
                    self._complain(lost, "Reconnecting, to send again what is not confirmed.")
            finally:
                self._disconnect()
            self._connected = False
            with self._changed:
                self._changed.wait_for(lambda: self._closed, PAUSE)
                self._changed.wait_for(lambda: self._closed or self._backlog())

    def _complain(self, problem: str, what_follows: str) -> None:
        """Take note of why nothing is confirmed, and tell the user, once until something is confirmed again."""
        self._problem = problem
        if not self._told:
            self._tell(f"{problem} {what_follows}")
        self._told = True

    def _fail(self, failure: Exception) -> None:
        with self._changed:
            self._failure = failure
            self._changed.notify_all()

    def _open(self, node: pika.URLParameters):
        """Return an open connection to a node. Whatever pika raises passes through."""
        self._broken = None
        with self._changed:
            self._loop = IOLoop()
        try:
            return self._reply(
                lambda on_reply: pika.SelectConnection(
                    node,
                    on_open_callback=on_reply,
                    on_open_error_callback=self._on_break,
                    on_close_callback=self._on_break,
                    custom_ioloop=self._loop,
                )
            )
        except BaseException:
            self._disconnect()
            raise

    def _disconnect(self) -> None:
        self._resting = True
        with self._changed:
            loop, self._loop = self._loop, None
        if loop:
            loop.close()

    def _on_break(self, _connection_or_channel, error: Exception) -> None:
        """Pass on why a connection or channel ended, unless we closed it ourselves."""
        if isinstance(error, ChannelClosedByClient):
            return  # the connection's end comes next: RabbitMQ logs a warning for one that goes without a word
        if not isinstance(error, ConnectionClosedByClient):
            self._broken = self._broken or error
        self._loop.stop()

    def _run_loop(self) -> None:
        """Let pika do its work until one of our callbacks stops it. Raise what broke, if something did."""
        self._loop.start()
        broken, self._broken = self._broken, None
        if broken:
            raise broken

    def _reply(self, request):
        """Return RabbitMQ's reply to request(on_reply), a call of pika's that does not wait for it."""
        replies = []

        def on_reply(reply):
            replies.append(reply)
            self._loop.stop()

        request(on_reply)
        while not replies:
            self._run_loop()
        return replies[0]

    def _open_channel(self):
        channel = self._reply(lambda on_reply: self._connection.channel(on_open_callback=on_reply))
        channel.add_on_close_callback(self._on_break)
        return channel

    def _declare(self, **settings):
        """Declare a queue and return RabbitMQ's counts. It closes the channel to say no, so that may need another."""
        if not self._channel.is_open:
            self._channel = self._open_channel()
        return self._reply(lambda on_reply: self._channel.queue_declare(**settings, callback=on_reply)).method

    def _serve(self) -> None:
        """Publish on a new connection until close(). Raise what ended it otherwise."""
        try:
            self._channel = self._open_channel()
            arguments = settled_arguments(self._declare)
            if not self._channel.is_open:
                self._channel = self._open_channel()
            self._channel.add_on_return_callback(self._on_return)
            self._connection.add_on_connection_blocked_callback(self._on_blocked)
            self._connection.add_on_connection_unblocked_callback(self._on_unblocked)
            self._set_up(self._channel, arguments, self._on_confirm)
            if not self._closed:
                self._publish_all()
            while not self._closed:
                self._run_loop()
        except ConnectionBlockedTimeout:
            raise Refused(f"{self._alarm} Free some there; rabbitmq-diagnostics alarms tells more.") from None
        except ChannelClosedByBroker as error:
            if error.reply_code in (403, 405, 406):  # no permission, not our queue, or a task larger than it takes
                raise Refused(f"RabbitMQ refuses: {describe(error)}.") from None
            raise
        self._connection.close()
        self._run_loop()

    def _publish_all(self) -> None:
        """Start with what the connection before this one left without a confirm."""
        self._outbox.extendleft(reversed(self._unconfirmed.values()))
        self._unconfirmed.clear()
        self._tag = self._seen = 0  # the highest delivery tag given, and the highest below which all are confirmed
        self._rests, self._resting = 0, False  # how often in a row it could not store a task
        self._publish_waiting()

    def _publish_waiting(self) -> None:
        self._awake = False  # first, so that a task that comes now wakes us again
        while self._outbox and not self._resting:
            task = self._outbox[0]
            self._tag += 1
            self._unconfirmed[self._tag] = task  # before it leaves the outbox: it must always be seen in one of them
            self._outbox.popleft()
            self._publish(self._channel, task.body, task.message_id)

    def _on_confirm(self, frame) -> None:
        """Take note of a basic.ack or basic.nack for one task, or for all up to that one."""
        if self._broken:
            return  # e.g. a task was given back: RabbitMQ confirms that one, too
        last, several = frame.method.delivery_tag, frame.method.multiple
        tags = range(self._seen + 1, last + 1) if several else (last,)
        if several:
            self._seen = last
        for tag in tags:
            task = self._unconfirmed.get(tag)
            if task is None:
                continue  # confirmed on its own before
            if isinstance(frame.method, Basic.Nack):
                self._outbox.appendleft(task)
            else:
                self.confirmed += 1
                self._bytes_out += len(task.body)
            del self._unconfirmed[tag]
        if isinstance(frame.method, Basic.Nack):
            self._rest()
            return
        self._progress, self._problem, self._told, self._rests = time.monotonic(), None, False, 0
        if self._backlog() <= WINDOW // 2 and self._bytes_in - self._bytes_out <= WINDOW_BYTES // 2:
            with self._changed:
                self._changed.notify_all()

    def _rest(self) -> None:
        """RabbitMQ could not store a task, e.g. as the queue has no leader for a moment: go on after a pause."""
        self._complain(NOT_STORED, "Trying again.")
        if not self._resting:
            self._resting = True
            self._rests += 1
            self._loop.call_later(PAUSE, self._wake_up)

    def _wake_up(self) -> None:
        if self._rests > MAX_RESTS:
            self._broken = Unreachable(NOT_STORED)
            self._loop.stop()
            return
        self._resting = False
        self._publish_waiting()

    def _on_return(self, _channel, method, _properties, _body) -> None:
        self._broken = Refused(f"RabbitMQ gave a task back ({method.reply_text}). Was the queue deleted just now?")
        self._loop.stop()

    def _on_blocked(self, _connection, frame) -> None:
        self._alarm = f"RabbitMQ takes no tasks for now: {frame.method.reason}."
        self._complain(self._alarm, f"Waiting up to {BLOCKED_SECONDS} s.")

    def _on_unblocked(self, _connection, _frame) -> None:
        self._problem = None
