"""The frame that our HTML pages share: one file, no network, light and dark; written atomically."""

import os
import tempfile
from html import escape
from pathlib import Path
from urllib.parse import quote

from fastpix2pix.errors import UserError

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbfa; --card: #ffffff; --ink: #1c1e21; --faint: #6b7079; --line: #dfe1e4; --accent: #0b64c0;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --card: #1d2024; --ink: #e6e8ea; --faint: #949aa3; --line: #33373d; --accent: #6cb2ff;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.45rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
header, main { max-width: 76rem; margin: 0 auto; padding: 1.25rem 1.25rem 0; }
main { padding-bottom: 3rem; }
p { margin: .35rem 0 0; color: var(--faint); max-width: 60rem; overflow-wrap: anywhere; }
a { color: var(--accent); }
img { display: block; background: var(--line); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
"""


def text(value: object) -> str:
    """``value`` as HTML text or attribute value; bytes of a file name that are no UTF-8 become ?"""
    return escape(str(value).encode("utf-8", "replace").decode("utf-8"))


def link(path: str) -> str:
    """The relative file path ``path`` as an attribute value that is a URL, whatever characters it holds."""
    return escape("./" + quote(os.fsencode(path)))


def render_page(*, title: str, style: str, body: str, script: str = "") -> str:
    """A whole page. ``title`` is plain text; ``body``, ``style`` and ``script`` go in as they are."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="fastpix2pix">
<link rel="icon" href="data:,">
<title>{text(title)}</title>
<style>{STYLE}{style}</style>
{body}
{f"<script>{script}</script>" if script else ""}
</html>
"""


def write_page(path: Path, *, title: str, style: str, body: str, script: str = "") -> None:
    """Write :func:`render_page` to ``path``; a reader sees the old page or the new one, never a part.

    Raises UserError when ``path`` cannot be written.
    """
    page = render_page(title=title, style=style, body=body, script=script)
    try:
        handle, partial = tempfile.mkstemp(prefix=".", suffix=".partial", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(page)
            os.chmod(partial, 0o644)  # mkstemp makes it private
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise
    except OSError as error:
        raise UserError(f"{path}: can't be written ({error.strerror}); check the folder") from error
