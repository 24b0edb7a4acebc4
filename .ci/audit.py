"""pip-audit on the pinned packages, for a machine that may have no way to the service that it asks.

A vulnerability fails, and so does what a service that answers cannot say of one package. A service that cannot be
reached says nothing: that passes, and is told.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

#: What the last line of pip-audit's errors names where the network, or the service, did not answer.
_UNREACHED = re.compile(
    r"\b(?:\w*ConnectionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|HTTPError|ServiceError)\b"
    r"|network may be blocking|could not connect",
    re.IGNORECASE,
)


def verdict(status: int, report: str, errors: str) -> tuple[bool, str]:
    """Whether the packages pass, and why, from pip-audit's exit status, its JSON and what it wrote to stderr."""
    if report.strip():
        return _of_report(json.loads(report)["dependencies"])
    if status == 0:
        return True, "No known vulnerabilities."
    last = errors.strip().rpartition("\n")[2]
    if _UNREACHED.search(last):
        return True, f"The audit is left out: its service cannot be reached ({last[:200]})."
    return False, errors


def _of_report(packages: list[dict[str, object]]) -> tuple[bool, str]:
    found = [
        f"{package['name']}: {vulnerability}" for package in packages for vulnerability in _vulnerabilities(package)
    ]
    skipped = [str(package["skip_reason"]) for package in packages if "skip_reason" in package]
    if found:
        return False, "\n".join(found)
    if packages and len(skipped) == len(packages):
        # As a mirror does that has the packages and not their vulnerabilities.
        return True, f"The audit is left out: its service knows none of the packages ({skipped[0]})."
    return not skipped, "\n".join(skipped) or "No known vulnerabilities."


def _vulnerabilities(package: dict[str, object]) -> list[object]:
    found = package.get("vulns")
    return found if isinstance(found, list) else []


def main(arguments: list[str]) -> int:
    program = Path(sys.executable).parent / "pip-audit"
    command = [str(program), "--no-deps", "--disable-pip", "--format", "json", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    passes, why = verdict(run.returncode, run.stdout, run.stderr)
    sys.stdout.write(f"{why}\n")
    return 0 if passes else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
