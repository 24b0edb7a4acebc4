"""The wheel is the producers' client: it brings `idefics_jobs` and nothing of the worker."""

from __future__ import annotations

import subprocess
import sys
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from worker.demo.stack import CHECKOUT

SCRIPT = """
import sys
import importlib.util
import idefics_jobs
from celery import Celery
from idefics_jobs import BrokerUnavailable, Caption, Client
from idefics_jobs.testing import FakeClient

assert FakeClient(lambda job: "a cat").submit(Caption(image="https://example.com/a.png")).result().text == "a cat"
assert Client("redis://localhost:1/0").app.conf.result_backend == "redis://localhost:1/1"
try:
    Client(app=Celery("site", broker="redis://localhost:1/0", backend="redis://localhost:1/1")).job("a").cancel()
    raise AssertionError("there is no Redis")
except BrokerUnavailable:
    pass
for name in ("torch", "transformers", "PIL", "tasks", "worker", "config", "requests", "pydantic_settings"):
    assert importlib.util.find_spec(name) is None, name
assert "torch" not in sys.modules
print("imported", idefics_jobs.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    source = tmp_path_factory.mktemp("source") / "checkout"
    # A copy: a build leaves folders behind.
    _copy_sources(source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--outdir", folder, source], check=True, capture_output=True
    )
    return next(folder.glob("*.whl"))


def _copy_sources(target: Path) -> None:
    target.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "idefics_jobs_celery.py"):
        (target / name).write_bytes((CHECKOUT / name).read_bytes())
    for path in (CHECKOUT / "tasks").rglob("*"):
        if path.suffix in (".css", ".html", ".js", ".py", ".typed"):
            copy = target / path.relative_to(CHECKOUT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


def test_the_wheel_holds_the_client_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"idefics_jobs", "idefics_jobs_celery.py"}
    assert "idefics_jobs/py.typed" in names
    assert "idefics_jobs/client.py" in names
    assert "idefics_jobs/cli/main.py" in names
    parts = {name for name in names if name.endswith((".css", ".html", ".js"))}
    assert len(parts) == sum(len(list((CHECKOUT / "tasks").rglob(f"*.{kind}"))) for kind in ("css", "html", "js"))


@pytest.mark.parametrize(
    "pins", [("--constraint", CHECKOUT / "constraints.txt"), ("celery==5.4.0", "kombu<5.5")], ids=["tested", "oldest"]
)
def test_the_wheel_imports_where_torch_tasks_worker_and_config_are_absent(
    wheel: Path, tmp_path: Path, pins: Sequence[str | Path]
) -> None:
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *pins, wheel]
    subprocess.run(install, check=True, capture_output=True)
    done = subprocess.run([python, "-c", SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "imported" in done.stdout
    help_text = subprocess.run([python.parent / "idefics-jobs", "--help"], capture_output=True, text=True)
    assert "submit" in help_text.stdout, help_text.stderr
    celery = subprocess.run([python.parent / "celery", "failed", "--help"], capture_output=True, text=True)
    assert "retry" in celery.stdout, celery.stderr
