// Asks the system to back a range of memory with huge pages.
#pragma once
#include <cstddef>
#include <cstdint>

namespace wrpo {

// Covers the whole 2 MiB pages inside [address, address + bytes); false where there are none, or where the system has
// no such advice.
bool advise_huge_pages(uintptr_t address, size_t bytes);

}  // namespace wrpo
