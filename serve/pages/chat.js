"use strict";
// All that a server or a model says reaches the page as text, never as HTML.
const KEY = "raysft.key";
const LEAST_S = 0.05; // a shorter stream came in one piece and has no speed
const element = (id) => document.getElementById(id);
const header = document.querySelector("header");
const prompt = element("prompt"), send = element("send"), thread = element("thread"), dialog = element("key-dialog");
const selects = [element("model-0"), element("model-1")];

let cards = [];
let turns = []; // {prompt, answers: {side: Answer}}; a side is the place of its select
let conversation = newId();
let running = null; // the AbortController of what is being answered
let following = true; // whether the reader is at the end of the page

function make(tag, name = "", text = "") {
  const made = document.createElement(tag);
  made.className = name;
  made.textContent = text;
  return made;
}

function newId() {
  return [...crypto.getRandomValues(new Uint8Array(12))].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

// ---- the server

async function ask(path, body, signal) {
  const key = sessionStorage.getItem(KEY);
  const headers = { ...(key && { authorization: `Bearer ${key}` }), ...(body && { "content-type": "application/json" }) };
  const options = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  const response = await fetch(path, body ? { ...options, body: JSON.stringify(body) } : options).catch((error) => {
    throw signal?.aborted ? error : new Error("The server cannot be reached.");
  });
  if (response.ok) return response;
  const message = await response.json().then((said) => said.error.message).catch(() => `The server answered ${response.status}.`);
  if (response.status === 401) openKey(key ? message : "");
  throw new Error(response.status === 401 && !key ? "This server asks for an API key." : message);
}

// The objects of a stream of server-sent events. One that ends without [DONE] broke off.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = ""; ;) {
    const { done, value } = await reader.read();
    if (done) throw new Error("The answer broke off: the connection ended early.");
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts.filter((text) => text.startsWith("data:"))) {
      const data = part.slice(5).trim();
      if (data === "[DONE]") return;
      const said = JSON.parse(data);
      if (said.error) throw new Error(said.error.message);
      yield said;
    }
  }
}

// ---- models

const isVersion = (card) => card.parent !== null && card.root === card.id;
const isAlias = (card) => card.parent !== null && card.root !== card.id;
const cardOf = (select) => cards.find((card) => card.id === select.value);
const comparing = () => document.body.classList.contains("comparing");
const sides = () => (comparing() ? [0, 1] : [0]);

async function loadModels() {
  try {
    const found = (await (await ask("v1/models")).json()).data;
    if (!found.length) throw new Error("There is no model that this key may use.");
    cards = found;
    notice("");
  } catch (error) {
    notice(error.message);
    return refresh(); // what was known before stays
  }
  const newestFirst = (one, other) => other.created - one.created || other.id.localeCompare(one.id, "en", { numeric: true });
  const groups = [
    ["Aliases", cards.filter(isAlias)],
    ["Versions", cards.filter(isVersion).sort(newestFirst)],
    ["Base model", cards.filter((card) => card.parent === null)],
  ].filter(([, found]) => found.length);
  for (const select of selects) {
    const chosen = select.value;
    select.replaceChildren(...groups.map(([label, found]) => {
      const group = document.createElement("optgroup");
      group.label = label;
      group.append(...found.map((card) => new Option(isAlias(card) ? `${card.id} \u2192 ${card.root}` : card.id, card.id)));
      return group;
    }));
    if (cards.some((card) => card.id === chosen)) select.value = chosen;
  }
  selects[0].disabled = false;
  element("compare").disabled = cards.length < 2;
  refresh();
}

function compare(on) {
  document.body.classList.toggle("comparing", on);
  element("second").hidden = !on;
  element("compare").setAttribute("aria-pressed", on);
  const [first, second] = selects.map(cardOf);
  const other = cards.filter(isVersion).concat(cards).find((card) => card.root !== first.root);
  if (on && first.root === second.root && other) selects[1].value = other.id;
  refresh();
}

function facts(card) {
  const { version, rank, published_by: by, lineage } = card.metadata ?? {};
  const numbers = Object.entries(lineage?.metrics ?? {}).filter(([, value]) => typeof value === "number");
  return [
    ["Model", comparing() && card.id],
    ["Answers with", version !== card.id && version],
    ["Base", card.parent],
    ["Longest text", card.max_model_len && `${card.max_model_len.toLocaleString("en")} tokens`],
    ["LoRA rank", rank],
    ["Published", card.created && new Date(card.created * 1000).toLocaleDateString("en", { dateStyle: "medium" }) + (by ? ` by ${by}` : "")],
    ["Run", lineage?.run],
    ...numbers.slice(0, 4).map(([name, value]) => [name, String(Number(value.toPrecision(4)))]),
  ].filter(([, value]) => value);
}

// What stands in place of a conversation that has not begun.
function drawStart() {
  const chosen = cards.length ? sides().map((side) => cardOf(selects[side])) : [];
  element("start").hidden = !chosen.length || turns.length > 0;
  element("start").replaceChildren(
    make("h2", "", `Ask ${chosen.map((card) => card.id).join(" and ")}`),
    ...chosen.map((card) => {
      const list = make("dl");
      for (const [name, value] of facts(card)) list.append(make("dt", "", name), make("dd", "", value));
      return list;
    }),
  );
}

// ---- answers

const seconds = (value) => (value < 1 ? `${Math.round(value * 1000)} ms` : `${value.toFixed(value < 10 ? 2 : 1)} s`);

class Answer {
  constructor(model) {
    this.model = model;
    this.text = "";
    this.pieces = 0;
    this.began = performance.now();
    this.view = make("section", "answer waiting");
    this.title = make("h2");
    this.words = document.createTextNode("");
    this.figures = make("p", "figures");
    const body = make("p", "text");
    body.append(this.words);
    this.view.append(this.title, body, this.figures);
    this.view.ariaBusy = "true";
    this.name(model);
  }

  name(version) {
    this.version = version;
    this.title.replaceChildren(make("b", "", version), version === this.model ? "" : `asked as ${this.model}`);
    this.view.ariaLabel = `Answer of ${version}`;
  }

  add({ content, reasoning, reasoning_content: older }) {
    if (!content && !reasoning && !older) return;
    this.first ??= performance.now();
    this.pieces += 1;
    this.view.classList.replace("waiting", "streaming");
    if (reasoning || older) this.think(reasoning || older);
    if (content) {
      this.text += content;
      this.words.appendData(content);
    }
    this.draw();
  }

  think(words) {
    if (!this.thoughts) {
      this.thoughts = make("p", "text");
      const details = make("details");
      details.append(make("summary", "", "Reasoning"), this.thoughts);
      this.title.after(details);
    }
    this.thoughts.append(words);
  }

  // An answer that broke or was stopped has no usage; it has about one token a piece.
  draw() {
    const tokens = this.usage?.completion_tokens ?? this.pieces;
    const ended = this.ended ?? performance.now();
    const took = (ended - this.first) / 1000;
    const figures = [
      this.first && [seconds((this.first - this.began) / 1000), "to first token"],
      this.first && [tokens.toLocaleString("en"), tokens === 1 ? "token" : "tokens"],
      tokens > 1 && took > LEAST_S && [((tokens - 1) / took).toFixed(took > tokens / 10 ? 1 : 0), "tokens/s"],
      this.ended && [seconds((ended - this.began) / 1000), "in all"],
      this.note && [this.note, ""],
    ].filter(Boolean);
    this.figures.replaceChildren(...figures.map(([value, what]) => {
      const figure = make("span");
      figure.append(make("b", "", value), ` ${what}`);
      return figure;
    }));
  }

  end(note = "") {
    this.ended = performance.now();
    this.note = note;
    this.view.classList.remove("waiting", "streaming");
    this.view.ariaBusy = "false";
    this.draw();
  }

  fail(message, again) {
    this.failed = true;
    this.end();
    const error = make("p", "error", message);
    const button = make("button", "", "Try again");
    button.type = "button";
    button.addEventListener("click", again);
    error.append(" ", button);
    this.figures.before(error);
  }
}

// What a side has said so far. Of a turn that it was not asked in, what the other side said.
function history(turn, side) {
  const system = element("system").value.trim();
  const messages = system ? [{ role: "system", content: system }] : [];
  for (const { prompt: asked, answers } of turns.slice(0, turns.indexOf(turn))) {
    const answer = answers[side] ?? answers[1 - side];
    if (!answer.failed && answer.text) messages.push({ role: "user", content: asked }, { role: "assistant", content: answer.text });
  }
  return [...messages, { role: "user", content: turn.prompt }];
}

async function answer(turn, side, model, signal) {
  const made = new Answer(model);
  const before = turn.answers[side]?.view;
  turn.answers[side] = made;
  before ? before.replaceWith(made.view) : turn.view.append(made.view);
  try {
    const longest = element("max-tokens").value;
    const response = await ask("v1/chat/completions", {
      model,
      messages: history(turn, side),
      temperature: Number(element("temperature").value),
      ...(longest && { max_tokens: Number(longest) }),
      stream: true,
      stream_options: { include_usage: true },
      user: conversation,
    }, signal);
    const version = response.headers.get("x-raysft-version");
    if (version) made.name(version);
    let reason;
    for await (const event of events(response)) {
      if (!version && event.model) made.name(event.model);
      if (event.usage) made.usage = event.usage;
      const choice = event.choices?.[0];
      if (!choice) continue;
      made.add(choice.delta ?? {});
      reason = choice.finish_reason ?? reason;
      follow();
    }
    made.end(reason === "length" ? "cut at the longest length" : "");
    say(`${made.version} has answered.`);
  } catch (error) {
    if (signal.aborted) {
      made.end("stopped");
      say("Stopped.");
    } else {
      made.fail(error.message, () => run((again) => [answer(turn, side, model, again)]));
      say(`No answer: ${error.message}`);
    }
  }
  follow();
}

// ---- the conversation

async function run(start) {
  if (running) return;
  running = new AbortController();
  refresh();
  await Promise.all(start(running.signal));
  running = null;
  refresh();
}

async function submit() {
  const text = prompt.value.trim();
  if (running || !text || !cards.length) return;
  const turn = { prompt: text, answers: {}, view: make("div", "answers") };
  turn.view.classList.toggle("two", comparing());
  const article = make("article", "turn");
  article.append(make("p", "prompt", text), turn.view);
  turns.push(turn);
  thread.append(article);
  prompt.value = "";
  following = true;
  const asked = sides().map((side) => [side, selects[side].value]);
  const done = run((signal) => asked.map(([side, model]) => answer(turn, side, model, signal)));
  follow();
  await done;
}

function clear() {
  running?.abort();
  turns = [];
  conversation = newId();
  thread.replaceChildren();
  refresh();
  prompt.focus();
}

// ---- the page

function refresh() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
  send.textContent = running ? "Stop" : "Send";
  send.classList.toggle("stop", Boolean(running));
  send.disabled = !running && (!prompt.value.trim() || !cards.length);
  element("new").disabled = !turns.length;
  element("key-button").hidden = !sessionStorage.getItem(KEY);
  drawStart();
}

function say(text) {
  element("status").textContent = text;
}

function notice(text) {
  element("notice").hidden = !text;
  element("notice").firstChild.textContent = text;
}

function follow() {
  if (following) window.scrollTo({ top: document.documentElement.scrollHeight });
}

function openKey(fault) {
  element("key-error").textContent = fault;
  element("key-error").hidden = !fault;
  element("key-forget").hidden = !sessionStorage.getItem(KEY);
  if (!dialog.open) dialog.showModal();
}

function useKey(key) {
  key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY);
  element("key").value = "";
  dialog.close();
  loadModels();
}

window.addEventListener("scroll", () => {
  following = window.innerHeight + window.scrollY > document.documentElement.scrollHeight - 48;
});
document.addEventListener("visibilitychange", () => {
  if (!document.hidden && !dialog.open) loadModels(); // aliases may have moved
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !dialog.open) running?.abort();
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  submit();
});
prompt.addEventListener("input", refresh);
element("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  running ? running.abort() : submit();
});
for (const form of [element("models"), element("settings")]) form.addEventListener("submit", (event) => event.preventDefault());
for (const select of selects) select.addEventListener("change", refresh);
element("compare").addEventListener("click", () => compare(!comparing()));
element("new").addEventListener("click", clear);
element("reload").addEventListener("click", loadModels);
element("settings-button").addEventListener("click", (event) => {
  event.target.ariaExpanded = header.classList.toggle("open");
});
element("temperature").addEventListener("input", (event) => {
  element("temperature-shown").textContent = event.target.value;
});
element("key-button").addEventListener("click", () => openKey(""));
element("key-cancel").addEventListener("click", () => dialog.close());
element("key-forget").addEventListener("click", () => useKey(""));
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(element("key").value);
});

loadModels();
if (matchMedia("(pointer: fine)").matches) prompt.focus();
