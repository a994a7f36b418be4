"""The page of a translated folder: every image beside what it was made from and what it should be."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastpix2pix.page import link, text, write_page

ROLES = ("input", "generated", "target")


@dataclass(frozen=True)
class Entry:
    """One translated image.

    images: path of each picture by its role ("input", "generated", and "target" where it is known), relative
    to the gallery's folder. size: (height, width) in pixels. metrics: values by name, e.g. ``{"L1": 0.12}``.
    """

    name: str
    images: Mapping[str, str]
    size: tuple[int, int]
    metrics: Mapping[str, float] = field(default_factory=dict)


def write_gallery(folder: Path, entries: Sequence[Entry], *, title: str, note: str = "") -> Path:
    """Write ``folder / "index.html"``, which shows ``entries`` from the disk, without a network.

    Rows can be filtered by name and sorted by each metric, whose mean stands on top; a click enlarges an
    image, and arrow keys then step through the roles and rows at the same place on the screen. Pictures load
    as they scroll into view. Raises UserError when the page cannot be written.
    """
    roles = [role for role in ROLES if any(role in entry.images for entry in entries)]
    metrics = list(dict.fromkeys(name for entry in entries for name in entry.metrics))
    body = f"""
<header>
  <h1>{text(title)}</h1>
  <p>{text(note)}</p>
  {_means(entries, metrics)}
  <div class="controls">
    <label>Filter <input type="search" id="filter" placeholder="part of a name ( / )"></label>
    <label>Sort <select id="sort">{_orders(metrics)}</select></label>
    <output id="count" for="filter">{len(entries)} images</output>
  </div>
</header>
<main style="--columns: {len(roles)}">
  <div class="roles">{"".join(f"<span>{role}</span>" for role in roles)}</div>
  <div id="rows">
{"".join(_row(entry, roles, metrics) for entry in entries)}</div>
</main>
<dialog id="viewer" aria-label="enlarged image">
  <figure><img alt=""><figcaption></figcaption></figure>
</dialog>
"""
    path = folder / "index.html"
    write_page(path, title=title, style=STYLE, body=body, script=SCRIPT)
    return path


def _means(entries: Sequence[Entry], metrics: Sequence[str]) -> str:
    if not metrics:
        return ""
    cells = []
    for name in metrics:
        values = [entry.metrics[name] for entry in entries if name in entry.metrics]
        cells.append(f"<div><dt>mean {text(name)}</dt><dd>{sum(values) / len(values):.4g}</dd></div>")
    return f'<dl class="means">{"".join(cells)}</dl>'


def _orders(metrics: Sequence[str]) -> str:
    options = ['<option value="">as given</option>']
    for index, name in enumerate(metrics):
        options.append(f'<option value="{index} 1">{text(name)}, lowest first</option>')
        options.append(f'<option value="{index} -1">{text(name)}, highest first</option>')
    return "".join(options)


def _row(entry: Entry, roles: Sequence[str], metrics: Sequence[str]) -> str:
    height, width = entry.size
    pictures = "".join(_picture(entry, role) for role in roles)
    shown = "".join(
        f"<div><dt>{text(name)}</dt><dd>{entry.metrics[name]:.4g}</dd></div>"
        for name in metrics
        if name in entry.metrics
    )
    values = " ".join(json.dumps(float(entry.metrics.get(name, "nan"))) for name in metrics)
    ratio = entry.size[0] / entry.size[1]
    return f"""<article style="--ratio: {ratio:.4f}" data-name="{text(entry.name)}" data-metrics="{values}">
<div class="caption"><h2>{text(entry.name)}</h2><dl>{shown}</dl></div>
<div class="pictures">{pictures}</div>
</article>
"""


def _picture(entry: Entry, role: str) -> str:
    if role not in entry.images:
        return "<span></span>"
    height, width = entry.size
    url = link(entry.images[role])
    return (
        f'<a href="{url}" data-role="{role}"><img src="{url}" alt="{text(entry.name)}, {role}" '
        f'width="{width}" height="{height}" loading="lazy" decoding="async"></a>'
    )


STYLE = """
.means, article dl { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; margin: 0; }
.means { margin-top: .8rem; gap: .4rem 2rem; }
dl div { display: flex; gap: .4rem; align-items: baseline; }
.means div { display: block; }
dt { color: var(--faint); font-size: .85em; }
dd { margin: 0; font-variant-numeric: tabular-nums; }
.means dd { font-size: 1.35rem; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.2rem; align-items: center; margin-top: .9rem; }
.controls label { color: var(--faint); }
.controls input, .controls select {
  font: inherit; color: var(--ink); background: var(--card); padding: .3rem .5rem; margin-left: .35rem;
  border: 1px solid var(--line); border-radius: 6px;
}
.controls input { width: min(18rem, 60vw); }
#count { color: var(--faint); }
.roles, .pictures {
  display: grid; gap: .5rem; grid-template-columns: repeat(var(--columns), minmax(0, 1fr));
}
.roles {
  position: sticky; top: 0; z-index: 1; padding: .5rem .75rem; background: var(--paper); color: var(--faint);
  border-bottom: 1px solid var(--line); margin-bottom: .75rem;
}
article {
  background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .75rem .75rem;
  margin-bottom: .75rem; content-visibility: auto;
  contain-intrinsic-size: auto calc(3.5rem + min(100vw, 76rem) / var(--columns) * var(--ratio));
}
.caption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: .1rem 1.5rem; }
.caption { margin-bottom: .45rem; }
.caption h2 { white-space: pre-wrap; }
.pictures img { width: 100%; height: auto; border-radius: 4px; }
.pictures a { display: block; border-radius: 4px; }
dialog { border: 0; outline: 0; padding: 0; background: transparent; }
dialog { max-width: none; max-height: none; margin: auto; }
dialog::backdrop { background: rgb(0 0 0 / .82); }
dialog figure { margin: 0; }
dialog img { width: min(94vw, calc(86vh * var(--shape))); height: auto; image-rendering: pixelated; }
dialog figcaption { color: #f2f2f2; text-align: center; padding: .5rem; overflow-wrap: anywhere; }
"""

SCRIPT = """
const rows = [...document.querySelectorAll("article")];
const filter = document.getElementById("filter"), sort = document.getElementById("sort");
const count = document.getElementById("count"), list = document.getElementById("rows");
const viewer = document.getElementById("viewer");
const names = new Map(rows.map(row => [row, row.dataset.name.toLowerCase()]));
const metrics = new Map(rows.map(row => [row, row.dataset.metrics.split(" ").map(Number)]));

function applyFilter() {
  const wanted = filter.value.toLowerCase();
  let shown = 0;
  for (const row of rows) shown += !(row.hidden = !names.get(row).includes(wanted));
  count.value = shown === rows.length ? `${shown} images` : `${shown} of ${rows.length} images`;
}

function applySort() {
  const [which, sign] = sort.value.split(" ").map(Number);
  const ordered = sort.value ? [...rows].sort((a, b) => {
    const x = metrics.get(a)[which], y = metrics.get(b)[which];
    return isNaN(x) ? 1 : isNaN(y) ? -1 : sign * (x - y);
  }) : rows;
  list.append(...ordered);
}

let current = null;  // the link whose image is enlarged
function enlarge(anchor) {
  current = anchor;
  const small = anchor.querySelector("img"), large = viewer.querySelector("img");
  large.src = anchor.href;
  large.alt = small.alt;
  large.style.setProperty("--shape", small.getAttribute("width") / small.getAttribute("height"));
  viewer.querySelector("figcaption").textContent = `${small.alt}  ( ← → ↑ ↓ )`;
  if (!viewer.open) viewer.showModal();
}

function step(sideways, down) {
  const visible = [...list.children].filter(row => !row.hidden);
  const row = current.closest("article"), role = current.dataset.role;
  if (sideways) {
    const own = [...row.querySelectorAll("a")];
    enlarge(own[(own.indexOf(current) + sideways + own.length) % own.length]);
  } else {
    const next = visible[visible.indexOf(row) + down];
    if (next) enlarge(next.querySelector(`a[data-role="${role}"]`) || next.querySelector("a"));
  }
}

filter.addEventListener("input", applyFilter);
sort.addEventListener("change", applySort);
list.addEventListener("click", event => {
  const anchor = event.target.closest("a");
  if (!anchor || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  enlarge(anchor);
});
viewer.addEventListener("click", () => viewer.close());
viewer.addEventListener("close", () => current.focus());
document.addEventListener("keydown", event => {
  const moves = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
  if (viewer.open && moves[event.key]) { event.preventDefault(); step(...moves[event.key]); }
  else if (event.key === "/" && event.target !== filter) { event.preventDefault(); filter.focus(); }
  else if (event.key === "Escape" && event.target === filter) { filter.value = ""; applyFilter(); }
});
applyFilter();
applySort();
"""
