"""What new_task.py and worker.py stand on. The lesson is in these two; nobody needs this folder to learn it."""

import sys

from task_queue import console

sys.excepthook = console.last_words  # before pika, which takes a moment to import

try:
    import pika  # noqa: F401
except ModuleNotFoundError as error:
    help = "In this folder: make .venv/run, then source .venv/bin/activate. Elsewhere: pip install -r requirements.txt"
    raise ImportError(f"pika is not installed. {help}", name=error.name) from None

# The queue that holds the tasks, and the one for tasks that failed too often.
QUEUE, DEAD_LETTERS = "task_queue", "task_queue_dead_letters"

# A quorum queue writes each task to disk (on most nodes, in a cluster) before it confirms it, and counts deliveries.
QUORUM = {"x-queue-type": "quorum"}
