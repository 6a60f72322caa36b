"""The text of the HTML page: its Jinja template, style and script. Nothing in it refers to another address."""

from __future__ import annotations

TEMPLATE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>Kept visual tokens: {{ e.maps | map(attribute="name") | join(", ") | truncate(80) }}</title>
<style>
{{ style | safe }}
{% for image in images %}
#image{{ loop.index }} .photo { background-image: url({{ image.uri }}); }
#image{{ loop.index }} .score .photo { filter: {{ image.grey }}; }
{% endfor %}
</style>
</head>
<body>
<main>
<h1>Which visual tokens were kept</h1>
<dl class="talk">
{% if e.prompt is not none %}
<div><dt>Question</dt><dd dir="auto">{{ e.prompt }}</dd></div>
{% endif %}
{% if e.answer is not none %}
<div><dt>Answer</dt><dd dir="auto">{{ e.answer or "(empty)" }}</dd></div>
{% endif %}
</dl>
<p class="figures"><b>{{ e.model }}</b>: {{ e.run }}{{ "; no question asked" if e.answer is none }}</p>
{% if e.score_range is none %}
<p class="note">{{ "Every visual token was kept, so nothing was scored and there is no heat map." if e.all_kept
 else "Nothing was scored, so there is no heat map." }}</p>
{% else %}
<div class="controls">
<div class="bar" role="img" aria-label="Colours of the heat map: {{ e.score_name }}, from {{ "%.4f" % e.score_range[0] }} (dark violet) to
 {{ "%.4f" % e.score_range[1] }} (light yellow){% if e.lowest_kept is not none %}; kept from {{ "%.4f" % e.lowest_kept }} on{% endif %}">
<div class="bar-title">{{ e.score_name }}</div>
<div class="colours" style="background: linear-gradient(90deg, {{ gradient }})">
{% if cut is not none %}<span class="cut" style="left: {{ cut }}%"></span>{% endif %}
</div>
<div class="numbers"><span>{{ "%.4f" % e.score_range[0] }}</span>
{% if e.lowest_kept is not none %}<span>kept from {{ "%.4f" % e.lowest_kept }}</span>{% endif %}
<span>{{ "%.4f" % e.score_range[1] }}</span></div>
</div>
{% if e.by_rank %}
<form class="slider" id="slider" hidden>
<label for="keep">Keep by score <output id="keep-shown" for="keep">{{ e.kept }}</output> of {{ count }}</label>
<input type="range" id="keep" min="1" max="{{ e.most_by_rank }}" value="{{ e.kept }}" list="budgets">
<datalist id="budgets">{% for budget in e.budgets %}<option value="{{ budget }}"></option>{% endfor %}</datalist>
<p><span id="state" aria-live="polite">As it was run.</span> <button type="button" id="reset" hidden>Back to the run</button></p>
</form>
{% else %}
<p class="note">The kept tokens are not those of the highest scores over all images, so other budgets are not shown.</p>
{% endif %}
</div>
{% endif %}
<p class="note" id="help" hidden>Point at a patch for its score, or focus a picture and use the arrow keys.</p>
{% for image in images %}
{% set map = image.map %}
{% set name = "image " ~ loop.index ~ " of " ~ images | length ~ ", " ~ map.name if images | length > 1 else map.name %}
<section id="image{{ loop.index }}" class="image" data-image="{{ loop.index0 }}">
<h2><bdi>{{ loop.index ~ ". " if images | length > 1 }}{{ map.name }}</bdi>
<small>{{ map.original_size[0] }} × {{ map.original_size[1] }};
<span class="count">{{ map.kept }}</span> of {{ map.tokens | length }} visual tokens kept</small></h2>
{% for note in map.notes %}<p class="note">Not in the pictures: {{ note }}.</p>
{% endfor %}
<div class="panels{{ " small" if images | length > 2 }}">
{% for kind, caption, alt in [
 ("seen", "Image" ~ ("; hatched: not seen by the model" if map.cropped), "The image itself: " ~ name),
 ("kept", "Kept (outlined) and dropped (dark)",
  name ~ ": " ~ map.kept ~ " of " ~ map.tokens | length ~ " visual tokens kept, drawn bright and outlined, the others dark"),
 ("score", "Score of every token", name ~ (": heat map of the scores over the image in grey" if image.cells else ": nothing was scored")),
] %}
<figure>
<div class="panel {{ kind }}{{ " fine" if image.fine }}" style="aspect-ratio: 1000 / {{ image.height }};
 max-width: calc(90vh * {{ (1000 / image.height) | round(3) }})" tabindex="0" role="img" aria-label="{{ alt }}">
{% if kind != "score" or image.cells %}
<div class="photo"></div>
<svg viewBox="0 0 1000 {{ image.height }}" preserveAspectRatio="none" aria-hidden="true">
{% if kind == "kept" %}
<path class="dropped" d="{{ image.dropped_path }}"/>
<path class="dark-line" d="{{ image.kept_path }}"/>
<path class="bright-line" d="{{ image.kept_path }}"/>
{% elif kind == "score" %}
<g fill-opacity="{{ heat_share }}" shape-rendering="crispEdges">
{% for cell in image.cells %}
{% set left, top, right, bottom = cell.box %}
<rect x="{{ left }}" y="{{ top }}" width="{{ (right - left) | round(1) }}" height="{{ (bottom - top) | round(1) }}"
 fill="{{ cell.colour or "url(#crossed)" }}"><title>{{ cell.text }}</title></rect>
{% endfor %}
</g>
{% endif %}
{% if image.unseen_path %}
<path class="unseen" d="{{ image.unseen_path }}"/><path fill="url(#hatch)" fill-rule="evenodd" d="{{ image.unseen_path }}"/>
{% endif %}
<path class="here-dark" d=""/><path class="here" d=""/>
</svg>
{% else %}
<p class="empty">nothing was scored</p>
{% endif %}
</div>
<figcaption>{{ caption }}</figcaption>
</figure>
{% endfor %}
</div>
</section>
{% endfor %}
<svg class="patterns" width="0" height="0" aria-hidden="true"><defs>
<pattern id="hatch" width="30" height="30" patternUnits="userSpaceOnUse" patternTransform="rotate(45)"><path
 d="M0 0V30" stroke="#555" stroke-width="8"/></pattern>
<pattern id="crossed" width="1" height="1" viewBox="0 0 10 10"><path d="M0 0L10 10M10 0L0 10" stroke="#000"/></pattern>
</defs></svg>
<div id="tip" role="status" hidden></div>
</main>
<script type="application/json" id="data">{{ data | tojson }}</script>
<script>
{{ script | safe }}
</script>
</body>
</html>
"""

STYLE = """\
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0; background: #fafafa; color: #1e1e22; font: 16px/1.45 system-ui, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
main { max-width: 1400px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.4rem; margin: 0 0 .6rem; }
h2 { font-size: 1.1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 small { display: inline-block; font-weight: normal; font-size: .9rem; color: #4a4a52; margin-left: .4em; }
dl.talk { margin: 0; }
dl.talk div { display: flex; gap: .8em; margin: 0 0 .3rem; }
dl.talk dt { flex: 0 0 5em; color: #4a4a52; }
dl.talk dd { margin: 0; max-height: 9em; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 0; }
.figures { margin: .5rem 0; }
.note { margin: 0 0 .5rem; color: #4a4a52; }
.controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 340px), 1fr)); gap: 10px 24px; margin: .6rem 0 1rem; }
.bar { max-width: 460px; }
.bar-title, .numbers { font-size: .9rem; }
.colours { position: relative; height: 14px; border: 1px solid #888; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.cut { position: absolute; top: -5px; bottom: -5px; width: 4px; margin-left: -2px; background: #1e1e22; border: 1px solid #fff; }
.numbers { display: flex; justify-content: space-between; }
.slider { padding: .4rem .8rem; background: #fff; border: 1px solid #d5d5da; border-radius: 6px; }
.slider label { display: block; }
.slider output { font-weight: bold; font-variant-numeric: tabular-nums; }
.slider input { width: 100%; height: 28px; margin: 0; accent-color: #7a4b00; }
.slider button { font: inherit; padding: .1rem .6rem; margin-left: .4em; }
.slider p { margin: 0; min-height: 2.1em; font-size: .9rem; }
.other-budget #state, .other-budget .count { color: #8a3200; font-weight: bold; }
section.image { margin: 0 0 1.2rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 300px), 1fr)); gap: 14px; align-items: start; }
.panels.small { max-width: 860px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
figure { margin: 0; min-width: 0; }
figcaption { font-size: .9rem; color: #4a4a52; margin-top: .2rem; }
.panel { position: relative; width: 100%; overflow: hidden; background: #e4e4e6;
 box-shadow: 0 0 0 1px #cdcdd2; touch-action: manipulation; cursor: crosshair; }
.panel:focus-visible { outline: 3px solid #1a5fb4; outline-offset: 2px; }
.photo { position: absolute; inset: 0; background-size: 100% 100%; background-repeat: no-repeat;
 print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.panel svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.panel svg path { fill: none; vector-effect: non-scaling-stroke; }
.panel svg path.dropped { fill: #000; fill-opacity: .74; }
.panel svg path.dark-line { stroke: #191400; stroke-width: 3.5px; }
.panel svg path.bright-line { stroke: #ffc828; stroke-width: 1.6px; }
.panel.fine svg path.dark-line { stroke-width: 2px; }
.panel.fine svg path.bright-line { stroke-width: 1px; }
.panel svg path.unseen { fill: #fafafa; fill-opacity: .72; fill-rule: evenodd; }
.panel svg path[fill^="url"] { fill: url(#hatch); fill-opacity: .7; }
.panel svg path.here-dark { stroke: #000; stroke-width: 5px; }
.panel svg path.here { stroke: #fff; stroke-width: 2.5px; }
.empty { position: absolute; inset: 0; margin: 0; display: flex; align-items: center; justify-content: center; }
.patterns { position: absolute; }
#tip { position: fixed; z-index: 1; left: 0; top: 0; max-width: min(22em, 90vw); padding: .3rem .6rem; border-radius: 4px;
 background: #1e1e22; color: #fff; font-size: .9rem; pointer-events: none; }
"""

SCRIPT = """\
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const tip = document.getElementById("tip");
  const slider = document.getElementById("slider");
  let budget = data.kept;
  document.querySelectorAll("svg title").forEach((title) => title.remove()); // the tip says the same, at once

  const total = data.images.reduce((sum, image) => sum + image.boxes.length + (image.classRank === null ? 0 : 1), 0);
  const isRun = () => budget === data.kept;
  const kept = (image, i) => (isRun() ? image.kept[i] === 1 : image.ranks[i] < budget);
  const number = (value) => String(Math.round(value * 10) / 10);

  function rectangle(box, wanted) {
    const inset = Math.min(wanted, (box[2] - box[0]) / 4, (box[3] - box[1]) / 4);
    const width = number(box[2] - box[0] - 2 * inset);
    return "M" + number(box[0] + inset) + " " + number(box[1] + inset) + "h" + width + "v" + number(box[3] - box[1] - 2 * inset)
      + "h-" + width + "z";
  }

  function redraw() {
    document.querySelectorAll("section.image").forEach((section) => {
      const image = data.images[section.dataset.image];
      let inside = "", outside = "", count = 0;
      image.boxes.forEach((box, i) => {
        const stays = kept(image, i);
        count += stays ? 1 : 0;
        if (box && stays) inside += rectangle(box, 3);
        if (box && !stays) outside += rectangle(box, 0);
      });
      if (image.classRank !== null && image.classRank < budget) count += 1;
      section.querySelector(".dropped").setAttribute("d", outside);
      section.querySelectorAll(".dark-line, .bright-line").forEach((line) => line.setAttribute("d", inside));
      section.querySelector(".count").textContent = isRun() ? image.keptTokens : count;
    });
  }

  function setBudget(value) {
    budget = value;
    document.getElementById("keep").value = value;
    document.getElementById("keep-shown").textContent = value;
    const state = document.getElementById("state");
    document.body.classList.toggle("other-budget", !isRun());
    document.getElementById("reset").hidden = isRun();
    state.textContent = isRun() ? "As it was run."
      : "By score, not run: the " + value + " highest scores. The run kept " + data.kept + ".";
    redraw();
  }

  function describe(image, i) {
    const row = Math.floor(i / image.side) + 1, column = (i % image.side) + 1;
    const score = image.scores[i] === null ? "not scored" : "score " + image.scores[i].toFixed(4);
    const rank = image.ranks[i] === null ? "" : ", rank " + (image.ranks[i] + 1) + " of " + total;
    const state = (kept(image, i) ? "kept" : "dropped") + (isRun() ? "" : " at " + budget + ", by score, not run");
    return "token " + (image.first + i) + " (row " + row + ", column " + column + "): " + score + rank + ", " + state;
  }

  function show(section, panel, i) {
    const image = data.images[section.dataset.image], box = image.boxes[i];
    section.querySelectorAll(".here, .here-dark").forEach((mark) => mark.setAttribute("d", rectangle(box, 3)));
    tip.textContent = describe(image, i);
    tip.hidden = false;
    const area = panel.getBoundingClientRect(), height = image.viewHeight;
    const x = area.left + (box[0] + box[2]) / 2000 * area.width, y = area.top + box[3] / height * area.height + 8;
    const above = area.top + box[1] / height * area.height - tip.offsetHeight - 8;
    tip.style.left = Math.max(4, Math.min(x - tip.offsetWidth / 2, document.documentElement.clientWidth - tip.offsetWidth - 4)) + "px";
    tip.style.top = (y + tip.offsetHeight > window.innerHeight && above > 0 ? above : y) + "px";
    section.dataset.at = i;
  }

  function hide(section) {
    section.querySelectorAll(".here, .here-dark").forEach((mark) => mark.setAttribute("d", ""));
    tip.hidden = true;
  }

  function attach(section, panel) {
    const image = data.images[section.dataset.image];
    const view = panel.querySelector("svg");
    if (!view) return;
    image.viewHeight = view.viewBox.baseVal.height;
    const follow = (event) => {
      const area = panel.getBoundingClientRect();
      const x = (event.clientX - area.left) / area.width * 1000, y = (event.clientY - area.top) / area.height * image.viewHeight;
      const i = image.boxes.findIndex((box) => box && x >= box[0] && x < box[2] && y >= box[1] && y < box[3]);
      if (i < 0) hide(section); else show(section, panel, i);
    };
    panel.addEventListener("pointermove", follow);
    panel.addEventListener("pointerdown", follow);
    panel.addEventListener("pointerleave", () => hide(section));
    panel.addEventListener("blur", () => hide(section));
    panel.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -image.side, ArrowDown: image.side }[event.key];
      if (event.key === "Escape") hide(section);
      if (!step) return;
      event.preventDefault();
      const at = section.dataset.at === undefined ? image.boxes.findIndex((box) => box) : Number(section.dataset.at) + step;
      if (image.boxes[at]) show(section, panel, at);
    });
  }

  document.querySelectorAll("section.image").forEach((section) => {
    section.querySelectorAll(".panel").forEach((panel) => attach(section, panel));
  });
  document.getElementById("help").hidden = false;
  if (slider) {
    slider.hidden = false;
    slider.addEventListener("submit", (event) => event.preventDefault());
    document.getElementById("keep").addEventListener("input", (event) => setBudget(Number(event.target.value)));
    document.getElementById("reset").addEventListener("click", () => setBudget(data.kept));
  }
})();
"""
