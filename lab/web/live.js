// live.js: the panels. The learner types a prompt, and every model answers at once.
//
// A prompt is shown and computed anew with each keystroke. Choosing another character, head or
// temperature only draws again what has been computed.
"use strict";

const N_LISTED = 3; // the characters that the sentence below an attention map names
const LONGEST = 200; // characters that one press of the button writes
const N_UNKNOWN = 5; // the characters that a message about unknown ones names
const PAUSE = 40; // milliseconds between two of them
const DARKEST = 6; // the surprise in nats from which on the colour gets no stronger

const packed = JSON.parse(document.getElementById("live-weights").textContent);
const characters = packed.characters; // token id -> character
const n_bars = Math.min(10, characters.length); // the likeliest next characters that are shown
const block_size = packed.block_size;
const ids = new Map(characters.map((character, id) => [character, id]));
const models = {};
const caches = {}; // what each model keeps of the prompt
for (const [name, parameters] of Object.entries(packed.models)) {
  models[name] = loadModel(parameters);
  caches[name] = new Cache();
}

// What is on the page now. position is the chosen character of the prompt, from 0.
const state = { idx: [], position: 0, temperature: 1, answers: {} };

const promptField = document.getElementById("live-prompt");
const message = document.getElementById("live-message");
const view = document.getElementById("live-view");
const slider = document.getElementById("live-temperature");
const sliderValue = document.getElementById("live-temperature-value");
const writer = document.getElementById("live-writer");
const writeButton = document.getElementById("live-write");
const columns = [...document.querySelectorAll(".live-answers > [data-model]")];
const panels = [...document.querySelectorAll(".live-panel")];

let ink = readInk();

// ---- Computing

// The logits, a Matrix (T, V), the surprise of each character, (T), and the attention weights of
// each head, where maps[h][i][j] says how much position i attends to position j.
function answer(name, idx, cache) {
  const logits = computeLogits(name, models[name], idx, cache);
  const surprises = idx.map((_, t) => surprise(logits, idx, t));
  const maps = [...cache.heads.values()].map((kept) => kept.weights);
  return { logits, surprises, maps };
}

// The text as a list of characters; a character outside the basic plane counts as one.
function split(text) {
  return Array.from(text);
}

// The token ids of a text that has only known characters.
function encode(text) {
  return split(text).map((character) => ids.get(character));
}

// -ln p of the character at position t, in nats. Nothing precedes the first one, so it has none.
function surprise(logits, idx, t) {
  return t === 0 ? null : -Math.log(softmax(logits.row(t - 1))[idx[t]]);
}

// The mean surprise as text; a prompt of one character has none.
function meanSurprise([, ...surprises]) {
  if (surprises.length === 0) return "–";
  const total = surprises.reduce((sum, nats) => sum + nats, 0);
  return `${(total / surprises.length).toFixed(2)} nats`;
}

// The probabilities (V) of the character after the prompt.
function predictNext({ logits }) {
  return softmax(logits.row(logits.rows - 1), state.temperature);
}

// Token ids with the largest values first.
function sortedIds(values) {
  return [...values.keys()].sort((a, b) => values[b] - values[a]);
}

// ---- Writing characters so that they can be seen and read aloud

function symbol(character) {
  return { "\n": "↵", " ": "␣", "\t": "⇥" }[character] ?? character;
}

function spoken(character) {
  if (/[\p{C}\p{Z}\p{M}]/u.test(character) && !" \n\t".includes(character)) {
    // It can't be seen, or not alone.
    return `U+${character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}`;
  }
  return { "\n": "line break", " ": "space", "\t": "tab" }[character] ?? `‘${character}’`;
}

// ---- Drawing

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

// The empty rows for the likeliest next characters.
function makeBars(column) {
  for (let i = 0; i < n_bars; i++) {
    const row = element("li", "live-bar");
    const label = element("span", "live-symbol");
    label.setAttribute("role", "img");
    const track = element("span", "live-track");
    track.append(element("span", "live-fill"));
    row.append(label, track, element("span", "live-number"));
    column.querySelector(".live-bars").append(row);
  }
}

// The likeliest next characters. The width of a bar is the probability itself.
function drawBars(column, given) {
  const mean = meanSurprise(given.surprises);
  column.querySelector(".live-mean").textContent = `mean surprise ${mean}`;
  const probabilities = predictNext(given); // (V)
  const likeliest = sortedIds(probabilities);
  column.querySelectorAll(".live-bar").forEach((row, i) => {
    const id = likeliest[i];
    const [label, track, number] = row.children;
    label.textContent = symbol(characters[id]);
    label.setAttribute("aria-label", spoken(characters[id]));
    track.firstChild.style.width = `${100 * probabilities[id]}%`;
    number.textContent = probabilities[id].toFixed(3);
  });
}

// The prompt as a row of characters that can be coloured.
function fillStrip(strip) {
  const text = state.idx.map((id) => characters[id]);
  const cells = strip.children; // one for each character
  while (cells.length > text.length) strip.lastChild.remove();
  while (cells.length < text.length) strip.append(element("span", "live-cell"));
  text.forEach((character, t) => {
    if (cells[t].textContent === symbol(character)) return; // it can stay as it is
    cells[t].textContent = symbol(character);
    cells[t].dataset.position = t;
    cells[t].classList.toggle("live-line-end", character === "\n");
  });
  strip.setAttribute("aria-valuemin", 1);
  strip.setAttribute("aria-valuemax", text.length);
}

// Colours the characters of a strip; strengths from 0 to 1, or null for a character without one.
function colourStrip(strip, strengths) {
  [...strip.children].forEach((cell, t) => {
    cell.style.setProperty("--strength", strengths[t] ?? 0);
    cell.classList.toggle("live-chosen", t === state.position);
    cell.classList.toggle("live-without", strengths[t] === null);
  });
}

// What a strip says about the chosen character, on the page and to screen readers.
function describe(strip, sentence) {
  strip.setAttribute("aria-valuenow", state.position + 1);
  strip.setAttribute("aria-valuetext", sentence);
  strip.nextElementSibling.textContent = sentence;
}

// The prompt, coloured by surprise.
function drawSurprise(panel, { logits, surprises }) {
  const { idx, position } = state;
  const strip = panel.querySelector("[data-strip=surprise]");
  const strengths = surprises.map((nats) => (nats === null ? null : Math.min(nats / DARKEST, 1)));
  colourStrip(strip, strengths);

  const character = spoken(characters[idx[position]]);
  if (position === 0) {
    describe(strip, `${character} is the first character, so no model has predicted it.`);
    return;
  }
  const probabilities = softmax(logits.row(position - 1)); // (V)
  const [best] = sortedIds(probabilities);
  const p = probabilities[idx[position]];
  const likeliest = `${spoken(characters[best])} (${probabilities[best].toFixed(3)})`;
  const found = best === idx[position] ? "It was the likeliest." : `Likeliest: ${likeliest}.`;
  const nats = surprises[position].toFixed(2);
  describe(strip, `${character} had probability ${p.toFixed(3)}: ${nats} nats. ${found}`);
}

// The colour of the maps as red, green and blue: the style sheet's.
function readInk() {
  return getComputedStyle(document.querySelector(".live-map")).color.match(/[\d.]+/g).map(Number);
}

// How strongly to colour an attention weight: small weights would be invisible otherwise.
function strength(weight) {
  return Math.sqrt(weight);
}

// One pixel for each pair of characters: row i looks, and column j is looked at.
function drawMap(canvas, weights, [red, green, blue]) {
  const T = weights.length;
  canvas.width = T;
  canvas.height = T;
  const image = new ImageData(T, T);
  const pixels = image.data; // red, green, blue and opacity of each pixel, from 0 to 255
  for (let i = 0; i < T; i++) {
    for (let j = 0; j <= i; j++) {
      const pixel = 4 * (i * T + j);
      pixels[pixel] = red;
      pixels[pixel + 1] = green;
      pixels[pixel + 2] = blue;
      pixels[pixel + 3] = 255 * strength(weights[i][j]);
    }
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

// Draws the maps of all heads of a panel.
function drawMaps(panel, given) {
  panel.querySelectorAll("canvas").forEach((canvas, h) => drawMap(canvas, given.maps[h], ink));
}

// What the chosen character attends to in the chosen head.
function drawAttention(panel, given) {
  const strip = panel.querySelector("[data-strip=attention]");
  if (strip === null) return; // a bigram model has no attention
  const { idx, position } = state;
  const chosen = panel.querySelector("input:checked");
  const weights = given.maps[Number(chosen.value)][position]; // (position + 1)
  colourStrip(strip, Array.from(weights, strength));
  for (const marker of panel.querySelectorAll(".live-marker")) {
    marker.style.top = `${(100 * position) / idx.length}%`;
    marker.style.height = `${100 / idx.length}%`;
  }
  const largest = sortedIds(weights).slice(0, N_LISTED);
  const listed = largest.map((t) => {
    const where = t === position ? "itself" : `${position - t} back`;
    return `${weights[t].toFixed(2)} to ${spoken(characters[idx[t]])} (${where})`;
  });
  const character = spoken(characters[idx[position]]);
  describe(strip, `${character}, ${chosen.dataset.label}: ${listed.join(", ")}.`);
}

// Draws in each of the nodes what its model answers.
function drawAll(nodes, ...functions) {
  for (const node of nodes) {
    for (const draw of functions) draw(node, state.answers[node.dataset.model]);
  }
}

// ---- Reacting

// Says what is wrong, or nothing if text is empty.
function say(text) {
  message.textContent = text;
  promptField.setAttribute("aria-invalid", text !== "");
}

// Answers the prompt in the field; if the models can't read it, says why and changes nothing else.
function update() {
  const text = split(promptField.value);
  const count = text.length === 1 ? "1 character" : `${text.length} characters`;
  const seen = text.length > block_size ? `; the models see the last ${block_size}` : "";
  view.textContent = count + seen;
  const unknown = [...new Set(text)].filter((character) => !ids.has(character));
  if (unknown.length > 0) {
    const listed = unknown.slice(0, N_UNKNOWN).map(spoken).join(", ");
    const others = unknown.length - N_UNKNOWN;
    const more = others > 0 ? ` and ${others} more` : "";
    say(`Not in the text that the models learned from: ${listed}${more}. ` +
      "The panels still show the last prompt that they could read.");
    return false;
  }
  if (text.length === 0) {
    say("The models need at least one character. The panels still show the last prompt.");
    return false;
  }
  say("");
  state.idx = encode(text.slice(-block_size).join(""));
  state.position = state.idx.length - 1;
  for (const name of Object.keys(models)) {
    state.answers[name] = answer(name, state.idx, caches[name]);
  }
  document.querySelectorAll(".live-strip").forEach(fillStrip);
  drawAll(columns, drawBars);
  drawAll(panels, drawSurprise, drawMaps, drawAttention);
  return true;
}

// Chooses the character at a position, in all panels.
function choose(position) {
  const within = Math.max(0, Math.min(position, state.idx.length - 1));
  if (within === state.position) return;
  state.position = within;
  drawAll(panels, drawSurprise, drawAttention);
}

function connectStrip(strip) {
  const chooseUnder = (event) => {
    const position = event.target.dataset.position;
    if (position !== undefined) choose(Number(position));
  };
  // Not pointerover: that also fires when the characters change under a pointer at rest.
  strip.addEventListener("pointermove", chooseUnder);
  strip.addEventListener("click", chooseUnder);
  strip.addEventListener("keydown", (event) => {
    const last = state.idx.length - 1;
    const goals = {
      ArrowLeft: state.position - 1,
      ArrowDown: state.position - 1,
      ArrowRight: state.position + 1,
      ArrowUp: state.position + 1,
      Home: 0,
      End: last,
    };
    const modified = event.altKey || event.ctrlKey || event.metaKey; // a shortcut of the browser
    if (event.key in goals && !modified) {
      event.preventDefault(); // the page mustn't scroll
      choose(goals[event.key]);
    }
  });
}

// In a map, the pointer chooses the row below it.
function connectMap(canvas) {
  canvas.addEventListener("pointermove", (event) => {
    choose(Math.floor((event.offsetY / canvas.clientHeight) * state.idx.length));
  });
}

// ---- Continuing the text

let timer = null; // of the next character, while a model writes

// A token id, drawn with the given probabilities (V).
function sample(probabilities) {
  let rest = Math.random();
  for (let id = 0; id < probabilities.length; id++) {
    rest -= probabilities[id];
    if (rest < 0) return id;
  }
  return sortedIds(probabilities)[0]; // the probabilities add up to 1 only up to rounding
}

// Writes one character after the prompt, and later the others.
function write(left) {
  const id = sample(predictNext(state.answers[writer.value]));
  promptField.value += characters[id];
  promptField.scrollTop = promptField.scrollHeight;
  update();
  if (left > 1) {
    timer = setTimeout(write, PAUSE, left - 1);
  } else {
    stop();
  }
}

function stop() {
  clearTimeout(timer);
  timer = null;
  writeButton.textContent = "Continue the text";
}

function startOrStop() {
  if (timer !== null) {
    stop();
  } else if (update()) {
    writeButton.textContent = "Stop";
    timer = setTimeout(write, 0, LONGEST);
  }
}

// ---- Start

promptField.addEventListener("input", () => {
  stop();
  update();
});
slider.addEventListener("input", () => {
  state.temperature = Number(slider.value);
  sliderValue.textContent = state.temperature.toFixed(2);
  drawAll(columns, drawBars);
});
writeButton.addEventListener("click", startOrStop);
columns.forEach(makeBars);
document.querySelectorAll(".live-strip").forEach(connectStrip);
document.querySelectorAll(".live-map canvas").forEach(connectMap);
for (const panel of panels) {
  panel.addEventListener("change", () => drawAttention(panel, state.answers[panel.dataset.model]));
}
// The maps are painted in a colour of the style sheet, which differs in dark mode.
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  ink = readInk();
  drawAll(panels, drawMaps);
});

document.querySelectorAll(".live [hidden]").forEach((node) => node.removeAttribute("hidden"));
// A browser may restore what was in the fields before a reload. Start with the page's own values.
promptField.value = promptField.defaultValue;
slider.value = slider.defaultValue;
update();

// For the browser's console: course.logits("v5_gpt", "ROMEO:") has a row for each character.
window.course = {
  characters,
  models,
  state,
  logits(name, text) {
    const { logits } = answer(name, encode(text).slice(-block_size), new Cache());
    return Array.from({ length: logits.rows }, (_, t) => Array.from(logits.row(t)));
  },
};
