"""The studio's look: the reports' type, spacing and colours, as a style sheet and as a theme of Gradio."""

from importlib.resources import files

import gradio as gr
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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


class EarlyScript:
    """Runs `frames.js` before Gradio's own scripts, which keep the browser's functions as they find them.

    What Gradio calls the head of a page is added after them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._script = f"<head><script>{asset('frames.js')}</script>".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request, for the page itself with the script in it."""
        begun: list[Message] = []

        async def changed(message: Message) -> None:
            if message["type"] == "http.response.start":
                begun.append(message)
                return
            if begun:
                start = begun.pop()
                message["body"] = message.get("body", b"").replace(b"<head>", self._script, 1)
                if "content-length" in (headers := MutableHeaders(raw=start["headers"])):
                    headers["content-length"] = str(len(message["body"]))
                await send(start)
            await send(message)

        is_page = scope["type"] == "http" and scope["path"] == "/"
        await self._app(scope, receive, changed if is_page else send)
