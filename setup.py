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
        "torch>=2.6",
        "diffusers>=0.36",
        "transformers>=4.57",
        "accelerate>=1.10",
        "datasets>=4.0",
        "safetensors>=0.4.3",
        "huggingface_hub>=0.34",
        "scikit-learn>=1.3",  # the digits
        "matplotlib>=3.7",  # the curves
        "tqdm>=4.66",
    ],
    extras_require={
        "eval": ["torch-fidelity>=0.4.0"],
        "test": ["pytest>=8", "peft>=0.17", "tensorboard", "ruff>=0.9"],
    },
    entry_points={"console_scripts": ["sddit-train=train_sddit:main"]},
)
