"""What new_task.py and worker.py are built on. The lesson is in those two: you don't need this folder to learn it."""

import os
import sys
from typing import Any

# The queue that holds the tasks, and the one for tasks that failed too often.
QUEUE, DEAD_LETTERS = "task_queue", "task_queue_dead_letters"
# A quorum queue has a task on disk (of most nodes, in a cluster) before RabbitMQ confirms it, and counts deliveries.
QUORUM = {"x-queue-type": "quorum"}


def _last_words(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Report what nobody caught: Ctrl+C (in our scripts) and a missing pika in one line each."""
    if isinstance(error, KeyboardInterrupt) and sys.argv[0].endswith(("new_task.py", "worker.py")):
        sends = sys.argv[0].endswith("new_task.py")
        print(" [!] Not sent: interrupted." if sends else " [!] Stopped by Ctrl+C.", file=sys.stderr)
        os._exit(1 if sends else 0)
    elif isinstance(error, ModuleNotFoundError) and error.name == "pika":
        here = "In this folder: make .venv/run, then source .venv/bin/activate."
        print(f" [!] pika is not installed. {here} Elsewhere: pip install -r requirements.txt", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _last_words  # before pika, which takes a moment to import
