// The chat page: settings, one conversation, and answers streamed from /v1/chat/completions.
//
// What a model writes reaches the page only as textContent. Addresses are relative, so that the page also works below
// a path of a reverse proxy. The conversation lives in memory, the API key in the session storage of the tab, settings
// in local storage.

"use strict";

const STRINGS = {
  en: {
    language: "中文", languageLabel: "中文: switch to Chinese", theme: "Colours", themeAuto: "as the system", themeLight: "light", themeDark: "dark",
    model: "Model", newChat: "New chat", settings: "Settings", conversation: "Conversation",
    empty: "Ask something.", emptyKeys: "Enter sends, Shift+Enter starts a new line, Escape stops.",
    message: "Message", messageHint: "Message", send: "Send", stop: "Stop",
    system: "System message", systemHint: "How the model should answer", temperature: "Temperature", topP: "Top-p",
    maxTokens: "Tokens at most", noLimit: "no limit", seed: "Seed", random: "random",
    key: "API key", keyHint: "if the server wants one", keyNote: "Kept in this tab only, until it is closed.",
    you: "You", answer: "Answer", thinking: "Thinking", copy: "Copy", copied: "Copied", copyFailed: "Copying failed", again: "Try again",
    token: "{n} token", tokens: "{n} tokens", first: "first after {s} s", rate: "{r} tokens/s", prompt: "prompt {n}", cached: "{n} cached",
    limit: "ended by the token limit", stopped: "stopped", code: "code", done: "The answer is complete.",
    noServer: "The server cannot be reached: {why}", needsKey: "The server wants an API key: enter it in the settings.",
    wrongKey: "The server refused the API key.", status: "The server answered {status}: {why}", cut: "The answer broke off: {why}", ended: "the stream ended early",
    invalid: "{name} must be a number from {min} to {max}", invalidMin: "{name} must be a whole number, {min} or more",
  },
  zh: {
    language: "English", languageLabel: "English: 切换到英文", theme: "颜色", themeAuto: "跟随系统", themeLight: "浅色", themeDark: "深色",
    model: "模型", newChat: "新对话", settings: "设置", conversation: "对话",
    empty: "请提问。", emptyKeys: "回车发送，Shift+回车换行，Esc 停止。",
    message: "消息", messageHint: "输入消息", send: "发送", stop: "停止",
    system: "系统消息", systemHint: "希望模型如何回答", temperature: "温度", topP: "Top-p",
    maxTokens: "最多词元数", noLimit: "不限", seed: "随机种子", random: "随机",
    key: "API 密钥", keyHint: "服务器要求时填写", keyNote: "只保存在当前标签页，关闭即清除。",
    you: "你", answer: "回答", thinking: "思考过程", copy: "复制", copied: "已复制", copyFailed: "复制失败", again: "重试",
    token: "{n} 个词元", tokens: "{n} 个词元", first: "首个词元 {s} 秒", rate: "{r} 词元/秒", prompt: "提示 {n}", cached: "缓存命中 {n}",
    limit: "达到词元上限", stopped: "已停止", code: "代码", done: "回答完毕。",
    noServer: "无法连接服务器：{why}", needsKey: "服务器需要 API 密钥：请在设置中填写。",
    wrongKey: "服务器拒绝了该 API 密钥。", status: "服务器返回 {status}：{why}", cut: "回答中断：{why}", ended: "数据流提前结束",
    invalid: "{name}必须是 {min} 到 {max} 之间的数", invalidMin: "{name}必须是不小于 {min} 的整数",
  },
};

const $ = (id) => document.getElementById(id);
const log = $("log");

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// --- language and colours

// Storage may be switched off; then nothing is remembered.
function recall(storage, name) {
  try { return window[storage].getItem(`nanovllm.${name}`); } catch { return null; }
}
function remember(storage, name, value) {
  try { window[storage].setItem(`nanovllm.${name}`, value); } catch { /* not remembered */ }
}

let language = recall("localStorage", "language") || (navigator.language.startsWith("zh") ? "zh" : "en");
let theme = recall("localStorage", "theme") || "auto";

function say(name, values = {}) {
  return (STRINGS[language] || STRINGS.en)[name].replace(/\{(\w+)\}/g, (_, key) => values[key]);
}

function applyLanguage() {
  document.documentElement.lang = language === "zh" ? "zh-CN" : "en";
  for (const node of document.querySelectorAll("[data-text]")) node.textContent = say(node.dataset.text);
  for (const node of document.querySelectorAll("[data-hint]")) node.placeholder = say(node.dataset.hint);
  for (const node of document.querySelectorAll("[data-label]")) node.setAttribute("aria-label", say(node.dataset.label));
  for (const answer of answers) answer.showFoot();
  applyTheme();
}

function applyTheme() {
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  const label = `${say("theme")}: ${say({ auto: "themeAuto", light: "themeLight", dark: "themeDark" }[theme])}`;
  $("theme").textContent = { auto: "◐", light: "☀", dark: "☾" }[theme];
  $("theme").title = label;
  $("theme").setAttribute("aria-label", label);
}

// --- Markdown, as far as chat answers need it: code, headings, lists, quotes, bold, italic

const FENCE = /^\s*(```+|~~~+)\s*([^\s`]*)/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)]) +/;
const HEADING = /^(#{1,6}) +(.*)$/;

// Blocks with the offset at which they begin. The last block may still grow; those before it are final.
function splitBlocks(text) {
  const blocks = [];
  let offset = 0, block = null, fence = null;
  for (const line of text.split("\n")) {
    const start = offset;
    offset += line.length + 1;
    if (fence) {
      if (line.trim().startsWith(fence) && !line.trim().slice(fence.length).trim()) fence = block = null;
      else block.lines.push(line);
      continue;
    }
    const opening = FENCE.exec(line);
    const kind = opening ? "code" : HEADING.test(line) ? "heading" : ITEM.test(line) ? "list" : line.startsWith(">") ? "quote" : line.trim() ? "text" : null;
    if (kind === null) {
      block = null;
    } else if (opening) {
      fence = opening[1];
      blocks.push((block = { kind, start, lines: [], name: opening[2] }));
    } else if (block && kind !== "heading" && (block.kind === kind || (kind === "text" && block.kind === "list"))) {
      block.lines.push(line);
    } else {
      blocks.push({ kind, start, lines: [line] });
      block = kind === "heading" ? null : blocks.at(-1);
    }
  }
  return blocks;
}

// Plain text with `code`, **bold** and *italic*. Every search that fails is made once, so the time is linear.
function addInline(node, text) {
  const failed = new Set();
  let plain = 0, at = 0;
  while (at < text.length) {
    const char = text[at];
    if (char !== "`" && char !== "*") { at += 1; continue; }
    let length = 1;
    while (text[at + length] === char) length += 1;
    const mark = char.repeat(length);
    const end = failed.has(mark) || (char === "*" && length > 2) ? -1 : text.indexOf(mark, at + length);
    const inner = end < 0 ? "" : text.slice(at + length, end);
    if (end < 0) failed.add(mark);
    if (!inner || (char === "*" && (/^\s|\s$/.test(inner) || inner.includes("\n")))) { at += length; continue; }
    node.append(text.slice(plain, at));
    if (char === "`") node.append(make("code", "", inner));
    else addInline(node.appendChild(make(length === 2 ? "strong" : "em")), inner);
    plain = at = end + length;
  }
  node.append(text.slice(plain));
  return node;
}

function makeBlock(block) {
  const text = block.lines.join("\n");
  if (block.kind === "code") return makeCode(block.name, text);
  if (block.kind === "heading") {
    const [, marks, title] = HEADING.exec(text);
    return addInline(make(`h${Math.min(marks.length + 1, 4)}`), title);
  }
  if (block.kind === "quote") return addInline(make("blockquote"), text.replace(/^> ?/gm, ""));
  if (block.kind === "list") return makeList(block.lines);
  return addInline(make("p"), text);
}

function makeList(lines) {
  const first = ITEM.exec(lines[0]);
  const isNumbered = /\d/.test(first[2]);
  const list = make(isNumbered ? "ol" : "ul");
  if (isNumbered) list.start = parseInt(first[2], 10);
  const base = first[1].length;
  let own = null, inner = [];
  const close = () => {
    if (inner.length) (own || list.appendChild(make("li"))).append(makeList(inner));
    inner = [];
  };
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (inner.length && !(item && item[1].length <= base)) inner.push(line);
    else if (item && item[1].length > base + 1 && own && base < 12) inner.push(line);
    else if (item) { close(); own = addInline(list.appendChild(make("li")), line.slice(item[0].length)); }
    else addInline(own, "\n" + line.trim());
  }
  close();
  return list;
}

function makeCode(name, text) {
  const frame = make("div", "code");
  const bar = frame.appendChild(make("div", "bar"));
  bar.append(make("span", "", name || say("code")), copyButton(() => code.textContent));
  const pre = frame.appendChild(make("pre"));
  pre.tabIndex = 0; // so that a keyboard can scroll it
  const code = pre.appendChild(make("code", "", text));
  return frame;
}

function copyButton(read) {
  const button = make("button", "small", say("copy"));
  button.type = "button";
  button.dataset.text = "copy";
  button.addEventListener("click", async () => {
    let name = "copied";
    try { await navigator.clipboard.writeText(read()); } catch { name = "copyFailed"; }
    button.textContent = say(name);
    setTimeout(() => { button.textContent = say("copy"); }, 1500);
  });
  return button;
}

// Text that grows: only its last block is made anew.
class GrowingMarkdown {
  constructor(node) {
    this.node = node;
    this.start = 0; // of the last block
    this.last = null;
    this.lastKind = "";
  }

  show(text) {
    const blocks = splitBlocks(text.slice(this.start));
    if (!blocks.length) return;
    if (this.last && blocks[0].kind === "code" && this.lastKind === "code" && blocks.length === 1) {
      this.last.querySelector("code").textContent = blocks[0].lines.join("\n");
      return;
    }
    if (this.last) this.last.remove();
    for (const block of blocks) this.last = this.node.appendChild(makeBlock(block));
    this.start += blocks.at(-1).start;
    this.lastKind = blocks.at(-1).kind;
  }
}

// --- one answer on the page

class Answer {
  constructor() {
    this.text = "";
    this.reasoning = "";
    this.usage = null;
    this.numPieces = 0;
    this.started = performance.now();
    this.first = null; // when the first piece came
    this.last = null;
    this.ending = ""; // "", "stop", "length", "stopped", "error"
    this.node = log.appendChild(make("article", "message assistant"));
    this.node.append(make("span", "hidden", say("answer")));
    this.body = this.node.appendChild(make("div", "body waiting"));
    this.foot = this.node.appendChild(make("div", "foot"));
    this.markdown = new GrowingMarkdown(this.body.appendChild(make("div")));
    this.frame = 0;
  }

  // One event of the stream.
  add(event) {
    if (event.usage) this.usage = event.usage;
    const choice = event.choices && event.choices[0];
    if (choice) {
      const delta = choice.delta || {};
      const piece = delta.content || "", thought = delta.reasoning || delta.reasoning_content || "";
      if (piece || thought) {
        this.last = performance.now();
        this.first ??= this.last;
        this.numPieces += 1;
        this.text += piece;
        this.reasoning += thought;
      }
      if (choice.finish_reason) this.ending = choice.finish_reason;
    }
    this.frame ||= requestAnimationFrame(() => this.show());
  }

  show() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    const isAtEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
    if (this.reasoning) this.showReasoning();
    this.markdown.show(this.text);
    this.showFoot();
    if (isAtEnd) log.scrollTop = log.scrollHeight;
  }

  showReasoning() {
    if (!this.thoughts) {
      const details = make("details", "reasoning");
      const summary = details.appendChild(make("summary", "", say("thinking")));
      summary.dataset.text = "thinking";
      this.thoughts = details.appendChild(make("div"));
      this.body.prepend(details);
    }
    this.thoughts.textContent = this.reasoning;
  }

  showFoot() {
    const parts = [];
    const numTokens = this.usage ? this.usage.completion_tokens : this.numPieces;
    if (numTokens) parts.push(say(numTokens === 1 ? "token" : "tokens", { n: numTokens }));
    if (this.first !== null) parts.push(say("first", { s: ((this.first - this.started) / 1000).toFixed(2) }));
    if (this.last - this.first > 50) parts.push(say("rate", { r: ((numTokens - 1) / ((this.last - this.first) / 1000)).toFixed(1) }));
    if (this.usage && this.ending) {
      const cached = this.usage.prompt_tokens_details && this.usage.prompt_tokens_details.cached_tokens;
      parts.push(say("prompt", { n: this.usage.prompt_tokens }) + (cached ? ` (${say("cached", { n: cached })})` : ""));
    }
    if (this.ending === "length") parts.push(say("limit"));
    if (this.ending === "stopped") parts.push(say("stopped"));
    const nodes = parts.map((part) => make("span", "", part));
    if (this.isDone && this.text) nodes.push(copyButton(() => this.text));
    if (this.isDone && answers.at(-1) === this) nodes.push(againButton());
    this.foot.replaceChildren(...nodes);
  }

  end(error) {
    this.isDone = true;
    this.body.classList.remove("waiting");
    this.show();
    if (!error) return;
    const node = make("div", "error", error);
    node.setAttribute("role", "alert");
    this.node.insertBefore(node, this.foot);
    log.scrollTop = log.scrollHeight;
  }
}

function againButton() {
  const button = make("button", "small", say("again"));
  button.type = "button";
  button.addEventListener("click", () => { if (!running) answerAgain(); });
  return button;
}

// --- the conversation

let messages = []; // what the server gets, without the system message
let answers = []; // those on the page
let running = null; // AbortController of the answer that is being written

function readSettings() {
  const settings = {};
  for (const name of ["temperature", "top_p", "max_tokens", "seed"]) {
    const input = $(name);
    const isWhole = name === "max_tokens" || name === "seed";
    if (!input.value && !input.validity.badInput) continue;
    const value = Number(input.value);
    const isGood = input.value !== "" && value >= Number(input.min) && (!input.max || value <= Number(input.max)) && (!isWhole || Number.isSafeInteger(value));
    input.setAttribute("aria-invalid", String(!isGood));
    if (!isGood) {
      openSettings(true);
      input.focus();
      throw new Error(say(isWhole ? "invalidMin" : "invalid", { name: say({ top_p: "topP", max_tokens: "maxTokens" }[name] || name), min: input.min, max: input.max }));
    }
    settings[name] = value;
  }
  return settings;
}

function makeRequest() {
  const system = $("system").value.trim();
  return {
    ...($("model").value ? { model: $("model").value } : {}),
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
    ...readSettings(),
  };
}

function callServer(path, options = {}) {
  const headers = { ...options.headers };
  if ($("key").value) headers.Authorization = `Bearer ${$("key").value}`;
  return fetch(path, { ...options, headers, credentials: "same-origin" });
}

async function explain(response) {
  if (response.status === 401) {
    openSettings(true);
    $("key").focus();
    return say($("key").value ? "wrongKey" : "needsKey");
  }
  let why = response.statusText;
  try { why = (await response.json()).error.message; } catch { /* not our shape */ }
  return say("status", { status: response.status, why });
}

// The JSON of each `data:` line, as it arrives. Throws if the stream ends without [DONE].
async function* readEvents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new Error(say("ended"));
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data:")) continue;
      const data = line.slice(5).trim();
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

// Streams one answer to `messages`. Returns why it failed, or "".
async function fill(answer, request) {
  let response;
  try {
    response = await callServer("v1/chat/completions", {
      method: "POST", body: JSON.stringify(request), headers: { "Content-Type": "application/json" }, signal: running.signal,
    });
  } catch (error) {
    return error.name === "AbortError" ? "" : say("noServer", { why: error.message });
  }
  if (!response.ok) return explain(response);
  try {
    for await (const event of readEvents(response)) {
      if (event.error) throw new Error(event.error.message);
      answer.add(event);
    }
  } catch (error) {
    return error.name === "AbortError" ? "" : say("cut", { why: error.message });
  }
  return "";
}

async function runAnswer() {
  showNotice("");
  let request;
  try { request = makeRequest(); } catch (error) { showNotice(error.message); return false; }
  running = new AbortController();
  setBusy(true);
  const answer = new Answer();
  const previous = answers.at(-1);
  answers.push(answer);
  if (previous) previous.showFoot(); // no longer the last
  log.scrollTop = log.scrollHeight;
  const conversation = messages; // a new chat may begin meanwhile
  const failure = await fill(answer, request);
  if (running.signal.aborted) answer.ending = "stopped";
  else if (failure) answer.ending = "error";
  running = null;
  answer.end(failure);
  setBusy(false);
  if (answer.text && conversation === messages) messages.push({ role: "assistant", content: answer.text });
  if (!failure) $("status").textContent = say("done");
  if (document.activeElement === document.body || document.activeElement === $("stop")) $("message").focus();
  return true;
}

async function send() {
  const text = $("message").value.trim();
  if (!text || running) return;
  if (messages.at(-1)?.role === "user") dropLast(); // its answer failed; the new message takes its place
  $("empty").hidden = true;
  const node = log.appendChild(make("article", "message user"));
  node.append(make("span", "hidden", say("you")), make("div", "body", text));
  messages.push({ role: "user", content: text });
  $("message").value = "";
  fitMessage();
  if (!(await runAnswer())) { // refused by our own checks: nothing was sent
    messages.pop();
    node.remove();
    $("message").value = text;
    fitMessage();
    $("empty").hidden = log.childElementCount > 1;
  }
}

// Takes the last answer off the page, and with it the question that it failed to answer.
function dropLast() {
  messages.pop();
  answers.pop()?.node.remove();
  log.lastElementChild.remove();
}

function answerAgain() {
  answers.pop()?.node.remove();
  if (messages.at(-1)?.role === "assistant") messages.pop();
  runAnswer();
}

function startOver() {
  running?.abort();
  messages = [];
  for (const node of [...log.querySelectorAll(".message")]) node.remove();
  answers = [];
  $("empty").hidden = false;
  showNotice("");
  $("message").focus();
}

// --- the frame of the page

function setBusy(isBusy) {
  log.setAttribute("aria-busy", String(isBusy)); // a screen reader waits for the whole answer
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  if (isBusy) $("status").textContent = "";
}

function showNotice(text) {
  $("notice").textContent = text;
  $("notice").hidden = !text;
}

function openSettings(isOpen) {
  $("settings").hidden = !isOpen;
  $("toggle-settings").setAttribute("aria-expanded", String(isOpen));
}

function fitMessage() {
  const box = $("message");
  box.style.height = "auto";
  box.style.height = `${box.scrollHeight + 2}px`;
}

async function loadModels() {
  let response;
  try { response = await callServer("v1/models"); } catch (error) { showNotice(say("noServer", { why: error.message })); return; }
  if (!response.ok) { showNotice(await explain(response)); return; }
  showNotice("");
  const models = (await response.json()).data;
  $("model").replaceChildren(...models.map((model) => {
    const option = make("option", "", model.id);
    option.value = model.id;
    return option;
  }));
  document.title = models.length ? `${models[0].id} - nanovllm` : "nanovllm";
}

function connect() {
  const remembered = ["system", "temperature", "top_p", "max_tokens", "seed"];
  for (const name of remembered) {
    $(name).value = recall("localStorage", name) || "";
    $(name).addEventListener("change", () => remember("localStorage", name, $(name).value));
  }
  $("key").value = recall("sessionStorage", "key") || "";
  $("key").addEventListener("change", () => { remember("sessionStorage", "key", $("key").value); loadModels(); });
  $("language").addEventListener("click", () => {
    language = language === "zh" ? "en" : "zh";
    remember("localStorage", "language", language);
    applyLanguage();
  });
  $("theme").addEventListener("click", () => {
    theme = { auto: "light", light: "dark", dark: "auto" }[theme];
    remember("localStorage", "theme", theme);
    applyTheme();
  });
  $("new").addEventListener("click", startOver);
  $("toggle-settings").addEventListener("click", () => openSettings($("settings").hidden));
  $("stop").addEventListener("click", () => running?.abort());
  $("composer").addEventListener("submit", (event) => { event.preventDefault(); send(); });
  $("message").addEventListener("input", fitMessage);
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); } // composing: the key belongs to the input method
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
}

openSettings(window.matchMedia("(min-width: 48.01rem)").matches);
connect();
applyLanguage();
loadModels();
