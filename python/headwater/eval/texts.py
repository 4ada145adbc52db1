"""Long texts, and windows of them whose last tokens are the same at every length."""

import shutil
import struct
import subprocess
import zlib
from pathlib import Path
from typing import List, Sequence, Tuple

JANE_AUSTEN = Path("/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb")
BIBLE = ("bible", "-f", "gen1:1-rev22:21")


class TextError(ValueError):
    """A text is not there or cannot be read; the message says what to do."""


def read_text(name: str) -> Tuple[str, str]:
    """(short name, text) of a file, of "kjv" (Debian's bible-kjv), or of the first words of a novel's title, such as "emma"
    or "persuasion" (Debian's r-cran-janeaustenr)."""
    path = Path(name)
    if path.is_file():
        return path.stem, path.read_text(encoding="utf-8", errors="replace")
    if path.suffix or "/" in name:
        raise TextError(f"text {name}: no such file")
    if name == "kjv":
        return name, _bible()
    if not JANE_AUSTEN.is_file():
        raise TextError(f"text {name}: no such file, and {JANE_AUSTEN} is absent (apt-get install --no-install-recommends "
                        f"r-cran-janeaustenr)")
    novels = read_novels(JANE_AUSTEN)
    if name not in novels:
        raise TextError(f"text {name}: no such file, and no novel of {', '.join(novels)}")
    return name, novels[name]


def _bible() -> str:
    if shutil.which(BIBLE[0]) is None:
        raise TextError("text kjv: the program `bible` is absent (apt-get install bible-kjv)")
    done = subprocess.run(BIBLE, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=60,
                          check=False)
    if done.returncode != 0 or len(done.stdout) < 1 << 20:
        raise TextError(f"text kjv: `{' '.join(BIBLE)}` gave {len(done.stdout)} characters, status {done.returncode}")
    return done.stdout


def read_novels(path: Path) -> dict:
    """Text by name (lower case letters of the title) from an R lazy-load file: entries of 4 bytes (big endian, length) and a
    zlib stream, which holds one serialised character vector, a line an element."""
    rest, novels = path.read_bytes(), {}
    while rest:
        stream = zlib.decompressobj()
        lines = _character_vector(stream.decompress(rest[4:]))
        rest = stream.unused_data
        title = next((line for line in lines if line.strip()), "")
        novels["".join(c for c in title.lower() if c.isalpha())] = "\n".join(lines)
    return novels


def _character_vector(data: bytes) -> List[str]:
    """Lines of a character vector in R's XDR format: version words, then type 16, a length, and strings (type 9) with a
    length each; -1 is a missing string."""
    version, = struct.unpack_from(">i", data, 2)
    place = 14
    if version == 3:  # the native encoding's name follows
        place += 4 + struct.unpack_from(">i", data, 14)[0]
    kind, count = struct.unpack_from(">Ii", data, place)
    if data[:2] != b"X\n" or kind & 255 != 16:
        raise TextError(f"not a character vector in R's XDR format (type {kind & 255})")
    place += 8
    lines = []
    for _ in range(count):
        kind, size = struct.unpack_from(">Ii", data, place)
        if kind & 255 != 9:
            raise TextError(f"line {len(lines)}: type {kind & 255} in a character vector")
        place += 8
        lines.append(data[place:place + max(size, 0)].decode("utf-8", errors="replace"))
        place += max(size, 0)
    return lines


def window_ends(num_tokens: int, longest: int, targets: int, windows: int) -> List[int]:
    """Ends (exclusive) of at most `windows` windows of a text, spread evenly: each has room for `longest` tokens before it,
    and the last `targets` tokens before two ends do not overlap. Empty where the text is shorter than `longest`."""
    room = num_tokens - longest
    if room < 0 or windows < 1:
        return []
    count = min(windows, room // targets + 1)
    return [longest + room * i // max(1, count - 1) for i in range(count)]


def window(tokens: Sequence[int], end: int, length: int, prefix: Sequence[int]) -> List[int]:
    """`length` token ids that end before `end`: the tokenizer's prefix (<bos>, where it has one), then text."""
    return [*prefix, *tokens[end - (length - len(prefix)):end]]
