#!/usr/bin/env python3
"""Makes an authority and one certificate a role, to try mutual TLS on one machine. Not for production: the authority's key lies
beside them.

    make_certificates.py DIR [--hosts 127.0.0.1 localhost] [--days 30]

DIR/ca.crt, ca.key, and ROLE.crt, ROLE.key for client, admin, coordinator, worker and decode. Needs the openssl program.
"""

import argparse
import ipaddress
import subprocess
import sys
import tempfile
from pathlib import Path

ROLES = ("client", "admin", "coordinator", "worker", "decode")
TRUST_DOMAIN = "headwater.example"


class CertificateError(Exception):
    """openssl is missing or refuses; the message has its words."""


def _openssl(*words) -> None:
    try:
        done = subprocess.run(["openssl", *map(str, words)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CertificateError(f"openssl: {error}") from error
    if done.returncode != 0:
        raise CertificateError(f"openssl {words[0]}: {done.stderr.strip()[-500:]}")


def _new_key(*words) -> None:
    _openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", *words)


def host_name(host: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(host)}"
    except ValueError:
        return f"DNS:{host}"


def make_certificates(directory: Path, hosts=("127.0.0.1", "localhost"), days: int = 30) -> None:
    """Replaces what is in the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    _new_key("-x509", "-days", days, "-subj", "/CN=Headwater trial authority", "-keyout", directory / "ca.key",
             "-out", directory / "ca.crt")
    names = ",".join(host_name(host) for host in hosts)
    with tempfile.TemporaryDirectory() as folder:
        request, extensions = Path(folder) / "request", Path(folder) / "extensions"
        for role in ROLES:
            extensions.write_text(f"subjectAltName={names},URI:spiffe://{TRUST_DOMAIN}/ns/headwater/{role}\n"
                                  "extendedKeyUsage=serverAuth,clientAuth\nbasicConstraints=CA:FALSE\n", encoding="utf-8")
            _new_key("-subj", f"/CN={role}", "-keyout", directory / f"{role}.key", "-out", request)
            _openssl("x509", "-req", "-in", request, "-CA", directory / "ca.crt", "-CAkey", directory / "ca.key", "-CAcreateserial",
                     "-days", days, "-extfile", extensions, "-out", directory / f"{role}.crt")
    for key in directory.glob("*.key"):
        key.chmod(0o600)


def tls_flags(directory: Path, role: str) -> list:
    return [f"--tls_cert={directory / role}.crt", f"--tls_key={directory / role}.key", f"--tls_ca={directory / 'ca.crt'}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--hosts", nargs="+", default=["127.0.0.1", "localhost"], help="names and addresses of the servers")
    parser.add_argument("--days", type=int, default=30)
    arguments = parser.parse_args()
    try:
        make_certificates(arguments.directory, arguments.hosts, arguments.days)
    except (CertificateError, OSError) as error:
        print(f"make_certificates: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.directory}: ca.crt, and .crt and .key of {', '.join(ROLES)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
