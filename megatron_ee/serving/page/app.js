// A chat with the server, whose tokens are tinted by the layer that wrote them.

import { Broken, Refused, chat, getJson } from "./api.js";
import { differences } from "./differences.js";
import { TEXTS, firstLanguage, saveLanguage } from "./texts.js";

const STRONGEST = 0.85;
const FAINTEST = 0.25;
const TOKENS = 256; // at most, of an answer
const NARROW = matchMedia("(max-width: 52rem)"); // as in style.css

const $ = (id) => document.getElementById(id);

const page = {
  language: firstLanguage(),
  layers: 0, // of the model
  limit: TOKENS, // of an answer's tokens, as the server has it
  rules: null, // for this key; null until the server has told them
  sampling: { temperature: 0 }, // of the requests
  exits: [], // layers of the exits, ascending
  answers: 0, // number of answers so far
  pointed: undefined, // span of the token whose layer is shown
  messages: [], // of the conversation
  counts: new Map(), // number of tokens by layer
  running: null, // AbortController of the answer that is being written
};

// ---- Texts ----

const said = new Map(); // by element, the function that makes its text

/** Show a text in the current language now, and again after the language changes, as long as it is in the page. */
function say(element, text) {
  said.set(element, text);
  element.textContent = text(TEXTS[page.language]);
}

function forgetRemoved() {
  for (const element of said.keys()) if (!element.isConnected) said.delete(element);
}

function show(language) {
  page.language = language;
  document.documentElement.lang = language;
  $("language").value = language;
  const texts = TEXTS[language];
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = texts[element.dataset.text];
  for (const element of document.querySelectorAll("[data-placeholder]"))
    element.placeholder = texts[element.dataset.placeholder];
  forgetRemoved();
  for (const [element, text] of said) element.textContent = text(texts);
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

const place = (texts, layer) => (page.exits.includes(layer) ? texts.exit(layer) : texts.final(layer));

/** Strength of a layer's tint: the first exit has the strongest, the final exit none. */
function tint(layer) {
  const index = page.exits.indexOf(layer);
  if (index < 0) return 0;
  return STRONGEST - ((STRONGEST - FAINTEST) * index) / Math.max(page.exits.length - 1, 1);
}

// ---- Settings, legend and histogram ----

/** Fill a select with options: pairs of a value and the function that makes its text. */
function offer(select, options) {
  select.replaceChildren(
    ...options.map(([value, text]) => {
      const option = element("option", "");
      option.value = value;
      say(option, text);
      return option;
    }),
  );
}

const modeOption = (mode) => [mode, (texts) => texts.modes[mode]];

/** Set what the certificate of the task asks for. */
function chooseTask() {
  const task = page.rules.tasks[$("task").value || page.rules.default?.task];
  const certificate = task?.mode ? null : task?.certificate; // a mode of the rules comes before the certificate
  // With other settings the answer would be full mode's. The server takes what is left out from the certificate.
  page.sampling = certificate ? { seed: 0 } : { temperature: 0 };
  $("max-tokens").value = Math.min(certificate?.decoding.max_tokens ?? TOKENS, page.limit);
}

function controls() {
  const mode = $("mode").value;
  $("threshold-row").hidden = mode !== "threshold";
  $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
  say($("mode-help"), (texts) => texts.modeHelp[mode]);
}

/** The task as requests name it. */
const namedTask = () => ($("task").value ? { task: $("task").value } : {});

function earlyExit() {
  const mode = $("mode").value;
  if (mode === "default") return namedTask();
  if (mode !== "threshold") return { ...namedTask(), mode };
  // Under a certificate, thresholds of one's own need the word; without one it says nothing new.
  return { ...namedTask(), mode, threshold: Number($("threshold").value), uncertified: true };
}

function drawLegend() {
  const rows = [...page.exits, page.layers].map((layer) => {
    const swatch = element("span", "swatch");
    swatch.style.setProperty("--tint", tint(layer));
    const name = element("span", "");
    const row = element("li", "", swatch, name);
    say(name, (texts) => place(texts, layer));
    return row;
  });
  $("legend").replaceChildren(...rows);
}

function drawHistogram() {
  if (!page.rules) return;
  const total = [...page.counts.values()].reduce((sum, count) => sum + count, 0);
  const rows = [...page.exits, page.layers].map((layer) => {
    const count = page.counts.get(layer) ?? 0;
    const name = element("th", "");
    name.scope = "row";
    const bar = element("i", "");
    bar.style.setProperty("--tint", tint(layer));
    bar.style.setProperty("--share", total ? count / total : 0);
    const share = total ? ` (${((100 * count) / total).toFixed(0)}%)` : "";
    const row = element("tr", "", name, element("td", "bar", bar), element("td", "count", `${count}${share}`));
    name.textContent = String(layer);
    name.title = place(TEXTS[page.language], layer);
    return row;
  });
  $("histogram").tBodies[0].replaceChildren(...rows);
  const sum = [...page.counts].reduce((value, [layer, count]) => value + layer * count, 0);
  say($("totals"), (texts) => (total ? texts.totals(total, (sum / total).toFixed(1)) : texts.none));
}

// ---- Answers ----

/** Scroll to an element, between the form and, on a phone, the settings: they cover the ends of the window. */
function bringIntoView(element, block) {
  element.style.scrollMarginBottom = `${$("form").offsetHeight}px`;
  element.style.scrollMarginTop = `${NARROW.matches ? document.querySelector("aside").offsetHeight : 0}px`;
  element.scrollIntoView({ block });
}

const showEnd = (entry) => bringIntoView(entry, "end");

/** Go on showing the end of an entry that grows, unless the reader has scrolled away from it. */
function followEnd(entry) {
  if (entry.getBoundingClientRect().bottom < window.innerHeight) showEnd(entry);
}

/** A paragraph that screen readers read once it has a text. It must be in the page before. */
function status(className) {
  const made = element("p", className);
  made.setAttribute("role", "status");
  return made;
}

/** An answer on the page. `tokens` holds text, layer, confidence and span of each token. */
function newAnswer(title) {
  const heading = element("h3", "");
  heading.id = `answer-${++page.answers}`;
  const text = element("div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  text.setAttribute("aria-labelledby", heading.id);
  const facts = status("facts");
  const box = element("div", "answer", heading, text, facts);
  const answer = { box, text, facts, tokens: [], current: -1, cut: false, stopped: false, summary: null };
  say(heading, title);
  // Not pointerover, which also comes when the text is scrolled under a pointer that rests.
  for (const name of ["pointermove", "pointerdown"])
    text.addEventListener(name, (event) => {
      if (event.target !== page.pointed) point(answer, answer.tokens.findIndex((token) => token.span === event.target));
    });
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step === undefined || !answer.tokens.length) return;
    event.preventDefault();
    point(answer, Math.min(Math.max(answer.current + step, 0), answer.tokens.length - 1));
    bringIntoView(answer.tokens[answer.current].span, "nearest");
  });
  text.addEventListener("blur", () => point(answer, -1));
  return answer;
}

function point(answer, index) {
  page.pointed?.classList.remove("current");
  answer.current = index;
  const token = answer.tokens[index];
  page.pointed = token?.span;
  if (!token) return;
  token.span.classList.add("current");
  const confidence = token.confidence.toFixed(3);
  say($("detail"), (texts) => `${JSON.stringify(token.text)}: ${texts.token(place(texts, token.layer), confidence)}`);
}

function addTokens(answer, details) {
  for (const [index, layer] of details.layers.entries()) {
    const span = element("span", "", details.pieces[index]);
    span.style.setProperty("--tint", tint(layer));
    answer.text.append(span);
    answer.tokens.push({ text: details.pieces[index], layer, confidence: details.confidences[index], span });
  }
}

const textOf = (answer) => answer.tokens.map((token) => token.text).join("");

/** Ask the server, and show the answer as it comes. `each` is called with the layers of new tokens. */
async function ask(answer, messages, settings, signal, each = () => {}) {
  const started = performance.now();
  try {
    for await (const chunk of chat({ messages, ...settings }, signal)) {
      const choice = chunk.choices[0];
      if (choice?.early_exit) {
        addTokens(answer, choice.early_exit);
        each(choice.early_exit.layers);
      }
      if (choice?.finish_reason === "length") answer.cut = true;
      if (chunk.early_exit) answer.summary = chunk.early_exit;
    }
  } catch (error) {
    answer.stopped = true;
    if (error.name !== "AbortError") throw error;
  } finally {
    if (answer.box.isConnected) sayFacts(answer, (performance.now() - started) / 1000);
  }
}

function sayFacts(answer, seconds) {
  const count = answer.tokens.length;
  say(answer.facts, (texts) => {
    const parts = [texts.facts(count, seconds.toFixed(1), (count / seconds).toFixed(1))];
    const { layers_per_token: run, proposed, accepted, calibration } = answer.summary ?? {};
    if (run != null) parts.push(texts.layers(run.toFixed(1), page.layers));
    if (proposed) parts.push(texts.drafts(accepted, proposed));
    if (calibration?.status === "certified") parts.push(texts.certified(calibration.task));
    if (calibration?.status === "uncertified") parts.push(texts.uncertified);
    if (answer.stopped) parts.push(texts.stopped);
    if (answer.cut) parts.push(texts.cut);
    return parts.join(" · ");
  });
}

/** Run one call to the server at a time, with the stop button shown, and say what went wrong. */
async function run(work) {
  if (page.running) return;
  $("error").hidden = true;
  setRunning(new AbortController());
  try {
    await work(page.running.signal);
  } catch (error) {
    if (error.name === "AbortError") return;
    say($("error"), explanation(error));
    $("error").hidden = false;
  } finally {
    setRunning(null);
  }
}

function setRunning(controller) {
  page.running = controller;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  for (const button of document.querySelectorAll("#log button")) button.disabled = Boolean(controller);
}

/** The function that makes the text about an error. */
function explanation(error) {
  if (error instanceof Refused) return (texts) => texts.failed(error.message);
  if (error instanceof Broken) return (texts) => texts.broken;
  if (error instanceof TypeError) return (texts) => texts.lost; // so fetch fails
  return (texts) => texts.unexpected(error.message);
}

/** Focus an element if what had the focus is gone. */
function focusIfLost(element) {
  const gone = [document.body, $("send"), $("stop")]; // the buttons were hidden
  if (gone.includes(document.activeElement)) element.focus({ preventScroll: true });
}

async function send() {
  const content = $("message").value.trim();
  if (!content || page.running) return;
  await run(async (signal) => {
    if (!page.rules) await load(signal);
    const messages = [...page.messages, { role: "user", content }];
    const settings = { ...page.sampling, max_tokens: Number($("max-tokens").value) || TOKENS, early_exit: earlyExit() };
    const full = { ...settings, early_exit: { ...namedTask(), mode: "full" } };
    const answer = newAnswer((texts) => texts.answer);
    const answers = element("div", "answers", answer.box);
    const entry = element("li", "", element("p", "question", content), answers);
    $("introduction").hidden = true;
    $("log").append(entry);
    showEnd(entry);
    $("message").value = "";
    try {
      await ask(answer, messages, settings, signal, (layers) => {
        for (const layer of layers) page.counts.set(layer, (page.counts.get(layer) ?? 0) + 1);
        drawHistogram();
        followEnd(entry);
      });
    } catch (error) {
      if (!answer.tokens.length) {
        entry.remove();
        $("introduction").hidden = $("log").childElementCount > 0;
        $("message").value ||= content; // unless something was typed meanwhile
      }
      throw error;
    } finally {
      if (entry.isConnected) {
        page.messages = [...messages, { role: "assistant", content: textOf(answer) }];
        if (answer.tokens.length) offerComparison(answers, answer, messages, full);
        followEnd(entry);
      }
    }
  });
  focusIfLost($("message"));
}

// ---- Comparison ----

function offerComparison(answers, answer, messages, settings) {
  const button = element("button", "quiet");
  button.type = "button";
  say(button, (texts) => texts.compare);
  button.addEventListener("click", () => compare(button, answers, answer, messages, settings));
  answer.box.append(button);
}

/** Show full mode's answer beside an answer, and mark what differs. */
async function compare(button, answers, answer, messages, settings) {
  if (page.running) return;
  const focused = document.activeElement === button; // a button that is disabled loses the focus
  const full = newAnswer((texts) => texts.fullAnswer);
  const verdict = status("facts verdict");
  verdict.tabIndex = -1;
  await run(async (signal) => {
    say(button, (texts) => texts.comparing);
    answers.append(full.box);
    answer.box.append(verdict);
    let comparable = false;
    try {
      await ask(full, messages, settings, signal);
      comparable = full.tokens.length > 0; // none if it was stopped before the first
    } finally {
      if (comparable) {
        say(verdict, marked(answer, full));
        button.remove();
      } else {
        full.box.remove();
        verdict.remove();
        say(button, (texts) => texts.compare);
      }
    }
  });
  if (focused) focusIfLost(verdict.isConnected ? verdict : button);
}

/** Number of tokens up to which two answers can be compared: what a stopped one would have gone on with is not known. */
function comparedTokens(...answers) {
  return Math.min(...answers.map((answer) => (answer.stopped ? answer.tokens.length : Infinity)));
}

/** Mark what differs from full mode's answer. Returns the function that makes the verdict's text. */
function marked(answer, full) {
  const limit = comparedTokens(answer, full);
  const [left, right] = [answer, full].map((each) => each.tokens.slice(0, limit).map((token) => token.text));
  const marks = differences(left, right);
  for (const [side, each] of [[marks.left, answer], [marks.right, full]])
    side.forEach((differs, index) => each.tokens[index].span.classList.toggle("differs", differs));
  return (texts) => {
    if (marks.first !== null) return texts.departs(marks.first + 1, Math.max(left.length, right.length));
    return limit === Infinity ? texts.same : texts.sameSoFar(left.length);
  };
}

function clear() {
  page.running?.abort();
  page.messages = [];
  page.counts.clear();
  $("log").replaceChildren();
  forgetRemoved();
  $("introduction").hidden = false;
  $("error").hidden = true;
  said.delete($("detail"));
  $("detail").textContent = "";
  drawHistogram();
  $("message").focus();
}

// ---- Start ----

/** Whether a key belongs to the input of a Japanese word. 229 is Safari's Enter that ends it. */
const composes = (event) => event.isComposing || event.keyCode === 229;

/** On a phone the settings are closed at first. */
function fold() {
  $("panel").open = !NARROW.matches;
}

function listen() {
  fold();
  NARROW.addEventListener("change", fold);
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("message").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && !composes(event)) page.running?.abort();
  });
  $("stop").addEventListener("click", () => page.running?.abort());
  $("clear").addEventListener("click", clear);
  $("task").addEventListener("change", chooseTask);
  $("mode").addEventListener("change", controls);
  $("threshold").addEventListener("input", controls);
  $("language").addEventListener("change", () => {
    saveLanguage($("language").value);
    show($("language").value);
    drawHistogram();
  });
}

/** Learn from the server what the page can offer. */
async function load(signal) {
  const [models, found] = await Promise.all([getJson("v1/models", signal), getJson("v1/exits", signal)]);
  if (page.rules) return; // another call was quicker
  $("model").textContent = document.title = models.data[0].id;
  page.layers = found.num_layers;
  page.exits = found.exits.map((each) => each.layer).sort((a, b) => a - b);
  page.rules = found.rules;
  page.limit = $("max-tokens").max = found.max_tokens;
  const { default: unnamed, may_choose, may_name, priority } = found.rules;
  const tasks = may_name.map((name) => [name, () => name]);
  offer($("task"), unnamed ? [["", (texts) => texts.noTask], ...tasks] : tasks);
  $("task-row").hidden = !tasks.length;
  const thresholds = may_choose && priority !== "important";
  const modes = found.modes.filter((mode) => mode !== "threshold" || thresholds);
  offer($("mode"), ["default", ...modes].map(modeOption));
  say($("state"), (texts) => (page.exits.length ? texts.ready(page.exits.length) : texts.noExits));
  chooseTask();
  controls();
  drawLegend();
  drawHistogram();
}

async function start() {
  show(page.language);
  listen();
  offer($("mode"), [modeOption("default")]);
  controls();
  try {
    await load();
  } catch (error) {
    say($("state"), explanation(error)); // the first message tries again
  }
}

start();
