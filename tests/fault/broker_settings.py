"""How the fault suite's broker is set up: a way in for every fault.

PLAINTEXT  for the tests themselves, administrator
PROXIED    what relays use: the broker tells them to come back through the proxy
SASL       SCRAM over TLS: a user with a password and rights that can be taken away
TLS        a certificate of a CA of the suite's own
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import trustme
from confluent_kafka.admin import AdminClient
from confluent_kafka.admin._scram import (
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key

from cdc_outbox.demo.ports import free_port

USER: Final = "relay"
PASSWORD: Final = "hunter2-sasl"
MECHANISM: Final = "SCRAM-SHA-512"


@dataclass(slots=True)
class BrokerPorts:
    proxied: int = field(default_factory=free_port)
    proxy: int = field(default_factory=free_port)
    sasl: int = field(default_factory=free_port)
    tls: int = field(default_factory=free_port)


def settings(ports: BrokerPorts, keystore: Path) -> dict[str, str]:
    own = f"PLAINTEXT://127.0.0.1:{{port}},SASL://127.0.0.1:{ports.sasl},TLS://127.0.0.1:{ports.tls}"
    return {
        "listeners": f"{own},PROXIED://127.0.0.1:{ports.proxied},CONTROLLER://127.0.0.1:{{controller_port}}",
        "advertised.listeners": f"{own},PROXIED://127.0.0.1:{ports.proxy}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT,"
        "SASL:SASL_SSL,TLS:SSL",
        "inter.broker.listener.name": "PLAINTEXT",
        "sasl.enabled.mechanisms": MECHANISM,
        "listener.name.sasl.scram-sha-512.sasl.jaas.config": (
            "org.apache.kafka.common.security.scram.ScramLoginModule required;"
        ),
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(keystore),
    }


def make_user(bootstrap_servers: str) -> None:
    """The SASL listener's, kept by the broker itself."""
    admin = AdminClient({"bootstrap.servers": bootstrap_servers})
    info = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    change = UserScramCredentialUpsertion(USER, info, PASSWORD.encode())
    admin.alter_user_scram_credentials([change])[USER].result()


def make_certificates(folder: Path) -> tuple[Path, Path]:
    """The broker's keystore, and the CA's certificate that its clients need."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    # Kafka reads keys in PKCS #8 only
    key = load_pem_private_key(certificate.private_key_pem.bytes(), password=None)
    chain = b"".join(part.bytes() for part in certificate.cert_chain_pems)
    keystore, ca = folder / "broker.pem", folder / "ca.pem"
    keystore.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + chain)
    authority.cert_pem.write_to_path(str(ca))
    return keystore, ca
