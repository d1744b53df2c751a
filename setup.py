from pathlib import Path

from setuptools import setup

setup(
    name="sddit-diffusers",
    version="0.1.0",
    description="SD-DiT: diffusion transformers with self-supervised discrimination, for diffusers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=["sddit_diffusers"],
    py_modules=["train_sddit"],
    install_requires=[
        "torch>=2.8",
        "diffusers>=0.38",
        "transformers>=4.57.1",
        "accelerate>=1.12",
        "datasets>=4.4",
        "safetensors>=0.8",
        "huggingface_hub>=0.36",
        "scikit-learn>=1.6.1",  # the digits
        "matplotlib>=3.9.4",  # the curves
        "tqdm",
    ],
    extras_require={
        "eval": ["torch-fidelity>=0.4.0"],
        "test": ["pytest>=8.3.5", "peft>=0.18", "tensorboard", "ruff"],
    },
    entry_points={"console_scripts": ["sddit-train=train_sddit:main"]},
)
