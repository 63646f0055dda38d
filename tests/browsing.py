"""Headless Chromium for the tests of pages; they skip where there is none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars")
FLAGS += ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage")
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 60
"""Seconds for a page to load or a script to end."""


@contextmanager
def browser(profile: Path, width: int = 1280, height: int = 900) -> Iterator:
    """A selenium driver of Chromium with the empty folder `profile` as its own; skips where there is no Chromium."""
    webdriver = pytest.importorskip("selenium.webdriver")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    chromedriver = shutil.which("chromedriver")
    if program is None or chromedriver is None:
        pytest.skip("no headless browser here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in (*FLAGS, f"--user-data-dir={profile}", f"--window-size={width},{height}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(chromedriver))
    try:
        driver.set_page_load_timeout(PATIENCE)
        driver.set_script_timeout(PATIENCE)
        yield driver
    finally:
        driver.quit()


def screen(driver, width: int, height: int, *, dark: bool = False, media: str = "") -> None:
    """Show the page as on a screen of this size in CSS pixels (narrower than a window can be), or as another medium."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": [scheme]})


def complaints(driver) -> list[str]:
    """What the console said since the last call: errors, warnings, violations of the policy."""
    return [line["message"] for line in driver.get_log("browser")]
