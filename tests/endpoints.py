"""Servers of OpenAI's API, on a free port of this machine."""

import json
import socket
import subprocess
import time
from contextlib import contextmanager, suppress
from urllib.request import Request, urlopen


@contextmanager
def served(command, folder, **settings):
    """Run `command --port PORT` in `folder`, and yield a function that asks for a chat completion, once it answers.

    Settings are `subprocess.Popen`'s. What the server prints goes to `folder/log`.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]

    def complete(**body):
        address, headers = f"http://localhost:{port}/v1/chat/completions", {"Content-Type": "application/json"}
        with urlopen(Request(address, json.dumps(body).encode(), headers)) as response:
            return response.read().decode()

    with (folder / "log").open("w+") as log:
        arguments = [*map(str, command), "--port", str(port)]
        server = subprocess.Popen(arguments, cwd=folder, stdout=log, stderr=log, **settings)
        try:
            while True:
                with suppress(OSError):
                    urlopen(f"http://localhost:{port}/health").close()
                    break
                assert server.poll() is None, log.seek(0) or log.read()[-4000:]
                time.sleep(0.2)
            yield complete
        finally:
            server.terminate()
            server.wait()


def streamed(answer):
    """The text of a streamed chat completion."""
    parts = [json.loads(line[6:]) for line in answer.splitlines() if line.startswith("data: {")]
    return "".join(part["choices"][0]["delta"].get("content") or "" for part in parts if part["choices"])
