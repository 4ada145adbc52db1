"""Tests of cmake --install: what is there, that nothing names the machine, and that a program of its own can be built from the
receiver library of an installation that was moved."""

import os
import re
import shutil
import subprocess
import tempfile
import unittest
from pathlib import Path

import packaging_facts as facts
from packaging_facts import BUILD, ROOT

PUBLIC = ["base/metrics.h", "base/rpc/server.h", "base/rpc/transport.h", "google/rpc/status.pb.h", "headwater/v1/kv.grpc.pb.h",
          "kvtransfer/digest.h", "kvtransfer/layout.h", "kvtransfer/receiver.h", "kvtransfer/sender.h", "kvtransfer/store.h"]
PRIVATE = ["kvtransfer/session_files.h", "kvtransfer/send_ledger.h"]


def run(*command, **words) -> subprocess.CompletedProcess:
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **words)


def where_the_build_looks() -> dict:
    """An environment in which installed programs, which have no search path, find NVIDIA's libraries as the build does."""
    paths = re.findall(r"RUNPATH.*\[(.*)\]", run("readelf", "--dynamic", BUILD / "bin/headwater-worker").stdout)
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(paths)}


def missing_headers(include: Path) -> set:
    """What headers of the root `include` include of the project's own parts, and is not there."""
    parts = {path.name for path in (ROOT / "kvtransfer", ROOT / "base")} | {"headwater"}
    wanted = set()
    for path in include.rglob("*.h"):
        for name in re.findall(r'^\s*#\s*include\s*"([^"]+)"', path.read_text(), re.MULTILINE):
            if name.split("/")[0] in parts or name.startswith("google/rpc/"):
                wanted.add(name)
    return {name for name in wanted if not (include / name).is_file()}


class Install(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        installed = run("cmake", "--install", BUILD, "--prefix", cls.folder / "first")
        if installed.returncode != 0:
            raise AssertionError(installed.stderr)
        # Whatever holds the first path breaks here.
        cls.prefix = cls.folder / "moved"
        (cls.folder / "first").rename(cls.prefix)
        cls.include = cls.prefix / "include" / "headwater"

    def downstream(self, prefix: Path, name: str) -> tuple:
        """Configures and builds tests/package/downstream against `prefix`; returns (what was printed, the program)."""
        build = self.folder / name
        configured = run("cmake", "-S", ROOT / "tests/package/downstream", "-B", build, "-G", "Ninja",
                         f"-DCMAKE_PREFIX_PATH={prefix}")
        self.assertEqual(configured.returncode, 0, configured.stderr)
        cache = (build / "CMakeCache.txt").read_text()
        self.assertIn(f"Headwater_DIR:PATH={prefix}/lib", cache)
        built = run("cmake", "--build", build)
        return built.stdout + built.stderr, build / "receive_session"

    def test_programs_say_their_version(self):
        for name in facts.PROGRAMS:
            said = run(self.prefix / "bin" / name, "--version", env=where_the_build_looks())
            self.assertEqual(said.returncode, 0, said.stderr)
            version = re.escape(facts.version())
            self.assertRegex(said.stdout, rf"^{name} {version} \(commit ([0-9a-f]{{12}}\+?|unknown), protocol \d+\)\n$")
            asked = run(self.prefix / "bin" / name, "--help", env=where_the_build_looks())
            self.assertEqual((asked.returncode, "version" in asked.stdout), (0, True), name)

    def test_headers_of_the_library_and_no_others(self):
        for name in PUBLIC:
            self.assertTrue((self.include / name).is_file(), name)
        for name in PRIVATE:
            self.assertFalse((self.include / name).exists(), name)
        self.assertEqual(missing_headers(self.include), set())

    def test_protocol_and_deployment_files(self):
        share = self.prefix / "share" / "headwater"
        protos = {path.name for path in (ROOT / "proto/headwater/v1").glob("*.proto")}
        self.assertEqual({path.name for path in (share / "proto/headwater/v1").iterdir()}, protos)
        for folder in ("alerts", "dashboards", "kubernetes"):
            mine = sorted(path.relative_to(ROOT / "deploy") for path in (ROOT / "deploy" / folder).rglob("*") if path.is_file())
            theirs = sorted(path.relative_to(share) for path in (share / folder).rglob("*") if path.is_file())
            self.assertEqual(theirs, mine)
        self.assertEqual((share / "roles.txtpb").read_text(), (ROOT / "deploy/roles.txtpb").read_text())
        self.assertTrue((share / "prometheus.yml").is_file())
        self.assertTrue((self.prefix / "share/doc/headwater/docs/install.md").is_file())

    def test_nothing_names_the_machine(self):
        self.assertEqual(facts.machine_paths(self.prefix), [])
        named = self.folder / "named"
        named.mkdir()
        (named / "program").write_bytes(b"\0" + str(BUILD).encode() + b"/a.cc\0")
        (named / "another").write_bytes(b"/opt" + str(BUILD).encode() + b"/a.cc")
        self.assertEqual(facts.machine_paths(named), [("program", f"{BUILD}/")])

    def test_a_program_built_from_the_library_receives_a_session(self):
        said, program = self.downstream(self.prefix, "downstream")
        self.assertTrue(program.is_file(), said)
        (self.folder / "kv").mkdir()
        received = run(program, self.folder / "kv", timeout=60)
        # 3 layers of K and V, 1000 tokens of 2 x 64 bf16, in blocks of 64 tokens.
        self.assertEqual((received.stdout, received.returncode), ("received 1536000 bytes in 96 blocks\n", 0), received.stderr)
        self.assertNotIn(str(BUILD), run("readelf", "-d", program).stdout)

    def test_a_header_that_is_missed_is_named(self):
        broken = self.folder / "broken"
        shutil.copytree(self.prefix, broken, ignore=shutil.ignore_patterns("bin"))
        (broken / "include/headwater/kvtransfer/digest.h").unlink()
        self.assertEqual(missing_headers(broken / "include/headwater"), {"kvtransfer/digest.h"})
        (broken / "include/headwater/kvtransfer/digest.h").write_text("#error no digest\n")
        said, program = self.downstream(broken, "broken_build")
        self.assertFalse(program.exists())
        self.assertIn("no digest", said)

    def test_destdir_holds_everything(self):
        root = self.folder / "root"
        installed = run("cmake", "--install", BUILD, "--prefix", "/usr", "--component", "deploy",
                        env={**os.environ, "DESTDIR": str(root)})
        self.assertEqual(installed.returncode, 0, installed.stderr)
        self.assertTrue((root / "usr/share/headwater/alerts/headwater.rules.yml").is_file())
        self.assertFalse((root / "usr/bin").exists())  # of another component


if __name__ == "__main__":
    facts.need("cmake", "ninja", "readelf", "g++")
    unittest.main(verbosity=2)
