"""Tests that the proto lint passes the protos as they are and finds planted violations in them."""

import shutil
import subprocess
import sys
import tempfile
import unittest
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def lint(folder):
    return subprocess.run([sys.executable, str(ROOT / "tools" / "lint_protos.py"), str(folder)],
                          capture_output=True, text=True, timeout=180)


class LintProtosTest(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.proto = Path(folder.name) / "proto"
        shutil.copytree(ROOT / "proto", self.proto)

    def replace(self, old, new):
        path = self.proto / "headwater/v1/prefill.proto"
        text = path.read_text()
        self.assertIn(old, text)
        path.write_text(text.replace(old, new, 1))

    def test_the_protos_are_clean(self):
        result = lint(ROOT / "proto")
        self.assertEqual(result.returncode, 0, result.stdout + result.stderr)

    def test_a_field_in_camel_case_is_found(self):
        self.replace("string request_id = 1;", "string requestId = 1;")
        result = lint(self.proto)
        self.assertEqual(result.returncode, 1)
        self.assertIn("requestId", result.stdout)

    def test_a_response_without_its_own_type_is_found(self):
        self.replace("returns (CancelPrefillResponse)", "returns (GetPrefillResponse)")
        result = lint(self.proto)
        self.assertEqual(result.returncode, 1)
        self.assertIn("CancelPrefill", result.stdout)

    def test_a_proto_that_does_not_compile_is_found(self):
        self.replace("message CancelPrefillRequest {", "message CancelPrefillRequest")
        self.assertEqual(lint(self.proto).returncode, 1)


if __name__ == "__main__":
    if lint(ROOT / "proto").returncode == 77:
        print("SKIPPED: buf or protoc is absent")
        sys.exit(77)
    unittest.main()
