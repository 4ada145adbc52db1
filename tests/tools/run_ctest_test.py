"""Tests of the summary of skipped cases that tools/run_ctest.py prints."""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from run_ctest import CLOSING, skipped_cases  # noqa: E402

LOG = """\
1/3 Testing: attention_gpu_test
1/3 Test: attention_gpu_test
Output:
[  PASSED  ] 1 test.
[  SKIPPED ] 2 tests, listed below:
[  SKIPPED ] Attention.RunsOnDevice
[  SKIPPED ] Attention.MatchesReference
2/3 Test: planner_test
Output:
[  PASSED  ] 9 tests.
3/3 Test: linear_test
Output:
[  SKIPPED ] 1 test, listed below:
[  SKIPPED ] Linear.UsesAmx
"""


class RunCtestTest(unittest.TestCase):
    def test_skipped_cases_are_counted_by_program(self):
        self.assertEqual(skipped_cases(LOG), {"attention_gpu_test": 2, "linear_test": 1})

    def test_closing_lines_are_known(self):
        self.assertTrue(CLOSING.match("100% tests passed, 0 tests failed out of 3\n"))
        self.assertTrue(CLOSING.match("67% tests passed, 1 tests failed out of 3\n"))
        self.assertFalse(CLOSING.match("1/3 Test #1: planner_test ....   Passed    0.1 sec\n"))


if __name__ == "__main__":
    unittest.main()
