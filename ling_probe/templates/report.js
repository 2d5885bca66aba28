const dark = matchMedia("(prefers-color-scheme: dark)");
const plots = [...document.querySelectorAll(".plot")];
const config = JSON.parse(document.getElementById("config").textContent);
let printing = location.hash === "#print";

const colour = () => (dark.matches && !printing ? "#e6edf3" : "#1f2328");

async function unpack() {
  const packed = atob(document.getElementById("library").textContent);
  const bytes = Uint8Array.from(packed, (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

async function draw(plot) {
  if (plot.dataset.drawn) return;
  plot.dataset.drawn = "yes";
  const figure = JSON.parse(document.getElementById("data-" + plot.id).textContent);
  figure.layout.font = { ...figure.layout.font, color: colour() };
  if (printing) {
    figure.layout.height = Math.round(0.8 * plot.clientHeight);
    plot.style.height = figure.layout.height + "px";
  }
  await Plotly.newPlot(plot, figure.data, figure.layout, config);
}

async function paint() {
  for (const plot of plots.filter((each) => each.dataset.drawn)) {
    await Plotly.relayout(plot, { "font.color": colour(), autosize: true });
  }
}

async function paper(on) {
  printing = on;
  document.documentElement.classList.toggle("paper", on);
  for (const detail of document.querySelectorAll("#claims ~ details")) detail.open = on;
  await Promise.all(plots.map(draw));
  await paint();
}

async function start() {
  if (!plots.length) return;
  if (!("DecompressionStream" in window)) {
    for (const plot of plots) plot.textContent = "This browser is too old to draw the figure; its table has the numbers.";
    return;
  }
  await unpack();
  if (printing) {
    await paper(true);
    document.documentElement.dataset.drawn = "all";
    return;
  }
  const seen = new IntersectionObserver(
    (entries) => entries.filter((each) => each.isIntersecting).forEach((each) => draw(each.target)),
    { rootMargin: "800px" },
  );
  plots.forEach((plot) => seen.observe(plot));
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  dark.addEventListener("change", paint);
}

start();
