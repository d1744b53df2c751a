"""A page to try a model: its images, how they come about, and the code that makes them.

    python -m sddit_diffusers.app PIPELINE     # a folder or a name on the Hub

Image i has the seed `seed` + i, as in `generate`, and the lines of code on the page make the images again, to
the bit on the same machine. The page listens on this machine alone unless told otherwise, and its browser
asks nothing of another. A copy of this file is the app.py of a Space (pipelines/space), where the environment
variable SDDIT_MODEL names the pipeline: hence its absolute imports.
"""

import contextlib
import html
import os
import random
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import parse_qs

from accelerate import Accelerator

from sddit_diffusers.cli import Parser, check_options, one_line, one_line_errors, option
from sddit_diffusers.pipelines.calls import MAX_GUIDANCE_SCALE, Made, call_of, code_of, highest_level, make
from sddit_diffusers.pipelines.loading import DTYPES, load_pipeline
from sddit_diffusers.pipelines.pipeline_sddit import SDDiTPipeline, default_steps
from sddit_diffusers.pipelines.sampling import class_name, image_size

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio as gr
    from starlette.middleware import Middleware
    from starlette.responses import PlainTextResponse
except ModuleNotFoundError:
    sys.exit("app: error: the page needs gradio: pip install 'sddit-diffusers[app]'.")

_PROGRESS = gr.Progress()  # the default of an argument: gradio's way to ask for it
_WAITING = 16  # calls in the queue
_CALLS = 4  # of one client, waiting or under way
_PATIENCE = 10.0  # seconds in which somebody must begin to read a call's answer
_ENDS = 2  # of a slider from 1, which gradio wants to have two
_MESSAGE = 500  # characters on the page, at most
_SESSIONS = 32  # whose last images are kept
_FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
_SMALL = 64  # pixels; what is smaller is enlarged without smoothing
_GRID = """
.images { min-height: 230px }
.images .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(48px, 1fr)) }
.images .caption-label { opacity: 0 }
.images :hover > .caption-label { opacity: 0.9 }
"""
_PIXELATED = ".images img { image-rendering: pixelated }"


@dataclass
class AppConfig:
    """The settings of the page."""

    max_images: int = option(16, "images that are made at once, at most", low=1)
    max_steps: int = option(100, "steps, at most", low=1)
    dtype: str = option(
        "float32", "of the transformer: 'float32', 'bfloat16' or 'float16'", choices=tuple(DTYPES)
    )
    server_name: str = option("", "the address to listen at; 127.0.0.1, this machine alone, if not given")
    server_port: int = option(
        0, "the port to listen at; the first free one from 7860 if not given", low=0, high=65535
    )

    def __post_init__(self):
        check_options(self)


class Clients:
    """Who uses the page: one has a few calls at a time, and a call whose answer nobody reads is let go.

    gradio itself keeps the calls of whoever posts them, and what a session is called is the client's choice.
    """

    def __init__(self, queue):
        self.queue, self._push = queue, queue.push
        self.reading = Counter()  # sessions and events, by the answers that are being read
        queue.push = self.push

    def _waiting(self) -> list:
        return [
            event for queue in self.queue.event_queue_per_concurrency_id.values() for event in queue.queue
        ]

    def _under_way(self) -> list:
        return [event for job in self.queue.active_jobs if job for event in job]

    def _is_abandoned(self, event) -> bool:
        read = event.session_hash in self.reading or event._id in self.reading
        return not read and time.monotonic() - event.enqueue_time > _PATIENCE

    def has_left(self, session: str) -> bool:
        """Whether nobody reads the answer of this page's call, which is under way."""
        calls = [event for event in self._under_way() if event.session_hash == session]
        return bool(calls) and all(map(self._is_abandoned, calls))

    async def push(self, body, request, username) -> tuple:
        """As of gradio's queue, whose places those take who wait for them."""
        for event in filter(self._is_abandoned, self._waiting()):
            await self.queue.clean_events(event_id=event._id)
        address = _address(request)
        calls = [
            event
            for event in self._waiting() + self._under_way()
            if event.session_hash == body.session_hash or _address(event.request) == address
        ]
        if len(calls) >= _CALLS:
            return False, f"You have {len(calls)} calls here; wait for their end.", "queue_full"
        return await self._push(body=body, request=request, username=username)

    def around(self, app: Callable) -> Callable:
        """The web application, which takes no files and notes what is being read."""

        async def answer(scope: dict, receive: Callable, send: Callable) -> None:
            path = scope.get("path", "").rstrip("/")
            if path.endswith("/upload"):
                await PlainTextResponse("This page takes no files.", 403)(scope, receive, send)
                return
            session = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("session_hash", [""])[0]
            reads = path.endswith("/queue/data") or "/call/" in path and scope.get("method") == "GET"
            key = session if path.endswith("/queue/data") else path.rpartition("/")[2]
            self.reading[key] += reads
            try:
                await app(scope, receive, send)
            finally:
                self.reading[key] -= reads
                self.reading += Counter()  # forgets what is read no longer

        return answer


def _address(request) -> str:
    """Of who asks. A Space is behind a proxy, which puts that last."""
    forwarded = request.headers.get("x-forwarded-for", "") if "SPACE_ID" in os.environ else ""
    return forwarded.split(",")[-1].strip() or (request.client.host if request.client else "")


class Page:
    """What the page's controls do. The queue lets one call at a time use the pipeline."""

    clients: Clients | None = None  # once it is built

    def __init__(self, pipe: SDDiTPipeline, model: str, config: AppConfig):
        self.pipe, self.model, self.config = pipe, model, config
        self.steps = min(default_steps(pipe.scheduler), config.max_steps)  # unless others are chosen
        self.stopping = deque(maxlen=_WAITING)  # sessions that want their call to end

    def choices(self) -> list[tuple[str, int]]:
        """What the list of classes shows, and their numbers, which stand beside names that several have."""
        names = [class_name(self.pipe, i) for i in range(self.pipe.transformer.config.num_classes)]
        times = Counter(names)
        return [(name if times[name] == 1 else f"{name} ({i})", i) for i, name in enumerate(names)]

    def begin(self, request: gr.Request, *values) -> None:
        """Before a call waits for its turn: refuses what it would refuse, and forgets an earlier Stop."""
        self._call_of(values)
        with contextlib.suppress(ValueError):
            self.stopping.remove(request.session_hash)

    def _call_of(self, values: Sequence) -> tuple[dict, range]:
        with _refusals():
            return call_of(self.pipe, self.config, *values)

    def stop(self, request: gr.Request) -> None:
        """Ends this page's call after the evaluation in progress."""
        if request.session_hash not in self.stopping:
            self.stopping.append(request.session_hash)

    def generate(
        self, classes, images, steps, guidance, low, high, seed, request: gr.Request, progress=_PROGRESS
    ) -> list:
        """A call: gallery, sentence, slider, code, and the [`Made`] that `show` needs."""
        arguments, seeds = self._call_of((classes, images, steps, guidance, low, high, seed))

        def on_evaluation(done: int, total: int) -> bool:
            progress((done, total), desc="Denoising", unit="evaluations")
            left = self.clients is not None and self.clients.has_left(request.session_hash)
            return left or request.session_hash in self.stopping

        with _refusals():
            made = make(self.pipe, arguments, seeds, on_evaluation)
        images, last = arguments["num_images_per_label"], made.positions
        wanted = 4 if len(seeds) <= 8 else 8
        columns = min(8, images * max(1, wanted // images))  # rows of whole classes
        return [
            *self.show(made, last, columns=columns),
            gr.Slider(maximum=max(_ENDS, last), value=last, interactive=last > 1),
            "" if made.stopped else code_of(self.model, self.pipe, arguments, seeds),
            made,
        ]

    def show(self, made: Made | None, position, **options) -> list:
        """The gallery at a place on the path, and the sentence on it."""
        with _refusals():
            if made is None:
                raise ValueError("These images are kept no longer: generate them again.")
            images, about = made.at(self.pipe, position)
        return [gr.Gallery(images, **options), about]


@contextlib.contextmanager
def _refusals():
    """Wrong values and samples as messages on the page, which takes them for HTML."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        text = one_line(error)
        text = text if len(text) <= _MESSAGE else f"{text[: _MESSAGE - 3]}..."
        raise gr.Error(html.escape(text), print_exception=False) from None


def _inputs(page: Page) -> tuple[list, list]:
    """The controls of a call's values, in the order of `call_of`, and the buttons."""
    choices, config = page.choices(), page.config
    classes = gr.Dropdown(
        choices, value=[], multiselect=True, visible=bool(choices), label="Classes",
        info="Type to search. None: unconditional images.",
    )  # fmt: skip
    most = config.max_images
    images = gr.Slider(1, max(_ENDS, most), min(4, most), step=1, visible=most > 1, label="Images per class")
    steps = gr.Slider(1, max(_ENDS, config.max_steps), page.steps, step=1, label="Steps")
    guidance = gr.Slider(0, MAX_GUIDANCE_SCALE, 1, step=0.1, label="Guidance scale (1 is off)")
    with gr.Accordion("Guidance interval", open=False), gr.Row():
        low = gr.Number(0, label="Lowest sigma", min_width=100)
        high = gr.Number(highest_level(page.pipe), label="Highest sigma", min_width=100)
    with gr.Group():
        seed = gr.Number(0, label="Seed of the first image")
        another = gr.Button("Random seed", size="sm")
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", min_width=100)
        stop = gr.Button("Stop", min_width=100)
    return [classes, images, steps, guidance, low, high, seed], [another, generate, stop]


def build(page: Page) -> gr.Blocks:
    """The page's controls, and what they call.

    Nothing is preprocessed: gradio's own checks of values end in tracebacks, and `call_of` does them all.
    """
    with gr.Blocks(title="SD-DiT", delete_cache=(3600, 3600)) as blocks:
        gr.Markdown(f"## {html.escape(page.model)}")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                values, (another, generate, stop) = _inputs(page)
            with gr.Column(scale=5):
                gallery = gr.Gallery(
                    label="Images", show_label=False, elem_classes="images", format="png",
                    object_fit="contain", interactive=False, buttons=["download", "fullscreen"],
                )  # fmt: skip
                about = gr.Markdown("Choose classes and generate.")
                position = gr.Slider(
                    1, max(_ENDS, page.steps), page.steps, step=1, interactive=False,
                    label="How the images come about (step)",
                )  # fmt: skip
                code = gr.Code(
                    label="The code that makes these images", language="python", interactive=False,
                    show_line_numbers=False, wrap_lines=True,
                )  # fmt: skip
        made = gr.State(time_to_live=3600)

        quick = dict(preprocess=False, queue=False, show_progress="hidden", api_visibility="private")
        pipeline = dict(preprocess=False, concurrency_limit=1, concurrency_id="pipeline")
        outputs = [gallery, about, position, code, made]
        another.click(lambda: random.randrange(1_000_000), None, values[-1], **quick)
        begun = generate.click(page.begin, values, None, **quick | {"queue": True, "concurrency_limit": None})
        begun.success(page.generate, values, outputs, show_progress_on=gallery, **pipeline)
        stop.click(page.stop, None, None, **quick)
        shown = dict(show_progress="hidden", trigger_mode="always_last")
        position.input(page.show, [made, position], outputs[:2], **shown, **pipeline)
    blocks.queue(max_size=_WAITING, api_open=False)
    page.clients = Clients(blocks._queue)
    return blocks


def serve(model: str, config: AppConfig) -> None:
    """Loads a pipeline and serves its page until it is interrupted.

    Raises:
        ValueError: there is no such pipeline.
        OSError: the port is taken.
    """
    pipe = load_pipeline(model, DTYPES[config.dtype]).to(Accelerator().device)
    pipe.set_progress_bar_config(disable=True)
    small = image_size(pipe) <= _SMALL
    page = Page(pipe, model, config)
    blocks = build(page)
    _, url, _ = blocks.launch(
        server_name=config.server_name or None,
        server_port=config.server_port or None,
        share=False,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(page.clients.around)]},
        state_session_capacity=_SESSIONS,
        theme=gr.themes.Default(**_FONTS),
        css=_GRID + _PIXELATED * small,
        footer_links=[],
        quiet=True,
        prevent_thread_lock=True,
    )
    print(f"{model} is at {url}", flush=True)
    blocks.block_thread()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(AppConfig, prog="app", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", nargs="?", help="a folder or a name on the Hub; SDDIT_MODEL if not given")
    with one_line_errors("app"):
        chosen = parser.parse_known_options(arguments)
        model = chosen.pop("model") or os.environ.get("SDDIT_MODEL")
        config = AppConfig(**chosen)
        if not model:
            raise ValueError("no pipeline; give a folder or a name on the Hub, here or in SDDIT_MODEL.")
        serve(model, config)


if __name__ == "__main__":
    main()
