"""Rules that every rendered overlay keeps. Each yields its violations, which name the object, the value and the limit."""

import re
from typing import Iterator

from manifests import LEADER, ROOT, Cluster, Peer, Pod, matches, quantity, seconds

# What these need between the end of a drain and their own end. The coordinator's is in its main.cc, after Drain().
SPARE_S = {"headwater-coordinator": 20, "headwater-worker": 10}
LABELS = tuple(f"app.kubernetes.io/{name}" for name in ("name", "instance", "component", "part-of", "version"))
# Objects that the operator makes, and README says so.
EXTERNAL = {("PersistentVolumeClaim", "headwater-models")}
TLS_FLAGS = {"tls_cert": "tls.crt", "tls_key": "tls.key", "tls_ca": "ca.crt"}
ROLES = {"client", "decode", "worker", "admin", "coordinator"}
SHM_BYTES = 8 * 2**30
KV_PORT = 7080
CLUSTER_SCOPED = {"Namespace"}


def identity(document: dict) -> str:
    return f"{document['kind']}/{document['metadata']['name']}"


def labels(cluster: Cluster) -> Iterator[str]:
    told = [(identity(document), document["metadata"].get("labels", {})) for document in cluster.documents]
    told += [(f"pods of {pod.name}", pod.labels) for pod in cluster.pods]
    for name, found in told:
        for label in LABELS:
            if not found.get(label):
                yield f"labels: {name} has no {label}"
        version = found.get("app.kubernetes.io/version")
        if version and version != cluster.version:
            yield f"labels: {name} is version '{version}', the project's is '{cluster.version}'"
    for document in cluster.documents:
        if document["kind"] not in CLUSTER_SCOPED and document["metadata"].get("namespace") != "headwater":
            yield f"labels: {identity(document)} is in namespace '{document['metadata'].get('namespace')}', not in 'headwater'"
    for pod in cluster.pods:
        if pod.component == "worker" and pod.labels.get("llm-d.ai/role") != "prefill":
            yield f"labels: {pod.name} has llm-d.ai/role '{pod.labels.get('llm-d.ai/role')}', not 'prefill'"


def images(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        image = pod.container["image"]
        tag = image.rpartition("/")[2].partition(":")[2]
        wanted = "headwater-cuda" if pod.flags.get("device", "").startswith("cuda:") else "headwater-cpu"
        if tag in ("", "latest"):
            yield f"images: {pod.name} takes '{image}', which has no fixed tag"
        elif image != f"{wanted}:{cluster.version}":
            yield f"images: {pod.name} takes '{image}', not '{wanted}:{cluster.version}'"


def resources(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        found = pod.container.get("resources", {})
        for side in ("requests", "limits"):
            for name in ("cpu", "memory", "ephemeral-storage"):
                if name not in found.get(side, {}):
                    yield f"resources: {pod.name} has no {side}.{name}"
        limits = found.get("limits", {})
        on_gpu = pod.flags.get("device", "cpu") != "cpu"
        if str(limits.get("nvidia.com/gpu", "0")) != ("1" if on_gpu else "0"):
            yield (f"resources: {pod.name} with --device={pod.flags.get('device')} has a limit of "
                   f"{limits.get('nvidia.com/gpu', 0)} GPUs")
        memory = quantity(limits.get("memory", "0"))
        budget = pod.flags.get("memory_budget")
        if budget is not None and not on_gpu and quantity(budget) > 0.8 * memory:
            yield f"resources: {pod.name} has --memory_budget={budget}, over 80 % of the limit {limits.get('memory')}"
        if budget is None and not on_gpu and pod.component == "worker":
            yield f"resources: {pod.name} has no --memory_budget; its default is a share of the node's memory, not the limit's"
        if float(pod.flags.get("threads", 1)) > quantity(limits.get("cpu", "0")):
            yield f"resources: {pod.name} has --threads={pod.flags['threads']}, over the limit of {limits.get('cpu')} CPUs"
        yield from _volumes(pod, on_gpu, memory)


def _volumes(pod: Pod, on_gpu: bool, memory: float) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounts = {mount["mountPath"]: volumes.get(mount["name"], {}) for mount in pod.container.get("volumeMounts", [])}
    for volume in volumes.values():
        if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
            yield f"resources: {pod.name}'s volume {volume['name']} has no sizeLimit"
    if not on_gpu:
        return
    shm = mounts.get("/dev/shm", {}).get("emptyDir", {})
    size = quantity(shm.get("sizeLimit", "0"))
    if shm.get("medium") != "Memory" or size < SHM_BYTES:
        yield f"resources: {pod.name}'s /dev/shm is '{shm.get('medium')}' of {size:.0f} bytes, not memory of {SHM_BYTES}"
    elif 2 * size > memory:
        yield f"resources: {pod.name}'s /dev/shm of {size:.0f} bytes is over half of its memory limit {memory:.0f}"


def security(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        context, own = pod.spec.get("securityContext", {}), pod.container.get("securityContext", {})
        capabilities = own.get("capabilities", {})
        for what, value, wanted in (
                ("runAsNonRoot", context.get("runAsNonRoot"), True),
                ("seccompProfile", context.get("seccompProfile", {}).get("type"), "RuntimeDefault"),
                ("automountServiceAccountToken", pod.spec.get("automountServiceAccountToken"), False),
                ("allowPrivilegeEscalation", own.get("allowPrivilegeEscalation"), False),
                ("readOnlyRootFilesystem", own.get("readOnlyRootFilesystem"), True),
                ("privileged", own.get("privileged", False), False),
                ("capabilities.drop", capabilities.get("drop"), ["ALL"]),
                ("capabilities.add", capabilities.get("add", []), []),
                ("hostNetwork", pod.spec.get("hostNetwork", False), False),
                ("hostPID", pod.spec.get("hostPID", False), False),
                ("hostIPC", pod.spec.get("hostIPC", False), False)):
            if value != wanted:
                yield f"security: {pod.name} has {what} {value}, not {wanted}"
        for name in ("runAsUser", "runAsGroup"):
            if not isinstance(context.get(name), int) or context[name] <= 0:
                yield f"security: {pod.name} has {name} {context.get(name)}, not a fixed number over 0"
        for volume in pod.spec.get("volumes", []):
            if "hostPath" in volume:
                yield f"security: {pod.name} mounts the node's {volume['hostPath'].get('path')}"
        if len(pod.spec["containers"]) != 1 or pod.spec.get("initContainers"):
            yield f"security: {pod.name} has more containers than the one that these rules look at"
        account = cluster.named("ServiceAccount", pod.spec.get("serviceAccountName", "default"), pod.namespace)
        if account is None or account.get("automountServiceAccountToken") is not False:
            yield f"security: {pod.name}'s account '{pod.spec.get('serviceAccountName')}' is not one without a token"


def probes(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        port = pod.flag_port("health")
        for name, path in (("startupProbe", "/livez"), ("livenessProbe", "/livez"), ("readinessProbe", "/readyz")):
            asked = pod.container.get(name, {}).get("httpGet")
            if asked is None:
                yield f"probes: {pod.name} has no {name} by HTTP"
                continue
            if asked.get("port") != port:
                yield f"probes: {pod.name}'s {name} asks port {asked.get('port')}, --health has {port}"
            if asked.get("path") != path or asked.get("scheme", "HTTP") != "HTTP":
                yield f"probes: {pod.name}'s {name} asks for {asked.get('scheme', 'HTTP')} {asked.get('path')}, not HTTP {path}"


def grace(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        sleep = pod.container.get("lifecycle", {}).get("preStop", {}).get("sleep", {}).get("seconds", 0)
        if sleep < 5:
            yield f"grace: {pod.name} sleeps {sleep} s before SIGTERM, in which Services should forget it: at least 5"
        if "drain_timeout" not in pod.flags:
            yield f"grace: {pod.name} has no --drain_timeout"
            continue
        drain, spare = seconds(pod.flags["drain_timeout"]), SPARE_S[pod.program]
        given = pod.spec.get("terminationGracePeriodSeconds", 30)
        if given < sleep + drain + spare:
            yield f"grace: {pod.name} gets {given} s, needs {sleep} + {drain:.0f} + {spare} s"


def ports(cluster: Cluster) -> Iterator[str]:
    services = cluster.kind("Service")
    for pod in cluster.pods:
        listens = {pod.flag_port(flag) for flag in ("listen", "metrics", "health")}
        declared = set(pod.ports().values())
        if listens != declared:
            yield f"ports: {pod.name} declares {sorted(declared)}, its flags have {sorted(map(str, listens))}"
        for flag in ("listen", "metrics", "health"):
            if pod.flags.get(flag, "").rpartition(":")[0] != "pod-podIP":
                yield f"ports: {pod.name} has --{flag}={pod.flags.get(flag)}, not the pod's own address"
        if "advertise" in pod.flags and pod.flag_port("advertise") != pod.flag_port("listen"):
            yield f"ports: {pod.name} has --advertise={pod.flags['advertise']} and --listen={pod.flags['listen']}"
        host, _, port = pod.flags.get("coordinator", "").rpartition(":")
        service = cluster.named("Service", host, pod.namespace)
        if "coordinator" in pod.flags and (service is None or port not in {str(p["port"]) for p in service["spec"]["ports"]}):
            yield f"ports: {pod.name} dials {pod.flags['coordinator']}, which is no port of a Service"
    for service in services:
        behind = [pod for pod in cluster.pods if matches({"matchLabels": service["spec"].get("selector", {})}, pod.labels)]
        if not service["spec"].get("selector") or len({pod.component for pod in behind}) != 1:
            yield f"ports: {identity(service)} selects {[pod.name for pod in behind]}, not the pods of one component"
        for port in service["spec"]["ports"]:
            for pod in behind:
                if pod.ports().get(port.get("targetPort")) != port["port"]:
                    yield (f"ports: {identity(service)} has {port['port']} to '{port.get('targetPort')}', "
                           f"{pod.name} has {pod.ports()}")


def flags(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        for name, value in pod.flags.items():
            for variable in re.findall(r"\$\(\w+\)", value):
                yield f"flags: {pod.name} has --{name} with {variable}, which nothing defines"
        if cluster.flags is None:
            continue
        for argument in pod.container.get("args", []):
            name = argument.removeprefix("--").partition("=")[0]
            if not argument.startswith("--") or name not in cluster.flags.get(pod.program, {}):
                yield f"flags: {pod.name} has '{argument}', which {pod.program} --help does not list"


def disruption(cluster: Cluster) -> Iterator[str]:
    wanted = {"coordinator": ("minAvailable", 1), "worker": ("maxUnavailable", 1)}
    held: dict = {pod.name: [] for pod in cluster.pods}
    for budget in cluster.kind("PodDisruptionBudget"):
        selected = [pod for pod in cluster.pods if pod.namespace == budget["metadata"].get("namespace")
                    and matches(budget["spec"]["selector"], pod.labels)]
        components = {pod.component for pod in selected}
        if len(components) != 1:
            yield f"disruption: {identity(budget)} selects {[pod.name for pod in selected]}, not pods of one component"
            continue
        name, count = wanted[components.pop()]
        if budget["spec"].get(name) != count:
            yield f"disruption: {identity(budget)} has {name} {budget['spec'].get(name)}, not {count}"
        for pod in selected:
            held[pod.name].append(identity(budget))
    for pod in cluster.pods:
        number = 0 if pod.labels.get(LEADER, "0") != "0" else 1
        if len(held[pod.name]) != number:
            yield f"disruption: {pod.name} is held by {held[pod.name]}, not by {number}"


def network(cluster: Cluster) -> Iterator[str]:
    pods = {pod.component: pod for pod in cluster.pods}
    for namespace in {pod.namespace for pod in cluster.pods}:
        if not any(policy["metadata"].get("namespace") == namespace and policy["spec"].get("podSelector") == {}
                   and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
                   and not policy["spec"].get("ingress") and not policy["spec"].get("egress")
                   for policy in cluster.kind("NetworkPolicy")):
            yield f"network: namespace {namespace} has no policy that denies everything"
    coordinator, worker = pods["coordinator"], pods["worker"]
    api, kv, free = coordinator.flag_port("listen"), KV_PORT, 40000
    outside = {
        "client": Peer("team", {"headwater.example/access": "client"}, {}),
        "gateway": Peer("edge", {"headwater.example/access": "gateway"}, {}),
        "monitoring": Peer("monitoring", {"kubernetes.io/metadata.name": "monitoring"}, {}),
        "decode": Peer("team", {}, {"llm-d.ai/role": "decode"}),
        "dns": Peer("kube-system", {"kubernetes.io/metadata.name": "kube-system"}, {"k8s-app": "kube-dns"}),
        "stranger": Peer("other", {}, {}),
        "neighbour": Peer("headwater", {"kubernetes.io/metadata.name": "headwater"}, {}),
        "coordinator": coordinator.peer(),
        "worker": worker.peer(),
    }
    # Who may come to which port.
    listening = {("coordinator", "listen"): {"client", "gateway", "decode", "worker"},
                 ("coordinator", "metrics"): {"monitoring"}, ("coordinator", "health"): set(),
                 ("worker", "listen"): {"worker"}, ("worker", "metrics"): {"worker", "monitoring"},
                 ("worker", "health"): {"worker"}}
    for (component, flag), wanted in listening.items():
        pod = pods[component]
        port = pod.flag_port(flag)
        found = {name for name, peer in outside.items() if cluster.admits(pod, "Ingress", peer, port or 0)}
        if found != wanted:
            yield f"network: {component}'s --{flag} port {port} is open to {sorted(found)}, not to {sorted(wanted)}"
    # Who may go where.
    going = {("worker", "coordinator", api), ("worker", "decode", kv), ("coordinator", "decode", kv)}
    for pod in (coordinator, worker):
        for name, peer in outside.items():
            for port in {free, api, kv, 443}:
                wanted = (pod.component, name, port) in going or (pod.component, name) == ("worker", "worker")
                if cluster.admits(pod, "Egress", peer, port) != wanted:
                    yield f"network: {pod.component} may {'not ' if wanted else ''}reach port {port} of {name}"
        for protocol in ("UDP", "TCP"):
            if not cluster.admits(pod, "Egress", outside["dns"], 53, protocol):
                yield f"network: {pod.component} may not ask DNS by {protocol}"
        if cluster.reaches_metadata(pod):
            yield f"network: {pod.component} may reach 169.254.169.254"


def references(cluster: Cluster) -> Iterator[str]:
    issued = {certificate["spec"]["secretName"]: certificate for certificate in cluster.kind("Certificate")}
    for pod in cluster.pods:
        wanted = [("ConfigMap", source["configMapRef"]["name"]) for source in pod.container.get("envFrom", [])]
        for volume in pod.spec.get("volumes", []):
            wanted += [("ConfigMap", volume["configMap"]["name"])] if "configMap" in volume else []
            wanted += [("Secret", volume["secret"]["secretName"])] if "secret" in volume else []
            if "persistentVolumeClaim" in volume:
                wanted.append(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
        for kind, name in wanted:
            made = name in issued if kind == "Secret" else cluster.named(kind, name, pod.namespace)
            if not made and (kind, name) not in EXTERNAL:
                yield f"references: {pod.name} wants {kind}/{name}, which nothing makes"
        if pod.workload["kind"] == "StatefulSet":
            service = cluster.named("Service", pod.workload["spec"]["serviceName"], pod.namespace)
            if service is None or service["spec"].get("clusterIP") != "None":
                yield f"references: {pod.name} has serviceName {pod.workload['spec']['serviceName']}, no headless Service"
        if not matches(pod.workload["spec"].get("selector", {}), pod.labels):
            yield f"references: {pod.name} does not select its own pods"
    for certificate in cluster.kind("Certificate"):
        issuer = certificate["spec"]["issuerRef"]["name"]
        if cluster.named("Issuer", issuer, certificate["metadata"]["namespace"]) is None:
            yield f"references: {identity(certificate)} wants Issuer/{issuer}, which nothing makes"
    for scaler in cluster.kind("ScaledObject", "HorizontalPodAutoscaler"):
        yield from _scaler(cluster, scaler)
    for monitor in cluster.kind("ServiceMonitor", "PodMonitor"):
        yield from _monitor(cluster, monitor)


def _scaler(cluster: Cluster, scaler: dict) -> Iterator[str]:
    target, name = scaler["spec"]["scaleTargetRef"], identity(scaler)
    workload = cluster.named(target["kind"], target["name"], scaler["metadata"]["namespace"])
    if workload is None:
        yield f"references: {name} scales {target['kind']}/{target['name']}, which is not there"
    elif "replicas" in workload["spec"]:
        yield f"references: {name} scales {identity(workload)}, which has replicas {workload['spec']['replicas']} of its own"
    least = scaler["spec"].get("minReplicaCount", scaler["spec"].get("minReplicas", 0))
    if least < 1:
        yield f"references: {name} goes down to {least} workers; prompts are refused without one"
    if scaler["kind"] == "ScaledObject":
        metrics = re.findall(r"\bheadwater_\w+", " ".join(t["metadata"].get("query", "") for t in scaler["spec"]["triggers"]))
    else:
        metrics = [metric["external"]["metric"]["name"] for metric in scaler["spec"]["metrics"] if "external" in metric]
    exported = (ROOT / "coordinator/coordinator_metrics.cc").read_text()
    for metric in metrics or ["(none)"]:
        if f'"{metric}"' not in exported:
            yield f"references: {name} asks for {metric}, which the coordinator does not export"


def _monitor(cluster: Cluster, monitor: dict) -> Iterator[str]:
    name, selector = identity(monitor), monitor["spec"]["selector"]
    if monitor["kind"] == "PodMonitor":
        found = [set(pod.ports()) for pod in cluster.pods if matches(selector, pod.labels)]
    else:
        found = [{port["name"] for port in service["spec"]["ports"]} for service in cluster.kind("Service")
                 if matches(selector, service["metadata"]["labels"])]
    if not found:
        yield f"references: {name} selects nothing"
    for endpoint in monitor["spec"].get("podMetricsEndpoints", monitor["spec"].get("endpoints", [])):
        for port_names in found:
            if endpoint["port"] not in port_names:
                yield f"references: {name} scrapes port '{endpoint['port']}', there are {sorted(port_names)}"


def identities(cluster: Cluster) -> Iterator[str]:
    """TLS: all programs or none; files that are mounted; certificates whose SPIFFE id says the role."""
    secure = [pod for pod in cluster.pods if any(flag in pod.flags for flag in TLS_FLAGS)]
    for pod in cluster.pods if secure else []:
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.container.get("volumeMounts", [])}
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for flag, file in TLS_FLAGS.items():
            folder, _, found = pod.flags.get(flag, "").rpartition("/")
            volume = volumes.get(mounts.get(folder, ""), {})
            if found != file or "secret" not in volume:
                yield f"identities: {pod.name} has --{flag}={pod.flags.get(flag)}, not {file} of a mounted secret"
        secrets = {volume["secret"]["secretName"] for volume in volumes.values() if "secret" in volume}
        if secrets != {f"headwater-{pod.component}-tls"}:
            yield f"identities: {pod.name} mounts the secrets {sorted(secrets)}, not headwater-{pod.component}-tls alone"
    for certificate in cluster.kind("Certificate"):
        if certificate["spec"].get("isCA"):
            continue
        role = certificate["spec"]["secretName"].removeprefix("headwater-").removesuffix("-tls")
        uri = f"spiffe://headwater.example/ns/{certificate['metadata']['namespace']}/{role}"
        if role not in ROLES or certificate["spec"].get("uris") != [uri]:
            yield f"identities: {identity(certificate)} has {certificate['spec'].get('uris')}, not {uri} of {sorted(ROLES)}"


RULES = (labels, images, resources, security, probes, grace, ports, flags, disruption, network, references, identities)


def check(cluster: Cluster) -> list:
    problems = []
    for rule in RULES:
        try:
            problems += rule(cluster)
        except ValueError as error:  # a value that is no number, for example an undefined $(NAME)
            problems.append(f"{rule.__name__}: {error}")
    return problems
