"""The binary alone: no library, no shell, no file beside it."""

from __future__ import annotations

import shutil
import socket
import subprocess

import harness


def test_it_runs_in_an_empty_image(tmp_path):
    shutil.copy(harness.binary(), tmp_path / "agent-sidecar")
    inside = ["chroot", tmp_path, "/agent-sidecar", "run", "--listen", "off", "--", "/agent-sidecar", "--version"]
    done = subprocess.run(inside, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout.split()[0], done.stderr) == (0, b"agent-sidecar", b"")


def test_a_full_disk_costs_the_ledger_and_nothing_else():
    argv = [harness.binary(), "run", "--listen", "off", "--ledger", "/dev/full", "--", "sh", "-c", "cat; exit 3", "sh", *harness.STREAM_JSON]
    # It only echoes, and is no CLI: nothing of ours is written to it.
    lines = b'{"type":"user","session_id":"s","message":{"role":"user","content":"x"}}\n' * 3
    done = subprocess.run(argv, input=lines, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout) == (3, lines)
    assert done.stderr.count(b"the ledger file cannot be written") == 1


def test_a_port_that_is_taken_costs_the_metrics_and_nothing_else():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run([harness.binary(), "run", "--hub", "off", "--listen", address, "--", "sh", "-c", "exit 4"], capture_output=True, timeout=60)
    assert done.returncode == 4
    assert address.encode() in done.stderr and b"--listen" in done.stderr
