// A model's shape and workers with rates, round numbers both.
#ifndef HW_TESTS_COORDINATOR_RATES_H_
#define HW_TESTS_COORDINATOR_RATES_H_

#include "headwater/v1/worker.pb.h"

namespace headwater::testing {

// Llama-3-8B's.
inline v1::ServedModel MakeShape() {
  v1::ServedModel model;
  model.set_num_layers(32);
  model.set_num_kv_heads(8);
  model.set_head_dim(128);
  model.set_hidden_size(4096);
  model.set_num_q_heads(32);
  model.set_intermediate_size(14336);
  return model;
}

inline v1::ComputeRates MakeRates() {
  v1::ComputeRates rates;
  rates.set_linear_flops(400e12);
  rates.set_attention_flops(400e12);
  rates.set_link_bytes_per_s(100e9);
  rates.set_egress_bytes_per_s(5e9);
  rates.set_exchange_bytes_per_token(2 * 8 * 128 * 2);
  return rates;
}

}  // namespace headwater::testing

#endif  // HW_TESTS_COORDINATOR_RATES_H_
