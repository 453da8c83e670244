"""The studio's look: the reports' type, spacing and colours, as a style sheet and as a theme of Gradio."""

from importlib.resources import files

import gradio as gr

FONT = (
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)


def asset(name: str) -> str:
    """Return the text of a file beside the page's templates."""
    return (files("pixrl.report") / "templates" / "studio" / name).read_text(encoding="utf-8")


def style() -> str:
    """Return the reports' style sheet for what stands inside `.pixrl`, and the studio's own."""
    templates = files("pixrl.report") / "templates"
    colours, report = (
        (templates / name).read_text(encoding="utf-8") for name in ("colours.css", "style.css")
    )
    return f"<style>{colours}.pixrl {{ {report} }}\n{asset('studio.css')}{asset('fuse.css')}</style>"


def theme() -> gr.themes.Base:
    """Return Gradio's plain theme in the type, spacing and colours of the reports."""
    base = gr.themes.Base(
        primary_hue="blue",
        neutral_hue="zinc",
        radius_size="lg",
        font=FONT,
        font_mono=("ui-monospace", "Menlo", "Consolas", "monospace"),
    )
    return base.set(
        body_background_fill="var(--bg)",
        body_background_fill_dark="var(--bg)",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        button_secondary_background_fill="var(--card)",
        button_secondary_background_fill_dark="var(--card)",
        button_secondary_border_color="var(--line)",
        button_secondary_border_color_dark="var(--line)",
        button_border_width="1px",
        input_background_fill="var(--card)",
        input_background_fill_dark="var(--card)",
        input_border_color="var(--line)",
        input_border_color_dark="var(--line)",
    )
