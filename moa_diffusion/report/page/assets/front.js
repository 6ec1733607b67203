// The rewards on the axes of the front, and the selected model in it.
const frontPlot = find("#front-plot");
const frontAxes = [find("#front-x"), find("#front-y")];

function showFront() {
  const view = data.views[frontAxes[0].value][frontAxes[1].value];
  const front = figures.get(frontPlot);
  view.traces.forEach((arrays, i) => Object.assign(front.data[i], arrays));
  [front.layout.xaxis.title.text, front.layout.yaxis.title.text] = view.titles;
  front.data.at(-1).selectedpoints = [state.selected];
  frontPlot.setAttribute("aria-label", view.words);
  frontPlot.hidden = !view.known;
  find("#front-none").hidden = view.known;
  drawSoon(frontPlot);
}

frontAxes.forEach((choice) => choice.addEventListener("change", showFront));
frontPlot.addEventListener("drawn", () =>
  frontPlot.on("plotly_click", ({ points }) => goToColumn(points[0].pointIndex)),
);
listeners.push(showFront);
select(state.selected);
