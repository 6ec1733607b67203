// How much the objectives of a run pull against each other: a map per run.
const MEASURES = {
  cosine: "cosines of the gradients",
  correlation: "correlations of the advantages",
};

function averaged(curve, part) {
  const last = curve.x.at(-1);
  const inside = { last: (x) => x >= 0.75 * last, first: (x) => x <= 0.25 * last, all: () => true }[
    part
  ];
  const known = curve.y.filter((value, i) => value !== null && inside(curve.x[i]));
  return known.length ? known.reduce((sum, value) => sum + value, 0) / known.length : null;
}

function conflicts() {
  const place = find("#conflict .panels");
  forget(place);
  place.classList.add("wide");
  for (const run of runs) {
    const kind = run.curves.cosine ? "cosine" : "correlation";
    const pairs = Object.entries(run.curves[kind] ?? {}).map(([name, curve]) => ({
      names: name.split("~"),
      curve,
    }));
    if (!pairs.length) continue;
    const found = new Set(pairs.flatMap(({ names }) => names));
    const names = [
      ...run.objectives.filter((name) => found.has(name)),
      ...[...found].filter((name) => !run.objectives.includes(name)),
    ];
    const matrix = names.map((_, i) => names.map((_, j) => (i === j ? 1 : null)));
    const part = find("#conflict-part").value;
    for (const {
      names: [a, b],
      curve,
    } of pairs) {
      const [i, j] = [names.indexOf(a), names.indexOf(b)];
      matrix[i][j] = matrix[j][i] = averaged(curve, part);
    }
    const title = `${run.name}: ${MEASURES[kind]}`;
    const words = pairs
      .map(
        ({ names: [a, b] }) =>
          `${a} and ${b}: ${short(matrix[names.indexOf(a)][names.indexOf(b)])}`,
      )
      .join("; ");
    panel(place, title, words, () => heatMap(names, matrix), "square");
  }
  find("#conflict").hidden = !place.children.length;
}

function heatMap(names, matrix) {
  const labels = names.map(plain);
  const middle = variable("--panel");
  return {
    traces: [
      {
        type: "heatmap",
        x: labels,
        y: labels,
        z: matrix,
        zmin: -1,
        zmax: 1,
        xgap: 2,
        ygap: 2,
        colorscale: [
          [0, "#d55e00"],
          [0.5, middle],
          [1, "#0072b2"],
        ],
        texttemplate: "%{z:.2f}",
        textfont: { size: 13 },
        hovertemplate: "%{y}, %{x}: %{z:.3f}<extra></extra>",
        colorbar: { thickness: 10, tickvals: [-1, -0.5, 0, 0.5, 1], outlinewidth: 0 },
      },
    ],
    layout: layout({
      dragmode: false,
      xaxis: {
        type: "category",
        tickangle: names.length > 3 ? -35 : 0,
        showgrid: false,
        fixedrange: true,
      },
      yaxis: { type: "category", autorange: "reversed", showgrid: false, fixedrange: true },
    }),
  };
}
