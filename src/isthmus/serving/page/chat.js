// The chat page: one conversation, kept in this tab, spoken over the server's own OpenAI-like endpoint.

import { rendered } from "./markdown.js";
import { ALLOWED, overlay, read } from "./pictures.js";

const $ = (id) => document.getElementById(id);
const state = { turns: [], tray: [], running: null, aspect: null, attention: false, following: true };

// ------------------------------------------------------------------------------------------------ building the page

function make(name, properties = {}, ...children) {
  const element = document.createElement(name);
  const { dataset = {}, ...rest } = properties;
  Object.assign(element, rest);
  Object.assign(element.dataset, dataset);
  element.append(...children);
  return element;
}

function say(text) {
  $("status").textContent = text;
}

function picture(url, name) {
  return make("figure", { className: "picture" }, make("img", { src: url, alt: name }));
}

function showTurn(turn) {
  const said = make("div", { className: "said", textContent: turn.text });
  const pictures = make("div", { className: "pictures" }, ...turn.pictures.map((each) => picture(each.url, each.name)));
  const who = make("span", { className: "hidden", textContent: turn.role === "user" ? "You:" : "Model:" });
  const item = make("li", { className: turn.role }, who, ...(turn.pictures.length ? [pictures] : []), said);
  $("welcome").hidden = true;
  $("log").append(item);
  return { item, said };
}

function showTray() {
  $("tray").replaceChildren(
    ...state.tray.map((each, index) => {
      const remove = make("button", { type: "button", textContent: "×", ariaLabel: `Remove ${each.name}` });
      remove.addEventListener("click", () => {
        state.tray.splice(index, 1);
        showTray();
        $("question").focus();
      });
      return make("li", {}, make("img", { src: each.url, alt: each.name }), remove);
    }),
  );
  ready();
}

// Nothing can be sent while there is nothing to send.
function ready() {
  $("send").disabled = !$("question").value.trim() && !state.tray.length;
}

// ------------------------------------------------------------------------------------------------ pictures

async function add(files) {
  const told = [];
  for (const file of files) {
    if (!ALLOWED.includes(file.type)) told.push(`${file.name || "That"} is not a PNG, JPEG, WebP or GIF picture.`);
    else {
      const { note, ...taken } = await read(file);
      state.tray.push(taken);
      if (note) told.push(note);
    }
  }
  if (files.length) say(told.join(" "));
  showTray();
  $("question").focus();
}

// The end of the conversation stays in view while it grows, unless the reader has scrolled up.
function follow() {
  let last = 0;
  const end = () => document.documentElement.scrollHeight - window.innerHeight;
  new ResizeObserver(() => state.following && window.scrollTo(0, end())).observe($("log"));
  window.addEventListener("scroll", () => {
    if (window.scrollY < last) state.following = false;
    if (window.scrollY > end() - 40) state.following = true;
    last = window.scrollY;
  });
}

const filesOf = (transfer) => [...(transfer?.files ?? [])];

// ------------------------------------------------------------------------------------------------ asking

const settings = () => Object.fromEntries(new FormData($("settings").querySelector("form")));

function headers() {
  const key = settings().key;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
}

function messages(turns = state.turns) {
  const { system } = settings();
  const told = turns.map((turn) => ({
    role: turn.role,
    content: turn.pictures.length
      ? [...turn.pictures.map((each) => ({ type: "image_url", image_url: { url: each.url } })), { type: "text", text: turn.text }]
      : turn.text,
  }));
  return system ? [{ role: "system", content: system }, ...told] : told;
}

function request() {
  const { temperature, top_p, max_tokens, seed } = settings();
  return {
    model: state.model,
    messages: messages(),
    temperature: Number(temperature),
    top_p: Number(top_p),
    max_tokens: Number(max_tokens) || 128,
    ...(seed === "" ? {} : { seed: Number(seed) }),
    stream: true,
    stream_options: { include_usage: true },
  };
}

async function failure(response) {
  const body = await response.json().catch(() => ({}));
  if (response.status === 401) return "The server wants an API key: put it under Settings.";
  if (body.error?.code === "body_too_large") return "The pictures of this conversation are too large together. Begin a new one.";
  return body.error?.message ?? `The server answered ${response.status}.`;
}

// Server-sent events of one response, parsed as they come.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    rest += value;
    const blocks = rest.split(/\r?\n\r?\n/);
    rest = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:")).map((line) => line.slice(5).trim()).join("\n");
      if (data && data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

function busy(controller) {
  state.running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
}

async function answer() {
  const turn = { role: "assistant", text: "", pictures: [] };
  const { item, said } = showTurn(turn);
  const controller = new AbortController();
  busy(controller);
  item.ariaBusy = "true"; // a screen reader reads the whole answer once, not every token
  const begun = performance.now();
  let usage = null;
  let first = null;
  let stopped = false;
  let wrong = "";
  try {
    const response = await fetch("/v1/chat/completions", {
      method: "POST", headers: headers(), body: JSON.stringify(request()), signal: controller.signal,
    });
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      const piece = event.choices?.[0]?.delta?.content;
      if (piece) {
        first ??= performance.now();
        turn.text += piece;
        said.replaceChildren(...rendered(turn.text));
      }
    }
  } catch (error) {
    stopped = error.name === "AbortError";
    if (!stopped) wrong = error instanceof TypeError ? "The server cannot be reached." : error.message;
  }
  item.ariaBusy = "false";
  busy(null);
  if (!item.isConnected) return; // a new conversation was begun meanwhile
  if (wrong || (stopped && !turn.text)) {
    item.remove();
    takeBack(wrong);
  } else {
    state.turns.push(turn);
    if (!turn.text) said.append(make("span", { className: "soft", textContent: "The model said nothing." }));
    const told = make("span", { textContent: facts(usage, begun, first, stopped) });
    item.append(make("div", { className: "tools" }, ...copy(turn), again(item), ...look(item), told));
  }
  $("question").focus();
}

// Nothing is lost when an answer fails: the question and its pictures go back to where they were written.
function takeBack(why) {
  const turn = state.turns.pop();
  $("log").lastElementChild?.remove();
  $("welcome").hidden = state.turns.length > 0;
  $("question").value = [turn.text, $("question").value].filter(Boolean).join("\n");
  state.tray = [...turn.pictures, ...state.tray];
  showTray();
  say(why);
}

function facts(usage, begun, first, stopped) {
  const parts = [];
  if (stopped) parts.push("stopped");
  if (usage) parts.push(`${usage.prompt_tokens} tokens read, ${usage.completion_tokens} written`);
  if (first) parts.push(`first after ${((first - begun) / 1000).toFixed(1)} s`);
  return parts.join(" · ");
}

// Browsers give pages the clipboard over https and from this machine alone.
function copy(turn) {
  if (!navigator.clipboard) return [];
  const button = make("button", { type: "button", textContent: "Copy" });
  button.addEventListener("click", () => navigator.clipboard.writeText(turn.text).then(
    () => say("Copied."), () => say("The browser did not let it be copied."),
  ));
  return [button];
}

function again(item) {
  const button = make("button", { type: "button", textContent: "Try again" });
  button.addEventListener("click", () => {
    if (state.running) return;
    const turns = [...$("log").children];
    const kept = turns.indexOf(item);
    turns.slice(kept).forEach((each) => each.remove());
    state.turns.length = kept;
    answer();
  });
  return button;
}

// ------------------------------------------------------------------------------------------------ where it looked

// A switch beside an answer, if there are pictures it could have looked at.
function look(item) {
  const turns = state.turns.slice(0, [...$("log").children].indexOf(item)); // the answer was begun after these
  if (!state.attention || !turns.some((turn) => turn.pictures.length)) return [];
  const button = make("button", { type: "button", className: "look", textContent: "Where it looked", ariaPressed: "false" });
  button.addEventListener("click", async () => {
    const shown = button.ariaPressed === "true";
    $("log").querySelectorAll("canvas").forEach((canvas) => canvas.remove());
    $("log").querySelectorAll(".look").forEach((each) => { each.ariaPressed = "false"; });
    if (shown) return;
    button.disabled = true;
    await attend(turns, button).finally(() => { button.disabled = false; });
  });
  return [button];
}

async function attend(turns, button) {
  const response = await fetch("/page/attention", {
    method: "POST", headers: headers(), body: JSON.stringify({ model: state.model, messages: messages(turns) }),
  }).catch(() => null);
  if (!response?.ok) {
    say(response ? await failure(response) : "The server cannot be reached.");
    return;
  }
  const { maps } = await response.json();
  [...$("log").querySelectorAll(".user .picture")].slice(0, maps.length).forEach((figure, index) => overlay(figure, maps[index], state.aspect));
  button.ariaPressed = "true";
  say("The brighter a place, the more the model looked at it as it began to answer.");
}

// ------------------------------------------------------------------------------------------------ wiring

async function submit(event) {
  event?.preventDefault();
  const text = $("question").value.trim();
  if (state.running || (!text && !state.tray.length)) return;
  const turn = { role: "user", text, pictures: state.tray };
  state.tray = [];
  showTray();
  $("question").value = "";
  ready();
  say("");
  state.following = true;
  state.turns.push(turn);
  showTurn(turn);
  await answer();
}

function clear() {
  state.running?.abort();
  state.turns = [];
  $("log").replaceChildren();
  $("welcome").hidden = false;
  say("");
  $("question").focus();
}

async function introduce() {
  const response = await fetch("/page/facts", { headers: headers() }).catch(() => null);
  if (!response?.ok) {
    $("model").textContent = "";
    say(response ? await failure(response) : "The server cannot be reached.");
    return;
  }
  const { model, facts: known, attention, aspect, max_tokens } = await response.json();
  state.model = model;
  state.aspect = aspect;
  state.attention = attention;
  $("model").textContent = model;
  document.title = `${model} · Isthmus`;
  $("facts").replaceChildren(
    ...Object.entries(known).flatMap(([name, value]) => [make("dt", { textContent: name }), make("dd", { textContent: value })]),
  );
  const longest = $("settings").querySelector("form").elements.max_tokens;
  longest.max = max_tokens;
  if (Number(longest.value) > max_tokens) longest.value = max_tokens; // else the settings would not close
}

function showValues() {
  for (const label of $("settings").querySelectorAll("label:has(.value)")) {
    label.querySelector(".value").textContent = label.querySelector("input").value;
  }
}

$("composer").addEventListener("submit", submit);
$("stop").addEventListener("click", () => state.running?.abort());
$("clear").addEventListener("click", clear);
$("files").addEventListener("change", async (event) => {
  await add([...event.target.files]);
  event.target.value = "";
});
$("question").addEventListener("input", ready);
$("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("settings").open) state.running?.abort();
});
document.addEventListener("paste", (event) => {
  const files = filesOf(event.clipboardData);
  if (files.length) {
    event.preventDefault();
    add(files);
  }
});
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  $("drop").hidden = false;
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) $("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  $("drop").hidden = true;
  add(filesOf(event.dataTransfer));
});
$("settings-open").addEventListener("click", () => $("settings").showModal());
$("settings").addEventListener("input", showValues);
$("settings").addEventListener("close", () => state.model || introduce());
showValues();
follow();
ready();
introduce();
$("question").focus();
