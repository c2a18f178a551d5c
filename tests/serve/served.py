"""A server as a process, and plain requests to it."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

KEY = "a-key-of-sorts"


def launch(folder, model_folder, *more):
    environment = {**os.environ, "KVTRIM_LIBRARY": str(folder / "library"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "kvtrim", "serve", "--model", str(model_folder)]
    command += ["--port", "0", "--api-key", KEY, "--method", "snapkv", "--keep", "48"]
    with (folder / "log").open("a") as log:
        process = subprocess.Popen(
            [*command, *more], env=environment, stdout=subprocess.PIPE, stderr=log, text=True
        )
    line = process.stdout.readline()
    found = re.search(r"at (http://\S+)/ ", line)
    assert found, (line, (folder / "log").read_text())
    return process, found[1]


def send(url, method, path, body=None, key=KEY, **headers):
    headers = {"Content-Type": "application/json", **headers}
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"
    asked = urllib.request.Request(url + path, body, headers, method=method)
    try:
        with urllib.request.urlopen(asked, timeout=60) as got:
            content, status = got.read(), got.status
    except urllib.error.HTTPError as error:
        content, status = error.read(), error.code
    try:
        return status, json.loads(content)
    except ValueError:
        return status, content.decode()
