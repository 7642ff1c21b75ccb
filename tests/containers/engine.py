"""A dockerd of our own, its images, and what runs in them.

There is no bridge and nothing to pull: the images are made of files of this machine, and the containers of a test share the loopback
of one that runs the scripted API.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import http.client
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "live"))

import claude_agent_sdk
import harness

# As people have it, and the same with the two lines of the README.
BARE, WRAPPED = "app", "app-with-sidecar"
DOCKERFILE = f"FROM {BARE}\nCOPY agent-sidecar /usr/local/bin/\nRUN agent-sidecar install --all\n"
API = "http://127.0.0.1:8000"
# What a container is given to end by itself, on a machine that does other things besides.
GRACE = 30


class Dockerd:
    """The daemon, for the whole run. With `bridges` containers may have networks of their own, as far as the namespace goes that we are in."""

    def __init__(self, bridges: bool = False, config: dict | None = None):
        self.directory = Path(tempfile.mkdtemp(prefix="dockerd-"))
        self.host = f"unix://{self.directory}/docker.sock"
        self.log = self.directory / "log"
        (self.directory / "daemon.json").write_text(json.dumps(config or {}))
        paths = {"data-root": "data", "exec-root": "exec", "pidfile": "pid", "config-file": "daemon.json"}
        flags = [word for name, path in paths.items() for word in (f"--{name}", self.directory / path)]
        # The daemon goes with us, even if we are killed.
        argv = ["setpriv", "--pdeathsig", "TERM", "dockerd", "--host", self.host, *flags]
        argv += ["--shutdown-timeout", "5"]
        argv += [] if bridges else ["--bridge", "none", "--iptables=false", "--ip-forward=false", "--ip-masq=false"]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(list(map(str, argv)), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            harness.wait_for("dockerd", self._answers, 60)
        except AssertionError:
            said = self.log.read_text(errors="replace")
            self.stop()
            last = "\n".join(said.splitlines()[-8:])
            raise RuntimeError(
                "dockerd does not start here: the container tests need root and cgroups of their own, and the package docker.io"
                f" (tests/install); AGENT_SIDECAR_TESTS_NO_DOCKER=1 leaves them out. Its last words:\n{last}"
            ) from None

    def _answers(self) -> bool:
        assert self.process.poll() is None, "dockerd has ended"
        return subprocess.run(["docker", "--host", self.host, "version"], capture_output=True).returncode == 0

    def stop(self) -> None:
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(60)
        self.process.kill()
        self.process.wait(5)
        shutil.rmtree(self.directory, ignore_errors=True)


def docker(*words: object, stdin: object = subprocess.DEVNULL, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess:
    done = subprocess.run(["docker", *map(str, words)], stdin=stdin, capture_output=True, text=True, timeout=timeout)
    assert not check or done.returncode == 0, f"docker {words[0]}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
    return done


# ---- images

TOOLS = "bash sh cat cp echo env id kill ls mkdir mv ps rm sleep tail touch true".split()
PYTHON_LIB = f"/usr/local/lib/python{sysconfig.get_python_version()}"
ACCOUNTS = {
    "/etc/passwd": "root:x:0:0:root:/root:/bin/bash\napp:x:1000:1000::/home/app:/bin/bash\n",
    "/etc/group": "root:x:0:\napp:x:1000:\n",
}


def libraries(path: Path) -> Iterator[Path]:
    """What the loader wants for a program or a module; nothing for what is static."""
    listed = subprocess.run(["ldd", path], capture_output=True, text=True).stdout
    for word in listed.split():
        if word.startswith("/"):
            yield Path(word)


class Root:
    """A tar of an image's files."""

    def __init__(self, out):
        self.tar = tarfile.open(fileobj=out, mode="w|")
        self.has: set[str] = set()

    def put(self, source: Path, at: str, mode: int | None = None) -> None:
        """A file, with what it is linked with."""
        if at in self.has:
            return
        self.has.add(at)
        real = source.resolve()
        info = self.tar.gettarinfo(real, at)
        info.uid = info.gid = 0
        info.mode = mode or info.mode
        # The same file under two names is two files here.
        info.type, info.linkname, info.size = tarfile.REGTYPE, "", real.stat().st_size
        with real.open("rb") as content:
            self.tar.addfile(info, content)
        if os.access(real, os.X_OK) or ".so" in real.name:
            self.libraries(real)

    def libraries(self, of: Path) -> None:
        for library in libraries(of):
            # /lib is a link; and a Python of one's own may have its library below a home that is nobody else's.
            place = library.parent.resolve()
            self.put(library, str((place if place.is_relative_to("/usr") else Path("/usr/lib")) / library.name))

    def tree(self, source: Path, at: str, leave_out: Callable[[Path], bool]) -> None:
        for path in sorted(source.rglob("*")):
            if path.is_file() and not leave_out(path.relative_to(source)):
                self.put(path, f"{at}/{path.relative_to(source)}")

    def directory(self, at: str, mode: int = 0o755, owner: int = 0) -> None:
        info = tarfile.TarInfo(at)
        info.type, info.mode, info.uid, info.gid = tarfile.DIRTYPE, mode, owner, owner
        self.tar.addfile(info)

    def text(self, at: str, content: str) -> None:
        info, data = tarfile.TarInfo(at), content.encode()
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def link(self, at: str, to: str) -> None:
        info = tarfile.TarInfo(at)
        info.type, info.linkname = tarfile.SYMTYPE, to
        self.tar.addfile(info)


def write_root(out) -> None:
    """An image as somebody has it who uses the Python SDK: a shell and its tools, Python, the SDK with its CLI, and an app."""
    root = Root(out)
    for directory in ["/etc", "/usr", "/var", "/var/log", "/run", "/data"]:
        root.directory(directory)
    for link in ["bin", "lib", "lib64", "sbin"]:
        root.directory(f"/usr/{link}")
        root.link(f"/{link}", f"usr/{link}")
    root.directory("/root", 0o700)
    root.directory("/home/app", owner=1000)
    root.directory("/tmp", 0o1777)
    for at, content in ACCOUNTS.items():
        root.text(at, content)
    for tool in TOOLS:
        root.put(Path(shutil.which(tool)), f"/usr/bin/{tool}")
    root.put(Path(sys.executable), "/usr/local/bin/python3")
    of_no_use = {"test", "tests", "idlelib", "tkinter", "ensurepip", "lib2to3", "site-packages", "dist-packages", "config"}
    root.tree(Path(sysconfig.get_path("stdlib")), PYTHON_LIB, lambda path: bool(of_no_use & set(path.parts)))
    packages = Path(claude_agent_sdk.__file__).parents[1]
    not_the_apps = {"pip", "setuptools", "rotel", "pytest", "_pytest", "xdist"}
    root.tree(packages, f"{PYTHON_LIB}/site-packages", lambda path: bool(not_the_apps & set(path.parts)) or path.name == "claude")
    bundled = f"{PYTHON_LIB}/site-packages/claude_agent_sdk/_bundled/claude"
    root.put(harness.cli("new"), bundled, 0o755)
    root.link("/usr/local/bin/claude", bundled)
    for app in HERE.glob("apps/*.py"):
        root.put(app, f"/app/{app.name}")
    # A binary for developers is linked with a few more.
    root.libraries(harness.binary())
    root.tar.close()


def import_root(image: str, write: Callable, *changes: str) -> None:
    """An image of the files that `write` puts into its tar."""
    words = [word for change in changes for word in ("--change", change)]
    importing = subprocess.Popen(["docker", "import", *words, "-", image], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    with importing.stdin as out:
        write(out)
    assert importing.wait(300) == 0, "docker import"


def make_bare() -> None:
    import_root(BARE, write_root, f"ENV PYTHONPATH={PYTHON_LIB}/site-packages", "ENV PATH=/usr/local/bin:/usr/bin")
    os.environ["DOCKER_BUILDKIT"] = "0"  # What builds there is would have to be pulled.


def make_images() -> None:
    make_bare()
    with tempfile.TemporaryDirectory() as context:
        shutil.copy2(harness.binary(), Path(context) / "agent-sidecar")
        (Path(context) / "Dockerfile").write_text(DOCKERFILE)
        docker("build", "--network", "none", "--tag", WRAPPED, context, timeout=300)


# ---- containers

class Container:
    """Started, and removed with its test. stdout and stderr apart, as its log has them."""

    def __init__(self, pod: Pod, image: str, flags: tuple, command: tuple):
        self.pod = pod
        network = f"container:{pod.id}" if pod.id else "none"
        self.id = docker("run", "--detach", "--network", network, *flags, image, *command).stdout.strip()

    def inspect(self, path: str) -> str:
        return docker("inspect", "--format", "{{" + path + "}}", self.id).stdout.strip()

    def running(self) -> bool:
        return self.inspect(".State.Running") == "true"

    def wait(self, timeout: float = 120) -> int:
        """Its exit code, when it is over."""
        return int(docker("wait", self.id, timeout=timeout).stdout)

    def stop(self, grace: int = GRACE) -> int:
        docker("stop", "--time", grace, self.id)
        return self.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """A command inside."""
        return docker("exec", self.id, *command, check=check).stdout

    def output(self) -> str:
        return docker("logs", self.id).stdout

    def errors(self) -> str:
        return docker("logs", self.id).stderr

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.output().splitlines()]

    def remove(self) -> None:
        docker("rm", "--force", "--volumes", self.id, check=False)


class Pod(harness.Api):
    """Containers that share a network, which is loopback alone; the first runs the scripted API, whose log is the truth."""

    def __init__(self, directory: Path, script: dict):
        self.directory = directory / "api"
        self.directory.mkdir(parents=True)
        self.log_file = self.directory / "api.jsonl"
        (self.directory / "script.json").write_text(json.dumps(script))
        self.id = ""
        mounts = ["--volume", f"{harness.binary()}:/agent-sidecar:ro", "--volume", f"{self.directory}:/api"]
        command = "/agent-sidecar messages-api --script /api/script.json --listen 127.0.0.1:8000 --log /api/api.jsonl".split()
        self.containers = [Container(self, BARE, tuple(mounts), tuple(command))]
        self.id = self.containers[0].id
        self.pid = int(self.containers[0].inspect(".State.Pid"))
        harness.wait_for("messages API", lambda: self.get("/", 8000)[0] == 200)

    def start(self, *command: str, image: str = WRAPPED, flags: tuple = (), **environment: str) -> Container:
        """A container with a CLI that knows where the API is."""
        known = {
            "ANTHROPIC_API_KEY": "sk-ant-test",
            "ANTHROPIC_BASE_URL": API,
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "DISABLE_AUTOUPDATER": "1",
            **environment,
        }
        variables = [word for name, value in known.items() for word in ("--env", f"{name}={value}")]
        self.containers.append(Container(self, image, (*variables, *flags), command))
        return self.containers[-1]

    def get(self, path: str, port: int = 9477, body: str | None = None) -> tuple[int, str]:
        """Asks inside; status 0 if nobody answers."""

        def ask() -> tuple[int, str]:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
            try:
                connection.request("GET" if body is None else "POST", path, body)
                answer = connection.getresponse()
                return answer.status, answer.read().decode()
            except (OSError, http.client.HTTPException):
                return 0, ""
            finally:
                connection.close()

        return within(self.pid, ask)

    def metrics(self) -> dict[str, float]:
        status, page = self.get("/metrics")
        assert status == 200, page
        return harness.samples(page)

    def counted(self, name: str) -> float:
        return sum(value for series, value in self.metrics().items() if series.split("{")[0] == name)

    def close(self) -> None:
        for container in reversed(self.containers):
            container.remove()


@functools.cache
def libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def within(pid: int, ask: Callable) -> object:
    """Calls `ask` in the network of a process, on a thread that ends with it."""
    answers: list = []

    def enter() -> None:
        network = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        try:
            assert libc().setns(network, 0x40000000) == 0, os.strerror(ctypes.get_errno())
        finally:
            os.close(network)
        answers.append(ask())

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    return answers[0]
