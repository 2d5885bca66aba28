// Draws the tokens that token_strip.py sends. Every text is set with textContent; nothing here reads markup.

const GREY = "rgb(128 128 128)";

export default function ({ parentElement, data, setTriggerValue }) {
  const strip = parentElement.querySelector(".strip");
  strip.send = (name, value) => setTriggerValue(name, { value });
  if (strip.view !== data.view) build(strip, data);
  show(strip, data);
}

function build(strip, data) {
  strip.view = data.view;
  strip.replaceChildren(legend(strip, data), ...bands(data.tokens).map((band) => bandElement(data, band)), tip());
  strip.onclick = (event) => {
    const token = event.target.closest(".token");
    if (token) strip.send("pin", token.getAttribute("aria-pressed") === "true" ? null : token.row.position);
  };
  strip.onkeydown = (event) => move(strip, event);
  strip.onmouseover = strip.onfocusin = (event) => showTip(strip, event.target.closest(".token"));
  strip.onmouseleave = () => showTip(strip, null);
  strip.onfocusout = () => showTip(strip, null);
}

// What is pinned and marked changes often; the tokens stay, and with them the keyboard's place.
function show(strip, { pinned, marked }) {
  const tokens = [...strip.querySelectorAll(".token")];
  const current = tokens.find((token) => token.row.position === pinned) ?? tokens[0];
  strip.classList.toggle("marking", marked !== null);
  for (const token of tokens) {
    token.setAttribute("aria-pressed", String(token.row.position === pinned));
    token.classList.toggle("chosen", token.row.experts.includes(marked));
    if (!strip.contains(strip.getRootNode().activeElement)) token.tabIndex = token === current ? 0 : -1;
  }
  for (const button of strip.querySelectorAll(".legend button")) {
    if (button.extra) button.hidden = marked === null || button.others.includes(marked);
    if (button.extra && !button.hidden) label(button, marked, tokens);
    button.setAttribute("aria-pressed", String(button.expert === marked));
  }
}

function label(button, expert, tokens) {
  const count = tokens.filter((token) => token.row.experts.includes(expert)).length;
  button.expert = expert;
  button.textContent = `expert ${expert}, chosen for ${count} shown`;
}

function make(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function legend(strip, { legend: entries, palette, scale }) {
  const box = make("div", "legend");
  box.setAttribute("role", "group");
  box.setAttribute("aria-label", scale ? scale.name : "Leading experts; press one to mark every token that chose it");
  box.append(make("span", "", scale ? `${scale.name}:` : "leading expert:"));
  if (scale) box.append(make("span", "number", figures(scale.low)), ramp(palette), make("span", "number", figures(scale.high)));
  for (const { expert, tokens, colour } of entries) {
    const button = make("button", "hue", `${expert} (${tokens} ${tokens === 1 ? "token" : "tokens"})`);
    button.style.setProperty("--hue", palette[colour]);
    button.expert = expert;
    box.append(button);
  }
  box.append(hueless("span", scale ? "none" : "others"));
  const extra = hueless("button", "");
  extra.extra = true;
  extra.others = entries.map(({ expert }) => expert);
  box.append(extra);
  box.onclick = (event) => {
    const button = event.target.closest("button");
    if (button) strip.send("mark", button.getAttribute("aria-pressed") === "true" ? null : button.expert);
  };
  return box;
}

function ramp(palette) {
  const bar = make("span", "ramp");
  for (let step = 0; step <= 8; step++) bar.append(shaded(make("span", "level"), step / 8, palette));
  return bar;
}

// The more, the denser: legible under light and dark text, and without telling hues apart.
function shaded(made, level, palette) {
  made.style.setProperty("--hue", palette[0]);
  made.style.setProperty("--density", `${5 + 65 * level}%`);
  return made;
}

function figures(number) {
  return number === 0 || Math.abs(number) >= 0.01 ? number.toFixed(Number.isInteger(number) ? 0 : 2) : number.toPrecision(2);
}

function hueless(tag, text) {
  const made = make(tag, "hue", text);
  made.style.setProperty("--hue", GREY);
  return made;
}

// Neighbours in the same segment and step make a band.
function bands(tokens) {
  const found = [];
  for (const row of tokens) {
    const last = found.at(-1);
    if (last && last.segment === row.segment && last.step === row.step) last.rows.push(row);
    else found.push({ segment: row.segment, step: row.step, label: row.label, correct: row.step_correct, rows: [row] });
  }
  return found;
}

function bandElement({ palette, scale }, { segment, step, label, correct, rows }) {
  const wrong = correct === false;
  const band = make("section", `band ${segment}${wrong ? " wrong" : ""}`);
  const name = make("div", "name", step < 0 ? segment : label);
  if (step >= 0) name.append(make("small", "", `step ${step + 1}${wrong ? " ✗ wrong" : correct ? " ✓" : ""}`));
  const text = make("div", "text");
  for (const row of rows) {
    text.append(tokenElement(row, palette, scale));
    if (row.token.includes("\n") && row !== rows.at(-1)) text.append(make("br"));
  }
  band.setAttribute("aria-label", name.textContent);
  band.append(name, text);
  return band;
}

function tokenElement(row, palette, scale) {
  const level = scale && row.level !== null;
  const token = make("button", level ? "token level" : "token hue");
  token.type = "button";
  token.row = row;
  token.said = scale ? `${scale.name}: ${row.value === null ? "none" : figures(row.value)}` : "";
  if (level) shaded(token, row.level, palette);
  else token.style.setProperty("--hue", scale || row.colour === null ? GREY : palette[row.colour]);
  for (const [piece, standsFor] of row.pieces) token.append(make(standsFor ? "i" : "span", "", piece));
  if (!row.pieces.length) token.append(make("i", "", "∅"));
  token.setAttribute("aria-label", `${token.textContent}, position ${row.position}, expert ${row.expert} leads`
    + (scale ? `, ${token.said}` : ""));
  return token;
}

function tip() {
  const box = make("div", "tip");
  box.setAttribute("role", "tooltip");
  box.hidden = true;
  return box;
}

function showTip(strip, token) {
  const box = strip.querySelector(".tip");
  box.hidden = !token;
  if (!token) return;
  const { row } = token;
  const experts = make("dl");
  experts.className = row.contributions ? "adds" : "";
  const head = ["expert", "weight", ...(row.contributions ? ["adds"] : [])];
  for (const name of row.contributions ? head : [...head, ...head]) experts.append(make("dt", "", name));
  row.experts.forEach((expert, rank) => {
    experts.append(make("dt", "", `${expert}`), make("dd", "", row.weights[rank].toFixed(3)));
    if (row.contributions) experts.append(make("dd", "", figures(row.contributions[rank])));
  });
  const place = row.step < 0 ? row.segment : `${row.segment}, step ${row.step + 1} (${row.label})`;
  const loss = row.loss === null ? "last token" : `next-token loss ${row.loss.toFixed(3)} nats`;
  box.replaceChildren(make("p", "", `position ${row.position}, ${place}`), experts, make("p", "", loss));
  if (token.said) box.append(make("p", "", token.said));
  const frame = strip.getBoundingClientRect();
  const at = token.getBoundingClientRect();
  box.style.top = `${at.bottom - frame.top + 6}px`;
  box.style.left = `${Math.max(0, Math.min(at.left - frame.left, frame.width - box.offsetWidth))}px`;
}

function move(strip, event) {
  const token = event.target.closest(".token");
  if (!token || event.ctrlKey || event.metaKey || event.altKey) return;
  const tokens = [...strip.querySelectorAll(".token")];
  const next = neighbour(tokens, tokens.indexOf(token), event.key);
  if (event.key === "Escape") strip.send("pin", null);
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
}

function neighbour(tokens, place, key) {
  if (key === "ArrowRight") return tokens[place + 1];
  if (key === "ArrowLeft") return tokens[place - 1];
  if (key === "Home") return tokens[0];
  if (key === "End") return tokens.at(-1);
  if (key === "ArrowDown") return nearest(tokens.slice(place + 1), tokens[place]);
  if (key === "ArrowUp") return nearest(tokens.slice(0, place).reverse(), tokens[place]);
  return undefined;
}

// The token of the next line of text that stands closest to this one.
function nearest(ahead, token) {
  const middle = (each) => each.offsetLeft + each.offsetWidth / 2;
  const line = ahead.find((each) => Math.abs(each.offsetTop - token.offsetTop) > token.offsetHeight / 2);
  const there = ahead.filter((each) => line && Math.abs(each.offsetTop - line.offsetTop) <= token.offsetHeight / 2);
  return there.sort((a, b) => Math.abs(middle(a) - middle(token)) - Math.abs(middle(b) - middle(token)))[0];
}
