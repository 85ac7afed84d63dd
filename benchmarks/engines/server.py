"""A real `vllm serve` for as long as a `with` block lasts: started, awaited, and always stopped.

with serve(Path("checkpoint"), "--enforce-eager") as server:
    server.client().completions.create(model=str(server.model), prompt="Hello")
"""

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.engines.kv_cache import kv_cache_environment

if TYPE_CHECKING:
    from openai import OpenAI

ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_LOGGING_COLOR": "0",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
}
STOP_SECONDS = 20.0
BACKEND_LINE = re.compile(r"PermLLM \S+: backend .*$", re.MULTILINE)


class ServerError(RuntimeError):
    """The server did not come up; the message ends with the last lines of its log."""


@dataclass(frozen=True)
class Server:
    """A running server."""

    model: Path
    base_url: str
    log_path: Path

    def client(self) -> "OpenAI":
        """Return an OpenAI client that is bound to this server."""
        from openai import OpenAI

        return OpenAI(base_url=self.base_url, api_key="none", max_retries=0, timeout=300)

    def log(self) -> str:
        """Return everything that the server has written so far."""
        return self.log_path.read_text(errors="replace")

    def backend_line(self) -> str:
        """Return the log line that says which backend serves how many sparse layers, or ""."""
        match = BACKEND_LINE.search(self.log())
        return match.group() if match else ""


@contextmanager
def serve(
    model: Path,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    log_path: Path | None = None,
    start_seconds: float = 300.0,
) -> Iterator[Server]:
    """Run `vllm serve MODEL ARGUMENTS` on a free port of the loopback interface.

    The log goes to `log_path`, or to a temporary file that is left behind only after an error.

    Raises:
        ServerError: the server ended, or did not answer within `start_seconds`.
    """
    temporary = log_path is None
    if log_path is None:
        handle, name = tempfile.mkstemp(prefix="vllm-serve-", suffix=".log")
        os.close(handle)
        log_path = Path(name)
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        *("serve", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *arguments,
    ]
    with log_path.open("wb") as log:
        # A session of its own, so that one signal reaches the engine and worker processes too.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **ENVIRONMENT, **kv_cache_environment(), **(environment or {})},
            start_new_session=True,
        )
    try:
        _wait_until_healthy(process, port, log_path, start_seconds)
        yield Server(model, f"http://127.0.0.1:{port}/v1", log_path)
    finally:
        _stop(process)
    if temporary:  # and nothing went wrong: nobody will want to read it
        log_path.unlink()


def free_port() -> int:
    """Return a port of the loopback interface that nothing listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(
    process: subprocess.Popen[bytes], port: int, log_path: Path, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServerError(
                f"vllm serve ended with status {process.returncode}:\n{_tail(log_path)}"
            )
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.25)
    raise ServerError(f"vllm serve did not answer within {seconds:.0f} s:\n{_tail(log_path)}")


def _tail(log_path: Path, lines: int = 60) -> str:
    return "\n".join(log_path.read_text(errors="replace").splitlines()[-lines:])


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask the server to end, and make sure that it and everything that it started does."""
    group = process.pid  # start_new_session made it the leader of its group
    _signal_group(group, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    _signal_group(group, signal.SIGKILL)
    process.wait()


def _signal_group(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)
