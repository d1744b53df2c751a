import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "sddit_diffusers/__init__.py").read_text()).group(1)
GRADIO = "gradio>=6.31"
TORCHDIFFEQ = "torchdiffeq>=0.2.3"  # dopri5

setup(
    name="sddit-diffusers",
    version=VERSION,
    description="SD-DiT: diffusion transformers with self-supervised discrimination, for diffusers",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["sddit_diffusers*"]), "sddit_diffusers.digits"],
    package_dir={"sddit_diffusers.digits": "pipelines/digits"},  # the pipeline to try, without code
    package_data={
        "sddit_diffusers.digits": ["README.md", "*.json", "*/*.json", "*/*.safetensors"],
        "sddit_diffusers": ["py.typed"],
        "sddit_diffusers.training": ["model_card.md"],
    },
    py_modules=["sddit", "train_sddit", "distill_sddit"],
    install_requires=[
        "torch>=2.8",
        "diffusers>=0.41",
        "transformers>=4.57.1",
        "accelerate>=1.12",
        "datasets>=4.4",
        "safetensors>=0.8",
        "huggingface_hub>=0.36",
        "filelock>=3.32.7",  # one run a folder; huggingface_hub needs it too
        "scikit-learn>=1.6.1",  # the digits
        "matplotlib>=3.9.4",  # the curves
        "torch-fidelity>=0.4.0",  # Inception and KID
        "jinja2",  # model cards
        "numpy",
        "scipy",  # rank correlations of a study; scikit-learn needs it too
        "pillow",
        "tqdm",
        "psutil",  # how a run was started; accelerate needs it too
    ],
    extras_require={
        "app": [GRADIO],
        "docs": ["mkdocs>=1.6,<2", "mkdocs-material>=9.8,<10", "mkdocstrings[python]>=1.0,<2"],
        "ode": [TORCHDIFFEQ],
        "deepspeed": ["deepspeed>=0.19.8"],  # the oldest whose gradients were seen right
        # playwright drives a Chromium that is there; it brings none.
        "test": [
            "pytest>=8.3.5",
            "pytest-xdist>=3.8",
            "hypothesis",
            "peft>=0.18",
            "tensorboard",
            "onnx",
            "onnxscript",
            "onnxruntime",
            "ruff",
            "mypy>=2",
            GRADIO,
            TORCHDIFFEQ,
            "playwright>=1.65",
        ],
    },
    entry_points={
        "console_scripts": [
            "sddit=sddit:main",
            "sddit-train=train_sddit:main",  # these two are deprecated
            "sddit-distill=distill_sddit:main",
        ]
    },
)
