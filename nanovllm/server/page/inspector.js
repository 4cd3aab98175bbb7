// The inspector: what the engine does, live from /admin/inspector or step by step from a file. Nothing of it costs anything
// while no page asks. A film is frames (`observability/film.py` says what is in one); every view is drawn from the frames up
// to the one that is shown, so that going back is drawing again. Ids and counts only, and all of them as text.

"use strict";

const TEXT = {  // name: [English, Chinese]
  inspector: ["inspector", "观察页"], key: ["Admin key", "管理密钥"], live: ["Watch live", "实时观察"], recent: ["Last steps", "最近的步"], open: ["Open a file", "打开文件"],
  language: ["中文", "English"], languageLabel: ["中文: switch to Chinese", "English: 切换到英文"], theme: ["Colours", "颜色"], steps: ["Steps", "步"],
  first: ["First step", "第一步"], back: ["One step back", "后退一步"], play: ["Play or pause", "播放或暂停"], next: ["One step on", "前进一步"], last: ["Last step", "最后一步"],
  place: ["Place in the film", "位置"], speed: ["Steps per second", "每秒步数"], step: ["Step", "步"], queue: ["Queue, by reason", "队列（按原因）"], running: ["Running", "运行中"],
  sequence: ["sequence", "序列"], row: ["row", "行"], progress: ["cached | computed | known", "命中 | 已算 | 已知"], chunk: ["this step", "本步"], blocks: ["blocks", "块"],
  kv: ["KV blocks", "KV 块"], roofline: ["Roofline", "屋顶线"], hardware: ["Roof of", "硬件"], thisDevice: ["this device", "本设备"], requests: ["Requests", "请求"], latency: ["Latency", "延迟"],
  waits: ["waits", "等待"], prompt: ["prompt", "提示"], decode: ["decode", "解码"], preempted: ["preempted", "被抢占"], noData: ["not in this file", "此文件中没有"], nobody: ["nobody waits", "无人等待"],
  waiting: ["waiting", "等待"], tokens: ["tokens in step", "本步词元"], ms: ["forward, ms", "前向，毫秒"], rate: ["output tokens/s", "输出词元/秒"], free: ["free blocks", "空闲块"],
  hits: ["prefix hits", "前缀命中"], preemptions: ["preemptions", "抢占"], evictions: ["evictions", "逐出"],
  why_rows: ["all rows are taken (max_num_seqs)", "行已用完（max_num_seqs）"], why_blocks: ["too few free blocks", "空闲块不够"], why_next: ["looked at in the next step", "下一步再看"],
  why_behind: ["behind the first: nobody overtakes", "排在队首之后：不能超车"], why_token: ["a token of it is in flight", "有一个词元在途"], why_sibling: ["shares its sibling's prompt, once computed", "等兄弟序列算完提示"],
  why_door: ["at the server's door", "在服务器门口"], budget: ["budget {n}: {used} used, {left} left", "预算 {n}：用 {used}，剩 {left}"], promptTokens: ["prompt tokens", "提示词元"], draws: ["sequences that draw", "抽样的序列"],
  forward: ["ms: forward, host", "毫秒：前向、主机"], stepTitle: ["step {n}: {p} prompt tokens, {d} draw, {ms} ms", "第 {n} 步：{p} 提示词元，{d} 抽样，{ms} 毫秒"],
  blank: ["blank", "空白"], cached: ["free, cached", "空闲，有缓存"], private: ["held", "占用"], held: ["held, findable", "占用，可查找"], shared: ["shared, with its number of holders", "共享（数字为持有者数）"], lost: ["content evicted in this step", "本步内容被逐出"],
  blockText: ["block {i}: {state}; {who}", "块 {i}：{state}；{who}"], heldBy: ["in the table of {who}", "在 {who} 的块表中"], noTable: ["in no table", "不在任何块表中"], clipped: ["The map shows the first {n} of {all} blocks.", "图中为 {all} 块中的前 {n} 块。"],
  reached: ["{b} GB/s, {bp} % of the roof's; {f} GFLOP/s, {fp} %. {x} operations per byte; the ridge is at {r}.", "{b} GB/s，屋顶的 {bp} %；{f} GFLOP/s，{fp} %。每字节 {x} 次运算；脊点 {r}。"],
  noSpec: ["The shape of the model is not known here.", "此处不知模型形状。"], where: ["step {n} · {s} s", "第 {n} 步 · {s} 秒"], liveSource: ["live: {model}, {device}", "实时：{model}，{device}"],
  needsKey: ["This needs the server's admin key.", "需要服务器的管理密钥。"], wrongKey: ["The server refused the key: it must be an admin key.", "服务器拒绝了密钥：须为管理密钥。"], failed: ["The server answered {status}: {why}", "服务器返回 {status}：{why}"],
  gone: ["The server cannot be reached: {why}", "无法连接服务器：{why}"], notAFilm: ["This is neither a flight record, nor a film, nor a lifecycle file.", "既不是飞行记录，也不是影片或生命周期文件。"],
  hint: ["Watch the engine live with the admin key, or open a file: a flight record, a film of `nanovllm replay --film`, or a lifecycle file.", "用管理密钥实时观察引擎，或打开文件：飞行记录、`nanovllm replay --film` 的影片，或生命周期文件。"],
};
const PERIOD_MS = 500, MAX_FRAMES = 1200, NUM_STRIPS = 120, NUM_REQUESTS = 16;
const $ = (id) => document.getElementById(id);
const recall = (store, name) => { try { return window[store].getItem(`nanovllm.${name}`); } catch { return null; } };
const remember = (store, name, value) => { try { window[store].setItem(`nanovllm.${name}`, value); } catch { /* not remembered */ } };
let language = recall("localStorage", "language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let theme = recall("localStorage", "theme") || "auto";
const say = (name, values = {}) => TEXT[name][language === "zh" ? 1 : 0].replace(/\{(\w+)\}/g, (_, key) => values[key]);

function make(tag, attributes = {}, ...children) {
  const isHtml = /^(li|b|span|dt|dd|div|small|tr|td|button|option|p)$/.test(tag);
  const node = isHtml ? document.createElement(tag) : document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
const title = (text) => make("title", {}, text);
const rect = (x, y, width, height, kind, ...children) => make("rect", { x, y, width: Math.max(0, width), height: Math.max(0, height), class: kind }, ...children);
const label = (x, y, text, more = {}) => make("text", { x, y, ...more }, text);
const show = (value) => value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);

// --- the film: frames, and what they tell of steps and sequences

let film;
function begin(facts, source, isLive = false) {
  film = { facts, source, isLive, frames: [], steps: [], sequences: new Map(), rows: new Map(), flying: new Map(), preempted: [], tokens: [], place: -1, chosen: null, start: Infinity };
  $("hardware").replaceChildren(...Object.keys(facts.hardware || {}).map((name) => name === "this device" ? make("option", { value: name, "data-text": "thisDevice" }, say("thisDevice")) : make("option", {}, name)));
  const device = (facts.device || "").toLowerCase();
  $("hardware").value = Object.keys(facts.hardware || {}).find((name) => name === "this device" || device.includes(name)) || "cpu";
}

const READ = {
  add([, time, name, births]) {
    for (const one of births) film.sequences.set(one.seq_id, { id: one.seq_id, name, prompt: one.num_prompt_tokens, added: time, early: !film.frames.length, admits: [], preempts: [], chunks: [], tokens: [], cached: 0 });
  },
  admit([, time, id, , cached, row]) {
    film.rows.set(row, id);
    const one = film.sequences.get(id);
    if (one) { one.admits.push(time); if (one.admits.length === 1) one.cached = cached; }
  },
  preempt([, time, id]) { film.preempted.push(time); film.sequences.get(id)?.preempts.push(time); },
  finish([, time, id, reason]) { const one = film.sequences.get(id); if (one) Object.assign(one, { ended: time, reason }); },
  step([, time, number, rows, starts, lengths, sampled, , , , schedule, bytes, operations]) {
    const step = { number, time, chunks: [], prompts: 0, draws: sampled.length, host: schedule * 1e-6, bytes, operations, frame: film.frames.length };
    rows.forEach((row, i) => {
      const one = film.sequences.get(film.rows.get(row));
      const isPrompt = lengths[i] > 1 || starts[i] < (one?.prompt ?? 0);
      const chunk = { one, row, start: starts[i], length: lengths[i], isPrompt, time, end: null };
      if (isPrompt) step.prompts += lengths[i];
      step.chunks.push(chunk);
      one?.chunks.push(chunk);
    });
    step.drawing = sampled.map((i) => step.chunks[i].one);
    film.steps.push(step);
    film.flying.set(number, step);
  },
  result([, time, number, numNew, forward, apply]) {
    const step = film.flying.get(number);
    if (!step) return;
    film.flying.delete(number);
    Object.assign(step, { end: time, forward: forward * 1e-6, host: step.host + apply * 1e-6 });
    for (const chunk of step.chunks) chunk.end = time;
    for (const one of step.drawing) {
      if (!one || one.closed) continue;
      one.tokens.push(time);
      film.tokens.push(time);
      one.closed = one.ended !== undefined;
    }
  },
};

function addFrame(frame) {
  const before = film.frames.at(-1);
  let time = Math.max(before?.time ?? -Infinity, frame.time ?? -Infinity);
  for (const entry of frame.entries) {
    READ[entry[0]]?.(entry);
    if (typeof entry[1] !== "number") continue;
    time = Math.max(time, entry[1]);
    film.start = Math.min(film.start, entry[1]);
  }
  const state = frame.state;
  if (state) {
    state.codes = state.blocks ? Uint8Array.from(state.blocks, (code) => parseInt(code, 36)) : before.state.codes;
    if (state.changed?.length) {
      state.codes = state.codes.slice();
      for (const [place, code] of state.changed) state.codes[place] = parseInt(code, 36);
    }
    const tables = new Map(before?.state?.running.map((one) => [one[0], one[5]]));
    for (const one of state.running) one[5] ??= tables.get(one[0]) ?? [];
  }
  film.frames.push({ time, state, door: frame.door, numSteps: film.steps.length });
}

function forget() {  // live: the oldest frames and steps, and sequences that ended before them
  if (film.frames.length <= MAX_FRAMES) return;
  const cut = MAX_FRAMES / 4, steps = film.frames[cut - 1].numSteps, time = film.frames[cut].time;
  film.frames.splice(0, cut);
  film.steps.splice(0, steps);
  for (const frame of film.frames) frame.numSteps -= steps;
  for (const step of film.steps) step.frame = Math.max(0, step.frame - cut);
  for (const [id, one] of film.sequences) if (one.ended < time) film.sequences.delete(id);
  for (const name of ["tokens", "preempted"]) film[name] = film[name].filter((moment) => moment >= time);
  film.place = Math.max(0, film.place - cut);
}

function openLifecycle(lines, source) {
  const requests = new Map();
  for (const { request_id: id, stage, timestamp_ms: ms, metadata } of lines) {
    if (!requests.has(id)) requests.set(id, { times: {} });
    const request = requests.get(id);
    request.times[stage] = ms / 1000;
    Object.assign(request, metadata);
  }
  begin({}, source);
  const moments = new Set();
  [...requests].forEach(([name, request], id) => {
    const { times, times: { received: added, scheduled, prefill_done: prompted, first_token: first, decode_done: ended } } = request;
    Object.values(times).forEach((time) => { moments.add(time); film.start = Math.min(film.start, time); });
    const chunks = [[scheduled, prompted, true], [first, ended, false]].filter(([start, end]) => start && end);
    film.sequences.set(id, {
      id, name, added, ended, prompt: request.prompt_len, cached: request.cached_len, reason: request.finish_reasons?.[0], admits: scheduled ? [scheduled] : [], preempts: [],
      chunks: chunks.map(([time, end, isPrompt]) => ({ time, end, isPrompt })), tokens: first ? [first] : [], tpot: request.tpot_ms / 1000,
    });
  });
  for (const time of [...moments].sort((a, b) => a - b)) film.frames.push({ time, state: null, numSteps: 0 });
}

// --- sources

function complain(text) { $("notice").textContent = text; $("notice").hidden = !text; }

async function ask(path, options = {}) {
  const key = $("key").value;
  if (!key) { $("key").focus(); complain(say("needsKey")); return null; }
  let reply, body;
  try {
    reply = await fetch(path, { ...options, headers: { authorization: `Bearer ${key}` } });
    body = await reply.json();
  } catch (error) { complain(say("gone", { why: error.message })); return null; }
  if (reply.ok) { complain(""); remember("sessionStorage", "adminKey", key); return body; }
  complain(reply.status === 401 || reply.status === 403 ? say("wrongKey") : say("failed", { status: reply.status, why: body.error?.message }));
  return null;
}

let watching = 0, cursor = null, follows = true, player = 0;
async function watch() {
  const mine = ++watching;
  cursor = null;
  while (mine === watching) {
    const news = document.hidden && cursor !== null ? undefined : await ask(cursor === null ? "admin/inspector" : `admin/inspector?after=${cursor}`);
    if (mine !== watching) return;
    if (news === null) return stopWatching();
    if (news) {
      if (news.facts) { begin(news.facts, say("liveSource", news.facts), true); follows = true; }
      cursor = news.cursor;
      addFrame(news);
      forget();
      goTo(follows ? film.frames.length - 1 : film.place, follows);
    }
    await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  }
}
function stopWatching() { watching++; if (film) film.isLive = false; $("source").classList.remove("on"); }

function openFilm(made, source) {
  begin(made.facts, `${source} · ${made.report}`);
  made.frames.forEach(addFrame);
}

async function openText(text, name) {
  stopWatching();
  let content = null;
  try { content = JSON.parse(text); } catch { /* lines, perhaps */ }
  try {
    if (content?.keyframe) content = await ask("admin/inspector/film", { method: "POST", body: text });
    else if (!content?.film) content = text.trim().split("\n").map((line) => JSON.parse(line));
    if (content === null) return;
    if (content.film) openFilm(content, name);
    else if (content[0]?.stage) openLifecycle(content, name);
    else throw new Error("no stages");
    complain("");
    goTo(0, false);
  } catch { complain(say("notAFilm")); }
}

async function openRecent() {
  stopWatching();
  const made = await ask("admin/inspector/film", { method: "POST" });
  if (made) { openFilm(made, say("recent")); goTo(film.frames.length - 1, false); }
}

// --- where we are

function goTo(place, follow) {
  if (!film?.frames.length) return;
  film.place = Math.max(0, Math.min(place, film.frames.length - 1));
  follows = follow;
  draw();
}
function go(by) { pause(); if (film) goTo(film.place + by, false); }
function pause() { clearInterval(player); player = 0; $("play").textContent = "▶"; }
function play() {
  if (player || !film) return pause();
  if (film.place === film.frames.length - 1) film.place = 0;
  $("play").textContent = "❙❙";
  player = setInterval(() => film.place < film.frames.length - 1 ? goTo(film.place + 1, false) : pause(), Number($("speed").value));
}

// --- the views

function draw() {
  const frame = film.frames[film.place], steps = film.steps.slice(0, frame.numSteps), step = steps.at(-1);
  const view = { frame, state: frame.state, steps, step, now: frame.time, isHere: (time) => time <= frame.time };
  $("source").textContent = $("source").title = film.source;
  $("source").classList.toggle("on", film.isLive);
  Object.assign($("place"), { max: film.frames.length - 1, value: film.place });
  $("where").textContent = say("where", { n: step?.number ?? "–", s: Math.max(0, frame.time - film.start).toFixed(2) });
  for (const one of [drawNumbers, drawBudget, drawStrips, drawQueue, drawBatch, drawMap, drawTimeline, drawHistograms, drawRoof]) one(view);
}

function drawNumbers({ state, step, now, isHere }) {
  const recent = film.tokens.filter((time) => isHere(time) && time > now - 3).length / Math.min(3, Math.max(0.5, now - film.start));
  const numbers = state ? {
    running: state.running.length, waiting: Object.values(state.reasons).reduce((a, b) => a + b, 0), tokens: step ? step.chunks.reduce((sum, one) => sum + one.length, 0) : 0,
    ms: step?.forward ? step.forward.toFixed(1) : "–", rate: recent.toFixed(0), free: [state.free, ` / ${film.facts.num_blocks}`],
    hits: state.queried ? `${Math.round(100 * state.hit / state.queried)} %` : "–", preemptions: film.preempted.filter(isHere).length, evictions: state.evictions,
  } : {};
  $("numbers").replaceChildren(...Object.entries(numbers).map(([name, value]) => make("div", {}, make("dt", {}, say(name)), make("dd", {}, ...(Array.isArray(value) ? [value[0], make("small", {}, value[1])] : [value])))));
}

const plot = (id, height, name, ...nodes) => $(id).replaceChildren(make("svg", { height, role: "img", "aria-label": name }, ...nodes));
const widthOf = (id) => $(id).clientWidth || 600;

function drawBudget({ state, step }) {
  const width = widthOf("budget");
  if (!state || !step) return $("budget").replaceChildren(state ? "" : say("noData"));
  const budget = state.limits.max_num_batched_tokens, used = step.chunks.reduce((sum, one) => sum + one.length, 0);
  let x = 0;
  const bars = step.chunks.map((one) => {
    const size = width * one.length / budget, gap = size > 3 ? 1 : 0;
    const bar = rect(x, 18, size - gap, 20, one.isPrompt ? "prompt" : "decode", title(`#${one.one?.id ?? "?"} [${one.start}, ${one.start + one.length})`));
    x += size;
    return bar;
  });
  const text = say("budget", { n: budget, used, left: budget - used });
  plot("budget", 46, text, label(0, 11, text, { class: "strong" }), rect(0.5, 18, width - 1, 20, "blank"), ...bars);
}

function drawStrips({ state, steps }) {
  const width = widthOf("strips"), shown = steps.slice(-NUM_STRIPS), size = width / NUM_STRIPS;
  if (!state) return $("strips").replaceChildren();
  const most = Math.max(1, ...shown.map((step) => (step.forward ?? 0) + step.host));
  const strips = [
    ["promptTokens", state.limits.max_num_batched_tokens, (step) => [["prompt", step.prompts]]],
    ["draws", state.limits.max_num_seqs, (step) => [["decode", step.draws]]],
    ["forward", most, (step) => [["cached", step.forward ?? 0], ["wait", step.host]]],
  ];
  const nodes = strips.flatMap(([name, top, parts], i) => {
    const base = 76 * i + 72;
    const bars = shown.flatMap((step, place) => {
      let y = base;
      return parts(step).map(([kind, value]) => { const tall = 54 * value / top; y -= tall; return rect(place * size, y, size - 1, tall, kind); });
    });
    return [label(0, base - 60, say(name)), label(width, base - 60, show(top).replace(/\.0+$/, ""), { "text-anchor": "end" }), make("path", { d: `M0 ${base + 0.5}H${width}`, class: "axis" }), ...bars];
  });
  const columns = shown.map((step, place) => {
    const column = rect(place * size, 0, size, 226, "hit", title(say("stepTitle", { n: step.number, p: step.prompts, d: step.draws, ms: step.forward?.toFixed(1) ?? "–" })));
    column.addEventListener("click", () => { pause(); goTo(step.frame, false); });
    return column;
  });
  plot("strips", 226, say("steps"), ...nodes, rect((shown.length - 1) * size, 0, size, 226, "cursor"), ...columns);
}

function drawQueue({ frame, state, now, isHere }) {
  const counts = Object.entries(state?.reasons || {});
  if (frame.door) counts.push(["door", frame.door]);
  const items = counts.map(([reason, count]) => make("li", {}, make("b", {}, String(count)), say(`why_${reason}`)));
  $("reasons").replaceChildren(...(items.length ? items : [make("li", {}, say(state ? "nobody" : "noData"))]));
  $("waiting").textContent = (state?.waiting || []).slice(0, 8).map(([id]) => {
    const one = film.sequences.get(id);
    return one ? `#${id} ${one.prompt} + ${one.tokens.filter(isHere).length}, ${Math.max(0, now - (one.preempts.at(-1) ?? one.added)).toFixed(1)} s` : `#${id}`;
  }).join(" · ");
}

function choose(id) { film.chosen = film.chosen === id ? null : id; draw(); document.querySelector(`[data-id="${id}"]`)?.focus(); }

function drawBatch({ state, step }) {
  const chunks = new Map(step?.chunks.map((chunk) => [chunk.one?.id, chunk]));
  const focused = document.activeElement?.dataset?.id;
  $("batch").replaceChildren(...(state?.running || []).map(([id, row, known, computed, preemptions, table]) => {
    const one = film.sequences.get(id), chunk = chunks.get(id), whole = Math.max(known, computed, 1), part = (count) => 100 * Math.min(count, whole) / whole;
    const bar = make("svg", { viewBox: "0 0 100 8", height: 9, preserveAspectRatio: "none", role: "img", "aria-label": `${one?.cached ?? 0} | ${computed} | ${known}` },
      rect(0, 0, 100, 8, "wait"), rect(0, 0, part(computed), 8, "decode"), rect(0, 0, part(Math.min(one?.prompt ?? 0, computed)), 8, "prompt"), rect(0, 0, part(Math.min(one?.cached ?? 0, computed)), 8, "cached"),
      title(`${one?.cached ?? 0} | ${computed} | ${known}`));
    const button = make("button", { type: "button", "data-id": id, "aria-pressed": film.chosen === id }, `#${id}`);
    button.addEventListener("click", () => choose(id));
    const range = !chunk ? "–" : chunk.isPrompt ? `[${chunk.start}, ${chunk.start + chunk.length})` : `${chunk.start}`;
    return make("tr", { class: film.chosen === id ? "chosen" : "" }, make("td", {}, button, preemptions ? ` ×${preemptions}` : ""), make("td", {}, String(row)), make("td", {}, bar), make("td", {}, range), make("td", {}, String(table.length)));
  }));
  if (focused) document.querySelector(`[data-id="${focused}"]`)?.focus();
}

const KINDS = ["blank", "cached", "private", "held", "shared", "lost"];
const kindOf = (code) => code >= 4 ? "shared" : KINDS[code];
let grid = { size: 1, columns: 1 };
function drawMap({ state }) {
  const canvas = $("map"), width = canvas.clientWidth || 600, codes = state?.codes ?? [], count = codes.length || 1;
  const columns = Math.ceil(width / Math.max(3, Math.min(40, Math.sqrt(width * 250 / count)))), size = width / columns, scale = devicePixelRatio || 1;
  grid = { size, columns };
  Object.assign(canvas, { width: width * scale, height: Math.ceil(count / columns) * size * scale });
  const counts = Object.fromEntries(KINDS.map((kind) => [kind, 0]));
  codes.forEach((code) => counts[kindOf(code)]++);
  counts.lost = state?.evicted?.length ?? 0;
  $("legend").replaceChildren(...KINDS.map((kind) => make("span", { class: kind }, `${say(kind)}${state ? `: ${counts[kind]}` : ""}`)));
  canvas.setAttribute("aria-label", $("legend").textContent);
  const colours = Object.fromEntries([...$("legend").children].map((node) => [node.className, getComputedStyle(node, "::before").backgroundColor]));
  const pen = canvas.getContext("2d"), gap = size > 5 ? 1 : 0, own = new Set(state?.running.find((one) => one[0] === film.chosen)?.[5]);
  const lost = new Set(state?.evicted);
  pen.scale(scale, scale);
  Object.assign(pen, { font: `600 ${Math.min(13, size - 6)}px system-ui`, textAlign: "center", textBaseline: "middle", lineWidth: 2 });
  codes.forEach((code, i) => {
    const x = (i % columns) * size, y = Math.floor(i / columns) * size;
    pen.globalAlpha = own.size && !own.has(i) ? 0.3 : 1;
    pen.fillStyle = colours[kindOf(code)];
    pen.fillRect(x, y, size - gap, size - gap);
    if (lost.has(i)) { pen.strokeStyle = colours.lost; pen.strokeRect(x + 1, y + 1, size - gap - 2, size - gap - 2); }
    if (code >= 4 && size >= 14) { pen.fillStyle = getComputedStyle(document.body).backgroundColor; pen.fillText(code >> 1, x + (size - gap) / 2, y + (size - gap) / 2 + 1); }
  });
  const all = film.facts.num_blocks;
  $("block").textContent = state ? (all > codes.length ? say("clipped", { n: codes.length, all }) : "") : say("noData");
}
function tellBlock(event) {
  const state = film?.frames[film.place]?.state, place = Math.floor(event.offsetY / grid.size) * grid.columns + Math.floor(event.offsetX / grid.size);
  if (!state || !(place < state.codes.length)) return;
  const who = state.running.filter((one) => one[5].includes(place)).map((one) => `#${one[0]}`).join(", ");
  $("block").textContent = say("blockText", { i: place, state: say(kindOf(state.codes[place])), who: who ? say("heldBy", { who }) : say("noTable") });
}

function drawTimeline({ now, isHere }) {
  const known = [...film.sequences.values()].filter((one) => one.added <= now).sort((a, b) => b.added - a.added || b.id - a.id);
  const last = (times) => times.filter(isHere).at(-1) ?? -Infinity, isOver = (one) => one.ended <= now;
  const waits = (one) => !isOver(one) && last(one.preempts) >= last(one.admits), waiting = known.filter(waits).slice(-4);
  const others = known.filter((one) => !waits(one)).sort((a, b) => isOver(a) - isOver(b) || (isOver(a) ? b.ended - a.ended : 0));
  const shown = [...others.slice(0, NUM_REQUESTS - waiting.length), ...waiting].sort((a, b) => a.added - b.added || a.id - b.id);
  const width = widthOf("timeline"), left = 52, high = 19, from = Math.min(now - 0.1, ...shown.map((one) => one.added)), x = (time) => left + (width - left) * (time - from) / (now - from);
  const span = (a, b, place, kind, text, thin = 0) => rect(x(a), place * high + 3 + thin, Math.max(1, x(Math.min(b ?? now, now)) - x(a)), high - 7 - 2 * thin, kind, title(text));
  const lines = shown.map((one, place) => {
    const nodes = [label(0, place * high + 13, `#${one.id}`)];
    [one.added, ...one.preempts].filter(isHere).forEach((time) => nodes.push(span(time, one.admits.find((admit) => admit >= time) ?? one.ended, place, "wait", say("waits"), 4)));
    const runs = [];
    for (const chunk of one.chunks.filter((chunk) => isHere(chunk.time))) {
      const run = runs.at(-1);
      if (run && !run.isPrompt && !chunk.isPrompt && !one.preempts.some((time) => time > run.time && time <= chunk.time)) run.end = chunk.end;
      else runs.push({ ...chunk });
    }
    for (const run of runs) nodes.push(span(run.time, run.end, place, run.isPrompt ? "prompt" : "decode", say(run.isPrompt ? "prompt" : "decode")));
    for (const time of one.preempts.filter(isHere)) nodes.push(rect(x(time) - 1.5, place * high + 1, 3, high - 3, "lost", title(say("preempted"))));
    const group = make("g", { class: film.chosen === one.id ? "chosen" : "" }, title(`#${one.id} ${one.name} · ${one.prompt} + ${one.tokens.filter(isHere).length}${one.ended <= now ? ` · ${one.reason}` : ""}`), ...nodes);
    group.addEventListener("click", () => choose(one.id));
    return group;
  });
  const bottom = shown.length * high + 4, ticks = [0, 0.25, 0.5, 0.75, 1].map((share) => label(left + share * (width - left), bottom + 13, `${((share - 1) * (now - from)).toFixed(1)} s`, { "text-anchor": share ? share === 1 ? "end" : "middle" : "start" }));
  plot("timeline", bottom + 18, say("requests"), make("path", { d: `M${left} ${bottom}H${width}`, class: "axis" }), ...lines, ...ticks);
}

function drawHistograms({ now, isHere }) {
  const values = { TTFT: [], TPOT: [], ITL: [] };
  for (const one of film.sequences.values()) {
    const times = one.tokens.filter(isHere);
    if (times.length && !one.early) values.TTFT.push(times[0] - one.added);
    for (let i = 1; i < times.length; i++) values.ITL.push(times[i] - times[i - 1]);
    if (one.tpot && one.ended <= now) values.TPOT.push(one.tpot);
    else if (one.ended <= now && times.length > 1 && !one.early) values.TPOT.push((times.at(-1) - times[0]) / (times.length - 1));
  }
  const width = widthOf("histograms"), numBins = 24;
  const parts = Object.entries(values).flatMap(([name, all], row) => {
    const top = row * 84, base = top + 64, sorted = all.map((value) => value * 1000).sort((a, b) => a - b);
    const at = (share) => sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
    const text = sorted.length ? `p50 ${show(at(0.5))} · p99 ${show(at(0.99))} ms · n ${sorted.length}` : "–";
    const head = [label(0, top + 11, name, { class: "strong" }), label(width, top + 11, text, { "text-anchor": "end" }), make("path", { d: `M0 ${base + 0.5}H${width}`, class: "axis" })];
    if (!sorted.length) return head;
    const low = Math.log(sorted[0] / 1.1), high = Math.log(sorted.at(-1) * 1.1), bins = Array(numBins).fill(0), place = (value) => (Math.log(value) - low) / (high - low);
    for (const value of sorted) bins[Math.min(numBins - 1, Math.floor(place(value) * numBins))]++;
    const most = Math.max(...bins), size = width / numBins;
    const bars = bins.map((count, i) => rect(i * size, base - 44 * count / most, size - 1, 44 * count / most, "decode", title(`${show(Math.exp(low + (high - low) * i / numBins))} ms: ${count}`)));
    const marks = [0.5, 0.99].map((share) => rect(width * place(at(share)) - 0.75, base - 46, 1.5, 46, "prompt", title(`p${share * 100}`)));
    return [...head, ...bars, ...marks, label(0, base + 13, `${show(sorted[0])} ms`), label(width, base + 13, `${show(sorted.at(-1))} ms`, { "text-anchor": "end" })];
  });
  plot("histograms", 250, "TTFT, TPOT, ITL", ...parts);
}

function drawRoof({ state, steps }) {
  const done = steps.filter((step) => step.bytes && step.forward).slice(-200), [bandwidth, flops] = film.facts.hardware?.[$("hardware").value] ?? [1, 1];
  $("reached").textContent = say(done.length || !state ? "noData" : "noSpec");
  if (!done.length) return $("roof").replaceChildren();
  const width = widthOf("roof"), height = 210, left = 44, points = done.map((step) => [step.operations / step.bytes, 1000 * step.operations / step.forward, step]);
  const ridge = flops / bandwidth, low = [Math.min(0.5, ...points.map((one) => one[0])), Math.min(flops / 1000, ...points.map((one) => one[1])) / 2], high = [ridge * 8, flops * 2];
  const scale = (value, axis) => Math.log(value / low[axis]) / Math.log(high[axis] / low[axis]);
  const x = (value) => left + (width - left) * scale(value, 0), y = (value) => (height - 20) * (1 - scale(value, 1));
  const roof = make("path", { d: `M${left} ${y(low[0] * bandwidth)}L${x(ridge)} ${y(flops)}H${width}`, class: "roof" });
  const marks = [1, 10, 100, 1000].filter((value) => value > low[0] && value < high[0]).map((value) => label(x(value), height - 4, `${value}`, { "text-anchor": "middle" }));
  const sides = [9, 10, 11, 12, 13, 14, 15].filter((power) => 10 ** power > low[1] && 10 ** power < high[1]).map((power) => label(0, y(10 ** power) + 4, ["1 G", "10 G", "100 G", "1 T", "10 T", "100 T", "1 P"][power - 9]));
  const dots = points.map(([intensity, rate, step], i) => make("circle", { cx: x(intensity), cy: y(rate), r: i === points.length - 1 ? 6 : 3.5, class: `${step.prompts ? "prompt" : "decode"}${i === points.length - 1 ? " now" : ""}` }, title(`${step.number}: ${show(intensity)} op/B, ${show(rate / 1e9)} GFLOP/s`)));
  const [intensity, rate] = points.at(-1), speed = rate / intensity;
  const text = say("reached", { b: show(speed / 1e9), bp: Math.round(100 * speed / bandwidth), f: show(rate / 1e9), fp: Math.round(100 * rate / flops), x: show(intensity), r: show(ridge) });
  $("reached").textContent = text;
  const axes = make("path", { d: `M${left} 0V${height - 20}H${width}`, class: "axis" });
  plot("roof", height, text, axes, roof, label(left + 6, 12, "op/s"), label(width, height - 26, "op/B", { "text-anchor": "end" }), ...marks, ...sides, ...dots);
}

// --- language, colours, controls

function applyLanguage() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = say(node.dataset.hint);
  for (const node of document.querySelectorAll("[data-label]")) { node.setAttribute("aria-label", say(node.dataset.label)); if (node.tagName === "BUTTON") node.title = say(node.dataset.label); }
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  $("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
  if (film) draw();
  else $("source").textContent = say("hint");
}
const CLICKS = {
  first: () => { pause(); goTo(0, false); }, back: () => go(-1), play, next: () => go(1), last: () => { pause(); goTo(Infinity, film?.isLive); },
  live: () => { pause(); watch(); }, recent: () => { pause(); openRecent(); },
  language: () => { language = language === "zh" ? "en" : "zh"; remember("localStorage", "language", language); applyLanguage(); },
  theme: () => { theme = { auto: "light", light: "dark", dark: "auto" }[theme]; remember("localStorage", "theme", theme); applyLanguage(); },
};
for (const [id, act] of Object.entries(CLICKS)) $(id).addEventListener("click", act);
$("place").addEventListener("input", () => { pause(); goTo(Number($("place").value), false); });
$("speed").addEventListener("change", () => { if (player) { pause(); play(); } });
$("hardware").addEventListener("change", () => film && draw());
$("key").addEventListener("keydown", (event) => { if (event.key === "Enter") CLICKS.live(); });
$("map").addEventListener("mousemove", tellBlock);
$("file").addEventListener("change", async () => { const [file] = $("file").files; $("file").value = ""; if (file) { pause(); openText(await file.text(), file.name); } });
document.addEventListener("keydown", (event) => {
  if (/INPUT|SELECT|BUTTON/.test(event.target.tagName) || event.ctrlKey || event.metaKey || event.altKey) return;
  const act = { ArrowLeft: CLICKS.back, ArrowRight: CLICKS.next, " ": play }[event.key];
  if (act) { event.preventDefault(); act(); }
});
addEventListener("resize", () => film && draw());
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => film && draw());
$("key").value = recall("sessionStorage", "adminKey") || "";
applyLanguage();
