"""The Kubernetes manifests: valid by the schemas, and in step with the settings they carry."""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import daemon
from daemon.http.auth import OPEN_PATHS
from daemon.settings import PREFIX, Loaded, StoreKind, load_settings, parse_bind
from tests.bridge.node.install import skip_or_fail

MANIFESTS = Path(__file__).resolve().parents[2] / "deploy" / "kubernetes"
KUSTOMIZATION = MANIFESTS / "kustomization.yaml"
FILES = sorted(path for path in MANIFESTS.glob("*.yaml") if path != KUSTOMIZATION)


def documents() -> Iterator[dict[str, Any]]:
    for path in FILES:
        yield from yaml.safe_load_all(path.read_text())


def one(kind: str) -> dict[str, Any]:
    [found] = [each for each in documents() if each["kind"] == kind]
    return found


@pytest.fixture
def pod() -> dict[str, Any]:
    spec: dict[str, Any] = one("Deployment")["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def container(pod: dict[str, Any]) -> dict[str, Any]:
    [found] = pod["containers"]
    return dict(found)


@pytest.fixture
def loaded(container: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Loaded:
    """The settings as a pod has them, with secrets as docs/kubernetes.md makes them."""
    for name in [name for name in os.environ if name.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    [generator] = yaml.safe_load(KUSTOMIZATION.read_text())["configMapGenerator"]
    literals = dict(each.split("=", 1) for each in generator["literals"])
    given = {each["name"]: each["value"] for each in container["env"] if "value" in each}
    known = {"POD_IP": "10.8.0.7", "WATCHKEEPER_INSTANCE_NAME": "watchkeeper-6d4b75cb6d-hwd7q"}
    (tmp_path / "watchkeeper_admin_token").write_text("a-token-of-enough-letters")
    (tmp_path / "watchkeeper_encryption_key").write_text(base64.b64encode(b"k" * 32).decode())
    assert given["WATCHKEEPER_SECRETS_DIR"] == "/run/secrets/watchkeeper"
    given["WATCHKEEPER_SECRETS_DIR"] = str(tmp_path)
    for name, value in {**literals, **given, **known}.items():
        monkeypatch.setenv(name, value.replace("$(POD_IP)", known["POD_IP"]))
    return load_settings(serving=True)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_manifest_is_valid_by_the_schema(path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("kubernetes-validate"), "--strict", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_manifest_is_applied() -> None:
    listed = yaml.safe_load(KUSTOMIZATION.read_text())["resources"]
    assert sorted(listed) == [path.name for path in FILES]


def test_the_settings_are_complete_and_all_known(loaded: Loaded) -> None:
    assert loaded.warnings == ()
    assert loaded.settings.production
    assert loaded.settings.store is StoreKind.FIRESTORE
    assert loaded.settings.advertise_url == "http://10.8.0.7:8080"


def test_the_ports_are_those_that_are_listened_on(
    loaded: Loaded, container: dict[str, Any]
) -> None:
    ports = {each["name"]: each["containerPort"] for each in container["ports"]}
    assert loaded.settings.metrics_bind is not None
    assert ports == {
        "http": loaded.settings.host_port[1],
        "metrics": parse_bind(loaded.settings.metrics_bind)[1],
    }


def test_a_pod_is_given_the_time_that_a_drain_may_take(
    loaded: Loaded, pod: dict[str, Any], container: dict[str, Any]
) -> None:
    sleep, before_s = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    assert pod["terminationGracePeriodSeconds"] > float(before_s) + loaded.settings.stop_s()


def test_the_probes_ask_what_they_are_for(container: dict[str, Any]) -> None:
    asked = {
        name: container[f"{name}Probe"]["httpGet"]["path"]
        for name in ("startup", "readiness", "liveness")
    }
    # Liveness is /livez alone: that it never asks the store is shown in tests/http.
    assert asked == {"startup": "/startupz", "readiness": "/readyz", "liveness": "/livez"}
    assert set(asked.values()) <= OPEN_PATHS


def test_a_rollout_has_a_standby_before_a_holder_is_asked_to_end() -> None:
    spec = one("Deployment")["spec"]
    assert spec["replicas"] >= 2
    assert spec["strategy"]["rollingUpdate"] == {"maxSurge": 1, "maxUnavailable": 0}


def test_a_pod_may_do_nothing_but_write_its_state(
    pod: dict[str, Any], container: dict[str, Any]
) -> None:
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False


def test_the_image_is_of_this_version() -> None:
    [image] = yaml.safe_load(KUSTOMIZATION.read_text())["images"]
    assert image == {"name": "watchkeeper", "newTag": daemon.__version__}


# --- what `kubectl` makes of it, without a cluster


@pytest.fixture
def kubectl() -> Callable[..., str]:
    if shutil.which("kubectl") is None:
        skip_or_fail("no kubectl here: the kustomization is not built")

    def run(*words: str) -> str:
        done = subprocess.run(
            ["kubectl", *words], capture_output=True, text=True, check=False, timeout=30
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_what_is_applied_hangs_together(kubectl: Callable[..., str], tmp_path: Path) -> None:
    built = kubectl("kustomize", str(MANIFESTS))
    (tmp_path / "all.yaml").write_text(built)
    test_a_manifest_is_valid_by_the_schema(tmp_path / "all.yaml")
    found = list(yaml.safe_load_all(built))
    assert {each["kind"] for each in found} == {"ConfigMap", *(d["kind"] for d in documents())}
    of = {each["kind"]: each for each in found}
    template = of["Deployment"]["spec"]["template"]
    labels = template["metadata"]["labels"].items()
    selectors = [
        of["Deployment"]["spec"]["selector"]["matchLabels"],
        of["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        of["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        *(each["spec"]["selector"] for each in found if each["kind"] == "Service"),
    ]
    assert all(selector and selector.items() <= labels for selector in selectors)
    [container] = template["spec"]["containers"]
    # Changed settings have another name, and so begin a rollout.
    assert container["envFrom"][0]["configMapRef"]["name"] == of["ConfigMap"]["metadata"]["name"]
    assert container["image"] == f"watchkeeper:{daemon.__version__}"
    assert template["spec"]["serviceAccountName"] == of["ServiceAccount"]["metadata"]["name"]
    assert {e["metadata"].get("namespace", "watchkeeper") for e in found} == {"watchkeeper"}


def test_the_secrets_are_made_as_the_page_says(
    kubectl: Callable[..., str], pod: dict[str, Any], tmp_path: Path
) -> None:
    page = (MANIFESTS.parents[1] / "docs" / "kubernetes.md").read_text(encoding="utf-8")
    command = re.search(r"kubectl (-n watchkeeper create secret (?:[^`]+?))\n   ```", page)
    assert command is not None
    for name in ("admin-token", "encryption-key"):
        (tmp_path / name).write_text(f"{name}-of-a-test")
    words = command[1].replace("\\\n", " ").split()
    words = [re.sub(r"=([a-z-]+)$", rf"={tmp_path}/\1", word) for word in words]
    secret = yaml.safe_load(kubectl(*words, "--dry-run=client", "--output=yaml"))
    assert set(secret["data"]) == {"watchkeeper_admin_token", "watchkeeper_encryption_key"}
    mounted = [each["secret"]["secretName"] for each in pod["volumes"] if "secret" in each]
    assert mounted == [secret["metadata"]["name"]]
