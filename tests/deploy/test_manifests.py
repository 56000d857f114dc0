"""What lies in deploy/, each by its own tool or schema: the image, the Compose file, the unit, the manifests."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cdc_outbox.config import load_config

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = DEPLOY / "kubernetes"


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def manifests() -> list[dict[str, Any]]:
    """As kubectl renders them; the files themselves, which are whole without it, where there is none."""
    if shutil.which("kubectl"):
        rendered = run("kubectl", "kustomize", MANIFESTS / "monitoring")
        assert rendered.returncode == 0, rendered.stderr
        texts = [rendered.stdout]
    else:
        texts = [path.read_text() for path in MANIFESTS.rglob("*.yaml") if path.name != "kustomization.yaml"]
    return [document for text in texts for document in yaml.safe_load_all(text)]


@pytest.mark.parametrize("version", ["1.30", "1.33"])
def test_the_manifests_are_what_kubernetes_takes(version: str) -> None:
    kinds = set()
    for manifest in manifests():
        kinds.add(manifest["kind"])
        if manifest["kind"] != "ServiceMonitor":  # the Prometheus operator's own
            kubernetes_validate.validate(manifest, version, strict=True)
    assert kinds >= {"Deployment", "Service", "PodDisruptionBudget", "CronJob", "ServiceMonitor"}


def test_every_pod_is_locked_in() -> None:
    specs = [
        manifest["spec"]["template"]["spec"] if manifest["kind"] == "Deployment"
        else manifest["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        for manifest in manifests() if manifest["kind"] in ("Deployment", "CronJob")
    ]  # fmt: skip
    assert len(specs) == 2
    for spec in specs:
        assert spec["enableServiceLinks"] is False, "our own Service's variables look like our configuration"
        assert spec["securityContext"]["runAsNonRoot"]
        for container in spec["containers"]:
            context = container["securityContext"]
            assert context["readOnlyRootFilesystem"]
            assert not context["allowPrivilegeEscalation"]
            assert context["capabilities"] == {"drop": ["ALL"]}


def test_the_manifests_configuration_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CDC_OUTBOX_POSTGRES__DSN", "host=db")
    config = load_config(MANIFESTS / "base" / "cdc-outbox.toml")
    assert config.http.address() == ("0.0.0.0", 9646)  # noqa: S104 - the pod's own network


def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((DEPLOY / "compose" / "compose.yaml").read_text())
    return content


def test_the_compose_file_configures_relays_that_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("migrate", "relay-a", "relay-b"):
        service = compose()["services"][name]
        with monkeypatch.context() as patched:
            for key, value in service["environment"].items():
                patched.setenv(key, value)
            config = load_config(None)
        assert config.postgres.dsn.get_secret_value().startswith("host=postgres")
        assert (DEPLOY / "compose" / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def test_the_compose_file_mounts_files_that_are_there() -> None:
    mounted = [
        volume.split(":")[0] for service in compose()["services"].values() for volume in service.get("volumes", [])
    ]
    assert len(mounted) == 5
    assert [path for path in mounted if not (DEPLOY / "compose" / path).is_file()] == []


def test_the_dockerfile_is_as_hadolint_would_have_it() -> None:
    linted = run(Path(sys.executable).with_name("hadolint"), DEPLOY / "Dockerfile")
    assert linted.returncode == 0, linted.stdout


def test_the_image_s_steps_install_a_command_that_works(tmp_path: Path) -> None:
    """What the Dockerfile does, without Docker: the locked libraries by their hashes, then ourselves, nothing else."""
    steps = (DEPLOY / "Dockerfile").read_text()
    assert "--require-hashes" in steps
    python = tmp_path / "bin" / "python"
    assert run(sys.executable, "-m", "venv", tmp_path).returncode == 0
    pip: list[str | Path] = [python, "-m", "pip", "install", "-q", "--no-deps"]
    locked = run(*pip, "--require-hashes", "--only-binary", ":all:", "-r", DEPLOY / "requirements.txt")
    assert locked.returncode == 0, locked.stderr
    assert run(*pip, ROOT).returncode == 0
    checked = run(python, "-m", "pip", "check")
    assert checked.returncode == 0, checked.stdout
    environment = {"CDC_OUTBOX_POSTGRES__DSN": "host=127.0.0.1 port=1", "CDC_OUTBOX_TRACING__ENABLED": "true"}
    said = run(tmp_path / "bin" / "cdc-outbox", "migrate", "status", cwd="/", env=environment)
    assert said.returncode == 3
    assert said.stderr.startswith("error: PostgreSQL cannot be reached")
