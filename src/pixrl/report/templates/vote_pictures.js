"use strict"; // the pictures that a page shows to choose from; the page says what `choose(name, n)` and `pictureAt(name)` do
const $ = (id) => document.getElementById(id);
function notice(sentence) { $("notice").textContent = sentence; $("notice").hidden = !sentence; }
const picks = () => [...document.querySelectorAll(".pick")];

function option(name, n) {
  const box = document.createElement("div"), pick = document.createElement("button");
  const image = new Image(), label = document.createElement("span"), zoom = document.createElement("button");
  box.className = "option"; pick.className = "pick"; zoom.className = "zoom";
  pick.setAttribute("aria-label", `Picture ${n + 1}`); zoom.setAttribute("aria-label", `Enlarge picture ${n + 1}`);
  image.src = pictureAt(name); image.alt = ""; label.textContent = n + 1;
  image.onerror = () => notice(GONE);
  zoom.innerHTML = '<svg viewBox="0 0 16 16" fill="none" stroke="currentColor" stroke-width="1.8" stroke-linecap="round"><path d="M6 2H2v4M10 14h4v-4M2 2l4.5 4.5M14 14l-4.5-4.5"/></svg>';
  pick.onclick = () => choose(name, n);
  zoom.onclick = () => enlarge(name);
  pick.append(image, label); box.append(pick, zoom);
  return box;
}
function enlarge(name) { $("large").firstElementChild.src = pictureAt(name); $("large").showModal(); }
$("large").onclick = () => $("large").close();

