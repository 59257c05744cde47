"""cluster.yaml: what Ray's launcher checks, what it lets through, and what the file's commands do on a node.

Ray validates the outline and leaves `provider`, `node_config` and every command to fail on the cloud, or to succeed
with less security than was meant. `faults` looks there. Nothing here needs a cloud account or starts Ray.
"""

from __future__ import annotations

import copy
import http.server
import os
import re
import shlex
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.command_runner import _with_interactive
from ray.autoscaler._private.util import prepare_config, validate_config, with_envs
from ray.scripts.scripts import cli

Config = dict[str, Any]

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "docs" / "cluster.md"
PLACEHOLDER = "CHANGE-ME"


def _words(text: str) -> set[str]:
    return set(text.split())


# What Ray 2.60 reads from an AWS provider section.
PROVIDER_KEYS = _words(
    "type region availability_zone cache_stopped_nodes use_internal_ips use_external_head_ip security_group key_pair "
    "aws_credentials cloudwatch disable_node_updaters disable_launch_config_check foreground_node_launch "
    "worker_liveness_check"
)
# EC2's RunInstances, less what Ray fills in (the counts, one subnet), plus Ray's own SubnetIds.
NODE_CONFIG_KEYS = _words(
    "AdditionalInfo BlockDeviceMappings CapacityReservationSpecification ClientToken CpuOptions CreditSpecification "
    "DisableApiStop DisableApiTermination DryRun EbsOptimized ElasticGpuSpecification ElasticInferenceAccelerators "
    "EnablePrimaryIpv6 EnclaveOptions HibernationOptions IamInstanceProfile ImageId InstanceInitiatedShutdownBehavior "
    "InstanceMarketOptions InstanceType Ipv6AddressCount Ipv6Addresses KernelId KeyName LaunchTemplate "
    "LicenseSpecifications MaintenanceOptions MetadataOptions Monitoring NetworkInterfaces NetworkPerformanceOptions "
    "Operator Placement PrivateDnsNameOptions PrivateIpAddress RamdiskId SecondaryInterfaces SecurityGroupIds "
    "SecurityGroups SubnetIds TagSpecifications UserData"
)
NESTED_KEYS = {
    "InstanceMarketOptions": {"MarketType", "SpotOptions"},
    "SpotOptions": _words("BlockDurationMinutes InstanceInterruptionBehavior MaxPrice SpotInstanceType ValidUntil"),
    "BlockDeviceMappings": {"DeviceName", "Ebs", "NoDevice", "VirtualName"},
    "Ebs": _words(
        "AvailabilityZone AvailabilityZoneId DeleteOnTermination EbsCardIndex Encrypted Iops KmsKeyId OutpostArn "
        "SnapshotId Throughput VolumeInitializationRate VolumeSize VolumeType"
    ),
    "MetadataOptions": _words("HttpEndpoint HttpProtocolIpv6 HttpPutResponseHopLimit HttpTokens InstanceMetadataTags"),
    "IamInstanceProfile": {"Arn", "Name"},
}
MARKET = "ray.io/market-type"
TOKEN = "~/.ray/auth_token"
LOOPBACK = "--dashboard-host=127.0.0.1"


def pins(lock: Path) -> dict[str, str]:
    """Reads `name==version` lines of a requirements file; a file that is not there pins nothing."""
    lines = lock.read_text().splitlines() if lock.is_file() else []
    return dict(re.findall(r"^([A-Za-z0-9._-]+)(?:\[[^]]*])?==([^\s;]+)", "\n".join(lines), re.MULTILINE))


def _unknown(where: str, given: Config, allowed: set[str]) -> list[str]:
    found = [f"{where}.{key}: unknown key" for key in given if key not in allowed]
    for key, value in given.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict) and key in NESTED_KEYS:
                found += _unknown(f"{where}.{key}", inner, NESTED_KEYS[key])
    return found


def _has_gpu(node_type: Config) -> bool:
    return re.match(r"(p|g)\d", node_type["node_config"].get("InstanceType", "")) is not None


def _node_type_faults(name: str, node_type: Config, is_head: bool) -> list[str]:
    found = []
    resources, node = node_type["resources"], node_type["node_config"]
    found += _unknown(f"{name}.node_config", node, NODE_CONFIG_KEYS)

    has_gpu = _has_gpu(node_type)
    if is_head and (has_gpu or resources.get("GPU", 0)):
        found.append(f"{name}: the head has a GPU")
    elif has_gpu != (resources.get("GPU", 0) > 0):
        found.append(f"{name}: resources.GPU does not fit {node.get('InstanceType')}")
    if is_head and resources.get("CPU") != 0:
        found.append(f"{name}: the head must offer CPU: 0")
    elif not is_head and resources.get("CPU", 0) <= 0:
        found.append(f"{name}: resources.CPU is missing")

    if not is_head:
        absent = [key for key in ("min_workers", "max_workers", "idle_timeout_s") if key not in node_type]
        found += [f"{name}: {key} is missing" for key in absent]
        if not absent and not 0 <= node_type["min_workers"] <= node_type["max_workers"]:
            found.append(f"{name}: min_workers is above max_workers")
        bought = node.get("InstanceMarketOptions", {}).get("MarketType", "on-demand")
        if node_type.get("labels", {}).get(MARKET) != bought:
            found.append(f"{name}: label {MARKET} does not say {bought}, which is how the node is bought")

    found += [
        f"{name}: {key} is missing, and Ray's default is too open"
        for key in ("SecurityGroupIds", "IamInstanceProfile")
        if not node.get(key)
    ]
    if node.get("MetadataOptions", {}).get("HttpTokens") != "required":
        found.append(f"{name}: the metadata service answers without a session token")
    if not all(disk.get("Ebs", {}).get("Encrypted") for disk in node.get("BlockDeviceMappings", [{}])):
        found.append(f"{name}: a disk is not encrypted")
    return found


def _file_faults(config: Config, root: Path) -> list[str]:
    mounts: dict[str, str] = config["file_mounts"]
    found = [
        f"file_mounts: {local} must lie in the checkout or below ~"
        for local in mounts.values()
        if local.startswith("/") or ".." in Path(local).parts
    ]
    if mounts.get(TOKEN) != TOKEN:
        found.append("file_mounts: the token does not reach the nodes")

    installs = [line for line in config["setup_commands"] if re.search(r"\bpip install\b.* -r ", line)]
    if not installs:
        return [*found, "setup_commands: nothing installs the lock"]
    for line in installs:
        if "--no-deps" not in line:
            found.append("setup_commands: the lock is installed without --no-deps")
        if "--python 3.11" not in line:
            found.append("setup_commands: the environment is not made for Python 3.11")
        for remote in re.findall(r" -r (\S+)", line):
            local = next((here + remote[len(at) :] for at, here in mounts.items() if remote.startswith(f"{at}/")), None)
            if local != "requirements/gpu.txt":
                found.append(f"setup_commands: {remote} is not requirements/gpu.txt")
            elif not (root / local).is_file():
                found.append(f"setup_commands: {local} is not in the checkout")
    return found


def _command_faults(config: Config, root: Path) -> list[str]:
    found = []
    starts = {
        key: [line for line in config[key] if "ray start" in line]
        for key in ("head_start_ray_commands", "worker_start_ray_commands")
    }
    for key, lines in starts.items():
        if not lines:
            found.append(f"{key}: nothing starts Ray")
        if not all(re.search(r"\bRAY_AUTH_MODE=token\b.*\bray start\b", line) for line in lines):
            found.append(f"{key}: ray start without RAY_AUTH_MODE=token")
    for line in starts["head_start_ray_commands"]:
        if re.findall(r"--dashboard-host\S*", line) != [LOOPBACK]:
            found.append("head_start_ray_commands: the dashboard does not listen on loopback")
        if "--autoscaling-config=~/ray_bootstrap_config.yaml" not in line:
            found.append("head_start_ray_commands: the head would not launch workers")

    setup = [*config["setup_commands"], *config["head_setup_commands"], *config.get("worker_setup_commands", [])]
    if not any("export RAY_AUTH_MODE=token" in line for line in setup):
        found.append("setup_commands: commands on a node would not use the token")
    locked = pins(root / "requirements" / "dev.txt") | pins(root / "requirements" / "gpu.txt")
    for name, version in re.findall(r"([\w.-]+)==([\w.+]+)", "\n".join(setup)):
        if locked.get(name, version) != version:
            found.append(f"setup_commands: {name}=={version}, but requirements/ has {locked[name]}")

    provider = config["provider"]
    region = provider.get("region", "")
    regions = re.findall(r"AWS_REGION=([\w-]+)", "\n".join(setup))
    zones = [zone.strip() for zone in provider.get("availability_zone", "").split(",")]
    if regions != [region] or not all(re.fullmatch(rf"{region}[a-z]|", zone) for zone in zones):
        found.append(f"provider.region: {region} here, another region elsewhere")
    return found


def faults(config: Config, root: Path = ROOT) -> list[str]:
    """Names what is wrong with a launcher config that Ray's own validator accepts."""
    types, head = config["available_node_types"], config["head_node_type"]
    found = _unknown("provider", config["provider"], PROVIDER_KEYS)
    for name, node_type in types.items():
        found += _node_type_faults(name, node_type, name == head)
    for market in ("spot", "on-demand"):
        if not any(_has_gpu(each) and each.get("labels", {}).get(MARKET) == market for each in types.values()):
            found.append(f"available_node_types: no {market} GPU type")
    return found + _file_faults(config, root) + _command_faults(config, root)


def ray_accepts(config: Config) -> Config:
    """Fills in defaults and validates, as `ray up` does before it talks to AWS."""
    prepared: Config = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    return prepared


@pytest.fixture
def config() -> Config:
    loaded: Config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    return loaded


def node(config: Config, name: str) -> Config:
    found: Config = config["available_node_types"][name]
    return found


def replace(config: Config, key: str, old: str, new: str) -> None:
    assert any(old in line for line in config[key]), f"{key} has no {old}"
    config[key] = [line.replace(old, new) for line in config[key]]


def test_the_file_is_accepted_by_ray_and_has_no_fault(config: Config) -> None:
    ray_accepts(config)
    assert faults(config) == []


def test_nodes_and_this_validation_use_the_same_ray() -> None:
    assert pins(ROOT / "requirements" / "gpu.txt")["ray"] == ray.__version__


MUTATIONS: list[tuple[str, Callable[[Config], Any], str]] = [
    (
        "zone typo",
        lambda c: c["provider"].update(avalability_zone=c["provider"].pop("availability_zone")),
        "provider.avalability_zone: unknown key",
    ),
    (
        "provider typo",
        lambda c: c["provider"].update(cache_stoped_nodes=False),
        "provider.cache_stoped_nodes: unknown key",
    ),
    (
        "node_config typo",
        lambda c: node(c, "gpu")["node_config"].update(KeyNane="mine"),
        "gpu.node_config.KeyNane: unknown key",
    ),
    (
        "disk typo",
        lambda c: node(c, "cpu")["node_config"].update(
            BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {"Encrypted": True, "VolumeSze": 9}}]
        ),
        "cpu.node_config.BlockDeviceMappings.Ebs.VolumeSze: unknown key",
    ),
    (
        "spot option typo",
        lambda c: node(c, "gpu-spot")["node_config"]["InstanceMarketOptions"].update(SpotOptions={"MaxPrise": "3"}),
        "gpu-spot.node_config.InstanceMarketOptions.SpotOptions.MaxPrise: unknown key",
    ),
    (
        "spot type bought on demand",
        lambda c: node(c, "gpu-spot")["node_config"].pop("InstanceMarketOptions"),
        "gpu-spot: label ray.io/market-type does not say on-demand, which is how the node is bought",
    ),
    (
        "market misspelt",
        lambda c: node(c, "gpu-spot")["node_config"].update(InstanceMarketOptions={"MarketType": "sopt"}),
        "gpu-spot: label ray.io/market-type does not say sopt, which is how the node is bought",
    ),
    (
        "no spot type",
        lambda c: c["available_node_types"].pop("gpu-spot"),
        "available_node_types: no spot GPU type",
    ),
    ("min above max", lambda c: node(c, "cpu").update(min_workers=9), "cpu: min_workers is above max_workers"),
    ("no limit", lambda c: node(c, "gpu").pop("max_workers"), "gpu: max_workers is missing"),
    (
        "GPU not declared",
        lambda c: node(c, "gpu-spot").update(resources={"CPU": 16}),
        "gpu-spot: resources.GPU does not fit g6e.12xlarge",
    ),
    ("CPU not declared", lambda c: node(c, "gpu").update(resources={"GPU": 4}), "gpu: resources.CPU is missing"),
    (
        "GPU declared where there is none",
        lambda c: node(c, "cpu").update(resources={"CPU": 32, "GPU": 1}),
        "cpu: resources.GPU does not fit m7i.8xlarge",
    ),
    (
        "GPU head",
        lambda c: node(c, "head")["node_config"].update(InstanceType="g6e.xlarge"),
        "head: the head has a GPU",
    ),
    ("head claims a GPU", lambda c: node(c, "head")["resources"].update(GPU=1), "head: the head has a GPU"),
    ("head takes tasks", lambda c: node(c, "head").update(resources={}), "head: the head must offer CPU: 0"),
    (
        "SSH open to the world",
        lambda c: node(c, "cpu")["node_config"].pop("SecurityGroupIds"),
        "cpu: SecurityGroupIds is missing, and Ray's default is too open",
    ),
    (
        "role with all of EC2",
        lambda c: node(c, "head")["node_config"].pop("IamInstanceProfile"),
        "head: IamInstanceProfile is missing, and Ray's default is too open",
    ),
    (
        "metadata without token",
        lambda c: node(c, "cpu")["node_config"].update(MetadataOptions={"HttpTokens": "optional"}),
        "cpu: the metadata service answers without a session token",
    ),
    (
        "plain disk",
        lambda c: node(c, "cpu")["node_config"].update(BlockDeviceMappings=[{"DeviceName": "/dev/sda1", "Ebs": {}}]),
        "cpu: a disk is not encrypted",
    ),
    (
        "dashboard on every interface",
        lambda c: replace(c, "head_start_ray_commands", LOOPBACK, "--dashboard-host=0.0.0.0"),
        "head_start_ray_commands: the dashboard does not listen on loopback",
    ),
    (
        "second dashboard host wins",
        lambda c: replace(c, "head_start_ray_commands", LOOPBACK, f"{LOOPBACK} --dashboard-host 0.0.0.0"),
        "head_start_ray_commands: the dashboard does not listen on loopback",
    ),
    (
        "no autoscaler",
        lambda c: replace(c, "head_start_ray_commands", "--autoscaling-config=~/ray_bootstrap_config.yaml", ""),
        "head_start_ray_commands: the head would not launch workers",
    ),
    (
        "head without authentication",
        lambda c: replace(c, "head_start_ray_commands", "RAY_AUTH_MODE=token", "RAY_AUTH_MODE=disabled"),
        "head_start_ray_commands: ray start without RAY_AUTH_MODE=token",
    ),
    (
        "workers without authentication",
        lambda c: replace(c, "worker_start_ray_commands", "RAY_AUTH_MODE=token", ""),
        "worker_start_ray_commands: ray start without RAY_AUTH_MODE=token",
    ),
    (
        "commands without authentication",
        lambda c: replace(c, "setup_commands", "'export RAY_AUTH_MODE=token'", ""),
        "setup_commands: commands on a node would not use the token",
    ),
    ("token not sent", lambda c: c["file_mounts"].pop(TOKEN), "file_mounts: the token does not reach the nodes"),
    (
        "file of one machine",
        lambda c: c["file_mounts"].update({"~/data": "/home/me/data"}),
        "file_mounts: /home/me/data must lie in the checkout or below ~",
    ),
    (
        "file outside the checkout",
        lambda c: c["file_mounts"].update({"~/data": "../data"}),
        "file_mounts: ../data must lie in the checkout or below ~",
    ),
    (
        "dependencies resolved on the node",
        lambda c: replace(c, "setup_commands", "--no-deps ", ""),
        "setup_commands: the lock is installed without --no-deps",
    ),
    (
        "another Python",
        lambda c: replace(c, "setup_commands", "--python 3.11 ", "--python 3.12 "),
        "setup_commands: the environment is not made for Python 3.11",
    ),
    (
        "the lock of CPUs",
        lambda c: replace(c, "setup_commands", "-r ~/raysft/requirements/gpu.txt", "-r ~/raysft/requirements/cpu.txt"),
        "setup_commands: ~/raysft/requirements/cpu.txt is not requirements/gpu.txt",
    ),
    (
        "another Ray",
        lambda c: c["head_setup_commands"].append("pip install ray==2.59.0"),
        f"setup_commands: ray==2.59.0, but requirements/ has {ray.__version__}",
    ),
    (
        "two regions",
        lambda c: replace(c, "setup_commands", "AWS_REGION=us-west-2", "AWS_REGION=us-east-1"),
        "provider.region: us-west-2 here, another region elsewhere",
    ),
    (
        "zone of another region",
        lambda c: c["provider"].update(availability_zone="us-west-2a, us-east-1a"),
        "provider.region: us-west-2 here, another region elsewhere",
    ),
]


@pytest.mark.parametrize(("mutate", "expected"), [row[1:] for row in MUTATIONS], ids=[row[0] for row in MUTATIONS])
def test_a_fault_that_ray_lets_through_is_named(config: Config, mutate: Callable[[Config], Any], expected: str) -> None:
    mutate(config)
    ray_accepts(config)
    assert faults(config) == [expected]


def test_a_missing_lock_is_named(config: Config, tmp_path: Path) -> None:
    assert faults(config, tmp_path) == ["setup_commands: requirements/gpu.txt is not in the checkout"]


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (lambda c: c.update(idle_timeout=5), "'idle_timeout' was unexpected"),
        (lambda c: node(c, "gpu").update(max_worker=5), "'max_worker' was unexpected"),
        (lambda c: c.update(head_node_type="haed"), "must be one of `available_node_types`"),
        (lambda c: node(c, "cpu").update(min_workers=8) or c.update(max_workers=7), "smaller than the sum"),
    ],
    ids=["top-level key", "node type key", "head type", "sum of min_workers"],
)
def test_ray_itself_rejects_what_faults_leaves_to_it(
    config: Config, mutate: Callable[[Config], Any], message: str
) -> None:
    mutate(config)
    with pytest.raises(Exception, match=message):
        ray_accepts(config)


def test_key_lists_are_those_of_ec2() -> None:
    session = pytest.importorskip("botocore.session").get_session()
    shape = session.get_service_model("ec2").operation_model("RunInstances").input_shape
    filled_in = {"MinCount", "MaxCount", "SubnetId"}
    assert set(shape.members) - filled_in | {"SubnetIds"} == NODE_CONFIG_KEYS
    market, disk = shape.members["InstanceMarketOptions"], shape.members["BlockDeviceMappings"].member
    inner = {
        "InstanceMarketOptions": market,
        "SpotOptions": market.members["SpotOptions"],
        "BlockDeviceMappings": disk,
        "Ebs": disk.members["Ebs"],
        "MetadataOptions": shape.members["MetadataOptions"],
        "IamInstanceProfile": shape.members["IamInstanceProfile"],
    }
    assert {name: set(each.members) for name, each in inner.items()} == NESTED_KEYS


def test_every_node_type_launches_on_a_simulated_ec2(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Takes Ray's real AWS provider up to the running instance, with the placeholders filled in."""
    moto, boto3 = pytest.importorskip("moto"), pytest.importorskip("boto3")
    backend = pytest.importorskip("moto.ec2.models.instance_types").InstanceTypeBackend
    wanted = {each["node_config"]["InstanceType"] for each in config["available_node_types"].values()}
    offered = [each for each in backend.instance_types if each["InstanceType"] in wanted]
    monkeypatch.setattr(backend, "instance_types", offered)  # Ray lists them all, which takes moto many seconds
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    with moto.mock_aws():
        ec2 = boto3.client("ec2", region_name=config["provider"]["region"])
        iam = boto3.client("iam")
        group = ec2.create_security_group(
            GroupName="raysft", Description="raysft", VpcId=ec2.describe_vpcs()["Vpcs"][0]["VpcId"]
        )["GroupId"]
        image = ec2.register_image(Name="raysft")["ImageId"]
        for node_type in config["available_node_types"].values():
            settings = node_type["node_config"]
            assert PLACEHOLDER in settings["ImageId"] + settings["SecurityGroupIds"][0]
            settings.update(ImageId=image, SecurityGroupIds=[group])
        for profile in ("head", "worker"):
            iam.create_instance_profile(InstanceProfileName=f"{PLACEHOLDER}-raysft-{profile}")

        filled = AWSNodeProvider.fillout_available_node_types_resources(ray_accepts(config))
        validate_config(filled)
        ready = AWSNodeProvider.bootstrap_config(filled)
        launched = {}
        for name, node_type in ready["available_node_types"].items():
            provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
            tags = {"ray-node-type": "worker", "ray-launch-config": "x", "ray-node-name": name}
            (instance,) = provider.create_node(node_type["node_config"], tags, 1)
            described = ec2.describe_instances(InstanceIds=[instance])["Reservations"][0]["Instances"][0]
            launched[name] = (
                described["InstanceType"],
                described.get("InstanceLifecycle", "on-demand"),
                described["IamInstanceProfile"]["Arn"].rpartition("-")[2],
            )
        assert launched == {
            "head": ("m7i.2xlarge", "on-demand", "head"),
            "gpu": ("g6e.12xlarge", "on-demand", "worker"),
            "gpu-spot": ("g6e.12xlarge", "spot", "worker"),
            "cpu": ("m7i.8xlarge", "on-demand", "worker"),
        }

        # What the file offers is what it says, and the machine has it.
        machines = {each["InstanceType"]: each for each in ec2.describe_instance_types()["InstanceTypes"]}
        for name, node_type in filled["available_node_types"].items():
            given = config["available_node_types"][name]["resources"]
            assert {key: node_type["resources"][key] for key in given} == given
            machine = machines[node_type["node_config"]["InstanceType"]]
            gpus = sum(gpu["Count"] for gpu in machine.get("GpuInfo", {}).get("Gpus", []))
            assert given.get("GPU", 0) == gpus
            assert given["CPU"] <= machine["VCpuInfo"]["DefaultVCpus"]


class Node:
    """A machine that the launcher logs into: a home folder, and stand-ins that note how they were called."""

    PYTHON = "/usr/bin/python3"

    def __init__(self, home: Path) -> None:
        self.home, self.bin, self.calls = home, home / "bin", home / "calls"
        (home / "raysft").mkdir()
        (home / ".ray").mkdir()
        (home / ".ray" / "auth_token").write_text("secret")
        (home / "raysft" / "requirements").mkdir()
        self.lock.write_text("ray==2\n")
        self.bin.mkdir()
        # An image's own ~/.bash_profile stands in for the system's PATH.
        (home / ".bash_profile").write_text(f'export PATH="{self.bin}:$PATH"\n')
        self.calls.touch()

    @property
    def lock(self) -> Path:
        return self.home / "raysft" / "requirements" / "gpu.txt"

    def stub(self, name: str, body: str = "") -> None:
        file = self.bin / name
        file.write_text(f'#!/bin/bash\necho "{name} $*" >> {self.calls}\n{body}\n')
        file.chmod(0o755)

    def run(self, command: str) -> None:
        """Runs a command in the shell that the launcher opens through ssh."""
        line = " ".join(_with_interactive(command.replace(self.PYTHON, "python3-of-the-image")))
        environment = {"HOME": str(self.home), "PATH": os.environ["PATH"]}
        subprocess.run(
            line, shell=True, check=True, env=environment, start_new_session=True, capture_output=True, timeout=30
        )

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Node]:
    yield Node(tmp_path)
    (tmp_path / "stop").touch()  # ends what still loops in the background


def test_setup_runs_twice_and_installs_once_per_lock(config: Config, machine: Node) -> None:
    machine.stub("python3-of-the-image", f'[ "$3" = venv ] && mkdir -p {machine.home}/raysft/env; true')
    prepared = ray_accepts(config)
    again = ray_accepts(prepared)  # the head reads the file that `ray up` prepared, and prepares it once more
    assert again["worker_setup_commands"] == 2 * prepared["worker_setup_commands"]
    machine.home.joinpath(".ray", "auth_token").chmod(0o644)

    for command in again["worker_setup_commands"]:
        machine.run(command)

    home = machine.home
    install = f"python3-of-the-image -m uv pip install --python {home}/raysft/env --no-deps -r {machine.lock}"
    assert [call for call in machine.called() if "--no-deps" in call] == [install]
    assert (home / ".bashrc").read_text().splitlines() == ["source ~/raysft/node.sh"]
    assert (home / "raysft" / "node.sh").read_text().splitlines() == [
        'export PATH="$HOME/raysft/env/bin:$PATH"',
        "export RAY_AUTH_MODE=token",
        "export AWS_REGION=us-west-2",
        f"export RAYSFT_STORAGE=s3://{PLACEHOLDER}/raysft",
    ]
    assert stat.S_IMODE((home / ".ray" / "auth_token").stat().st_mode) == 0o600

    machine.lock.write_text("ray==3\n")
    for command in again["worker_setup_commands"]:
        machine.run(command)
    assert [call for call in machine.called() if "--no-deps" in call] == [install, install]


def test_a_failed_install_is_tried_again(config: Config, machine: Node) -> None:
    machine.stub("python3-of-the-image", f"mkdir -p {machine.home}/raysft/env; exit 1")
    (install,) = [command for command in config["setup_commands"] if "--no-deps" in command]
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            machine.run(install)
    assert not (machine.home / "raysft" / "env" / "gpu.txt").exists()


@pytest.mark.parametrize("role", ["head", "worker"])
def test_ray_starts_with_the_token_and_all_its_threads(config: Config, machine: Node, role: str) -> None:
    machine.stub("ray", f'echo "$1 auth=$RAY_AUTH_MODE omp=$OMP_NUM_THREADS" >> {machine.calls}')
    (start,) = [each for each in config[f"{role}_start_ray_commands"] if "ray start" in each]
    machine.run("".join(with_envs([start], {"RAY_HEAD_IP": "10.0.0.1"})))
    call, environment = machine.called()
    assert environment == "start auth=token omp="
    ports = {"head": "--head --port=6379", "worker": "--address=10.0.0.1:6379"}
    assert call.startswith(f"ray start {ports[role]} ")


@pytest.fixture
def metadata() -> Iterator[tuple[str, threading.Event]]:
    """EC2's metadata service on loopback: its address, and the event that sets the reclaim notice."""
    reclaim = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, status: int, body: bytes = b"") -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_PUT(self) -> None:
            asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200, b"session") if asked else self.answer(400)

        def do_GET(self) -> None:
            if self.headers["X-aws-ec2-metadata-token"] != "session":
                self.answer(401)
            elif self.path == "/latest/meta-data/spot/instance-action" and reclaim.is_set():
                self.answer(200, b'{"action": "terminate", "time": "2026-01-01T00:00:00Z"}')
            else:
                self.answer(404)

        def log_message(self, *_: Any) -> None:
            return

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", reclaim
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_spot_notice_drains_the_node_once(
    config: Config, machine: Node, metadata: tuple[str, threading.Event]
) -> None:
    address, reclaim = metadata
    machine.stub("ray", f'echo done >> {machine.home}/drained; [ "$(wc -l < {machine.home}/drained)" -ge 2 ]')
    machine.stub("sleep", f"[ -e {machine.home}/stop ] && kill $PPID; exec /bin/sleep 0.05")
    (watch,) = [each for each in config["worker_start_ray_commands"] if "169.254.169.254" in each]
    watch = watch.replace("169.254.169.254", address)

    machine.run(watch)
    machine.run(watch)  # Ray was started again on the node: one watcher is enough
    deadline = time.monotonic() + 30
    while len(machine.called()) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert {call.split()[0] for call in machine.called()} == {"sleep"}

    reclaim.set()
    lock = machine.home / "raysft" / "reclaim.lock"
    subprocess.run(["flock", str(lock), "true"], check=True, timeout=30)  # both watchers have ended
    drains = [call for call in machine.called() if not call.startswith("sleep")]
    expected = (
        "ray drain-node --reason DRAIN_NODE_REASON_PREEMPTION --reason-message spot node reclaimed "
        "--deadline-remaining-seconds 110"
    )
    assert drains == [expected, expected]  # refused once, then accepted


def _check_ray_command(words: list[str]) -> None:
    command: Any = cli
    while hasattr(command, "commands"):
        assert words[0] in command.commands, f"ray has no command {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    for word in words:
        if word == "--":
            return
        if word.startswith("-"):
            assert word.partition("=")[0] in options, f"ray {command.name} has no option {word}"


def test_every_ray_command_exists_with_its_options(config: Config) -> None:
    blocks = re.findall(r"```bash\n(.*?)```", GUIDE.read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    guide = [line for line in lines if line.startswith("ray ")]
    file = re.findall(
        r"\bray (?:start|stop|drain-node)[^;\n]*",
        "\n".join(config["head_start_ray_commands"] + config["worker_start_ray_commands"]),
    )
    assert len(guide) >= 8
    assert len(file) == 5
    for line in guide + file:
        _check_ray_command(shlex.split(line, comments=True)[1:])


def test_the_guide_lists_every_placeholder() -> None:
    lines = [line for line in (ROOT / "cluster.yaml").read_text().splitlines() if not line.startswith("#")]
    values = set(re.findall(rf"[\w:/-]*{PLACEHOLDER}[\w/-]*", "\n".join(lines)))
    listed = set(re.findall(rf"^\| `([^`]*{PLACEHOLDER}[^`]*)`", GUIDE.read_text(), re.MULTILINE))
    assert values == listed
    assert len(values) == 5
