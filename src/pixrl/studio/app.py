"""`pixrl studio`: the page, made of Gradio's parts, and the address at which it is served.

The page shows what `folders.py` reads and `pages.py` makes of it; a timer asks for both, and only parts that have
changed are sent.
"""

import hmac
import os
import socket
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # nothing leaves this machine
import gradio as gr
from starlette.middleware import Middleware

from pixrl.errors import InputError, PixrlError
from pixrl.report.page import render
from pixrl.rewards.http import is_loopback
from pixrl.runs.process import ask_to_stop
from pixrl.studio.folders import RunData, Runs, State, sentence
from pixrl.studio.fuse import FuseTab
from pixrl.studio.pages import AT_ONCE, RunPage, large, orders_of, run_list
from pixrl.studio.processes import Processes
from pixrl.studio.style import EarlyScript, asset, style, theme

EVERY = 6.0
"""Seconds between two looks at the folders; `benchmarks.studio watch` measures what they cost a training beside."""
LEAST_TOKEN = 16
"""Characters of a token, at least."""
POLL = 0.05
"""Seconds between two looks of Gradio at its queue, as it has them on Windows; its millisecond takes 7 % of a core."""
NONE = "–"
"""No run beside the first one."""


class Studio:
    """The page of one folder of runs."""

    def __init__(self, root: Path, concepts: Sequence[str] = (), model: str = "toy:turbo") -> None:
        """Make the page.

        Args:
            root: a folder of runs, or a run.
            concepts: what the list of the tab of fusions offers.
            model: what draws the fusions.

        Raises:
            InputError: there is no such folder.
        """
        self._fused_from, self._model = tuple(concepts), model
        self.runs = Runs(root)
        self.processes = Processes()
        self._pages: dict[str, RunPage] = {}
        self.page = self._build()

    def look(self, name: str) -> RunData:
        """Read a run on; one that the studio has just started is `starting` until its process writes to the folder."""
        data = self.runs.look(name)
        if self.processes.busy_with(data.path) == "resume" and data.state in (State.STOPPED, State.FINISHED):
            return data.but(State.STARTING)
        return data

    def read_all(self) -> None:
        """Read all runs once, so that the first visitor need not wait for it: logs may be long."""
        for name in self.runs.names():
            with suppress(InputError):  # it has gone meanwhile
                self.look(name)

    def page_of(self, name: str) -> RunPage:
        """Return the parts of a run's page as they were last made."""
        return self._pages.setdefault(name, RunPage())

    def picture(self, run: str, file: str) -> str:
        """Return a picture that was clicked on, as a data URI; an empty text where it is gone or damaged."""
        try:
            return large(self.runs.picture(run, file))
        except InputError:
            return ""

    def _build(self) -> gr.Blocks:
        with gr.Blocks(title="pixrl studio", analytics_enabled=False, fill_width=True) as page:
            gr.HTML('<div id="wordmark">pixrl <span>studio</span></div>')
            chosen, beside = gr.State(None), gr.State(None)
            seen = gr.State({})
            with gr.Tab("Runs"), gr.Row(elem_id="sides"):
                with gr.Column(scale=1, min_width=240):
                    listing = self.html()
                    other = gr.Dropdown([NONE], value=NONE, label="Beside it", interactive=True)
                with gr.Column(scale=5, min_width=320), gr.Row(elem_id="columns"):
                    left, right = RunColumn(self, visible=True), RunColumn(self, visible=False)
            with gr.Tab("Fuse"):
                self.fuse = FuseTab(self, self._fused_from, self._model)
            columns = (left, right)
            shown = [listing, other, chosen, beside, seen, *left.outputs, *right.outputs]
            given = [chosen, beside, seen, *left.inputs, *right.inputs]

            def update(
                first: str | None, second: str | None, known: dict[str, int], *settings: Any
            ) -> list[Any]:
                return self._update(first, second, known, columns, settings)

            def tick(*values: Any) -> list[Any]:
                # what is chosen stays as it is: a click may come while this looks
                listed, choice, _, _, known, *parts = update(*values)
                return [listed, choice, gr.skip(), gr.skip(), known, *parts]

            def open_page(request: gr.Request, *values: Any) -> list[Any]:
                wanted = [request.query_params.get(name) for name in ("run", "beside")]
                return [*update(*wanted, {}, *values[3:]), gr.Timer(active=True)]

            def choose(event: gr.EventData, *values: Any) -> list[Any]:
                return update(str(event._data["name"]), *values[1:])

            def set_beside(name: str, *values: Any) -> list[Any]:
                return update(values[0], None if name == NONE else name, *values[2:])

            quiet: dict[str, Any] = {
                "show_progress": "hidden",
                "concurrency_limit": 8,
                "api_visibility": "private",
            }
            timer = gr.Timer(EVERY, active=False)
            page.load(open_page, given, [*shown, timer], **quiet)
            timer.tick(tick, given, shown, **quiet)
            fuse = self.fuse
            timer.tick(fuse.tick, [fuse.searched, fuse.mark], [fuse.learned, fuse.mark], **quiet)
            listing.select(choose, given, shown, **quiet)
            other.input(set_beside, [other, *given], shown, **quiet)
            for column, name in ((left, chosen), (right, beside)):
                column.listen(name, update, given, shown, quiet)
        return page

    def _update(
        self,
        first: str | None,
        second: str | None,
        known: Mapping[str, int],
        columns: Sequence["RunColumn"],
        settings: Sequence[Any],
    ) -> list[Any]:
        """Return what the page shows now, in the order of its parts; nothing for those that it shows already."""
        names = self.runs.names()
        runs = {name: self.look(name) for name in names}
        if first not in runs:
            first = names[0] if names else None
        if second not in runs or second == first:
            second = None
        fresh = Fresh(known)
        html = fresh("list", run_list(list(runs.values()), first))
        others = [NONE, *(name for name in names if name != first)]
        choice = fresh("beside", (others, second), gr.Dropdown(choices=others, value=second or NONE))
        half = len(settings) // 2
        parts = []
        for at, (column, name) in enumerate(zip(columns, (first, second), strict=True)):
            data = None if name is None else runs[name]
            parts += column.show(f"{at}", data, settings[at * half : (at + 1) * half], fresh)
        return [html, choice, first, second, fresh.known, *parts]

    def html(self, **more: Any) -> gr.HTML:
        """Make a part of the page whose runs can be clicked on, and whose pictures are enlarged."""

        def picture(asked: Any) -> str:
            return self.picture(str(asked["run"]), str(asked["file"]))

        return gr.HTML(
            "",
            js_on_load=asset("studio.js"),
            server_functions=[picture],
            apply_default_css=False,
            **more,
        )


class Fresh:
    """Passes on what a page does not show yet."""

    def __init__(self, known: Mapping[str, int]) -> None:
        self.known = dict(known)

    def __call__(self, name: str, content: Any, shown: Any = None) -> Any:
        """Return `shown`, or the content itself, where the part `name` showed something else before."""
        mark = hash(repr(content))
        if self.known.get(name) == mark:
            return gr.skip()
        self.known[name] = mark
        return content if shown is None else shown


class RunColumn:
    """The parts of the page that show one run."""

    def __init__(self, studio: Studio, *, visible: bool) -> None:
        self.studio = studio
        with gr.Column(visible=visible, min_width=320) as self.column:
            self.head = studio.html()
            with gr.Row(elem_classes="buttons"):
                self.stop = gr.Button("Stop", size="sm", interactive=False)
                self.resume = gr.Button("Resume", size="sm", interactive=False)
                self.export = gr.Button("Export LoRA", size="sm", interactive=False)
            self.note = gr.HTML("", elem_classes="note", visible=False)
            self.rewards = studio.html()
            self.group = studio.html()
            with gr.Row(visible=False, elem_classes="heading") as self.bar:
                gr.HTML('<div class="pixrl"><h2>Before and after</h2></div>')
                self.order = gr.Dropdown([], value=None, show_label=False, container=False)
            self.pairs = studio.html()
            self.more = gr.Button("Show more", size="sm", visible=False)
            self.learning = studio.html()
        self.count = gr.State(AT_ONCE)
        self.said = gr.State("")
        """What came of the last click on a button."""

    @property
    def inputs(self) -> list[Any]:
        """What the user has set in this column."""
        return [self.order, self.count, self.said]

    @property
    def outputs(self) -> list[Any]:
        """The parts in the order of what `show` returns."""
        buttons = [self.stop, self.resume, self.export]
        return [
            *(self.column, self.head, *buttons, self.note, self.rewards, self.group),
            *(self.bar, self.order, self.pairs, self.more, self.learning),
        ]

    def show(self, at: str, data: RunData | None, settings: Sequence[Any], fresh: Fresh) -> list[Any]:
        """Return what the parts show of a run; nothing for those that are as they were."""
        visible = fresh(f"{at}/column", data is not None, gr.Column(visible=data is not None or at == "0"))
        if data is None:
            return [visible, *[gr.skip()] * (len(self.outputs) - 1)]
        order, count, said = settings
        page, orders = self.studio.page_of(data.name), orders_of(data)
        order = order if order in orders else orders[0]
        busy = self.studio.processes.busy_with(data.path)
        trains = data.shape is not None
        can_stop = data.state is State.RUNNING
        can_resume = data.state in (State.STOPPED, State.FINISHED) and busy is None and not data.error
        can_export = trains and busy is None and data.done > 0
        text = self.studio.processes.outcome(data.path) if busy is None else f"{busy} is under way."
        note = render("studio/note.html.j2", {"text": said or text})
        pairs = page.pairs(data, order, count) if trains else ""
        more = f"{count} of " in pairs and f"{count} of {count} shown" not in pairs
        can_resume = can_resume and data.state is State.STOPPED
        return [
            visible,
            fresh(f"{at}/head", page.head(data)),
            fresh(f"{at}/stop", can_stop, gr.Button(interactive=can_stop)),
            fresh(f"{at}/resume", can_resume, gr.Button(interactive=can_resume)),
            fresh(f"{at}/export", (can_export, trains), gr.Button(interactive=can_export, visible=trains)),
            fresh(f"{at}/note", note, gr.HTML(note, visible=bool(note.strip()))),
            fresh(f"{at}/rewards", page.rewards(data)),
            fresh(f"{at}/group", page.group(data)),
            fresh(f"{at}/bar", trains, gr.Row(visible=trains)),
            fresh(f"{at}/order", (orders, order), gr.Dropdown(choices=orders, value=order)),
            fresh(f"{at}/pairs", pairs),
            fresh(f"{at}/more", more, gr.Button(visible=more)),
            fresh(f"{at}/learning", page.learning(data)),
        ]

    def listen(
        self, name: gr.State, update: Any, given: list[Any], shown: list[Any], quiet: Mapping[str, Any]
    ) -> None:
        """Have the buttons do what they say, and the page show what came of it."""
        clicks = (
            (self.stop, self._stop),
            (self.resume, self._begin("resume")),
            (self.export, self._begin("export")),
        )
        for button, do in clicks:
            button.click(do, [name], [self.said], **quiet).then(update, given, shown, **quiet)
        self.more.click(lambda count: count + AT_ONCE, [self.count], [self.count], **quiet).then(
            update, given, shown, **quiet
        )
        self.order.input(update, given, shown, **quiet)

    def _stop(self, name: str) -> str:
        run = self.studio.runs.watched(name).path
        try:
            process = ask_to_stop(run)
        except PixrlError as error:
            return sentence(error, run)
        return "" if process.is_here else f"Asked its process on {process.host} to stop."

    def _begin(self, command: str) -> Any:
        def begin(name: str) -> str:
            run = self.studio.runs.watched(name).path
            try:
                self.studio.processes.begin(command, run)
            except PixrlError as error:
                return sentence(error, run)
            return ""

        return begin


def launch(studio: Studio, host: str, port: int, token: str | None) -> str:
    """Serve the page in threads of its own, and return its address.

    Args:
        studio: the page.
        host, port: where; port 0 takes any that is free.
        token: what visitors type as the password, of any user name; None: nothing is asked.

    Raises:
        InputError: the address cannot be listened at, or others reach it and there is no token.
    """
    if token is None and not is_loopback(host):
        raise InputError(
            f"Other machines reach {host or 'an empty --host'}, so the studio asks for a token there: put one of "
            f"{LEAST_TOKEN} characters or more into PIXRL_STUDIO_TOKEN, or leave --host out."
        )
    if token is not None and len(token) < LEAST_TOKEN:
        raise InputError(
            f"The studio's token has at least {LEAST_TOKEN} characters; this one has {len(token)}. Make one: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind((host, port))
        except OSError as error:
            raise InputError(
                f"Cannot listen at {host}, port {port}: {error.strerror or error}. Is another server there? Give "
                "another one: --port 0 takes any that is free."
            ) from None
        port = int(one.getsockname()[1])  # the one that is free, for 0
    studio.page._queue.sleep_when_free = POLL
    auth = None if token is None else lambda _, given: hmac.compare_digest(given.encode(), token.encode())
    _, url, _ = studio.page.launch(
        server_name=host,
        server_port=port,
        auth=auth,
        auth_message="Any user name; the password is the token of PIXRL_STUDIO_TOKEN.",
        prevent_thread_lock=True,
        quiet=True,
        share=False,
        ssr_mode=False,
        footer_links=[],
        theme=theme(),
        head=style(),
        app_kwargs={"middleware": [Middleware(EarlyScript)]},
    )
    threading.Thread(target=studio.read_all, daemon=True).start()
    return str(url)
