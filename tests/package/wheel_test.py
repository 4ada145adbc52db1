"""Tests of the Python wheel: built from a copy of the sources, installed into an environment that has the packages which it
asks for and no others, and used by python/examples/prefill.py with a live cluster of CPU processes."""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import unittest
import venv
import zipfile
from pathlib import Path

import packaging_facts as facts
from packaging_facts import BUILD, ROOT

sys.path.insert(0, str(ROOT / "tools"))

try:
    import grpc_tools  # noqa: F401  the wheel is built without a network, with what is here
    from headwater import Client
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name
    from watch_cluster import small_cluster, tokens
except ImportError as error:
    print(f"SKIPPED: {error} (tools/venv.sh installs it)")
    sys.exit(77)

NEW_TOKENS = 8


def output_of(*command, **words) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **words)
    if done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def requirements_of(requirements) -> list:
    """The distributions of this environment that the requirements, without extras, lead to."""
    found, waiting = {}, list(requirements)
    while waiting:
        requirement = Requirement(waiting.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
            found[name] = importlib.metadata.distribution(name)
            waiting += found[name].requires or []
    return list(found.values())


class Wheel(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        source = cls.folder / "source"  # a build leaves files among the sources
        for part in ("python", "proto"):
            shutil.copytree(ROOT / part, source / part, ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
        output_of(*pip, "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", cls.folder,
                  source / "python")
        cls.wheel = next(cls.folder.glob("*.whl"))
        cls.names = zipfile.ZipFile(cls.wheel).namelist()

        cls.environment = cls.folder / "environment"
        venv.create(cls.environment, with_pip=False)
        cls.python = cls.environment / "bin" / "python"
        cls.pip = [*pip, "--python", cls.python]
        output_of(*cls.pip, "install", "--quiet", "--no-index", "--no-deps", cls.wheel)
        site = Path(output_of(cls.python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
        cls.asked = re.findall(r"^Requires-Dist: (.*)$", zipfile.ZipFile(cls.wheel).read(
            f"headwater-{facts.version()}.dist-info/METADATA").decode(), re.MULTILINE)
        for distribution in requirements_of(cls.asked):
            for file in distribution.files:
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    (site / file).parent.mkdir(parents=True, exist_ok=True)
                    (site / file).symlink_to(file.locate())

    def test_name_and_contents(self):
        self.assertEqual(self.wheel.name, f"headwater-{facts.version()}-py3-none-any.whl")
        for stem in ("admin", "decode", "kv", "prefill", "roles", "types", "worker"):
            self.assertIn(f"headwater/v1/{stem}_pb2.py", self.names)
            self.assertIn(f"headwater/v1/{stem}_pb2.pyi", self.names)
        self.assertIn("headwater/v1/prefill_pb2_grpc.py", self.names)
        self.assertIn("headwater/py.typed", self.names)
        # Every module of the sources, and nothing of anyone else.
        modules = {str(path.relative_to(ROOT / "python")) for path in (ROOT / "python/headwater").rglob("*.py")}
        written = {name for name in self.names if name.endswith(".py") and not name.startswith("headwater/v1/")}
        self.assertEqual(written, modules)
        self.assertEqual({name.split("/")[0] for name in self.names}, {"headwater", f"headwater-{facts.version()}.dist-info"})

    def test_nothing_names_the_machine(self):
        with zipfile.ZipFile(self.wheel) as archive:
            archive.extractall(self.folder / "extracted")
        self.assertEqual(facts.machine_paths(self.folder / "extracted"), [])

    def test_what_it_asks_for_is_enough(self):
        self.assertIn("No broken requirements found.", output_of(*self.pip, "check"))
        listed = {one["name"].lower() for one in json.loads(output_of(*self.pip, "list", "--format=json"))}
        self.assertTrue({"headwater", "grpcio", "tokenizers"} <= listed, listed)
        self.assertFalse({"grpcio-tools", "setuptools", "numpy"} & listed, listed)
        home = output_of(self.python, "-I", "-c", "import headwater.client, headwater.chat; print(headwater.__file__)")
        self.assertTrue(home.startswith(str(self.environment)), home)
        missing = subprocess.run([self.python, "-I", "-c", "import grpc_tools"], capture_output=True, text=True, check=False)
        self.assertIn("No module named 'grpc_tools'", missing.stderr)

    def test_the_example_with_a_live_cluster(self):
        prompt = tokens(700)
        words = ",".join(map(str, prompt))
        example = [self.python, "-I", ROOT / "python/examples/prefill.py"]
        with small_cluster(BUILD / "bin", self.folder / "cluster") as cluster:
            with Client(cluster.coordinator) as client:
                cluster.wait_registered(client, lambda *_: None)
            said = output_of(*example, cluster.coordinator, "--tokens", words, "--max_new_tokens", NEW_TOKENS, timeout=60)
            # Another client of the same service must get the same tokens.
            (self.folder / "prompt").write_text(words.replace(",", " "))
            line = output_of(BUILD / "bin/headwater", "submit", f"--coordinator={cluster.coordinator}",
                             f"--tokens={self.folder / 'prompt'}", f"--generate={NEW_TOKENS}", "--json", "--release",
                             timeout=60)
            refused = subprocess.run([*example, cluster.coordinator, "--tokens", "9999"], capture_output=True, text=True,
                                     check=False, timeout=60)
        match = re.fullmatch(r"prefilled 700 tokens on (w\d(?:, w\d)?): ([1-9]\d*) bytes of KV at decode-0\n"
                             r"generated ((?:\d+ ?)+)\nreleased ([1-9]\d*) bytes\n", said)
        self.assertIsNotNone(match, said)
        generated = [int(word) for word in match[3].split()]
        self.assertEqual(len(generated), NEW_TOKENS)
        self.assertEqual(json.loads(line.splitlines()[-1])["generated"]["tokens"], generated, line)
        self.assertEqual(refused.returncode, 1, refused.stdout)
        self.assertTrue(refused.stderr.startswith("INVALID_ARGUMENT TOKEN_OUT_OF_RANGE: "), refused.stderr)


if __name__ == "__main__":
    os.environ.pop("PYTHONPATH", None)
    facts.need()
    unittest.main(verbosity=2)
