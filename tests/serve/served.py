"""A server as a process, and plain requests to it."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request

from processes import start

KEY = "a-key-of-sorts"


def launch(folder, model_folder, *more, fresh=False, **environment):
    """A server and its address; a fork of this process unless it is to be fresh."""
    if not fresh:
        import kvtrim.serve.app  # noqa: F401 here, once for all servers

    command = ["serve", "--model", model_folder, "--port", 0, "--api-key", KEY]
    command += ["--method", "snapkv", "--keep", 48, *more]
    log, library = folder / "log", str(folder / "library")
    if fresh:
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, "-m", "kvtrim", *map(str, command)],
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env={**os.environ, "KVTRIM_LIBRARY": library, **environment},
            )
    else:
        process = start(*command, log=log, KVTRIM_LIBRARY=library, **environment)
    line = process.stdout.readline()
    found = re.search(r"at (http://\S+)/ ", line)
    assert found, (line, log.read_text())
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
