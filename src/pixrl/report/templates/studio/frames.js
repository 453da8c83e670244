// Gradio's page asks for sixty frames a second for as long as it is open, for a clock that it does not show: an eighth of
// a core, beside the training. While nobody touches the page it gets four.
(() => {
  const TOUCHED = 2000, PAUSE = 250, frame = requestAnimationFrame.bind(window), cancel = cancelAnimationFrame.bind(window);
  let touched = performance.now();
  for (const kind of ["pointermove", "pointerdown", "keydown", "wheel", "touchstart"])
    addEventListener(kind, () => { touched = performance.now(); }, { capture: true, passive: true });
  window.requestAnimationFrame = (draw) =>
    performance.now() - touched < TOUCHED ? frame(draw) : -setTimeout(() => frame(draw), PAUSE);
  window.cancelAnimationFrame = (asked) => (asked < 0 ? clearTimeout(-asked) : cancel(asked));
})();
