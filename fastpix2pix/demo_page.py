"""The page of the demo: a canvas to draw on, and beside it what the network makes of the drawing."""

import json
from collections.abc import Mapping

from fastpix2pix.page import render_page, text


def render(
    *, title: str, note: str, size: int, smooth: bool, palette: Mapping[str, str], examples: int
) -> str:
    """The page as HTML.

    size: pixels a side of the drawing. smooth: whether a magnified picture is smoothed. palette: the colours
    to draw with, "#rrggbb" by their name. examples: how many GET /example/N there are.
    """
    colours = "".join(
        f'<label style="--colour: {colour}"><input type="radio" name="colour" value="{colour}"'
        f"{' checked' if name == 'window' else ''}><span>{text(name)}</span></label>"
        for name, colour in palette.items()
    )
    background = next(iter(palette.values()))
    body = f"""
<header>
  <h1>{text(title)}</h1>
  <p>{text(note)}</p>
</header>
<main>
  <fieldset class="colours"><legend>colour</legend>{colours}
    <label class="free" style="--colour: #808080"><input type="radio" name="colour" value="#808080" id="free">
      <span>other</span><input type="color" id="picker" value="#808080" aria-label="other colour"></label>
  </fieldset>
  <div class="controls">
    <fieldset class="tools"><legend>tool</legend>
      <label><input type="radio" name="tool" value="box" checked><span>box</span></label>
      <label><input type="radio" name="tool" value="brush"><span>brush</span></label>
      <label class="width">width <input type="range" id="width" min="1" max="{max(2, size // 8)}"
        value="{max(1, size // 32)}"></label>
    </fieldset>
    <div class="buttons">
      <button id="undo" title="Ctrl-Z" disabled>Undo</button>
      <button id="redo" title="Ctrl-Shift-Z" disabled>Redo</button>
      <button id="clear">Clear</button>
      <button id="example">Example</button>
      <button id="open">Open&hellip;</button>
      <input type="file" id="file" accept="image/png,image/jpeg" hidden>
      <button id="save">Save image</button>
      <button id="save_drawing">Save drawing</button>
    </div>
  </div>
  <div class="pictures">
    <figure><canvas id="drawing" width="{size}" height="{size}" aria-label="drawing"></canvas>
      <figcaption>draw here</figcaption></figure>
    <figure><canvas id="result" width="{size}" height="{size}" class="{"smooth" if smooth else ""}"
      aria-label="translated image"></canvas>
      <figcaption><output id="status" aria-live="polite">&nbsp;</output></figcaption></figure>
  </div>
</main>
"""
    settings = json.dumps({"background": background, "examples": examples})
    script = f"const settings = {settings};\n{SCRIPT}"
    return render_page(title=title, style=STYLE, body=body, script=script)


STYLE = """
fieldset { border: 0; margin: 0; padding: 0; }
fieldset, .buttons { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center; }
legend { float: left; color: var(--faint); margin-right: .5rem; padding: 0; }
.colours label, .tools label:not(.width) {
  position: relative; display: inline-flex; align-items: center; gap: .4rem;
  padding: .25rem .6rem .25rem .3rem; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px; background: var(--card);
}
.tools label:not(.width) { padding: .25rem .7rem; }
.colours label::before {
  content: ""; width: 1.25rem; height: 1.25rem; border-radius: 4px; background: var(--colour);
}
.colours input[type=radio], .tools input[type=radio] { position: absolute; opacity: 0; pointer-events: none; }
label:has(input:checked) { border-color: var(--accent); box-shadow: inset 0 0 0 1px var(--accent); }
label:has(input:focus-visible) { outline: 2px solid var(--accent); outline-offset: 2px; }
#picker { width: 1.8rem; height: 1.4rem; padding: 0; border: 0; background: none; }
.width { color: var(--faint); display: inline-flex; align-items: center; gap: .4rem; }
.width input { width: 8rem; }
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.5rem; margin: .8rem 0; }
button {
  font: inherit; color: var(--ink); background: var(--card); padding: .25rem .8rem; cursor: pointer;
  border: 1px solid var(--line); border-radius: 6px;
}
button:hover:enabled { border-color: var(--accent); }
button:disabled { color: var(--faint); opacity: .6; cursor: default; }
.pictures { display: grid; gap: .9rem; }
.pictures { grid-template-columns: repeat(auto-fit, minmax(min(100%, 17rem), 1fr)); }
.pictures { max-width: calc(2 * max(16rem, 100vh - 18rem)); }  /* as high as the window leaves room */
figure { margin: 0; }
canvas { display: block; width: 100%; aspect-ratio: 1; border-radius: 8px; image-rendering: pixelated; }
#drawing { touch-action: none; cursor: crosshair; }
.smooth { image-rendering: auto; }
figcaption { color: var(--faint); padding-top: .35rem; min-height: 1.8rem; }
.failed { color: #c02a2a; }
@media (max-width: 40rem) {  /* a phone: both pictures in view, tools within reach of the thumb */
  header { padding-top: .6rem; }
  main { display: flex; flex-direction: column; padding-top: .6rem; }
  .pictures { order: -1; gap: .4rem; margin-bottom: .6rem; max-width: none; }
  figure:first-child figcaption { display: none; }
}
"""

SCRIPT = """
const $ = id => document.getElementById(id);
const drawing = $("drawing"), result = $("result"), status = $("status");
const pen = drawing.getContext("2d", { alpha: false, willReadFrequently: true });
const paper = result.getContext("2d", { alpha: false });
const size = drawing.width;
pen.imageSmoothingEnabled = false;

// ---- undo: whole pictures, the newest last

const past = [], future = [], DEEP = 100;
const picture = () => pen.getImageData(0, 0, size, size);
function remember(before) {
  past.push(before);
  if (past.length > DEEP) past.shift();
  future.length = 0;
  showButtons();
}
function travel(from, to) {
  if (!from.length || stroke) return;
  to.push(picture());
  pen.putImageData(from.pop(), 0, 0);
  showButtons();
  changed();
}
function showButtons() {
  $("undo").disabled = !past.length;
  $("redo").disabled = !future.length;
}

// ---- translation: one request at a time, always of the newest drawing

let wanted = 0, shown = 0, busy = false;
function changed() {
  wanted++;
  result.setAttribute("aria-busy", "true");
  translate();
}
async function translate() {
  if (busy || shown === wanted) return;
  busy = true;
  const number = wanted;
  try {
    const answer = await send("translate", await blob(drawing));
    const image = await createImageBitmap(await answer.blob());
    result.width = image.width;
    result.height = image.height;
    paper.drawImage(image, 0, 0);
    say(`${answer.headers.get("X-Milliseconds")} ms`);
  } catch (error) {
    say(error.message, true);
  }
  shown = number;
  busy = false;
  result.setAttribute("aria-busy", String(shown !== wanted));
  translate();
}
async function send(where, body) {
  let answer;
  try {
    answer = await fetch(where, { method: "POST", body });
  } catch {
    throw new Error("no answer; does the command still run?");
  }
  if (!answer.ok) throw new Error(await answer.text());
  return answer;
}
const blob = canvas => new Promise(done => canvas.toBlob(done, "image/png"));
function say(words, failed = false) {
  status.value = words;
  status.className = failed ? "failed" : "";
}

// ---- drawing: whole pixels without soft edges, for a label map has no colours in between

let stroke = null;  // {before, x, y}: the picture before it, and where it began or came last
function place(event) {
  const box = drawing.getBoundingClientRect();
  const at = (position, start, length) =>
    Math.min(size - 1, Math.max(0, Math.floor((position - start) * size / length)));
  return { x: at(event.clientX, box.left, box.width), y: at(event.clientY, box.top, box.height) };
}
const chosen = name => document.querySelector(`input[name=${name}]:checked`).value;
function dot(x, y) {
  const width = Number($("width").value), half = Math.floor(width / 2);
  pen.fillRect(x - half, y - half, width, width);
}
function line(from, to) {
  const steps = Math.max(Math.abs(to.x - from.x), Math.abs(to.y - from.y), 1);
  for (let i = 0; i <= steps; i++)
    dot(Math.round(from.x + (to.x - from.x) * i / steps), Math.round(from.y + (to.y - from.y) * i / steps));
}
function draw(to) {
  pen.fillStyle = chosen("colour");
  if (chosen("tool") === "box") {
    pen.putImageData(stroke.before, 0, 0);
    const left = Math.min(stroke.x, to.x), top = Math.min(stroke.y, to.y);
    pen.fillRect(left, top, Math.abs(to.x - stroke.x) + 1, Math.abs(to.y - stroke.y) + 1);
  } else {
    line(stroke, to);
    Object.assign(stroke, to);
  }
  changed();
}
drawing.addEventListener("pointerdown", event => {
  if (stroke || event.button) return;
  drawing.setPointerCapture(event.pointerId);
  stroke = { before: picture(), ...place(event) };
  draw(place(event));
});
drawing.addEventListener("pointermove", event => stroke && draw(place(event)));
drawing.addEventListener("pointerup", () => {
  if (stroke) remember(stroke.before);
  stroke = null;
});
drawing.addEventListener("pointercancel", () => {
  if (stroke) pen.putImageData(stroke.before, 0, 0);
  stroke = null;
  changed();
});

// ---- buttons

function replace(paint) {
  remember(picture());
  paint();
  changed();
}
function fill() {
  pen.fillStyle = settings.background;
  pen.fillRect(0, 0, size, size);
}
async function show(file) {  // a file in the size of the drawing
  const image = await createImageBitmap(await file);
  pen.drawImage(image, 0, 0);
}
async function open(file) {
  try {
    const fitted = await (await send("fit", file)).blob();
    remember(picture());
    await show(fitted);
    changed();
  } catch (error) {
    say(error.message, true);
  }
}
async function example(number) {
  await show((await fetch(`example/${number}`)).blob());
  changed();
}
function save(canvas, name) {
  canvas.toBlob(file => {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(file);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  });
}
let next = 0;
$("undo").addEventListener("click", () => travel(past, future));
$("redo").addEventListener("click", () => travel(future, past));
$("clear").addEventListener("click", () => replace(fill));
$("example").addEventListener("click", () => {
  remember(picture());
  next = (next + 1) % settings.examples;
  example(next);
});
$("open").addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) open($("file").files[0]);
  $("file").value = "";
});
$("save").addEventListener("click", () => save(result, "generated.png"));
$("save_drawing").addEventListener("click", () => save(drawing, "input.png"));
$("picker").addEventListener("input", () => {
  $("free").value = $("picker").value;
  $("free").checked = true;
  $("free").closest("label").style.setProperty("--colour", $("picker").value);
});
document.addEventListener("keydown", event => {
  if (!(event.ctrlKey || event.metaKey) || event.key.toLowerCase() !== "z") return;
  event.preventDefault();
  event.shiftKey ? travel(future, past) : travel(past, future);
});
fill();
example(0);
"""
