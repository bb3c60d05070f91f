"""The tutorial's experiments, on a real RabbitMQ, with the scripts as real processes."""


def test_hello_world(broker, shells):
    worker = shells.worker()
    assert shells.new_task().output() == [" [x] Sent 'Hello World!'"]
    worker.wait_for("[x] Done")
    assert worker.output() == [
        " [*] Waiting for messages. To exit press CTRL+C",
        " [x] Received 'Hello World!'",
        " [x] Done",
    ]
