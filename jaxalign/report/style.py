"""The shell of every page: its style sheet and its one script, written into it."""

import html
from collections.abc import Iterable

_LIGHT = (
    "#2563eb", "#e06c0a", "#15803d", "#be27a0", "#d32f3f",
    "#0788a5", "#8b5a2b", "#6b7c00", "#5b6678", "#7c3aed",
)  # fmt: skip
_DARK = (
    "#74a9ff", "#ffa04d", "#55d18d", "#f183df", "#ff7f89",
    "#45d0ea", "#d0a274", "#c6d24a", "#a9b5c8", "#b99cff",
)  # fmt: skip


def _palette(colours: tuple[str, ...]) -> str:
    return "".join(f"--c{i}:{c};" for i, c in enumerate(colours))


_CLASSES = "".join(f".c{i}{{--c:var(--c{i})}}" for i in range(10))

CSS = (
    ":root{color-scheme:light dark;--bg:#fff;--panel:#f7f8fa;--ink:#1b2130;"
    "--soft:#5b6475;--rule:#dfe3ea;--grid:#e8ebf0;" + _palette(_LIGHT) + "}"
    "@media(prefers-color-scheme:dark){:root{--bg:#12151c;--panel:#1a1f29;"
    "--ink:#e6e9ef;--soft:#9aa4b5;--rule:#303848;--grid:#283040;"
    + _palette(_DARK)
    + "}}"
    + _CLASSES
    + """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);line-height:1.5;
 font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,
 sans-serif;-webkit-text-size-adjust:100%}
main{max-width:1280px;margin:0 auto;padding:24px 20px 64px}
h1{font-size:26px;line-height:1.2;margin:0 0 4px;letter-spacing:-.01em}
h2{font-size:20px;margin:44px 0 8px;padding-top:14px;border-top:1px solid var(--rule)}
h3{font-size:16px;margin:26px 0 0}
h4{font-size:11px;margin:0 0 4px;text-transform:uppercase;letter-spacing:.06em;
 color:var(--soft)}
.note,.caption,.sub{color:var(--soft);margin:2px 0 10px;font-size:13.5px}
.caption{font-size:12px;margin:2px 4px 0}
small{font-size:.85em;color:var(--soft);font-weight:400}
code,pre{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px}
pre{overflow:auto;background:var(--panel);padding:12px;border-radius:8px;max-height:60vh}
.legend{display:flex;flex-wrap:wrap;gap:6px 8px;margin:14px 0 0;padding:8px 0;
 position:sticky;top:0;background:var(--bg);z-index:2}
.legend .how{color:var(--soft);font-size:12.5px;align-self:center}
.chip{display:inline-block;padding:1px 10px;border-radius:99px;font-size:13px;
 font-weight:600;color:var(--c);border:1.5px solid var(--c);overflow-wrap:anywhere}
.heads{list-style:none;margin:14px 0;padding:0;font-size:13.5px;color:var(--soft)}
.heads li{margin:6px 0;display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline}
.key{display:inline-block;width:.7em;height:.7em;border-radius:50%;background:var(--c);
 margin-right:.45em}
.warn{background:var(--panel);border-left:3px solid var(--c1);padding:8px 14px;
 margin:14px 0;border-radius:0 8px 8px 0;font-size:13.5px}
.warn ul{margin:2px 0;padding-left:18px}
.scroll{overflow-x:auto;margin:0 -4px;padding:0 4px}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:6px 14px 6px 0;text-align:left;vertical-align:top;
 border-bottom:1px solid var(--grid)}
thead th{font-weight:600;border-bottom:1px solid var(--rule);white-space:nowrap}
tbody th{font-weight:500;white-space:nowrap}
.runs tbody th{color:var(--soft);font-weight:400}
.runs td{min-width:9em;max-width:34em;overflow-wrap:anywhere}
.num{text-align:right;white-space:nowrap}
.results td,.results th{vertical-align:middle}
.results td .range{width:240px;display:block}
.results .axis-row td{border:0;padding-top:0}
.grid{display:grid;gap:14px;margin-top:10px;
 grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
figure{margin:0;padding:10px 10px 8px;background:var(--panel);border-radius:10px;
 position:relative;min-width:0}
figcaption{font-size:13.5px;margin:0 4px 2px;overflow-wrap:anywhere}
figure>p{margin:2px 4px 0;font-size:12px;color:var(--soft)}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-size:11px;fill:var(--soft);font-variant-numeric:tabular-nums}
text.y,text.name{text-anchor:end}text.x,text.bad{text-anchor:middle}
text.name{font-style:italic}svg text.bad{fill:var(--c);font-size:13px}
.grid line.grid,svg line.grid{stroke:var(--grid)}
line.zero,line.axis,line.tick{stroke:var(--soft);stroke-opacity:.55}
path{fill:none;stroke-linejoin:round;stroke-linecap:round}
path.line{stroke:var(--c);stroke-width:1.7}
path.raw{stroke:var(--c);stroke-width:1;stroke-opacity:.28}
.many path.raw{stroke-opacity:.1}
path.eval{stroke:var(--c);stroke-width:1.7;stroke-dasharray:5 4}
path.ideal,line.ideal{stroke:var(--soft);stroke-dasharray:3 3}
.dot{fill:var(--c);stroke:var(--panel);stroke-width:1}
.bar{fill:var(--c);fill-opacity:.35}
.hair{stroke:var(--soft);stroke-opacity:.6}
.tip{position:absolute;pointer-events:none;background:var(--bg);color:var(--ink);
 border:1px solid var(--rule);border-radius:8px;padding:6px 9px;font-size:12px;
 line-height:1.45;z-index:3;white-space:nowrap;box-shadow:0 4px 14px #0003}
.tip b{font-variant-numeric:tabular-nums}
.parts{display:flex;height:22px;gap:2px;margin:6px 0 8px;max-width:900px}
.parts i{background:var(--c);border-radius:3px;min-width:1px}
details{margin:10px 0}summary{cursor:pointer;padding:4px 0}
details.more{margin-top:26px}details.more>summary{font-weight:600}
article{background:var(--panel);border-radius:10px;padding:14px;margin:14px 0}
.text{white-space:pre-wrap;overflow-wrap:anywhere;max-height:15em;overflow:auto;
 font-size:14px}
.empty{color:var(--soft);font-style:italic}
.target{margin-top:10px}
.responses{display:grid;gap:12px;margin-top:12px;
 grid-template-columns:repeat(auto-fit,minmax(min(100%,250px),1fr))}
.response{background:var(--bg);border-top:3px solid var(--c);border-radius:6px;
 padding:10px 12px;min-width:0}
.who{display:flex;flex-wrap:wrap;gap:2px 10px;align-items:baseline;margin-bottom:6px}
@media(max-width:600px){main{padding:16px 12px 48px}h1{font-size:22px}
 figure{padding:8px 4px 6px}.legend{position:static}}
@media print{.legend{position:static}.text{max-height:none}}
"""
)

# Reads a curve's own coordinates back into numbers under the pointer.
SCRIPT = """
const fmt = v => { const a = Math.abs(v);
  return a >= 1e4 || (a && a < 1e-3) ? v.toExponential(2) : +v.toPrecision(4) + ""; };
for (const svg of document.querySelectorAll("svg.curves")) {
  const [x0, x1, y0, y1] = svg.dataset.scale.split(",").map(Number);
  const [left, right, top, bottom] = svg.dataset.plot.split(",").map(Number);
  const figure = svg.closest("figure");
  let lines, tip, hair;
  const leave = () => { if (tip) { tip.remove(); hair.remove(); tip = null; } };
  svg.addEventListener("pointerleave", leave);
  svg.addEventListener("pointermove", event => {
    lines ??= [...svg.querySelectorAll("path[data-label]")].map(p => ({
      label: p.dataset.label, colour: getComputedStyle(p).stroke,
      points: (p.getAttribute("d").match(/[\\d.-]+ [\\d.-]+/g) || [])
        .map(q => q.split(" ").map(Number)) }));
    const box = svg.getBoundingClientRect(), zoom = 400 / box.width;
    const x = (event.clientX - box.left) * zoom;
    if (x < left - 4 || x > right + 4) return leave();
    if (!tip) {
      tip = figure.appendChild(document.createElement("div")); tip.className = "tip";
      hair = svg.appendChild(
        document.createElementNS(svg.namespaceURI, "line"));
      hair.setAttribute("class", "hair");
      hair.setAttribute("y1", top); hair.setAttribute("y2", bottom);
    }
    hair.setAttribute("x1", x); hair.setAttribute("x2", x);
    const step = Math.round(x0 + (x - left) / (right - left) * (x1 - x0));
    tip.textContent = "step " + step;
    for (const line of lines) {
      let best = null;
      for (const p of line.points)
        if (!best || Math.abs(p[0] - x) < Math.abs(best[0] - x)) best = p;
      if (!best) continue;
      const value = y0 + (bottom - best[1]) / (bottom - top) * (y1 - y0);
      const row = tip.appendChild(document.createElement("div"));
      const dot = row.appendChild(document.createElement("i"));
      dot.className = "key"; dot.style.background = line.colour;
      row.append(line.label + "  ");
      row.appendChild(document.createElement("b")).textContent = fmt(value);
    }
    const frame = figure.getBoundingClientRect();
    const at = event.clientX - frame.left;
    tip.style.top = "34px";
    const side = at > frame.width / 2;
    tip.style.left = side ? "" : at + 14 + "px";
    tip.style.right = side ? frame.width - at + 14 + "px" : "";
  });
}
"""


def table(head: str, rows: Iterable[str], kind: str = "") -> str:
    """A table that scrolls sideways, of cells ``<th>..`` and rows ``<tr>..``."""
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return (
        f'<div class="scroll"><table class="{kind}">{top}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def page(title: str, body: str, css: str = "", script: bool = False) -> str:
    """A whole page that needs no network, and is forbidden to ask for any.

    ``script`` shows the numbers of curves under the pointer.
    """
    running = f"<script>{SCRIPT}</script>" if script else ""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f"<title>{html.escape(title)} · jaxalign</title><style>{CSS}{css}</style>"
        f"</head><body><main>{body}</main>{running}</body></html>\n"
    )
