// Runs once for each part of the page: `element`, `trigger` and `server` are Gradio's.
function box() {
  let dialog = document.querySelector("dialog.pixrl");
  if (!dialog) {
    dialog = document.createElement("dialog");
    dialog.className = "pixrl";
    dialog.innerHTML = '<div class="shown"></div><p class="text soft"></p>';
    dialog.addEventListener("click", () => dialog.close());
    document.body.append(dialog);
  }
  return dialog;
}
async function enlarge(figure) {
  const dialog = box(), shown = dialog.querySelector(".shown");
  dialog.querySelector(".text").textContent = figure.dataset.caption || figure.querySelector("h3")?.textContent || "";
  if (figure.matches(".chart")) {
    shown.replaceChildren(figure.querySelector("svg").cloneNode(true));
  } else {
    const images = [...figure.querySelectorAll("img")].map((one) => one.cloneNode());
    shown.replaceChildren(...images);
    shown.style.setProperty("--count", images.length || 1);
    const run = figure.closest("[data-of]")?.dataset.of;
    figure.dataset.files.split(" ").forEach(async (file, at) => {
      const large = await server.picture({ run, file });
      if (large && images[at]) images[at].src = large;
    });
  }
  if (!dialog.open) dialog.showModal();
  dialog.onkeydown = (event) => {
    const all = [...element.querySelectorAll("figure.large, figure.chart")], step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step && all[all.indexOf(figure) + step];
    if (next) enlarge(next);
  };
}
element.addEventListener("click", (event) => {
  const run = event.target.closest("[data-run]"), figure = event.target.closest("figure.large, figure.chart");
  if (run) trigger("select", { name: run.dataset.run });
  else if (figure) enlarge(figure);
});
element.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && event.target.matches("figure.large, figure.chart")) enlarge(event.target);
});
