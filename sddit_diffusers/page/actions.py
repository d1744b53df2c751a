"""What the page's controls do."""

import contextlib
import html
import io
import math
import random
import re
import secrets
import time
import zipfile
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import gradio as gr
from gradio.utils import get_upload_folder

from ..cli import one_line
from ..pipelines.calls import MAX_SEED, Made, WrongValue, call_of, highest_level, make
from ..pipelines.pipeline_sddit import SDDiTPipeline
from ..pipelines.samplers import presets, samplers
from ..pipelines.sampling import class_name, image_size
from .about import about
from .clients import Clients

# Of a call's values, in this order.
FIELDS = ("classes", "images", "steps", "guidance", "low", "high", "seed", "sampler")
WAITING = 16  # calls in the queue
ENDS = 2  # of a slider from 1, which gradio wants to have two
GUIDANCE = 1.5  # at the start
_SMALL = 64  # pixels; what is smaller is enlarged on the page
_MESSAGE = 500  # characters on the page, at most
_OPENING = 10.0  # seconds at most for the images that the page opens with
_PLACES = 8  # of a path that are shown as pictures
_REFRESH = 0.2  # seconds between what is told of a call's progress: a browser has to draw it
_PROGRESS = gr.Progress()  # the default of an argument: gradio's way to ask for it


class View(NamedTuple):
    """What is shown of a call at a place on the path.

    Attributes:
        images: with their captions.
        about: a sentence on them.
        code: Python that makes them, empty if none can.
        step: which step of the path the code makes.
        archive: the address of a file of them and the code.
    """

    images: list
    about: str
    code: str
    step: str
    archive: str


class Page:
    """What the page's controls do. The queue lets one call at a time use the pipeline.

    Args:
        pipe: the pipeline, with its own scheduler.
        model: the name by which `load_pipeline` found it.
        config: has `max_images` of a call and `max_steps`.
    """

    clients: Clients | None = None  # once it is built

    def __init__(self, pipe: SDDiTPipeline, model: str, config):
        self.pipe, self.model, self.config = pipe, model, config
        self.pipes = samplers(pipe)
        for each in self.pipes.values():
            each.set_progress_bar_config(disable=True)
        self.about = about(pipe, model)
        self.presets = presets(pipe, config.max_steps)
        self.is_small = image_size(pipe) < _SMALL
        self.stopping = deque(maxlen=WAITING)  # sessions that want their call to end

    # What is offered

    def choices(self) -> list[tuple[str, int]]:
        """What the list of classes shows, and their numbers, which stand beside names that several have."""
        names = [class_name(self.pipe, i) for i in range(self.pipe.transformer.config.num_classes)]
        times = Counter(names)
        return [(name if times[name] == 1 else f"{name} ({i})", i) for i, name in enumerate(names)]

    def start(self) -> dict:
        """The values that the page opens with, by [`FIELDS`]."""
        most = self.config.max_images
        preset = self.presets[-2:][0]  # not the best, if it can be
        classes = self._spread(2)
        images = max(1, min(4 if classes else 8, most // max(1, len(classes))))
        guidance = GUIDANCE if self.about.guided else 1
        values = (
            classes, images, preset.steps, guidance, 0, highest_level(self.pipe), 0, preset.scheduler,
        )  # fmt: skip
        return dict(zip(FIELDS, values, strict=True))

    def _spread(self, count: int) -> list[int]:
        """Evenly chosen classes, as many as a call can have of them."""
        known = self.pipe.transformer.config.num_classes
        count = min(count, known, self.config.max_images)
        return [(i + 1) * known // (count + 1) for i in range(count)]

    def examples(self) -> dict[str, dict]:
        """Values for one click, all but the sampler's, by what is on the button; none without classes."""
        start, known = self.start(), self.pipe.transformer.config.num_classes
        del start["steps"], start["sampler"]
        if not known:
            return {}
        each = self._spread(10)
        found = {
            "Every class" if len(each) == known else f"{len(each)} classes": {"classes": each, "images": 1},
            "Guidance 4": {"guidance": 4},
            "Guidance off": {"guidance": 1},
            "Without a class": {"classes": [], "images": min(8, self.config.max_images), "guidance": 1},
        }
        if not self.about.guided:
            found = {title: values for title, values in found.items() if "Guidance" not in title}
        return {title: start | values for title, values in found.items()}

    # Before a call

    def check(self, *values) -> list:
        """Marks the controls with a wrong value, and opens the folded ones for it: [`FIELDS`], and that."""
        wrong = ()
        try:
            self._call_of(values)
        except WrongValue as error:
            wrong = error.fields
        marks = [gr.update(elem_classes=["page-wrong"] if name in wrong else []) for name in FIELDS]
        return [*marks, gr.update(open=True) if set(wrong) - {"classes"} else gr.skip()]

    def begin(self, request: gr.Request, *values) -> None:
        """Before a call waits for its turn: refuses what it would refuse, and forgets an earlier Stop."""
        with _refusals():
            self._call_of(values)
        with contextlib.suppress(ValueError):
            self.stopping.remove(request.session_hash)

    def _call_of(self, values: Sequence) -> tuple[SDDiTPipeline, dict, range]:
        """The pipeline with the sampler, and what [`call_of`] says of the other values."""
        *values, sampler = values
        pipe = self.pipes.get(sampler) if isinstance(sampler, str) else None
        if pipe is None:
            raise WrongValue(f"Sampler: {sampler!r:.50} is not one of {', '.join(self.pipes)}.", "sampler")
        return pipe, *call_of(pipe, self.config, *values)

    def stop(self, request: gr.Request) -> None:
        """Ends this page's call after the evaluation in progress."""
        if request.session_hash not in self.stopping:
            self.stopping.append(request.session_hash)

    def new_seed(self) -> int:
        """Of images that nobody has seen."""
        return random.randrange(MAX_SEED // 1000)

    def choose(self, title) -> list:
        """Sampler and steps of a preset."""
        chosen = [preset for preset in self.presets if preset.title == title]
        return [chosen[0].scheduler, chosen[0].steps] if chosen else [gr.skip(), gr.skip()]

    def preset_of(self, sampler, steps) -> str | None:
        """The title of the preset that has a sampler and steps, if one has."""
        titles = [each.title for each in self.presets if (each.scheduler, each.steps) == (sampler, steps)]
        return titles[0] if titles else None

    # A call

    def open(self) -> Made | None:
        """Images for the page to open with; None if they take too long."""
        pipe, arguments, seeds = self._call_of(list(self.start().values()))
        deadline = time.monotonic() + _OPENING
        try:
            made = make(pipe, arguments, seeds, lambda done, total: time.monotonic() > deadline)
        except FloatingPointError:
            return None
        return None if made.stopped else made

    def generate(self, request: gr.Request, progress=_PROGRESS, *values) -> list:
        """A call: what [`show`] gives, then the slider, the strip, and the [`Made`] that they need."""
        with _refusals():
            pipe, arguments, seeds = self._call_of(values)

        told = -math.inf

        def on_evaluation(done: int, total: int) -> bool:
            nonlocal told
            if time.monotonic() - told >= _REFRESH:
                told = time.monotonic()
                progress((done, total), desc="Denoising", unit="evaluations")
            left = self.clients is not None and self.clients.has_left(request.session_hash)
            return left or request.session_hash in self.stopping

        with _refusals():
            made = make(pipe, arguments, seeds, on_evaluation)
        last = made.positions
        return [
            *self.show(made, last, visible=True, columns=columns_of(made)),
            gr.Slider(
                maximum=max(ENDS, last), value=last, interactive=last > 1, visible=last > 1,
                label=path_label(made, 0),
            ),
            gr.Gallery(**self.strip(made, 0)),
            made,
        ]  # fmt: skip

    def show(self, made: Made | None, position, **options) -> list:
        """The gallery at a place on the path, the sentence on it, its code, and its archive."""
        with _refusals():
            view = self.view(made, position)
        return [
            gr.Gallery(view.images, **options),
            view.about,
            gr.Code(view.code, label=code_label(view), visible=bool(view.code)),
            gr.DownloadButton(value=view.archive, visible=True),
        ]

    def view(self, made: Made | None, position) -> View:
        """What is shown at a place on the path.

        Raises:
            WrongValue: there is no such place, or the images are gone.
        """
        pipe = self.pipes[_kept(made).sampler]
        images, about = made.at(pipe, position)
        code, place = made.code(self.model, pipe, position), made.place(position)
        is_end = place == made.positions and not made.stopped
        step = "the finished images" if is_end else f"step {place} of {made.positions}"
        return View(images, about, code, step, self._archive(images, code))

    def _archive(self, images: list, code: str) -> str:
        """A ZIP of the images as PNG and of their code, where gradio has its files and deletes old ones."""
        folder = Path(get_upload_folder(), secrets.token_hex(16))
        folder.mkdir(parents=True)
        with zipfile.ZipFile(folder / "images.zip", "w") as archive:
            for i, (image, caption) in enumerate(images):
                data = io.BytesIO()
                image.save(data, "PNG")
                name = re.sub(r"[^\w-]+", "-", caption)[:80]
                archive.writestr(f"{i:02d}-{name}.png", data.getvalue())
            if code:
                archive.writestr("images.py", f"{code}\n")
        return str(folder / "images.zip")

    # The path of an image

    def look(self, made: Made | None, event: gr.EventData) -> list:
        """The slider and the strip of the image that was clicked."""
        with _refusals():
            image = _index(event)
            strip = self.strip(_kept(made), image)
        return [gr.Slider(label=path_label(made, image)), gr.Gallery(**strip)]

    def strip(self, made: Made, image: int) -> dict:
        """What is shown of an image's path: arguments of a gallery.

        Raises:
            WrongValue: there is no such image.
        """
        path = made.path(self.pipes[made.sampler], image, _PLACES)
        return dict(value=path, columns=max(1, len(path)), visible=bool(path))

    def go(self, made: Made | None, event: gr.EventData) -> list:
        """What [`show`] gives at the place that was clicked in the strip, and the slider there."""
        with _refusals():
            places, i = _kept(made).places(_PLACES), _index(event)
            if i >= len(places):
                raise WrongValue(f"Step: there are {len(places)} pictures, and no {i + 1}.", "position")
        return [*self.show(made, places[i]), places[i]]


def columns_of(made: Made) -> int:
    """Of the gallery: rows of whole classes, and none that is nearly empty where that can be."""
    each, total = made.arguments["num_images_per_label"], len(made.images)
    most = 4 if total <= 8 else 8
    if each >= most:
        return min(8, each)
    whole = [columns for columns in range(most, 2, -1) if columns % each == 0]
    return next((columns for columns in whole if total % columns == 0), min(most // each * each, total))


def code_label(view: View) -> str:
    """Over the code: which step of the path it makes."""
    return f"Code of {view.step}"


def path_label(made: Made, image: int) -> str:
    """Over the slider: whose path the pictures under it show."""
    return f"How “{made.captions[image]}” came about: step"


def _kept(made: Made | None) -> Made:
    if made is None:
        raise WrongValue("These images are kept no longer: generate them again.")
    return made


def _index(event: gr.EventData) -> int:
    """Of what was clicked in a gallery, as far as the client says so."""
    data = event._data
    index = data.get("index") if isinstance(data, dict) else None
    if type(index) is not int or index < 0:
        raise WrongValue(f"{index!r:.50} is no picture's number.")
    return index


@contextlib.contextmanager
def _refusals():
    """Wrong values and samples as messages on the page, which takes them for HTML."""
    try:
        yield
    except (ValueError, FloatingPointError) as error:
        text = one_line(error)
        text = text if len(text) <= _MESSAGE else f"{text[: _MESSAGE - 3]}..."
        raise gr.Error(html.escape(text), print_exception=False) from None
