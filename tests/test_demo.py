"""`make demo`, on a RabbitMQ that it did not start."""

import os
import subprocess
import sys

from conftest import ROOT


def test_the_demo_plays_the_tutorial_and_loses_nothing(broker):
    environment = {**os.environ, "AMQP_URL": broker.url, "NO_COLOR": "1"}
    demo = subprocess.run(
        [sys.executable, "tools/demo.py"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150
    )
    assert demo.returncode == 0, demo.stdout + demo.stderr
    assert "Left out: the demo did not start this RabbitMQ" in demo.stdout
    assert "Tally: sent 11, done 11, redelivered 2, lost 0" in demo.stdout
    assert demo.stderr == ""
    assert broker.ready() == 0
