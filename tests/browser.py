"""Pages that programs write, read as text and driven in a browser without a window."""

import html
import json
import re
import shutil
import subprocess

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
