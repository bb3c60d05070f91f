"""amqps://: the server must prove who it is. The certificates are made here, for each run."""

import urllib.parse

import pytest
import trustme
from conftest import Node, Shells
from node import free_port


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    """The folder with ca.pem, of the authority that signs RabbitMQ's certificate, and other-ca.pem, of another."""
    folder = tmp_path_factory.mktemp("certificates")
    ca = trustme.CA()
    ca.cert_pem.write_to_path(folder / "ca.pem")
    trustme.CA().cert_pem.write_to_path(folder / "other-ca.pem")
    server = ca.issue_cert("localhost")
    server.private_key_and_cert_chain_pem.write_to_path(folder / "server.pem")
    return folder


@pytest.fixture(scope="module")
def tls_port(authority, tmp_path_factory):
    """The port of a RabbitMQ that speaks TLS there, as localhost and under no other name."""
    port = free_port()
    config = f"""
        listeners.ssl.1 = 127.0.0.1:{port}
        ssl_options.cacertfile = {authority}/ca.pem
        ssl_options.certfile = {authority}/server.pem
        ssl_options.keyfile = {authority}/server.pem
    """
    node = Node(tmp_path_factory.mktemp("tls"), config=config)
    yield node.start() and port
    node.close()


@pytest.fixture
def tls(tls_port):
    shells = Shells(f"amqps://guest:guest@localhost:{tls_port}/")
    yield shells
    shells.close()


def refused(script) -> str:
    """Return the only line of a script that must have refused the server."""
    assert script.ends() == 1
    assert script.output() == []
    (line,) = script.output("stderr")
    return line


def test_a_server_that_the_systems_authorities_vouch_for_is_trusted(tls, authority):
    trust = {"SSL_CERT_FILE": f"{authority}/ca.pem"}
    assert tls.new_task("task", environment=trust).output() == [" [x] Sent 'task'"]
    tls.worker(environment=trust).wait_for("[x] Done")


def test_an_authority_can_be_named_in_the_url(tls, authority):
    options = urllib.parse.quote(str({"cafile": f"{authority}/ca.pem"}))
    assert tls.new_task("task", url=f"{tls.url}?ssl_options={options}").output() == [" [x] Sent 'task'"]


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_server_of_an_unknown_authority_is_refused(tls, authority, script):
    trust = {"SSL_CERT_FILE": f"{authority}/other-ca.pem"}
    assert "is not to be trusted" in refused(tls.start(script, environment=trust))


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_server_under_a_name_that_its_certificate_lacks_is_refused(tls, authority, script):
    trust = {"SSL_CERT_FILE": f"{authority}/ca.pem"}
    url = tls.url.replace("localhost", "127.0.0.1")
    assert "is not to be trusted" in refused(tls.start(script, url=url, environment=trust))


@pytest.mark.parametrize("script", ["new_task.py", "worker.py"])
def test_a_server_without_tls_is_refused(broker, shells, script):
    assert "does not speak TLS" in refused(shells.start(script, url=shells.url.replace("amqp:", "amqps:")))
