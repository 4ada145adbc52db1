"""What kubectl renders, and what Kubernetes makes of it: pods, their arguments, selectors, who may reach whom."""

import ipaddress
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Iterator, NamedTuple, Optional

import yaml

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "deploy/kubernetes"
PROGRAMS = ("headwater-coordinator", "headwater-worker", "headwater-decode")
LEADER = "leaderworkerset.sigs.k8s.io/worker-index"
METADATA_ADDRESS = ipaddress.ip_address("169.254.169.254")
UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600}
SIZES = {"": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
         "m": 0.001}


def find_kubectl() -> Optional[str]:
    """The kubectl of this Python's environment, else the system's."""
    own = Path(sys.executable).parent / "kubectl"
    return str(own) if own.exists() else shutil.which("kubectl")


def render(kubectl: str, folder: Path) -> list:
    run = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    if run.returncode != 0:
        raise AssertionError(f"kubectl kustomize {folder}: status {run.returncode}: {run.stderr.strip()}")
    if run.stderr.strip():  # deprecated fields, for example
        raise AssertionError(f"kubectl kustomize {folder} warns: {run.stderr.strip()}")
    return [document for document in yaml.safe_load_all(run.stdout) if document]


def seconds(text: str) -> float:
    parts = re.findall(r"(\d+(?:\.\d+)?)(ms|s|m|h)", str(text))
    if not parts or "".join(a + b for a, b in parts) != str(text):
        raise ValueError(f"'{text}' is not a duration such as 45s")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def quantity(text) -> float:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([A-Za-z]*)", str(text))
    if not match or match.group(2) not in SIZES:
        raise ValueError(f"'{text}' is not a quantity such as 16Gi")
    return float(match.group(1)) * SIZES[match.group(2)]


class Flag(NamedTuple):
    default: str


def program_flags(binaries: Path) -> dict:
    """Program -> its flags, by name, as its --help tells them."""
    result = {}
    for program in PROGRAMS:
        run = subprocess.run([str(binaries / program), "--help"], capture_output=True, text=True, timeout=60, check=True)
        found = re.findall(r"^  --(\w+)(?:=VALUE)?(?: \(default (.*)\))?$", run.stdout, re.MULTILINE)
        if not found:
            raise AssertionError(f"{program} --help lists no flag: {run.stdout[:200]!r}")
        result[program] = {name: Flag(default) for name, default in found}
    return result


def matches(selector: dict, labels: dict) -> bool:
    """A LabelSelector; an empty one matches everything."""
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for term in selector.get("matchExpressions", []):
        value, operator = labels.get(term["key"]), term["operator"]
        if not {"In": value in term.get("values", []), "NotIn": value not in term.get("values", []),
                "Exists": value is not None, "DoesNotExist": value is None}[operator]:
            return False
    return True


class Peer(NamedTuple):
    """A pod at one end of a connection."""
    namespace: str
    namespace_labels: dict
    labels: dict


@dataclass
class Pod:
    """One kind of pod that a workload makes."""
    name: str
    workload: dict
    template: dict
    labels: dict
    values: dict = field(default_factory=dict)

    @property
    def namespace(self) -> str:
        return self.workload["metadata"].get("namespace", "")

    @property
    def component(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    @property
    def spec(self) -> dict:
        return self.template["spec"]

    @property
    def container(self) -> dict:
        return self.spec["containers"][0]

    @property
    def program(self) -> str:
        return self.container.get("command", [""])[0]

    @property
    def flags(self) -> dict:
        """Flag -> value, with $(NAME) replaced. What has no value keeps its $(NAME)."""
        result = {}
        for argument in self.container.get("args", []):
            name, _, value = argument.removeprefix("--").partition("=")
            result[name] = re.sub(r"\$\((\w+)\)", lambda m: self.values.get(m.group(1), m.group(0)), value)
        return result

    def flag_port(self, name: str) -> Optional[int]:
        port = self.flags.get(name, "").rpartition(":")[2]
        return int(port) if port.isdigit() else None

    def ports(self) -> dict:
        return {port.get("name", ""): port["containerPort"] for port in self.container.get("ports", [])}

    def peer(self) -> Peer:
        return Peer(self.namespace, {"kubernetes.io/metadata.name": self.namespace}, self.labels)


class Cluster:
    def __init__(self, documents: list, version: str, flags: Optional[dict] = None):
        self.documents, self.version, self.flags = documents, version, flags
        self.pods = list(self._pods())

    def kind(self, *kinds: str) -> list:
        return [document for document in self.documents if document["kind"] in kinds]

    def named(self, kind: str, name: str, namespace: str) -> Optional[dict]:
        for document in self.kind(kind):
            if document["metadata"]["name"] == name and document["metadata"].get("namespace") == namespace:
                return document
        return None

    def _pods(self) -> Iterator[Pod]:
        for workload in self.kind("Deployment", "StatefulSet", "LeaderWorkerSet"):
            name = f"{workload['kind']}/{workload['metadata']['name']}"
            if workload["kind"] != "LeaderWorkerSet":
                template = workload["spec"]["template"]
                kinds = [(name, template["metadata"]["labels"])]
            else:
                template = workload["spec"]["leaderWorkerTemplate"]["workerTemplate"]
                labels = template["metadata"]["labels"]
                kinds = [(f"{name} leader", {**labels, LEADER: "0"}), (f"{name} member", {**labels, LEADER: "1"})]
            for pod_name, labels in kinds:
                pod = Pod(pod_name, workload, template, labels)
                pod.values = self._values(pod)
                yield pod

    def _values(self, pod: Pod) -> dict:
        """The container's environment; fields of the pod are written as 'pod' and the field's last part."""
        result = {}
        for source in pod.container.get("envFrom", []):
            config = self.named("ConfigMap", source.get("configMapRef", {}).get("name", ""), pod.namespace)
            result.update((config or {}).get("data", {}))
        for entry in pod.container.get("env", []):
            path = entry.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
            result[entry["name"]] = entry.get("value", "pod-" + path.rpartition(".")[2])
        return result

    def _rules(self, pod: Pod, direction: str) -> Optional[list]:
        """Rules for that direction (Ingress, Egress) of all policies that select the pod; None: no policy isolates it."""
        selecting = [policy for policy in self.kind("NetworkPolicy")
                     if policy["metadata"].get("namespace") == pod.namespace and direction in policy["spec"]["policyTypes"]
                     and matches(policy["spec"]["podSelector"], pod.labels)]
        if not selecting:
            return None
        return [(policy["metadata"]["namespace"], rule) for policy in selecting
                for rule in policy["spec"].get(direction.lower(), [])]

    def admits(self, pod: Pod, direction: str, peer: Peer, port: int, protocol: str = "TCP") -> bool:
        """Whether policies let the pod be reached by that peer at its own port (Ingress), or reach that peer's (Egress)."""
        rules = self._rules(pod, direction)
        if rules is None:
            return True
        ends = "from" if direction == "Ingress" else "to"
        for namespace, rule in rules:
            ports = rule.get("ports")
            if ports and (port, protocol) not in [(one.get("port", port), one.get("protocol", "TCP")) for one in ports]:
                continue
            if not rule.get(ends) or any(is_peer(entry, namespace, peer) for entry in rule[ends]):
                return True
        return False

    def reaches_metadata(self, pod: Pod) -> bool:
        rules = self._rules(pod, "Egress")
        if rules is None:
            return True
        for _, rule in rules:
            if not rule.get("to"):
                return True
            for block in (entry["ipBlock"] for entry in rule["to"] if "ipBlock" in entry):
                holds = [METADATA_ADDRESS in ipaddress.ip_network(net) for net in [block["cidr"], *block.get("except", [])]]
                if holds[0] and not any(holds[1:]):
                    return True
        return False


def is_peer(entry: dict, namespace: str, peer: Peer) -> bool:
    if "ipBlock" in entry:
        return False  # addresses outside the cluster
    if "namespaceSelector" in entry:
        if not matches(entry["namespaceSelector"], peer.namespace_labels):
            return False
    elif peer.namespace != namespace:
        return False
    return matches(entry.get("podSelector", {}), peer.labels)
