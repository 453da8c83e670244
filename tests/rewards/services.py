"""Services for tests: a fake one that says what it is told, and a real reward server on a thread or as a process."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml

from pixrl.serve.server import RewardServer, ServeSettings

ROOT = Path(__file__).parents[2]
TOKEN = "a-token-for-tests-only"


@dataclass(frozen=True)
class Say:
    """An answer of the fake service."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    after: float = 0.0
    """Seconds."""
    cut: bool = False
    """Hang up in the middle."""


@dataclass(frozen=True)
class Asked:
    """A request that the fake service got."""

    path: str
    headers: Mapping[str, str]
    body: bytes


Answer = Callable[[Asked, int], Say]
"""Request and its number among those with a body -> answer."""


@contextmanager
def fake_service(answer: Answer) -> Iterator[tuple[str, list[Asked]]]:
    """Its address, and what it was asked."""
    asked: list[Asked] = []
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(answer(Asked(self.path, dict(self.headers), b""), -1))

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                asked.append(Asked(self.path, dict(self.headers), body))
                number = len(asked) - 1
            self.reply(answer(asked[number], number))

        def reply(self, say: Say) -> None:
            time.sleep(say.after)
            self.send_response(say.status)
            for name, value in {"Content-Length": str(len(say.body)), **say.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(say.body[: len(say.body) // 2] if say.cut else say.body)

        def log_message(self, *given: object) -> None: ...

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *given: object) -> None: ...  # clients that give up hang up

    with running(Server(("127.0.0.1", 0), Handler)) as server:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked


@contextmanager
def running(server: Any) -> Iterator[Any]:
    """A server that listens, on a thread."""
    thread = threading.Thread(target=lambda: server.serve_forever(poll_interval=0.01), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def reward_server(function: str, **settings: Any) -> Iterator[RewardServer]:
    """The real one, with a function as its reward `mine`."""
    rewards = [{"name": "mine", "kind": "python", "options": {"function": function}}]
    server = RewardServer(
        ServeSettings.model_validate({"port": 0, "rewards": rewards, **settings}), token=TOKEN
    )
    server.open()
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join()


@contextmanager
def service_for(name: str, folder: Path) -> Iterator[dict[str, Any]]:
    """Options of the reward `judge` or `remote`, with something behind them that answers well."""
    if name == "judge":
        with fake_service(_judge_by_size) as (url, _):
            yield {"base_url": f"{url}/v1", "model": "judge-1"}
        return
    (folder / "mine.py").write_text(
        "def length(images, prompts, metadata): return [len(p) for p in prompts]\n"
    )
    with reward_server(f"{folder / 'mine.py'}:length") as server:
        yield {"url": server.url, "reward": "mine"}


def _judge_by_size(asked: Asked, number: int) -> Say:
    """A score that depends on nothing but the question: on how many bytes picture and prompt are."""
    message = {"content": json.dumps({"score": 1 + len(asked.body) % 10})}
    return Say(body=json.dumps({"choices": [{"message": message}]}).encode())


class Process:
    """`pixrl serve-rewards` as a process of its own, which can be killed and started again at the same port."""

    def __init__(self, folder: Path, function: str, port: int) -> None:
        self.port = port
        self.file = folder / "serve.yaml"
        rewards = [{"name": "mine", "kind": "python", "options": {"function": function}}]
        self.file.write_text(yaml.safe_dump({"kind": "serve-rewards", "rewards": rewards, "port": port}))
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        environment = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}",
            "OMP_NUM_THREADS": "1",
            "PIXRL_REWARD_TOKEN": TOKEN,
        }
        command = [sys.executable, "-m", "pixrl", "serve-rewards", str(self.file)]
        self.process = subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if "Serving rewards" in line:
                return
        raise AssertionError("the server ended before it served")

    def wait(self, seconds: float = 300.0) -> int:
        """Its exit code, once it has ended."""
        assert self.process is not None
        return self.process.wait(seconds)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(30)


def free_port() -> int:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port
