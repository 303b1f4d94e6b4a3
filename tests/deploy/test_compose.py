"""compose.yaml and redeploy.sh, as they are, run by podman-compose.

There is no Docker engine where the tests run, so `docker compose` itself is not shown. Stand-ins
take the names of the base images and of the emulator's image (tests/deploy/engine.py).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
import pytest
import trio
import yaml

from tests.bridge.node.install import skip_or_fail
from tests.deploy.engine import (
    CERTIFICATES,
    NODE_IMAGE,
    PYTHON_IMAGE,
    ROOT,
    Container,
    Engine,
    missing_networks,
)
from tests.deploy.host import wait_until
from tests.emulator import MISSING, emulator_jar
from tests.ports import free_port
from tests.system.cluster import Cluster, Node
from tests.system.steps import dashboard, send_all
from tests.system.traffic import Traffic, arrived_exactly_once

pytestmark = [pytest.mark.system, pytest.mark.long]

COMPOSE = ROOT / "deploy" / "compose"
REDEPLOY = COMPOSE / "redeploy.sh"
UID = 10001
FIRST_BUILD_S = 900.0
COMMAND_S = 300.0
CONNECT_S = 1.0
NAMES = ("a", "b")


@dataclass
class Deployment:
    """A project of its own from compose.yaml, with its secrets and ports."""

    engine: Engine
    project: str
    secrets: Path
    ports: dict[str, int]

    @property
    def command(self) -> tuple[str, ...]:
        """How compose is called here: what these machines need of a build, and the project."""
        build = (
            *("--isolation=chroot", "--pull-never", "--format=docker"),
            *("-v", f"{CERTIFICATES}:{CERTIFICATES}:ro"),
            *("-v", f"{self.engine.work}/pip.conf:/etc/pip.conf:ro"),
            *("--build-arg", f"PYTHON_IMAGE={PYTHON_IMAGE}"),
            *("--build-arg", f"NODE_IMAGE={NODE_IMAGE}"),
        )
        program = str(Path(sys.executable).with_name("podman-compose"))
        return program, "-p", self.project, f"--podman-build-args={shlex.join(build)}"

    @property
    def env(self) -> dict[str, str]:
        """What an operator's `.env` would say, beside the engine's own."""
        ports = {f"PORT_{name.upper()}": str(port) for name, port in self.ports.items()}
        return {**self.engine.env, **ports, "SECRETS": str(self.secrets)}

    def compose(self, *words: str, within_s: float = COMMAND_S) -> str:
        done = subprocess.run(
            [*self.command, *words],
            cwd=COMPOSE,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=within_s,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    async def redeploy(
        self, *options: str, within: tuple[str, ...] = (), ready_s: int = 60
    ) -> subprocess.CompletedProcess[bytes]:
        """Run redeploy.sh to its end; `within` are further options of compose."""
        with trio.fail_after(COMMAND_S):
            return await trio.run_process(
                [str(REDEPLOY), *options, *self.command, *within],
                env={**self.env, "READY_S": str(ready_s)},
                stdin=b"",
                capture_stdout=True,
                capture_stderr=True,
                check=False,
            )

    def container(self, service: str) -> Container:
        return Container(self.engine, f"{self.project}_{service}_1")

    def ids(self) -> dict[str, str]:
        """Service → its container's id."""
        return {name: self.container(name).inspect("{{.Id}}") for name in (*NAMES, "firestore")}


@pytest.fixture(scope="module")
def deployment(bases: Engine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """The first deploy, command by command as docs/compose.md has it."""
    lacking = missing_networks()
    jar = emulator_jar()
    if lacking is not None or jar is None:
        skip_or_fail(lacking or MISSING)
    assert jar is not None
    image = yaml.safe_load((COMPOSE / "compose.yaml").read_text())["services"]["firestore"]["image"]
    bases.build_emulator(image, jar)
    deployment = Deployment(
        bases,
        project=f"wk{uuid.uuid4().hex[:8]}",
        secrets=tmp_path_factory.mktemp("compose") / "secrets",
        ports={name: free_port() for name in NAMES},
    )
    try:
        deployment.compose("build", "a", within_s=FIRST_BUILD_S)
        make_secrets(deployment)
        # This podman is older than `wait --condition=healthy`, so `init` would not wait for it.
        deployment.compose("up", "-d", "firestore")
        wait_until("the emulator is healthy", partial(healthy, deployment, "firestore"), 60)
        for said in ("is there: released, at epoch 0", "is there already. Nothing was changed"):
            assert said in deployment.compose("run", "--rm", "-T", "a", "init")
        deployment.compose("up", "-d", "--wait")
        for name in NAMES:
            wait_until(f"{name} is ready", partial(ready, deployment, name), 60)
        yield deployment
    finally:
        for name in (*NAMES, "firestore"):
            container = deployment.container(name)
            print(name, container.log()[-3000:])
        deployment.compose("down", "--volumes", "-t", "0")


def make_secrets(deployment: Deployment) -> None:
    """As the operator does, by the image's own `keygen`, for the user of the image."""
    deployment.secrets.mkdir(mode=0o700)
    keygen = ("run", "--rm", "--network", "none", "watchkeeper", "keygen")
    for name, options in {"admin_token": ("--token",), "encryption_key": ()}.items():
        path = deployment.secrets / f"watchkeeper_{name}"
        path.touch(mode=0o600)
        path.write_text(deployment.engine.podman(*keygen, *options).stdout)
        os.chown(path, UID, UID)


def healthy(deployment: Deployment, service: str) -> bool:
    """Whether compose.yaml's own check says so. This engine runs no timer: it is asked by hand."""
    name = deployment.container(service).name
    return deployment.engine.podman("healthcheck", "run", name, check=False).returncode == 0


def ready(deployment: Deployment, name: str) -> bool:
    try:
        answer = httpx.get(f"http://127.0.0.1:{deployment.ports[name]}/readyz", timeout=5)
    except httpx.TransportError:
        return False
    return answer.status_code == 200


@pytest.fixture
async def cluster(deployment: Deployment, tmp_path: Path) -> AsyncIterator[Cluster]:
    """The published ports, asked with the token that the deploy made."""
    token = (deployment.secrets / "watchkeeper_admin_token").read_text().strip()
    nodes = [Node(name, deployment.ports[name], tmp_path, {}) for name in NAMES]
    # While a container's address is gone, nothing answers there: a caller has to lose patience.
    async with httpx.AsyncClient(timeout=httpx.Timeout(30, connect=CONNECT_S)) as client:
        yield Cluster(tmp_path, {}, client, nodes, token)


async def standby_of(cluster: Cluster) -> tuple[Node, Node]:
    """The ACTIVE one, and the other."""
    active = await cluster.wait_active()
    [standby] = [node for node in cluster.nodes if node is not active]
    await cluster.wait_state(standby, "PASSIVE")
    return active, standby


def test_containers_are_confined_and_healthy_and_show_no_secret(deployment: Deployment) -> None:
    secrets = [path.read_text().strip() for path in deployment.secrets.iterdir()]
    assert len(secrets) == 2
    for name in (*NAMES, "firestore"):
        assert healthy(deployment, name), name
        [seen] = json.loads(
            deployment.engine.podman("inspect", deployment.container(name).name).stdout
        )
        host = seen["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["Memory"] >= 2**30
        assert 0 < host["PidsLimit"] <= 512
        assert "no-new-privileges" in " ".join(host["SecurityOpt"])
        assert seen["EffectiveCaps"] in (None, [])
        assert seen["Config"]["User"] == f"{UID}:{UID}"
        bindings = [each for found in host["PortBindings"].values() for each in found]
        assert {each["HostIp"] for each in bindings} <= {"127.0.0.1"}
        pid = seen["State"]["Pid"]
        shown = json.dumps(seen) + Path(f"/proc/{pid}/environ").read_text()
        for process in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                shown += process.read_text()
            except OSError:  # It ended meanwhile.
                continue
        assert not any(secret in shown for secret in secrets)


async def test_redeploy_under_traffic_fails_no_request_and_loses_no_message(
    deployment: Deployment, cluster: Cluster
) -> None:
    active, standby = await standby_of(cluster)
    await cluster.add_paired(active, "anna")
    ids = deployment.ids()
    epoch = (await dashboard(cluster, active))["lease"]["epoch"]
    traffic = Traffic(cluster, ("anna",), every_s=0.05, repeats=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(traffic.keep_sending)
        await trio.sleep(1)
        began = trio.current_time()
        done = await deployment.redeploy()
        took_s = trio.current_time() - began
        await trio.sleep(1)
        traffic.stopping.set()
    told = done.stdout.decode()
    assert done.returncode == 0, told + done.stderr.decode()
    print(
        f"redeploy: {took_s:.1f} s; {traffic.sent} sends, {len(traffic.accepted)} accepted, "
        f"{traffic.repeated} repeated, {len(traffic.failed)} failed; "
        f"the longest took {max(traffic.seconds):.2f} s"
    )
    assert traffic.failed == []
    assert len(traffic.accepted) == traffic.sent
    assert told.index(f"replacing {standby.name}") < told.index(f"replacing {active.name}")
    now = deployment.ids()
    assert {name for name in now if now[name] != ids[name]} == set(NAMES)
    # One handoff in all: the standby went first, and took over from the other.
    holder = (await dashboard(cluster, standby))["instance"]
    assert (holder["state"], holder["epoch"]) == ("ACTIVE", epoch + 1)
    await cluster.wait_state(active, "PASSIVE")
    await cluster.wait_connected(standby, "anna")
    await arrived_exactly_once(cluster, standby, traffic)
    kept = await cluster.json(active, "GET", "/api/status/transitions")
    assert ("drain", "SIGTERM") in [(e["trigger"], e["reason"]) for e in kept["transitions"]]


async def test_an_instance_that_does_not_get_ready_ends_it_and_the_other_serves(
    deployment: Deployment, cluster: Cluster, tmp_path: Path
) -> None:
    active, standby = await standby_of(cluster)
    if "anna" not in str(await cluster.json(active, "GET", "/api/whatsapp/accounts")):
        await cluster.add_paired(active, "anna")
    ids = deployment.ids()
    epoch = (await dashboard(cluster, active))["lease"]["epoch"]
    wrong = tmp_path / "wrong.yaml"
    # Without a restart: this podman may find a container that ends all the time running again
    # between its stop and its removal, and then keeps it.
    settings = {"environment": {"WATCHKEEPER_LEASE_TTL_S": "2"}, "restart": "no"}
    wrong.write_text(yaml.safe_dump({"services": {standby.name: settings}}))
    refused = await deployment.redeploy(
        "--no-build", within=("-f", "compose.yaml", "-f", str(wrong)), ready_s=8
    )
    told = refused.stderr.decode()
    assert refused.returncode == 1, told
    assert f"{standby.name} is not ready after 8 s" in told
    assert f"{active.name} was left alone and serves" in told
    assert "Raise WATCHKEEPER_LEASE_TTL_S" in told, "the instance's own last words are shown"
    now = deployment.ids()
    assert {name for name in now if now[name] != ids[name]} == {standby.name}
    await send_all(cluster, active, "anna", "while the other one is broken")
    assert (await dashboard(cluster, active))["lease"]["epoch"] == epoch
    mended = await deployment.redeploy("--no-build")
    assert mended.returncode == 0, mended.stderr.decode()
    await cluster.wait_state(standby, "ACTIVE")
    await send_all(cluster, standby, "anna", "when both are well again")
