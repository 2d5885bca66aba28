// Saves a chart of the page as a picture: its data as they are shown, its layout as a report would print it.

export default function ({ parentElement, data }) {
  const box = parentElement.querySelector(".pictures");
  box.replaceChildren(...["PNG", "SVG"].map((format) => button(box, data, format)));
}

function button(box, data, format) {
  const made = document.createElement("button");
  made.textContent = format;
  made.onclick = () => save(data, format.toLowerCase()).catch((error) => tell(box, error));
  return made;
}

async function save({ chart, name, width, height, layout }, format) {
  const shown = document.querySelector(`.st-key-${chart} .js-plotly-plot`);
  if (!shown || !window.Plotly) throw new Error("the chart is not drawn yet");
  const sheet = { data: shown.data, layout: { ...layout, width, height, autosize: false } };
  const link = document.createElement("a");
  link.href = await window.Plotly.toImage(sheet, { format, width, height, scale: format === "png" ? 2 : 1 });
  link.download = `${name}.${format}`;
  link.click();
}

function tell(box, error) {
  const said = document.createElement("p");
  said.textContent = `No picture: ${error.message}. The camera above the chart makes one too.`;
  box.append(said);
}
