// Prompts x models, one seed at a time; a cell is filled when it is about to be seen.
const cells = find("#cells");
const rows = [];
const filled = new Set();

function buildGrid() {
  const head = element("tr", {}, element("th", { scope: "col" }, "prompt"));
  models.forEach((model, e) => {
    const button = element(
      "button",
      { type: "button", class: "head choose", "data-model": String(e), "aria-pressed": "false" },
      swatch(model),
      model.label,
    );
    button.addEventListener("click", () => select(e));
    head.append(element("th", { scope: "col", "data-model": String(e) }, button));
  });
  const body = element("tbody");
  prompts.forEach((prompt, p) => {
    const words = element("div", { class: "prompt" }, prompt);
    const row = element("tr", {}, element("th", { scope: "row" }, words));
    models.forEach((model, e) => row.append(emptyCell(e, p)));
    rows.push(row);
    body.append(row);
  });
  const title = { "aria-labelledby": "grid-title", role: "grid" };
  cells.append(element("table", title, element("thead", {}, head), body));
  cells.classList.toggle("texts", Boolean(data.texts));
  cells.querySelector(".cell").tabIndex = 0;
}

function swatch({ colour, outline }) {
  const made = find(".swatch").cloneNode(true);
  made.firstElementChild.setAttribute("fill", colour);
  made.firstElementChild.setAttribute("d", outline);
  return made;
}

function emptyCell(e, p) {
  const button = element("button", {
    type: "button",
    class: "cell",
    tabIndex: -1,
    "data-model": String(e),
    "data-prompt": String(p),
    "aria-label": `${models[e].label}: ${prompts[p]}`,
  });
  button.addEventListener("click", () => openCell(e, p, state.seed));
  whenSeen(button, () => {
    filled.add(button);
    fill(button);
  });
  return element("td", { "data-model": String(e) }, button);
}

function fill(button) {
  const [e, p] = [Number(button.dataset.model), Number(button.dataset.prompt)];
  button.replaceChildren(sample(e, p, state.seed), ...scores(e, p, state.seed));
  // What it holds names it from now on: the image's text and the scores.
  button.removeAttribute("aria-label");
}

function scores(e, p, s) {
  return rewards.map(({ name }, k) => {
    const change = e === 0 ? null : gain(e, k, p, s);
    return element(
      "span",
      { class: "score" },
      element("span", {}, name),
      element(
        "span",
        { class: e === 0 ? "" : side(change, k) },
        short(data.values[e][k][p][s]) + arrow(change, k),
      ),
    );
  });
}

for (const radio of find("#seeds").elements) {
  radio.addEventListener("change", () => {
    state.seed = Number(radio.value);
    filled.forEach(fill);
  });
}

function filter() {
  const wanted = find("#find").value.trim().toLowerCase();
  let count = 0;
  rows.forEach((row, p) => {
    row.hidden = !prompts[p].toLowerCase().includes(wanted);
    count += row.hidden ? 0 : 1;
  });
  find("#found").textContent = wanted ? `${count} of ${prompts.length} prompts` : "";
  const visible = rows.find((row) => !row.hidden);
  if (visible) rove(visible.querySelector(".cell"));
}

// One stop of the Tab key for the whole grid; arrow keys move inside it.
function rove(button) {
  for (const old of cells.querySelectorAll('.cell[tabindex="0"]')) old.tabIndex = -1;
  button.tabIndex = 0;
}

function move(event) {
  const here = event.target.closest(".cell");
  const step = {
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    Home: [0, -models.length],
    End: [0, models.length],
  }[event.key];
  if (!here || !step) return;
  event.preventDefault();
  const shown = rows.filter((row) => !row.hidden);
  const clamp = (value, length) => Math.max(0, Math.min(length - 1, value));
  const row = shown[clamp(shown.indexOf(here.closest("tr")) + step[0], shown.length)];
  const next =
    row.querySelectorAll(".cell")[clamp(Number(here.dataset.model) + step[1], models.length)];
  rove(next);
  next.focus({ preventScroll: true });
  reveal(next.parentElement);
}

// Sticky headings hide what the browser would otherwise believe to be in view.
function reveal(cell) {
  const corner = cells.querySelector("thead th");
  cells.style.scrollPadding = `${corner.offsetHeight}px 0 0 ${corner.offsetWidth}px`;
  cell.scrollIntoView({ block: "nearest", inline: "nearest" });
}

function markColumn(e) {
  for (const cell of cells.querySelectorAll("th[data-model], td[data-model]")) {
    cell.classList.toggle("chosen", Number(cell.dataset.model) === e);
  }
}

function goToColumn(e) {
  select(e);
  unfold(find("#grid"));
  find("#grid").scrollIntoView();
  const head = cells.querySelector(`thead th[data-model="${e}"]`);
  const corner = cells.querySelector("thead th");
  cells.scrollLeft += head.getBoundingClientRect().left - corner.getBoundingClientRect().right;
  head.querySelector("button").focus({ preventScroll: true });
}

buildGrid();
watched.observe(cells.firstElementChild);
listeners.push(markColumn);
cells.addEventListener("keydown", move);
cells.addEventListener("focusin", (event) => event.target.matches(".cell") && rove(event.target));
find("#find").addEventListener("input", filter);
for (const button of document.querySelectorAll("#models .choose")) {
  button.addEventListener("click", () => goToColumn(Number(button.dataset.model)));
}
