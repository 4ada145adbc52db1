// Times attention and linear layers on the CPU at SmolLM2-135M's shapes, on all OpenMP threads:
//   kernels_cpu_bench [path]
// path: portable, avx2, avx512, avx512_bf16 or amx; left out: the best. Prints the best and the median of
// some runs.

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include <omp.h>

#include "kernels/attention/attention.h"
#include "kernels/cpu/cpu_features.h"
#include "kernels/ops/layer_ops.h"
#include "kernels/ops/linear.h"

namespace headwater::kernels {
namespace {

struct Seconds {
  double best = 0;
  double median = 0;
};

Seconds Time(const std::function<void()>& run) {
  run();
  std::vector<double> seconds;
  double total = 0;
  while (seconds.size() < 5 || (total < 1.0 && seconds.size() < 200)) {
    const auto start = std::chrono::steady_clock::now();
    run();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    total += seconds.back();
  }
  std::sort(seconds.begin(), seconds.end());
  return {seconds.front(), seconds[seconds.size() / 2]};
}

std::vector<char> Random(int64_t count, DType dtype) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(random);
  std::vector<char> bytes(values.size() * SizeOf(dtype));
  Convert(values.data(), DType::kF32, bytes.data(), dtype, values.size());
  return bytes;
}

void Report(const std::string& what, const Seconds& seconds, double flop) {
  std::printf("%-44s best %9.3f ms %8.1f GFLOP/s   median %9.3f ms %8.1f GFLOP/s\n", what.c_str(),
              seconds.best * 1e3, flop / seconds.best / 1e9, seconds.median * 1e3,
              flop / seconds.median / 1e9);
}

void TimeAttention(const AttentionShape& shape, int64_t begin, int64_t num_queries, DType dtype) {
  const int64_t num_keys = begin + num_queries;
  const auto q = Random(num_queries * shape.num_q_heads * shape.head_dim, dtype);
  const auto k = Random(num_keys * shape.num_kv_heads * shape.head_dim, dtype);
  std::vector<float> out(static_cast<size_t>(num_queries * shape.num_q_heads * shape.head_dim));
  std::vector<float> lse(static_cast<size_t>(num_queries * shape.num_q_heads));
  const AttentionState state{out.data(), lse.data()};
  const int64_t first = begin / kQueryTileTokens;
  const BlockIndex index = DenseBlockIndex(first, (num_keys - 1) / kQueryTileTokens - first + 1);
  const Seconds seconds = Time([&] {
    ResetAttentionState(shape, num_queries, state);
    const Status status = SparseAttention(shape, {q.data(), dtype, begin, num_queries},
                                          {k.data(), k.data(), dtype, 0, num_keys}, index, state);
    if (!status.ok()) std::printf("%s\n", status.message().c_str());
  });
  const double pairs = (static_cast<double>(begin + 1) + static_cast<double>(num_keys)) / 2 *
                       static_cast<double>(num_queries) * shape.num_q_heads;
  Report("attention " + std::to_string(shape.num_q_heads) + "/" + std::to_string(shape.num_kv_heads) + " x " +
             std::to_string(shape.head_dim) + " " + NameOf(dtype) + " " + std::to_string(num_queries) +
             " x " + std::to_string(num_keys),
         seconds, 4.0 * shape.head_dim * pairs);
}

void TimeLinear(int64_t in, int64_t out, int64_t tokens, DType compute, DType y_dtype, bool accumulate) {
  const auto weight = Random(in * out, compute);
  LinearSpec spec;
  spec.in_features = in;
  spec.weight = {{weight.data(), compute, out}};
  spec.compute = compute;
  std::unique_ptr<Linear> linear;
  if (!Linear::Create(spec, &linear).ok()) return;
  const auto x = Random(tokens * in, compute);
  std::vector<char> y(static_cast<size_t>(tokens * out) * SizeOf(y_dtype));
  const Seconds seconds =
      Time([&] { (void)linear->Run(x.data(), tokens, y.data(), y_dtype, accumulate).ok(); });
  Report("linear " + std::to_string(in) + " to " + std::to_string(out) + " " + NameOf(compute) + " to " +
             NameOf(y_dtype) + (accumulate ? " +=" : "") + ", " + std::to_string(tokens) + " tokens",
         seconds, 2.0 * static_cast<double>(in) * static_cast<double>(out) * static_cast<double>(tokens));
}

void TimeLayerOps(int64_t tokens) {
  const auto x = Random(tokens * 3072, DType::kF32);
  const auto* values = reinterpret_cast<const float*>(x.data());
  std::vector<float> out(static_cast<size_t>(tokens * 3072));
  const auto count = static_cast<double>(tokens);
  Report("RmsNorm 576 to bf16 (10 FLOP an element)",
         Time([&] { RmsNorm(values, values, 1e-5f, tokens, 576, out.data(), DType::kBF16); }),
         10 * count * 576);
  Report("SiluMul 1536 bf16 to bf16 (10 FLOP)",
         Time([&] { SiluMul(x.data(), DType::kBF16, tokens, 1536, out.data(), DType::kBF16); }),
         10 * count * 1536);
  RopeFrequencies frequencies;
  for (int i = 0; i < 32; ++i) frequencies.inverse.push_back(std::pow(1e4, -i / 32.0));
  std::vector<float> cos(static_cast<size_t>(tokens * 32));
  std::vector<float> sin(cos.size());
  Report("RopeTable 64 (1 FLOP)",
         Time([&] { RopeTable(frequencies, 100000, tokens, cos.data(), sin.data()); }), count * 32);
  SplitQkvArgs args{values,
                    tokens,
                    9,
                    3,
                    64,
                    nullptr,
                    nullptr,
                    0,
                    cos.data(),
                    sin.data(),
                    DType::kBF16,
                    out.data(),
                    out.data() + tokens * 576,
                    out.data() + tokens * 1000};
  Report("SplitQkv 9/3 x 64 (3 FLOP)", Time([&] { SplitQkv(args); }), 3 * count * 960);
}

int Main(int argc, char** argv) {
  std::optional<cpu::ScopedCpuPath> forced;
  for (const auto path : {cpu::CpuPath::kPortable, cpu::CpuPath::kAvx2, cpu::CpuPath::kAvx512,
                          cpu::CpuPath::kAvx512Bf16, cpu::CpuPath::kAmx}) {
    if (argc > 1 && std::strcmp(argv[1], cpu::NameOf(path)) == 0) {
      if (!cpu::IsSupported(path)) {
        std::fprintf(stderr, "this CPU has no %s\n", argv[1]);
        return 1;
      }
      forced.emplace(path);
    }
  }
  if (argc > 1 && !forced.has_value()) {
    std::fprintf(stderr, "unknown path \"%s\"\n", argv[1]);
    return 1;
  }
  std::printf("path %s, %d threads\n", cpu::NameOf(cpu::ActivePath()), omp_get_max_threads());
  const AttentionShape smol{9, 3, 64, 0.125f};
  const AttentionShape llama{32, 8, 128, 0.088388f};
  const DType types[] = {DType::kBF16, DType::kF32};
  for (const DType dtype : types) {
    for (const int64_t tokens : {128, 512, 2048, 4096}) TimeAttention(smol, 0, tokens, dtype);
    TimeAttention(smol, 4095, 1, dtype);
    TimeAttention(llama, 0, 1024, dtype);
    TimeAttention(llama, 4095, 1, dtype);
  }
  const DType compute = PreferredComputeType();
  for (const int64_t tokens : {512, 1}) {
    TimeLinear(576, 960, tokens, compute, DType::kF32, false);
    TimeLinear(576, 576, tokens, compute, DType::kF32, true);
    TimeLinear(576, 3072, tokens, compute, compute, false);
    TimeLinear(1536, 576, tokens, compute, DType::kF32, true);
    TimeLinear(576, 960, tokens, DType::kF32, DType::kF32, false);
    TimeLinear(1536, 576, tokens, DType::kF32, DType::kF32, true);
  }
  TimeLinear(576, 49152, 1, compute, DType::kF32, false);
  TimeLayerOps(512);
  return 0;
}

}  // namespace
}  // namespace headwater::kernels

int main(int argc, char** argv) { return headwater::kernels::Main(argc, argv); }
