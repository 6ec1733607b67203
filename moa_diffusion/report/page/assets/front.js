// Means of two rewards, a point per model.
const SYMBOLS = [
  "circle",
  "square",
  "diamond",
  "triangle-down",
  "triangle-up",
  "cross",
  "star",
  "x",
];
const CROWDED = 16; // models beyond which only those of the front are named
const frontPlot = find("#front-plot");
const frontAxes = [find("#front-x"), find("#front-y")];

const axisTitle = ({ name, unit }) => ({
  text: plain(unit ? `${name} (${unit})` : name),
  standoff: 8,
});

function hoverOf(e) {
  const lines = rewards.map(({ name }, k) => {
    const [mean, low, high] = models[e].mean[k];
    const stds =
      e === 0 || models[e].stds[k][0] === null ? "" : `, ${signed(models[e].stds[k][0])} stds`;
    return plain(
      mean === null
        ? `${name}: does not apply`
        : `${name}: ${short(mean)} [${short(low)}, ${short(high)}]${stds}`,
    );
  });
  return [`<b>${plain(models[e].label)}</b>`, ...lines].join("<br>");
}

// Where each name stands, so that it covers no name before it.
function positions(points) {
  const [wide, high] = [frontPlot.clientWidth || 600, frontPlot.clientHeight || 480];
  const span = (key) => {
    const all = points.map((one) => one[key]);
    return [Math.min(...all), Math.max(...all) - Math.min(...all) || 1];
  };
  const [[left, width], [low, height]] = [span("x"), span("y")];
  // In pixels, roughly: the plot is smaller than its element by the axes.
  const pixels = (one) => ({
    x: ((one.x - left) / width) * (wide - 140),
    y: ((low - one.y) / height) * (high - 140),
  });
  const taken = points.map((one) => ({ ...pixels(one), half: 6 }));
  return points.map((one) => {
    const { x, y } = pixels(one);
    const half = models[one.e].short.length * 3.5;
    const places = {
      "top center": [0, -16],
      "bottom center": [0, 16],
      "middle right": [half + 10, 0],
      "middle left": [-half - 10, 0],
    };
    const free = ([dx, dy]) =>
      taken.every(
        (box) => Math.abs(box.x - x - dx) > box.half + half || Math.abs(box.y - y - dy) > 13,
      );
    const chosen = Object.keys(places).find((name) => free(places[name])) ?? "top center";
    const [dx, dy] = places[chosen];
    taken.push({ x: x + dx, y: y + dy, half });
    return chosen;
  });
}

// Which points no other is above and to the right of, from left to right.
function upperRight(points) {
  const beats = (a, b) => a.x >= b.x && a.y >= b.y && (a.x > b.x || a.y > b.y);
  return points
    .filter((one) => !points.some((other) => beats(other, one)))
    .sort((a, b) => a.x - b.x);
}

function makeFront() {
  const [x, y] = frontAxes.map((choice) => Number(choice.value));
  const points = models
    .map((model, e) => ({ e, x: model.mean[x][0], y: model.mean[y][0] }))
    .filter((one) => one.x !== null && one.y !== null);
  const places = positions(points);
  const edge = upperRight(points);
  const traces = [
    {
      x: edge.map((one) => one.x),
      y: edge.map((one) => one.y),
      mode: "lines",
      hoverinfo: "skip",
      line: { dash: "dash", width: 1, color: variable("--soft") },
    },
  ];
  const groups = [{ name: "" }, ...data.series];
  groups.forEach(({ name }, i) => {
    const mine = points.filter(({ e }) => models[e].series === name);
    const colour = colourOf(name);
    const named = mine.map(({ e }) => models.length <= CROWDED || models[e].nondominated);
    // A run's line starts at the base model.
    const joined = mine.every(({ e }) => models[e].step !== null)
      ? [...points.filter(({ e }) => e === 0), ...mine]
      : [];
    if (name && joined.length > 1) {
      traces.push({
        x: joined.map((one) => one.x),
        y: joined.map((one) => one.y),
        mode: "lines",
        hoverinfo: "skip",
        opacity: 0.8,
        line: { width: 1, color: colour },
      });
    }
    traces.push({
      x: mine.map((one) => one.x),
      y: mine.map((one) => one.y),
      customdata: mine.map(({ e }) => e),
      hovertext: mine.map(({ e }) => hoverOf(e)),
      hoverinfo: "text",
      mode: "markers+text",
      text: mine.map(({ e }, n) => (named[n] ? plain(models[e].short) : "")),
      textposition: mine.map((one) => places[points.indexOf(one)]),
      cliponaxis: false,
      marker: {
        symbol: name ? SYMBOLS[(i - 1) % SYMBOLS.length] : "cross-thin",
        size: mine.map(({ e }) => (e === state.selected ? 16 : 11)),
        opacity: 1,
        color: mine.map(({ e }) => (models[e].nondominated ? colour : variable("--paper"))),
        line: { width: 2, color: colour },
      },
    });
  });
  return {
    traces,
    layout: layout({
      margin: { l: 56, r: 24, t: 24, b: 48 },
      xaxis: { title: axisTitle(rewards[x]) },
      yaxis: { title: axisTitle(rewards[y]) },
    }),
  };
}

// One reward has no plane: means with their intervals, a row per model.
function makeSingle() {
  const places = models.map((_, e) => e);
  const mean = (e) => models[e].mean[0];
  return {
    traces: [
      {
        x: places.map((e) => mean(e)[0]),
        y: places,
        customdata: places,
        hovertext: places.map(hoverOf),
        hoverinfo: "text",
        mode: "markers",
        error_x: {
          type: "data",
          symmetric: false,
          array: places.map((e) => mean(e)[2] - mean(e)[0]),
          arrayminus: places.map((e) => mean(e)[0] - mean(e)[1]),
          color: variable("--soft"),
        },
        marker: {
          opacity: 1,
          size: places.map((e) => (e === state.selected ? 16 : 11)),
          color: models.map((model) => colourOf(model.series)),
        },
      },
    ],
    layout: layout({
      xaxis: { title: axisTitle(rewards[0]) },
      yaxis: {
        tickvals: places,
        ticktext: models.map((model) => plain(model.label)),
        autorange: "reversed",
      },
    }),
  };
}

function describe() {
  const names = frontAxes.map((choice) => rewards[Number(choice.value)].name).join(" and ");
  frontPlot.setAttribute(
    "aria-label",
    `Means of ${names} for every model; the table below has the same numbers.`,
  );
  const both = models.some(({ mean }) =>
    frontAxes.every((choice) => mean[Number(choice.value)][0] !== null),
  );
  frontPlot.hidden = !both;
  find("#front-none").hidden = both;
  redraw(frontPlot);
}

frontAxes.forEach((choice, i) => {
  options(
    choice,
    rewards.map(({ name }) => name),
    Math.min(i, rewards.length - 1),
  );
  choice.addEventListener("change", describe);
  choice.parentElement.hidden = rewards.length < 2;
});
find("#front-legend").append(
  element("li", {}, "✛ base model"),
  ...data.series
    .filter(({ name }) => models.some((model) => model.series === name))
    .map(({ name }) =>
      element("li", {}, element("span", { class: "swatch", "data-series": name }), name),
    ),
);
describe();
chart(frontPlot, rewards.length < 2 ? makeSingle : makeFront, (target) =>
  target.on("plotly_click", ({ points }) => goToColumn(points[0].customdata)),
);
listeners.push(() => redraw(frontPlot));
