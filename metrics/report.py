"""One HTML file that shows scored pictures, worst first: enlarged input, result and reference with their numbers.

Everything is inside: no server, nothing from elsewhere. Pictures are stored as WebP at quality 90, so that a hundred
make some 20 MB; the numbers come from the originals. Click on a picture to lay two of them over each other.
"""
import base64
import io
from html import escape
from math import inf, isnan

from PIL import Image

from metrics import METRICS
from metrics.score import crop, mean, shown
from photos.pictures import read_rgb, write_bytes

SIDE = 1280  # larger pictures are shown smaller

STYLE = """
:root { color-scheme: light dark; --line: #8884; --accent: #c2410c }
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 1680px; padding: 1.5rem }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: 1rem; margin: 0; overflow-wrap: anywhere }
p { margin: .3rem 0 1rem; opacity: .75 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto }
th, td { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap }
th:first-child, td:first-child { text-align: left; padding-left: 0 }
th button { all: unset; cursor: pointer; font-weight: 600 } th button[aria-pressed=true] { color: var(--accent) }
tfoot td { font-weight: 600; border: 0 } td a { color: inherit }
section { margin-top: 2rem; padding-top: 1rem; border-top: 1px solid var(--line) }
dl { display: flex; flex-wrap: wrap; gap: 0 1.2rem; margin: .1rem 0 .6rem }
dl div { display: flex; gap: .35rem } dt { opacity: .65 } dd { margin: 0; font-variant-numeric: tabular-nums }
.row { display: grid; grid-auto-flow: column; grid-auto-columns: minmax(0, 1fr); gap: .6rem }
figure { margin: 0 } figure img { width: 100%; display: block; cursor: zoom-in } figcaption { opacity: .65 }
dialog { border: 0; padding: 1rem; max-width: 96vw; max-height: 96vh; box-sizing: border-box }
dialog::backdrop { background: #000b }
#over { position: relative; line-height: 0 }
#over img { display: block; width: min(88vw, calc(78vh * var(--ratio))) }
#top { position: absolute; inset: 0; clip-path: inset(0 calc(100% - var(--cut)) 0 0) }
#cut { position: absolute; top: 0; bottom: 0; left: var(--cut); border-left: 1px solid #fff }
dialog input { width: 100%; margin: .8rem 0 0; accent-color: var(--accent) }
dialog p { display: flex; justify-content: space-between; margin: 0; gap: 1rem }
"""

SCRIPT = """
const $ = s => document.querySelector(s), all = (s, e) => [...(e || document).querySelectorAll(s)];
const value = (e, name) => e.getAttribute("data-" + name);
const rank = (e, name, sign) => isNaN(value(e, name)) ? 1e9 : sign * value(e, name);  // those without a value last
function sortBy(button) {
  const name = button.dataset.metric, sign = button.dataset.sign;
  for (const b of all("th button")) b.setAttribute("aria-pressed", b == button);
  for (const parent of [$("tbody"), $("main")])
    parent.append(...[...parent.children].sort((a, b) => rank(a, name, sign) - rank(b, name, sign)));
}
for (const b of all("th button")) b.onclick = () => sortBy(b);
const dialog = $("dialog"), slider = $("dialog input"), over = $("#over");
const move = v => { slider.value = v; over.style.setProperty("--cut", v + "%") };
slider.oninput = () => move(slider.value);
over.onpointermove = e => move(Math.min(100, Math.max(0, 100 * e.offsetX / over.clientWidth)));
for (const img of all("figure img")) img.onclick = () => {
  const row = all("figure", img.closest(".row")), result = row.find(f => f.dataset.kind == "result");
  const chosen = img.closest("figure"), other = chosen == result ? row[row.length - 1] : chosen;
  const [a, b] = row.indexOf(result) < row.indexOf(other) ? [result, other] : [other, result];
  $("#top").src = a.querySelector("img").src; $("#left").textContent = a.innerText;
  $("#under").src = b.querySelector("img").src; $("#right").textContent = b.innerText;
  over.style.setProperty("--ratio", img.naturalWidth / img.naturalHeight);
  move(50); dialog.showModal();
};
dialog.onclick = e => { if (e.target == dialog) dialog.close() };
"""


def worst_first(rows, pairs):
    """(row, pair) for each picture, sorted by LPIPS if it is there, else by the first metric; and the metric's name."""
    by = "lpips" if "lpips" in rows[0] else list(rows[0])[1]
    sign = METRICS[by].sign
    return sorted(zip(rows, pairs, strict=True), key=lambda item: inf if isnan(item[0][by]) else sign * item[0][by]), by


def write_report(rows, pairs, path, protocol="full", note=""):
    """Write the HTML file `path` for the `rows` that `score.evaluate` gave for `pairs`.

    note: goes below the heading. An input (Pair.lr) is shown enlarged by bicubic interpolation to the result's size.
    """
    names = list(rows[0])[1:]
    order, by = worst_first(rows, pairs)

    def data(row):  # attributes by which the page sorts
        return "".join(f' data-{n}="{row[n]:.6f}"' for n in names)

    def cells(row):
        return "".join(f"<td>{shown(n, row[n])}</td>" for n in names)

    def figure(kind, image):
        image, buffer = crop(image, protocol).copy(), io.BytesIO()
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        image.save(buffer, "WEBP", quality=90)
        source = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
        return (f'<figure data-kind="{kind}"><img src="{source}" alt="{kind}" loading="lazy">'
                f"<figcaption>{kind}</figcaption></figure>")

    def section(i, row, pair):
        sr = read_rgb(pair.sr)
        pictures = {"bicubic": pair.lr and read_rgb(pair.lr).resize(sr.size, Image.Resampling.BICUBIC), "result": sr,
                    "reference": pair.hr and read_rgb(pair.hr)}
        figures = "".join(figure(kind, image) for kind, image in pictures.items() if image)
        numbers = "".join(f"<div><dt>{n}</dt><dd>{shown(n, row[n])}</dd></div>" for n in names)
        return (f'<section id="i{i}"{data(row)}><h2>{escape(row["image"])}</h2><dl>{numbers}</dl>'
                f'<div class="row">{figures}</div></section>')

    head = "".join(f'<th><button data-metric="{n}" data-sign="{METRICS[n].sign}" aria-pressed="{str(n == by).lower()}" '
                   f'title="{escape(METRICS[n].range)}; click: worst first">{n} {METRICS[n].arrow}</button></th>'
                   for n in names)
    body = "".join(f'<tr{data(row)}><td><a href="#i{i}">{escape(row["image"])}</a></td>{cells(row)}</tr>'
                   for i, (row, _) in enumerate(order))
    sections = "".join(section(i, row, pair) for i, (row, pair) in enumerate(order))
    extent = "whole images" if protocol == "full" else "central 256×256 crops"
    note = (f"{note + ': ' if note else ''}{len(rows)} pictures, {extent}, worst first by the marked metric. "
            "Click a picture to lay two over each other.")
    write_bytes(path, f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Super-resolution report</title>
<style>{STYLE}</style>
<h1>Super-resolution report</h1>
<p>{escape(note)}</p>
<table><thead><tr><th>image</th>{head}</tr></thead><tbody>{body}</tbody>
<tfoot><tr><td>mean</td>{cells(mean(rows))}</tr></tfoot></table>
<main>{sections}</main>
<dialog><div id="over"><img id="under" alt=""><img id="top" alt=""><div id="cut"></div></div>
<input type="range" min="0" max="100" step="0.1" aria-label="where the two pictures meet">
<p><span id="left"></span><span id="right"></span></p></dialog>
<script>{SCRIPT}</script></html>
""")
