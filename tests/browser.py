"""A page in Chromium, driven through its debugging pipe: no driver and no package beside the browser itself."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import time


class Page:
    """One page. `requested` has everything it has asked for: address and, where there was one, body."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._last = read, write, b"", 0
        self.requested: list[tuple[str, str]] = []
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {
            "sessionId": self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        }
        self._call("Network.enable")

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def run(self, script: str):
        """What the script's last expression, or the promise it makes, comes to."""
        found = self._call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60):
        """Until the expression is true. Says what stands on the page when it does not become so.

        While a page is being replaced there is no body, or nothing to ask at all: not true yet, no error.
        """
        end = time.monotonic() + seconds
        while True:
            try:
                if found := self.run(script):
                    return found
                said = self.run("document.body?.innerText")
            except AssertionError as error:
                said = error
            assert time.monotonic() < end, (script, said)
            time.sleep(0.1)

    def type(self, selector: str, text: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})?.focus() ?? document.activeElement.matches({json.dumps(selector)})")  # fmt: skip
        self._call("Input.insertText", text=text)

    def click(self, said: str) -> None:
        """The button that shows this text or is named so."""
        find = f"[...document.querySelectorAll('button')].find(b => [b.textContent.trim(), b.ariaLabel].includes({json.dumps(said)}))"
        self.wait(f"{find} && !{find}.disabled")
        self.run(f"{find}.click()")

    def _call(self, method: str, **params):
        self._last += 1
        session = getattr(self, "_session", {})
        os.write(self._write, json.dumps({"id": self._last, "method": method, "params": params, **session}).encode() + b"\0")  # fmt: skip
        while (answer := self._next()).get("id") != self._last:
            if answer.get("method") == "Network.requestWillBeSent":
                request = answer["params"]["request"]
                self.requested.append((request["url"], request.get("postData", "")))
        assert "error" not in answer, answer
        return answer["result"]

    def _next(self):
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "the browser does not answer"
            block = os.read(self._read, 1 << 16)
            assert block, "the browser has ended"
            self._rest += block
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextlib.contextmanager
def browser(program: str, profile):
    """A fresh Chromium with one page, until the block ends."""
    (theirs_in, ours_out), (ours_in, theirs_out) = os.pipe(), os.pipe()
    options = f"--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --user-data-dir={profile} --remote-debugging-pipe"  # fmt: skip
    process = subprocess.Popen(
        ["sh", "-c", f"exec {program} {options} 3<&0 4>&1 </dev/null >/dev/null"],
        stdin=theirs_in, stdout=theirs_out, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    os.close(theirs_in)
    os.close(theirs_out)
    try:
        yield Page(ours_in, ours_out)
    finally:
        process.terminate()
        process.wait(20)
        os.close(ours_in)
        os.close(ours_out)
