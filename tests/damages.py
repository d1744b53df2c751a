"""What can happen to a file of tensors."""

from safetensors.torch import load_file, save_file


def truncated(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def emptied(path):
    path.write_bytes(b"")


def reshaped(path):
    tensors = load_file(path)
    save_file({name: tensor[:1].contiguous() for name, tensor in tensors.items()}, path)


def without_hash(path):
    save_file(load_file(path), path)


DAMAGES = [truncated, flipped, emptied, reshaped, without_hash]
