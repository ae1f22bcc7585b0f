"use strict";
const read = id => JSON.parse(document.getElementById(id).textContent);
const [data, headlines, steps] = ["data", "headlines", "steps"].map(read);
const at = id => document.getElementById(id);
const tokens = [...document.querySelectorAll("#text .t")], tip = at("tip"), slider = at("step");
const nats = x => x == null ? "–" : (x / 100).toFixed(2);
const signed = x => x == null ? "–" : (x > 0 ? "+" : "") + (x / 100).toFixed(2).replace("-", "−");
let what = document.querySelector("[name=what]:checked").value, seen = null, timer = 0;

// what is known of token i in the evaluation that the slider stands at
function about(i) {
  const view = data.views[slider.value], loss = view.loss[i], guide = data.guides[view.guide][i];
  const unmapped = data.kinds[i] !== "0" || (data.selects === "guided" && guide == null);
  const excess = view.excess ? view.excess[i] : loss == null || guide == null ? null : loss - guide;
  return { loss, guide, excess, weight: view.weight[i], kept: view.weight[i] > 0, unmapped };
}

function colour(x) {
  if (x == null) return "";
  const both = what === "excess", limit = 100 * limitOf();
  const share = both ? (x / limit + 1) / 2 : x / limit;
  return " c" + Math.max(0, Math.min(2 * data.half, Math.round(2 * data.half * share)));
}

// the end of the color scale
function limitOf() {
  return what === "excess" ? data.limits.excess : what === "weight" ? 1 : data.limits.loss;
}

function draw() {
  at("headline").textContent = headlines[slider.value];
  at("when").textContent = "step " + steps[slider.value].toLocaleString("en");
  for (const value of document.querySelectorAll(".value")) value.textContent = JSON.parse(value.dataset.texts)[slider.value];
  const x = 100 * slider.value / Math.max(1, steps.length - 1);
  for (const line of document.querySelectorAll(".at")) { line.setAttribute("x1", x); line.setAttribute("x2", x); }
  tokens.forEach((token, i) => {
    const known = about(i);
    token.className = "t " + (known.unmapped ? "u" : (known.kept ? "k" : "d") + colour(known[what]));
  });
  document.body.classList.toggle("seq", what !== "excess");
  const limit = limitOf();
  at("low").textContent = what === "excess" ? "student ahead −" + limit : "0";
  at("high").textContent = what === "weight" ? "1" : (what === "excess" ? "+" + limit + " teacher ahead" : limit + " and more") + ", nats";
  if (seen != null) tell(seen);
}

function line(list, name, value) {
  list.append(Object.assign(document.createElement("dt"), { textContent: name }));
  list.append(Object.assign(document.createElement("dd"), { textContent: value }));
}

function tell(i) {
  const token = tokens[i], passage = token.parentElement, known = about(i), [first, last] = data.spans[i];
  const place = +passage.dataset.start + [...passage.querySelectorAll(".t")].indexOf(token);
  const title = Object.assign(document.createElement("h2"), { textContent: token.textContent.replaceAll(" ", "␣") });
  title.append(Object.assign(document.createElement("small"), { textContent: `document ${passage.dataset.document}, token ${place}` }));
  const list = document.createElement("dl");
  line(list, "student loss", nats(known.loss));
  line(list, "guide", nats(known.guide));
  line(list, "excess", signed(known.excess));
  const state = known.unmapped ? "unmapped" + (data.kinds[i] === "0" ? "" : ": " + data.reasons[data.kinds[i]]) : known.kept ? "kept" : "dropped";
  line(list, "weight", `${known.weight / 100}, ${state}`);
  const cover = Object.assign(document.createElement("p"), { className: "cover" });
  if (last > first) cover.append("covered by ");
  const names = data.teacher[data.row[i]].slice(first, last);
  for (const name of names.slice(0, 12)) cover.append(Object.assign(document.createElement("span"), { textContent: name }));
  if (names.length > 12) cover.append(` and ${names.length - 12} more`);
  tip.replaceChildren(title, list, cover);
  tip.hidden = false;
  tokens.forEach((other, k) => other.classList.toggle("on", k === i));
  const box = [...token.getClientRects()].pop(), wide = document.documentElement.clientWidth;
  const above = box.bottom + tip.offsetHeight + 12 > innerHeight && box.top > tip.offsetHeight + 12;
  tip.style.left = scrollX + Math.max(8, Math.min(box.left, wide - tip.offsetWidth - 8)) + "px";
  tip.style.top = scrollY + (above ? box.top - tip.offsetHeight - 8 : box.bottom + 8) + "px";
  seen = i;
}

function hush() {
  tip.hidden = true;
  if (seen != null) tokens[seen].classList.remove("on");
  seen = null;
}

function go(to) {
  slider.value = Math.max(0, Math.min(steps.length - 1, to));
  draw();
}

function play(on) {
  clearInterval(timer);
  timer = on ? setInterval(() => +slider.value === steps.length - 1 ? play(false) : go(+slider.value + 1), 700) : 0;
  at("play").textContent = on ? "❚❚ Pause" : "▶ Play";
  at("play").setAttribute("aria-pressed", String(on));
}

tokens.forEach((token, i) => {
  token.tabIndex = i ? -1 : 0;
  token.addEventListener("mouseenter", () => tell(i));
  token.addEventListener("mouseleave", () => document.activeElement === token || hush());
  token.addEventListener("focus", () => tell(i));
  token.addEventListener("blur", hush);
});
slider.addEventListener("input", draw);
at("play").addEventListener("click", () => {
  const on = !timer;
  if (on && +slider.value === steps.length - 1) go(0);
  play(on);
});
for (const choice of document.querySelectorAll("[name=what]")) choice.addEventListener("change", () => { what = choice.value; draw(); });
document.addEventListener("keydown", event => {
  const side = { ArrowLeft: -1, ArrowRight: 1 }[event.key], level = { ArrowDown: -1, ArrowUp: 1 }[event.key];
  const i = tokens.indexOf(document.activeElement);
  if (event.target.matches("input") || event.ctrlKey || event.altKey || event.metaKey) return;
  if (i >= 0 && side && tokens[i + side]) {
    tokens[i].tabIndex = -1;
    tokens[i + side].tabIndex = 0;
    tokens[i + side].focus();
  } else if (i < 0 && side) go(+slider.value + side);
  else if (i >= 0 && level) go(+slider.value + level);
  else if (event.key === " " && event.target !== at("play")) at("play").click();
  else return;
  event.preventDefault();
});
draw();
