// Plotly's figures, each in its element, drawn in the page's colours when it is about to be seen.
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false, showTips: false };
const touch = matchMedia("(pointer: coarse)").matches;
const plots = [...document.querySelectorAll(".plot")];
const figures = new Map(plots.map((plot) => [plot, JSON.parse(plot.dataset.figure)]));
const { template } = data;
if (touch) {
  // A finger that scrolls the page should not be caught by a chart.
  template.layout.dragmode = false;
  template.layout.xaxis.fixedrange = template.layout.yaxis.fixedrange = true;
}

const styles = getComputedStyle(document.documentElement);
const resolved = (_, value) =>
  typeof value === "string" && value.startsWith("var(--")
    ? styles.getPropertyValue(value.slice(4, -1)).trim()
    : value;

function draw(plot) {
  const text = JSON.stringify({ template, ...figures.get(plot) });
  const { data: traces, layout, template: look } = JSON.parse(text, resolved);
  const fresh = !plot.on;
  Plotly.react(plot, traces, { template: look, ...layout }, CONFIG);
  if (fresh) plot.dispatchEvent(new Event("drawn"));
}

const drawSoon = (plot) => whenSeen(plot, () => draw(plot));

// Of the panels of a section those that are chosen are shown.
for (const choice of document.querySelectorAll(".choice")) {
  choice.addEventListener("change", () => {
    const panels = choice.closest("section").querySelectorAll(".panels");
    panels.forEach((one, i) => (one.hidden = i !== choice.selectedIndex));
    // What was drawn before may have another width by now.
    plots.filter((plot) => choice.closest("section").contains(plot)).forEach(drawSoon);
  });
}
plots.forEach(drawSoon);
dark.addEventListener("change", () => plots.forEach(drawSoon));
