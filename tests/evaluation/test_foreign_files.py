"""Files of others, honest and hostile: statistics and arrays are read as numbers, or refused."""

import codecs
import io
import pickle
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from conftest import Touch
from hypothesis import given, settings
from hypothesis import strategies as st

from sddit_diffusers.evaluation.image_sets import open_images
from sddit_diffusers.evaluation.scores import Gaussian
from sddit_diffusers.evaluation.statistics import read_statistics, save_statistics

GAUSSIANS = {
    name: Gaussian(torch.arange(float(dim)).double(), (torch.eye(dim) * dim).double())
    for name, dim in (("fid", 5), ("sfid", 4), ("fd_dinov2", 3))
}


def same(a, b):
    return torch.equal(a.mean, b.mean) and torch.equal(a.covariance, b.covariance)


def test_saved_statistics_come_back(tmp_path):
    save_statistics(tmp_path / "s.npz", GAUSSIANS)
    found = read_statistics(tmp_path / "s.npz")
    assert found.keys() == GAUSSIANS.keys() and all(same(found[name], GAUSSIANS[name]) for name in found)


def test_adms_and_edms_files_are_read(tmp_path):
    arrays = {"mu": np.arange(5, dtype=np.float32), "sigma": 5 * np.eye(5)}
    np.savez(tmp_path / "edm.npz", **arrays)
    edm = read_statistics(tmp_path / "edm.npz")
    assert edm.keys() == {"fid"} and same(edm["fid"], GAUSSIANS["fid"])
    arrays |= {"mu_s": np.arange(4.0), "sigma_s": 4 * np.eye(4), "arr_0": np.zeros((3, 8, 8, 3), np.uint8)}
    np.savez(tmp_path / "adm.npz", **arrays)
    adm = read_statistics(tmp_path / "adm.npz")
    assert adm.keys() == {"fid", "sfid"} and same(adm["sfid"], GAUSSIANS["sfid"])
    assert len(open_images(str(tmp_path / "adm.npz"))) == 3


@pytest.mark.parametrize("protocol", range(2, 6))
def test_edm2s_pickle_is_read(tmp_path, protocol):
    content = {
        name: {"mu": GAUSSIANS[name].mean.numpy(), "sigma": GAUSSIANS[name].covariance.numpy()}
        for name in ("fid", "fd_dinov2")
    }
    (tmp_path / "s.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    found = read_statistics(tmp_path / "s.pkl")
    assert found.keys() == content.keys() and all(same(found[name], GAUSSIANS[name]) for name in found)


def test_no_pickle_runs_code(tmp_path):
    flag = tmp_path / "was run"
    (tmp_path / "a.pkl").write_bytes(pickle.dumps({"fid": Touch(flag)}))
    with pytest.raises(
        ValueError, match=r"a.pkl cannot be read as statistics: it asks for _?io.open, and only"
    ):
        read_statistics(tmp_path / "a.pkl")
    np.savez(tmp_path / "a.npz", mu=np.array([Touch(flag)]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="a.npz cannot be read as statistics: mu .* is object of shape"):
        read_statistics(tmp_path / "a.npz")
    assert not flag.exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pkl", pickle.dumps({"fid": {"mu": 1}}), "cannot be read as statistics"),
        ("a.pkl", pickle.dumps([1, 2]), "holds no statistics"),
        ("a.pkl", b"nothing", "cannot be read as statistics"),
        ("a.npz", {"mu": np.zeros(3), "sigma": np.eye(2)}, r"have shapes \(3,\) and \(2, 2\)"),
        ("a.npz", {"mu": np.zeros(2), "sigma": np.eye(2) * np.nan}, "is not finite"),
    ],
)
def test_other_statistics_are_refused(tmp_path, name, content, message):
    if isinstance(content, dict):
        np.savez(tmp_path / name, **content)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_statistics(tmp_path / name)


def pickled(array, protocol, module):
    """A pickle of EDM2's structure as another version of numpy writes it."""
    content = pickle.dumps({"fid": {"mu": array, "sigma": np.outer(array, array)}}, protocol=protocol)
    if module == "numpy._core":
        return content
    if protocol < 4:
        return content.replace(b"cnumpy._core.", b"cnumpy.core.")
    for part in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + part, b"numpy.core." + part
        content = content.replace(bytes([len(new)]) + new, bytes([len(old)]) + old)
    return content[:2] + content[11:]  # without the frame, whose length has changed


@pytest.mark.parametrize("module", ["numpy._core", "numpy.core"])
@pytest.mark.parametrize("dtype", ["<f4", "<f8", ">f8"])
@pytest.mark.parametrize("protocol", range(2, 6))
def test_pickles_of_both_numpys_are_read(tmp_path, protocol, dtype, module):
    (tmp_path / "s.pkl").write_bytes(pickled(np.arange(1, 4).astype(dtype), protocol, module))
    gaussian = read_statistics(tmp_path / "s.pkl")["fid"]
    assert gaussian.mean.tolist() == [1, 2, 3] and gaussian.covariance.dtype == torch.float64
    assert gaussian.covariance.tolist() == [[1, 2, 3], [2, 4, 6], [3, 6, 9]]


@pytest.mark.parametrize("protocol", range(2, 6))
def test_columns_of_a_pickle_come_as_they_are(tmp_path, protocol):
    sigma = np.asfortranarray([[1.0, 2.0], [3.0, 4.0]])
    content = pickle.dumps({"fid": {"mu": np.zeros(2), "sigma": sigma}, "n": np.int64(3)}, protocol=protocol)
    (tmp_path / "s.pkl").write_bytes(content)
    assert read_statistics(tmp_path / "s.pkl")["fid"].covariance.tolist() == sigma.tolist()


class Call:
    """Pickled, a call of a function; then `__setstate__` with a state, where there is one."""

    def __init__(self, function, arguments, *state):
        self.parts = (function, arguments, *state)

    def __reduce__(self):
        return self.parts


def rebuilt(shape, dtype, content=b"\0" * 16, fortran=False):
    arguments = (np.ndarray, (0,), b"b")
    return Call(np._core.multiarray._reconstruct, arguments, (1, shape, dtype, fortran, content))


def typed(name, *state):
    return Call(np.dtype, (name, False, True), *state)


HOSTILE = {
    "objects over raw bytes": rebuilt((2,), typed("f8", (3, "|", None, None, None, -1, -1, 63))),
    "objects": rebuilt((2,), typed("O8")),
    "objects, named so later": rebuilt((2,), typed("V8", (3, "|", ("O", (2,)), None, None, 8, 1, 27))),
    "a field": rebuilt((2,), typed([("a", "O")])),
    "sub-arrays": rebuilt((2,), typed("(2,)f8")),
    "text": rebuilt((2,), typed("U2")),
    "void": rebuilt((2,), typed("V8")),
    "a negative side": rebuilt((-2,), np.dtype("f8")),
    "two negative sides": rebuilt((-2, -1), np.dtype("f8")),
    "an overflowing shape": rebuilt((2**62, 2**62), np.dtype("f8")),
    "a shape of a large number": rebuilt((2**70,), np.dtype("f8")),
    "more than its bytes": rebuilt((3,), np.dtype("f8")),
    "less than its bytes": rebuilt((1,), np.dtype("f8")),
    "a shape that is none": rebuilt("ab", np.dtype("f8")),
    "no bytes": rebuilt((2,), np.dtype("f8"), [1.0, 2.0]),
    "a view of nothing": Call(np._core.numeric._frombuffer, (b"", np.dtype("f8"), (2,), "C")),
    "a view with no order": Call(np._core.numeric._frombuffer, (b"\0" * 16, np.dtype("f8"), (2,), "X")),
    "a number of an object": Call(np._core.multiarray.scalar, (typed("O8"), b"\0" * 8)),
    "an array by its class": Call(np.ndarray, ((2,), np.dtype("f8"), b"\0" * 16)),
    "another base": Call(np._core.multiarray._reconstruct, (np.dtype, (0,), b"b")),
    "an array never filled": Call(np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b")),
    "a class of numpy given a state": Call(np._core.multiarray.scalar, (np.dtype("f8"), b"\0" * 8), {"x": 1}),
    "a function of numpy": Call(np.memmap, ("/etc/passwd",)),
    "another encoding": Call(codecs.encode, ("abc", "rot13")),
    "a dtype as an array": typed("f8"),
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_hostile_arrays_of_a_pickle_are_refused(tmp_path, name, protocol):
    content = {"fid": {"mu": HOSTILE[name], "sigma": np.eye(2)}}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content, protocol=protocol))
    with pytest.raises(ValueError, match="a.pkl cannot be read as statistics: "):
        read_statistics(tmp_path / "a.pkl")


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02]r\xff\xff\xff\x7f.",  # a memo of 2^31 entries
        b"\x80\x02])" + b"\x85" * 200_000 + b"}" + b"(",  # tuples in tuples
        b"\x80\x02})" + b"\x85" * 200_000 + b"Ns.",  # as a key, which is hashed
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",  # bytes of a length that nothing has
        b"\x80\x05\x96" + b"\xff" * 5 + b"\0\0\0.",
        b"\x80\x02cnumpy\nndarray\n}(X\x01\0\0\0aK\x01ub.",  # a state for a class
        b"\x80\x02cnumpy\ndtype\nN}X\x0c\0\0\0__setstate__K\x01s\x86b.",
        b"\x80\x05\x97.",  # a buffer from outside
        b"\x80\x02\x82\x01.",  # a class by number
        b"",
    ],
)
def test_pickles_by_hand_are_refused(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="a.pkl cannot be read as statistics: "):
        read_statistics(tmp_path / "a.pkl")


VALID = [
    pickle.dumps({"fid": {"mu": np.arange(2.0), "sigma": np.eye(2)}}, protocol=protocol)
    for protocol in (2, 4, 5)
]


@st.composite
def mutated(draw, originals):
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    return bytes(content)


def only_numbers_or_refused(path):
    try:
        statistics = read_statistics(path)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        for gaussian in statistics.values():
            assert gaussian.mean.isfinite().all() and gaussian.covariance.dtype == torch.float64


@settings(max_examples=300, deadline=None)
@given(content=st.one_of(st.binary(max_size=200), mutated(VALID)))
def test_no_pickle_gives_anything_but_numbers(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "mutated.pkl"
    path.write_bytes(content)
    only_numbers_or_refused(path)


def npz(path, **members):
    """An archive of `.npy` files, each given as a header and what follows it, or as bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, member in members.items():
            if not isinstance(member, bytes):
                header, content = member
                buffer = io.BytesIO()
                np.lib.format.write_array_header_1_0(buffer, header)
                member = buffer.getvalue() + content
            archive.writestr(f"{name}.npy", member)
    return path


def header(descr="<f8", shape=(2,), fortran=False):
    return {"descr": descr, "fortran_order": fortran, "shape": shape}


BAD_ARRAYS = {
    "empty": b"",
    "only its mark": b"\x93NUMPY\x01\0",
    "another version": b"\x93NUMPY\x09\0" + bytes(100),
    "text": b"no array at all",
    "objects": (header("|O"), pickle.dumps([1.0, 2.0])),
    "fields": (header([("a", "<f8")]), bytes(16)),
    "text of numpy": (header("<U2"), bytes(16)),
    "a negative side": (header(shape=(-2,)), bytes(16)),
    "an overflowing shape": (header(shape=(2**62, 2**62)), bytes(16)),
    "a large number": (header(shape=(10**40,)), bytes(16)),
    "true as a side": (header(shape=(True,)), bytes(8)),
    "more than there is": (header(shape=(10**9,)), bytes(16)),
    "less than there is": (header(shape=(1,)), bytes(16)),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
@pytest.mark.parametrize("array", ["mu", "sigma"])
def test_bad_arrays_of_statistics_are_refused(tmp_path, name, array):
    good = {"mu": (header(), bytes(16)), "sigma": (header(shape=(2, 2)), bytes(32))}
    path = npz(tmp_path / "a.npz", **good | {array: BAD_ARRAYS[name]})
    with pytest.raises(ValueError, match=f"{array}.* of .*a.npz|a.npz cannot be read as statistics.*{array}"):
        read_statistics(path)


IMAGES = (header("|u1", (1, 2, 2, 3)), bytes(12))


@pytest.mark.parametrize("name", sorted(BAD_ARRAYS.keys() - {"more than there is"}))
def test_bad_arrays_of_images_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="a.npz"):
        open_images(str(npz(tmp_path / "a.npz", arr_0=BAD_ARRAYS[name])))


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_bad_arrays_of_labels_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="labels of .*a.npz, its arr_1, cannot be read"):
        open_images(str(npz(tmp_path / "a.npz", arr_0=IMAGES, arr_1=BAD_ARRAYS[name])))


@pytest.mark.parametrize(
    "shape", [(-1, 2, 2, 3), (2**64, 2, 2, 3), (0, 2, 2, 3), (1, 0, 2, 3), (1, -2, -2, 3)]
)
def test_images_of_impossible_shapes_are_refused(tmp_path, shape):
    path = npz(tmp_path / "a.npz", arr_0=(header("|u1", shape), bytes(12)))
    with pytest.raises(ValueError, match="a.npz"):
        open_images(str(path))


def test_a_little_file_takes_little_memory(tmp_path):
    """Zeros, packed a thousand to one: they are refused before they are unpacked."""
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("mu.npy", "w") as member:
            np.lib.format.write_array_header_1_0(member, header(shape=(2**24,)))
            for _ in range(128):
                member.write(bytes(2**20))
        archive.writestr("sigma.npy", b"")
    tracemalloc.start()
    with pytest.raises(ValueError, match="bomb.npz"):
        read_statistics(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**25


@pytest.mark.parametrize("kept", [0, 1, 30, 100, 200, 400])
def test_truncated_archives_are_named(tmp_path, kept):
    npz(
        tmp_path / "whole.npz",
        arr_0=IMAGES,
        mu=(header(), bytes(16)),
        sigma=(header(shape=(2, 2)), bytes(32)),
    )
    path = tmp_path / "a.npz"
    path.write_bytes((tmp_path / "whole.npz").read_bytes()[:kept])
    with pytest.raises(ValueError, match="a.npz"):
        read_statistics(path)
    with pytest.raises(ValueError, match="a.npz"):
        open_images(str(path))


def test_a_single_array_is_no_archive(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match="a.npz cannot be read as statistics"):
        read_statistics(tmp_path / "a.npz")


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_archive_gives_anything_but_numbers_and_pictures(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.npz"
    good = {"mu": (header(), bytes(16)), "sigma": (header(shape=(2, 2)), bytes(32)), "arr_0": IMAGES}
    whole = npz(path, **good, arr_1=(header("<i8", (1,)), bytes(8))).read_bytes()
    path.write_bytes(data.draw(mutated([whole])))
    only_numbers_or_refused(path)
    try:
        images = open_images(str(path))
        assert images.read(range(len(images))).dtype == torch.uint8
    except ValueError as error:
        assert str(path) in str(error)
