"""The page's controls: where they are, how they look, what they call."""

import errno
import os
import socket

import gradio as gr
from starlette.middleware import Middleware

from ..pipelines.calls import MAX_GUIDANCE_SCALE, Made
from ..pipelines.samplers import steps_of, title_of
from .actions import ENDS, FIELDS, WAITING, Page, code_label, columns_of, path_label
from .clients import Clients

_SESSIONS = 32  # whose last images are kept
_FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_CSS = """
.page-head, .page-head > * { padding: 0 !important }
.page-head h1 { margin: 0 0 4px }
.page-head a { margin-left: 8px; white-space: nowrap }
.page-examples { display: grid !important; grid-template-columns: 1fr 1fr; gap: 8px !important }
.page-examples::before { content: "Examples"; grid-column: 1 / -1; font-size: var(--text-sm);
  color: var(--body-text-color-subdued); margin-bottom: -4px }
.page-actions { flex-wrap: nowrap !important; gap: 8px !important }
.page-actions button { white-space: nowrap; padding-left: 8px; padding-right: 8px; font-size: var(--text-md) }
.page-actions button:first-child { flex-grow: 2 }
.page-quality label { padding: 6px 10px }
.images .grid-wrap { min-height: 0; max-height: none; overflow: visible }
.images:has(.preview) .grid-wrap { min-height: 420px }
.images .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(40px, 1fr));
  grid-template-rows: none; grid-auto-rows: auto }
.images .thumbnail-item { height: auto; aspect-ratio: auto; display: flex; flex-direction: column }
.images .thumbnail-item > img { height: auto; aspect-ratio: 1 }
.images .caption-label { position: static; max-width: none; width: 100%; border: 0; border-radius: 0;
  padding: 2px 4px; text-align: center; white-space: normal; opacity: 1 !important }
.page-strip .grid-wrap { overflow-x: auto }
.page-strip .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(60px, 1fr)); gap: 6px }
.page-hard .images img { image-rendering: pixelated }
.page-bar { align-items: center; flex-wrap: nowrap !important }
.page-bar > * { margin: 0 !important; flex: 0 0 auto !important; width: auto !important;
  min-width: 0 !important }
.page-bar button { min-height: 38px }
.page-bar > :first-child { flex: 1 !important }
@media (max-width: 600px) {
  .page-bar { flex-wrap: wrap !important; justify-content: space-between }
  .page-bar > :first-child { flex: 1 0 100% !important }
}
.page-wrong { outline: 2px solid #dc2626; outline-offset: -2px; border-radius: var(--block-radius) }
"""
_HARD = "(on) => { document.querySelector('.gradio-container').classList.toggle('page-hard', on) }"
_QUICK = dict(preprocess=False, queue=False, show_progress="hidden", api_visibility="private")
_PIPELINE = dict(preprocess=False, concurrency_limit=1, concurrency_id="pipeline")


def _settings(page: Page, start: dict) -> tuple[dict, gr.Accordion]:
    """The folded controls by [`FIELDS`], and what folds them."""
    most, steps = page.config.max_images, page.config.max_steps
    with gr.Accordion("Settings", open=False) as fold:
        found = {
            "images": gr.Slider(
                1, max(ENDS, most), start["images"], step=1, visible=most > 1, label="Images per class"
            ),
            "guidance": gr.Slider(
                0, MAX_GUIDANCE_SCALE, start["guidance"], step=0.1, label="Guidance scale", info="1 is off."
            ),
            "seed": gr.Number(
                start["seed"], label="Seed", info="Of the first image; the next have the next ones."
            ),
            "sampler": gr.Dropdown(
                [(title_of(pipe.scheduler), name) for name, pipe in page.pipes.items()],
                value=start["sampler"], label="Sampler", visible=len(page.pipes) > 1,
            ),
            "steps": gr.Slider(1, max(ENDS, steps), start["steps"], step=1, label="Steps"),
        }  # fmt: skip
        with gr.Row():
            found["low"] = gr.Number(0, label="Lowest sigma", info="of guidance", min_width=100)
            found["high"] = gr.Number(start["high"], label="Highest sigma", info="of guidance", min_width=100)
    return found, fold


def _results(page: Page, made: Made | None) -> dict:
    """What shows a call, in the order of what `generate` gives: at first the one that the page opens with."""
    view = made and page.view(made, made.positions)
    last, there = (made.positions if made else 1), made is not None
    gallery = gr.Gallery(
        view and view.images, label="Images", show_label=False, elem_classes="images", format="png",
        object_fit="contain", interactive=False, buttons=["fullscreen", "download"], visible=there,
        columns=columns_of(made) if made else None,
    )  # fmt: skip
    with gr.Row(elem_classes="page-bar"):
        about = gr.Markdown(view.about if view else "Choose classes and generate.")
        hard = gr.Checkbox(False, label="Hard pixels", visible=page.is_small, container=False)
        archive = gr.DownloadButton("Download", value=view and view.archive, visible=there, size="sm")
    position = gr.Slider(
        1, max(ENDS, last), last, step=1, interactive=last > 1, visible=last > 1,
        label=made and path_label(made, 0),
    )  # fmt: skip
    strip = gr.Gallery(
        **page.strip(made, 0) if made else {"visible": False}, elem_classes=["images", "page-strip"],
        format="png", show_label=False, object_fit="contain", interactive=False, allow_preview=False,
        buttons=[],
    )  # fmt: skip
    code = gr.Code(
        view and view.code, label=code_label(view) if view else None, language="python", interactive=False,
        show_line_numbers=False, wrap_lines=True, visible=there,
    )  # fmt: skip
    hard.input(None, hard, None, js=_HARD)
    return {
        "gallery": gallery, "about": about, "code": code, "archive": archive, "position": position,
        "strip": strip, "made": gr.State(made, time_to_live=3600),
    }  # fmt: skip


def build(page: Page) -> gr.Blocks:
    """The page's controls, and what they call.

    Nothing is preprocessed: gradio's own checks of values end in tracebacks, and `call_of` does them all.
    """
    start, choices, opening = page.start(), page.choices(), page.open()
    with gr.Blocks(title=f"{page.about.title}: SD-DiT", delete_cache=(3600, 3600)) as blocks:
        gr.HTML(page.about.html(), elem_classes="page-head", padding=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                classes = gr.Dropdown(
                    choices, value=start["classes"], multiselect=True, visible=bool(choices), label="Classes",
                    info="Type to search; leave it empty for any.",
                )  # fmt: skip
                with gr.Row(visible=bool(choices), elem_classes="page-examples"):
                    examples = [
                        (gr.Button(title, size="sm", min_width=100), values)
                        for title, values in page.examples().items()
                    ]
                quality = gr.Radio(
                    [preset.title for preset in page.presets],
                    value=page.preset_of(start["sampler"], start["steps"]), visible=len(page.presets) > 1,
                    label="Quality", info=steps_of(page.presets), elem_classes="page-quality",
                )  # fmt: skip
                folded, fold = _settings(page, start)
                with gr.Row(elem_classes="page-actions"):
                    generate = gr.Button("Generate", variant="primary", min_width=60)
                    another = gr.Button("New seed", min_width=60)
                    stop = gr.Button("Stop", min_width=60)
            with gr.Column(scale=5, min_width=300):
                shown = _results(page, opening)
        controls = {name: ({"classes": classes} | folded)[name] for name in FIELDS}

        def run(listen) -> None:
            """Makes an event's listener begin a call."""
            values = [*controls.values()]
            checked = listen(page.check, values, [*values, fold], **_QUICK)
            begun = checked.then(
                page.begin, values, None, **_QUICK | {"queue": True, "concurrency_limit": None}
            )
            begun.success(
                page.generate, values, [*shown.values()], show_progress_on=progress,
                api_visibility="public" if listen == generate.click else "private", **_PIPELINE,
            )  # fmt: skip

        progress = shown["gallery" if opening else "about"]
        run(generate.click)
        run(another.click(page.new_seed, None, controls["seed"], **_QUICK).then)
        for button, example in examples:
            picked = [controls[name] for name in example]
            run(button.click(lambda example=example: [*example.values()], None, picked, **_QUICK).then)
        stop.click(page.stop, None, None, **_QUICK)
        sampler, steps = controls["sampler"], controls["steps"]
        quality.input(page.choose, quality, [sampler, steps], **_QUICK)
        for control in (sampler, steps):
            control.input(page.preset_of, [sampler, steps], quality, **_QUICK)
        _look_back(page, shown)
    blocks.queue(max_size=WAITING, api_open=False)
    page.clients = Clients(blocks._queue)
    return blocks


def _look_back(page: Page, shown: dict) -> None:
    """The slider and the pictures under it show how the images came about."""
    made, position, strip = (shown[name] for name in ("made", "position", "strip"))
    at_place = [shown[name] for name in ("gallery", "about", "code", "archive")]
    quiet = dict(show_progress="hidden", trigger_mode="always_last", **_PIPELINE)
    position.input(page.show, [made, position], at_place, **quiet)
    strip.select(page.go, made, [*at_place, position], **quiet, api_visibility="private")
    shown["gallery"].select(page.look, made, [position, strip], **quiet, api_visibility="private")


def check_address(server_name: str, server_port: int) -> None:
    """Asks this machine for an address and a port, since gradio would try a hundred ports of a wrong address.

    Raises:
        ValueError: there is no such address here.
        OSError: the port is taken, or nobody's to take.
    """
    name = server_name or os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")
    try:
        host = name.strip("[]")  # which gradio wants around IPv6
        family, *_, address = socket.getaddrinfo(host, server_port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise OSError(f"server_port is {server_port}, which cannot be had: {error.strerror}.") from None
        raise ValueError(f"server_name is {name!r}; it must be an address of this machine.") from None


def launch(page: Page, server_name: str, server_port: int) -> tuple[gr.Blocks, str]:
    """Serves the page, at the first free port from 7860 if it is 0; returns its address too.

    Raises:
        OSError: the port is taken.
    """
    blocks = build(page)
    _, url, _ = blocks.launch(
        server_name=server_name or None,
        server_port=server_port or None,
        share=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(page.clients.around)]},
        state_session_capacity=_SESSIONS,
        theme=gr.themes.Default(**_FONTS),
        css=_CSS,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    return blocks, url
