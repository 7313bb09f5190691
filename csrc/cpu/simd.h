// Instruction sets: what this build holds, what this machine runs, which one is in use.
#pragma once
#include <string>
#include <vector>

#include "product.h"
#include "token_logp.h"
#include "token_statistics.h"
#include "transpose.h"

namespace wrpo {

// The loops of one instruction set.
struct Level {
  const char* name;
  decltype(generic::token_logp)* token_logp;
  decltype(generic::token_logp_delta)* token_logp_delta;
  decltype(generic::token_logp_grad)* token_logp_grad;
  decltype(generic::token_statistics)* token_statistics;
  decltype(generic::token_statistics_grad)* token_statistics_grad;
  decltype(generic::transpose)* transpose;
  decltype(generic::product)* product;
};

const Level& level_in_use();                      // the widest one at first
std::vector<std::string> available_levels();      // narrowest first
void use_level(const std::string& name);          // throws std::invalid_argument where it is not available

bool is_intel();                                  // the CPU is Intel's, which torch's library (MKL) is made for
bool has_amx_bf16();                              // the CPU has the tiles and the system saves their state

}  // namespace wrpo
