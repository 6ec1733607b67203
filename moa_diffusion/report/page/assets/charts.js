// What all charts share: colours of the page, sizes, and drawing when they are about to be seen.
const drawn = new Map();
const CONFIG = { responsive: true, displaylogo: false, displayModeBar: false, showTips: false };

// Plotly reads a little HTML in its labels; names are no HTML.
const plain = (text) =>
  String(text).replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

function axis(more = {}) {
  return {
    gridcolor: variable("--line"),
    zerolinecolor: variable("--line"),
    linecolor: variable("--line"),
    automargin: true,
    ...more,
  };
}

function layout({ xaxis = {}, yaxis = {}, ...more } = {}) {
  const touch = matchMedia("(pointer: coarse)").matches;
  return {
    paper_bgcolor: "rgba(0,0,0,0)",
    plot_bgcolor: "rgba(0,0,0,0)",
    font: { family: "system-ui, sans-serif", size: 12, color: variable("--ink") },
    margin: { l: 48, r: 12, t: 10, b: 36 },
    showlegend: false,
    hovermode: "closest",
    hoverlabel: {
      bgcolor: variable("--panel"),
      bordercolor: variable("--line"),
      font: { color: variable("--ink"), size: 12 },
      align: "left",
    },
    // A finger that scrolls the page should not be caught by a chart.
    dragmode: touch ? false : "zoom",
    xaxis: axis({ fixedrange: touch, ...xaxis }),
    yaxis: axis({ fixedrange: touch, ...yaxis }),
    ...more,
  };
}

// `make` gives Plotly's traces and layout, anew whenever the colours change.
function chart(target, make, ready = () => {}) {
  whenSeen(target, () => {
    drawn.set(target, make);
    const { traces, layout } = make();
    Plotly.newPlot(target, traces, layout, CONFIG).then(() => ready(target));
  });
}

function redraw(target) {
  const make = drawn.get(target);
  if (!make) return;
  const { traces, layout } = make();
  Plotly.react(target, traces, layout, CONFIG);
}

function forget(container) {
  for (const target of container.querySelectorAll(".plot")) {
    if (drawn.delete(target)) Plotly.purge(target);
    waiting.delete(target);
    watcher.unobserve(target);
  }
  container.replaceChildren();
}

// A figure with a heading of its own: it wraps, and is read out.
function panel(container, title, words, make, kind = "") {
  const plot = element("div", { class: "plot", role: "img", "aria-label": `${title}. ${words}` });
  container.append(element("figure", { class: `panel ${kind}` }, element("h4", {}, title), plot));
  chart(plot, make);
}

dark.addEventListener("change", () => drawn.forEach((_, target) => redraw(target)));
