"""The container image: built from the Dockerfile, and run as an orchestrator would run it."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.deploy.engine import IMAGE, NODE_IMAGE, PYTHON_IMAGE, ROOT, Container, Engine
from tests.deploy.host import wait_until

pytestmark = [pytest.mark.system, pytest.mark.long]

DOCKERFILE = ROOT / "deploy" / "container" / "Dockerfile"
TOKEN = "the-token-of-the-container-tests"
HARDENED = (
    *("--network", "none", "--read-only", "--cap-drop=all"),
    *("--security-opt", "no-new-privileges", "--tmpfs", "/tmp:rw,size=16m,mode=1777"),
)
LOOPBACK = (
    *("-e", "WATCHKEEPER_CONNECTOR=loopback", "-e", f"WATCHKEEPER_ADMIN_TOKEN={TOKEN}"),
    *("-e", "WATCHKEEPER_ADVERTISE_URL=http://127.0.0.1:8080"),
)

Start = Callable[..., Container]


@pytest.fixture(scope="module")
def engine(bases: Engine) -> Engine:
    """An engine with the image built on the stand-ins."""
    bases.build(
        *(ROOT, DOCKERFILE, IMAGE),
        *("--ignorefile", str(ROOT / ".dockerignore")),
        *("--build-arg", f"PYTHON_IMAGE={PYTHON_IMAGE}"),
        *("--build-arg", f"NODE_IMAGE={NODE_IMAGE}"),
    )
    return bases


@pytest.fixture
def start(engine: Engine) -> Iterator[Start]:
    """Start the image, hardened, on loopback, with these further options."""
    started: list[Container] = []

    def start(*options: str, command: tuple[str, ...] = ()) -> Container:
        name = f"wk-{uuid.uuid4().hex[:8]}"
        engine.podman("run", "-d", "--name", name, *HARDENED, *LOOPBACK, *options, IMAGE, *command)
        started.append(Container(engine, name))
        return started[-1]

    yield start
    for container in started:
        engine.podman("rm", "--force", "--time", "0", container.name, check=False)


def wait_well(container: Container) -> None:
    def looks() -> bool:
        return container.execute("watchkeeper", "health", "--ready", check=False).returncode == 0

    wait_until("the container is well", looks, 60)


def test_image_runs_as_nobody_special_and_has_no_build_tools(engine: Engine) -> None:
    size = engine.image_size(IMAGE) - engine.image_size(PYTHON_IMAGE)
    print(f"the image adds {size / 1e6:.0f} MB to its base")
    assert engine.podman("image", "inspect", "--format", "{{.User}}", IMAGE).stdout.strip() == (
        "10001:10001"
    )
    labels = json.loads(
        engine.podman("image", "inspect", "--format", "{{json .Labels}}", IMAGE).stdout
    )
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    tools = "for tool in gcc make npm pip git; do command -v $tool; done; ls /opt/watchkeeper/bin"
    found = engine.podman("run", "--rm", "--network=none", "--entrypoint", "sh", IMAGE, "-c", tools)
    assert not {"gcc", "make", "npm", "pip", "git"} & {
        Path(line).name for line in found.stdout.split()
    }


def test_container_on_a_read_only_root_becomes_active_and_is_healthy(start: Start) -> None:
    container = start()
    wait_well(container)
    # This engine runs no timer of its own: the image's health check is asked for by hand.
    healthy = container.engine.podman("healthcheck", "run", container.name, check=False)
    assert healthy.returncode == 0, healthy.stdout + healthy.stderr
    wait_until("ACTIVE", lambda: "PASSIVE -> ACTIVE" in container.log())
    assert container.execute("touch", "/opt/watchkeeper/x", check=False).returncode != 0
    code, took_s = container.stop_with("TERM")
    print(f"SIGTERM when ACTIVE: {took_s:.2f} s")
    assert code == 0


def test_bridge_in_the_image_has_all_it_needs(start: Start) -> None:
    container = start()
    wait_well(container)
    # Beside the instance that runs: only what the doctor finds of Node and Baileys is looked at.
    told = container.execute(
        "env", "WATCHKEEPER_CONNECTOR=baileys", "watchkeeper", "doctor", "--json", check=False
    )
    verdicts = {found["check"]: found["verdict"] for found in json.loads(told.stdout)["findings"]}
    assert verdicts["node"] in ("ok", "warn")
    assert verdicts["baileys"] == "ok"


@pytest.mark.parametrize("after_s", [0.0, 0.1, 0.5, 2.0])
def test_sigterm_ends_it_cleanly_however_early_it_comes(start: Start, after_s: float) -> None:
    container = start()
    time.sleep(after_s)
    code, took_s = container.stop_with("TERM")
    print(f"SIGTERM after {after_s:g} s: exit {code} in {took_s:.2f} s")
    # 143: nothing was running yet that had to be ended in order. Never 137, which is SIGKILL.
    assert code in (0, 143)
    assert took_s < 15


def test_settings_that_cannot_work_end_it_with_what_to_do(start: Start) -> None:
    container = start("-e", "WATCHKEEPER_LEASE_TTL_S=2")
    assert container.wait() == 2
    assert "Raise WATCHKEEPER_LEASE_TTL_S" in container.log()


def test_memory_and_process_limits_leave_it_room(start: Start) -> None:
    container = start("--memory", "256m", "--pids-limit", "64")
    wait_well(container)
    assert container.inspect("{{.HostConfig.Memory}}") == str(256 * 2**20)
    code, _ = container.stop_with("TERM")
    assert (code, container.inspect("{{.State.OOMKilled}}")) == (0, "false")
