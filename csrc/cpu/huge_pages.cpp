#include "huge_pages.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace wrpo {

bool advise_huge_pages(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(2) << 20;
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage, end = (address + bytes) / kPage * kPage;
  return begin < end && madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE) == 0;
#else
  return (void)address, (void)bytes, false;
#endif
}

}  // namespace wrpo
