// Formulas that pymdownx.arithmatex marked, rendered by the KaTeX that lies beside this file.
document.addEventListener("DOMContentLoaded", () => {
  for (const place of document.querySelectorAll(".arithmatex")) {
    const text = place.textContent.trim();
    const display = text.startsWith("\\[");
    katex.render(text.slice(2, -2), place, { displayMode: display, throwOnError: false });
  }
});
