"""What keeps worker.py going: reconnecting, heartbeats while it works, and a clean end on Ctrl+C and SIGTERM.

None of this is the lesson of worker.py. It is here because a worker that is left running meets all of it.
"""

import contextlib
import os
import random
import re
import signal
import threading
import time

import pika
from pika.exceptions import AMQPError, ChannelClosedByBroker

from task_queue import (
    QUEUE,
    Refused,
    Unreachable,
    describe,
    end_line_of_ctrl_c,
    first_that_answers,
    nodes,
    settled_arguments,
    warn,
)

# Seconds between two attempts to connect: doubled from the first to the last, each one shortened at random by up to
# half, so that many workers don't come back in the same moment. The last keeps the wait for RabbitMQ's return short.
FIRST_PAUSE, LAST_PAUSE = 0.5, 3

# How often the connection is looked after during work: often enough to tell at once that it is lost.
PUMP_SECONDS = 0.2

# How long a worker that is told to stop waits for RabbitMQ to take its task back before it just goes. RabbitMQ takes
# the task back then, too, but only when it notices that the connection is gone.
GOODBYE_SECONDS = 5

# What pika raises when RabbitMQ or the network fails; the last two are its slips on connections that have just closed.
LOST = (AMQPError, OSError, ValueError, AssertionError)

# Up to RabbitMQ 4.2 it closes the channel, from 4.3 on it only cancels the consumer.
TOO_LONG = (
    "RabbitMQ took the task back, as it does when one takes longer than consumer_timeout (30 minutes, unless "
    "rabbitmq.conf says otherwise; raise it there)"
)


class Stop(BaseException):
    """The user or the service manager wants this worker to end. No `except Exception` in work() holds it up."""


def keep_working(do_tasks, graceful: bool = False) -> None:
    """Run do_tasks(channel, keep_alive) on one connection after the other, until a signal ends it.

    graceful: whether SIGTERM waits for the task in hand; Ctrl+C never does.
    Refused if RabbitMQ won't have us, for a reason that waiting doesn't cure.
    """
    signals = Signals(graceful)
    pause, said = FIRST_PAUSE, set()
    try:
        while True:
            try:
                with signals.welcome():
                    connection = first_that_answers(nodes("worker.py"), pika.BlockingConnection)
                work_until_it_ends(connection, do_tasks, signals)
                pause, said = FIRST_PAUSE, set()
            except Unreachable as problem:
                # Once is enough, however long it lasts. Details, in brackets, change from one attempt to the next.
                gist = re.sub(r"\(.*\)", "", str(problem))
                if gist not in said:
                    warn(f"{problem} Trying until it answers.")
                said.add(gist)
            with signals.welcome():
                time.sleep(pause * random.uniform(0.5, 1))
            pause = min(2 * pause, LAST_PAUSE)
    except Stop as stop:
        if signals.first == "Ctrl+C":
            end_line_of_ctrl_c()
        warn(f"Stopped by {signals.first}.{''.join(stop.args)}")


def work_until_it_ends(connection, do_tasks, signals) -> None:
    """Run do_tasks on a connection until that is lost, or RabbitMQ ends it. Unreachable if it never came to work.

    Whatever ended it, the next connection cures it: that is simpler than telling what of this one is still good.
    """
    keep_alive = KeepAlive(connection, signals)
    try:
        do_tasks(keep_alive.channel(), keep_alive)
        warn(why_cancelled(connection))
    except Stop:
        raise Stop(keep_alive.hand_back()) from None
    except LOST as error:
        if getattr(error, "reply_code", None) == 403:
            raise Refused(f"RabbitMQ forbids this user to take tasks: {describe(error)}.") from None
        if not keep_alive.has_waited:  # it will be so again next time, and once is enough to say it
            raise Unreachable(f"RabbitMQ is there, but not ready ({describe(error)}).") from None
        if not keep_alive.lost:  # else it has been said
            warn(f"Lost RabbitMQ ({describe(error)}). Reconnecting.")
    finally:
        keep_alive.end()


def why_cancelled(connection) -> str:
    """Return a line that says why RabbitMQ ended our consumer, though it closed neither channel nor connection."""
    time.sleep(0.5)  # RabbitMQ 4 cancels the consumers of a queue a moment before it deletes the queue
    with contextlib.suppress(*LOST):
        try:
            connection.channel().queue_declare(queue=QUEUE, passive=True)
        except ChannelClosedByBroker as error:
            if "no queue" in error.reply_text:  # and not one whose node is down
                return f"The queue {QUEUE!r} was deleted. Declaring it again."
    return f"{TOO_LONG}. The task will be done again."


def arguments_for(queue: str, connection) -> dict:
    """Return settled_arguments() for a queue, asked for on channels of their own: RabbitMQ says no by closing them."""

    def declare(**settings):
        channel = connection.channel()
        found = channel.queue_declare(**settings).method
        channel.close()
        return found

    return settled_arguments(declare, queue)


def publish_copy(queue: str, task: bytes, properties) -> None:
    """Publish a task to a durable queue, and return when RabbitMQ has confirmed it; else Refused, Unreachable or LOST.

    It takes a connection of its own. RabbitMQ stops listening to one that publishes while memory or disk is short: on
    the worker's own, that would hold up its acknowledgements, and so the very workers that could empty the queue.
    """
    with first_that_answers(nodes("worker.py"), pika.BlockingConnection) as connection:
        channel = connection.channel()
        channel.queue_declare(queue=queue, durable=True, arguments=arguments_for(queue, connection))
        channel.confirm_delivery()
        channel.basic_publish(exchange="", routing_key=queue, body=task, properties=properties, mandatory=True)


class KeepAlive:
    """Answers RabbitMQ's heartbeats while the main thread works.

    pika must not be used by two threads at once, so they share a lock. The main thread holds it all the time, except
    inside `with keep_alive:`, where it works; there the other thread looks after the connection.
    """

    def __init__(self, connection, signals):
        self.lost = False  # whether the connection, or the channel, was lost while we were working
        self.has_waited = False  # whether it came as far as waiting for a task
        self._connection, self._channel, self._signals = connection, None, signals
        self._in_hand = None  # the delivery tag of the task that is not acknowledged yet
        self._ended = False
        self._pika = threading.Lock()
        self._mine = self._pika.acquire()  # whether the main thread holds the lock
        threading.Thread(target=self._pump, daemon=True).start()

    def channel(self):
        """Return the channel to work on."""
        self._channel = self._connection.channel()
        return self._channel

    def until_stopped(self, deliveries):
        """Pass deliveries on. A signal ends the wait for the next one, but never the acknowledgement of the last."""
        self.has_waited = True
        while True:
            with self._signals.welcome():
                delivery = next(deliveries, None)
            if delivery is None:
                return
            self._in_hand = delivery[0].delivery_tag
            yield delivery
            self._in_hand = None

    def __enter__(self):
        self._mine = False
        self._pika.release()
        self._signals.let_in(working=True)

    def __exit__(self, *_):
        self._signals.hold_off()
        self._mine = self._pika.acquire()

    def _pump(self):
        while True:
            time.sleep(PUMP_SECONDS)
            with self._pika:
                if self._ended:
                    return
                try:
                    self._connection.process_data_events()
                    if self._channel.is_open:
                        continue
                    why = TOO_LONG
                except LOST as error:
                    why = f"Lost RabbitMQ ({describe(error)})"
                self.lost = True
                warn(f"{why}. This task will be done again.")
                return

    def hand_back(self) -> str:
        """Give the task in hand, if any, back to RabbitMQ, which gives it to another worker. Return what to tell."""
        if self._in_hand is None:
            return ""
        # The connection may be dead without our knowing it, so this may take very long.
        impatient = threading.Timer(GOODBYE_SECONDS, os._exit, [0])
        impatient.daemon = True
        impatient.start()
        self._mine = self._mine or self._pika.acquire()
        with contextlib.suppress(*LOST):
            self._channel.cancel()  # first: or RabbitMQ gives the task to us again
            # A nack, not a reject: since RabbitMQ 4.3 it doesn't count as a failure of the task.
            self._channel.basic_nack(self._in_hand, requeue=True)
            self._connection.close()
        impatient.cancel()
        return " The task in hand goes back to the queue."

    def end(self) -> None:
        """Let the other thread end, and close the connection unless a signal has cut pika short in its use."""
        self._ended = True
        if self._mine:
            if not self._signals.first:
                with contextlib.suppress(*LOST):
                    self._connection.close()
            self._pika.release()


class Signals:
    """Turns the first Ctrl+C or SIGTERM into Stop, at a moment when nothing is cut in half. A second one exits at once.

    Those moments are while waiting and while working. A Stop amid pika's own work would leave its connection in a
    state in which it can't be used any more, not even to hand the task back.
    """

    def __init__(self, graceful: bool):
        self.first = ""  # the name of the first signal
        self._signum = None
        self._welcome = []  # the signals that may raise Stop now
        self._while_working = [signal.SIGINT] if graceful else [signal.SIGINT, signal.SIGTERM]
        signal.signal(signal.SIGINT, self._on_signal)
        signal.signal(signal.SIGTERM, self._on_signal)
        self._pid = os.getpid()

    def _on_signal(self, signum, _frame):
        if os.getpid() != self._pid:  # a process that work() forked: a signal ends it, as it ends any process
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        if self.first:
            os._exit(0)  # RabbitMQ sees the connection close, and gives the task to another worker
        self.first = "Ctrl+C" if signum == signal.SIGINT else "SIGTERM"
        self._signum = signum
        if signum in self._welcome:
            raise Stop
        if self._welcome:  # we work, and SIGTERM waits for that; print() must not be used in a signal handler
            os.write(2, b" [!] SIGTERM: will stop when this task is done, or at once on a second signal.\n")

    def let_in(self, working: bool = False) -> None:
        """From here on a signal raises Stop, and one that has come meanwhile does so now."""
        self._welcome = self._while_working if working else [signal.SIGINT, signal.SIGTERM]
        if self.first and self._signum in self._welcome:
            raise Stop

    def hold_off(self) -> None:
        """From here on a signal waits for the next let_in()."""
        self._welcome = []

    @contextlib.contextmanager
    def welcome(self):
        """The same for a block."""
        self.let_in()
        try:
            yield
        finally:
            self.hold_off()
