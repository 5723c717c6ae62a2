"""Pages that programs write, read as text and driven in a browser without a window."""

import html
import json
import re
import shutil
import subprocess
import threading
import time
from contextlib import suppress

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--enable-logging=stderr"]
FLAGS += ["--virtual-time-budget=2000"]
# Text that breaks out of whatever does not take it as text.
TRICKY = "</script><b>&amp;<!-- \u2028 'quoted' \"twice\""
# The answers are left in an attribute, and the browser prints the page.
DRIVER = """<script>
const out = [], say = (...what) => out.push(what);
try { __STEPS__ } catch (error) { say("error", String(error.stack)); }
document.body.setAttribute("data-result", JSON.stringify(out));
</script>"""


def data_of(page):
    """The data in a page, as the text that stands there and as what it says."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, flags=re.DOTALL)
    return found, json.loads(found)


def check_closed(page):
    """Nothing can break out of the data of a page."""
    raw, _ = data_of(page)
    assert not set("<>&\u2028") & set(raw)
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert "__DATA__" not in page and "__SCRIPT__" not in page


def check_asks_for_nothing(page):
    """A page loads nothing and makes no markup of text."""
    urls = set(re.findall(r"[a-z][a-z0-9+.-]*://[^\s\"'<>`]*", page))
    assert urls == {"http://www.w3.org/2000/svg"}  # the name of a vocabulary, never fetched
    loaders = ("src=", "href=", "url(", "@import", "fetch(", "XMLHttpRequest", "import(", "<link", "<img", "<iframe")
    assert [loader for loader in loaders if loader in page] == []
    assert "default-src 'none'" in page
    assert not re.search(r"\.innerHTML|insertAdjacentHTML|document\.write|\beval\(", page)


def drive(page, steps, folder, size=(1400, 1000)):
    """What `steps`, a script that calls `say(name, ...)`, says about a page: for each name, a list of what was said.

    Whatever the browser writes on its console is an error.
    """
    if BROWSER is None:
        pytest.skip("no Chromium or Chrome is installed: apt-get install chromium")
    path = folder / "page.html"
    script = DRIVER.replace("__STEPS__", steps)
    path.write_text(page.replace("</body>", script + "</body>"), encoding="utf-8")
    flags = [*FLAGS, "--window-size={},{}".format(*size), f"--user-data-dir={folder / 'profile'}"]
    command = [BROWSER, *flags, "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert console == []
    (result,) = re.findall(r'data-result="([^"]*)"', done.stdout)
    found = {}
    for name, *what in json.loads(html.unescape(result)):
        found.setdefault(name, []).append(what)
    assert "error" not in found, found["error"]
    return found


class LivePage:
    """A page of a server, open in a browser without a window; a context.

    The browser is spoken to in the DevTools protocol, over a pair of pipes: messages in JSON, a zero byte after each.

    Args:
        url (`str`): what to open.
        folder (`Path`): where the browser keeps what it keeps.
        size (pair of `int`): of the window.
    """

    def __init__(self, url, folder, size=(1400, 1000)):
        if BROWSER is None:
            pytest.skip("no Chromium or Chrome is installed: apt-get install chromium")
        flags = [flag for flag in FLAGS if "virtual-time" not in flag] + ["--window-size={},{}".format(*size)]
        flags += [f"--user-data-dir={folder / 'profile'}", "--remote-debugging-pipe", "about:blank"]
        # The browser reads commands at its descriptor 3 and answers at 4.
        shell = 'exec "$@" 3<&0 4>&1 </dev/null >/dev/null 2>&1'
        command = ["/bin/sh", "-c", shell, "sh", BROWSER, *flags]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # A browser that says nothing more ends the test instead of holding it.
        self.watch = threading.Timer(60, self.process.kill)
        self.watch.start()
        self.session, self.count = None, 0
        target = self.call("Target.createTarget", url=url)["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def __enter__(self):
        return self

    def __exit__(self, *error):
        # Killed, it would leave processes that still write to the folder.
        self.session = None
        with suppress(OSError, AssertionError):
            self.call("Browser.close")
        self.process.communicate()
        self.watch.cancel()

    def call(self, method, **parameters):
        """What the browser answers to a command."""
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        self.process.stdin.write(json.dumps(message).encode() + b"\0")
        self.process.stdin.flush()
        while True:
            answer = json.loads(self._message())
            if answer.get("id") == self.count:
                assert "error" not in answer, answer["error"]
                return answer["result"]

    def _message(self):
        message = b""
        while not message.endswith(b"\0"):
            byte = self.process.stdout.read(1)
            assert byte, "the browser is gone"
            message += byte
        return message[:-1]

    def evaluate(self, script):
        """The value of an expression in the page, or of the promise that it is."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait_for(self, script, seconds=20.0):
        """The first value of an expression that counts as true; an error if none comes."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            found = self.evaluate(script)
            if found:
                return found
            time.sleep(0.05)
        raise AssertionError(f"{script} never came true: {self.evaluate('document.body.innerText')}")
