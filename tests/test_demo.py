"""`make demo`, on a RabbitMQ that it did not start."""


def test_the_demo_plays_the_tutorial_and_loses_nothing(broker, shells):
    demo = shells.start("tools/demo.py", environment={"NO_COLOR": "1"})
    assert demo.ends(within=150) == 0, str(demo)
    assert "Left out: the demo did not start this RabbitMQ" in str(demo)
    assert "Tally: sent 11, done 11, redelivered 2, lost 0" in str(demo)
    assert demo.output("stderr") == []
    assert broker.ready() == 0
