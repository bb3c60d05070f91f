"""amqps://: the server must prove who it is. The certificates are made here, for each run."""

import pytest
from conftest import DONE


@pytest.fixture
def tls_shells(shells, tls):
    """Shells whose scripts talk to RabbitMQ over TLS."""
    shells.url = f"amqps://guest:guest@localhost:{tls.port}/"
    return shells


def test_a_server_that_the_systems_authorities_vouch_for_is_trusted(tls_shells, tls):
    trust = {"SSL_CERT_FILE": f"{tls.folder}/ca.pem"}
    tls_shells.send("task", environment=trust)
    tls_shells.worker(environment=trust).wait_for(DONE)


def test_a_server_of_an_unknown_authority_is_refused(tls_shells, tls):
    tls_shells.both_refused("certificate verify failed", environment={"SSL_CERT_FILE": f"{tls.folder}/other-ca.pem"})


def test_a_server_under_a_name_that_its_certificate_lacks_is_refused(tls_shells, tls):
    url = tls_shells.url.replace("localhost", "127.0.0.1")
    trust = {"SSL_CERT_FILE": f"{tls.folder}/ca.pem"}
    tls_shells.both_refused("certificate verify failed", url=url, environment=trust)


def test_a_server_without_tls_is_refused(shells):
    shells.both_refused("TLS with 127.0.0.1", url=shells.url.replace("amqp:", "amqps:"))
