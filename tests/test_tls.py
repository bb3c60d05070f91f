"""amqps://: the server must prove who it is. The certificates are made here, for each run."""

import contextlib
import urllib.parse

import pytest
from conftest import DONE, Shells, refused


@pytest.fixture
def tls(broker, tls_port):
    with contextlib.closing(Shells(f"amqps://guest:guest@localhost:{tls_port}/")) as shells:
        yield shells


def test_a_server_that_the_systems_authorities_vouch_for_is_trusted(tls, authority):
    trust = {"SSL_CERT_FILE": f"{authority}/ca.pem"}
    tls.send("task", environment=trust)
    tls.worker(environment=trust).wait_for(DONE)


def test_an_authority_can_be_named_in_the_url(tls, authority):
    options = urllib.parse.quote(str({"cafile": f"{authority}/ca.pem"}))
    tls.send("task", url=f"{tls.url}?ssl_options={options}")


def assert_both_refuse(shells, url: str, why: str, authority: str = "") -> None:
    for script in ("new_task.py", "worker.py"):
        assert why in refused(shells.start(script, url=url, environment={"SSL_CERT_FILE": authority}))


def test_a_server_of_an_unknown_authority_is_refused(tls, authority):
    assert_both_refuse(tls, tls.url, "is not to be trusted", f"{authority}/other-ca.pem")


def test_a_server_under_a_name_that_its_certificate_lacks_is_refused(tls, authority):
    url = tls.url.replace("localhost", "127.0.0.1")
    assert_both_refuse(tls, url, "is not to be trusted", f"{authority}/ca.pem")


def test_a_server_without_tls_is_refused(broker, shells):
    assert_both_refuse(shells, shells.url.replace("amqp:", "amqps:"), "does not speak TLS")
