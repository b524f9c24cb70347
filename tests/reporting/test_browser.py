"""The page in a real browser, without a window: its script runs, nothing is complained of, and nothing hostile runs.

Skipped where there is no Chromium.
"""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from .folders import render, write_evaluation, write_run
from .test_page import HOSTILE

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next((path for name in NAMES if (path := shutil.which(name))), None)

# Run after the page's own script; what it finds is in the title of the page.
LOOK = """
const svg = document.querySelector(".chart svg"), box = svg.getBoundingClientRect();
const point = (type, x) => svg.dispatchEvent(new PointerEvent(type,
  {bubbles: true, pointerType: "mouse", clientX: box.left + x * box.width, clientY: box.top + box.height / 2}));
point("pointermove", 0.9);
const tip = document.querySelector(".tip");
const hovered = tip.hidden ? "none" : tip.textContent;
point("pointerleave", 0.9);
const left = tip.hidden;
svg.focus();
svg.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
const keyed = tip.textContent;
document.querySelectorAll(".legend li")[1].click();
const dimmed = document.querySelectorAll(".chart g.dim").length, lines = document.querySelectorAll(".chart g").length;
document.querySelector(".token[title]").click();
document.title = JSON.stringify({hovered, left, keyed, tapped: tip.textContent, half: 2 * dimmed === lines && lines > 0,
  wide: document.documentElement.scrollWidth > innerWidth, images: document.images.length, hacked: window.hacked ?? 0});
"""


@pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
@pytest.mark.parametrize("width", [500, 1200])  # the narrowest window that a headless Chromium makes, and a desktop's
def test_in_a_browser(tmp_path: Path, width: int) -> None:
    lines = [
        {"step": step, "loss": 3.0 - step, HOSTILE: 1.0, "val_ce_loss": 2.5 - step, "val_teacher_ce_loss": 1.0}
        for step in (0, 1)
    ]
    hostile = HOSTILE.replace("alert(1)", "hacked=1")
    folders = [write_run(tmp_path / name, lines=lines, prompt=hostile, kd_ratio=name) for name in "ab"]
    text = render(*folders, write_evaluation(tmp_path / "evaluation"))
    # The policy lets the test's own script in, and the page's by its own hash as before.
    assert text.count("script-src 'sha256") == 1
    text = text.replace("script-src 'sha256", "script-src 'nonce-test' 'sha256")
    page = tmp_path / "page.html"
    page.write_text(text.replace("</body>", f"<script nonce=test>{LOOK}</script></body>"), encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--window-size={width},900"]
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    done = subprocess.run(
        [str(BROWSER), *options, profile, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title
    assert json.loads(html.unescape(title[1])) == {
        "hovered": "step 1a1.500b1.500",
        "left": True,
        "keyed": "step 0a2.500b2.500",
        "half": True,
        "tapped": "“Hi”: teacher says “Ho”, student says “Hi”, KL 0.010, cross-entropy 0.100",
        "wide": False,
        "images": 0,
        "hacked": 0,
    }
