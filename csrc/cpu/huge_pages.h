// Large memory in few pages, where the system gives them only to those who ask.
#pragma once
#include <cstdint>

namespace wrpo {

// Asks for huge pages under the whole pages within these bytes; whether the system took note. Never an error: it is
// advice, and the values stay.
bool advise_huge_pages(void* start, int64_t bytes);

}  // namespace wrpo
