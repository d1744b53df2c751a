"""Features are the images', whatever the cache holds and however few images a process has."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from damages import DAMAGES
from processes import launch

from sddit_diffusers.evaluation.cache import keep_tensors
from sddit_diffusers.evaluation.extractors import PixelExtractor
from sddit_diffusers.evaluation.features import features_of_set
from sddit_diffusers.evaluation.image_sets import open_images
from sddit_diffusers.evaluation.scores import Manifold


def of(path, cache):
    extractor = PixelExtractor("sddit-pixels", ["features"])
    return features_of_set(open_images(str(path)), extractor, Accelerator(cpu=True), 2, cache).features


@pytest.fixture
def images(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=IMAGES.numpy().transpose(0, 2, 3, 1))
    return tmp_path / "a.npz"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_of_the_cache_is_made_again(images, tmp_path, capsys, damage):
    found = of(images, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    content = path.read_bytes()
    damage(path)
    capsys.readouterr()
    assert torch.equal(of(images, tmp_path / "cache"), found) and path.read_bytes() == content
    assert f"{path} is damaged or" in capsys.readouterr().err
    assert torch.equal(of(images, tmp_path / "cache"), found)
    assert "damaged" not in capsys.readouterr().err


def test_features_of_other_images_under_the_name_are_not_taken(images, tmp_path):
    found = of(images, tmp_path / "cache")
    (path,) = (tmp_path / "cache").iterdir()
    np.savez(tmp_path / "b.npz", arr_0=255 - IMAGES.numpy().transpose(0, 2, 3, 1))
    of(tmp_path / "b.npz", tmp_path / "other")
    (other,) = (tmp_path / "other").iterdir()
    path.write_bytes(other.read_bytes())
    assert torch.equal(of(images, tmp_path / "cache"), found)


def test_radii_are_kept_beside_the_features(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "six.npz", arr_0=pixels)
    extractor = PixelExtractor("sddit-pixels", ["features"])

    def features():
        images = open_images(str(tmp_path / "six.npz"))
        return features_of_set(images, extractor, Accelerator(cpu=True), 2, tmp_path / "cache")

    expected = Manifold(features().features).radii
    for _ in range(2):
        assert torch.equal(features().manifold("cpu", half=False).radii, expected)
    (path,) = (tmp_path / "cache").glob("radii-3-*")
    keep_tensors(path, {"radii": expected + 1})
    assert torch.equal(features().manifold("cpu", half=False).radii, expected + 1)
    assert not torch.equal(features().manifold("cpu", half=True).radii, expected + 1)


def test_a_set_of_no_images_is_refused(tmp_path):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((0, 8, 8, 3), np.uint8))
    with pytest.raises(ValueError, match=r"a.npz is uint8 of shape \(0, 8, 8, 3\)"):
        of(tmp_path / "a.npz", None)


IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 20, 24), dtype=np.uint8))
SCRIPT = """
import json, sys
import torch
from accelerate import Accelerator
from conftest import TINY, randomize
from sddit_diffusers import EDMHeunScheduler, SDDiTPipeline, SDDiTTransformer2DModel
from sddit_diffusers.evaluation.extractors import Extractor
from sddit_diffusers.evaluation.features import extract
from sddit_diffusers.evaluation.judge import Judge

class Twofold(Extractor):
    provided = ("features", "spatial")

    def forward(self, images):
        return images.flatten(1).float(), images.flatten(1)[:, :5].float()

accelerator = Accelerator(cpu=True)
images = torch.arange(4 * 12, dtype=torch.uint8).view(4, 3, 2, 2) ** 2
mine = images[accelerator.process_index :: accelerator.num_processes] if accelerator.process_index < 2 else []
found = extract([mine] if len(mine) else [], Twofold("x", ["features", "spatial"]), accelerator)

pipe = SDDiTPipeline(randomize(SDDiTTransformer2DModel(**TINY)), EDMHeunScheduler())
pipe.set_progress_bar_config(disable=True)
judge = Judge(sys.argv[1], ["pixels"], (8, 8), 2, "image", "", accelerator)
scores = judge(pipe, 8, num_inference_steps=2)
if accelerator.is_main_process:
    print("found", json.dumps([len(found), found.spatial.mean.tolist(), scores]))
"""


@pytest.fixture
def reference(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "reference.npz", arr_0=pixels)
    return tmp_path / "reference.npz"


@pytest.mark.thorough
@pytest.mark.process
def test_processes_without_images_take_part(reference, tmp_path):
    """Three processes, of which one has none of the samples and none of the reference's two pictures."""
    (tmp_path / "script.py").write_text(SCRIPT)
    found = {}
    for processes in (1, 3):
        result = launch(processes, tmp_path / "script.py", reference)
        assert result.returncode == 0, result.stderr
        line = next(line for line in result.stdout.splitlines() if line.startswith("found"))
        found[processes] = json.loads(line.removeprefix("found"))
    assert found[3][2] == pytest.approx(found[1][2], rel=1e-4) and "fid_pixels" in found[1][2]
    assert len(found[3][1]) == 5
