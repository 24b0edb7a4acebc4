"""config/redis/secrets.sh: users in Redis's own form, passwords that stay, certificates by one authority."""

from __future__ import annotations

import hashlib
import re
import subprocess
from pathlib import Path

import pytest

from tests.support.guarded import USERS, environment, make_secrets, password


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_secrets(tmp_path_factory.mktemp("made") / "secrets", "redis.example.com", "10.1.2.3")


def test_each_user_is_a_line_with_its_passwords_hash_and_without_comments(made: Path) -> None:
    default, *users = (made / "redis" / "users.acl").read_text().splitlines()
    assert default == "user default off"
    assert [line.split()[1] for line in users] == list(USERS)
    for line, user in zip(users, USERS, strict=True):
        assert f" on #{hashlib.sha256(password(made, user).encode()).hexdigest()} " in line
        assert password(made, user) not in line
        assert "  " not in line
        assert "nopass" not in line


def test_passwords_are_long_and_each_is_another(made: Path) -> None:
    assert len({password(made, user) for user in USERS}) == len(USERS)
    assert all(len(password(made, user)) == 48 for user in USERS)


def test_flowers_login_is_random_and_stays(made: Path, tmp_path: Path) -> None:
    first = (made / "flower" / "env").read_text()
    assert re.fullmatch(r"FLOWER_BASIC_AUTH=flower:[0-9a-f]{32}\n", first)
    assert (make_secrets(made, "redis.example.com") / "flower" / "env").read_text() == first
    assert (make_secrets(tmp_path / "other") / "flower" / "env").read_text() != first


def test_the_urls_spell_out_tls_and_name_the_first_host(made: Path) -> None:
    found = environment(made, "worker")
    url = found["IDEFICS_BROKER_URL"]
    assert url.startswith(
        f"rediss://worker:{password(made, 'worker')}@redis.example.com:6379/0?ssl_cert_reqs=required&"
    )
    assert f"ssl_ca_certs={made}/worker/ca.crt" in url
    assert f"ssl_certfile={made}/worker/tls.crt&ssl_keyfile={made}/worker/tls.key" in url
    assert found["IDEFICS_RESULT_BACKEND"] == url.replace(":6379/0?", ":6379/1?")


def test_the_server_is_certified_by_its_names(made: Path) -> None:
    certificate = str(made / "redis" / "tls.crt")
    command = ["openssl", "verify", "-CAfile", str(made / "ca.crt"), "-purpose", "sslserver"]
    for name in (["-verify_hostname", "redis.example.com"], ["-verify_ip", "10.1.2.3"], ["-verify_ip", "127.0.0.1"]):
        assert subprocess.run([*command, *name, certificate], capture_output=True).returncode == 0
    others = ["-verify_hostname", "other.example.com"]
    assert subprocess.run([*command, *others, certificate], capture_output=True).returncode != 0


def test_a_users_certificate_is_no_servers(made: Path) -> None:
    command = ["openssl", "verify", "-CAfile", str(made / "ca.crt"), "-purpose"]
    certificate = str(made / "producer" / "tls.crt")
    assert subprocess.run([*command, "sslclient", certificate], capture_output=True).returncode == 0
    assert subprocess.run([*command, "sslserver", certificate], capture_output=True).returncode != 0


def test_containers_may_read_what_they_mount_and_this_machines_users_nothing(made: Path) -> None:
    assert made.stat().st_mode & 0o777 == 0o700
    assert (made / "ca.key").stat().st_mode & 0o777 == 0o600
    for name in ("redis", *USERS):
        assert (made / name / "tls.key").stat().st_mode & 0o777 == 0o644
        assert (made / name / "env").stat().st_mode & 0o777 == 0o600
    assert not list(made.glob("*/ca.key"))


def test_existing_secrets_stay_and_deleted_ones_are_made_anew(tmp_path: Path) -> None:
    folder = make_secrets(tmp_path / "secrets", models="large")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    make_secrets(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    (folder / "producer" / "password").unlink()
    (folder / "worker" / "tls.crt").unlink()
    make_secrets(folder)
    changed = {path.relative_to(folder) for path, content in before.items() if path.read_bytes() != content}
    assert set(map(str, changed)) == {
        "producer/password",
        "producer/env",
        "redis/users.acl",
        "worker/tls.crt",
        "worker/tls.key",
    }


def _patterns(folder: Path) -> set[str]:
    return set(re.findall(r"~([^ )]+)", (folder / "redis" / "users.acl").read_text()))


def test_models_have_their_queues_until_they_are_named_no_more(tmp_path: Path) -> None:
    folder, before = tmp_path / "secrets", _patterns(make_secrets(tmp_path / "without"))
    make_secrets(folder, models="large small-2.5")
    assert _patterns(folder) - before == {
        f"{start}idefics.{model}{end}"
        for model in ("large", "small-2.5")
        for start, end in (("", ""), ("", "??[1-9]"), ("", ":[1-9]"), ("_kombu.binding.", ""))
    } | {f"_kombu.binding_permanent.idefics.{model}" for model in ("large", "small-2.5")}
    make_secrets(folder, models="")
    assert _patterns(folder) == before


@pytest.mark.parametrize("models", ["*", "large callbacks", "a&b", "x~*", "large\n~*"])
def test_a_name_that_no_model_may_have_changes_no_right(tmp_path: Path, models: str) -> None:
    folder = make_secrets(tmp_path / "secrets", models="large")
    before = (folder / "redis" / "users.acl").read_text()
    with pytest.raises(subprocess.CalledProcessError):
        make_secrets(folder, models=models)
    assert (folder / "redis" / "users.acl").read_text() == before
    assert (folder / "models").read_text() == "large\n"
