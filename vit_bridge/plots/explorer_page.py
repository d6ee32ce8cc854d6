"""The page of explorer.py: its HTML, style and script. Data, colours and title are put in where $NAME stands.

The script keeps one state: image, method, direction, layer, head, patch, depth of the ConvNet. Every control changes it
and calls show(), which draws all of it anew; nothing else is remembered.
"""





STYLE = """
:root { color-scheme: light dark; --line: #8886; --soft: #8881; --mark: #0072b2; --ink: #1a1a1a; --page: #fff; }
:root[data-theme=dark] { color-scheme: dark; --mark: #56b4e9; --ink: #eee; --page: #16181c; }
:root[data-theme=light] { color-scheme: light; }
@media (prefers-color-scheme: dark) { :root:not([data-theme=light]) { --mark: #56b4e9; --ink: #eee; --page: #16181c; } }
* { box-sizing: border-box; } [hidden] { display: none !important; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0 auto; padding: 1rem;
  max-width: 78rem; }
h1 { font-size: 1.5rem; line-height: 1.2; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 0 0 .4rem; }
h3 { font-size: 1rem; margin: 1.1rem 0 .3rem; }
h1, h2, #say, footer { overflow-wrap: anywhere; }
#say { border-left: 4px solid var(--mark); padding: .2rem 0 .2rem .8rem; min-height: 4.6em; margin: .6rem 0; }
#images { display: flex; flex-wrap: wrap; gap: .4rem; margin: .6rem 0; }
#images button { padding: 2px; border: 3px solid transparent; background: none; border-radius: 6px; cursor: pointer; }
#images button[aria-pressed=true] { border-color: var(--mark); }
#images img { width: 56px; height: 56px; object-fit: cover; display: block; image-rendering: pixelated; }
#controls { display: flex; flex-wrap: wrap; gap: .5rem 1rem; align-items: end; background: var(--soft); padding: .7rem;
  border-radius: 8px; }
#controls label { display: flex; flex-direction: column; font-size: .85rem; }
select, button, input { font: inherit; color: inherit; max-width: 100%; }
select, #controls button { min-height: 2.5rem; padding: .2rem .6rem; border-radius: 6px; border: 1px solid var(--line);
  background: var(--page); }
#panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem;
  margin-top: 1rem; }
article { min-width: 0; } canvas { display: block; max-width: 100%; }
canvas.view { width: 100%; max-width: 32rem; touch-action: manipulation; cursor: crosshair; border-radius: 4px; }
canvas:focus-visible, select:focus-visible, button:focus-visible, input:focus-visible { outline: 3px solid var(--mark);
  outline-offset: 2px; }
canvas.strip { cursor: pointer; }
.scroll { overflow-x: auto; background:
  linear-gradient(to right, var(--page) 30%, transparent) left / 3rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 30%, transparent) right / 3rem 100% no-repeat local,
  linear-gradient(to right, var(--line), transparent) left / 1rem 100% no-repeat scroll,
  linear-gradient(to left, var(--line), transparent) right / 1rem 100% no-repeat scroll; }
.scale { display: flex; align-items: center; gap: .5rem; font-size: .85rem; margin: .4rem 0; }
.scale canvas { width: 10rem; height: .8rem; border-radius: 3px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .6rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
footer, .note { font-size: .85rem; opacity: .85; }
kbd { border: 1px solid var(--line); border-radius: 4px; padding: 0 .3em; }
"""


BODY = """
<h1>$TITLE</h1>
<p id="say" role="status" aria-live="polite"></p>
<div id="images" role="group" aria-label="image"></div>
<div id="controls">
  <label>show <select id="method"></select></label>
  <label>of <select id="direction"><option value="from">where it looks</option>
    <option value="to">who looks at it</option></select></label>
  <label><span id="layername">layer</span> <select id="layer"></select></label>
  <label>head <select id="head"></select></label>
  <label id="ofconvnet" hidden>depth of the ConvNet <select id="depth"></select></label>
  <button id="reader" type="button">what the head reads</button>
  <label>strength <input id="opacity" type="range" min="0" max="100" value="75"></label>
  <button id="save" type="button">save as PNG</button>
  <button id="theme" type="button">light or dark</button>
</div>
<p class="note">Rows, columns, layers and heads count from 0. Point at a patch; click or tap to keep it, and again to
  let it go; or move with the arrow keys when an image has the focus. Keys:
  <kbd>c</kbd> what the head reads, <kbd>[</kbd> <kbd>]</kbd> layer (or depth of a ConvNet), <kbd>,</kbd> <kbd>.</kbd>
  head, <kbd>m</kbd> method, <kbd>d</kbd> direction, <kbd>n</kbd> next image, <kbd>s</kbd> save.</p>
<main id="panels"></main>
<footer><p>$NOTE</p></footer>
"""
SCRIPT = r"""
'use strict';
const DATA = JSON.parse(document.getElementById('data').textContent), COLOURS = $COLOURS;
const byId = id => document.getElementById(id);
const make = (tag, options = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), options);
  node.append(...children);
  return node;
};
const main = DATA.models[0], vits = DATA.models.filter(m => m.kind !== 'cnn');
const convnet = DATA.models.find(m => m.kind === 'cnn');
const [nLayers, nHeads] = ['layers', 'heads'].map(key => Math.max(...DATA.models.map(m => m[key])));
const state = {image: 0, method: 'attention', direction: 'from', layer: 0, head: -1, patch: -1, kept: false,
  depth: -1};  // of a ConvNet, where it has been chosen apart
const METHODS = {attention: 'attention', rollout: 'rollout', relevance: 'relevance'};
const percent = (value, digits = 1) => (100 * value).toFixed(digits) + '%';

// ---- Numbers: matrices are bytes, with a factor for each row.

function bytes(text) {
  const raw = atob(text), out = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
  return out;
}
const opened = new Map();
function matrices(model, image, key) {
  const name = model + '/' + image + '/' + key;
  if (!opened.has(name)) {
    const part = DATA.models[model].images[image][key];
    opened.set(name, {values: bytes(part.values), factors: new Float32Array(bytes(part.factors).buffer)});
  }
  return opened.get(name);
}
function entry(part, n, index, row, column) {
  return part.values[(index * n + row) * n + column] * part.factors[index * n + row];
}
// What is shown of a model: a value for each of its patches, and what goes to the tokens before them.
function shown(model, layer, head, patch) {
  const m = DATA.models[model], n = m.tokens, first = m.prefix, patches = n - first;
  const method = m.kind === 'cnn' ? 'attention' : state.method;
  const part = matrices(model, state.image, method);
  const heads = method !== 'attention' ? [0] : head < 0 ? [...Array(m.heads).keys()] : [head];
  const values = new Float64Array(patches);
  let before = 0;
  const asked = patch >= 0 ? [first + patch] : m.pool === 'cls' ? [0] : [...Array(patches).keys()].map(i => first + i);
  for (const h of heads) for (const token of asked) {
    const index = method === 'attention' ? layer * m.heads + h : 0, weight = 1 / heads.length / asked.length;
    for (let i = 0; i < n; i++) {
      const value = weight * (state.direction === 'from' ? entry(part, n, index, token, i)
                                                         : entry(part, n, index, i, token));
      if (i < first) before += value; else values[i - first] += value;
    }
  }
  return {values, before};
}
const layerOf = m => m.kind === 'cnn' && state.depth >= 0 ? state.depth : Math.min(m.layers - 1, state.layer);
const headOf = m => Math.min(m.heads - 1, state.head);
// The patch of another model at the same place of the image.
function placeIn(m) {
  if (state.patch < 0) return m.kind === 'cnn' ? Math.floor(m.rows / 2) * m.columns + Math.floor(m.columns / 2) : -1;
  const row = Math.floor(state.patch / main.columns), column = state.patch % main.columns;
  return Math.floor((row + .5) / main.rows * m.rows) * m.columns + Math.floor((column + .5) / main.columns * m.columns);
}

// ---- Drawing

function colour(value) {
  const c = COLOURS[Math.max(0, Math.min(COLOURS.length - 1, Math.round(value * (COLOURS.length - 1))))];
  return 'rgb(' + c.join(',') + ')';
}
const pictures = DATA.pictures.map(({pngs}) => pngs.map(src => Object.assign(new Image(), {src})));
const pictureOf = model => pictures[state.image][Math.min(model, pictures[state.image].length - 1)];  // one for all?
function drawView(canvas, image, m, values, most, patch) {
  const k = Math.max(1, Math.round(512 / image.naturalWidth));
  canvas.width = image.naturalWidth * k; canvas.height = image.naturalHeight * k;
  const pen = canvas.getContext('2d'), w = canvas.width / m.columns, h = canvas.height / m.rows;
  pen.imageSmoothingEnabled = k < 4;
  pen.filter = byId('opacity').value > 0 ? 'grayscale(1)' : 'none';
  pen.drawImage(image, 0, 0, canvas.width, canvas.height);
  pen.filter = 'none';
  pen.globalAlpha = byId('opacity').value / 100;
  values.forEach((value, i) => {
    pen.fillStyle = colour(most > 0 ? value / most : 0);
    pen.fillRect(i % m.columns * w, Math.floor(i / m.columns) * h, w + .5, h + .5);
  });
  pen.globalAlpha = .25; pen.strokeStyle = '#fff'; pen.lineWidth = 1;
  pen.beginPath();
  for (let i = 1; i < m.columns; i++) { pen.moveTo(i * w, 0); pen.lineTo(i * w, canvas.height); }
  for (let i = 1; i < m.rows; i++) { pen.moveTo(0, i * h); pen.lineTo(canvas.width, i * h); }
  pen.stroke(); pen.globalAlpha = 1;
  if (patch >= 0) {
    const x = patch % m.columns * w, y = Math.floor(patch / m.columns) * h;
    pen.lineWidth = 7; pen.strokeStyle = '#000'; pen.strokeRect(x, y, w, h);
    pen.lineWidth = 3; pen.strokeStyle = '#fff'; pen.strokeRect(x, y, w, h);
  }
}
function drawScale(canvas) {
  canvas.width = COLOURS.length; canvas.height = 1;
  const pen = canvas.getContext('2d');
  for (let i = 0; i < COLOURS.length; i++) {
    pen.fillStyle = colour(i / (COLOURS.length - 1));
    pen.fillRect(i, 0, 1, 1);
  }
}
const stripCell = m => Math.max(24, Math.min(56, Math.floor(420 / m.heads)));
function drawStrip(canvas, model) {
  const m = DATA.models[model], cell = stripCell(m), all = [];
  canvas.width = m.heads * cell; canvas.height = m.layers * cell;
  let most = 0;
  for (let l = 0; l < m.layers; l++) for (let h = 0; h < m.heads; h++) {
    const {values} = shown(model, l, h, placeIn(m));
    values.forEach(value => { most = Math.max(most, value); });
    all.push(values);
  }
  const pen = canvas.getContext('2d'), w = (cell - 3) / m.columns, h = (cell - 3) / m.rows;
  all.forEach((values, index) => {
    const x = index % m.heads * cell + 1, y = Math.floor(index / m.heads) * cell + 1;
    values.forEach((value, i) => {
      pen.fillStyle = colour(most > 0 ? value / most : 0);
      pen.fillRect(x + i % m.columns * w, y + Math.floor(i / m.columns) * h, w + .5, h + .5);
    });
    const here = Math.floor(index / m.heads) === layerOf(m) && (headOf(m) < 0 || index % m.heads === headOf(m));
    if (here) { pen.strokeStyle = '#e69f00'; pen.lineWidth = 2; pen.strokeRect(x, y, cell - 3, cell - 3); }
  });
}
const makeRow = (tag, texts) => make('tr', {}, ...texts.map(text => make(tag, {textContent: text})));
function drawLens(table, m, {classes, rows, says}) {
  const cnn = m.kind === 'cnn', first = depth => cnn ? ['answer'] : [depth, says[depth]];
  table.replaceChildren(
    make('thead', {}, makeRow('th', [...(cnn ? [''] : ['blocks passed', 'says']), ...classes])),
    make('tbody', {}, ...rows.map((row, depth) => makeRow('td', [...first(depth), ...row.map(p => percent(p, 0))]))));
}

// ---- Words

const placeName = (m, i) => 'row ' + Math.floor(i / m.columns) + ', column ' + i % m.columns;
function asker(m) {
  if (state.patch >= 0) return 'The patch in ' + placeName(m, state.patch);
  return m.pool === 'cls' ? 'CLS, the token that the head reads,' : 'What the head reads, the mean of the patches,';
}
function sentence(values, before) {
  const m = main, order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, 3);
  const number = value => state.method === 'relevance' ? value.toPrecision(3) : percent(value);
  const places = order.map(i => placeName(m, i) + ' (' + number(values[i]) + ')').join('; ');
  const looks = state.direction === 'from', who = asker(m);
  let text;
  if (state.method === 'attention') {
    const heads = state.head < 0 ? 'mean of ' + m.heads + ' heads' : 'head ' + headOf(m);
    text = who + (looks ? ' looks most at ' : ' is looked at most by ') + places + ', in layer ' + layerOf(m) + ', '
      + heads + '. ' + (looks ? percent(before) + ' of its attention goes to tokens that are no patch.'
                      : state.patch < 0 && m.pool !== 'cls'
                      ? 'Each value is what that patch gives to a patch, on average.'
                      : 'Each value is the part of that patch’s attention that goes here.');
  } else if (state.method === 'rollout') {
    text = who + (looks ? ' holds, by rollout, most of ' : ' has gone, by rollout, mostly into ') + places
      + '. Rollout multiplies the attention of all layers, each half residual.';
  } else {
    text = who + (looks ? ' holds most that speaks for “' : ' speaks most for “') + m.images[state.image].target + '” '
      + (looks ? 'from ' : 'in ') + places + '. Relevance weighs attention by the gradient of that class; its unit is '
      + 'arbitrary.';
  }
  return text;
}

// ---- The page

const panels = DATA.models.map((m, model) => {
  const view = make('canvas', {className: 'view', tabIndex: 0}), scale = make('canvas'), most = make('span');
  view.setAttribute('role', 'application');
  const strip = make('canvas', {className: 'strip'}), numbers = make('tbody'), lens = make('table'), title = make('h2');
  strip.setAttribute('role', 'img');
  strip.setAttribute('aria-label', m.kind === 'cnn' ? 'all depths, from the top; choose one above'
    : 'all layers (rows) and heads (columns); choose them with the controls above');
  drawScale(scale);
  const jump = make('div', {className: 'scroll'},
    make('h3', {textContent: m.kind === 'cnn' ? 'all depths' : 'all layers (down) and heads (across)'}), strip);
  const heading = m.kind === 'cnn' ? 'likeliest classes'
    : 'what the head would say after so many blocks (logit lens), and the likeliest classes at the end';
  const answers = make('div', {hidden: !m.images[0].lens.classes.length}, make('h3', {textContent: heading}),
    make('div', {className: 'scroll'}, lens));
  const article = make('article', {}, title, view, make('div', {className: 'scale'}, '0', scale, most), jump, answers,
    make('details', {}, make('summary', {textContent: 'the twelve largest values'}), make('table', {}, make('thead', {},
      makeRow('th', ['patch', 'value'])), numbers)));
  byId('panels').append(article);
  const pick = event => {
    const box = view.getBoundingClientRect();
    const column = Math.floor((event.clientX - box.left) / box.width * main.columns);
    const row = Math.floor((event.clientY - box.top) / box.height * main.rows);
    const inside = row >= 0 && row < main.rows && column >= 0 && column < main.columns;
    return inside ? row * main.columns + column : -1;
  };
  view.addEventListener('click', event => {
    const patch = pick(event);
    change(state.kept && patch === state.patch ? {patch: -1, kept: false} : {patch, kept: patch >= 0});
  });
  view.addEventListener('pointermove', event => {
    const patch = pick(event);
    if (event.pointerType === 'mouse' && !state.kept && patch !== state.patch) change({patch});
  });
  view.addEventListener('pointerleave', event => {
    if (event.pointerType === 'mouse' && !state.kept && state.patch >= 0) change({patch: -1});
  });
  strip.addEventListener('click', event => {
    const box = strip.getBoundingClientRect(), cell = box.width / m.heads;
    const layer = Math.floor((event.clientY - box.top) / cell);
    if (m.kind === 'cnn') change({depth: layer});
    else change({layer, head: Math.floor((event.clientX - box.left) / cell), method: 'attention'});
  });
  return {m, model, view, most, jump, strip, numbers, lens, title};
});

function show() {
  const all = panels.map(({m, model}) => shown(model, layerOf(m), headOf(m), placeIn(m)));
  const most = panels.map(({m}, i) => Math.max(...all[i].values));
  const attending = most.filter((value, i) => panels[i].m.kind !== 'cnn');
  panels.forEach(({m, model, view, most: label, jump, strip, numbers, lens, title}, i) => {
    const own = m.images[state.image], values = all[i].values, cnn = m.kind === 'cnn';
    const top = cnn || state.method === 'relevance' ? most[i] : Math.max(...attending);
    const middle = state.patch < 0 ? 'in the middle (' + placeName(m, placeIn(m)) + '; the head reads all)' : '';
    const place = cnn ? (state.direction === 'from' ? 'what the unit ' + (middle || 'at this place') + ' sees'
                        : 'which units see the place ' + (middle || 'chosen')) + ', after ' + m.depths[layerOf(m)]
      : state.method !== 'attention' ? METHODS[state.method]
      : 'layer ' + layerOf(m) + (headOf(m) < 0 ? ', mean of ' + m.heads + ' heads' : ', head ' + headOf(m));
    title.textContent = [m.name, own.prediction, place].filter(text => text).join('; ');
    drawView(view, pictureOf(model), m, values, top, placeIn(m));
    label.textContent = state.method === 'relevance' && !cnn ? top.toPrecision(3) : percent(top)
      + (cnn ? ' of a unit’s gradient' : '');
    view.setAttribute('aria-label', m.name + ', ' + DATA.pictures[state.image].name + '. Arrow keys choose a patch.');
    jump.hidden = !cnn && state.method !== 'attention';
    if (!jump.hidden) drawStrip(strip, model);
    drawLens(lens, m, own.lens);
    const order = [...values.keys()].sort((a, b) => values[b] - values[a]).slice(0, 12);
    numbers.replaceChildren(...order.map(k => makeRow('td', [placeName(m, k), values[k].toPrecision(3)])));
  });
  byId('say').textContent = sentence(all[0].values, all[0].before);
  byId('method').value = state.method; byId('direction').value = state.direction;
  for (const id of ['layer', 'head', 'depth']) byId(id).value = String(state[id]);
  for (const id of ['layer', 'head']) byId(id).disabled = state.method !== 'attention';
  [...byId('images').children].forEach((button, i) => button.setAttribute('aria-pressed', String(i === state.image)));
}
function change(part) {
  Object.assign(state, part);
  show();
}
const within = (value, least, most) => Math.max(least, Math.min(most, value));
const stepHead = by => change({head: within(state.head + by, -1, nHeads - 1)});
function stepLayer(by) {
  if (state.method === 'attention') change({layer: within(state.layer + by, 0, nLayers - 1), depth: -1});
  else if (convnet) change({depth: within(layerOf(convnet) + by, 0, convnet.layers - 1)});
}

const option = (value, text) => make('option', {value: String(value), textContent: text});
const methods = Object.keys(METHODS).filter(key => DATA.models.every(m => m.kind === 'cnn' || m.images[0][key]));
methods.forEach(key => byId('method').append(option(key, METHODS[key])));
for (let l = 0; l < nLayers; l++) byId('layer').append(option(l, l + ' (of 0 to ' + (nLayers - 1) + ')'));
byId('head').append(option(-1, 'mean of ' + (vits.every(m => m.heads === nHeads) ? nHeads : 'all')));
for (let h = 0; h < nHeads; h++) byId('head').append(option(h, h));
byId('ofconvnet').hidden = !convnet;
byId('depth').append(option(-1, 'as the layer'), ...(convnet ? convnet.depths : []).map((name, l) => option(l, name)));
DATA.pictures.forEach((picture, i) => {
  const face = make('img', {src: picture.pngs[0], alt: picture.name});
  const button = make('button', {type: 'button', title: picture.name}, face);
  button.addEventListener('click', () => change({image: i}));
  byId('images').append(button);
});
byId('method').addEventListener('change', event => change({method: event.target.value}));
byId('direction').addEventListener('change', event => change({direction: event.target.value}));
byId('layer').addEventListener('change', event => change({layer: Number(event.target.value), depth: -1}));
byId('head').addEventListener('change', event => change({head: Number(event.target.value)}));
byId('depth').addEventListener('change', event => change({depth: Number(event.target.value)}));
byId('reader').addEventListener('click', () => change({patch: -1, kept: false}));
byId('opacity').addEventListener('input', show);
byId('theme').addEventListener('click', () => {
  const root = document.documentElement, dark = matchMedia('(prefers-color-scheme: dark)').matches;
  root.dataset.theme = (root.dataset.theme || (dark ? 'dark' : 'light')) === 'dark' ? 'light' : 'dark';
});
function save() {
  const views = panels.map(panel => panel.view), height = Math.max(...views.map(view => view.height));
  const out = make('canvas', {width: views.reduce((sum, view) => sum + view.width + 16, 16)});
  const pen = out.getContext('2d'), font = '15px sans-serif';
  pen.font = font;
  const words = byId('say').textContent.split(' '), lines = [''];
  words.forEach(word => {
    if (pen.measureText(lines[lines.length - 1] + ' ' + word).width > out.width - 32) lines.push('');
    lines[lines.length - 1] += ' ' + word;
  });
  out.height = height + 54 + 20 * lines.length;  // which also sets the pen back
  pen.fillStyle = '#fff'; pen.fillRect(0, 0, out.width, out.height);
  pen.fillStyle = '#000'; pen.font = font;
  let x = 16;
  panels.forEach(panel => {
    pen.fillText(panel.title.textContent, x, 24, panel.view.width);
    pen.drawImage(panel.view, x, 36);
    x += panel.view.width + 16;
  });
  lines.forEach((line, i) => pen.fillText(line.trim(), 16, height + 58 + 20 * i));
  make('a', {href: out.toDataURL('image/png'), download: 'attention.png'}).click();
}
byId('save').addEventListener('click', save);
document.addEventListener('keydown', event => {
  // Brackets are typed with AltGr on many keyboards, which Windows sends as Ctrl and Alt, and with Option on a Mac.
  const typed = event.getModifierState('AltGraph') || event.altKey && '[]'.includes(event.key);
  if (!typed && (event.ctrlKey || event.metaKey || event.altKey)) return;
  if (['SELECT', 'INPUT'].includes(event.target.tagName)) return;
  const moves = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -main.columns, ArrowDown: main.columns};
  if (event.key in moves && event.target.tagName === 'CANVAS') {
    const from = state.patch < 0 ? Math.floor(main.rows / 2) * main.columns + Math.floor(main.columns / 2)
      : state.patch, to = from + moves[event.key];
    const stays = event.key === 'ArrowLeft' ? from % main.columns > 0 : event.key === 'ArrowRight'
      ? to % main.columns > 0 : to >= 0 && to < main.rows * main.columns;
    change({patch: state.patch < 0 ? from : stays ? to : from, kept: true});
    event.preventDefault();
  } else if (event.key === 'c') change({patch: -1, kept: false});
  else if (event.key === '[') stepLayer(-1);
  else if (event.key === ']') stepLayer(1);
  else if (',.'.includes(event.key) && state.method === 'attention') stepHead(event.key === ',' ? -1 : 1);
  else if (event.key === 'm') change({method: methods[(methods.indexOf(state.method) + 1) % methods.length]});
  else if (event.key === 'd') change({direction: state.direction === 'from' ? 'to' : 'from'});
  else if (event.key === 'n') change({image: (state.image + 1) % DATA.pictures.length});
  else if (event.key === 's') save();
});
Promise.all(pictures.flat().map(image => image.decode())).then(() => change({layer: nLayers - 1}));
"""
PAGE = ("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$TITLE</title>
<style>""" + STYLE + """</style>
<body>""" + BODY + """<script id="data" type="application/json">$DATA</script>
<script>""" + SCRIPT + """</script>
</body>
</html>
""")
