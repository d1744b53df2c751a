"""How good is the digits demo? `python benchmarks/digits.py sddit-digits`

Draws 100 samples of each digit at guidance 1 and judges them against the 1,797 real ones:
- accuracy: the share that a support-vector classifier, fitted to the real digits, gives their class;
- Fréchet distance between the pixels, in -1..1, of the samples and of all real digits.
Two random halves of the real digits are measured likewise; the last line is the ratio of the two distances.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.svm import SVC

from sddit_diffusers.evaluation.scores import Gaussian, frechet_distance
from sddit_diffusers.pipelines.loading import load_pipeline
from sddit_diffusers.pipelines.sampling import generators


def distance_between(a: np.ndarray, b: np.ndarray) -> float:
    """The Fréchet distance between the rows of `a` and `b`."""
    return frechet_distance(*(Gaussian.of(torch.from_numpy(rows)) for rows in (a, b)))


def sample(folder: str, per_class: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixels in -1..1, `[10 per_class, 64]`, and their classes."""
    pipe = load_pipeline(folder)
    labels = np.repeat(np.arange(10), per_class)
    images = pipe(labels, generator=generators(range(len(labels))), output_type="pt").images
    return images.flatten(1).double().numpy() * 2 - 1, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="pipeline that the digits preset has left, or 'digits'")
    parser.add_argument("--per_class", type=int, default=100)
    arguments = parser.parse_args()

    digits = load_digits()
    pixels = digits.images.reshape(-1, 64)
    classifier = SVC(gamma=0.001, C=10).fit(pixels, digits.target)
    real = pixels / 8 - 1
    order = np.random.default_rng(0).permutation(len(real))
    halves = distance_between(real[order[::2]], real[order[1::2]])

    samples, labels = sample(arguments.folder, arguments.per_class)
    accuracy = (classifier.predict((samples + 1) * 8) == labels).mean()
    distance = distance_between(samples, real)
    metrics = Path(arguments.folder, "metrics.jsonl")
    last = json.loads(metrics.read_text().splitlines()[-1]) if metrics.is_file() else {}

    print(f"{'samples':<42}{len(samples)}")
    print(f"{'given their class':<42}{accuracy:.1%}")
    print(f"{'Fréchet distance to the real digits':<42}{distance:.3f}")
    print(f"{'Fréchet distance of two real halves':<42}{halves:.3f}")
    if "teacher_entropy" in last:
        print(f"{'teacher entropy, share of ln K':<42}{last['teacher_entropy']:.1%}")
        print(f"{'prototypes in use':<42}{last['prototypes_used']:.1%}")
    print(f"{'ratio of the distances':<42}{distance / halves:.2f}")


if __name__ == "__main__":
    main()
