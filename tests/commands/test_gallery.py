"""The gallery page: parsed as HTML against the files on disk, and driven in headless Chromium where it is."""

import math
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote_to_bytes

import pytest
from PIL import Image

from fastpix2pix.errors import UserError
from fastpix2pix.gallery import Entry, write_gallery

NAMES = (
    "plain",
    'a "quoted" <b>name & more &amp;',
    "it's 100% #1?x=2;y",
    "line\nbreak\tand tab",
    "ünï 図面 🏠",
    "<SCRIPT>document.title='broken into'",
    "'><img src=x onerror=alert(1)>",
    "-->",
    "%2e%2e%2f",
    "n" * 200,
    "javascript:alert(1)",
    " leading and trailing ",
)


class Page(HTMLParser):
    """What a browser would read: tags with their attributes, and the text of the headings."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.headings: list[str] = []
        self._in_heading = False
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "h2":
            self._in_heading = True
            self.headings.append("")

    def handle_endtag(self, tag):
        self._in_heading &= tag != "h2"

    def handle_data(self, data):
        if self._in_heading:
            self.headings[-1] += data


def make_entries(
    folder: Path, names=NAMES, roles=("input", "generated", "target"), size=(8, 12)
) -> list[Entry]:
    for role in roles:
        (folder / role).mkdir(parents=True, exist_ok=True)
        for name in names:
            Image.new("RGB", size[::-1], "teal").save(folder / role / f"{name}.png")
    return [
        Entry(
            name, {role: f"{role}/{name}.png" for role in roles}, size, {"L1": 0.01 * (7 * i % 11), "SSIM": i}
        )
        for i, name in enumerate(names)
    ]


def test_every_link_is_a_file_beside_the_page_and_every_name_is_text(tmp_path):
    entries = make_entries(tmp_path)
    page = Page(write_gallery(tmp_path, entries, title="<i>T</i>", note="n"))
    sources = [attributes["src"] for tag, attributes in page.tags if tag == "img" and "src" in attributes]
    assert len(sources) == 3 * len(NAMES)
    for source, (entry, role) in zip(
        sources, ((e, r) for e in entries for r in ("input", "generated", "target")), strict=True
    ):
        assert source.startswith("./") and not re.search(r"[^\w./%~-]", source)
        file = os.fsencode(tmp_path) + b"/" + unquote_to_bytes(source)
        assert os.path.samefile(file, tmp_path / entry.images[role])
    assert page.headings == list(NAMES)
    assert [tag for tag, _ in page.tags if tag in ("script", "b", "i")] == ["script"]


def test_page_needs_nothing_but_itself(tmp_path):
    page = Page(write_gallery(tmp_path, make_entries(tmp_path, ["one"]), title="t"))
    for tag, attributes in page.tags:
        for name in ("src", "href"):
            assert attributes.get(name, "./").startswith(("./", "data:")), (tag, attributes)
    assert "http" not in re.sub(r"<!doctype.*?>", "", (tmp_path / "index.html").read_text())


def test_bytes_that_are_no_text_in_a_file_name(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    page = Page(write_gallery(tmp_path, make_entries(tmp_path, [name]), title=name))
    assert page.headings == ["caf?"]
    source = next(attributes["src"] for tag, attributes in page.tags if tag == "img")
    assert unquote_to_bytes(source) == b"./input/caf\xe9.png"


def test_means_and_missing_metrics(tmp_path):
    entries = [
        Entry("a", {"generated": "a.png"}, (1, 1), {"L1": 0.25}),
        Entry("b", {"generated": "b.png"}, (1, 1), {"L1": 0.5, "PSNR": math.inf}),
        Entry("c", {"generated": "c.png", "input": "c.jpg"}, (1, 1)),
    ]
    html = write_gallery(tmp_path, entries, title="t").read_text()
    assert "<dt>mean L1</dt><dd>0.375</dd>" in html and "<dt>mean PSNR</dt><dd>inf</dd>" in html
    assert re.findall(r'data-metrics="(.*?)"', html) == ["0.25 NaN", "0.5 Infinity", "NaN NaN"]
    assert '<div class="roles"><span>input</span><span>generated</span></div>' in html


def test_page_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    write_gallery(tmp_path, make_entries(tmp_path, ["old"]), title="t")
    before = (tmp_path / "index.html").read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=f"{tmp_path}/index.html: can't be written .No space left"):
        write_gallery(tmp_path, make_entries(tmp_path, ["new"]), title="t")
    assert (tmp_path / "index.html").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["generated", "index.html", "input", "target"]


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def drive(page: Path, actions: str, tmp_path: Path) -> str:
    """Open ``page`` from the disk in Chromium, run ``actions`` there and return ``result``."""
    acting = page.with_name("acting.html")
    script = f"<script>onload = () => {{ let result; {actions}; document.title = result }}</script>"
    html = page.read_text(encoding="utf-8").replace('loading="lazy"', "")  # so that onload waits for all
    acting.write_text(html + script, encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking"
    command = [CHROMIUM, *flags.split(), f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    done = subprocess.run(
        [*command, "--virtual-time-budget=8000", acting.as_uri()], capture_output=True, timeout=60, check=True
    )
    return re.search(r"<title>(.*?)</title>", done.stdout.decode(), re.DOTALL)[1]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_in_a_browser(tmp_path):
    folder = tmp_path / "a folder: ünï #1"
    entries = make_entries(folder)
    page = write_gallery(folder, entries, title="t")
    actions = """
      const images = [...document.querySelectorAll("article img")];
      const wide = images.filter(image => image.naturalWidth === 12).length;
      const type = words => { filter.value = words; filter.dispatchEvent(new Event("input")); };
      const shown = () => [...list.children].filter(row => row.getClientRects().length).length;
      type("SCRIPT"); const found = shown() + " " + count.value;
      type(""); const all = shown();
      sort.value = "0 -1"; sort.dispatchEvent(new Event("change"));
      const order = [...list.children].map(row => names.get(row).length).join();
      const press = key => document.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
      list.querySelector("a").click(); press("ArrowRight"); press("ArrowDown");
      const at = current.dataset.role + [...list.children].indexOf(current.closest("article"));
      result = [wide, found, all, order, viewer.open, at].join("|");
    """
    highest_first = sorted(entries, key=lambda entry: -entry.metrics["L1"])
    order = ",".join(str(len(entry.name.encode("utf-16-le")) // 2) for entry in highest_first)
    n = len(NAMES)
    # "<SCRIPT>..." and "javascript:..." hold the word
    assert drive(page, actions, tmp_path) == f"{3 * n}|2 2 of {n} images|{n}|{order}|true|generated1"
