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
from cdc_outbox.demo.ports import free_port
from support import command
from support.kubelet import injected
from support.relays import CheckedRelay
from support.world import World, read_topic

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = DEPLOY / "kubernetes"
CONFIG = MANIFESTS / "config" / "cdc-outbox.toml"


def run(*command: str | Path, **more: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **more)


def manifests() -> list[dict[str, Any]]:
    """As kubectl renders them; the files themselves, which are whole without it, where there is none."""
    if shutil.which("kubectl"):
        texts = []
        for folder in ("monitoring", "setup"):
            rendered = run("kubectl", "kustomize", MANIFESTS / folder)
            assert rendered.returncode == 0, rendered.stderr
            texts.append(rendered.stdout)
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
    assert kinds >= {"Deployment", "Service", "PodDisruptionBudget", "CronJob", "Job", "ServiceMonitor"}


def test_a_kustomization_names_files_that_are_there() -> None:
    for path in MANIFESTS.rglob("kustomization.yaml"):
        kustomization = yaml.safe_load(path.read_text())
        named = list(kustomization.get("resources", []))
        for generator in kustomization.get("configMapGenerator", []):
            named += generator["files"]
        assert named
        assert [name for name in named if not (path.parent / name).exists()] == []
        assert all(".." not in name for generator in kustomization.get("configMapGenerator", []) for name in generator)


def pod_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]
    return dict(spec.get("jobTemplate", manifest)["spec"]["template"]["spec"])


def test_every_pod_is_locked_in() -> None:
    specs = [pod_spec(manifest) for manifest in manifests() if manifest["kind"] in ("Deployment", "CronJob", "Job")]
    assert len(specs) == 4
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
    config = load_config(CONFIG)
    assert config.http.address() == ("0.0.0.0", 9646)  # noqa: S104 - the pod's own network


def test_the_pods_commands_work_with_what_a_kubelet_gives_them(world: World, tmp_path: Path) -> None:
    """Job, Job, Deployment, CronJob, in that order: arguments, configuration, secrets, and links to our own Service."""
    settings = {
        **injected("CDC_OUTBOX"),
        **injected("CDC_OUTBOX_POSTGRES"),
        "CDC_OUTBOX_CONFIG": str(CONFIG),
        "CDC_OUTBOX_POSTGRES__DSN": world.dsn,
        # the test's own, where the file has the cluster's
        "CDC_OUTBOX_POSTGRES__SLOT": world.slot,
        "CDC_OUTBOX_KAFKA__BOOTSTRAP_SERVERS": world.bootstrap_servers,
        "CDC_OUTBOX_KAFKA__TOPIC": f"{world.name}.{{aggregate_type}}",
        "CDC_OUTBOX_CANARY__TOPIC": f"{world.name}-canary",
    }
    arguments = {
        (manifest["kind"], container["name"]): container["args"]
        for manifest in manifests() if manifest["kind"] in ("Deployment", "CronJob", "Job")
        for container in pod_spec(manifest)["containers"]
    }  # fmt: skip
    one_broker = [argument.replace("3", "1") for argument in arguments["Job", "topics"]]
    for job in (arguments["Job", "migrate"], one_broker):
        done = command.run(settings, *job)
        assert done.exit_code == 0, done
    assert arguments["Deployment", "relay"] == ["run"]
    relay = CheckedRelay({**settings, "CDC_OUTBOX_HTTP__LISTEN": f"0.0.0.0:{free_port()}"}, tmp_path / "log")
    relay.address = f"127.0.0.1:{relay._environment['CDC_OUTBOX_HTTP__LISTEN'].partition(':')[2]}"
    with relay:
        relay.wait_until_ready()
        world.insert("event")
        assert len(read_topic(world.bootstrap_servers, f"{world.name}.event", 1)) == 1
        world.wait_until_confirmed()
    done = command.run(settings, *arguments["CronJob", "prune"])
    assert done.exit_code == 0, done


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


@pytest.mark.rest
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
