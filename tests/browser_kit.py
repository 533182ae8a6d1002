"""A real browser for tests of pages: Chromium, driven over a pipe (Chrome DevTools Protocol), no package needed.

    with Browser() as browser:
        page = browser.open(path, width=390, dark=True)
        page.evaluate("document.title"), page.screenshot(), page.requests, page.complaints

Debian's and Ubuntu's `chromium` is installed where the tests run as root and it is missing; elsewhere the tests say
loudly that they were skipped.
"""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PACKAGES = ("chromium", "fonts-dejavu-core")
SWITCHES = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--mute-audio",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--remote-debugging-pipe", "--force-color-profile=srgb", "--disable-extensions",
)  # fmt: skip


def find() -> str:
    """The browser's path, or ""."""
    return next((path for name in NAMES if (path := shutil.which(name))), "")


def obstacle() -> str:
    """Why no page can be looked at here, or "". Installs Chromium first where that is possible."""
    if find():
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "no Chromium here, and only root on Debian or Ubuntu can install it (apt-get install chromium)"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    quiet = {"env": env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "check": False}
    subprocess.run(["apt-get", "update", "-qq"], **quiet)
    subprocess.run(["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES], **quiet)
    return "" if find() else "apt-get install chromium failed here"


class Page:
    """One tab. `requests` are the addresses that it asked for, `complaints` what its console said."""

    def __init__(self, browser: "Browser", target: str, session: str) -> None:
        self.browser, self.target, self.session = browser, target, session
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.loaded = False

    def call(self, method: str, **params: Any) -> dict:
        """One command of the protocol for this tab."""
        return self.browser.call(method, self.session, **params)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        return base64.b64decode(self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def pdf(self) -> bytes:
        """The page as it prints, on A4."""
        sizes = {"paperWidth": 8.27, "paperHeight": 11.69, "preferCSSPageSize": True}
        return base64.b64decode(self.call("Page.printToPDF", printBackground=True, **sizes)["data"])

    def go(self, address: str) -> None:
        """Load an address."""
        self.loaded = False
        self.call("Page.navigate", url=address)
        limit = time.monotonic() + 600
        while not self.loaded:
            assert time.monotonic() < limit, f"{address} did not load"
            self.browser._next()

    def close(self) -> None:
        """Leave the tab, empty, to the next page: a new one is a new process, which costs more than most pages."""
        self.go("about:blank")
        self.browser.idle.append(self)


class Browser:
    """Chromium with a profile of its own, gone at the end."""

    def __enter__(self) -> "Browser":
        self.profile = tempfile.mkdtemp(prefix="browser-")
        pipes = [*os.pipe(), *os.pipe()]
        # the protocol wants its commands on descriptor 3 and its answers on 4: ours first get out of their way
        to_read, self.to, self.back, to_write = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in pipes)
        for end in pipes:
            os.close(end)
        moved = f"import os, sys; os.dup2({to_read}, 3); os.dup2({to_write}, 4); os.execv(sys.argv[1], sys.argv[1:])"
        words = [
            sys.executable,
            "-c",
            moved,
            find(),
            *SWITCHES,
            f"--user-data-dir={self.profile}",
            "about:blank",
        ]
        self.process = subprocess.Popen(
            words, pass_fds=(to_read, to_write), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_read)
        os.close(to_write)
        self.number, self.rest = 0, b""
        self.pages: dict[str, Page] = {}
        self.idle: list[Page] = []
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self.to)
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self.back)
        shutil.rmtree(self.profile, ignore_errors=True)

    def call(self, method: str, session: str = "", **params: Any) -> dict:
        """Send one command and wait for its answer."""
        self.number += 1
        command = {"id": self.number, "method": method, "params": params}
        if session:
            command["sessionId"] = session
        os.write(self.to, json.dumps(command).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                assert "error" not in answer, answer
                return answer["result"]

    def _next(self) -> dict:
        while b"\0" not in self.rest:
            data = os.read(self.back, 1 << 20)
            assert data, f"the browser ended with status {self.process.poll()}"
            self.rest += data
        message, _, self.rest = self.rest.partition(b"\0")
        found = json.loads(message)
        page = self.pages.get(found.get("sessionId", ""))
        if page is not None:
            self._note(page, found.get("method", ""), found.get("params", {}))
        return found

    @staticmethod
    def _note(page: Page, event: str, params: dict) -> None:
        if event == "Network.requestWillBeSent":
            page.requests.append(params["request"]["url"])
        elif event == "Log.entryAdded":
            page.complaints.append(params["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            page.complaints.append(str(params["exceptionDetails"].get("text")))
        elif event == "Page.loadEventFired":
            page.loaded = True

    def open(
        self, path: Path, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1
    ) -> Page:
        """A tab with the file at `path`, loaded; `width` in CSS pixels."""
        if self.idle:
            old = self.idle.pop()
            page = self.pages[old.session] = Page(self, old.target, old.session)
        else:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
            page = self.pages[session] = Page(self, target, session)
            for domain in ("Page", "Network", "Log", "Runtime"):
                page.call(f"{domain}.enable")
        page.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale,
                  mobile=width < 600)  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", media="", features=[theme])
        page.go(path.resolve().as_uri())
        return page
