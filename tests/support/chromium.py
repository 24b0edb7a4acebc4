"""A real headless Chromium, driven over its DevTools pipe.

A page's file is opened in a fresh profile without a network: each request, script error and dialog is recorded.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import itertools
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.waiting import PATIENCE_S

#: A further flag of a browser that may load pages of this machine.
LOOPBACK = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
#: Debian's package `chromium` has it; CI installs it (`.ci/run`), and must not leave these tests out.
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"), reason="Debian's package `chromium` has it"
)
_FLAGS = (
    "--headless=new",
    # Chromium's sandbox refuses root.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    # Whatever a page asks for, no name resolves.
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--remote-debugging-pipe",
)


class Browser:
    """One tab. `dialogs` and `errors` are what a page's scripts did.

    `violations` are what its Content-Security-Policy refused, as the console tells it.
    """

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._asked: dict[str, str] = {}
        self.dialogs: list[str] = []
        self.errors: list[str] = []
        self.violations: list[str] = []
        self._to, self._from = to_browser, from_browser
        self._numbers = itertools.count(1)
        self._sending = threading.Lock()
        self._replies: dict[int, dict[str, Any]] = {}
        self._changed = threading.Condition()
        self._loaded = self._closed = False
        self._session = ""
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def requests(self) -> list[str]:
        """The URLs that pages asked for, without those that their policies refused."""
        return list(self._asked.values())

    def forget(self) -> None:
        """Empty what was recorded."""
        for heard in (self._asked, self.dialogs, self.errors, self.violations):
            heard.clear()

    def start(self) -> None:
        """Make the tab."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    def show(self, width: int, height: int, *, dark: bool = False) -> None:
        """The size of the page in pixels, and the color scheme that its reader prefers."""
        self._call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._call("Emulation.setEmulatedMedia", features=[scheme])

    def open(self, page: Path | str) -> None:
        """Open a file, or a URL, and wait until it is loaded."""
        self._loaded = False
        self._call("Page.navigate", url=page if isinstance(page, str) else page.as_uri())
        self._wait(lambda: self._loaded)

    def run(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, promises awaited."""
        reply = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply["exceptionDetails"]
        return reply["result"].get("value")

    def wait(self, script: str) -> None:
        """Wait until an expression is true in the page."""
        end = time.monotonic() + PATIENCE_S
        while not self.run(f"Boolean({script})"):
            assert time.monotonic() < end, f"never true in the page: {script}"
            time.sleep(0.02)

    def type(self, text: str) -> None:
        """Type into the focused element."""
        self._call("Input.insertText", text=text)

    def press(self, key: str, *, is_held: bool = False) -> None:
        """Press and release a key: a character's, `Enter`, `Escape`, `Tab`, `ArrowRight`. `is_held`: as it repeats."""
        codes = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowLeft": 37, "ArrowRight": 39}
        code = codes.get(key) or ord(key.upper())
        told: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        typed = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        self._call("Input.dispatchKeyEvent", type="keyDown", autoRepeat=is_held, **told, **typed)
        self._call("Input.dispatchKeyEvent", type="keyUp", **told)

    def screenshot(self, path: Path | None = None, *, whole: bool = False) -> Image.Image:
        """What the window shows, or the page in its whole length; also written to a file."""
        reply = self._call("Page.captureScreenshot", captureBeyondViewport=whole)
        content = base64.b64decode(reply["data"])
        if path is not None:
            path.write_bytes(content)
        return Image.open(io.BytesIO(content)).convert("RGB")

    def close(self) -> None:
        with contextlib.suppress(OSError, ConnectionError):
            self._send("Browser.close", {})

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = self._send(method, parameters)
        self._wait(lambda: number in self._replies)
        reply = self._replies.pop(number)
        assert "error" not in reply, f"{method}: {reply['error']}"
        return dict(reply["result"])

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        number = next(self._numbers)
        session = {"sessionId": self._session} if self._session else {}
        content = json.dumps({"id": number, "method": method, "params": parameters, **session}).encode() + b"\0"
        with self._sending:
            while content:
                content = content[os.write(self._to, content) :]
        return number

    def _wait(self, holds: Any) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: holds() or self._closed, PATIENCE_S), "Chromium does not answer"
            assert holds(), "Chromium has ended"

    def _read(self) -> None:
        rest = b""
        while chunk := os.read(self._from, 1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in messages:
                self._note(json.loads(message))
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _note(self, message: dict[str, Any]) -> None:
        with self._changed:
            if "id" in message:
                self._replies[message["id"]] = message
            else:
                self._note_event(message["method"], message["params"])
            self._changed.notify_all()

    def _note_event(self, method: str, event: dict[str, Any]) -> None:
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Network.requestWillBeSent":
            self._asked[event["requestId"]] = event["request"]["url"]
        elif method == "Network.loadingFailed" and event.get("blockedReason") == "csp":
            self._asked.pop(event["requestId"], None)
        elif method == "Runtime.exceptionThrown":
            self.errors.append(json.dumps(event["exceptionDetails"]))
        elif method == "Page.javascriptDialogOpening":
            self.dialogs.append(event["message"])
            self._send("Page.handleJavaScriptDialog", {"accept": False})
        elif method == "Log.entryAdded" and event["entry"]["source"] in ("security", "violation"):
            self.violations.append(event["entry"]["text"])


@contextlib.contextmanager
def chromium(profile: Path, flags: Sequence[str] = ()) -> Iterator[Browser]:
    """A browser with a new profile in the folder `profile`."""
    assert CHROMIUM, "apt-get install chromium"
    their_in, our_out = _pipe()
    our_in, their_out = _pipe()
    # Chromium reads commands from descriptor 3 and answers on 4.
    moved = f'exec "$@" 3<&{their_in} 4>&{their_out}'
    command = ["bash", "-c", moved, "bash", CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", *flags]
    process = subprocess.Popen(command, pass_fds=(their_in, their_out), stderr=subprocess.DEVNULL)
    os.close(their_in)
    os.close(their_out)
    browser = Browser(our_out, our_in)
    try:
        browser.start()
        yield browser
    finally:
        browser.close()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        os.close(our_out)


def _pipe() -> tuple[int, int]:
    """A pipe whose ends are not Chromium's descriptors 3 and 4."""
    ends = os.pipe()
    moved = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends]
    for end in ends:
        os.close(end)
    return moved[0], moved[1]
