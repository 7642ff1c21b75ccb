"""The examples for one platform each: their shape is what the platform's own schema, model or SDK has, and what they set the sidecar understands. None of
these platforms is asked.
"""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from pathlib import Path

import jsonschema
import pytest
import settings
import yaml
from images import AGENT, DEPLOY, SIDECAR
from kustomize import TOOLS

PYTHON = TOOLS / "venv/bin/python"


def seconds(duration: str) -> int:
    return sum(int(n) * {"s": 1, "m": 60, "h": 3600}[unit] for n, unit in re.findall(r"(\d+)([smh])", duration))


def sdk(directory: str, ask: str) -> object:
    """Has the example imported where its SDK is, and nothing can be reached; `ask` prints JSON."""
    done = subprocess.run([PYTHON, "-c", f"import json\n{ask}"], cwd=DEPLOY / directory, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def typed(source: Path, types: str, tmp_path: Path) -> None:
    """TypeScript's compiler finds the SDK's types satisfied."""
    (tmp_path / source.name).write_text(source.read_text())
    (tmp_path / "node_modules").symlink_to((TOOLS / "npm/node_modules").resolve())
    flags = ["--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "esnext", "--moduleResolution", "bundler", "--lib", "es2023"]
    done = subprocess.run(["node_modules/.bin/tsc", *flags, "--types", types, source.name], cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout


def strings(source: str) -> dict[str, str]:
    """The variables of a TypeScript object, with what they are set to, or a value of the kind where that is told elsewhere."""
    block = re.search(r"environment: Record<string, string> = \{(.*?)^\};", source, re.DOTALL | re.MULTILINE)[1]
    fixed = dict(re.findall(r'^\s*(\w+): "([^"]*)",$', block, re.MULTILINE))
    assert len(fixed) == len([line for line in block.splitlines() if line.strip() and not line.strip().startswith("//")])
    given = {name: VALUES[name] for name in re.findall(r"^\s*(AGENT_SIDECAR_\w+):", source, re.MULTILINE) if name not in fixed}
    return fixed | given


# What an example takes from a secret, or from who calls it.
VALUES = {
    "AGENT_SIDECAR_OTLP_ENDPOINT": "https://otlp.example.com",
    "AGENT_SIDECAR_OTLP_HEADERS": "authorization=Bearer%20x",
    "AGENT_SIDECAR_BUSY_WEBHOOK": "https://agents.example.com/busy/acme",
    "AGENT_SIDECAR_BUSY_WEBHOOK_HEADERS": "authorization=Bearer%20x",
    "AGENT_SIDECAR_TENANT": "acme",
}


def pushes(environment: dict[str, str]) -> None:
    """Everything is sent, metrics too; and the books of its own are kept."""
    said = settings.check(environment, flags=["--print"])
    shown = {line.split()[0]: line for line in said.splitlines() if line.strip()}
    assert environment["AGENT_SIDECAR_OTLP_ENDPOINT"].startswith("https://")
    assert "AGENT_SIDECAR_OTLP_METRICS" not in environment
    for name in ("limits.max_cost_usd", "ledger.path", "otlp.queue_dir", "otlp.endpoint"):
        assert "(unset)" not in shown[name], said
    # Either is there, or an agent that hangs is paid for until the platform's own end.
    assert not all("(unset)" in shown[name] for name in ("limits.idle_timeout", "limits.max_duration")), said


# ---- a machine


def test_systemd_takes_the_unit(tmp_path: Path):
    """What it starts is not here: a stand-in is in its place."""
    unit = tmp_path / "agent-sidecar@x.service"
    unit.write_text((DEPLOY / "systemd/agent-sidecar@.service").read_text().replace("/opt/agents/%i/bin/python3", "/bin/true"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", unit], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and unit.name not in done.stderr, done.stderr
    argv = ["systemd-analyze", "security", "--offline=yes", "--threshold=25", "--no-pager", unit]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-600:] + done.stderr


def test_the_unit_counts_on_the_grace_that_it_gives():
    text = (DEPLOY / "systemd/agent-sidecar@.service").read_text()
    words = " ".join(re.findall(r"^Environment=(.*)$", text, re.MULTILINE)).replace("%i", "x").split()
    environment = dict(word.split("=", 1) for word in words)
    settings.check(environment)
    assert re.search(r"^TimeoutStopSec=(.*)$", text, re.MULTILINE)[1] == environment["AGENT_SIDECAR_PLATFORM_GRACE"]


# ---- Fly


# There is no schema of it in a registry: the words of its reference that are used, by table.
FLY = {
    "": {"app", "primary_region", "kill_signal", "kill_timeout", "build", "env", "metrics", "mounts", "vm", "http_service"},
    "build": {"image"},
    "metrics": {"port", "path"},
    "mounts": {"source", "destination"},
    "vm": {"size", "memory"},
    "http_service": {"internal_port", "force_https", "auto_stop_machines", "auto_start_machines", "min_machines_running", "concurrency", "checks"},
    "concurrency": {"type", "soft_limit", "hard_limit"},
    "checks": {"method", "path", "interval", "timeout", "grace_period"},
}


def test_fly_is_told_words_that_it_knows():
    fly = tomllib.loads((DEPLOY / "fly/fly.toml").read_text())

    def known(table: dict, name: str = "") -> None:
        assert set(table) <= FLY[name]
        for key, value in table.items():
            for each in value if isinstance(value, list) else [value]:
                if isinstance(each, dict) and key != "env":
                    known(each, key)

    known(fly)
    said = settings.check({**fly["env"], "AGENT_SIDECAR_OTLP_HEADERS": VALUES["AGENT_SIDECAR_OTLP_HEADERS"]}, flags=["--print"])
    assert fly["env"]["AGENT_SIDECAR_PLATFORM_GRACE"] == f"{fly['kill_timeout']}s"
    assert re.search(rf"listen\s+\S*:{fly['metrics']['port']}\b", said), said
    assert fly["http_service"]["auto_stop_machines"] == "off"


# ---- Cloud Run


def cloud_run() -> dict:
    """Google's discovery document as a JSON schema that knows what it does not know."""

    def strict(node: object) -> object:
        if isinstance(node, list):
            return [strict(each) for each in node]
        if not isinstance(node, dict):
            return node
        # Both are read.
        if node.get("format") == "int64":
            return {"type": ["string", "integer"]}
        made = {key: strict(value) for key, value in node.items() if key not in {"id", "format", "default", "enumDescriptions"}}
        if "$ref" in made:
            return {"$ref": f"#/$defs/{node['$ref']}"}
        if "properties" in made and node.get("type") == "object":
            made.setdefault("additionalProperties", False)
        return made

    document = json.loads((TOOLS / "run.v1.json").read_text())
    return {"$defs": {name: strict(schema) for name, schema in document["schemas"].items()}}


CLOUD_RUN = {"service.yaml": lambda object: object["spec"]["template"], "job.yaml": lambda object: object["spec"]["template"]["spec"]["template"]}


@pytest.mark.parametrize("file", CLOUD_RUN)
def test_cloud_run_takes_it(file: str):
    object = yaml.safe_load((DEPLOY / "cloud-run" / file).read_text())
    schema = cloud_run()
    validator = jsonschema.Draft202012Validator({**schema, "$ref": f"#/$defs/{object['kind']}"})
    assert [error.message for error in validator.iter_errors(object)] == []
    CLOUD_RUN[file](object)["spec"]["containers"][0]["imagine"] = "x"
    assert [error.message for error in validator.iter_errors(object)] != []


@pytest.mark.parametrize("file", CLOUD_RUN)
def test_cloud_runs_agents_push_and_end_within_ten_seconds(file: str):
    spec = CLOUD_RUN[file](yaml.safe_load((DEPLOY / "cloud-run" / file).read_text()))["spec"]
    for container in spec["containers"]:
        environment = {each["name"]: each.get("value") or VALUES[each["name"]] for each in container["env"]}
        settings.check(environment)
        if container["name"] == "agent":
            pushes(environment)
            assert environment["AGENT_SIDECAR_PLATFORM_GRACE"] == "10s"
        mounts, volumes = ({each["name"] for each in list} for list in (container["volumeMounts"], spec["volumes"]))
        assert mounts <= volumes
    if file == "job.yaml":
        assert seconds(environment["AGENT_SIDECAR_MAX_DURATION"]) < spec["timeoutSeconds"]


# ---- ECS


def test_ecs_takes_it():
    file = DEPLOY / "ecs/task-definition.json"
    ask = f"""
import botocore.loaders, botocore.model, botocore.validate
model = botocore.model.ServiceModel(botocore.loaders.Loader().load_service_model("ecs", "service-2"))
shape = model.operation_model("RegisterTaskDefinition").input_shape
task = json.load(open({str(file)!r}))
say = lambda task: botocore.validate.ParamValidator().validate(task, shape).generate_report()
good = say(task)
task["containerDefinitions"][0]["readOnly"] = True
print(json.dumps([good, say(task)]))"""
    good, broken = sdk("ecs", ask)
    assert good == "" and "readOnly" in broken


def test_ecs_agents_push_and_are_given_their_grace():
    task = json.loads((DEPLOY / "ecs/task-definition.json").read_text())
    for container in task["containerDefinitions"]:
        environment = {each["name"]: each["value"] for each in container["environment"]}
        environment |= {each["name"]: VALUES.get(each["name"], "x") for each in container.get("secrets", [])}
        settings.check(environment)
        # Fargate gives two minutes at most.
        assert seconds(environment.get("AGENT_SIDECAR_PLATFORM_GRACE", "30s")) <= container["stopTimeout"] <= 120
        assert container["readonlyRootFilesystem"] and container["user"] == "10001:10001"
        assert container["linuxParameters"]["capabilities"] == {"drop": ["ALL"]}
        assert {each["sourceVolume"] for each in container["mountPoints"]} <= {each["name"] for each in task["volumes"]}
        if container["name"] == "agent":
            pushes(environment)
    assert sum(each["memory"] for each in task["containerDefinitions"]) <= int(task["memory"])


# ---- sandboxes


def test_modal_takes_it():
    ask = """
import inspect, app, modal
called = {}
def create(*args, **options):
    given.bind(*args, **options)
    called.update(options, args=args)
given = inspect.signature(modal.Sandbox.create)
modal.Sandbox.create = create
app.start("go", "acme")
assert isinstance(called["image"], modal.Image) and all(isinstance(one, modal.Volume) for one in called["volumes"].values())
print(json.dumps({"env": called["env"], "timeout": called["timeout"], "idle": called.get("idle_timeout"), "args": called["args"]}))"""
    said = sdk("modal", ask)
    pushes(said["env"])
    assert said["args"][-1] == "go" and said["idle"] is None
    assert seconds(said["env"]["AGENT_SIDECAR_MAX_DURATION"]) < said["timeout"]


def test_e2b_takes_it():
    ask = """
import inspect, os, types, e2b, template
os.environ.update(ANTHROPIC_API_KEY="x", AGENT_SIDECAR_OTLP_HEADERS="authorization=Bearer%20x")
called = {}
class Commands:
    def run(self, *args, **options):
        inspect.signature(e2b.sandbox_sync.commands.command.Commands.run).bind(self, *args, **options)
        called.update(run=args, **options)
        return types.SimpleNamespace(stdout="")
given = inspect.signature(e2b.Sandbox.create)
def create(*args, **options):
    given.bind(*args, **options)
    called.update(create=options)
    return types.SimpleNamespace(commands=Commands(), kill=lambda: called.update(killed=True))
template.Sandbox.create = create
template.run("go", "acme")
inspect.signature(e2b.Template.build).bind(template.template, template.NAME, cpu_count=2, memory_mb=4096)
print(json.dumps({**called, "template": json.loads(e2b.Template.to_json(template.template))}))"""
    said = sdk("e2b", ask)
    pushes(said["envs"])
    assert said["killed"] and said["timeout"] == 0
    # Nothing is started when it is built, and frozen.
    assert not said["template"].get("startCmd") and said["template"]["fromImage"].endswith(AGENT)
    assert seconds(said["envs"]["AGENT_SIDECAR_MAX_DURATION"]) < said["create"]["timeout"]


def test_daytona_takes_it():
    ask = """
import inspect, os, types, create, daytona
from daytona._sync.process import Process
os.environ.update(ANTHROPIC_API_KEY="x", AGENT_SIDECAR_OTLP_HEADERS="authorization=Bearer%20x")
called = {}
given = {"create": inspect.signature(daytona.Daytona.create), "exec": inspect.signature(Process.exec)}
def exec(*args, **options):
    given["exec"].bind(None, *args, **options)
    called.update(options)
    return types.SimpleNamespace(result="")
class Daytona:
    def create(self, params, **options):
        given["create"].bind(self, params, **options)
        called.update(params=params.model_dump(include={"auto_stop_interval", "ttl_minutes", "ephemeral", "labels"}))
        return types.SimpleNamespace(process=types.SimpleNamespace(exec=exec), delete=lambda: called.update(deleted=True))
create.Daytona = Daytona
create.run("go", "acme")
print(json.dumps({**called, "dockerfile": create.image.dockerfile()}))"""
    said = sdk("daytona", ask)
    pushes(said["env"])
    assert said["deleted"] and f"/{AGENT}" in said["dockerfile"]
    assert said["params"]["auto_stop_interval"] == 0, "or it is stopped in the middle of an answer"
    assert seconds(said["env"]["AGENT_SIDECAR_MAX_DURATION"]) < said["params"]["ttl_minutes"] * 60


def test_vercel_takes_it(tmp_path: Path):
    file = DEPLOY / "vercel/create.ts"
    typed(file, "node", tmp_path)
    environment = strings(file.read_text())
    pushes(environment)
    assert seconds(environment["AGENT_SIDECAR_MAX_DURATION"]) < 60 * int(re.search(r"minutes = (\d+)", file.read_text())[1])


@pytest.mark.parametrize("directory", ["cloudflare", "cloudflare/fleet"])
def test_cloudflare_takes_it(directory: str, tmp_path: Path):
    directory = DEPLOY / directory
    typed(directory / "worker.ts", "@cloudflare/workers-types", tmp_path)
    text = "\n".join(line for line in (directory / "wrangler.jsonc").read_text().splitlines() if not line.lstrip().startswith("//"))
    wrangler = json.loads(text)
    schema = json.loads((TOOLS / "wrangler.json").read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(wrangler)] == []
    assert [error.message for error in validator.iter_errors({**wrangler, "containers": [{"class": "Agent"}]})] != []
    source = (directory / "worker.ts").read_text()
    bound = {each["name"]: each["class_name"] for each in wrangler["durable_objects"]["bindings"]}
    assert wrangler["containers"][0]["class_name"] in bound.values() and set(bound.values()) == set(wrangler["migrations"][0]["new_sqlite_classes"])
    assert all(re.search(rf"^export class {name} extends (Container|DurableObject)<Env> ", source, re.MULTILINE) for name in bound.values())
    assert (directory / wrangler["containers"][0]["image"]).is_file()
    # What the Worker reads is set here, or is a secret that the head tells of; a token that is replaced is not there for long.
    read = set(re.findall(r"env\.([A-Z_]+)", source)) - set(bound) - {"FLEET_TOKEN_OLD"}
    head = (directory / "wrangler.jsonc").read_text().splitlines()[0]
    assert read and all(name in wrangler["vars"] or name in head for name in read)


def test_cloudflares_agents_push_and_keep_their_container_awake():
    source = (DEPLOY / "cloudflare/worker.ts").read_text()
    environment = strings(source)
    pushes(environment)
    assert seconds(environment["AGENT_SIDECAR_BUSY_LEASE"]) < seconds(re.search(r'sleepAfter = "(\w+)"', source)[1])


@pytest.mark.parametrize("file", ["cloudflare/Dockerfile", "cloudflare/fleet/wrangler.jsonc", "modal/app.py", "e2b/template.py", "daytona/create.py", "fly/fly.toml", "cloud-run/service.yaml", "cloud-run/job.yaml"])
def test_they_all_take_the_same_image(file: str):
    images = re.findall(r"registry\.example\.com/([\w.:-]+)", (DEPLOY / file).read_text())
    assert images and set(images) <= {AGENT, SIDECAR}
