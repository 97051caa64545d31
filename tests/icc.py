"""Small ICC profiles (ICC.1:2001-04), because Pillow can only make those of sRGB, Lab and XYZ."""

import struct

import numpy as np

D50 = (0.9642, 1.0, 0.8249)  # white of the profile connection space
DISPLAY_P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))  # its colors, under D50


def rgb_profile(gamma: float = 2.2) -> bytes:
    """The primaries of Display P3, with a power function as its curve."""
    tags = {f"{name}XYZ": _xyz(color) for name, color in zip("rgb", DISPLAY_P3, strict=True)}
    return _profile(b"RGB ", b"XYZ ", tags | {f"{name}TRC": _curve(gamma) for name in "rgb"})


def gray_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {"kTRC": _curve(gamma)})


def cmyk_profile() -> bytes:
    """A profile in which only black counts: CIELAB lightness falls from 100 to 0 with it, and everything is neutral."""
    identity = bytes(range(256))
    grid = bytes([255, 128, 128, 0, 128, 128]) * 2**3  # Lab at the corners of the cube of inks, black changes first
    matrix = struct.pack(">9i", *(65536 * np.eye(3, dtype=int).flatten()))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + grid + identity * 3
    return _profile(b"CMYK", b"Lab ", {"A2B0": table}, kind=b"prtr")


def _profile(space, connection, tags, kind=b"mntr"):
    tags = {"desc": b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78), "wtpt": _xyz(D50)} | tags
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name.encode() + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    header = struct.pack(">I", start + len(body)) + bytes(4) + bytes([2, 0x40, 0, 0]) + kind + space + connection
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + _xyz(D50)[8:]
    return header.ljust(128, b"\0") + table + body


def _xyz(color):
    return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(value * 65536) for value in color))


def _curve(gamma):
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256))
