"""docs/own_head.md from its first line to its last, each command as a reader types it."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from documents import PAGES, lines, snippets
from ports import free_port

PAGE = next(page for page in PAGES if page.stem == "own_head")
# What a busy machine may take to load a pair.
SECONDS = 300


@pytest.mark.slow
def test_the_seven_steps(tmp_path):
    scripts = str(Path(sys.executable).parent)
    environment = os.environ | {"PATH": f"{scripts}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}
    port = free_port()
    install, *commands, serve, ask = (line.replace("8000", str(port)) for line in lines(PAGE))
    assert install.startswith("pip install") and serve.startswith("dspark-hf serve") and ask.startswith("curl")
    [prompts] = snippets(PAGE)
    subprocess.run([sys.executable, "-c", prompts], cwd=tmp_path, check=True)
    said = {}
    for command in commands:
        done = subprocess.run(
            shlex.split(command), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        said[shlex.split(command)[1]] = done.stdout
    assert list(said) == ["regenerate", "train", "inspect", "verify", "doctor", "eval", "bench", "publish"]
    assert re.search(r"step \d+ of \d+ .*tau", said["train"]) and "of its own answers" in said["train"]
    assert "fits" in said["inspect"]
    assert "identical" in said["verify"] and "nothing is wrong" in said["doctor"]
    [measured] = json.loads((tmp_path / "results.json").read_text())["results"]
    assert measured["accepted_length"] > 1.5
    assert "drafts for USER/my-model" in said["publish"]
    for path in (tmp_path / "repository").rglob("*.*"):
        assert path.suffix == ".safetensors" or str(tmp_path) not in path.read_text(), path
    server = subprocess.Popen(shlex.split(serve), cwd=tmp_path, env=environment)
    try:
        answer = asked(ask, server)
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(SECONDS)
    assert answer["choices"][0]["message"]["content"] and answer["usage"]["completion_tokens"] > 1


def asked(command: str, server: subprocess.Popen) -> dict:
    """What curl would print, once the server listens."""
    _, url, _, header, _, body = shlex.split(command)
    request = urllib.request.Request(url, body.encode(), dict([header.split(": ")]))
    end = time.monotonic() + SECONDS
    while True:
        assert server.poll() is None and time.monotonic() < end
        try:
            with urllib.request.urlopen(request) as response:
                return json.load(response)
        except urllib.error.HTTPError:
            raise
        except urllib.error.URLError:
            time.sleep(0.5)
