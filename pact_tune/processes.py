"""Commands that a command of ours runs, each in a process of its own."""

import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def call(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end, also when this process is asked to stop: the command saves its state and stops by itself.

    Args:
        command (Sequence[str]): its words.
        environment (Mapping[str, str]): of the command.

    Returns:
        int: its exit code.
    """
    with subprocess.Popen(command, env=environment) as process:
        handlers: dict[int, Callable[[int, Any], None]] = {
            signal.SIGINT: lambda number, frame: None,  # a terminal sends it to the command as well
            signal.SIGTERM: lambda number, frame: process.send_signal(number),
        }
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            return process.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
