"""What cluster/ says of itself: every file there is valid, has no secret in it, and opens no door it should not."""

import configparser
import copy
import functools
import json
import os
import re
import secrets
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml  # type: ignore[import-untyped, unused-ignore]

from tests import kuberay

REPOSITORY = Path(__file__).parent.parent
CLUSTER = REPOSITORY / "cluster"
LAUNCHERS = ("aws.yaml", "gcp.yaml", "on-premises.yaml")
CLOUDS = LAUNCHERS[:2]
KUBERNETES = sorted(path.name for path in (CLUSTER / "kubernetes").glob("*"))
SCRIPTS = sorted(path.name for path in CLUSTER.glob("*.sh"))
OTHERS = {
    "aws-network.yaml": "the door on AWS",
    "compose.yaml": "MLflow",
    "mlflow-auth.ini": "MLflow",
    "runtime_env.yaml": "test_what_a_job_brings_along",
    "Dockerfile": "the image",
    "Dockerfile.dockerignore": "the image",
    "README.md": "the README",
    "local.py": "ruff, mypy and its own tests",
}


def load(name: str) -> dict[str, Any]:
    """A file of cluster/ that holds one YAML document."""
    (document,) = documents(name)
    return document


@functools.cache
def _text(name: str) -> str:
    return (CLUSTER / name).read_text()


@functools.cache
def _parsed(name: str) -> str:
    return json.dumps(list(yaml.safe_load_all(_text(name))))


def documents(name: str) -> list[dict[str, Any]]:
    """The YAML documents of a file, in which no two places share a mapping, as anchors would have it."""
    found: list[dict[str, Any]] = json.loads(_parsed(name))
    return found


def files() -> list[str]:
    """Every file of cluster/ that belongs to the repository."""
    found = (path.relative_to(CLUSTER) for path in CLUSTER.rglob("*") if path.is_file())
    return sorted(str(path) for path in found if path.name != ".env" and "__pycache__" not in path.parts)


def all_of(kind: str) -> list[dict[str, Any]]:
    """Every Kubernetes object of a kind."""
    found = [document for name in KUBERNETES for document in documents(f"kubernetes/{name}")]
    return [document for document in found if document["kind"] == kind]


def named(kind: str, name: str) -> dict[str, Any]:
    (found,) = [document for document in all_of(kind) if document["metadata"]["name"] == name]
    return found


def cluster_specs() -> dict[str, dict[str, Any]]:
    """The specification of the Ray cluster in each of KubeRay's files."""
    specs = {document["metadata"]["name"]: document["spec"] for document in all_of("RayCluster")}
    return specs | {job["metadata"]["name"]: job["spec"]["rayClusterSpec"] for job in all_of("RayJob")}


def test_every_file_is_covered_by_a_test() -> None:
    known = {*LAUNCHERS, *SCRIPTS, *OTHERS, *(f"kubernetes/{name}" for name in KUBERNETES)}
    assert set(files()) - known == set()


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_may_be_run(name: str) -> None:
    assert subprocess.run(["bash", "-n", CLUSTER / name], check=False).returncode == 0
    assert os.access(CLUSTER / name, os.X_OK)
    assert _text(name).startswith("#!/usr/bin/env bash\n")


# ---------------------------------------------------------------------------------------------- launcher files


def ray_accepts(config: dict[str, Any]) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(config))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_accepts_the_launcher_files(name: str) -> None:
    ray_accepts(load(name))


@pytest.mark.parametrize("name", LAUNCHERS)
def test_ray_rejects_a_damaged_launcher_file(name: str) -> None:
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        ray_accepts({**load(name), "idle_timeout": 5})
    with pytest.raises(Exception, match="is not of type 'number'"):
        ray_accepts({**load(name), "idle_timeout_minutes": "5"})


@pytest.mark.parametrize("name", CLOUDS)
def test_ray_rejects_damaged_node_types(name: str) -> None:
    config = load(name)
    del config["available_node_types"]["gpu"]["resources"]
    with pytest.raises(Exception, match="'resources' is a required property"):
        ray_accepts(config)
    with pytest.raises(ValueError, match="head_node_type"):
        ray_accepts({**load(name), "head_node_type": "heat"})


@pytest.mark.parametrize("name", CLOUDS)
def test_gpu_workers_come_and_go_and_the_head_trains_nothing(name: str) -> None:
    config = load(name)
    types = config["available_node_types"]
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}
    for worker in ("gpu", "gpu_spot"):
        assert types[worker]["resources"]["GPU"] == 1
        assert types[worker]["min_workers"] == 0
        assert 0 < types[worker]["max_workers"] <= config["max_workers"]
    assert 0 < config["idle_timeout_minutes"] < 60


def test_on_premises_a_worker_stays_that_shows_what_the_machines_have() -> None:
    """Of the type `local` no resources can be named; the autoscaler takes those of a worker that runs."""
    config = load("on-premises.yaml")
    assert 1 <= config["min_workers"] <= config["max_workers"] == len(config["provider"]["worker_ips"])


@pytest.mark.parametrize("name", LAUNCHERS)
def test_the_commands_of_the_nodes_parse(name: str) -> None:
    for key, commands in load(name).items():
        for command in commands if key.endswith("commands") else []:
            assert subprocess.run(["bash", "-n", "-c", command], check=False).returncode == 0, command


def test_only_the_spot_workers_are_spot() -> None:
    aws = {name: kind["node_config"] for name, kind in load("aws.yaml")["available_node_types"].items()}
    assert {name for name, node in aws.items() if "InstanceMarketOptions" in node} == {"gpu_spot"}
    assert aws["gpu_spot"]["InstanceMarketOptions"]["MarketType"] == "spot"
    gcp = {name: kind["node_config"] for name, kind in load("gcp.yaml")["available_node_types"].items()}
    assert {name for name, node in gcp.items() if "SPOT" in str(node) or "preemptible" in str(node)} == {"gpu_spot"}
    assert gcp["gpu_spot"]["scheduling"]["provisioningModel"] == "SPOT"


def test_nodes_are_set_up_alike_everywhere() -> None:
    """But for the disk, and the client of the cloud that the head's autoscaler needs."""

    def commands(name: str) -> list[str]:
        own = r"boto3|google-\S+|&& \{ setsid nohup bash \S+spot-notice.sh .*"
        return [
            " ".join(re.sub(own, "", command).split())
            for key in ("setup_commands", "head_start_ray_commands", "worker_start_ray_commands")
            for command in load(name)[key]
            if "/shared" not in command
        ]

    aws, gcp, on_premises = map(commands, LAUNCHERS)
    assert aws == gcp == on_premises
    for name in LAUNCHERS:
        assert sum("/shared" in command for command in load(name)["setup_commands"]) == 1
        assert load(name)["head_setup_commands"] == load(name)["worker_setup_commands"] == []  # not Ray's defaults


@pytest.mark.parametrize("name", LAUNCHERS)
def test_what_is_mounted_is_there(name: str) -> None:
    local = [source for source in load(name)["file_mounts"].values() if not source.startswith("~")]
    assert local
    for source in local:
        assert (REPOSITORY / source).exists(), source


# -------------------------------------------------------------------------------------------------- Kubernetes


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_files_keep_to_the_schema(name: str) -> None:
    for document in documents(f"kubernetes/{name}"):
        assert kuberay.problems(document) == []


@pytest.mark.parametrize(
    ("path", "key"),
    [
        (("spec", "workerGroupSpecs", 0), "minReplica"),
        (("spec",), "enableInTreeAutoscalling"),
        (("spec", "authOptions"), "secret"),
        (("spec", "headGroupSpec", "template", "spec"), "container"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0), "envs"),
        (("spec", "headGroupSpec", "template", "spec", "containers", 0, "resources"), "limit"),
        (("spec", "workerGroupSpecs", 0, "template", "spec", "volumes", 0), "pvc"),
    ],
)
def test_a_typo_is_found_wherever_it_is(path: tuple[str | int, ...], key: str) -> None:
    cluster = load("kubernetes/raycluster.yaml")
    place: Any = cluster
    for step in path:
        place = place[step]
    place[key] = "1"
    (problem,) = kuberay.problems(cluster)
    assert repr(key) in problem


def test_what_is_missing_is_found() -> None:
    cluster = load("kubernetes/raycluster.yaml")
    del cluster["spec"]["workerGroupSpecs"][0]["maxReplicas"]
    del cluster["spec"]["headGroupSpec"]["template"]
    assert len(kuberay.problems(cluster)) == 2
    assert kuberay.problems({**cluster, "kind": "RayClusters"}) == ["kind 'RayClusters' is not known"]


def test_jobs_bring_the_cluster_that_stays() -> None:
    specs = cluster_specs()
    assert set(specs) == {"distmaml", "train", "tune"}
    assert specs["train"] == specs["tune"] == specs["distmaml"]


def test_kubernetes_has_gpu_workers_that_come_and_go_and_spot_ones() -> None:
    spec = cluster_specs()["distmaml"]
    assert spec["enableInTreeAutoscaling"] is True
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert set(groups) == {"gpu", "gpu-spot"}
    for group in groups.values():
        assert group["minReplicas"] == 0 < group["maxReplicas"]
        (container,) = group["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    head = str(spec["headGroupSpec"]["template"]["spec"]["affinity"])
    for label in re.findall(r"'key': '(\S+)'", str(groups["gpu-spot"]["template"]["spec"]["affinity"])):
        assert (
            f"'key': '{label}', 'operator': 'DoesNotExist'" in head or f"'key': '{label}', 'operator': 'NotIn'" in head
        )


def test_all_pods_of_ray_see_the_shared_folder() -> None:
    spec = cluster_specs()["distmaml"]
    claim = named("PersistentVolumeClaim", "shared")
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["volumes"] == [{"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}}]
        assert pod["containers"][0]["volumeMounts"] == [{"name": "shared", "mountPath": "/shared"}]


def test_no_container_runs_as_root() -> None:
    specs = cluster_specs()["distmaml"]
    pods = [group["template"]["spec"] for group in (specs["headGroupSpec"], *specs["workerGroupSpecs"])]
    pods += [found["spec"]["template"]["spec"] for kind in ("Deployment", "StatefulSet") for found in all_of(kind)]
    assert len(pods) == 5
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        for container in pod["containers"]:
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    stages = re.split(r"^FROM ", _text("Dockerfile"), flags=re.MULTILINE)[1:]
    assert len(stages) == 3
    for stage in stages:
        assert (re.findall(r"^USER (\S+)", stage, re.MULTILINE) or ["ray"])[-1] == "ray"


def test_what_a_job_brings_along() -> None:
    brought = load("runtime_env.yaml")
    assert set(brought) <= {"env_vars", "excludes", "working_dir", "py_modules"}
    assert all(isinstance(value, str) for value in brought["env_vars"].values())  # Ray refuses anything else
    for job in all_of("RayJob"):
        assert yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"] == brought["env_vars"]


def test_a_submitted_job_uploads_the_code_and_nothing_large_or_secret(tmp_path: Path) -> None:
    """As Ray packs a working directory; without `excludes` what lies beside the code would go to every node."""
    from ray._private.runtime_env.packaging import create_package

    copy = tmp_path / "checkout"
    for name in ("distmaml", "jobs", "cluster", "docs"):
        shutil.copytree(REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / ".gitignore", copy)
    for name in (
        "omniglot.arrow",
        "images.zip",
        "model.safetensors",
        "cluster/.env",
        "cluster/ca.key",
        ".venv/bin/python",
    ):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes(secrets.token_bytes(2**20))
    package = tmp_path / "package.zip"
    create_package(str(copy), package, include_gitignore=True, excludes=load("runtime_env.yaml")["excludes"])
    names = set(zipfile.ZipFile(package).namelist())
    assert {"distmaml/loop.py", "jobs/train.py", "cluster/runtime_env.yaml"} <= names
    assert not [name for name in names if name.startswith((".venv", "docs")) or name.endswith((".env", ".key"))]
    assert package.stat().st_size < 2**20


def test_the_commands_of_the_jobs_are_ones_that_our_jobs_take() -> None:
    from distmaml import cli

    readme = [line.partition("-- ")[2] for line in readme_commands() if line.startswith("ray job submit")]
    jobs = [job["spec"]["entrypoint"].replace("/home/ray/distmaml/", "") for job in all_of("RayJob")]
    assert "WORKDIR /home/ray/distmaml" in _text("Dockerfile")
    assert readme
    assert len(jobs) == 2
    for python, script, *arguments in map(shlex.split, readme + jobs):
        assert python == "python"
        if script == "jobs/train.py":
            config = cli.parse_recipe(arguments, prog=script, description="")
        else:
            assert script == "jobs/tune.py"
            config, _ = cli.parse_search(arguments, prog=script, description="")
        if str(config.run.output_dir) == "/shared/distmaml":
            assert config.run.name is not None
            assert config.cluster.use_gpu == "yes"  # auto looks at the GPUs that are there: none, before the nodes come


# ------------------------------------------------------------------------------------------------------- secrets

LITERALS = (
    r"\b[0-9a-fA-F]{24,}\b",
    r"(?<![\w/.-])(?=(?:[A-Za-z+/]*[0-9]){3})[A-Za-z0-9+/]{40,}={0,2}(?![\w/.-])",
    r"\b(?:AKIA|ghp_|sk-)[A-Za-z0-9]{10,}",
    r"-----BEGIN [A-Z ]*PRIVATE KEY",
    r"://[^\s/:@]+:[^\s/@$]+@",
    r"(?i)(?:password|passwd|secret(?!name|s\b|keyref)|token)[\w\"']*(?::\s*|\s*=\s*[\"']|=)[\"']?"
    r"(?!required\b)[A-Za-z0-9+/]{6,}",
)


def secrets_in(text: str) -> list[str]:
    """What looks like one."""
    return [match[0] for pattern in LITERALS for match in re.finditer(pattern, text)]


@pytest.mark.parametrize("name", files())
def test_no_file_has_a_secret_in_it(name: str) -> None:
    assert secrets_in(_text(name)) == []


@pytest.mark.parametrize(
    "planted",
    [
        "POSTGRES_PASSWORD: hunter22",
        "password=correcthorse",
        "RAY_AUTH_TOKEN=" + "ab" * 16,
        "auth_token: '" + "0" * 64 + "'",
        "- " + "c3VwZXJzZWNyZXQ" * 3 + "==",
        "aws_access_key: AKIAABCDEFGHIJKLMNOP",
        "postgresql+psycopg2://mlflow:letmein@postgres/mlflow",
    ],
)
def test_a_planted_secret_is_found(planted: str) -> None:
    assert secrets_in(f"kind: Secret\n{planted}\n")


def environment_of(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for container in pod["containers"]:
        yield from container.get("env", [])


def is_secret(name: str) -> bool:
    return bool(re.search(r"PASSWORD|SECRET|TOKEN|PRIVATE|ACCESS_KEY", name))


def test_secrets_reach_pods_from_secrets_only() -> None:
    spec = cluster_specs()["distmaml"]
    pods = [group["template"]["spec"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]
    pods += [found["spec"]["template"]["spec"] for kind in ("Deployment", "StatefulSet") for found in all_of(kind)]
    found = [variable for pod in pods for variable in environment_of(pod) if is_secret(variable["name"])]
    found += [v for pod in pods for v in environment_of(pod) if v["name"] == "PGPASSWORD"]
    assert {variable["name"] for variable in found} >= {
        *("POSTGRES_PASSWORD", "PGPASSWORD", "MLFLOW_AUTH_ADMIN_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"),
        "MLFLOW_TRACKING_PASSWORD",
    }
    made = set(re.findall(r"'([A-Z_]+)=%s", _text("mlflow-secrets.sh")))
    for variable in found:
        assert set(variable) == {"name", "valueFrom"}
        assert variable["valueFrom"]["secretKeyRef"]["name"] == "mlflow"
        assert variable["valueFrom"]["secretKeyRef"]["key"] in made
    assert all_of("Secret") == []


def test_compose_takes_its_secrets_from_the_environment_and_will_not_start_without() -> None:
    services = load("compose.yaml")["services"]
    variables = {name: value for service in services.values() for name, value in service["environment"].items()}
    found = {name: value for name, value in variables.items() if is_secret(name) or name == "PGPASSWORD"}
    assert len(found) == 4
    made = set(re.findall(r"'([A-Z_]+)=%s", _text("mlflow-secrets.sh")))
    for value in found.values():
        variable, _, message = value.removeprefix("${").partition(":?")
        assert variable in made
        assert "mlflow-secrets.sh" in message


def command_lines() -> Iterator[str]:
    """Every command that a file of ours starts, as `ps` would show it."""
    for name in LAUNCHERS:
        for key, value in load(name).items():
            if key.endswith("commands"):
                yield from value
    for service in load("compose.yaml")["services"].values():
        yield " ".join(service.get("command", []))
        yield " ".join(service["healthcheck"]["test"])
    for kind in ("Deployment", "StatefulSet"):
        for found in all_of(kind):
            for container in found["spec"]["template"]["spec"]["containers"]:
                yield " ".join([*container.get("command", []), *container.get("args", [])])
    for job in all_of("RayJob"):
        yield job["spec"]["entrypoint"]
    yield from re.findall(r"^(?:RUN|CMD) (?:.*\\\n)*.*", _text("Dockerfile"), re.MULTILINE)
    yield from readme_commands()
    for name in SCRIPTS:
        # printf is the shell's own and no process; a comment is no command
        yield from (line for line in _text(name).splitlines() if not re.match(r"\s*(printf|#)", line))


def test_no_command_line_holds_a_secret() -> None:
    lines = list(command_lines())
    assert len(lines) > 100
    for line in lines:
        assert not re.search(r"\$\{?\w*(PASSWORD|SECRET|TOKEN|password|token)\b", line), line
        assert not re.search(r"--(password|token|from-literal|redis-password|backend-store-uri)\b", line), line


def run_script(name: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CLUSTER / name, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_passwords_are_made_once_for_their_owner_and_not_shown(tmp_path: Path) -> None:
    script = tmp_path / "cluster" / "mlflow-secrets.sh"
    script.parent.mkdir()
    script.write_bytes((CLUSTER / "mlflow-secrets.sh").read_bytes())

    def run() -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "HOME": str(tmp_path)}
        return subprocess.run(["bash", script], env=environment, capture_output=True, text=True, check=False)

    first = run()
    assert first.returncode == 0, first.stderr
    server, client = script.parent / ".env", tmp_path / ".mlflow" / "credentials"
    assert mode(server) == mode(client) == 0o600
    values = dict(line.split("=", 1) for line in server.read_text().splitlines())
    assert set(values) == {"POSTGRES_PASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY", "MLFLOW_AUTH_ADMIN_PASSWORD"}
    assert all(re.fullmatch(r"[0-9a-f]{64}", value) for value in values.values())
    assert len(set(values.values())) == 3
    assert f"mlflow_tracking_password = {values['MLFLOW_AUTH_ADMIN_PASSWORD']}\n" in client.read_text()
    assert not any(value in first.stdout + first.stderr for value in values.values())
    before = server.read_text()
    again = run()
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 1
    assert server.read_text() == before


def test_the_passwords_are_neither_committed_nor_sent_with_a_job() -> None:
    """Ray leaves out of a working directory what .gitignore names."""
    assert re.search(r"^(?:/?cluster/)?\.env$", (REPOSITORY / ".gitignore").read_text(), re.MULTILINE)
    assert ".env" in load("aws.yaml")["rsync_exclude"]


# ------------------------------------------------------------------------------------------------- the locked door


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_ray_is_started_with_a_token(name: str) -> None:
    config = load(name)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        (start,) = [command for command in config[key] if "ray start" in command]
        assert re.search(r"export [^;]*\bRAY_AUTH_MODE=token;", start.partition("ray start")[0])
    assert "--dashboard-host=127.0.0.1" in " ".join(config["head_start_ray_commands"])


def test_no_other_file_starts_ray_by_itself() -> None:
    starting = {name for name in files() if re.search(r"\bray start --|ray\.init\((?!address)", _text(name))}
    assert starting - {"local.py"} == set(LAUNCHERS)


def test_kuberay_starts_ray_with_the_token_of_a_secret() -> None:
    for spec in cluster_specs().values():
        assert spec["authOptions"] == {"mode": "token", "secretName": "ray-token"}


def test_on_aws_only_ssh_from_ones_own_address_comes_in() -> None:
    resources = load("aws-network.yaml")["Resources"]
    groups = [found for found in resources.values() if found["Type"] == "AWS::EC2::SecurityGroup"]
    more = [found["Properties"] for found in resources.values() if found["Type"].startswith("AWS::EC2::SecurityGroupI")]
    (rule,) = groups[0]["Properties"]["SecurityGroupIngress"]
    assert (len(groups), rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) == (1, "tcp", 22, 22)
    assert rule["CidrIp"] == {"Ref": "SshFrom"}
    (among,) = more
    itself = {"Fn::GetAtt": ["Nodes", "GroupId"]}
    assert among == {"GroupId": itself, "IpProtocol": "-1", "SourceSecurityGroupId": itself}
    (mount,) = [found["Properties"] for found in resources.values() if found["Type"] == "AWS::EFS::MountTarget"]
    assert mount["SecurityGroups"] == [itself]
    allowed = load("aws-network.yaml")["Parameters"]["SshFrom"]["AllowedPattern"]
    assert re.search(allowed, "203.0.113.7/32")
    assert re.search(allowed, "198.51.100.0/24")
    assert not any(re.search(allowed, other) for other in ("0.0.0.0/0", "0.0.0.0/1", "203.0.113.7", "::/0"))


def test_on_aws_ray_makes_no_security_group_of_its_own() -> None:
    from ray.autoscaler._private.aws.config import _configure_security_group

    config = load("aws.yaml")
    assert "security_group" not in config["provider"]
    (group,) = {
        name for kind in config["available_node_types"].values() for name in kind["node_config"]["SecurityGroupIds"]
    }
    assert group == config["metadata"]["security_group"]
    before = copy.deepcopy(config)
    assert _configure_security_group(config) == before  # without asking AWS for anything


def test_the_stack_prints_what_the_head_of_the_aws_file_wants() -> None:
    outputs = set(load("aws-network.yaml")["Outputs"])
    assert outputs == {"SecurityGroup", "Subnet", "Image", "Disk"}
    text = _text("aws.yaml")
    for placeholder in ("sg-from-the-stack", "subnet-from-the-stack", "ami-from-the-stack", "disk-from-the-stack"):
        assert text.count(placeholder) == 1


@pytest.fixture
def gcloud(tmp_path: Path) -> Path:
    """A folder with a `gcloud` that writes down what it is asked, and finds what lies in its folder `there`."""
    (tmp_path / "there").mkdir()
    script = tmp_path / "gcloud"
    script.write_text(
        "#!/usr/bin/env bash\n"
        f'printf "%s\\n" "$*" >> {tmp_path}/asked\n'
        '[[ "$*" != *describe* || "$*" == *--format* ]] || '
        f'[ -e "{tmp_path}/there/$(sed "s/ describe.*//; s/ /-/g" <<< "$*")" ]\n'
    )
    script.chmod(0o755)
    return tmp_path


def made(gcloud: Path) -> list[list[str]]:
    return [shlex.split(line) for line in (gcloud / "asked").read_text().splitlines() if " create " in line]


def test_on_google_cloud_only_ssh_from_ones_own_address_comes_in(gcloud: Path) -> None:
    path = f"{gcloud}:{os.environ['PATH']}"
    done = run_script("gcp-network.sh", "mine", "us-central1", "us-central1-a", "203.0.113.7/32", PATH=path)
    assert done.returncode == 0, done.stderr
    rules = [command for command in made(gcloud) if "firewall-rules" in command]
    (ssh, among) = rules
    assert ssh[ssh.index("--rules") + 1] == "tcp:22"
    assert ssh[ssh.index("--source-ranges") + 1] == "203.0.113.7/32"
    assert among[among.index("--rules") + 1] == "all"
    assert among[among.index("--source-tags") + 1] == among[among.index("--target-tags") + 1] == "distmaml"
    assert "--source-ranges" not in among
    for rule in rules:
        assert rule[rule.index("--network") + 1] == "distmaml"
    config = load("gcp.yaml")
    for kind in config["available_node_types"].values():
        (interface,) = kind["node_config"]["networkInterfaces"]
        assert interface["subnetwork"] == f"regions/{config['provider']['region']}/subnetworks/distmaml"
        assert kind["node_config"]["tags"] == {"items": ["distmaml"]}


def test_what_exists_on_google_cloud_is_left_as_it_is(gcloud: Path) -> None:
    for kind in ("compute-networks", "compute-firewall-rules", "filestore-instances"):
        (gcloud / "there" / kind).touch()
    path = f"{gcloud}:{os.environ['PATH']}"
    done = run_script("gcp-network.sh", "mine", "us-central1", "us-central1-a", "203.0.113.7/32", PATH=path)
    assert done.returncode == 0, done.stderr
    (only,) = made(gcloud)
    assert only[:4] == ["compute", "networks", "subnets", "create"]


@pytest.mark.parametrize("addresses", ["0.0.0.0/0", "203.0.113.7", "everyone"])
def test_the_whole_world_is_not_let_in_on_google_cloud(gcloud: Path, addresses: str) -> None:
    path = f"{gcloud}:{os.environ['PATH']}"
    done = run_script("gcp-network.sh", "mine", "us-central1", "us-central1-a", addresses, PATH=path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert not (gcloud / "asked").exists()


def admits(source: dict[str, str], namespace: str, target: dict[str, str], port: int) -> bool:
    """Whether our NetworkPolicies let a pod of a namespace through to a pod of ours.

    Once any policy selects the target, what none of its rules names is refused
    (https://kubernetes.io/docs/concepts/services-networking/network-policies/).
    """

    def chosen(selector: dict[str, Any], labels: dict[str, str]) -> bool:
        assert set(selector) <= {"matchLabels"}
        return all(labels.get(name) == value for name, value in selector.get("matchLabels", {}).items())

    def named_by(peer: dict[str, Any]) -> bool:
        assert set(peer) <= {"podSelector", "namespaceSelector"}
        its_own = {"kubernetes.io/metadata.name": namespace}
        spaces = chosen(peer["namespaceSelector"], its_own) if "namespaceSelector" in peer else namespace == "distmaml"
        return spaces and chosen(peer["podSelector"], source)

    policies = [found["spec"] for found in all_of("NetworkPolicy") if chosen(found["spec"]["podSelector"], target)]
    assert all(policy["policyTypes"] == ["Ingress"] for policy in policies)
    return not policies or any(
        any(named_by(peer) for peer in rule["from"])
        and ("ports" not in rule or any(allowed["port"] == port for allowed in rule["ports"]))
        for policy in policies
        for rule in policy.get("ingress", [])
    )


def test_the_network_policies_let_through_what_they_should_and_nothing_else() -> None:
    spec = cluster_specs()["distmaml"]
    labels = spec["headGroupSpec"]["template"]["metadata"]["labels"]
    assert all(group["template"]["metadata"]["labels"] == labels for group in spec["workerGroupSpecs"])
    # what KubeRay adds (controllers/ray/common/pod.go, rayjob_controller.go), and its chart for the operator
    head, worker = labels | {"ray.io/node-type": "head"}, labels | {"ray.io/node-type": "worker"}
    submitter = {"ray.io/originated-from-crd": "RayJob", "app.kubernetes.io/created-by": "kuberay-operator"}
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    mlflow = named("Deployment", "mlflow")["spec"]["template"]["metadata"]["labels"]
    postgres = named("StatefulSet", "postgres")["spec"]["template"]["metadata"]["labels"]
    stranger = {"app": "shell"}

    for source, target in ((head, worker), (worker, head), (worker, worker)):
        for port in (6379, 8265, 10001, 40123):
            assert admits(source, "distmaml", target, port)
    assert admits(submitter, "distmaml", head, 8265)
    assert admits(operator, "kuberay", head, 8265)
    assert admits(head, "distmaml", mlflow, 5000)
    assert admits(mlflow, "distmaml", postgres, 5432)

    for port in (6379, 10001, 52365):
        assert not admits(submitter, "distmaml", head, port)
        assert not admits(operator, "kuberay", head, port)
    assert not admits(head, "distmaml", mlflow, 22)
    assert not admits(mlflow, "distmaml", postgres, 22)
    assert not admits(submitter, "distmaml", worker, 8265)
    assert not admits(submitter, "elsewhere", head, 8265)
    assert not admits(operator, "elsewhere", head, 8265)
    assert not admits(head, "elsewhere", worker, 6379)
    for source in (stranger, mlflow, postgres):
        for target in (head, worker):
            assert not any(admits(source, "distmaml", target, port) for port in (6379, 8265, 10001, 40123))
    assert not any(admits(source, "distmaml", mlflow, 5000) for source in (stranger, postgres, submitter))
    assert not any(admits(source, "distmaml", postgres, 5432) for source in (stranger, head, worker, submitter))
    assert not admits(stranger, "distmaml", {"app": "whatever is added"}, 80)


def test_no_service_is_open_to_the_outside() -> None:
    for service in all_of("Service"):
        assert service["spec"].get("type", "ClusterIP") == "ClusterIP"
    for spec in cluster_specs().values():
        assert not {"enableIngress", "serviceType", "headService"} & set(spec["headGroupSpec"])
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            assert "hostNetwork" not in group["template"]["spec"]
    (service,) = [found for found in all_of("Service") if found["metadata"]["name"] == "distmaml-dashboard"]
    head = cluster_specs()["distmaml"]["headGroupSpec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == head | {"ray.io/node-type": "head"}
    assert [port["port"] for port in service["spec"]["ports"]] == [8265]


# ----------------------------------------------------------------------------------------------------- MLflow


def server_settings() -> list[tuple[list[str], dict[str, str]]]:
    """Command and plain variables of the MLflow server: of compose, and of Kubernetes."""
    service = load("compose.yaml")["services"]["mlflow"]
    (container,) = named("Deployment", "mlflow")["spec"]["template"]["spec"]["containers"]
    return [
        (service["command"], {k: v for k, v in service["environment"].items() if ":?" not in v}),
        (container["command"], {v["name"]: v["value"] for v in container["env"] if "value" in v}),
    ]


def test_mlflow_is_the_same_server_on_compose_and_on_kubernetes() -> None:
    (compose, its), (kubernetes, theirs) = server_settings()
    assert compose == kubernetes
    hosts = its.pop("MLFLOW_SERVER_ALLOWED_HOSTS")
    assert hosts == "${MLFLOW_SERVER_ALLOWED_HOSTS:-" + theirs.pop("MLFLOW_SERVER_ALLOWED_HOSTS") + "}"
    assert its == theirs
    assert named("ConfigMap", "mlflow-auth")["data"]["auth.ini"] == _text("mlflow-auth.ini")


def test_mlflow_asks_for_a_password_and_for_the_right_host() -> None:
    for command, variables in server_settings():
        assert "--app-name=basic-auth" in command
        assert variables["MLFLOW_AUTH_CONFIG_PATH"] == "/etc/mlflow/auth.ini"
        hosts = variables["MLFLOW_SERVER_ALLOWED_HOSTS"].removeprefix("${MLFLOW_SERVER_ALLOWED_HOSTS:-").rstrip("}")
        assert set(hosts.split(",")) == {"mlflow:5000", "127.0.0.1:5000", "localhost:5000"}
        assert variables["MLFLOW_BACKEND_STORE_URI"] == "postgresql+psycopg2://mlflow@postgres:5432/mlflow"
        assert variables["MLFLOW_DISABLE_TELEMETRY"] == "true"
        assert variables["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"


def test_mlflow_has_no_password_in_its_file_of_users_and_caches_whom_it_knows() -> None:
    file = configparser.ConfigParser()
    file.read_string(_text("mlflow-auth.ini"))
    settings = dict(file["mlflow"])
    assert settings["database_uri"] == "postgresql+psycopg2://mlflow@postgres:5432/mlflow"  # libpq adds PGPASSWORD
    assert settings["auth_cache_ttl_seconds"] == "60"
    assert "admin_password" not in settings


def test_compose_listens_on_loopback_and_postgres_not_at_all() -> None:
    services = load("compose.yaml")["services"]
    assert services["mlflow"]["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]
    assert "ports" not in services["postgres"]
    assert services["mlflow"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    mounted = services["mlflow"]["volumes"][0].partition(":")[0]
    assert (CLUSTER / mounted).is_file()


# --------------------------------------------------------------------------------------------------- versions


@functools.cache
def pinned() -> dict[str, str]:
    lines = (REPOSITORY / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if "==" in line)


def test_images_and_manifests_have_the_versions_of_the_constraints() -> None:
    for spec in cluster_specs().values():
        assert spec["rayVersion"] == pinned()["ray"]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    images = set(re.findall(r"\b(distmaml(?:-mlflow)?):(\d[\w.]*)", "\n".join(map(_text, files()))))
    assert images == {("distmaml", project["version"]), ("distmaml-mlflow", pinned()["mlflow"])}
    assert f"ray[default,train,tune]=={pinned()['ray']}" in project["dependencies"]


def test_every_pinned_version_is_that_of_the_constraints() -> None:
    found = [pin for name in files() for pin in re.findall(r"\b([A-Za-z][\w.-]*)==(\d[\w.]*)", _text(name))]
    assert {name for name, _ in found} >= {"psycopg2-binary", "uvloop", "Flask-WTF"}
    for name, version in found:
        assert pinned().get(name, version) == version, name
    versions = {name: {version for other, version in found if other == name} for name, _ in found}
    assert all(len(each) == 1 for each in versions.values())


def test_python_is_the_same_everywhere() -> None:
    python = re.search(r"on Python (\d\.\d+)", (REPOSITORY / "constraints.txt").read_text())
    assert python is not None
    assert f"ARG PYTHON_VERSION={python[1]}\n" in _text("Dockerfile")
    for name in LAUNCHERS:
        (venv,) = [command for command in load(name)["setup_commands"] if "uv venv" in command]
        assert f"--python {python[1]} ~/venv" in venv
        (install,) = [command for command in load(name)["setup_commands"] if "pip install" in command]
        assert "-c ~/distmaml/constraints.txt" in install
        for key in ("head_start_ray_commands", "worker_start_ray_commands"):
            assert all(command.startswith("export PATH=$HOME/venv/bin:$PATH") for command in load(name)[key])


def test_the_image_is_installed_by_the_constraints() -> None:
    installs = re.findall(r"pip install .*", _text("Dockerfile"))
    assert len(installs) == 4
    assert all("-c constraints.txt" in install for install in installs)
    copied = {word for line in re.findall(r"^COPY (.*)", _text("Dockerfile"), re.MULTILINE) for word in line.split()}
    let_in = {line[1:] for line in _text("Dockerfile.dockerignore").splitlines() if line.startswith("!")}
    assert let_in == {name for name in copied if (REPOSITORY / name).exists() and name != "./"}


# ------------------------------------------------------------------------------------------------------- README


def readme_commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", _text("README.md"), re.DOTALL)
    return [line for block in blocks for line in block.replace("\\\n", " ").splitlines() if line.strip()]


def test_the_readme_names_files_that_are_there() -> None:
    named_there = re.findall(r"(?<![\w/])(?:cluster|jobs|tests)/[\w./-]*\w", _text("README.md"))
    assert len(set(named_there)) > 10
    made_by_the_user = {"cluster/.env"}
    for name in set(named_there) - made_by_the_user:
        assert (REPOSITORY / name).exists(), name


def test_the_readme_leads_to_every_file() -> None:
    indirectly = {"Dockerfile.dockerignore", "mlflow-auth.ini", "local.sh", "local.py", "README.md"}
    for name in set(files()) - indirectly:
        assert Path(name).name in _text("README.md"), name


# ------------------------------------------------------------------------------------------------- spot notices


class _Metadata(BaseHTTPRequestHandler):
    """The metadata service of a cloud, whose notice comes with the second question."""

    asked: int

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self._answer(200, b"session")

    def do_GET(self) -> None:
        type(self).asked += 1
        come = type(self).asked > 1
        if self.path == "/latest/meta-data/spot/instance-action":
            known = self.headers["X-aws-ec2-metadata-token"] == "session"
            self._answer(200 if come and known else 404, b"{}")
        else:
            assert self.path == "/computeMetadata/v1/instance/preempted"
            assert self.headers["Metadata-Flavor"] == "Google"
            self._answer(200, b"TRUE" if come else b"FALSE")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", "110"), ("gcp", "25")])
def test_ray_hears_that_a_node_is_taken_back(cloud: str, seconds: str, tmp_path: Path) -> None:
    for name, does in {
        "ray": f'printf "%s\\n" "$@" > {tmp_path}/heard',
        "python": "echo this-node",
        "sleep": "exec true",
    }.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{does}\n")
        (tmp_path / name).chmod(0o755)
    handler = type("Handler", (_Metadata,), {"asked": 0})
    with HTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        environment = {"AWS_METADATA": address, "GCP_METADATA": address, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = run_script("spot-notice.sh", cloud, **environment)
        server.shutdown()
    assert done.returncode == 0, done.stderr
    heard = (tmp_path / "heard").read_text().splitlines()
    assert heard[:3] == ["drain-node", "--node-id", "this-node"]
    assert heard[heard.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    assert heard[heard.index("--deadline-remaining-seconds") + 1] == seconds


def test_an_unknown_cloud_is_refused() -> None:
    assert run_script("spot-notice.sh", "azure").returncode == 2


# ---------------------------------------------------------------------------------------------------- certificates


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout


def test_certificates_hold_the_names_and_the_keys_are_private(tmp_path: Path) -> None:
    done = run_script("certificates.sh", tmp_path / "tls", "node-1", "10.0.0.7", "fd00::7")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tls"
    assert sorted(path.name for path in folder.iterdir()) == ["ca.crt", "ca.key", "node.crt", "node.key"]
    assert mode(folder) == 0o700
    assert mode(folder / "ca.key") == mode(folder / "node.key") == 0o600
    names = openssl("x509", "-in", folder / "node.crt", "-noout", "-ext", "subjectAltName")
    assert "IP Address:10.0.0.7" in names
    assert "DNS:node-1" in names
    assert "FD00:0:0:0:0:0:0:7" in names
    assert "node.crt: OK" in openssl("verify", "-CAfile", folder / "ca.crt", folder / "node.crt")
    assert "PRIVATE" not in done.stdout
    assert dict(line.removeprefix("export ").split("=", 1) for line in done.stdout.splitlines()) == {
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": str(folder / "node.crt"),
        "RAY_TLS_SERVER_KEY": str(folder / "node.key"),
        "RAY_TLS_CA_CERT": str(folder / "ca.crt"),
    }
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    again = run_script("certificates.sh", folder, "node-1")
    assert again.returncode == 2
    assert "node.crt exists" in again.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_further_node_gets_its_certificate_from_the_same_authority(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert run_script("certificates.sh", first, "10.0.0.1").returncode == 0
    second.mkdir()
    for name in ("ca.crt", "ca.key"):
        (second / name).write_bytes((first / name).read_bytes())
    assert run_script("certificates.sh", second, "10.0.0.2").returncode == 0
    assert (second / "ca.key").read_bytes() == (first / "ca.key").read_bytes()
    assert "OK" in openssl("verify", "-CAfile", first / "ca.crt", second / "node.crt")
    (second / "node.crt").unlink()
    (second / "node.key").unlink()
    (second / "ca.key").unlink()
    assert "only one of ca.crt and ca.key" in run_script("certificates.sh", second, "10.0.0.2").stderr


@pytest.mark.parametrize("arguments", [[], ["{}"], ["{}", "999.2.3.4"], ["{}", "1.2.3"], ["{}", "a,DNS:b"], ["{}", ""]])
def test_a_wrong_host_is_one_clear_line_and_leaves_nothing(arguments: list[str], tmp_path: Path) -> None:
    done = run_script("certificates.sh", *(argument.format(tmp_path / "tls") for argument in arguments))
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("certificates.sh: ")
    assert not (tmp_path / "tls").exists()


TWO_NODES = """
import json, os, sys
import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
ray.init(address=cluster.address, log_to_driver=False)


@ray.remote(num_cpus=1)
def where() -> str:
    return ray.get_runtime_context().get_node_id()


nodes = [node["NodeID"] for node in ray.nodes()]
at = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
found = ray.get([where.options(scheduling_strategy=at(node, soft=False)).remote() for node in nodes])
print(json.dumps({"address": cluster.address, "nodes": nodes, "found": found}), flush=True)
sys.stdin.readline()
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.ray
def test_two_nodes_talk_tls_and_refuse_whoever_has_no_certificate(tmp_path: Path) -> None:
    made = run_script("certificates.sh", tmp_path / "tls", "127.0.0.1", "localhost")
    variables = dict(line.removeprefix("export ").split("=", 1) for line in made.stdout.splitlines())
    folder = tempfile.mkdtemp(prefix="tls", dir="/tmp")  # a socket's path may have 107 characters
    environment = {
        **os.environ,
        **variables,
        "RAY_TMPDIR": folder,
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # all ports on 127.0.0.1 only
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    with (
        (tmp_path / "errors").open("wb") as errors,
        subprocess.Popen(
            [sys.executable, "-c", TWO_NODES],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        ) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            line = next((line for line in process.stdout if line.startswith("{")), None)
            assert line, (tmp_path / "errors").read_text()
            said = json.loads(line)
            assert len(said["nodes"]) == 2
            assert sorted(said["found"]) == sorted(said["nodes"])
            check_door(said["address"], tmp_path / "tls")
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.wait(60) == 0, (tmp_path / "errors").read_text()
        finally:
            process.kill()
            for left in psutil.process_iter():
                try:
                    if left.environ().get("RAY_TMPDIR") == folder:
                        left.kill()
                except psutil.Error:
                    continue
            shutil.rmtree(folder, ignore_errors=True)


def check_door(address: str, folder: Path) -> None:
    """The GCS shows a certificate of our authority for its address, and wants one."""

    def handshake(*arguments: str | Path) -> str:
        command = ["openssl", "s_client", "-connect", address, "-CAfile", str(folder / "ca.crt")]
        command += ["-verify_return_error", *map(str, arguments)]
        done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
        return done.stdout + done.stderr

    its = ("-cert", folder / "node.crt", "-key", folder / "node.key")
    assert "Verify return code: 0 (ok)" in handshake("-verify_ip", "127.0.0.1", *its)
    assert "IP address mismatch" in handshake("-verify_ip", "10.1.2.3", *its)
    assert not grpc_answers(address)  # without TLS
    assert not grpc_answers(address, ca=folder / "ca.crt")  # with, but without a certificate
    assert grpc_answers(address, ca=folder / "ca.crt", own=folder / "node")


def grpc_answers(address: str, ca: Path | None = None, own: Path | None = None) -> bool:
    """Whether a call reaches the server behind an address, whatever it says of it."""
    import grpc  # type: ignore[import-untyped, unused-ignore]

    if ca is None:
        channel = grpc.insecure_channel(address)
    else:
        key = own.with_suffix(".key").read_bytes() if own else None
        chain = own.with_suffix(".crt").read_bytes() if own else None
        channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(ca.read_bytes(), key, chain))
    with channel:
        try:
            channel.unary_unary("/nobody/Knows")(b"", timeout=10)
        except grpc.RpcError as error:
            code = error.code()
            assert code in (
                grpc.StatusCode.UNAVAILABLE,  # nobody there who would talk to us
                grpc.StatusCode.UNIMPLEMENTED,
                grpc.StatusCode.UNAUTHENTICATED,
            ), code
            return bool(code is not grpc.StatusCode.UNAVAILABLE)
    return True
