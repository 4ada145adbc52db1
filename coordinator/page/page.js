
// Asks for the state once a second and shows it.

const INTERVAL_MS = 1000;
const DEADLINE_MS = 2500;
const STALE_MS = 3500;
const POINTS = 120;
const LOST_S = 600;
const OPEN_MAPS = 4;

const past = {};  // of the tiles, the last POINTS values of each
const streams = new Map();  // of requests in flight, to tell how fast their KV goes
let answeredAt = null;  // on this machine's clock
let startedAt = performance.now();
let failure = '';
let timer = 0;

const keyOf = (item) => `${item.tenant || ''}/${item.id}`;

// Bytes a second of each request's KV, smoothed over a few answers.
function updateStreams(state) {
  const now = state.clock_ms / MILLI;
  const before = new Map(streams);
  streams.clear();
  for (const request of state.running.items) {
    const last = before.get(keyOf(request));
    const stream = { at: now, epoch: request.epoch, acked: request.bytes_acked, rate: null };
    if (last && last.epoch === request.epoch && now > last.at) {
      const rate = Math.max(0, request.bytes_acked - last.acked) / (now - last.at);
      stream.rate = last.rate === null ? rate : 0.6 * last.rate + 0.4 * rate;
    } else if (last) {
      Object.assign(stream, { at: last.at, rate: last.rate });
    }
    streams.set(keyOf(request), stream);
  }
}
const rateOf = (request) => (streams.get(keyOf(request)) || {}).rate ?? null;
const rateText = (rate) => rate === null ? '– B/s' : `${bytes(rate)}/s`;

function problemsOf(state) {
  const found = [];
  const named = (list) => list.slice(0, 4).map((item) => item.id).join(', ') + (list.length > 4 ? ' …' : '');
  const silent = state.workers.items.filter((worker) => worker.state === 'silent');
  if (silent.length) found.push(`${plural(state.workers_silent, 'worker is', 'workers are')} silent: ${named(silent)}`);
  const lost = state.lost_workers.items.filter((worker) => worker.ago_s < LOST_S);
  for (const worker of lost.slice(0, 3)) found.push(`Worker ${worker.id} left ${seconds(worker.ago_s)} ago: ${worker.why}`);
  const away = state.decode_nodes.items.filter((node) => !node.connected);
  if (away.length) found.push(`${plural(away.length, 'decode node is', 'decode nodes are')} away: ${named(away)}`);
  const stalled = state.running.items.filter((request) => request.decode_away);
  if (stalled.length) found.push(`Waiting for their decode node: ${named(stalled)}`);
  if (state.waiting.total > 0.8 * state.max_queue_requests) {
    found.push(`The queue holds ${count(state.waiting.total)} of ${count(state.max_queue_requests)} requests`);
  }
  const unplannable = state.waiting.items.find((request) => request.why);
  if (unplannable) found.push(`Request ${unplannable.id} cannot be planned: ${unplannable.why}`);
  return found;
}

function verdictOf(state, problems) {
  if (state.draining) return ['warn', 'Draining'];
  if (state.workers.total === 0) {
    return state.lost_workers.total ? ['bad', 'Not serving: no workers'] : ['busy', 'Waiting for workers'];
  }
  if (state.decode_nodes_connected === 0) {
    return state.decode_nodes.total ? ['bad', 'Not serving: no decode node'] : ['busy', 'Waiting for a decode node'];
  }
  return problems.length ? ['warn', 'Needs attention'] : ['ok', 'Healthy'];
}

function showTile(id, title, value, unit, note, point) {
  const tile = part(byId('tiles'), id, 'div', 'tile');
  tile.dataset.tile = id;
  setText(part(tile, 'title', 'h2'), title);
  const shown = part(tile, 'value', 'div', 'value');
  setText(part(shown, 'number', 'span'), value);
  setText(part(shown, 'unit', 'small'), unit ? ` ${unit}` : '');
  setText(part(tile, 'note', 'div', 'note'), note);
  const points = past[id] = (past[id] || []).concat(point).slice(-POINTS);
  if (!tile.line) tile.line = tile.appendChild(makeSparkline());
  drawSparkline(tile.line, points);
}

function showTiles(state) {
  const well = state.workers.total - state.workers_silent - state.workers_draining;
  const out = [...streams.values()].reduce((sum, stream) => sum + (stream.rate || 0), 0);
  const speed = state.running.items.reduce((sum, request) => sum + (request.tokens_per_second || 0), 0);
  const unacked = state.workers.items.reduce((sum, worker) => sum + worker.kv_unacked_bytes, 0);
  showTile('workers', 'Workers busy', count(state.workers_busy), `of ${count(state.workers.total)}`,
           state.workers.total === 0 ? 'none registered' : well === state.workers.total ? 'all well'
             : `${count(state.workers_silent)} silent, ${count(state.workers_draining)} draining`, state.workers_busy);
  showTile('running', 'In flight', count(state.running.total), '', `${count(state.running_tokens)} tokens`, state.running.total);
  showTile('waiting', 'Waiting', count(state.waiting.total), '',
           state.waiting.total ? `${count(state.waiting_tokens)} tokens, up to ${seconds(state.longest_wait_s)}` : 'the queue is empty',
           state.waiting.total);
  showTile('speed', 'Prefill rate', count(speed), 'tok/s', `${count(state.tokens_total)} tokens since start`, speed);
  showTile('egress', 'KV acknowledged', bytes(out), '/s', `${bytes(unacked)} on the way`, out);
  showTile('ended', 'Completed', count(state.completed_total), '',
           `${count(state.failed_total)} failed, ${count(state.retries_total)} retried`, state.completed_total);
}

function requestName(cell, request) {
  const more = [request.tenant && `tenant ${request.tenant}`, request.priority && `priority ${request.priority}`,
                request.epoch > 1 && `try ${request.epoch}`].filter(Boolean);
  setNote(cell, request.id, more.join(' · '));
}
const promptText = (cell, request) => setNote(cell, `${count(request.tokens)} tokens`, request.policy);

const RUNNING = [
  { label: 'Request', fill: requestName },
  { label: 'Prompt', fill: promptText },
  { label: 'Phase', fill: (cell, r) => {
    setPill(cell, r.phase === 'running' || r.phase === 'committing' ? 'busy' : r.phase === 'opening' ? '' : 'warn', r.phase);
    setText(part(cell, 'note', 'span', 'sub'), `${seconds(r.in_epoch_s)}, waited ${seconds(r.waited_s)}`);
  } },
  { label: 'Workers', fill: (cell, r) => {
    const all = r.ranks.map((rank) => rank.worker);
    setNote(cell, all.slice(0, 4).join(', ') + (all.length > 4 ? ` and ${count(all.length + r.ranks_left_out - 4)} more` : ''),
            r.strategy ? `group of ${all.length + r.ranks_left_out}, ${r.strategy}` : '');
  } },
  { label: 'Layers', fill: (cell, r) => setBar(cell, `${r.layers_done} of ${r.layers}`, r.layers_done / r.layers,
    r.resume_layer ? `from layer ${r.resume_layer}` : '', `layers of ${r.id}`) },
  { label: 'Rate', number: true, fill: (cell, r) => setNote(cell, `${count(r.tokens_per_second)} tok/s`,
    r.layers_done > r.resume_layer ? `density ${percent(r.density)}` : '') },
  { label: 'Time left', number: true, fill: (cell, r) => setNote(cell, r.eta_s === null ? '–' : seconds(r.eta_s),
    r.time_left_s === null ? '' : `deadline in ${seconds(Math.max(0, r.time_left_s))}`) },
  { label: 'KV stream', fill: (cell, r) => setBar(cell, `${bytes(r.bytes_acked)} of ${bytes(r.bytes_total)}`,
    r.bytes_total ? r.bytes_acked / r.bytes_total : 0, `${rateText(rateOf(r))} to ${r.decode_node}`, `KV of ${r.id}`) },
];
const WAITING = [
  { label: 'Request', fill: requestName },
  { label: 'Prompt', fill: promptText },
  { label: 'Waits', number: true, fill: (cell, r) => setNote(cell, seconds(r.waited_s),
    r.time_left_s === null ? '' : `deadline in ${seconds(Math.max(0, r.time_left_s))}`) },
  { label: 'For', fill: (cell, r) => setText(cell, r.why || (r.accepted ? 'free workers' : 'workers to register')) },
];
const WORKERS = [
  { label: 'Worker', fill: (cell, w) => setNote(cell, w.id, w.device) },
  { label: 'State', fill: (cell, w) => setPill(cell, { idle: 'ok', busy: 'busy', draining: 'warn', silent: 'bad' }[w.state] || '', w.state) },
  { label: 'Works on', fill: (cell, w) => {
    const works = w.works.map((work) => work.world_size > 1 ? `${work.id} (rank ${work.rank} of ${work.world_size})` : work.id);
    const more = w.requests - w.works.length;
    setNote(cell, works.length ? works.join(', ') + (more > 0 ? ` and ${count(more)} more` : '') : '–',
            works.length ? `${count(w.tokens)} tokens` : `idle for ${seconds(w.idle_s)}`);
  } },
  { label: 'Model', fill: (cell, w) => setText(cell, w.model) },
  { label: 'Memory', number: true, fill: (cell, w) => setNote(cell, bytes(w.budget_bytes), `weights ${bytes(w.weight_bytes)}`) },
  { label: 'KV on the way', number: true, fill: (cell, w) => setText(cell, bytes(w.kv_unacked_bytes)) },
  { label: 'Heard', number: true, fill: (cell, w) => setText(cell, `${seconds(w.heartbeat_age_s)} ago`) },
];
let sentTo = new Map();  // decode node -> {streams, rate}
const DECODE_NODES = [
  { label: 'Decode node', fill: (cell, n) => setNote(cell, n.id, `pool ${n.pool}`) },
  { label: 'State', fill: (cell, n) => setPill(cell, n.connected ? 'ok' : 'bad', n.connected ? 'connected' : 'away') },
  { label: 'Streams in', fill: (cell, n) => {
    const sent = sentTo.get(n.id) || { streams: 0, rate: 0 };
    setNote(cell, count(sent.streams), rateText(sent.rate));
  } },
  { label: 'Cache', fill: (cell, n) => setBar(cell, `${bytes(n.kv_bytes_used)} of ${bytes(n.kv_budget_bytes)}`,
    n.kv_bytes_used / n.kv_budget_bytes, plural(n.sessions, 'session', 'sessions'), `cache of ${n.id}`) },
  { label: 'Heard', number: true, fill: (cell, n) => setText(cell, `${seconds(n.heartbeat_age_s)} ago`) },
];
const ENDED = [
  { label: 'Request', fill: requestName },
  { label: 'Prompt', fill: promptText },
  { label: 'End', fill: (cell, r) => {
    setPill(cell, r.code === 'OK' ? 'ok' : r.code === 'CANCELLED' ? '' : 'bad', r.code === 'OK' ? 'completed' : r.reason || r.code);
    setText(part(cell, 'note', 'span', 'sub'), `${seconds(r.ago_s)} ago`);
  } },
  { label: 'Took', number: true, fill: (cell, r) => setNote(cell, seconds(r.total_s), `waited ${seconds(r.waited_s)}`) },
  { label: 'Rate', number: true, fill: (cell, r) => setNote(cell, r.code === 'OK' ? `${count(r.tokens_per_second)} tok/s` : '–',
    r.world_size ? plural(r.world_size, 'worker', 'workers') : '') },
  { label: 'Density', number: true, fill: (cell, r) => setNote(cell, r.code === 'OK' ? percent(r.density) : '–',
    r.recall === null ? '' : `recall ${recallText(r.recall)}`) },
  { label: 'KV', number: true, fill: (cell, r) => setNote(cell, r.code === 'OK' ? bytes(r.kv_bytes) : '–', r.decode_node) },
];

function showMaps(state) {
  const known = (request) => request.map.left_out || request.map.rows.some((row) => row.density.length);
  const running = state.running.items.filter(known).map((request) => ({ request, note: 'in flight' }));
  const ended = state.ended.items.filter(known).map((request) => ({ request, note: `ended ${seconds(request.ago_s)} ago` }));
  const all = running.concat(ended);
  byId('maps_empty').hidden = all.length > 0;
  byId('legends').hidden = all.length === 0;
  showLegends(byId('legends'));
  let open = 0;
  sync(byId('map_list'), all, (item) => `${keyOf(item.request)} ${item.request.epoch}`, () => {
    const made = element('details');
    made.append(element('summary'));
    made.open = open < OPEN_MAPS;
    return made;
  }, (details, { request, note }) => {
    const { map } = request;
    open += details.open ? 1 : 0;
    const summary = details.firstChild;
    setText(part(summary, 'id', 'b'), request.id);
    setText(part(summary, 'note', 'span'), `${request.policy} · ${count(request.tokens)} tokens · density ${percent(request.density)}` +
      (request.recall === null ? '' : ` · recall ${recallText(request.recall)}`) + ` · ${note}`);
    if (!details.open) return;
    const left = part(details, 'left_out', 'p', 'empty');
    left.hidden = !map.left_out;
    setText(left, 'This map is too large to be shown.');
    const layers = request.layers || map.first_layer + Math.max(0, ...map.rows.map((row) => row.density.length));
    const names = map.rows.map((row) => row.name);
    showRows(details, 'h', 'Density', names, map.rows.map((row) => row.density), map.first_layer, layers);
    const measured = map.rows.some((row) => row.recall.length);
    showRows(details, 'r', 'Recall', names, measured ? map.rows.map((row) => row.recall) : [], map.first_layer, layers);
  });
}

function showStart(state) {
  const ready = state.workers.total > 0 && state.decode_nodes.total > 0;
  byId('start').hidden = ready;
  if (ready) return;
  const steps = [[state.workers.total > 0, 'Workers', 'headwater-worker --coordinator=HOST:PORT --model=DIR'],
                 [state.decode_nodes.total > 0, 'A decode node', 'headwater-decode --coordinator=HOST:PORT --model=DIR'],
                 [state.completed_total + state.running.total > 0, 'Prompts', 'headwater submit, or any client of PrefillService']];
  sync(byId('steps'), steps, (step) => step[1], () => element('li'), (item, [done, what, how]) => {
    setClass(item, done ? 'done' : '');
    setText(part(item, 'what', 'span'), `${what}${done ? ': here' : ''} `);
    setText(part(item, 'how', 'code'), how);
  });
}

function render(state) {
  updateStreams(state);
  sentTo = new Map();
  for (const request of state.running.items) {
    const sent = sentTo.get(request.decode_node) || { streams: 0, rate: 0 };
    sentTo.set(request.decode_node, { streams: sent.streams + 1, rate: sent.rate + (rateOf(request) || 0) });
  }
  const problems = problemsOf(state);
  const [kind, text] = verdictOf(state, problems);
  setClass(byId('verdict'), `pill ${kind}`);
  setText(byId('verdict'), text);
  setText(byId('version'), `${state.version} · up ${seconds(state.uptime_s)}`);
  document.title = `${text} – Headwater`;
  byId('attention').hidden = problems.length === 0;
  sync(byId('attention').firstChild, problems, (problem) => problem, (problem) => element('li', '', problem), () => {});
  showStart(state);
  showTiles(state);
  showTable(byId('running'), 'In flight', plural(state.running.total, 'request', 'requests'), RUNNING, state.running, keyOf,
            'No request is in flight.');
  showTable(byId('waiting'), 'Waiting', 'the next first', WAITING, state.waiting, keyOf, 'No request waits.');
  showTable(byId('decode_nodes'), 'KV streams', 'into decode nodes', DECODE_NODES, state.decode_nodes, keyOf,
            'No decode node is registered.');
  showTable(byId('workers'), 'Workers', '', WORKERS, state.workers, keyOf, 'No worker is registered.');
  showMaps(state);
  showTable(byId('ended'), 'Ended', 'the last few', ENDED, state.ended, (item) => `${keyOf(item)} ${item.epoch}`, 'No request has ended yet.');
}

function showAge() {
  const age = performance.now() - (answeredAt ?? startedAt);
  const stale = age > STALE_MS;
  document.body.dataset.stale = String(stale);
  setText(byId('fresh'), answeredAt === null ? 'no answer yet' : stale ? '' : 'updated each second');
  byId('stale').hidden = !stale;
  if (!stale) return;
  const since = new Date(Date.now() - age).toLocaleTimeString([], { hourCycle: 'h23' });
  setText(byId('stale'), `Stale since ${since}: the coordinator does not answer${failure && ` (${failure})`}. ` +
    (answeredAt === null ? 'Nothing is known yet.' : 'What is shown is from then.'));
  setClass(byId('verdict'), 'pill bad');
  setText(byId('verdict'), 'Stale');
  document.title = 'Stale – Headwater';
}

async function poll() {
  clearTimeout(timer);
  if (document.hidden) return;
  try {
    const response = await fetch('state.json', { cache: 'no-store', signal: AbortSignal.timeout(DEADLINE_MS) });
    if (!response.ok) throw new Error(`status ${response.status}`);
    const state = await response.json();
    answeredAt = performance.now();
    failure = '';
    render(state);
  } catch (error) {
    failure = error.name === 'TimeoutError' ? `no answer in ${DEADLINE_MS / MILLI} s` : error.message;
  }
  showAge();
  clearTimeout(timer);
  timer = setTimeout(poll, INTERVAL_MS);
}

document.addEventListener('visibilitychange', () => {
  if (document.hidden) {
    clearTimeout(timer);
  } else {
    startedAt = performance.now();
    poll();
  }
});
poll();
