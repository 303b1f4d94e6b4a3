"""compose.yaml: what it allows, the numbers it carries; and redeploy.sh, on a stage."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from daemon.settings import PREFIX, SECRET_FIELDS, Loaded, StoreKind, load_settings, variable_of

COMPOSE = Path(__file__).resolve().parents[2] / "deploy" / "compose"
DOCKERFILE = COMPOSE.parent / "container" / "Dockerfile"
REDEPLOY = COMPOSE / "redeploy.sh"
INSTANCES = ("a", "b")
SERVICES = (*INSTANCES, "firestore")


@pytest.fixture(scope="module")
def file() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((COMPOSE / "compose.yaml").read_text())
    return loaded


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return float(found[1])


def test_there_are_two_instances_and_the_emulator(file: dict[str, Any]) -> None:
    assert tuple(file["services"]) == SERVICES


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little_and_use_little(file: dict[str, Any], name: str) -> None:
    service = file["services"][name]
    assert service["user"] == "10001:10001"
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert [each.partition(":")[0] for each in service["tmpfs"]] == ["/tmp"]
    assert "size=" in service["tmpfs"][0]
    assert re.fullmatch(r"\d+[mg]", service["mem_limit"])
    assert 0 < service["pids_limit"] <= 512
    assert service["restart"] == "unless-stopped"
    assert not {"privileged", "cap_add", "devices", "network_mode", "pid", "ipc"} & set(service)


@pytest.mark.parametrize("name", SERVICES)
def test_a_port_is_published_on_this_host_only(file: dict[str, Any], name: str) -> None:
    published = file["services"][name].get("ports", [])
    assert len(published) == (1 if name in INSTANCES else 0)
    assert all(port.startswith("127.0.0.1:") for port in published)


def test_secrets_are_files_and_none_is_in_the_environment(file: dict[str, Any]) -> None:
    for name in SERVICES:
        environment = file["services"][name]["environment"]
        secret = {variable_of(field) for field in SECRET_FIELDS}
        assert not secret & set(environment), name
    assert all(set(source) == {"file"} for source in file["secrets"].values())
    for name in INSTANCES:
        assert file["services"][name]["secrets"] == list(file["secrets"])


def test_the_images_are_named_by_version(file: dict[str, Any]) -> None:
    tag = file["services"]["firestore"]["image"].rpartition(":")[2]
    assert re.fullmatch(r"\d+\.\d+\.\d+-emulators", tag)
    [build] = {str(file["services"][name]["build"]) for name in INSTANCES}
    context, dockerfile = yaml.safe_load(build).values()
    assert (COMPOSE / context / dockerfile).resolve() == DOCKERFILE


def test_the_instances_differ_only_in_whose_they_are(file: dict[str, Any]) -> None:
    a, b = (yaml.safe_dump(file["services"][name]) for name in INSTANCES)
    own = {
        "WATCHKEEPER_INSTANCE_NAME: a": "WATCHKEEPER_INSTANCE_NAME: b",
        "/var/lib/watchkeeper/a": "/var/lib/watchkeeper/b",
        "http://a:8080": "http://b:8080",
        "PORT_A:-8081": "PORT_B:-8082",
    }
    for each, others in own.items():
        assert a.count(each) == 1
        a = a.replace(each, others)
    assert a == b


@pytest.fixture(params=INSTANCES)
def loaded(
    request: pytest.FixtureRequest,
    file: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> Loaded:
    """The settings as an instance has them: the image's, this file's, and the secrets."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    for name, value in re.findall(r"(WATCHKEEPER_\w+)=(\S+)", DOCKERFILE.read_text()):
        monkeypatch.setenv(name, value)
    given = file["services"][request.param]["environment"]
    assert given["WATCHKEEPER_SECRETS_DIR"] == "/run/secrets"
    for name, value in {**given, "WATCHKEEPER_SECRETS_DIR": str(tmp_path)}.items():
        assert isinstance(value, str), f"{name}: compose would not take it as it is written"
        monkeypatch.setenv(name, value)
    secrets = {"watchkeeper_admin_token": "a-token-of-enough-letters"}
    secrets["watchkeeper_encryption_key"] = base64.b64encode(b"k" * 32).decode()
    assert list(secrets) == list(file["secrets"])
    for name, content in secrets.items():
        (tmp_path / name).write_text(content)
    return load_settings(serving=True)


def test_the_settings_are_complete_and_all_known(loaded: Loaded, file: dict[str, Any]) -> None:
    name = loaded.settings.instance_name
    assert loaded.warnings == ()
    assert loaded.settings.store is StoreKind.FIRESTORE
    assert loaded.settings.advertise_url == f"http://{name}:{loaded.settings.host_port[1]}"
    assert file["services"][name]["ports"][0].endswith(f":{loaded.settings.host_port[1]}")
    host, port = str(loaded.settings.firestore_emulator_host).split(":")
    assert f"--host-port=0.0.0.0:{port}" in file["services"][host]["command"]


def test_what_is_written_is_kept_in_the_volume(loaded: Loaded, file: dict[str, Any]) -> None:
    [volume] = file["services"][loaded.settings.instance_name]["volumes"]
    source, target = volume.split(":")
    assert source in file["volumes"]
    for path in (loaded.settings.state_dir, loaded.settings.shared_dir):
        assert path.is_relative_to(target)


def test_a_stop_is_given_the_time_that_a_drain_may_take(
    loaded: Loaded, file: dict[str, Any]
) -> None:
    service = file["services"][loaded.settings.instance_name]
    assert seconds(service["stop_grace_period"]) > loaded.settings.stop_s()


@pytest.mark.parametrize("name", INSTANCES)
def test_the_health_check_asks_the_instance_alone(file: dict[str, Any], name: str) -> None:
    service = file["services"][name]
    # Not by the service's name: whether the network's names are served is not its health.
    assert service["healthcheck"]["test"] == [
        *("CMD", "watchkeeper", "health", "--url", "http://127.0.0.1:8080")
    ]
    assert service["depends_on"] == {"firestore": {"condition": "service_healthy"}}
    assert "healthcheck" in file["services"]["firestore"]


# --- redeploy.sh, with a compose that only remembers what it was asked ------------------------


STAGE = """\
#!/bin/sh
# Stands for compose. In $STAGE: NAME.state is what an instance is, NAME.next what it is after `up`.
echo "$*" >>"$STAGE/asked"
state() { cat "$STAGE/$1.state"; }
case "$*" in
    "exec -T "*" health --ready "*) case $(state "$3") in ACTIVE | PASSIVE) ;; *) exit 1 ;; esac ;;
    "exec -T "*" status "*) printf '{\\n  "instance": {\\n    "state": "%s",\\n' "$(state "$3")" ;;
    "up -d --no-deps --no-build --force-recreate "*)
        for other in a b; do
            if [ "$(state "$6")" = ACTIVE ] && [ "$other" != "$6" ]; then
                echo ACTIVE >"$STAGE/$other.state"
            fi
        done
        cp "$STAGE/$6.next" "$STAGE/$6.state" ;;
    "logs --tail 20 "*) echo "last words of $4" ;;
esac
"""


class Stage:
    """redeploy.sh with two instances that are only words in files."""

    def __init__(self, directory: Path, a: str, b: str) -> None:
        self.directory = directory
        for name, state in (("a", a), ("b", b)):
            self.write(f"{name}.state", state)
            self.write(f"{name}.next", "PASSIVE")
        self.write("asked", "")
        self.write("compose", STAGE)
        (directory / "compose").chmod(0o755)

    def write(self, name: str, content: str) -> None:
        (self.directory / name).write_text(content)

    def redeploy(self, *options: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [REDEPLOY, *options, self.directory / "compose"],
            env={"PATH": os.environ["PATH"], "STAGE": str(self.directory), "READY_S": "1"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )

    def did(self) -> list[str]:
        """What changed something, in order."""
        asked = (self.directory / "asked").read_text().splitlines()
        return [
            " ".join((line.split()[0], line.split()[-1]))
            for line in asked
            if "up" in line or line.split()[0] in ("build", "pull")
        ]


@pytest.mark.parametrize(
    ("a", "b", "order"),
    [
        ("ACTIVE", "PASSIVE", "ba"),
        ("PASSIVE", "ACTIVE", "ab"),
        ("gone", "ACTIVE", "ab"),
        ("ACTIVE", "gone", "ba"),
        ("gone", "PASSIVE", "ab"),
        ("PASSIVE", "PASSIVE", "ba"),
    ],
)
def test_whoever_serves_is_replaced_last(tmp_path: Path, a: str, b: str, order: str) -> None:
    stage = Stage(tmp_path, a, b)
    done = stage.redeploy()
    assert done.returncode == 0, done.stderr
    assert stage.did() == ["build a", *(f"up {name}" for name in order)]


@pytest.mark.parametrize(("option", "did"), [("--pull", ["pull a"]), ("--no-build", [])])
def test_the_image_is_fetched_or_left_as_it_is(tmp_path: Path, option: str, did: list[str]) -> None:
    stage = Stage(tmp_path, "ACTIVE", "PASSIVE")
    assert stage.redeploy(option).returncode == 0
    assert stage.did() == [*did, "up b", "up a"]


def test_an_instance_that_does_not_become_ready_ends_it(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "ACTIVE", "PASSIVE")
    stage.write("b.next", "BOOTING")
    done = stage.redeploy("--no-build")
    assert done.returncode == 1
    assert "last words of b" in done.stderr
    assert "b is not ready after 1 s" in done.stderr
    assert "a was left alone and serves" in done.stderr
    assert stage.did() == ["up b"]


def test_nothing_is_replaced_while_the_other_one_could_not_serve(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "gone", "gone")
    done = stage.redeploy("--no-build")
    assert done.returncode == 1
    assert "b is not ready, and would have to serve without a" in done.stderr
    assert stage.did() == []


def test_an_unknown_option_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    stage = Stage(tmp_path, "ACTIVE", "PASSIVE")
    done = stage.redeploy("--force")
    assert (done.returncode, stage.did()) == (2, [])
    assert "usage:" in done.stderr


def test_the_script_stops_at_the_first_failure_and_shellcheck_finds_nothing() -> None:
    assert "\nset -euo pipefail\n" in REDEPLOY.read_text()
    assert REDEPLOY.stat().st_mode & 0o111
    if shutil.which("shellcheck") is None and not os.environ.get("CI"):
        pytest.skip("needs shellcheck")
    done = subprocess.run(["shellcheck", REDEPLOY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
