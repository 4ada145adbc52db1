"""Tests that tools/check_layering.py finds what it is there to find."""

import sys
import unittest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from check_layering import Source, check  # noqa: E402


class LayeringTest(unittest.TestCase):
    def assert_found(self, path, text, message):
        problems = check([Source(path, text)])
        self.assertEqual(len(problems), 1, problems)
        self.assertIn(message, problems[0])

    def assert_clean(self, *sources):
        self.assertEqual(check([Source(path, text) for path, text in sources]), [])

    def test_allowed_includes_pass(self):
        self.assert_clean(
            ("kernels/ops/linear.cc", '#include "kernels/ops/linear.h"\n#include <vector>\n#include <oneapi/dnnl/dnnl.hpp>\n'),
            ("model/model.cc", '#include "base/log.h"\n#include "kernels/status.h"\n#include "absl/status/status.h"\n'),
            ("base/rpc/server.cc", '#include "base/clock.h"\n#include "headwater/v1/types.pb.h"\n#include <grpcpp/grpcpp.h>\n'),
            ("worker/main.cc", '#include "worker/worker.h"\n#include "kvtransfer/sender.h"\n#include "gloo/context.h"\n'),
            ("decode/node.cc", '#include "model/model.h"\n#include "kvtransfer/store.h"\n#include <thread>\n'))

    def test_includes_across_the_table_are_found(self):
        for path, included in (
                ("kernels/cpu/a.cc", "base/log.h"), ("kernels/a.h", "absl/status/status.h"), ("kernels/a.cu", "thread"),
                ("kernels/a.cc", "headwater/v1/kv.pb.h"), ("base/log.cc", "base/rpc/server.h"),
                ("base/log.cc", "grpcpp/grpcpp.h"),
                ("base/flags.cc", "base/config/config.h"), ("base/config/config.cc", "headwater/v1/config.pb.h"),
                ("base/config/config.cc", "grpcpp/grpcpp.h"), ("kvtransfer/a.cc", "base/config/config.h"), ("base/rpc/server.cc", "worker/worker.h"),
                ("model/model.cc", "kvtransfer/layout.h"), ("model/model.cc", "headwater/v1/types.pb.h"),
                ("kvtransfer/sender.cc", "kernels/dtype.h"), ("coordinator/main.cc", "kvtransfer/layout.h"),
                ("coordinator/planner.cc", "cuda_runtime.h"), ("coordinator/planner.cc", "worker/partition.h"),
                ("worker/main.cc", "coordinator/planner.h"), ("worker/main.cc", "decode/node.h"),
                ("decode/main.cc", "worker/partition.h"), ("decode/main.cc", "gloo/context.h"),
                ("tools/cli/main.cc", "model/config.h"), ("worker/main.cc", "tests/fakes/fake_clock.h")):
            with self.subTest(path=path, included=included):
                self.assert_found(path, f'// x\n#include "{included}"\n', f"{path}:2: ")
                self.assert_found(path, f"// x\n# include <{included}>\n", included)

    def test_deadlines_by_the_wall_clock_are_found(self):
        self.assert_found("worker/a.cc", "const auto end = absl::Now() + limit;\n", "SteadyNow()")
        self.assert_found("decode/a.cc", "changed.WaitWithDeadline(&mutex, end);\n", "SteadyNow()")
        self.assert_clean(("base/log.cc", "absl::Now();\n"), ("tests/a.cc", "absl::Now();\n"), ("bench/a.cc", "absl::Now();\n"),
                          ("worker/a.cc", "SteadyNow();\n"))

    def test_tests_may_include_what_they_test(self):
        self.assert_clean(("tests/worker/a_test.cc", '#include "coordinator/planner.h"\n#include "worker/worker.h"\n'))

    def test_links_across_the_table_are_found(self):
        base = ("base/CMakeLists.txt", "hw_library(hw_base SOURCES a.cc)\nhw_library(hw_rpc SOURCES b.cc DEPS hw_base)\n"
                "hw_library(hw_config SOURCES c.cc DEPS hw_base)\n")
        kernels = ("kernels/CMakeLists.txt", "hw_library(hw_kernels SOURCES a.cc)\n")
        self.assert_clean(base, kernels, ("model/CMakeLists.txt", "hw_library(hw_model SOURCES a.cc\n  DEPS hw_base hw_kernels)\n"))
        for path, text, target in (
                ("model/CMakeLists.txt", "hw_library(hw_model SOURCES a.cc\n PRIVATE_DEPS\n hw_rpc)", "hw_rpc of base/rpc"),
                ("model/CMakeLists.txt", "hw_library(hw_model SOURCES a.cc DEPS hw_config)", "hw_config of base/config"),
                ("coordinator/CMakeLists.txt", "hw_binary(c SOURCES m.cc DEPS hw_rpc hw_kernels)", "hw_kernels of kernels"),
                ("coordinator/CMakeLists.txt", "hw_binary(c SOURCES m.cc DEPS hw_rpc CUDA::cudart)", "CUDA::cudart"),
                ("kvtransfer/CMakeLists.txt", "hw_library(k SOURCES m.cc)\ntarget_link_libraries(k PUBLIC hw_kernels)", "hw_kernels"),
                ("worker/CMakeLists.txt", "hw_library(w SOURCES m.cc DEPS DNNL::dnnl)", "DNNL::dnnl")):
            with self.subTest(text=text):
                problems = check([Source(*base), Source(*kernels), Source(path, text)])
                self.assertEqual(len(problems), 1, problems)
                self.assertIn(target, problems[0])

    def test_a_comment_is_no_link(self):
        self.assert_clean(("kernels/CMakeLists.txt", "hw_library(k SOURCES a.cc) # DEPS absl::status\n"))

    def test_long_files_are_found(self):
        self.assert_clean(("model/a.cc", "x\n" * 400), ("tests/model/a_test.cc", "x\n" * 600), ("README.md", "x\n" * 900))
        self.assert_found("model/a.cc", "x\n" * 401, "401 lines, limit 400")
        self.assert_found("tests/model/a_test.cc", "x\n" * 601, "601 lines, limit 600")

    def test_unwanted_words_are_found(self):
        self.assert_clean(("README.md", "see framework/x, ./work/ and TODO(#12)\n"))
        self.assert_found("README.md", "a\nbuilt in /work/x\n", "README.md:2: '/work/'")
        self.assert_found("tools/a.sh", "curl https://pypi.org/simple\n", "package registry")
        self.assert_found("model/a.cc", "// TODO: later\n", "TODO(#n)")


if __name__ == "__main__":
    unittest.main()
