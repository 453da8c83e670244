const GONE = "A picture cannot be shown. Your votes are kept. Stop pixrl vote with Ctrl-C and go on with the run: it is drawn again.";
const pictureAt = (name) => `${location.pathname}/picture/${name}.png`;
let state = null, group = null, chosen = [], mine = [], lit = -1, busy = false;

function show(part) { for (const id of ["wait", "compare"]) $(id).hidden = id !== part; }
const left = () => state.groups.filter((one) => !one.voted);
const undoable = () => mine.filter((one) => state.groups.some((other) => other.group === one)); // others are learned from

function draw() { // the group in hand, or the next one that nobody has voted on
  const same = group && left().find((one) => one.group === group.group);
  const next = same || left()[0];
  if (!next) { group = null; return wait(); }
  show("compare");
  const done = state.groups.length - left().length, bar = document.querySelector(".track");
  bar.setAttribute("aria-valuemax", state.groups.length); bar.setAttribute("aria-valuenow", done);
  bar.firstElementChild.style.width = `${(100 * done) / state.groups.length}%`;
  $("count").textContent = `step ${state.step + 1} / ${state.steps} · group ${done + 1} / ${state.groups.length}`;
  $("undo").disabled = !undoable().length && !chosen.length;
  if (same) return;
  group = next; chosen = []; lit = -1;
  const n = group.pictures.length, order = state.ask === "order" && n > 2;
  document.documentElement.style.setProperty("--columns", n > 4 ? Math.ceil(n / 2) > 4 ? 4 : Math.ceil(n / 2) : n);
  document.documentElement.style.setProperty("--rows-share", n > 8 ? 0.35 : n > 4 ? 0.55 : 1);
  $("pictures").classList.toggle("two", n === 2);
  $("prompt").textContent = group.prompt;
  $("question").textContent = n === 2 ? "Which is better?" : order ? "From the best to the worst?" : "Which is the best?";
  $("arrows").innerHTML = n === 2 ? "<kbd>←</kbd> <kbd>→</kbd> too" : "<kbd>←</kbd> <kbd>→</kbd> and <kbd>Enter</kbd> too";
  $("pictures").replaceChildren(...group.pictures.map(option));
  for (const name of left()[1]?.pictures || []) new Image().src = pictureAt(name);
}

function wait() {
  show("wait");
  const votes = `${state.votes} ${state.votes === 1 ? "vote" : "votes"} so far.`;
  $("wait-head").textContent = state.ended ? "Thank you" : "One moment";
  $("wait-text").textContent = state.ended || `${state.votes ? "Learning from your votes and drawing the next pictures." : "The first pictures are being drawn."} ${votes}`;
  $("back").hidden = Boolean(state.ended) || !undoable().length;
}

function choose(name, n) {
  if (busy || !group) return;
  notice("");
  if (state.ask === "best") return vote([name], n);
  chosen = chosen.includes(name) ? chosen.filter((one) => one !== name) : [...chosen, name];
  const rest = group.pictures.filter((one) => !chosen.includes(one));
  badges();
  if (rest.length <= 1) vote([...chosen, ...rest], n);
}
function badges() { // in an order, each chosen picture says its place
  picks().forEach((pick, n) => {
    const place = chosen.indexOf(group.pictures[n]);
    pick.classList.toggle("chosen", place >= 0);
    pick.querySelector("span").textContent = place >= 0 ? `${n + 1} · ${["best", "second", "third"][place] || `${place + 1}th`}` : n + 1;
  });
  $("undo").disabled = !undoable().length && !chosen.length;
}

async function vote(best, n) {
  busy = true; // until it is on the disk: a double click is one vote
  const voted = group;
  picks()[n]?.classList.add("chosen");
  const [answer] = await Promise.all([send("PUT", { group: voted.group, best }), new Promise((go) => setTimeout(go, 160))]);
  if (answer.counted) mine.push(voted.group);
  else notice(answer.error || "That group has a vote already, from another tab: the first one counts.");
  if (!answer.error) voted.voted = true;
  group = null;
  busy = false;
  await look();
}
async function undo() {
  if (busy) return;
  if (chosen.length) { chosen.pop(); return badges(); }
  if (!undoable().length) return;
  busy = true;
  const last = mine.pop(), answer = await send("DELETE", { group: last });
  notice(answer.error || "");
  await look();
  if (!answer.error) { group = null; state.groups.sort((a, b) => (b.group === last) - (a.group === last)); draw(); }
  busy = false;
}
async function send(method, body) { // again and again until it is answered: a vote is never dropped
  for (let pause = 500; ; pause = Math.min(2 * pause, 8000)) {
    try {
      const answer = await fetch(`${location.pathname}/vote`, { method, body: JSON.stringify(body) });
      const given = await answer.json();
      if (answer.status < 500) { notice(""); return given; }
      notice(given.error);
    } catch { notice("Not saved yet: pixrl vote does not answer. Your vote is kept here and sent again."); }
    await new Promise((go) => setTimeout(go, pause));
  }
}

let looking = null;
async function look() {
  clearTimeout(looking);
  try {
    const answer = await fetch(`${location.pathname}/state`), given = await answer.json();
    if (given.error) { $("wait-text").textContent = given.error; return show("wait"); }
    state = given;
    if (!busy) draw();
  } catch {
    if (!state?.ended) notice("pixrl vote does not answer. Start it again, and open the link that it prints.");
  }
  if (!state?.ended) looking = setTimeout(look, state && left().length ? 2000 : 500);
}

$("undo").onclick = undo;
$("back").onclick = undo;
$("tie").onclick = () => { if (!busy && group) vote([], -1); };
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const press = event.key;
  if ($("large").open) { if (press === " ") { event.preventDefault(); $("large").close(); } return; }
  if (press === "u" || press === "z" || press === "Backspace") return undo();
  if ($("compare").hidden || !group) return;
  const names = group.pictures, n = Number(press) - 1, onButton = event.target.tagName === "BUTTON";
  if (press >= "1" && press <= "9" && n < names.length) return choose(names[n], n);
  if (press === "0") return $("tie").click();
  if (press === " " && !onButton) { event.preventDefault(); return enlarge(names[Math.max(lit, 0)]); }
  if (press === "ArrowLeft" || press === "ArrowRight") {
    event.preventDefault();
    const right = press === "ArrowRight";
    if (names.length === 2) return choose(names[right ? 1 : 0], right ? 1 : 0);
    lit = lit < 0 ? (right ? 0 : names.length - 1) : (lit + (right ? 1 : names.length - 1)) % names.length;
    picks().forEach((pick, k) => pick.classList.toggle("lit", k === lit));
  }
  if (press === "Enter" && lit >= 0 && !onButton) choose(names[lit], lit);
});
look();
