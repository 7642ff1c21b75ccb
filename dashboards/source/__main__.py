"""Writes the dashboards, or with --check says which are not what the code makes: `.cache/venv/bin/python -m source`, in dashboards/."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from grafana_foundation_sdk.cog.encoder import JSONEncoder

from . import agent, agent_fleet, fleet, internals, limits, native, spend

HERE = Path(__file__).resolve().parents[1]
BOARDS = {"fleet": fleet, "spend": spend, "agent": agent, "limits": limits, "internals": internals, "agent-fleet": agent_fleet, "native": native}


def texts() -> dict[str, str]:
    return {name: json.dumps(plain(module.dashboard()), indent=2, sort_keys=True, ensure_ascii=False) + "\n" for name, module in BOARDS.items()}


def plain(board) -> dict:
    """The board as JSON, without what the library says of links and annotations by itself: that they are hidden in a menu."""

    def clean(value):
        if isinstance(value, dict):
            return {key: clean(one) for key, one in value.items() if key != "placement" or one != "inControlsMenu"}
        return [clean(one) for one in value] if isinstance(value, list) else value

    return clean(json.loads(json.dumps(board, cls=JSONEncoder)))


if __name__ == "__main__":
    stale = [name for name, text in texts().items() if not (file := HERE / f"{name}.json").exists() or file.read_text() != text]
    if "--check" in sys.argv:
        sys.exit(f"not as made: {stale}" if stale else 0)
    for name, text in texts().items():
        (HERE / f"{name}.json").write_text(text)
