"""A pod's YAML as flags of docker: what kubelet would make of it, for the fields that deploy/kubernetes uses. A field that is not known here fails the
test, so that nothing is taken for tried that was not.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import engine

from harness import wait_for

API = {"ANTHROPIC_BASE_URL": engine.API}
UNITS = {"m": 1e-3, "": 1, "Ki": 2**10, "Mi": 2**20, "Gi": 2**30}
# What a test on one machine has no counterpart for: where a pod runs, and what is asked of it from outside, which tests ask themselves.
ELSEWHERE = {"serviceAccountName", "automountServiceAccountToken", "enableServiceLinks", "restartPolicy", "terminationGracePeriodSeconds"}
PROBED = ["startupProbe", "livenessProbe", "readinessProbe"]


def quantity(text: str) -> float:
    number, unit = re.fullmatch(r"(\d+)([A-Za-z]*)", str(text)).groups()
    return int(number) * UNITS[unit]


def image(name: str) -> str:
    """Of the registry's, those that were built here."""
    return name.removeprefix("registry.example.com/")


@dataclass
class Pod:
    """What stands in a workload's template, with the ConfigMaps beside it; its containers share what a pod's do."""

    template: dict
    configs: dict[str, dict]
    network: engine.Pod
    directory: Path
    secrets: dict[str, dict]
    containers: dict[str, engine.Container] = field(default_factory=dict)

    @property
    def spec(self) -> dict:
        return self.template["spec"]

    def volumes(self) -> dict[str, tuple[Path, str]]:
        """As kubelet lays them: a directory each, its group the pod's, and whether it is for reading alone."""
        group = self.spec["securityContext"].get("fsGroup", 0)
        made = {}
        for volume in self.spec["volumes"]:
            (kind,) = set(volume) - {"name"}
            at = self.directory / volume["name"]
            at.mkdir()
            files = {
                "emptyDir": lambda _: {},
                "configMap": lambda source: self.configs[source["name"]],
                "secret": lambda source: self.secrets[source["secretName"]],
                "downwardAPI": lambda source: {item["path"]: self.downward(item["fieldRef"]["fieldPath"]) for item in source["items"]},
            }[kind](volume[kind])
            for name, content in files.items():
                (at / name).write_text(content)
                (at / name).chmod(volume[kind].get("defaultMode", 0o644))
                engine.os.chown(at / name, 0, group)
            engine.os.chown(at, 0, group)
            at.chmod(0o2777 if group else 0o777)
            made[volume["name"]] = (at, "rw" if kind == "emptyDir" else "ro")
        return made

    def downward(self, path: str) -> str:
        if path in {"metadata.labels", "metadata.annotations"}:
            given = self.template["metadata"].get(path.split(".")[1], {})
            return "\n".join(f"{key}={json.dumps(value)}" for key, value in given.items())
        return {"metadata.name": "agent-0", "metadata.namespace": "agents"}[path]

    def environment(self, container: dict) -> dict[str, str]:
        known: dict[str, str] = {}
        for variable in container.get("env", []):
            source = variable.get("valueFrom")
            value = self.downward(source["fieldRef"]["fieldPath"]) if source else variable["value"]
            known[variable["name"]] = re.sub(r"\$\((\w+)\)", lambda name: known[name[1]], value)
        return known

    def start(self) -> None:
        volumes = self.volumes()
        unknown = set(self.spec) - ELSEWHERE - {"containers", "initContainers", "volumes", "securityContext", "shareProcessNamespace"}
        assert not unknown, unknown
        for container in self.spec.get("initContainers", []):
            self.run(container, volumes)
            if container.get("restartPolicy") == "Always":
                probe = container["startupProbe"]
                wait_for("started sidecar", lambda probe=probe, of=container: self.ask(of, probe), 120)
            else:
                assert self.containers[container["name"]].wait() == 0, self.containers[container["name"]].errors()
        for container in self.spec["containers"]:
            self.run(container, volumes)

    def ask(self, container: dict, probe: dict) -> bool:
        """A probe, once."""
        ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
        port = probe["httpGet"]["port"]
        return self.network.get(probe["httpGet"]["path"], ports.get(port, port))[0] == 200

    def run(self, container: dict, volumes: dict[str, tuple[Path, str]]) -> None:
        known = {"name", "image", "command", "args", "env", "resources", "securityContext", "volumeMounts", "ports", "lifecycle", "restartPolicy", *PROBED}
        assert set(container) <= known, set(container) - known
        flags: list[object] = []
        for mount in container.get("volumeMounts", []):
            assert set(mount) <= {"name", "mountPath", "readOnly"}, mount
            source, mode = volumes[mount["name"]]
            flags += ["--volume", f"{source}:{mount['mountPath']}:{'ro' if mount.get('readOnly') else mode}"]
        # The pod's, as far as the container's own does not say otherwise.
        may = self.spec["securityContext"] | container.get("securityContext", {})
        for key, value in may.items():
            flags += {
                "runAsUser": lambda uid: ["--user", f"{uid}:{may['runAsGroup']}"],
                "fsGroup": lambda group: ["--group-add", group],
                "readOnlyRootFilesystem": lambda yes: ["--read-only"] if yes else [],
                "allowPrivilegeEscalation": lambda yes: [] if yes else ["--security-opt", "no-new-privileges"],
                # Docker's own filter is what containers have here, if the kernel has one.
                "seccompProfile": lambda _: [],
                "runAsNonRoot": lambda yes: [] if not yes or may["runAsUser"] else 1 / 0,
                "runAsGroup": lambda _: [],
                "fsGroupChangePolicy": lambda _: [],
                "capabilities": lambda caps: [
                    word for how in ("drop", "add") for cap in caps.get(how, []) for word in (f"--cap-{how}", cap)
                ],
            }[key](value)
        limits = container["resources"]["limits"]
        flags += ["--memory", int(quantity(limits["memory"])), "--cpus", quantity(limits["cpu"])]
        if self.spec.get("shareProcessNamespace"):
            flags += ["--pid", f"container:{self.network.id}"]
        for name, value in (self.environment(container) | API).items():
            flags += ["--env", f"{name}={value}"]
        command = container.get("command", [])
        if command:
            flags += ["--entrypoint", command[0]]
        words = (*command[1:], *container.get("args", []))
        started = engine.Container(self.network, image(container["image"]), tuple(flags), tuple(words))
        self.network.containers.append(started)
        self.containers[container["name"]] = started
