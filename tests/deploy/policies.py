"""What clusters refuse: Pod Security's levels, and rules as Kyverno's and Gatekeeper's libraries have them. Each is a function of a pod's spec that
says what is wrong; the tests break a good pod for each of them.
"""

from __future__ import annotations

from collections.abc import Iterator

RESTRICTED_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
BASELINE_CAPS = set("AUDIT_WRITE CHOWN DAC_OVERRIDE FOWNER FSETID KILL MKNOD NET_BIND_SERVICE SETFCAP SETGID SETPCAP SETUID SYS_CHROOT".split())
SYSCTLS = {"kernel.shm_rmid_forced", "net.ipv4.ip_local_port_range", "net.ipv4.ip_unprivileged_port_start", "net.ipv4.tcp_syncookies", "net.ipv4.ping_group_range"}


def containers(pod: dict) -> list[dict]:
    return pod.get("initContainers", []) + pod["containers"] + pod.get("ephemeralContainers", [])


def contexts(pod: dict) -> Iterator[tuple[str, dict]]:
    """Of each container, with what it has of the pod's."""
    for one in containers(pod):
        yield one["name"], pod.get("securityContext", {}) | one.get("securityContext", {})


def baseline(pod: dict) -> Iterator[str]:
    for host in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(host):
            yield f"{host} is the node's"
    yield from (f"volume {volume['name']} is the node's" for volume in pod.get("volumes", []) if "hostPath" in volume)
    yield from (f"sysctl {sysctl['name']}" for sysctl in pod.get("securityContext", {}).get("sysctls", []) if sysctl["name"] not in SYSCTLS)
    for one in containers(pod):
        yield from (f"{one['name']} takes a port of the node's" for port in one.get("ports", []) if port.get("hostPort"))
    for name, context in contexts(pod):
        if context.get("privileged"):
            yield f"{name} is privileged"
        if more := set(context.get("capabilities", {}).get("add", [])) - BASELINE_CAPS:
            yield f"{name} has {sorted(more)}"
        if context.get("seccompProfile", {}).get("type") == "Unconfined" or context.get("procMount", "Default") != "Default":
            yield f"{name} is not confined"


def restricted(pod: dict) -> Iterator[str]:
    yield from baseline(pod)
    for volume in pod.get("volumes", []):
        if not set(volume) - {"name"} <= RESTRICTED_VOLUMES:
            yield f"volume {volume['name']} is of no allowed type"
    for name, context in contexts(pod):
        if context.get("allowPrivilegeEscalation") is not False:
            yield f"{name} may gain privileges"
        if context.get("runAsNonRoot") is not True or context.get("runAsUser") == 0:
            yield f"{name} may be root"
        if context.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
            yield f"{name} has no seccomp profile"
        capabilities = context.get("capabilities", {})
        if "ALL" not in capabilities.get("drop", []) or not set(capabilities.get("add", [])) <= {"NET_BIND_SERVICE"}:
            yield f"{name} keeps capabilities"


def library(pod: dict) -> Iterator[str]:
    """Best practices that clusters commonly enforce."""
    if pod.get("automountServiceAccountToken") is not False:
        yield "a token is mounted"
    if pod.get("serviceAccountName", "default") == "default":
        yield "it is the default service account"
    for one in containers(pod):
        name, tag = one["name"], one["image"].rpartition("/")[2].partition(":")[2]
        if tag in {"", "latest"} and "@sha256:" not in one["image"]:
            yield f"{name}'s image has no version"
        if "/" not in one["image"]:
            yield f"{name}'s image has no registry"
        for kind, wanted in (("requests", {"cpu", "memory", "ephemeral-storage"}), ("limits", {"memory", "ephemeral-storage"})):
            if not wanted <= set(one.get("resources", {}).get(kind, {})):
                yield f"{name} has no {kind}"
        if one.get("securityContext", {}).get("readOnlyRootFilesystem") is not True:
            yield f"{name} may write to its root"
        if any("secretKeyRef" in variable.get("valueFrom", {}) for variable in one.get("env", [])):
            yield f"{name} has a secret in its environment"
    # A native sidecar's app has the readiness of both.
    for one, probes in [(one, ("livenessProbe", "readinessProbe")) for one in pod["containers"]] + [
        (one, ("livenessProbe", "startupProbe")) for one in pod.get("initContainers", []) if one.get("restartPolicy") == "Always"
    ]:
        yield from (f"{one['name']} has no {probe}" for probe in probes if probe not in one)
    for volume in pod.get("volumes", []):
        if "emptyDir" in volume and not volume["emptyDir"].get("sizeLimit"):
            yield f"volume {volume['name']} has no end"
