"""Whether a provider's own SDK, pointed at our fake of it, sees what we have created: `sdks.py PROVIDER ADDRESS TOKEN KEY`."""

import os
import sys

provider, address, token, key = sys.argv[1:]
KEY_LABEL = "agent-fleet.key"

if provider == "e2b":
    os.environ |= {"E2B_API_KEY": token, "E2B_API_URL": address, "E2B_SANDBOX_URL": address}
    from e2b import Sandbox, SandboxQuery

    (found,) = Sandbox.list(query=SandboxQuery(metadata={KEY_LABEL: key})).next_items()
    assert found.metadata[KEY_LABEL] == key, found
    sandbox = Sandbox.connect(found.sandbox_id)
    # What we have begun is there, by its tag's command.
    assert any("agent-fleet" in word for process in sandbox.commands.list() for word in process.args), sandbox.commands.list()
    done = sandbox.commands.run("echo $SAID; echo no >&2")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "hello\n", "no\n"), done
    assert sandbox.kill()
elif provider == "daytona":
    from daytona import Daytona, DaytonaConfig

    sandbox = Daytona(DaytonaConfig(api_key=token, api_url=address, target="us")).get(key)
    assert sandbox.labels[KEY_LABEL] == key and sandbox.auto_stop_interval == 0, sandbox
    done = sandbox.process.exec("echo $SAID")
    assert (done.exit_code, done.result.strip()) == (0, "hello"), done
    sandbox.delete()
elif provider == "modal":
    token_id, token_secret = token.split(":")
    os.environ |= {"MODAL_SERVER_URL": address, "MODAL_TOKEN_ID": token_id, "MODAL_TOKEN_SECRET": token_secret, "MODAL_CONFIG_PATH": "/dev/null"}
    import modal

    app = modal.App.lookup("agents")
    (found,) = modal.Sandbox.list(app_id=app.app_id, tags={KEY_LABEL: key})
    sandbox = modal.Sandbox.from_name("agents", key)
    assert sandbox.object_id == found.object_id, (sandbox, found)
    assert sandbox.get_tags()[KEY_LABEL] == key, sandbox.get_tags()
    assert sandbox.poll() is None
    done = sandbox.exec("sh", "-c", "echo $SAID $MORE; echo no >&2; exit 3", env={"MORE": "more"})
    assert (done.stdout.read(), done.stderr.read(), done.wait()) == ("hello more\n", "no\n", 3)
    # What we have begun writes down who it is.
    assert sandbox.exec("test", "-e", f"/tmp/.{key}.pid").wait() == 0
    assert sandbox.tunnels()[8080].url.startswith("https://"), sandbox.tunnels()
    sandbox.terminate()
    assert sandbox.poll() == 137
    assert list(modal.Sandbox.list(app_id=app.app_id, tags={KEY_LABEL: key})) == []
else:
    sys.exit(f"there is no SDK of {provider} here")
