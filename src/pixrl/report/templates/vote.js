const token = STATIC ? location.hash.slice(1) : location.pathname.split("/").pop();
const kept = `pixrl-study-${token}`; // of this browser: votes of a bundle, or those that the server does not have yet
const GONE = "A picture cannot be shown. Reload the page; if it stays away, tell who invited you. Your votes are kept.";
const pictureAt = (name) => (STATIC ? `pictures/${name}.png` : `/picture/${name}.png`);
let study, questions, answers, at, lit, since, busy = false, stored = {};

function show(part) {
  for (const id of ["intro", "compare", "end", "failed"]) $(id).hidden = id !== part;
}
function fail(sentence) { $("why").textContent = sentence; show("failed"); }
const key = (q) => `${q.task} ${q.criterion}`;

function readStored() {
  try { return JSON.parse(localStorage.getItem(kept)) || {}; } catch { return {}; }
}
function store() {
  try { localStorage.setItem(kept, JSON.stringify(stored)); return true; } catch { return false; }
}

function startStudy(given) {
  study = given;
  document.documentElement.style.setProperty("--columns", study.tasks[0].pictures.length > 4 ? 3 : study.tasks[0].pictures.length);
  document.documentElement.style.setProperty("--rows-share", study.tasks[0].pictures.length > 4 ? 0.5 : 1);
  questions = study.tasks.flatMap((_, task) => study.criteria.map((c) => ({ task, criterion: c.name, question: c.question })));
  answers = new Map(study.answers.map((a) => [key(a), a.choice]));
  stored = readStored();
  for (const vote of Object.values(stored)) {
    if (vote.choice === null) answers.delete(key(vote)); else answers.set(key(vote), vote.choice);
  }
  at = next();
  const done = answers.size, two = study.tasks[0].pictures.length === 2;
  $("pictures").classList.toggle("two", two);
  const many = study.criteria.length > 1 ? `${study.tasks.length} comparisons with ${study.criteria.length} questions each` : `${study.tasks.length} comparisons`;
  $("welcome").textContent = done ? `Welcome back. You have answered ${done} of ${questions.length} questions.` : `You will see ${many}. Choose a picture by clicking it.`;
  $("start").textContent = done ? "Go on" : "Start";
  $("arrows").innerHTML = two ? "<kbd>←</kbd> <kbd>→</kbd> too" : "<kbd>←</kbd> <kbd>→</kbd> and <kbd>Enter</kbd> too";
  $("tie-key").hidden = $("tie").hidden = !study.ties;
  if (at === questions.length) finish(); else show("intro");
  send();
}
const next = () => { const n = questions.findIndex((q) => !answers.has(key(q))); return n < 0 ? questions.length : n; };

function draw() {
  if (at >= questions.length) return finish();
  const q = questions[at], task = study.tasks[q.task];
  show("compare");
  $("prompt").textContent = task.prompt;
  $("question").textContent = q.question;
  $("reference").hidden = !task.reference;
  if (task.reference) $("reference").firstElementChild.src = pictureAt(task.reference);
  const bar = document.querySelector(".track");
  bar.setAttribute("aria-valuemax", questions.length); bar.setAttribute("aria-valuenow", at);
  bar.firstElementChild.style.width = `${(100 * at) / questions.length}%`;
  $("count").textContent = `${at + 1} / ${questions.length}`;
  $("undo").disabled = at === 0;
  const same = $("pictures").dataset.task === String(q.task);
  if (!same) {
    $("pictures").replaceChildren(...task.pictures.map(option));
    $("pictures").dataset.task = q.task;
    for (const name of study.tasks[q.task + 1]?.pictures || []) new Image().src = pictureAt(name);
  }
  since = performance.now();
  lit = -1;
  for (const pick of picks()) pick.classList.remove("chosen", "lit");
}
function choose(choice, n) {
  if (busy || at >= questions.length) return;
  if (!offline) notice("");
  busy = true; // until the picture has shown that it was chosen: a double click is one vote
  picks()[n]?.classList.add("chosen");
  put(questions[at], choice);
  setTimeout(() => { busy = false; at = next(); draw(); }, 160);
}
function undo() {
  if (busy) return;
  const last = at - 1;
  if (last < 0) return;
  at = last;
  put(questions[at], null);
  draw();
}
function put(q, choice) {
  if (choice === null) answers.delete(key(q)); else answers.set(key(q), choice);
  const seconds = Math.round((performance.now() - since) / 100) / 10;
  stored[key(q)] = { task: q.task, criterion: q.criterion, choice, seconds, at: Date.now() / 1000 };
  if (!store() && STATIC) notice("This browser keeps nothing (private window?): do not close the page before you have saved your votes.");
  send();
}

let sending = false, offline = false;
async function send() { // one after the other, oldest first; what is not confirmed stays stored and is sent again
  if (STATIC || sending) return;
  sending = true;
  for (let wait = 500; Object.keys(stored).length;) {
    const [name, vote] = Object.entries(stored)[0];
    try {
      const answer = await fetch(`${location.pathname}/vote`, { method: vote.choice === null ? "DELETE" : "PUT", body: JSON.stringify(vote) });
      if (answer.status >= 500) throw new Error();
      if (!answer.ok) notice((await answer.json()).error); else if (offline) notice("");
      offline = false;
      if (stored[name] === vote) { delete stored[name]; store(); }
      wait = 500;
    } catch {
      offline = true;
      notice("Not saved yet: the server does not answer. Your votes are kept here and sent again.");
      await new Promise((go) => setTimeout(go, wait));
      wait = Math.min(2 * wait, 8000);
    }
  }
  sending = false;
  if (!$("end").hidden) finish();
}

function finish() {
  const waiting = !STATIC && Object.keys(stored).length;
  $("thanks").textContent = STATIC ? "All questions are answered. Save your votes as a file, and send it to who invited you."
    : waiting ? "All questions are answered; the last votes are being saved. Please keep this page open." : "All your votes are saved. You can close this page.";
  $("save").hidden = !STATIC;
  show("end");
}
$("save").onclick = () => {
  const votes = Object.values(stored).filter((vote) => vote.choice !== null);
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([JSON.stringify({ token, votes })], { type: "application/json" }));
  link.download = "votes.json";
  link.click();
};
$("start").onclick = () => draw();
$("back").onclick = () => { at = questions.length; undo(); };
$("undo").onclick = undo;
$("tie").onclick = () => choose("tie", -1);
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  const press = event.key;
  if ($("large").open) { if (press === " ") { event.preventDefault(); $("large").close(); } return; }
  if (!$("intro").hidden) { if (press === "Enter" && event.target.tagName !== "BUTTON") draw(); return; }
  if (press === "z" || press === "u" || press === "Backspace") return $("end").hidden ? undo() : $("back").click();
  if ($("compare").hidden) return;
  const names = study.tasks[questions[at].task].pictures, n = Number(press) - 1;
  if (press >= "1" && press <= "9" && n < names.length) return choose(names[n], n);
  if (press === "0" && study.ties) return choose("tie", -1);
  if (press === " " && event.target.tagName !== "BUTTON") { event.preventDefault(); return enlarge(names[Math.max(lit, 0)]); }
  if (press === "ArrowLeft" || press === "ArrowRight") {
    event.preventDefault();
    const right = press === "ArrowRight";
    if (names.length === 2) return choose(names[right ? 1 : 0], right ? 1 : 0);
    lit = lit < 0 ? (right ? 0 : names.length - 1) : (lit + (right ? 1 : names.length - 1)) % names.length;
    picks().forEach((pick, k) => pick.classList.toggle("lit", k === lit));
  }
  if (press === "Enter" && lit >= 0 && event.target.tagName !== "BUTTON") choose(names[lit], lit);
});

if (STATIC) {
  const script = document.createElement("script");
  script.src = `plans/${encodeURIComponent(token)}.js`;
  script.onerror = () => fail(token ? "This link is not one of this study. Ask whoever invited you for yours." : "Here is a study. To take part, open your own link.");
  document.head.append(script);
} else {
  fetch(`${location.pathname}/state`).then((answer) => answer.json()).then((given) => given.error ? fail(given.error) : startStudy(given))
    .catch(() => fail("The study cannot be reached just now. Reload the page."));
}
