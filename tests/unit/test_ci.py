"""What CI does beside the make targets: the audit, which must not depend on a way to the network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from worker.demo.stack import CHECKOUT, free_port

AUDIT = CHECKOUT / ".ci" / "audit.py"


def _verdict(*arguments: Any) -> tuple[bool, str]:
    spec = importlib.util.spec_from_file_location("audit", AUDIT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    passes, why = module.verdict(*arguments)
    return passes, why


def _report(*packages: dict[str, Any]) -> str:
    return json.dumps({"dependencies": packages})


FINE = {"name": "good", "version": "1", "vulns": []}
WEAK = {"name": "weak", "version": "1", "vulns": [{"id": "CVE-1", "fix_versions": ["2"]}]}
UNKNOWN = {"name": "unknown", "skip_reason": "Dependency not found: unknown (1)"}


@pytest.mark.parametrize(
    ("status", "report", "errors", "passes", "says"),
    [
        (0, "", "No known vulnerabilities found", True, "No known"),
        (1, _report(FINE, WEAK), "Found 1 known vulnerability", False, "CVE-1"),
        (1, _report(UNKNOWN, WEAK), "Found 1 known vulnerability", False, "CVE-1"),
        (0, _report(FINE, UNKNOWN), "", False, "not found: unknown"),
        (0, _report(UNKNOWN), "", True, "left out"),
        (1, "", "Traceback\nrequests.exceptions.ProxyError: no way out", True, "cannot be reached"),
        (1, "", "Traceback\nrequests.exceptions.ConnectionError: refused", True, "cannot be reached"),
        (1, "", "Could not connect\nERROR:pip_audit._cli:Tip: your network may be blocking this", True, "left out"),
        (1, "", "ERROR:pip_audit._cli:requirement line 3 is malformed", False, "malformed"),
        (2, "", "error: unrecognized arguments: --stricct", False, "unrecognized"),
    ],
)
def test_a_vulnerability_fails_and_a_service_that_is_away_does_not(
    status: int, report: str, errors: str, passes: bool, says: str
) -> None:
    passed, why = _verdict(status, report, errors)
    assert passed is passes
    assert says in why


def test_without_a_network_the_audit_is_left_out(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("celery==5.7.0\n")
    run = subprocess.run(
        [sys.executable, str(AUDIT), "--cache-dir", str(tmp_path), "--requirement", str(requirements)],
        env={**os.environ, "HTTPS_PROXY": nowhere, "HTTP_PROXY": nowhere, "https_proxy": nowhere, "NO_PROXY": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "left out" in run.stdout


def test_ci_names_no_host() -> None:
    for path in filter(Path.is_file, (CHECKOUT / ".ci").iterdir()):
        assert not re.search(r"https?://", path.read_text()), path
