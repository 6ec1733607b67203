// Curves of the runs: a panel per objective, a colour per run.
const union = (lists) => [...new Set(lists.flat())];
const curveOf = (run, group, name) => run.curves[group]?.[name];
const namesOf = (group) => union(runs.map((run) => Object.keys(run.curves[group] ?? {})));
const DRAWN = new Set([
  "reward_mean",
  "eval_mean",
  "eval_sem",
  "weight",
  "share",
  "correlation",
  "cosine",
  "image",
  "eval_image",
  "text",
  "eval_text",
  "eval_gap",
  "alarm",
]);

function line(run, curve, { width = 1.5, dots = false, dash = "solid", opacity = 1, what }) {
  return {
    x: curve.x,
    y: curve.y,
    mode: dots ? "lines+markers" : "lines",
    connectgaps: dots,
    opacity,
    line: { width, dash, color: colourOf(run.name) },
    marker: { size: 7 },
    name: plain(run.name),
    hovertemplate: `%{fullData.name}, ${what}<br>rollout %{x}: %{y:.4g}<extra></extra>`,
  };
}

function band(run, mean, error) {
  const known = mean.x
    .map((x, i) => ({ x, y: mean.y[i], e: error.y[error.x.indexOf(x)] ?? null }))
    .filter(({ y, e }) => y !== null && e !== null);
  const back = [...known].reverse();
  return {
    x: [...known, ...back].map(({ x }) => x),
    y: [...known.map(({ y, e }) => y + e), ...back.map(({ y, e }) => y - e)],
    mode: "none",
    fill: "toself",
    opacity: 0.2,
    fillcolor: colourOf(run.name),
    hoverinfo: "skip",
  };
}

// Upright lines with the message; a rollback shades what was taken back.
function alarms(name) {
  const traces = [];
  const shapes = [];
  for (const run of runs) {
    let taken = 0; // what an earlier rollback took back is shaded already
    for (const alarm of run.alarms) {
      if (alarm.name !== name && alarm.kind !== "reward_hack" && alarm.action === "warn") continue;
      const colour = colourOf(run.name);
      const heights = Array.from({ length: 21 }, (_, i) => i / 20);
      traces.push({
        x: heights.map(() => alarm.step),
        y: heights,
        yaxis: "y2",
        mode: "lines+markers",
        marker: {
          symbol: heights.map((height) => (height === 1 ? "triangle-down" : "line-ns")),
          size: heights.map((height) => (height === 1 ? 10 : 3)),
          color: colour,
          line: { width: 0 },
        },
        line: { dash: "dot", width: 1.5, color: colour },
        cliponaxis: false,
        hovertext: wrapped(`${run.name}, rollout ${alarm.step}: ${alarm.message}`),
        hoverinfo: "text",
        meta: "alarm",
      });
      if (alarm.action === "rollback" && (alarm.to_step ?? null) !== null) {
        shapes.push({
          type: "rect",
          xref: "x",
          yref: "paper",
          x0: Math.max(alarm.to_step, taken),
          x1: alarm.step,
          y0: 0,
          y1: 1,
          fillcolor: colour,
          opacity: 0.13,
          line: { width: 0 },
          layer: "below",
        });
        taken = alarm.step;
      }
    }
  }
  return { traces, shapes };
}

function wrapped(text) {
  const lines = [""];
  for (const word of text.split(/\s+/)) {
    if ((lines.at(-1) + word).length > 46) lines.push("");
    lines[lines.length - 1] += `${word} `;
  }
  return lines.map((one) => plain(one.trim())).join("<br>");
}

function summaryOf(entries) {
  return entries
    .map(({ run, curve }) => {
      const known = curve.y.filter((value) => value !== null);
      return known.length ? `${run.name}: from ${short(known[0])} to ${short(known.at(-1))}` : "";
    })
    .filter(Boolean)
    .join("; ");
}

// `layers` are groups of metrics drawn over each other, each with its style.
function curvesPanel(container, title, name, layers, { whole = false, fromZero = false } = {}) {
  const entries = layers.flatMap((layer) =>
    runs
      .map((run) => ({ run, layer, curve: curveOf(run, layer.group, name) }))
      .filter(({ curve }) => curve && curve.y.some((value) => value !== null)),
  );
  if (!entries.length) return;
  panel(container, title, summaryOf(entries), () => {
    const marks = alarms(name);
    const traces = entries.flatMap(({ run, layer, curve }) => {
      const error = layer.error && curveOf(run, layer.error, name);
      return [
        ...(error ? [band(run, curve, error)] : []),
        line(run, curve, layer.style(run, name)),
      ];
    });
    return {
      traces: [...traces, ...marks.traces],
      layout: layout({
        xaxis: { title: { text: "rollouts", standoff: 4 }, rangemode: "tozero" },
        yaxis: whole
          ? { range: shareRange(entries) }
          : { rangemode: fromZero ? "tozero" : "normal" },
        yaxis2: { overlaying: "y", range: [0, 1], visible: false, fixedrange: true },
        shapes: marks.shapes,
      }),
    };
  });
}

// Shares lie between 0 and 1, and a little outside where objectives oppose each other.
function shareRange(entries) {
  const known = entries.flatMap(({ curve }) => curve.y).filter((value) => value !== null);
  return [Math.min(0, ...known) - 0.03, Math.max(1, ...known) + 0.03];
}

const thin = { group: "", style: () => ({ width: 1.2, opacity: 0.75, what: "rollouts" }) };
const dotted = {
  group: "",
  style: (run, name) => ({
    width: 2,
    dots: true,
    dash: run.heldout.includes(name) ? "dash" : "solid",
    what: "evaluations",
  }),
};
const bold = { group: "", style: () => ({ width: 1.8, what: "rollouts" }) };

// A section without data is left out.
function section(id, names, draw) {
  const place = find(`#${id} .panels`);
  names.forEach((name) => draw(place, name));
  find(`#${id}`).hidden = !place.children.length;
}

function otherGroup() {
  const place = find("#other .panels");
  forget(place);
  const group = find("#other-group").selectedOptions[0]?.text;
  for (const name of group ? namesOf(group) : [])
    curvesPanel(place, name, name, [{ ...(group.startsWith("eval_") ? dotted : bold), group }]);
}

function buildTraining() {
  const objectives = union(runs.map((run) => run.objectives));
  const heldout = union(runs.map((run) => run.heldout)).filter(
    (name) => !objectives.includes(name),
  );
  const evaluated = namesOf("eval_mean");
  const unit = (name) => rewards.find((one) => one.name === name)?.unit;
  section("rewards", union([objectives, heldout, evaluated]), (place, name) =>
    curvesPanel(
      place,
      (heldout.includes(name) ? `${name}, held-out` : name) +
        (unit(name) ? ` (${unit(name)})` : ""),
      name,
      [
        { ...thin, group: "reward_mean" },
        { ...dotted, group: "eval_mean", error: "eval_sem" },
      ],
    ),
  );
  section("weights", namesOf("weight"), (place, name) =>
    curvesPanel(place, name, name, [{ ...bold, group: "weight" }], { fromZero: true }),
  );
  section("share", namesOf("share"), (place, name) =>
    curvesPanel(place, name, name, [{ ...bold, group: "share" }], { whole: true }),
  );
  const drifting = ["image", "eval_image", "text", "eval_text"];
  section("drift", union(drifting.map(namesOf)), (place, name) =>
    curvesPanel(
      place,
      name.replaceAll("_", " "),
      name,
      drifting.map((group) => ({ ...(group.startsWith("eval_") ? dotted : thin), group })),
    ),
  );
  section("gap", namesOf("eval_gap"), (place, name) =>
    curvesPanel(place, name, name, [{ ...dotted, group: "eval_gap" }]),
  );
  section("watch", namesOf("alarm"), (place, name) =>
    curvesPanel(place, name, name, [{ ...dotted, group: "alarm" }], { fromZero: true }),
  );
  conflicts();
  const others = union(runs.map((run) => Object.keys(run.curves)))
    .filter((group) => !DRAWN.has(group))
    .sort((one, other) => (one === "seconds") - (other === "seconds"));
  options(find("#other-group"), others, 0);
  find("#other").hidden = !others.length;
  otherGroup();

  const empty = runs.filter((run) => !Object.keys(run.curves).length).map((run) => run.name);
  const pooled = Math.max(...runs.map((run) => run.pooled));
  find("#training-note").textContent = [
    pooled > 1 ? `A point of the longest curves is the mean of ${pooled} rollouts.` : "",
    empty.length ? `No metrics were found for ${empty.join(", ")}.` : "",
  ]
    .join(" ")
    .trim();
  find("#training-legend").append(
    ...runs.map(({ name }) =>
      element("li", {}, element("span", { class: "swatch", "data-series": name }), name),
    ),
  );
  find("#conflict-part").addEventListener("change", conflicts);
  find("#other-group").addEventListener("change", otherGroup);
}

if (runs.length) buildTraining();
paintSwatches();
select(state.selected);
