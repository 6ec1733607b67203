// The data, the one thing that changes (which model is selected), and small helpers.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const data = read("data");
const thumbnails = read("thumbnails");
const { models, prompts, seeds, rewards } = data;
const state = { selected: data.first, seed: 0 };
const listeners = [];
const dark = matchMedia("(prefers-color-scheme: dark)");

const find = (selector) => document.querySelector(selector);

function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name === "class") made.className = value;
    else if (name in made && typeof value !== "string") made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...children);
  return made;
}

function short(value) {
  if (value === null) return "-";
  return Math.abs(value) < 10 ? value.toFixed(3) : String(Number(value.toPrecision(4)));
}

function signed(value) {
  if (value === null) return "-";
  return (value > 0 ? "+" : "") + short(value);
}

function gain(e, k, p, s, before = 0) {
  const [here, there] = [data.values[e][k][p][s], data.values[before][k][p][s]];
  return here === null || there === null ? null : here - there;
}

// Not by colour alone: the sign is written as well. What lies within noise has none.
const side = (change, k) =>
  change === null || !(Math.abs(change) > (rewards[k].noise ?? Infinity))
    ? "open"
    : change > 0
      ? "up"
      : "down";
const arrow = (change, k) => ({ open: "", up: " ▲", down: " ▼" })[side(change, k)];

function select(e) {
  state.selected = e;
  for (const listener of listeners) listener(e);
  find("#said").textContent = `${models[e].label} is selected.`;
}

function markChosen(e) {
  for (const row of document.querySelectorAll("#models tr[data-model]")) {
    row.classList.toggle("chosen", Number(row.dataset.model) === e);
  }
  for (const button of document.querySelectorAll("button.choose")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.model) === e));
  }
}

// Runs a function once, when an element is about to be seen.
const waiting = new Map();
const watcher = new IntersectionObserver(
  (entries) => {
    for (const entry of entries) if (entry.isIntersecting) showNow(entry.target);
  },
  { rootMargin: "300px" },
);
function whenSeen(target, draw) {
  waiting.set(target, draw);
  watcher.observe(target);
}
function showNow(target) {
  const draw = waiting.get(target);
  waiting.delete(target);
  watcher.unobserve(target);
  if (draw) draw();
}

// What is not seen yet is drawn when there is time: a page is whole without scrolling.
function drawRest() {
  const target = [...waiting.keys()].find((one) => one.checkVisibility());
  if (!target) return;
  showNow(target);
  setTimeout(drawRest);
}
addEventListener("load", () => setTimeout(drawRest));

// On a phone sections are folded; a link opens the one it leads to.
const folds = [...document.querySelectorAll(".fold")];
if (matchMedia("(max-width: 40rem)").matches) {
  for (const fold of folds) fold.open = fold.parentElement.id === "front";
}
function unfold(section) {
  for (const fold of section.querySelectorAll(":scope > .fold")) fold.open = true;
}
for (const link of document.querySelectorAll('a[href^="#"]')) {
  link.addEventListener("click", () => unfold(find(link.hash)));
}
let folded = [];
addEventListener("beforeprint", () => {
  folded = folds.filter((fold) => !fold.open);
  for (const fold of folded) fold.open = true;
  [...waiting.keys()].filter((target) => target.checkVisibility()).forEach(showNow);
});
addEventListener("afterprint", () => folded.forEach((fold) => (fold.open = false)));

// A table that is cut off says so.
const watched = new ResizeObserver((entries) => {
  for (const box of new Set(entries.map(({ target }) => target.closest(".scroll")))) {
    box.previousElementSibling.hidden = box.scrollWidth <= box.clientWidth;
  }
});
for (const box of document.querySelectorAll(".scroll")) {
  box.before(element("p", { class: "more", hidden: true }, "The table goes on to the right →"));
  watched.observe(box);
}

listeners.push(markChosen);
