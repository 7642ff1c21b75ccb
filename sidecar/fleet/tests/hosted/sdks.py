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
else:
    sys.exit(f"there is no SDK of {provider} here")
