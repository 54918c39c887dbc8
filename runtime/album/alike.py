"""Pictures that look alike: the mean of each one's image features, kept in F16, compared by their cosine.

Knows arrays and the album's table of them; encodes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pocketllava.album.journal import Album

Vector = npt.NDArray[np.float32]
AT_ONCE = 256  # rows that are compared together, 2 MB of a 7B model's: they stay in the processor's cache
MAPPED_BYTES = 1 << 32  # of the album, read without copying
# F16 to F32 by shifting, twice as fast as numpy's conversion: the exponent's bias is 15 in one, 127 in the other.
MANTISSA_SHIFT, BIAS = 13, np.float32(2.0 ** (127 - 15))
NOT_SIGN_COPIES = ~np.int32(0b111 << 28)  # of F16's sign, which widening has put there


def has(album: Album, pixels: str, tower: str) -> bool:
    """Whether features are kept of these pixels."""
    found = album.database.execute("SELECT 1 FROM features WHERE tower = ? AND pixels = ?", (tower, pixels))
    return found.fetchone() is not None


def put(album: Album, pixels: str, tower: str, features: npt.NDArray[np.float32]) -> None:
    """Keep (n_tokens, n_embd) features as their mean, of length one."""
    mean = unit(features.mean(axis=0)).astype("<f2").tobytes()
    album.database.execute(
        "INSERT OR REPLACE INTO features (pixels, tower, mean) VALUES (?, ?, ?)", (pixels, tower, mean)
    )


def get(album: Album, pixels: str, tower: str) -> Vector | None:
    """What put() kept."""
    found = album.database.execute(
        "SELECT mean FROM features WHERE tower = ? AND pixels = ?", (tower, pixels)
    ).fetchone()
    return np.frombuffer(found[0], "<f2").astype(np.float32) if found else None


def unit(vector: Vector) -> Vector:
    """The vector at length one; zeros as they are."""
    length = float(np.linalg.norm(vector))
    return (vector / length).astype(np.float32) if length else vector.astype(np.float32)


def nearest(album: Album, tower: str, wanted: Vector, limit: int) -> list[tuple[str, float]]:
    """(pixels, cosine) of the pictures that look most alike, the most alike first."""
    best: list[tuple[str, float]] = []
    for contents, cosines in _cosines(album, tower, wanted):
        n = min(limit, len(contents))
        top = np.argpartition(-cosines, n - 1)[:n]
        if len(best) == limit:
            top = top[cosines[top] >= best[-1][1]]
        best += [(contents[k], float(cosines[k])) for k in top]
        best = sorted(best, key=lambda pair: (-pair[1], pair[0]))[:limit]
    return best


def widen(halves: npt.NDArray[np.int16], out: Vector) -> None:
    """The bits of finite F16 numbers as F32 numbers that are smaller by BIAS, bit for bit."""
    bits = out.view(np.int32)
    bits[...] = halves
    np.left_shift(bits, MANTISSA_SHIFT, out=bits)
    np.bitwise_and(bits, NOT_SIGN_COPIES, out=bits)


def _cosines(album: Album, tower: str, wanted: Vector) -> Iterator[tuple[list[str], Vector]]:
    album.database.execute(f"PRAGMA mmap_size = {MAPPED_BYTES}")
    # + keeps SQLite from an index, which would have it sort 800 MB
    rows = album.database.execute(
        "SELECT pixels, mean FROM features WHERE +tower = ? AND length(mean) = ? ORDER BY id", (tower, 2 * len(wanted))
    )  # fmt: skip
    matrix, scaled = np.empty((AT_ONCE, len(wanted)), np.float32), wanted * BIAS
    while some := rows.fetchmany(AT_ONCE):
        contents, means = zip(*some, strict=True)
        part = matrix[: len(means)]
        widen(np.frombuffer(b"".join(means), "<i2").reshape(part.shape), part)
        yield list(contents), part @ scaled
