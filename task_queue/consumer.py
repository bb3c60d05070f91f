"""What keeps worker.py going: reconnecting, heartbeats while it works, and a clean end on Ctrl+C and SIGTERM.

The main thread does the tasks; a second one looks after the connection meanwhile. When pika has a connection that
threads can share (it is on its main branch), use it in place of heartbeats() and _look_after().
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from task_queue import DEAD_LETTERS, QUORUM, console, dead_letters, declaration
from task_queue.address import PIKAS_ERRORS, Lost, Refused, Unreachable, close_socket, connect, lost_rabbitmq

# Seconds between two attempts to connect, from the first to the last, shortened at random: many workers must not come
# back at the same moment. After a connection that lasted for GOOD seconds the pause is the first again.
FIRST_PAUSE, LAST_PAUSE, GOOD = 0.5, 3, 30
# How often the connection is looked after during work, and how long a worker that stops waits for RabbitMQ's answer.
TICK_SECONDS, GOODBYE_SECONDS, FOREVER = 0.2, 5, float("inf")
# The signals that end a worker, as the user knows them.
SIGNALS: dict[int, str] = {signal.SIGINT: "Ctrl+C", signal.SIGTERM: "SIGTERM"}
# When a task takes too long, RabbitMQ up to 4.2 closes the channel; from 4.3 on it only cancels the consumer.
TOO_LONG = "RabbitMQ took the task back: it ran longer than consumer_timeout (rabbitmq.conf), or its queue was deleted."


class Stop(BaseException):
    """The user or the service manager wants this worker to end. No `except Exception` in work() holds it up."""


class TaskFailed(Exception):
    """work() raised. The message says what, and where."""


class Channel:
    """pika's channel, with heartbeats during the work. Raises Lost when the connection is gone, Stop after a signal."""

    def __init__(self, graceful: bool):
        self._connection: Any = None
        self._told = False  # whether the user knows that the connection has ended
        self._pika = threading.RLock()  # pika must not be used by two threads at once
        self._pika.acquire()  # the main thread has it, except in heartbeats()
        self._working = False  # whether it has a task, from the delivery to the end of heartbeats()
        self._graceful = graceful  # whether SIGTERM waits for the task in hand; Ctrl+C never does
        self._signal = 0  # the first one that came
        self._leaving = False  # whether we are handing back what we have
        self._deadline = FOREVER  # when we must be gone, once we have said that we stop
        self._pid = os.getpid()
        for signum in SIGNALS:
            signal.signal(signum, self._on_signal)
        os.register_at_fork(after_in_child=self._in_a_child)
        threading.Thread(target=self._look_after, daemon=True).start()

    @lost_rabbitmq()
    def queue_declare(self, queue: str, durable: bool = True, arguments: Any = QUORUM) -> None:
        """Declare a durable quorum queue, and be sure that it is safe to use: see declaration.py."""
        self._channel, self._counts = declaration.declare(self._connection, queue)  # whether it counts deliveries
        self.basic_qos: Any = lost_rabbitmq()(self._channel.basic_qos)  # pika's own, but they raise Lost or Refused
        self.basic_ack: Any = lost_rabbitmq()(self._channel.basic_ack)

    def consume(self, queue: str) -> Iterator[tuple[Any, Any, bytes]]:
        """Yield (method, properties, body) as pika's does; but a task that was delivered ten times is set aside."""
        self._queue, done_at = queue, 0.0
        self._deliveries = self._channel.consume(queue)
        while True:
            self._stop_if_told()
            with lost_rabbitmq():
                delivery = next(self._deliveries, None)
            if not delivery:  # RabbitMQ has ended our consumer, and nothing else
                just_now = time.monotonic() < done_at + TICK_SECONDS
                return console.warn(TOO_LONG if just_now else f"The queue {queue!r} was deleted. Declaring it again.")
            method, properties, task = delivery
            tries = self._earlier_deliveries(method, properties)
            if tries < dead_letters.MAX_DELIVERIES:
                self._working = True
                yield delivery
            else:
                self._set_aside(method, properties, task, tries, "its workers died or were stopped")
            done_at = time.monotonic()

    def heartbeats(self) -> "Channel":
        """In a `with` block of this, RabbitMQ keeps hearing from us. What that raises becomes TaskFailed, or Stop."""
        return self

    def __enter__(self) -> None:
        self._working = True
        self._stop_if_told()
        self._pika.release()

    def __exit__(self, _kind: Any, error: BaseException | None, _trace: Any) -> None:
        self._working = False
        if os.getpid() != self._pid:
            os._exit(0)  # and touch nothing: the task and the connection are the parent's
        self._pika.acquire()
        if error and not isinstance(error, Stop):
            raise TaskFailed(dead_letters.reason(error)) from error

    @lost_rabbitmq()
    def requeue_or_set_aside(self, method: Any, properties: Any, task: bytes, failure: TaskFailed) -> None:
        """Give a task back for another try, after a pause; or set it aside when it has had its tries."""
        tries = self._earlier_deliveries(method, properties) + 1
        if tries >= dead_letters.MAX_DELIVERIES:
            return self._set_aside(method, properties, task, tries, str(failure))
        console.warn(f"Failed {console.shown(task)}: {failure}. It will be tried again.")
        self._connection.sleep(dead_letters.PAUSE_AFTER_FAILURE)
        # A reject, not a nack: every RabbitMQ counts it as a delivery that failed.
        self._channel.basic_reject(method.delivery_tag, requeue=True)

    def _earlier_deliveries(self, method: Any, properties: Any) -> int:
        """Return how many earlier deliveries of a task RabbitMQ has counted. What its sender says doesn't count."""
        headers = properties.headers or {}
        count, acquired = headers.get("x-delivery-count"), headers.get("x-acquired-count")
        if not self._counts or not method.redelivered or not isinstance(count, int):
            return 0
        # RabbitMQ 4.3 leaves the sender's count after a nack. But it writes down how often somebody had the task.
        return min(count, acquired) if isinstance(acquired, int) else count

    @lost_rabbitmq()
    def _set_aside(self, method: Any, properties: Any, task: bytes, tries: int, why: str) -> None:
        """Move a task to the dead letters. If that fails, hold it: handed back, it would return at once."""
        try:
            with self.heartbeats():
                dead_letters.set_aside(task, properties, tries, why)
        except TaskFailed as failure:
            console.warn(f"Can't set aside {console.shown(task)}: {failure.__cause__} Holding it until I stop.")
            self._channel.cancel()  # a consumer that holds a task gets no other one, but a new consumer does
            self._deliveries = self._channel.consume(self._queue)
        else:
            # Only now that RabbitMQ has confirmed the copy: a crash in between leaves two, never none.
            self._channel.basic_ack(method.delivery_tag)
            console.warn(f"Set aside {console.shown(task)} in {DEAD_LETTERS} after {tries} deliveries: {why}")

    def run(self, do_tasks: Callable[["Channel"], None]) -> None:
        """Call do_tasks(self) on one connection after another. Ends with Stop, or Refused if waiting doesn't help."""
        pause, known = FIRST_PAUSE, set[str]()
        while True:
            began, self._told = time.monotonic(), False
            try:
                self._connection = connect("worker.py")
                self._stop_if_told()
                do_tasks(self)
            except Unreachable as problem:
                self._stop_if_told()
                gist = str(problem).partition(" (")[0]  # details, in brackets, change from one attempt to the next
                if gist not in known and not self._told:
                    console.warn(f"{problem} Trying again until it works.")
                known.add(gist)
            with contextlib.suppress(AttributeError, *PIKAS_ERRORS):  # there may be none
                self._connection.close()
            if time.monotonic() > began + GOOD:
                pause, known = FIRST_PAUSE, set()
            for _ in range(int(pause * random.uniform(0.5, 1) / TICK_SECONDS)):
                self._stop_if_told()
                time.sleep(TICK_SECONDS)
            pause = min(2 * pause, LAST_PAUSE)

    def hand_back(self) -> None:
        """Give what we have to RabbitMQ, which gives it to other workers; and say goodbye to it."""
        self._working, self._leaving = False, True
        if self._deadline == FOREVER:
            self._say_goodbye()
        self._pika.acquire()  # a signal may have come before we had it back
        # The connection and the channel may be gone, or not there yet.
        with contextlib.suppress(AttributeError, TypeError, *PIKAS_ERRORS), contextlib.closing(self._connection):
            self._channel.cancel()  # first: or RabbitMQ gives the task to us again
            # RabbitMQ 4 doesn't count a nack as a failure of the task. RabbitMQ 3 does, and puts it behind the others.
            if self._connection._impl.server_properties["version"] >= "4":
                self._channel.basic_nack(0, multiple=True, requeue=True)
        for signum in SIGNALS:  # the exit status is 0, even if another one comes while Python ends
            signal.signal(signum, signal.SIG_IGN)

    def _look_after(self) -> None:
        """The second thread: answer heartbeats during the work."""
        # Signals are for the main thread: one that this thread took would not wake it where it waits for the network.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        while time.monotonic() < self._deadline:
            time.sleep(TICK_SECONDS)
            if self._working and not self._told and self._pika.acquire(blocking=False):
                try:
                    with lost_rabbitmq():
                        self._connection.process_data_events()
                    if not self._channel.is_open:
                        raise Lost(TOO_LONG)
                except (Lost, Refused) as problem:
                    self._told = True
                    console.warn(f"{problem} This task will be done again.")
                except Stop:
                    pass  # the task was done just now: the main thread sees by itself that it must stop
                self._pika.release()
        os._exit(0)

    def _on_signal(self, signum: int, _frame: Any) -> None:
        if self._signal:
            os._exit(0)  # RabbitMQ sees the connection close, and gives the task to another worker
        self._signal = signum
        if self._working and self._graceful and signum == signal.SIGTERM:
            return console.warn("SIGTERM: will stop when this task is done, or at once on a second signal.")
        self._say_goodbye()
        if self._working:
            raise Stop
        with contextlib.suppress(AttributeError, *PIKAS_ERRORS):  # there may be no connection
            self._connection.add_callback_threadsafe(self._stop_if_told)  # pika must not be interrupted

    def _say_goodbye(self) -> None:
        """Say that we stop; and do so in time, even if nobody listens."""
        self._deadline = time.monotonic() + GOODBYE_SECONDS
        what = " The task in hand goes back to the queue." if self._working else ""
        console.warn(f"Stopped by {SIGNALS[self._signal]}.{what}", after_ctrl_c=self._signal == signal.SIGINT)

    def _in_a_child(self) -> None:
        """In a process that work() forked: a signal ends it like any process, and the connection is not its own."""
        close_socket(self._connection)
        for signum in SIGNALS:
            signal.signal(signum, signal.SIG_DFL)

    def _stop_if_told(self) -> None:
        if self._signal and not self._leaving:
            raise Stop


def keep_working(do_tasks: Callable[[Channel], None], usage: str) -> int:
    """Call do_tasks(channel) again and again, until a signal; return the exit status. usage: what --help prints."""
    graceful = bool(console.arguments(usage, lambda words: words in ([], ["--graceful"])))
    channel = Channel(graceful)
    if hasattr(sys.stdout, "reconfigure"):  # the shell has not closed it
        sys.stdout.reconfigure(line_buffering=True)  # for what work() prints
    try:
        channel.run(do_tasks)
    except Stop:
        channel.hand_back()
        return 0
    except Refused as problem:
        console.warn(str(problem))
    return 1
