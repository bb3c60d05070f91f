"""The same two scripts on a cluster of three RabbitMQ nodes: nodes die, freeze and restart, and no task is lost."""

import itertools
import json
import threading

import psutil
import pytest
from conftest import DONE, Broker, Node, Shells, finish, frozen, say
from node import cluster_nodes
from processes import wait_until

from task_queue import QUEUE


class Cluster(Broker):
    """Three nodes on loopback, and what a test asks them. The first is asked, unless it is down."""

    def __init__(self, nodes: list[Node]):
        self.nodes = nodes

    @property
    def node(self) -> Node:
        return next(node for node in self.nodes if node.running)

    @property
    def url(self) -> str:
        """AMQP_URL for the scripts: all nodes. Of one that freezes only the missing heartbeats tell."""
        return ";".join(f"{node.url}?heartbeat=2" for node in self.nodes)

    def queue(self, asked: Node | None = None) -> dict:
        """What rabbitmqctl tells of task_queue: {"leader": name of a node, "online": names of nodes}."""
        queues = json.loads((asked or self.node).ctl("list_queues", "name", "leader", "online", "--formatter", "json"))
        missing = {"leader": None, "online": []}  # as it is for a moment, when its leader is out of reach
        return next((queue for queue in queues if queue["name"] == QUEUE), missing)

    def leader(self, asked: Node | None = None) -> Node | None:
        """The node that leads the queue, as far as the asked one knows. None while there is no leader."""
        name = self.queue(asked)["leader"]
        return next((node for node in self.nodes if node.name == name), None)

    def start(self) -> None:
        """Start the nodes that are down, all at once."""
        for node in self.nodes:
            node.launch()
        for node in self.nodes:
            node.wait_until_ready()

    def wait_until_whole(self) -> None:
        """Return when the queue is up on all three nodes."""
        wait_until(lambda: len(self.queue()["online"]) == 3, "the queue is online on three nodes", within=120)

    def part(self, node: Node) -> None:
        """Break the network between a node and the two others until it is restarted: their cookies differ now."""
        part = "erlang:set_cookie('{0}', other), erlang:disconnect_node('{0}')".format
        # Both at once: Erlang would part the others, too, if one of them still saw the node.
        node.ctl("eval", ", ".join(part(other.name) for other in self.others(node)) + ".")

    def others(self, node: Node) -> list[Node]:
        return [other for other in self.nodes if other != node]


@pytest.fixture(scope="module")
def all_nodes(tmp_path_factory):
    cluster = Cluster(cluster_nodes(tmp_path_factory.mktemp("cluster")))
    try:
        cluster.nodes[0].start()  # which the others join
        yield cluster
    finally:
        for node in cluster.nodes:
            node.close()


@pytest.fixture
def cluster(all_nodes):
    """A cluster of which all nodes run, with an empty task_queue on all of them."""
    all_nodes.start()
    all_nodes.empty()
    all_nodes.wait_until_whole()
    return all_nodes


class Load:
    """Tasks that flow through `new_task.py -` to four workers, twenty a second. Every tenth takes a second."""

    def __init__(self, cluster: Cluster, shells: Shells):
        self._cluster, self._shells = cluster, shells
        self.workers = [shells.worker() for _ in range(4)]
        self._producer = shells.feed()
        self._tasks: list[str] = []
        self._ended = threading.Event()
        self._feeder = threading.Thread(target=self._feed)
        self._feeder.start()
        self.wait_until_all_work()

    def _feed(self) -> None:
        while not self._ended.wait(1 / 20):
            number = len(self._tasks)
            self._tasks.append(f"task {number}{'' if number % 10 else '.'}")
            say(self._producer, self._tasks[-1])

    def workers_on(self, node: Node) -> list:
        """The workers that are connected to a node; if need be, more are started until there is one."""
        while not (found := [worker for worker in self.workers if is_connected(worker, node)]):
            self.workers.append(self._shells.worker())
        return found

    def wait_until_all_work(self, workers=None, within: float = 60) -> None:
        """Return when each of the workers has done two more tasks: it has received the second one after now."""
        expected = [(worker, worker.output().count(DONE) + 2) for worker in workers or self.workers]
        for worker, times in expected:
            worker.wait_for(DONE, times, within)

    def finish(self) -> None:
        """See that all nodes are back, and all workers work; then that every task was reported sent and is done."""
        self._cluster.wait_until_whole()
        self.wait_until_all_work()
        self._ended.set()
        self._feeder.join()
        finish(self._producer, len(self._tasks), within=90)
        wait_until(lambda: set(self._tasks) <= self.done(), "every task is done", within=60)
        for script in (self._producer, *self.workers):
            assert all(line.startswith(" [!] ") for line in script.output("stderr")), str(script)
        assert all(worker.running for worker in self.workers)

    def stop(self) -> None:
        """Send no more. For the end of a test that failed."""
        self._ended.set()
        self._producer.kill()
        self._feeder.join()

    def done(self) -> set[str]:
        """The tasks that were done."""
        pairs = [pair for worker in self.workers for pair in itertools.pairwise(worker.output())]
        return {line.split("'")[1] for line, following in pairs if following == DONE}


@pytest.fixture
def load(cluster, shells):
    load = Load(cluster, shells)
    yield load
    load.stop()


def is_connected(worker, node: Node) -> bool:
    """Whether a script is connected to a node, as the kernel knows it."""
    sockets = psutil.Process(worker.process.pid).net_connections()
    return any(socket.raddr and socket.raddr.port == node.port for socket in sockets)


def test_the_node_that_leads_the_queue_is_killed_and_comes_back(cluster, load):
    leader = cluster.leader()
    orphans = load.workers_on(leader)
    leader.kill()
    load.wait_until_all_work(orphans, within=15)
    load.wait_until_all_work()
    assert all("Lost RabbitMQ" in str(worker) for worker in orphans)
    assert cluster.leader() != leader

    leader.start()
    load.finish()


@pytest.mark.parametrize("leads", [False, True], ids=["another", "the leader"])
def test_a_node_that_freezes_is_given_up_and_taken_back(cluster, load, leads):
    leader = cluster.leader()
    still = leader if leads else cluster.others(leader)[0]
    orphans = load.workers_on(still)
    with frozen(still):
        for worker in orphans:
            worker.wait_for("Lost RabbitMQ", within=60)
        if not leads:  # without its leader the queue may stand still until the node is back
            load.wait_until_all_work(within=90)  # a worker may try the frozen node, too, for 15 s a time
            assert not any(is_connected(worker, still) for worker in load.workers)
    load.finish()


def test_a_node_that_is_cut_off_from_the_others_is_done_without_and_taken_back(cluster, shells, load):
    cut_off = cluster.leader()
    rest = cluster.others(cut_off)
    load.workers_on(rest[0])
    cluster.part(cut_off)
    peers = cut_off.ctl("eval", "nodes().")
    assert not any(node.name in peers for node in rest)
    wait_until(lambda: cluster.leader(asked=rest[0]) in rest, "another node leads the queue", within=60)
    shells.send("elsewhere", url=rest[0].url)  # the load may be sent to the node that is cut off
    wait_until(lambda: "elsewhere" in load.done(), "the others go on", within=60)
    cut_off.stop()  # RabbitMQ 3.10 stays in two halves until one is restarted
    cut_off.start()
    load.finish()


def test_each_node_in_turn_is_restarted(cluster, load):
    for node in cluster.nodes:
        node.stop()
        node.start()
        cluster.wait_until_whole()
    load.finish()


def test_with_two_of_three_nodes_down_producers_fail_and_workers_wait(cluster, shells, changed):
    impatient = changed("new_task", "publisher.GIVE_UP_SECONDS = 5")
    worker = shells.worker()
    shells.send("before")
    worker.wait_for(DONE)
    leader = cluster.leader()
    second = cluster.others(leader)[0]
    for node in (leader, second):
        node.kill()

    producer = shells.start(impatient, "while down")
    assert (producer.ends(), producer.output()) == (1, [])
    assert producer.output("stderr")[-1].startswith(" [!] Not sent: gave up after 5 s: RabbitMQ ")
    newcomer = shells.start("worker.py")
    patient = shells.start("new_task.py", "patient")
    assert worker.running

    second.start()
    assert patient.ends(60) == 0, str(patient)
    shells.send("after")
    for task in ("patient", "after"):
        wait_until(lambda t=task: f"Received '{t}'" in f"{worker}{newcomer}", f"{task!r} is taken", within=60)
    for number in range(8):  # each takes a second, so both workers are needed
        shells.send(f"all together {number}.")
    for script in (worker, newcomer):
        script.wait_for("Received 'all together")
        assert all(line.startswith(" [!] ") for line in script.output("stderr")), str(script)
