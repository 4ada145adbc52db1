/* C interface of the references of pattern policies (kernels/reference/policies/): double precision, on the
 * CPU, in obvious loops. For checking other implementations; a library of its own that needs no GPU. Errors,
 * structures and hw_policy_config: headwater_kernels.h.
 */
#ifndef HEADWATER_REFERENCE_H_
#define HEADWATER_REFERENCE_H_

#include "kernels/headwater_kernels.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct hw_reference hw_reference;

/* Block lists of one layer, in host memory of the hw_reference, valid until its next call. Segment (list,
 * tile) has the number list * num_tiles + tile. */
typedef struct {
  uint32_t struct_size;
  int32_t num_lists, tile_positions;
  int64_t num_tiles;
  const uint8_t* dense;   /* [num_lists * num_tiles]; nonzero: every causal block, the list is empty */
  const int64_t* offsets; /* [num_lists * num_tiles + 1] */
  const int32_t* blocks;
  int64_t sink_tokens, window_tokens; /* element mask (a_shape), or both negative */
} hw_reference_lists;

/* *reference is null where this fails. HW_UNIMPLEMENTED: the policy has no reference here ("dense", "probe").
 */
HW_EXPORT hw_status hw_reference_create(const hw_policy_config* config, hw_reference** reference);
HW_EXPORT void hw_reference_destroy(hw_reference* reference); /* null: does nothing */
/* q [tokens, query heads, head_dim], k and v [tokens, KV heads, head_dim] f32 in host memory. v may be null.
 * Layers of a prompt come in order; layer 0 begins one. Objects are independent: different threads may use
 * different ones. */
HW_EXPORT hw_status hw_reference_select(hw_reference* reference, int32_t layer, int64_t num_tokens,
                                        const float* q, const float* k, const float* v,
                                        hw_reference_lists* lists);

HW_EXPORT const char* hw_reference_last_error(void);

#ifdef __cplusplus
}
#endif

#endif /* HEADWATER_REFERENCE_H_ */
