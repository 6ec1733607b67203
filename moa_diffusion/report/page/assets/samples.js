// The best, the worst and the most changed samples of one model in one reward.
const SHOWN = 4;
const samplesModel = find("#samples-model");
const samplesReward = find("#samples-reward");

function ranked(value) {
  const places = [];
  prompts.forEach((_, p) =>
    seeds.forEach((_, s) => {
      const size = value(p, s);
      if (size !== null) places.push({ p, s, size });
    }),
  );
  return places.sort((one, other) => other.size - one.size);
}

function showSamples() {
  const [e, k] = [Number(samplesModel.value), Number(samplesReward.value)];
  const byScore = ranked((p, s) => data.values[e][k][p][s]);
  const byGain = e === 0 ? [] : ranked((p, s) => gain(e, k, p, s));
  const lists = [
    ["Best", byScore.slice(0, SHOWN)],
    ["Worst", byScore.slice(-SHOWN).reverse()],
    ["Gained most against the base model", byGain.slice(0, SHOWN).filter((one) => one.size > 0)],
    [
      "Lost most against the base model",
      byGain
        .slice(-SHOWN)
        .reverse()
        .filter((one) => one.size < 0),
    ],
  ];
  const parts = lists
    .filter(([, members]) => members.length)
    .map(([title, members]) =>
      element(
        "section",
        {},
        element("h3", {}, title),
        element("div", { class: "row" }, ...members.map((one) => sampleCard(e, k, one))),
      ),
    );
  const none = element("p", {}, `${rewards[k].name} applies to none of the prompts.`);
  find("#samples-lists").replaceChildren(...(parts.length ? parts : [none]));
}

function labelled(e, pair, shown) {
  if (pair.length === 1) return shown;
  const label = element("span", { class: "label" }, e === 0 ? "before" : "after");
  return element("span", {}, label, shown);
}

function sampleCard(e, k, { p, s }) {
  const change = e === 0 ? null : gain(e, k, p, s);
  const [here, there] = [e, 0].map((one) => short(data.values[one][k][p][s]));
  const { name } = rewards[k];
  const words =
    e === 0 ? `${name} ${here}` : `${name}: before ${there}, after ${here}${arrow(change, k)}`;
  const button = element("button", {
    type: "button",
    class: "sample",
    "aria-label": `${prompts[p]}, seed ${seeds[s]}: ${words}`,
  });
  whenSeen(button, () => {
    const pair = e === 0 || data.texts ? [e] : [0, e];
    button.append(
      element(
        "span",
        { class: pair.length > 1 ? "pair" : "" },
        ...pair.map((one) => labelled(one, pair, sample(one, p, s))),
      ),
      element("span", { class: side(change, k) }, words),
      element("span", { class: "words" }, `${prompts[p]} (seed ${seeds[s]})`),
    );
  });
  button.addEventListener("click", () => openCell(e, p, s));
  return button;
}

samplesModel.addEventListener("change", showSamples);
samplesReward.addEventListener("change", showSamples);
listeners.push((e) => {
  samplesModel.value = e;
  showSamples();
});
