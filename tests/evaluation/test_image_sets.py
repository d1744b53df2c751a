"""Images of folders, archives and datasets, in one order and with one hash."""

import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from sddit_diffusers.evaluation.image_sets import batches, open_images

PIXELS = np.random.default_rng(0).integers(0, 256, (23, 6, 8, 3), dtype=np.uint8)


@pytest.fixture(params=["folder", "npz", "compressed npz"])
def images(request, tmp_path):
    """PIXELS in every form."""
    if request.param == "folder":
        for i, pixels in enumerate(PIXELS):
            (tmp_path / "set" / str(i // 10)).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / "set" / str(i // 10) / f"{i:03d}.png")
        return open_images(str(tmp_path / "set"))
    save = np.savez if request.param == "npz" else np.savez_compressed
    save(tmp_path / "set.npz", PIXELS, np.arange(23) % 4)
    return open_images(str(tmp_path / "set.npz"))


def test_any_part_is_read(images):
    expected = torch.from_numpy(PIXELS.transpose(0, 3, 1, 2).copy())
    assert len(images) == 23 and images.size == (6, 8)
    for rows in (range(23), range(5, 9), range(2, 4), range(4, 23)):  # forward and back
        assert torch.equal(images.read(rows), expected[rows.start : rows.stop])
    assert torch.equal(torch.cat(list(batches(images, range(3, 23), 7))), expected[3:])
    if images.labels is not None:
        assert images.labels.tolist() == [i % 4 for i in range(23)]


def test_a_hash_tells_content_and_order(tmp_path):
    hashes = set()
    changed = PIXELS.copy()
    changed[7, 1, 1, 1] ^= 1
    for name, pixels in (("a", PIXELS), ("b", PIXELS[::-1]), ("c", changed), ("again", PIXELS)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / f"{i:03d}.png")
        hashes.add(open_images(str(tmp_path / name)).sha256)
    assert len(hashes) == 3
    resized = open_images(str(tmp_path / "a"), resolution=4)
    assert resized.sha256 not in hashes and resized.read(range(2)).shape == (2, 3, 4, 4)


def test_a_dataset_is_read_at_the_size_of_its_first_picture():
    digits = open_images("digits", label_column="label")
    assert digits.size == (8, 8) and len(digits) == 1797 and digits.labels[:3].tolist() == [0, 1, 2]
    pixels = digits.read(range(3, 5))
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 8, 8)
    before = digits.sha256
    digits.size = (4, 4)
    assert digits.read(range(1)).shape == (1, 3, 4, 4) and before == digits.sha256


def write_npz(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"arr_0": PIXELS[..., 0]}, r"is uint8 of shape \(23, 6, 8\); it must be uint8 of shape"),
        ({"arr_0": PIXELS[..., :1]}, r"is uint8 of shape \(23, 6, 8, 1\); it must be"),
        ({"arr_0": PIXELS / 255}, r"is float64 of shape \(23, 6, 8, 3\); it must be uint8"),
        ({"images": PIXELS}, "has no images, which would be its arr_0; it has images"),
        ({"arr_0": PIXELS, "arr_1": np.array([object()])}, "labels of .*, its arr_1, cannot be read"),
    ],
)
def test_other_arrays_are_refused(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        open_images(write_npz(tmp_path / "a.npz", **arrays))


def test_pictures_of_mixed_sizes_are_refused(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Image.new("RGB", (8, 9)).save(tmp_path / "b.png")
    with pytest.raises(ValueError, match=r"b.png is 9 x 8, but a.png is 8 x 8: the images of a set have one"):
        open_images(str(tmp_path)).read(range(2))
    assert open_images(str(tmp_path), resolution=4).read(range(2)).shape == (2, 3, 4, 4)


def test_what_is_no_set_of_images_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="a.png.* cannot be read as a picture"):
        open_images(str(tmp_path))
    (tmp_path / "a.npz").write_bytes(b"no zip")
    with pytest.raises(ValueError, match="a.npz cannot be read: File is not a zip file"):
        open_images(str(tmp_path / "a.npz"))
    with pytest.raises(ValueError, match="a.npz cannot be read: .*No such file"):
        open_images(str(tmp_path / "none" / "a.npz"))
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(ValueError, match="a.txt is no .npz file; images come as"):
        open_images(str(tmp_path / "a.txt"))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(ValueError, match="is a pipeline; sddit_diffusers.generate makes images of it"):
        open_images(str(tmp_path))
    with pytest.raises(ValueError, match="There is no dataset folder /none"):
        open_images("/none")


def test_a_damaged_archive_is_named(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, PIXELS)
    content = bytearray(path.read_bytes())
    content[600] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match="a.npz is damaged: Bad CRC-32"):
        open_images(str(path)).read(range(23))


def test_images_are_not_held_whole(tmp_path):
    """The archive has more images than memory is asked for."""
    path = tmp_path / "large.npz"
    header = {"descr": "|u1", "fortran_order": False, "shape": (10**7, 256, 256, 3)}  # 2 TB
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(3 * 256 * 256 * 3))
    images = open_images(str(path))
    assert len(images) == 10**7 and images.read(range(1, 3)).shape == (2, 3, 256, 256)
    with pytest.raises(ValueError, match="its arr_0 ends before image 5"):
        images.read(range(2, 5))
