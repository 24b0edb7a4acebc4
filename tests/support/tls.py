"""TLS servers with certificates that are signed by themselves."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path


def server_context(folder: Path, name: str) -> ssl.SSLContext:
    """Serves `name`, with a certificate that openssl makes in the folder: `crt`."""
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN={name}"
    files = ["-addext", f"subjectAltName=DNS:{name}", "-keyout", str(folder / "key"), "-out", str(folder / "crt")]
    subprocess.run([*command.split(), *files], check=True, capture_output=True, timeout=120)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "crt", folder / "key")
    return context
