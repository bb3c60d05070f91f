# The two scripts as an image: a worker by default, and `python new_task.py WORD ...` sends a task from the same image.
FROM python:3.13-slim
WORKDIR /app

# First what seldom changes, so that an edit of a script rebuilds only the last layer.
COPY requirements.txt ./
RUN pip install --no-cache-dir --root-user-action=ignore -r requirements.txt

COPY *.py ./
COPY task_queue task_queue

# Not as root. A number, not a name, lets Kubernetes check that (runAsNonRoot).
USER 65534:65534

# As a list, so that no shell stands in between: the SIGTERM of `docker stop` must reach the worker itself.
CMD ["python", "worker.py"]
