"""What `make check` is for is found by it: each of its own rules is broken once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from worker.demo.stack import CHECKOUT

HELPER = '''
def {name}(items: list[int]) -> int:
    """One of two."""
    total = 0
    for item in items:
        if item > 3:
            total += item * 2
        elif item < 0:
            total -= item
        else:
            total += 1
    print(total)
    return total
'''


def _check(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    found = shutil.which(program, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, f"{program} is not installed: `make setup`"
    return subprocess.run([found, *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=120)


def test_a_helper_that_was_written_twice_is_found(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(HELPER.format(name=name))
    run = _check("arid", "--config", str(CHECKOUT / "pyproject.toml"), str(tmp_path))
    assert run.returncode == 1, run.stderr
    assert "one.py" in run.stdout
    assert "two.py" in run.stdout


def test_a_short_repetition_is_none(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text(
            "\n".join(HELPER.format(name=name).splitlines()[:5]) + "\n        total += item\n"
        )
    assert _check("arid", "--config", str(CHECKOUT / "pyproject.toml"), str(tmp_path)).returncode == 0


def test_an_unsafe_call_is_found(tmp_path: Path) -> None:
    (tmp_path / "unsafe.py").write_text("import subprocess\n\n\ndef run(x):\n    subprocess.call(x, shell=True)\n")
    run = _check("bandit", "--quiet", "--configfile", "pyproject.toml", str(tmp_path / "unsafe.py"))
    assert run.returncode == 1
    assert "B602" in run.stdout
