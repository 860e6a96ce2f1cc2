"""A stopped command ends, with its code and all that it started, whatever its code is busy with."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
COMMAND = """
import hashlib, signal, subprocess, sys, time
import typer
from jobs import cli, stopping

stopping.ENDS_WITHIN_S = 0.3
app = typer.Typer()

@app.command()
def native():
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes, without a look at signals

@app.command()
def deaf():
    while True:
        try:
            time.sleep(60)
        except BaseException:
            pass

@app.command()
def plain():
    time.sleep(60)

@app.command()
def early():
    time.sleep(60)

@app.command()
def late():
    pass

if sys.argv[1] in ("early", "late"):
    calls, set_wakeup_fd = [], signal.set_wakeup_fd

    def signalled(*arguments, **keywords):
        calls.append(None)
        if len(calls) == (1 if sys.argv[1] == "early" else 2):  # it is called where handlers are set, and set back
            signal.raise_signal(signal.SIGTERM)
        return set_wakeup_fd(*arguments, **keywords)

    signal.set_wakeup_fd = signalled

print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
cli.main(app)
"""


def handles_sigterm(pid):
    """Whether the process has a handler for it by now."""
    caught = Path(f"/proc/{pid}/status").read_text().split("SigCgt:")[1].split()[0]
    return int(caught, 16) >> (signal.SIGTERM - 1) & 1


@pytest.mark.parametrize("busy", ["native", "deaf", "plain"])
def test_a_signal_ends_the_command_and_its_children(busy):
    """In native code, where no handler runs; in code that swallows what the handler raises; and the ordinary way."""
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, busy], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(command.stdout.readline()))
    while not handles_sigterm(command.pid):
        time.sleep(0.02)
    command.send_signal(signal.SIGTERM)
    _, said = command.communicate(timeout=60)
    assert (143, False) == (command.returncode, child.is_running())
    assert said.startswith("stopped; what is committed stays")


@pytest.mark.parametrize("when", ["early", "late"])
def test_a_signal_beside_the_command_ends_it_as_one_within(when):
    """While handlers are being set, before anything has begun; and while they are set back, when all is done."""
    command = subprocess.Popen(
        [sys.executable, "-c", COMMAND, when], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    child = psutil.Process(int(command.stdout.readline()))
    _, said = command.communicate(timeout=60)
    assert (143, False) == (command.returncode, child.is_running())
    assert said.startswith("stopped; what is committed stays")
