"""Pipelines and VAEs by name, their dtypes, and the hash of their weights."""

import hashlib

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, AutoModel

from .pipeline_sddit import SDDiTPipeline


def load_vae(name: str, **arguments) -> AutoencoderKL | AutoencoderTiny:
    """A VAE by name or path, of its own or within a pipeline.

    Raises:
        ValueError: there is none.
    """
    problems = []
    for subfolder in (None, "vae"):
        try:
            vae = AutoModel.from_pretrained(name, subfolder=subfolder, **arguments)
            break
        except Exception as error:  # whatever the Hub, the network and the reader raise
            problems.append(str(error).strip().split("\n")[0])
    else:
        raise ValueError(f"The VAE {name!r} cannot be loaded: {problems[0]}")
    if not isinstance(vae, (AutoencoderKL, AutoencoderTiny)):
        raise ValueError(
            f"{name!r} is a {type(vae).__name__}; allowed are AutoencoderKL and AutoencoderTiny."
        )
    return vae.eval().requires_grad_(False)


def sha256_of_weights(model: torch.nn.Module) -> str:
    """A SHA-256 of a model's weights and their names, in hexadecimal."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


_DTYPES = ("float32", "bfloat16", "float16")


def dtype_named(name: str) -> torch.dtype:
    """The dtype that the option `dtype` names.

    Raises:
        ValueError: another name.
    """
    if name not in _DTYPES:
        raise ValueError(f"dtype is {name!r}; it must be 'float32', 'bfloat16' or 'float16'.")
    return getattr(torch, name)


def load_pipeline(name: str, dtype: torch.dtype = torch.float32) -> SDDiTPipeline:
    """A pipeline by folder or name on the Hub, its transformer of a dtype, all else in float32.

    Raises:
        ValueError: there is none.
    """
    try:
        dtypes = {"transformer": dtype, "default": torch.float32}
        return SDDiTPipeline.from_pretrained(name, dtype=dtypes)
    except Exception as error:  # whatever the Hub, the network and the readers raise
        problem = str(error).strip().split("\n")[0]
        raise ValueError(f"The pipeline {name!r} cannot be loaded: {problem}") from None
