// The pad of weights: `element` and `trigger` are Gradio's. The point follows the pointer at once, the picture as fast as it can.
let waiting = null;
function tell(x, y) {
  const pad = element.querySelector(".pad");
  pad.style.setProperty("--x", x);
  pad.style.setProperty("--y", y);
  if (!waiting) waiting = setTimeout(() => { waiting = null; trigger("input", { x: +pad.style.getPropertyValue("--x"), y: +pad.style.getPropertyValue("--y") }); }, 60);
}
function at(event) {
  const area = element.querySelector(".pad .area").getBoundingClientRect();
  const inside = (value) => Math.min(1, Math.max(0, value));
  tell(inside((event.clientX - area.left) / area.width), inside((event.clientY - area.top) / area.height));
}
element.addEventListener("pointerdown", (event) => {
  const pad = event.target.closest(".pad");
  if (!pad) return;
  pad.setPointerCapture(event.pointerId);
  pad.focus();
  at(event);
  event.preventDefault();
});
element.addEventListener("pointermove", (event) => { if (event.buttons && event.target.closest(".pad")) at(event); });
element.addEventListener("keydown", (event) => {
  const pad = event.target.closest(".pad"), step = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (!pad || !step) return;
  event.preventDefault();
  const [x, y] = ["--x", "--y"].map((name, axis) => Math.min(1, Math.max(0, +pad.style.getPropertyValue(name) + 0.05 * step[axis])));
  tell(x, y);
});
