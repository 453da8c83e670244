// Lists of mixtures: a click, or Enter, takes one up.
function take(target) {
  const figure = target.closest("figure.pick");
  if (figure) trigger("select", { list: figure.dataset.list, at: +figure.dataset.at });
}
element.addEventListener("click", (event) => take(event.target));
element.addEventListener("keydown", (event) => { if (event.key === "Enter") take(event.target); });
