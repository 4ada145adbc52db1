"""A headless Chromium, driven over the pipe of its DevTools protocol: needs Debian's package chromium and nothing else."""

import base64
import fcntl
import json
import os
import shutil
import struct
import subprocess
import tempfile
import threading
import time
import zlib
from pathlib import Path

ANSWER_TIMEOUT_S = 30


class BrowserError(Exception):
    """The browser did not start, did not answer in time, or refused a command; the message says which."""


def high_pipe() -> tuple:
    """A pipe whose ends are no descriptors that a program expects something else at."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return tuple(ends)


class Browser:
    """A context manager: leaving it ends the browser. One page; console errors and requests are kept from its start."""

    def __init__(self):
        self.console_errors = []
        self.requests = []  # URLs
        self._answers = {}
        self._arrived = threading.Condition()
        self._next_id = 0
        self._session = None
        self._closed = False

    def __enter__(self) -> "Browser":
        program = shutil.which("chromium")
        if program is None:
            raise BrowserError("chromium is not installed (Debian package chromium)")
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        # The browser reads commands from its descriptor 3 and writes answers to 4, where the shell puts these ends.
        read_commands, self._commands = high_pipe()
        self._events, write_events = high_pipe()
        command = [program, "--headless=new", "--remote-debugging-pipe", f"--user-data-dir={self._profile.name}",
                   "--no-first-run", "--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking",
                   "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--no-proxy-server",
                   "--force-color-profile=srgb", "about:blank"]
        if os.geteuid() == 0:
            command.append("--no-sandbox")
        shell = ["bash", "-c", f'exec "$0" "$@" 3<&{read_commands} 4>&{write_events}', *command]
        self._log = open(Path(self._profile.name) / "browser.log", "wb")
        # It ends with its pipe, so with this process. No preexec_fn: gRPC's threads do not bear a fork.
        self._process = subprocess.Popen(shell, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
                                         pass_fds=(read_commands, write_events))
        os.close(read_commands)
        os.close(write_events)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        try:
            self._attach()
        except (BrowserError, OSError) as error:
            self._process.kill()
            log = Path(self._log.name).read_text(encoding="utf-8", errors="replace")[-4000:]
            status = self._process.wait()
            self.__exit__()
            raise BrowserError(f"{error}; the browser ended with status {status}; its log:\n{log}") from error
        return self

    def __exit__(self, *_) -> None:
        try:
            self._send("Browser.close", {}, None)
        except OSError:
            pass
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=5)
        os.close(self._commands)
        self._log.close()
        self._profile.cleanup()

    def _attach(self) -> None:
        targets = self.command("Target.getTargets")["targetInfos"]
        page = next(target for target in targets if target["type"] == "page")
        self._session = self.command("Target.attachToTarget", targetId=page["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.command(f"{domain}.enable")

    def _send(self, method: str, params: dict, session) -> int:
        self._next_id += 1
        message = {"id": self._next_id, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._commands, data):]
        return self._next_id

    def _read(self) -> None:
        pending = b""
        while chunk := os.read(self._events, 1 << 16):
            *messages, pending = (pending + chunk).split(b"\0")
            for message in messages:
                self._take(json.loads(message))
        os.close(self._events)
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()

    def _take(self, message: dict) -> None:
        params = message.get("params", {})
        method = message.get("method")
        with self._arrived:
            if "id" in message:
                self._answers[message["id"]] = message
            elif method == "Network.requestWillBeSent":
                self.requests.append(params["request"]["url"])
            elif method == "Runtime.exceptionThrown":
                self.console_errors.append(json.dumps(params["exceptionDetails"]))
            elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                self.console_errors.append(json.dumps(params["args"]))
            elif method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                self.console_errors.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            self._arrived.notify_all()

    def command(self, method: str, **params) -> dict:
        number = self._send(method, params, self._session)
        with self._arrived:
            answered = self._arrived.wait_for(lambda: number in self._answers or self._closed, ANSWER_TIMEOUT_S)
            if not answered or number not in self._answers:
                raise BrowserError(f"{method}: {'the browser ended' if self._closed else 'no answer'}")
            answer = self._answers.pop(number)
        if "error" in answer:
            raise BrowserError(f"{method}: {answer['error']}")
        return answer["result"]

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, as JSON carries it."""
        answer = self.command("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{expression}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait(self, expression: str, timeout_s: float, what: str = ""):
        """Waits until the expression is true, and returns its value."""
        end = time.monotonic() + timeout_s
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                text = self.evaluate("document.body.innerText")
                raise BrowserError(f"after {timeout_s} s: {what or expression}; the page says:\n{text}")
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        answer = self.command("Page.navigate", url=url)
        if answer.get("errorText"):
            raise BrowserError(f"{url}: {answer['errorText']}")
        self.wait("document.readyState === 'complete'", 20)

    def open_when_served(self, url: str, timeout_s: float = 20) -> None:
        """Of a process that is about to listen."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                return self.open(url)
            except BrowserError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.1)

    def size(self, width: int, height: int = 900) -> None:
        self.command("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)

    def scheme(self, name: str) -> None:
        """"light" or "dark"; transitions are off."""
        self.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name},
                                                             {"name": "prefers-reduced-motion", "value": "reduce"}])

    def screenshot(self, path: Path, width: int, most_height: int = 4000) -> None:
        """The whole page, or its upper part."""
        height = self.evaluate("Math.ceil(document.documentElement.getBoundingClientRect().height)")
        self.size(width, min(height, most_height))
        picture = self.command("Page.captureScreenshot", format="png")["data"]
        path.write_bytes(self._repacked(picture))

    def _repacked(self, picture: str) -> bytes:
        """The same PNG without its alpha channel and packed harder, by a quarter smaller."""
        width, height, pixels = self.evaluate(f"""(async () => {{
          const bytes = Uint8Array.from(atob('{picture}'), (c) => c.charCodeAt(0));
          const image = await createImageBitmap(new Blob([bytes], {{ type: 'image/png' }}));
          const canvas = new OffscreenCanvas(image.width, image.height).getContext('2d');
          canvas.drawImage(image, 0, 0);
          const data = canvas.getImageData(0, 0, image.width, image.height).data;
          let text = '';
          for (let i = 0; i < data.length; i += 32768) text += String.fromCharCode(...data.subarray(i, i + 32768));
          return [image.width, image.height, btoa(text)];
        }})()""")
        rgba = base64.b64decode(pixels)
        rgb = bytearray(3 * width * height)
        for channel in range(3):
            rgb[channel::3] = rgba[channel::4]
        rows = b"".join(b"\0" + rgb[3 * width * row:3 * width * (row + 1)] for row in range(height))

        def chunk(kind: bytes, data: bytes) -> bytes:
            return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

        return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) +
                chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))
