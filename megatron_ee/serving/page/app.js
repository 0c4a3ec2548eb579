// A chat with the server, whose tokens are tinted by the layer that wrote them.

import { Refused, chat, getJson } from "./api.js";
import { differences } from "./differences.js";
import { TEXTS, firstLanguage, saveLanguage } from "./texts.js";

const STRONGEST = 0.85;
const FAINTEST = 0.25;

const $ = (id) => document.getElementById(id);

const page = {
  language: firstLanguage(),
  layers: 0, // of the model
  sampling: { temperature: 0 }, // of the requests
  exits: [], // layers of the exits, ascending
  messages: [], // of the conversation
  counts: new Map(), // number of tokens by layer
  running: null, // AbortController of the answer that is being written
};

// ---- Texts ----

const said = new Map(); // by element, the function that makes its text

/** Show a text in the current language now, and again after the language changes. */
function say(element, text) {
  said.set(element, text);
  element.textContent = text(TEXTS[page.language]);
}

function show(language) {
  page.language = language;
  document.documentElement.lang = language;
  $("language").value = language;
  const texts = TEXTS[language];
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = texts[element.dataset.text];
  for (const element of document.querySelectorAll("[data-placeholder]"))
    element.placeholder = texts[element.dataset.placeholder];
  for (const [element, text] of said) {
    if (element.isConnected) element.textContent = text(texts);
    else said.delete(element);
  }
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

function controls() {
  const mode = $("mode").value;
  $("threshold-row").hidden = mode !== "threshold";
  $("threshold-value").textContent = Number($("threshold").value).toFixed(2);
  say($("mode-help"), (texts) => texts.modeHelp[mode]);
}

function earlyExit() {
  const mode = $("mode").value;
  if (mode === "default") return undefined;
  if (mode !== "threshold") return { mode };
  // Under a certificate, thresholds of one's own need the word; without one it says nothing new.
  return { mode, threshold: Number($("threshold").value), uncertified: true };
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

/** Show the end of an entry of the conversation, above the form, which covers the lower end of the window. */
function showEnd(entry) {
  entry.style.scrollMarginBottom = `${$("form").offsetHeight + $("detail").offsetHeight}px`;
  entry.scrollIntoView({ block: "end" });
}

/** Go on showing the end of an entry that grows, unless the reader has scrolled away from it. */
function followEnd(entry) {
  if (entry.getBoundingClientRect().bottom < window.innerHeight) showEnd(entry);
}

/** An answer on the page. `tokens` holds text, layer, confidence and span of each token. */
function newAnswer(title) {
  const heading = element("h3", "");
  const text = element("div", "text");
  text.tabIndex = 0;
  text.setAttribute("role", "group");
  const facts = element("p", "facts");
  const box = element("div", "answer", heading, text, facts);
  const answer = { box, text, facts, tokens: [], current: -1, cut: false, stopped: false, summary: null };
  say(heading, title);
  text.addEventListener("pointerover", (event) => point(answer, answer.tokens.findIndex((t) => t.span === event.target)));
  text.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (step === undefined || !answer.tokens.length) return;
    event.preventDefault();
    point(answer, Math.min(Math.max(answer.current + step, 0), answer.tokens.length - 1));
  });
  text.addEventListener("blur", () => point(answer, -1));
  return answer;
}

function point(answer, index) {
  answer.tokens[answer.current]?.span.classList.remove("current");
  answer.current = index;
  const token = answer.tokens[index];
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
    for await (const chunk of chat({ messages, ...page.sampling, ...settings }, signal)) {
      const choice = chunk.choices[0];
      if (choice?.early_exit) {
        addTokens(answer, choice.early_exit);
        each(choice.early_exit.layers);
      }
      if (choice?.finish_reason === "length") answer.cut = true;
      if (chunk.early_exit) answer.summary = chunk.early_exit;
    }
  } catch (error) {
    if (error.name !== "AbortError") throw error;
    answer.stopped = true;
  }
  const seconds = (performance.now() - started) / 1000;
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
  page.running = new AbortController();
  $("error").hidden = true;
  $("send").hidden = true;
  $("stop").hidden = false;
  try {
    await work(page.running.signal);
  } catch (error) {
    const refused = error instanceof Refused;
    if (!refused && !(error instanceof TypeError)) throw error; // fetch fails with a TypeError
    say($("error"), (texts) => (refused ? texts.failed(error.message) : texts.lost));
    $("error").hidden = false;
  } finally {
    page.running = null;
    $("send").hidden = false;
    $("stop").hidden = true;
  }
}

async function send() {
  const content = $("message").value.trim();
  if (!content || page.running) return;
  const messages = [...page.messages, { role: "user", content }];
  const answer = newAnswer((texts) => texts.answer);
  const answers = element("div", "answers", answer.box);
  const entry = element("li", "", element("p", "question", content), answers);
  $("introduction").hidden = true;
  $("log").append(entry);
  showEnd(entry);
  const settings = { max_tokens: Number($("max-tokens").value) || 256 };
  await run(async (signal) => {
    $("message").value = "";
    try {
      await ask(answer, messages, { ...settings, early_exit: earlyExit() }, signal, (layers) => {
        for (const layer of layers) page.counts.set(layer, (page.counts.get(layer) ?? 0) + 1);
        drawHistogram();
        followEnd(entry);
      });
    } catch (error) {
      if (!answer.tokens.length) {
        entry.remove();
        $("message").value = content;
      }
      throw error;
    }
    if (!entry.isConnected) return; // a new conversation has begun
    page.messages = [...messages, { role: "assistant", content: textOf(answer) }];
    const button = element("button", "quiet");
    button.type = "button";
    say(button, (texts) => texts.compare);
    button.addEventListener("click", () => compare(button, answers, answer, messages, settings));
    answer.box.append(button);
    followEnd(entry);
  });
  $("message").focus({ preventScroll: true });
}

/** Number of tokens up to which two answers can be compared: what a stopped one would have gone on with is not known. */
function comparable(...answers) {
  return Math.min(...answers.map((answer) => (answer.stopped ? answer.tokens.length : Infinity)));
}

/** Show full mode's answer beside an answer, and mark what differs. */
async function compare(button, answers, answer, messages, settings) {
  await run(async (signal) => {
    button.disabled = true;
    say(button, (texts) => texts.comparing);
    const full = newAnswer((texts) => texts.fullAnswer);
    answers.append(full.box);
    try {
      await ask(full, messages, { ...settings, early_exit: { mode: "full" } }, signal);
    } catch (error) {
      full.box.remove();
      button.disabled = false;
      say(button, (texts) => texts.compare);
      throw error;
    }
    const limit = comparable(answer, full);
    const [left, right] = [answer, full].map((each) => each.tokens.slice(0, limit).map((token) => token.text));
    const marks = differences(left, right);
    for (const [side, each] of [[marks.left, answer], [marks.right, full]])
      side.forEach((differs, index) => each.tokens[index].span.classList.toggle("differs", differs));
    const verdict = element("p", "facts verdict");
    say(verdict, (texts) => {
      if (marks.first !== null) return texts.departs(marks.first + 1, Math.max(left.length, right.length));
      return limit === Infinity ? texts.same : texts.sameSoFar(left.length);
    });
    button.replaceWith(verdict);
  });
}

function clear() {
  page.running?.abort();
  page.messages = [];
  page.counts.clear();
  $("log").replaceChildren();
  $("introduction").hidden = false;
  said.delete($("detail"));
  $("detail").textContent = "";
  drawHistogram();
  $("message").focus();
}

// ---- Start ----

function listen() {
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    send();
  });
  $("message").addEventListener("keydown", (event) => {
    // An Enter that ends the input of a Japanese word is part of the composition.
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    send();
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") page.running?.abort();
  });
  $("stop").addEventListener("click", () => page.running?.abort());
  $("clear").addEventListener("click", clear);
  $("mode").addEventListener("change", controls);
  $("threshold").addEventListener("input", controls);
  $("language").addEventListener("change", () => {
    saveLanguage($("language").value);
    show($("language").value);
  });
}

async function start() {
  show(page.language);
  listen();
  try {
    const [models, found] = await Promise.all([getJson("v1/models"), getJson("v1/exits")]);
    $("model").textContent = document.title = models.data[0].id;
    page.layers = found.num_layers;
    const { rules } = found; // for this key
    const task = rules.tasks[rules.default?.task];
    const certificate = task?.mode ? null : task?.certificate; // a mode of the rules comes before the certificate
    if (certificate) {
      // With other settings the answer would be full mode's. The server takes what is left out from the certificate.
      page.sampling = { seed: 0 };
      $("max-tokens").value = certificate.decoding.max_tokens;
    }
    page.exits = found.exits.map((each) => each.layer).sort((a, b) => a - b);
    const thresholds = rules.may_choose && rules.priority !== "important";
    const modes = ["default", ...found.modes.filter((mode) => mode !== "threshold" || thresholds)];
    $("mode").replaceChildren(
      ...modes.map((mode) => {
        const option = element("option", "");
        option.value = mode;
        say(option, (texts) => texts.modes[mode]);
        return option;
      }),
    );
    say($("state"), (texts) => (page.exits.length ? texts.ready(page.exits.length) : texts.noExits));
  } catch (error) {
    say($("state"), (texts) => (error instanceof Refused ? texts.failed(error.message) : texts.lost));
  }
  controls();
  drawLegend();
  drawHistogram();
}

start();
