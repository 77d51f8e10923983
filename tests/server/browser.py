"""A real headless Chromium, driven over its own pipe (DevTools protocol): just enough to use a page."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def find():
    """The browser of this machine, or none; `CHROMIUM` names another."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab. Raises whatever a script on the page raises."""

    def __init__(self, program, *, width=1200, height=900):
        self._profile = tempfile.TemporaryDirectory()
        to_child, self._out = os.pipe()
        self._in, from_child = os.pipe()
        # the browser reads descriptor 3 and writes descriptor 4; the shell puts ours there
        script = f'exec 3<&{to_child} 4>&{from_child}; exec "$@" {to_child}<&- {from_child}>&-'
        flags = [
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--remote-debugging-pipe",
            "--disable-dev-shm-usage",
        ]
        more = [f"--user-data-dir={self._profile.name}", f"--window-size={width},{height}", "--no-first-run"]
        self._process = subprocess.Popen(
            ["bash", "-c", script, "bash", program, *flags, *more, "about:blank"],
            pass_fds=(to_child, from_child),
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child), os.close(from_child)
        self._number, self._rest, self.requests, self.complaints = 0, b"", [], []
        tabs = self._call("Target.getTargets")["targetInfos"]
        target = next(tab["targetId"] for tab in tabs if tab["type"] == "page")
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self._call(f"{domain}.enable")

    _session = None

    def _call(self, method, **params):
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            told = self._next()
            if told.get("id") == self._number:
                if "error" in told:
                    raise AssertionError(told["error"])
                return told["result"]
            self._note(told)

    def _next(self):
        while b"\0" not in self._rest:
            read = os.read(self._in, 1 << 16)
            if not read:
                raise AssertionError("the browser is gone")
            self._rest += read
        told, _, self._rest = self._rest.partition(b"\0")
        return json.loads(told)

    def _note(self, told):
        params = told.get("params", {})
        if told.get("method") == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        if told.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(params)

    def open(self, url):
        self._call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def run(self, script):
        """The value of an expression, awaited."""
        done = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in done:
            raise AssertionError(done["exceptionDetails"])
        return done["result"].get("value")

    def wait(self, condition, seconds=60):
        until = time.monotonic() + seconds
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > until:
                raise AssertionError(f"{condition} did not come true: {self.run('document.body.innerText')}")
            time.sleep(0.05)

    def type(self, text):
        self._call("Input.insertText", text=text)

    def press(self, key, code=0, text=None, shift=False):
        common = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": 8 if shift else 0}
        self._call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self._call("Input.dispatchKeyEvent", type="keyUp", **common)

    def screenshot(self, file):
        Path(file).write_bytes(base64.b64decode(self._call("Page.captureScreenshot", format="png")["data"]))

    def close(self):
        with contextlib.suppress(Exception):
            self._session = None
            self._call("Browser.close")
        self._process.kill()
        self._process.wait()
        os.close(self._out), os.close(self._in)
        self._profile.cleanup()
