// Images and texts, and two of them against each other.
const compared = { before: 0, after: 0, p: 0, s: 0 };
const dialog = find("#compare");
const slider = find("#compare-slider");
const full = find("#compare-full");

const placeOf = (e, p, s) => data.images[e][p][s];
const thumbnail = (e, p, s) => `data:image/webp;base64,${thumbnails[placeOf(e, p, s)]}`;

function imageElement(e, p, s) {
  const image = element("img", { class: "image", alt: `${models[e].label}: ${prompts[p]}` });
  showSharp(image);
  image.src = thumbnail(e, p, s);
  return image;
}

// Squares of small images stay sharp.
function showSharp(image) {
  image.addEventListener("load", () => image.classList.toggle("pixels", image.naturalWidth < 128));
}

function sample(e, p, s) {
  if (data.images) return imageElement(e, p, s);
  return element("span", { class: "completion" }, data.texts[e][p][s]);
}

// A cell of the base model is compared with the selected model, any other with the base model.
function openCell(e, p, s) {
  openPair(0, e === 0 ? state.selected : e, p, s);
}

function openPair(before, after, p, s) {
  Object.assign(compared, { before, after, p, s });
  slider.value = 50;
  showPair();
  dialog.showModal();
  (data.images ? slider : find("#compare-close")).focus();
}

function showPair() {
  const { before, after, p, s } = compared;
  find("#compare-title").textContent = `${prompts[p]} (seed ${seeds[s]})`;
  find("#compare-before").value = before;
  find("#compare-after").value = after;
  find("#compare-back").disabled = p === 0;
  find("#compare-on").disabled = p === prompts.length - 1;
  if (data.images) {
    find("#compare-said").textContent = "";
    for (const [name, e] of [
      ["before", before],
      ["after", after],
    ]) {
      const original = data.originals[placeOf(e, p, s)];
      const image = find(`#image-${name}`);
      image.alt = `${name}: ${models[e].label}`;
      image.src = full.checked ? original : thumbnail(e, p, s);
      const link = find(`#original-${name}`);
      link.href = original;
      link.textContent = models[e].label;
    }
    slide();
  } else {
    for (const [name, e] of [
      ["before", before],
      ["after", after],
    ]) {
      find(`#text-${name}`).textContent = data.texts[e][p][s];
      find(`#text-${name}`).previousElementSibling.textContent = `${name}: ${models[e].label}`;
    }
  }
  find("#compare-scores tbody").replaceChildren(
    ...rewards.map(({ name, unit }, k) => {
      const change = gain(after, k, p, s, before);
      return element(
        "tr",
        {},
        element("th", { scope: "row" }, unit ? `${name} (${unit})` : name),
        element("td", { class: "number" }, short(data.values[before][k][p][s])),
        element("td", { class: "number" }, short(data.values[after][k][p][s])),
        element("td", { class: `number ${side(change, k)}` }, signed(change) + arrow(change, k)),
      );
    }),
  );
}

function slide() {
  find(".stage").style.setProperty("--at", `${slider.value}%`);
  slider.setAttribute("aria-valuetext", `${slider.value} % before, the rest after`);
}

function missing() {
  if (!full.checked) return;
  full.checked = false;
  showPair();
  find("#compare-said").textContent = "The originals are not beside this page; small ones instead.";
}

for (const name of ["before", "after"]) {
  const choice = find(`#compare-${name}`);
  choice.addEventListener("change", () => {
    compared[name] = Number(choice.value);
    showPair();
  });
  const image = find(`#image-${name}`);
  image.addEventListener("error", missing);
  showSharp(image);
}
for (const [id, way] of [
  ["#compare-back", -1],
  ["#compare-on", 1],
]) {
  find(id).addEventListener("click", () => {
    compared.p += way;
    showPair();
  });
}
slider.addEventListener("input", slide);
full.addEventListener("change", showPair);
find("#compare-close").addEventListener("click", () => dialog.close());
dialog.addEventListener("click", (event) => event.target === dialog && dialog.close());
