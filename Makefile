# Everything there is to run. `make` alone lists it; each target sets up what it needs, and nothing twice.
# Kept to what GNU make 3.81 knows, which is what macOS has.

PYTHON ?= python3
ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test bench chaos recording lint dead-letters requeue-dead-letters stop clean rabbitmq queues kill-rabbitmq

# What users run is described behind ##, what maintainers run behind ###.
help: ## list these targets
	@echo "To use it:"
	@awk -F ':.* ## ' '/^[a-z-]+:.* ## / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile
	@echo "To work on it:"
	@awk -F ':.* ### ' '/^[a-z-]+:.* ### / { printf "  make %-20s %s\n", $$1, $$2 }' Makefile

demo: .venv/run ## play four acts on a real RabbitMQ, in a minute
	@.venv/bin/python tools/demo.py

test: .venv/dev ### run the tests on nodes of their own (ARGS="-k name")
	@.venv/bin/python tools/rabbitmq.py programs
	@.venv/bin/python -m pytest $(ARGS)

bench: .venv/dev ### measure the speed (ARGS="--help")
	@.venv/bin/python tools/rabbitmq.py programs
	@.venv/bin/python tools/bench.py $(ARGS)

chaos: .venv/dev ### kill at random, count what is lost (ARGS="--help")
	@.venv/bin/python tools/rabbitmq.py programs
	@.venv/bin/python tools/chaos.py $(ARGS)

recording: .venv/run ### make docs/recording.svg from a real run
	@.venv/bin/python tools/rabbitmq.py programs
	@.venv/bin/python tools/recording.py $(ARGS)

lint: .venv/dev ### check style, formatting and types
	@.venv/bin/python -m ruff check --quiet .
	@.venv/bin/python -m ruff format --quiet --check .
	@.venv/bin/python -m mypy --no-error-summary

dead-letters: .venv/run ## list the tasks that failed too often
	@.venv/bin/python -m task_queue.dead_letters list

requeue-dead-letters: .venv/run ## send the tasks that failed too often again
	@.venv/bin/python -m task_queue.dead_letters requeue

rabbitmq: .venv/run ## find or start a RabbitMQ, as demo does
	@.venv/bin/python tools/rabbitmq.py start

queues: ## list the queues of that RabbitMQ
	@$(PYTHON) tools/rabbitmq.py queues

kill-rabbitmq: ## kill -9 that RabbitMQ, to see what survives
	@$(PYTHON) tools/rabbitmq.py kill

stop: ## stop the RabbitMQ that was started here
	@$(PYTHON) tools/rabbitmq.py stop

clean: ## stop it, and delete it with its data and .venv
	@$(PYTHON) tools/rabbitmq.py stop
	@docker compose -p task-queue-demo down --volumes >/dev/null 2>&1 || true
	@rm -rf .venv .rabbitmq .pytest_cache .ruff_cache .mypy_cache __pycache__ */__pycache__

# What is installed in .venv, as files that are as old as the installation.

.venv/run: requirements.txt .venv/bin/python
	@echo "Installing requirements.txt in .venv"
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt requirements.txt .venv/bin/python
	@echo "Installing requirements-dev.txt in .venv"
	@.venv/bin/python -m pip install -q --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Debian and Ubuntu keep what venv needs, ensurepip, in a package of its own. Not `-m venv`: its answer to Ctrl+C is a
# traceback.
.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || \
		{ echo " [!] $(PYTHON) is missing or older than 3.10: install a newer one, or name it (make PYTHON=python3.13)" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip' 2>/dev/null || \
		tools/apt.sh "$$($(PYTHON) -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" || \
		{ echo " [!] $(PYTHON) has no ensurepip, and this can't install it: sudo apt-get install python3-venv" >&2; exit 1; }
	@echo "Creating .venv with $$($(PYTHON) --version)"
	@$(PYTHON) -c 'import signal as s; s.signal(s.SIGINT, s.SIG_DFL); import venv; venv.main(["--clear", ".venv"])'
