"""The parts of the page, which needs gradio."""

import os
import sys

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported
try:
    import gradio  # noqa: F401
except ModuleNotFoundError:
    sys.exit("app: error: the page needs gradio: pip install 'sddit-diffusers[app]'.")
