// What the kernels of SparseSkeleton share. Rows of a query head are counted from the first that has an
// interior, keys from the first that is in one: row p is token p + sinks + local, key u is token u + sinks,
// and row p's interior is keys 0 to p.
#ifndef HW_KERNELS_CUDA_SM90_SKELETON_PARAMS_H_
#define HW_KERNELS_CUDA_SM90_SKELETON_PARAMS_H_

#include <cstdint>

#include <cuda_runtime_api.h>

namespace headwater::kernels::sm90 {

inline constexpr int kSkeletonGroupKeys = 16;   // of a sum of keys before rotation
inline constexpr int kSkeletonChunkKeys = 512;  // of a prefix of those
inline constexpr int kSkeletonLastKeys = 2048;  // of the last row, one CTA
inline constexpr int kSkeletonScanRows = 1024;  // one CTA
inline constexpr int kSkeletonFineTurns = 128;  // positions of `turns`
inline constexpr int kSkeletonDesignTile = 32;  // samples
inline constexpr int kSkeletonPairTokens = 64;  // of the published blocks
// Rows of a system beyond 2 head_dim columns: the right-hand side, and padding.
inline constexpr int kSkeletonMoreRows = 8;

struct SkeletonParams {
  const void* q;             // bf16 [num_tokens, num_q_heads, head_dim]
  const void* k;             // bf16 [num_tokens, num_kv_heads, head_dim]
  int64_t num_tokens, rows;  // rows = num_tokens - sinks - local > 0
  int32_t num_q_heads, num_kv_heads, head_dim, sinks, local;
  float scale;
  uint64_t seed;
  double ridge;
  int64_t samples, batch;  // of a head; `batch` of them at a time, a multiple of splits * kSkeletonDesignTile
  int32_t splits;          // CTAs that share a batch of a head
  int32_t gram_chunk_tiles, gram_chunks;  // of head_dim rows

  // Frequencies theta_m: of head_dim / 2.
  double* per_pi;        // theta / pi
  double* inverse_sine;  // 1 / sin(theta / 2); 0 where theta is 0
  double2* turns;        // [head_dim / 2, kSkeletonFineTurns]: (cos, sin) of position * theta
  float2* turns_f32;     // the same

  // Sums of keys before rotation, exclusive: of chunks from the first key on, of groups within their chunk.
  double* chunk_sums;  // [num_kv_heads, chunks, head_dim]
  float* group_sums;   // [num_kv_heads, chunks * groups of a chunk, head_dim]
  float4* grams;       // [gram_chunks, num_kv_heads, head_dim / 16 + 1, 4 head_dim], kernel order
  float2* last_parts;  // [num_q_heads, parts]: log2 of the largest, sum relative to it

  // By query head and token; rows from sinks + local on.
  float *mu, *sigma, *lambda, *delta, *h;  // [num_q_heads, num_tokens]
  float *s, *v;                            // [num_q_heads, num_tokens]; s by distance

  // Rows of the design: the distance's part, whose low frequencies are nearly one column, and the key's.
  double* distances;     // [num_q_heads, batch, head_dim]
  float* keys;           // [num_q_heads, batch, head_dim]
  float* target;         // [num_q_heads, batch]
  double* system;        // [num_q_heads, splits, 2 head_dim columns, 2 head_dim + kSkeletonMoreRows rows]
  double* coefficients;  // [num_q_heads, 2 head_dim]: alpha, kappa
  double* constants;     // [num_q_heads, 3]: rbar_N . alpha, khatbar_N . kappa, zeta
  double2* scan_sums;    // [num_q_heads, scan blocks]: of s and of v
  double2* spread_sums;  // the same size: of the model and of its squares, for a budget
  float* tau;            // [num_q_heads]

  // [num_q_heads, blocks of 64]
  float *s_most, *s_block, *v_block, *h_block;

  uint32_t* words;  // CudaBlockMasks of num_q_heads lists

  __host__ __device__ int32_t group() const { return num_q_heads / num_kv_heads; }
  __host__ __device__ int64_t chunks() const { return (rows + kSkeletonChunkKeys - 1) / kSkeletonChunkKeys; }
  __host__ __device__ int64_t groups() const { return chunks() * (kSkeletonChunkKeys / kSkeletonGroupKeys); }
  __host__ __device__ int64_t last_part_count() const {
    return (rows + kSkeletonLastKeys - 1) / kSkeletonLastKeys;
  }
  __host__ __device__ int64_t scan_blocks() const {
    return (rows + kSkeletonScanRows - 1) / kSkeletonScanRows;
  }
  __host__ __device__ int64_t pair_blocks() const {
    return (num_tokens + kSkeletonPairTokens - 1) / kSkeletonPairTokens;
  }
  __host__ __device__ int32_t system_rows() const { return 2 * head_dim + kSkeletonMoreRows; }
};

}  // namespace headwater::kernels::sm90

#endif  // HW_KERNELS_CUDA_SM90_SKELETON_PARAMS_H_
