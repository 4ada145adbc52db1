"""Tests of deploy/kubernetes without a cluster: every overlay is rendered, held against schemas and the rules of rules.py, and
each rule is shown to fail where a rendered document is broken."""

import copy
import os
import re
import sys
import tempfile
import unittest
from pathlib import Path

try:
    import jsonschema  # noqa: F401
    import kubernetes_validate  # noqa: F401
    import yaml  # noqa: F401
except ImportError as error:
    print(f"SKIPPED: {error.name} is not installed (tools/requirements.txt, tools/venv.sh)")
    sys.exit(77)

sys.path.insert(0, str(Path(__file__).resolve().parent))

import rules  # noqa: E402
import schemas  # noqa: E402
from manifests import FOLDER, LEADER, METADATA_ADDRESS, ROOT, Cluster, find_kubectl, program_flags  # noqa: E402
from manifests import quantity, render, seconds  # noqa: E402

KUBECTL = find_kubectl()
BIN = os.environ.get("HEADWATER_BIN", "")
FLAGS = program_flags(Path(BIN)) if BIN else None
VERSION = re.search(r"project\(headwater VERSION (\S+)", (ROOT / "CMakeLists.txt").read_text()).group(1)
OVERLAYS = {"single-gpu", "multi-gpu", "leaderworkerset", "keda", "hpa", "mtls", "monitoring"}
_rendered: dict = {}


def rendered(name: str) -> list:
    """A copy of base's or an overlay's documents; each is rendered once."""
    if name not in _rendered:
        _rendered[name] = render(KUBECTL, FOLDER / ("base" if name == "base" else f"overlays/{name}"))
    return copy.deepcopy(_rendered[name])


def find(documents: list, kind: str, name: str = "") -> dict:
    return next(d for d in documents if d["kind"] == kind and d["metadata"]["name"].startswith(name))


def container(documents: list, kind: str = "StatefulSet") -> dict:
    return find(documents, kind)["spec"]["template"]["spec"]["containers"][0]


def pod_labels(documents: list) -> dict:
    return find(documents, "StatefulSet")["spec"]["template"]["metadata"]["labels"]


def values(documents: list) -> dict:
    return find(documents, "ConfigMap", "headwater-worker")["data"]


def service_port(documents: list) -> dict:
    return find(documents, "Service")["spec"]["ports"][0]


def replace_flag(documents: list, flag: str, value: str, kind: str = "StatefulSet") -> None:
    arguments = container(documents, kind)["args"]
    index = next(i for i, argument in enumerate(arguments) if argument.startswith(f"--{flag}="))
    arguments[index] = f"--{flag}={value}"


class Rendered(unittest.TestCase):
    def test_every_folder_is_named_here(self):
        self.assertEqual({path.name for path in (FOLDER / "overlays").iterdir()}, OVERLAYS)

    def test_schemas(self):
        for name in ["base", *sorted(OVERLAYS)]:
            with self.subTest(name):
                self.assertEqual([p for document in rendered(name) for p in schemas.schema(document)], [])

    def test_rules(self):
        for name in ["base", *sorted(OVERLAYS)]:
            with self.subTest(name):
                self.assertEqual(rules.check(Cluster(rendered(name), VERSION, FLAGS)), [])

    def test_components_together(self):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.relpath(FOLDER, os.path.realpath(folder))
            text = f"resources: [{path}/overlays/multi-gpu]\ncomponents:\n"
            text += "".join(f"  - {path}/components/{name}\n" for name in ("keda", "mtls", "monitoring"))
            (Path(folder) / "kustomization.yaml").write_text(text)
            documents = render(KUBECTL, Path(folder))
        self.assertEqual(rules.check(Cluster(documents, VERSION, FLAGS)), [])
        self.assertLessEqual({"ScaledObject", "Certificate", "PodMonitor"}, {document["kind"] for document in documents})

    def test_what_overlays_are_for(self):
        self.assertEqual(container(rendered("base"))["image"].partition(":")[0], "headwater-cpu")
        self.assertEqual(find(rendered("single-gpu"), "StatefulSet")["spec"]["replicas"], 1)
        self.assertEqual(find(rendered("multi-gpu"), "StatefulSet")["spec"]["podManagementPolicy"], "Parallel")
        documents = rendered("multi-gpu")
        pod = Cluster(documents, VERSION).pods[-1]
        self.assertEqual(int(pod.flags["max_gpus"]), find(documents, "StatefulSet")["spec"]["replicas"])
        self.assertEqual({name for name in pod.values if name.startswith("NCCL_")},
                         {"NCCL_SOCKET_IFNAME", "NCCL_DEBUG", "NCCL_NVLS_ENABLE", "NCCL_RAS_ADDR", "NCCL_CUMEM_HOST_ENABLE"})
        kinds = {document["kind"] for document in rendered("leaderworkerset")}
        self.assertTrue("LeaderWorkerSet" in kinds and "StatefulSet" not in kinds, kinds)
        budget = find(rendered("leaderworkerset"), "PodDisruptionBudget", "headwater-worker")
        self.assertEqual(budget["spec"]["selector"]["matchLabels"][LEADER], "0")
        for name, kind in (("keda", "ScaledObject"), ("hpa", "HorizontalPodAutoscaler"), ("mtls", "Certificate"),
                           ("monitoring", "PodMonitor"), ("monitoring", "ServiceMonitor"), ("monitoring", "PrometheusRule")):
            self.assertIn(kind, {document["kind"] for document in rendered(name)})
        jobs = {line["replacement"] for document in rendered("monitoring") for kind in ("endpoints", "podMetricsEndpoints")
                for endpoint in document.get("spec", {}).get(kind, []) for line in endpoint["relabelings"]}
        scraped = {job["job_name"] for job in yaml.safe_load((ROOT / "deploy" / "prometheus.yml").read_text())["scrape_configs"]}
        self.assertEqual(jobs, scraped - {"headwater-decode"}, "jobs that the rules know")
        boards = [document for document in rendered("monitoring") if document["metadata"].get("labels", {}).get("grafana_dashboard")]
        self.assertEqual({name for board in boards for name in board["data"]}, {"service.json", "workers.json"})
        for name, protocol in (("multi-gpu", "kubernetes.io/h2c"), ("mtls", "https")):
            ports = find(rendered(name), "Service", "headwater-coordinator")["spec"]["ports"]
            self.assertEqual([port.get("appProtocol") for port in ports if port["name"] == "api"], [protocol], name)
        for pod in Cluster(rendered("mtls"), VERSION).pods:
            self.assertLessEqual(set(rules.TLS_FLAGS), set(pod.flags), pod.name)

    @unittest.skipUnless(FLAGS, "HEADWATER_BIN names no folder with the programs")
    def test_flags_that_the_programs_have(self):
        self.assertEqual(FLAGS["headwater-decode"]["listen"].default.rpartition(":")[2], str(rules.KV_PORT))


class Broken(unittest.TestCase):
    """Each rule fails where a rendered document is broken, and says so."""

    def fails(self, overlay: str, change, *wanted: str, flags=FLAGS):
        documents = rendered(overlay)
        change(documents)
        problems = rules.check(Cluster(documents, VERSION, flags))
        for text in wanted:
            self.assertTrue(any(re.search(text, problem) for problem in problems), f"no '{text}' among {problems}")

    def set(self, overlay: str, where, key: str, value, *wanted: str):
        """Sets one field of what where(documents) gives; None removes it."""
        def change(documents):
            target = where(documents)
            if value is None:
                del target[key]
            else:
                target[key] = value
        self.fails(overlay, change, *wanted)

    def pod(self, documents: list) -> dict:
        return find(documents, "StatefulSet")["spec"]["template"]["spec"]

    def test_labels(self):
        worker = "app.kubernetes.io/"
        self.set("base", lambda d: find(d, "Service")["metadata"]["labels"], worker + "part-of", None,
                 "labels: Service/.* has no app.kubernetes.io/part-of")
        self.set("base", pod_labels, worker + "version", "9.9.9",
                 "labels: pods of StatefulSet.* is version '9.9.9'")
        self.set("base", pod_labels, "llm-d.ai/role", "decode",
                 "labels: .* has llm-d.ai/role 'decode'")
        self.set("keda", lambda d: find(d, "ScaledObject")["metadata"], "namespace", "other", "labels: ScaledObject.* 'other'")

    def test_images(self):
        self.set("base", container, "image", "headwater-cpu:latest", "images: .* 'headwater-cpu:latest', which has no")
        self.set("base", container, "image", "registry:5000/headwater-cpu", "images: .*no fixed tag")
        self.set("single-gpu", container, "image", "headwater-cpu:0.1.0", "images: .* not 'headwater-cuda:")

    def test_resources(self):
        limits = lambda d: container(d)["resources"]["limits"]  # noqa: E731
        for name in ("cpu", "memory", "ephemeral-storage"):
            self.set("base", limits, name, None, f"resources: .* has no limits.{name}")
        self.set("base", lambda d: container(d)["resources"]["requests"], "memory", None, "resources: .*no requests.memory")
        self.set("single-gpu", limits, "nvidia.com/gpu", "2", "resources: .*--device=cuda:0 has a limit of 2 GPUs")
        self.fails("base", lambda d: replace_flag(d, "memory_budget", "15GiB"), "resources: .*15GiB, over 80 %")
        self.fails("base", lambda d: container(d)["args"].remove("--memory_budget=$(MEMORY_BUDGET)"), "no --memory_budget")
        self.fails("base", lambda d: replace_flag(d, "threads", "5"), "resources: .*--threads=5, over the limit of 4 CPUs")
        shm = lambda d: self.pod(d)["volumes"][0]["emptyDir"]  # noqa: E731
        self.set("multi-gpu", shm, "medium", None, "resources: .*/dev/shm is 'None'")
        self.set("multi-gpu", shm, "sizeLimit", "1Gi", "resources: .*/dev/shm is 'Memory' of 1073741824 bytes")
        self.set("multi-gpu", shm, "sizeLimit", "60Gi", "resources: .*/dev/shm of .* over half")
        self.set("multi-gpu", shm, "sizeLimit", None, "resources: .*volume shm has no sizeLimit")

    def test_security(self):
        context = lambda d: self.pod(d)["securityContext"]  # noqa: E731
        own = lambda d: container(d)["securityContext"]  # noqa: E731
        for where, key, value in (
                (context, "runAsNonRoot", False), (context, "runAsUser", 0), (context, "runAsGroup", None),
                (context, "seccompProfile", {"type": "Unconfined"}), (self.pod, "automountServiceAccountToken", True),
                (self.pod, "hostNetwork", True), (self.pod, "hostPID", True), (self.pod, "hostIPC", True),
                (own, "allowPrivilegeEscalation", True), (own, "readOnlyRootFilesystem", None), (own, "privileged", True)):
            self.set("base", where, key, value, f"security: StatefulSet.* has {key} ")
        self.set("base", own, "capabilities", {"drop": ["NET_RAW"]}, r"security: .*capabilities.drop \['NET_RAW'\]")
        self.set("base", own, "capabilities", {"drop": ["ALL"], "add": ["IPC_LOCK"]}, "security: .*capabilities.add")
        self.fails("base", lambda d: self.pod(d)["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), "the node's /")
        self.set("base", lambda d: find(d, "ServiceAccount", "headwater-worker"), "automountServiceAccountToken", True,
                 "security: .*account 'headwater-worker' is not one without a token")
        self.fails("base", lambda d: self.pod(d)["containers"].append(dict(container(d))), "security: .*more containers")

    def test_probes(self):
        self.set("base", container, "livenessProbe", None, "probes: .*no livenessProbe by HTTP")
        self.set("base", container, "startupProbe", {"grpc": {"port": 8071}}, "probes: .*no startupProbe by HTTP")
        probe = lambda name: lambda d: container(d)[name]["httpGet"]
        self.set("base", probe("readinessProbe"), "port", 7071, "readinessProbe asks port 7071")
        self.set("base", probe("livenessProbe"), "path", "/readyz", "asks for HTTP /readyz")
        self.set("base", probe("livenessProbe"), "scheme", "HTTPS", "asks for HTTPS /livez")

    def test_grace(self):
        self.set("base", self.pod, "terminationGracePeriodSeconds", 69, r"grace: .*gets 69 s, needs 15 \+ 45 \+ 10 s")
        self.set("base", lambda d: find(d, "Deployment")["spec"]["template"]["spec"], "terminationGracePeriodSeconds", 75,
                 r"grace: .*gets 75 s, needs 15 \+ 45 \+ 20 s")
        self.set("base", values, "DRAIN_TIMEOUT", "1m30s", "needs 15 [+] 90")
        self.set("base", container, "lifecycle", None, "grace: .*sleeps 0 s")
        self.fails("base", lambda d: container(d)["args"].remove("--drain_timeout=$(DRAIN_TIMEOUT)"), "has no --drain_timeout")

    def test_ports(self):
        self.fails("base", lambda d: replace_flag(d, "metrics", "$(POD_IP):9999"), r"ports: .*its flags have .*'9999'")
        self.set("base", lambda d: container(d)["ports"][0], "containerPort", 7079, "ports: .*declares .*7079", "Service/")
        self.set("base", service_port, "port", 7079, "ports: .*dials .*no port of a Service",
                 "ports: Service/headwater-coordinator has 7079 to 'api'")
        self.set("base", service_port, "targetPort", "grpc", "ports: Service/.* to 'grpc'")
        self.fails("base", lambda d: find(d, "Service")["spec"]["selector"].pop("app.kubernetes.io/component"),
                   "ports: Service/headwater-coordinator selects .*StatefulSet")
        self.fails("base", lambda d: replace_flag(d, "listen", "0.0.0.0:7071"), "ports: .*--listen=0.0.0.0:7071, not the pod's")
        self.fails("mtls", lambda d: replace_flag(d, "advertise", "$(POD_NAME):7070"), "ports: .*--advertise=.*:7070 and")

    def test_flags(self):
        self.set("base", values, "MODEL", None, r"flags: .*--model with \$\(MODEL\)")
        known = {"headwater-worker": {}, "headwater-coordinator": {}}
        self.fails("base", lambda d: None, "flags: .*'--listen=.*headwater-worker --help does not list", flags=known)
        if FLAGS:
            self.fails("base", lambda d: container(d)["args"].append("--no_such=1"), "flags: .*'--no_such=1'")
            self.fails("base", lambda d: container(d)["args"].append("model"), "flags: .*'model'")

    def test_disruption(self):
        budget = lambda d: find(d, "PodDisruptionBudget", "headwater-worker")["spec"]  # noqa: E731
        self.fails("base", lambda d: d.remove(find(d, "PodDisruptionBudget")), r"disruption: Deployment.* is held by \[\]")
        self.fails("base", lambda d: budget(d)["selector"]["matchLabels"].pop("app.kubernetes.io/component"),
                   "disruption: .*selects .*not pods of one component")
        self.set("base", lambda d: budget(d)["selector"]["matchLabels"], "app.kubernetes.io/name", "x", r"selects \[\]")
        self.set("base", budget, "maxUnavailable", 2, "disruption: .*maxUnavailable 2, not 1")
        self.fails("leaderworkerset", lambda d: budget(d)["selector"]["matchLabels"].pop(LEADER),
                   "disruption: LeaderWorkerSet/headwater-worker member is held by .*not by 0")
        self.set("leaderworkerset", lambda d: budget(d)["selector"]["matchLabels"], LEADER, "1", r"leader is held by \[\]")

    def test_network(self):
        policy = lambda name: lambda d: find(d, "NetworkPolicy", f"headwater-{name}")["spec"]  # noqa: E731
        for name, wanted in (("default-deny", "no policy that denies everything"), ("dns", "may not ask DNS by UDP"),
                             ("coordinator", "--listen port 7070 is open to"), ("worker", "worker may not reach port"),
                             ("metrics", "--metrics port 9070 is open to")):
            self.fails("base", lambda d, n=name: d.remove(find(d, "NetworkPolicy", f"headwater-{n}")), f"network: .*{wanted}")
        rule = lambda name, way: lambda d: policy(name)(d)[way][0]  # noqa: E731
        self.set("base", rule("coordinator", "ingress"), "from", None, r"network: coordinator's --listen .*'stranger'")
        self.set("base", rule("coordinator", "ingress"), "ports", None, r"coordinator's --health port 8070 is open to \['")
        self.set("base", rule("metrics", "ingress"), "from", [{"namespaceSelector": {}}], r"--metrics .*'stranger'")
        self.fails("base", lambda d: policy("worker")(d)["egress"].append({"ports": [{"port": 443}]}),
                   "worker may reach port 443 of stranger", f"worker may reach {METADATA_ADDRESS}")
        self.fails("base", lambda d: policy("worker")(d)["egress"][2].pop("ports"), "worker may reach port 443 of decode")
        self.fails("base", lambda d: policy("worker")(d)["egress"][2]["to"][0].pop("podSelector"), "7080 of stranger")
        self.fails("base", lambda d: policy("coordinator")(d)["egress"].clear(), "may not reach port 7080 of decode")
        self.fails("base", lambda d: policy("worker")(d)["egress"].append({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}),
                   "worker may reach 169.254.169.254")
        spared = {"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]}
        documents = rendered("base")
        policy("worker")(documents)["egress"].append(spared)
        self.assertEqual(list(rules.network(Cluster(documents, VERSION))), [])

    def test_references(self):
        self.fails("base", lambda d: d.remove(find(d, "ConfigMap", "headwater-worker")), "wants ConfigMap/headwater-worker")
        self.fails("leaderworkerset", lambda d: d.remove(find(d, "ConfigMap", "headwater-nccl")), "wants ConfigMap/headwater-n")
        self.fails("base", lambda d: d.remove(find(d, "Service", "headwater-worker")), "headwater-worker, no headless")
        self.set("base", lambda d: find(d, "StatefulSet")["spec"]["selector"]["matchLabels"], "x", "y", "not select its own")
        self.fails("mtls", lambda d: d.remove(find(d, "Certificate", "headwater-worker")), "wants Secret/headwater-worker-tls")
        self.fails("mtls", lambda d: d.remove(find(d, "Issuer", "headwater-ca")), "wants Issuer/headwater-ca")
        self.set("keda", lambda d: find(d, "StatefulSet")["spec"], "replicas", 2, "ScaledObject/.* has replicas 2 of its own")
        self.set("keda", lambda d: find(d, "ScaledObject")["spec"], "minReplicaCount", 0, "goes down to 0 workers")
        self.set("keda", lambda d: find(d, "ScaledObject")["spec"]["scaleTargetRef"], "kind", "Deployment", "is not there")
        self.set("keda", lambda d: find(d, "ScaledObject")["spec"]["triggers"][0]["metadata"], "query", "sum(headwater_waits)",
                 "asks for headwater_waits, which the coordinator does not export")
        self.set("hpa", lambda d: find(d, "HorizontalPodAutoscaler")["spec"]["metrics"][0]["external"]["metric"], "name", "x",
                 "asks for x, which the coordinator does not export")
        self.set("monitoring", lambda d: find(d, "PodMonitor")["spec"]["podMetricsEndpoints"][0], "port", "web",
                 "scrapes port 'web'")
        self.set("monitoring", lambda d: find(d, "ServiceMonitor")["spec"]["selector"]["matchLabels"], "x", "y",
                 "selects nothing")

    def test_identities(self):
        self.fails("mtls", lambda d: container(d)["args"].remove("--tls_ca=/etc/headwater/tls/ca.crt"), "--tls_ca=None")
        self.fails("mtls", lambda d: replace_flag(d, "tls_key", "/etc/keys/tls.key"), "identities: .*/etc/keys/tls.key")
        self.set("mtls", lambda d: self.pod(d)["volumes"][0]["secret"], "secretName", "headwater-admin-tls",
                 r"identities: .*mounts the secrets \['headwater-admin-tls'\]")
        uri = lambda d: find(d, "Certificate", "headwater-worker")["spec"]  # noqa: E731
        self.set("mtls", uri, "uris", ["spiffe://headwater.example/ns/headwater/admin"], "/admin'], not .*/worker")

    def test_schemas(self):
        for overlay, kind, change, wanted in (
                ("base", "StatefulSet", lambda s: s.update(replica=2), "replica"),
                ("base", "NetworkPolicy", lambda s: s.update(policyTypes="Egress"), "policyTypes"),
                ("leaderworkerset", "LeaderWorkerSet",
                 lambda s: s["leaderWorkerTemplate"].update(restartPolicy="Never"), "Never"),
                ("leaderworkerset", "LeaderWorkerSet",
                 lambda s: s["leaderWorkerTemplate"]["workerTemplate"]["spec"].update(hostname=7), "hostname"),
                ("keda", "ScaledObject", lambda s: s["triggers"][0]["metadata"].update(threshold=5), "threshold"),
                ("keda", "ScaledObject",
                 lambda s: s["advanced"]["horizontalPodAutoscalerConfig"]["behavior"].update(down=1), "down"),
                ("mtls", "Certificate", lambda s: s.update(duration="90d"), "90d"),
                ("mtls", "Issuer", lambda s: s.update(acme={}), "Issuer/.*spec"),
                ("monitoring", "PodMonitor", lambda s: s["podMetricsEndpoints"][0].update(interval=30), "interval"),
                ("monitoring", "ServiceMonitor", lambda s: s.pop("endpoints"), "endpoints")):
            with self.subTest(f"{kind} {wanted}"):
                document = find(rendered(overlay), kind)
                change(document["spec"])
                problems = list(schemas.schema(document))
                self.assertTrue(any(re.search(wanted, problem) for problem in problems), f"no '{wanted}' among {problems}")
        unknown = {"apiVersion": "example.com/v1", "kind": "Nothing", "metadata": {"name": "x"}}
        self.assertRegex("".join(schemas.schema(unknown)), "schema: Nothing/x: no schema of example.com/v1 Nothing")

    def test_render(self):
        with self.assertRaisesRegex(AssertionError, "kubectl kustomize .*/deploy/kubernetes: status 1"):
            render(KUBECTL, FOLDER)  # has no kustomization of its own

    def test_numbers(self):
        self.assertEqual([seconds("45s"), seconds("1m30s"), seconds("250ms")], [45, 90, 0.25])
        self.assertEqual([quantity("8Gi"), quantity("12GiB"), quantity("500m"), quantity(2)], [2**33, 12 * 2**30, 0.5, 2])
        for text in ("45", "", "4 s", "s"):
            with self.assertRaises(ValueError, msg=text):
                seconds(text)
        with self.assertRaises(ValueError):
            quantity("8GB")


if __name__ == "__main__":
    if KUBECTL is None:
        print("SKIPPED: there is no kubectl (tools/requirements.txt, tools/venv.sh)")
        sys.exit(77)
    unittest.main()
