'use strict';
// Numbers in human units, elements, tables, heat maps. All text goes through textContent: what the server sends is
// never read as markup.

const MILLI = 1000;

function scaled(value, base, units) {
  let unit = 0;
  while (value >= base * 0.9995 && unit + 1 < units.length) {
    value /= base;
    unit += 1;
  }
  const digits = unit === 0 || value >= 99.95 ? 0 : value >= 9.995 ? 1 : 2;
  return value.toFixed(digits) + units[unit];
}
const count = (value) => value < 10000 ? String(Math.round(value)) : scaled(value, 1000, ['', 'k', 'M', 'G', 'T']);
const bytes = (value) => scaled(value, 1000, [' B', ' kB', ' MB', ' GB', ' TB', ' PB']);
const percent = (share) => share === null ? '–' : share >= 0.0995 ? `${(100 * share).toFixed(0)} %` : `${(100 * share).toFixed(1)} %`;
// Recall is read by what is missing from 1.
const recallText = (share) => share === null ? '–' : `${(100 * share).toFixed(1)} %`;
const two = (value) => String(value).padStart(2, '0');
function seconds(value) {
  if (value === null || !Number.isFinite(value)) return '–';
  if (value < 9.95) return `${value.toFixed(1)} s`;
  if (value < 60) return `${Math.round(value)} s`;
  const whole = Math.round(value);
  if (whole < 3600) return `${Math.floor(whole / 60)} min ${two(whole % 60)} s`;
  if (whole < 86400) return `${Math.floor(whole / 3600)} h ${two(Math.floor(whole % 3600 / 60))} min`;
  return `${Math.floor(whole / 86400)} d ${Math.floor(whole % 86400 / 3600)} h`;
}
const plural = (number, one, many) => `${count(number)} ${number === 1 ? one : many}`;

const byId = (id) => document.getElementById(id);
function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
}
// Touches the document only where something changed.
function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}
function setClass(node, name) {
  if (node.className !== name) node.className = name;
}
function setAttribute(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}
// The child of a role, made at the first call.
function part(parent, role, tag, name) {
  parent.parts = parent.parts || {};
  if (!parent.parts[role]) {
    parent.parts[role] = element(tag, name);
    parent.append(parent.parts[role]);
  }
  return parent.parts[role];
}
// Makes the children of `parent` those of `items`, in order; `make(item)` runs once a key, `update(child, item)` always.
function sync(parent, items, keyOf, make, update) {
  const before = parent.kept || new Map();
  const kept = new Map();
  let place = null;
  for (const item of items) {
    let key = keyOf(item);
    while (kept.has(key)) key += '+';
    const child = before.get(key) || make(item);
    before.delete(key);
    kept.set(key, child);
    const next = place === null ? parent.firstChild : place.nextSibling;
    if (next !== child) parent.insertBefore(child, next);
    update(child, item);
    place = child;
  }
  for (const child of before.values()) child.remove();
  parent.kept = kept;
}
function setNote(cell, text, note) {
  setText(part(cell, 'text', 'span'), text);
  setText(part(cell, 'note', 'span', 'sub'), note);
}
function setPill(cell, kind, text) {
  const pill = part(cell, 'pill', 'span');
  setClass(pill, `pill ${kind}`);
  setText(pill, text);
}
function setBar(cell, text, share, note, label) {
  setText(part(cell, 'text', 'span'), text);
  const bar = part(cell, 'bar', 'span', 'bar');
  const width = `${(100 * Math.min(1, Math.max(0, share || 0))).toFixed(1)}%`;
  const fill = part(bar, 'fill', 'i');
  if (fill.style.width !== width) fill.style.width = width;
  setAttribute(bar, 'role', 'progressbar');
  setAttribute(bar, 'aria-label', label);
  setAttribute(bar, 'aria-valuenow', String(Math.round(100 * (share || 0))));
  setText(part(cell, 'note', 'span', 'sub'), note);
}

// columns: {label, number, fill(cell, item)}; the first one names the row.
function showTable(section, title, note, columns, list, keyOf, empty) {
  if (!section.body) {
    const table = element('table');
    const caption = table.createCaption();
    caption.append(title, element('span'));
    const head = table.createTHead().insertRow();
    for (const column of columns) {
      const cell = element('th', column.number ? 'number' : '', column.label);
      cell.scope = 'col';
      head.append(cell);
    }
    section.body = table.createTBody();
    section.head = table.tHead;
    section.append(table);
  }
  setText(section.querySelector('caption span'), note);
  section.head.hidden = list.items.length === 0;
  sync(section.body, list.items, keyOf, () => {
    const row = element('tr');
    columns.forEach((column, index) => {
      const cell = element(index === 0 ? 'th' : 'td', column.number ? 'number' : '');
      if (index === 0) cell.scope = 'row';
      cell.dataset.label = column.label;
      row.append(cell);
      // On narrow screens a cell is a grid of its label and this.
      cell.inner = cell.appendChild(element('div'));
    });
    return row;
  }, (row, item) => columns.forEach((column, index) => column.fill(row.cells[index].inner, item)));
  const nothing = part(section, 'empty', 'p', 'empty');
  nothing.hidden = list.items.length > 0;
  setText(nothing, empty);
  const left = part(section, 'left_out', 'p', 'left_out');
  left.hidden = list.left_out === 0;
  setText(left, `${count(list.left_out)} more are not listed.`);
}

// Upper ends of the steps of density, and lower ends of those of recall.
const DENSITY_STEPS = [0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75];
const RECALL_STEPS = [0.999, 0.995, 0.99, 0.98, 0.97, 0.95, 0.93, 0.9, 0.85];
function stepOf(share, kind) {
  const at = kind === 'h' ? DENSITY_STEPS.findIndex((end) => share <= end) : RECALL_STEPS.findIndex((end) => share >= end);
  return kind + (at < 0 ? 9 : at);
}
function showLegends(parent) {
  if (parent.firstChild) return;
  for (const [kind, title, from, to] of [['h', 'Density: share of key blocks read', '1 %', '100 %'],
                                         ['r', 'Recall: attention mass kept', '100 %', 'under 85 %']]) {
    const legend = parent.appendChild(element('div', 'legend'));
    const ramp = element('span', 'ramp');
    for (let step = 0; step < 10; step += 1) ramp.append(element('i', kind + step));
    legend.append(element('span', '', title), element('span', '', from), ramp, element('span', '', to));
  }
}
// One row of a map: a cell a layer, those that are not known yet left blank.
function showCells(row, what, values, first, layers, kind) {
  const known = values.filter((share) => share !== null);
  const write = kind === 'h' ? percent : recallText;
  const mean = known.length ? known.reduce((sum, share) => sum + share, 0) / known.length : null;
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const cells = row.cells;
  while (cells.childElementCount < layers) cells.append(element('i'));
  while (cells.childElementCount > layers) cells.lastChild.remove();
  for (let layer = 0; layer < layers; layer += 1) {
    const share = layer < first ? null : values[layer - first] ?? null;
    const cell = cells.children[layer];
    setClass(cell, share === null ? '' : stepOf(share, kind));
    const title = share === null ? '' : `layer ${layer}: ${write(share)}`;
    if (cell.title !== title) cell.title = title;
  }
  setAttribute(cells, 'role', 'img');
  setAttribute(cells, 'aria-label', known.length === 0 ? `${what}: no layer yet`
    : `${what} by layer: mean ${write(mean)}, from ${write(low)} to ${write(high)}, ${known.length} of ${layers} layers`);
  setText(row.mean, write(mean));
}
function showRows(map, kind, title, names, rows, first, layers) {
  const lines = rows.length ? [{ key: 'what' }, ...rows.map((values, index) => ({ key: index, values })), { key: 'axis' }] : [];
  const list = part(map, kind, 'div', 'map');
  list.hidden = rows.length === 0;
  // A row is three grid cells, so that all rows of the map share their columns.
  const flat = lines.flatMap((line) => line.values ? ['row', 'cells', 'mean'].map((role) => ({ ...line, role })) : [line]);
  const row = {};
  sync(list, flat, (line) => `${line.key} ${line.role || ''}`, (line) => element('div', line.role || line.key), (child, line) => {
    if (line.key === 'what') setText(child, title);
    if (line.key === 'axis') {
      setText(part(child, 'from', 'span'), 'layer 0');
      setText(part(child, 'to', 'span'), `layer ${layers - 1}`);
    }
    if (!line.role) return;
    row[line.role] = child;
    if (line.role === 'row') setText(child, names[line.key]);
    if (line.role === 'mean') {
      showCells({ cells: row.cells, mean: child }, `${title}, ${names[line.key]}`, line.values, first, layers, kind);
    }
  });
}
// A line through the points with its area below, scaled to the largest; nothing where all are 0.
const SVG = 'http://www.w3.org/2000/svg';
function makeSparkline() {
  const svg = document.createElementNS(SVG, 'svg');
  svg.setAttribute('viewBox', '0 0 119 26');
  svg.setAttribute('preserveAspectRatio', 'none');
  svg.setAttribute('aria-hidden', 'true');
  for (const name of ['area', 'line']) svg.appendChild(document.createElementNS(SVG, 'path')).setAttribute('class', name);
  return svg;
}
function drawSparkline(svg, points) {
  const top = Math.max(...points);
  const first = 120 - points.length;
  const line = points.map((value, index) => `${first + index} ${(25 - 22 * value / top).toFixed(1)}`).join('L');
  const shown = top > 0 && points.length > 1;
  setAttribute(svg.firstChild, 'd', shown ? `M${first} 26L${line}L119 26Z` : '');
  setAttribute(svg.lastChild, 'd', shown ? `M${line}` : '');
}
