"""The manifests in cluster/ and docker/ are right as far as files can be.

They parse, their commands exist, versions and paths agree. None of them is run here: that takes Kubernetes, Slurm, SSH
hosts or a Docker engine.
"""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from typing import Any

import pytest
import yaml
from commands import ROOT, check_command, in_checkout

from services.study.file import read_study

CLUSTER, DOCKER = ROOT / "cluster", ROOT / "docker"
MANIFESTS = [*sorted(CLUSTER.glob("*.yaml")), DOCKER / "compose.yaml"]
# Where a container may keep what lasts: the shared storage, and what belongs to Postgres.
PLACES = ("/shared", "/var/lib/postgresql/data", "/dev/shm", "/run/secrets")


def documents(path: Any) -> list[Any]:
    return list(yaml.safe_load_all(path.read_text()))


def objects() -> list[Any]:
    """Every Kubernetes object."""
    return [item for name in ("mlflow.yaml", "ray-job.yaml") for item in documents(CLUSTER / name)]


def every(value: Any, key: str) -> list[Any]:
    """The values of `key` anywhere below `value`."""
    if isinstance(value, list):
        return [found for item in value for found in every(item, key)]
    if not isinstance(value, dict):
        return []
    return [v for k, v in value.items() if k == key] + [found for v in value.values() for found in every(v, key)]


def pod_specs() -> list[Any]:
    return [item["spec"] for item in every(objects(), "template") if "containers" in item.get("spec", {})]


def constraint(package: str) -> str:
    found = re.search(rf"^{package}==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert found is not None
    return found[1]


def shell_commands(words: list[str] | str) -> str:
    """What a container's command runs, as one line: `sh -c` unwrapped, compose's doubled dollars read."""
    line = words if isinstance(words, str) else words[2] if words[:2] == ["sh", "-c"] else shlex.join(words)
    return re.sub(r'^(?:[A-Z_]+="\S+ \S+" )+exec ', "", line.replace("$$", "$"))


def commands() -> list[str]:
    """Every command that a manifest would run, those of Slurm included."""
    job = documents(CLUSTER / "ray-job.yaml")[0]["spec"]["entrypoint"]
    compose = documents(DOCKER / "compose.yaml")[0]["services"]
    up = documents(CLUSTER / "ray-up.yaml")[0]
    in_pods = [c["command"] for spec in pod_specs() for c in spec["containers"] if "command" in c]
    in_services = [service["command"] for service in compose.values() if "command" in service]
    script = re.sub(r"(?m)^\s*#.*$", "", (CLUSTER / "slurm.sh").read_text().replace("\\\n", " "))
    for variable, value in (("study", "tune_spaces/smoke.yaml"), ("storage", "/shared/runs"), (r"\w+", "1")):
        script = re.sub(rf'"\${variable}"', value, script)
    starts = re.findall(r"\b((?:ray (?:start|status)|decay run) ?[^&>|;)\n]*)", script)
    return [
        job,
        *map(shell_commands, [*in_pods, *in_services]),
        *up["head_start_ray_commands"],
        *up["worker_start_ray_commands"],
        *starts,
    ]


def test_every_mlflow_server_that_is_not_on_loopback_asks_for_a_password():
    servers = [line for line in commands() if line.startswith("mlflow server")]
    assert len(servers) == 2
    assert all("--app-name=basic-auth" in line or "--app-name basic-auth" in line for line in servers)
    asked = (ROOT / "docs" / "run-on-a-cluster.md").read_text()
    assert asked.count("mlflow server --app-name basic-auth --host 0.0.0.0") == asked.count("mlflow server --") == 2


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_manifest_parses(path):
    assert all(isinstance(document, dict) for document in documents(path))


def test_every_command_of_the_manifests_would_be_understood():
    kinds = [check_command(line) for line in commands()]
    assert kinds.count("ray") >= 8 and kinds.count("mlflow") == 2 and "decay" in kinds


def test_commands_that_comments_recommend_would_be_understood():
    """Lines such as `#   docker compose -f …` and sentences such as "Then: decay run …" are commands as well."""
    recommended = []
    for path in [*MANIFESTS, CLUSTER / "slurm.sh", DOCKER / "Dockerfile"]:
        for line in path.read_text().splitlines():
            recommended += re.findall(r"^#.*?((?:docker compose -f|sbatch|decay submit|ray up) [^`]*)", line)
    assert len(recommended) >= 5
    for line in recommended:
        check_command(line.strip())


def test_the_job_runs_a_study_that_fits_its_cluster():
    """Enough CPUs on a worker pod for a rank, an MLflow server for several nodes, the storage on the claim."""
    spec = documents(CLUSTER / "ray-job.yaml")[0]["spec"]
    words = spec["entrypoint"].split()
    study = read_study(in_checkout(words[4]), words[words.index("--storage") + 1])
    group = spec["rayClusterSpec"]["workerGroupSpecs"][0]
    cpus = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"])
    assert study.resources.cpus_per_worker <= cpus
    assert study.resources.workers * study.resources.cpus_per_worker <= cpus * group["replicas"]
    services = [item for item in objects() if item["kind"] == "Service"]
    ports = {item["metadata"]["name"]: item["spec"]["ports"][0]["port"] for item in services}
    assert study.tracking.uri == f"http://mlflow:{ports['mlflow']}"
    assert study.storage.startswith("/shared/")


def test_the_head_is_not_evicted_and_a_retry_is_allowed():
    spec = documents(CLUSTER / "ray-job.yaml")[0]["spec"]
    head = spec["rayClusterSpec"]["headGroupSpec"]
    annotations = head["template"]["metadata"]["annotations"]
    assert annotations == {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false"}
    assert head["rayStartParams"]["num-cpus"] == "0"
    assert spec["backoffLimit"] >= 2 and spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}


def test_ray_start_params_are_options_of_ray_start():
    from commands import ray_group

    options = {option for param in ray_group().commands["start"].params for option in param.opts}
    given = {name for params in every(objects(), "rayStartParams") for name in params}
    assert given and {f"--{name}" for name in given} <= options


def test_versions_agree_with_constraints():
    assert documents(CLUSTER / "ray-job.yaml")[0]["spec"]["rayClusterSpec"]["rayVersion"] == constraint("ray")
    dockerfile = (DOCKER / "Dockerfile").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert "ARG BASE=python:3.12-slim" in dockerfile and 'requires-python = ">=3.11,<3.13"' in project
    assert "-c constraints.txt -e ." in dockerfile
    version = re.search(r'^version = "(.+)"$', project, re.MULTILINE)
    assert version is not None
    images = {image for path in MANIFESTS for document in documents(path) for image in every(document, "image")}
    assert images == {f"decay:{version[1]}", "postgres:17"}


def test_every_volume_is_mounted_from_a_declared_one_at_a_documented_place():
    for spec in pod_specs():
        mounts = list(itertools.chain.from_iterable(c.get("volumeMounts", []) for c in spec["containers"]))
        assert {mount["name"] for mount in mounts} == {volume["name"] for volume in spec["volumes"]}
        assert all(mount["mountPath"] in PLACES for mount in mounts)
    claims = {item["metadata"]["name"] for item in objects() if item["kind"] == "PersistentVolumeClaim"}
    assert {claim["claimName"] for claim in every(objects(), "persistentVolumeClaim")} == claims


def test_no_manifest_writes_outside_the_documented_places():
    """Absolute paths in commands are below the storage, or read-only: the checkout, a token, a secret."""
    read_only = ("/app/", "/shared/decay/.venv/", "/etc/ray/token", "/run/secrets/")
    for line in commands():
        for path in re.findall(r"(?:^|[\s=\"])(/[\w./-]+)", line):
            assert path.startswith(("/shared/", *read_only)), line
    compose = documents(DOCKER / "compose.yaml")[0]
    mounts = [mount.split(":")[1] for mount in itertools.chain.from_iterable(every(compose["services"], "volumes"))]
    assert mounts and set(mounts) <= set(PLACES)


def test_compose_asks_for_nothing_that_it_does_not_declare():
    compose = documents(DOCKER / "compose.yaml")[0]
    services = compose["services"]
    for service in services.values():
        assert set(service.get("depends_on", {})) <= set(services)
        assert set(service.get("secrets", [])) <= set(compose["secrets"])
        assert {mount.split(":")[0] for mount in service["volumes"]} <= set(compose["volumes"])
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"} and "healthcheck" in services[name]


def test_ray_accepts_the_on_premises_file():
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(documents(CLUSTER / "ray-up.yaml")[0]))


def test_slurm_script_is_shell():
    subprocess.run(["bash", "-n", str(CLUSTER / "slurm.sh")], check=True)


def test_folders_without_python_hold_none():
    assert [path for folder in (CLUSTER, DOCKER) for path in folder.rglob("*.py")] == []


def test_every_file_says_what_was_not_exercised():
    for path in [*MANIFESTS, CLUSTER / "slurm.sh", DOCKER / "Dockerfile"]:
        assert "tests/docs/test_cluster_files.py" in path.read_text(), path.name
