// Click to enlarge; rows of pictures whose last one is not left with a single picture; a page that renews itself.
const grids = [...document.querySelectorAll("main div.grid, main .two")];
function arrange(grid) {
  grid.style.gridTemplateColumns = "";
  const count = grid.children.length, most = getComputedStyle(grid).gridTemplateColumns.split(" ").length;
  if (most < 2 || count <= most) return;
  const least = Math.max(2, Math.ceil(most * 0.6)), fits = grid.matches(".two") ? [2, 3] : [];
  for (let columns = most; columns >= least; columns--) fits.push(columns);
  fits.push(most + 1);
  const rest = (columns) => count % columns || columns;
  const best = fits.find((columns) => rest(columns) >= columns / 2 && rest(columns) > 1) ?? fits.find((columns) => rest(columns) > 1);
  if (best && best !== most) grid.style.gridTemplateColumns = `repeat(${best}, minmax(0, 1fr))`;
}
const all = [...document.querySelectorAll("main img")].filter((image) => !image.closest("a"));
const dialog = document.createElement("dialog");
dialog.innerHTML = '<div class="shown"></div><p class="soft"></p>';
dialog.addEventListener("click", () => dialog.close());
document.body.append(dialog);
let at = 0;
function enlarge(number) {
  at = (number + all.length) % all.length;
  const image = all[at], beside = image.closest(".pair"), shown = beside ? [...beside.querySelectorAll("img")] : [image];
  dialog.firstChild.replaceChildren(...shown.map((one) => {
    const copy = new Image();
    copy.src = one.src, copy.alt = one.alt;
    if (one.dataset.file) {
      const full = new Image();  // the picture itself, where the page still lies beside it
      full.onload = () => { copy.src = full.src; };
      full.src = one.dataset.file;
    }
    return copy;
  }));
  dialog.firstChild.style.setProperty("--count", shown.length);
  dialog.lastChild.textContent = image.closest("figure")?.querySelector("figcaption")?.innerText || image.alt;
  if (!dialog.open) dialog.showModal();
}
all.forEach((image, number) => {
  image.tabIndex = 0;
  image.setAttribute("role", "button");
  image.classList.add("zooms");
  image.addEventListener("click", () => enlarge(number));
  image.addEventListener("keydown", (event) => { if (event.key === "Enter") enlarge(number); });
});
dialog.addEventListener("keydown", (event) => {
  const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
  if (step) enlarge(at + step);
});
grids.forEach(arrange);
addEventListener("resize", () => grids.forEach(arrange));
const refresh = Number(document.body.dataset.refresh);
if (refresh) setInterval(() => { if (!dialog.open && !document.hidden) location.reload(); }, 1000 * refresh);
