"""Tests of the Debian packages of this build: fields, dependencies, files, no word of the machine that made them, and programs
that start from a directory into which a package was unpacked."""

import os
import re
import subprocess
import tempfile
import unittest
from pathlib import Path

import packaging_facts as facts
from packaging_facts import BUILD

REQUIRED = ("Package", "Version", "Architecture", "Maintainer", "Section", "Priority", "Installed-Size", "Description")


def output_of(*command, **words) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False, **words)
    if done.returncode != 0:
        raise AssertionError(f"{command}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    return done.stdout


class Packages(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        folder = tempfile.TemporaryDirectory()
        cls.addClassCleanup(folder.cleanup)
        cls.folder = Path(folder.name)
        output_of("cpack", "--config", BUILD / "CPackConfig.cmake", "-B", cls.folder, cwd=cls.folder)
        cls.files = {path.name.split("_")[0]: path for path in cls.folder.glob("*.deb")}
        cls.roots = {}
        for name, path in cls.files.items():
            cls.roots[name] = cls.folder / name
            output_of("dpkg-deb", "--extract", path, cls.roots[name])

    def fields(self, name: str) -> dict:
        text = output_of("dpkg-deb", "--field", self.files[name])
        return {key: value.strip() for key, value in re.findall(r"^([\w-]+):((?:.*\n(?: .*\n)*))", text, re.MULTILINE)}

    def contents(self, name: str) -> dict:
        """Path -> (mode, owner)"""
        lines = [line.split(None, 5) for line in output_of("dpkg-deb", "--contents", self.files[name]).splitlines()]
        return {words[5].removeprefix("."): (words[0], words[1]) for words in lines}

    def test_names_and_fields(self):
        self.assertEqual(set(self.files), {"headwater", "headwater-deploy", "libheadwater-dev"})
        native = output_of("dpkg", "--print-architecture").strip()
        for name, path in self.files.items():
            fields = self.fields(name)
            self.assertEqual([key for key in REQUIRED if not fields.get(key)], [], name)
            self.assertEqual(fields["Version"], facts.version())
            self.assertEqual(fields["Architecture"], "all" if name == "headwater-deploy" else native)
            self.assertEqual(path.name, f"{name}_{fields['Version']}_{fields['Architecture']}.deb")
            self.assertRegex(fields["Maintainer"], r"^[\w ]+ <[\w.]+@[\w.]+>$")
            synopsis, *rest = fields["Description"].splitlines()
            self.assertTrue(0 < len(synopsis) < 80 and rest, fields["Description"])

    def test_dependencies(self):
        depends = self.fields("headwater")["Depends"]
        for package in ("libc6", "libdnnl2", "libgrpc++1.51", "libisal2", "libprotobuf32", "libssl3"):
            self.assertIn(f"{package} (>= ", depends)
        self.assertNotIn("-dev", depends)
        self.assertNotIn("Depends", self.fields("headwater-deploy"))
        wanted = self.fields("libheadwater-dev")["Depends"].split(", ")
        config = (self.roots["libheadwater-dev"] / "usr/lib/cmake/Headwater/HeadwaterConfig.cmake").read_text()
        # Each package that the configuration looks for, and where Debian has it; threads come with any compiler.
        homes = {"absl": "libabsl-dev", "Protobuf": "libprotobuf-dev", "gRPC": "libgrpc++-dev",
                 "prometheus-cpp": "prometheus-cpp-dev", "OpenSSL": "libssl-dev", "ISAL": "libisal-dev"}
        found = set(re.findall(r"find_dependency\(([\w-]+)", config)) - {"Threads"}
        self.assertEqual(found, set(homes))
        self.assertEqual(set(homes.values()) - set(wanted), set())

    def test_files(self):
        runtime = set(self.contents("headwater"))
        for program in facts.PROGRAMS:
            self.assertIn(f"/usr/bin/{program}", runtime)
        self.assertIn("/usr/share/headwater/sbom.spdx.json", runtime)
        self.assertEqual([path for path in runtime if "/include/" in path or path.endswith(".a")], [])
        deploy = set(self.contents("headwater-deploy"))
        self.assertIn("/usr/share/headwater/alerts/headwater.rules.yml", deploy)
        self.assertEqual([path for path in deploy if "/bin/" in path], [])
        development = set(self.contents("libheadwater-dev"))
        self.assertIn("/usr/include/headwater/kvtransfer/receiver.h", development)
        self.assertIn("/usr/lib/libheadwater_kvtransfer.a", development)
        whole = [self.contents(name) for name in self.files]
        files = [path for contents in whole for path in contents if not path.endswith("/")]
        self.assertEqual(len(files), len(set(files)), "a file is in two packages")
        for name, contents in zip(self.files, whole):
            self.assertIn(f"/usr/share/doc/{name}/copyright", contents)
            self.assertIn(f"/usr/share/doc/{name}/changelog.gz", contents)
            for path, (mode, owner) in contents.items():
                self.assertTrue(path == "/" or path.startswith("/usr/"), path)
                self.assertEqual(owner, "root/root", path)
                program = path.endswith("/") or "/bin/" in path
                self.assertEqual(mode[1:], "rwxr-xr-x" if program else "rw-r--r--", path)

    def test_nothing_names_the_machine(self):
        for name, root in self.roots.items():
            self.assertEqual(facts.machine_paths(root), [], name)

    def test_programs_have_no_search_path_and_no_debug_information(self):
        for program in facts.PROGRAMS:
            path = self.roots["headwater"] / "usr/bin" / program
            self.assertNotRegex(output_of("readelf", "--dynamic", path), "RPATH|RUNPATH")
            self.assertNotRegex(output_of("readelf", "--sections", "--wide", path), r"\.debug_|\.symtab")

    def test_programs_start_where_they_were_unpacked(self):
        environment = {"PATH": f"{self.roots['headwater']}/usr/bin:{os.environ['PATH']}", "HOME": str(self.folder)}
        for program in facts.PROGRAMS:
            said = output_of(program, "--version", env=environment, cwd=self.folder)
            self.assertTrue(said.startswith(f"{program} {facts.version()} (commit "), said)
            self.assertIn("usage: " + program, output_of(program, "--help", env=environment, cwd=self.folder))
        benchmark = output_of("headwater", "bench", "prefill", "--help", env=environment, cwd=self.folder)
        self.assertIn("--tokens=VALUE", benchmark)


if __name__ == "__main__":
    facts.need("cpack", "dpkg-deb", "dpkg-shlibdeps", "readelf", "ldd")
    unittest.main(verbosity=2)
