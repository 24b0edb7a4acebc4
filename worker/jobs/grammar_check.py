"""The process that compiles grammars before the model process does: it may be ended by what they need.

llguidance has limits, and a grammar that is made to pass them by would otherwise take the worker's memory, or its
stack and so the worker. `GrammarChecker` starts this module and ends it.
"""

from __future__ import annotations

import contextlib
import json
import resource
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

from worker.engine.grammar import Grammar, GrammarRefused, GrammarTokens

CHECKOUT = Path(__file__).parents[2]
#: Bytes of address space, with a tokenizer of 128,000 tokens.
MAX_BYTES = 2**31
#: Seconds of computing for a grammar, and seconds for its reply on a busy machine.
CPU_S = 4
REPLY_S = 40.0
TOO_LARGE = "it needs too much computing or memory: make it smaller"


class GrammarChecker:
    """Tries grammars out in a child process, which is started again after one has ended it. Not thread-safe."""

    def __init__(self, tokens: GrammarTokens) -> None:
        self._tokens = tokens
        self._child: subprocess.Popen[bytes] | None = None

    def check(self, definition: str) -> None:
        """Raises GrammarRefused for a grammar that is wrong, or not compiled within the limits."""
        self._child = self._child or _start(self._tokens)
        reply = _ask(self._child, definition)
        if reply is None:
            self.close()
            raise GrammarRefused(TOO_LARGE)
        fault = json.loads(reply)
        if fault:
            raise GrammarRefused(fault)

    def close(self) -> None:
        """End the child."""
        if self._child:
            self._child.kill()
            self._child.communicate()
            self._child = None


def _start(tokens: GrammarTokens) -> subprocess.Popen[bytes]:
    child = subprocess.Popen(
        [sys.executable, "-m", "worker.jobs.grammar_check"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # What Rust's panics say would be lines of no form in the log.
        stderr=subprocess.DEVNULL,
        cwd=CHECKOUT,
    )
    _send(child, [tokens.definition, tokens.count, tokens.eos_ids])
    return child


def _ask(child: subprocess.Popen[bytes], definition: str) -> bytes | None:
    """The child's reply; None if it has ended or does not reply in time."""
    assert child.stdout, "its output is a pipe"
    _send(child, definition)
    is_ready, _, _ = select.select([child.stdout], [], [], REPLY_S)
    return child.stdout.readline() or None if is_ready else None


def _send(child: subprocess.Popen[bytes], content: object) -> None:
    assert child.stdin, "its input is a pipe"
    # Of a child that has ended, reading says so.
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(json.dumps(content).encode() + b"\n")
        child.stdin.flush()


def main() -> None:
    """Read the tokens, then a grammar in each line, and reply with what is wrong with it, or null."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
    # Where memory is short, the system ends this process first.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    definition, count, eos_ids = json.loads(sys.stdin.readline())
    tokenizer = GrammarTokens(definition, count, tuple(eos_ids)).tokenizer()
    for line in sys.stdin:
        # The system ends the process after that.
        limit = int(time.process_time()) + 1 + CPU_S
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        fault = None
        try:
            Grammar(tokenizer, json.loads(line), drops_blank=False).probe()
        except GrammarRefused as refused:
            fault = str(refused)
        print(json.dumps(fault), flush=True)  # noqa: T201 - the reply


if __name__ == "__main__":
    main()
